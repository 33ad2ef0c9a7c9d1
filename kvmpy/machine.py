"""A virtual machine put together, run, and taken apart: the only module that knows all the others."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import TracebackType

from .boot import cmdline, loader
from .boot.spec import BootSpec, EntryPoint, Mode
from .config import MachineConfig
from .console import BATCH, OUTPUT_LIMIT, Console, Endpoint
from .core.board import Attachable, Reason, Stop
from .core.errors import CannotRunKernels, ConfigError, ImageError, exhausted
from .core.events import EventLoop
from .core.log import log
from .core.outbox import Outbox
from .core.pure import PURE
from .core.text import printable
from .core.typed import TYPE_CHECKING, Any, Self
from .devices.acpi_ged import AcpiGed
from .devices.acpi_pm import AcpiPm
from .devices.boot_timer import BootTimer
from .devices.cmos import Cmos
from .devices.debugcon import Debugcon
from .devices.exit_port import ExitPort
from .devices.i8042 import I8042
from .devices.port92 import Port92
from .devices.postcode import PostCodes
from .devices.pvpanic import Pvpanic
from .devices.reset_control import ResetControl
from .devices.serial import Serial
from .foundation import Foundation
from .kvm.fast import FastOutbox
from .kvm.handle import Kvm, Vcpu
from .kvm.state import Regs, Sregs
from .mainboard import MainBoard
from .vcpu import VcpuThread
from .x86 import acpi, bios, cpuid, lapic, layout, longmode, mptable, msr

JOIN_SECONDS = 1.0  # for a vCPU to come back from a device, and for the host to take the last output
MAX_CAUSES = 16  # exceptions behind one another
WATCH_SECONDS = 1.0  # how often a silent machine is looked at
IDLE_SECONDS = 0.001  # of CPU time in that period: the vCPU did nothing
MP_STATE_UNINITIALIZED, MP_STATE_HALTED = 1, 3  # KVM_MP_STATE_*
RFLAGS_IF = 1 << 9
PANIC = "Kernel panic - not syncing"  # how Linux announces that it is about to reset, or to stand still
PANIC_LENGTH = 200  # characters of that line that are told: any guest can say it, and more behind it
HALTED = "System halted"  # what it says when that was asked for
ORDERLY = {Reason.POWEROFF, Reason.RESET, Reason.EXIT, Reason.HALT}

LINUX_PROTOCOLS = ("pvh", "linux64", "decompressor")
HVC = "console=hvc0"  # behind console=ttyS0: the last one is /dev/console
QUIET = ("quiet", "loglevel=1")  # with --exec, the console is for the command's output, and for panics
AGENT = "kvmpy.agent=only"  # guests/init.c, as the next one
ROOT_WORD, ROOT_TAG = "kvmpy.root=", "root"
ROOT = ROOT_WORD + ROOT_TAG

EXIT_MARKER = r"\nkvmpy-exit: ([0-9]{1,3})\r?\n\Z"  # guests/init.c

if TYPE_CHECKING:
    from pathlib import Path

    from .virtio.console import VirtioConsole

MakeEndpoint = Callable[[EventLoop, Console], Endpoint | None]


class Machine:
    """A KVM virtual machine: `with Machine(kernel=..., mem="512M") as vm:` boots it; leaving the block ends it.

    Options are those of MachineConfig.of. Attach devices of your own with `add` before the start.
    `endpoint` makes the host's end of the console; without one, output is only kept for `console`. Who has
    something else to do before the start begins a `foundation` for the same configuration; the machine closes it.
    Raises ConfigError, ImageError, NotFoundError, HostError or KvmError, before the guest's first instruction.
    """

    def __init__(
        self,
        config: MachineConfig | None = None,
        *,
        endpoint: MakeEndpoint | None = None,
        foundation: Foundation | None = None,
        **options: Any,
    ) -> None:
        self.config = config or MachineConfig.of(**options)
        self.stopped: Stop | None = None
        self.vcpus: list[VcpuThread] = []
        self.entry: EntryPoint
        self.cmdline = ""
        self.hvc: VirtioConsole | None = None  # the virtio console, where that is the kernel's
        self.started_at = 0.0  # time.monotonic() of the guest's first instruction
        self._make_endpoint = endpoint
        self._added: list[Attachable] = []
        self._stops: deque[Stop] = deque()  # requests, the first one counts; a deque, since signal handlers append
        self._stop_event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._undo = ExitStack()
        self._undo.callback(self._close_stop_event)
        self._foundation = foundation
        if foundation is not None:
            self._undo.callback(foundation.close)
        self.loop = EventLoop("io", self._loop_failed)
        self._undo.callback(self.loop.stop)
        self._console_loop = EventLoop("console", self._loop_failed)
        self.console = Console(self._console_loop, self._outbox())
        self._undo.callback(self.console.detach)  # when the loop no longer runs: callbacks go in reverse
        self._undo.callback(self._console_loop.stop)

    # Life.

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, device: Attachable) -> None:
        """Attach a device; one that is attached while the machine runs cannot add to the kernel command line."""
        if self.vcpus:
            with self.paused():
                device.attach(self.board)
        else:
            self._added.append(device)

    def start(self, lock_down: Callable[[], Callable[[str], None]] | None = None) -> None:
        """Build the machine and let it run.

        `lock_down` is called when all is opened and no thread of the machine runs yet; what it returns is called on
        each thread before it does anything, with its role: "loop" or "vcpu". See kvmpy.jail.
        """
        try:
            if self._foundation is None:
                self._foundation = Foundation(self.config)
                self._undo.callback(self._foundation.close)
            image = loader.read_image(self.config.kernel or _find_kernel())
            linux = loader.plan(image, self.config.boot).protocol in LINUX_PROTOCOLS
            self.kvm, self.memory, self.vm = self._foundation.begun()
            if linux:
                _require_ring0(self.kvm)
            self._create_devices()
            self._create_vcpus()
            self._load(image, linux)
            self._foundation.await_it()
            enter = None if lock_down is None else lock_down()
            in_loop, in_vcpu = (None, None) if enter is None else (partial(enter, "loop"), partial(enter, "vcpu"))
            self.loop.start(in_loop)
            self._console_loop.start(in_loop)
            self.board.start_loops(in_loop)
            self.started_at = time.monotonic()
            self.boot_timer.start = self.post_codes.start = time.monotonic_ns()
            for vcpu in self.vcpus:
                vcpu.start(in_vcpu)
        except BaseException as error:
            self.close()
            if (lacking := exhausted(error)) is not None:
                raise lacking from error
            raise

    def stop(self, why: Stop) -> None:
        """Ask the machine to stop; any thread and any signal handler may, and the call returns at once."""
        self._stops.append(why)
        if self._stop_event >= 0:
            os.eventfd_write(self._stop_event, 1)

    def wait(self, timeout: float | None = None) -> Stop:
        """Until the machine stops, for at most `timeout` seconds; then all vCPUs stand still for good."""
        if self.stopped is None:
            deadline = None if timeout is None else time.monotonic() + timeout
            self._await_request(deadline)
            for vcpu in self.vcpus:
                vcpu.end()
            for vcpu in self.vcpus:
                vcpu.join(JOIN_SECONDS)
            self._flush_console(deadline)
            self.stopped = self._verdict(self._why())
            self.console.finish(str(self.stopped))
        return self.stopped

    def run(self, timeout: float | None = None) -> Stop:
        """Start, wait, and say why it stopped."""
        self.start()
        return self.wait(timeout)

    def close(self) -> None:
        """End everything and give back what the host lent; safe to call twice."""
        if self.vcpus and self.stopped is None:
            self.stop(Stop(Reason.QUIT))
            self.wait()
        for stop in self._stops:
            _let_go(stop.cause)
        self._undo.close()

    def _outbox(self) -> Outbox | None:
        """The console's, watched by its loop; None: the console makes one of its own."""
        if PURE:
            return None
        outbox = FastOutbox(OUTPUT_LIMIT, BATCH)
        self._undo.callback(outbox.close)

        def look() -> None:
            os.eventfd_read(outbox.fd)
            self.console.look()

        self._console_loop.add(outbox.fd, look)
        return outbox

    # While it runs.

    @contextmanager
    def paused(self) -> Iterator[list[Vcpu]]:
        """All vCPUs standing still. Not to be used by a device on behalf of the guest: it would wait for itself."""
        self.pause()
        try:
            yield [thread.vcpu for thread in self.vcpus]
        finally:
            self.resume()

    def pause(self) -> None:
        for vcpu in self.vcpus:
            vcpu.pause()
        for vcpu in self.vcpus:
            vcpu.wait_paused()

    def resume(self) -> None:
        for vcpu in self.vcpus:
            vcpu.resume()

    def regs(self, cpu: int = 0) -> Regs:
        """The general registers of a vCPU, which stands still for a moment."""
        with self.vcpus[cpu].paused() as vcpu:
            return vcpu.regs()

    def sregs(self, cpu: int = 0) -> Sregs:
        """The segment and control registers of a vCPU."""
        with self.vcpus[cpu].paused() as vcpu:
            return vcpu.sregs()

    def power_button(self) -> None:
        """Press it; a guest with ACPI shuts itself down."""
        self.loop.call_soon(self.acpi_ged.press_power_button, owner=self.acpi_ged)

    def resize_console(self, cols: int, rows: int) -> None:
        """Tell the guest how large the terminal behind its virtio console is; any thread and any signal handler may."""
        hvc = self.hvc
        if hvc is not None:
            self.loop.call_soon(lambda: hvc.resize(cols, rows), owner=hvc)

    def wait_for_console(self, pattern: str, timeout: float = 60.0) -> str:
        """Wait for output that matches a regular expression; raises ConsoleTimeout."""
        return self.console.wait_for(pattern, timeout)

    # The steps of `start`.

    def _create_devices(self) -> None:
        """The board, the platform's devices and the user's."""
        self.board = MainBoard(self.vm, self.memory, self.loop, self.stop, pci=self.config.transport == "pci")
        self._undo.callback(self.board.close)
        self.serial = Serial(self.console, layout.PORT_COM1, layout.IRQ_COM1)
        self.acpi_ged = AcpiGed(layout.PORT_GED, layout.IRQ_GED)
        self.boot_timer = BootTimer(layout.BOOT_TIMER)
        self.post_codes = PostCodes(layout.PORT_POST)
        debug_ports = [Debugcon(self.console, port) for port in (layout.PORT_BOCHS, layout.PORT_DEBUGCON)]
        self._connect_console(debug_ports)
        if self._make_endpoint is not None:
            self.console.attach(self._make_endpoint(self._console_loop, self.console))
        devices: list[Attachable] = [
            self.serial,
            self.acpi_ged,
            self.boot_timer,
            self.post_codes,
            *debug_ports,
            AcpiPm(layout.PORT_ACPI_PM),
            Cmos(layout.PORT_CMOS),
            ExitPort(layout.PORT_EXIT),
            I8042(layout.PORT_I8042, layout.IRQ_I8042),
            Port92(layout.PORT_92),
            Pvpanic(layout.PORT_PVPANIC),
            ResetControl(layout.PORT_RESET_CONTROL),
        ]
        if self.hvc is not None:
            devices.append(self.hvc)
        devices += self._added
        if self.config.devices:
            from . import catalogue  # not needed by most

            devices += [catalogue.make(text) for text in self.config.devices]
        if self.config.root is not None:
            devices.append(_share(self.config.root, ROOT_TAG, ro=True, xattrs=False))
        devices += [_share(volume.host, tag, ro=volume.ro) for tag, volume in self.config.tagged_volumes]
        for device in devices:
            device.attach(self.board)

    def _connect_console(self, debug_ports: list[Debugcon]) -> None:
        """Output of all comes to the console; input goes to the one that the kernel has as its console."""
        if self.config.console == "virtio":
            from .virtio.console import VirtioConsole  # not needed by most

            self.hvc = VirtioConsole()
            port = self.hvc.ports[0]
            port.on_data, port.on_room = self.console.write, self.console.room
            self.console.connect(self.hvc, [self.serial, *debug_ports])
        else:
            self.console.connect(self.serial, debug_ports)
            self.serial.on_room = self.console.room

    def _create_vcpus(self) -> None:
        """All vCPUs with their CPUID and MSRs; the first one will start, the others wait for its call."""
        supported = self.kvm.supported_cpuid()
        tsc_deadline = bool(self.kvm.check("KVM_CAP_TSC_DEADLINE_TIMER"))
        for apic_id in range(self.config.cpus):
            vcpu = self.vm.create_vcpu(apic_id)
            self._undo.callback(vcpu.close)
            vcpu.set_cpuid(
                cpuid.for_vcpu(supported, apic_id, self.config.cpus, tsc_khz=vcpu.tsc_khz(), tsc_deadline=tsc_deadline)
            )
            vcpu.set_msrs(msr.BOOT)
            vcpu.set_lapic(lapic.virtual_wire(vcpu.lapic(), boot_cpu=apic_id == 0))
            thread = VcpuThread(vcpu, self.board.ports, self.board.memory_bus, self.stop, self.board.cells)
            self._undo.callback(thread.close)
            self.vcpus.append(thread)

    def _load(self, image: loader.KernelImage, linux: bool) -> None:
        """Tables and kernel into memory, the first vCPU to the kernel's entry."""
        apic_ids = range(self.config.cpus)
        self.console.patient = linux
        quiet = QUIET if self.config.exec is not None or self.config.agent else ()
        init = [*([AGENT] if self.config.agent else []), *([ROOT] if self.config.root is not None else [])]
        words = [*self.board.words, *self.config.environment, *quiet, *init]
        if cmdline.acpi_is_off(" ".join([self.config.cmdline or "", *self.config.append])):
            words += self.board.virtio_words()
        self.cmdline = cmdline.compose(
            self.config.cmdline if linux else self.config.cmdline or "",
            [*([HVC] if linux and self.hvc is not None else []), *self.config.append],
            words if linux else (),
            pci=self.board.pci is not None,
        )
        if linux and self.board.virtio_pci and (word := cmdline.pci_is_off(self.cmdline)):
            raise ConfigError(
                f"with {word} on its command line, Linux finds no device of --transport pci",
                f"leave {word} out, or use --transport mmio",
            )
        spec = BootSpec(
            ram_size=self.config.mem,
            e820=layout.e820(self.config.mem),
            cmdline=self.cmdline,
            initrd=self._initrd(image, linux),
            rsdp=acpi.write(self.memory, apic_ids, self.board.virtio_resources(), pci=self.board.pci is not None),
        )
        mptable.write(self.memory, apic_ids)
        bios.write(self.memory)
        self.entry = loader.load(image, self.memory, spec, self.config.boot)
        log.info("boot", kernel=image.path, protocol=self.entry.protocol, why=self.entry.why)
        log.info("command line", words=self.cmdline)
        vcpu = self.vcpus[0].vcpu
        sregs = vcpu.sregs()
        if self.entry.mode is Mode.REAL:
            longmode.real_mode(sregs)
        elif self.entry.mode is Mode.PROTECTED:
            longmode.protected_mode(sregs, self.memory)
        else:
            longmode.long_mode(sregs, self.memory)
        vcpu.set_sregs(sregs)
        vcpu.set_regs(Regs(rip=self.entry.rip, **self.entry.registers))

    def _initrd(self, image: loader.KernelImage, linux: bool) -> bytes:
        if self.config.exec is not None and (self.config.initrd is not None or not linux):
            raise ConfigError("--exec needs Linux and the built-in initramfs", "leave --initrd out, or --exec")
        if self.config.initrd is not None:
            from .boot import initrd

            return initrd.read(self.config.initrd, self.config.mem)
        if not linux:
            return b""
        from .boot import initramfs  # not needed by those who bring their own

        disks = [word for word in self.board.words if word.startswith(ROOT_WORD)]  # virtio/root_disk.py
        wanted = [*self.board.modules, *cmdline.root_modules(self.cmdline), *self.config.modules]
        has_root = self.config.root is not None or bool(disks)
        if has_root:
            wanted += ["overlay", *(word.rpartition(":")[2] for word in disks)]
        modules_dir: str | Path | None = self.config.modules_dir
        if modules_dir is None and wanted:
            from .boot import kernels

            modules_dir = kernels.modules_dir_for(image.path)
        if modules_dir is None:  # a kernel without modules has its drivers built in
            if self.board.modules:
                _warn_of_missing_drivers(image, self.board.modules)
            wanted = list(self.config.modules)
        return initramfs.build(
            exec=self.config.exec,
            busybox=None if has_root else "auto",
            modules=wanted,
            modules_dir=modules_dir,
            agent=self.config.agent,
            volumes=[(tag, volume.guest, volume.ro) for tag, volume in self.config.tagged_volumes],
        )

    # Endings.

    def _await_request(self, deadline: float | None) -> None:
        """Until somebody asked for a stop; asks itself at the deadline, or when all vCPUs are halted for good."""
        poll = select.poll()
        poll.register(self._stop_event, select.POLLIN)
        used = 0.0
        while not self._stops:
            left = WATCH_SECONDS if deadline is None else min(WATCH_SECONDS, deadline - time.monotonic())
            if left <= 0:
                self.stop(Stop(Reason.TIMEOUT))
            elif not poll.poll(left * 1000):
                used, before = sum(vcpu.cpu_seconds() for vcpu in self.vcpus), used
                if used - before < IDLE_SECONDS and all(_halted_for_good(vcpu) for vcpu in self.vcpus):
                    self.stop(Stop(Reason.HALT))

    def _flush_console(self, deadline: float | None) -> None:
        """Let the host take the last output: a slow reader gets all the time it needs after an orderly end, unless
        somebody asks for a stop again; else it gets a moment."""
        asked = len(self._stops)
        while not self.console.flush(JOIN_SECONDS):
            late = deadline is not None and time.monotonic() > deadline
            if self._why().reason not in ORDERLY or late or len(self._stops) > asked:
                return

    def _why(self) -> Stop:
        """The first request for a stop; but an exception of ours is told, whatever else has happened."""
        return next((stop for stop in self._stops if stop.cause is not None), self._stops[0])

    def _verdict(self, stop: Stop) -> Stop:
        """What the request means: a reset right after a panic message is a panic; a power-off right after a status on
        the console, which init writes where it may not use ports, gives that status; Linux does not halt unasked."""
        if stop.reason is Reason.POWEROFF and self.config.exec is not None:
            import re

            marker = re.search(EXIT_MARKER, self.console.text)
            if marker:
                return Stop(Reason.EXIT, f"status {marker[1]}", status=int(marker[1]))
        text = self.console.text
        if stop.reason in (Reason.RESET, Reason.HALT) and PANIC in text:
            line = text[text.rindex(PANIC) + len(PANIC) :][:PANIC_LENGTH].partition("\n")[0]
            return Stop(Reason.PANIC, printable(line).strip(": "))
        if stop.reason is Reason.HALT and self.entry.protocol in LINUX_PROTOCOLS and HALTED not in text:
            return Stop(Reason.CRASH, "the kernel gave up: every CPU is halted with interrupts off")
        return stop

    def _close_stop_event(self) -> None:
        event, self._stop_event = self._stop_event, -1
        os.close(event)

    def _loop_failed(self, error: BaseException) -> None:
        self.stop(Stop(Reason.ERROR, f"{type(error).__name__} in a device: {error}", cause=error))


