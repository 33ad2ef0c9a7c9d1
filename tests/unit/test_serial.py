"""The UART as a driver sees it through its ports, and as the console sees it from the host."""

from __future__ import annotations

import json

import pytest

from kvmpy.devices.serial import BREAK, FCR, IER, LCR, LSR, MCR, MSR, Serial, Source
from kvmpy.testing import ByteSink, FakeBoard, IrqRecorder

COM1, GSI = 0x3F8, 4
FIFOS = 0xC0  # what IIR shows while the FIFOs are enabled


class Port:
    """The guest's end of a UART: registers by name, through the bus."""

    AT = {"RBR": 0, "THR": 0, "DLL": 0, "IER": 1, "DLM": 1, "IIR": 2, "FCR": 2, "LCR": 3, "MCR": 4, "LSR": 5,
          "MSR": 6, "SCR": 7}  # fmt: skip

    def __init__(self, room: int | None = None) -> None:
        self.sink = ByteSink(room)
        self.uart = Serial(self.sink, port=COM1, gsi=GSI)
        self.board = FakeBoard()
        self.uart.attach(self.board)

    @property
    def line(self) -> IrqRecorder:
        return self.board.lines[GSI]

    def get(self, name: str) -> int:
        return self.board.ports.read(COM1 + self.AT[name], 1)

    def put(self, name: str, value: int) -> None:
        self.board.ports.write(COM1 + self.AT[name], 1, value)

    def write(self, data: bytes) -> None:
        for byte in data:
            self.put("THR", byte)

    def read(self) -> bytes:
        """Everything that LSR.DR announces; never more than two FIFOs full."""
        return bytes(self.get("RBR") for _ in range(32) if self.get("LSR") & LSR.DR)


@pytest.fixture
def port() -> Port:
    return Port()


@pytest.fixture
def open_port() -> Port:
    """As an operating system drives it: FIFOs on with trigger level 8, OUT2, RTS and DTR up, receive interrupts on."""
    port = Port()
    port.put("FCR", FCR.ENABLE | 0x80)
    port.put("MCR", MCR.DTR | MCR.RTS | MCR.OUT2)
    port.put("IER", IER.ERBFI)
    return port


# After reset (data sheet, table III)


def test_reset_values(port: Port) -> None:
    values = {name: port.get(name) for name in ("RBR", "IER", "IIR", "LCR", "MCR", "LSR", "MSR", "SCR")}

    assert values == {"RBR": 0, "IER": 0, "IIR": 1, "LCR": 0, "MCR": 0, "LSR": 0x60, "MSR": 0xB0, "SCR": 0}
    assert port.line.level is False


def test_reset_forgets_what_was_received(open_port: Port) -> None:
    open_port.uart.receive(b"a")

    open_port.uart.reset()
    lsr, level = open_port.get("LSR"), open_port.line.level
    open_port.uart.receive(b"b")

    assert (lsr, level) == (LSR.THRE | LSR.TEMT, False)
    assert open_port.read() == b"b"


def test_reset_forgets_what_waits_for_a_full_sink() -> None:
    port = Port(room=1)
    port.write(b"ab")

    port.uart.reset()
    lsr = port.get("LSR")
    port.sink.room = None
    port.uart.drained()

    assert lsr & LSR.THRE == 0
    assert port.sink.data == b"a"


@pytest.mark.parametrize(
    ("name", "written", "kept"), [("IER", 0xFF, 0x0F), ("MCR", 0xFF, 0x1F), ("LCR", 0x7F, 0x7F), ("SCR", 0xA5, 0xA5)]
)
def test_reserved_bits_stay_0(port: Port, name: str, written: int, kept: int) -> None:
    port.put(name, written)

    assert port.get(name) == kept


@pytest.mark.parametrize("name", ["LSR", "MSR"])
def test_status_registers_ignore_writes(port: Port, name: str) -> None:
    before = port.get(name)

    port.put(name, 0xFF)

    assert port.get(name) == before


def test_divisor_latch_hides_data_and_interrupt_enable(port: Port) -> None:
    port.put("IER", IER.ERBFI)
    port.put("LCR", LCR.DLAB | 3)
    port.put("DLL", 0x12)
    port.put("DLM", 0x34)

    assert (port.get("DLL"), port.get("DLM")) == (0x12, 0x34)
    port.put("LCR", 3)
    assert port.get("IER") == IER.ERBFI
    assert port.sink.data == b""


# Sending


