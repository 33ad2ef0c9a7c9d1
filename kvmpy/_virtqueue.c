/* SPDX-License-Identifier: Apache-2.0
 *
 * The hot path of virtio queues: the twin of virtio/queue.py, and of what virtio/blk.py does with ordinary requests and
 * virtio/net.py with ordinary frames on stream sockets (host/netsocket.py) and taps (host/tap.py).
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
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { MAX_REGIONS = 8, MAX_SEGMENTS = 256 };

/* Drivers hear of what is done after so many requests, or so many ns; when one has said that it need not, it goes on
 * for a turn, after which others have theirs. */
enum { BATCH = 64, BATCH_NS = 100000, TURN_NS = 500000, PATIENCE_MAX_NS = 300000 };

enum outcome {
    KVMPY_EMPTY,   /* nothing is left, and the driver will kick for the next one */
    KVMPY_DRAINED, /* nothing is left, and the driver will not kick: call again */
    KVMPY_MORE,    /* there may be more, but it is time to interrupt, or for others */
    KVMPY_ODD,     /* the next one is not ordinary */
    KVMPY_BLOCKED, /* the host has no room, or no frame */
};
enum { ENTRY = -1 }; /* no outcome yet: there is one to be served */

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
    uint16_t signalled;              /* up to where the driver has been told of used elements */
};

/* How driver and device take turns, in ns. */
struct kvmpy_pace {
    uint64_t drained;    /* when the driver was left without anything under way (CLOCK_MONOTONIC), else 0 */
    uint64_t busy;       /* for how long entries had been served by then */
    uint64_t turnaround; /* how long the driver last took to have another one */
};

struct kvmpy_disk {
    struct kvmpy_pace pace;
    uint64_t sectors;
    int32_t fd;
    uint8_t writable; /* and the driver flushes: where it cannot, each write has to reach the disk */
};

enum { /* bytes, as host/netsocket.py and host/frames.py have them */
    LENGTH = 4,
    VNET_HEADER = 12,
    ETH_HEADER = 14,
    MAX_FRAME = ETH_HEADER + 0xFFFF,
};

/* A stream socket that carries frames, each behind its length, which is big-endian. */
struct kvmpy_wire {
    struct kvmpy_pace pace;
    uint8_t *buffer;           /* of `size` bytes, more than a frame: what was read and not yet given out ... */
    uint32_t size, start, end; /* ... is [start, end) of it */
    uint8_t *rest;             /* room for LENGTH + MAX_FRAME: of a frame that was taken in part ... */
    uint32_t rest_size;        /* ... so much has yet to be sent */
    int32_t fd;
    uint32_t longest; /* frame for the guest */
    uint8_t mergeable;
};

/* A tap interface; each frame has a struct virtio_net_hdr in front. */
struct kvmpy_tap {
    struct kvmpy_pace pace;
    uint8_t *buffer; /* of `size` bytes, more than a frame with its header */
    uint32_t size, kept;
    int32_t fd;
    uint32_t longest, longest_gso;             /* frames for the guest: whole ones, unsegmented ones */
    uint8_t host_csum, guest_csum, mergeable;  /* features */
    uint8_t host_gso[256], guest_gso[256];     /* for each gso_type: whether it may be */
};

