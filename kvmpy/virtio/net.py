"""Network device: Ethernet frames between a guest and something on the host (VIRTIO 1.2, 5.1).

Linux: VIRTIO_NET. A hostile guest may send frames that are too short, too long or wrongly described, which are dropped;
offer buffers that no frame fits into, which is its own loss; or send and receive without end: each turn of the event
loop has a bound. Frames wait with the host until the guest has buffers, and in the ring until the host has room.
"""

from __future__ import annotations

import hashlib
import re
import select
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

from ..core.board import Board
from ..core.buffers import pieces
from ..core.errors import ConfigError, HostError
from ..core.events import READ, WRITE
from ..core.pure import PURE
from ..core.ratelimit import BURST, RateLimit, parse_bandwidth
from ..core.regs import Bits, bit
from ..core.wire import Wire, b6, u8, u16
from ..host import netsocket, tap
from ..host.frames import ETH_HEADER, MAX_FRAME, VLAN_TAG, VNET_HEADER, Frame, NetBackend
from ..host.passt import Passt, parse_forwards
from ..host.pcap import Pcap
from .device import VirtioDevice
from .queue import Chain, VirtQueue
from .spec import Type

if TYPE_CHECKING:
    from .twin import FrameTwin

RX, TX = 0, 1  # queues (5.1.2)
WAKES = {RX: READ, TX: WRITE}  # what of the host a queue waits for
BATCH = 64  # frames of a queue in one turn of the event loop, through Python: a flood must leave time for others
MTU_MIN, MTU_MAX = 68, 0xFFFF  # 5.1.4.1
BURST_MIN, BURST_MAX = 0.01, 3600.0  # seconds, for the limits
LOCAL, MULTICAST = 0x02, 0x01  # bits of the first byte of a MAC address (IEEE 802)
MAC = re.compile("[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")

T = TypeVar("T")


class NET_F(Bits):
    """Feature bits (5.1.3)."""

    CSUM = bit(0)
    GUEST_CSUM = bit(1)
    MTU = bit(3)
    MAC = bit(5)
    GUEST_TSO4 = bit(7)
    GUEST_TSO6 = bit(8)
    GUEST_ECN = bit(9)
    HOST_TSO4 = bit(11)
    HOST_TSO6 = bit(12)
    HOST_ECN = bit(13)
    MRG_RXBUF = bit(15)
    STATUS = bit(16)

    OFFLOADS = CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_ECN


NEEDS = {  # 5.1.3.1
    NET_F.GUEST_TSO4: NET_F.GUEST_CSUM,
    NET_F.GUEST_TSO6: NET_F.GUEST_CSUM,
    NET_F.GUEST_ECN: NET_F.GUEST_TSO4 | NET_F.GUEST_TSO6,
    NET_F.HOST_TSO4: NET_F.CSUM,
    NET_F.HOST_TSO6: NET_F.CSUM,
    NET_F.HOST_ECN: NET_F.HOST_TSO4 | NET_F.HOST_TSO6,
}


class NET_S(Bits):
    """Bits of `status` in the configuration space (5.1.4)."""

    LINK_UP = bit(0)


class HDR_F(Bits):
    """Flags of the header (5.1.6)."""

    NEEDS_CSUM = bit(0)
    DATA_VALID = bit(1)


GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_ECN = 0, 1, 4, 0x80  # gso_type (5.1.6)
CHECKSUM = 2  # bytes of one, at csum_offset
TUN_F = {
    NET_F.GUEST_CSUM: tap.TUN_F_CSUM,
    NET_F.GUEST_TSO4: tap.TUN_F_TSO4,
    NET_F.GUEST_TSO6: tap.TUN_F_TSO6,
    NET_F.GUEST_ECN: tap.TUN_F_TSO_ECN,
}


class Config(Wire):
    """The configuration space (5.1.4)."""

    mac: b6
    status: u16
    max_virtqueue_pairs: u16
    mtu: u16


class Header(Wire):
    """struct virtio_net_hdr, in front of every frame (5.1.6)."""

    flags: u8
    gso_type: u8
    hdr_len: u16
    gso_size: u16
    csum_start: u16
    csum_offset: u16
    num_buffers: u16


