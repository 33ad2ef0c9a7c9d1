"""The console device (VIRTIO 1.2, 5.3)."""

from __future__ import annotations

import struct

import pytest
from consoles import CONTROL_RX, CONTROL_TX, RX, RX1, TX, TX1, Owner, hear, say

from kvmpy.console import LINGER, OUTPUT_LIMIT, Console
from kvmpy.core.errors import ConfigError
from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio import console
from kvmpy.virtio.console import (
    CONSOLE_F,
    CONSOLE_PORT,
    DEVICE_ADD,
    DEVICE_READY,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
    RESIZE,
    VirtioConsole,
)
from kvmpy.virtio.spec import INTERRUPT, F


@pytest.fixture
def board(transport: str) -> FakeBoard:
    return FakeBoard(4 << 20, transport)


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def device(board: FakeBoard, owner: Owner) -> VirtioConsole:
    """One port, which belongs to `owner`."""
    device = VirtioConsole()
    device.ports[0].on_data, device.ports[0].on_room = owner.take, owner.on_room
    device.attach(board)
    return device


@pytest.fixture
def driver(board: FakeBoard, device: VirtioConsole) -> RingDriver:
    driver = RingDriver(board)
    driver.start(F.VERSION_1 | CONSOLE_F.SIZE)
    return driver


@pytest.fixture
def many(board: FakeBoard, owner: Owner) -> VirtioConsole:
    """Three ports: the console, one named "agent" that belongs to `owner`, and one left."""
    device = VirtioConsole(ports=3)
    device.add_port("agent", owner.take).on_room = owner.on_room
    device.attach(board)
    return device


@pytest.fixture
def multi(board: FakeBoard, many: VirtioConsole) -> RingDriver:
    driver = RingDriver(board)
    driver.start(F.VERSION_1 | CONSOLE_F.SIZE | CONSOLE_F.MULTIPORT)
    return driver


def test_one_port_has_two_queues(device: VirtioConsole, driver: RingDriver) -> None:
    assert device.features == CONSOLE_F.SIZE
    assert len(driver.queues) == 2


@pytest.mark.parametrize("ports", [0, -1, 32])
def test_number_of_ports_that_cannot_be(ports: int) -> None:
    with pytest.raises(ConfigError, match=f"console ports {ports}; use"):
        VirtioConsole(ports=ports)


# The guest writes.


def test_output(driver: RingDriver, owner: Owner) -> None:
    """All of the chain, however it is cut, and no byte written into it (HOSTILE.md, 56)."""
    assert driver.request(TX, [b"a", b"", b"bc", b"def\n"]) == b""
    assert owner.data == b"abcdef\n"


def test_output_of_writable_buffers_is_nothing(driver: RingDriver, owner: Owner) -> None:
    assert driver.request(TX, writable=[16]) == b""
    assert (owner.data, driver.needs_reset) == (b"", False)


def test_output_nobody_wants(device: VirtioConsole, driver: RingDriver) -> None:
    device.ports[0].on_data = None

    assert driver.request(TX, [b"abc"]) == b""


def test_owner_without_room_leaves_chains_in_the_queue(device: VirtioConsole, driver: RingDriver, owner: Owner) -> None:
    owner.room = 2
    heads = [driver.submit(TX, [text]) for text in (b"one ", b"two ", b"three ", b"four")]

    driver.kick(TX)
    driver.kick(TX)
    taken, given_back = owner.data, driver.used(TX)
    owner.room = 10
    device.drained()
    driver.board.steps.turn()

    assert (taken, given_back) == (b"one two ", [(heads[0], 0), (heads[1], 0)])
    assert (owner.data, driver.used(TX)) == (b"one two three four", [(heads[2], 0), (heads[3], 0)])


