"""The machine that the options of `kvmpy boot` and the file of --config describe together.

The file is YAML. Its keys are the names of options, plural where there can be several, and every value means what it
means on the command line, where paths begin at the current folder. What is given as an option replaces what the file
says, or adds to its list.

    kernel: bzImage
    mem: 1G
    disks:
      - root.img
      - {path: data.qcow2, format: qcow2, ro: on}
    nets: [user]
    publish: [8080:80]
    volumes: [src:/mnt/src:ro]
    devices:
      - virtio-rng
      - virtio-balloon: {target: 64M}
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from ..boot import files
from ..config import MachineConfig
from ..core.errors import ConfigError, NotFoundError
from ..core.typed import Any
from .options import Option

MAX_FILE = 1 << 16
SERIAL = "stdio, null, pty, file=PATH or unix=PATH"
DISK, NET = "virtio-blk", "virtio-net"
LISTS = ("initrd", "append", "modules", "disks", "nets", "publish", "volumes", "devices")
KEYS = (
    *("kernel", "initrd", "mem", "cpus", "cmdline", "append", "boot", "exec", "modules", "modules_dir"),
    *("console", "transport", "disks", "nets", "publish", "volumes", "devices", "serial", "timeout"),
)

Told = dict[str, Any]  # by key: text, or for LISTS a list of it; nothing for what nobody has said


# What describes a machine.
OPTIONS = (
    Option(("image",), "kernel image, as with --kernel", "KERNEL"),
    Option(("--config",), "options from a YAML file (`kvmpy config` prints one)", "FILE"),
    Option(("-k", "--kernel"), "bzImage, ELF vmlinux, multiboot or flat image", "FILE"),
    Option(("-i", "--initrd"), "initial RAM disk; several are concatenated", "FILE", many=True),
    Option(("-m", "--mem"), "memory, e.g. 512M or 2G; no suffix: MiB (default 512M)", "SIZE"),
    Option(("-c", "--cpus"), "number of virtual CPUs (default 1)", "N"),
    Option(("--cmdline",), "the kernel's command line, instead of the default one", "WORDS"),
    Option(("--append", "--params"), "words behind the command line", "WORDS", many=True),
    Option(("--boot",), "auto (default), pvh, linux64, decompressor, multiboot or flat", "PROTOCOL"),
    Option(("--exec",), "shell command, or file with a script, for the built-in initramfs to run", "CMD"),
    Option(("--modules-dir",), "the kernel's modules, for the built-in initramfs (default: beside it)", "DIR"),
    Option(("--console",), "the kernel's console: serial (default) or virtio (hvc0)", "KIND"),
    Option(("--transport",), "how virtio devices are connected: mmio (default) or pci", "BUS"),
    Option(("-d", "--disk"), "a disk: virtio-blk,path=FILE,...", "FILE[,OPTION=...]", "disks", many=True),
    Option(("-n", "--net"), "a network: user, tap=NAME, socket=PATH", "KIND[,OPTION=...]", "nets", many=True),
    Option(("--publish",), "a port of a --net user", "[IP:]HOST:GUEST[/udp]", many=True),
    Option(("--volume",), "a folder of the host in the guest", "HOST:GUEST[:ro]", "volumes", many=True),
    Option(("--device",), "a device, or FILE.py:CLASS of your own", "NAME[,OPTION=...]", "devices", many=True),
    Option(("--serial",), f"where the console ends: {SERIAL} (default stdio)", "WHERE"),
    Option(("--timeout",), "stop after S seconds, with status 124", "S"),
)


def of(args: SimpleNamespace) -> Told:
    """What options and file say together; raises ConfigError and NotFoundError."""
    if args.image and args.kernel:
        raise ConfigError("two kernels are given", "name one, with or without --kernel")
    given = {key: value for key in KEYS if (value := getattr(args, key, None)) is not None}
    if args.image:
        given["kernel"] = args.image
    for key, short in (("disks", short_disk), ("nets", short_net)):
        if key in given:
            given[key] = [short(text) for text in given[key]]
    told: Told = {} if args.config is None else read(args.config)
    for key, value in given.items():
        adds = key in LISTS and key != "initrd"
        told[key] = [*told.get(key, ()), *value] if adds else value
    return told


def machine_config(told: Told, environment: Sequence[str] = ()) -> MachineConfig:
    """The MachineConfig of what is told; raises ConfigError."""
    passed = (
        *("kernel", "initrd", "mem", "cpus", "cmdline", "boot", "modules", "modules_dir", "console", "transport"),
        "volumes",
    )
    return MachineConfig.of(
        **{key: told[key] for key in passed if key in told},
        append=[*root_words(told), *told.get("append", ())],
        exec=command(told.get("exec")),
        environment=environment,
        devices=devices(told),
    )


def root_words(told: Told) -> list[str]:
    """The first disk is where Linux goes on from, unless the user says otherwise."""
    otherwise = "cmdline" in told or "exec" in told or any("root=" in words for words in told.get("append", ()))
    return ["root=/dev/vda rw"] if told.get("disks") and not otherwise else []


def devices(told: Told) -> list[str]:
    """All devices as --device has them, disks first."""
    nets, published = list(told.get("nets", ())), told.get("publish")
    if published:
        user = f"{NET},backend=user"
        at = next((n for n, net in enumerate(nets) if f"{net},".startswith(f"{user},")), None)
        if at is None:
            nets, at = [user, *nets], 0
        nets[at] = f"{user},publish={'+'.join(published)}{nets[at].removeprefix(user)}"
    return [*told.get("disks", ()), *nets, *told.get("devices", ())]


def short_disk(text: str) -> str:
    """What --disk stands for."""
    return f"{DISK},path={text}"


def short_net(text: str) -> str:
    """What --net stands for."""
    kind, comma, options = text.partition(",")
    kind, _, value = kind.partition("=")
    place = f",{'name' if kind == 'tap' else 'path'}={value}" if value else ""
    return f"{NET},backend={kind}{place}{comma}{options}"


def command(text: str | None) -> str | None:
    """What --exec means: the command itself, or the script in the file of that name."""
    if text is None:
        return None
    from ..boot.initramfs import read_command

    return read_command(text)


def parse_serial(text: str) -> tuple[str, str | None]:
    """The kind and path in a value of --serial; raises ConfigError."""
    kind, equals, path = text.partition("=")
    if kind in ("stdio", "null", "pty") and not equals:
        return kind, None
    if kind in ("file", "unix") and path:
        return kind, path
    raise ConfigError(f'invalid console "{text}"', f"use {SERIAL}")


# The file.


def read(path: str) -> Told:
    """What the file at `path` says; raises ConfigError, NotFoundError or HostError."""
    import yaml  # 20 ms, for those who use it

    class Loader(yaml.BaseLoader):
        """All values as text: 22:22 is a port of ours for one of the guest's, and no number in base 60."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue  # refused below
                if key.value in names:
                    raise ConfigError(
                        f"{path}, line {node.start_mark.line + 1}: {key.value!r} is there twice", "keep one"
                    )
                names.add(key.value)
            return super().construct_mapping(node, deep)

    text = bytes(files.read(path, "configuration", MAX_FILE, "describe a machine"))
    try:
        content = yaml.load(text, Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or "it cannot be read"
        raise ConfigError(f"{path}{where} is no YAML: {why}", "mend the file") from None
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no configuration", f"write keys with values, e.g. {KEYS[0]}: FILE")
    unknown = next((key for key in content if key not in KEYS), None)
    if unknown is not None:
        raise ConfigError(f"{path}: unknown key {unknown!r}", f"the keys are {', '.join(KEYS)}")
    return {key: _value(f"{path}: {key}", key, value) for key, value in content.items()}


def _value(where: str, key: str, value: object) -> str | list[str]:
    if key not in LISTS:
        return _text(where, value)
    items = value if isinstance(value, list) else [value]
    if key == "disks":
        return [
            _device(where, DISK, item) if isinstance(item, dict) else short_disk(_text(where, item)) for item in items
        ]
    if key == "nets":
        user = {"backend": "user"}
        return [
            _device(where, NET, user | item) if isinstance(item, dict) else short_net(_text(where, item))
            for item in items
        ]
    if key == "devices":
        return [_named(where, item) if isinstance(item, dict) else _text(where, item) for item in items]
    return [_text(where, item) for item in items]


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {type(value).__name__} instead of a text", "give one text, or a list of such")
    if not value:
        raise ConfigError(f"{where} has no value", "give one, or leave the key out")
    return value


def _named(where: str, item: dict[str, Any]) -> str:
    """A device that is told as its name with a mapping of options."""
    if len(item) != 1:
        raise ConfigError(f"{where}: a device with {len(item)} names", "write e.g. - virtio-balloon: {target: 64M}")
    ((name, options),) = item.items()
    if not isinstance(options or {}, dict):
        raise ConfigError(f"{where}: the options of {name} are no mapping", f"write {name}: {{OPTION: VALUE}}")
    return _device(where, name, options or {})


def _device(where: str, name: str, options: dict[str, Any]) -> str:
    """A device as --device has it; several values of an option are joined as --publish needs it."""
    words = [name]
    for key, value in options.items():
        text = "+".join(_text(f"{where}: {name}: {key}", part) for part in value) if isinstance(value, list) else value
        words.append(f"{key}={_text(f'{where}: {name}: {key}', text)}")
    return ",".join(word.replace(",", ",,") for word in words)


def dump(told: Told) -> str:
    """The machine as YAML that `read` takes, with defaults and all that short forms stand for; raises ConfigError."""
    import yaml

    from .. import catalogue
    from ..boot import kernels

    config = machine_config(told)
    kernel = config.kernel
    if kernel is None:
        try:
            kernel = str(kernels.find_kernel())
        except NotFoundError:
            kernel = None
    found: dict[str, Any] = {
        "kernel": kernel,
        "initrd": None if config.initrd is None else list(config.initrd),
        "mem": _size(config.mem),
        "cpus": config.cpus,
        "cmdline": config.cmdline,
        "append": list(config.append),
        "boot": config.boot,
        "exec": config.exec,
        "modules": list(config.modules),
        "modules_dir": config.modules_dir,
        "console": config.console,
        "transport": config.transport,
        "volumes": [str(volume) for volume in config.volumes],
        "devices": [catalogue.plain(text) for text in config.devices],
        "serial": told.get("serial", "stdio"),
        "timeout": told.get("timeout"),
    }
    said = {key: value for key, value in found.items() if value is not None and (value != [] or key == "initrd")}
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=120)


def _size(size: int) -> str:
    """`size` with the largest unit that keeps it whole."""
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return f"{size}B"
