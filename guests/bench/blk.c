/* The ring-replay guest of a disk: requests are prepared once, each kick publishes `depth` of them again.
 *
 * A phase: kind 0 reads and 1 writes at places spread over the disk, 2 reads and 3 writes from its beginning on;
 * `depth` requests of `bytes` each. A request that fails ends the phase with no operations. Other CPUs read COM1's line
 * status all the time and echo what comes.
 */
#include "bench.h"

enum { IN, OUT, FLUSH_BIT = 1 << 9, SECTOR = 512, REQUESTS = 128, SEQUENTIAL = 2, BUFFERS = 16 << 20 };

static struct queue queue;
static struct request {
    struct descriptor table[3];
    u32 type, reserved;
    u64 sector;
    volatile u8 status;
} __attribute__((aligned(64))) requests[REQUESTS];

/* Entry i of the ring is descriptor i, which is an indirect table. The ring is longer than the deepest phase: entries
 * take turns, at every depth the same requests come again. */
static void prepare(const struct phase *phase)
{
    u64 sectors = *(volatile u32 *)(u64)(parameters.device + CONFIG);
    u32 each = phase->bytes / SECTOR, slots = sectors / each, random = 1;
    u32 type = phase->kind & 1 ? OUT : IN;
    for (u32 i = 0; i < REQUESTS; i++) {
        struct request *r = &requests[i];
        random = random * 1664525 + 1013904223; /* hardly ever neighbours, which a monitor could join */
        u32 slot = phase->kind < SEQUENTIAL ? random >> 8 : i;
        r->type = type;
        r->sector = (u64)(slot % slots) * each;
        r->status = 0;
        r->table[0] = (struct descriptor){(u64)&r->type, 16, NEXT, 1};
        r->table[1] = (struct descriptor){BUFFERS + (u64)(i % phase->depth) * phase->bytes, phase->bytes,
                                          NEXT | (type == IN ? WRITE : 0), 2};
        r->table[2] = (struct descriptor){(u64)&r->status, 1, WRITE, 0};
    }
    for (u32 i = 0; i < QUEUE; i++)
        queue.desc[i] = (struct descriptor){(u64)requests[i % REQUESTS].table, 48, INDIRECT, 0};
}

static u32 run(u32 depth, u64 length)
{
    u32 done = 0;
    u64 end = ticks() + length;
    while (ticks() < end) {
        replay(0, &queue, depth);
        done += depth;
    }
    return done;
}

void main(void)
{
    start_others(LINE_STATUS);
    device_begin(FLUSH_BIT | INDIRECT_DESC | EVENT_IDX);
    device_queue(0, &queue);
    ring_is(&queue);
    device_end();
    for (u32 i = 0; i < parameters.phases; i++) {
        const struct phase *phase = &parameters.phase[i];
        prepare(phase);
        run(phase->depth, parameters.warmup);
        phase_begins();
        u32 done = run(phase->depth, parameters.ticks);
        for (u32 j = 0; j < phase->depth; j++)
            done = requests[j].status ? 0 : done;
        phase_ends(done);
    }
}
