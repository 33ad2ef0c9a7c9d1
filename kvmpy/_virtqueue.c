/* SPDX-License-Identifier: Apache-2.0
 *
 * The hot path of virtio queues: the twin of virtio/queue.py and of what virtio/blk.py does with ordinary requests.
 *
 * What is not ordinary - a rule of the queue broken, an odd request, an error of the host - is left in the ring as if
 * nobody had looked at it, and Python, which is told so, takes it from there: all errors have one home. A guest may
 * change its memory at any time: what it wrote is copied once, and the copy is checked and used. All pointers into guest
 * RAM come from `in_ram`. Every function is called without the GIL, and with the device's lock held.
 * Built by _virtqueue_build.py; typed and documented in _virtqueue.pyi.
 */
#define _GNU_SOURCE 1
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

enum { MAX_REGIONS = 8, MAX_SEGMENTS = 256 };

enum outcome {
    KVMPY_EMPTY,   /* nothing is left, and the driver will kick for the next one */
    KVMPY_DRAINED, /* nothing is left, and the driver will not kick: call again */
    KVMPY_MORE,    /* there may be more, but it is time to interrupt */
    KVMPY_ODD,     /* the next one is not ordinary */
};

/* RAM that is contiguous in guest-physical space, as core/memory.py has it; sorted by address. */
struct kvmpy_region {
    uint64_t gpa, size;
    uint8_t *bytes;
};

struct kvmpy_queue {
    struct kvmpy_region region[MAX_REGIONS];
    uint32_t regions;
    uint32_t size;                   /* entries, a power of two */
    uint8_t *desc, *avail, *used;    /* inside the regions, of the lengths that `size` gives, aligned as VIRTIO wants */
    uint8_t indirect, event_idx;     /* features */
    uint16_t next_avail, next_used;
};

struct kvmpy_disk {
    uint64_t sectors;
    int32_t fd;
    uint8_t writable; /* and the driver flushes: where it cannot, each write has to reach the disk */
};

