"""The loader: fallback, errors, races and killed builds, in processes and caches of their own."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddfup._resources import resource_dir
from ddfup.errors import ArgumentError, KernelBuildError
from ddfup.inference import Upsampler
from ddfup.ops import cache, compilers, native

ROOT = resource_dir("csrc").parent
# Runs the op twice, so that a second try to build would show.
USE = """
import torch
from ddfup.ops import ddf, native
for _ in range(2):
    out = ddf(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), torch.ones(1, 9, 3, 3), kernel_size=3)
assert out[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]], out
print(native.status().cpu.loaded)
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the fake compilers are shell scripts")


def environment(cache: Path, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "DDFUP_KERNELS")}
    return {**kept, "PYTHONPATH": str(ROOT), "DDFUP_CACHE_DIR": str(cache), **changes}


def start(cache: Path, code: str = USE, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(cache, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="session")
def library() -> Path:
    """The real library, which the fake compilers hand out."""
    if native.mode() == "torch":
        pytest.skip("DDFUP_KERNELS=torch builds nothing")
    assert native.load("cpu")
    path = native.status().cpu.library
    assert path is not None
    return path


def fake_compiler(folder: Path, library: Path, before: str = "") -> Path:
    """Write a compiler that logs its call and copies a library to where `-o` says."""
    script = folder / "fake-cxx"
    script.write_text(
        f'#!/bin/sh\necho call >> "{folder}/calls"\n{before}\n'
        f'for target in "$@"; do :; done\ncp "{library}" "$target"\n'
    )
    script.chmod(0o755)
    return script


def calls(folder: Path) -> int:
    log = folder / "calls"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_without_a_compiler_the_torch_kernels_run_and_one_note_says_so(tmp_path: Path) -> None:
    process = start(tmp_path, CXX="/bin/false")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.split() == ["False"]
    notes = [line for line in err.splitlines() if line.strip()]
    assert len(notes) == 1
    assert notes[0].startswith("ddfup: no native CPU kernels, using slower PyTorch ones: /bin/false failed")
    assert "install a C++17 compiler" in notes[0]


def test_native_mode_turns_a_failed_build_into_an_error(tmp_path: Path) -> None:
    compiler = tmp_path / "broken-cxx"
    compiler.write_text("#!/bin/sh\necho 'ddf_cpu.cpp:7: error: no such planet' >&2\nexit 3\n")
    compiler.chmod(0o755)
    process = start(tmp_path, CXX=str(compiler), DDFUP_KERNELS="native")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "KernelBuildError" in err
    assert f"{compiler} failed with exit status 3: ddf_cpu.cpp:7: error: no such planet" in err


def test_torch_mode_never_calls_a_compiler(tmp_path: Path) -> None:
    compiler = fake_compiler(tmp_path, Path("/nonexistent"))
    process = start(tmp_path / "cache", CXX=str(compiler), DDFUP_KERNELS="torch")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.split(), err) == (0, ["False"], "")
    assert calls(tmp_path) == 0


def test_processes_that_start_together_build_once(tmp_path: Path, library: Path) -> None:
    compiler = fake_compiler(tmp_path, library, before="sleep 2")
    cache = tmp_path / "cache"
    processes = [start(cache, CXX=str(compiler), DDFUP_KERNELS="native") for _ in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out.split(), err) == (0, ["True"], "")
    assert len(list(cache.glob("*.so"))) == 1
    assert not list(cache.glob("build-*"))
    # A process late by more than the build finds the library; none builds beside another.
    assert calls(tmp_path) == 1


def test_a_build_killed_halfway_harms_nobody(tmp_path: Path, library: Path) -> None:
    cache = tmp_path / "cache"
    compiler = fake_compiler(tmp_path, library, before='[ -n "$HANG" ] && sleep 60')
    process = start(cache, CXX=str(compiler), DDFUP_KERNELS="native", HANG="1")
    deadline = time.monotonic() + 60
    while not calls(tmp_path):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert list(cache.glob("build-*")) and not list(cache.glob("*.so"))
    again = start(cache, CXX=str(compiler), DDFUP_KERNELS="native")
    out, err = again.communicate(timeout=120)
    assert (again.returncode, out.split(), err) == (0, ["True"], "")


