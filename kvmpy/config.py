"""What the user wants a machine to be: checked values, no file opened."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath

from .core.errors import ConfigError
from .core.record import Record
from .core.units import is_decimal, parse_size
from .x86 import layout

MIN_MEMORY = layout.MIB
CONSOLES = ("serial", "virtio")
TRANSPORTS = ("mmio", "pci")  # of virtio devices
MAX_CPUS = 4096  # a mistake in --cpus ends here; KVM's own limit, asked later, is often lower


def parse_count(text: str | int, name: str, limit: int) -> int:
    """A whole number from 1 to `limit`; raises ConfigError that names the option."""
    if not is_decimal(str(text), 9) or not 1 <= int(text) <= limit:
        raise ConfigError(f'invalid {name} "{text}"', f"use a whole number from 1 to {limit}")
    return int(text)


class Volume(Record, frozen=True):
    """A folder of the host that the guest has as a folder of its own: `HOST:GUEST[:ro]`."""

    host: str
    guest: str
    ro: bool = False

    @classmethod
    def of(cls, text: str) -> Volume:
        """Check and take apart what a person wrote; raises ConfigError."""
        place, _, how = text.rpartition(":")
        if how not in ("ro", "rw"):
            place, how = text, "rw"
        host, _, guest = place.rpartition(":/")
        parts = [part for part in guest.split("/") if part not in ("", ".")]
        if not host or not parts or ".." in parts or ":" in guest or "\0" in text:
            raise ConfigError(f'invalid volume "{text}"', "use HOST:GUEST[:ro], GUEST being an absolute path")
        return cls(host, "/" + "/".join(parts), how == "ro")

    def __str__(self) -> str:
        return f"{self.host}:{self.guest}{':ro' if self.ro else ''}"


class MachineConfig(Record, frozen=True):
    """A machine, as the user describes it. Values may be given as text, as on the command line.

    kernel   path of the image; None: the newest one that is found
    initrd   paths, concatenated in order; None: the built-in initramfs, or none where the protocol has no use for it
    mem      RAM in bytes, or text with a unit (`512M`); a bare number in text counts MiB
    cpus     number of vCPUs
    cmdline  the whole kernel command line instead of the default one
    append   words behind it
    boot     protocol, or "auto"
    exec     a shell command for the built-in initramfs to run instead of a shell
    modules  kernel modules for the built-in initramfs to load, besides those for the devices
    modules_dir  where the kernel's modules are; None: beside it, or in /lib/modules
    devices  devices besides those that every machine has, as for --device (catalogue.py)
    volumes  folders of the host, `HOST:GUEST[:ro]`, which the built-in initramfs mounts
    environment  NAME=VALUE words for the shell of the built-in initramfs
    console  what the kernel's console is: "serial" (ttyS0), or "virtio" (hvc0), which starts when its driver does
    transport  how virtio devices are connected: "mmio", or "pci" with MSI-X
    agent    the built-in initramfs runs the agent (kvmpy.guest) and nothing else
    root     a folder of the host that it makes the guest's root, read-only with a tmpfs above it for what is written
    """

    kernel: str | None = None
    initrd: tuple[str, ...] | None = None
    mem: int = 512 * layout.MIB
    cpus: int = 1
    cmdline: str | None = None
    append: tuple[str, ...] = ()
    boot: str = "auto"
    exec: str | None = None
    modules: tuple[str, ...] = ()
    modules_dir: str | None = None
    devices: tuple[str, ...] = ()
    volumes: tuple[Volume, ...] = ()
    environment: tuple[str, ...] = ()
    console: str = "serial"
    transport: str = "mmio"
    agent: bool = False
    root: str | None = None

    @property
    def tagged_volumes(self) -> list[tuple[str, Volume]]:
        """The volumes with the tags of their virtio-fs devices: volume0, volume1, ..."""
        return [(f"volume{n}", volume) for n, volume in enumerate(self.volumes)]

    @classmethod
    def of(
        cls,
        kernel: str | PathLike[str] | None = None,
        initrd: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
        mem: str | int = "512M",
        cpus: str | int = 1,
        cmdline: str | None = None,
        append: str | Sequence[str] = (),
        boot: str = "auto",
        exec: str | None = None,
        modules: Sequence[str] = (),
        modules_dir: str | PathLike[str] | None = None,
        devices: Sequence[str] = (),
        volumes: Sequence[str] = (),
        environment: Sequence[str] = (),
        console: str = "serial",
        transport: str = "mmio",
        agent: bool = False,
        root: str | PathLike[str] | None = None,
    ) -> MachineConfig:
        """Check and convert what a person wrote; an int for `mem` counts MiB too. Raises ConfigError."""
        size = parse_size(mem)
        if not MIN_MEMORY <= size <= layout.MAX_RAM:
            raise ConfigError(f'invalid size "{mem}"', f"a machine has 1M to {layout.MAX_RAM >> 30}G of memory")
        if size % layout.PAGE:
            raise ConfigError(f'invalid size "{mem}"', "memory comes in whole pages of 4K")
        if console not in CONSOLES:
            raise ConfigError(f'invalid console "{console}"', f"use {' or '.join(CONSOLES)}")
        if transport not in TRANSPORTS:
            raise ConfigError(f'invalid transport "{transport}"', f"use {' or '.join(TRANSPORTS)}")
        if isinstance(initrd, (str, PathLike)):
            initrd = [initrd]
        return cls(
            kernel=None if kernel is None else fspath(kernel),
            initrd=None if initrd is None else tuple(fspath(path) for path in initrd),
            mem=size,
            cpus=parse_count(cpus, "number of CPUs", MAX_CPUS),
            cmdline=cmdline,
            append=(append,) if isinstance(append, str) else tuple(append),
            boot=boot,
            exec=exec,
            modules=tuple(modules),
            modules_dir=None if modules_dir is None else fspath(modules_dir),
            devices=tuple(devices),
            volumes=tuple(map(Volume.of, volumes)),
            environment=tuple(environment),
            console=console,
            transport=transport,
            agent=agent,
            root=None if root is None else fspath(root),
        )
