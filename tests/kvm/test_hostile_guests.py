"""Hostile guests on /dev/kvm: each ends as a machine may end, and the host is afterwards as it was before.

Every run has a sample. All of them, each with the compiled twins and without, and every port:

    KVMPY_HOSTILE=1 python -m pytest tests/kvm/test_hostile_guests.py

KVMPY_HOSTILE=N has N times the seeds of those that are random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import malice_board
import malice_cpu
import malice_rows
import malice_virtio
import pytest
from arena import Arena, Outcome, start_peer
from malice import BUFFERS, SCALE, SERVED, Guest, engines
from malice_board import NEXT_PORT
from rig import GUESTS

from kvmpy.core.board import Reason, Stop
from kvmpy.jail.lock import landlock_abi, why_no_namespaces

FAMILIES = [
    malice_cpu.faults,
    malice_cpu.instructions,
    malice_cpu.registers,
    malice_board.windows,
    malice_board.strings,
    *([malice_board.registers] if SCALE else []),
    malice_board.junk,
    malice_board.interrupts,
    malice_virtio.random_chains,
    malice_virtio.races,
    malice_virtio.storms,
    malice_virtio.buses,
]
SAMPLE, FEW = (1, None) if SCALE else (6, 2)  # every so many guests of all families, so many of each row
SAMPLE_LOCKED_IN = 5  # of these, where all are wanted, every so many in a process of its own
ROWS = {guest.name: guest for guest in [*malice_rows.rows(), malice_rows.strings_to_uart()]}
ALL = {guest.name: guest for guest in chain.from_iterable(family() for family in FAMILIES)}
SWEEPS = {
    (verb, size, value): malice_board.sweep(verb, size, value)
    for verb, values in (("in", [0]), ("out", [0, 1, 0x34, 0xFF]), ("ins", [0]), ("outs", [0xFE]))
    for value in values
    for size in (1, 2, 4)
}


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """For all guests; tells with `pytest -s` how many there were, by how their machines ended."""
    folder = tmp_path_factory.mktemp("arena")
    peer = start_peer(folder / "peer")
    try:
        arena = Arena(folder, GUESTS, [*ALL.values(), *ROWS.values(), *SWEEPS.values()], folder / "peer")
        yield arena
        print(f"\n{arena.endings.total()} guests: {dict(arena.endings)}")
    finally:
        peer.kill()
        peer.communicate()


@pytest.fixture
def pure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiled twins, where that is asked for; and halts are noticed soon."""
    monkeypatch.setattr("kvmpy.machine.WATCH_SECONDS", 0.05)
    for module in ("vcpu", "machine", "virtio.blk", "virtio.net"):
        monkeypatch.setattr(f"kvmpy.{module}.PURE", getattr(request, "param", False))


def test_there_are_enough() -> None:
    """Different programs, by what they have in memory."""
    programs = {
        (guest.code, guest.mode, guest.second, guest.transport, *guest.memory.items()) for guest in ALL.values()
    }

    assert len(programs) == len(ALL)
    assert len(programs) >= 300


@pytest.mark.parametrize(("guest", "pure"), engines(ALL.values())[::SAMPLE], indirect=["pure"])
def test_guest(arena: Arena, guest: Guest, pure: None) -> None:
    arena.run(guest)


LOCKED_IN = ["race-blk-addresses-pci", "prints-without-end-3f8", "panic-text-29"]


@pytest.mark.parametrize("name", list(ALL)[::SAMPLE_LOCKED_IN] if SCALE else LOCKED_IN)
def test_guest_of_a_process_that_is_locked_in(arena: Arena, name: str) -> None:
    """Nothing that a guest can do makes a thread ask for what it may not: that would end the process."""
    guest = ALL[name]
    level = "default" if "fs" in guest.devices or why_no_namespaces() or not landlock_abi() else "strict"

    found = arena.run_locked_in(guest, level)

    assert guest.ends != SERVED or found["status"] == 0


# The list of other monitors' defects.

Play = Callable[..., list[Outcome]]


