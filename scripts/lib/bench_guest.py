"""Runs a benchmark guest under kvmpy, as a user's script would: a flat image, a device at the MMIO address."""

from __future__ import annotations

import sys

import kvmpy

END_PORT = 0xF4
MMIO = 0xFED00000


class End(kvmpy.RegisterDevice, span=1):
    """The guest's last word."""

    STATUS = kvmpy.Reg(0, read=False)

    def attach(self, board: kvmpy.Board) -> None:
        self._board = board
        board.pio(END_PORT, self.SPAN, self)

    def write_STATUS(self, value: int) -> None:
        self._board.stop(kvmpy.Stop(kvmpy.Reason.EXIT, status=value))


class Timer(kvmpy.RegisterDevice, span=8, stride=8):
    """One register that is read."""

    ID = kvmpy.Reg(0, reset=0x60, write=0)

    def attach(self, board: kvmpy.Board) -> None:
        board.mmio(self.SPAN, self, MMIO)


def main() -> int:
    machine = kvmpy.Machine(kernel=sys.argv[1], boot="flat", mem="2M")
    machine.add(End())
    machine.add(Timer())
    stop = machine.run()
    machine.close()
    return stop.status if stop.reason is kvmpy.Reason.EXIT else 255


if __name__ == "__main__":
    sys.exit(main())
