/* SPDX-License-Identifier: Apache-2.0
 *
 * The KVM API (Documentation/virt/kvm/api.rst) as C functions, one for each ioctl: mechanism only, no policy.
 * Every function returns the ioctl's result, or -errno. cffi drops the GIL around each call, KVM_RUN among them.
 * Built by _kvm_build.py; typed and documented in _kvm_ioctls.pyi. Needs the headers of Linux 6.1 or later.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The three shapes an ioctl has: no argument, a number, a structure. */
#define IOCTL(name, request)                                                                                          \
    static int name(int fd)                                                                                           \
    {                                                                                                                 \
        int result = ioctl(fd, request, 0);                                                                           \
        return result < 0 ? -errno : result;                                                                          \
    }
#define IOCTL_NUMBER(name, request)                                                                                   \
    static int name(int fd, unsigned long argument)                                                                   \
    {                                                                                                                 \
        int result = ioctl(fd, request, argument);                                                                    \
        return result < 0 ? -errno : result;                                                                          \
    }
#define IOCTL_STRUCT(name, request, type)                                                                             \
    static int name(int fd, type *argument)                                                                           \
    {                                                                                                                 \
        int result = ioctl(fd, request, argument);                                                                    \
        return result < 0 ? -errno : result;                                                                          \
    }

/* On /dev/kvm. */
IOCTL(kvm_get_api_version, KVM_GET_API_VERSION)
IOCTL_NUMBER(kvm_create_vm, KVM_CREATE_VM)
IOCTL_NUMBER(kvm_check_extension, KVM_CHECK_EXTENSION) /* also on a VM */
IOCTL(kvm_get_vcpu_mmap_size, KVM_GET_VCPU_MMAP_SIZE)
IOCTL_STRUCT(kvm_get_supported_cpuid, KVM_GET_SUPPORTED_CPUID, void)
IOCTL_STRUCT(kvm_get_msr_index_list, KVM_GET_MSR_INDEX_LIST, void)

/* On a VM. */
IOCTL_NUMBER(kvm_create_vcpu, KVM_CREATE_VCPU)
IOCTL_STRUCT(kvm_set_user_memory_region, KVM_SET_USER_MEMORY_REGION, struct kvm_userspace_memory_region)
IOCTL_STRUCT(kvm_get_dirty_log, KVM_GET_DIRTY_LOG, struct kvm_dirty_log)
IOCTL_NUMBER(kvm_set_tss_addr, KVM_SET_TSS_ADDR)
IOCTL_STRUCT(kvm_set_identity_map_addr, KVM_SET_IDENTITY_MAP_ADDR, uint64_t)
IOCTL(kvm_create_irqchip, KVM_CREATE_IRQCHIP)
IOCTL_STRUCT(kvm_create_pit2, KVM_CREATE_PIT2, struct kvm_pit_config)
IOCTL_STRUCT(kvm_get_pit2, KVM_GET_PIT2, void)
IOCTL_STRUCT(kvm_set_pit2, KVM_SET_PIT2, void)
IOCTL_STRUCT(kvm_get_irqchip, KVM_GET_IRQCHIP, void)
IOCTL_STRUCT(kvm_set_irqchip, KVM_SET_IRQCHIP, void)
IOCTL_STRUCT(kvm_irqfd, KVM_IRQFD, struct kvm_irqfd)
IOCTL_STRUCT(kvm_ioeventfd, KVM_IOEVENTFD, struct kvm_ioeventfd)
IOCTL_STRUCT(kvm_set_gsi_routing, KVM_SET_GSI_ROUTING, void)
IOCTL_STRUCT(kvm_signal_msi, KVM_SIGNAL_MSI, struct kvm_msi)
IOCTL_STRUCT(kvm_register_coalesced_mmio, KVM_REGISTER_COALESCED_MMIO, struct kvm_coalesced_mmio_zone)
IOCTL_STRUCT(kvm_unregister_coalesced_mmio, KVM_UNREGISTER_COALESCED_MMIO, struct kvm_coalesced_mmio_zone)
IOCTL_STRUCT(kvm_get_clock, KVM_GET_CLOCK, struct kvm_clock_data)
IOCTL_STRUCT(kvm_set_clock, KVM_SET_CLOCK, struct kvm_clock_data)
IOCTL_STRUCT(kvm_enable_cap, KVM_ENABLE_CAP, struct kvm_enable_cap)

