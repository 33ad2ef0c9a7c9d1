# HLT with interrupts off: nothing inside the guest ends it.
#
# Entry: real mode.
# Reports the byte 1, halts; would report 2 and END 0 if the HLT came to an end.

        .include "tiny.inc"
        .code16

        say     1
        cli
        hlt
        say     2
        finish
