"""Socket device: streams between programs in the guest and programs on the host (VIRTIO 1.2, 5.10).

Linux: VIRTIO_VSOCKETS; AF_VSOCK sockets in the guest, where the host is CID 2. On the host a stream is a socket of this
process, or of another one, through the UNIX sockets of host/vsocket.py.

    vsock = Vsock()
    vm.add(vsock)
    vsock.listen(1024, ready.put)                 # programs in the guest that connect to port 1024 of the host
    ...
    with vsock.connect(5000) as stream:           # what listens at port 5000 in the guest
        stream.sendall(b"hello")

Nothing is lost and nothing spins when one side stops: what the guest may send ahead is bounded by its credit, what the
host sends stays with the host until the guest has buffers and credit. A hostile guest may send packets that are cut,
of unknown kinds, for connections that are not there, from or to others, or beyond its credit (each ends in a reset of
that connection); ask for connections without end (there are `limit`, or as many as its half of this process's
descriptors); claim credit that it has not, which harms itself; or leave no buffers while it causes answers (then its
own packets wait).
"""

from __future__ import annotations

import itertools
import resource
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..core.board import Board
from ..core.buffers import pieces, total
from ..core.errors import ConfigError, GuestError
from ..core.events import READ, WRITE
from ..core.regs import Bits, bit
from ..host.streamsocket import StreamSocket
from ..host.vsocket import VsockListener
from .device import VirtioDevice
from .queue import Chain, VirtQueue
from .spec import Type

RX, TX, EVENT = range(3)  # queues (5.10.2)
HEADER = struct.Struct("<QQIIIHHIII")  # 5.10.6: src_cid dst_cid src_port dst_port len type op flags buf_alloc fwd_cnt
STREAM = 1  # type of socket (5.10.6)
INVALID, REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(8)  # op (5.10.6)
TRANSPORT_RESET = struct.pack("<I", 0)  # the only event (5.10.6.7)

HOST_CID = 2
CIDS = range(3, 0xFFFFFFFF)  # those that are not reserved (5.10.4)
PORTS = range(0xFFFFFFFF)  # the last one means any (VMADDR_PORT_ANY)
FIRST_HOST_PORT = 1 << 30  # of connections that the host makes; below are those that programs listen at

BUFFER = 1 << 17  # bytes that the guest may send ahead of the host, for each connection
UPDATE = BUFFER // 4  # bytes that the host has taken of them, after which the guest is told
MAX_PAYLOAD = 1 << 16  # bytes of a packet to the guest; Linux gives buffers of 4 KiB
MAX_CONNECTIONS = 4096
RESETS = 128  # answers that wait for the guest's buffers; with more, its packets wait
BATCH = 64  # packets of a queue in one turn of the event loop
LINGER = 8.0  # seconds that the guest has to confirm the end of a connection, as long as Linux gives
WRAP = 0xFFFFFFFF  # counters of bytes have 32 bits

Accepted = Callable[[socket.socket], object]
Answered = Callable[["Stream | None"], None]
Key = tuple[int, int]  # port of the host, port of the guest


class VSOCK_F(Bits):
    """Feature bits (5.10.3)."""

    STREAM = bit(0)


class END(Bits):
    """Flags of SHUTDOWN: what the sender will not do any more (5.10.6.5)."""

    RECEIVE = bit(0)
    SEND = bit(1)

    BOTH = RECEIVE | SEND


