/* What guests/init.c reads, read from a file instead: each input is given to everything in it that parses.
 * Its system calls come here (test_init_parsers.py sees to that), and do nothing but read the input. */

/* Of libc, whose headers do not go together with those of the kernel. */
void *malloc(unsigned long), *calloc(unsigned long, unsigned long);
void free(void *);
void *fopen(const char *, const char *);
unsigned long fread(void *, unsigned long, unsigned long, void *);

static const unsigned char *input;
static unsigned long input_size, input_at;
static void *powered_off[5];

long fake(long number, long a, long b, long c, long d, long e, long f);

#include "free.h"
#undef ENTRY_POINT
#define ENTRY_POINT
#include "init.c"

long fake(long number, long a, long b, long c, long d, long e, long f)
{
	unsigned long left = input_size - input_at, count = (unsigned long)c < left ? (unsigned long)c : left;

	(void)a, (void)d, (void)e, (void)f;
	switch (number) {
	case __NR_open:
		input_at = 0;
		return 3;
	case __NR_lseek:
		return c == 2 ? (long)input_size : 0;
	case __NR_mmap:
		return (long)calloc(1, b); /* with an end, beyond which nothing may be read */
	case __NR_pread64:
		count = (unsigned long)c < input_size ? (unsigned long)c : input_size;
		memcpy((void *)b, input, count);
		return count;
	case __NR_read:
		memcpy((void *)b, input + input_at, count);
		input_at += count;
		return count;
	case __NR_write:
		return c;
	case __NR_fork:
		return 1;
	case __NR_socket:
		return 4;
	case __NR_pause:
		__builtin_longjmp(powered_off, 1);
	}
	return 0;
}

static void parse(void)
{
	static const char *const names[] = {"root=", "rootfstype=", "kvmpy.ip=", "init=", ""};
	char value[16], given[128];
	unsigned long size;
	char *text;

	memset(cmdline, 0, sizeof cmdline);
	peek("cmdline", cmdline, sizeof cmdline);
	for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
		option(names[i], value, sizeof value);
		option(names[i], given, sizeof given);
	}
	network_up();
	claimed(0xc0000000UL);
	load_modules();
	volumes = slurp("volumes", &volumes_size);
	mount_volumes();
	free(volumes);
	text = slurp("words", &size);
	free(text);
	wanted = "LABEL=abc";
	identify("/sys/class/block", "sda");
	wanted = "UUID=00000000-0000-0000-0000-000000000000";
	identify("/sys/class/block", "a name that is longer than any that a disk of Linux has, or that fits into 128 bytes, "
				     "which are what there is room for in this program, give or take a few");
	mount_root(0);
	input_at = 0;
	if (!__builtin_setjmp(powered_off))
		prompt();
}

int main(int argc, char **argv)
{
	void *file = fopen(argv[argc - 1], "rb");
	unsigned size;

	while (fread(&size, sizeof size, 1, file) == 1) {
		unsigned char *data = malloc(size ? size : 1);

		if (fread(data, 1, size, file) != size)
			return 2;
		input = data;
		input_size = size;
		parse();
		free(data);
	}
	return 0;
}
