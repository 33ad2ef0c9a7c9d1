# Exits at full speed, counted by the guest.
#
# Entry: real mode.
# Reports the dwords 1, 2, 3 ... and after each reads ASK (byte); when the answer is not 0, reports the total once
# more and says END 0.

        .include "tiny.inc"
        .code16

        xor     %eax, %eax
        xor     %ebx, %ebx
next:   inc     %ebx
        mov     %ebx, %eax
        out     %eax, $REPORT
        in      $ASK, %al
        test    %al, %al
        jz      next
        mov     %ebx, %eax
        out     %eax, $REPORT
        finish
