"""One thread for each vCPU: run the guest, hand what it touches to the buses, stop when told.

The loop is the whole conversation between a virtual CPU and the machine: KVM_RUN returns, the exit is looked up,
a device answers, and round again. Other threads talk to it through `pause`, `resume` and `end` alone.
"""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .core.board import Reason, Stop
from .core.bus import Bus
from .core.errors import KvmError
from .kvm import exits
from .kvm.handle import Vcpu, prepare_kick

KICK = signal.SIGRTMIN
RECENT_EXITS = 32  # kept for crash reports
SYSTEM_EVENTS = {"shutdown": Reason.POWEROFF, "reset": Reason.RESET, "crash": Reason.PANIC}
AGAIN = (-errno.EINTR, -errno.EAGAIN)  # EAGAIN: a CPU that waited for its start-up interrupt was woken
# What a vCPU's thread takes: all else is for Python's main thread. Faults are its own; blocked, they kill unreported.
TAKEN = {KICK, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}


class VcpuThread:
    """Runs `vcpu` until `end`, or until an exit after which it cannot go on; that is told to `stop`."""

    def __init__(self, vcpu: Vcpu, ports: Bus, mmio: Bus, stop: Callable[[Stop], None]) -> None:
        self.vcpu = vcpu
        self.recent: deque[tuple[int, ...]] = deque(maxlen=RECENT_EXITS)
        self._ports = ports
        self._mmio = mmio
        self._stop = stop
        self._change = threading.Condition()
        self._pauses = 0  # how many callers want the vCPU to stand still
        self._ending = False
        self._ident = 0  # of the thread while it can be signalled
        self._standing = True  # not in KVM_RUN, nor in a device on behalf of the guest
        self._thread = threading.Thread(target=self._main, name=f"kvmpy-vcpu{vcpu.index}", daemon=True)

    def start(self) -> None:
        prepare_kick(KICK)
        self._thread.start()

    def pause(self) -> None:
        """Make the vCPU stand still; returns at once (`wait_paused` waits). Every pause wants its `resume`."""
        with self._change:
            self._pauses += 1
            self._kick()

    def wait_paused(self, timeout: float | None = None) -> bool:
        """Until the vCPU stands still; False when it did not within `timeout` seconds (a device holds it)."""
        if threading.current_thread() is self._thread:
            return True
        with self._change:
            return self._change.wait_for(lambda: self._standing, timeout)

    def resume(self) -> None:
        """Undo one pause; returns once the vCPU is off, so that pauses in a row do not starve the guest."""
        with self._change:
            if self._pauses == 0:
                raise RuntimeError("resume of a vCPU that was not paused")
            self._pauses -= 1
            self._change.notify_all()
            self._change.wait_for(lambda: not (self._standing and self._ident) or self._pauses > 0 or self._ending)

    @contextmanager
    def paused(self) -> Iterator[Vcpu]:
        """The vCPU standing still, so that its state can be read and changed."""
        self.pause()
        try:
            self.wait_paused()
            yield self.vcpu
        finally:
            self.resume()

    def end(self) -> None:
        """Ask the thread to finish; `join` waits for it."""
        with self._change:
            self._ending = True
            self._change.notify_all()
            self._kick()

    def join(self, timeout: float) -> bool:
        """Whether the thread has finished within `timeout` seconds."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def cpu_seconds(self) -> float:
        """CPU time that the thread has used, in and out of the guest; 0 when it does not run."""
        with self._change:
            return time.clock_gettime(time.pthread_getcpuclockid(self._ident)) if self._ident else 0.0

    def _kick(self) -> None:
        """Out of KVM_RUN: the flag catches a thread on its way in, the signal one that is inside.

        For callers that hold `_change`, so that the thread cannot come to its end meanwhile.
        """
        if self._ident:
            self.vcpu.page[exits.IMMEDIATE_EXIT] = 1
            signal.pthread_kill(self._ident, KICK)

    def _attend(self) -> bool:
        """On the vCPU's thread, outside KVM_RUN: stand still while anybody wants it; False when it is time to end."""
        with self._change:
            while self._pauses > 0 and not self._ending:
                self._standing = True
                self._change.notify_all()
                self._change.wait()
            self._standing = False
            self._change.notify_all()
            self.vcpu.page[exits.IMMEDIATE_EXIT] = 0  # all kicks so far have been heard
            return not self._ending

    def _main(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals() - TAKEN)
        with self._change:
            self._ident = threading.get_ident()
        try:
            if self._attend():  # somebody may have wanted something before the start
                self._loop()
        except BaseException as error:  # a device's bug, be it SystemExit: the machine stops, loudly
            self._stop(Stop(Reason.ERROR, f"{type(error).__name__} in a device: {error}", cause=error))
        finally:
            with self._change:
                self._ident = 0
                self._standing = True
                self._change.notify_all()

    def _loop(self) -> None:
        fd, page, run, index = self.vcpu.fd, self.vcpu.page, self.vcpu.runner(), self.vcpu.index
        unpack_io, unpack_mmio, put_data = exits.IO.unpack_from, exits.MMIO.unpack_from, exits.DATA.pack_into
        ports, mmio, recent = self._ports, self._mmio, self.recent.append
        EXIT_IO, EXIT_MMIO, UNION, MMIO_DATA = exits.EXIT_IO, exits.EXIT_MMIO, exits.UNION, exits.MMIO_DATA
        while True:
            result = run(fd)
            if result < 0:
                if result not in AGAIN:
                    self._stop(Stop(Reason.CRASH, str(KvmError("KVM_RUN", f"vcpu {index}", -result))))
                    return
                if not self._attend():
                    return
                continue
            fields = unpack_io(page)
            reason, is_out, size, port, count, at = fields
            if reason == EXIT_IO:
                recent(fields)
                if size == count == 1:  # nearly all of them
                    if is_out:
                        ports.write(port, 1, page[at])
                    else:
                        page[at] = ports.read(port, 1)
                    continue
                for here in range(at, at + size * count, size):  # string instructions bring up to a page of elements
                    if is_out:
                        ports.write(port, size, int.from_bytes(page[here : here + size], "little"))
                    else:
                        page[here : here + size] = ports.read(port, size).to_bytes(size, "little")
            elif reason == EXIT_MMIO:
                address, data, length, is_write = fields = unpack_mmio(page, UNION)
                recent((EXIT_MMIO, *fields))
                if is_write:
                    mmio.write(address, length, data & ((1 << 8 * length) - 1))
                else:
                    put_data(page, MMIO_DATA, mmio.read(address, length))
            elif reason == exits.EXIT_INTR:
                if not self._attend():
                    return
            else:
                recent(fields)
                self._stop(self._last_exit(reason))
                return

    def _last_exit(self, reason: int) -> Stop:
        """What an exit means from which this vCPU does not come back."""
        text = exits.describe(self.vcpu.page)
        if reason == exits.EXIT_SHUTDOWN:
            return Stop(Reason.TRIPLE_FAULT, f"vcpu {self.vcpu.index}")
        if reason == exits.EXIT_HLT:  # only a machine without in-kernel interrupt controllers gets here
            return Stop(Reason.HALT, f"vcpu {self.vcpu.index}")
        if reason == exits.EXIT_SYSTEM_EVENT:
            event = exits.system_event(self.vcpu.page)
            return Stop(SYSTEM_EVENTS.get(event, Reason.CRASH), text)
        return Stop(Reason.CRASH, f"vcpu {self.vcpu.index}: {text}")
