"""Tell how a kernel image can be booted, and what it needs.

Without KERNEL, the one that `kvmpy boot` would take. Exit status: 125 when `kvmpy boot` could not start it.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from ..boot import image, kernels, loader
from ..core.text import printable
from ..kvm.handle import explain_bus_errors

WIDTH = 100
# What it means for a guest of kvmpy when the kernel was built without an option.
NEEDED = {
    "64BIT": "a 32-bit kernel: no 64-bit programs, and some 4 GiB of memory at most",
    "SERIAL_8250_CONSOLE": "no console: its output cannot be seen",
    "BLK_DEV_INITRD": "it takes no initrd, nor the built-in initramfs",
    "SMP": "it uses one CPU only",
    "ACPI": "it finds further CPUs by X86_MPPARSE only, and does not power off",
    "DEVTMPFS": "/dev holds what the initrd brings, no more",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kernel", nargs="?", metavar="KERNEL", help="bzImage, ELF vmlinux, multiboot or flat image")
    parser.add_argument("--json", action="store_true", help="print all that is known as JSON")


def run(args: argparse.Namespace) -> int:
    explain_bus_errors()
    kernel = loader.read_image(kernels.find_kernel() if args.kernel is None else args.kernel)
    description = image.describe(kernel)
    print(json.dumps(description, indent=2) if args.json else "\n".join(render(description)))
    if description["auto"]["protocol"] is None:
        loader.plan(kernel)  # raises the error that `kvmpy boot` would
    return 0


def render(description: dict[str, Any]) -> Iterator[str]:
    """The description for people; names and sizes in it come from the image, so they may be anything."""
    yield f"{printable(description['file'])}, {_size(description['size'])}"
    yield from (f"  {line}" for line in _identity(description))
    yield ""
    auto = description["auto"]
    yield "Boot protocols"
    for protocol, state in description["boot"].items():
        entry = description["entries"].get(protocol)
        where = f", entered at {entry:#x}" if entry is not None and state == "yes" else ""
        yield f"  {protocol:<13} {'yes' + where if state == 'yes' else 'no: ' + printable(state)}"
    yield from _wrapped("auto", f"{auto['protocol'] or 'none'}: {printable(auto['why'])}")
    if needs := list(_needs(description)):
        yield from ["", "Limits", *needs]
    if description["config"]:
        yield from ["", *_options(description["config"])]


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"  {name:<13} ", subsequent_indent=" " * 16)


def _identity(description: dict[str, Any]) -> Iterator[str]:
    if description["version"]:
        yield f"Linux {printable(description['version'])}"
    parts = [description["format"]]
    if description["container"]:
        parts.append(f"in a {description['container']} file")
    if description["setup"]:
        parts.append(f"setup header {description['setup']['protocol']}")
    if payload := description["payload"]:
        size = f" to {_size(payload['size'])}" if payload["size"] else ""
        parts.append(f"payload {payload['compression'] or 'of unknown format'}, {_size(payload['compressed'])}{size}")
    yield ", ".join(parts)


def _needs(description: dict[str, Any]) -> Iterator[str]:
    if description["cmdline_limit"]:
        yield from _wrapped("command line", f"{description['cmdline_limit']} bytes")
    if description["min_memory"]:
        yield from _wrapped("memory", f"{_size(description['min_memory'])} for the kernel alone")
    if description["setup"]:
        yield from _wrapped("initrd", f"below {description['setup']['initrd_addr_max'] + 1:#x}")
    if description["kaslr"]:
        how = "done by its decompressor (--boot decompressor)" if description["kaslr"]["relocations"] else "no"
        yield from _wrapped("KASLR", how)


def _options(config: dict[str, Any]) -> Iterator[str]:
    """Options grouped by value, and what follows from those that are missing."""
    options: dict[str, str | None] = config["options"]
    yield f"Options ({printable(config['source'])})"
    groups = {
        "built in": [name for name, value in options.items() if value == "y"],
        "modules": [name for name, value in options.items() if value == "m"],
        "not set": [name for name, value in options.items() if value is None],
    }
    groups["others"] = [f"{name}={value}" for name, value in options.items() if value not in ("y", "m", None)]
    for title, names in groups.items():
        if names:
            yield from _wrapped(title, printable(" ".join(names)))
    for name, consequence in NEEDED.items():
        if name in options and options[name] is None:
            yield f"  -> without {name}: {consequence}"
    if groups["modules"]:
        yield "  -> modules must be in the initrd: `kvmpy initrd --module NAME`"


def _size(count: int) -> str:
    """Bytes as people read them."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count} bytes"
