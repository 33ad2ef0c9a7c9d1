"""Chains, any descriptors that can be, and state (more of rings: test_conformance_ring.py, test_hostile_ring.py)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe import ALL, Echo

from kvmpy.core.buffers import pieces
from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.queue import DESC_F, MAX_QUEUE_SIZE, Chain, VirtQueue
from kvmpy.virtio.spec import F


@pytest.fixture
def board(transport: str) -> FakeBoard:
    return FakeBoard(4 << 20, transport)


@pytest.fixture
def device(board: FakeBoard) -> Echo:
    device = Echo()
    device.attach(board)
    return device


@pytest.fixture
def driver(board: FakeBoard, device: Echo) -> RingDriver:
    driver = RingDriver(board)
    driver.start(ALL)
    return driver


def test_pieces_of_buffers() -> None:
    buffers = [memoryview(b"abc"), memoryview(b""), memoryview(b"defg")]

    assert [bytes(piece) for piece in pieces(buffers, 2, 3)] == [b"c", b"de"]
    assert pieces(buffers, 7, 3) == []


@pytest.mark.parametrize("size", [-2, 0, 3, 2 * MAX_QUEUE_SIZE])
def test_queue_of_a_device_that_cannot_be(board: FakeBoard, size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        VirtQueue(0, size, board.mem, lambda queue: None)


def test_the_longest_queue_of_a_device(board: FakeBoard) -> None:
    assert VirtQueue(0, MAX_QUEUE_SIZE, board.mem, lambda queue: None).max_size == MAX_QUEUE_SIZE


def test_chain_writes_in_order_and_counts() -> None:
    room = [memoryview(bytearray(2)), memoryview(bytearray(3))]
    chain = Chain(0, [], room)

    assert chain.write(b"abc") == 3
    assert chain.write(b"defg") == 2
    assert (b"".join(room), chain.written) == (b"abcde", 5)


def test_chain_with_a_gap_counts_what_is_whole() -> None:
    chain = Chain(0, [], [memoryview(bytearray(8))])

    chain.write(b"!", at=7)
    before = chain.written
    chain.write(b"abcdefg", at=0)

    assert (before, chain.written) == (0, 7)


def test_readable_descriptor_behind_a_writable_one(driver: RingDriver) -> None:
    """2.7.4.2 forbids it to the driver."""
    ring = driver.queues[0]
    driver.descriptor(ring.desc, 0, 0, 4, DESC_F.NEXT | DESC_F.WRITE, 1)
    driver.descriptor(ring.desc, 1, 0, 4, 0, 0)
    driver.publish(0, 0)

    driver.kick(0)

    assert (driver.needs_reset, driver.used(0)) == (True, [])


descriptor = st.tuples(
    st.sampled_from([0, 0x1000, 0x8000, (4 << 20) - 16, 4 << 20, 0xD000_0000, 1 << 63]) | st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 16, 48, 4096, 0xFFFFFFFF]) | st.integers(0, 2**32 - 1),
    st.integers(0, 7) | st.integers(0, 0xFFFF),
    st.integers(0, 9) | st.integers(0, 0xFFFF),
)


@settings(max_examples=300, deadline=None)
@given(
    table=st.lists(descriptor, min_size=8, max_size=8),
    inner=st.lists(descriptor, min_size=8, max_size=8),
    heads=st.lists(st.integers(0, 8), min_size=1, max_size=12),
    features=st.sampled_from([ALL, F.VERSION_1]),
)
def test_any_descriptors_are_survived(
    table: list[tuple[int, int, int, int]], inner: list[tuple[int, int, int, int]], heads: list[int], features: int
) -> None:
    """The device answers or needs a reset, after which it answers; it never raises."""
    board = FakeBoard(4 << 20)
    Echo().attach(board)
    driver = RingDriver(board, free=0x200000)
    driver.start(features)
    for n in range(8):
        driver.descriptor(driver.queues[0].desc, n, *table[n])
        driver.descriptor(0x1000, n, *inner[n])
    for head in heads:
        driver.publish(0, head)

    driver.kick(0)
    driver.start(features)

    assert driver.request(0, [b"hello"], [5]) == b"hello"


def test_state_and_restore(driver: RingDriver, device: Echo) -> None:
    driver.request(0, [b"before"], [6])
    device.busy = True
    head = driver.submit(0, [b"after"], [5])
    driver.kick(0)
    state = driver.transport.state()

    driver.set("Status", 0)
    driver.transport.restore(state)
    device.busy = False
    driver.kick(0)

    assert driver.used(0) == [(head, 5)]
    assert driver.data(0, head) == b"after"


@pytest.mark.parametrize(
    "change", [{"queues": []}, {"queues": [{}, {}]}, {"device": {"version": 99}}], ids=["none", "empty", "version"]
)
def test_state_that_is_not_ours(driver: RingDriver, change: dict[str, object]) -> None:
    state = driver.transport.state()
    state["core"] |= change

    with pytest.raises(ValueError):
        driver.transport.restore(state)
