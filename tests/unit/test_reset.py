"""The two plain reset registers: port 92h and the chipset's reset control."""

from __future__ import annotations

import json

import pytest

from kvmpy.core.board import Reason
from kvmpy.devices.port92 import Port92
from kvmpy.devices.reset_control import ResetControl
from kvmpy.testing import FakeBoard

PORT_A, RST_CNT = 0x92, 0xCF9


@pytest.fixture
def board() -> FakeBoard:
    board = FakeBoard()
    Port92(PORT_A).attach(board)
    ResetControl(RST_CNT).attach(board)
    return board


def test_port_92_bit_0_resets(board: FakeBoard) -> None:
    board.ports.write(PORT_A, 1, 0x03)

    assert [stop.reason for stop in board.stops] == [Reason.RESET]


def test_port_92_a20_reads_back_and_does_not_reset(board: FakeBoard) -> None:
    initial = board.ports.read(PORT_A, 1)
    board.ports.write(PORT_A, 1, 0xFE)  # Linux, enable_a20_fast: bit 1 set, bit 0 clear
    on = board.ports.read(PORT_A, 1)
    board.ports.write(PORT_A, 1, 0x00)

    assert (initial, on, board.ports.read(PORT_A, 1)) == (0x02, 0x02, 0x00)
    assert board.stops == []


@pytest.mark.parametrize("code", [0x06, 0x0E])
def test_linux_resets_by_reset_control(board: FakeBoard, code: int) -> None:
    cf9 = board.ports.read(RST_CNT, 1) & ~code  # arch/x86/kernel/reboot.c, BOOT_CF9_FORCE
    board.ports.write(RST_CNT, 1, cf9 | 2)
    prepared = list(board.stops)
    board.ports.write(RST_CNT, 1, cf9 | code)

    assert prepared == []
    assert [stop.reason for stop in board.stops] == [Reason.RESET]


def test_reset_control_acts_when_rst_cpu_goes_high_only(board: FakeBoard) -> None:
    board.ports.write(RST_CNT, 1, 0x0A)
    board.ports.write(RST_CNT, 1, 0x04)
    board.ports.write(RST_CNT, 1, 0x06)

    assert len(board.stops) == 1


def test_pci_configuration_access_does_not_reset(board: FakeBoard) -> None:
    board.ports.write(RST_CNT - 1, 4, 0x80000600)

    assert board.stops == []
    assert board.ports.read(RST_CNT, 1) == 0


@pytest.mark.parametrize("device", [Port92(PORT_A), ResetControl(RST_CNT)])
def test_state_round_trip_through_json(device: Port92 | ResetControl) -> None:
    device.attach(FakeBoard())
    device.write(0, 1, 0x02)
    state = json.loads(json.dumps(device.state()))

    other = type(device)(0)
    other.restore(state)

    assert other.state() == state
    assert other.read(0, 1) == 0x02
