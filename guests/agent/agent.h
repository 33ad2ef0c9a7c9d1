/* What the parts of the agent share: the frames of PROTOCOL.md, and the connection that this process serves. */
#pragma once

#include <asm/ioctls.h>
#include <asm/poll.h>
#include <asm/stat.h>
#include <linux/time.h>

#include "../free.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

enum { PORT = 1024, VERSION = 1 };
enum { MAX_DATA = 64 << 10, MAX_EXEC = 2 << 20, WINDOW_SIZE = 256 << 10, MAX_LIMITS = 16 };
enum { STDIN, STDOUT, STDERR };
enum { TO_COMMAND, TO_GROUP, TO_ALL };
#define UNCHANGED 0xffffffffU

enum kind {
	HELLO = 1,
	ERROR = 2,
	END = 3,
	DATA = 4,
	EOF = 5,
	WINDOW = 6,
	EXEC = 16,
	STARTED = 17,
	RESIZE = 18,
	SIGNAL = 19,
	EXIT = 20,
	READ = 32,
	WRITE = 33,
	LIST = 34,
	STAT = 35,
	MKDIR = 36,
	REMOVE = 37,
	RENAME = 38,
	PACK = 39,
	UNPACK = 40,
	CHANGES = 41,
	ENTRY = 48,
	DIAL = 49,
};

enum stage {
	STAGE_PROTOCOL = 1,
	STAGE_SYSTEM = 2,
	STAGE_USER = 3,
	STAGE_LIMIT = 4,
	STAGE_CWD = 5,
	STAGE_EXEC = 6,
	STAGE_LOADER = 7,
	STAGE_FILE = 8,
	STAGE_PORT = 9,
};

enum run_flags { RUN_TTY = 1, RUN_STDIN = 2, RUN_STDOUT = 4, RUN_STDERR = 8, RUN_MERGE = 16 };

enum file_flags {
	HOW_ATOMIC = 1,
	HOW_APPEND = 2,
	HOW_EXCLUSIVE = 4,
	HOW_PARENTS = 8,
	HOW_NOFOLLOW = 16,
	HOW_RECURSIVE = 32,
	HOW_CONTENT = 64,
};

struct header {
	u32 length;
	u8 kind, stream;
	u16 zero;
};

struct hello {
	char magic[4];
	u16 oldest, newest;
};

struct error {
	u32 stage, error;
};

struct exec {
	u32 flags, umask;
	u16 rows, columns;
	u32 argc, envc, limits;
};

struct limit {
	u32 resource, zero;
	u64 soft, hard;
};

struct exit {
	u32 status, signal, core, zero;
	u64 elapsed, user, system, maxrss;
};

struct file_request {
	u32 flags, mode, uid, gid;
	u64 offset, size;
};

struct entry {
	u32 mode, uid, gid, links;
	u64 size, mtime;
};

/* frames.c: the connection of this process, read and written whole frames at a time, waiting. */

struct frame {
	struct header head;
	char payload[MAX_DATA + 1]; /* a NUL follows what was received */
};

extern int peer;              /* the connection */
extern int in_guest;          /* whether this is the agent of a guest, not a test's */
extern void (*when_lost)(void); /* what to undo when the client has gone */

__attribute__((noreturn)) void leave(void);
__attribute__((noreturn)) void linger(void);
__attribute__((noreturn)) void fail(enum stage stage, long error, const char *text);
void greet(const struct hello *hello);
u64 take_greeting(char *to);
void send_frame(enum kind kind, int stream, const void *payload, unsigned long size);
void receive(struct frame *frame);
char *receive_exec(const struct header *head);
void receive_head(struct header *head);
void receive_payload(struct frame *frame);
void check_head(const struct header *head);

/* users.c */

struct identity {
	u32 uid, gid;
	u32 groups[64];
	unsigned count;
	char name[64], home[256];
};

long identify(const char *spec, struct identity *identity);

/* tree.c */
void keep_descendants(void);
u32 signal_tree(int signal, u32 group);
void kill_tree(void);

/* command.c */
__attribute__((noreturn)) void serve_command(char *payload, unsigned long size);

/* changes.c */
void changes(const char *upper, const char *lower, int content);

/* files.c */
enum { DEPTH = 256, PATH_SIZE = 4096 };
enum { NO_FOLLOW = 0x100, TYPE = 0170000, FOLDER = 0040000, REGULAR = 0100000, LINK = 0120000, CHARACTER = 0020000 };
#define IS(mode, type) (((mode)&TYPE) == (type))
#define OPEN_FOLDER (O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
extern char relative[PATH_SIZE]; /* the name, in a tree, of what is sent */
__attribute__((noreturn)) void fail_file(long error, const char *name);
u64 enter_name(const char *name, int depth);
void send_link(int dir, const char *name, const struct stat *status, const char *told);
void send_content(int fd);
long each_name(int dir, long (*each)(int dir, const char *name, int depth), int depth);
__attribute__((noreturn)) void serve_files(struct frame *request);

/* port.c */
__attribute__((noreturn)) void serve_port(struct frame *request);

static inline u64 now(void)
{
	struct timespec time;

	SYS(clock_gettime, 1 /* CLOCK_MONOTONIC */, &time);
	return time.tv_sec * 1000000000UL + time.tv_nsec;
}

/* `size` zero bytes, never freed; NULL when there is no memory. */
static inline void *allocate(unsigned long size)
{
	long data = SYS(mmap, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return (unsigned long)data > -4096UL ? 0 : (void *)data;
}
