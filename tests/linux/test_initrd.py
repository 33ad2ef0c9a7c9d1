"""Initial RAM disks that `kvmpy initrd` makes: with programs, modules and files, compressed, several at once."""

from __future__ import annotations

from pathlib import Path

from command import KVMPY, Boot, Start

JOB = "bash -c 'echo bash $((6*7))'; lsmod | cut -d' ' -f1; cat /first /second; exit 3"


def test_several_are_concatenated(start: Start, boot: Boot, cloud: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.img", tmp_path / "two.img"
    modules = cloud.parent.parent / "lib/modules" / cloud.name.removeprefix("vmlinuz-")
    (tmp_path / "first").write_text("the first\n")
    (tmp_path / "second").write_text("the second\n")

    made = start(
        KVMPY, "initrd", "-o", one, "--file", f"{tmp_path}/first:/first", "--file", "/bin/bash", "--exec", JOB,
        "--module", "evdev", "--modules-dir", modules,
    ).end()  # fmt: skip
    assert made == (0, "", "")
    made = start(KVMPY, "initrd", "-o", two, "--file", f"{tmp_path}/second:/second", "--compress", "zstd").end()
    assert made == (0, "", "")
    done = boot("-k", cloud, "--initrd", one, "--initrd", two, "--append", "quiet loglevel=1")

    assert one.stat().st_size % 4 == 0
    assert (done.status, done.stdout) == (3, "bash 42\nModule\nevdev\nthe first\nthe second\n")
