/* All that stems from this process: what a command has started, in whatever session or process group it is now. */
#include <asm/siginfo.h>
#include <asm/signal.h>
#include <linux/prctl.h>
#include <linux/wait.h>

#include "agent.h"

enum {
	MOST_PIDS = 1 << 22,    /* Linux, PID_MAX_LIMIT: no process has a higher number */
	MOST_AT_ONCE = 1 << 15, /* processes looked at in one pass; the next one sees others */
	PASSES = 500,           /* with PAUSE about a second: what has not died by then waits for a device */
	PAUSE = 2000000,        /* ns */
};

static struct process {
	u32 pid, parent, group;
	char state;
} processes[MOST_AT_ONCE];
static u8 ours[MOST_PIDS / 8]; /* a bit for each process: it stems from this one */

static int is_ours(u32 pid)
{
	return pid < MOST_PIDS && ours[pid / 8] >> (pid & 7) & 1;
}

static void set_ours(u32 pid, int value)
{
	if (pid < MOST_PIDS)
		ours[pid / 8] = (ours[pid / 8] & ~(1 << (pid & 7))) | value << (pid & 7);
}

/* Have what stems from this process stay its own, when the parents in between have gone. */
void keep_descendants(void)
{
	SYS(prctl, PR_SET_CHILD_SUBREAPER, 1);
}

/* What /proc/PID/stat says: "PID (NAME) STATE PARENT GROUP ...", where the name may be anything; 0 if it has gone. */
static int examine(int proc, const char *pid, struct process *process)
{
	char path[40] = "", text[256];
	const char *at;
	long fd, n;

	append(path, sizeof path, pid);
	append(path, sizeof path, "/stat");
	fd = SYS(openat, proc, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	n = SYS(read, fd, text, sizeof text - 1);
	SYS(close, fd);
	text[n > 0 ? n : 0] = 0;
	for (at = text + length(text); at > text && *at != ')'; at--)
		;
	if (at == text || length(at) < 6)
		return 0;
	process->pid = number(&pid, 10);
	process->state = at[2];
	at += 4;
	process->parent = number(&at, 10);
	at += *at == ' ';
	process->group = number(&at, 10);
	return 1;
}

/* All processes of the machine; how many. */
static u32 look(void)
{
	char names[2048] __attribute__((aligned(8)));
	long proc = SYS(open, "/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC), n;
	u32 count = 0;

	while (proc >= 0 && (n = SYS(getdents64, proc, names, sizeof names)) > 0) {
		for (long at = 0; at < n && count < MOST_AT_ONCE;) {
			/* struct linux_dirent64: ino, off (8 bytes each), reclen (2), type (1), name */
			const char *name = names + at + 19;

			at += *(u16 *)(names + at + 16);
			if (*name >= '1' && *name <= '9')
				count += examine(proc, name, &processes[count]);
		}
	}
	SYS(close, proc);
	return count;
}

/* Send `signal` to all that stems from this process, or with a `group` to those of it that are in there; how many. */
u32 signal_tree(int signal, u32 group)
{
	u32 count = look(), self = SYS(getpid), sent = 0;
	int more = 1;

	set_ours(self, 1);
	while (more) { /* children mostly have higher numbers, and come later */
		more = 0;
		for (u32 i = 0; i < count; i++) {
			if (is_ours(processes[i].parent) && !is_ours(processes[i].pid)) {
				set_ours(processes[i].pid, 1);
				more = 1;
			}
		}
	}
	set_ours(self, 0);
	for (u32 i = 0; i < count; i++) {
		const struct process *process = &processes[i];

		if (!is_ours(process->pid))
			continue;
		set_ours(process->pid, 0);
		if (process->state == 'Z' || process->state == 'X' || (group && process->group != group))
			continue;
		SYS(kill, process->pid, signal);
		sent++;
	}
	return sent;
}

static void schedule(int policy, int priority)
{
	if (in_guest)
		SYS(sched_setscheduler, 0, policy, &priority);
}

/* Kill all that stems from this process. What is killed forks no more; those that it has forked are met in the next
   pass, and have less time for it than we do. */
void kill_tree(void)
{
	struct timespec pause = {.tv_nsec = PAUSE};

	schedule(1 /* SCHED_FIFO */, 1);
	for (int pass = 0; pass < PASSES && signal_tree(SIGKILL, 0); pass++)
		if (pass)
			SYS(nanosleep, &pause, 0);
	schedule(0 /* SCHED_OTHER */, 0);
}
