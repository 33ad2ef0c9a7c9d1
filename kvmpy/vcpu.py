"""One thread for each vCPU: run the guest, hand what it touches to the buses, stop when told.

The loop is the whole conversation between a virtual CPU and the machine: KVM_RUN returns, the exit is looked up,
a device answers, and round again. Other threads talk to it through `pause`, `resume` and `end` alone.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .core.board import Reason, Stop
from .core.bus import Bus
from .core.errors import KvmError
from .core.pure import PURE
from .core.signals import signal
from .kvm import exits, fast
from .kvm.exits import Exit
from .kvm.handle import Vcpu, prepare_kick

KICK = signal.SIGRTMIN
SYSTEM_EVENTS = {"shutdown": Reason.POWEROFF, "reset": Reason.RESET, "crash": Reason.PANIC}
AGAIN = (-errno.EINTR, -errno.EAGAIN)  # EAGAIN: a CPU that waited for its start-up interrupt was woken
# What a vCPU's thread takes: all else is for Python's main thread. Faults are its own; blocked, they kill unreported.
TAKEN = {KICK, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}


class VcpuThread:
    """Runs `vcpu` until `end`, or until an exit after which it cannot go on; that is told to `stop`.

    Without `cells`, or with KVMPY_PURE=1, every exit is looked at in Python.
    """

    def __init__(
        self, vcpu: Vcpu, ports: Bus, mmio: Bus, stop: Callable[[Stop], None], cells: fast.Cells | None = None
    ) -> None:
        self.vcpu = vcpu
        self._fast = None if cells is None or PURE else fast.Runner(vcpu, cells)
        self._recent: deque[Exit] = deque(maxlen=fast.RECENT)
        self._ports = ports
        self._mmio = mmio
        self._stop = stop
        self._change = threading.Condition()
        self._pauses = 0  # how many callers want the vCPU to stand still
        self._ending = False
        self._ident = 0  # of the thread while it can be signalled
        self._prepare: Callable[[], None] | None = None
        self._standing = True  # not in KVM_RUN, nor in a device on behalf of the guest
        self._thread = threading.Thread(target=self._main, name=f"kvmpy-vcpu{vcpu.index}", daemon=True)

    def start(self, prepare: Callable[[], None] | None = None) -> None:
        """Begin; the thread calls `prepare` before the guest runs."""
        self._prepare = prepare
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

    def recent(self) -> list[Exit]:
        """The last exits, the latest last; for a vCPU that stands still, or whose exits need not be whole."""
        return self._fast.recent() if self._fast is not None else list(self._recent.copy())

    def close(self) -> None:
        """Let go of the vCPU's kvm_run page; behind `join`, and before the vCPU is closed."""
        if self._fast is not None:
            self._fast.close()

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
            if self._prepare is not None:
                self._prepare()
            if self._attend():  # somebody may have wanted something before the start
                self._loop() if self._fast is None else self._fast_loop(self._fast)
        except BaseException as error:  # a device's bug, be it SystemExit: the machine stops, loudly
            self._stop(Stop(Reason.ERROR, f"{type(error).__name__} in a device: {error}", cause=error))
        finally:
            with self._change:
                self._ident = 0
                self._standing = True
                self._change.notify_all()

    def _loop(self) -> None:
        """The reference: what `_fast_loop` does with the shim's help, in Python alone."""
        fd, page, run = self.vcpu.fd, self.vcpu.page, self.vcpu.runner()
        while True:
            result = run(fd)
            if result < 0:
                if not self._interrupted(result):
                    return
                continue
            self._recent.append(exits.summary(page))
            if not self._handle():
                return

    def _fast_loop(self, runner: fast.Runner) -> None:
        """The shim has decoded the exit and answered those that need no decision: see kvm/fast.py."""
        fd, run, cpu = self.vcpu.fd, runner.run, runner.cpu
        ports, mmio, slots = self._ports, self._mmio, self._ports.slots
        OTHER, WRITE, MMIO = fast.OTHER, fast.WRITE, fast.MMIO
        answer = 0
        while True:
            access = run(fd, cpu, answer)
            if access < 0:
                if not self._interrupted(access):
                    return
            elif access < WRITE:
                slot = slots.get(access)
                if slot is not None:
                    read, _, lock, mask = slot
                    if lock is None:
                        answer = read() & mask
                    else:
                        with lock:
                            answer = read() & mask
                else:
                    bus = mmio if access & MMIO else ports
                    answer = bus.read((access & ~MMIO) >> fast.ADDRESS_SHIFT, access & fast.SIZE)
            elif access < OTHER:
                slot = slots.get(access ^ WRITE)
                if slot is not None:
                    _, write, lock, _ = slot
                    if lock is None:
                        write(cpu.data)
                    else:
                        with lock:
                            write(cpu.data)
                else:
                    bus = mmio if access & MMIO else ports
                    bus.write((access & ~(MMIO | WRITE)) >> fast.ADDRESS_SHIFT, access & fast.SIZE, cpu.data)
            elif not self._handle():
                return

    def _interrupted(self, result: int) -> bool:
        """KVM_RUN has failed, which is how it ends when somebody wants something; False when it is time to end."""
        if result in AGAIN:
            return self._attend()
        self._stop(Stop(Reason.CRASH, str(KvmError("KVM_RUN", f"vcpu {self.vcpu.index}", -result))))
        return False

    def _handle(self) -> bool:
        """Do what the exit in the kvm_run page asks for; False when it was the vCPU's last one."""
        page = self.vcpu.page
        reason, is_out, size, port, count, at = exits.IO.unpack_from(page)
        if reason == exits.EXIT_IO:
            for here in range(at, at + size * count, size):  # string instructions bring up to a page of elements
                if is_out:
                    self._ports.write(port, size, int.from_bytes(page[here : here + size], "little"))
                else:
                    page[here : here + size] = self._ports.read(port, size).to_bytes(size, "little")
            return True
        if reason == exits.EXIT_MMIO:
            address, data, length, is_write = exits.MMIO.unpack_from(page, exits.UNION)
            if is_write:
                self._mmio.write(address, length, data & ((1 << 8 * length) - 1))
            else:
                exits.DATA.pack_into(page, exits.MMIO_DATA, self._mmio.read(address, length))
            return True
        if reason == exits.EXIT_INTR:
            return self._attend()
        self._stop(self._last_exit(reason))
        return False

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
