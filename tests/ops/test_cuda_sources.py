"""The CUDA kernels without a GPU.

nvcc compiles them for every architecture without a warning; the same device code, compiled for the CPU by
`cuda_emulator`, agrees with a float64 oracle.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"

# Largest difference allowed, over the largest value of the oracle.
TOLERANCE = {"float64": 1e-13, "float32": 3e-6, "float16": 1e-3, "bfloat16": 6e-3}
WANTED = ("output", "grad_features", "grad_channel", "grad_spatial")


@dataclasses.dataclass(frozen=True)
class Case:
    n: int = 2
    c: int = 6
    h: int = 7
    w: int = 9
    k: int = 3
    stride: int = 1
    dilation: int = 1
    heads: int = 1
    scale: int = 1
    combine: str = "mul"
    padding: str = "zeros"
    layout: str = "contiguous"
    enough_blocks: int = 1024

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.h // self.stride), -(-self.w // self.stride)

    def __str__(self) -> str:
        changed = (
            (field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )
        return "-".join(f"{name}{value}" for name, value in changed) or "default"


CASES = (
    Case(),
    Case(n=0),
    Case(n=1, c=1, h=1, w=1),
    Case(n=1, c=1, h=1, w=1, k=5, padding="replicate"),
    Case(c=4, h=3, w=2, k=7, padding="replicate"),
    Case(c=3, h=2, w=3, k=5),
    Case(n=1, c=70, h=9, w=34, heads=2),
    Case(n=1, c=70, h=5, w=33, scale=2),
    Case(padding="replicate"),
    Case(h=1, padding="replicate"),
    Case(w=1, padding="replicate", scale=2),
    Case(h=2, w=2, padding="replicate", k=5),
    Case(k=1),
    Case(k=1, scale=2, padding="replicate"),
    Case(k=5, heads=3),
    Case(k=5, padding="replicate", dilation=2),
    Case(k=7),
    Case(k=7, scale=2, heads=2),
    Case(k=9, h=5, w=4),
    Case(k=9, h=5, w=4, padding="replicate", stride=2),
    Case(dilation=2, heads=2),
    Case(dilation=3, h=13, w=11, padding="replicate"),
    Case(dilation=9, padding="replicate"),
    Case(stride=2),
    Case(stride=2, h=8, w=10, padding="replicate", heads=2),
    Case(stride=3, dilation=2, k=5, padding="replicate"),
    Case(stride=2, k=7),
    Case(stride=2, k=1),
    Case(stride=2, scale=2),
    Case(scale=2),
    Case(scale=2, padding="replicate", heads=2),
    Case(scale=2, dilation=2),
    Case(scale=2, k=5),
    Case(scale=2, k=5, padding="replicate", dilation=2, h=11, w=6),
    Case(scale=3, heads=3),
    Case(scale=3, k=5, padding="replicate"),
    Case(combine="add"),
    Case(combine="add", scale=2, padding="replicate", heads=2),
    Case(combine="add", k=5, stride=2),
    Case(combine="add", k=9, h=4, w=3),
    Case(n=1, c=130, h=40, w=37),
    Case(c=70, h=4, w=5, enough_blocks=1),
    Case(c=70, h=4, w=5, scale=2, enough_blocks=1),
    Case(c=70, h=4, w=5, layout="channels_last", enough_blocks=1),
    Case(layout="sliced"),
    Case(layout="sliced", scale=2, k=5, padding="replicate"),
    Case(layout="expanded", scale=2),
    Case(layout="huge", h=1),
    Case(layout="huge", h=1, k=5, scale=2, padding="replicate"),
    Case(layout="channels_last"),
    Case(layout="channels_last", c=8, w=10),
    Case(layout="channels_last", c=16, heads=2, padding="replicate"),
    Case(layout="channels_last", c=48, k=5, dilation=2, padding="replicate"),
    Case(layout="channels_last", c=8, k=1, scale=2),
    Case(layout="channels_last", c=8, k=7, scale=2),
    Case(layout="channels_last", n=1, c=264, h=5, w=7, scale=2),
    Case(layout="channels_last", n=1, c=136, h=4, w=5, k=7),
    Case(layout="channels_last", c=16, h=13, w=21, dilation=3, scale=3),
    Case(layout="channels_last", c=8, scale=2, padding="replicate"),
    Case(layout="channels_last", c=16, h=6, w=11, k=5, scale=2, heads=2, dilation=2),
    Case(layout="channels_last", n=1, c=272, h=5, w=6, k=5, scale=2, padding="replicate"),
    Case(layout="channels_last", n=1, c=160, h=19, w=23, enough_blocks=8),
    Case(layout="channels_last", c=8, h=2, w=3),
    Case(layout="channels_last", c=8, stride=2),
    Case(layout="channels_last", c=8, combine="add", padding="replicate"),
    Case(layout="channels_last", c=10, k=9, heads=5, stride=2),
    Case(layout="channels_last_crop", c=8, k=5),
    Case(layout="channels_last_crop", c=5, scale=2, padding="replicate"),
)

KERNELS = {
    *(f"forward_kernel<{t}, {k}, 1, 1>" for t, k in product(("T", "double"), (1, 3, 5, 7))),
    *(f"forward_kernel<T, {shape}>" for shape in ("3, 1, ROWS", "3, 2, 4", "5, 1, 4", "5, 2, 2")),
    *(f"forward_channels_last_kernel<T, {k}>" for k in (1, 3, 5, 7)),
    *(f"grad_features_kernel<T, {shape}>" for shape in ("3, 1, 4", "3, 2, 2", "5, 1, 2", "5, 2, 1")),
    *(f"grad_features_channels_last_kernel<T, {shape}>" for shape in ("3, 1", "3, 2", "5, 1", "5, 2")),
    *(
        f"grad_{of}_kernel<{t}, {taps}>"
        for of, t, taps in product(("spatial", "channel"), ("T", "double"), ("1, 1", "3, 3"))
    ),
    *(f"grad_{of}_kernel<T, {taps}>" for of, taps in product(("spatial", "channel"), ("1, 7", "5, 5"))),
    *(f"{name}_kernel<{t}>" for name, t in product(("forward_any", "grad_features_any", "sum"), ("T", "double"))),
}


def oracle(case: Case, features: Any, channel: Any, spatial: Any, grad: Any) -> dict[str, Any]:
    """The formula of ddf.h and its derivatives, tap by tap in float64."""
    rows, columns = case.grid
    margin = case.k // 2 * case.dilation
    mode = "constant" if case.padding == "zeros" else "edge"
    edges = ((0, 0), (0, 0), (margin, margin), (margin, margin))
    padded = np.pad(features, edges, mode=mode)
    s, k, per_head = case.scale, case.k, case.c // case.heads
    channel = channel.reshape(case.n, s, s, case.c, k, k)
    spatial = spatial.reshape(case.n, s, s, case.heads, k, k, rows, columns)
    result = {
        "output": np.zeros((case.n, case.c, rows * s, columns * s)),
        "grad_channel": np.zeros_like(channel),
        "grad_spatial": np.zeros_like(spatial),
    }
    grad_padded = np.zeros_like(padded)
    head = np.arange(case.c) // per_head
    for i, j, u, v in product(range(s), range(s), range(k), range(k)):
        window = (
            ...,
            slice(u * case.dilation, u * case.dilation + (rows - 1) * case.stride + 1, case.stride),
            slice(v * case.dilation, v * case.dilation + (columns - 1) * case.stride + 1, case.stride),
        )
        to = (..., slice(i, None, s), slice(j, None, s))
        weight_c = channel[:, i, j, :, u, v, None, None]
        weight_s = spatial[:, i, j, :, u, v][:, head]
        times = case.combine == "mul"
        mixed = weight_c * weight_s if times else weight_c + weight_s
        seen, incoming = padded[window], grad[to]
        result["output"][to] += mixed * seen
        grad_padded[window] += mixed * incoming
        result["grad_channel"][:, i, j, :, u, v] = (incoming * seen * (weight_s if times else 1)).sum((2, 3))
        share = incoming * seen * (weight_c if times else 1)
        share = share.reshape(case.n, case.heads, per_head, rows, columns)
        result["grad_spatial"][:, i, j, :, u, v] = share.sum(2)
    # The derivative of padding: every pixel of the margin hands its gradient to the pixel it was copied from.
    nearest = np.pad(np.arange(case.h * case.w).reshape(case.h, case.w), margin, mode="edge")
    if case.padding == "zeros":
        inner = slice(margin, margin + case.h), slice(margin, margin + case.w)
        result["grad_features"] = grad_padded[(..., *inner)]
    else:
        total = np.zeros((case.n, case.c, case.h * case.w))
        np.add.at(
            total,
            (slice(None), slice(None), nearest.ravel()),
            grad_padded.reshape(case.n, case.c, nearest.size),
        )
        result["grad_features"] = total.reshape(features.shape)
    return result


class Buffer:
    """A tensor with strides, inside memory that is NaN elsewhere, so that a stray read or write shows."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> None:
        self.dtype, self.shape, self.strides = dtype, shape, strides
        # Strides of axes of length 1 do not count.
        span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True) if n > 1)
        kind = {"float64": np.uint64, "float32": np.uint32}.get(dtype, np.uint16)
        self.margin = 64
        self.memory = np.full(span + 2 * self.margin, np.iinfo(kind).max, kind)  # all ones is NaN in every type
        # Vectors of 16 bytes need memory that starts on such a boundary, as PyTorch's allocator gives it.
        shift = (-self.memory.ctypes.data // self.memory.itemsize) % (16 // self.memory.itemsize)
        self.start = self.margin // 2 + shift
        self.bits = np.lib.stride_tricks.as_strided(
            self.memory[self.start :],
            shape,
            [step * self.memory.itemsize if n > 1 else 0 for n, step in zip(shape, strides, strict=True)],
        )

    def fill(self, values: Any) -> Any:
        """Store the values and return them, rounded to the type."""
        if self.dtype == "bfloat16":
            bits = values.astype(np.float32).view(np.uint32)
            self.bits[...] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        else:
            self.bits[...] = values.astype(self.dtype).view(self.memory.dtype)
        return self.values()

    def values(self) -> Any:
        bits = np.ascontiguousarray(self.bits)
        if self.dtype == "bfloat16":
            return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return bits.view(self.dtype).astype(np.float64)

    def outside_untouched(self) -> bool:
        memory = self.memory.copy()
        view = np.lib.stride_tricks.as_strided(memory[self.start :], self.shape, self.bits.strides)
        view[...] = np.iinfo(memory.dtype).max
        return bool((memory == np.iinfo(memory.dtype).max).all())

    @property
    def address(self) -> int:
        return self.memory.ctypes.data + self.start * self.memory.itemsize


def strides_of(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    _, c, h, w = shape
    return {
        "contiguous": (c * h * w, h * w, w, 1),
        "sliced": ((2 * c + 1) * (h + 2) * 3 * w, 2 * (h + 2) * 3 * w, 3 * w, 3),
        "expanded": (c * h * w, h * w, w, 1),
        "huge": (
            c * h * w,
            h * w,
            2**40,
            1,
        ),  # rows so far apart that 32 bits do not reach, of which there is one
        "channels_last": (h * w * c, 1, w * c, c),
        "channels_last_crop": ((h + 2) * (w + 4) * c, 1, (w + 4) * c, c),
    }[layout]


class Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "channels", "height", "width", "grid_height", "grid_width")),
        *(
            (name, ctypes.c_int64)
            for name in ("scale", "kernel_size", "stride", "dilation", "heads", "combine", "padding")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("features", "channel_filter", "spatial_filter", "grad_output", "result")
        ),
        *((f"{name}_strides", ctypes.c_int64 * 4) for name in ("features", "spatial", "output", "result")),
        ("enough_blocks", ctypes.c_int64),
    )


