"""Find, build and load the native kernels in ``csrc``; the only file that knows compilers.

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
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from ddfup._resources import resource_dir
from ddfup.errors import ArgumentError, DDFUpError, KernelBuildError

Mode = Literal["auto", "native", "torch"]

_log = logging.getLogger("ddfup")
_lock = threading.RLock()
_SOURCES = {
    "cpu": ("ddf_cpu.cpp", ("ddf.h", "ddf_cpu*")),
    "cuda": ("ddf_cuda.cu", ("ddf.h", "*.cuh", "ddf_cuda*")),
}
# The oldest stable ABI the kernels use: PyTorch 2.10.
_DEFINES = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)
_CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall")
_NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA")
_BUILD_SECONDS = 900
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


class _BuildFailure(DDFUpError):
    """Why a library could not be had; turned into a note or a KernelBuildError."""


_loaded: dict[str, Path] = {}
_failed: dict[str, _BuildFailure] = {}


def mode() -> Mode:
    """Return the value of DDFUP_KERNELS.

    Raises:
        ArgumentError: If it is none of ``auto``, ``native`` and ``torch``.
    """
    value = os.environ.get("DDFUP_KERNELS", "auto") or "auto"
    for known in get_args(Mode):
        if value == known:
            return known  # type: ignore[no-any-return]
    raise ArgumentError(
        f"DDFUP_KERNELS must be auto, native or torch; got {value!r}", "unset it to let ddfup choose"
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
            except _BuildFailure as error:
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
            except _BuildFailure as failure:
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
        _BuildFailure: If that is impossible.
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
            raise _BuildFailure(
                f"the library just built cannot be loaded: {error}", "report this with `ddfup doctor`"
            ) from error
        # A file in the cache that the system refuses (a damaged disk, another C library) is worth one new
        # build.
        _build_library(device, library, rebuild=True)
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        except OSError as again:
            raise _BuildFailure(
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
        *_CXX_FLAGS,
        *_DEFINES,
        os.environ.get("CXX", ""),
    ]
    if device == "cpu":
        parts.append(_instruction_set())
    else:
        parts += [*_NVCC_FLAGS, torch.version.cuda or "", *_gpu_flags()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in _source_files(device):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    suffix = ".dll" if sys.platform == "win32" else ".so"
    return cache_dir() / f"ddf_{device}-{digest.hexdigest()[:32]}{suffix}"


def _source_files(device: str) -> list[Path]:
    folder = _csrc()
    return sorted({path for pattern in _SOURCES[device][1] for path in folder.glob(pattern)})


def _csrc() -> Path:
    try:
        return resource_dir("csrc")
    except FileNotFoundError as error:
        raise _BuildFailure(str(error), "reinstall ddfup") from error


def _instruction_set() -> str:
    """Name what ``-march=native`` depends on: machines that share a home must not share a library."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.lower().startswith(("flags", "features")):
                    return line
    except OSError:
        pass  # not Linux
    return platform.processor()


def _build_library(device: str, library: Path, *, rebuild: bool) -> None:
    """Compile a library and put it in its place.

    The lock only saves work: processes that start together wait for the first one's build. It is released by
    the system when its holder dies, and the build is right without it.

    Raises:
        _BuildFailure: If there is no compiler, or it fails.
    """
    import filelock

    cache = library.parent
    _remove_stale(cache)
    lock = filelock.FileLock(cache / f"{library.stem}.lock", timeout=_BUILD_SECONDS)
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
            raise _BuildFailure(
                f"{cache} cannot be written: {error}", "set DDFUP_CACHE_DIR to a writable folder"
            ) from error
        try:
            _log.info("ddfup: building the %s kernels, once", device)
            built = folder / library.name
            if device == "cpu":
                _compile_cpu(built)
            else:
                _compile_cuda(built)
            built.replace(library)
        except OSError as error:
            raise _BuildFailure(
                f"the build in {cache} failed: {error}", "check free space and permissions"
            ) from error
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


def _compile_cpu(target: Path) -> None:
    compiler = _find_cxx()
    source = str(_csrc() / _SOURCES["cpu"][0])
    tuned: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())
    for tuning in tuned:
        command = [
            *compiler,
            *_CXX_FLAGS,
            *tuning,
            *_DEFINES,
            *_includes(),
            source,
            *_link_flags(),
            "-o",
            str(target),
        ]
        try:
            _run(command)
            return
        except _BuildFailure as failure:
            # Not every compiler and processor knows these options; anything else is a real failure.
            if not tuning or not any(word in failure.message for word in ("march", "mcpu", "native")):
                raise


