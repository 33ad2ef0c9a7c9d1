"""`kvmpy boot --exec` gives back what a command in the guest says, and how it ends."""

from __future__ import annotations

from pathlib import Path

from command import Boot


def test_output_is_exact_and_apart_from_our_own(boot: Boot, cloud: Path) -> None:
    done = boot("-v", "-k", cloud, "--exec", r"printf 'a\tb\r\nc\001'; printf '\nto stderr' >&2")

    assert (done.status, done.stdout) == (0, "a\tb\r\nc\1\nto stderr")
    assert "protocol=pvh" in done.stderr
    assert "Linux version" not in done.stderr


def test_script_killed_by_a_signal(boot: Boot, cloud: Path, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\nread line || echo no input\n[ -t 1 ] || echo $0\nkill -9 $$\necho not reached\n")

    done = boot("-k", cloud, "--exec", script)

    assert (done.status, done.stdout, done.stderr) == (128 + 9, "no input\n/etc/kvmpy/script\n", "")
