"""One address of a device that may be answered without asking the device.

A device gets a cell with `board.cell`, and says in it, whenever its state changes, what it would do at that address
now. The compiled run loop then does it, without the interpreter and without the device's lock:

    READ_VALUE    a read gives `value` and changes nothing
    WRITE_SEEN    a write of a byte whose bit in `seen` is set changes `value` to it, and nothing else
    WRITE_STREAM  a byte written goes to the console, and changes nothing else
    WRITE_CLEARS  a write of four bytes clears the bits that it sets in the value of `target`, and nothing else

Kinds that are not set, accesses of another size, and a console about to be full come to the device. So do all of them
where nobody looks at the cell, with KVMPY_PURE=1 and on other boards: a cell changes no behaviour, ever.
"""

from __future__ import annotations

READ_VALUE, WRITE_SEEN, WRITE_STREAM, WRITE_CLEARS = 1, 2, 4, 8  # as in _kvm_ioctls.c


class Cell:
    """A cell that nobody looks at, and the attributes that all cells have."""

    __slots__ = ("kinds", "seen", "target", "value")

    def __init__(self) -> None:
        self.kinds = 0
        self.value = 0
        self.target: Cell | None = None
        self.seen = bytearray(32)  # a bit for each byte, the lowest bit first
