"""What a program of this host needs to run elsewhere: its loader and its shared libraries.

The host's own loader is asked for the list, as ldd does; the program itself does not run.
"""

from __future__ import annotations

import os
import shlex
import struct
import subprocess
from pathlib import Path, PurePosixPath

from ..core.errors import ConfigError, HostError

LOADERS = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-musl-x86_64.so.1")  # glibc's and musl's; no other one is executed
TIMEOUT = 10  # seconds; the tools asked here answer in milliseconds
PATH_MAX = 4096

# System V ABI, ELF-64
IDENT = b"\x7fELF\x02\x01"  # 64-bit, little-endian
EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
EM_X86_64 = 62
PT_INTERP = 3


def loader_of(path: Path) -> str | None:
    """The program loader that an x86-64 ELF file names, "" for a static one; None for any other file."""
    try:
        with path.open("rb") as file:
            head = file.read(EHDR.size)
            if len(head) < EHDR.size or not head.startswith(IDENT):
                return None
            _, _, machine, _, _, phoff, _, _, _, phentsize, phnum, *_ = EHDR.unpack(head)
            if machine != EM_X86_64 or phentsize not in (0, PHDR.size):
                return None
            file.seek(min(phoff, 1 << 62))
            table = file.read(phnum * PHDR.size)
            for kind, _, offset, _, _, size, _, _ in PHDR.iter_unpack(table[: len(table) // PHDR.size * PHDR.size]):
                if kind == PT_INTERP:
                    file.seek(min(offset, 1 << 62))
                    return os.fsdecode(file.read(min(size, PATH_MAX)).rstrip(b"\0"))
    except OSError:
        return None
    return ""


def libraries(program: Path) -> dict[str, Path]:
    """Path in the guest -> file of the host, for all that a dynamic program needs; empty for anything else.

    All libraries go where the loader looks by default, beside its libc. Raises ConfigError when one is missing,
    HostError when the loader fails.
    """
    loader = loader_of(program)
    if not loader:
        return {}
    if loader not in LOADERS or not Path(loader).exists():
        raise ConfigError(f"{program} needs the program loader {loader}", "link it statically")
    found = {loader: loader}
    folder = PurePosixPath("/lib")
    for line in ask(loader, "--list", str(program.absolute())):
        # "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)", "/opt/x.so (0x...)", "linux-vdso.so.1 (0x...)"
        name, arrow, rest = line.strip().partition(" => ")
        path = (rest if arrow else name).rpartition(" (")[0]
        if arrow and not path.startswith("/"):
            raise ConfigError(f"{program} needs the library {name}, which is not on this host", "install it")
        if name.startswith("libc."):
            folder = PurePosixPath(path).parent
        if path.startswith("/"):
            found[name if arrow else path] = path
    return {str(folder / name): Path(path).resolve() for name, path in found.items()}


def ask(*words: str) -> list[str]:
    """The lines that a tool of the host prints; raises HostError when it fails."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=True)
    except subprocess.CalledProcessError as error:
        why = os.fsdecode(error.stderr or error.stdout).strip().splitlines() or [f"status {error.returncode}"]
        raise HostError(f"`{shlex.join(words)}` failed: {why[-1]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"`{shlex.join(words)}` failed: {error}") from None
    return os.fsdecode(done.stdout).splitlines()
