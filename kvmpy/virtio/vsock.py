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
of unknown kinds, for connections that are not there, from or to others, or beyond its credit (each is answered with a
reset); ask for connections without end (there are at most `limit`); claim that it has room where it has none, which is
its own loss; or leave no buffers while it causes answers (then its own packets wait).
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
from ..core.buffers import pieces
from ..core.errors import ConfigError, GuestError
from ..core.regs import Bits, bit
from ..host.streamsocket import StreamSocket
from ..host.vsocket import VsockListener
from .device import VirtioDevice
from .queue import Chain, VirtQueue
from .spec import Type
from .vsock_stream import END, HEADER, HOST_CID, REQUEST, RST, STREAM, Answered, Key, Stream, reset

RX, TX, EVENT = range(3)  # queues (5.10.2)
TRANSPORT_RESET = struct.pack("<I", 0)  # the only event (5.10.6.7)

CIDS = range(3, 0xFFFFFFFF)  # those that are not reserved (5.10.4)
PORTS = range(0xFFFFFFFF)  # the last one means any (VMADDR_PORT_ANY)
FIRST_HOST_PORT = 1 << 30  # of connections that the host makes; below are those that programs listen at

MAX_CONNECTIONS = 4096
RESETS = 128  # answers that wait for the guest's buffers; with more, its packets wait
BATCH = 64  # packets of a queue in one turn of the event loop
LINGER = 8.0  # seconds that the guest has to confirm the end of a connection, as long as Linux gives

Accepted = Callable[[socket.socket], object]


class VSOCK_F(Bits):
    """Feature bits (5.10.3)."""

    STREAM = bit(0)


class Vsock(VirtioDevice):
    """Streams between the guest and this host.

    cid   the guest's own address, 3 to 4294967294; machines may have the same, since each has a device of its own
    path  a UNIX socket, which is made, for programs that want to connect to the guest (host/vsocket.py)

    There are at most `limit` connections, which take no more than half of this process's descriptors. Raises
    ConfigError for a CID that is reserved; `attach` raises HostError when it cannot listen.
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
        self.reaches = path is not None  # beside it are the sockets that the guest can dial
        self.config = struct.pack("<Q", cid)
        self.limit = min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)  # each takes two
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
            if stream is None:
                raise ConnectionRefusedError("the guest's driver is not up, or there are too many connections")
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
                self.speak()
            elif index == RX:
                self._fill(queue)
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
                self._obey(header, chain)
            queue.push(chain)
        queue.more = True

    def _obey(self, header: bytes, chain: Chain) -> None:
        """A packet of the guest's; who breaks a rule, or means nobody, gets a reset (5.10.6.4, 5.10.6.5)."""
        src_cid, dst_cid, src_port, dst_port, size, kind, op, flags, buf_alloc, fwd_cnt = HEADER.unpack(header)
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
        self._resets.append(reset(dst_cid, src_cid, dst_port, src_port, kind))

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

    def speak(self) -> None:
        """Tell the guest what there is to tell."""
        if self._resets or self.speakers:
            self.serve(RX)

    def _fill(self, queue: VirtQueue) -> None:
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
            self._resets.append(reset(HOST_CID, self.cid, *stream.key))
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