def test_long_chain_is_passed_on_in_pieces(device: VirtioConsole, driver: RingDriver, owner: Owner) -> None:
    text = bytes(range(256)) * (3 * console.PIECE // 256)
    owner.room = 1
    head = driver.submit(TX, [text[:100], text[100:], b"!"])

    driver.kick(TX)
    first, given_back = len(owner.data), driver.used(TX)
    owner.room = 10
    device.drained()
    driver.board.steps.turn()

    assert (first, given_back) == (console.PIECE, [])
    assert (owner.data, driver.used(TX)) == (text + b"!", [(head, 0)])


def test_one_turn_is_bounded(driver: RingDriver, owner: Owner) -> None:
    """A chain that names the same memory again and again, longer than a turn's work."""
    table = driver.queues[TX].desc
    for n in range(3):
        driver.descriptor(table, n, 0, 1 << 17, 1 if n < 2 else 0, n + 1)
    driver.publish(TX, 0)

    driver.kick(TX)
    first, given_back = len(owner.data), driver.used(TX)
    driver.board.steps.turn()

    assert (first, given_back) == (console.BUDGET, [])
    assert (len(owner.data), driver.used(TX)) == (3 << 17, [(0, 0)])


def test_chain_that_shrinks_meanwhile(device: VirtioConsole, driver: RingDriver, owner: Owner) -> None:
    owner.room = 1
    head = driver.submit(TX, [bytes(2 * console.PIECE)])
    driver.kick(TX)
    driver.descriptor(driver.queues[TX].desc, head, 0, 5, 0, 0)

    owner.room = 9
    device.drained()
    driver.board.steps.turn()

    assert (len(owner.data), driver.used(TX)) == (console.PIECE, [(head, 0)])
    assert driver.request(TX, [b"next"]) == b""
    assert owner.data.endswith(b"next")


# The guest reads.


def test_input(device: VirtioConsole, driver: RingDriver) -> None:
    heads = [driver.submit(RX, writable=sizes) for sizes in ([2, 1], [8], [8])]
    driver.kick(RX)

    taken = device.receive(b"hello")
    driver.board.steps.turn()

    assert taken == 5
    assert driver.used(RX) == [(heads[0], 3), (heads[1], 2)]
    assert driver.data(RX, heads[0]) + driver.data(RX, heads[1])[:2] == b"hello"


def test_input_waits_for_buffers(device: VirtioConsole, driver: RingDriver) -> None:
    device.receive(b"hel")
    device.receive(b"lo")
    driver.board.steps.turn()

    assert driver.request(RX, writable=[16]) == b"hello"


def test_input_nobody_reads_is_bounded(device: VirtioConsole, driver: RingDriver, owner: Owner) -> None:
    """What the port does not take stays with the host, which is told when it can go on (HOSTILE.md, 57)."""
    owner.rooms = 0
    taken = [device.receive(bytes(3000)) for _ in range(3)]
    driver.board.steps.turn()
    told = owner.rooms

    answer = driver.request(RX, writable=[1000])

    assert (taken, told) == ([3000, console.INPUT_LIMIT - 3000, 0], 0)
    assert (len(answer), owner.rooms) == (1000, 1)
    assert device.receive(bytes(3000)) == 1000


@pytest.mark.parametrize("sizes", [[0], []])
def test_buffers_with_no_room(device: VirtioConsole, driver: RingDriver, sizes: list[int]) -> None:
    device.receive(b"x")
    for _ in range(30):
        driver.submit(RX, readable=[b"text"], writable=sizes)

    driver.kick(RX)

    assert [count for _, count in driver.used(RX)] == [0] * 30
    assert driver.request(RX, writable=[1]) == b"x"


def test_listening_from_the_first_output_on(device: VirtioConsole, board: FakeBoard, owner: Owner) -> None:
    driver = RingDriver(board)
    driver.start()
    before = device.listening
    driver.request(TX, [b"# "])
    up, told = device.listening, owner.rooms
    driver.set("Status", 0)

    assert (before, up, told, device.listening) == (False, True, 1, False)


def test_reset_forgets_input_and_half_a_chain(device: VirtioConsole, driver: RingDriver, owner: Owner) -> None:
    owner.room = 1
    driver.submit(TX, [bytes(2 * console.PIECE)])
    driver.kick(TX)
    device.receive(b"old")

    driver.start()
    owner.data, owner.room = b"", 5
    device.drained()
    driver.request(TX, [b"new"])
    device.receive(b"input")
    driver.board.steps.turn()

    assert owner.data == b"new"
    assert driver.request(RX, writable=[16]) == b"input"


# The size of the terminal.


def test_resize(device: VirtioConsole, driver: RingDriver) -> None:
    device.resize(132, 43)

    assert (driver.config(0, 2), driver.config(2, 2), driver.config(4, 4)) == (132, 43, 1)
    assert driver.interrupts() == INTERRUPT.CONFIGURATION


@pytest.mark.parametrize(("cols", "rows"), [(-1, 1), (1, 0x10000)])
def test_size_that_cannot_be(device: VirtioConsole, cols: int, rows: int) -> None:
    with pytest.raises(ValueError, match="terminal"):
        device.resize(cols, rows)


def test_driver_changes_no_configuration(device: VirtioConsole, driver: RingDriver) -> None:
    for offset in range(0, 12, 4):
        driver.write_config(offset, 4, 0xFFFFFFFF)

    assert [driver.config(offset, 4) for offset in (0, 4, 8)] == [0, 1, 0]


# Many ports.


def test_ports_are_announced(multi: RingDriver) -> None:
    say(multi, 0, DEVICE_READY, 1)
    added = hear(multi)
    say(multi, 0, PORT_READY, 1)
    say(multi, 1, PORT_READY, 1)

    assert added == [(0, DEVICE_ADD, b""), (1, DEVICE_ADD, b"")]
    assert hear(multi) == [
        (0, CONSOLE_PORT, b""),
        (0, RESIZE, bytes(4)),
        (0, PORT_OPEN, b""),
        (1, PORT_NAME, b"agent"),
        (1, PORT_OPEN, b""),
    ]


def test_port_is_added_while_the_guest_runs(many: VirtioConsole, multi: RingDriver) -> None:
    say(multi, 0, DEVICE_READY, 1)
    hear(multi)

    port = many.add_port("second")

    assert port.number == 2
    assert hear(multi) == [(2, DEVICE_ADD, b"")]


@pytest.mark.parametrize("name", ["", "agent"])
def test_name_that_cannot_be(many: VirtioConsole, name: str) -> None:
    with pytest.raises(ConfigError, match="invalid name"):
        many.add_port(name)


def test_no_port_left(device: VirtioConsole) -> None:
    with pytest.raises(ConfigError, match=r'no console port for "agent"; give the device ports=2'):
        device.add_port("agent")


def test_bytes_of_a_named_port(many: VirtioConsole, multi: RingDriver, owner: Owner) -> None:
    multi.request(TX1, [b"from the agent"])
    taken = many.ports[1].write(b"to the agent")
    multi.board.steps.turn()

    assert taken == 12
    assert owner.data == b"from the agent"
    assert multi.request(RX1, writable=[64]) == b"to the agent"


def test_port_is_open_when_the_guest_says_so(many: VirtioConsole, multi: RingDriver, owner: Owner) -> None:
    before = many.ports[1].listening
    say(multi, 1, PORT_OPEN, 1)
    opened, told = many.ports[1].listening, owner.rooms
    say(multi, 1, PORT_OPEN, 0)

    assert (before, opened, told, many.ports[1].listening) == (False, True, 1, False)


def test_resize_message_has_the_newest_size(many: VirtioConsole, multi: RingDriver) -> None:
    say(multi, 0, PORT_READY, 1)
    hear(multi)

    many.resize(80, 25)
    many.resize(100, 30)

    assert hear(multi) == [(0, RESIZE, struct.pack("<HH", 100, 30))]


def test_driver_without_control_messages_has_port_0_only(board: FakeBoard, many: VirtioConsole, owner: Owner) -> None:
    driver = RingDriver(board)
    driver.start(F.VERSION_1)
    text = Owner()
    many.ports[0].on_data = text.take

    driver.request(TX, [b"console"])
    driver.submit(TX1, [b"agent"])
    driver.submit(CONTROL_TX, [struct.pack("<IHH", 0, DEVICE_READY, 1)])
    driver.kick(TX1)
    driver.kick(CONTROL_TX)

    assert (text.data, owner.data, many.listening) == (b"console", b"", True)
    assert (driver.used(TX1), driver.used(CONTROL_TX), hear(driver)) == ([], [], [])


# What a hostile guest may try (HOSTILE.md, 60).


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0",
        struct.pack("<IHH", 0, DEVICE_READY, 1)[:7],
        struct.pack("<IHH", 2, PORT_READY, 1),
        struct.pack("<IHH", 3, PORT_OPEN, 1),
        struct.pack("<IHH", 0xFFFFFFFF, PORT_READY, 1),
        struct.pack("<IHH", 0, 8, 1),
        struct.pack("<IHH", 0, 0xFFFF, 0xFFFF),
        struct.pack("<IHH", 0, RESIZE, 1),
        struct.pack("<IHH", 1, DEVICE_ADD, 1),
    ],
)
def test_messages_that_mean_nothing(multi: RingDriver, message: bytes) -> None:
    multi.request(CONTROL_TX, [message])

    assert hear(multi) == []
    assert not multi.needs_reset