@pytest.fixture(params=[False, True] if SCALE else [False])
def play(arena: Arena, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Runs the guests whose names begin so."""
    monkeypatch.setattr("kvmpy.machine.WATCH_SECONDS", 0.05)
    for module in ("vcpu", "machine", "virtio.blk", "virtio.net"):
        monkeypatch.setattr(f"kvmpy.{module}.PURE", request.param)

    def run(*beginnings: str) -> list[Outcome]:
        found = [[g for name, g in (ROWS | ALL).items() if name.startswith(beginning)] for beginning in beginnings]
        assert all(found), f"no guest is called {beginnings}"
        return [arena.run(guest) for guests in found for guest in guests[:FEW]]

    return run


def test_hostile_01_index_beyond_the_queue(play: Play) -> None:
    play("row-01")


def test_hostile_02_descriptors_of_no_length(play: Play) -> None:
    play("row-02")


def test_hostile_03_chains_in_a_circle(play: Play) -> None:
    play("row-03")


def test_hostile_04_links_and_heads_that_are_none(play: Play) -> None:
    play("row-04")


def test_hostile_05_table_longer_than_the_queue(play: Play) -> None:
    play("row-05")


def test_hostile_06_addresses_that_wrap(play: Play) -> None:
    play("row-06")


def test_hostile_07_buffers_and_rings_that_leave_ram(play: Play) -> None:
    play("row-07")


def test_hostile_08_descriptor_of_4_gib(play: Play) -> None:
    play("row-08")


def test_hostile_09_chain_of_more_than_4_gib(play: Play) -> None:
    play("row-09")


def test_hostile_12_tables_of_odd_sizes(play: Play) -> None:
    play("row-12")


def test_hostile_13_tables_within_tables(play: Play) -> None:
    play("row-13")


def test_hostile_14_table_that_was_not_agreed_on(play: Play) -> None:
    play("row-14")


def test_hostile_15_table_that_says_writable(play: Play) -> None:
    play("row-15")


def test_hostile_16_queue_set_up_again_while_it_runs(play: Play) -> None:
    play("row-16")


def test_hostile_17_queue_sizes_that_are_none(play: Play) -> None:
    play("row-17")


def test_hostile_18_kicks_for_queues_that_are_none(play: Play) -> None:
    play("row-18")


def test_hostile_19_rings_that_overlap(play: Play) -> None:
    play("row-19")


def test_hostile_23_buffers_that_are_devices(play: Play) -> None:
    play("row-23")


def test_hostile_24_index_that_goes_back(play: Play) -> None:
    play("row-24")


def test_hostile_25_packed_rings(play: Play) -> None:
    play("row-25")


def test_hostile_27_header_of_many_pieces(play: Play) -> None:
    play("row-27")


def test_hostile_28_sectors_beyond_the_disk(play: Play) -> None:
    play("row-28")


def test_hostile_29_request_whose_sum_is_beyond_the_disk(play: Play) -> None:
    play("row-29")


def test_hostile_30_data_that_is_no_sector(play: Play) -> None:
    play("row-30")


def test_hostile_31_discards_of_what_is_not_there(play: Play) -> None:
    play("row-31")


def test_hostile_33_request_types_that_are_none(play: Play) -> None:
    play("row-33")


def test_hostile_34_serial_numbers_of_any_length(play: Play) -> None:
    play("row-34")


def test_hostile_35_requests_without_head_or_tail(play: Play) -> None:
    play("row-35")


def test_hostile_41_frames_too_large(play: Play) -> None:
    play("row-41")


def test_hostile_42_frames_too_small(play: Play) -> None:
    play("row-42")


def test_hostile_43_offloads_that_make_no_sense(play: Play) -> None:
    play("row-43")


def test_hostile_47_packet_shorter_than_it_says(play: Play) -> None:
    play("row-47")


def test_hostile_48_packet_longer_than_it_says(play: Play) -> None:
    play("row-48")


def test_hostile_52_packets_from_and_to_anybody(play: Play) -> None:
    play("row-52")


def test_hostile_53_random_bytes_by_the_mebibyte(play: Play) -> None:
    play("row-53")


def test_hostile_55_balloon_of_pages_that_are_none(play: Play) -> None:
    play("row-55")


def test_hostile_56_output_in_pieces(play: Play) -> None:
    play("row-56")


def test_hostile_60_control_messages_that_make_no_sense(play: Play) -> None:
    play("row-60")


def test_hostile_63_status_in_any_order(play: Play) -> None:
    play("row-63")


def test_hostile_64_features_that_were_not_offered(play: Play) -> None:
    play("row-64")


def test_hostile_65_kicks_at_any_time(play: Play) -> None:
    play("row-65")


def test_hostile_66_resets_in_a_row(play: Play) -> None:
    play("row-66")


def test_hostile_11_and_20_second_cpu_changes_rings(play: Play) -> None:
    play("race-rng-index", "race-blk-lengths", "race-net-addresses", "race-blk-headers")


def test_hostile_58_output_without_end(play: Play) -> None:
    play("prints-without-end")


def test_hostile_59_uart_that_talks_to_itself(play: Play) -> None:
    play("serial-loopback", "uart-level-storm")


def test_hostile_61_and_62_registers_at_any_width_and_place(play: Play) -> None:
    play("window-virtio-mmio-mmio", "window-bars-pci", "window-lapic", "window-end-of-ram", "everywhere-mmio-0")


def test_hostile_68_a_string_to_the_uart_arrives_once(play: Play) -> None:
    (outcome,) = play("row-68")

    assert outcome.console.encode() == ROWS["row-68"].memory[BUFFERS]


def test_hostile_69_exits_from_which_no_cpu_comes_back(play: Play) -> None:
    outcomes = play("triple-long", "triple-real", "reset-vector", "halt-real", "odd-int3", "run-at-device")

    assert {Reason.TRIPLE_FAULT, Reason.HALT, Reason.RESET} <= {outcome.stop.reason for outcome in outcomes}


def test_a_cpu_at_the_end_of_all_addresses_is_reported(play: Play) -> None:
    play("loop-at-the-end", "stack-at-the-end", "fault-at-the-end", "popcnt-at-the-end")


def test_a_panic_of_one_endless_line_is_reported_in_few_words(play: Play) -> None:
    outcomes = play("panic-text")

    assert all("%s{}" in outcome.stop.detail for outcome in outcomes)
    assert all(len(str(outcome.stop)) < 300 and str(outcome.stop).isprintable() for outcome in outcomes)


def test_hostile_70_accesses_that_are_logged(play: Play) -> None:
    outcomes = play("bar-onto-ram", "bar-onto-high", "storm-rng-set-up-late", "storm-blk-set-up-late")

    assert all(outcome.lines for outcome in outcomes)


def test_hostile_71_interrupt_storms(play: Play) -> None:
    play("masks-and-unmasks", "lapic-timer-storm", "pit-storm", "eoi-storm", "ipi-vector-80-to-all", "storm-rng-kicks")


# Every port.

# Where a byte stops the machine, by what is then said of it.
STOPS = {
    "keyboard controller": 0x64,
    "fast reset by port 92h": 0x92,
    "reported by the guest kernel": 0x505,
    "ACPI S5": 0x600,
    "ACPI reset register": 0x602,
    "reset control register": 0xCF9,
}
ENDS = {
    ("out", 1, 0): [0x502],
    ("out", 1, 1): [0x92, 0x502, 0x505, 0x602],
    ("out", 1, 0x34): [0x502, 0x600, 0xCF9],
    ("out", 2, 0x34): [0x600],
    ("out", 1, 0xFF): [0x92, 0x502, 0x505, 0xCF9],
    ("outs", 1, 0xFE): [0x64, 0x502, 0xCF9],
}
ALL_PORTS, LOW_PORTS, SOME_PORTS = (0, 0x10000, 1), (0, 0x1000, 1), (0x1001, 0x10000, 61)


@pytest.mark.parametrize("kind", SWEEPS, ids=lambda kind: "-".join(map(str, kind)))
def test_hostile_67_every_port(arena: Arena, pure: None, kind: tuple[str, int, int]) -> None:
    """Those that stop the machine do so, by a byte alone; the sweep goes on behind them."""
    ends: list[int] = []
    parts = [ALL_PORTS] if SCALE else [LOW_PORTS, SOME_PORTS] if kind[1] == 4 else [LOW_PORTS]
    for first, last, stride in parts:
        while True:
            outcome = arena.run(malice_board.part(SWEEPS[kind], kind[2], first, last, stride))
            if outcome.stop.reason is Reason.HALT:
                assert outcome.memory[NEXT_PORT : NEXT_PORT + 4] == (0x10000).to_bytes(4, "little")
                break
            ends.append(STOPS.get(outcome.stop.detail, 0x502))
            assert ends[-1] != 0x502 or outcome.stop == Stop(Reason.EXIT, f"status {kind[2]}", status=kind[2])
            first = ends[-1] + 1

    assert ends == ENDS.get(kind, [])