def run(library: ctypes.CDLL, case: Case, dtype: str, *, dry: bool = False) -> dict[str, tuple[Any, Any]]:
    """Compute everything for one case; return got and expected by name."""
    random = np.random.default_rng(3)
    rows, columns = case.grid
    subs, taps = case.scale**2, case.k**2
    shape = (case.n, case.c, case.h, case.w)
    out_shape = (case.n, case.c, rows * case.scale, columns * case.scale)
    spatial_shape = (case.n, subs * case.heads * taps, rows, columns)
    channel_shape = (1, 1, 1, case.n * subs * case.c * taps)
    plain = "channels_last" if "channels_last" in case.layout else "contiguous"
    features = Buffer(shape, strides_of(shape, case.layout), dtype)
    spatial = Buffer(
        spatial_shape, strides_of(spatial_shape, "sliced" if case.layout == "sliced" else "contiguous"), dtype
    )
    channel = Buffer(channel_shape, strides_of(channel_shape, "contiguous"), dtype)
    grad_layout = plain if case.layout in ("huge", "channels_last_crop") else case.layout
    grad_strides = (0, 0, 0, 0) if case.layout == "expanded" else strides_of(out_shape, grad_layout)
    grad = Buffer(out_shape, grad_strides, dtype)
    inputs = [buffer.fill(random.standard_normal(buffer.shape)) for buffer in (features, channel, spatial)]
    inputs.append(
        grad.fill(
            np.broadcast_to(random.standard_normal(), out_shape)
            if case.layout == "expanded"
            else random.standard_normal(out_shape)
        )
    )
    expected = {} if dry else oracle(case, *inputs)
    results = {
        "output": (out_shape, plain),
        "grad_features": (shape, plain),
        "grad_channel": (channel_shape, "contiguous"),
        "grad_spatial": (spatial_shape, "contiguous"),
    }
    pairs = {}
    for index, name in enumerate(WANTED):
        found = []
        for backwards in (False, True) if dtype == "float32" and not dry else (False,):
            result_shape, layout = results[name]
            result = Buffer(result_shape, strides_of(result_shape, layout), dtype)
            arguments = Arguments(
                *shape, rows, columns, case.scale, case.k, case.stride,
                min(case.dilation, max(case.h, case.w)), case.heads,
                case.combine == "add", case.padding == "replicate",
                features.address, channel.address, spatial.address, grad.address, result.address,
            )  # fmt: skip
            arguments.features_strides[:] = features.strides
            arguments.spatial_strides[:] = spatial.strides
            arguments.output_strides[:] = result.strides if name == "output" else grad.strides
            arguments.result_strides[:] = result.strides
            arguments.enough_blocks = case.enough_blocks
            message = library.ddf_emulate(index, dtype.encode(), backwards, dry, ctypes.byref(arguments))
            assert not message, f"{name}: {message.decode()}"
            assert result.outside_untouched(), f"{name}: a write outside the result"
            found.append(result.values())
        if not dry:
            np.testing.assert_array_equal(found[0], found[-1], err_msg=f"{name} depends on the order of threads")
            pairs[name] = found[0], expected[name].reshape(found[0].shape)
    return pairs


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("the emulator needs Linux and a C++ compiler")
    target = tmp_path_factory.mktemp("cuda_emulator") / "kernels.so"
    command = [
        *compiler.split(),
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    command += [f"-I{CSRC}", str(HERE / "cuda_emulator" / "kernels.cpp"), "-o", str(target), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    library = ctypes.CDLL(str(target))
    library.ddf_emulate.restype = ctypes.c_char_p
    library.ddf_emulate.argtypes = (
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_bool,
        ctypes.c_bool,
        ctypes.c_void_p,
    )
    library.ddf_channel_norm.restype = ctypes.c_char_p
    library.ddf_channel_norm.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_float,
        ctypes.c_bool,
        ctypes.c_void_p,
    )
    library.ddf_launched.restype = ctypes.c_char_p
    library.ddf_round.restype = ctypes.c_float
    library.ddf_round.argtypes = (ctypes.c_char_p, ctypes.c_float)
    return library


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_agree_with_the_oracle(emulator: ctypes.CDLL, case: Case, dtype: str) -> None:
    for name, (got, expected) in run(emulator, case, dtype).items():
        scale = np.abs(expected).max(initial=1.0)
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[dtype] * scale, err_msg=name)