def test_sends_what_is_written(port: Port) -> None:
    port.write(b"hello")

    assert port.sink.data == b"hello"
    assert port.get("LSR") == LSR.THRE | LSR.TEMT


def test_without_a_sink_bytes_vanish() -> None:
    board = FakeBoard()
    uart = Serial(None, port=COM1, gsi=GSI)
    uart.attach(board)

    board.ports.write(COM1, 1, 0x41)

    assert board.ports.read(COM1 + 5, 1) == LSR.THRE | LSR.TEMT


def test_full_sink_clears_thre_and_the_rest_of_a_burst_waits_in_the_fifo() -> None:
    port = Port(room=3)
    port.put("FCR", FCR.ENABLE)

    port.write(b"0123456789abcdef")  # a driver writes 16 bytes for each THRE

    assert port.sink.data == b"012"
    assert port.get("LSR") & (LSR.THRE | LSR.TEMT) == 0
    assert port.uart.DROPPED == 0


def test_drained_sends_the_rest_and_sets_thre() -> None:
    port = Port(room=3)
    port.put("FCR", FCR.ENABLE)
    port.write(b"0123456789abcdef")

    port.sink.room = None
    port.uart.drained()

    assert port.sink.data == b"0123456789abcdef"
    assert port.get("LSR") == LSR.THRE | LSR.TEMT


def test_drained_into_a_sink_that_fills_again_keeps_thre_clear() -> None:
    port = Port(room=1)
    port.put("FCR", FCR.ENABLE)
    port.write(b"0123")

    port.sink.room = 2
    port.uart.drained()

    assert port.sink.data == b"012"
    assert port.get("LSR") & LSR.THRE == 0


def test_bytes_written_against_thre_are_dropped_and_counted() -> None:
    port = Port(room=1)
    port.put("FCR", FCR.ENABLE)

    port.write(bytes(100))

    port.sink.room = None
    port.uart.drained()
    assert len(port.sink.data) == 17  # one sent, 16 in the FIFO
    assert port.uart.DROPPED == 83


def test_single_byte_mode_holds_one_byte_while_the_sink_is_full() -> None:
    port = Port(room=1)

    port.write(b"abc")

    port.sink.room = None
    port.uart.drained()
    assert port.sink.data == b"ab"
    assert port.uart.DROPPED == 1


def test_clearing_the_transmit_fifo_loses_what_waits_there() -> None:
    port = Port(room=1)
    port.put("FCR", FCR.ENABLE)
    port.write(b"abc")

    port.put("FCR", FCR.ENABLE | FCR.CLEAR_TX)

    port.sink.room = None
    port.uart.drained()
    assert port.sink.data == b"a"


# The THRE interrupt


def test_without_etbei_there_is_none(port: Port) -> None:
    port.put("MCR", MCR.OUT2)

    port.write(b"a")

    assert port.get("IIR") == Source.NONE
    assert port.line.edges == 0


def test_disabling_takes_it_back(port: Port) -> None:
    port.put("MCR", MCR.OUT2)
    port.put("IER", IER.ETBEI)

    port.put("IER", 0)

    assert port.get("IIR") == Source.NONE
    assert port.line.level is False


def test_enabling_the_thre_interrupt_raises_it(port: Port) -> None:
    port.put("MCR", MCR.OUT2)

    port.put("IER", IER.ETBEI)

    assert port.line.level is True
    assert port.get("IIR") == Source.THR_EMPTY


def test_reading_iir_takes_the_thre_interrupt_back(port: Port) -> None:
    port.put("MCR", MCR.OUT2)
    port.put("IER", IER.ETBEI)

    port.get("IIR")

    assert port.line.level is False
    assert port.get("IIR") == Source.NONE
    assert port.get("LSR") & LSR.THRE


def test_disabling_and_enabling_raises_the_thre_interrupt_again(port: Port) -> None:
    port.put("IER", IER.ETBEI)
    port.get("IIR")

    port.put("IER", 0)
    port.put("IER", IER.ETBEI)

    assert port.get("IIR") == Source.THR_EMPTY


def test_enabling_it_once_more_does_not(port: Port) -> None:
    port.put("IER", IER.ETBEI)
    port.get("IIR")

    port.put("IER", IER.ETBEI | IER.ERBFI)

    assert port.get("IIR") == Source.NONE


def test_a_sent_byte_raises_the_thre_interrupt_with_an_edge(port: Port) -> None:
    port.put("MCR", MCR.OUT2)
    port.put("IER", IER.ETBEI)
    port.get("IIR")

    port.write(b"0123456789abcdef")

    assert port.get("IIR") == Source.THR_EMPTY
    assert port.line.edges == 2  # one for enabling, one for the whole burst