class Net(VirtioDevice):
    """A network interface of the guest.

    backend       what it is plugged into: `user` (passt: no privileges), `tap`, `socket` (a stream), `none`
    name          of the tap interface; a new one by default
    path          of the UNIX socket to connect to
    mac           by default a locally administered one, the same in each run
    mtu           that the guest should use, 68 to 65535 bytes
    link          off: the cable is pulled out, until `set_link`
    publish       ports of the host that lead into the guest, for `user`: [ip:]host:guest[/udp], several joined by +
    pcap          file for a capture of all frames
    rx_bandwidth  bytes per second to the guest, such as 10M; those of Ethernet frames
    rx_ops        frames per second to the guest, as they come from the host: many segments may be one
    tx_bandwidth  as rx_bandwidth, from the guest
    tx_ops        as rx_ops, from the guest
    burst         how much of these limits is saved up while nothing happens, in seconds

    Raises ConfigError for what cannot be; `attach` raises HostError for what the host does not give.
    """

    type_id = Type.NET
    queue_sizes = (256, 256)
    own_thread = True  # it may wait for the driver, too (twin.py)
    needs = NEEDS
    modules: ClassVar[tuple[str, ...]] = ("virtio_net",)

    def __init__(
        self,
        backend: str = "user",
        name: str | None = None,
        path: Path | None = None,
        mac: str | None = None,
        mtu: int | None = None,
        link: bool = True,
        publish: str | None = None,
        pcap: Path | None = None,
        rx_bandwidth: str | None = None,
        rx_ops: int | None = None,
        tx_bandwidth: str | None = None,
        tx_ops: int | None = None,
        burst: float = BURST,
    ) -> None:
        if mtu is not None and not MTU_MIN <= mtu <= MTU_MAX:
            raise ConfigError(f"a network device cannot have mtu={mtu}", f"use {MTU_MIN} to {MTU_MAX}")
        if not BURST_MIN <= burst <= BURST_MAX:
            raise ConfigError(f"invalid burst {burst:g}", f"give seconds, {BURST_MIN:g} to {BURST_MAX:g}")
        self._limit_options = {
            RX: _limit_options("rx", rx_bandwidth, rx_ops, burst),
            TX: _limit_options("tx", tx_bandwidth, tx_ops, burst),
        }
        self._limits: dict[int, RateLimit] = {}  # by queue
        self.mac = parse_mac(mac) if mac is not None else bytes(6)
        self._plug = _opener(backend, name, path, publish, mtu)
        self._place = f"{backend} {name or path or ''}"
        self._mtu = mtu or 0
        self._pcap_path = pcap
        self._pcap: Pcap | None = None
        self.backend: NetBackend | None = None
        self._cable = link
        self._vnet = False  # the backend's frames have a header
        self._twin: FrameTwin | None = None  # while ordinary frames go through C
        self._events = -1  # what the loop watches the backend for; -1: nothing, not even its end
        self.features = NET_F.MAC | NET_F.STATUS | NET_F.MRG_RXBUF
        self.features |= NET_F.MTU if mtu is not None else 0
        self.features |= NET_F.OFFLOADS if backend == "tap" else 0
        self.tx_dropped = self.rx_dropped = 0  # frames that made no sense, or fitted nowhere
        self.reset()

    def attach(self, board: Board) -> None:
        if any(self.mac):
            _claim(board, self.mac)
        super().attach(board)
        for index, options in self._limit_options.items():
            self._limits[index] = RateLimit(self.loop, self, partial(self.serve, index), **options)
        if self._pcap_path is not None:
            self._pcap = Pcap(self._pcap_path)
        self.backend = backend = self.open()
        self._vnet = backend is not None and backend.vnet_header
        if not any(self.mac):
            self.mac = default_mac(board, f"tap {backend.name}" if isinstance(backend, tap.Tap) else self._place)
        self._write_config()
        self._watch()

    def open(self) -> NetBackend | None:
        """What the device is plugged into, opened once, by `attach`; a subclass may bring another one."""
        return self._plug()

    # The driver.

    def activate(self, features: int, queues: Sequence[VirtQueue]) -> None:
        self._accepted = features
        self._guest_gso = _gso_types(features, NET_F.GUEST_TSO4, NET_F.GUEST_TSO6, NET_F.GUEST_ECN)
        self._host_gso = _gso_types(features, NET_F.HOST_TSO4, NET_F.HOST_TSO6, NET_F.HOST_ECN)
        self._host(lambda backend: _take_offloads(backend, features), None)
        self._waiting = READ | WRITE  # there may be something in both queues
        self._twin = self._make_twin(queues)
        self._watch()

    def reset(self) -> None:
        self._accepted = 0
        self._guest_gso = self._host_gso = frozenset[int]()
        self._waiting = 0  # READ: there are buffers, but no frame; WRITE: there are frames, but no room
        self._kept: memoryview | None = None  # a frame for which there were not enough buffers
        self._lacking = False
        self._twin = None
        self._watch()

    def notify(self, index: int, queue: VirtQueue) -> None:
        self._waiting &= ~WAKES[index]
        try:
            (self._receive if index == RX else self._transmit)(queue)
        finally:
            self._watch()

    def state(self) -> dict[str, Any]:
        """What the guest knows of the device; frames under way are lost, as on any wire."""
        return super().state() | {"mac": self.mac.hex(":"), "link": self.link}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; a link that is not as it was then is told to the driver."""
        super().restore(state)
        self.mac = parse_mac(str(state.get("mac")))
        self._write_config()
        if state.get("link") != self.link:
            self.config_changed()

    def close(self) -> None:
        """Give back what the host lent."""
        self._unplug()
        if self._pcap is not None:
            self._pcap.close()
            self._pcap = None

    @property
    def link(self) -> bool:
        """Whether the cable is in, and there is somebody at the other end."""
        return self._cable and self.backend is not None

    def set_link(self, up: bool) -> None:
        """Put the cable in or pull it out (with `lock` held). Without it what the guest sends is lost; what the host
        sends waits, as far as the host keeps it."""
        if up != self._cable:
            self._cable = up
            self._write_config()
            self.config_changed()
            self._watch()

    # From the guest.

    def _transmit(self, queue: VirtQueue) -> None:
        limit = self._limits[TX]
        if self._twin is not None and self._cable and self._host(lambda backend: backend.flush(), False):
            outcome = self._twin.transmit(queue, queue.size)
            if outcome != self._twin.ODD:
                self._waiting |= WRITE if outcome == self._twin.BLOCKED else 0
                queue.more = outcome == self._twin.MORE
                return
        for _ in range(BATCH):
            if not self._host(lambda backend: backend.flush(), True):
                self._waiting |= WRITE
                return
            chain = None if limit.waiting else queue.pop()
            if chain is None:
                return  # until the driver kicks, or the limit's timer
            frame, cost = self._outgoing(chain), chain.size - VNET_HEADER
            if frame is None:
                self.tx_dropped += 1
                cost = 0  # a host that did look at it, but took no bytes
            elif not self._send(frame):
                queue.undo_pop()
                self._waiting |= WRITE
                return
            queue.push(chain)
            limit.spend(cost)
        queue.more = True

    def _outgoing(self, chain: Chain) -> list[Frame] | None:
        """The frame in `chain` as the backend takes it; None when it cannot be one."""
        size = chain.size - VNET_HEADER
        if not ETH_HEADER <= size <= MAX_FRAME:
            return None
        frame: list[Frame] = [*pieces(chain.readable, VNET_HEADER, size)]
        if not self._vnet:
            return frame  # without offloads there is nothing in the header
        header = Header.read(chain.read(VNET_HEADER))
        header.flags &= HDR_F.NEEDS_CSUM if self._accepted & NET_F.CSUM else 0  # 5.1.6.2.2: ignore the others
        if header.flags and header.csum_start + header.csum_offset + CHECKSUM > size:
            return None
        if header.gso_type != GSO_NONE:
            known = header.gso_type in self._host_gso and header.flags
            if not known or not header.gso_size or header.hdr_len > size:
                return None
        header.num_buffers = 0
        return [bytes(header), *frame]

    def _send(self, frame: list[Frame]) -> bool:
        if not self._host(lambda backend: backend.send(frame), True):
            return False
        self._record(frame[1:] if self._vnet else frame)
        return True

    # To the guest.

    def _receive(self, queue: VirtQueue) -> None:
        limit = self._limits[RX]
        if self._twin is not None and self._cable and self._kept is None:
            outcome = self._twin.receive(queue, queue.size)
            self._kept = self._twin.kept
            if outcome != self._twin.ODD:
                self._waiting |= READ if outcome == self._twin.BLOCKED else 0
                queue.more = outcome == self._twin.MORE
                return
        for _ in range(BATCH):
            chain = None if limit.waiting else queue.pop()
            if chain is None:
                return  # until the driver kicks, or the limit's timer
            if chain.capacity < VNET_HEADER:
                queue.push(chain)  # of no use to any frame
                continue
            raw = self._kept or self._host(lambda backend: backend.receive(), None)
            self._kept = None
            if raw is None:
                queue.undo_pop()
                self._waiting |= READ
                return
            packet = self._incoming(memoryview(raw))
            if packet is None:
                queue.undo_pop()
                self.rx_dropped += 1
                continue
            header, frame = packet
            chains = self._gather(queue, chain, VNET_HEADER + len(frame))
            if chains:
                _fill(chains, header, frame)
                queue.push(*chains)
                self._record([frame])
                limit.spend(len(frame))
            elif self._lacking:
                self._kept = memoryview(bytes(raw))
                return  # until the driver kicks
            else:
                self.rx_dropped += 1
                break  # looking through a whole ring is enough for one turn
        queue.more = True

    def _incoming(self, raw: memoryview) -> tuple[Header, memoryview] | None:
        """The frame that the backend gave, with the header that the guest will see; None when it may not have it."""
        if self._vnet:
            if len(raw) < VNET_HEADER:
                return None
            header, frame = Header.read(raw), raw[VNET_HEADER:]
            if not self._accepted & NET_F.GUEST_CSUM:  # 5.1.6.4.1
                if header.flags & HDR_F.NEEDS_CSUM:  # from a time when another driver took such frames
                    return None
                header.flags = 0
            if header.gso_type not in (GSO_NONE, *self._guest_gso):
                return None
        else:
            header, frame = Header(0, GSO_NONE, 0, 0, 0, 0, 0), raw
        return (header, frame) if ETH_HEADER <= len(frame) <= self._longest(header.gso_type) else None

    def _longest(self, gso_type: int) -> int:
        """Bytes of the longest frame that the guest takes."""
        if self._accepted & NET_F.MTU and gso_type == GSO_NONE:
            return self._mtu + ETH_HEADER + VLAN_TAG  # 5.1.4.1
        return MAX_FRAME + VLAN_TAG

    def _gather(self, queue: VirtQueue, first: Chain, size: int) -> list[Chain]:
        """Chains with room for `size` bytes, `first` among them; else none, with all of them back in the ring, and
        `_lacking` says whether the driver can still give more."""
        chains, room = [first], first.capacity
        mergeable = self._accepted & NET_F.MRG_RXBUF
        while room < size:
            chain = queue.pop() if mergeable and len(chains) < queue.size else None
            if chain is None:
                for _ in chains:
                    queue.undo_pop()
                self._lacking = bool(mergeable) and len(chains) < queue.size
                return []
            chains.append(chain)
            room += chain.capacity
        return chains

    # The host.

    def _host(self, ask: Callable[[NetBackend], T], gone: T) -> T:
        """What the backend answers; `gone` when there is none, or none any more, or no cable to it."""
        if self.backend is None or not self._cable:
            return gone
        try:
            return ask(self.backend)
        except HostError as error:
            self.board.log("a network link is down", mac=self.mac.hex(":"), why=str(error))
            self._unplug()
            self._write_config()
            self.config_changed()
            return gone

    def _ready(self) -> None:
        """The host has a frame or has room, whichever is waited for; or it has hung up. On the event loop."""
        if not self._events:  # or an event of the same turn as the one after which nothing was waited for
            self._host(_drain_ended, None)
        for index, event in WAKES.items():
            if self._waiting & event:
                self._waiting &= ~event
                self.serve(index)
        self._watch()

    def _watch(self) -> None:
        """Watch the backend for what is waited for, and always for its end; not at all without a cable to it."""
        events = self._waiting if self._cable else -1
        if self.backend is None or self._events == events:
            return
        descriptor = self.backend.fileno()
        if self._events >= 0:
            self.loop.remove(descriptor)
        self._events = events
        if events >= 0:
            self.loop.add(descriptor, self._ready, events=events, owner=self)

    def _make_twin(self, queues: Sequence[VirtQueue]) -> FrameTwin | None:
        """What carries frames in C: between a socket or tap and a driver, where nobody counts or records them."""
        limited = any(limit.limited for limit in self._limits.values())
        if PURE or limited or self._pcap is not None or not all(queue.ready for queue in queues):
            return None
        from . import twin

        backend, mergeable = self.backend, bool(self._accepted & NET_F.MRG_RXBUF)
        if not all(map(twin.usable, queues)):
            return None
        if isinstance(backend, netsocket.FrameStream) and _is_plain(backend, netsocket.FrameStream):
            return twin.WireTwin(queues, backend, longest=self._longest(GSO_NONE), mergeable=mergeable)
        if isinstance(backend, tap.Tap) and _is_plain(backend, tap.Tap):
            return twin.TapTwin(
                queues,
                backend,
                longest=(self._longest(GSO_NONE), self._longest(GSO_TCPV4)),
                mergeable=mergeable,
                checksums=(bool(self._accepted & NET_F.CSUM), bool(self._accepted & NET_F.GUEST_CSUM)),
                gso=(self._host_gso, self._guest_gso),
            )
        return None

    def _unplug(self) -> None:
        self._twin = None
        if self.backend is not None:
            if self._events >= 0:
                self.loop.remove(self.backend.fileno())
                self._events = -1
            self.backend.close()
            self.backend = None

    def _record(self, frame: Sequence[Frame]) -> None:
        if self._pcap is not None:
            try:
                self._pcap.record(frame)
            except HostError as error:
                self.board.log("a network capture has ended", mac=self.mac.hex(":"), why=error.what)
                self._pcap = None

    def _write_config(self) -> None:
        status = NET_S.LINK_UP if self.link else 0
        self.config = bytes(Config(self.mac, status, 1, self._mtu))


def parse_mac(text: str) -> bytes:
    """The six bytes of a MAC address that an interface can have; raises ConfigError."""
    if not MAC.fullmatch(text):
        raise ConfigError(f'"{text}" is no MAC address', "use one such as 02:00:00:00:00:01")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & MULTICAST:
        raise ConfigError(f"{text} is a multicast address", "use an even first byte, such as 02:00:00:00:00:01")
    if not any(mac):
        raise ConfigError(f"{text} is no address of an interface", "use one such as 02:00:00:00:00:01")
    return mac


def _limit_options(way: str, bandwidth: str | None, ops: int | None, burst: float) -> dict[str, Any]:
    """The options of a RateLimit in one direction; raises ConfigError."""
    if ops is not None and ops < 1:
        raise ConfigError(f"invalid {way}_ops {ops}", "give frames per second, 1 or more")
    return {"bandwidth": None if bandwidth is None else parse_bandwidth(bandwidth), "iops": ops, "burst": burst}


def default_mac(board: Board, place: str) -> bytes:
    """A locally administered address that depends on the place in the host's network and on the NICs before it."""
    taken = _macs.setdefault(board, set())
    for number in range(1, len(taken) + 2):
        mac = bytes([LOCAL]) + hashlib.sha256(f"{place} {number}".encode()).digest()[:5]
        if mac not in taken:
            break
    taken.add(mac)
    return mac


