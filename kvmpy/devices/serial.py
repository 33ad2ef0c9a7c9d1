"""A 16550A UART, the PC's serial port.

Source: PC16550D data sheet (National Semiconductor, now TI, June 1995), whose sections are cited.
Linux: SERIAL_8250, SERIAL_8250_CONSOLE.
The line is infinitely fast. A byte leaves as it is written, unless the sink is full: then the transmit FIFO fills
and THRE stays clear, so the guest waits and no byte is lost. A byte that is in the receive FIFO has been there
for the four character times of the time-out, so fewer than the trigger level interrupt at once. Not modelled:
baud rate, word length, parity, sending a break.

A hostile guest may write without looking at THRE (both FIFOs hold 16 bytes, what does not fit is counted), loop
back its own output, never read its input, or make interrupts as fast as it can exit.

The methods for the host's side (`receive`, `drained`, `send_break`) are called with `lock` held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..core.board import Board
from ..core.cell import READ_VALUE, WRITE_STREAM, Cell
from ..core.irq import IrqLine
from ..core.regs import Bits, Field, Reg, RegisterDevice, bit
from ..core.sink import Sink
from ..core.typed import Any, TypeGuard

FIFO_SIZE = 16
BREAK = 1 << 8  # in the receive FIFO, the error bit that goes with a byte
DIVISOR = 1  # the bank of registers behind LCR.DLAB


class IER(Bits):
    """Interrupt enable (8.7)."""

    ERBFI = bit(0)  # received data available
    ETBEI = bit(1)  # transmitter holding register empty
    ELSI = bit(2)  # receiver line status
    EDSSI = bit(3)  # modem status


class IIR(Bits):
    """Interrupt identification (8.6)."""

    ID = Field(3, 0)
    FIFOS = Field(7, 6)  # both set while the FIFOs are enabled


class Source:
    """Values of IIR.ID (table IV), highest priority first."""

    LINE_STATUS = 0b0110
    DATA = 0b0100
    TIMEOUT = 0b1100
    THR_EMPTY = 0b0010
    MODEM_STATUS = 0b0000
    NONE = 0b0001


class FCR(Bits):
    """FIFO control (8.5)."""

    ENABLE = bit(0)
    CLEAR_RX = bit(1)
    CLEAR_TX = bit(2)
    DMA = bit(3)
    TRIGGER = Field(7, 6)

    LEVELS = (1, 4, 8, 14)  # bytes, by TRIGGER


class LCR(Bits):
    """Line control (8.1)."""

    WLS = Field(1, 0)
    STB = bit(2)
    PEN = bit(3)
    EPS = bit(4)
    STICK = bit(5)
    BREAK = bit(6)
    DLAB = bit(7)


class MCR(Bits):
    """Modem control (8.8)."""

    DTR = bit(0)
    RTS = bit(1)
    OUT1 = bit(2)
    OUT2 = bit(3)  # on a PC: lets the interrupt out
    LOOP = bit(4)


class LSR(Bits):
    """Line status (8.4)."""

    DR = bit(0)
    OE = bit(1)
    PE = bit(2)
    FE = bit(3)
    BI = bit(4)
    THRE = bit(5)
    TEMT = bit(6)
    FIFO_ERROR = bit(7)

    ERRORS = OE | PE | FE | BI  # those that interrupt
    READ_CLEARS = ERRORS | FIFO_ERROR
    IDLE = THRE | TEMT


class MSR(Bits):
    """Modem status (8.9): four lines in the upper half, what has changed in the lower."""

    DCTS = bit(0)
    DDSR = bit(1)
    TERI = bit(2)
    DDCD = bit(3)
    CTS = bit(4)
    DSR = bit(5)
    RI = bit(6)
    DCD = bit(7)

    DELTAS = DCTS | DDSR | TERI | DDCD
    CONNECTED = CTS | DSR | DCD


class Serial(RegisterDevice, span=8):
    """One UART at `port`, interrupting on `gsi`; what the guest sends goes to `sink`, or nowhere.

    `on_room` (a leaf, called with `lock` held) is told when `receive`, having refused something, would take bytes
    again, and when `listening` becomes true. `DROPPED` counts bytes that the guest wrote into a full FIFO.
    """

    RBR = Reg(0, write=0)
    THR = Reg(0, read=False)
    IER = Reg(1, write=0x0F, bits=IER)
    IIR = Reg(2, reset=Source.NONE, write=0, bits=IIR)
    FCR = Reg(2, read=False, write=FCR.ENABLE | FCR.DMA | FCR.TRIGGER, bits=FCR)
    LCR = Reg(3, bits=LCR)
    MCR = Reg(4, write=0x1F, bits=MCR)
    LSR = Reg(5, reset=LSR.IDLE, write=0, bits=LSR)
    MSR = Reg(6, reset=MSR.CONNECTED, write=0, bits=MSR)
    SCR = Reg(7)
    DLL = Reg(0, reset=12, bank=DIVISOR)  # 9600 baud
    DLM = Reg(1, bank=DIVISOR)
    THRE_PENDING = Reg(None)  # the latch behind Source.THR_EMPTY
    DROPPED = Reg(None)

    def __init__(self, sink: Sink | None, port: int, gsi: int) -> None:
        self._sink = sink
        self.port = port
        self.gsi = gsi
        self.on_room: Callable[[], None] | None = None
        self._put = sink.put if sink is not None else _vanish
        self._rx: deque[int] = deque()
        self._tx: deque[int] = deque()  # used only while the sink is full
        self._sink_full = False
        self._short = False  # `receive` has refused something
        self._cells = {name: Cell() for name in ("THR", "IIR", "LSR", "MSR")}
        self._irq: IrqLine

    def attach(self, board: Board) -> None:
        self._irq = board.irq(self.gsi)
        board.pio(self.port, self.SPAN, self)
        for name in self._cells:
            self._cells[name] = board.cell(self.port + (self.REGISTERS[name].offset or 0), 1, sink=self._sink)
        self._publish()

    # The host's side.

    def receive(self, data: bytes) -> int:
        """Put `data` on the line; how many bytes the FIFO has taken. `on_room` tells when it takes the rest."""
        taken = 0 if self.MCR & MCR.LOOP else min(len(data), self._depth - len(self._rx))
        self._short = taken < len(data)
        if taken:
            self._rx.extend(data[:taken])
            self.LSR |= LSR.DR
            self._update()
        return taken

    def send_break(self) -> None:
        """A break condition on the line: a NUL with LSR.BI. Linux may take the byte after it as a SysRq command."""
        if not self.MCR & MCR.LOOP:
            self._arrive(BREAK)

    def drained(self) -> None:
        """The sink has room again."""
        if not self._sink_full:
            return
        self._sink_full = False
        while self._tx and not self._sink_full:
            self._sink_full = not self._put(self._tx.popleft())
        if not self._sink_full:
            self.LSR |= LSR.IDLE
            self._thr_empty()
        self._publish()

    @property
    def listening(self) -> bool:
        """Whether a driver has the port open: bytes sent before that fall to its clearing of the FIFO."""
        return bool(self.IER & IER.ERBFI and self.MCR & MCR.RTS)

    # The guest's side.

    def write_THR(self, value: int) -> None:
        if self.MCR & MCR.LOOP:
            self._arrive(value)
        elif self._sink_full:
            if len(self._tx) < self._depth:
                self._tx.append(value)
            else:
                self.DROPPED += 1
        elif not self._put(value):
            self._sink_full = True
            self.LSR &= ~LSR.IDLE
            self.THRE_PENDING = 0
            self._update()
        self._thr_empty()

    def read_RBR(self) -> int:
        if self._rx:
            self.RBR = self._rx.popleft() & 0xFF
            if not self._rx:
                self.LSR &= ~LSR.DR
                self._tell_room()
            elif self._rx[0] & BREAK:
                self.LSR |= LSR.BI
            self._update()
        return self.RBR

    def read_LSR(self) -> int:
        value = self.LSR
        if value & LSR.READ_CLEARS:
            self.LSR &= ~LSR.READ_CLEARS
            if any(byte & BREAK for byte in list(self._rx)[1:]):
                self.LSR |= LSR.FIFO_ERROR  # "subsequent errors in the FIFO"
            self._update()
        return value

    def write_IER(self, value: int) -> None:
        was, listened = self.IER, self.listening
        self.IER = value & Serial.IER.write
        if self.IER & ~was & IER.ETBEI:  # enabling samples THRE anew, even when IIR has reported it before
            self._thr_empty()
        elif not self.IER & IER.ETBEI:
            self.THRE_PENDING = 0
        self._update()
        self._tell_listening(listened)

    def read_IIR(self) -> int:
        value = self.IIR
        if IIR.ID.of(value) == Source.THR_EMPTY:
            self.THRE_PENDING = 0
            self._update()
        return value

    def write_FCR(self, value: int) -> None:
        if not value & FCR.ENABLE:  # 8.5: without it, no other bit is programmed
            value = 0
        if (value ^ self.FCR) & FCR.ENABLE:  # 8.5: changing the mode clears both FIFOs
            value |= FCR.CLEAR_RX | FCR.CLEAR_TX
        self.FCR = value & Serial.FCR.write
        if value & FCR.CLEAR_TX:
            self._tx.clear()
        if value & FCR.CLEAR_RX:
            self._rx.clear()
            self.LSR &= ~(LSR.DR | LSR.BI | LSR.FIFO_ERROR)
            self._tell_room()
        self._update()

    def write_LCR(self, value: int) -> None:
        self.LCR = value
        self.select_bank(DIVISOR if value & LCR.DLAB else 0)
        self._publish()

    def write_MCR(self, value: int) -> None:
        listened = self.listening
        self.MCR = value & Serial.MCR.write
        lines = _looped(self.MCR) if self.MCR & MCR.LOOP else MSR.CONNECTED
        changed = lines ^ self.MSR
        if lines & MSR.RI:  # TERI is set by the end of a ring only
            changed &= ~MSR.RI
        self.MSR = lines | (self.MSR & MSR.DELTAS) | (changed >> 4)
        self._update()
        self._tell_room()
        self._tell_listening(listened)

    def read_MSR(self) -> int:
        value = self.MSR
        if value & MSR.DELTAS:
            self.MSR &= ~MSR.DELTAS
            self._update()
        return value

    # State.

    def reset(self) -> None:
        super().reset()
        self._rx.clear()
        self._tx.clear()
        if self._sink_full:
            self.LSR &= ~LSR.IDLE
        self._update()

    def state(self) -> dict[str, Any]:
        return super().state() | {"rx": list(self._rx), "tx": list(self._tx)}

    def restore(self, state: dict[str, Any]) -> None:
        """Call it on an attached device: the interrupt line follows, and what a full sink had left goes to this one."""
        rx, tx = state.get("rx"), state.get("tx")
        if not (_is_fifo(rx) and _is_fifo(tx)):
            raise ValueError(f"Serial: state has rx={rx!r} tx={tx!r}")
        super().restore(state)
        self._rx, self._tx = deque(rx), deque(tx)
        self.select_bank(DIVISOR if self.LCR & LCR.DLAB else 0)
        self._update()
        self._sink_full = not self.LSR & LSR.THRE
        self.drained()

    # Inside.

    @property
    def _depth(self) -> int:
        return FIFO_SIZE if self.FCR & FCR.ENABLE else 1

    def _arrive(self, byte: int) -> None:
        """A character at the receiver, whether there is room or not."""
        if len(self._rx) >= self._depth:
            self.LSR |= LSR.OE
            if self.FCR & FCR.ENABLE:  # 8.4: a FIFO keeps what it has, a single register is overwritten
                self._update()
                return
            self._rx.clear()
        self._rx.append(byte)
        self.LSR |= LSR.DR
        if byte & BREAK:
            if self.FCR & FCR.ENABLE:
                self.LSR |= LSR.FIFO_ERROR
            if len(self._rx) == 1:  # 8.4: reported when it is at the top of the FIFO
                self.LSR |= LSR.BI
        self._update()

    def _thr_empty(self) -> None:
        if self.IER & IER.ETBEI and not self.THRE_PENDING and self.LSR & LSR.THRE:
            self.THRE_PENDING = 1
            self._update()

    def _update(self) -> None:
        """Find the interrupt source of the highest priority (table IV) and drive the line."""
        enabled = self.IER
        if enabled & IER.ELSI and self.LSR & LSR.ERRORS:
            source = Source.LINE_STATUS
        elif enabled & IER.ERBFI and self._rx:
            waiting = len(self._rx) < FCR.LEVELS[FCR.TRIGGER.of(self.FCR)]  # never in single-byte mode: TRIGGER is 0
            source = Source.TIMEOUT if waiting else Source.DATA
        elif self.THRE_PENDING:
            source = Source.THR_EMPTY
        elif enabled & IER.EDSSI and self.MSR & MSR.DELTAS:
            source = Source.MODEM_STATUS
        else:
            source = Source.NONE
        self.IIR = source | (IIR.FIFOS if self.FCR & FCR.ENABLE else 0)
        # A loopback takes the modem outputs off their pins, OUT2 with them (8.8).
        gate = self.MCR & (MCR.OUT2 | MCR.LOOP) == MCR.OUT2
        self._publish()  # before the guest is told to look
        self._irq.set(gate and source != Source.NONE)

    def _publish(self) -> None:
        """Into the cells what these registers would do now: nearly all that a kernel asks while it prints."""
        cells = self._cells
        plain = not (self.MCR & MCR.LOOP or self.LCR & LCR.DLAB or self.IER & IER.ETBEI or self._sink_full)
        cells["THR"].kinds = WRITE_STREAM if plain else 0
        cells["LSR"].value = self.LSR
        cells["LSR"].kinds = 0 if self.LSR & LSR.READ_CLEARS else READ_VALUE
        cells["IIR"].value = self.IIR
        cells["IIR"].kinds = 0 if IIR.ID.of(self.IIR) == Source.THR_EMPTY else READ_VALUE
        cells["MSR"].value = self.MSR
        cells["MSR"].kinds = 0 if self.MSR & MSR.DELTAS else READ_VALUE

    def _tell_room(self) -> None:
        if self._short and not self._rx and not self.MCR & MCR.LOOP:
            self._short = False
            if self.on_room is not None:
                self.on_room()

    def _tell_listening(self, before: bool) -> None:
        if self.on_room is not None and self.listening and not before:
            self.on_room()


def _looped(mcr: int) -> int:
    """The modem lines as the outputs drive them in loopback (8.8)."""
    return (
        (MSR.CTS if mcr & MCR.RTS else 0)
        | (MSR.DSR if mcr & MCR.DTR else 0)
        | (MSR.RI if mcr & MCR.OUT1 else 0)
        | (MSR.DCD if mcr & MCR.OUT2 else 0)
    )


def _vanish(byte: int) -> bool:
    return True


def _is_fifo(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= FIFO_SIZE
        and all(type(byte) is int and 0 <= byte <= BREAK | 0xFF for byte in value)
    )
