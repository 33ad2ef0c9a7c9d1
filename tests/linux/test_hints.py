"""When a boot goes wrong in one of the usual ways, the report names the cause and the remedy."""

from __future__ import annotations

from pathlib import Path

from command import Boot


def test_damaged_initrd_and_no_root_device(boot: Boot, cloud: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd.img"
    initrd.write_bytes(b"this is no archive" * 100)

    done = boot("-k", cloud, "--initrd", initrd, "--append", "loglevel=5 root=/dev/vda")

    report = " ".join(done.stderr.split())
    assert done.status == 253
    assert "guest kernel panicked (VFS: Unable to mount root fs" in report
    assert "the initrd could not be unpacked" in report
    assert "the kernel found nothing to start" in report


def test_no_serial_console(boot: Boot, cloud: Path) -> None:
    done = boot("-k", cloud, "--cmdline", "", "--timeout", "5")

    assert done.status == 124
    assert "the command line names no serial console" in done.stderr
    assert "--append console=ttyS0" in done.stderr