def _claim(board: Board, mac: bytes) -> None:
    """Raises ConfigError when another NIC of the board has this address."""
    taken = _macs.setdefault(board, set())
    if mac in taken:
        raise ConfigError(f"two network devices have mac={mac.hex(':')}", "give each its own")
    taken.add(mac)


_macs: WeakKeyDictionary[Board, set[bytes]] = WeakKeyDictionary()  # of the NICs of each board


def _opener(
    backend: str, name: str | None, path: Path | None, publish: str | None, mtu: int | None
) -> Callable[[], NetBackend | None]:
    """What makes the backend; raises ConfigError for options that do not go together."""
    for option, value, owner in (("name", name, "tap"), ("path", path, "socket"), ("publish", publish, "user")):
        if value is not None and backend != owner:
            raise ConfigError(f'{option}={value} means nothing to the network "{backend}"', f"it is for {owner}")
    if backend == "user":
        return partial(Passt, parse_forwards(publish) if publish is not None else (), mtu)
    if backend == "tap":
        if name is not None:
            tap.check_name(name)
        return partial(tap.Tap, name)
    if backend == "socket":
        if path is None:
            raise ConfigError('the network "socket" needs a path', "name the UNIX socket to connect to")
        return partial(netsocket.connect, path)
    if backend == "none":
        return lambda: None
    raise ConfigError(f'unknown network "{backend}"', "use user, tap, socket or none")