def test_message_in_pieces_and_more(multi: RingDriver) -> None:
    message = struct.pack("<IHH", 0, DEVICE_READY, 1)

    multi.request(CONTROL_TX, [message[:1], message[1:5], message[5:] + bytes(4096)])

    assert [number for number, _, _ in hear(multi)] == [0, 1]


def test_messages_without_end(many: VirtioConsole, multi: RingDriver) -> None:
    """A driver that asks and never listens costs no more than one answer of each kind."""
    for _ in range(500):
        say(multi, 0, DEVICE_READY, 1)
        say(multi, 1, PORT_READY, 1)

    assert len(hear(multi)) == 4


def test_buffer_too_small_for_the_message(multi: RingDriver) -> None:
    say(multi, 1, PORT_READY, 1)

    assert multi.request(CONTROL_RX, writable=[3]) == b"\1\0\0"
    assert not multi.needs_reset


def test_queues_of_a_port_that_is_not_there(multi: RingDriver) -> None:
    multi.submit(7, [b"x"])

    multi.kick(7)
    multi.kick(6)

    assert (multi.used(7), multi.needs_reset) == ([], False)


def test_largest_number_of_ports(board: FakeBoard) -> None:
    device = VirtioConsole(ports=console.MAX_PORTS)
    last = [device.add_port(f"port {n}") for n in range(1, console.MAX_PORTS)][-1]
    device.attach(board)
    driver = RingDriver(board)
    driver.start(F.VERSION_1 | CONSOLE_F.MULTIPORT, [4] * len(device.queue_sizes))

    last.write(b"x")

    assert driver.request(last.receive_queue, writable=[4]) == b"x"
    assert last.transmit_queue == len(device.queue_sizes) - 1


