/* DIAL: connects to a port of this machine, then carries bytes both ways as they are. */
#include "agent.h"

enum { INET = 2, INET6 = 10, STREAM_CLOEXEC = 1 | 02000000, NO_MORE_WRITES = 1 };

/* Bytes from one socket to the other. */
struct way {
	int from, to;
	int ended, told; /* `from` has no more; `to` knows that */
	u32 at, used;
	char data[MAX_DATA];
};

static struct way ways[2];

/* A connection to `port` (network order) of the loopback interface, or a negative errno. */
static long connect_port(u16 port)
{
	struct { /* struct sockaddr_in */
		u16 family, port;
		u8 address[4];
		u8 zero[8];
	} four = {.family = INET, .port = port, .address = {127, 0, 0, 1}};
	struct { /* struct sockaddr_in6 */
		u16 family, port;
		u32 flow;
		u8 address[16];
		u32 scope;
	} six = {.family = INET6, .port = port, .address[15] = 1};
	long fd = SYS(socket, INET, STREAM_CLOEXEC, 0), error, second;

	if (fd < 0)
		return fd;
	error = SYS(connect, fd, &four, sizeof four);
	if (!error)
		return fd;
	SYS(close, fd);
	fd = SYS(socket, INET6, STREAM_CLOEXEC, 0); /* who listens at ::1 alone */
	if (fd < 0)
		return error;
	second = SYS(connect, fd, &six, sizeof six);
	if (!second)
		return fd;
	SYS(close, fd);
	return error;
}

static void take(struct way *way)
{
	long n = SYS(read, way->from, way->data, sizeof way->data);

	if (n == -EAGAIN || n == -EINTR)
		return;
	way->ended = n <= 0;
	way->at = 0;
	way->used = n > 0 ? n : 0;
}

static void give(struct way *way)
{
	while (way->used) {
		long n = SYS(write, way->to, way->data + way->at, way->used);

		if (n == -EAGAIN)
			return;
		if (n == -EINTR)
			continue;
		if (n <= 0) { /* nobody wants it; what comes the other way may still be wanted */
			way->used = 0;
			way->ended = 1;
			break;
		}
		way->at += n;
		way->used -= n;
	}
	if (way->ended && !way->told) {
		way->told = 1;
		SYS(shutdown, way->to, NO_MORE_WRITES);
	}
}

static void nonblocking(int fd)
{
	long flags = SYS(fcntl, fd, F_GETFL);

	SYS(fcntl, fd, F_SETFL, flags | O_NONBLOCK);
}

void serve_port(struct frame *request)
{
	char text[16] = "";
	u32 port;
	long fd;

	if (request->head.length != sizeof port)
		fail(STAGE_PROTOCOL, -EPROTO, "bad DIAL");
	memcpy(&port, request->payload, sizeof port);
	append_number(text, sizeof text, port, 1);
	if (!port || port > 0xffff)
		fail(STAGE_PORT, -EINVAL, text);
	fd = connect_port(port >> 8 | (port & 0xff) << 8);
	if (fd < 0)
		fail(STAGE_PORT, fd, text);
	send_frame(END, 0, 0, 0);
	nonblocking(fd);
	nonblocking(peer);
	ways[0].from = ways[1].to = peer;
	ways[0].to = ways[1].from = fd;
	while (!ways[0].told || !ways[1].told) {
		struct pollfd waits[4];

		for (int i = 0; i < 2; i++) {
			struct way *way = &ways[i];
			/* Only what is waited for: the end of a socket that nobody asks would wake us for ever. */
			int reads = !way->ended && !way->used;

			waits[2 * i] = (struct pollfd){.fd = reads ? way->from : -1, .events = POLLIN};
			waits[2 * i + 1] = (struct pollfd){.fd = way->used ? way->to : -1, .events = POLLOUT};
		}
		SYS(poll, waits, 4, -1);
		for (int i = 0; i < 2; i++) {
			if (waits[2 * i].revents)
				take(&ways[i]);
			give(&ways[i]);
		}
	}
	SYS(exit_group, 0);
	__builtin_unreachable();
}
