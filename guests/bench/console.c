/* Printing: a phase of kind 0 goes through the UART as a polling driver does, byte by byte in lines of `bytes`; kind 1
 * through a virtio console, in lines of `bytes`, `depth` of them published with each kick. Operations are bytes.
 */
#define QUEUE 64
#include "bench.h"

enum { VIRTIO = 1, TRANSMIT = 1, LONGEST = 4096 };

static struct queue queues[2];
static char line[LONGEST];

static u32 uart(const struct phase *phase, u64 length)
{
    u32 done = 0;
    u64 end = ticks() + length;
    do {
        for (u32 i = 0; i < phase->bytes; i++)
            print(line[i]);
        done += phase->bytes;
    } while (ticks() < end);
    return done;
}

static u32 virtio(const struct phase *phase, u64 length)
{
    struct queue *queue = &queues[TRANSMIT];
    for (u32 i = 0; i < QUEUE; i++)
        queue->desc[i] = (struct descriptor){(u64)line, phase->bytes, 0, 0};
    u32 done = 0;
    u64 end = ticks() + length;
    do {
        replay(TRANSMIT, queue, phase->depth);
        done += phase->depth * phase->bytes;
    } while (ticks() < end);
    return done;
}

void main(void)
{
    int up = 0;
    for (u32 i = 0; i < parameters.phases; i++) {
        const struct phase *phase = &parameters.phase[i];
        if (phase->kind == VIRTIO && !up++) {
            device_begin(EVENT_IDX);
            device_queue(0, &queues[0]);
            device_queue(TRANSMIT, &queues[TRANSMIT]);
            ring_is(&queues[TRANSMIT]);
            device_end();
        }
        for (u32 j = 0; j < phase->bytes - 1; j++)
            line[j] = '.';
        line[phase->bytes - 1] = '\n';
        u32 (*run)(const struct phase *, u64) = phase->kind == VIRTIO ? virtio : uart;
        run(phase, parameters.warmup);
        phase_begins();
        u32 done = run(phase, parameters.ticks);
        phase_ends(done);
    }
}
