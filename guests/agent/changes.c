/* What an overlay has that the folder below it has not, by the overlay's upper folder
   (Linux, Documentation/filesystems/overlayfs.rst). */
#include "agent.h"

enum change { DELETED, CHANGED, ADDED, ENTERED }; /* as PROTOCOL.md has them */

static int lowers[DEPTH + 2]; /* for each depth the folder below, -1: there is none */
static int with_content;

static void send_change(int dir, const char *name, struct stat *status, enum change change)
{
	status->st_nlink = change;
	send_link(dir, name, status, relative);
}

static int upper_of_opaque;

/* Tell of a name in the folder below an opaque one, if that has it no more. */
static long delete_hidden(int lower, const char *name, int depth)
{
	struct stat status;
	u64 end;

	if (SYS(newfstatat, upper_of_opaque, name, &status, NO_FOLLOW) == 0 ||
	    SYS(newfstatat, lower, name, &status, NO_FOLLOW))
		return 0;
	end = enter_name(name, depth);
	send_change(lower, name, &status, DELETED);
	relative[end] = 0;
	return 0;
}

static long change_one(int dir, const char *name, int depth);

/* What is in the folder `fd`, which is at `relative`. */
static long change_folder(int fd, int lower, int depth)
{
	char opaque = 0;
	long error = 0;

	if (lower >= 0 && SYS(fgetxattr, fd, "trusted.overlay.opaque", &opaque, 1) == 1 && opaque == 'y') {
		upper_of_opaque = fd;
		error = each_name(lower, delete_hidden, depth);
	}
	lowers[depth] = lower;
	return error ? error : each_name(fd, change_one, depth);
}

static long change_one(int dir, const char *name, int depth)
{
	struct stat status, old;
	int lower = lowers[depth];
	int there = lower >= 0 && SYS(newfstatat, lower, name, &old, NO_FOLLOW) == 0;
	enum change change = there ? CHANGED : ADDED;
	long fd, error;
	u64 end;

	if (SYS(newfstatat, dir, name, &status, NO_FOLLOW))
		return 0; /* it has gone since */
	end = enter_name(name, depth);
	if (IS(status.st_mode, CHARACTER) && !status.st_rdev) {
		if (there)
			send_change(lower, name, &old, DELETED);
	} else if (IS(status.st_mode, FOLDER) || IS(status.st_mode, REGULAR)) {
		int is_folder = IS(status.st_mode, FOLDER);

		if (is_folder && there && status.st_mode == old.st_mode && status.st_uid == old.st_uid &&
		    status.st_gid == old.st_gid)
			change = ENTERED;
		send_change(dir, name, &status, change);
		if (is_folder || with_content) {
			fd = SYS(openat, dir, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
			if (fd < 0)
				fail_file(fd, relative);
			if (is_folder) {
				long below = there && IS(old.st_mode, FOLDER) ? SYS(openat, lower, name, OPEN_FOLDER) : -1;

				error = change_folder(fd, below, depth + 1);
				if (error)
					fail_file(error, relative);
				if (below >= 0)
					SYS(close, below);
			} else {
				send_content(fd);
			}
			SYS(close, fd);
		}
	} else {
		send_change(dir, name, &status, change);
	}
	relative[end] = 0;
	return 0;
}

/* Send an ENTRY for all that the overlay of these folders has changed, a folder before what is in it. */
void changes(const char *upper, const char *lower, int content)
{
	long fd = SYS(open, upper, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	long below = SYS(open, lower, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	long error;

	if (fd < 0)
		fail_file(fd, upper);
	if (below < 0)
		fail_file(below, lower);
	with_content = content;
	error = change_folder(fd, below, 0);
	if (error)
		fail_file(error, relative);
}
