"""The FUSE server over a folder: what a guest's file system does, and what a guest must not be able to do."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from racing import at_moment
from scale import examples
from shares import Client

from kvmpy.core.errors import ConfigError, NotFoundError
from kvmpy.host import fuse, fuse_folder, fuse_nodes, syscalls
from kvmpy.host import fuse_wire as wire
from kvmpy.host.fuse import FuseServer
from kvmpy.host.fuse_wire import FATTR, FOPEN, INIT_F, ROOT_ID, Op

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
Mount = Callable[..., Client]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The share; beside it lies what nobody in the guest may see."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("secret")
    (tmp_path / "share").mkdir(mode=0o755)
    return tmp_path / "share"


@pytest.fixture
def mount(folder: Path) -> Iterator[Mount]:
    """Makes a server with these options, and a client that has sent INIT."""
    servers = []

    def mount(**options: object) -> Client:
        server = FuseServer(folder, **options)
        servers.append(server)

        def serve(parts: Sequence[bytes], room: int) -> bytes:
            answer = bytearray(room)
            # in pieces that fit nothing: their boundaries mean nothing
            writable = [memoryview(answer)[:7], memoryview(answer)[7:33], memoryview(answer)[33:]]
            return bytes(answer[: server.serve([memoryview(part) for part in parts], writable)])

        client = Client(serve)
        client.init()
        client.server = server
        return client

    yield mount
    for server in servers:
        server.close()


@pytest.fixture
def client(mount: Mount) -> Client:
    return mount()


def refused(number: int, call: Callable[..., object], *args: object, **named: object) -> None:
    """The call must end with this error."""
    with pytest.raises(OSError) as caught:
        call(*args, **named)
    assert errno.errorcode[caught.value.errno] == errno.errorcode[number]


def swap(a: Path, b: Path) -> None:
    syscalls.renameat2(-100, os.fsencode(a), -100, os.fsencode(b), syscalls.RENAME_EXCHANGE)


# The connection.


def test_init_agrees_on_a_version_and_large_requests(client: Client) -> None:
    major, minor, readahead, flags, _, _, max_write, granularity, max_pages, _, _ = client.init()

    assert (major, minor, readahead) == (7, 31, 1 << 17)
    assert (max_write, max_pages, granularity) == (1 << 20, 256, 1)
    assert flags & INIT_F.HANDLE_KILLPRIV_V2
    assert not flags & INIT_F.CACHE_SYMLINKS


def test_init_takes_only_what_the_kernel_offers(client: Client) -> None:
    assert client.init(flags=INIT_F.BIG_WRITES)[3] == INIT_F.BIG_WRITES


def test_init_with_other_versions(client: Client) -> None:
    assert client.init(major=8)[:2] == (7, 31)
    refused(errno.EPROTO, client.init, minor=30)
    refused(errno.EPROTO, client.init, major=6)


def test_nothing_is_served_before_init(client: Client) -> None:
    client.call(Op.DESTROY, 0)

    refused(errno.EIO, client.getattr, ROOT_ID)


def test_destroy_closes_everything(client: Client) -> None:
    before = len(os.listdir("/proc/self/fd"))
    client.create(b"a")
    client.mkdir(b"d")
    client.opendir()

    client.call(Op.DESTROY, 0)

    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("op", [0, 7, 19, 25, 31, 32, 33, 34, 37, 39, 40, 48, 49, 51, 4096, 0xFFFFFFFF])
def test_what_the_guest_does_itself_or_does_without(client: Client, op: int) -> None:
    refused(errno.ENOSYS, client.call, op, ROOT_ID, bytes(64))


def test_statfs(client: Client, folder: Path) -> None:
    blocks, _, _, files, _, bsize, namelen, frsize = wire.STATFS_OUT.unpack(client.call(Op.STATFS, ROOT_ID))

    status = os.statvfs(folder)
    assert (blocks, files) == (status.f_blocks, status.f_files)
    assert (bsize, namelen, frsize) == (status.f_bsize, status.f_namemax, status.f_frsize)


def test_syncfs(client: Client) -> None:
    assert client.call(Op.SYNCFS, ROOT_ID, bytes(8)) == b""


# Names.


def test_mkdir_rmdir(client: Client, folder: Path) -> None:
    made = client.mkdir(b"d", mode=0o2750)

    assert stat.S_IMODE((folder / "d").stat().st_mode) == made.attr.permissions == 0o2750
    refused(errno.EEXIST, client.mkdir, b"d")
    client.mkdir(b"in", made.node)
    refused(errno.ENOTEMPTY, client.rmdir, b"d")
    refused(errno.EISDIR, client.unlink, b"d")
    client.rmdir(b"in", made.node)
    client.rmdir(b"d")
    refused(errno.ENOENT, client.rmdir, b"d")
    assert not list(folder.iterdir())


def test_create_write_read(client: Client, folder: Path) -> None:
    made, fh = client.create(b"f", mode=0o640)

    assert client.write(fh, b"hello") == 5
    assert client.write(fh, b"there", offset=10) == 5
    assert client.read(fh) == (folder / "f").read_bytes() == b"hello\0\0\0\0\0there"
    assert client.read(fh, offset=12, size=2) == b"er"
    assert client.read(fh, offset=15) == b""
    assert client.getattr(made.node, fh).size == 15
    assert made.attr.permissions == 0o640
    client.release(fh)
    refused(errno.EBADF, client.read, fh)


def test_create_of_what_is_there(client: Client, folder: Path) -> None:
    (folder / "f").write_text("long text")

    refused(errno.EEXIST, client.create, b"f", flags=os.O_RDWR | os.O_EXCL)
    found, fh = client.create(b"f", flags=os.O_RDWR | os.O_TRUNC)

    assert found.node == client.lookup(b"f").node
    assert client.read(fh) == b""


def test_open_modes(client: Client, folder: Path) -> None:
    (folder / "f").write_text("text")
    node = client.walk("f")

    refused(errno.EBADF, client.write, client.open(node), b"x")
    refused(errno.EBADF, client.read, client.open(node, os.O_WRONLY))
    client.write(client.open(node, os.O_WRONLY | os.O_APPEND), b"!", offset=0)
    assert (folder / "f").read_text() == "text!"
    client.open(node, os.O_WRONLY | os.O_TRUNC)
    assert (folder / "f").read_text() == ""


def test_modes_do_not_depend_on_the_umask(client: Client, folder: Path) -> None:
    before = os.umask(0o077)
    try:
        made = [client.mkdir(b"d", mode=0o777), client.mknod(b"n", 0o666), client.create(b"c", mode=0o666)[0]]
    finally:
        os.umask(before)

    assert [entry.attr.permissions for entry in made] == [0o777, 0o666, 0o666]


def test_rename(client: Client, folder: Path) -> None:
    first, second = client.mkdir(b"d").node, client.mkdir(b"e").node
    node = client.create(b"f", first)[0].node

    client.rename(b"f", b"g", first, second)

    refused(errno.ENOENT, client.lookup, b"f", first)
    assert client.lookup(b"g", second).node == node
    assert (folder / "e/g").exists()
    refused(errno.ENOTEMPTY, client.rename, b"d", b"e")
    refused(errno.EINVAL, client.rename, b"e", b"x", target=second)
    refused(errno.ENOENT, client.rename, b"nothing", b"x")
    client.rename(b"e", b"d")
    assert client.lookup(b"g", client.walk("d")).node == node


def test_rename_replaces_what_is_open(client: Client, folder: Path) -> None:
    old, fh = client.create(b"old")
    client.write(fh, b"old")
    client.mknod(b"new", 0o600)

    client.rename(b"new", b"old")

    assert client.read(fh) == b"old"
    assert client.getattr(old.node).nlink == 0


def test_rename_flags(client: Client, folder: Path) -> None:
    a, b = client.mknod(b"a", 0o600).node, client.mkdir(b"b").node

    refused(errno.EEXIST, client.rename, b"a", b"b", flags=1)
    refused(errno.EINVAL, client.rename, b"a", b"b", flags=4)
    client.rename(b"a", b"b", flags=2)
    assert (client.lookup(b"a").node, client.lookup(b"b").node) == (b, a)
    client.rename(b"a", b"c", flags=1)
    assert client.names() == {b"b", b"c"}


def test_links(client: Client, folder: Path) -> None:
    node = client.mknod(b"a", 0o600).node

    linked = client.link(node, b"b")

    assert (linked.node, linked.attr.nlink) == (node, 2)
    refused(errno.EEXIST, client.link, node, b"b")
    refused(errno.EPERM, client.link, client.mkdir(b"d").node, b"e")
    client.unlink(b"a")
    assert client.getattr(node).nlink == 1


def test_symlinks(client: Client, folder: Path) -> None:
    node = client.symlink(b"s", b"../secret").node

    assert client.readlink(node) == b"../secret"
    assert stat.S_ISLNK(client.lookup(b"s").attr.mode)
    refused(errno.EINVAL, client.readlink, client.mkdir(b"d").node)
    refused(errno.EEXIST, client.symlink, b"s", b"x")
    refused(errno.EOPNOTSUPP, client.chmod, node, 0o600)
    client.unlink(b"s")
    assert not list((folder / "d").iterdir())


def test_file_without_a_name_lives_until_it_is_forgotten(client: Client, folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    made, fh = client.create(b"f")
    client.write(fh, b"text")
    client.release(fh)

    client.unlink(b"f")

    assert client.content(made.node) == b"text"
    assert client.chmod(made.node, 0o600).nlink == 0
    refused(errno.ENOENT, client.link, made.node, b"again")
    client.forget(made.node)
    refused(errno.ESTALE, client.getattr, made.node)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_could_not_be_deleted_is_found_again(mount: Mount) -> None:
    client = mount()
    node = client.mkdir(b"d").node
    client.mkdir(b"in", node)
    refused(errno.ENOTEMPTY, client.rmdir, b"d")

    client.server.folder.nodes._keep = 0
    client.server.folder.nodes.trim()

    assert client.lookup(b"in", node).node


def test_length_of_names(client: Client) -> None:
    assert client.mknod(b"n" * 255, 0o600).node
    refused(errno.ENAMETOOLONG, client.mknod, b"n" * 256, 0o600)


def test_any_bytes_are_a_name(client: Client) -> None:
    name = bytes(range(1, 256)).replace(b"/", b"")

    client.mknod(name, 0o600)

    assert client.names() == {name}


# Attributes.


def test_getattr(client: Client, folder: Path) -> None:
    (folder / "f").write_bytes(bytes(5000))
    os.utime(folder / "f", ns=(-1, 1_000_000_000_000_000_001))

    attr = client.lookup(b"f").attr

    status = (folder / "f").stat()
    assert (attr.ino, attr.size, attr.blocks) == (status.st_ino, 5000, status.st_blocks)
    assert (attr.atime, attr.atimensec, attr.mtime, attr.mtimensec) == (-1, 999_999_999, 1_000_000_000, 1)
    assert (attr.mode, attr.nlink, attr.blksize) == (status.st_mode, 1, status.st_blksize)


def test_chmod_truncate(client: Client, folder: Path) -> None:
    made, fh = client.create(b"f")
    client.write(fh, b"0123456789")

    assert client.chmod(made.node, 0o6711).permissions == 0o6711
    assert client.truncate(made.node, 4).size == 4
    assert client.setattr(made.node, FATTR.SIZE | FATTR.FH, size=1 << 33, fh=fh).size == 1 << 33
    assert (folder / "f").stat().st_size == 1 << 33
    refused(errno.EISDIR, client.truncate, ROOT_ID, 0)
    refused(errno.EINVAL, client.truncate, made.node, 1 << 63)


def test_times(client: Client, folder: Path) -> None:
    node = client.mknod(b"f", 0o600).node

    attr = client.setattr(node, FATTR.ATIME | FATTR.MTIME, atime=-5, atimensec=1, mtime=1 << 31, mtimensec=999_999_999)

    assert (attr.atime, attr.atimensec, attr.mtime, attr.mtimensec) == (-5, 1, 1 << 31, 999_999_999)
    attr = client.setattr(node, FATTR.MTIME | FATTR.MTIME_NOW)
    assert (attr.atime, attr.atimensec) == (-5, 1)
    assert abs(attr.mtime - (folder / "f").stat().st_ctime) < 5
    refused(errno.EINVAL, client.setattr, node, FATTR.MTIME, mtimensec=1_000_000_000)


def test_times_of_a_link_are_its_own(client: Client, folder: Path) -> None:
    before = (folder.parent / "secret").stat().st_mtime_ns
    node = client.symlink(b"s", b"../secret").node

    client.setattr(node, FATTR.MTIME, mtime=7)

    assert (folder / "s").lstat().st_mtime == 7
    assert (folder.parent / "secret").stat().st_mtime_ns == before


@pytest.mark.parametrize(("mode", "kept"), [(0o6755, 0o755), (0o2745, 0o2745), (0o4644, 0o644), (0o2711, 0o711)])
def test_writes_take_privileges_away_when_the_guest_says_so(client: Client, mode: int, kept: int) -> None:
    made, fh = client.create(b"f", mode=mode)

    client.write(fh, b"x")
    assert client.getattr(made.node).permissions == (mode if os.geteuid() == 0 else kept)
    client.write(fh, b"x", flags=wire.WRITE_KILL_SUIDGID)
    assert client.getattr(made.node).permissions == kept
    client.chmod(made.node, mode)
    assert client.setattr(made.node, FATTR.SIZE | FATTR.KILL_SUIDGID).permissions == kept
    client.chmod(made.node, mode)
    client.open(made.node, os.O_WRONLY | os.O_TRUNC, wire.OPEN_KILL_SUIDGID)
    assert client.getattr(made.node).permissions == kept


@needs_root
def test_owners_are_whom_the_guest_says(client: Client, folder: Path) -> None:
    client.uid, client.gid = 1000, 100

    made = [client.mkdir(b"d"), client.mknod(b"n", 0o600), client.symlink(b"s", b"x"), client.create(b"c")[0]]

    assert [(entry.attr.uid, entry.attr.gid) for entry in made] == [(1000, 100)] * 4
    attr = client.setattr(made[2].node, FATTR.UID | FATTR.GID, uid=5, gid=6)
    assert (attr.uid, attr.gid) == (5, 6)
    assert ((folder / "s").lstat().st_uid, (folder / "s").lstat().st_gid) == (5, 6)
    assert client.setattr(made[3].node, FATTR.GID, gid=7)[-5:-3] == (1000, 7)


@needs_root
def test_group_of_a_setgid_folder(client: Client) -> None:
    shared = client.mkdir(b"d").node
    client.setattr(shared, FATTR.GID, gid=42)
    client.chmod(shared, 0o2777)
    client.uid, client.gid = 1000, 100

    inner, (file, _) = client.mkdir(b"i", shared), client.create(b"f", shared)

    assert (inner.attr.gid, inner.attr.permissions) == (42, 0o2755)
    assert (file.attr.uid, file.attr.gid, file.attr.permissions) == (1000, 42, 0o644)


@needs_root
def test_owners_that_are_none(client: Client, folder: Path) -> None:
    client.uid = 0xFFFFFFFF

    refused(errno.EINVAL, client.mkdir, b"d")
    refused(errno.EINVAL, client.create, b"f")
    refused(errno.EINVAL, client.symlink, b"s", b"t")
    assert not list(folder.iterdir())


@pytest.fixture
def plain_user(client: Client, folder: Path) -> Client:
    """A client of a server that is not root, but the owner of the share."""
    client.server.folder.owners.is_root = False
    return client


def test_a_plain_user_is_the_guests_root(plain_user: Client) -> None:
    plain_user.uid = plain_user.gid = 1000

    made = plain_user.create(b"f")[0]

    assert (made.attr.uid, made.attr.gid) == (0, 0)
    plain_user.setattr(made.node, FATTR.UID | FATTR.GID, uid=0, gid=0)
    refused(errno.EPERM, plain_user.setattr, made.node, FATTR.UID, uid=1000)
    plain_user.server.folder.owners.user = 12345  # as if the file were another's
    attr = plain_user.getattr(made.node)
    assert (attr.uid, attr.gid) == (65534, 0)


# Folders.


def test_readdir_in_pieces(client: Client) -> None:
    names = {b"%d" % n * 20 for n in range(200)}
    for name in names:
        client.mknod(name, 0o600)

    assert client.names() == names


def test_readdir_types_and_rewind(client: Client, folder: Path) -> None:
    client.mkdir(b"d")
    client.symlink(b"s", b"t")
    fh = client.opendir()

    first = {name: kind for name, kind, _ in client.readdir(fh)}
    client.mknod(b"f", 0o600)
    again = {name: kind for name, kind, _ in client.readdir(fh, offset=0)}

    assert first == {b".": 4, b"..": 4, b"d": 4, b"s": 10}
    assert again == first | {b"f": 8}
    refused(errno.EINVAL, client.readdir, fh, offset=0, size=8)
    refused(errno.EINVAL, client.readdir, fh, offset=1 << 63)


def test_readdir_goes_on_from_any_offset(client: Client) -> None:
    for n in range(10):
        client.mknod(b"%d" % n, 0o600)
    fh = client.opendir()
    whole = client.readdir(fh)

    assert client.readdir(fh, offset=whole[4][2]) == whole[5:]
    assert client.readdir(fh, offset=whole[8][2]) == whole[9:]
    assert client.readdir(fh, offset=whole[1][2]) == whole[2:]


def test_readdirplus_looks_up(client: Client, folder: Path) -> None:
    (folder / "f").write_text("text")
    (folder / "s").symlink_to("../secret")

    found = client.readdirplus(client.opendir())

    assert set(found) == {b".", b"..", b"f", b"s"}
    assert found[b"."].node == found[b".."].node == 0
    assert (found[b"f"].attr.size, client.content(found[b"f"].node)) == (4, b"text")
    assert found[b"f"].node == client.lookup(b"f").node
    client.forget(found[b"f"].node, 1)
    assert client.getattr(found[b"f"].node).size == 4
    client.forget(found[b"f"].node, 1)
    refused(errno.ESTALE, client.getattr, found[b"f"].node)


def test_handles_of_files_and_folders_are_no_substitutes(client: Client) -> None:
    node = client.mkdir(b"d").node
    _, file = client.create(b"f")
    opened = client.opendir(node)

    refused(errno.EISDIR, client.read, opened)
    refused(errno.EBADF, client.readdir, file)
    refused(errno.EBADF, client.readdir, opened, node=ROOT_ID)
    refused(errno.ENOTDIR, client.opendir, client.walk("f"))
    refused(errno.EISDIR, client.open, node)


# Other requests.


def test_extended_attributes(client: Client) -> None:
    node = client.mknod(b"f", 0o600).node

    client.setxattr(node, b"user.a", b"value\0with nul", flags=os.XATTR_CREATE)

    refused(errno.EEXIST, client.setxattr, node, b"user.a", b"", flags=os.XATTR_CREATE)
    refused(errno.ENODATA, client.setxattr, node, b"user.b", b"", flags=os.XATTR_REPLACE)
    assert client.getxattr(node, b"user.a") == b"value\0with nul"
    assert struct.unpack("<II", client.getxattr(node, b"user.a", size=0)) == (14, 0)
    refused(errno.ERANGE, client.getxattr, node, b"user.a", size=13)
    refused(errno.ENODATA, client.getxattr, node, b"user.none")
    assert client.listxattr(node) == b"user.a\0"
    assert struct.unpack("<II", client.listxattr(node, size=0)) == (7, 0)
    client.call(Op.REMOVEXATTR, node, b"user.a\0")
    assert client.listxattr(node) == b""


@pytest.mark.parametrize(
    "name", [b"security.capability", b"trusted.overlay.opaque", b"system.posix_acl_access", b"u", b""]
)
def test_other_extended_attributes_are_refused(client: Client, folder: Path, name: bytes) -> None:
    node = client.mknod(b"f", 0o600).node

    refused(errno.EOPNOTSUPP, client.setxattr, node, name, b"x")
    refused(errno.EOPNOTSUPP, client.getxattr, node, name)
    refused(errno.EOPNOTSUPP, client.call, Op.REMOVEXATTR, node, name + b"\0")
    assert os.listxattr(folder / "f") == []


def test_extended_attributes_do_not_follow_links(client: Client, folder: Path) -> None:
    os.setxattr(folder.parent / "secret", "user.secret", b"x")
    node = client.symlink(b"s", b"../secret").node

    refused(errno.EOPNOTSUPP, client.getxattr, node, b"user.secret")
    refused(errno.EOPNOTSUPP, client.setxattr, node, b"user.secret", b"y")


def test_fallocate_lseek_copy_fsync(client: Client, folder: Path) -> None:
    _, fh = client.create(b"f")
    other, target = client.create(b"g")

    client.call(Op.FALLOCATE, ROOT_ID, wire.FALLOCATE_IN.pack(fh, 0, 1 << 20, 0, 0))
    client.write(fh, b"data", offset=1 << 19)
    client.call(Op.FALLOCATE, ROOT_ID, wire.FALLOCATE_IN.pack(fh, 0, 1 << 19, 3, 0))
    data = client.call(Op.LSEEK, ROOT_ID, wire.LSEEK_IN.pack(fh, 0, os.SEEK_DATA, 0))
    copied = client.call(
        Op.COPY_FILE_RANGE, ROOT_ID, wire.COPY_FILE_RANGE_IN.pack(fh, 1 << 19, other.node, target, 0, 4, 0)
    )
    client.call(Op.FSYNC, ROOT_ID, wire.FSYNC_IN.pack(target, 0, 0))
    client.call(Op.FSYNC, ROOT_ID, wire.FSYNC_IN.pack(target, wire.FSYNC_FDATASYNC, 0))
    client.call(Op.FSYNCDIR, ROOT_ID, wire.FSYNC_IN.pack(client.opendir(), 0, 0))

    assert (folder / "f").stat().st_size == 1 << 20
    assert wire.LSEEK_OUT.unpack(data) == (1 << 19,)
    assert wire.WRITE_OUT.unpack(copied) == (4, 0)
    assert (folder / "g").read_bytes() == b"data"
    refused(errno.EINVAL, client.call, Op.LSEEK, ROOT_ID, wire.LSEEK_IN.pack(fh, 0, os.SEEK_SET, 0))
    refused(errno.EOPNOTSUPP, client.call, Op.FALLOCATE, ROOT_ID, wire.FALLOCATE_IN.pack(fh, 0, 1, 8, 0))


def test_caches(mount: Mount, folder: Path) -> None:
    (folder / "f").write_text("text")
    careful, trusting = mount(), mount(cache="always")

    assert (careful.lookup(b"f").valid, careful.open_out(careful.walk("f"))[1]) == (1, 0)
    assert (trusting.lookup(b"f").valid, trusting.open_out(trusting.walk("f"))[1]) == (86400, FOPEN.KEEP_CACHE)
    assert trusting.init()[3] & INIT_F.CACHE_SYMLINKS
    refused(errno.ENOENT, careful.lookup, b"none")
    none = trusting.lookup(b"none")
    assert (none.node, none.valid) == (0, 86400)


def test_what_was_read_is_kept_until_the_file_changes(client: Client, folder: Path) -> None:
    path = folder / "f"
    path.write_text("text")
    os.utime(path, (1, 1))
    node = client.walk("f")

    def kept() -> int:
        return client.open_out(node)[1]

    assert (kept(), kept()) == (0, 0)  # it has changed just now, and may once more with the same time
    settle(path)
    assert (kept(), kept(), kept()) == (0, FOPEN.KEEP_CACHE, FOPEN.KEEP_CACHE)
    path.write_text("news")
    assert (kept(), kept()) == (0, 0)


def settle(path: Path) -> None:
    """Wait until a change of the file has become an old one."""
    deadline = time.monotonic() + 10
    while time.time_ns() - path.stat().st_ctime_ns <= fuse_folder.SETTLED:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_links_and_missing_names_of_a_folder_that_is_read_only(mount: Mount, folder: Path) -> None:
    link = folder / "link"
    link.symlink_to("old")
    client = mount(read_only=True)
    before = client.lookup(b"link").node
    same = client.lookup(b"link").node
    number = link.lstat().st_ino
    link.unlink()
    link.symlink_to("new")
    after = client.lookup(b"link")

    assert client.init()[3] & INIT_F.CACHE_SYMLINKS
    assert same == before
    assert after.node != before, f"inode {number}, then {link.lstat().st_ino}"
    client.lookup(b"link")
    none = client.lookup(b"none")
    assert (none.node, none.valid) == (0, 1)


def test_a_folder_without_extended_attributes(mount: Mount, folder: Path) -> None:
    (folder / "f").write_text("text")
    os.setxattr(folder / "f", "user.a", b"x")
    client = mount(xattrs=False)

    refused(errno.ENOSYS, client.getxattr, client.walk("f"), b"user.a")
    refused(errno.ENOSYS, client.listxattr, client.walk("f"))


# What a guest must not be able to do.


CHANGES: dict[str, Callable[[Client, int, int], object]] = {
    "create": lambda client, node, fh: client.create(b"new"),
    "mkdir": lambda client, node, fh: client.mkdir(b"new"),
    "mknod": lambda client, node, fh: client.mknod(b"new", 0o600),
    "symlink": lambda client, node, fh: client.symlink(b"new", b"x"),
    "link": lambda client, node, fh: client.link(node, b"new"),
    "unlink": lambda client, node, fh: client.unlink(b"f"),
    "rmdir": lambda client, node, fh: client.rmdir(b"d"),
    "rename": lambda client, node, fh: client.rename(b"f", b"new"),
    "rename2": lambda client, node, fh: client.rename(b"f", b"d", flags=2),
    "open": lambda client, node, fh: client.open(node, os.O_RDWR),
    "truncating open": lambda client, node, fh: client.open(node, os.O_TRUNC),
    "write": lambda client, node, fh: client.write(fh, b"x"),
    "chmod": lambda client, node, fh: client.chmod(node, 0o777),
    "truncate": lambda client, node, fh: client.truncate(node, 0),
    "utime": lambda client, node, fh: client.setattr(node, FATTR.MTIME | FATTR.MTIME_NOW),
    "setxattr": lambda client, node, fh: client.setxattr(node, b"user.a", b""),
    "removexattr": lambda client, node, fh: client.call(Op.REMOVEXATTR, node, b"user.a\0"),
    "fallocate": lambda client, node, fh: client.call(Op.FALLOCATE, node, wire.FALLOCATE_IN.pack(fh, 0, 4096, 0, 0)),
    "copy": lambda client, node, fh: client.call(
        Op.COPY_FILE_RANGE, node, wire.COPY_FILE_RANGE_IN.pack(fh, 0, node, fh, 8, 2, 0)
    ),
}


@pytest.fixture
def read_only(mount: Mount, folder: Path) -> Client:
    (folder / "f").write_text("text")
    (folder / "d").mkdir()
    return mount(read_only=True)


@pytest.mark.parametrize("change", CHANGES)
def test_hostile_84_a_read_only_share_cannot_be_changed(read_only: Client, folder: Path, change: str) -> None:
    node = read_only.walk("f")
    before = (folder / "f").stat()

    refused(errno.EROFS, CHANGES[change], read_only, node, read_only.open(node))

    assert (folder / "f").stat().st_ctime_ns == before.st_ctime_ns
    assert set(os.listdir(folder)) == {"d", "f"}


def test_hostile_84_a_read_only_share_has_no_writable_descriptor(read_only: Client) -> None:
    read_only.open(read_only.walk("f"))
    read_only.opendir()

    for handle in read_only.server.folder.handles.values():
        with pytest.raises(OSError):
            os.write(handle.fd, b"x")


@pytest.mark.parametrize("kind", [stat.S_IFBLK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFDIR, stat.S_IFLNK])
def test_hostile_85_only_regular_files_are_made(client: Client, folder: Path, kind: int) -> None:
    refused(errno.EPERM, client.mknod, b"n", kind | 0o666, rdev=0x801)

    assert not list(folder.iterdir())


def test_hostile_85_only_regular_files_are_opened(client: Client, folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    (folder / "link").symlink_to("fifo")

    refused(errno.ENXIO, client.open, client.walk("fifo"), os.O_RDONLY)
    refused(errno.ENXIO, client.open, client.walk("socket"), os.O_RDWR)
    refused(errno.ENXIO, client.open, client.walk("link"))
    refused(errno.ENXIO, client.create, b"fifo")
    refused(errno.ENXIO, client.truncate, client.walk("fifo"), 0)
    assert stat.S_ISFIFO(client.lookup(b"fifo").attr.mode)
    client.unlink(b"socket")
    listener.close()


@needs_root
def test_hostile_85_device_nodes_of_the_host_are_not_opened(client: Client, folder: Path) -> None:
    try:
        os.mknod(folder / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("no device nodes in this container")

    found = client.lookup(b"zero")

    assert found.attr.rdev == 0x105
    refused(errno.ENXIO, client.open, found.node, os.O_RDONLY)


@pytest.mark.parametrize("name", [b"..", b".", b"", b"../secret", b"/etc", b"d/f", b"a/"])
def test_names_are_single_steps(client: Client, folder: Path, name: bytes) -> None:
    (folder / "d").mkdir()
    (folder / "d/f").write_text("text")
    node = client.walk("d")

    for call in (
        lambda: client.lookup(name),
        lambda: client.lookup(name, node),
        lambda: client.create(name),
        lambda: client.mkdir(name),
        lambda: client.mknod(name, 0o600),
        lambda: client.symlink(name, b"x"),
        lambda: client.link(node, name),
        lambda: client.unlink(name),
        lambda: client.rmdir(name),
        lambda: client.rename(name, b"x"),
        lambda: client.rename(b"d", name),
        lambda: client.rename(b"d", name, flags=2),
    ):
        refused(errno.EINVAL, call)
    assert os.listdir(folder) == ["d"]


def test_names_have_an_end(client: Client) -> None:
    refused(errno.EINVAL, client.call, Op.LOOKUP, ROOT_ID, b"name")
    refused(errno.EINVAL, client.call, Op.RENAME, ROOT_ID, wire.RENAME_IN.pack(ROOT_ID) + b"a\0b")
    refused(errno.EINVAL, client.call, Op.SYMLINK, ROOT_ID, b"a\0")
    refused(errno.EINVAL, client.call, Op.GETXATTR, ROOT_ID, wire.GETXATTR_IN.pack(0, 0) + b"user.a")


def test_links_of_the_share_lead_nowhere_on_the_host(client: Client, folder: Path) -> None:
    (folder / "file").symlink_to("../secret")
    (folder / "dir").symlink_to("../outside")

    refused(errno.ENXIO, client.open, client.walk("file"))
    refused(errno.ENOTDIR, client.lookup, b"file", client.walk("dir"))
    refused(errno.ENOTDIR, client.opendir, client.walk("dir"))
    refused(errno.ENOTDIR, client.create, b"new", client.walk("dir"))
    refused(errno.ENXIO, client.truncate, client.walk("file"), 0)
    refused(errno.ENXIO, client.create, b"file", flags=os.O_RDWR | os.O_TRUNC)
    assert (folder.parent / "secret").read_text() == "secret"


@pytest.fixture
def forgetful(client: Client) -> Client:
    """A client of a server that keeps nothing open between requests, so that it looks for everything again."""
    client.server.folder.nodes._keep = 0
    return client


def test_a_folder_swapped_for_a_link_leads_nowhere(forgetful: Client, folder: Path) -> None:
    (folder / "d").mkdir()
    (folder / "d/file").write_text("mine")
    inner, file = forgetful.walk("d"), forgetful.walk("d/file")

    (folder / "d").rename(folder / "elsewhere")
    (folder / "d").symlink_to("../outside")

    refused(errno.ESTALE, forgetful.open, file)
    refused(errno.ESTALE, forgetful.lookup, b"file", inner)
    refused(errno.ESTALE, forgetful.create, b"new", inner)
    refused(errno.ESTALE, forgetful.unlink, b"file", inner)
    assert forgetful.content(forgetful.walk("elsewhere/file")) == b"mine"
    assert os.listdir(folder.parent / "outside") == ["file"]


def test_a_file_swapped_for_another_is_not_taken_for_it(forgetful: Client, folder: Path) -> None:
    (folder / "f").write_text("mine")
    node = forgetful.walk("f")
    (folder / "g").write_text("other")

    (folder / "g").replace(folder / "f")

    refused(errno.ESTALE, forgetful.open, node)
    assert forgetful.content(forgetful.walk("f")) == b"other"


def test_what_was_closed_is_found_again(forgetful: Client, folder: Path) -> None:
    (folder / "a/b/c").mkdir(parents=True)
    (folder / "a/b/c/f").write_text("text")
    node = forgetful.walk("a/b/c/f")
    top = forgetful.walk("a")
    before = len(os.listdir("/proc/self/fd"))

    forgetful.rename(b"b", b"x", top, ROOT_ID)

    assert forgetful.content(node) == b"text"
    assert len(os.listdir("/proc/self/fd")) == before


def test_nodes_are_bounded(client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_nodes, "MAX_NODES", 3)
    for name in "abc":
        (folder / name).write_text("")
    first = client.walk("a")
    client.walk("b")

    refused(errno.ENFILE, client.walk, "c")
    refused(errno.ENFILE, client.create, b"d")
    client.forget(first)

    assert client.walk("c")
    assert not (folder / "d").exists()


def test_folders_stay_known_while_something_in_them_is(client: Client, folder: Path) -> None:
    (folder / "d").mkdir()
    (folder / "d/f").write_text("text")
    inner, file = client.walk("d"), client.walk("d/f")
    client.forget(inner, 100)

    assert client.content(file) == b"text"
    client.forget(file, 100)
    refused(errno.ESTALE, client.getattr, inner)
    assert len(client.server.folder.nodes) == 1


def test_batch_forget(client: Client, folder: Path) -> None:
    nodes = [client.mknod(b"%d" % n, 0o600).node for n in range(3)]

    client.silent(
        Op.BATCH_FORGET,
        0,
        wire.BATCH_FORGET_IN.pack(4, 0) + b"".join(wire.FORGET_ONE.pack(n, 1) for n in [*nodes, 999]),
    )
    client.silent(Op.BATCH_FORGET, 0, wire.BATCH_FORGET_IN.pack(0xFFFFFFFF, 0))
    client.forget(ROOT_ID, 1 << 63)

    assert len(client.server.folder.nodes) == 1
    assert client.getattr(ROOT_ID).nlink


def test_handles_are_bounded(client: Client, folder: Path) -> None:
    client.server.folder.max_handles = 2
    made, fh = client.create(b"f")
    client.opendir()

    refused(errno.ENFILE, client.open, made.node)
    refused(errno.ENFILE, client.opendir)
    refused(errno.ENFILE, client.create, b"g")
    client.release(fh)

    assert client.open(made.node)
    assert os.listdir(folder) == ["f"]


def test_files_without_a_name_are_bounded(client: Client, folder: Path) -> None:
    nodes = [client.mknod(b"%d" % n, 0o600).node for n in range(3)]
    client.server.folder.nodes._keep = 2

    for n in range(3):
        client.unlink(b"%d" % n)

    assert client.getattr(nodes[1]).nlink == 0
    refused(errno.ESTALE, client.getattr, nodes[2])


@pytest.mark.parametrize("op", [*Op])
@pytest.mark.parametrize("size", [0, 1, 7, 15, 16, 39, 128])
def test_any_request_with_any_arguments_is_answered(client: Client, op: Op, size: int) -> None:
    for fill in (b"\0", b"\xff", b"A"):
        header = wire.IN_HEADER.pack(40 + size, op, 2, ROOT_ID, 0, 0, 0, 0, 0)
        for room in (0, 15, 16, 17, 4096):
            answer = client.serve([header + fill * size], room)

            assert len(answer) <= room


def test_requests_of_wrong_length(client: Client) -> None:
    for length in (0, 39, 41, 0xFFFFFFFF):
        answer = client.serve([wire.IN_HEADER.pack(length, Op.STATFS, 2, ROOT_ID, 0, 0, 0, 0, 0)], 4096)

        assert wire.OUT_HEADER.unpack(answer) == (16, -errno.EINVAL, 2)
    assert client.serve([bytes(39)], 4096) == b""


def test_writes_and_reads_beyond_everything(client: Client) -> None:
    _, fh = client.create(b"f")

    refused(errno.EINVAL, client.write, fh, b"x", offset=1 << 63)
    refused(errno.EINVAL, client.write, fh, b"x", offset=(1 << 63) - 1)
    refused(errno.EINVAL, client.read, fh, offset=(1 << 64) - 1)
    refused(errno.EINVAL, client.call, Op.WRITE, ROOT_ID, wire.WRITE_IN.pack(fh, 0, 2, 0, 0, 0, 0), data=b"x")
    refused(errno.E2BIG, client.setxattr, ROOT_ID, b"user.a", bytes(1 << 17))
    refused(errno.EINVAL, client.setxattr, ROOT_ID, b"user.a", b"", flags=1 << 31)


def test_many_small_buffers(client: Client, folder: Path) -> None:
    data = os.urandom(5000)
    (folder / "f").write_bytes(data)
    fh = client.open(client.walk("f"), os.O_RDWR)
    request = wire.IN_HEADER.pack(80, Op.READ, 2, ROOT_ID, 0, 0, 0, 0, 0) + wire.READ_IN.pack(fh, 0, 5000, 0, 0, 0, 0)
    room = bytearray(16 + 5000)
    view = memoryview(room)

    done = client.server.serve([memoryview(request)], [view[n : n + 1] for n in range(len(room))])
    request = wire.IN_HEADER.pack(5080, Op.WRITE, 4, ROOT_ID, 0, 0, 0, 0, 0)
    request += wire.WRITE_IN.pack(fh, 5000, 5000, 0, 0, 0, 0) + data
    view = memoryview(request)
    client.server.serve([view[n : n + 1] for n in range(len(request))], [memoryview(bytearray(64))])

    assert (done, room[16:]) == (5016, data)
    assert (folder / "f").read_bytes() == data * 2


# The folder.


def test_folders_that_cannot_be_shared(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(NotFoundError, match="no folder"):
        FuseServer(tmp_path / "none")
    with pytest.raises(ConfigError, match="is no folder"):
        FuseServer(tmp_path / "file")
    with pytest.raises(ConfigError, match="use auto or always"):
        FuseServer(tmp_path, cache="never")


def test_close_gives_all_descriptors_back(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    server = FuseServer(tmp_path)

    server.close()

    assert len(os.listdir("/proc/self/fd")) == before
    assert fuse.MAX_PAGES * 4096 == fuse_folder.MAX_TRANSFER


@pytest.mark.parametrize("keep", [0, 100])
def test_a_swap_at_any_moment_leads_nowhere(client: Client, folder: Path, keep: int) -> None:
    """A folder becomes a link out of the share while the guest is on its way to a file in it, or makes one there."""
    (folder / "d").mkdir()
    (folder / "d/file").write_text("mine")
    (folder / "link").symlink_to("../outside")
    client.server.folder.nodes._keep = keep
    found: set[object] = set()

    def visit() -> None:
        try:
            found.add(client.content(client.walk("d/file")))
            client.mknod(b"new", 0o600, client.walk("d"))
        except OSError as error:
            found.add(error.errno)

    moment = 0
    while at_moment(moment, visit, lambda: swap(folder / "d", folder / "link"), part="host/fuse"):
        if (folder / "d").is_symlink():
            swap(folder / "d", folder / "link")
        (folder / "d/new").unlink(missing_ok=True)
        moment += 7  # all of them are thousands

    assert b"mine" in found
    assert found <= {b"mine", errno.ENOTDIR, errno.ESTALE, errno.ENXIO}
    assert len(found) > 1
    assert os.listdir(folder.parent / "outside") == ["file"]


SMALL = st.integers(0, 9)
ARGUMENTS = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda numbers, name: b"".join(n.to_bytes(8, "little") for n in numbers) + name,
        st.lists(st.one_of(SMALL, st.integers(0, (1 << 64) - 1)), max_size=8),
        st.sampled_from([b"", b"a\0", b"a\0b\0", b"..\0", b"a/b\0b\0", b"user.a\0value"])),
)  # fmt: skip
REQUESTS = st.lists(st.tuples(st.sampled_from([*Op]), SMALL, ARGUMENTS, st.integers(0, 600)), max_size=30)


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(REQUESTS)
def test_nothing_that_a_guest_sends_is_more_than_an_error(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[Op, int, bytes, int]]
) -> None:
    top = tmp_path_factory.mktemp("fuzz")
    (top / "secret").write_text("secret")
    (top / "share/a").mkdir(parents=True)
    (top / "share/b").symlink_to("../secret")
    before = len(os.listdir("/proc/self/fd"))
    server = FuseServer(top / "share")
    init = wire.IN_HEADER.pack(56, Op.INIT, 1, 0, 0, 0, 0, 0, 0) + wire.INIT_IN.pack(7, 38, 0, 0)
    server.serve([memoryview(init)], [memoryview(bytearray(80))])

    for op, node, args, room in requests:
        request = wire.IN_HEADER.pack(40 + len(args), op, 2, node, 0, 0, 0, 0, 0) + args
        answer = bytearray(room)
        count = server.serve([memoryview(request)], [memoryview(answer)])
        assert count <= room
        assert not count or wire.OUT_HEADER.unpack_from(answer)[0] == count
    server.close()

    assert (top / "secret").read_text() == "secret"
    assert set(os.listdir(top)) == {"secret", "share"}
    assert len(os.listdir("/proc/self/fd")) == before