def test_a_full_sink_holds_the_thre_interrupt_back_until_drained() -> None:
    port = Port(room=1)
    port.put("FCR", FCR.ENABLE)
    port.put("MCR", MCR.OUT2)
    port.put("IER", IER.ETBEI)

    port.write(b"a")
    held = port.line.level
    port.sink.room = None
    port.uart.drained()

    assert (held, port.line.level) == (False, True)


def test_drained_without_need_raises_nothing(port: Port) -> None:
    port.put("MCR", MCR.OUT2)
    port.put("IER", IER.ETBEI)
    port.get("IIR")

    port.uart.drained()

    assert port.line.level is False


def test_reading_iir_for_another_source_keeps_the_thre_interrupt(open_port: Port) -> None:
    open_port.put("IER", IER.ERBFI | IER.ETBEI)
    open_port.uart.receive(b"x")

    sources = [open_port.get("IIR"), open_port.get("RBR"), open_port.get("IIR"), open_port.get("IIR")]

    assert sources == [FIFOS | Source.TIMEOUT, ord("x"), FIFOS | Source.THR_EMPTY, FIFOS | Source.NONE]


# Receiving


def test_receives_in_order(open_port: Port) -> None:
    taken = open_port.uart.receive(b"hello")

    assert taken == 5
    assert open_port.read() == b"hello"
    assert open_port.get("LSR") & LSR.DR == 0


def test_single_byte_mode_takes_one_byte(port: Port) -> None:
    taken = port.uart.receive(b"hello")

    assert taken == 1
    assert port.read() == b"h"


def test_fifo_takes_16_bytes_and_no_more(open_port: Port) -> None:
    taken = [open_port.uart.receive(bytes(range(20))), open_port.uart.receive(b"x")]

    assert taken == [16, 0]
    assert open_port.read() == bytes(range(16))
    assert open_port.uart.receive(b"") == 0


@pytest.mark.parametrize(
    ("trigger", "level", "below"),
    [(0, 1, Source.NONE), (1, 4, Source.TIMEOUT), (2, 8, Source.TIMEOUT), (3, 14, Source.TIMEOUT)],
)
def test_iir_tells_the_trigger_level_from_the_time_out(open_port: Port, trigger: int, level: int, below: int) -> None:
    open_port.put("FCR", FCR.ENABLE | trigger << 6)

    open_port.uart.receive(bytes(level - 1))
    source = open_port.get("IIR")
    open_port.uart.receive(b"x")

    assert source == FIFOS | below
    assert open_port.get("IIR") == FIFOS | Source.DATA


def test_the_line_falls_with_the_last_byte_read(open_port: Port) -> None:
    open_port.uart.receive(b"ab")

    levels = [open_port.line.level, open_port.get("RBR"), open_port.line.level, open_port.get("RBR")]

    assert levels == [True, ord("a"), True, ord("b")]
    assert open_port.line.level is False


def test_without_receive_interrupts_the_line_stays_low(open_port: Port) -> None:
    open_port.put("IER", 0)

    open_port.uart.receive(b"a")

    assert open_port.line.level is False
    assert open_port.get("IIR") == FIFOS | Source.NONE


def test_enabling_receive_interrupts_with_data_waiting_raises_the_line(open_port: Port) -> None:
    open_port.put("IER", 0)
    open_port.uart.receive(b"a")

    open_port.put("IER", IER.ERBFI)

    assert open_port.line.level is True


def test_out2_gates_the_line_but_not_iir(open_port: Port) -> None:
    open_port.uart.receive(b"a")

    open_port.put("MCR", MCR.DTR | MCR.RTS)
    gated = open_port.line.level
    open_port.put("MCR", MCR.OUT2)

    assert (gated, open_port.line.level) == (False, True)
    assert open_port.get("IIR") == FIFOS | Source.TIMEOUT


def test_on_room_is_told_once_the_fifo_is_empty_after_a_refusal(open_port: Port) -> None:
    told: list[int] = []
    open_port.uart.on_room = lambda: told.append(1)
    open_port.uart.receive(bytes(17))

    before = list(told)
    open_port.read()
    emptied = list(told)
    open_port.get("RBR")
    open_port.put("FCR", FCR.ENABLE | FCR.CLEAR_RX)

    assert (before, emptied, told) == ([], [1], [1])