/* struct virtq_desc (VIRTIO 1.2, 2.7.5) */
struct descriptor {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

enum { DESC_F_NEXT = 1, DESC_F_WRITE = 2, DESC_F_INDIRECT = 4 };

/* One request: the readable buffers are segment[first .. readable), the writable ones segment[readable .. segments). */
struct chain {
    unsigned head, first, readable, segments;
    uint64_t size, capacity; /* bytes that can be read and written */
    struct iovec segment[MAX_SEGMENTS];
};

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* Where the guest's bytes [gpa, gpa+size) are; NULL unless all of them are in one region. */
static uint8_t *in_ram(const struct kvmpy_queue *queue, uint64_t gpa, uint64_t size)
{
    for (uint32_t i = queue->regions; i-- > 0;) {
        const struct kvmpy_region *region = &queue->region[i];
        if (gpa < region->gpa)
            continue;
        uint64_t offset = gpa - region->gpa;
        return size <= region->size && offset <= region->size - size ? region->bytes + offset : NULL;
    }
    return NULL;
}

/* Copy what the guest may be changing; the compiler cannot read the original again afterwards. */
static void copy_once(void *copy, const uint8_t *original, size_t size)
{
    memcpy(copy, original, size);
    __asm__ volatile("" : : "r"(copy) : "memory");
}

static uint16_t *number(uint8_t *ring, size_t offset)
{
    return (uint16_t *)(void *)(ring + offset);
}

/* The index up to which the driver has made entries available (2.7.6). */
static uint16_t avail_index(const struct kvmpy_queue *queue)
{
    return __atomic_load_n(number(queue->avail, 2), __ATOMIC_ACQUIRE);
}

/* Let the driver kick for the next entry it makes available; look again afterwards: it may just have (2.7.10). */
static void ask_for_kick(struct kvmpy_queue *queue)
{
    if (queue->event_idx)
        __atomic_store_n(number(queue->used, 4 + 8 * (size_t)queue->size), queue->next_avail, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Wait up to `length` ns for an entry that the driver makes available without a kick. */
static void wait_for_entry(const struct kvmpy_queue *queue, uint64_t length)
{
    for (uint64_t end = now() + length; now() < end;)
        for (int i = 0; i < 16; i++) {
            if (avail_index(queue) != queue->next_avail)
                return;
            __builtin_ia32_pause();
        }
}

/* The chain of descriptors that begins with `head`, as VirtQueue._chain takes it; 0 when it breaks a rule. */
static int get_chain(const struct kvmpy_queue *queue, unsigned head, struct chain *chain)
{
    const uint8_t *table = queue->desc;
    uint32_t size = queue->size, at = head;
    int in_indirect = 0;
    chain->head = head;
    chain->first = chain->readable = chain->segments = 0;
    chain->size = chain->capacity = 0;
    for (;;) { /* each round adds a segment, up to their limit, or enters the only indirect table */
        struct descriptor d;
        if (at >= size)
            return 0;
        copy_once(&d, table + sizeof d * at, sizeof d);
        if (d.flags & DESC_F_INDIRECT) {
            if (!queue->indirect || in_indirect || d.flags & DESC_F_NEXT || d.len % sizeof d || !d.len)
                return 0;
            size = d.len / sizeof d;
            table = in_ram(queue, d.addr, d.len);
            if (size > queue->size || !table)
                return 0;
            in_indirect = 1;
            at = 0;
            continue;
        }
        uint8_t *bytes = in_ram(queue, d.addr, d.len);
        if (!bytes || chain->segments == queue->size || chain->segments == MAX_SEGMENTS)
            return 0;
        if (d.flags & DESC_F_WRITE) {
            chain->capacity += d.len;
        } else {
            if (chain->segments != chain->readable)
                return 0; /* a readable one behind a writable one */
            chain->readable++;
            chain->size += d.len;
        }
        if (chain->size + chain->capacity > UINT64_C(1) << 32) /* 2.7.5.2 */
            return 0;
        chain->segment[chain->segments++] = (struct iovec){bytes, d.len};
        if (!(d.flags & DESC_F_NEXT))
            return 1;
        at = d.next;
    }
}

/* Give a chain back, into which `written` bytes were written. */
static void push(struct kvmpy_queue *queue, uint32_t head, uint32_t written)
{
    uint32_t element[2] = {head, written};
    memcpy(queue->used + 4 + sizeof element * (queue->next_used % queue->size), element, sizeof element);
    __atomic_store_n(number(queue->used, 2), ++queue->next_used, __ATOMIC_RELEASE); /* last (2.7.8.2) */
}

/* Copy the first `size` readable bytes out of the chain; 0 when there are fewer. */
static int take_front(struct chain *chain, void *header, size_t size)
{
    uint8_t *to = header;
    if (chain->size < size)
        return 0;
    chain->size -= size;
    while (size) {
        struct iovec *front = &chain->segment[chain->first];
        size_t part = front->iov_len < size ? front->iov_len : size;
        copy_once(to, front->iov_base, part);
        to += part;
        size -= part;
        front->iov_base = (uint8_t *)front->iov_base + part;
        front->iov_len -= part;
        if (size) /* only what is used up is left behind: `first` stays below `readable` */
            chain->first++;
    }
    return 1;
}

/* Take the last writable byte out of the chain: where it is, NULL when there is none. */
static uint8_t *take_last(struct chain *chain)
{
    if (!chain->capacity)
        return NULL;
    chain->capacity--;
    while (!chain->segment[chain->segments - 1].iov_len)
        chain->segments--;
    struct iovec *last = &chain->segment[chain->segments - 1];
    return (uint8_t *)last->iov_base + --last->iov_len;
}

/* Disks. */

enum { SECTOR = 512, T_IN = 0, T_OUT = 1, S_OK = 0 }; /* VIRTIO 1.2, 5.2.6 */

struct blk_header { /* virtio_blk_req */
    uint32_t type, reserved;
    uint64_t sector;
};

/* Do a read or write that nothing is the matter with; 0, with no trace of it that Python would not overwrite, for all
 * else. */
static int blk_request(const struct kvmpy_disk *disk, struct chain *chain, uint8_t **status)
{
    struct blk_header header;
    if (!take_front(chain, &header, sizeof header))
        return 0;
    *status = take_last(chain);
    if (!*status)
        return 0;
    int out = header.type == T_OUT;
    uint64_t length = out ? chain->size : chain->capacity, other = out ? chain->capacity : chain->size;
    if ((!out && header.type != T_IN) || other || (out && !disk->writable))
        return 0;
    if (!length || length % SECTOR || header.sector >= disk->sectors || length / SECTOR > disk->sectors - header.sector)
        return 0;
    unsigned from = out ? chain->first : chain->readable, to = out ? chain->readable : chain->segments;
    off_t offset = (off_t)(header.sector * SECTOR);
    ssize_t done;
    do {
        if (out)
            done = pwritev(disk->fd, chain->segment + from, (int)(to - from), offset);
        else
            done = preadv(disk->fd, chain->segment + from, (int)(to - from), offset);
    } while (done < 0 && errno == EINTR);
    return done >= 0 && (uint64_t)done == length;
}

/* Serve up to `limit` requests, for little more than `length` ns. If there is none at first, wait `patience` ns for one
 * that comes without a kick. Returns an enum outcome; EMPTY only when none was served. */
static int kvmpy_serve_disk(struct kvmpy_queue *queue, const struct kvmpy_disk *disk, uint32_t limit, uint64_t length,
                            uint64_t patience)
{
    struct chain chain;
    uint64_t end = 0;
    for (uint32_t served = 0;; served++) {
        uint16_t index = avail_index(queue);
        if (index == queue->next_avail) {
            if (served)
                return KVMPY_DRAINED;
            if (patience)
                wait_for_entry(queue, patience);
            index = avail_index(queue);
            if (index == queue->next_avail) {
                ask_for_kick(queue);
                index = avail_index(queue);
            }
            if (index == queue->next_avail)
                return KVMPY_EMPTY;
        }
        if (!served)
            end = now() + length;
        else if (served >= limit || now() >= end)
            return KVMPY_MORE;
        if ((uint16_t)(index - queue->next_avail) > queue->size)
            return KVMPY_ODD;
        unsigned slot = queue->next_avail % queue->size;
        uint16_t head = __atomic_load_n(number(queue->avail, 4 + 2 * (size_t)slot), __ATOMIC_RELAXED);
        uint8_t *status;
        uint64_t written;
        if (!get_chain(queue, head, &chain))
            return KVMPY_ODD;
        written = chain.capacity;
        if (!blk_request(disk, &chain, &status))
            return KVMPY_ODD;
        *status = S_OK;
        queue->next_avail++;
        push(queue, head, (uint32_t)written); /* below 4 GiB: the chain has a header as well */
    }
}
