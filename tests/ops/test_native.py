"""The loader: fallback, errors, races and killed builds, in processes and caches of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from ddfup._resources import resource_dir
from ddfup.errors import ArgumentError, KernelBuildError
from ddfup.ops import compilers, native

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
    """The user's cache lies under a file, so the temporary folder serves; its library is damaged."""
    compiler = fake_compiler(tmp_path, library)
    (tmp_path / "file").touch()
    changes = {"CXX": str(compiler), "DDFUP_KERNELS": "native", "TMPDIR": str(tmp_path)}
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


def test_nvcc_of_the_pip_packages_is_found(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    sysconfig.get_config_vars()  # imports a module, once
    monkeypatch.setattr(sys, "path", [str(fresh)])
    nvcc = fresh / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    runtime = fresh / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    runtime.parent.mkdir()
    runtime.touch()
    assert compilers.find_nvcc() == nvcc
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    # A PyTorch for CUDA has loaded a runtime already, which would be taken.
    monkeypatch.setattr(compilers, "_loaded_files", list)
    assert compilers._find_cudart(nvcc) == runtime
    monkeypatch.setenv("CUDA_HOME", str(fresh / "nvidia" / "cu13"))
    assert compilers.find_nvcc() == nvcc


def test_old_build_folders_are_swept_and_young_ones_left(fresh: Path) -> None:
    for name, age in (("build-old", 2 * 24 * 3600), ("build-young", 60)):
        (fresh / name).mkdir()
        os.utime(fresh / name, (time.time() - age,) * 2)
    native._remove_stale(fresh)
    assert [folder.name for folder in fresh.glob("build-*")] == ["build-young"]


def test_a_folder_others_can_write_is_no_cache(tmp_path: Path) -> None:
    assert native._is_private(tmp_path)
    tmp_path.chmod(0o777)
    assert not native._is_private(tmp_path)
