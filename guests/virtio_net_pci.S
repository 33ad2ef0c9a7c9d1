# The driver's half of a virtio-pci network device: a frame out, a frame in, each queue with a message of its own.
#
# Entry: long mode.
# The device is 00:01.0. Reports what BAR 0 says about its size and Status when it is up; all else: virtio_net.inc.
# Queue 0 has vector 1, queue 1 has vector 2 of MSI-X: they are VECTOR and VECTOR - 1 of the processor.

        .include "tiny.inc"
        .include "virtio_up.inc"
        .equ    VECTOR, 0x36
        .equ    BAR, 0xe2000000                 # inside layout.PCI_WINDOW, not where it was
        .equ    STATUS, 0x14                    # VIRTIO 1.2, 4.1.4.3
        .equ    NOTIFY, 0x3000                  # kvmpy/virtio/pci.py

.macro kick
        movw    $1, NOTIFY + 4(%rbx)
.endm

.macro acknowledge
        mov     $1, %eax
.endm

        .code64
        up_pci
        movzbl  STATUS(%rbx), %eax
        out     %eax, $REPORT
        .include "virtio_net.inc"

        .balign 8
setup:  .long   STATUS, 1, 0, STATUS, 1, 1, STATUS, 1, 3        # offset, bytes, value: reset, ACKNOWLEDGE, DRIVER
        .long   0x08, 4, 0, 0x0c, 4, 0, 0x08, 4, 1, 0x0c, 4, 1  # features: VERSION_1
        .long   STATUS, 1, 0xb                                  # FEATURES_OK
        .long   ENTRY, 4, LAPIC, ENTRY + 4, 4, 0, ENTRY + 8, 4, VECTOR, ENTRY + 12, 4, 0
        .long   ENTRY + 16, 4, LAPIC, ENTRY + 20, 4, 0, ENTRY + 24, 4, VECTOR - 1, ENTRY + 28, 4, 0
        .long   0x16, 2, 0, 0x18, 2, 4, 0x1a, 2, 1              # queue 0 has 4 entries and vector 1
        .long   0x20, 4, desc, 0x24, 4, 0, 0x28, 4, avail, 0x2c, 4, 0, 0x30, 4, used, 0x34, 4, 0, 0x1c, 2, 1
        .long   0x16, 2, 1, 0x18, 2, 4, 0x1a, 2, 2              # queue 1 has 4 entries and vector 2
        .long   0x20, 4, desc1, 0x24, 4, 0, 0x28, 4, avail1, 0x2c, 4, 0, 0x30, 4, used1, 0x34, 4, 0, 0x1c, 2, 1
        .long   STATUS, 1, 0xf                                  # DRIVER_OK
        .long   -1
