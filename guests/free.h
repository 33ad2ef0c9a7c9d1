/* What free-standing programs of the guest have instead of a libc. HOSTED: there is one, for sanitizers. */
#pragma once

#include <asm/errno.h>
#include <asm/fcntl.h>
#include <asm/unistd.h>
#include <linux/mman.h>

#define DEFAULT_PATH "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"

/* System calls. */

static inline long syscall6(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}
#define SYS_(n, a, b, c, d, e, f, ...) \
	syscall6(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define SYS(name, ...) SYS_(__NR_##name, ##__VA_ARGS__, 0, 0, 0, 0, 0, 0)

/* Strings. gcc may call the mem functions on its own. */

#ifdef HOSTED
#include <string.h>
#else
__attribute__((weak)) void *memcpy(void *to, const void *from, unsigned long size)
{
	void *at = to;

	__asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(size) : : "memory");
	return to;
}

__attribute__((weak)) void *memset(void *to, int value, unsigned long size)
{
	void *at = to;

	__asm__ volatile("rep stosb" : "+D"(at), "+c"(size) : "a"(value) : "memory");
	return to;
}
#endif

/* Copy to a lower address, where the two may overlap. */
static inline void move(void *to, const void *from, unsigned long size)
{
	__asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
}

static inline unsigned long length(const char *text)
{
	unsigned long n = 0;

	while (text[n])
		n++;
	return n;
}

static inline int same(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

/* What follows `prefix` in `text`, or NULL. */
static inline const char *after(const char *text, const char *prefix)
{
	for (; *prefix; text++, prefix++)
		if (*text != *prefix)
			return 0;
	return text;
}

static inline int contains(const char *text, const char *part)
{
	for (; *text; text++)
		if (after(text, part))
			return 1;
	return 0;
}

/* The number at `*text` in `base`; moves `*text` past it. */
static inline unsigned long number(const char **text, unsigned base)
{
	unsigned long value = 0;

	for (;; ++*text) {
		unsigned digit = **text >= 'a' ? **text - 'a' + 10u : **text - '0' + 0u;

		if (digit >= base)
			return value;
		value = value * base + digit;
	}
}

/* Append `text` to `buf` of `size` bytes, cutting what does not fit; always NUL-terminated. */
static inline void append(char *buf, unsigned long size, const char *text)
{
	unsigned long at = length(buf);

	while (*text && at + 1 < size)
		buf[at++] = *text++;
	buf[at] = 0;
}

/* Append `value` in decimal, at least `digits` wide. */
static inline void append_number(char *buf, unsigned long size, unsigned long value, int digits)
{
	char text[24];
	int at = sizeof text - 1;

	text[at] = 0;
	do {
		text[--at] = '0' + value % 10;
		value /= 10;
	} while (--digits > 0 || value);
	append(buf, size, text + at);
}

/* Files. */

static inline void write_all(int fd, const char *data, unsigned long size)
{
	while (size) {
		long n = SYS(write, fd, data, size);

		if (n == -EINTR || n == -EAGAIN)
			continue;
		if (n <= 0)
			return;
		data += n;
		size -= n;
	}
}

static inline void print(const char *text)
{
	write_all(1, text, length(text));
}

/* The whole of a file followed by a NUL, its size in `*size`; NULL when it cannot be had. Never freed. */
static inline char *slurp(const char *path, unsigned long *size)
{
	long fd = SYS(open, path, O_RDONLY | O_CLOEXEC);
	long end, data, n;

	if (fd < 0)
		return 0;
	end = SYS(lseek, fd, 0, 2 /* SEEK_END */);
	SYS(lseek, fd, 0, 0 /* SEEK_SET */);
	data = SYS(mmap, 0, end + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	*size = 0;
	if (end < 0 || (unsigned long)data > -4096UL) {
		SYS(close, fd);
		return 0;
	}
	while (*size < (unsigned long)end && (n = SYS(read, fd, data + *size, end - *size)) > 0)
		*size += n;
	SYS(close, fd);
	return (char *)data;
}

static inline void put(const char *path, const char *text)
{
	long fd = SYS(open, path, O_WRONLY | O_CLOEXEC);

	if (fd >= 0) {
		write_all(fd, text, length(text));
		SYS(close, fd);
	}
}

/* The program begins at start(), with the stack as the kernel leaves it (System V ABI, x86-64, 3.4.1): argc, argv,
   NULL, envp, NULL. */
#define ENTRY_POINT \
	__asm__(".globl _start\n" \
		"_start: xor %ebp, %ebp\n" \
		"mov %rsp, %rdi\n" \
		"and $-16, %rsp\n" \
		"call start\n")
