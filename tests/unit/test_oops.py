"""What a kernel says in distress, found among all else."""

from __future__ import annotations

import pytest

from kvmpy.oops import MAX_LINES, oops

TRACE = """\
[    1.0] BUG: kernel NULL pointer dereference, address: 0000000000000008
[    1.0] Oops: 0002 [#1] PREEMPT SMP NOPTI
[    1.0] RIP: 0010:sysrq_handle_crash+0x16/0x20
[    1.0] ---[ end trace 0000000000000000 ]---"""
PANIC = """\
Kernel panic - not syncing: sysrq triggered crash
CPU: 0 PID: 80 Comm: sh Not tainted
---[ end Kernel panic - not syncing: sysrq triggered crash ]---"""


@pytest.mark.parametrize("text", ["", "all is well\nEXT4-fs (vda): mounted\n"])
def test_nothing_has_happened(text: str) -> None:
    assert oops(text) == ""


def test_found_with_all_that_belongs_to_it() -> None:
    assert oops(f"before\n{TRACE}\nbetween\n{PANIC}\nafter\n") == f"{TRACE}\n{PANIC}"


def test_one_that_ends_with_the_machine() -> None:
    assert oops("before\n" + PANIC.rpartition("\n")[0]) == PANIC.rpartition("\n")[0]


def test_no_more_than_is_of_use() -> None:
    assert len(oops("BUG: x\n" * 10_000).splitlines()) == MAX_LINES
