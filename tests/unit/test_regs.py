"""Registers declared in a class body behave as their data sheet line says."""

from __future__ import annotations

import json

import pytest

from kvmpy.core.regs import Bits, Field, Reg, RegisterDevice, bit


class CTRL(Bits):
    ON = bit(0)
    MODE = Field(3, 1)
    OFF = bit(7)
    BOTH = ON | OFF


class Chip(RegisterDevice, span=8):
    CTRL = Reg(0, reset=0x81, bits=CTRL)
    MASKED = Reg(1, reset=0xF0, write=0x0F)
    READ_ONLY = Reg(2, reset=0x55, write=0)
    WRITE_ONLY = Reg(3, reset=0x66, read=False)
    STATUS = Reg(4, reset=0xFF, write=0x0F, w1c=0xC0)
    EVENTS = Reg(5, reset=0xFF, write=0, rc=0x0F)
    HANDLED = Reg(6)
    LATCH = Reg(None, reset=-1)
    OTHER = Reg(0, reset=0x22, bank=1)

    def read_HANDLED(self) -> int:
        return self.HANDLED + 1

    def write_HANDLED(self, value: int) -> None:
        self.HANDLED = value * 2


class Wide(RegisterDevice, span=0x10, stride=4):
    LOW = Reg(0, reset=0x11223344)
    HIGH = Reg(4, reset=0x55667788)


@pytest.fixture
def chip() -> Chip:
    return Chip()


def test_the_class_has_the_declaration_and_the_instance_the_value(chip: Chip) -> None:
    assert (Chip.CTRL.offset, Chip.CTRL.name, Chip.CTRL.bits) == (0, "CTRL", CTRL)
    assert chip.CTRL == 0x81


def test_plain_register_reads_back(chip: Chip) -> None:
    chip.write(0, 1, 0x5A)

    assert chip.read(0, 1) == chip.CTRL == 0x5A


def test_write_mask(chip: Chip) -> None:
    chip.write(1, 1, 0xAA)

    assert chip.read(1, 1) == 0xFA


def test_read_only(chip: Chip) -> None:
    chip.write(2, 1, 0xAA)

    assert chip.read(2, 1) == 0x55


def test_write_only_reads_0(chip: Chip) -> None:
    chip.write(3, 1, 0xAA)

    assert chip.read(3, 1) == 0
    assert chip.WRITE_ONLY == 0xAA


def test_w1c_clears_where_a_1_is_written(chip: Chip) -> None:
    chip.write(4, 1, 0x45)

    assert chip.read(4, 1) == 0xB5  # bit 6 cleared, bit 7 kept, low half written, the rest read-only


def test_w1c_wins_over_write() -> None:
    class Both(RegisterDevice, span=1):
        R = Reg(0, reset=0xFF, w1c=0x80)

    device = Both()
    device.write(0, 1, 0x80)

    assert device.R == 0


def test_rc_clears_by_reading(chip: Chip) -> None:
    values = [chip.read(5, 1), chip.read(5, 1)]

    assert values == [0xFF, 0xF0]


def test_handlers_replace_the_plain_behaviour(chip: Chip) -> None:
    chip.write(6, 1, 4)

    assert chip.read(6, 1) == 9


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_access_calls_the_handler_once(size: int) -> None:
    class Counting(RegisterDevice, span=4):
        R = Reg(0)

        def read_R(self) -> int:
            calls.append(-1)
            return 0

        def write_R(self, value: int) -> None:
            calls.append(value)

    calls: list[int] = []
    device = Counting()
    device.write(0, size, 0x44)
    device.read(0, size)

    assert calls == [0x44, -1]


def test_where_no_register_is_reads_give_0_and_writes_vanish(chip: Chip) -> None:
    before = chip.state()

    chip.write(7, 1, 0xFF)

    assert chip.read(7, 1) == 0
    assert chip.state() == before


def test_banks(chip: Chip) -> None:
    chip.select_bank(1)
    chip.write(0, 1, 0x33)
    in_bank_1 = [chip.read(0, 1), chip.read(1, 1)]
    chip.select_bank(0)

    assert in_bank_1 == [0x33, 0xF0]
    assert (chip.read(0, 1), chip.OTHER) == (0x81, 0x33)


def test_instances_do_not_share_values(chip: Chip) -> None:
    chip.write(0, 1, 0x5A)

    other = Chip()
    assert other.read(0, 1) == 0x81
    assert other.lock is not chip.lock


def test_reset_restores_values_and_bank(chip: Chip) -> None:
    chip.write(0, 1, 0x5A)
    chip.select_bank(1)

    chip.reset()

    assert chip.read(0, 1) == 0x81


def test_wide_access_is_split_into_registers(chip: Chip) -> None:
    assert chip.read(0, 4) == 0x0055F081

    chip.write(0, 4, 0x44332211)

    assert (chip.CTRL, chip.MASKED, chip.READ_ONLY, chip.WRITE_ONLY) == (0x11, 0xF2, 0x55, 0x44)


