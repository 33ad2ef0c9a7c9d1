/* Requests for files, with the agent's own rights. Trees are walked by descriptors, so that no link leads out of them. */
#include "agent.h"

enum { AT_CWD = -100, REMOVE_FOLDER = 0x200, RENAME_NO_REPLACE = 1 };

static struct file_request request;
static char path[PATH_SIZE], path2[PATH_SIZE];
static struct frame incoming;

__attribute__((noreturn)) void fail_file(long error, const char *name)
{
	fail(STAGE_FILE, error, name);
}

static long need(long result)
{
	if (result < 0)
		fail_file(result, path);
	return result;
}

/* The string at `*at` into `to`; moves `*at` past it. */
static void take_path(const char **at, const char *end, char *to)
{
	u64 n = length(*at);

	if (*at + n >= end)
		fail(STAGE_PROTOCOL, -EPROTO, "bad file request");
	if (n >= PATH_SIZE)
		fail_file(-ENAMETOOLONG, *at);
	memcpy(to, *at, n + 1);
	*at += n + 1;
}

/* Where the last part of `name` begins. */
static char *last_part(char *name)
{
	char *last = name;

	for (char *at = name; *at; at++)
		if (*at == '/' && at[1] && at[1] != '/')
			last = at + 1;
	return last;
}

/* Make the folders above `name`. */
static void make_parents(char *name)
{
	for (char *at = name + 1; *at; at++) {
		if (*at != '/')
			continue;
		*at = 0;
		SYS(mkdir, name, 0755); /* if that is no folder in the end, what follows fails */
		*at = '/';
	}
}

static long owner_and_mode(int fd, u32 mode)
{
	long error = 0;

	if (request.uid != UNCHANGED || request.gid != UNCHANGED)
		error = SYS(fchown, fd, request.uid, request.gid);
	if (!error && mode != UNCHANGED)
		error = SYS(fchmod, fd, mode & 07777);
	return error;
}

static long write_file(int fd, const char *data, u64 size)
{
	while (size) {
		long n = SYS(write, fd, data, size);

		if (n == -EINTR)
			continue;
		if (n <= 0)
			return n ? n : -EIO;
		data += n;
		size -= n;
	}
	return 0;
}

/* Attributes. */

static void send_entry(const struct stat *status, const char *name, const char *target)
{
	static char payload[sizeof(struct entry) + 2 * PATH_SIZE];
	struct entry entry = {
		.mode = status->st_mode,
		.uid = status->st_uid,
		.gid = status->st_gid,
		.links = status->st_nlink,
		.size = status->st_size,
		.mtime = status->st_mtime * 1000000000UL + status->st_mtime_nsec,
	};
	u64 size = sizeof entry, n;

	memcpy(payload, &entry, sizeof entry);
	n = length(name) + 1;
	memcpy(payload + size, name, n);
	size += n;
	n = length(target) + 1;
	memcpy(payload + size, target, n);
	send_frame(ENTRY, 0, payload, size + n);
}

/* The entry of `name` in `dir`, told as `told`; a link's target is with it. */
void send_link(int dir, const char *name, const struct stat *status, const char *told)
{
	char target[PATH_SIZE] = "";
	long n = IS(status->st_mode, LINK) ? SYS(readlinkat, dir, name, target, sizeof target - 1) : 0;

	target[n > 0 ? n : 0] = 0;
	send_entry(status, told, target);
}

/* Call `each` for every name in the open folder but the dot ones, until one returns an error; 0, or that. */
long each_name(int dir, long (*each)(int dir, const char *name, int depth), int depth)
{
	char buf[2048] __attribute__((aligned(8)));
	long n;

	while ((n = SYS(getdents64, dir, buf, sizeof buf)) > 0) {
		for (long at = 0; at < n;) {
			/* struct linux_dirent64: ino, off (8 bytes each), reclen (2), type (1), name */
			u16 reclen = *(u16 *)(buf + at + 16);
			const char *name = buf + at + 19;

			if (!same(name, ".") && !same(name, "..")) {
				long error = each(dir, name, depth);

				if (error)
					return error;
			}
			at += reclen;
		}
	}
	return n;
}

/* Single files. */

static void read_file(void)
{
	static char data[MAX_DATA];
	/* A FIFO that nobody writes to must not hold this up for ever. */
	long fd = need(SYS(open, path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));

	if (request.offset)
		need(SYS(lseek, fd, request.offset, 0 /* SEEK_SET */));
	while (request.size) {
		long n = SYS(read, fd, data, request.size < MAX_DATA ? request.size : MAX_DATA);

		if (n == -EINTR)
			continue;
		if (need(n) == 0)
			break;
		send_frame(DATA, 0, data, n);
		request.size -= n;
	}
	send_frame(END, 0, 0, 0);
}

