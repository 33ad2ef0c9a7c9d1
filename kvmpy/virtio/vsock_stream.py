"""One connection of a socket device: its packets, the credit of both sides, how it ends (VIRTIO 1.2, 5.10.6)."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core.buffers import pieces, total
from ..core.events import READ, WRITE
from ..core.regs import Bits, bit
from ..host.streamsocket import StreamSocket
from .queue import Chain

if TYPE_CHECKING:
    from .vsock import Vsock

HEADER = struct.Struct("<QQIIIHHIII")  # src_cid dst_cid src_port dst_port len type op flags buf_alloc fwd_cnt
STREAM = 1  # type of socket
INVALID, REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(8)  # op
HOST_CID = 2

BUFFER = 1 << 17  # bytes that the guest may send ahead of the host, for each connection
UPDATE = BUFFER // 4  # bytes that the host has taken of them, after which the guest is told
MAX_PAYLOAD = 1 << 16  # bytes of a packet to the guest; Linux gives buffers of 4 KiB
WRAP = 0xFFFFFFFF  # counters of bytes have 32 bits

Answered = Callable[["Stream | None"], None]
Key = tuple[int, int]  # port of the host, port of the guest


class END(Bits):
    """Flags of SHUTDOWN: what the sender will not do any more (5.10.6.5)."""

    RECEIVE = bit(0)
    SEND = bit(1)

    BOTH = RECEIVE | SEND


class Stream:
    """A port of the guest, a port of the host, and the socket behind that; methods for the device, with its lock held.

    `answered` is called when the guest has answered to a connection of the host, with None when it has refused.
    """

    def __init__(self, device: Vsock, key: Key, host: socket.socket, answered: Answered | None = None) -> None:
        self.key = key
        self.socket = StreamSocket(device.board.loop, host, self._woken, device)
        self.answered = answered
        self.open = answered is None
        self.said = 0  # ends that the guest was told of, or is about to be
        self.heard = 0  # and those that it has told
        self.gone = False  # no connection of the device any more
        self._device = device
        self._words = [RESPONSE if answered is None else REQUEST]  # packets without payload that are due
        self._starved = False  # the guest was asked for credit
        self._room = self._taken = self._sent = 0  # buf_alloc and fwd_cnt of the guest, and what was sent to it
        self._received = self._told = 0  # bytes from the guest, and fwd_cnt as it knows it

    # From the guest.

    def credit(self, buf_alloc: int, fwd_cnt: int) -> None:
        """What each packet tells (5.10.6.3). A fwd_cnt that was sent earlier than the last one, or that is none of what
        was sent, changes nothing."""
        self._room = buf_alloc
        if fwd_cnt - self._taken & WRAP <= self._sent - self._taken & WRAP:
            self._taken = fwd_cnt
        if self._starved and self._credit > 0:
            self._starved = False
            self.watch()

    def hear(self, op: int, flags: int, buf_alloc: int, fwd_cnt: int, payload: list[memoryview], size: int) -> bool:
        """A packet of the guest's; False when it breaks a rule."""
        self.credit(buf_alloc, fwd_cnt)
        if op == RESPONSE:
            if self.open or not self.known:
                return False
            self._answer(True)
        elif not self.open:
            return False
        elif op == RW:
            if size > BUFFER - self.socket.held or self.heard & END.SEND:
                return False
            self._received += size
            self.socket.write(payload)
            self._moved()
        elif op == SHUTDOWN:
            self._shutdown(flags & END.BOTH)
        elif op == CREDIT_REQUEST:
            self._say(CREDIT_UPDATE)
        elif op != CREDIT_UPDATE:
            return False
        self.watch()
        return True

    def _shutdown(self, flags: int) -> None:
        news = flags & ~self.heard
        self.heard |= flags
        if self.said == END.BOTH or self.heard == END.BOTH:
            return  # the device sees to it
        if news & END.RECEIVE:
            self.socket.refuse()
            self._end(END.SEND)
        if news & END.SEND:
            self.socket.finish()

    # To the guest.

    @property
    def known(self) -> bool:
        """Whether the guest has heard of the connection."""
        return REQUEST not in self._words

    @property
    def _credit(self) -> int:
        return self._room - (self._sent - self._taken & WRAP)

    def speak(self, chain: Chain) -> None:
        """Fill `chain`, which has room for a header, with what is due next; nothing is `written` when nothing is."""
        size, more = 0, False
        if self._words:
            op = self._words.pop(0)
        elif not self.open or self.said & END.SEND:
            return
        elif self._credit <= 0:
            if self._starved:
                return
            self._starved, op = True, CREDIT_REQUEST
        else:
            room = pieces(chain.writable, HEADER.size, min(self._credit, MAX_PAYLOAD))
            if not total(room):
                op = CREDIT_UPDATE  # a buffer that has room for nothing else
            else:
                try:
                    op, size = RW, self.socket.read_into(room)
                except BlockingIOError:
                    return
                if not size:
                    self._end(END.BOTH if self.socket.hung_up else END.SEND)
                    op = self._words.pop()
            more = size == total(room)
        self._sent = self._sent + size & WRAP
        chain.write(self._header(op, size), at=0)
        chain.written = HEADER.size + size
        if self._words or more:
            self._device.speakers[self] = None  # again, after the others

    def _header(self, op: int, size: int) -> bytes:
        self._told = fwd_cnt = self._received - self.socket.held & WRAP
        host_port, guest_port = self.key
        flags = self.said if op == SHUTDOWN else 0
        return HEADER.pack(HOST_CID, self._device.cid, host_port, guest_port, size, STREAM, op, flags, BUFFER, fwd_cnt)

    def _say(self, op: int) -> None:
        if op not in self._words:
            self._words.append(op)
        self._device.speakers[self] = None

    # The host's socket.

    def watch(self) -> None:
        """Wait for what the host has to do next. Its end alone is only waited for behind the end of its output, or
        before the stream begins: else it is seen by reading, since there may be input left."""
        if self.gone:
            return
        reading = self.open and not self.said & END.SEND
        waits = reading and not self._starved and self not in self._device.speakers
        events = READ * waits | WRITE * bool(self.socket.held)
        self.socket.watch(-1 if self.said == END.BOTH or (reading and not events) else events)

    def close(self) -> None:
        """The connection is lost."""
        self.socket.close()
        self._answer(False)

    def _woken(self) -> None:
        if self.gone:  # while the loop waited for the lock
            return
        device = self._device
        self.socket.flush()
        self._moved()
        if not self.open:
            if self.socket.hung_up:
                device.abandon(self)
                return
        elif not self.said & END.SEND:
            device.speakers[self] = None
        elif self.socket.hung_up:
            self._end(END.BOTH)
        device.speak()
        self.watch()

    def _moved(self) -> None:
        """The host may have taken some of what the guest has sent, or be gone."""
        if self.socket.deaf:
            self._end(END.RECEIVE)
        if (self._received - self.socket.held - self._told & WRAP) >= UPDATE:
            self._say(CREDIT_UPDATE)

    def _end(self, flags: int) -> None:
        """The host will not receive, or not send any more."""
        if flags & ~self.said:
            self.said |= flags
            self._say(SHUTDOWN)
            if self.said == END.BOTH:
                self.socket.close()
                self._device.part(self)

    def _answer(self, accepted: bool) -> None:
        answered, self.answered = self.answered, None
        self.open = self.open or accepted
        if answered is not None:
            answered(self if accepted else None)


def reset(src_cid: int, dst_cid: int, src_port: int, dst_port: int, kind: int = STREAM) -> bytes:
    """The packet that ends a connection at once, or says that there is none."""
    return HEADER.pack(src_cid, dst_cid, src_port, dst_port, 0, kind, RST, 0, 0, 0)
