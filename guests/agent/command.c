/* EXEC: starts a command, then carries its streams until it has ended. Never waits for one stream alone. */
#include <asm/siginfo.h>
#include <asm/signal.h>
#include <asm/termbits.h>
#include <asm/termios.h>
#include <linux/prctl.h>
#include <linux/resource.h>
#include <linux/wait.h>

#include "agent.h"

#ifndef CLD_EXITED
#define CLD_EXITED 1
#define CLD_DUMPED 3
#endif

static struct exec *request;
static struct limit *limits;
static char *cwd, *user, **argv, **envp;
static struct identity identity;

static long command; /* its pid, which is also its process group */
static int ended;
static u64 began;
static int master = -1;                     /* of its terminal */
static int ends[3] = {-1, -1, -1};          /* our ends of its streams */
static u64 window[3] = {WINDOW_SIZE, WINDOW_SIZE, WINDOW_SIZE}; /* what may be sent on each stream */
static char ring[WINDOW_SIZE];              /* stdin that the command has not taken */
static u64 ring_at, ring_used, taken;       /* taken: for how much the client has no WINDOW yet */
static int input_ended;
static char in[sizeof(struct header) + MAX_DATA];
static u64 in_used;
static char out[sizeof(struct header) + MAX_DATA + 256]; /* one DATA, and the few others that may come beside it */
static u64 out_at, out_used;

/* The request. */

static char *next_string(char **at, char *end)
{
	char *text = *at;

	while (*at < end && **at)
		++*at;
	if (*at >= end)
		fail(STAGE_PROTOCOL, -EPROTO, "EXEC ends early");
	++*at;
	return text;
}

static const char *variable(const char *name)
{
	for (char **at = envp; *at; at++) {
		const char *value = after(*at, name);

		if (value)
			return value;
	}
	return 0;
}

static void add_default(u32 *count, const char *name, const char *value)
{
	char *text;

	if (variable(name))
		return;
	text = allocate(4096);
	if (!text)
		fail(STAGE_SYSTEM, -ENOMEM, "memory");
	append(text, 4096, name);
	append(text, 4096, value);
	envp[(*count)++] = text;
}

static void parse(char *payload, u64 size)
{
	char *at = payload + sizeof *request, *end = payload + size;
	u32 count;
	long error;

	request = (struct exec *)payload;
	if (size < sizeof *request || request->argc < 1 || request->argc > size || request->envc > size ||
	    request->limits > MAX_LIMITS || request->umask > 0777 ||
	    request->flags > (RUN_TTY | RUN_STDIN | RUN_STDOUT | RUN_STDERR | RUN_MERGE) ||
	    size - sizeof *request < request->limits * sizeof *limits)
		fail(STAGE_PROTOCOL, -EPROTO, "bad EXEC");
	limits = (struct limit *)at;
	at += request->limits * sizeof *limits;
	cwd = next_string(&at, end);
	user = next_string(&at, end);
	argv = allocate((request->argc + 1UL) * sizeof *argv);
	envp = allocate((request->envc + 8UL) * sizeof *envp);
	if (!argv || !envp)
		fail(STAGE_SYSTEM, -ENOMEM, "memory");
	for (u32 i = 0; i < request->argc; i++)
		argv[i] = next_string(&at, end);
	for (u32 i = 0; i < request->envc; i++)
		envp[i] = next_string(&at, end);
	if (at != end)
		fail(STAGE_PROTOCOL, -EPROTO, "EXEC goes on behind its end");
	error = identify(user, &identity);
	if (error)
		fail(STAGE_USER, error, user);
	count = request->envc;
	add_default(&count, "PATH=", DEFAULT_PATH);
	add_default(&count, "HOME=", identity.home);
	add_default(&count, "USER=", identity.name);
	add_default(&count, "LOGNAME=", identity.name);
}

/* The command's own process, before the program. */

