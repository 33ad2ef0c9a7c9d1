# Does what the test tells it, one access at a time.
#
# Entry: long mode.
# Reads orders from ASK as dwords: verb | size << 8, address low, address high, value low, value high.
#   verb 0  END 0
#   verb 1  write `size` bytes (1, 2, 4) of value to port `address`
#   verb 2  read port `address`, report it (dword)
#   verb 3  write `size` bytes (1, 2, 4, 8) of value to memory
#   verb 4  read memory, report the value (two dwords, low half first)
# All five dwords are read for every verb but 0.

        .include "tiny.inc"
        .code64

        mov     $0x7000, %esp
next:   in      $ASK, %eax
        test    %al, %al
        jz      end
        mov     %eax, %ebp
        call    quad
        mov     %rax, %rdi                      # address
        call    quad
        mov     %rax, %rsi                      # value
        mov     %ebp, %ecx
        movzbl  %ch, %ecx                       # size
        mov     %ebp, %eax
        cmp     $1, %al
        je      port_write
        cmp     $2, %al
        je      port_read
        cmp     $3, %al
        je      store

load:   xor     %eax, %eax
        cmp     $2, %ecx
        ja      1f
        je      2f
        mov     (%rdi), %al
        jmp     told
2:      mov     (%rdi), %ax
        jmp     told
1:      cmp     $4, %ecx
        ja      1f
        mov     (%rdi), %eax
        jmp     told
1:      mov     (%rdi), %rax
told:   out     %eax, $REPORT
        shr     $32, %rax
        out     %eax, $REPORT
        jmp     next

store:  mov     %rsi, %rax
        cmp     $2, %ecx
        ja      1f
        je      2f
        mov     %al, (%rdi)
        jmp     next
2:      mov     %ax, (%rdi)
        jmp     next
1:      cmp     $4, %ecx
        ja      1f
        mov     %eax, (%rdi)
        jmp     next
1:      mov     %rax, (%rdi)
        jmp     next

port_write:
        mov     %edi, %edx
        mov     %esi, %eax
        cmp     $2, %ecx
        ja      1f
        je      2f
        out     %al, %dx
        jmp     next
2:      out     %ax, %dx
        jmp     next
1:      out     %eax, %dx
        jmp     next

port_read:
        mov     %edi, %edx
        xor     %eax, %eax
        cmp     $2, %ecx
        ja      1f
        je      2f
        in      %dx, %al
        jmp     3f
2:      in      %dx, %ax
        jmp     3f
1:      in      %dx, %eax
3:      out     %eax, $REPORT
        jmp     next

end:    finish

quad:   in      $ASK, %eax
        mov     %eax, %r8d
        in      $ASK, %eax
        shl     $32, %rax
        or      %r8, %rax
        ret