/* struct virtq_desc (VIRTIO 1.2, 2.7.5) */
struct descriptor {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

enum { DESC_F_NEXT = 1, DESC_F_WRITE = 2, DESC_F_INDIRECT = 4, AVAIL_F_NO_INTERRUPT = 1 };

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

/* Whether there is no entry; then the driver will kick for the next one. */
static int is_empty(struct kvmpy_queue *queue)
{
    if (avail_index(queue) != queue->next_avail)
        return 0;
    ask_for_kick(queue);
    return avail_index(queue) == queue->next_avail;
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

/* Whether the driver may have made the entries available that lie between `at` and `index`; at most as many as the queue
 * has, and those that are under way are not among them (2.7.13). */
static int may_be(const struct kvmpy_queue *queue, uint16_t at, uint16_t index)
{
    unsigned count = (uint16_t)(index - at), under_way = (uint16_t)(at - queue->next_used);
    return count + under_way <= queue->size;
}

/* The chain that entry `at` of the available ring names; 0 when it breaks a rule. */
static int get_entry(const struct kvmpy_queue *queue, uint16_t at, struct chain *chain)
{
    size_t slot = at % queue->size;
    return get_chain(queue, __atomic_load_n(number(queue->avail, 4 + 2 * slot), __ATOMIC_RELAXED), chain);
}

/* Fill in the next used element: a chain into which `written` bytes were written. */
static void put_used(struct kvmpy_queue *queue, uint32_t head, uint32_t written)
{
    uint32_t element[2] = {head, written};
    memcpy(queue->used + 4 + sizeof element * (queue->next_used++ % queue->size), element, sizeof element);
}

/* Give the driver what `put_used` has filled in, in one store (2.7.8.2). */
static void publish(struct kvmpy_queue *queue)
{
    __atomic_store_n(number(queue->used, 2), queue->next_used, __ATOMIC_RELEASE);
}

/* Whether the driver need not hear of what has been published; then it counts as told (2.7.7, 2.7.10). */
static int need_not_tell(struct kvmpy_queue *queue)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint16_t news = (uint16_t)(queue->next_used - queue->signalled);
    if (queue->event_idx) {
        uint16_t event = __atomic_load_n(number(queue->avail, 4 + 2 * (size_t)queue->size), __ATOMIC_RELAXED);
        if ((uint16_t)(queue->next_used - event - 1) < news)
            return 0;
    } else if (news && !(__atomic_load_n(number(queue->avail, 0), __ATOMIC_RELAXED) & AVAIL_F_NO_INTERRUPT)) {
        return 0;
    }
    queue->signalled = queue->next_used;
    return 1;
}

/* What a call may still do: so many requests until it ends, and until the driver hears of them. */
struct turn {
    uint32_t left, batch;
    uint64_t batch_end, end;
    uint64_t began; /* to serve what came last, when there had been nothing */
};

static void begin_turn(struct turn *turn, uint32_t limit)
{
    uint64_t time = now();
    *turn = (struct turn){limit, BATCH, time + BATCH_NS, time + TURN_NS, time};
}

/* Whether the turn goes on after `count` requests, at most as many as were left. */
static int goes_on(struct kvmpy_queue *queue, struct turn *turn, uint32_t count)
{
    uint64_t time = now();
    turn->left -= count;
    turn->batch -= count < turn->batch ? count : turn->batch;
    if (!turn->left)
        return 0;
    if (turn->batch && time < turn->batch_end)
        return 1;
    if (time >= turn->end || !need_not_tell(queue))
        return 0;
    turn->batch = BATCH;
    turn->batch_end = time + BATCH_NS;
    return 1;
}

/* Note whether the driver has nothing under way now. */
static int is_drained(const struct kvmpy_queue *queue, struct kvmpy_pace *pace, const struct turn *turn)
{
    if (avail_index(queue) != queue->next_avail)
        return 0;
    pace->drained = now();
    pace->busy = pace->drained - turn->began;
    return 1;
}

/* For how long a driver that is as quick as the last time is waited for, ns: as long as a wait costs less than half of
 * the work, after which it takes the driver longer to come back from its sleep. */
static uint64_t patience_for(const struct kvmpy_pace *pace, uint64_t patience)
{
    uint64_t most = pace->busy / 2 < PATIENCE_MAX_NS ? pace->busy / 2 : PATIENCE_MAX_NS;
    uint64_t longest = most > patience ? most : patience;
    return patience && pace->turnaround < longest ? longest : 0;
}

/* Be sure that there is an entry: ENTRY. When one was `served` before, and the driver wants to be told of that or the turn
 * is over, DRAINED. Else wait for `patience` ns or longer, unless that is 0; EMPTY. */
static int find_entry(struct kvmpy_queue *queue, struct kvmpy_pace *pace, struct turn *turn, int served, uint64_t patience)
{
    if (avail_index(queue) == queue->next_avail) {
        if (served && is_drained(queue, pace, turn) &&
            (!patience || pace->drained >= turn->end || !need_not_tell(queue)))
            return KVMPY_DRAINED;
        uint64_t wait = patience_for(pace, patience);
        if (wait)
            wait_for_entry(queue, wait);
        if (is_empty(queue))
            return KVMPY_EMPTY;
    }
    if (pace->drained) {
        turn->began = now();
        pace->turnaround = turn->began - pace->drained;
        pace->drained = 0;
    }
    return ENTRY;
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

/* Serve up to `limit` requests, for a turn. Where there is none, wait for one that comes without a kick, for `patience`
 * ns or longer. Returns an enum outcome; with EMPTY, the driver has been told of all that was served. */
static int kvmpy_serve_disk(struct kvmpy_queue *queue, struct kvmpy_disk *disk, uint32_t limit, uint64_t patience)
{
    struct chain chain;
    struct turn turn;
    begin_turn(&turn, limit);
    for (int served = 0;; served = 1) {
        int found = find_entry(queue, &disk->pace, &turn, served, patience);
        if (found != ENTRY)
            return found;
        uint8_t *status;
        if (!may_be(queue, queue->next_avail, avail_index(queue)) || !get_entry(queue, queue->next_avail, &chain))
            return KVMPY_ODD;
        uint64_t written = chain.capacity;
        if (!blk_request(disk, &chain, &status))
            return KVMPY_ODD;
        *status = S_OK;
        queue->next_avail++;
        put_used(queue, chain.head, (uint32_t)written); /* below 4 GiB: the chain has a header as well */
        publish(queue);
        if (!goes_on(queue, &turn, 1))
            return is_drained(queue, &disk->pace, &turn) ? KVMPY_DRAINED : KVMPY_MORE;
    }
}

/* Network devices on a stream socket. */

enum { MAX_FRAMES = 64, MAX_VECTORS = 1024 /* IOV_MAX */ };

/* Frames on their way to the host: `vector` has a length and the frame's bytes for each. */
struct outgoing {
    unsigned frames, vectors;
    uint64_t size;
    struct iovec vector[MAX_VECTORS];
    struct {
        uint8_t length[LENGTH];
        unsigned head;
        uint64_t end; /* of the frame, in the bytes of all */
    } frame[MAX_FRAMES];
};

/* Collect up to `limit` of the frames that are available; 0 when one that is not ordinary follows them. */
static int collect_frames(const struct kvmpy_queue *queue, struct outgoing *out, uint32_t limit)
{
    struct chain chain;
    out->frames = out->vectors = 0;
    out->size = 0;
    for (uint16_t at = queue->next_avail; out->frames < limit && out->frames < MAX_FRAMES; at++) {
        uint16_t index = avail_index(queue);
        if (index == at)
            break;
        uint8_t header[VNET_HEADER]; /* without offloads there is nothing in it */
        if (!may_be(queue, at, index) || !get_entry(queue, at, &chain) || !take_front(&chain, header, sizeof header))
            return 0;
        if (chain.size < ETH_HEADER || chain.size > MAX_FRAME)
            return 0;
        unsigned pieces = chain.readable - chain.first;
        if (out->vectors + 1 + pieces > MAX_VECTORS)
            break; /* the next time: MAX_SEGMENTS always fit */
        uint8_t *length = out->frame[out->frames].length;
        for (int i = 0; i < LENGTH; i++)
            length[i] = (uint8_t)(chain.size >> 8 * (LENGTH - 1 - i));
        out->vector[out->vectors++] = (struct iovec){length, LENGTH};
        memcpy(&out->vector[out->vectors], &chain.segment[chain.first], pieces * sizeof *chain.segment);
        out->vectors += pieces;
        out->size += LENGTH + chain.size;
        out->frame[out->frames].head = chain.head;
        out->frame[out->frames++].end = out->size;
    }
    return 1;
}

/* Keep the bytes [from, to) of what was to be sent, at most one frame with its length. */
static void keep_rest(struct kvmpy_wire *wire, const struct outgoing *out, uint64_t from, uint64_t to)
{
    uint64_t at = 0;
    for (unsigned i = 0; i < out->vectors && from < to; i++) {
        uint64_t length = out->vector[i].iov_len, offset = from - at;
        if (from < at + length) {
            uint64_t part = (to < at + length ? to : at + length) - from;
            memcpy(wire->rest + wire->rest_size, (uint8_t *)out->vector[i].iov_base + offset, part);
            wire->rest_size += (uint32_t)part;
            from += part;
        }
        at += length;
    }
}

/* Send up to `limit` frames, for a turn, when nothing is left of an earlier one. Where there is none, wait for one that
 * comes without a kick, for `patience` ns or longer. Returns an enum outcome; with EMPTY, the driver has been told of all
 * that was sent. */
static int kvmpy_send_frames(struct kvmpy_queue *queue, struct kvmpy_wire *wire, uint32_t limit, uint64_t patience)
{
    struct outgoing out;
    struct turn turn;
    wire->rest_size = 0;
    begin_turn(&turn, limit);
    for (int served = 0;; served = 1) {
        int found = find_entry(queue, &wire->pace, &turn, served, patience);
        if (found != ENTRY)
            return found;
        int ordinary = collect_frames(queue, &out, turn.left);
        if (!out.frames) /* a driver that takes entries back cannot keep us here */
            return ordinary ? KVMPY_MORE : KVMPY_ODD;
        struct msghdr message = {.msg_iov = out.vector, .msg_iovlen = out.vectors};
        ssize_t done;
        do {
            done = sendmsg(wire->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        } while (done < 0 && errno == EINTR);
        if (done < 0)
            return errno == EAGAIN ? KVMPY_BLOCKED : KVMPY_ODD;
        uint64_t sent = (uint64_t)done, begin = 0;
        for (unsigned i = 0; i < out.frames && begin < sent; begin = out.frame[i++].end) {
            if (sent < out.frame[i].end)
                keep_rest(wire, &out, sent, out.frame[i].end);
            put_used(queue, out.frame[i].head, 0);
            queue->next_avail++;
        }
        publish(queue);
        if (sent < out.size)
            return KVMPY_BLOCKED;
        if (!goes_on(queue, &turn, out.frames))
            return is_drained(queue, &wire->pace, &turn) ? KVMPY_DRAINED : KVMPY_MORE;
    }
}

/* Read until there is a whole frame, and give its size; 0 with `*outcome` set when there is none. */
static uint32_t next_frame(struct kvmpy_wire *wire, int *outcome)
{
    for (;;) { /* each round reads something: at most until the buffer is full, which is more than a frame */
        uint32_t have = wire->end - wire->start;
        if (have >= LENGTH) {
            uint32_t size = 0;
            for (int i = 0; i < LENGTH; i++)
                size = size << 8 | wire->buffer[wire->start + (uint32_t)i];
            *outcome = KVMPY_ODD;
            if (!size || size > MAX_FRAME)
                return 0;
            if (have >= LENGTH + size)
                return size;
        }
        memmove(wire->buffer, wire->buffer + wire->start, have);
        wire->start = 0;
        wire->end = have;
        ssize_t count;
        do {
            count = recv(wire->fd, wire->buffer + have, wire->size - have, MSG_DONTWAIT);
        } while (count < 0 && errno == EINTR);
        *outcome = count < 0 && errno == EAGAIN ? KVMPY_BLOCKED : KVMPY_ODD;
        if (count <= 0)
            return 0;
        wire->end += (uint32_t)count;
    }
}

/* Chains with room for a frame. */
struct incoming {
    unsigned chains, vectors;
    uint64_t room;
    struct iovec vector[MAX_VECTORS];
    struct {
        unsigned head;
        uint64_t room;
    } chain[MAX_VECTORS];
};

/* Collect chains until there are `size` bytes of room; 0 when there are not, or they are not ordinary. */
static int collect_room(const struct kvmpy_queue *queue, struct incoming *in, uint64_t size, int mergeable)
{
    struct chain chain;
    in->chains = in->vectors = 0;
    in->room = 0;
    for (uint16_t at = queue->next_avail; in->room < size; at++) {
        uint16_t index = avail_index(queue);
        if (index == at || !may_be(queue, at, index) || !get_entry(queue, at, &chain))
            return 0;
        if (in->chains ? !mergeable || in->chains == queue->size : chain.capacity < VNET_HEADER)
            return 0;
        unsigned pieces = chain.segments - chain.readable;
        if (in->vectors + pieces > MAX_VECTORS || in->chains == MAX_VECTORS)
            return 0;
        memcpy(&in->vector[in->vectors], &chain.segment[chain.readable], pieces * sizeof *chain.segment);
        in->vectors += pieces;
        in->room += chain.capacity;
        in->chain[in->chains].head = chain.head;
        in->chain[in->chains++].room = chain.capacity;
    }
    return 1;
}

/* Copy `size` bytes into the room that is left; what lies behind them remains. There is as much. */
static void scatter(struct iovec **room, const uint8_t *data, size_t size)
{
    while (size) {
        struct iovec *piece = *room;
        size_t part = piece->iov_len < size ? piece->iov_len : size;
        memcpy(piece->iov_base, data, part);
        data += part;
        size -= part;
        piece->iov_base = (uint8_t *)piece->iov_base + part;
        piece->iov_len -= part;
        *room += !piece->iov_len;
    }
}

/* Give the driver a frame in the chains of `in`, which have room for it: all but the last get full. */
static void deliver(struct kvmpy_queue *queue, struct incoming *in, const void *header, const uint8_t *frame, uint32_t size)
{
    struct iovec *room = in->vector;
    uint64_t left = VNET_HEADER + size;
    scatter(&room, header, VNET_HEADER);
    scatter(&room, frame, size);
    for (unsigned i = 0; i < in->chains; i++) {
        uint64_t written = in->chain[i].room < left ? in->chain[i].room : left;
        put_used(queue, in->chain[i].head, (uint32_t)written);
        left -= written;
    }
    queue->next_avail = (uint16_t)(queue->next_avail + in->chains);
    publish(queue);
}

/* Give the driver up to `limit` frames, for a turn. Returns an enum outcome, not DRAINED. */
static int kvmpy_receive_frames(struct kvmpy_queue *queue, struct kvmpy_wire *wire, uint32_t limit)
{
    struct incoming in;
    struct turn turn;
    begin_turn(&turn, limit);
    do {
        int outcome;
        if (is_empty(queue))
            return KVMPY_EMPTY;
        uint32_t size = next_frame(wire, &outcome);
        if (!size && outcome == KVMPY_BLOCKED && !collect_room(queue, &in, VNET_HEADER, 0))
            return KVMPY_ODD; /* what waits for a frame must be fit for one */
        if (!size)
            return outcome;
        if (size < ETH_HEADER || size > wire->longest)
            return KVMPY_ODD;
        if (!collect_room(queue, &in, VNET_HEADER + size, wire->mergeable))
            return KVMPY_ODD;
        uint8_t header[VNET_HEADER] = {0}; /* struct virtio_net_hdr (VIRTIO 1.2, 5.1.6), num_buffers last */
        header[VNET_HEADER - 2] = (uint8_t)in.chains;
        header[VNET_HEADER - 1] = (uint8_t)(in.chains >> 8);
        deliver(queue, &in, header, wire->buffer + wire->start + LENGTH, size);
        wire->start += LENGTH + size;
    } while (goes_on(queue, &turn, 1));
    return KVMPY_MORE;
}

/* Network devices on a tap interface, whose frames have a header and may be unfinished. */

enum { HDR_F_NEEDS_CSUM = 1, GSO_NONE = 0, CHECKSUM = 2 }; /* VIRTIO 1.2, 5.1.6 */

struct net_header { /* struct virtio_net_hdr */
    uint8_t flags, gso_type;
    uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};

/* Send up to `limit` frames, for a turn. Where there is none, wait for one that comes without a kick, for `patience` ns
 * or longer. Returns an enum outcome; with EMPTY, the driver has been told of all that was sent. */
static int kvmpy_tap_send(struct kvmpy_queue *queue, struct kvmpy_tap *tap, uint32_t limit, uint64_t patience)
{
    struct chain chain;
    struct iovec vector[1 + MAX_SEGMENTS];
    struct turn turn;
    begin_turn(&turn, limit);
    for (int served = 0;; served = 1) {
        int found = find_entry(queue, &tap->pace, &turn, served, patience);
        if (found != ENTRY)
            return found;
        struct net_header header;
        if (!may_be(queue, queue->next_avail, avail_index(queue)) || !get_entry(queue, queue->next_avail, &chain))
            return KVMPY_ODD;
        if (!take_front(&chain, &header, sizeof header) || chain.size < ETH_HEADER || chain.size > MAX_FRAME)
            return KVMPY_ODD;
        header.flags &= tap->host_csum ? HDR_F_NEEDS_CSUM : 0; /* 5.1.6.2.2: ignore the others */
        header.num_buffers = 0;
        if (header.flags && (uint64_t)header.csum_start + header.csum_offset + CHECKSUM > chain.size)
            return KVMPY_ODD;
        if (header.gso_type != GSO_NONE && (!tap->host_gso[header.gso_type] || !header.flags || !header.gso_size ||
                                            header.hdr_len > chain.size))
            return KVMPY_ODD;
        unsigned pieces = chain.readable - chain.first;
        vector[0] = (struct iovec){&header, sizeof header};
        memcpy(vector + 1, &chain.segment[chain.first], pieces * sizeof *vector);
        ssize_t done;
        do {
            done = writev(tap->fd, vector, (int)(1 + pieces));
        } while (done < 0 && errno == EINTR);
        if (done < 0)
            return errno == EAGAIN ? KVMPY_BLOCKED : KVMPY_ODD;
        queue->next_avail++;
        put_used(queue, chain.head, 0);
        publish(queue);
        if (!goes_on(queue, &turn, 1))
            return is_drained(queue, &tap->pace, &turn) ? KVMPY_DRAINED : KVMPY_MORE;
    }
}

/* Whether the guest takes the frame of `size` bytes behind `header`, which is changed for it. */
static int takes_frame(const struct kvmpy_tap *tap, struct net_header *header, uint32_t size)
{
    if (!tap->guest_csum) { /* 5.1.6.4.1 */
        if (header->flags & HDR_F_NEEDS_CSUM)
            return 0;
        header->flags = 0;
    }
    uint32_t longest = header->gso_type == GSO_NONE ? tap->longest : tap->longest_gso;
    return (header->gso_type == GSO_NONE || tap->guest_gso[header->gso_type]) && size >= ETH_HEADER && size <= longest;
}

/* Give the driver up to `limit` frames, for a turn. Returns an enum outcome, not DRAINED; with ODD,
 * `kept` is the size of the frame in the buffer that has not been delivered, 0 when there is none. */
static int kvmpy_tap_receive(struct kvmpy_queue *queue, struct kvmpy_tap *tap, uint32_t limit)
{
    struct incoming in;
    struct turn turn;
    tap->kept = 0;
    begin_turn(&turn, limit);
    do {
        if (is_empty(queue))
            return KVMPY_EMPTY;
        if (!collect_room(queue, &in, VNET_HEADER, 0))
            return KVMPY_ODD; /* what waits for a frame must be fit for one */
        ssize_t count;
        do {
            count = read(tap->fd, tap->buffer, tap->size);
        } while (count < 0 && errno == EINTR);
        if (count <= 0)
            return count < 0 && errno == EAGAIN ? KVMPY_BLOCKED : KVMPY_ODD;
        struct net_header header;
        uint32_t whole = (uint32_t)count;
        if (whole >= sizeof header)
            memcpy(&header, tap->buffer, sizeof header);
        if (whole < sizeof header || !takes_frame(tap, &header, whole - (uint32_t)sizeof header) ||
            !collect_room(queue, &in, whole, tap->mergeable)) {
            tap->kept = whole;
            return KVMPY_ODD;
        }
        header.num_buffers = (uint16_t)in.chains;
        deliver(queue, &in, &header, tap->buffer + sizeof header, whole - (uint32_t)sizeof header);
    } while (goes_on(queue, &turn, 1));
    return KVMPY_MORE;
}
