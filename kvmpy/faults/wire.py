"""A network line that loses, doubles, reorders, corrupts or delays frames, or fails for good."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from ..core.errors import HostError
from ..host.frames import ETH_HEADER, VNET_HEADER, Frame, NetBackend
from .plan import Fault, Plan

SEND, RECEIVE = "send", "receive"
OPERATIONS = (SEND, RECEIVE)
Later = Callable[[float, Callable[[], None]], None]


class WireFault(Fault, frozen=True):
    """A fault of frames that the guest `send`s, that it is to `receive`, or of any."""


class Drop(WireFault, frozen=True):
    """The frame is lost."""


class Duplicate(WireFault, frozen=True):
    """The frame arrives twice."""


class Reorder(WireFault, frozen=True):
    """The frame arrives behind the next one of its direction; without a next one it never does."""


class Corrupt(WireFault, frozen=True):
    """One bit of the frame is flipped, anywhere behind its Ethernet header."""


class Late(WireFault, frozen=True):
    """The frame arrives so much later, behind others if these are faster."""

    seconds: float = 0.1


class Hangup(WireFault, frozen=True):
    """The other end has gone: the guest's link is down for good."""


class FaultyWire:
    """`line` with the faults of `plan`; no twin in C goes round it. `later` runs a call after so many seconds, with the
    device's lock; `arrived` says that there is a frame without the line being readable."""

    def __init__(self, line: NetBackend, plan: Plan, later: Later, arrived: Callable[[], None]) -> None:
        self.vnet_header = line.vnet_header
        self.fileno = line.fileno
        self._line = line
        self._plan = plan
        self._later = later
        self._arrived = arrived
        self._closed = False
        self._behind: dict[str, list[bytes]] = {SEND: [], RECEIVE: []}  # the next frame of this direction
        self._unsent: deque[bytes] = deque()  # of a frame that became several
        self._incoming: deque[bytes] = deque()

    def send(self, frame: Sequence[Frame]) -> bool:
        if not self._drain():
            return False
        self._unsent.extend(self._apply(SEND, b"".join(frame)))
        self._drain()
        return True

    def flush(self) -> bool:
        return self._line.flush() and self._drain()

    def receive(self) -> Frame | None:
        while not self._incoming:
            frame = self._line.receive()
            if frame is None:
                return None
            self._incoming.extend(self._apply(RECEIVE, bytes(frame)))
        return self._incoming.popleft()

    def close(self) -> None:
        self._closed = True
        self._line.close()

    def _drain(self) -> bool:
        """Whether the line has taken all that was to be sent."""
        while self._unsent:
            if not self._line.send([self._unsent[0]]):
                return False
            self._unsent.popleft()
        return True

    def _apply(self, on: str, frame: bytes) -> list[bytes]:
        """The frames that follow from one."""
        frames = [frame]
        behind = self._behind[on]
        self._behind[on] = []
        for fault, numbers in self._plan.hits(on, size=len(frame)):
            match fault:
                case Drop():
                    frames = []
                case Duplicate():
                    frames = frames * 2
                case Corrupt():
                    head = ETH_HEADER + (VNET_HEADER if self.vnet_header else 0)
                    bit = numbers.randrange(8 * head, max(8 * len(frame), 8 * head + 1))
                    frames = [_flipped(each, bit) for each in frames]
                case Reorder():
                    self._behind[on] += frames
                    frames = []
                case Late():
                    for each in frames:
                        self._delay(fault.seconds, on, each)
                    frames = []
                case Hangup():
                    raise HostError("the other end of the network has gone", "this is an injected fault")
        return frames + behind

    def _delay(self, seconds: float, on: str, frame: bytes) -> None:
        def arrive() -> None:
            if self._closed:
                return
            if on == SEND:
                self._unsent.append(frame)
                with suppress(HostError):  # the device hears of it when it sends the next one
                    self._drain()
            else:
                self._incoming.append(frame)
                self._arrived()

        self._later(seconds, arrive)


def _flipped(frame: bytes, bit: int) -> bytes:
    if bit >= 8 * len(frame):
        return frame
    changed = bytearray(frame)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
