/*
 * Keeps records on a file system, for tests/linux/test_power_cuts.py:
 *   records DISK FOLDER ROUNDS [nosync]
 * Each round appends a record to FOLDER/log, replaces FOLDER/state by a new file, and changes pages of FOLDER/db, whose
 * old content is in FOLDER/db-journal until that is safe. When one of these is safe, as far as fsync tells, PORT gets a
 * word: DISK << 28 | what << 24 | round. With `nosync`, fsync is forgotten. Files that nobody syncs come and go.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PORT = 0x5e4, PAGE = 4096, PAGES = 8, LOG = 1, STATE = 2, DB = 3 };

static int disk, forgetful;
static uint8_t buffer[1 << 16];

static void check(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

static void safe(int what, int number)
{
	outl((uint32_t)disk << 28 | (uint32_t)what << 24 | (uint32_t)number, PORT);
}

static void sync_file(int fd)
{
	if (!forgetful)
		check(!fsync(fd), "fsync");
}

static void sync_folder(void)
{
	int fd = open(".", O_RDONLY | O_DIRECTORY);

	check(fd >= 0, "folder");
	sync_file(fd);
	close(fd);
}

static int create(const char *name)
{
	int fd = open(name, O_CREAT | O_RDWR | O_TRUNC, 0644);

	check(fd >= 0, name);
	return fd;
}

static void put(int fd, size_t size)
{
	check(write(fd, buffer, size) == (ssize_t)size, "write");
}

/* The content of record `number`, as the test knows it, too. */
static size_t fill(int what, int number)
{
	size_t size = 100 + (size_t)(number * 37 % 3000);

	for (size_t at = 0; at < size; at++)
		buffer[at] = (uint8_t)(what * 31 + number * 131 + (int)at * 7);
	return size;
}

static void append(int number)
{
	int fd = open("log", O_CREAT | O_WRONLY | O_APPEND, 0644);

	check(fd >= 0, "log");
	put(fd, fill(LOG, number));
	sync_file(fd);
	close(fd);
	if (number == 1)
		sync_folder();
	safe(LOG, number);
}

static void replace(int number)
{
	int fd = create("state.new");
	size_t size = fill(STATE, number);

	memcpy(buffer + size, &number, sizeof number);
	put(fd, size + sizeof number);
	sync_file(fd);
	close(fd);
	check(!rename("state.new", "state"), "rename");
	sync_folder();
	safe(STATE, number);
}

static uint32_t sum(const uint8_t *data, size_t size)
{
	uint32_t a = 1, b = 0; /* Adler-32, RFC 1950 */

	while (size--) {
		a = (a + *data++) % 65521;
		b = (b + a) % 65521;
	}
	return b << 16 | a;
}

/* Pages 0, number % PAGES and (3 * number + 1) % PAGES become full of `number`. */
static void change(int number)
{
	int pages[] = {0, number % PAGES, (3 * number + 1) % PAGES};
	int db = open("db", O_CREAT | O_RDWR, 0644), journal = create("db-journal");
	uint32_t check_sum;

	check(db >= 0, "db");
	if (number == 1)
		check(!ftruncate(db, PAGE * PAGES), "ftruncate");
	for (int n = 0; n < 3; n++) {
		uint8_t *entry = buffer + n * (PAGE + 4);
		memcpy(entry, &pages[n], 4);
		check(pread(db, entry + 4, PAGE, pages[n] * PAGE) == PAGE, "pread");
	}
	check_sum = sum(buffer, 3 * (PAGE + 4));
	memcpy(buffer + 3 * (PAGE + 4), &check_sum, 4);
	put(journal, 3 * (PAGE + 4) + 4);
	sync_file(journal);
	sync_folder();
	for (int n = 0; n < 3; n++) {
		for (int at = 0; at < PAGE; at += 4)
			memcpy(buffer + at, &number, 4);
		check(pwrite(db, buffer, PAGE, pages[n] * PAGE) == PAGE, "pwrite");
	}
	sync_file(db);
	close(db);
	close(journal);
	check(!unlink("db-journal"), "unlink");
	sync_folder();
	safe(DB, number);
}

static void litter(int number)
{
	char name[32];
	int fd;

	sprintf(name, "litter%d", number % 20);
	unlink(name);
	fd = create(name);
	put(fd, (size_t)(number * 7919 % 30000));
	close(fd);
	sprintf(name, "folder%d", number % 7);
	if (mkdir(name, 0755))
		rmdir(name);
}

int main(int count, char **words)
{
	int rounds;

	check(count >= 4, "usage: records DISK FOLDER ROUNDS [nosync]");
	disk = atoi(words[1]);
	rounds = atoi(words[3]);
	forgetful = count > 4;
	check(!chdir(words[2]), words[2]);
	check(!iopl(3), "iopl");
	for (int number = 1; number <= rounds; number++) {
		litter(number);
		append(number);
		replace(number);
		change(number);
	}
	return 0;
}
