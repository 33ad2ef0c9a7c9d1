"""ACPI power management without the legacy hardware: sleep, reset, power button."""

from __future__ import annotations

import json

import pytest

from kvmpy.core.board import Reason
from kvmpy.devices.acpi_ged import AcpiGed
from kvmpy.devices.acpi_pm import SLEEP_CONTROL, AcpiPm
from kvmpy.testing import FakeBoard

PM, GED, GSI = 0x600, 0x604, 9


@pytest.fixture
def board() -> FakeBoard:
    return FakeBoard()


@pytest.fixture
def pm(board: FakeBoard) -> AcpiPm:
    device = AcpiPm(PM)
    device.attach(board)
    return device


@pytest.fixture
def ged(board: FakeBoard) -> AcpiGed:
    device = AcpiGed(GED, GSI)
    device.attach(board)
    return device


@pytest.mark.usefixtures("pm")
def test_s5_powers_off(board: FakeBoard) -> None:
    board.ports.write(PM, 1, 5 << 2 | 1 << 5)

    assert [stop.reason for stop in board.stops] == [Reason.POWEROFF]


@pytest.mark.parametrize("value", [5 << 2, 1 << 5, 3 << 2 | 1 << 5, 7 << 2 | 1 << 5, 0xFF & ~(1 << 5)])
@pytest.mark.usefixtures("pm")
def test_anything_else_does_not(board: FakeBoard, value: int) -> None:
    board.ports.write(PM, 1, value)

    assert board.stops == []


@pytest.mark.usefixtures("pm")
def test_sleep_type_reads_back_and_sleep_enable_reads_0(board: FakeBoard) -> None:
    board.ports.write(PM, 1, 0xFF)

    assert board.ports.read(PM, 1) == SLEEP_CONTROL.SLP_TYP


def test_wake_status_is_cleared_by_writing_1(board: FakeBoard, pm: AcpiPm) -> None:
    pm.SLEEP_STATUS = 0x80

    board.ports.write(PM + 1, 1, 0x7F)
    kept = board.ports.read(PM + 1, 1)
    board.ports.write(PM + 1, 1, 0x80)

    assert (kept, board.ports.read(PM + 1, 1)) == (0x80, 0)


@pytest.mark.usefixtures("pm")
def test_reset_register_takes_the_value_of_the_fadt_only(board: FakeBoard) -> None:
    for value in (0, 2, 0x81, 0xFF):
        board.ports.write(PM + 2, 1, value)
    others = list(board.stops)
    board.ports.write(PM + 2, 1, 1)

    assert others == []
    assert [stop.reason for stop in board.stops] == [Reason.RESET]
    assert board.ports.read(PM + 2, 1) == 0


def test_power_button_is_an_event_and_an_edge(board: FakeBoard, ged: AcpiGed) -> None:
    ged.press_power_button()

    events = [board.ports.read(GED, 1), board.ports.read(GED, 1)]
    assert events == [1, 0]
    assert board.lines[GSI].pulses == 1


def test_every_press_is_an_edge(board: FakeBoard, ged: AcpiGed) -> None:
    ged.press_power_button()
    ged.press_power_button()

    assert board.lines[GSI].pulses == 2
    assert board.ports.read(GED, 1) == 1


@pytest.mark.usefixtures("ged")
def test_the_guest_cannot_make_events(board: FakeBoard) -> None:
    board.ports.write(GED, 1, 0xFF)

    assert board.ports.read(GED, 1) == 0
    assert board.lines[GSI].edges == 0


def test_pm_state_round_trip_through_json(board: FakeBoard, pm: AcpiPm) -> None:
    board.ports.write(PM, 1, 3 << 2)
    state = json.loads(json.dumps(pm.state()))

    other = AcpiPm(PM)
    other.restore(state)

    assert other.state() == state
    assert other.read(0, 1) == 3 << 2


def test_ged_state_round_trip_through_json(ged: AcpiGed) -> None:
    ged.press_power_button()
    state = json.loads(json.dumps(ged.state()))

    other = AcpiGed(GED, GSI)
    other.restore(state)

    assert other.state() == state
    assert other.read(0, 1) == 1