def test_on_room_is_not_told_when_all_was_taken(open_port: Port) -> None:
    told: list[int] = []
    open_port.uart.on_room = lambda: told.append(1)

    open_port.uart.receive(bytes(16))
    open_port.read()

    assert told == []


@pytest.mark.parametrize("fcr", [FCR.ENABLE | FCR.CLEAR_RX, 0])
def test_clearing_the_receive_fifo_makes_room(open_port: Port, fcr: int) -> None:
    told: list[int] = []
    open_port.uart.on_room = lambda: told.append(1)
    open_port.uart.receive(bytes(17))

    open_port.put("FCR", fcr)

    assert told == [1]
    assert open_port.get("LSR") & LSR.DR == 0
    assert open_port.line.level is False


def test_fcr_without_enable_programs_nothing(port: Port) -> None:
    port.uart.receive(b"a")

    port.put("FCR", FCR.CLEAR_RX | 0xC0)

    assert port.read() == b"a"


def test_clear_bits_clear_themselves(open_port: Port) -> None:
    open_port.put("FCR", FCR.ENABLE | FCR.CLEAR_RX | FCR.CLEAR_TX)

    open_port.uart.receive(b"a")

    assert open_port.read() == b"a"


def test_listening_when_a_driver_has_the_port_open_and_tells_so_once(port: Port) -> None:
    told: list[bool] = []
    port.uart.on_room = lambda: told.append(port.uart.listening)

    port.put("IER", IER.ERBFI)  # the order of Linux: interrupts, then FCR, then RTS
    port.put("FCR", FCR.ENABLE | FCR.CLEAR_RX)
    before = (list(told), port.uart.listening)
    port.put("MCR", MCR.DTR | MCR.RTS | MCR.OUT2)
    port.put("MCR", MCR.RTS | MCR.OUT2)

    assert before == ([], False)
    assert told == [True]


def test_listening_in_the_other_order(port: Port) -> None:
    told: list[bool] = []
    port.uart.on_room = lambda: told.append(port.uart.listening)

    port.put("MCR", MCR.RTS)
    before = list(told)
    port.put("IER", IER.ERBFI)

    assert (before, told) == ([], [True])


# Break


def test_break_is_a_nul_with_bi(open_port: Port) -> None:
    open_port.put("IER", IER.ERBFI | IER.ELSI)

    open_port.uart.send_break()

    assert open_port.get("IIR") == FIFOS | Source.LINE_STATUS
    assert open_port.get("LSR") & (LSR.BI | LSR.DR | LSR.FIFO_ERROR) == LSR.BI | LSR.DR | LSR.FIFO_ERROR
    assert open_port.get("LSR") & (LSR.BI | LSR.FIFO_ERROR) == 0
    assert open_port.get("IIR") == FIFOS | Source.TIMEOUT
    assert open_port.get("RBR") == 0


def test_break_shows_when_it_is_at_the_top_of_the_fifo(open_port: Port) -> None:
    open_port.uart.receive(b"a")
    open_port.uart.send_break()
    open_port.uart.receive(b"h")

    seen = [(open_port.get("LSR") & (LSR.BI | LSR.DR), open_port.get("RBR")) for _ in range(3)]

    assert seen == [(LSR.DR, ord("a")), (LSR.DR | LSR.BI, 0), (LSR.DR, ord("h"))]


def test_fifo_error_stays_while_a_later_byte_has_one(open_port: Port) -> None:
    open_port.uart.send_break()
    open_port.uart.send_break()

    errors = [open_port.get("LSR") & LSR.FIFO_ERROR, open_port.get("LSR") & LSR.FIFO_ERROR]

    assert errors == [LSR.FIFO_ERROR, LSR.FIFO_ERROR]


def test_break_into_a_full_fifo_is_an_overrun(open_port: Port) -> None:
    open_port.put("IER", IER.ELSI)
    open_port.uart.receive(bytes(16))

    open_port.uart.send_break()

    assert open_port.line.level is True
    assert open_port.get("LSR") & LSR.OE
    assert open_port.get("LSR") & LSR.OE == 0
    assert open_port.line.level is False
    assert len(open_port.read()) == 16


# Loopback


def test_loopback_returns_what_is_sent_and_sends_nothing(open_port: Port) -> None:
    open_port.put("MCR", MCR.LOOP)

    open_port.write(b"abc")

    assert open_port.read() == b"abc"
    assert open_port.sink.data == b""


def test_loopback_overrun_keeps_the_fifo(open_port: Port) -> None:
    open_port.put("MCR", MCR.LOOP)

    open_port.write(bytes(range(200)))

    assert open_port.get("LSR") & LSR.OE
    assert open_port.read() == bytes(range(16))


