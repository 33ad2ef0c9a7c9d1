# The driver's half of a virtio-mmio network device: a frame out, a frame in.
#
# Entry: long mode.
# The device is at MMIO and interrupts pin 5 of the IOAPIC. Reports Status when it is up; all else: virtio_net.inc.

        .include "tiny.inc"
        .include "virtio_up.inc"
        .equ    VECTOR, 0x35
        .equ    QUEUE_NOTIFY, 0x50              # VIRTIO 1.2, 4.2.2
        .equ    INTERRUPT_STATUS, 0x60
        .equ    INTERRUPT_ACK, 0x64
        .equ    STATUS, 0x70

.macro kick
        movl    $1, QUEUE_NOTIFY(%rbx)
.endm

.macro acknowledge
        mov     INTERRUPT_STATUS(%rbx), %eax
        mov     %eax, INTERRUPT_ACK(%rbx)
.endm

        .code64
        up_mmio
        mov     STATUS(%rbx), %eax
        out     %eax, $REPORT
        .include "virtio_net.inc"

        .balign 8
setup:  .long   STATUS, 0, STATUS, 1, STATUS, 3         # reset, ACKNOWLEDGE, DRIVER
        .long   0x24, 0, 0x20, 0, 0x24, 1, 0x20, 1      # features: VERSION_1
        .long   STATUS, 0xb                             # FEATURES_OK
        .long   0x30, 0, 0x38, 4                        # queue 0 has 4 entries
        .long   0x80, desc, 0x84, 0, 0x90, avail, 0x94, 0, 0xa0, used, 0xa4, 0, 0x44, 1
        .long   0x30, 1, 0x38, 4                        # so has queue 1
        .long   0x80, desc1, 0x84, 0, 0x90, avail1, 0x94, 0, 0xa0, used1, 0xa4, 0, 0x44, 1
        .long   STATUS, 0xf                             # DRIVER_OK
        .long   -1
