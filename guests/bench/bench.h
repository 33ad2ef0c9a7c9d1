/* What the benchmark guests in C share: parameters, the serial line to the harness, one virtio-mmio device.
 *
 * The harness (scripts/lib/bench) fills in the parameters. A guest prints "B" when a phase begins and "E" with the
 * number of operations, in hexadecimal, when it ends; the harness takes the time at both.
 */
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

enum { MAX_PHASES = 32, COM1 = 0x3f8, LINE_STATUS = COM1 + 5, CAN_SEND = 1 << 5 };

struct phase {
    u32 kind, depth, bytes; /* what they mean is the guest's */
};

extern const struct {
    u32 device;    /* address of the virtio-mmio device */
    u32 pin;       /* its IOAPIC pin */
    u32 exit_port; /* a byte written there ends the machine */
    u32 phases;
    u64 ticks; /* how long a phase is, in TSC ticks */
    u64 warmup;
    struct phase phase[MAX_PHASES];
} parameters;

void wait_interrupt(volatile u16 *index, u16 until);
void main(void);

static inline void barrier(void) { __asm__ volatile("" ::: "memory"); }

static inline u64 ticks(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

/* The serial line. */

static inline void out(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "d"(port)); }

static inline u8 in(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "d"(port));
    return value;
}

static inline void print(char c)
{
    while (!(in(LINE_STATUS) & CAN_SEND))
        ;
    out(COM1, c);
}

static inline void phase_begins(void)
{
    print('B');
    print('\n');
}

static inline void phase_ends(u32 operations)
{
    print('E');
    for (int shift = 28; shift >= 0; shift -= 4)
        print("0123456789abcdef"[operations >> shift & 15]);
    print('\n');
}

/* The other CPUs (start.S, ap_start): each reads a port for ever, and counts. */

enum { AP_PAGE = 0x8000, AP_PORT = AP_PAGE + 0x804, AP_COUNTS = AP_PAGE + 0x80c, MAX_CPUS = 64 };
enum { LAPIC_ICR = 0xfee00300, OTHERS_INIT = 0xc4500, OTHERS_STARTUP = 0xc4600 };

extern const u8 ap_start[], ap_end[];

static inline void start_others(u16 port)
{
    for (u32 i = 0; i < (u32)(ap_end - ap_start); i++)
        ((volatile u8 *)AP_PAGE)[i] = ap_start[i];
    for (u32 i = 0; i < MAX_CPUS + 3; i++)
        ((volatile u32 *)(AP_PAGE + 0x800))[i] = 0;
    *(volatile u16 *)AP_PORT = port;
    *(volatile u32 *)LAPIC_ICR = OTHERS_INIT;
    *(volatile u32 *)LAPIC_ICR = OTHERS_STARTUP | AP_PAGE >> 12;
}

static inline u32 others_count(void)
{
    u32 sum = 0;
    for (u32 i = 0; i < MAX_CPUS; i++)
        sum += ((volatile u32 *)AP_COUNTS)[i];
    return sum;
}

/* Virtio over MMIO (VIRTIO 1.2, 4.2). */

enum {
    DRIVER_FEATURES = 0x20,
    DRIVER_FEATURES_SEL = 0x24,
    QUEUE_SEL = 0x30,
    QUEUE_NUM = 0x38,
    QUEUE_READY = 0x44,
    QUEUE_NOTIFY = 0x50,
    STATUS = 0x70,
    QUEUE_DESC = 0x80,
    QUEUE_DRIVER = 0x90,
    QUEUE_DEVICE = 0xa0,
    CONFIG = 0x100,
    INDIRECT_DESC = 1 << 28,
    EVENT_IDX = 1 << 29,
    VERSION_1 = 1 << 0, /* of the upper half */
    NEXT = 1,
    WRITE = 2,
    INDIRECT = 4,
};

#ifndef QUEUE
#define QUEUE 256 /* entries; a power of two that no monitor finds too many */
#endif

struct descriptor {
    u64 address;
    u32 length;
    u16 flags, next;
};

struct queue {
    struct descriptor desc[QUEUE];
    struct {
        u16 flags;
        volatile u16 index;
        u16 ring[QUEUE];
        volatile u16 used_event;
    } avail;
    struct {
        u16 flags;
        volatile u16 index;
        struct {
            u32 id, length;
        } ring[QUEUE];
        volatile u16 avail_event;
    } used __attribute__((aligned(4)));
} __attribute__((aligned(4096)));

static inline void put(u32 offset, u32 value) { *(volatile u32 *)(u64)(parameters.device + offset) = value; }
static inline u32 get(u32 offset) { return *(volatile u32 *)(u64)(parameters.device + offset); }

static inline void device_begin(u32 features)
{
    put(STATUS, 0);
    put(STATUS, 1);
    put(STATUS, 3);
    put(DRIVER_FEATURES_SEL, 0);
    put(DRIVER_FEATURES, features);
    put(DRIVER_FEATURES_SEL, 1);
    put(DRIVER_FEATURES, VERSION_1);
    put(STATUS, 0xb);
}

static inline void device_queue(u32 index, struct queue *queue)
{
    put(QUEUE_SEL, index);
    put(QUEUE_NUM, QUEUE);
    put(QUEUE_DESC, (u32)(u64)&queue->desc);
    put(QUEUE_DESC + 4, 0);
    put(QUEUE_DRIVER, (u32)(u64)&queue->avail);
    put(QUEUE_DRIVER + 4, 0);
    put(QUEUE_DEVICE, (u32)(u64)&queue->used);
    put(QUEUE_DEVICE + 4, 0);
    put(QUEUE_READY, 1);
}

/* The driver is up; a device that needs a reset, or never came up, ends the guest. */
static inline void device_end(void)
{
    put(STATUS, 0xf);
    if ((get(STATUS) & 0xcf) != 0xf) {
        print('!');
        for (;;)
            __asm__ volatile("cli; hlt");
    }
}

/* Which entry of the ring is which descriptor: the same ones, for ever. */
static inline void ring_is(struct queue *queue)
{
    for (u32 i = 0; i < QUEUE; i++)
        queue->avail.ring[i] = i;
}

/* Publish the next `count` entries, whatever their descriptors say, and wait until all are used. */
static inline void replay(u32 index, struct queue *queue, u16 count)
{
    u16 until = queue->avail.index + count;
    queue->avail.used_event = until - 1;
    barrier();
    queue->avail.index = until;
    put(QUEUE_NOTIFY, index);
    wait_interrupt(&queue->used.index, until);
}
