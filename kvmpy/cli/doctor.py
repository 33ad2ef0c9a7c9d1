"""Tell what this host can do, and the remedy for what it cannot.

Exit status: 0 when Linux can boot here, else 126.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap

from ..doctor import Level, Section, can_boot_linux, examine, summary

CANNOT = 126  # as for KvmError
WIDTH = 100
NAME_WIDTH = 20
INDENT = 8 + NAME_WIDTH  # of what is found
COLOURS = {Level.OK: "32", Level.WARN: "33", Level.FAIL: "31;1"}  # ECMA-48, 8.3.117: green, yellow, bold red


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print all findings as JSON")


def run(args: argparse.Namespace) -> int:
    sections = examine()
    works = can_boot_linux(sections)
    if args.json:
        print(json.dumps(as_json(sections), indent=2))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        print("\n".join(render(sections, colour=colour)))
    return 0 if works else CANNOT


def render(sections: list[Section], *, colour: bool) -> list[str]:
    """The findings for people, with the summary at the end."""
    lines = []
    for section in sections:
        lines.append(section.title)
        for check in section.checks:
            level = f"{check.level.value:<5}"
            if colour and check.level in COLOURS:
                level = f"\x1b[{COLOURS[check.level]}m{level}\x1b[0m"
            first, *more = textwrap.wrap(check.found, WIDTH - INDENT, break_on_hyphens=False)
            lines.append(f"  {level} {check.name:<{NAME_WIDTH}}{first}")
            lines += [" " * INDENT + line for line in more]
            remedy = textwrap.wrap(check.remedy, WIDTH - INDENT - 3, break_on_hyphens=False)
            lines += [" " * INDENT + ("   " if index else "-> ") + line for index, line in enumerate(remedy)]
        lines.append("")
    return [*lines, *(line for text in summary(sections) for line in textwrap.wrap(text, WIDTH))]


def as_json(sections: list[Section]) -> dict[str, object]:
    return {
        "can_boot_linux": can_boot_linux(sections),
        "summary": summary(sections),
        "sections": [
            {
                "title": section.title,
                "checks": [
                    {
                        "name": check.name,
                        "level": check.level.name.lower(),
                        "found": check.found,
                        "remedy": check.remedy,
                    }
                    for check in section.checks
                ],
            }
            for section in sections
        ],
    }
