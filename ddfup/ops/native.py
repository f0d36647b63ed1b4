"""Build the native kernels on first use, keep them in a cache and load them.

A library is built on first use into the user's cache, under a name that is the hash of all that shapes it.
Each build has a private folder and ends with one rename, so builds may race or be killed. ``DDFUP_KERNELS``
chooses: ``auto`` (native where possible), ``native`` (a failed build is an error) or ``torch`` (never
native). ``DDFUP_CACHE_DIR`` moves the cache; where it cannot be written its libraries are used all the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from ddfup.errors import ArgumentError, KernelBuildError
from ddfup.ops.cache import cache_dir, is_readable, library_folders, remove_stale, remove_unused
from ddfup.ops.compilers import (
    ARCH_LIST,
    BUILD_SECONDS,
    CXX_FLAGS,
    DEFINES,
    NVCC_FLAGS,
    BuildFailure,
    builds_for_others,
    check_gpus,
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


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


# In a forked process the thread that held the lock is no more, and would never release it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@dataclass(frozen=True)
class KernelStatus:
    """What runs the op on one kind of device.

    Attributes:
        device: ``cpu`` or ``cuda``.
        available: Whether a native library is loaded, or lies built in the cache.
        loaded: Whether this process runs the native kernels.
        failed: Whether the last attempt of this process to build or load them failed.
        library: The library, once it is built.
        compiler: The compiler that builds or would build it, if one is found.
        reason: One sentence: why it is as it is.
        hint: What to do to get native kernels; empty when nothing needs to be done.
    """

    device: str
    available: bool
    loaded: bool
    failed: bool
    library: Path | None
    compiler: str | None
    reason: str
    hint: str


@dataclass(frozen=True)
class Status:
    """The state of all kernels, for ``ddfup doctor``.

    Attributes:
        mode: The value of DDFUP_KERNELS.
        cache: Folder that libraries are built into; one built by others may lie elsewhere.
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
        tensors: All that the kernel reads, as :func:`serves` has it.
    """
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)) and serves(*tensors)


def serves(*tensors: torch.Tensor) -> bool:
    """Tell whether kernels can take the work, loading them if that has not been tried.

    Args:
        tensors: All that the kernel reads: float32, contiguous and on one device, or it cannot.
    """
    device = tensors[0].device
    return (
        all(each.dtype == torch.float32 and each.is_contiguous() and each.device == device for each in tensors)
        # Compilers fuse PyTorch's own with what is around it, and exported files must hold standard operators.
        and not torch.compiler.is_compiling()
        and load(device.type)
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


def is_loaded(device: str) -> bool:
    """Tell whether native kernels serve a kind of device by now: no file is looked at and no GPU asked.

    Args:
        device: Type of a torch device, such as ``cpu`` or ``cuda``.
    """
    return device in _loaded


def build(*, force: bool = False) -> Status:
    """Build the libraries this machine can use, and load them.

    Where TORCH_CUDA_ARCH_LIST names GPUs, the CUDA library is built even if there is none here.

    Args:
        force: Compile again even if the cache has them; a library already loaded stays the one in use until
            the process ends.

    Returns:
        The status afterwards. Failures stand in it.
    """
    with _lock:
        for device in _SOURCES:
            for_others = device == "cuda" and builds_for_others()
            runs_here = device == "cpu" or torch.cuda.is_available()
            if not (runs_here or for_others):
                continue
            _failed.pop(device, None)
            try:
                if for_others:
                    # Whatever GPUs are here: none of them need be among those of the list.
                    _provide_library(device, rebuild=force)
                    if runs_here and device not in _loaded:
                        _load_library(device)
                elif force or device not in _loaded:
                    _load_library(device, rebuild=force)
            except BuildFailure as failure:
                _failed[device] = failure
    return status()


def status() -> Status:
    """Describe which kernels run and why, without building anything."""
    return Status(mode(), cache_dir(), _describe("cpu"), _describe("cuda"))


def _load_library(device: str, *, rebuild: bool = False) -> None:
    """Load the library of a device, building it if absent or unreadable.

    Raises:
        BuildFailure: If that is impossible.
    """
    if device == "cuda":
        check_gpus()
    refused = []
    library = Path()
    for library in _places(device):
        if rebuild or not is_readable(library):
            continue
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        except OSError as error:
            # A file that the system refuses (a damaged disk, another C library) is worth one new build.
            _log.debug("%s cannot be loaded: %s", library, error)
            refused.append(library)
        else:
            _loaded[device] = library
            return
    # The last place can be written to.
    _build_library(device, library, rebuild=rebuild or library in refused)
    if device in _loaded:
        return
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise BuildFailure(
            f"the library just built cannot be loaded: {error}", "report this with `ddfup doctor`"
        ) from error
    _loaded[device] = library


def _provide_library(device: str, *, rebuild: bool) -> None:
    """Build the library of a device, without loading it, if absent.

    Raises:
        BuildFailure: If that is impossible.
    """
    library = _library_path(device)
    if rebuild or not is_readable(library):
        _build_library(device, cache_dir() / library.name, rebuild=rebuild)


def _library_path(device: str) -> Path:
    """Return where the library lies or will lie."""
    library = Path()
    for library in _places(device):
        if is_readable(library):
            break
    return library


def _places(device: str) -> Iterator[Path]:
    """Yield where the library may lie, and last where it can be built."""
    name = _library_name(device)
    return (folder / name for folder in library_folders())


def _library_name(device: str) -> str:
    """Return the library's name: the hash of everything that shapes it."""
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
        parts += [*NVCC_FLAGS, torch.version.cuda or "", *gpu_flags(), os.environ.get("NVCC_CCBIN", "")]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in _source_files(device):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    suffix = ".dll" if sys.platform == "win32" else ".so"
    return f"ddf_{device}-{digest.hexdigest()[:32]}{suffix}"


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
    remove_stale(cache)
    lock = filelock.FileLock(cache / f"{library.stem}.lock", timeout=BUILD_SECONDS)
    try:
        lock.acquire()
    except (filelock.Timeout, OSError, NotImplementedError):
        _log.debug("building %s without a lock", library)
    try:
        if is_readable(library) and not rebuild:
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
            with contextlib.suppress(OSError):
                remove_unused(cache, library)
        except OSError as error:
            raise BuildFailure(f"the build in {cache} failed: {error}", "check free space and permissions") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()


