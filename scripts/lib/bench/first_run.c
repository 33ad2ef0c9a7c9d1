/* SPDX-License-Identifier: Apache-2.0
 *
 * Preloaded into a contender: writes the time of its first KVM_RUN, in ns of CLOCK_MONOTONIC, to the file that
 * BENCH_FIRST_RUN names. Any monitor will do that calls the C library's ioctl(). The file is opened when a VM is
 * made: later a monitor may have locked itself in.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static int (*next)(int, unsigned long, ...);
static atomic_flag seen = ATOMIC_FLAG_INIT, asked = ATOMIC_FLAG_INIT;
static int out = -1;

__attribute__((constructor)) static void find(void) { next = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl"); }

static void prepare(void)
{
    const char *name = getenv("BENCH_FIRST_RUN");
    out = name ? open(name, O_WRONLY | O_CREAT | O_CLOEXEC, 0600) : -1;
}

static void note(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    char text[32]; /* dprintf() would look where the file ends, which a locked-in vCPU may not */
    int length = snprintf(text, sizeof text, "%lld\n", now.tv_sec * 1000000000LL + now.tv_nsec);
    if (out < 0 || write(out, text, length) != length)
        abort();
    close(out);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (request == KVM_CREATE_VM && !atomic_flag_test_and_set(&asked))
        prepare();
    if (request == KVM_RUN && !atomic_flag_test_and_set(&seen))
        note();
    return next(fd, request, argument);
}
