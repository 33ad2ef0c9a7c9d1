"""Linux at work on all devices of a process that is locked in."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from command import Boot

from kvmpy.jail.lock import landlock_abi, why_no_namespaces

MIB = 1 << 20
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"  # where mke2fs is

SCRIPT = r"""
say() { name=$1; shift; echo "$name:" $(eval "$*" 2>&1); }
mkdir -p /mnt
say mount 'mount -t ext4 /dev/vda /mnt && echo yes'
say files 'dd if=/dev/urandom of=/mnt/x bs=1M count=4 2>/dev/null; sync; sha256sum < /mnt/x > /tmp/1
           echo 3 > /proc/sys/vm/drop_caches; sha256sum < /mnt/x | cmp - /tmp/1 && echo same; rm /mnt/x'
say trim 'fstrim -v /mnt | grep -c trimmed; umount /mnt'
say discard 'blkdiscard /dev/vdb && echo yes'
say direct 'dd if=/dev/zero of=/dev/vdb bs=64k count=16 oflag=direct 2>/dev/null && echo yes'
say qcow2 'dd if=/dev/zero of=/dev/vdc bs=64k count=16 oflag=direct 2>/dev/null && echo yes'
say random 'head -c 64 /dev/hwrng | wc -c'
say clock 'hwclock -w && hwclock -r > /dev/null && echo yes'
say errors 'dmesg | grep -ci "i/o error"'
"""
EXPECTED = [
    "mount: yes",
    "files: same",
    "trim: 1",
    "discard: yes",
    "direct: yes",
    "qcow2: yes",
    "random: 64",
    "errors: 0",
]


@pytest.mark.parametrize(("level", "transport"), [("default", "mmio"), ("strict", "pci")])
def test_all_devices(boot: Boot, cloud: Path, tmp_path: Path, level: str, transport: str) -> None:
    if level == "strict" and (why := why_no_namespaces() or ("" if landlock_abi() else "no Landlock")):
        pytest.skip(why)
    mke2fs = shutil.which("mke2fs", path=PATH)
    if mke2fs is None or not shutil.which("qemu-img"):
        pytest.skip("no mke2fs or qemu-img")
    for name in ("vda", "vdb"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 64 * MIB)
    subprocess.run([mke2fs, "-q", "-t", "ext4", tmp_path / "vda"], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "vdc", "64M"], check=True)
    (tmp_path / "script").write_text(SCRIPT)
    devices = ["virtio-rng", "virtio-balloon,target=150M", f"virtio-console,port=agent,path={tmp_path}/agent"]

    done = boot(
        *("--sandbox", level, "--transport", transport, "--kernel", cloud, "--mem", "256M", "--cpus", "2"),
        *("--disk", tmp_path / "vda", "--disk", f"{tmp_path}/vdb,snapshot", "--disk", f"{tmp_path}/vdc,format=qcow2"),
        *(word for device in devices for word in ("--device", device)),
        *("--exec", tmp_path / "script"),
    )

    said = done.stdout.replace("\r", "").splitlines()
    assert (done.status, done.stderr) == (0, "")
    assert [line for line in EXPECTED if line not in said] == []
    assert not (tmp_path / "agent").exists()
