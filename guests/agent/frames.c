/* Frames on the connection, whole and waiting. A connection that ends in the middle ends this process. */
#include "agent.h"

int peer;
int in_guest;
void (*when_lost)(void);

/* The client has gone. */
void leave(void)
{
	if (when_lost)
		when_lost();
	SYS(exit_group, 0);
	__builtin_unreachable();
}

/* Wait until the client has gone: to close while it still sends could cost it what it has not yet read. */
void linger(void)
{
	static char rest[MAX_DATA];
	struct pollfd wait = {.fd = peer, .events = POLLIN};
	long n;

	while ((n = SYS(read, peer, rest, sizeof rest)) != 0) {
		if (n == -EAGAIN)
			SYS(poll, &wait, 1, -1);
		else if (n < 0 && n != -EINTR)
			break;
	}
	SYS(exit_group, 0);
	__builtin_unreachable();
}

static void send_all(const char *data, unsigned long size)
{
	struct pollfd wait = {.fd = peer, .events = POLLOUT};

	while (size) {
		long n = SYS(write, peer, data, size);

		if (n == -EINTR)
			continue;
		if (n == -EAGAIN) {
			SYS(poll, &wait, 1, -1);
			continue;
		}
		if (n <= 0)
			leave();
		data += n;
		size -= n;
	}
}

static struct greeting {
	struct header head;
	struct hello hello;
} greeting;
static int greeting_due;

/* The agent's HELLO, if it is still due, to `to`; how many bytes that is. */
u64 take_greeting(char *to)
{
	if (!greeting_due)
		return 0;
	greeting_due = 0;
	memcpy(to, &greeting, sizeof greeting);
	return sizeof greeting;
}

void send_frame(enum kind kind, int stream, const void *payload, unsigned long size)
{
	static char out[sizeof greeting + sizeof(struct header) + MAX_DATA];
	struct header head = {.length = size, .kind = kind, .stream = stream};
	u64 at = take_greeting(out);

	memcpy(out + at, &head, sizeof head);
	at += sizeof head;
	if (size)
		memcpy(out + at, payload, size);
	send_all(out, at + size);
}

/* Answer to a HELLO; if the request is there already, together with the answer to that. */
void greet(const struct hello *hello)
{
	struct pollfd more = {.fd = peer, .events = POLLIN};

	greeting.head = (struct header){.length = sizeof *hello, .kind = HELLO};
	greeting.hello = *hello;
	greeting_due = 1;
	if (SYS(poll, &more, 1, 0) != 1) {
		greeting_due = 0;
		send_all((char *)&greeting, sizeof greeting);
	}
}

/* Tell what failed, then wait for the client to go. `error` is a negative errno. */
void fail(enum stage stage, long error, const char *text)
{
	char payload[sizeof(struct error) + 4096];
	struct error head = {.stage = stage, .error = -error};
	unsigned long size = length(text);

	if (size > sizeof payload - sizeof head)
		size = sizeof payload - sizeof head;
	memcpy(payload, &head, sizeof head);
	memcpy(payload + sizeof head, text, size);
	if (when_lost)
		when_lost();
	when_lost = 0;
	send_frame(ERROR, 0, payload, sizeof head + size);
	linger();
}

static void receive_all(char *data, unsigned long size)
{
	while (size) {
		long n = SYS(read, peer, data, size);

		if (n == -EINTR)
			continue;
		if (n <= 0)
			leave();
		data += n;
		size -= n;
	}
}

void check_head(const struct header *head)
{
	unsigned long most = head->kind == EXEC ? MAX_EXEC : MAX_DATA;

	if (head->length > most || head->stream > STDERR || head->zero)
		fail(STAGE_PROTOCOL, -EPROTO, "bad header");
}

void receive_head(struct header *head)
{
	receive_all((char *)head, sizeof *head);
	check_head(head);
}

void receive_payload(struct frame *frame)
{
	if (frame->head.length > MAX_DATA)
		fail(STAGE_PROTOCOL, -EPROTO, "EXEC is a request");
	receive_all(frame->payload, frame->head.length);
	frame->payload[frame->head.length] = 0;
}

void receive(struct frame *frame)
{
	receive_head(&frame->head);
	receive_payload(frame);
}

/* The payload behind `head`, which may be larger than that of other frames. */
char *receive_exec(const struct header *head)
{
	char *payload = allocate(head->length + 1);

	if (!payload)
		fail(STAGE_SYSTEM, -ENOMEM, "memory");
	receive_all(payload, head->length);
	return payload;
}
