"""What a guest's kernel has said in distress: oopses, bugs, warnings and panics, found in the text of its console."""

from __future__ import annotations

import re

# Linux: arch/x86/kernel/{dumpstack,traps}.c, arch/x86/mm/fault.c, lib/bug.c, kernel/{panic,watchdog,hung_task}.c
BEGIN = re.compile(
    r"BUG: |\bOops: |general protection fault|kernel BUG at |Kernel panic - |WARNING: CPU: |invalid opcode: |"
    r"INFO: task .{1,40} blocked for more"
)
END = "---[ end "  # of a trace, and of a panic
MAX_LINES = 100


def oops(text: str) -> str:
    """Such messages with all that belongs to them, the first ones first, at most 100 lines; "" if there are none."""
    found: list[str] = []
    inside = False
    for line in text.splitlines():
        inside = inside or BEGIN.search(line) is not None
        if inside:
            found.append(line)
        if END in line:
            inside = False
    return "\n".join(found[:MAX_LINES])