static int kvm_irq_line(int fd, uint32_t gsi, uint32_t level)
{
    struct kvm_irq_level line = {.irq = gsi, .level = level};
    int result = ioctl(fd, KVM_IRQ_LINE, &line);
    return result < 0 ? -errno : result;
}

/* On a vCPU. */
IOCTL(kvm_run, KVM_RUN)
IOCTL_STRUCT(kvm_get_regs, KVM_GET_REGS, void)
IOCTL_STRUCT(kvm_set_regs, KVM_SET_REGS, void)
IOCTL_STRUCT(kvm_get_sregs, KVM_GET_SREGS, void)
IOCTL_STRUCT(kvm_set_sregs, KVM_SET_SREGS, void)
IOCTL_STRUCT(kvm_get_fpu, KVM_GET_FPU, void)
IOCTL_STRUCT(kvm_set_fpu, KVM_SET_FPU, void)
IOCTL_STRUCT(kvm_get_xsave, KVM_GET_XSAVE, void)
IOCTL_STRUCT(kvm_get_xsave2, KVM_GET_XSAVE2, void)
IOCTL_STRUCT(kvm_set_xsave, KVM_SET_XSAVE, void)
IOCTL_STRUCT(kvm_get_xcrs, KVM_GET_XCRS, void)
IOCTL_STRUCT(kvm_set_xcrs, KVM_SET_XCRS, void)
IOCTL_STRUCT(kvm_get_msrs, KVM_GET_MSRS, void)
IOCTL_STRUCT(kvm_set_msrs, KVM_SET_MSRS, void)
IOCTL_STRUCT(kvm_set_cpuid2, KVM_SET_CPUID2, void)
IOCTL_STRUCT(kvm_get_cpuid2, KVM_GET_CPUID2, void)
IOCTL_STRUCT(kvm_get_lapic, KVM_GET_LAPIC, void)
IOCTL_STRUCT(kvm_set_lapic, KVM_SET_LAPIC, void)
IOCTL_STRUCT(kvm_get_vcpu_events, KVM_GET_VCPU_EVENTS, void)
IOCTL_STRUCT(kvm_set_vcpu_events, KVM_SET_VCPU_EVENTS, void)
IOCTL_STRUCT(kvm_get_debugregs, KVM_GET_DEBUGREGS, void)
IOCTL_STRUCT(kvm_set_debugregs, KVM_SET_DEBUGREGS, void)
IOCTL_STRUCT(kvm_get_mp_state, KVM_GET_MP_STATE, struct kvm_mp_state)
IOCTL_STRUCT(kvm_set_mp_state, KVM_SET_MP_STATE, struct kvm_mp_state)
IOCTL_STRUCT(kvm_set_guest_debug, KVM_SET_GUEST_DEBUG, void)
IOCTL_STRUCT(kvm_translate, KVM_TRANSLATE, struct kvm_translation)
IOCTL_STRUCT(kvm_interrupt, KVM_INTERRUPT, struct kvm_interrupt)
IOCTL(kvm_nmi, KVM_NMI)
IOCTL(kvm_get_tsc_khz, KVM_GET_TSC_KHZ)
IOCTL_NUMBER(kvm_set_tsc_khz, KVM_SET_TSC_KHZ)
IOCTL(kvm_kvmclock_ctrl, KVM_KVMCLOCK_CTRL)

/* Any system call: for those of the sandbox, which Python has no names for. */
static long kvmpy_syscall(long number, unsigned long a, unsigned long b, unsigned long c, unsigned long d,
                          unsigned long e)
{
    long result = syscall(number, a, b, c, d, e);
    return result < 0 ? -errno : result;
}

/* A signal that does nothing but make KVM_RUN return EINTR: Python's own handlers would need the GIL to run. */
static void kick_arrived(int signal_number)
{
    (void)signal_number;
}

static int kvmpy_prepare_kick(int signal_number)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = kick_arrived;
    action.sa_flags = SA_RESTART;
    return sigaction(signal_number, &action, NULL) < 0 ? -errno : 0;
}

