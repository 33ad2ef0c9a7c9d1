"""The console device (VIRTIO 1.2, 5.3)."""

from __future__ import annotations

import pytest
from consoles import RX, RX1, TX, TX1, Owner, hear, say

from kvmpy.console import LINGER, Console
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
from kvmpy.virtio.spec import F


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


@pytest.mark.parametrize("ports", [0, -1, 32])
def test_number_of_ports_that_cannot_be(ports: int) -> None:
    with pytest.raises(ConfigError, match=f"console ports {ports}; use"):
        VirtioConsole(ports=ports)


# The guest writes.


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


def test_input_waits_for_buffers(device: VirtioConsole, driver: RingDriver) -> None:
    device.receive(b"hel")
    device.receive(b"lo")
    driver.board.steps.turn()

    assert driver.request(RX, writable=[16]) == b"hello"


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


@pytest.mark.parametrize(("cols", "rows"), [(-1, 1), (1, 0x10000)])
def test_size_that_cannot_be(device: VirtioConsole, cols: int, rows: int) -> None:
    with pytest.raises(ValueError, match="terminal"):
        device.resize(cols, rows)


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
    say(multi, 1, PORT_OPEN, 1)
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


# What a hostile guest may try (HOSTILE.md, 60).


def test_largest_number_of_ports(board: FakeBoard) -> None:
    device = VirtioConsole(ports=console.MAX_PORTS)
    last = [device.add_port(f"port {n}") for n in range(1, console.MAX_PORTS)][-1]
    device.attach(board)
    driver = RingDriver(board)
    driver.start(F.VERSION_1 | CONSOLE_F.MULTIPORT, [4] * len(device.queue_sizes))

    say(driver, last.number, PORT_OPEN, 1)
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
