/* Exits at full speed: a phase does one thing again and again.
 *
 * The disk's queue is up and empty: a notification wakes the monitor for nothing.
 */
#include "bench.h"

enum { SCRATCH = COM1 + 7, POST = 0x80, DEVICE_FEATURES_SEL = 0x14, STRING = 64 };
enum kind { READ_LINE_STATUS, WRITE_POST, READ_SCRATCH, WRITE_SCRATCH, READ_MMIO, WRITE_MMIO, WRITE_STRING, NOTIFY };

static struct queue queue;
static u8 string[STRING];

static inline void out_string(u16 port)
{
    const u8 *from = string;
    u64 count = STRING;
    __asm__ volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(port) : "memory");
}

/* One loop for each kind, so that there is nothing else in it; the time is looked at now and then. */
#define REPEAT(operation)              \
    do {                               \
        for (int i = 0; i < 32; i++) \
            operation;                 \
        done += 32;                    \
    } while (ticks() < end)

static u32 run(enum kind kind, u64 length)
{
    u32 done = 0;
    u64 end = ticks() + length;
    switch (kind) {
    case READ_LINE_STATUS:
        REPEAT(in(LINE_STATUS));
        break;
    case WRITE_POST:
        REPEAT(out(POST, 0));
        break;
    case READ_SCRATCH:
        REPEAT(in(SCRATCH));
        break;
    case WRITE_SCRATCH:
        REPEAT(out(SCRATCH, 0));
        break;
    case READ_MMIO:
        REPEAT(get(0));
        break;
    case WRITE_MMIO:
        REPEAT(put(DEVICE_FEATURES_SEL, 0));
        break;
    case WRITE_STRING:
        REPEAT(out_string(POST));
        break;
    case NOTIFY:
        REPEAT(put(QUEUE_NOTIFY, 0));
        break;
    }
    return done;
}

void main(void)
{
    device_begin(0);
    device_queue(0, &queue);
    device_end();
    for (u32 i = 0; i < parameters.phases; i++) {
        run(parameters.phase[i].kind, parameters.warmup);
        phase_begins();
        phase_ends(run(parameters.phase[i].kind, parameters.ticks));
    }
}
