"""The compilers: which there are, and the commands that turn ``csrc`` into a library per kind of device."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
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
# The variable by which all that compiles for PyTorch is told of GPUs that are not in this machine.
ARCH_LIST = "TORCH_CUDA_ARCH_LIST"

_CPUINFO = Path("/proc/cpuinfo")
# What Linux calls the x86 instructions that a compiler may choose by itself; "pni" is SSE3.
_X86_INSTRUCTIONS = re.compile(
    r"(sse|ssse|avx|amx|apx|sha)\w*|pni|fma4?|f16c|bmi[12]|popcnt|abm|lzcnt|movbe|adx|v?aes|v?pclmulqdq|gfni|xop|tbm"
)
# Words that may stand before the compiler in CXX; nvcc wants the compiler itself.
_LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")
# Families that PyTorch takes by name in TORCH_CUDA_ARCH_LIST.
_GPU_FAMILIES = {
    "volta": "7.0+PTX",
    "turing": "7.5+PTX",
    "ampere": "8.0 8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0 10.3 12.0 12.1+PTX",
}


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
    """Name what ``-march=native`` depends on: processors that differ in it must not share a library.

    Linux lists much beside the instructions (clocks, virtual machines), which differs between machines that can.
    """
    try:
        with _CPUINFO.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, values = line.lower().partition(":")
                if name.strip() == "flags":
                    return " ".join(sorted(filter(_X86_INSTRUCTIONS.fullmatch, values.split())))
                if name.strip() == "features":
                    return " ".join(sorted(values.split()))
    except OSError:
        pass  # not Linux
    return platform.processor()


def compile_cpu(target: Path) -> None:
    """Compile the CPU kernels for this machine's instruction set into ``target``.

    Raises:
        BuildFailure: If there is no compiler, or it fails.
    """
    for tuning in ("-march=native", "-mcpu=native"):
        try:
            _compile_cpu(target, tuning)
            return
        except BuildFailure as failure:
            # Where an option is unknown the other may serve. Any other failure may still be the tuning's, such as an
            # assembler older than the processor: what comes of a build without is what counts.
            if not any(word in failure.message for word in ("march", "mcpu", "native")):
                break
    _compile_cpu(target)


def _compile_cpu(target: Path, *tuning: str) -> None:
    source = str(csrc() / "ddf_cpu.cpp")
    _run([*find_cxx(), *CXX_FLAGS, *tuning, *DEFINES, *_includes(), source, *_link_flags(), "-o", str(target)])


def compile_cuda(target: Path) -> None:
    """Compile the CUDA kernels into ``target``, for the GPUs that :func:`gpu_flags` names.

    Raises:
        BuildFailure: If there is no nvcc or no CUDA runtime, or a step fails.
    """
    nvcc = find_nvcc()
    source = str(csrc() / "ddf_cuda.cu")
    compiled = target.with_suffix(".o")
    includes = [*_includes(), *(f"-I{folder}" for folder in _cuda_folders("include"))]
    _run(
        [
            str(nvcc),
            *NVCC_FLAGS,
            *gpu_flags(),
            *_host_flags(),
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


def _host_flags() -> list[str]:
    """Return nvcc's options for the C++ compiler that it calls."""
    # nvcc reads this variable itself, but an option would win over it.
    if os.environ.get("NVCC_CCBIN"):
        return []
    words = find_cxx()
    while len(words) > 1 and Path(words[0]).name in _LAUNCHERS:
        words = words[1:]
    # At a comma nvcc would take an option for two.
    return ["-ccbin", words[0], *("-Xcompiler=" + word.replace(",", "\\,") for word in words[1:])]


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


@dataclass(frozen=True, order=True)
class _Target:
    """A kind of GPU to compile for.

    Attributes:
        major: First number of the compute capability.
        minor: Second number.
        suffix: "a" or "f" if the code may use what only this kind, or its family, has.
        ptx: Whether it is code for later kinds, to be finished by their driver.
    """

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    @property
    def flag(self) -> str:
        """The option by which nvcc compiles for it."""
        number = f"{self.major}{self.minor}{self.suffix}"
        return f"-gencode=arch=compute_{number},code={'compute' if self.ptx else 'sm'}_{number}"

    def serves(self, major: int, minor: int) -> bool:
        """Tell whether code for this kind runs on a GPU of that compute capability."""
        if self.suffix == "a":
            return (major, minor) == (self.major, self.minor)
        if self.ptx and not self.suffix:
            return (major, minor) >= (self.major, self.minor)
        return major == self.major and minor >= self.minor