/* Tell the agent what failed, through a pipe that a successful execve closes. */
__attribute__((noreturn)) static void give_up(int report, enum stage stage, long error, u32 detail)
{
	u32 words[3] = {stage, -error, detail};

	SYS(write, report, words, sizeof words);
	SYS(exit_group, 127);
	__builtin_unreachable();
}

/* Only returns when the program cannot be executed: a negative errno, and in `*stage` whose fault it is. */
static long execute(enum stage *stage)
{
	const char *name = argv[0], *dir = variable("PATH=");
	char path[4096 + 256];
	int denied = 0;
	long error;

	*stage = STAGE_EXEC;
	if (contains(name, "/")) {
		error = SYS(execve, name, argv, envp);
		if (error == -ENOENT && SYS(access, name, 0) == 0)
			*stage = STAGE_LOADER;
		return error;
	}
	while (*name && *dir) {
		u64 n = 0;

		while (*dir && *dir != ':' && n < 4000)
			path[n++] = *dir++;
		dir += *dir == ':';
		path[n] = 0;
		append(path, sizeof path, n ? "/" : "./");
		append(path, sizeof path, name);
		error = SYS(execve, path, argv, envp);
		if (error == -EACCES) {
			denied = 1;
		} else if (error == -ENOENT && SYS(access, path, 0) == 0) {
			*stage = STAGE_LOADER;
			return error;
		} else if (error != -ENOENT && error != -ENOTDIR && error != -ENAMETOOLONG && error != -ELOOP) {
			return error;
		}
	}
	return denied ? -EACCES : -ENOENT;
}

static void become(const int theirs[3], int report)
{
	struct sigaction action = {.sa_handler = SIG_DFL};
	u64 none = 0;
	enum stage stage;
	long error;

	SYS(setsid);
	if (in_guest)
		put("/proc/self/oom_score_adj", "0");
	for (int i = 0; i < 3; i++)
		SYS(dup2, theirs[i], i);
	for (int i = 0; i < 3; i++) /* these may have been among 0 to 2 only if the agent had none open */
		if (theirs[i] > 2)
			SYS(close, theirs[i]);
	if (request->flags & RUN_TTY)
		SYS(ioctl, 0, TIOCSCTTY, 1);
	for (int signal = 1; signal < 32; signal++)
		SYS(rt_sigaction, signal, &action, 0, sizeof action.sa_mask);
	SYS(umask, request->umask);
	for (u32 i = 0; i < request->limits; i++) {
		error = SYS(prlimit64, 0, limits[i].resource, &limits[i].soft, 0);
		if (error)
			give_up(report, STAGE_LIMIT, error, limits[i].resource);
	}
	if (*user) {
		error = SYS(setgroups, identity.count, identity.groups);
		if (!error)
			error = SYS(setgid, identity.gid);
		if (!error)
			error = SYS(setuid, identity.uid);
		if (error)
			give_up(report, STAGE_USER, error, 0);
	}
	error = SYS(chdir, *cwd ? cwd : "/");
	if (error)
		give_up(report, STAGE_CWD, error, 0);
	SYS(prctl, PR_SET_PDEATHSIG, SIGKILL);
	SYS(rt_sigprocmask, SIG_SETMASK, &none, 0, sizeof none);
	error = execute(&stage);
	give_up(report, stage, error, 0);
}

/* Starting it. */

static void need(long result, const char *what)
{
	if (result < 0)
		fail(STAGE_SYSTEM, result, what);
}

static void nonblocking(int fd)
{
	long flags = SYS(fcntl, fd, F_GETFL);

	SYS(fcntl, fd, F_SETFL, flags | O_NONBLOCK);
}

/* Descriptors for the command at 3 and above, so that dup2 to 0 to 2 loses none. */
static int above(long fd)
{
	long copy = fd;

	need(fd, "descriptors");
	if (fd < 3) {
		copy = SYS(fcntl, fd, 1030 /* F_DUPFD_CLOEXEC */, 3);
		need(copy, "descriptors");
		SYS(close, fd);
	}
	return copy;
}

static int null_device(void)
{
	return above(SYS(open, "/dev/null", O_RDWR | O_CLOEXEC));
}

