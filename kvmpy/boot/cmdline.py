"""Builds and checks the kernel command line."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..core.errors import ConfigError

LINUX_LIMIT = 2047  # COMMAND_LINE_SIZE - 1 on x86, for kernels that do not say (arch/x86/include/asm/setup.h)
OLD_LIMIT = 255  # before boot protocol 2.06 (Documentation/arch/x86/boot.rst, cmdline_size)

# Both save the early quirks' walk over bus 0 through ports that are not there, a few hundred accesses.
NO_PCI = "pci=off"  # there is no bus
PCI = "pci=noearly"  # there is one, which is found later: ACPI tells where its memory-mapped configuration is

# Values of pci= that leave Linux without this machine's bus, or its functions without interrupts: they have messages,
# no pins (arch/x86/pci/common.c, pcibios_setup; drivers/pci/pci.c, pci_setup).
PCI_OFF = {"off", "noacpi", "nommconf", "conf1", "conf2", "nomsi"}
NO_LOCAL_APIC = ("nolapic", "disableapic")

# What a guest of this machine is told unless --cmdline replaces it (Documentation/admin-guide/kernel-parameters).
DEFAULT = (
    "console=ttyS0,115200",  # the only console; time-outs of the tty layer grow with 1/baud, and 9600 is the default
    "reboot=k",  # reset through the keyboard controller's port: works without ACPI as well
    "panic=-1",  # a panic reboots at once instead of waiting for ever, so that the machine stops
    NO_PCI,
    "i8042.noaux",  # no mouse: kernels that cannot learn it from ACPI otherwise wait half a second for one
    "i8042.nokbd",  # nor a keyboard
    "no_timer_check",  # the timer works; kernels without KVM_GUEST otherwise count ten ticks to see that
    "8250.nr_uarts=1",  # do not probe for COM2 to COM4
    "random.trust_cpu=on",  # RDRAND seeds the random numbers: an idle guest has no other entropy to wait for
)


def compose(base: str | None, appends: Sequence[str] = (), extra: Sequence[str] = (), *, pci: bool = False) -> str:
    """The command line: `extra` (what devices ask for), then `base` or the defaults, then `appends`.

    The defaults turn PCI off unless the machine has it.
    Of a word given twice the kernel takes the last, and words after `--` go to init: so the user's come last.
    Raises ConfigError for what cannot be in a command line.
    """
    default = " ".join(PCI if pci and word == NO_PCI else word for word in DEFAULT)
    line = " ".join(filter(None, [*extra, default if base is None else base, *appends]))
    _bytes(line)
    return line


def acpi_is_off(line: str) -> bool:
    """Whether the words of `line` tell Linux not to use ACPI."""
    said = [word for word in _kernel_words(line) if word in ("acpi=off", "acpi=on", "acpi=force")]
    return said[-1:] == ["acpi=off"]


def pci_is_off(line: str) -> str:
    """The word of `line` for which Linux can use no function of this machine's PCI bus; "" when there is none."""
    if acpi_is_off(line):
        return "acpi=off"
    for word in _kernel_words(line):
        name, _, value = word.partition("=")
        if word in NO_LOCAL_APIC or (name == "pci" and PCI_OFF & set(value.split(","))):
            return word
    return ""


def root_modules(line: str) -> list[str]:
    """The driver of the file system that root= is on: rootfstype= names it, ext4 is the usual one."""
    words = _kernel_words(line)
    if not any(word.startswith("root=") for word in words):
        return []
    types = [word.removeprefix("rootfstype=") for word in words if word.startswith("rootfstype=")]
    return types[-1:] or ["ext4"]


def encode(line: str, limit: int) -> bytes:
    """`line` as the kernel gets it, without the NUL; raises ConfigError over `limit` bytes or for bad characters."""
    data = _bytes(line)
    if len(data) > limit:
        raise ConfigError(
            f"the command line has {len(data)} bytes, this kernel takes {limit}",
            f"make --cmdline/--append shorter by {len(data) - limit}",
        )
    return data


def _bytes(line: str) -> bytes:
    for character, name in (("\0", "NUL"), ("\n", "newline"), ("\r", "carriage return")):
        if character in line:
            before = line[: line.index(character)][-20:]
            raise ConfigError(f"the command line has a {name} after {before!r}", "take it out of --cmdline/--append")
    try:
        return os.fsencode(line)
    except UnicodeEncodeError as error:
        bad = line[error.start]
        raise ConfigError(f"the command line has {bad!r}, which is no character", "give it as UTF-8") from None


def _kernel_words(line: str) -> list[str]:
    """The words that are for the kernel: those behind `--` are for init."""
    words = line.split()
    return words[: words.index("--")] if "--" in words else words
