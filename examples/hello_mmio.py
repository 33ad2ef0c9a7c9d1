"""A bank of memory-mapped registers, the smallest device that does something.

    kvmpy boot --device ./examples/hello_mmio.py:HelloMmio,greeting=Ahoy --exec examples/hello_mmio.sh

examples/hello_mmio.sh is the guest's side: it finds the registers by the word `hello_mmio=ADDRESS` on the kernel
command line, and speaks to them with busybox's devmem.
"""

from __future__ import annotations

import kvmpy


class HelloMmio(kvmpy.RegisterDevice, span=16, stride=4):
    """Four registers of 32 bits: a greeting, a number to write, and the sum and count of what was written.

    greeting   four characters for the guest to read
    """

    GREETING = kvmpy.Reg(0, write=0)
    NUMBER = kvmpy.Reg(4)
    SUM = kvmpy.Reg(8, write=0)
    COUNT = kvmpy.Reg(12, write=0, rc=0xFFFF_FFFF)  # reading clears it

    def __init__(self, greeting: str = "Helo") -> None:
        text = greeting.encode()
        if len(text) != self.STRIDE:
            raise kvmpy.ConfigError(f'invalid greeting "{greeting}"', f"use {self.STRIDE} characters")
        self.GREETING = int.from_bytes(text, "little")

    def attach(self, board: kvmpy.Board) -> None:
        base = board.mmio(self.SPAN, self)
        board.cmdline(f"hello_mmio={base:#x}")

    def write_NUMBER(self, value: int) -> None:
        self.NUMBER = value
        self.SUM = self.SUM + value & 0xFFFF_FFFF
        self.COUNT += 1
