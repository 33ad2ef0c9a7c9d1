"""A PC keyboard controller without a keyboard: it answers what probes ask, and its pulse resets the machine.

Source: IBM PS/2 Hardware Interface Technical Reference (1990), "Keyboard and Auxiliary Device Controller".
There is no second (mouse) port. A byte for the keyboard is answered as on a PC where none is plugged in, with
0xFE and STATUS.TIMEOUT, so a driver learns at once what it would otherwise wait for. The A20 gate does nothing.
Linux: SERIO_I8042, and `reboot=k`. Reading port 0x61, which lies between the two registers, gives 0.

A hostile guest can fill nothing: the output buffer is one byte, and a newer answer replaces an unread one.
"""

from __future__ import annotations

from ..core.board import Board, Reason, Stop
from ..core.irq import IrqLine
from ..core.regs import Bits, Reg, RegisterDevice, bit
from ..core.typed import Any


class STATUS(Bits):
    """Status register, read at the command port."""

    OBF = bit(0)  # the output buffer has a byte for the CPU
    IBF = bit(1)  # the input buffer is full: never, for commands take no time here
    SYS = bit(2)  # as CONFIG.SYS
    COMMAND = bit(3)  # the last write was a command
    UNLOCKED = bit(4)  # the keyboard lock is open
    AUX = bit(5)
    TIMEOUT = bit(6)
    PARITY = bit(7)


class CONFIG(Bits):
    """Controller command byte."""

    KBD_INT = bit(0)
    AUX_INT = bit(1)
    SYS = bit(2)  # the self test has passed
    KBD_OFF = bit(4)
    AUX_OFF = bit(5)
    TRANSLATE = bit(6)


class OUTPUT(Bits):
    """Output port."""

    RUN = bit(0)  # low resets the processor
    A20 = bit(1)


class Command:
    """What can be written to the command port."""

    READ_CONFIG = 0x20
    WRITE_CONFIG = 0x60
    TEST_AUX = 0xA9
    SELF_TEST = 0xAA
    TEST_KBD = 0xAB
    DISABLE_KBD = 0xAD
    ENABLE_KBD = 0xAE
    READ_INPUT = 0xC0
    READ_OUTPUT = 0xD0
    WRITE_OUTPUT = 0xD1
    WRITE_KBD_BUFFER = 0xD2  # comes back as if the keyboard had sent it
    WRITE_AUX_BUFFER = 0xD3
    WRITE_AUX = 0xD4
    READ_TEST = 0xE0
    PULSE = 0xF0  # ... 0xFF: pulls those output bits low whose bits here are 0


class Answer:
    """What comes back at the data port."""

    SELF_TEST_PASSED = 0x55
    PORT_GOOD = 0x00
    PORT_CLOCK_LOW = 0x01
    RESEND = 0xFE
    INPUT_PORT = 0x80  # not locked


class I8042(RegisterDevice, span=5):
    """The controller at `port` (data) and `port`+4 (status, command), interrupting on `gsi`."""

    DATA = Reg(0)  # its value is the output buffer
    STATUS = Reg(4, reset=STATUS.SYS | STATUS.UNLOCKED, write=0, bits=STATUS)
    COMMAND = Reg(4, read=False)
    CONFIG = Reg(None, reset=CONFIG.KBD_INT | CONFIG.SYS | CONFIG.TRANSLATE, bits=CONFIG)  # as a BIOS leaves it
    OUTPUT = Reg(None, reset=OUTPUT.RUN | OUTPUT.A20, bits=OUTPUT)
    PENDING = Reg(None)  # the command whose parameter comes next at the data port

    def __init__(self, port: int, gsi: int) -> None:
        self.port = port
        self.gsi = gsi
        self._board: Board
        self._irq: IrqLine

    def attach(self, board: Board) -> None:
        self._board = board
        self._irq = board.irq(self.gsi)
        board.pio(self.port, self.SPAN, self)

    def read_DATA(self) -> int:
        self.STATUS &= ~(STATUS.OBF | STATUS.TIMEOUT)
        self._update()
        return self.DATA

    def write_DATA(self, value: int) -> None:
        self.STATUS &= ~STATUS.COMMAND
        command, self.PENDING = self.PENDING, 0
        match command:
            case Command.WRITE_CONFIG:
                self.CONFIG = value
                self.STATUS = self.STATUS & ~STATUS.SYS | (STATUS.SYS if value & CONFIG.SYS else 0)
                self._update()
            case Command.WRITE_OUTPUT:
                self.OUTPUT = value
                if not value & OUTPUT.RUN:
                    self._reset_machine()
            case Command.WRITE_KBD_BUFFER | Command.WRITE_AUX_BUFFER:
                self._answer(value)  # not marked AUX: that is how Linux learns that there is no second port
            case _:
                self._answer(Answer.RESEND, STATUS.TIMEOUT)

    def write_COMMAND(self, value: int) -> None:
        self.STATUS |= STATUS.COMMAND
        self.PENDING = 0
        match value:
            case Command.READ_CONFIG:
                self._answer(self.CONFIG)
            case (
                Command.WRITE_CONFIG
                | Command.WRITE_OUTPUT
                | Command.WRITE_KBD_BUFFER
                | Command.WRITE_AUX_BUFFER
                | Command.WRITE_AUX
            ):
                self.PENDING = value
            case Command.SELF_TEST:
                self._answer(Answer.SELF_TEST_PASSED)
            case Command.TEST_KBD:
                self._answer(Answer.PORT_GOOD)
            case Command.TEST_AUX:
                self._answer(Answer.PORT_CLOCK_LOW)
            case Command.DISABLE_KBD:
                self.CONFIG |= CONFIG.KBD_OFF
            case Command.ENABLE_KBD:
                self.CONFIG &= ~CONFIG.KBD_OFF
            case Command.READ_INPUT:
                self._answer(Answer.INPUT_PORT)
            case Command.READ_OUTPUT:
                self._answer(self.OUTPUT)
            case Command.READ_TEST:
                self._answer(0)
            case _ if value >= Command.PULSE and not value & OUTPUT.RUN:
                self._reset_machine()

    def restore(self, state: dict[str, Any]) -> None:
        """Call it on an attached device: the interrupt line follows."""
        super().restore(state)
        self._update()

    def _answer(self, byte: int, error: int = 0) -> None:
        self.DATA = byte
        self.STATUS = self.STATUS & ~STATUS.TIMEOUT | STATUS.OBF | error
        self._update()

    def _update(self) -> None:
        self._irq.set(bool(self.STATUS & STATUS.OBF and self.CONFIG & CONFIG.KBD_INT))

    def _reset_machine(self) -> None:
        self._board.stop(Stop(Reason.RESET, "keyboard controller"))