def test_an_unreadable_library_is_built_again_and_a_folder_that_cannot_be_is_replaced(
    tmp_path: Path, library: Path
) -> None:
    """The named and the user's cache lie under a file, so the temporary folder serves; its library is damaged."""
    compiler = fake_compiler(tmp_path, library)
    (tmp_path / "file").touch()
    changes = {
        "CXX": str(compiler),
        "DDFUP_KERNELS": "native",
        "TMPDIR": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "file"),
    }
    find = "from ddfup.ops import native; print(native._library_path('cpu'))"
    process = start(tmp_path / "file" / "cache", find, **changes)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    damaged = Path(out.strip())
    assert damaged.parent.parent == tmp_path
    damaged.write_bytes(b"not a library")
    process = start(tmp_path / "file" / "cache", **changes)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.split(), err) == (0, ["True"], "")
    assert calls(tmp_path) == 1


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A loader that has loaded and failed nothing, with an empty cache; loading is recorded, not done."""
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "_failed", {})
    monkeypatch.setenv("DDFUP_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("DDFUP_KERNELS", "auto")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return tmp_path


def test_the_name_follows_all_that_shapes_the_library(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = native._library_path("cpu")
    assert native._library_path("cpu") == before
    sources = fresh / "csrc"
    sources.mkdir()
    for source in native._source_files("cpu"):
        (sources / source.name).write_bytes(source.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(compilers, "resource_dir", lambda name: sources)
        assert native._library_path("cpu") == before
        with (sources / "ddf.h").open("a") as header:
            header.write("// changed\n")
        assert native._library_path("cpu") != before
    for change in (
        lambda patch: patch.setattr(torch, "__version__", "9.9"),
        lambda patch: patch.setattr(native, "CXX_FLAGS", ("-O0",)),
        lambda patch: patch.setattr(native, "instruction_set", lambda: "abacus"),
        lambda patch: patch.setenv("CXX", "another"),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            assert native._library_path("cpu") != before


def test_status_tells_what_a_build_did(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fake_compiler(fresh, compilers.csrc() / "ddf.h")
    monkeypatch.setenv("CXX", str(compiler))
    cpu = native.status().cpu
    assert (cpu.available, cpu.loaded, cpu.library, cpu.compiler) == (False, False, None, str(compiler))
    assert "--build" in cpu.hint
    cpu = native.build().cpu
    assert (cpu.available, cpu.loaded, cpu.hint) == (True, True, "")
    assert cpu.library is not None and cpu.library.is_file()
    native.build()
    assert calls(fresh) == 1
    native.build(force=True)
    assert calls(fresh) == 2


def test_status_tells_why_a_build_failed(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(fresh / "nowhere"))
    cpu = native.build().cpu
    assert not cpu.available and not cpu.loaded
    assert cpu.reason.startswith(f"{fresh / 'nowhere'} cannot be started")
    assert "CXX" in cpu.hint
    assert native.load("cpu") is False
    monkeypatch.setenv("DDFUP_KERNELS", "native")
    with pytest.raises(KernelBuildError, match="cannot be started"):
        native.load("cpu")


def test_a_compiler_that_cannot_tune_still_builds(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = 'case "$*" in *=native*) echo "error: unknown option -march=native" >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", str(fake_compiler(fresh, compilers.csrc() / "ddf.h", before=refuse)))
    assert native.load("cpu")
    assert calls(fresh) == 3


def test_there_is_no_compiler_at_all(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    cpu = native.status().cpu
    assert (cpu.compiler, cpu.reason) == (None, "there is no C++ compiler")
    assert native.load("cpu") is False


def test_unknown_modes_and_devices(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.load("meta") is False
    monkeypatch.setenv("DDFUP_KERNELS", "fast")
    with pytest.raises(ArgumentError, match=r"^DDFUP_KERNELS must be auto, native or torch; got 'fast'$"):
        native.load("cpu")


def fake_nvcc(path: Path, version: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {version}, V{version}.88"\n')
    path.chmod(0o755)


def test_nvcc_of_the_pip_packages_is_found(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", str(fresh))
    sysconfig.get_config_vars()  # imports a module, once
    monkeypatch.setattr(sys, "path", [str(fresh)])
    nvcc = fresh / "nvidia" / "cu13" / "bin" / "nvcc"
    fake_nvcc(nvcc, "13.0")
    runtime = fresh / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    runtime.parent.mkdir()
    runtime.touch()
    assert compilers.find_nvcc() == nvcc
    # A PyTorch for CUDA has loaded a runtime already, which would be taken.
    monkeypatch.setattr(compilers, "_loaded_files", list)
    assert compilers._find_cudart(nvcc) == runtime
    monkeypatch.setenv("CUDA_HOME", str(fresh / "nvidia" / "cu13"))
    assert compilers.find_nvcc() == nvcc


def test_nvcc_of_another_major_version_is_passed_over_or_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc(fresh / "home" / "bin" / "nvcc", "98.1")
    fake_nvcc(fresh / "path" / "nvcc", "99.3")
    monkeypatch.setenv("CUDA_HOME", str(fresh / "home"))
    monkeypatch.setenv("PATH", str(fresh / "path"))
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    assert compilers.find_nvcc() == fresh / "path" / "nvcc"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert compilers.find_nvcc() == fresh / "home" / "bin" / "nvcc"
    monkeypatch.setattr(torch.version, "cuda", "97.6")
    with pytest.raises(compilers.BuildFailure, match=r"^nvcc is of CUDA 98, PyTorch of 97\.6$") as failure:
        compilers.find_nvcc()
    assert failure.value.hint.startswith(compilers.NVCC_HINT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cuda = native.status().cuda
    assert (cuda.reason, cuda.compiler, cuda.available) == (failure.value.message, None, False)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("g++", ["-ccbin", "g++"]),
        ("ccache g++", ["-ccbin", "g++"]),
        (
            "/usr/bin/sccache distcc /opt/g++ -m64 -Wp,-DA",
            ["-ccbin", "/opt/g++", "-Xcompiler=-m64", r"-Xcompiler=-Wp\,-DA"],
        ),
    ],
)
def test_nvcc_gets_the_compiler_of_cxx_itself(
    command: str, flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(compilers, "_run", commands.append)
    monkeypatch.setattr(compilers, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(compilers, "_find_cudart", lambda nvcc: Path("libcudart.so"))
    monkeypatch.delenv("NVCC_CCBIN", raising=False)
    monkeypatch.setenv("CXX", command)
    compilers.compile_cuda(tmp_path / "library.so")
    compiling, linking = commands
    start = compiling.index("-ccbin")
    assert compiling[start : start + len(flags)] == flags
    assert compiling[start + len(flags)] == compilers.DEFINES[0]
    assert linking[: len(command.split())] == command.split()
    monkeypatch.setenv("NVCC_CCBIN", "g++-12")
    compilers.compile_cuda(tmp_path / "library.so")
    assert "-ccbin" not in commands[2]


@pytest.mark.parametrize(
    ("listed", "flags"),
    [
        ("8.0;9.0+PTX", ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"]),
        ("9.0a 8.6, 8.6", ["compute_86,code=sm_86", "compute_90a,code=sm_90a"]),
        ("Turing;12.0", ["compute_75,code=sm_75", "compute_75,code=compute_75", "compute_120,code=sm_120"]),
        (" ; ", []),
    ],
)
def test_the_list_of_architectures_names_the_gpus(
    listed: str, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert compilers.gpu_flags() == [f"-gencode=arch={flag}" for flag in flags]


def test_an_unknown_list_of_architectures_is_told(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;newest")
    assert native.load("cuda") is False
    message = "TORCH_CUDA_ARCH_LIST must be such as 8.0;9.0+PTX; got 'newest'"
    assert native.status().cuda.reason == message
    monkeypatch.setattr(native, "_failed", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert native.status().cuda.reason == message


def test_cuda_kernels_are_built_without_a_gpu_for_those_that_are_listed(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus: list[tuple[int, int]] = []
    built: list[Path] = []
    loaded: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(native, "compile_cpu", Path.touch)
    monkeypatch.setattr(native, "compile_cuda", lambda target: (built.append(target), target.touch()))
    cuda = native.build().cuda
    assert (cuda.available, cuda.reason, built) == (False, "PyTorch finds no CUDA device", [])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    cuda = native.build().cuda
    assert (cuda.available, cuda.loaded) == (True, False)
    assert cuda.reason == "PyTorch finds no CUDA device; built for TORCH_CUDA_ARCH_LIST"
    assert len(built) == 1 and not any("ddf_cuda" in path for path in loaded)
    # On a machine that has one of the GPUs it is used, on another not, but can be built.
    gpus.append((8, 6))
    assert native.load("cuda") and len(built) == 1 and loaded[-1] == str(cuda.library)
    native._loaded.pop("cuda")
    gpus.append((7, 5))
    cuda = native.status().cuda
    assert cuda.reason == "TORCH_CUDA_ARCH_LIST=8.0;9.0 leaves out a GPU here, of compute capability 7.5"
    assert native.build(force=True).cuda.reason == cuda.reason
    assert len(built) == 2 and native.load("cuda") is False


def test_only_instructions_tell_processors_apart(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = fresh / "cpuinfo"
    monkeypatch.setattr(compilers, "_CPUINFO", cpuinfo)

    def name(text: str) -> str:
        cpuinfo.write_text(f"processor\t: 0\n{text}\n\nprocessor\t: 1\n")
        return native._library_path("cpu").name

    here = name(
        "flags\t\t: fpu sse sse4_2 pni avx512f avx2 fma bmi1 constant_tsc hypervisor sha_ni xsave\nvmx flags\t: ept"
    )
    assert name("flags\t\t: fpu avx2 sse sse4_2 pni avx512f fma bmi1 nonstop_tsc sha_ni") == here
    for lacking in ("avx512f", "fma", "bmi1", "sha_ni", "pni"):
        flags = "fpu sse sse4_2 pni avx512f avx2 fma bmi1 sha_ni".replace(lacking, "")
        assert name(f"flags\t\t: {flags}") != here
    arm = name("Features\t: fp asimd sve")
    assert name("Features\t: fp asimd") != arm


def test_a_library_in_a_folder_that_can_only_be_read_is_used(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt, own = fresh / "prebuilt", fresh / "own"
    monkeypatch.setenv("DDFUP_CACHE_DIR", str(prebuilt))
    monkeypatch.setenv("CXX", str(fake_compiler(fresh, compilers.csrc() / "ddf.h")))
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name, appauthor: str(own))
    before = os.umask(0o022)
    try:
        library = native.build().cpu.library
    finally:
        os.umask(before)
    assert library is not None and library.parent == prebuilt
    assert stat.S_IMODE(prebuilt.stat().st_mode) == 0o755
    make_read_only(prebuilt, monkeypatch)

    native._loaded.clear()
    assert native.load("cpu") and native._loaded["cpu"] == library
    assert calls(fresh) == 1 and not own.exists()
    native._loaded.clear()
    assert native.status().cpu.library == library

    # What has to be built goes to the user's cache, which nobody else may read, and is found there.
    monkeypatch.setattr(native, "instruction_set", lambda: "abacus")
    native._loaded.clear()
    assert cache.cache_dir() == own and stat.S_IMODE(own.stat().st_mode) == 0o700
    for _ in range(2):
        native._loaded.clear()
        cpu = native.build().cpu
        assert cpu.loaded and cpu.library is not None and cpu.library.parent == own
    assert calls(fresh) == 2


def make_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):  # root may write everywhere
        ask = cache._is_writable
        monkeypatch.setattr(cache, "_is_writable", lambda asked, *mode: asked != folder and ask(asked, *mode))


def test_a_damaged_library_that_cannot_be_replaced_is_built_once_elsewhere(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prebuilt, own = fresh / "prebuilt", fresh / "own"
    monkeypatch.setenv("DDFUP_CACHE_DIR", str(prebuilt))
    monkeypatch.setenv("CXX", str(fake_compiler(fresh, compilers.csrc() / "ddf.h")))
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name, appauthor: str(own))

    def load(path: str) -> None:
        if Path(path).parent == prebuilt:
            raise OSError("invalid ELF header")

    monkeypatch.setattr(torch.ops, "load_library", load)
    prebuilt.mkdir()
    native._library_path("cpu").touch()
    make_read_only(prebuilt, monkeypatch)
    for _ in range(2):
        native._loaded.clear()
        assert native.load("cpu") and native._loaded["cpu"].parent == own
    assert calls(fresh) == 1


def test_nothing_is_taken_from_folders_that_others_can_write(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither from the temporary folder, nor from below the current one for want of a home."""
    monkeypatch.delenv("DDFUP_CACHE_DIR")
    monkeypatch.chdir(fresh)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name, appauthor: "~/.cache/ddfup")
    monkeypatch.setattr("tempfile.tempdir", str(fresh))
    monkeypatch.setattr(cache, "_private_folder", [])
    temporary = fresh / f"ddfup-{os.getuid()}"
    assert cache.cache_dir() == temporary
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
    planted = native._library_path("cpu")
    planted.touch()
    (fresh / "~" / ".cache" / "ddfup").mkdir(parents=True)
    (fresh / "~" / ".cache" / "ddfup" / planted.name).touch()
    assert native._library_path("cpu") == planted
    temporary.chmod(0o777)
    assert native._library_path("cpu").parent not in (temporary, Path("~/.cache/ddfup"))
    assert not native.status().cpu.available


