"""Build the native kernels on first use, keep them in a cache and load them.

A library is built on first use into the user's cache, under a name that is the hash of all that shapes it.
Each build has a private folder and ends with one rename, so builds may race or be killed. ``DDFUP_KERNELS``
chooses: ``auto`` (native where possible), ``native`` (a failed build is an error) or ``torch`` (never
native). ``DDFUP_CACHE_DIR`` moves the cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import sys
import sysconfig
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from ddfup.errors import ArgumentError, KernelBuildError
from ddfup.ops.compilers import (
    BUILD_SECONDS,
    CXX_FLAGS,
    CXX_HINT,
    DEFINES,
    NVCC_FLAGS,
    NVCC_HINT,
    BuildFailure,
    compile_cpu,
    compile_cuda,
    csrc,
    find_cxx,
    find_nvcc,
    gpu_flags,
    instruction_set,
)

Mode = Literal["auto", "native", "torch"]

_log = logging.getLogger("ddfup")
_lock = threading.RLock()
# What of csrc shapes the library of each kind of device.
_SOURCES = {"cpu": ("ddf.h", "ddf_torch.h", "ddf_cpu*"), "cuda": ("ddf.h", "ddf_torch.h", "*.cuh", "ddf_cuda*")}
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class KernelStatus:
    """What runs the op on one kind of device.

    Attributes:
        device: ``cpu`` or ``cuda``.
        available: Whether a native library is loaded, or lies built in the cache.
        loaded: Whether this process runs the native kernels.
        library: The library, once it is built.
        compiler: The compiler that builds or would build it, if one is found.
        reason: One sentence: why it is as it is.
        hint: What to do to get native kernels; empty when nothing needs to be done.
    """

    device: str
    available: bool
    loaded: bool
    library: Path | None
    compiler: str | None
    reason: str
    hint: str


@dataclass(frozen=True)
class Status:
    """The state of all kernels, for ``ddfup doctor``.

    Attributes:
        mode: The value of DDFUP_KERNELS.
        cache: Folder of the built libraries.
        cpu: Kernels for tensors on the CPU.
        cuda: Kernels for tensors on NVIDIA GPUs.
    """

    mode: Mode
    cache: Path
    cpu: KernelStatus
    cuda: KernelStatus


_loaded: dict[str, Path] = {}
_failed: dict[str, BuildFailure] = {}


def mode() -> Mode:
    """Return the value of DDFUP_KERNELS.

    Raises:
        ArgumentError: If it is none of ``auto``, ``native`` and ``torch``.
    """
    value = os.environ.get("DDFUP_KERNELS", "auto") or "auto"
    for known in get_args(Mode):
        if value == known:
            return known  # type: ignore[no-any-return]
    raise ArgumentError(f"DDFUP_KERNELS must be auto, native or torch; got {value!r}", "unset it to let ddfup choose")


def serves_inference(*tensors: torch.Tensor) -> bool:
    """Tell whether kernels without gradients can take the work, loading them if that has not been tried.

    Args:
        tensors: All that the kernel reads, on one device: float32 and contiguous, or it cannot.
    """
    return (
        all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        # Compilers fuse PyTorch's own with what is around it, and exported files must hold standard operators.
        and not torch.compiler.is_compiling()
        and load(tensors[0].device.type)
    )


def load(device: str) -> bool:
    """Load the native kernels for a kind of device, building them first if the cache has none.

    A failure is remembered, so each process tries once.

    Args:
        device: Type of a torch device, such as ``cpu`` or ``cuda``.

    Returns:
        Whether native kernels now serve that device.

    Raises:
        KernelBuildError: If they cannot, and DDFUP_KERNELS is ``native``.
        ArgumentError: If DDFUP_KERNELS has an unknown value.
    """
    chosen = mode()
    if chosen == "torch" or device not in _SOURCES:
        return False
    with _lock:
        if device in _loaded:
            return True
        if device not in _failed:
            try:
                _load_library(device)
                return True
            except BuildFailure as error:
                _failed[device] = error
                if chosen == "auto":
                    kind = "CPU" if device == "cpu" else "CUDA"
                    _log.warning(
                        "ddfup: no native %s kernels, using slower PyTorch ones: %s (%s)",
                        kind,
                        error.message.splitlines()[0],
                        error.hint,
                    )
        failure = _failed[device]
    if chosen == "native":
        raise KernelBuildError(failure.message, failure.hint)
    return False


def build(*, force: bool = False) -> Status:
    """Build the libraries this machine can use, and load them.

    Args:
        force: Compile again even if the cache has them; a library already loaded stays the one in use until
            the process ends.

    Returns:
        The status afterwards. Failures stand in it.
    """
    with _lock:
        for device in _SOURCES:
            if device == "cuda" and not torch.cuda.is_available():
                continue
            _failed.pop(device, None)
            try:
                if force or device not in _loaded:
                    _load_library(device, rebuild=force)
            except BuildFailure as failure:
                _failed[device] = failure
    return status()


def status() -> Status:
    """Describe which kernels run and why, without building anything."""
    return Status(mode(), cache_dir(), _describe("cpu"), _describe("cuda"))


def cache_dir() -> Path:
    """Return the folder of built libraries, created if need be.

    It is DDFUP_CACHE_DIR, or the user's cache; if that cannot be written, a folder of this user under the
    system's temporary one.
    """
    chosen = os.environ.get("DDFUP_CACHE_DIR")
    if chosen:
        folder = Path(chosen).expanduser().absolute()
    else:
        import platformdirs

        folder = Path(platformdirs.user_cache_dir("ddfup", appauthor=False))
    if _is_writable(folder):
        return folder
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    shared = Path(tempfile.gettempdir()) / f"ddfup-{owner}"
    if _is_writable(shared) and _is_private(shared):
        return shared
    return _process_dir()


_private_folder: list[Path] = []


def _process_dir() -> Path:
    """Return a temporary folder that only this process uses."""
    if not _private_folder:
        _private_folder.append(Path(tempfile.mkdtemp(prefix="ddfup-")))
    return _private_folder[0]


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _is_private(folder: Path) -> bool:
    """Tell whether nobody else could have put a library there for us to run."""
    if not hasattr(os, "getuid"):
        return True
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _load_library(device: str, *, rebuild: bool = False) -> None:
    """Load the library of a device, building it if absent or unreadable.

    Raises:
        BuildFailure: If that is impossible.
    """
    library = _library_path(device)
    fresh = rebuild or not library.is_file()
    if fresh:
        _build_library(device, library, rebuild=rebuild)
    if device in _loaded:
        return
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        if fresh:
            raise BuildFailure(
                f"the library just built cannot be loaded: {error}", "report this with `ddfup doctor`"
            ) from error
        # A file in the cache that the system refuses (a damaged disk, another C library) is worth one new
        # build.
        _build_library(device, library, rebuild=True)
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        except OSError as again:
            raise BuildFailure(
                f"the library just built cannot be loaded: {again}", "report this with `ddfup doctor`"
            ) from again
    _loaded[device] = library


def _library_path(device: str) -> Path:
    """Return where the library lies or will lie: its name is the hash of everything that shapes it."""
    parts = [
        device,
        torch.__version__,
        sys.implementation.cache_tag or "",
        sysconfig.get_config_var("SOABI") or "",
        platform.system(),
        platform.machine(),
        *CXX_FLAGS,
        *DEFINES,
        os.environ.get("CXX", ""),
    ]
    if device == "cpu":
        parts.append(instruction_set())
    else:
        parts += [*NVCC_FLAGS, torch.version.cuda or "", *gpu_flags()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in _source_files(device):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    suffix = ".dll" if sys.platform == "win32" else ".so"
    return cache_dir() / f"ddf_{device}-{digest.hexdigest()[:32]}{suffix}"


def _source_files(device: str) -> list[Path]:
    folder = csrc()
    return sorted({path for pattern in _SOURCES[device] for path in folder.glob(pattern)})


def _build_library(device: str, library: Path, *, rebuild: bool) -> None:
    """Compile a library and put it in its place.

    The lock only saves work: processes that start together wait for the first one's build. It is released by
    the system when its holder dies, and the build is right without it.

    Raises:
        BuildFailure: If there is no compiler, or it fails.
    """
    import filelock

    cache = library.parent
    _remove_stale(cache)
    lock = filelock.FileLock(cache / f"{library.stem}.lock", timeout=BUILD_SECONDS)
    try:
        lock.acquire()
    except (filelock.Timeout, OSError, NotImplementedError):
        _log.debug("building %s without a lock", library)
    try:
        if library.is_file() and not rebuild:
            return
        try:
            folder = Path(tempfile.mkdtemp(prefix="build-", dir=cache))
        except OSError as error:
            raise BuildFailure(
                f"{cache} cannot be written: {error}", "set DDFUP_CACHE_DIR to a writable folder"
            ) from error
        try:
            _log.info("ddfup: building the %s kernels, once", device)
            built = folder / library.name
            if device == "cpu":
                compile_cpu(built)
            else:
                compile_cuda(built)
            built.replace(library)
        except OSError as error:
            raise BuildFailure(f"the build in {cache} failed: {error}", "check free space and permissions") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()


def _remove_stale(cache: Path) -> None:
    """Delete the folders of builds that were killed long ago."""
    for folder in cache.glob("build-*"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # another process was faster


def _describe(device: str) -> KernelStatus:
    """Return the state of one device's kernels without building any."""
    try:
        found = find_cxx()[0] if device == "cpu" else find_nvcc()
    except BuildFailure:
        found = None
    compiler = str(found) if found else None
    hint = ""
    library: Path | None = None
    if device in _loaded:
        library, reason = _loaded[device], "the native kernels are in use"
    elif mode() == "torch":
        reason, hint = "DDFUP_KERNELS=torch asks for the PyTorch kernels", "unset DDFUP_KERNELS"
    elif device == "cuda" and not torch.cuda.is_available():
        reason = "PyTorch finds no CUDA device"
    elif device in _failed:
        reason, hint = _failed[device].message.splitlines()[0], _failed[device].hint
    else:
        try:
            library = _library_path(device)
        except BuildFailure as failure:
            reason, hint = failure.message, failure.hint
        else:
            built = library.is_file()
            if not built:
                library = None
            if built:
                reason = "built; the first use loads them"
            elif compiler:
                reason, hint = (
                    "not built yet; the first use builds them",
                    "run `ddfup doctor --build` to do it now",
                )
            elif device == "cpu":
                reason, hint = "there is no C++ compiler", CXX_HINT
            else:
                reason = "there is no nvcc to compile them"
                hint = NVCC_HINT
    return KernelStatus(device, library is not None, device in _loaded, library, compiler, reason, hint)
