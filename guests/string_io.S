# String I/O with repeat counts, over a page boundary, with the direction flag set.
#
# Entry: real mode.
# The test fills memory before and looks at it afterwards.
#   out  16 bytes, 8 words and 4 dwords to REPORT, each from 0x5ff8 up; 4 bytes from 0x5ff8 down
#   in   16 bytes to 0x1ff8, 8 words to 0x2ff8, 4 dwords to 0x3ff8, up; 4 bytes to 0x4ffb down; all from ASK
#   in   6000 bytes from ASK to 0xa000, more than fit the page that KVM_RUN shares; END 0.

        .include "tiny.inc"
        .code16

        mov     $REPORT, %dx
        mov     $0x5ff8, %si
        mov     $16, %cx
        rep outsb
        mov     $0x5ff8, %si
        mov     $8, %cx
        rep outsw
        mov     $0x5ff8, %si
        mov     $4, %cx
        rep outsl
        std
        mov     $0x5ff8, %si
        mov     $4, %cx
        rep outsb

        cld
        mov     $ASK, %dx
        mov     $0x1ff8, %di
        mov     $16, %cx
        rep insb
        mov     $0x2ff8, %di
        mov     $8, %cx
        rep insw
        mov     $0x3ff8, %di
        mov     $4, %cx
        rep insl
        std
        mov     $0x4ffb, %di
        mov     $4, %cx
        rep insb

        cld
        mov     $0xa000, %di
        mov     $6000, %cx
        rep insb
        finish