/* A pipe; the command's end is returned, ours is in ends[stream]. */
static int make_pipe(int stream)
{
	int both[2];

	need(SYS(pipe2, both, O_CLOEXEC), "pipes");
	both[0] = above(both[0]);
	both[1] = above(both[1]);
	ends[stream] = both[stream == STDIN];
	nonblocking(ends[stream]);
	return both[stream != STDIN];
}

static int make_terminal(void)
{
	struct winsize size = {.ws_row = request->rows, .ws_col = request->columns};
	char path[32] = "/dev/pts/";
	int unlock = 0, terminal;
	u32 index = 0;

	master = above(SYS(open, "/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC));
	need(SYS(ioctl, master, TIOCSPTLCK, &unlock), "terminals");
	need(SYS(ioctl, master, TIOCGPTN, &index), "terminals");
	append_number(path, sizeof path, index, 1);
	terminal = above(SYS(open, path, O_RDWR | O_NOCTTY | O_CLOEXEC));
	SYS(ioctl, master, TIOCSWINSZ, &size);
	if (*user)
		SYS(fchown, terminal, identity.uid, UNCHANGED);
	nonblocking(master);
	ends[STDOUT] = master;
	ends[STDIN] = above(SYS(fcntl, master, 1030 /* F_DUPFD_CLOEXEC */, 3));
	return terminal;
}

static void begin(void)
{
	int theirs[3], report[2];
	u32 words[3];
	long n;

	if (request->flags & RUN_TTY) {
		theirs[0] = theirs[1] = theirs[2] = make_terminal();
	} else {
		theirs[STDIN] = request->flags & RUN_STDIN ? make_pipe(STDIN) : null_device();
		theirs[STDOUT] = request->flags & RUN_STDOUT ? make_pipe(STDOUT) : null_device();
		if (request->flags & RUN_MERGE)
			theirs[STDERR] = theirs[STDOUT];
		else
			theirs[STDERR] = request->flags & RUN_STDERR ? make_pipe(STDERR) : null_device();
	}
	need(SYS(pipe2, report, O_CLOEXEC), "pipes");
	report[0] = above(report[0]);
	report[1] = above(report[1]);
	began = now();
	command = SYS(fork);
	if (command == 0)
		become(theirs, report[1]);
	need(command, "processes");
	SYS(close, report[1]);
	for (int i = 0; i < 3; i++)
		SYS(close, theirs[i]);
	while ((n = SYS(read, report[0], words, sizeof words)) == -EINTR)
		;
	SYS(close, report[0]);
	if (n == sizeof words) {
		char text[16] = "";

		append_number(text, sizeof text, words[2], 1);
		fail(words[0], -(long)words[1],
		     words[0] == STAGE_LIMIT ? text :
		     words[0] == STAGE_USER ? user :
		     words[0] == STAGE_CWD ? cwd : argv[0]);
	}
}

/* Its streams. */

/* Nobody waits for the command any more: it ends, with all that it has started. */
static void lost(void)
{
	if (!ended)
		kill_tree();
}

__attribute__((noreturn)) static void broken(const char *text)
{
	lost();
	fail(STAGE_PROTOCOL, -EPROTO, text);
}

/* There is always room: one DATA is in `out` at most, and what else may come is counted. */
static void queue(enum kind kind, int stream, const void *payload, u64 size)
{
	struct header head = {.length = size, .kind = kind, .stream = stream};

	memcpy(out + out_used, &head, sizeof head);
	if (size)
		memcpy(out + out_used + sizeof head, payload, size);
	out_used += sizeof head + size;
}

static void flush(void)
{
	while (out_at < out_used) {
		long n = SYS(write, peer, out + out_at, out_used - out_at);

		if (n == -EAGAIN)
			return;
		if (n < 0 && n != -EINTR)
			leave();
		out_at += n > 0 ? n : 0;
	}
	out_at = out_used = 0;
}

static void close_end(int stream)
{
	SYS(close, ends[stream]);
	ends[stream] = -1;
	if (stream != STDIN || !input_ended)
		queue(EOF, stream, 0, 0);
}

/* One read of stdout or stderr, straight into its frame; `out` is empty. */
static void carry(int stream)
{
	u64 most = window[stream] < MAX_DATA ? window[stream] : MAX_DATA;
	long n = SYS(read, ends[stream], out + sizeof(struct header), most);
	struct header head = {.length = n, .kind = DATA, .stream = stream};

	if (n == -EAGAIN || n == -EINTR)
		return;
	if (n <= 0) { /* EIO: nobody has the terminal open any more */
		close_end(stream);
		return;
	}
	memcpy(out, &head, sizeof head);
	out_used = sizeof head + n;
	window[stream] -= n;
}

/* Give the command of its stdin what it takes; `gone`: nobody will read it. */
static void feed(int gone)
{
	while (ring_used && !gone) {
		u64 part = ring_at + ring_used > sizeof ring ? sizeof ring - ring_at : ring_used;
		long n = SYS(write, ends[STDIN], ring + ring_at, part);

		if (n == -EINTR)
			continue;
		if (n == -EAGAIN)
			return;
		if (n <= 0) {
			gone = 1;
			break;
		}
		ring_at = (ring_at + n) % sizeof ring;
		ring_used -= n;
		taken += n;
	}
	if (input_ended && !gone && master >= 0) {
		struct termios settings;
		char end = 4;

		if (SYS(ioctl, master, TCGETS, &settings) == 0)
			end = settings.c_cc[VEOF];
		if (SYS(write, ends[STDIN], &end, 1) == -EAGAIN)
			return;
	}
	if (input_ended || gone) {
		ring_used = 0;
		close_end(STDIN);
	}
}

static void take_input(const char *data, u64 size)
{
	if (input_ended || !(request->flags & (RUN_STDIN | RUN_TTY)) || size > window[STDIN])
		broken("DATA beyond the window or the end");
	window[STDIN] -= size;
	if (ends[STDIN] < 0)
		return;
	while (size) {
		u64 to = (ring_at + ring_used) % sizeof ring;
		u64 part = size < sizeof ring - to ? size : sizeof ring - to;

		memcpy(ring + to, data, part);
		ring_used += part;
		data += part;
		size -= part;
	}
}

static void send_signal(int whom, u32 signal)
{
	if (whom == TO_ALL && signal == SIGKILL)
		kill_tree();
	else if (whom == TO_ALL || (whom == TO_GROUP && ended)) /* its number may be that of another one by now */
		signal_tree(signal, whom == TO_ALL ? 0 : command);
	else if (!ended)
		SYS(kill, whom == TO_GROUP ? -command : command, signal);
}

static void act(const struct header *head, const char *payload)
{
	u32 value = 0;
	u16 cells[2];

	if (head->length == sizeof value)
		memcpy(&value, payload, sizeof value);
	if (head->kind == DATA && head->stream == STDIN) {
		take_input(payload, head->length);
	} else if (head->kind == EOF && head->stream == STDIN && !head->length && !input_ended) {
		input_ended = 1;
	} else if (head->kind == WINDOW && head->stream != STDIN && head->length == sizeof value &&
		   window[head->stream] + value <= 0xffffffffUL) {
		window[head->stream] += value;
	} else if (head->kind == SIGNAL && head->length == sizeof value) {
		send_signal(head->stream, value);
	} else if (head->kind == RESIZE && head->length == sizeof cells && master >= 0) {
		struct winsize size = {0};

		memcpy(cells, payload, sizeof cells);
		size.ws_row = cells[0];
		size.ws_col = cells[1];
		SYS(ioctl, master, TIOCSWINSZ, &size);
	} else {
		broken("not allowed while a command runs");
	}
}

/* Read what the client sends, and act on each whole frame of it. */
static void listen(void)
{
	long n = SYS(read, peer, in + in_used, sizeof in - in_used);
	u64 at = 0;

	if (n == -EAGAIN || n == -EINTR)
		return;
	if (n <= 0)
		leave();
	in_used += n;
	while (in_used - at >= sizeof(struct header)) {
		struct header head;

		memcpy(&head, in + at, sizeof head);
		if (head.length > MAX_DATA || head.stream > STDERR || head.zero)
			broken("bad header");
		if (in_used - at - sizeof head < head.length)
			break;
		act(&head, in + at + sizeof head);
		at += sizeof head + head.length;
	}
	in_used -= at;
	if (at)
		move(in, in + at, in_used);
}

static void tell_end(const siginfo_t *info, const struct rusage *usage)
{
	struct exit how = {
		.status = info->si_code == CLD_EXITED ? info->si_status & 0xff : 0,
		.signal = info->si_code == CLD_EXITED ? 0 : info->si_status,
		.core = info->si_code == CLD_DUMPED,
		.elapsed = now() - began,
		.user = usage->ru_utime.tv_sec * 1000000UL + usage->ru_utime.tv_usec,
		.system = usage->ru_stime.tv_sec * 1000000UL + usage->ru_stime.tv_usec,
		.maxrss = usage->ru_maxrss,
	};

	ended = 1;
	queue(EXIT, 0, &how, sizeof how);
}

/* Reap the command, and what it has left without a parent. */
static void reap(int signals)
{
	char told[128]; /* struct signalfd_siginfo */

	SYS(read, signals, told, sizeof told);
	for (;;) {
		struct rusage usage;
		siginfo_t info = {0};

		if (SYS(waitid, P_ALL, 0, &info, WEXITED | WNOHANG, &usage) || !info.si_pid)
			return;
		if (info.si_pid == command)
			tell_end(&info, &usage);
	}
}

/* Until the client has gone. */
__attribute__((noreturn)) static void carry_all(int signals)
{
	int turn = 0;

	for (;;) {
		struct pollfd waits[5] = {
			{.fd = peer, .events = POLLIN | (out_used ? POLLOUT : 0)},
			{.fd = signals, .events = POLLIN},
			/* without events, to hear that nobody reads it */
			{.fd = ends[STDIN], .events = ring_used || input_ended ? POLLOUT : 0},
			{.fd = window[STDOUT] && !out_used ? ends[STDOUT] : -1, .events = POLLIN},
			{.fd = window[STDERR] && !out_used ? ends[STDERR] : -1, .events = POLLIN},
		};

		SYS(poll, waits, 5, -1);
		if (waits[0].revents & (POLLIN | POLLHUP | POLLERR))
			listen();
		if (waits[1].revents)
			reap(signals);
		if (ends[STDIN] >= 0 && waits[2].revents)
			feed(waits[2].revents & (POLLERR | POLLHUP));
		for (int i = 0; i < 2; i++) { /* in turn, so that neither keeps the other waiting */
			int stream = STDOUT + ((turn + i) & 1);

			if (waits[2 + stream].revents == POLLHUP) /* and nothing is in it any more */
				close_end(stream);
			else if (waits[2 + stream].revents && !out_used)
				carry(stream);
		}
		turn ^= 1;
		flush();
		if (!out_used && taken >= WINDOW_SIZE / 2) { /* else there is a POLLOUT to come, and then this */
			u32 more = taken;

			queue(WINDOW, STDIN, &more, sizeof more);
			window[STDIN] += taken;
			taken = 0;
			flush();
		}
	}
}

/* `payload` is that of EXEC, followed by a zero. */
void serve_command(char *payload, u64 size)
{
	u64 child = 1UL << (SIGCHLD - 1);
	u32 pid;
	int signals;

	parse(payload, size);
	keep_descendants();
	SYS(rt_sigprocmask, SIG_BLOCK, &child, 0, sizeof child);
	signals = SYS(signalfd4, -1, &child, sizeof child, O_CLOEXEC | O_NONBLOCK);
	need(signals, "descriptors");
	begin();
	when_lost = lost;
	pid = command;
	out_used = take_greeting(out);
	queue(STARTED, 0, &pid, sizeof pid);
	nonblocking(peer);
	flush();
	carry_all(signals);
}