def test_cases_reach_every_kernel(emulator: ctypes.CDLL) -> None:
    emulator.ddf_launched()
    for case, dtype in product(CASES, TOLERANCE):
        run(emulator, case, dtype, dry=True)
    names = {re.sub(r"^void ddfup::cuda::|\(.*", "", line) for line in emulator.ddf_launched().decode().splitlines()}
    types = ("float", "__half", "__nv_bfloat16")
    assert names == {
        re.sub(r"\bT\b", t, name).replace("ROWS", "4" if t == "float" else "8") for name, t in product(KERNELS, types)
    }


@pytest.mark.parametrize("channels", [1, 3, 4, 12, 24, 31, 39, 40, 64, 100, 255, 256])
@pytest.mark.parametrize("rows", [0, 1, 39, 128, 300])
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
def test_channel_norm_agrees_with_its_formula(emulator: ctypes.CDLL, channels: int, rows: int, shift: int) -> None:
    rng = np.random.default_rng(channels)
    values = (5 + 3 * rng.standard_normal((rows, channels))).astype(np.float32)
    weight, bias = rng.standard_normal((2, channels)).astype(np.float32)
    # From a place that is a multiple of 16 bytes, or of 4 only; with room around it that must stay as it is.
    memory = np.zeros(values.size + 16, np.float32)
    first = -memory.ctypes.data // 4 % 4 + shift
    memory[first : first + values.size] = values.ravel()
    for reverse in (False, True):
        out = np.full(values.size + 16, 77.0, np.float32)
        to = 4 + -out.ctypes.data // 4 % 4 + shift
        message = emulator.ddf_channel_norm(
            memory[first:].ctypes.data,
            rows,
            channels,
            weight.ctypes.data,
            bias.ctypes.data,
            1e-3,
            reverse,
            out[to:].ctypes.data,
        )
        assert not message, message
        wide = values.astype(np.float64)
        centred = wide - wide.mean(axis=1, keepdims=True)
        expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-3) * weight + bias
        found = out[to : to + values.size].reshape(values.shape)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        assert (np.delete(out, np.s_[to : to + values.size]) == 77).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_emulated_half_types_round_to_nearest_even(emulator: ctypes.CDLL, dtype: str) -> None:
    exact = np.array(
        [0, 1, 65504, 65519.9, 65520, 1e-8, 5.9e-8, 6.2e-5, 0.1, 1 + 2**-11, 1 + 3 * 2**-11, np.inf, np.nan]
    )
    random = np.random.default_rng(5)
    values = np.concatenate([exact, random.standard_normal(2000) * 10.0 ** random.uniform(-8, 4, 2000)]).astype(
        np.float32
    )
    with np.errstate(over="ignore"):
        wanted = np.concatenate([values, -values])
        rounded = wanted.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        torch = pytest.importorskip("torch")
        rounded = torch.from_numpy(wanted).bfloat16().float().numpy()
    got = [emulator.ddf_round(dtype.encode(), float(value)) for value in wanted]
    np.testing.assert_array_equal(np.float32(got), rounded)


