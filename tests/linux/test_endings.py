"""Each way in which a Linux guest can end has its own exit status; the bad ones come with a report."""

from __future__ import annotations

from pathlib import Path

from command import KVMPY, Boot, Start


def test_reboot(start: Start, cloud: Path) -> None:
    console = start(KVMPY, "boot", "-k", cloud, "--append", "quiet")
    console.type("reboot\n")

    done = console.end()

    assert (done.status, done.stderr) == (0, "")


def test_halt(start: Start, cloud: Path) -> None:
    """All CPUs stand still with interrupts off: nothing can wake the guest any more."""
    console = start(KVMPY, "boot", "-k", cloud, "--append", "quiet", "-v", "-c", "2")
    console.type("halt -f\n")

    done = console.end()

    assert done.status == 0
    assert "guest halted for good" in done.stderr


def test_panic(boot: Boot, cloud: Path) -> None:
    done = boot("-k", cloud, "--exec", "echo before; echo c > /proc/sysrq-trigger; sleep 1000")

    assert done.status == 253
    assert done.stdout.startswith("before\n")
    assert "guest kernel panicked (sysrq triggered crash)" in done.stderr


def test_triple_fault(start: Start, cloud: Path) -> None:
    console = start(KVMPY, "boot", "-k", cloud, "--append", "quiet reboot=t")
    console.type("reboot\n")

    done = console.end()

    assert done.status == 254
    assert "triple fault" in done.stderr


def test_time_limit(start: Start, cloud: Path) -> None:
    done = start(KVMPY, "boot", "-k", cloud, "--serial", "null", "--timeout", "3").end()

    assert (done.status, done.stdout) == (124, "")
    assert "time limit reached" in done.stderr
    assert "rip" in done.stderr
