"""What is freed is kept: in a process of its own, since the setting is a process's."""

import platform
import subprocess
import sys

import pytest

from ddfup import _memory

SCRIPT = """
import ctypes, resource, sys
from ddfup._memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_memory()
print([faults(100 << 20) for _ in range(3)][-1])
"""


GIVE_BACK = """
import ctypes, sys
from ddfup._memory import keep_freed_memory, return_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

assert keep_freed_memory()
before = resident()
block = libc.malloc(100 << 20)
ctypes.memset(block, 1, 100 << 20)
libc.free(block)
kept = resident()
assert return_freed_memory()
print(kept - before, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_what_is_kept_can_be_given_back():
    done = subprocess.run([sys.executable, "-c", GIVE_BACK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    kept, left = map(int, done.stdout.split())
    assert kept > 90_000 > 10_000 > left


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_a_block_that_was_freed_is_not_taken_anew():
    def faults(how):
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    # Pages of 4 KiB or, where the system gives them unasked, of 2 MiB.
    assert faults("keep") < 10 < faults("leave")


@pytest.mark.parametrize("missing", ["platform", "function"])
def test_elsewhere_nothing_happens(monkeypatch, missing):
    if missing == "platform":
        monkeypatch.setattr(_memory.sys, "platform", "darwin")
    else:
        monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not _memory.keep_freed_memory()
    assert not _memory.return_freed_memory()