/* What is said when memory that a file or the host stands for has gone, before the process ends with a status. */
static const char *bus_error_text;
static size_t bus_error_length;
static int bus_error_status;

static void bus_error(int signal_number, siginfo_t *information, void *context)
{
    (void)context;
    if (information->si_code != BUS_ADRERR) {
        signal(signal_number, SIG_DFL); /* and what was tried happens again */
        return;
    }
    if (write(STDERR_FILENO, bus_error_text, bus_error_length) < 0)
        _exit(bus_error_status);
    _exit(bus_error_status);
}

static int kvmpy_explain_bus_error(const char *text, size_t length, int status)
{
    struct sigaction action;
    char *copy = malloc(length);
    if (!copy)
        return -ENOMEM;
    bus_error_text = memcpy(copy, text, length);
    bus_error_length = length;
    bus_error_status = status;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = bus_error;
    action.sa_flags = SA_SIGINFO;
    return sigaction(SIGBUS, &action, NULL) < 0 ? -errno : 0;
}

/* A stream of output bytes from guests' registers to one reader on another thread: the twin of core/stream.py. */
struct kvmpy_stream {
    pthread_mutex_t lock; /* a leaf */
    uint8_t *data;
    size_t used, capacity;
    size_t under_way, limit; /* bytes that the host has not taken yet, and from how many on the stream is full */
    size_t batch;            /* bytes that do not wait for more, nor does the end of a line */
    int wake;                /* eventfd of the reader */
    int called, lingers, full;
};

static struct kvmpy_stream *kvmpy_stream_new(size_t limit, size_t batch, int wake)
{
    struct kvmpy_stream *stream = calloc(1, sizeof *stream);
    if (stream) {
        pthread_mutex_init(&stream->lock, NULL);
        stream->limit = limit;
        stream->batch = batch;
        stream->wake = wake;
    }
    return stream;
}

static void kvmpy_stream_free(struct kvmpy_stream *stream)
{
    free(stream->data);
    pthread_mutex_destroy(&stream->lock);
    free(stream);
}

/* With the lock held: append, and say whether the reader is to be woken; -ENOMEM without a change. */
static int stream_append(struct kvmpy_stream *stream, const uint8_t *data, size_t size)
{
    if (stream->capacity - stream->used < size) {
        size_t capacity = 2 * stream->capacity + size + 4096;
        uint8_t *larger = realloc(stream->data, capacity);
        if (!larger)
            return -ENOMEM;
        stream->data = larger;
        stream->capacity = capacity;
    }
    memcpy(stream->data + stream->used, data, size);
    stream->used += size;
    stream->under_way += size;
    stream->full |= stream->under_way >= stream->limit; /* until the host has taken half of it */
    if (stream->called)
        return 0;
    if (stream->used >= stream->batch || memchr(data, '\n', size))
        return stream->called = 1;
    if (stream->lingers)
        return 0;
    return stream->lingers = 1;
}

static void stream_wake(struct kvmpy_stream *stream)
{
    uint64_t one = 1;
    ssize_t written = write(stream->wake, &one, sizeof one); /* fails only at 2^64 - 2 wakes without a read */
    (void)written;
}

/* Whether there is still room afterwards; -ENOMEM. Takes all of `data`. */
static int kvmpy_stream_put(struct kvmpy_stream *stream, const uint8_t *data, size_t size)
{
    pthread_mutex_lock(&stream->lock);
    int wake = stream_append(stream, data, size), room = !stream->full;
    pthread_mutex_unlock(&stream->lock);
    if (wake > 0)
        stream_wake(stream);
    return wake < 0 ? wake : room;
}

/* How many bytes a kvmpy_stream_take would give; whether they may wait for more is in *lingers. */
static size_t kvmpy_stream_waiting(struct kvmpy_stream *stream, int *lingers)
{
    pthread_mutex_lock(&stream->lock);
    size_t used = stream->used;
    *lingers = stream->lingers && !stream->called;
    pthread_mutex_unlock(&stream->lock);
    return used;
}

/* Copy up to `size` bytes out, the oldest first, and let the next byte wake the reader again. What has come since it asked
 * how many there are wakes it at once. */