def _share(folder: str, tag: str, *, ro: bool, xattrs: bool = True) -> Attachable:
    from pathlib import Path  # not needed by most

    from .virtio.fs import Fs

    return Fs(path=Path(folder), tag=tag, ro=ro, xattrs=xattrs)


def _require_ring0(kvm: Kvm) -> None:
    from .kvm.probe import runs_ring0_natively  # tiny guests get along without

    if not runs_ring0_natively(kvm):
        raise CannotRunKernels()


def _let_go(error: BaseException | None) -> None:
    """Have frames that an exception has left forget what they had in hand: with guest memory among it, that could not
    be unmapped."""
    for _ in range(MAX_CAUSES):
        trace = error.__traceback__ if error is not None else None
        while trace is not None:
            with suppress(RuntimeError):  # it still runs
                trace.tb_frame.clear()
            trace = trace.tb_next
        error = error and (error.__cause__ or error.__context__)


def _find_kernel() -> str:
    from .boot import kernels  # not needed by those who name one

    return str(kernels.find_kernel())


def _halted_for_good(thread: VcpuThread) -> bool:
    """Whether the vCPU waits in HLT with interrupts off, or was never started: nothing inside the guest can wake it."""
    with thread.paused() as vcpu:
        state = vcpu.mp_state()
        if state == MP_STATE_UNINITIALIZED:
            return True
        return state == MP_STATE_HALTED and not vcpu.regs().rflags & RFLAGS_IF


def _warn_of_missing_drivers(image: loader.KernelImage, wanted: list[str]) -> None:
    """Say which drivers of virtio devices the kernel does not have, where that can be told."""
    from .boot import modules

    try:
        missing = modules.not_built_in(image.elf.data, wanted)
    except ImageError:
        return
    if missing:
        from .boot import kernels

        folders = kernels.modules_dirs(image.path)
        none = f"there is no {' or '.join(map(str, folders))}" if folders else "it tells no version to find modules by"
        log.warning(
            f"kernel {image.path} has no {', '.join(missing)} built in, and {none}; "
            "give the folder of its modules with --modules-dir, or an --initrd that has them"
        )