def test_loopback_overrun_overwrites_the_single_byte(port: Port) -> None:
    port.put("MCR", MCR.LOOP)

    port.write(b"ab")

    assert port.get("LSR") & LSR.OE
    assert port.read() == b"b"


@pytest.mark.parametrize(
    ("output", "lines"), [(MCR.RTS, MSR.CTS), (MCR.DTR, MSR.DSR), (MCR.OUT1, MSR.RI), (MCR.OUT2, MSR.DCD)]
)
def test_loopback_wires_modem_outputs_to_inputs(port: Port, output: int, lines: int) -> None:
    port.put("MCR", MCR.LOOP | output)

    assert port.get("MSR") & 0xF0 == lines


def test_modem_deltas_are_set_by_changes_and_cleared_by_reading(port: Port) -> None:
    port.put("MCR", MCR.LOOP | MCR.RTS | MCR.DTR | MCR.OUT2)
    same = port.get("MSR")
    port.put("MCR", MCR.LOOP | MCR.DTR | MCR.OUT2)

    assert same == MSR.CTS | MSR.DSR | MSR.DCD
    assert port.get("MSR") == MSR.DSR | MSR.DCD | MSR.DCTS
    assert port.get("MSR") == MSR.DSR | MSR.DCD


def test_teri_is_set_by_the_end_of_a_ring(port: Port) -> None:
    port.put("MCR", MCR.LOOP | MCR.OUT1)
    begun = port.get("MSR")

    port.put("MCR", MCR.LOOP)

    assert begun & MSR.TERI == 0
    assert port.get("MSR") & MSR.TERI


def test_modem_status_interrupt_has_the_lowest_priority(port: Port) -> None:
    port.put("IER", IER.EDSSI | IER.ETBEI)
    port.put("MCR", MCR.LOOP)

    sources = [port.get("IIR"), port.get("IIR"), port.get("MSR") and port.get("IIR")]

    assert sources == [Source.THR_EMPTY, Source.MODEM_STATUS, Source.NONE]


def test_loopback_takes_the_interrupt_off_the_line(open_port: Port) -> None:
    open_port.uart.receive(b"a")

    open_port.put("MCR", MCR.LOOP | MCR.OUT2)

    assert open_port.line.level is False
    assert open_port.get("IIR") == FIFOS | Source.TIMEOUT


def test_in_loopback_the_line_is_deaf_and_says_when_it_hears_again(open_port: Port) -> None:
    told: list[int] = []
    open_port.put("MCR", MCR.LOOP | MCR.RTS)
    open_port.uart.on_room = lambda: told.append(1)

    taken = open_port.uart.receive(b"abc")
    open_port.uart.send_break()
    open_port.put("FCR", FCR.ENABLE | FCR.CLEAR_RX)
    in_loop = list(told)
    open_port.put("MCR", MCR.RTS)

    assert (taken, in_loop, told) == (0, [], [1])
    assert open_port.get("LSR") & LSR.DR == 0


# What Linux's 8250 driver does to find out what it has (drivers/tty/serial/8250/8250_port.c)


def test_linux_finds_a_port(port: Port) -> None:
    port.put("IER", 0)
    off = port.get("IER")
    port.put("IER", 0x0F)
    on = port.get("IER")
    port.put("IER", 0)
    port.put("MCR", MCR.LOOP | 0x0A)

    assert (off, on) == (0, 0x0F)
    assert port.get("MSR") & 0xF0 == 0x90


def test_linux_finds_a_16550a_and_nothing_newer(port: Port) -> None:
    port.put("LCR", 0xBF)
    port.put("FCR", 0)  # EFR of newer chips
    port.put("LCR", 0)
    port.put("FCR", FCR.ENABLE)
    is_16550a = port.get("IIR") >> 6
    port.put("LCR", 0x80)
    efr_650 = port.get("IIR")
    port.put("LCR", 0xBF)
    efr_650v2 = port.get("IIR")
    port.put("LCR", 0)
    mcr = port.get("MCR")
    port.put("MCR", mcr ^ MCR.LOOP)
    port.put("LCR", 0xE0)
    excr1_natsemi = port.get("IIR")
    port.put("LCR", 0)
    port.put("MCR", mcr)
    port.put("FCR", FCR.ENABLE | 0x20)
    fifo_64 = port.get("IIR") >> 5
    port.put("IER", 0x40)

    assert is_16550a == 3
    assert efr_650 != 0
    assert efr_650v2 != 0
    assert (excr1_natsemi ^ mcr) & MCR.LOOP == 0
    assert fifo_64 == 6
    assert port.get("IER") == 0  # no XScale