static size_t kvmpy_stream_take(struct kvmpy_stream *stream, uint8_t *data, size_t size)
{
    pthread_mutex_lock(&stream->lock);
    if (size > stream->used)
        size = stream->used;
    memcpy(data, stream->data, size);
    stream->used -= size;
    memmove(stream->data, stream->data + size, stream->used);
    int rest = stream->called = stream->lingers = stream->used > 0;
    pthread_mutex_unlock(&stream->lock);
    if (rest)
        stream_wake(stream);
    return size;
}

/* The host has taken `size` bytes; whether a full stream has thereby got room for half its limit. */
static int kvmpy_stream_sent(struct kvmpy_stream *stream, size_t size)
{
    pthread_mutex_lock(&stream->lock);
    stream->under_way -= size < stream->under_way ? size : stream->under_way;
    int drained = stream->full && stream->under_way <= stream->limit / 2;
    if (drained)
        stream->full = 0;
    pthread_mutex_unlock(&stream->lock);
    return drained;
}

/* Wake nobody any more: the reader is gone, and with it its eventfd. */
static void kvmpy_stream_close(struct kvmpy_stream *stream)
{
    pthread_mutex_lock(&stream->lock);
    stream->wake = -1;
    pthread_mutex_unlock(&stream->lock);
}

static size_t kvmpy_stream_under_way(struct kvmpy_stream *stream)
{
    return __atomic_load_n(&stream->under_way, __ATOMIC_RELAXED);
}

/* Registers that need no decision, which the run loop answers itself. Python keeps the cells up to date (core/cell.py
 * has the meaning of `kinds`); a cell that is not sure has kind 0, and the device is asked. */
enum {
    READ_VALUE = 1,
    WRITE_SEEN = 2,
    WRITE_STREAM = 4,
    WRITE_CLEARS = 8,
    CELLS = 256 /* a power of two */
};

struct kvmpy_cell {
    uint32_t kinds;
    uint32_t value;
    uint8_t seen[32];            /* WRITE_SEEN: a bit for each byte that brings no news when it is written */
    struct kvmpy_stream *stream; /* WRITE_STREAM: where bytes go */
    struct kvmpy_cell *target;   /* WRITE_CLEARS: whose bits are cleared */
};

struct kvmpy_cells {
    uint64_t key[CELLS]; /* as kvmpy_run returns it for a read; 0: none */
    struct kvmpy_cell *cell[CELLS];
};

/* Where `key` is, or would be: there is always a free place, see kvmpy_cell_add. */
static unsigned cell_place(const struct kvmpy_cells *cells, uint64_t key)
{
    unsigned at = (key * 0x9e3779b97f4a7c15u) >> 56;
    while (cells->key[at] && cells->key[at] != key)
        at = (at + 1) % CELLS;
    return at;
}

/* Let `cell` answer for `key`; false when there is no room, which leaves a quarter free so that misses are quick.
 * Only while no vCPU runs. */
static int kvmpy_cell_add(struct kvmpy_cells *cells, uint64_t key, struct kvmpy_cell *cell)
{
    unsigned used = 0;
    for (unsigned at = 0; at < CELLS; at++)
        used += cells->key[at] != 0;
    if (used >= CELLS / 4 * 3)
        return 0;
    unsigned at = cell_place(cells, key);
    cells->cell[at] = cell;
    cells->key[at] = key;
    return 1;
}

enum { RECENT = 32 }; /* exits that are remembered, for crash reports */

struct kvmpy_exit {
    uint64_t address, count;
    uint32_t reason, size, is_write, pad;
};

struct kvmpy_vcpu {
    struct kvm_run *run; /* NULL when the vCPU has been closed */
    struct kvmpy_cells *cells;
    uint64_t data;    /* what the guest wrote, in the low bytes */
    uint8_t *wanted;  /* where the answer to the read belongs that was returned last */
    uint64_t exits;   /* how many there have been, those answered here among them */
    uint32_t answered_size;
    struct kvmpy_exit recent[RECENT];
};

#define KVMPY_MMIO (1ull << 60)
#define KVMPY_WRITE (1ull << 61)
#define KVMPY_OTHER (1ull << 62)