def _gso_types(features: int, tso4: int, tso6: int, ecn: int) -> frozenset[int]:
    """The values of gso_type that `features` allow, besides GSO_NONE."""
    types = {kind for kind, feature in ((GSO_TCPV4, tso4), (GSO_TCPV6, tso6)) if features & feature}
    return frozenset(types | {kind | GSO_ECN for kind in types if features & ecn})


def _is_plain(backend: NetBackend, kind: type[NetBackend]) -> bool:
    """Whether frames go the way of `kind`, not that of a class which was made from it."""
    return (type(backend).send, type(backend).receive) == (kind.send, kind.receive)


def _take_offloads(backend: NetBackend, features: int) -> None:
    if isinstance(backend, tap.Tap):
        backend.set_offloads(sum(flag for feature, flag in TUN_F.items() if features & feature))


def _drain_ended(backend: NetBackend) -> None:
    """If the other end has hung up, read what nobody will take, until the backend says so with an error."""
    poll = select.poll()
    poll.register(backend, 0)
    for _ in range(BATCH if poll.poll(0) else 0):
        backend.receive()


def _fill(chains: list[Chain], header: Header, frame: memoryview) -> None:
    """A header and a frame into chains with room for them: all but the last get full (5.1.6.4.1)."""
    header.num_buffers = len(chains)
    chains[0].write(bytes(header))
    for chain in chains:
        frame = frame[chain.write(frame) :]