def test_wide_access_past_the_last_register(chip: Chip) -> None:
    assert chip.read(7, 8) == 0


def test_stride_of_4() -> None:
    wide = Wide()

    wide.write(0, 4, 0xDEADBEEF)

    assert [wide.read(0, 4), wide.read(4, 4), wide.read(8, 4)] == [0xDEADBEEF, 0x55667788, 0]


def test_8_byte_access_at_a_stride_of_4_is_two_registers() -> None:
    wide = Wide()
    value = wide.read(0, 8)

    wide.write(0, 8, 0x0123456789ABCDEF)

    assert value == 0x5566778811223344
    assert (wide.LOW, wide.HIGH) == (0x89ABCDEF, 0x01234567)


@pytest.mark.parametrize(("offset", "size"), [(1, 1), (2, 2), (3, 4), (2, 8)])
def test_access_beside_a_register_hits_none(offset: int, size: int) -> None:
    wide = Wide()
    before = wide.state()

    wide.write(offset, size, 0xFFFFFFFFFFFFFFFF)

    assert wide.read(offset, size) == 0
    assert wide.state() == before


def test_subclass_inherits_and_replaces() -> None:
    class Newer(Chip):
        EXTRA = Reg(7, reset=7)

        def read_CTRL(self) -> int:
            return 0x99

    device = Newer()

    assert [device.read(0, 1), device.read(1, 1), device.read(7, 1)] == [0x99, 0xF0, 7]
    assert "EXTRA" not in Chip.REGISTERS


# Mistakes in a class body are found when it is made.


def test_handler_of_no_register() -> None:
    with pytest.raises(TypeError, match=r"Typo\.write_CTLR: no register 'CTLR'; has CTRL"):

        class Typo(RegisterDevice, span=1):
            CTRL = Reg(0)

            def write_CTLR(self, value: int) -> None: ...


@pytest.mark.parametrize("offset", [-4, 2, 8])
def test_register_out_of_place(offset: int) -> None:
    with pytest.raises(TypeError, match=r"Outside\.R: no register can be at"):

        class Outside(RegisterDevice, span=8, stride=4):
            R = Reg(offset)


def test_two_registers_in_one_place() -> None:
    with pytest.raises(TypeError, match="Crowded: B and A both answer reads at 0x0"):

        class Crowded(RegisterDevice, span=1):
            A = Reg(0, write=0)
            B = Reg(0)


@pytest.mark.parametrize("other", [Reg(0, read=False), Reg(0, read=False, write=0, w1c=1)])
def test_two_writable_registers_in_one_place(other: Reg) -> None:
    with pytest.raises(TypeError, match="Crowded: B and A both answer writes at 0x0"):

        class Crowded(RegisterDevice, span=1):
            A = Reg(0)
            B = other


# State


def test_state_round_trip_through_json(chip: Chip) -> None:
    chip.write(0, 1, 0x5A)
    chip.LATCH = 1 << 40
    state = json.loads(json.dumps(chip.state()))

    other = Chip()
    other.restore(state)

    assert other.state() == state
    assert (other.read(0, 1), other.LATCH) == (0x5A, 1 << 40)


@pytest.mark.parametrize(
    "damage",
    [{"version": 2}, {"registers": {}}, {"registers": {"CTRL": 1}}],
)
def test_restore_refuses_another_layout(chip: Chip, damage: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Chip: state"):
        chip.restore(chip.state() | damage)


@pytest.mark.parametrize("value", [-1, 0x100, 1.5, "1", None, True])
def test_restore_refuses_a_value_no_register_can_have_and_changes_nothing(chip: Chip, value: object) -> None:
    state = chip.state()
    state["registers"] |= {"CTRL": 1, "MASKED": value}

    with pytest.raises(ValueError, match="state has MASKED="):
        chip.restore(state)

    assert chip.CTRL == 0x81


# Bits


def test_field() -> None:
    assert int(CTRL.MODE) == 0b1110
    assert CTRL.MODE.of(0b0110_1010) == 5
    assert CTRL.MODE.put(0b1111_1111, 2) == 0b1111_0101
    assert CTRL.MODE.put(0, 0xFF) == 0b1110


@pytest.mark.parametrize(
    ("value", "text"), [(0x8B, "0x8b (ON|MODE=0x5|OFF)"), (0x00, "0x0 (MODE=0x0)"), (0x01, "0x1 (ON|MODE=0x0)")]
)
def test_describe_names_single_bits_and_fields(value: int, text: str) -> None:
    assert CTRL.describe(value) == text


def test_describe_ignores_what_the_class_body_leaves_behind() -> None:
    class Plain(Bits):
        __firstlineno__ = 1  # Python 3.13 puts it there

    assert Plain.describe(1) == "0x1"
