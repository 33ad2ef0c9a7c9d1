"""Console device: a terminal for the guest, and more streams of bytes, which have names (VIRTIO 1.2, 5.3).

Linux: VIRTIO_CONSOLE. Port 0 is /dev/hvc0; the others are /dev/vport0p1 and so on, with their name in
/sys/class/virtio-ports.

    device = VirtioConsole(ports=2)
    agent = device.add_port("org.example.agent", on_data=print)
    vm.add(device)
    ...
    with device.lock:
        agent.write(b"hello")

Nothing is lost in either direction: what a port's owner does not take stays in the guest's queue, what the guest does
not take waits with the host, as does what comes for a port that no program in the guest has open. A hostile guest may
write without end (one turn passes on BUDGET bytes of a port), name ports that are not there, send control messages
that are cut, unknown or without end (answers are kept once for each port and event), or leave no buffers (a port then
holds INPUT_LIMIT bytes).
Older kernels (Linux before commit 5326ab737a47 of 2025) take the columns of a RESIZE message for the rows; a device of
one port sends none.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from ..core.errors import ConfigError
from ..core.regs import Bits, bit
from .device import VirtioDevice
from .queue import VirtQueue
from .spec import Type

QUEUE_SIZE = 64
MAX_PORTS = 31  # our own limit: each port has two queues
BUDGET = 1 << 18  # bytes from one port in one turn of the event loop
PIECE = 1 << 14  # bytes that on_data gets at a time
INPUT_LIMIT = 4096  # bytes that wait for the guest to give buffers
RECEIVE, TRANSMIT, CONTROL_RECEIVE, CONTROL_TRANSMIT = range(4)  # 5.3.2; the queues of port 1 follow
CONFIG = struct.Struct("<HHI")  # 5.3.4: cols, rows, max_nr_ports
CONTROL = struct.Struct("<IHH")  # 5.3.6.2: id, event, value
SIZE = struct.Struct("<HH")  # 5.3.6.2: cols, rows

EVENTS = range(8)  # 5.3.6.2
DEVICE_READY, DEVICE_ADD, DEVICE_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = EVENTS

OnData = Callable[[bytes], object]


class CONSOLE_F(Bits):
    """Feature bits (5.3.3)."""

    SIZE = bit(0)
    MULTIPORT = bit(1)


class Port:
    """One stream of bytes in each direction. All methods are called with the device's lock held.

    on_data  takes what the guest has written; it must not block and must not call the device. When it returns False,
             that was the last that fits for now, until its owner calls `drained`
    on_room  is told when `write`, having refused something, would take bytes again, and when `listening` becomes
             true; the same rules
    """

    def __init__(self, device: VirtioConsole, number: int, name: str, on_data: OnData | None = None) -> None:
        self.number = number
        self.name = name
        self.on_data = on_data
        self.on_room: Callable[[], None] | None = None
        self.receive_queue = RECEIVE if number == 0 else 2 * number + 2
        self.transmit_queue = self.receive_queue + 1
        self._device = device
        self._full = False
        self.reset()

    def reset(self) -> None:
        """As before the driver knew it."""
        self.ready = False  # the driver knows the port
        self.listening = False  # a driver or program in the guest has the port open
        self._input = bytearray()
        self._short = False  # `write` has refused something
        self._passed_on = 0  # bytes of the chain that is next in the transmit queue

    def write(self, data: bytes) -> int:
        """Send `data` to the guest; how many bytes were taken. `on_room` tells when the rest would be."""
        taken = min(len(data), INPUT_LIMIT - len(self._input))
        self._short = taken < len(data)
        if taken:
            self._input += data[:taken]
            self._device.serve_soon(self.receive_queue)
        return taken

    def drained(self) -> None:
        """The owner has room again."""
        if self._full:
            self._full = False
            self._device.serve_soon(self.transmit_queue)

    # For the device.

    def listen(self, listening: bool) -> None:
        news = listening and not self.listening
        self.listening = listening
        if news:
            self._device.serve_soon(self.receive_queue)
            if self.on_room is not None:
                self.on_room()

    def fill(self, queue: VirtQueue) -> None:
        """Input into the guest's buffers, if somebody is there to read it: Linux throws away what a port gets that no
        program has open."""
        if self.number and not self.listening:
            return
        for _ in range(queue.size):
            chain = queue.pop() if self._input else None
            if chain is None:
                break
            count = chain.write(bytes(self._input))
            del self._input[:count]
            queue.push(chain)
        else:
            queue.more = bool(self._input)
        if self._short and len(self._input) < INPUT_LIMIT:
            self._short = False
            if self.on_room is not None:
                self.on_room()

    def empty(self, queue: VirtQueue) -> None:
        """What the guest has written to the port's owner, a chain that is passed on in part staying in the queue."""
        if self._full:
            return
        budget = BUDGET
        for chain in queue.available():
            if not self.listening:
                self._device.heard(self)
            size = chain.size
            while self._passed_on < size and not self._full and budget > 0:
                data = chain.read(PIECE, self._passed_on)
                self._passed_on += len(data)
                budget -= len(data)
                self._full = self.on_data is not None and self.on_data(data) is False
            if self._passed_on < size:
                queue.undo_pop()
            else:
                self._passed_on = 0
                queue.push(chain)
            if self._full or budget <= 0:
                queue.more = not self._full  # the others on the loop first
                return

    def state(self) -> dict[str, Any]:
        return {
            "ready": self.ready,
            "listening": self.listening,
            "input": list(self._input),
            "passed_on": self._passed_on,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError when it is no port's state."""
        self.reset()
        self.ready, self.listening = bool(state["ready"]), bool(state["listening"])
        self._input += bytes(list(state["input"])[:INPUT_LIMIT])
        self._passed_on = max(0, int(state["passed_on"]))


class VirtioConsole(VirtioDevice):
    """A console, port 0, and room for `ports` - 1 named ports.

    For a Console it is a UART: `listening`, `receive`, `send_break` and `drained` are those of port 0, whose on_data
    and on_room its owner sets.
    """

    type_id = Type.CONSOLE
    modules = ("virtio_console",)
    has_console: ClassVar[bool] = True  # the driver is told of port 0
    config: bytearray

    def __init__(self, *, ports: int = 1) -> None:
        if not 1 <= ports <= MAX_PORTS:
            raise ConfigError(f"invalid number of console ports {ports}", f"use a number from 1 to {MAX_PORTS}")
        self.max_ports = ports
        self.ports = [Port(self, 0, "")]
        self.features = CONSOLE_F.SIZE | CONSOLE_F.MULTIPORT * (ports > 1)
        self.queue_sizes = (QUEUE_SIZE,) * (2 if ports == 1 else 2 * ports + 2)
        self.config = bytearray(CONFIG.pack(0, 0, ports))
        self._multiport = False  # the driver uses control messages
        self._ready = False  # and wants to hear of ports
        self._messages: dict[tuple[int, int], None] = {}  # port and event of what the driver has to hear, in order

    # The host's side.

    def add_port(self, name: str, on_data: OnData | None = None) -> Port:
        """A new port, with the machine running or not; raises ConfigError when there is none left."""
        if len(self.ports) == self.max_ports:
            raise ConfigError(f'no console port for "{name}"', f"give the device ports={self.max_ports + 1}")
        if not name or name in [port.name for port in self.ports]:
            raise ConfigError(f'invalid name of a console port "{name}"', "use one that no other port has")
        port = Port(self, len(self.ports), name, on_data)
        self.ports.append(port)
        if self._ready:
            self._tell(port, DEVICE_ADD)
        return port

    def resize(self, cols: int, rows: int) -> None:
        """The size of the terminal behind port 0 in characters; raises ValueError for what no terminal has."""
        if not (0 <= cols <= 0xFFFF and 0 <= rows <= 0xFFFF):
            raise ValueError(f"a terminal of {cols} x {rows}")
        CONFIG.pack_into(self.config, 0, cols, rows, self.max_ports)
        self.config_changed()
        if self.ports[0].ready:
            self._tell(self.ports[0], RESIZE)

    @property
    def listening(self) -> bool:
        return self.ports[0].listening

    def receive(self, data: bytes) -> int:
        return self.ports[0].write(data)

    def send_break(self) -> None:
        """Nothing: a virtio console knows no break."""

    def drained(self) -> None:
        self.ports[0].drained()

    # The guest's side.

    def activate(self, features: int, queues: Sequence[VirtQueue]) -> None:
        self._multiport = bool(features & CONSOLE_F.MULTIPORT)

    def notify(self, index: int, queue: VirtQueue) -> None:
        if index in (CONTROL_RECEIVE, CONTROL_TRANSMIT):
            if self._multiport:
                (self._send if index == CONTROL_RECEIVE else self._obey)(queue)
            return
        port = self._port(0 if index <= TRANSMIT else index // 2 - 1)
        if port is not None and (self._multiport or port.number == 0):
            (port.fill if index == port.receive_queue else port.empty)(queue)

    def heard(self, port: Port) -> None:
        """The guest has written to a port that it has not said to be open: a console alone says nothing else. Linux
        throws away what comes before its console is set up."""
        if not self._multiport:
            port.listen(True)

    def reset(self) -> None:
        self._multiport = self._ready = False
        self._messages.clear()
        for port in self.ports:
            port.reset()

    # State.

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "size": list(CONFIG.unpack(self.config)[:2]),
            "ready": self._ready,
            "messages": [list(message) for message in self._messages],
            "ports": [port.state() for port in self.ports],
        }

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        try:
            cols, rows = state["size"]
            self.config[:] = CONFIG.pack(cols, rows, self.max_ports)
            self._ready = bool(state["ready"])
            for number, event in state["messages"]:
                self._messages[self.ports[number].number, EVENTS[event]] = None
            for port, saved in zip(self.ports, state["ports"], strict=True):
                port.restore(saved)
        except (KeyError, IndexError, TypeError, ValueError, struct.error) as error:
            raise ValueError(f"VirtioConsole: state has no usable {error}") from None

    # Inside: control messages (5.3.6.2).

    def _port(self, number: int) -> Port | None:
        return self.ports[number] if number < len(self.ports) else None

    def serve_soon(self, index: int) -> None:
        """Look at queue `index` on the event loop, whose thread this need not be; all are looked at when they start."""
        if self.queues:
            self.board.loop.call_soon(lambda: self.serve(index), owner=self)

    def _tell(self, port: Port, *events: int) -> None:
        for event in events:
            self._messages[port.number, event] = None
        self.serve_soon(CONTROL_RECEIVE)

    def _send(self, queue: VirtQueue) -> None:
        while self._messages:
            chain = queue.pop()
            if chain is None:
                return
            number, event = message = next(iter(self._messages))
            del self._messages[message]
            data = CONTROL.pack(number, event, 1)  # a port is there, is a console, is open: 1 to all of them
            if event == PORT_NAME:
                data += self.ports[number].name.encode()
            elif event == RESIZE:
                data += SIZE.pack(*CONFIG.unpack(self.config)[:2])
            chain.write(data)
            queue.push(chain)

    def _obey(self, queue: VirtQueue) -> None:
        for chain in queue.available():
            message = chain.read(CONTROL.size)
            queue.push(chain)
            if len(message) == CONTROL.size:
                self._handle(*CONTROL.unpack(message))

    def _handle(self, number: int, event: int, value: int) -> None:
        if event == DEVICE_READY:
            self._ready = bool(value)
            for port in self.ports if value else ():
                if port.number or self.has_console:
                    self._tell(port, DEVICE_ADD)
            return
        found = self._port(number)
        if found is None:
            return
        if event == PORT_OPEN:
            found.listen(bool(value))
        elif event == PORT_READY:
            found.ready = bool(value)
            if value:
                self._tell(found, *((CONSOLE_PORT, RESIZE) if number == 0 else (PORT_NAME,)), PORT_OPEN)
