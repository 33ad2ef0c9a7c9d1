"""The FUSE server with this machine's own kernel as its client: a mount through /dev/fuse in a namespace."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvmpy.host.fuse import FuseServer
from kvmpy.host.fuse_folder import MAX_TRANSFER

LIMIT = 60  # seconds
ROOT = os.geteuid() == 0
UNSHARE = ["unshare", "--mount", *([] if ROOT else ["--user", "--map-root-user"])]
MAX_MESSAGE = MAX_TRANSFER + 8192

SCRIPT = r"""
set -eu
mkdir -p tree/a/b && cd tree
for n in 1 2 3 4 5 6 7 8 9; do echo "text $n" > a/file$n; cp a/file$n a/b/; done
ln -s ../file1 a/b/link; chmod 751 a/file2; ln a/file3 hard
tar cf ../tree.tar . && mkdir ../copy && tar xf ../tree.tar -C ../copy && diff -r . ../copy
[ "$(find . -type f | wc -l)" = 19 ]
[ "$(cat a/b/link)" = "text 1" ]
mv a/file5 a/b/file6 && [ "$(cat a/b/file6)" = "text 5" ]
[ "$(stat -c %h hard)" = 2 ]
! mkfifo pipe 2>/dev/null
cd .. && rm -r copy
head -c 5000000 /dev/urandom > big && cp big big2 && cmp big big2
truncate -s 100 big2 && [ "$(stat -c %s big2)" = 100 ]
echo one > log; echo two >> log; [ "$(tail -n 1 log)" = two ]
"$PYTHON" - <<'END'
import fcntl, mmap, os
with open("mapped", "w+b") as file:
    file.truncate(8192)
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with mmap.mmap(file.fileno(), 8192) as memory:
        memory[4096:4100] = b"text"
        memory.flush()
    os.unlink("mapped")
    assert os.pread(file.fileno(), 4, 4096) == b"text"
for n in range(500):
    open(f"tree/{n}", "w").close()
assert len(os.listdir("tree")) == 502
END
"""


def serve(fuse: int, server: FuseServer) -> None:
    """Answer until the file system is unmounted."""
    request, answer = bytearray(MAX_MESSAGE), memoryview(bytearray(MAX_MESSAGE))
    while True:
        try:
            size = os.readv(fuse, [request])
        except OSError:  # ENODEV: unmounted
            return
        count = server.serve([memoryview(request)[:size]], [answer])
        if count:
            os.write(fuse, answer[:count])


def run(share: Path, mount: Path) -> int:
    """In the namespace: mount the share, run the script in it; its status, or 77 where nothing can be mounted."""
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return 77
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,default_permissions".encode()
    libc = ctypes.CDLL(None)
    if libc.mount(b"share", os.fsencode(mount), b"fuse", 0, options):
        return 77
    server = FuseServer(share)
    threading.Thread(target=serve, args=(fuse, server), daemon=True).start()
    environment = os.environ | {"PYTHON": sys.executable}
    status = subprocess.run(["sh", "-c", SCRIPT], cwd=mount, env=environment, timeout=LIMIT).returncode
    libc.umount2(os.fsencode(mount), 2)
    return status


@pytest.mark.skipif(not shutil.which("unshare"), reason="no unshare here (package util-linux)")
def test_a_kernel_works_in_the_share(tmp_path: Path) -> None:
    share, mount = tmp_path / "share", tmp_path / "mount"
    share.mkdir()
    mount.mkdir()

    command = [*UNSHARE, sys.executable, __file__, str(share), str(mount)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT)

    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("no file system can be mounted here through /dev/fuse")
    assert (done.returncode, done.stderr) == (0, "")
    assert (share / "tree/a/b/file6").read_text() == "text 5\n"
    assert not list(mount.iterdir())


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), Path(sys.argv[2])))
