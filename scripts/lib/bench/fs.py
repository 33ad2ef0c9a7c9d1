"""A folder of the host in a Linux guest: `tar c` of a tree and a large file in sequence, fresh and once more.

kvmpy's virtio-fs against QEMU with 9p, and with virtiofsd where that is; the same kernel and the same busybox. Times
are those of the guest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from . import emulated
from .contenders import BUILD, LINUX
from .harness import QEMU, Options, Run

TIME_LIMIT = 1800  # seconds for all rounds
MEM = 512  # MiB
FOLDERS, FILES, SIZES = 20, 40, (300, 2000, 9000, 40_000)  # of the tree: each folder has so many files of these sizes
BIG = 64 << 20
TAG = "volume0"  # as kvmpy names its first volume
MODULES = ["virtio_mmio", "9p", "9pnet_virtio", "virtiofs"]
VIRTIOFSD = "/usr/libexec:/usr/lib/qemu:/usr/bin"

# /proc/uptime counts hundredths; `-T /dev/null` would leave names out. tar to /dev/null reads no contents: hence cat.
SCRIPT = """\
mkdir -p /share
case $(cat /proc/cmdline) in
    *bench.fs=9p*) mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,ro volume0 /share ;;
    *bench.fs=virtiofs*) mount -t virtiofs -o ro volume0 /share ;;
esac
now() { read -r at rest </proc/uptime; echo "$at"; }
for turn in fresh again; do
    a=$(now); tar cf - -C /share tree | cat >/dev/null
    b=$(now); cat /share/big >/dev/null
    c=$(now); echo "bench-fs $turn $a $b $c $(tar cf - -C /share tree | wc -c)"
done
"""


def runs(options: Options, folder: Path) -> dict[str, Run]:
    kernel = emulated.kernel("fs", "amd64")  # the cloud kernel has no 9p
    share = folder / "share"
    make_tree(share)
    initrd = folder / "initrd"
    kvmpy = str(BUILD / "venv/bin/kvmpy")
    modules = [f"--module={name}" for name in MODULES]
    modules_dir = kernel.parents[1] / "lib/modules" / kernel.name.removeprefix("vmlinuz-")
    words = [kvmpy, "initrd", "-o", initrd, "--exec", SCRIPT, *modules, "--modules-dir", modules_dir]
    subprocess.run([str(word) for word in words], check=True)
    boot = [kvmpy, "boot", kernel, "--initrd", initrd, "--mem", f"{MEM}M", "--serial", "stdio"]
    ours = [*boot, "--volume", f"{share}:/share:ro", "--cmdline", f"{LINUX} bench.fs=virtiofs"]
    contenders = {"kvmpy": {"command": ours}}
    if qemu := shutil.which("qemu-system-x86_64"):
        machine = f"{qemu} -accel kvm -m {MEM} -nodefaults -no-user-config -display none -no-reboot -serial stdio"
        machine += f" -kernel {kernel} -initrd {initrd}"
        plan9 = f"-M microvm,rtc=off -fsdev local,id=f,path={share},security_model=none,readonly=on"
        plan9 += f" -device virtio-9p-device,fsdev=f,mount_tag={TAG}"
        contenders[f"{QEMU} 9p"] = {"command": [*f"{machine} {plan9} -append".split(), f"{LINUX} bench.fs=9p"]}
        if daemon := shutil.which("virtiofsd", path=VIRTIOFSD):
            path = "/tmp/bench-virtiofsd"
            memory = f"-M microvm,rtc=off,memory-backend=ram -object memory-backend-memfd,id=ram,size={MEM}M,share=on"
            device = f"-chardev socket,id=c,path={path} -device vhost-user-fs-device,chardev=c,tag={TAG}"
            words = [*f"{machine} {memory} {device} -append".split(), f"{LINUX} bench.fs=virtiofs"]
            contenders[f"{QEMU} virtiofsd"] = {
                "command": words,
                "daemon": [daemon, f"--socket-path={path}", "-o", f"source={share}", "-o", "cache=auto"],
                "socket": path,
            }
    task = {
        "contenders": {
            name: {key: list(map(str, value)) if isinstance(value, list) else value for key, value in entry.items()}
            for name, entry in contenders.items()
            if re.search(options.only, name)
        },
        "rounds": options.rounds,
        "big": BIG,
    }
    return emulated.rounds("fs_rounds.py", folder, task, TIME_LIMIT)


def make_tree(share: Path) -> None:
    for number in range(FOLDERS):
        inner = share / f"tree/folder{number}"
        inner.mkdir(parents=True)
        for file in range(FILES):
            (inner / f"file{file}").write_bytes(os.urandom(SIZES[file % len(SIZES)]))
    (share / "big").write_bytes(os.urandom(1 << 20) * (BIG >> 20))
