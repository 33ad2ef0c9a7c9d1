/*
 * The first process of kvmpy's built-in initramfs: prepares the guest, runs one command or a shell, powers off.
 *
 * It is free-standing (no libc), so that it is a few KiB and builds with gcc and the kernel's headers alone. It asks
 * for nothing newer than Linux 3.8 (finit_module). Build: `make -C guests init`.
 *
 * What the initramfs tells it (kvmpy/boot/initramfs.py writes these):
 *   /etc/kvmpy/modules  kernel modules, one path a line, in the order to load them; uncompressed
 *   /etc/kvmpy/exec     NUL-terminated words of the command to run; without this file there is a shell on the console
 *   /usr/lib/kvmpy/agent  serves the host while all this goes on, if it is wanted (PROTOCOL.md)
 *   /etc/kvmpy/volumes  folders of the host to mount, in the root that the rest has: for each three NUL-terminated
 *                       words, the tag of the file system device, the folder here, which is made, and "rw" or "ro"
 * What the kernel's command line tells it, through the environment that the kernel makes of unknown NAME=VALUE words:
 *   TERM, LINES, COLUMNS  the user's terminal, for the interactive shell
 * and, as any initramfs is told (Documentation/admin-guide/kernel-parameters.rst), in /proc/cmdline:
 *   root=/dev/NAME, root=LABEL=NAME or root=UUID=ID  the disk to go on from (by label and id: ext2, ext3, ext4 only);
 *                         with rootfstype=, rw, and init=. There is a shell when that is not possible.
 *   kvmpy.ip=ADDRESS::GATEWAY:MASK::eth0:off:NAMESERVER
 *                         set up the first network card and /etc/resolv.conf; as ip= in Linux's admin-guide/nfs/nfsroot.rst,
 *                         which Linux, where it obeys that, does before there is a driver
 *   kvmpy.root=TAG        the folder of the host with this tag becomes the root, with a tmpfs above it that takes all
 *                         writes; the machine ends when that cannot be done
 *   kvmpy.root=disk:PARTITION:TYPE
 *                         as much for the file system TYPE on the disk whose serial is kvmpy-root (0: on the whole disk).
 *                         What was written, and what is below it, are the folders of this process's descriptors 100, 101
 *   kvmpy.agent=1         start the agent, in the root that the rest is to have
 *   kvmpy.agent=only      start it, and run neither command, shell nor the disk's init: power off when it ends
 *
 * What it tells the virtual machine monitor:
 *   port 0x80, byte 0x41                 userspace reached (Cloud Hypervisor's debug port code)
 *   physical 0xc0000000, byte 123        userspace reached (Firecracker's boot timer); skipped without /dev/mem
 *   port 0x502, one byte (PORT_EXIT)     exit status of the command in /etc/kvmpy/exec: 0-255; 128+n when signal n
 *                                        killed it; 126 and 127 as a shell says "cannot execute" and "not found".
 *                                        At most once. All output has left the UART and the disks are synced by then,
 *                                        so the monitor may stop the machine at once; else the guest powers off next.
 *   console line "\nkvmpy-exit: STATUS\n" the same, only when the kernel refuses port access (lockdown, no ioperm);
 *                                        the last bytes on the console. STATUS is decimal.
 * A machine that powers off without either had no command, or the command itself called poweroff or reboot.
 *
 * The command has /dev/null as its input and one pipe as both outputs, which is copied to the console byte for byte
 * (no "\n" to "\r\n"). The kernel's own messages are kept off the console meanwhile, except emergencies and panics.
 */
#include <asm/ioctls.h>
#include <asm/poll.h>
#include <asm/signal.h>
#include <asm/stat.h>
#include <asm/termbits.h>
#include <asm/termios.h>
#include <linux/mount.h>
#include <linux/reboot.h>
#include <linux/time.h>
#include <linux/utsname.h>
#include <linux/wait.h>

#include "free.h"

enum {
	PORT_DELAY = 0x80,
	USER_START = 0x41,
	PORT_EXIT = 0x502,
	BOOT_TIMER_MAGIC = 123,
	NOT_EXECUTABLE = 126,
	NOT_FOUND = 127,
	PAGE = 4096,
	MAX_WORDS = 64, /* of a line typed at the built-in prompt */
};
#define BOOT_TIMER 0xc0000000UL

static void outb(unsigned char value, unsigned short port)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

/* "kvmpy init: WHAT NAME: WHY", for the two arguments that most messages have. */
static void complain(const char *what, const char *name, long error)
{
	char line[512] = "kvmpy init: ";

	append(line, 400, what);
	append(line, 400, name);
	if (error == -ENOENT) {
		append(line, sizeof line, ": not found");
	} else if (error == -EACCES || error == -EISDIR) {
		append(line, sizeof line, ": not executable");
	} else if (error == -ENOEXEC) {
		append(line, sizeof line, ": wrong format");
	} else if (error) {
		append(line, sizeof line, ": error ");
		append_number(line, sizeof line, -error, 1);
	}
	append(line, sizeof line, "\n");
	print(line);
}

