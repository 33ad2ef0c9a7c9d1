"""The keyboard controller answers probes at once, and resets the machine."""

from __future__ import annotations

import json

import pytest

from kvmpy.core.board import Reason
from kvmpy.devices.i8042 import CONFIG, I8042, STATUS, Answer, Command
from kvmpy.testing import FakeBoard, IrqRecorder

KBD, GSI = 0x60, 1


class Port:
    """The guest's end: commands, parameters and answers, through the bus."""

    def __init__(self) -> None:
        self.board = FakeBoard()
        self.chip = I8042(KBD, GSI)
        self.chip.attach(self.board)

    @property
    def line(self) -> IrqRecorder:
        return self.board.lines[GSI]

    @property
    def status(self) -> int:
        return self.board.ports.read(KBD + 4, 1)

    def command(self, command: int, *parameters: int) -> None:
        self.board.ports.write(KBD + 4, 1, command)
        for byte in parameters:
            self.send(byte)

    def send(self, byte: int) -> None:
        self.board.ports.write(KBD, 1, byte)

    def answer(self) -> int:
        return self.board.ports.read(KBD, 1)


@pytest.fixture
def port() -> Port:
    return Port()


def test_at_power_on_it_is_idle_and_unlocked(port: Port) -> None:
    assert port.status == STATUS.SYS | STATUS.UNLOCKED
    assert port.line.level is False


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (Command.SELF_TEST, 0x55),
        (Command.TEST_KBD, 0x00),
        (Command.TEST_AUX, 0x01),
        (Command.READ_CONFIG, 0x45),
        (Command.READ_INPUT, 0x80),
        (Command.READ_OUTPUT, 0x03),
        (Command.READ_TEST, 0x00),
    ],
)
def test_command_is_answered_at_once(port: Port, command: int, answer: int) -> None:
    port.command(command)

    ready = port.status & (STATUS.OBF | STATUS.IBF | STATUS.TIMEOUT)
    assert ready == STATUS.OBF
    assert port.answer() == answer
    assert port.status & STATUS.OBF == 0


@pytest.mark.parametrize("command", [0x00, 0xA7, 0xA8, 0xC1, 0xDD, 0xDF])
def test_command_it_does_not_have_is_ignored(port: Port, command: int) -> None:
    port.command(command)

    assert port.status & STATUS.OBF == 0


def test_status_tells_commands_from_data(port: Port) -> None:
    port.command(Command.WRITE_CONFIG)
    after_command = port.status & STATUS.COMMAND
    port.send(0)

    assert (after_command, port.status & STATUS.COMMAND) == (STATUS.COMMAND, 0)


def test_config_reads_back_and_sys_follows_it(port: Port) -> None:
    port.command(Command.WRITE_CONFIG, 0x70)
    port.command(Command.READ_CONFIG)

    assert port.answer() == 0x70
    assert port.status & STATUS.SYS == 0


def test_keyboard_interface_is_disabled_and_enabled(port: Port) -> None:
    port.command(Command.DISABLE_KBD)
    disabled = port.chip.CONFIG & CONFIG.KBD_OFF
    port.command(Command.ENABLE_KBD)

    assert (disabled, port.chip.CONFIG & CONFIG.KBD_OFF) == (CONFIG.KBD_OFF, 0)


@pytest.mark.parametrize("prefix", [(), (Command.WRITE_AUX,)])
def test_a_byte_for_a_device_is_answered_by_the_time_out_of_an_empty_socket(port: Port, prefix: tuple[int]) -> None:
    for command in prefix:
        port.command(command)

    port.send(0xF2)  # identify

    assert port.status & (STATUS.OBF | STATUS.TIMEOUT) == STATUS.OBF | STATUS.TIMEOUT
    assert port.answer() == 0xFE
    assert port.status & (STATUS.OBF | STATUS.TIMEOUT) == 0


def test_the_time_out_of_one_answer_does_not_stick_to_the_next(port: Port) -> None:
    port.send(0xF2)

    port.command(Command.SELF_TEST)

    assert port.status & STATUS.TIMEOUT == 0
    assert port.answer() == Answer.SELF_TEST_PASSED


def test_a_parameter_is_taken_once(port: Port) -> None:
    port.command(Command.WRITE_CONFIG, 0x00, 0x55)

    assert port.chip.CONFIG == 0
    assert port.answer() == Answer.RESEND


def test_a_new_command_drops_the_parameter_that_the_last_one_waits_for(port: Port) -> None:
    port.command(Command.WRITE_CONFIG)
    port.command(Command.SELF_TEST)

    port.send(0x00)

    assert port.chip.CONFIG == 0x45