def test_which_kernels_served_is_told_without_a_look_at_files_or_gpus(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nobody may ask this after each answer")

    for place, name in (
        (native, "status"),
        (native, "library_folders"),
        (native, "_library_path"),
        (torch.cuda, "_lazy_init"),
    ):
        monkeypatch.setattr(place, name, refuse)
    kernels = Upsampler.kernels.fget
    assert kernels is not None
    upsampler = SimpleNamespace(_device=torch.device("cpu"))
    assert (native.is_loaded("cpu"), kernels(upsampler)) == (False, "torch")
    native._loaded["cpu"] = fresh
    assert (native.is_loaded("cpu"), kernels(upsampler)) == (True, "native")
    assert kernels(SimpleNamespace(_device=torch.device("cuda:0"))) == "torch"


def test_a_failure_of_the_tuning_is_followed_by_a_build_without(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = 'case "$*" in *=native*) echo "Error: no such instruction: vpsomething" >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", str(fake_compiler(fresh, compilers.csrc() / "ddf.h", before=refuse)))
    assert native.load("cpu")
    assert calls(fresh) == 2


def test_when_both_builds_fail_the_one_without_tuning_says_why(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = 'case "$*" in *=native*) echo "error: tuned" >&2; exit 1;; esac; echo "error: plain" >&2; exit 1'
    monkeypatch.setenv("CXX", str(fake_compiler(fresh, compilers.csrc() / "ddf.h", before=refuse)))
    assert native.build().cpu.reason.endswith("failed with exit status 1: error: plain")
    assert calls(fresh) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_process_forked_during_a_build_does_not_wait_for_it(tmp_path: Path) -> None:
    code = """
import os, threading
from ddfup.ops import native

held, done = threading.Event(), threading.Event()

def build():
    with native._lock:
        held.set()
        done.wait()

thread = threading.Thread(target=build)
thread.start()
held.wait()
child = os.fork()
if not child:
    os._exit(0 if native._lock.acquire(timeout=5) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
done.set()
"""
    out, err = start(tmp_path, code).communicate(timeout=120)
    assert out.split() == ["0"], err


def test_libraries_long_unused_are_removed_after_a_build(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day = 24 * 3600
    kept = {
        "ddf_cpu-" + "a" * 32 + ".so": (89, 200),  # used, though built long ago
        "ddf_cpu-" + "b" * 32 + ".so": (200, 89),  # a disk that does not note when files are read
        "ddf_cpu-" + "c" * 31 + ".so": (200, 200),  # no name of ours
        "notes.so": (200, 200),
    }
    removed = {
        "ddf_cpu-" + "d" * 32 + ".so": (91, 91),
        "ddf_cuda-" + "e" * 32 + ".so": (91, 200),
        "ddf_cpu-" + "d" * 32 + ".lock": (91, 91),
    }
    for name, (read, written) in (kept | removed).items():
        (fresh / name).touch()
        os.utime(fresh / name, (time.time() - read * day, time.time() - written * day))
    (fresh / ("ddf_cpu-" + "f" * 32 + ".so")).mkdir()  # cannot be removed, which is no failure
    os.utime(fresh / ("ddf_cpu-" + "f" * 32 + ".so"), (0, 0))
    # The file of an old compiler, whose times it keeps, is as old as the others.
    old = fresh / "old"
    old.touch()
    os.utime(old, (0, 0))
    compiler = fake_compiler(fresh, old)
    compiler.write_text(compiler.read_text().replace("cp ", "cp -p "))
    monkeypatch.setenv("CXX", str(compiler))
    library = native.build().cpu.library
    assert library is not None and library.is_file()
    assert {name for name in kept | removed if (fresh / name).exists()} == set(kept)


def test_old_build_folders_are_swept_and_young_ones_left(fresh: Path) -> None:
    for name, age in (("build-old", 2 * 24 * 3600), ("build-young", 60)):
        (fresh / name).mkdir()
        os.utime(fresh / name, (time.time() - age,) * 2)
    cache.remove_stale(fresh)
    assert [folder.name for folder in fresh.glob("build-*")] == ["build-young"]


def test_a_folder_others_can_write_is_no_cache(tmp_path: Path) -> None:
    assert cache._is_private(tmp_path)
    tmp_path.chmod(0o777)
    assert not cache._is_private(tmp_path)