/* The start of a file whose size is not known before it is read (procfs, sysfs), as a string. */
static char *peek(const char *path, char *buf, unsigned long size)
{
	long fd = SYS(open, path, O_RDONLY | O_CLOEXEC);
	unsigned long at = 0;
	long n;

	while (fd >= 0 && at + 1 < size && (n = SYS(read, fd, buf + at, size - 1 - at)) > 0)
		at += n;
	buf[at] = 0;
	if (fd >= 0)
		SYS(close, fd);
	return buf;
}

/* Call `each` with the name of every entry of a folder but the dot ones; 0, or a negative errno. */
static long list(const char *path, void (*each)(const char *folder, const char *name))
{
	long fd = SYS(open, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	char buf[2048] __attribute__((aligned(8)));
	long n;

	if (fd < 0)
		return fd;
	while ((n = SYS(getdents64, fd, buf, sizeof buf)) > 0) {
		for (long at = 0; at < n;) {
			/* struct linux_dirent64: ino, off (8 bytes each), reclen (2), type (1), name */
			unsigned short reclen = *(unsigned short *)(buf + at + 16);
			const char *name = buf + at + 19;

			if (name[0] != '.')
				each(path, name);
			at += reclen;
		}
	}
	SYS(close, fd);
	return n;
}

/* The kernel's command line. */

static char cmdline[PAGE];

/* What follows `name` in the last word of the kernel's command line that begins with it, up to the word's end; NULL. */
static const char *option(const char *name, char *value, unsigned long size)
{
	const char *found = 0;

	for (const char *at = cmdline; *at; at++) {
		const char *rest = at == cmdline || at[-1] == ' ' ? after(at, name) : 0;
		unsigned long n = 0;

		if (!rest)
			continue;
		while (rest[n] && rest[n] != ' ' && rest[n] != '\n' && n + 1 < size) {
			value[n] = rest[n];
			n++;
		}
		value[n] = 0;
		found = value;
	}
	return found;
}

/* The machine. */

static void mount_all(void)
{
	static const struct {
		const char *path, *type, *options;
		unsigned long flags;
	} mounts[] = {
		{"/proc", "proc", 0, MS_NOSUID | MS_NODEV | MS_NOEXEC},
		{"/sys", "sysfs", 0, MS_NOSUID | MS_NODEV | MS_NOEXEC},
		{"/dev", "devtmpfs", "mode=0755", MS_NOSUID},
		{"/dev/pts", "devpts", "mode=0620,ptmxmode=0666", MS_NOSUID | MS_NOEXEC},
	};
	static const struct {
		const char *path, *target;
	} links[] = {
		{"/dev/fd", "/proc/self/fd"},
		{"/dev/stdin", "fd/0"},
		{"/dev/stdout", "fd/1"},
		{"/dev/stderr", "fd/2"},
	};

	/* /run and /tmp stay on the root, which is in memory too: a mount would hide files that the user put there. */
	for (unsigned i = 0; i < sizeof mounts / sizeof mounts[0]; i++) {
		SYS(mkdir, mounts[i].path, 0755);
		SYS(mount, mounts[i].type, mounts[i].path, mounts[i].type, mounts[i].flags, mounts[i].options);
	}
	SYS(chmod, "/", 0755); /* in a kernel with tmpfs, all may write to the root of an initramfs */
	SYS(mkdir, "/dev/shm", 0);
	SYS(chmod, "/dev/shm", 01777);
	for (unsigned i = 0; i < sizeof links / sizeof links[0]; i++)
		SYS(symlink, links[i].target, links[i].path);
}

/* One device node from /sys/dev/{char,block}/MAJOR:MINOR. */
static void make_node(const char *folder, const char *name)
{
	char path[128] = "", uevent[512], node[128] = "/dev/";
	const char *line, *digits = name;
	unsigned long major, minor;

	append(path, sizeof path, folder);
	append(path, sizeof path, "/");
	append(path, sizeof path, name);
	append(path, sizeof path, "/uevent");
	for (line = peek(path, uevent, sizeof uevent); *line && !after(line, "DEVNAME="); line++)
		;
	if (!*line)
		return;
	major = number(&digits, 10);
	digits++; /* the colon */
	minor = number(&digits, 10);
	for (line += 8; *line && *line != '\n'; line++) {
		char next[2] = {*line, 0};

		if (*line == '/')
			SYS(mkdir, node, 0755);
		append(node, sizeof node, next);
	}
	/* The kernel's encoding of a device number (new_encode_dev); existing nodes stay as they are. */
	SYS(mknod, node, 0600 | (contains(folder, "block") ? 0060000 : 0020000),
	    (minor & 0xff) | major << 8 | (minor & ~0xffUL) << 12);
}

/* Without devtmpfs the nodes of /dev are those of the initramfs; add what the drivers have registered. */
static void make_nodes(void)
{
	char mounts[PAGE];

	if (contains(peek("/proc/mounts", mounts, sizeof mounts), " /dev devtmpfs "))
		return;
	list("/sys/dev/char", make_node);
	list("/sys/dev/block", make_node);
}

static void load_modules(void)
{
	unsigned long size;
	char *path = slurp("/etc/kvmpy/modules", &size);

	while (path && *path) {
		char *end = path;
		long fd, error;

		while (*end && *end != '\n')
			end++;
		if (*end)
			*end++ = 0;
		fd = SYS(open, path, O_RDONLY | O_CLOEXEC);
		error = fd < 0 ? fd : SYS(finit_module, fd, "", 0);
		/* ENODEV: an optional driver, such as a crypto instruction that this CPU lacks. */
		if (error < 0 && error != -EEXIST && error != -ENODEV)
			complain("cannot load module ", path, error);
		if (fd >= 0)
			SYS(close, fd);
		path = end;
	}
}

static char *volumes; /* what /etc/kvmpy/volumes has */
static unsigned long volumes_size;

/* Mount them; 0, or the negative errno of the last one that could not be. */
static long mount_volumes(void)
{
	long failed = 0;

	for (char *word = volumes, *end = volumes + volumes_size; volumes && word < end;) {
		char *tag = word, *folder = tag + length(tag) + 1, *how = folder < end ? folder + length(folder) + 1 : end;
		unsigned long flags;
		long error;

		if (how >= end) /* the list has been cut off */
			break;
		flags = MS_NODEV | (same(how, "ro") ? MS_RDONLY : 0);
		for (char *at = folder + 1; *at; at++) {
			if (*at != '/')
				continue;
			*at = 0;
			SYS(mkdir, folder, 0755);
			*at = '/';
		}
		SYS(mkdir, folder, 0755);
		error = SYS(mount, tag, folder, "virtiofs", flags, 0);
		if (error)
			complain("cannot mount the volume ", folder, failed = error);
		word = how + length(how) + 1;
	}
	return failed;
}

static void name_host(void)
{
	struct new_utsname names;

	if (SYS(uname, &names) == 0 && same(names.nodename, "(none)"))
		SYS(sethostname, "kvmpy", 5);
}

static void loopback_up(void)
{
	long fd = SYS(socket, 2 /* AF_INET */, 2 /* SOCK_DGRAM */, 0);
	struct { /* struct ifreq; linux/if.h wants libc's headers */
		char name[16];
		short flags;
		char rest[22];
	} request = {.name = "lo", .flags = 1 /* IFF_UP */};

	if (fd < 0)
		return;
	SYS(ioctl, fd, 0x8914 /* SIOCSIFFLAGS */, &request);
	SYS(close, fd);
}

/* The number of the next part of an address, or of a whole one in network order, from text that it is moved behind. */
static unsigned address_in(const char **text)
{
	unsigned address = 0;

	for (int i = 0; i < 32; i += 8) {
		address |= (number(text, 10) & 0xff) << i;
		*text += i < 24 && **text == '.';
	}
	return address;
}

/* Set up eth0 as kvmpy.ip= says, if it does. */
static void network_up(void)
{
	enum { SET_FLAGS = 0x8914, SET_ADDRESS = 0x8916, SET_MASK = 0x891c, ADD_ROUTE = 0x890b }; /* linux/sockios.h */
	struct address { /* struct sockaddr_in */
		unsigned short family, port;
		unsigned address;
		char zero[8];
	};
	struct { /* struct ifreq */
		char name[16];
		union {
			struct address address;
			short flags;
			char room[24];
		};
	} request = {.name = "eth0"};
	struct { /* struct rtentry */
		unsigned long pad1;
		struct address target, gateway, mask;
		unsigned short flags;
		short pad2;
		unsigned long pad3[2];
		short metric;
		char *device;
		unsigned long mtu, window;
		unsigned short timeout;
	} route = {.target.family = 2, .gateway.family = 2, .mask.family = 2, .flags = 3 /* RTF_UP | RTF_GATEWAY */};
	char words[128], resolver[80] = "nameserver ";
	const char *at = option("kvmpy.ip=", words, sizeof words);
	long fd = at ? SYS(socket, 2 /* AF_INET */, 2 /* SOCK_DGRAM */, 0) : -1, error;

	if (fd < 0)
		return;
	request.address.family = 2;
	request.address.address = address_in(&at);
	at += after(at, "::") ? 2 : 0;
	route.gateway.address = address_in(&at);
	at += *at == ':';
	error = SYS(ioctl, fd, SET_ADDRESS, &request);
	request.address.address = address_in(&at);
	error = error ? error : SYS(ioctl, fd, SET_MASK, &request);
	request.flags = 1 /* IFF_UP */;
	error = error ? error : SYS(ioctl, fd, SET_FLAGS, &request);
	error = error ? error : SYS(ioctl, fd, ADD_ROUTE, &route);
	if (error)
		complain("cannot set up the network card ", request.name, error);
	SYS(close, fd);
	at = after(at, "::eth0:off:");
	if (!at)
		return;
	append(resolver, sizeof resolver, at);
	append(resolver, sizeof resolver, "\n");
	SYS(unlink, "/etc/resolv.conf"); /* it may be a link to what is not here */
	fd = SYS(open, "/etc/resolv.conf", O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
	write_all(fd, resolver, length(resolver));
	SYS(close, fd);
}

/* Whether RAM or a device is at `address`, by /proc/iomem. */
static int claimed(unsigned long address)
{
	char map[8 * PAGE];

	for (const char *line = peek("/proc/iomem", map, sizeof map); *line;) {
		unsigned long start, end;

		while (*line == ' ')
			line++;
		start = number(&line, 16);
		line += *line == '-'; /* not at the end of what there was room for */
		end = number(&line, 16);
		if (start <= address && address <= end)
			return 1;
		while (*line && *line++ != '\n')
			;
	}
	return 0;
}

/* The boot timer's address may be anything on another machine: only write where nothing is known to be. */
static void stop_boot_timer(void)
{
	long fd, page;

	if (claimed(BOOT_TIMER))
		return;
	fd = SYS(open, "/dev/mem", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return;
	page = SYS(mmap, 0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, BOOT_TIMER);
	if ((unsigned long)page < -4096UL) {
		*(volatile char *)page = BOOT_TIMER_MAGIC;
		SYS(munmap, page, PAGE);
	}
	SYS(close, fd);
}

/* Have some console as descriptors 0 to 2, or /dev/null: the job is done all the same. */
static void open_console(void)
{
	static const char *const names[] = {"/dev/console", "/dev/ttyS0", "/dev/hvc0", "/dev/null"};
	long fd = SYS(fcntl, 2, F_GETFD);

	for (unsigned i = 0; fd < 0 && i < sizeof names / sizeof names[0]; i++)
		fd = SYS(open, names[i], O_RDWR | O_NOCTTY);
	for (int i = 0; i < 3; i++)
		if (SYS(fcntl, i, F_GETFD) < 0)
			SYS(dup2, fd, i);
}

/* Processes. Signals are blocked but while ppoll() waits, so that none is lost between a look and the wait. */

static volatile unsigned long arrived; /* bit n: signal n */
static char term[64] = "TERM=vt220";
static unsigned long lines, columns;
static char *environment[] = {
	"PATH=" DEFAULT_PATH,
	"HOME=/root",
	"USER=root",
	"LOGNAME=root",
	"SHELL=/bin/sh",
	"PS1=\\w # ",
	term,
	0,
};

static void note(int signal)
{
	arrived |= 1UL << signal;
}

void return_from_signal(void);
__asm__("return_from_signal: mov $15, %eax; syscall"); /* __NR_rt_sigreturn */

static void set_handler(int signal, void (*handler)(int))
{
	struct sigaction action = {
		.sa_handler = handler,
		.sa_flags = SA_RESTORER,
		.sa_restorer = return_from_signal,
	};

	SYS(rt_sigaction, signal, &action, 0, sizeof action.sa_mask);
}

/* Block every signal and have `handler` for those that this process acts on, or unblock when that is SIG_DFL. */
static void set_signals(void (*handler)(int))
{
	static const int signals[] = {SIGCHLD, SIGUSR1, SIGUSR2, SIGTERM, SIGINT, SIGPWR};
	unsigned long blocked = handler == SIG_DFL ? 0 : ~0UL;

	for (unsigned i = 0; i < sizeof signals / sizeof signals[0]; i++)
		set_handler(signals[i], handler);
	SYS(rt_sigprocmask, SIG_SETMASK, &blocked, 0, sizeof blocked);
}

/* The first file NAME in PATH, or NAME itself when it has a slash or is nowhere. */
static const char *find(const char *name, char *path, unsigned long size)
{
	const char *dir = environment[0] + length("PATH=");

	while (*dir && !contains(name, "/")) {
		unsigned long at = 0;

		while (*dir && *dir != ':' && at + 1 < size)
			path[at++] = *dir++;
		dir += *dir == ':';
		path[at] = 0;
		append(path, size, "/");
		append(path, size, name);
		if (SYS(access, path, 0 /* F_OK */) == 0)
			return path;
	}
	return name;
}

/* Replace this process with the program words[0]. Only returns when that fails, with the status to exit with. */
static int run(char **words)
{
	char buf[512];
	const char *path = words[0] ? find(words[0], buf, sizeof buf) : "";
	long error = SYS(execve, path, words, environment);

	if (error == -ENOENT && *path && SYS(access, path, 0) == 0)
		complain("what must load or interpret this program is not in the image: ", path, 0);
	else
		complain("", path, error);
	return error == -ENOENT || error == -ENOTDIR ? NOT_FOUND : NOT_EXECUTABLE;
}

/* Send everything else away, write back the disks, then power off or restart. Does not return. */
static void end(int command, int status)
{
	struct timespec tick = {.tv_nsec = 10 * 1000 * 1000};
	char marker[32] = "\nkvmpy-exit: ";
	long left;

	SYS(kill, -1, SIGTERM);
	for (int i = 0; i < 20; i++) { /* at most 0.2 s; ECHILD, as everything is this process's child in the end */
		while ((left = SYS(wait4, -1, 0, WNOHANG, 0)) > 0)
			;
		if (left == -ECHILD)
			break;
		SYS(nanosleep, &tick, 0);
	}
	SYS(kill, -1, SIGKILL);
	SYS(sync);
	SYS(ioctl, 1, TCSBRK, 1); /* tcdrain() */
	if (status >= 0) {
		if (SYS(ioperm, PORT_EXIT, 1, 1) == 0) {
			outb(status, PORT_EXIT);
		} else {
			append_number(marker, sizeof marker, status, 1);
			append(marker, sizeof marker, "\n");
			print(marker);
			SYS(ioctl, 1, TCSBRK, 1);
		}
		put("/proc/sys/kernel/printk", "0"); /* "reboot: Power down" is an emergency to the kernel */
	}
	/* A kernel without ACPI cannot power off: it would halt for ever. A reset at least ends the machine. */
	if (command == LINUX_REBOOT_CMD_POWER_OFF && SYS(access, "/sys/kernel", 0) == 0 &&
	    SYS(access, "/sys/firmware/acpi", 0) < 0)
		command = LINUX_REBOOT_CMD_RESTART;
	SYS(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, command, 0);
	for (;;)
		SYS(pause);
}

/* Copy what one read gives, at most `size` bytes, to the console; how many those were, 0 or less at the end. */
static long copy(int fd, unsigned long size)
{
	static char buf[16 * PAGE];
	long n = SYS(read, fd, buf, size < sizeof buf ? size : sizeof buf);

	if (n > 0)
		write_all(1, buf, n);
	return n;
}

/* Reap every child until `pid` has ended, with its output on the console; its status as a shell has it. */
static int wait_for(long pid, int output)
{
	struct pollfd input = {.fd = output, .events = POLLIN};
	unsigned long none = 0;
	int status = 0;
	long child = 0;

	while (child != pid) {
		arrived &= ~(1UL << SIGCHLD);
		while (child != pid && (child = SYS(wait4, -1, &status, WNOHANG, 0)) > 0)
			;
		if (child == pid)
			break;
		if (arrived & (1UL << SIGUSR1 | 1UL << SIGUSR2 | 1UL << SIGPWR)) /* busybox halt, poweroff */
			end(LINUX_REBOOT_CMD_POWER_OFF, -1);
		if (arrived & (1UL << SIGTERM | 1UL << SIGINT)) /* busybox reboot, Ctrl-Alt-Del */
			end(LINUX_REBOOT_CMD_RESTART, -1);
		input.revents = 0;
		SYS(ppoll, &input, 1, 0, &none, sizeof none);
		if (input.revents && copy(input.fd, ~0UL) <= 0)
			input.fd = -1;
	}
	if (input.fd >= 0) {
		int left = 0; /* what is in the pipe now; processes left behind may hold it open for ever */

		SYS(ioctl, input.fd, FIONREAD, &left);
		for (long n; left > 0 && (n = copy(input.fd, left)) > 0;)
			left -= n;
	}
	return status & 0x7f ? 128 + (status & 0x7f) : status >> 8 & 0xff;
}

/* Run the command of /etc/kvmpy/exec, `size` bytes of NUL-terminated words. */
static void run_command(char *words, unsigned long size)
{
	int ends[2];
	long pid, null;
	unsigned long count = 0;
	char **argv;

	for (unsigned long i = 0; i < size; i++)
		count += !words[i];
	argv = (char **)SYS(mmap, 0, (count + 1) * sizeof *argv, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (unsigned long i = 0; i < count; i++, words += length(words) + 1)
		argv[i] = words;
	SYS(pipe2, ends, O_CLOEXEC);
	pid = SYS(fork);
	if (pid == 0) {
		SYS(setsid);
		null = SYS(open, "/dev/null", O_RDWR);
		SYS(dup2, null, 0);
		if (null > 2)
			SYS(close, null);
		SYS(dup2, ends[1], 1);
		SYS(dup2, ends[1], 2);
		set_signals(SIG_DFL);
		SYS(exit_group, run(argv));
	}
	SYS(close, ends[1]);
	end(LINUX_REBOOT_CMD_POWER_OFF, pid < 0 ? NOT_EXECUTABLE : wait_for(pid, ends[0]));
}

/* The prompt for images without a shell. */

static void print_name(const char *folder, const char *name)
{
	(void)folder;
	print(name);
	print("\n");
}

static int builtin(char **words)
{
	if (same(words[0], "ls")) {
		long error = list(words[1] ? words[1] : "/", print_name);

		if (error)
			complain("ls: ", words[1], error);
		return error != 0;
	}
	if (same(words[0], "cat")) {
		for (words++; *words; words++) {
			long fd = SYS(open, *words, O_RDONLY);

			if (fd < 0)
				complain("cat: ", *words, fd);
			while (fd >= 0 && copy(fd, ~0UL) > 0)
				;
		}
		return 0;
	}
	return run(words);
}

static void prompt(void)
{
	static char line[PAGE + 1]; /* a terminal gives lines of up to 4096 bytes */

	set_handler(SIGINT, SIG_IGN); /* Ctrl-C ends the command, not the prompt */
	print("No shell in this image: install busybox-static on the host for one. Here: help, ls, cat, poweroff.\n");
	for (;;) {
		char *words[MAX_WORDS + 1];
		int count = 0;
		long n, pid;

		print("kvmpy> ");
		n = SYS(read, 0, line, sizeof line - 1);
		if (n <= 0)
			return;
		line[n] = 0;
		for (char *at = line; *at && count < MAX_WORDS;) {
			while (*at == ' ' || *at == '\t' || *at == '\n')
				*at++ = 0;
			if (*at)
				words[count++] = at;
			while (*at && *at != ' ' && *at != '\t' && *at != '\n')
				at++;
		}
		words[count] = 0;
		if (!count)
			continue;
		if (same(words[0], "exit"))
			return;
		if (same(words[0], "poweroff") || same(words[0], "reboot")) {
			SYS(kill, 1, words[0][0] == 'p' ? SIGUSR2 : SIGTERM);
			for (;;)
				SYS(pause);
		}
		if (same(words[0], "help")) {
			print("ls [FOLDER], cat FILE, poweroff, reboot, exit, or a program of this image with its words,\n"
			      "e.g.: cat /proc/cpuinfo\n");
			continue;
		}
		pid = SYS(fork);
		if (pid == 0) {
			set_handler(SIGINT, SIG_DFL);
			SYS(exit_group, builtin(words));
		}
		SYS(wait4, pid, 0, 0, 0);
	}
}

/* The terminal behind /dev/console, which itself would leave the shell without job control. */
static long open_terminal(void)
{
	char active[128], path[128] = "/dev/";
	char *name = peek("/sys/class/tty/console/active", active, sizeof active);

	for (char *at = active; *at; at++) { /* the last one is the console= of /dev/console */
		if (*at == ' ')
			name = at + 1;
		else if (*at == '\n')
			*at = 0;
	}
	append(path, sizeof path, name);
	return *name ? SYS(open, path, O_RDWR | O_NOCTTY) : -ENOENT;
}

static void announce(void)
{
	char text[PAGE], line[256] = "kvmpy init: userspace after ";
	struct new_utsname names;
	struct timespec now;

	if (contains(peek("/proc/cmdline", text, sizeof text), "quiet"))
		return;
	SYS(clock_gettime, 7 /* CLOCK_BOOTTIME */, &now);
	SYS(uname, &names);
	append_number(line, sizeof line, now.tv_sec, 1);
	append(line, sizeof line, ".");
	append_number(line, sizeof line, now.tv_nsec / 10000000, 2);
	append(line, sizeof line, " s (kernel ");
	append(line, sizeof line, names.release);
	append(line, sizeof line, ")\n");
	print(line);
}

static void run_shell(void)
{
	long pid = SYS(fork);

	if (pid == 0) {
		char *words[] = {"/bin/sh", 0};
		struct winsize size = {0};
		long terminal;

		SYS(setsid);
		terminal = open_terminal();
		for (int i = 0; terminal >= 0 && i < 3; i++)
			SYS(dup2, terminal, i);
		if (terminal > 2)
			SYS(close, terminal);
		SYS(ioctl, 0, TIOCSCTTY, 1);
		SYS(ioctl, 0, TIOCGWINSZ, &size);
		if (lines && columns)
			size.ws_row = lines, size.ws_col = columns;
		if (!size.ws_row || !size.ws_col)
			size.ws_row = 24, size.ws_col = 80;
		SYS(ioctl, 0, TIOCSWINSZ, &size);
		set_signals(SIG_DFL);
		announce();
		if (SYS(access, words[0], 1 /* X_OK */) == 0)
			SYS(exit_group, run(words));
		prompt();
		SYS(exit_group, 0);
	}
	wait_for(pid, -1);
	end(LINUX_REBOOT_CMD_POWER_OFF, -1);
}

/* The agent. */

static int agent = -1; /* its file, which the root of a disk may hide */
static int agent_only;

static void find_agent(void)
{
	char how[8];
	long fd;

	if (!option("kvmpy.agent=", how, sizeof how) || same(how, "0"))
		return;
	fd = SYS(open, "/usr/lib/kvmpy/agent", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		complain("no agent in this image: ", "/usr/lib/kvmpy/agent", fd);
	else
		agent_only = same(how, "only");
	agent = fd;
}

/* Start the agent, if there is to be one. Only returns when there is more to do than to wait for its end. */
static void start_agent(void)
{
	char *words[] = {"kvmpy-agent", 0};
	long pid = agent < 0 ? -1 : SYS(fork);

	if (pid == 0) {
		SYS(setsid);
		set_signals(SIG_DFL);
		SYS(execveat, agent, "", words, environment, 0x1000 /* AT_EMPTY_PATH */);
		complain("cannot execute the agent", "", -ENOEXEC);
		SYS(exit_group, NOT_EXECUTABLE);
	}
	if (!agent_only)
		return;
	wait_for(pid, -1);
	end(LINUX_REBOOT_CMD_POWER_OFF, -1);
}

/* Make what is mounted at /.root the root, with the mounts of the machine in it. */
static void enter_root(void)
{
	static const char *const moved[] = {"/dev", "/proc", "/sys"};
	char path[32];

	for (unsigned i = 0; i < sizeof moved / sizeof moved[0]; i++) {
		path[0] = 0;
		append(path, sizeof path, "/.root");
		append(path, sizeof path, moved[i]);
		SYS(mkdir, path, 0755);
		SYS(mount, moved[i], path, 0, MS_MOVE, 0);
	}
	SYS(chdir, "/.root");
	SYS(mount, ".", "/", 0, MS_MOVE, 0);
	SYS(chroot, ".");
	SYS(chdir, "/");
}

/* A root of which nothing is written to: a folder of the host, or a disk. */

#define LAYERS "lowerdir=/.lower,upperdir=/.writes/upper,workdir=/.writes/work"

static char root_disk[64]; /* its name in /dev */

static void find_root_disk(const char *folder, const char *name)
{
	char path[128] = "", serial[32];

	append(path, sizeof path, folder);
	append(path, sizeof path, "/");
	append(path, sizeof path, name);
	append(path, sizeof path, "/serial");
	if (same(peek(path, serial, sizeof serial), "kvmpy-root"))
		append(root_disk, sizeof root_disk, name);
}

/* Mount the disk that `spec`, PARTITION:TYPE, is about; 0 or a negative errno. */
static long mount_root_disk(const char *spec)
{
	unsigned long partition = number(&spec, 10);
	char path[80] = "/dev/";

	list("/sys/class/block", find_root_disk);
	append(path, sizeof path, root_disk);
	if (partition)
		append_number(path, sizeof path, partition, 1);
	return root_disk[0] ? SYS(mount, path, "/.lower", spec + 1, MS_RDONLY, 0) : -ENOENT;
}

/* Let the agent find a folder that the new root hides (see the top). */
static void keep_open(const char *path, int number)
{
	long fd = SYS(open, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	SYS(fcntl, fd, 1030 /* F_DUPFD_CLOEXEC */, number);
	SYS(close, fd);
}

/* Mount the root that `spec` is about, below a tmpfs; 0 or a negative errno. */
static long mount_lower(const char *spec)
{
	const char *disk = after(spec, "disk:");
	long error;

	SYS(mkdir, "/.lower", 0755);
	SYS(mkdir, "/.writes", 0755);
	SYS(mkdir, "/.root", 0755);
	error = disk ? mount_root_disk(disk) : SYS(mount, spec, "/.lower", "virtiofs", MS_RDONLY, 0);
	error = error ? error : SYS(mount, "tmpfs", "/.writes", "tmpfs", 0, "mode=0755");
	SYS(mkdir, "/.writes/upper", 0755);
	SYS(mkdir, "/.writes/work", 0755);
	if (error)
		return error;
	/* What was written is to be whole files, whatever this kernel's defaults are; older ones do not know the words. */
	error = SYS(mount, "root", "/.root", "overlay", 0, LAYERS ",redirect_dir=off,metacopy=off");
	error = error ? SYS(mount, "root", "/.root", "overlay", 0, LAYERS) : 0;
	if (error)
		return error;
	keep_open("/.writes/upper", 100);
	keep_open("/.lower", 101);
	enter_root();
	if (disk)
		return 0; /* what is in its /tmp and /run belongs there */
	/* What is in the host's is of no use to anybody here, or not for them. */
	SYS(mkdir, "/tmp", 0);
	SYS(mkdir, "/run", 0);
	SYS(mount, "tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755");
	return SYS(mount, "tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
}

/* Have the root that kvmpy.root= asks for, if it does. */
static void enter_share(void)
{
	char spec[64];
	long error = option("kvmpy.root=", spec, sizeof spec) ? mount_lower(spec) : 0;

	if (error) {
		complain("cannot mount the root ", spec, error);
		end(LINUX_REBOOT_CMD_POWER_OFF, -1);
	}
}

/* The disk to go on from. */

static const char *wanted; /* LABEL=... or UUID=... */
static char root[128];     /* the node of the root disk, once it is found */

/* Keep `name`, a block device, in `root` if its ext2 superblock (Documentation/filesystems/ext4) is the wanted one. */
static void identify(const char *folder, const char *name)
{
	unsigned char block[0x88];
	char path[128] = "/dev/", text[64] = "";
	long fd;

	(void)folder;
	append(path, sizeof path, name);
	fd = SYS(open, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (SYS(pread64, fd, block, sizeof block, 1024) == sizeof block && block[0x38] == 0x53 && block[0x39] == 0xef) {
		if (after(wanted, "LABEL=")) {
			append(text, sizeof text, "LABEL=");
			for (int i = 0; i < 16 && block[0x78 + i]; i++)
				append(text, sizeof text, (char[]){block[0x78 + i], 0});
		} else {
			append(text, sizeof text, "UUID=");
			for (int i = 0; i < 16; i++) {
				static const char digits[] = "0123456789abcdef";
				unsigned char byte = block[0x68 + i];

				if (i == 4 || i == 6 || i == 8 || i == 10)
					append(text, sizeof text, "-");
				append(text, sizeof text, (char[]){digits[byte >> 4], digits[byte & 15], 0});
			}
		}
		if (same(text, wanted)) {
			root[0] = 0;
			append(root, sizeof root, path);
		}
	}
	SYS(close, fd);
}

/* Wait up to 10 s for the disk that `spec` names; whether it has come. */
static int find_root(const char *spec)
{
	struct timespec tick = {.tv_nsec = 50 * 1000 * 1000};

	wanted = spec;
	for (int i = 0; i < 200; i++) {
		if (spec[0] == '/')
			append(root, sizeof root, i ? "" : spec);
		else
			list("/sys/class/block", identify);
		if (root[0] && SYS(access, root, 0) == 0)
			return 1;
		SYS(nanosleep, &tick, 0);
		make_nodes();
	}
	return 0;
}

/* Mount `root` at /.root, as the type that `rootfstype=` names or as the first that fits; 0 or a negative errno. */
static long mount_root(unsigned long flags)
{
	char types[PAGE], given[64];
	const char *type = option("rootfstype=", given, sizeof given);
	long error = -ENOENT;

	SYS(mkdir, "/.root", 0755);
	if (type)
		return SYS(mount, root, "/.root", type, flags, 0);
	if (SYS(mount, root, "/.root", "ext4", flags, 0) == 0) /* Linux tries ext3 first, and complains */
		return 0;
	for (char *at = peek("/proc/filesystems", types, sizeof types); *at;) {
		char *name = at;

		while (*at && *at != '\n')
			at++;
		if (*at)
			*at++ = 0;
		if (*name != '\t') /* "nodev" is before the tab of those that have no disk */
			continue;
		error = SYS(mount, root, "/.root", name + 1, flags, 0);
		if (!error)
			return 0;
	}
	return error;
}

/* Go on from the disk of root=, if there is one; returns when that cannot be done, having said why.
   The arguments in `argv`, which the kernel has from its command line, are for the disk's init. */
static void boot_disk(char **argv)
{
	static const char *const inits[] = {"/sbin/init", "/etc/init", "/bin/init", "/bin/sh"};
	char spec[128], given[128], path[256], rw[8];
	const char *init = option("init=", given, sizeof given);
	struct stat status;
	long error;

	if (!option("root=", spec, sizeof spec))
		return;
	if (!find_root(spec)) {
		complain("no disk (or no driver for it): ", spec, 0);
		return;
	}
	error = mount_root(option("rw", rw, sizeof rw) && !rw[0] ? 0 : MS_RDONLY);
	if (error) {
		if (error == -EINVAL)
			complain("no file system that this kernel knows on ", root, 0);
		else
			complain("cannot mount ", root, error);
		return;
	}
	for (unsigned i = 0; !init && i < sizeof inits / sizeof inits[0]; i++) {
		path[0] = 0;
		append(path, sizeof path, "/.root");
		append(path, sizeof path, inits[i]);
		if (SYS(lstat, path, &status) == 0) /* not access: the link is to be followed from the new root */
			init = inits[i];
	}
	if (!init && !agent_only) {
		complain("no init on the disk, which is at /.root: ", root, 0);
		return;
	}
	enter_root();
	mount_volumes();
	start_agent();
	set_signals(SIG_DFL);
	argv[0] = (char *)init;
	SYS(exit_group, run(argv));
}

static void read_environment(char **envp)
{
	const char *value;

	for (; *envp; envp++) {
		/* "linux" is what the kernel says when nobody has said anything. */
		if (after(*envp, "TERM=") && !same(*envp, "TERM=linux") && length(*envp) < sizeof term) {
			term[0] = 0;
			append(term, sizeof term, *envp);
		} else if ((value = after(*envp, "LINES="))) {
			lines = number(&value, 10);
		} else if ((value = after(*envp, "COLUMNS="))) {
			columns = number(&value, 10);
		}
	}
}

__attribute__((used, noreturn)) static void start(unsigned long *stack)
{
	struct termios settings;
	unsigned long size;
	char *command;

	if (SYS(getpid) != 1) {
		print("kvmpy init: this is the first process of a kvmpy guest; it does nothing elsewhere\n");
		SYS(exit_group, 2);
	}
	if (SYS(ioperm, PORT_DELAY, 1, 1) == 0)
		outb(USER_START, PORT_DELAY);
	mount_all();
	stop_boot_timer();
	open_console();
	set_signals(note);
	read_environment((char **)stack + stack[0] + 2);
	command = slurp("/etc/kvmpy/exec", &size);
	if (command) {
		put("/proc/sys/kernel/printk", "1");
		if (SYS(ioctl, 1, TCGETS, &settings) == 0) {
			settings.c_oflag &= ~OPOST;
			SYS(ioctl, 1, TCSETS, &settings);
		}
	}
	load_modules();
	make_nodes();
	name_host();
	loopback_up();
	volumes = slurp("/etc/kvmpy/volumes", &volumes_size);
	peek("/proc/cmdline", cmdline, sizeof cmdline);
	find_agent();
	enter_share();
	network_up();
	if (command) {
		mount_volumes();
		start_agent();
		run_command(command, size);
	}
	boot_disk((char **)stack + 1);
	if (mount_volumes() && agent_only)
		end(LINUX_REBOOT_CMD_POWER_OFF, -1);
	start_agent();
	run_shell();
	__builtin_unreachable();
}

ENTRY_POINT;