@pytest.mark.parametrize("command", [Command.WRITE_KBD_BUFFER, Command.WRITE_AUX_BUFFER])
def test_what_is_put_into_the_output_buffer_comes_back_as_keyboard_data(port: Port, command: int) -> None:
    port.command(command, 0x5A)

    assert port.status & (STATUS.OBF | STATUS.AUX) == STATUS.OBF
    assert port.answer() == 0x5A


def test_the_interrupt_follows_the_output_buffer(port: Port) -> None:
    port.send(0xFF)
    raised = port.line.level
    port.answer()

    assert (raised, port.line.level) == (True, False)


def test_the_interrupt_can_be_masked(port: Port) -> None:
    port.command(Command.WRITE_CONFIG, 0x00)
    port.send(0xFF)
    masked = port.line.level
    port.command(Command.WRITE_CONFIG, CONFIG.KBD_INT)

    assert (masked, port.line.level) == (False, True)


# Reset


@pytest.mark.parametrize("command", [0xFE, 0xF0, 0xFC])
def test_pulsing_output_bit_0_resets_the_machine(port: Port, command: int) -> None:
    port.command(command)

    assert [stop.reason for stop in port.board.stops] == [Reason.RESET]


@pytest.mark.parametrize("command", [0xFF, 0xF1, 0xFD])
def test_pulsing_other_bits_does_not(port: Port, command: int) -> None:
    port.command(command)

    assert port.board.stops == []


def test_output_port_with_bit_0_low_resets_the_machine(port: Port) -> None:
    port.command(Command.WRITE_OUTPUT, 0xDE)

    assert [stop.reason for stop in port.board.stops] == [Reason.RESET]


def test_switching_a20_on_does_not(port: Port) -> None:
    port.command(Command.WRITE_OUTPUT, 0xDF)  # Linux, arch/x86/boot/a20.c
    port.command(0xFF)
    port.command(Command.READ_OUTPUT)

    assert port.board.stops == []
    assert port.answer() == 0xDF


# What Linux's driver does (drivers/input/serio/i8042.c): nothing that it would wait for stays away.


def test_linux_finds_a_controller_without_a_second_port(port: Port) -> None:
    port.command(Command.SELF_TEST)
    self_test = port.answer()
    port.command(Command.READ_CONFIG)
    config = port.answer()
    port.command(Command.WRITE_CONFIG, (config | CONFIG.KBD_OFF) & ~CONFIG.KBD_INT)
    port.command(Command.WRITE_AUX_BUFFER, 0x5A)
    loop_status, loop = port.status, port.answer()
    port.command(Command.TEST_AUX)
    aux = port.answer()

    assert self_test == 0x55
    assert loop == 0x5A
    assert loop_status & STATUS.AUX == 0  # "auxerr"
    assert aux not in (0x00, 0xFA, 0xFF)  # what it would take for a working port
    assert port.status & STATUS.OBF == 0
    assert port.line.level is False


def test_linux_learns_by_interrupt_that_no_keyboard_answers(port: Port) -> None:
    port.command(Command.WRITE_CONFIG, CONFIG.KBD_INT | CONFIG.TRANSLATE)
    edges = port.line.edges

    port.send(0xF2)

    assert port.line.edges == edges + 1
    assert port.answer() == Answer.RESEND


# A guest that does everything, and state


def test_every_sequence_of_command_and_data_is_survived(port: Port) -> None:
    for command in range(256):
        for data in (0x00, 0x55, 0xFF):
            port.command(command, data)
            port.board.ports.write(KBD, 4, 0xFFFFFFFF)
            port.board.ports.read(KBD + 1, 4)

    assert {stop.reason for stop in port.board.stops} == {Reason.RESET}
    assert port.answer() in range(256)


def test_the_ports_between_read_0(port: Port) -> None:
    assert [port.board.ports.read(KBD + n, 1) for n in (1, 2, 3)] == [0, 0, 0]


def test_state_round_trip_through_json(port: Port) -> None:
    port.send(0xF2)
    port.command(Command.WRITE_OUTPUT)
    state = json.loads(json.dumps(port.chip.state()))

    other = Port()
    other.chip.restore(state)

    assert other.chip.state() == state
    assert other.line.level is True
    assert other.answer() == Answer.RESEND
    other.send(0xDE)
    assert [stop.reason for stop in other.board.stops] == [Reason.RESET]
