"""Disks that are full, read-only or failing, and users who may not: real ones where the system lets us make them."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from unittest import mock

NOBODY = 65534
SHIM = """
#include <errno.h>
int fsync(int file) { (void)file; errno = EIO; return -1; }
"""


class Unavailable(Exception):
    """This system or user cannot make such a disk."""


def _mount(*arguments):
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise Unavailable("mounting needs Linux and root")
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"mount: {done.stderr.strip()}")


def _unmount(folder):
    subprocess.run(["umount", str(folder)], check=True, capture_output=True)


@contextlib.contextmanager
def full_disk(folder, *, free=0):
    """Make a folder a disk of 1 MiB with so many bytes left; what is in the folder is hidden meanwhile."""
    folder.mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", "size=1m", "none", folder)
    try:
        ballast = folder / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
            while stream.write(bytes(4096)):
                pass
        if free:
            os.truncate(ballast, max(0, ballast.stat().st_size - free))
        yield
    finally:
        _unmount(folder)


@contextlib.contextmanager
def read_only(folder):
    """Make a folder read-only, for root too."""
    _mount("--bind", folder, folder)
    try:
        _mount("-o", "remount,bind,ro", folder)
        yield
    finally:
        _unmount(folder)


@contextlib.contextmanager
def small_files(most):
    """Let no file grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def failing(name, *, calls=0):
    """Let a function of `os` fail with EIO after so many calls."""
    original, left = getattr(os, name), calls

    def call(*arguments, **options):
        nonlocal left
        if left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        left -= 1
        return original(*arguments, **options)

    with mock.patch.object(os, name, call):
        yield


def failing_fsync(folder):
    """Build a library whose fsync fails with EIO; return the environment in which a process has it."""
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SHIM)
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable("no C compiler for an LD_PRELOAD library") from error
    return {"LD_PRELOAD": str(library)}


def as_nobody(folder):
    """Return how to start a process that has no rights but everybody's, after opening the way to a folder."""
    if os.geteuid() != 0:
        return {}
    for place in (folder, *folder.parents):
        if place.stat().st_uid == 0 and place != Path("/") and not place.stat().st_mode & 0o005 == 0o005:
            if not str(place).startswith("/tmp/"):
                raise Unavailable(f"{place} is closed to others")
            place.chmod(place.stat().st_mode | 0o055)
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []}