static void remove_temporary(void)
{
	SYS(unlink, path2);
}

/* A name beside `path` that nobody else has, in `path2`. */
static void name_temporary(void)
{
	u64 dir = last_part(path) - path;

	if (dir > PATH_SIZE - 64)
		fail_file(-ENAMETOOLONG, path);
	memcpy(path2, path, dir);
	path2[dir] = 0;
	append(path2, sizeof path2, ".kvmpy-");
	append_number(path2, sizeof path2, SYS(getpid), 1);
	append(path2, sizeof path2, "-");
	append_number(path2, sizeof path2, now(), 1);
}

static void write_request(void)
{
	int atomic = request.flags & HOW_ATOMIC;
	int flags = O_WRONLY | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
	u32 mode = request.mode;
	struct stat old;
	long fd, error;

	if (request.flags & HOW_PARENTS)
		make_parents(path);
	if (atomic) {
		long there = SYS(stat, path, &old);

		if (there == 0 && IS(old.st_mode, FOLDER))
			fail_file(-EISDIR, path);
		if (there == 0 && request.flags & HOW_EXCLUSIVE)
			fail_file(-EEXIST, path);
		if (mode == UNCHANGED)
			mode = there == 0 ? old.st_mode & 07777 : 0644;
		name_temporary();
		fd = need(SYS(open, path2, flags | O_EXCL, 0600));
		when_lost = remove_temporary;
	} else {
		flags |= request.flags & HOW_APPEND ? O_APPEND : O_TRUNC;
		flags |= request.flags & HOW_EXCLUSIVE ? O_EXCL : 0;
		fd = need(SYS(open, path, flags, mode == UNCHANGED ? 0644 : mode & 07777));
	}
	for (;;) {
		receive(&incoming);
		if (incoming.head.kind == END)
			break;
		if (incoming.head.kind != DATA)
			fail(STAGE_PROTOCOL, -EPROTO, "not allowed while a file is written");
		need(write_file(fd, incoming.payload, incoming.head.length));
	}
	need(owner_and_mode(fd, mode));
	if (atomic) {
		need(SYS(fsync, fd));
		error = SYS(renameat2, AT_CWD, path2, AT_CWD, path,
			    request.flags & HOW_EXCLUSIVE ? RENAME_NO_REPLACE : 0);
		need(error);
		when_lost = 0;
	}
	need(SYS(close, fd));
	send_frame(END, 0, 0, 0);
}

static void stat_request(void)
{
	struct stat status;

	need(SYS(newfstatat, AT_CWD, path, &status, request.flags & HOW_NOFOLLOW ? NO_FOLLOW : 0));
	send_link(AT_CWD, path, &status, "");
	send_frame(END, 0, 0, 0);
}

static long list_one(int dir, const char *name, int depth)
{
	struct stat status;

	(void)depth;
	if (SYS(newfstatat, dir, name, &status, NO_FOLLOW) == 0) /* else it has gone since */
		send_link(dir, name, &status, name);
	return 0;
}

static void list_request(void)
{
	need(each_name(need(SYS(open, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)), list_one, 0));
	send_frame(END, 0, 0, 0);
}