def _listed_targets() -> list[_Target]:
    """Return what TORCH_CUDA_ARCH_LIST names, such as ``8.0;9.0+PTX``; nothing where it is unset.

    Raises:
        BuildFailure: If it has another form.
    """
    targets = set()
    for word in re.split(r"[\s;,]+", os.environ.get(ARCH_LIST, "").lower()):
        for entry in _GPU_FAMILIES.get(word, word).lower().split():
            found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+ptx)?", entry)
            if not found:
                raise BuildFailure(f"{ARCH_LIST} must be such as 8.0;9.0+PTX; got {entry!r}", "correct or unset it")
            target = _Target(int(found[1]), int(found[2]), found[3])
            targets.add(target)
            if found[4]:
                targets.add(_Target(target.major, target.minor, target.suffix, ptx=True))
    return sorted(targets)


def _visible_gpus() -> list[tuple[int, int]]:
    return sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})


def builds_for_others() -> bool:
    """Tell whether CUDA kernels are to be built even if this machine has no GPU, as when an image is made."""
    return torch.version.cuda is not None and bool(os.environ.get(ARCH_LIST, "").strip("; ,"))


def gpu_flags() -> list[str]:
    """Return nvcc's options for the GPUs of TORCH_CUDA_ARCH_LIST, or those in this machine.

    Raises:
        BuildFailure: If the variable has a form that nobody knows.
    """
    targets = _listed_targets() or [_Target(major, minor) for major, minor in _visible_gpus()]
    return [target.flag for target in targets]


def check_gpus() -> None:
    """Check that the kernels run on every GPU in this machine: a call on another one would be an error.

    Raises:
        BuildFailure: If TORCH_CUDA_ARCH_LIST leaves one out, or has a form that nobody knows.
    """
    targets = _listed_targets()
    for gpu in _visible_gpus() if targets else []:
        if not any(target.serves(*gpu) for target in targets):
            number = ".".join(map(str, gpu))
            raise BuildFailure(
                f"{ARCH_LIST}={os.environ[ARCH_LIST]} leaves out a GPU here, of compute capability {number}",
                f"add {number} to {ARCH_LIST}, or unset it",
            )


def _cuda_folders(name: str) -> Iterator[Path]:
    """Yield the folders of that name in NVIDIA's pip packages."""
    for site in dict.fromkeys((*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        yield from sorted(Path(site).glob(f"nvidia/*/{name}"))


def find_nvcc() -> Path:
    """Return nvcc: of the named toolkit, on the PATH, of NVIDIA's pip packages, or in the usual places.

    One of PyTorch's major version of CUDA comes first: what another compiles wants another runtime beside PyTorch's.
    PyTorch's CPU build, with which nothing runs, takes any.

    Raises:
        BuildFailure: If there is none, or only one of another major version.
    """
    wanted = (torch.version.cuda or "").partition(".")[0]
    named = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    places = [
        *named,
        *([Path(on_path).parent] if on_path else []),
        *_cuda_folders("bin"),
        Path("/usr/local/cuda/bin"),
        *(sorted(Path("/usr/local").glob(f"cuda-{wanted}*/bin")) if wanted else []),
    ]
    mute: Path | None = None
    others: list[str] = []
    for place in dict.fromkeys(places):
        found = shutil.which("nvcc", path=str(place))
        if not found:
            continue
        if not wanted:
            return Path(found)
        major = _nvcc_major(found)
        if major == wanted:
            return Path(found)
        if major is None:
            mute = mute or Path(found)
        else:
            others.append(major)
    if mute:
        return mute  # its build will tell what is wrong with it, if anything
    if others:
        raise BuildFailure(
            f"nvcc is of CUDA {others[0]}, PyTorch of {torch.version.cuda}",
            f"{NVCC_HINT}; it has to be of CUDA {wanted}",
        )
    raise BuildFailure("there is no nvcc to compile them", NVCC_HINT)


def _nvcc_major(nvcc: str) -> str | None:
    """Return the major version of the CUDA that an nvcc is of, or None if it does not tell."""
    try:
        done = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+)\.", done.stdout)
    return found[1] if found else None


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
