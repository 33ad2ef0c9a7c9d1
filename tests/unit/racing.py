"""Another CPU that changes memory while a device works, at every moment there is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import kvmpy

PACKAGE = str(Path(kvmpy.__file__).parent)
MOST = 20_000  # bytecodes of one request


def at_moment(moment: int, act: Callable[[], None], change: Callable[[], None], part: str = "") -> bool:
    """Do `act`, and `change` before the bytecode number `moment` that it runs in those files of kvmpy whose path
    contains `part`; False when it ran fewer."""
    seen = 0

    def step(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen
        if event == "opcode":
            if seen == moment:
                change()
            seen += 1
        return step

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not (name.startswith(PACKAGE) and part in name):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        act()
    finally:
        sys.settrace(before)
    return seen > moment


def every_moment(
    prepare: Callable[[], None], act: Callable[[], None], change: Callable[[], None], part: str = ""
) -> Iterator[int]:
    """Do `prepare` and `act` again and again, with `change` one moment later each time; yields behind each."""
    for moment in range(MOST):
        prepare()
        happened = at_moment(moment, act, change, part)
        yield moment
        if not happened:
            return
    raise AssertionError("the device does not come to an end")


def turns(answers: list[Any]) -> list[Any]:
    """`answers` without repetitions of the one before."""
    return [answer for n, answer in enumerate(answers) if n == 0 or answer != answers[n - 1]]