static void make_folder(void)
{
	u32 mode = request.mode == UNCHANGED ? 0755 : request.mode & 07777;
	long error, fd;

	if (request.flags & HOW_PARENTS)
		make_parents(path);
	error = SYS(mkdir, path, mode);
	fd = need(error == -EEXIST && request.flags & HOW_PARENTS ? 0 : error);
	fd = need(SYS(open, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
	if (!error)
		need(owner_and_mode(fd, mode));
	send_frame(END, 0, 0, 0);
}

static long remove_one(int dir, const char *name, int depth)
{
	long error = SYS(unlinkat, dir, name, 0), fd;

	if (error != -EISDIR && error != -EPERM)
		return error == -ENOENT && depth ? 0 : error;
	if (!(request.flags & HOW_RECURSIVE)) {
		long folder = SYS(unlinkat, dir, name, REMOVE_FOLDER);

		return folder == -ENOTDIR ? error : folder;
	}
	if (depth > DEPTH)
		return -ELOOP;
	fd = SYS(openat, dir, name, OPEN_FOLDER);
	if (fd < 0)
		return fd == -ENOTDIR ? error : fd;
	error = each_name(fd, remove_one, depth + 1);
	SYS(close, fd);
	return error ? error : SYS(unlinkat, dir, name, REMOVE_FOLDER);
}

static void remove_request(void)
{
	need(remove_one(AT_CWD, path, 0));
	send_frame(END, 0, 0, 0);
}

static void rename_request(void)
{
	need(SYS(renameat2, AT_CWD, path, AT_CWD, path2, request.flags & HOW_EXCLUSIVE ? RENAME_NO_REPLACE : 0));
	send_frame(END, 0, 0, 0);
}

/* Trees out of the guest. */

char relative[PATH_SIZE];

/* Add `name` to `relative`; where that ended before. */
u64 enter_name(const char *name, int depth)
{
	u64 end = length(relative);

	if (depth > DEPTH || end + length(name) + 2 > sizeof relative)
		fail_file(-ENAMETOOLONG, relative);
	if (end)
		append(relative, sizeof relative, "/");
	append(relative, sizeof relative, name);
	return end;
}

void send_content(int fd)
{
	static char data[MAX_DATA];
	long n;

	while ((n = SYS(read, fd, data, sizeof data)) != 0) {
		if (n == -EINTR)
			continue;
		if (n < 0)
			fail_file(n, relative);
		send_frame(DATA, 0, data, n);
	}
}

static long pack_one(int dir, const char *name, int depth)
{
	struct stat status;
	long fd;
	u64 end;

	if (SYS(newfstatat, dir, name, &status, NO_FOLLOW))
		return 0; /* it has gone since */
	end = enter_name(name, depth);
	if (IS(status.st_mode, FOLDER) || IS(status.st_mode, REGULAR)) {
		fd = SYS(openat, dir, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
		if (fd < 0 && fd != -ENOENT)
			fail_file(fd, relative);
		if (fd >= 0) {
			SYS(fstat, fd, &status);
			send_entry(&status, relative, "");
			if (IS(status.st_mode, FOLDER)) {
				long error = each_name(fd, pack_one, depth + 1);

				if (error)
					fail_file(error, relative);
			} else if (IS(status.st_mode, REGULAR)) {
				send_content(fd);
			}
			SYS(close, fd);
		}
	} else {
		send_link(dir, name, &status, relative);
	}
	relative[end] = 0;
	return 0;
}

static void pack(void)
{
	long fd = need(SYS(open, path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
	struct stat status;

	need(SYS(fstat, fd, &status));
	send_entry(&status, "", "");
	if (IS(status.st_mode, FOLDER))
		need(each_name(fd, pack_one, 1));
	else if (IS(status.st_mode, REGULAR))
		send_content(fd);
	send_frame(END, 0, 0, 0);
}

/* Trees into the guest. */

static int root = -1, file = -1; /* the tree's folder, and the regular file that DATA is for */
static u64 file_mtime;
static u32 file_mode;

static void finish_file(void)
{
	struct timespec times[2] = {{.tv_nsec = 0x3fffffff /* UTIME_NOW */}};
	long mtime = file_mtime;

	if (file < 0)
		return;
	times[1].tv_sec = mtime / 1000000000;
	times[1].tv_nsec = mtime % 1000000000;
	if (times[1].tv_nsec < 0) {
		times[1].tv_sec--;
		times[1].tv_nsec += 1000000000;
	}
	need(owner_and_mode(file, file_mode));
	SYS(utimensat, file, 0, times, 0);
	need(SYS(close, file));
	file = -1;
}

/* Whether `name` has neither empty nor dot parts, and does not begin with a slash. */
static int is_safe(const char *name)
{
	for (;;) {
		u64 n = 0;

		while (name[n] && name[n] != '/')
			n++;
		if (!n || (n == 1 && name[0] == '.') || (n == 2 && name[0] == '.' && name[1] == '.'))
			return 0;
		if (!name[n])
			return 1;
		name += n + 1;
	}
}

/* The folder of `name` in the tree, through no link, to be closed; `*last` is the name in it. */
static int open_parent(char *name, char **last)
{
	long dir = SYS(fcntl, root, 1030 /* F_DUPFD_CLOEXEC */, 3);

	if (dir < 0)
		fail_file(dir, name);
	for (char *at = name; ; at++) {
		long next;

		if (!*at) {
			*last = name;
			return dir;
		}
		if (*at != '/')
			continue;
		*at = 0;
		next = SYS(openat, dir, name, OPEN_FOLDER);
		if (next < 0)
			fail_file(next, name);
		SYS(close, dir);
		dir = next;
		name = at + 1;
	}
}

/* Clear the place of what is no folder; then it must be free. */
static long make_file(int dir, const char *name)
{
	SYS(unlinkat, dir, name, 0);
	return SYS(openat, dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
}

static void unpack_root(const struct entry *entry)
{
	if (root >= 0 || file >= 0)
		fail(STAGE_PROTOCOL, -EPROTO, "a tree has one root");
	if (request.flags & HOW_PARENTS)
		make_parents(path);
	if (IS(entry->mode, FOLDER)) {
		long made = SYS(mkdir, path, 0700);

		if (made != -EEXIST)
			need(made);
		root = need(SYS(open, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
		if (!made)
			need(owner_and_mode(root, entry->mode & 07777));
	} else if (IS(entry->mode, REGULAR)) {
		file = need(make_file(AT_CWD, path));
	} else {
		fail_file(-EPERM, path);
	}
}

static void unpack_entry(const char *payload, u64 size)
{
	const char *name = payload + sizeof(struct entry), *target = name, *end = payload + size;
	struct entry entry;
	char *last;
	long dir, result;

	finish_file();
	if (size >= sizeof entry)
		target = name + length(name) + 1;
	if (size < sizeof entry || target >= end || target + length(target) + 1 != end)
		fail(STAGE_PROTOCOL, -EPROTO, "bad ENTRY");
	memcpy(&entry, payload, sizeof entry);
	file_mode = entry.mode & 07777;
	file_mtime = entry.mtime;
	if (!*name) {
		unpack_root(&entry);
		return;
	}
	if (root < 0 || !is_safe(name))
		fail(STAGE_PROTOCOL, -EPROTO, "bad name in a tree");
	dir = open_parent((char *)name, &last);
	if (IS(entry.mode, FOLDER)) {
		result = SYS(mkdirat, dir, last, 0700);
		if (result == -ENOTDIR || result == -EEXIST) {
			result = SYS(openat, dir, last, OPEN_FOLDER);
			if (result < 0) { /* it is no folder: replace it */
				SYS(unlinkat, dir, last, 0);
				result = SYS(mkdirat, dir, last, 0700);
			} else {
				SYS(close, result);
				result = 0;
			}
		}
		if (!result && (result = SYS(openat, dir, last, OPEN_FOLDER)) >= 0) {
			long made = result;

			result = owner_and_mode(made, file_mode);
			SYS(close, made);
		}
	} else if (IS(entry.mode, REGULAR)) {
		result = file = make_file(dir, last);
	} else if (IS(entry.mode, LINK)) {
		SYS(unlinkat, dir, last, 0);
		result = SYS(symlinkat, target, dir, last);
		if (!result && (request.uid != UNCHANGED || request.gid != UNCHANGED))
			result = SYS(fchownat, dir, last, request.uid, request.gid, NO_FOLLOW);
	} else {
		result = -EPERM;
	}
	if (result < 0)
		fail_file(result, last);
	SYS(close, dir);
}

static void unpack(void)
{
	for (;;) {
		receive(&incoming);
		if (incoming.head.kind == END)
			break;
		if (incoming.head.kind == ENTRY)
			unpack_entry(incoming.payload, incoming.head.length);
		else if (incoming.head.kind == DATA && file >= 0)
			need(write_file(file, incoming.payload, incoming.head.length));
		else
			fail(STAGE_PROTOCOL, -EPROTO, "not allowed in a tree");
	}
	finish_file();
	send_frame(END, 0, 0, 0);
}

static void changes_request(void)
{
	changes(path, path2, !!(request.flags & HOW_CONTENT));
	send_frame(END, 0, 0, 0);
}

void serve_files(struct frame *frame)
{
	const char *at = frame->payload + sizeof request, *end = frame->payload + frame->head.length;
	static void (*const requests[])(void) = {
		[READ - READ] = read_file,
		[WRITE - READ] = write_request,
		[LIST - READ] = list_request,
		[STAT - READ] = stat_request,
		[MKDIR - READ] = make_folder,
		[REMOVE - READ] = remove_request,
		[RENAME - READ] = rename_request,
		[PACK - READ] = pack,
		[UNPACK - READ] = unpack,
		[CHANGES - READ] = changes_request,
	};

	if (frame->head.length < sizeof request)
		fail(STAGE_PROTOCOL, -EPROTO, "bad file request");
	memcpy(&request, frame->payload, sizeof request);
	SYS(chdir, "/");
	take_path(&at, end, path);
	if (frame->head.kind == RENAME || frame->head.kind == CHANGES)
		take_path(&at, end, path2);
	if (at != end)
		fail(STAGE_PROTOCOL, -EPROTO, "bad file request");
	requests[frame->head.kind - READ]();
	linger();
}