def test_linux_measures_a_fifo_of_16_bytes(port: Port) -> None:
    port.put("LCR", 0)
    port.put("FCR", FCR.ENABLE | FCR.CLEAR_RX | FCR.CLEAR_TX)
    port.put("MCR", MCR.LOOP)
    port.put("LCR", LCR.DLAB)
    port.put("DLL", 1)
    port.put("DLM", 0)
    port.put("LCR", 3)

    port.write(bytes(256))

    assert len(port.read()) == 16
    assert port.sink.data == b""


def test_linux_finds_no_thre_bug_and_no_txen_bug(port: Port) -> None:
    for name in ("LSR", "RBR", "IIR", "MSR"):
        port.get(name)
    port.put("IER", IER.ETBEI)
    first = port.get("IIR")
    port.put("IER", 0)
    port.put("IER", IER.ETBEI)
    second = port.get("IIR")
    port.put("IER", 0)
    port.put("MCR", MCR.OUT2)
    port.put("IER", IER.ETBEI)
    lsr, third = port.get("LSR"), port.get("IIR")
    port.put("IER", 0)

    assert (first & 1, second & 1, third & 1) == (0, 0, 0)
    assert lsr & LSR.TEMT
    assert port.line.level is False


# Wide accesses and a guest that does everything


def test_a_word_access_is_two_byte_accesses(port: Port) -> None:
    port.board.ports.write(COM1 + 3, 2, 0x1003)  # LCR = 3, MCR = LOOP

    assert (port.get("LCR"), port.get("MCR")) == (3, MCR.LOOP)
    assert port.board.ports.read(COM1 + 3, 2) == 0x1003


def test_every_write_everywhere_leaves_the_fifos_bounded(port: Port) -> None:
    for value in range(256):
        for offset in range(8):
            for size in (1, 2, 4):
                port.board.ports.write(COM1 + offset, size, value * 0x01010101)
                port.board.ports.read(COM1 + offset, size)
                port.uart.receive(bytes(40))
                port.uart.send_break()

    state = port.uart.state()
    assert len(state["rx"]) <= 16
    assert len(state["tx"]) <= 16


# State


def test_state_round_trip_through_json(open_port: Port) -> None:
    open_port.put("IER", IER.ERBFI | IER.ETBEI)
    open_port.put("SCR", 0x5A)
    open_port.put("LCR", LCR.DLAB | 3)
    open_port.put("DLL", 1)
    open_port.uart.receive(b"ab\x00\xff" + bytes(11))
    open_port.uart.send_break()
    state = json.loads(json.dumps(open_port.uart.state()))

    other = Port()
    other.uart.restore(state)

    assert other.uart.state() == state
    assert other.line.level is True
    assert other.get("DLL") == 1
    other.put("LCR", 3)
    assert bytes(other.get("RBR") for _ in range(15)) == b"ab\x00\xff" + bytes(11)
    assert other.get("LSR") & LSR.BI


def test_restore_sends_what_a_full_sink_had_left() -> None:
    port = Port(room=1)
    port.put("FCR", FCR.ENABLE)
    port.write(b"abc")
    state = port.uart.state()

    other = Port()
    other.uart.restore(state)

    assert other.sink.data == b"bc"
    assert other.get("LSR") == LSR.THRE | LSR.TEMT


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2},
        {"rx": [0] * 17},
        {"tx": [0] * 17},
        {"rx": [BREAK * 2]},
        {"rx": [-1]},
        {"rx": ["a"]},
        {"rx": None},
        {"registers": {}},
    ],
)
def test_restore_refuses_a_damaged_state(port: Port, damage: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Serial: state"):
        port.uart.restore(port.uart.state() | damage)


def test_cells_are_right_before_the_interrupt_comes(open_port: Port) -> None:
    """A guest that looks at once must find why it was interrupted: the line makes an edge, and no second one."""
    seen = []

    class Looking(IrqRecorder):
        def set(self, level: bool) -> None:
            cells = open_port.board.cells
            seen.append((level, cells[COM1 + 2].value & 0xF, cells[COM1 + 5].value & LSR.DR))

    open_port.uart._irq = Looking()

    open_port.uart.receive(b"a")

    assert seen == [(True, Source.TIMEOUT, LSR.DR)]
