/*
 * The agent in the guest: runs commands and changes files for the host. PROTOCOL.md has what both have agreed on.
 *
 *   agent        listens on AF_VSOCK, port 1024, and takes connections from the host alone
 *   agent PATH   listens on a UNIX socket; for tests, on any machine
 *
 * One process listens; each connection has its own, which serves one operation and ends. Nothing is shared between them.
 */
#include <asm/signal.h>

#include "agent.h"

enum { AF_UNIX_ = 1, AF_VSOCK_ = 40, CID_HOST = 2, STREAM_CLOEXEC = 1 | 02000000 };
#define CID_ANY 0xffffffffU

struct vsock_address { /* struct sockaddr_vm; linux/vm_sockets.h wants libc's headers */
	u16 family, reserved;
	u32 port, cid;
	u8 rest[4];
};

static void complain(const char *what, long error)
{
	char line[256] = "kvmpy agent: cannot ";

	append(line, sizeof line, what);
	append(line, sizeof line, ": error ");
	append_number(line, sizeof line, -error, 1);
	append(line, sizeof line, "\n");
	print(line);
}

static void agree(void)
{
	struct frame frame;
	struct hello hello;

	receive(&frame);
	memcpy(&hello, frame.payload, sizeof hello);
	if (frame.head.kind != HELLO || frame.head.length != sizeof hello || hello.magic[0] != 'K' ||
	    hello.magic[1] != 'V' || hello.magic[2] != 'P' || hello.magic[3] != 'A')
		fail(STAGE_PROTOCOL, -EPROTO, "HELLO must come first");
	if (hello.oldest > VERSION || hello.newest < VERSION)
		fail(STAGE_PROTOCOL, -EPROTONOSUPPORT, "this agent speaks version 1");
	hello.oldest = hello.newest = VERSION;
	greet(&hello);
}

/* Serve the connection `peer`, which is all that this process is for. */
__attribute__((noreturn)) static void serve(void)
{
	static struct frame request;

	agree();
	receive_head(&request.head);
	if (request.head.kind == EXEC)
		serve_command(receive_exec(&request.head), request.head.length);
	receive_payload(&request);
	if (request.head.kind == DIAL)
		serve_port(&request);
	if (request.head.kind < READ || request.head.kind > CHANGES)
		fail(STAGE_PROTOCOL, -ENOSYS, "no such request");
	serve_files(&request);
}

static long listen_unix(const char *path)
{
	struct {
		u16 family;
		char path[108];
	} address = {.family = AF_UNIX_};
	long fd = SYS(socket, AF_UNIX_, STREAM_CLOEXEC, 0), error;

	append(address.path, sizeof address.path, path);
	if (fd < 0)
		return fd;
	error = SYS(bind, fd, &address, sizeof address);
	return error ? error : fd;
}

static long listen_vsock(void)
{
	struct vsock_address address = {.family = AF_VSOCK_, .port = PORT, .cid = CID_ANY};
	long fd = SYS(socket, AF_VSOCK_, STREAM_CLOEXEC, 0), error;

	if (fd < 0)
		return fd;
	error = SYS(bind, fd, &address, sizeof address);
	return error ? error : fd;
}

/* Say HELLO to the host, for which there may be nobody to hear it. */
static void tell_host(int listener)
{
	struct vsock_address address = {.family = AF_VSOCK_, .port = PORT, .cid = CID_HOST};
	struct hello hello = {.magic = {'K', 'V', 'P', 'A'}, .oldest = VERSION, .newest = VERSION};

	if (SYS(fork) != 0)
		return;
	SYS(close, listener);
	peer = SYS(socket, AF_VSOCK_, STREAM_CLOEXEC, 0);
	if (peer >= 0 && SYS(connect, peer, &address, sizeof address) == 0) {
		send_frame(HELLO, 0, &hello, sizeof hello);
		linger();
	}
	SYS(exit_group, 0);
}

static void set_action(int signal, void (*handler)(int))
{
	struct sigaction action = {.sa_handler = handler};

	SYS(rt_sigaction, signal, &action, 0, sizeof action.sa_mask);
}

static int run(int argc, char **argv)
{
	struct timespec tick = {.tv_nsec = 10 * 1000 * 1000};
	long listener;

	in_guest = argc < 2;
	listener = in_guest ? listen_vsock() : listen_unix(argv[1]);
	if (listener >= 0) {
		long error = SYS(listen, listener, 128);

		listener = error ? error : listener;
	}
	if (listener < 0) {
		complain("listen", listener);
		return 1;
	}
	set_action(SIGPIPE, SIG_IGN);
	set_action(SIGCHLD, SIG_IGN); /* those who serve connections need not be waited for */
	SYS(umask, 022);
	if (in_guest) {
		put("/proc/self/oom_score_adj", "-1000"); /* to lose the agent is to lose the guest */
		tell_host(listener);
	}
	for (;;) {
		struct vsock_address from = {0};
		u32 size = sizeof from;
		long pid;

		peer = SYS(accept4, listener, &from, &size, 02000000 /* SOCK_CLOEXEC */);
		if (peer < 0) { /* EMFILE and the like pass */
			SYS(nanosleep, &tick, 0);
			continue;
		}
		pid = in_guest && from.cid != CID_HOST ? -EPERM : SYS(fork);
		if (pid == 0) {
			SYS(close, listener);
			set_action(SIGCHLD, SIG_DFL);
			serve();
		}
		SYS(close, peer);
	}
}

#ifdef HOSTED
int main(int argc, char **argv)
{
	return run(argc, argv);
}
#else
__attribute__((used, noreturn)) static void start(long *stack)
{
	SYS(exit_group, run(stack[0], (char **)stack + 1));
	__builtin_unreachable();
}

ENTRY_POINT;
#endif
