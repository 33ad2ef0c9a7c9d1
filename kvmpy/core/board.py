"""Everything a device may ask for while it is attached, and how it asks the machine to stop."""

from __future__ import annotations

from collections.abc import Callable

from .bus import BusDevice
from .cell import Cell
from .events import EventLoop
from .irq import IrqLine, Message
from .memory import GuestMemory
from .record import Record
from .sink import Sink
from .typed import Any, Enum, Protocol


class Reason(Enum):
    """Why a machine stopped."""

    POWEROFF = "guest powered off"
    RESET = "guest asked for a reset"
    EXIT = "guest gave an exit status"
    PANIC = "guest kernel panicked"
    TRIPLE_FAULT = "triple fault"
    QUIT = "stopped by the user"
    SIGNAL = "stopped by a signal"
    TIMEOUT = "time limit reached"
    HALT = "guest halted for good"
    CRASH = "the vCPU cannot go on"
    ERROR = "kvmpy failed"


class Stop(Record, frozen=True):
    """A request to stop the machine; the first one made is the one that counts.

    `status` is the number that goes with EXIT (the guest's own status) and SIGNAL (the signal); `cause` is the
    exception behind an ERROR.
    """

    reason: Reason
    detail: str = ""
    status: int = 0
    cause: BaseException | None = None

    def __str__(self) -> str:
        return f"{self.reason.value} ({self.detail})" if self.detail else self.reason.value


class Doorbell(Protocol):
    """Where a device listens for a driver's kicks."""

    def place(self, address: int | None) -> None:
        """Listen at `address` from now on; None: nowhere. Any thread may call it."""


class Board(Protocol):
    """The machine as a device sees it; `stop` and `log` are for any time, the other verbs for `attach`."""

    mem: GuestMemory
    loop: EventLoop

    def pio(self, base: int, size: int, device: BusDevice) -> None:
        """Give I/O ports [base, base+size) to `device`; raises ValueError when one is taken."""

    def mmio(self, size: int, device: BusDevice, base: int | None = None) -> int:
        """Give `size` bytes of MMIO to `device`, at `base` or wherever there is room; returns where."""

    def cell(self, address: int, size: int, *, mmio: bool = False, sink: Sink | None = None) -> Cell:
        """Where the device says what it would do at a port or MMIO address, so that it need not be asked.

        A WRITE_STREAM goes to `sink`."""

    def irq(self, gsi: int | None = None) -> IrqLine:
        """Interrupt line `gsi`, or one that is free."""

    def msi(self) -> Message:
        """A message-signalled interrupt, which goes where `route` says."""

    def new_loop(self, name: str) -> EventLoop:
        """An event loop with a thread of its own, which runs already: for devices that wait for the host for long."""

    def doorbell(
        self,
        address: int | None,
        size: int,
        value: int | None,
        ring: Callable[[], None],
        owner: Any,
        loop: EventLoop | None = None,
    ) -> Doorbell:
        """Run `ring` on `loop`, the board's by default, with the owner's lock, when the guest writes `value` (None:
        anything) at the MMIO `address` (None: nowhere yet) with `size` bytes (0: any number); the write itself may or
        may not be seen by the device that has the address."""

    def virtio(self, device: Any) -> None:
        """Give a VirtioDevice its transport."""

    def cmdline(self, *words: str) -> None:
        """Words for the kernel command line."""

    def stop(self, why: Stop) -> None:
        """Ask the machine to stop; any thread may ask, and the call returns at once."""

    def log(self, event: str, **fields: object) -> None:
        """One structured line in the log; a guest that triggers it in a loop is cut off and counted."""


class Attachable(Protocol):
    """A device that can be put on a board."""

    def attach(self, board: Board) -> None: ...
