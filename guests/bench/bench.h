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

enum { MAX_PHASES = 32, COM1 = 0x3f8 };

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

static inline void print(char c) { __asm__ volatile("outb %0, %1" ::"a"(c), "d"((u16)COM1)); }

static void phase_begins(void)
{
    print('B');
    print('\n');
}

static void phase_ends(u32 operations)
{
    print('E');
    for (int shift = 28; shift >= 0; shift -= 4)
        print("0123456789abcdef"[operations >> shift & 15]);
    print('\n');
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
    QUEUE = 256, /* entries */
};

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
        u16 avail_event;
    } used __attribute__((aligned(4)));
} __attribute__((aligned(4096)));

static inline void put(u32 offset, u32 value) { *(volatile u32 *)(u64)(parameters.device + offset) = value; }
static inline u32 get(u32 offset) { return *(volatile u32 *)(u64)(parameters.device + offset); }

static void device_begin(u32 features)
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

static void device_queue(u32 index, struct queue *queue)
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
static void device_end(void)
{
    put(STATUS, 0xf);
    if ((get(STATUS) & 0xcf) != 0xf) {
        print('!');
        for (;;)
            __asm__ volatile("cli; hlt");
    }
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
