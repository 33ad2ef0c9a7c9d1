"""What the figures are to reach: medians of the ratios of each round, and a few absolute figures.

Exits are judged by CPU time: a guest that does nothing else never waits, and other programs of the host do not count.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class Target(NamedTuple):
    """`contender` is at least, or at most, `limit` times what it is compared with ("" for the figure itself)."""

    row: str
    case: str  # a regular expression, as `unit`
    unit: str
    contender: str
    to: str  # bare, qemu, off (kvmpy that does not lock itself in) or ""
    sense: str  # >= or <=
    limit: float


TARGETS = [
    Target("exits", "port read, line status|port write, POST code", "cpu us", "kvmpy", "bare", "<=", 1.05),
    Target("exits", "port .*, scratch|MMIO .*", "cpu us", "kvmpy", "bare", "<=", 1.30),
    Target("exits", "port .*, scratch|MMIO .*", "cpu us", "kvmpy", "qemu", "<=", 1.10),
    Target("exits", ".*", "cpu us", "kvmpy", "off", "<=", 1.05),
    Target("console", "UART", "KB/s", "kvmpy", "qemu", ">=", 1.0),
    Target("blk", "4K .* depth (32|128)", "IOPS", "kvmpy", "qemu", ">=", 1.2),
    Target("blk", "4K .* depth (32|128)", "IOPS", "kvmpy pure", "", ">=", 25_000),
    Target("blk", "4K .* depth 1", "us latency", "kvmpy", "qemu", "<=", 1.2),
    Target("blk", "1M .*", "MB/s", "kvmpy", "qemu", ">=", 1.0),
    Target("net", ".*1500 B.*|.*64 KiB.*", "packets/s", "kvmpy", "qemu", ">=", 1.0),
    Target("start", ".*first KVM_RUN", "ms", "kvmpy", "qemu", "<=", 1.0),
    Target("memory", "1 vCPU.*", "MiB PSS", "kvmpy", "", "<=", 32),
    Target("linux", "first KVM_RUN to init", "ms", "kvmpy", "qemu", "<=", 1.0),
    Target("run", "cold.*", "ms", "kvmpy", "qemu", "<=", 0.5),
    Target("fs", "tar c, fresh|sequential read, fresh", "MB/s", "kvmpy", "qemu", ">=", 1.0),
    Target("latency", "(key to guest|pause) p99", "ms", "kvmpy", "", "<=", 5),
]


def judge(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One verdict for each figure that has a target."""
    return [
        {"target": target._asdict(), "case": record["case"], "value": value, "met": met}
        for target in TARGETS
        for record in records
        if _is_about(target, record) and (value := _value(target, record)) is not None
        for met in [value >= target.limit if target.sense == ">=" else value <= target.limit]
    ]


def _is_about(target: Target, record: dict[str, Any]) -> bool:
    names = (target.row, target.contender) == (record["row"], record["contender"])
    return names and bool(re.fullmatch(target.case, record["case"]) and re.fullmatch(target.unit, record["unit"]))


def _value(target: Target, record: dict[str, Any]) -> float | None:
    value: float | None = record["median"] if not target.to else record["ratios"].get(target.to, {}).get("median")
    return value


def table(verdicts: list[dict[str, Any]]) -> str:
    """One line for each verdict; the ones that are missed stand out."""
    lines = ["", "targets"]
    for verdict in verdicts:
        target = Target(**verdict["target"])
        to = f" x {target.to}" if target.to else ""
        case = f"{target.row}: {verdict['case']}, {target.unit}, {target.contender}"
        met = "met" if verdict["met"] else "MISSED"
        lines.append(f"  {met:<6}  {case:<52} {verdict['value']:>9,.2f}{to}, to be {target.sense} {target.limit:,g}")
    return "\n".join(lines) if verdicts else ""