def cuda_home() -> Path | None:
    """The folder of the CUDA toolkit, seen through wrapper scripts; None without nvcc."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named and (Path(named) / "bin" / "nvcc").is_file():
        return Path(named)
    nvcc = shutil.which("nvcc")
    if not nvcc:
        return None
    shown = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    here = re.search(r"_HERE_=(.+)", shown.stderr)
    return Path(here.group(1).strip()).parent if here else None


def test_nvcc_compiles_for_all_architectures_without_warnings(tmp_path: Path) -> None:
    home = cuda_home()
    if home is None:
        pytest.skip("no nvcc here: neither in CUDA_HOME nor on the PATH")
    from torch.utils.cpp_extension import include_paths

    command = [str(home / "bin" / "nvcc"), "-std=c++17", "-O3", "--threads=2", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "--Werror=all-warnings"]
    command += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Werror", "-Xptxas=-v"]
    command += [
        f"-gencode=arch=compute_{arch},code={code}"
        for arch, code in (("80", "sm_80"), ("90", "sm_90"), ("90", "compute_90"))
    ]
    command += [part for path in include_paths() for part in ("-isystem", path)]
    command += ["-c", str(CSRC / "ddf_cuda.cu"), "-o", str(tmp_path / "ddf_cuda.o")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "CUDA_HOME": str(home)}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning" not in done.stderr