# State.


def test_state_and_restore(many: VirtioConsole, multi: RingDriver, owner: Owner) -> None:
    owner.room = 1
    many.resize(80, 25)
    head = multi.submit(TX1, [bytes(console.PIECE) + b"rest"])
    multi.kick(TX1)
    say(multi, 1, PORT_READY, 1)
    say(multi, 1, PORT_OPEN, 1)
    many.ports[1].write(b"input")
    state = multi.transport.state()

    multi.set("Status", 0)
    many.resize(1, 1)
    many.ports[1].drained()
    owner.data, owner.room = b"", 5
    multi.transport.restore(state)
    multi.board.steps.turn()

    assert (owner.data, multi.used(TX1)) == (b"rest", [(head, 0)])
    assert (many.ports[1].listening, multi.config(0, 2)) == (True, 80)
    assert hear(multi) == [(1, PORT_NAME, b"agent"), (1, PORT_OPEN, b"")]
    assert multi.request(RX1, writable=[16]) == b"input"


@pytest.mark.parametrize(
    "change",
    [
        {"ports": []},
        {"ports": [{}, {}]},
        {"size": [1]},
        {"size": [1, 1 << 16]},
        {"messages": [[5, 1]]},
        {"messages": [[0, 8]]},
        {"version": 2},
    ],
)
def test_state_that_is_not_ours(many: VirtioConsole, change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="VirtioConsole"):
        many.restore(many.state() | change)


# As the machine's console.


def test_behind_a_console(board: FakeBoard, device: VirtioConsole, driver: RingDriver) -> None:
    machine_console = Console(board.loop)
    machine_console.patient = True
    machine_console.connect(device)
    device.ports[0].on_data, device.ports[0].on_room = machine_console.write, machine_console.room

    driver.request(TX, [b"login: "])
    machine_console.send("root\n")
    for _ in range(4):
        board.steps.turn()
    board.steps.advance(LINGER)

    assert machine_console.text == "login: "
    assert driver.request(RX, writable=[16]) == b"root\n"


class Slow:
    """An endpoint that never passes anything on."""

    def write(self, data: bytes) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None: ...


def test_host_that_is_slow(board: FakeBoard, device: VirtioConsole, driver: RingDriver) -> None:
    """The guest waits, and what it has written comes later (HOSTILE.md, 58)."""
    machine_console = Console(board.loop)
    machine_console.connect(device)
    machine_console.attach(Slow())
    device.ports[0].on_data, device.ports[0].on_room = machine_console.write, machine_console.room
    pieces = OUTPUT_LIMIT // console.PIECE
    for _ in range(pieces + 4):
        driver.submit(TX, [bytes(console.PIECE)])

    driver.kick(TX)
    for _ in range(3):
        board.steps.turn()
    waiting = len(driver.used(TX))
    machine_console.sent(OUTPUT_LIMIT)
    for _ in range(3):
        board.steps.turn()

    assert (waiting, len(driver.used(TX))) == (pieces, 4)