class Stream:
    """A connection: a port of the guest, a port of the host, and the socket behind that.

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
        if CREDIT_UPDATE in self._words:
            self._words.remove(CREDIT_UPDATE)
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
        if device.speakers:
            device.serve(RX)
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


class Vsock(VirtioDevice):
    """Streams between the guest and this host.

    cid   the guest's own address, 3 to 4294967294; machines may have the same, since each has a device of its own
    path  a UNIX socket, which is made, for programs that want to connect to the guest (host/vsocket.py)

    There are at most `limit` connections. Raises ConfigError for a CID that is reserved; `attach` raises HostError
    when it cannot listen.
    """

    type_id = Type.VSOCK
    queue_sizes = (128, 128, 16)
    features = VSOCK_F.STREAM
    modules: ClassVar[tuple[str, ...]] = ("vmw_vsock_virtio_transport",)

    def __init__(self, cid: int = 3, path: Path | None = None) -> None:
        if cid not in CIDS:
            raise ConfigError(f"a guest cannot have cid={cid}", f"use {CIDS.start} to {CIDS.stop - 1}")
        self.cid = cid
        self.path = path
        self.config = struct.pack("<Q", cid)
        self.limit = min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)  # two for each, of half
        self.speakers: dict[Stream, None] = {}  # who may have something to say to the guest, in the order of turns
        self._streams: dict[Key, Stream] = {}
        self._retired: set[StreamSocket] = set()  # of connections that the guest has ended, with output left
        self._parting: dict[Stream, float] = {}  # of which the guest has to confirm the end, until when
        self._waiting = False  # for that time to pass
        self._resets: deque[bytes] = deque()
        self._stalled = False  # packets of the guest wait until there are fewer of these
        self._lost = False  # the guest has to be told that its connections are
        self._ports = itertools.count()
        self._accepted: dict[int, Accepted] = {}
        self._listener: VsockListener | None = None

    def attach(self, board: Board) -> None:
        self.board = board
        if self.path is not None:
            self._listener = VsockListener(board.loop, self.path, self._called, self._has_room, self)
        try:
            super().attach(board)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for retired in self._retired:
            retired.close()
        self._retired.clear()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    # For programs of this process, from any thread but the event loop's.

    def connect(self, port: int, timeout: float | None = None) -> socket.socket:
        """A stream to port `port` of the guest.

        Raises ConnectionRefusedError when nobody listens there, there is no driver yet, or there are too many
        connections, and TimeoutError when the guest has not answered in `timeout` seconds (None: no limit). A stream
        that the guest resets reads as its end.
        """
        if port not in PORTS:
            raise ValueError(f"port {port} of a guest")
        outcome: list[Stream | None] = []
        answered = threading.Event()

        def answer(stream: Stream | None) -> None:
            outcome.append(stream)
            answered.set()

        ours, theirs = socket.socketpair()
        with self.lock:
            stream = self._call(port, theirs, answer)
        try:
            if not answered.wait(timeout):
                with self.lock:
                    if stream is not None and not outcome:
                        self.abandon(stream)
                        raise TimeoutError(f"port {port} of the guest has not answered in {timeout:g} s")
            if outcome[0] is None:
                raise ConnectionRefusedError(f"nobody listens at port {port} of the guest")
        except BaseException:
            ours.close()
            raise
        return ours

    def listen(self, port: int, accepted: Accepted) -> None:
        """Hand streams that the guest makes to port `port` of the host to `accepted`, on the event loop: it must not
        block. Raises ValueError when somebody listens there."""
        with self.lock:
            if port not in PORTS or port in self._accepted:
                raise ValueError(f"port {port} of the host is taken" if port in PORTS else f"port {port} of the host")
            self._accepted[port] = accepted

    # The driver.

    def notify(self, index: int, queue: VirtQueue) -> None:
        try:
            if index == TX:
                self._hear(queue)
                if self._resets or self.speakers:
                    self.serve(RX)
            elif index == RX:
                self._speak(queue)
                if self._stalled and len(self._resets) < RESETS:
                    self._stalled = False
                    self._serve_soon(TX)
            else:
                self._tell(queue)
        except GuestError:
            self._drop_all()
            raise

    def reset(self) -> None:
        self._drop_all()
        self._stalled = self._lost = False

    def restore(self, state: dict[str, Any]) -> None:
        """Connections do not outlive a restore: the guest is told so, and reads its CID again (5.10.6.7)."""
        super().restore(state)
        self._lost = True

    def _tell(self, queue: VirtQueue) -> None:
        chain = queue.pop() if self._lost else None
        if chain is not None:
            self._lost = False
            chain.write(TRANSPORT_RESET)
            queue.push(chain)

    # From the guest.

    def _hear(self, queue: VirtQueue) -> None:
        for _ in range(BATCH):
            if len(self._resets) >= RESETS:
                self._stalled = True
                return
            chain = queue.pop()
            if chain is None:
                return
            header = chain.read(HEADER.size)
            if len(header) == HEADER.size:
                self._obey(chain, *HEADER.unpack(header))
            queue.push(chain)
        queue.more = True

    def _obey(
        self,
        chain: Chain,
        src_cid: int,
        dst_cid: int,
        src_port: int,
        dst_port: int,
        size: int,
        kind: int,
        op: int,
        flags: int,
        buf_alloc: int,
        fwd_cnt: int,
    ) -> None:
        """A packet of the guest's; who breaks a rule, or means nobody, gets a reset (5.10.6.4, 5.10.6.5)."""
        ours = src_cid == self.cid and dst_cid == HOST_CID and kind == STREAM
        stream = self._streams.get((dst_port, src_port)) if ours else None
        fits = size <= chain.size - HEADER.size
        if op == RST:
            if stream is not None:
                self._drop(stream)
            return
        if stream is None:
            stream = self._accept((dst_port, src_port)) if ours and fits and op == REQUEST else None
            if stream is not None:
                stream.credit(buf_alloc, fwd_cnt)
                return
        elif fits and stream.hear(op, flags, buf_alloc, fwd_cnt, pieces(chain.readable, HEADER.size, size), size):
            if stream.heard != END.BOTH:
                return
            self._retire(stream)  # 5.10.6.5: a reset is how the end is confirmed
        else:
            self._drop(stream)
        self._resets.append(HEADER.pack(dst_cid, src_cid, dst_port, src_port, 0, kind, RST, 0, 0, 0))

    def _accept(self, key: Key) -> Stream | None:
        """The guest connects to a port of the host."""
        accepted = self._accepted.get(key[0])
        if not self._has_room():
            return None
        if accepted is not None:
            try:
                ours, theirs = socket.socketpair()
            except OSError:  # EMFILE
                return None
            self.board.loop.call_soon(partial(_hand_over, accepted, ours))
        elif self._listener is not None:
            found = self._listener.dial(key[0])
            if found is None:
                return None
            theirs = found
        else:
            return None
        return self._add(Stream(self, key, theirs))

    # To the guest.

    def _speak(self, queue: VirtQueue) -> None:
        speakers = self.speakers
        for _ in range(BATCH):
            if not self._resets and not speakers:
                return
            chain = queue.pop()
            if chain is None:
                return
            if chain.capacity < HEADER.size:
                pass  # of no use to any packet
            elif self._resets:
                chain.write(self._resets.popleft())
            else:
                stream = next(iter(speakers))
                del speakers[stream]
                stream.speak(chain)
                stream.watch()
                if not chain.written:
                    queue.undo_pop()
                    continue
            queue.push(chain)
        queue.more = True

    # Connections.

    def _has_room(self) -> bool:
        clients = len(self._listener) if self._listener is not None else 0
        return len(self._streams) + len(self._retired) + clients < self.limit

    def _called(self, port: int, client: socket.socket) -> None:
        """A client of the UNIX socket wants a port of the guest."""

        def answer(stream: Stream | None) -> None:
            if stream is not None:
                stream.socket.write([memoryview(b"OK %d\n" % stream.key[0])])

        self._call(port, client, answer)

    def _call(self, port: int, host: socket.socket, answered: Answered) -> Stream | None:
        """Connect `host`, which this takes, to port `port` of the guest; None when that is refused at once."""
        if port not in PORTS or not self.queues or not self.queues[RX].ready or not self._has_room():
            host.close()
            answered(None)
            return None
        keys = ((FIRST_HOST_PORT + n % FIRST_HOST_PORT, port) for n in self._ports)
        key = next(key for key in keys if key not in self._streams)
        stream = self._add(Stream(self, key, host, answered))
        stream.watch()
        self._serve_soon(RX)
        return stream

    def _add(self, stream: Stream) -> Stream:
        self._streams[stream.key] = stream
        self.speakers[stream] = None
        return stream

    def abandon(self, stream: Stream) -> None:
        """The host does not want the connection any more."""
        self._drop(stream)
        if stream.known:
            host_port, guest_port = stream.key
            self._resets.append(HEADER.pack(HOST_CID, self.cid, host_port, guest_port, 0, STREAM, RST, 0, 0, 0))
            self._serve_soon(RX)

    def part(self, stream: Stream) -> None:
        """All has been said: the guest has some time to confirm the end."""
        self._parting[stream] = self.board.loop.time() + LINGER
        self._wait_for_end()

    def _wait_for_end(self) -> None:
        if self._parting and not self._waiting:
            self._waiting = True
            wait = next(iter(self._parting.values())) - self.board.loop.time()
            self.board.loop.after(wait, self._expire, owner=self)

    def _expire(self) -> None:
        self._waiting = False
        now = self.board.loop.time()
        for stream in [stream for stream, end in self._parting.items() if end <= now]:
            self.abandon(stream)
        self._wait_for_end()

    def _retire(self, stream: Stream) -> None:
        """The guest has gone; what it has sent is still for the host."""
        self._forget(stream)
        self._retired.add(stream.socket)
        stream.socket.retire(partial(self._retired.discard, stream.socket))

    def _drop(self, stream: Stream) -> None:
        self._forget(stream)
        stream.close()

    def _forget(self, stream: Stream) -> None:
        stream.gone = True
        del self._streams[stream.key]
        self.speakers.pop(stream, None)
        self._parting.pop(stream, None)

    def _drop_all(self) -> None:
        for stream in list(self._streams.values()):
            (self._retire if stream.open else self._drop)(stream)
        self._resets.clear()

    def _serve_soon(self, index: int) -> None:
        self.board.loop.call_soon(lambda: self.serve(index), owner=self)


def _hand_over(accepted: Accepted, stream: socket.socket) -> None:
    accepted(stream)
