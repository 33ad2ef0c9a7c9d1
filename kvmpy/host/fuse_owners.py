"""Whose the files of a shared folder are, for the host and for the guest, and what their modes are.

As root, files belong to whom the guest says, and it may set any mode: what root in the guest makes, a program that is
setuid root included, the host has. Otherwise all that the guest makes belongs to the user of this process, whom the
guest sees as root; the files of others it sees as nobody's, and it cannot change owners.
"""

from __future__ import annotations

import errno
import os
import stat

NOBODY = 65534
SAME = 0xFFFFFFFF  # the uid or gid -1: as it is


class Owners:
    """`proc` is an open /proc/self/fd: the way to change what a descriptor of O_PATH stands for. Raises OSError."""

    def __init__(self, proc: int) -> None:
        self._proc = proc
        self.is_root = os.geteuid() == 0
        self.user, self.group = os.geteuid(), os.getegid()

    def shown(self, status: os.stat_result) -> tuple[int, int]:
        """Owner and group of a file as the guest sees them."""
        if self.is_root:
            return status.st_uid, status.st_gid
        return 0 if status.st_uid == self.user else NOBODY, 0 if status.st_gid == self.group else NOBODY

    def give(self, fd: int, folder: int, uid: int, gid: int, mode: int | None) -> None:
        """Owner and mode (None: as it is) of what the guest's user has just made in `folder`, from which it may have
        got its group."""
        status = os.fstat(fd)
        if self.is_root and (uid, gid) != (status.st_uid, status.st_gid):
            if SAME in (uid, gid):
                raise OSError(errno.EINVAL, "no such owner")
            inherits = os.fstat(folder).st_mode & stat.S_ISGID
            os.chown(str(fd), uid, -1 if inherits else gid, dir_fd=self._proc)
        if mode is not None:
            self.chmod(fd, mode | status.st_mode & stat.S_ISGID)

    def chmod(self, fd: int, mode: int) -> None:
        os.chmod(str(fd), stat.S_IMODE(mode), dir_fd=self._proc)

    def chown(self, fd: int, uid: int, gid: int) -> None:
        """Change owner and group, SAME for one that stays."""
        if self.is_root:
            os.chown(str(fd), *(-1 if id == SAME else id for id in (uid, gid)), dir_fd=self._proc)
            return
        status = os.fstat(fd)
        if any(new not in (SAME, old) for new, old in zip((uid, gid), self.shown(status), strict=True)):
            raise OSError(errno.EPERM, "not root on the host")
        self.drop_privileges(fd)

    def drop_privileges(self, fd: int) -> None:
        """What Linux does when somebody else writes to a program: no setuid, no setgid of one that can be run."""
        mode = os.fstat(fd).st_mode
        kept = mode & ~(stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))
        if kept != mode and stat.S_ISREG(mode):
            self.chmod(fd, kept)
