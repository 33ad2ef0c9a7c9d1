/*
 * A program for the guest's end of streams, for tests/linux/test_virtio_vsock.py:
 *   vsock_peer echo PORT        gives back what each connection to PORT sends, until its end
 *   vsock_peer flood PORT SIZE  sends SIZE bytes of a pattern to each connection to PORT, then closes
 *   vsock_peer sink PORT        reads from each connection to PORT to its end and answers with the sum of the bytes
 *   vsock_peer deaf PORT        accepts connections to PORT and never reads
 *   vsock_peer call PORT        connects stdin and stdout to PORT of the host; the status tells errno
 *   vsock_peer cid              prints the guest's own address
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static char buffer[1 << 16];

static int put(int fd, const char *data, size_t size)
{
	while (size) {
		ssize_t count = write(fd, data, size);
		if (count < 0)
			return -1;
		data += count;
		size -= count;
	}
	return 0;
}

static void serve(const char *what, int fd, long size)
{
	ssize_t count;
	unsigned long long sum = 0;

	if (!strcmp(what, "echo"))
		while ((count = read(fd, buffer, sizeof buffer)) > 0 && !put(fd, buffer, count))
			;
	if (!strcmp(what, "sink")) {
		while ((count = read(fd, buffer, sizeof buffer)) > 0)
			for (ssize_t n = 0; n < count; n++)
				sum += (unsigned char)buffer[n];
		put(fd, buffer, sprintf(buffer, "%llu\n", sum));
	}
	if (!strcmp(what, "flood")) {
		for (size_t n = 0; n < sizeof buffer; n++)
			buffer[n] = n % 251;
		for (; size > 0 && !put(fd, buffer, sizeof buffer); size -= sizeof buffer)
			;
	}
	if (!strcmp(what, "deaf"))
		pause();
}

static int call(unsigned port)
{
	struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	ssize_t count;

	if (connect(fd, (struct sockaddr *)&address, sizeof address))
		return errno;
	while ((count = read(0, buffer, sizeof buffer)) > 0)
		put(fd, buffer, count);
	shutdown(fd, SHUT_WR);
	while ((count = read(fd, buffer, sizeof buffer)) > 0)
		put(1, buffer, count);
	return count < 0 ? errno : 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY};
	int listener, fd;

	if (argc == 2) {
		unsigned cid = 0;
		ioctl(open("/dev/vsock", O_RDONLY), IOCTL_VM_SOCKETS_GET_LOCAL_CID, &cid);
		printf("%u\n", cid);
		return 0;
	}
	if (argc < 3)
		return 1;
	if (!strcmp(argv[1], "call"))
		return call(atoi(argv[2]));
	signal(SIGCHLD, SIG_IGN);
	address.svm_port = atoi(argv[2]);
	listener = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 128))
		return errno;
	if (fork()) /* the shell goes on when it listens */
		return 0;
	while ((fd = accept(listener, 0, 0)) >= 0) {
		if (!fork()) {
			serve(argv[1], fd, argc > 3 ? atol(argv[3]) : 0);
			return 0;
		}
		close(fd);
	}
	return errno;
}
