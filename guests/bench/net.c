/* The ring-replay guest of a network card: buffers are prepared once, each kick publishes `depth` of them again.
 *
 * A phase: kind 0 sends frames of `bytes`; 1 receives frames into buffers for `bytes`, with one half of the ring
 * published while the other is filled; 2 sends TCP segments of `bytes` for the host to cut (TSO). All phases of a run
 * are of one kind. Operations are frames.
 */
#include "bench.h"

enum kind { SEND, RECEIVE, SEND_TSO };
enum { CSUM = 1 << 0, HOST_TSO4 = 1 << 11, NEEDS_CSUM = 1, TCPV4 = 1, SEGMENT = 1448 };
enum { ETHERNET = 14, IP = 20, TCP = 20, CHECKSUM = 16, PROTOCOL_TCP = 6, RX = 0, TX = 1, BUFFERS = 16 << 20 };

static struct queue queues[2];

static struct packet {
    u8 flags, gso_type;
    u16 hdr_len, gso_size, csum_start, csum_offset, num_buffers;
    u8 frame[];
} *const buffers = (void *)BUFFERS; /* 5.1.6 virtio_net_hdr */

/* One frame for all entries of the ring, to an address that nobody has. */
static void prepare_send(const struct phase *phase)
{
    u8 *frame = buffers->frame, *ip = frame + ETHERNET, *tcp = ip + IP;
    u32 length = phase->bytes - ETHERNET;
    for (u32 i = 0; i < 12; i++)
        frame[i] = i < 6 ? 0x02 : 0x06;
    frame[12] = 0x08;
    ip[0] = 0x45;
    ip[2] = length >> 8;
    ip[3] = length;
    ip[8] = 64;
    ip[9] = PROTOCOL_TCP;
    ip[12] = ip[16] = 10;
    tcp[12] = TCP / 4 << 4;
    if (phase->kind == SEND_TSO) {
        buffers->flags = NEEDS_CSUM;
        buffers->gso_type = TCPV4;
        buffers->hdr_len = ETHERNET + IP + TCP;
        buffers->gso_size = SEGMENT;
        buffers->csum_start = ETHERNET + IP;
        buffers->csum_offset = CHECKSUM;
    }
    for (u32 i = 0; i < QUEUE; i++)
        queues[TX].desc[i] = (struct descriptor){BUFFERS, sizeof *buffers + phase->bytes, 0, 0};
}

static void prepare_receive(const struct phase *phase)
{
    u32 size = sizeof *buffers + phase->bytes, stride = (size + 2047) & ~2047u;
    for (u32 i = 0; i < QUEUE; i++)
        queues[RX].desc[i] = (struct descriptor){BUFFERS + (u64)i * stride, size, WRITE, 0};
}

/* 2.7.7 and 2.7.10: whether the device wants to hear of the entries up to `index`. */
static int wants_kick(const struct queue *queue, u16 index, u16 count)
{
    __asm__ volatile("lock; addl $0, (%%rsp)" ::: "memory");
    return (u16)(index - queue->used.avail_event - 1) < count;
}

static void publish(struct queue *queue, u16 count)
{
    u16 index = queue->avail.index + count;
    barrier();
    queue->avail.index = index;
    if (wants_kick(queue, index, count))
        put(QUEUE_NOTIFY, RX);
}

static u32 receive(u32 depth, u64 length)
{
    struct queue *queue = &queues[RX];
    u32 done = 0;
    u64 end = ticks() + length;
    if (queue->avail.index == 0) { /* from now on, there are always between QUEUE - depth and QUEUE buffers */
        queue->avail.used_event = depth - 1;
        publish(queue, QUEUE);
    }
    do {
        u16 until = queue->avail.index - QUEUE + depth;
        wait_interrupt(&queue->used.index, until);
        queue->avail.used_event = until + depth - 1;
        publish(queue, depth);
        done += depth;
    } while (ticks() < end);
    return done;
}

static u32 send(u32 depth, u64 length)
{
    u32 done = 0;
    u64 end = ticks() + length;
    do {
        replay(TX, &queues[TX], depth);
        done += depth;
    } while (ticks() < end);
    return done;
}

static u32 run(const struct phase *phase, u64 length)
{
    return phase->kind == RECEIVE ? receive(phase->depth, length) : send(phase->depth, length);
}

void main(void)
{
    device_begin(EVENT_IDX | (parameters.phase->kind == SEND_TSO ? CSUM | HOST_TSO4 : 0));
    for (u32 i = 0; i < 2; i++) {
        device_queue(i, &queues[i]);
        ring_is(&queues[i]);
    }
    device_end();
    for (u32 i = 0; i < parameters.phases; i++) {
        const struct phase *phase = &parameters.phase[i];
        if (phase->kind == RECEIVE)
            prepare_receive(phase);
        else
            prepare_send(phase);
        run(phase, parameters.warmup);
        phase_begins();
        phase_ends(run(phase, parameters.ticks));
    }
}