/* Whether a cell has answered the write of `count` elements of `size` bytes. */
static int cell_takes(struct kvmpy_cell *cell, const uint8_t *data, unsigned size, unsigned count)
{
    uint32_t kinds = __atomic_load_n(&cell->kinds, __ATOMIC_ACQUIRE);
    if (kinds & WRITE_CLEARS && size == 4 && count == 1 && cell->target) {
        uint32_t bits;
        memcpy(&bits, data, sizeof bits);
        __atomic_and_fetch(&cell->target->value, ~bits, __ATOMIC_SEQ_CST);
        return 1;
    }
    if (kinds & WRITE_SEEN && size == 1 && count == 1 && cell->seen[*data / 8] & 1 << *data % 8) {
        __atomic_store_n(&cell->value, *data, __ATOMIC_RELAXED);
        return 1;
    }
    if (kinds & WRITE_STREAM && size == 1 && cell->stream) {
        struct kvmpy_stream *stream = cell->stream;
        int wake = -1;
        pthread_mutex_lock(&stream->lock);
        if (stream->under_way + count < stream->limit) /* the device has to know when it becomes full */
            wake = stream_append(stream, data, count);
        pthread_mutex_unlock(&stream->lock);
        if (wake > 0)
            stream_wake(stream);
        return wake >= 0;
    }
    return 0;
}

static void cell_answer(uint8_t *to, uint32_t value, unsigned size)
{
    uint64_t wide = value;
    memcpy(to, &wide, size);
}

/* KVM_RUN until an exit that no cell answers. `answer` is for the read that the last call returned.
 *
 * Returns -errno; or, for a read or write of one element, its size (bits 0-3), address (from bit 4 on), and KVMPY_MMIO
 * and KVMPY_WRITE; or KVMPY_OTHER for whatever else is in the kvm_run page, strings among it. */
static int64_t kvmpy_run(int fd, struct kvmpy_vcpu *cpu, uint64_t answer)
{
    struct kvm_run *run = cpu->run;
    if (!run)
        return -EBADF;
    if (cpu->wanted) {
        memcpy(cpu->wanted, &answer, cpu->answered_size);
        cpu->wanted = NULL;
    }
    for (;;) {
        if (ioctl(fd, KVM_RUN, 0) < 0)
            return -errno;
        struct kvmpy_exit *exit = &cpu->recent[cpu->exits++ % RECENT];
        unsigned size, count = 1, is_write;
        uint64_t key;
        uint8_t *data;
        *exit = (struct kvmpy_exit){.reason = run->exit_reason};
        if (run->exit_reason == KVM_EXIT_IO) {
            size = run->io.size;
            count = run->io.count;
            is_write = run->io.direction == KVM_EXIT_IO_OUT;
            data = (uint8_t *)run + run->io.data_offset;
            key = (uint64_t)run->io.port << 4 | size;
            exit->address = run->io.port;
        } else if (run->exit_reason == KVM_EXIT_MMIO && run->mmio.len <= 8 && !(run->mmio.phys_addr >> 56)) {
            size = run->mmio.len;
            is_write = !!run->mmio.is_write;
            data = run->mmio.data;
            key = run->mmio.phys_addr << 4 | size | KVMPY_MMIO;
            exit->address = run->mmio.phys_addr;
        } else {
            return KVMPY_OTHER;
        }
        exit->size = size;
        exit->count = count;
        exit->is_write = is_write;
        struct kvmpy_cell *cell = cpu->cells->cell[cell_place(cpu->cells, key)];
        if (cell) {
            if (is_write) {
                if (cell_takes(cell, data, size, count))
                    continue;
            } else if (__atomic_load_n(&cell->kinds, __ATOMIC_ACQUIRE) & READ_VALUE) {
                for (unsigned at = 0; at < count; at++)
                    cell_answer(data + at * size, cell->value, size);
                continue;
            }
        }
        if (count != 1)
            return KVMPY_OTHER;
        if (is_write) {
            cpu->data = 0;
            memcpy(&cpu->data, data, size);
            return key | KVMPY_WRITE;
        }
        cpu->wanted = data;
        cpu->answered_size = size;
        return key;
    }
}
