/* Users and groups by the guest's /etc/passwd and /etc/group. */
#include "agent.h"

/* The number that is all of `text`; -1 when it is none, or not below 2^32 - 1. */
static long as_number(const char *text)
{
	unsigned long value;

	if (*text < '0' || *text > '9' || length(text) > 10)
		return -1;
	value = number(&text, 10);
	return *text || value >= UNCHANGED ? -1 : (long)value;
}

/* Cut the next line of `*at` into up to `most` fields at its colons; how many, 0 at the end. */
static int fields(char **at, char **field, int most)
{
	char *line = *at;
	int count = 0;

	if (!*line)
		return 0;
	field[count++] = line;
	for (; *line && *line != '\n'; line++) {
		if (*line == ':' && count < most) {
			*line = 0;
			field[count++] = line + 1;
		}
	}
	if (*line)
		*line++ = 0;
	*at = line;
	return count;
}

static void copy_text(char *to, unsigned long size, const char *text)
{
	*to = 0;
	append(to, size, text);
}

/* Find the user by name, or by number when that is not negative; whether there is one. */
static int find_user(const char *name, long uid, struct identity *identity)
{
	unsigned long size;
	char *at = slurp("/etc/passwd", &size), *field[7];
	int count;

	while (at && (count = fields(&at, field, 7)) > 0) {
		long id = count >= 4 ? as_number(field[2]) : -1, group = count >= 4 ? as_number(field[3]) : -1;

		if (id < 0 || group < 0 || (uid < 0 ? !same(field[0], name) : id != uid))
			continue;
		identity->uid = id;
		identity->gid = group;
		copy_text(identity->name, sizeof identity->name, field[0]);
		copy_text(identity->home, sizeof identity->home, count >= 6 && *field[5] ? field[5] : "/");
		return 1;
	}
	return 0;
}

/* Whether the words of `list`, between commas, have `name`. */
static int has_member(const char *list, const char *name)
{
	while (*list) {
		const char *rest = after(list, name);

		if (rest && (!*rest || *rest == ','))
			return 1;
		while (*list && *list++ != ',')
			;
	}
	return 0;
}

/* All groups that have the user as a member, besides its own. */
static void find_groups(struct identity *identity)
{
	unsigned long size;
	char *at = slurp("/etc/group", &size), *field[4];
	int count;

	identity->groups[identity->count++] = identity->gid;
	while (at && (count = fields(&at, field, 4)) > 0) {
		long id = count == 4 ? as_number(field[2]) : -1;

		if (id >= 0 && (u32)id != identity->gid && has_member(field[3], identity->name) &&
		    identity->count < sizeof identity->groups / sizeof identity->groups[0])
			identity->groups[identity->count++] = id;
	}
}

static long find_group(const char *name)
{
	unsigned long size;
	char *at = slurp("/etc/group", &size), *field[4];
	int count;

	while (at && (count = fields(&at, field, 4)) > 0)
		if (count >= 3 && same(field[0], name))
			return as_number(field[2]);
	return as_number(name);
}

/* Who `spec` is: empty for the agent itself, or USER[:GROUP], see PROTOCOL.md. 0, or a negative errno. */
long identify(const char *spec, struct identity *identity)
{
	char user[256] = "";
	const char *group = spec;
	unsigned long n = 0;
	long id;

	memset(identity, 0, sizeof *identity);
	if (!*spec) {
		identity->uid = SYS(getuid);
		if (!find_user("", identity->uid, identity)) {
			copy_text(identity->name, sizeof identity->name, "root");
			copy_text(identity->home, sizeof identity->home, "/");
		}
		return 0;
	}
	while (*group && *group != ':') {
		if (n + 1 >= sizeof user)
			return -ENOENT;
		user[n++] = *group++;
	}
	user[n] = 0;
	if (!find_user(user, -1, identity)) {
		id = as_number(user);
		if (id < 0)
			return -ENOENT;
		if (!find_user("", id, identity)) {
			identity->uid = id;
			copy_text(identity->name, sizeof identity->name, user);
			copy_text(identity->home, sizeof identity->home, "/");
		}
	}
	if (*group) {
		id = find_group(group + 1);
		if (id < 0)
			return -ENOENT;
		identity->gid = id;
		identity->groups[identity->count++] = id;
		return 0;
	}
	find_groups(identity);
	return 0;
}