def _first_line(failure: BuildFailure) -> str:
    return failure.message.splitlines()[0]


def _describe(device: str) -> KernelStatus:
    """Return the state of one device's kernels without building any."""
    compiler: str | None = None
    missing: BuildFailure | None = None
    try:
        compiler = find_cxx()[0] if device == "cpu" else str(find_nvcc())
    except BuildFailure as failure:
        missing = failure
    hint = ""
    library: Path | None = None
    if device in _loaded:
        library, reason = _loaded[device], "the native kernels are in use"
        if device in _failed:
            reason, hint = f"{reason}; not built anew: {_first_line(_failed[device])}", _failed[device].hint
    elif mode() == "torch":
        reason, hint = "DDFUP_KERNELS=torch asks for the PyTorch kernels", "unset DDFUP_KERNELS"
    elif device in _failed:
        reason, hint = _first_line(_failed[device]), _failed[device].hint
    elif device == "cuda" and not torch.cuda.is_available() and not builds_for_others():
        reason = "PyTorch finds no CUDA device"
    else:
        try:
            if device == "cuda":
                check_gpus()
            place = _library_path(device)
        except BuildFailure as failure:
            reason, hint = failure.message, failure.hint
        else:
            library = place if is_readable(place) else None
            if device == "cuda" and not torch.cuda.is_available():
                reason = "PyTorch finds no CUDA device" + (f"; built for {ARCH_LIST}" if library else "")
            elif library:
                reason = "built; the first use loads them"
            elif missing:
                reason, hint = missing.message, missing.hint
            else:
                reason, hint = (
                    "not built yet; the first use builds them",
                    "run `ddfup doctor --build` to do it now",
                )
    return KernelStatus(
        device=device,
        available=library is not None,
        loaded=device in _loaded,
        failed=device in _failed,
        library=library,
        compiler=compiler,
        reason=reason,
        hint=hint,
    )