def _compile_cuda(target: Path) -> None:
    nvcc = _find_nvcc()
    if nvcc is None:
        raise _BuildFailure(
            "there is no nvcc to compile them",
            "pip install nvidia-cuda-nvcc, or install the CUDA toolkit and set CUDA_HOME",
        )
    source = str(_csrc() / _SOURCES["cuda"][0])
    compiled = target.with_suffix(".o")
    host = ["-ccbin", _find_cxx()[0]]
    includes = [*_includes(), *(f"-I{folder}" for folder in _cuda_folders("include"))]
    _run(
        [
            str(nvcc),
            *_NVCC_FLAGS,
            *_gpu_flags(),
            *host,
            *_DEFINES,
            *includes,
            "-c",
            source,
            "-o",
            str(compiled),
        ]
    )
    runtime = _find_cudart(nvcc)
    _run(
        [
            *_find_cxx(),
            str(compiled),
            *_link_flags(),
            _torch_library("torch_cuda"),
            str(runtime),
            "-o",
            str(target),
        ]
    )


def _run(command: list[str]) -> None:
    """Run a compiler.

    Raises:
        _BuildFailure: If it cannot start, fails or does not end; with its last lines.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_BUILD_SECONDS, check=False
        )
    except OSError as error:
        raise _BuildFailure(f"{command[0]} cannot be started: {error}", _COMPILER_HINT) from error
    except subprocess.TimeoutExpired as error:
        raise _BuildFailure(f"{command[0]} did not end within {_BUILD_SECONDS} s", _COMPILER_HINT) from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[-1] if lines else "")
        summary = f"{command[0]} failed with exit status {done.returncode}" + (
            f": {first.strip()}" if first else ""
        )
        raise _BuildFailure("\n".join([summary, *lines[-20:]]), _COMPILER_HINT)


_COMPILER_HINT = "install a C++17 compiler such as g++ 9 or clang 10, or name one in CXX"


def _find_cxx() -> list[str]:
    """Return the C++ compiler as the start of a command."""
    named = os.environ.get("CXX")
    if named:
        return named.split()
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return [found]
    raise _BuildFailure("there is no C++ compiler", _COMPILER_HINT)


def _torch_folder() -> Path:
    return Path(torch.__file__).parent


def _includes() -> list[str]:
    # As system headers, so that warnings are about our own code.
    return ["-isystem", str(_torch_folder() / "include")]


def _torch_library(name: str) -> str:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return str(_torch_folder() / "lib" / f"lib{name}.{suffix}")


def _link_flags() -> list[str]:
    """Return the linker's options; at run time PyTorch's library is found by name, being loaded already."""
    return ["-shared", _torch_library("torch_cpu")]


def _gpu_flags() -> list[str]:
    """Return nvcc's options for the GPUs in this machine."""
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}" for major, minor in sorted(found)]


def _cuda_folders(name: str) -> Iterator[Path]:
    """Yield the folders of that name in NVIDIA's pip packages."""
    for site in dict.fromkeys((*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        yield from sorted(Path(site).glob(f"nvidia/*/{name}"))


def _find_nvcc() -> Path | None:
    """Return nvcc: of the named toolkit, on the PATH, of NVIDIA's pip packages, or in the usual place."""
    named = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    places = [
        *named,
        *([Path(on_path).parent] if on_path else []),
        *_cuda_folders("bin"),
        Path("/usr/local/cuda/bin"),
    ]
    for place in places:
        found = shutil.which("nvcc", path=str(place))
        if found:
            return Path(found)
    return None


def _find_cudart(nvcc: Path) -> Path:
    """Return the CUDA runtime to link: the one this process runs already, else PyTorch's or the toolkit's.

    Raises:
        _BuildFailure: If there is none of PyTorch's major version.
    """
    major = (torch.version.cuda or "").partition(".")[0]
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    toolkits = [
        *named,
        nvcc.resolve().parent.parent,
        Path("/usr/local/cuda"),
        Path(f"/usr/local/cuda-{major}"),
    ]
    folders = [*_cuda_folders("lib"), _torch_folder() / "lib"]
    folders += [toolkit / name for toolkit in toolkits for name in ("lib64", "lib")]
    for library in (
        *_loaded_files(),
        *(file for folder in folders for file in sorted(folder.glob("libcudart*"))),
    ):
        if library.name.startswith("libcudart") and f".so.{major}" in library.name:
            return library
    raise _BuildFailure(
        f"there is no libcudart.so.{major} to link with",
        f"install the CUDA {major} runtime, the version PyTorch was built with",
    )


def _loaded_files() -> list[Path]:
    """Return the files mapped into this process, where the system tells."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [Path(path) for path in dict.fromkeys(line[line.find("/") :] for line in lines if "/" in line)]


def _describe(device: str) -> KernelStatus:
    """Return the state of one device's kernels without building any."""
    try:
        found = _find_cxx()[0] if device == "cpu" else _find_nvcc()
    except _BuildFailure:
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
        except _BuildFailure as failure:
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
                reason, hint = "there is no C++ compiler", _COMPILER_HINT
            else:
                reason = "there is no nvcc to compile them"
                hint = "pip install nvidia-cuda-nvcc, or install the CUDA toolkit and set CUDA_HOME"
    return KernelStatus(device, library is not None, device in _loaded, library, compiler, reason, hint)
