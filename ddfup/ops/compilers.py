"""The compilers: which there are, and the commands that turn ``csrc`` into a library per kind of device."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from ddfup._resources import resource_dir
from ddfup.errors import DDFUpError

# The oldest stable ABI the kernels use: PyTorch 2.10.
DEFINES = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)
CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall")
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA")
# A build takes seconds; one that hangs must not hang its user.
BUILD_SECONDS = 900
CXX_HINT = "install a C++17 compiler such as g++ 9 or clang 10, or name one in CXX"
NVCC_HINT = "pip install nvidia-cuda-nvcc, or install the CUDA toolkit and set CUDA_HOME"


class BuildFailure(DDFUpError):
    """Why a library could not be had; :mod:`ddfup.ops.native` turns it into a note or a KernelBuildError."""


def csrc() -> Path:
    """Return the folder of the sources.

    Raises:
        BuildFailure: If the installation lacks it.
    """
    try:
        return resource_dir("csrc")
    except FileNotFoundError as error:
        raise BuildFailure(str(error), "reinstall ddfup") from error


def instruction_set() -> str:
    """Name what ``-march=native`` depends on: machines that share a home must not share a library."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.lower().startswith(("flags", "features")):
                    return line
    except OSError:
        pass  # not Linux
    return platform.processor()


def compile_cpu(target: Path) -> None:
    """Compile the CPU kernels for this machine's instruction set into ``target``.

    Raises:
        BuildFailure: If there is no compiler, or it fails.
    """
    compiler = find_cxx()
    source = str(csrc() / "ddf_cpu.cpp")
    tuned: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())
    for tuning in tuned:
        command = [
            *compiler,
            *CXX_FLAGS,
            *tuning,
            *DEFINES,
            *_includes(),
            source,
            *_link_flags(),
            "-o",
            str(target),
        ]
        try:
            _run(command)
            return
        except BuildFailure as failure:
            # Not every compiler and processor knows these options; anything else is a real failure.
            if not tuning or not any(word in failure.message for word in ("march", "mcpu", "native")):
                raise


def compile_cuda(target: Path) -> None:
    """Compile the CUDA kernels for the GPUs in this machine into ``target``.

    Raises:
        BuildFailure: If there is no nvcc or no CUDA runtime, or a step fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildFailure(
            "there is no nvcc to compile them",
            NVCC_HINT,
        )
    source = str(csrc() / "ddf_cuda.cu")
    compiled = target.with_suffix(".o")
    host = ["-ccbin", find_cxx()[0]]
    includes = [*_includes(), *(f"-I{folder}" for folder in _cuda_folders("include"))]
    _run(
        [
            str(nvcc),
            *NVCC_FLAGS,
            *gpu_flags(),
            *host,
            *DEFINES,
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
            *find_cxx(),
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
        BuildFailure: If it cannot start, fails or does not end; with its last lines.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS, check=False
        )
    except OSError as error:
        raise BuildFailure(f"{command[0]} cannot be started: {error}", CXX_HINT) from error
    except subprocess.TimeoutExpired as error:
        raise BuildFailure(f"{command[0]} did not end within {BUILD_SECONDS} s", CXX_HINT) from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[-1] if lines else "")
        summary = f"{command[0]} failed with exit status {done.returncode}" + (f": {first.strip()}" if first else "")
        raise BuildFailure("\n".join([summary, *lines[-20:]]), CXX_HINT)


def find_cxx() -> list[str]:
    """Return the C++ compiler as the start of a command."""
    named = os.environ.get("CXX")
    if named:
        return named.split()
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return [found]
    raise BuildFailure("there is no C++ compiler", CXX_HINT)


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


def gpu_flags() -> list[str]:
    """Return nvcc's options for the GPUs in this machine."""
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}" for major, minor in sorted(found)]


def _cuda_folders(name: str) -> Iterator[Path]:
    """Yield the folders of that name in NVIDIA's pip packages."""
    for site in dict.fromkeys((*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        yield from sorted(Path(site).glob(f"nvidia/*/{name}"))


def find_nvcc() -> Path | None:
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
        BuildFailure: If there is none of PyTorch's major version.
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
    raise BuildFailure(
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
