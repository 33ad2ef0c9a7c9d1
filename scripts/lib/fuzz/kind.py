"""What the harness has to know of a kind of device: how it is made, what requests look like, what is behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kvmpy.virtio.spec import F

from .oracle import Done, Image, Ring, Span, Violation

if TYPE_CHECKING:
    from .generate import Generator
    from .rig import Rig

__all__ = ["Kind", "Violation"]


class Kind:
    """Base of all kinds; one object for one case."""

    NAME: ClassVar[str]
    TWIN: ClassVar[bool] = False  # some of its work is also done in C
    FEATURES: ClassVar[int] = F.VERSION_1 | F.INDIRECT_DESC | F.EVENT_IDX
    OPTIONAL: ClassVar[Sequence[int]] = (F.INDIRECT_DESC, F.EVENT_IDX)  # of these a driver may go without
    SIZES: ClassVar[Sequence[int]]  # of the queues of a well-behaved driver
    DEFECT: ClassVar[float] = 0.1  # of the chains have one; fewer where requests stand on those before
    QUEUE_SIZES: ClassVar[Sequence[int]] = (8, 16, 16, 32, 64)  # of which others choose

    # The device.

    def open(self, folder: Path) -> Any:
        """The device, not attached yet; what it needs of the host is in `folder`."""
        raise NotImplementedError

    def started(self, features: int) -> None:
        """A driver has begun with these features."""

    def settle(self) -> None:
        """What the host's side does all the time, such as to read what comes."""

    def rested(self) -> None:
        """Nothing is left to do; raises Violation when something should have happened and has not."""

    def host(self, rig: Rig, name: str, *arguments: Any) -> None:
        """Something that the host's side does when a case says so."""

    def works(self, rig: Rig) -> None:
        """Make a normal request with `rig.request`; raises Violation."""
        raise NotImplementedError

    def observe(self) -> Any:
        """What there is to see on the host's side, for the comparison of engines."""
        return None

    def close(self) -> None:
        """The device is closed; raises Violation when it has left behind what it must not."""

    # Requests.

    def begin(self, make: Generator) -> None:
        """What a driver does first."""

    def request(self, make: Generator) -> None:
        """Something plausible, mostly a chain."""
        raise NotImplementedError

    # The oracle's questions.

    def heads(self, index: int, ring: Ring) -> set[int] | None:
        """Which chains a device that keeps some may give back; None: in the order of the available ring."""
        return None

    def allows(self, one: Done, before: Image) -> list[Span]:
        """What it may have written besides the first `written` bytes of the chain's room."""
        return []

    def done(self, chains: list[Done], before: Image, after: Image) -> None:
        """Compare what was done with what should have been; raises Violation."""

    def tangled(self) -> None:
        """Something was done of which nobody can say what it should have been."""
