# A triple fault.
#
# Entry: protected mode.
# Reports the byte 1, then executes UD2 with an empty IDT. END 1 if it survives that.

        .include "tiny.inc"
        .code32

        say     1
        lidt    empty
        ud2
        finish  1

empty:  .word   0
        .long   0
