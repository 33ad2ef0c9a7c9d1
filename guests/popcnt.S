# An instruction that KVM's emulator lacks.
#
# Entry: long mode.
# Reports the byte 1, then POPCNT of 0x10301 (byte, 4). END 0. A KVM that has to emulate kernel code stops with
# KVM_EXIT_INTERNAL_ERROR in between; hardware executes it.

        .include "tiny.inc"
        .code64

        say     1
        mov     $0x10301, %ebx
        popcnt  %ebx, %eax
        out     %al, $REPORT
        finish
