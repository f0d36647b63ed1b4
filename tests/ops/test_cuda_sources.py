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
    least_filled: int = 67

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

# For the tile kernel, as here no size is too small. Its tiles have 64 columns; some end in the middle.
TILED = [
    Case(**options, scale=scale, padding=padding, enough_blocks=1, least_filled=0)
    for scale, padding in product((1, 2), ("zeros", "replicate"))
    for options in (
        {"n": 1, "c": 3, "h": 1, "w": 8},
        {"n": 1, "c": 5, "h": 2, "w": 64},
        {"n": 1, "c": 126, "h": 5, "w": 12},
        {"n": 2, "c": 7, "h": 37, "w": 72},
        {"n": 1, "c": 6, "h": 17, "w": 132, "heads": 3},
        {"n": 1, "c": 2, "h": 16, "w": 128},
    )
] + [
    Case(n=2, c=128, h=4, w=16, heads=2, enough_blocks=64, least_filled=0),
    Case(n=2, c=68, h=4, w=16, scale=2, heads=2, padding="replicate", enough_blocks=32, least_filled=0),
]
# As these, but for what the tile kernel leaves to others.
UNTILED = [
    Case(c=3, h=5, w=64, enough_blocks=1, least_filled=0, **options)
    for options in (
        {"k": 5},
        {"dilation": 2},
        {"stride": 2},
        {"scale": 3},
        {"combine": "add"},
        {"layout": "sliced"},
        {"layout": "channels_last"},
    )
] + [Case(c=3, h=5, w=66, enough_blocks=1, least_filled=0), Case(c=3, h=5, w=8, enough_blocks=1)]

KERNELS = {
    *(f"forward_kernel<{t}, {k}, 1, 1>" for t, k in product(("T", "double"), (1, 3, 5, 7))),
    *(f"forward_kernel<T, {shape}>" for shape in ("3, 1, ROWS", "3, 2, 4", "5, 1, 4", "5, 2, 2")),
    *(f"forward_tile_kernel<T, {scale}, CHUNK>" for scale in (1, 2)),
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
        ("least_filled", ctypes.c_int64),
    )


def run(
    library: ctypes.CDLL, case: Case, dtype: str, *, dry: bool = False, wanted: tuple[str, ...] = WANTED
) -> dict[str, tuple[Any, Any]]:
    """Compute everything that is wanted for one case; return got and expected by name."""
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
        if name not in wanted:
            continue
        found = []
        both = not dry and (dtype == "float32" or case in TILED)
        for backwards in (False, True) if both else (False,):
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
            arguments.least_filled = case.least_filled
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
    library.ddf_channel_norm_backward.restype = ctypes.c_char_p
    library.ddf_channel_norm_backward.argtypes = (
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_float,
        ctypes.c_int64,
        ctypes.c_bool,
        ctypes.c_void_p,
        ctypes.c_void_p,
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


def launched(emulator: ctypes.CDLL) -> set[str]:
    """Return the names of the kernels launched since the last call."""
    return {re.sub(r"^void ddfup::cuda::|\(.*", "", line) for line in emulator.ddf_launched().decode().splitlines()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", [*TILED, *UNTILED], ids=str)
def test_tile_kernel_agrees_with_the_oracle(emulator: ctypes.CDLL, case: Case, dtype: str) -> None:
    emulator.ddf_launched()
    ((got, expected),) = run(emulator, case, dtype, wanted=("output",)).values()
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max())
    assert all(("tile" in name) == (case in TILED) for name in launched(emulator))


def test_cases_reach_every_kernel(emulator: ctypes.CDLL) -> None:
    emulator.ddf_launched()
    for case, dtype in product([*CASES, *TILED], TOLERANCE):
        run(emulator, case, dtype, dry=True)
    types = ("float", "__half", "__nv_bfloat16")
    expected = {
        re.sub(r"\bT\b", t, name).replace("ROWS", "4" if t == "float" else "8").replace("CHUNK", chunk)
        for name, t, chunk in product(KERNELS, types, ("8", "16"))
        if (t, chunk) != ("float", "8") or "CHUNK" not in name
    }
    assert launched(emulator) == expected


def forward_of(
    emulator: ctypes.CDLL,
    sizes: tuple[int, int, int, int],
    scale: int,
    dtype: str,
    *,
    strides: dict[str, tuple[int, int, int, int]] | None = None,
    shifts: dict[str, int] | None = None,
) -> str:
    """Return the kernel that would be launched by default, for tensors that are nowhere.

    Args:
        emulator: The library.
        sizes: Of the features.
        scale: Upsampling factor.
        dtype: Type of the elements.
        strides: Of features, spatial and output, where they are not contiguous.
        shifts: Elements between a tensor's start and a multiple of 16 bytes.
    """
    n, c, h, w = sizes
    shapes = {"features": sizes, "spatial": (n, scale**2 * 9, h, w), "output": (n, c, h * scale, w * scale)}
    starts = {"features": "features", "spatial": "spatial_filter", "output": "result"}
    arguments = Arguments(*sizes, h, w, scale, 3, 1, 1, 1, 0, 0)
    for name, shape in shapes.items():
        getattr(arguments, f"{name}_strides")[:] = (strides or {}).get(name, strides_of(shape, "contiguous"))
        size = 4 if dtype == "float32" else 2
        setattr(arguments, starts[name], 4096 + (shifts or {}).get(name, 0) * size)
    arguments.enough_blocks, arguments.least_filled = Case.enough_blocks, Case.least_filled
    emulator.ddf_launched()
    message = emulator.ddf_emulate(0, dtype.encode(), False, True, ctypes.byref(arguments))
    assert not message, message.decode()
    (name,) = launched(emulator)
    return re.sub(r"float|__half|__nv_bfloat16", "T", name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_large_images_that_are_aligned_get_the_tile_kernel(emulator: ctypes.CDLL, dtype: str) -> None:
    small, size = dtype != "float32", (1, 64, 480, 640)
    for scale in (1, 2):
        tile = f"forward_tile_kernel<T, {scale}, 16>"
        assert forward_of(emulator, size, scale, dtype) == tile
        assert forward_of(emulator, (2, 256, 200, 300), scale, dtype) == tile.replace("16", "8" if small else "16")
        others = {f"forward_kernel<T, 3, {scale}, {8 if small and scale == 1 else 4}>"}

        def others_get(*arguments: Any, others: set[str] = others, **options: Any) -> None:
            assert forward_of(emulator, *arguments, **options) in others

        # Too small, too narrow for tiles, and no whole number of chunks or pairs in a row.
        others_get((1, 32, 30, 40), scale, dtype)
        others_get((1, 64, 100, 128), scale, dtype)
        others_get((8, 64, 480, 80), scale, dtype)
        others_get((1, 64, 480, 642), scale, dtype)
        others_get((1, 64, 480, 641), scale, dtype)
        # Starts and strides that are no multiples of what is moved at a time.
        for name, shift in (("features", 1), ("features", 2), ("output", 1)):
            others_get(size, scale, dtype, shifts={name: shift})
        others_get(size, scale, dtype, shifts={"output": scale})
        plane = 480 * 640
        for stride in ((64 * plane + 1, plane, 640, 1), (64 * plane, plane + 1, 640, 1), (64 * plane, plane, 641, 1)):
            others_get(size, scale, dtype, strides={"features": stride})
        # Rows behind one another that run backwards, and offsets beyond 32 bits.
        others_get(size, scale, dtype, strides={"features": (64 * plane, plane, -640, 1)})
        others_get(size, scale, dtype, strides={"features": (2**40, 2**33, 2**23, 1)})
        # Filters are read in pairs only where two elements are a word.
        got = forward_of(emulator, size, scale, dtype, shifts={"spatial": 1})
        assert got in others if small else got == tile
        # A crop, and one row for all.
        assert forward_of(emulator, size, scale, dtype, strides={"features": (2**26, 2**20, 2**10, 1)}) == tile
        assert forward_of(emulator, size, scale, dtype, strides={"features": (0, plane, 0, 1)}) == tile
    assert "tile" not in forward_of(emulator, size, 1, "float64")


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tile_kernel_keeps_what_is_not_a_number_to_its_windows(
    emulator: ctypes.CDLL, scale: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the corners and in the middle; the oracle multiplies what lies outside by zero.
    def standard_normal(shape: Any = None) -> Any:
        values = drawn(shape)
        if shape == (1, 3, 21, 72):
            for y, x in ((0, 0), (0, 71), (20, 0), (20, 71), (9, 63), (15, 40)):
                values[0, 1, y, x] = np.nan if x < 64 else np.inf
        return values

    generator = np.random.default_rng(3)
    drawn = generator.standard_normal

    class Random:
        def __init__(self) -> None:
            self.standard_normal = standard_normal

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Random())
    for padding in ("zeros", "replicate"):
        case = Case(n=1, c=3, h=21, w=72, scale=scale, padding=padding, enough_blocks=1, least_filled=0)
        with np.errstate(invalid="ignore"):
            ((got, expected),) = run(emulator, case, dtype, wanted=("output",)).values()
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
        assert not np.isfinite(expected).all()


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


# Rows of a single block that loops, of a few blocks with and without a turn that is not full, and of one turn each.
@pytest.mark.parametrize("channels", [1, 3, 24, 33, 64, 127, 128, 129, 255, 256])
@pytest.mark.parametrize(("rows", "most_blocks"), [(0, 4), (1, 4), (101, 1), (256, 2), (700, 3), (700, 1024)])
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
def test_gradients_of_channel_norm_agree_with_their_formula(
    emulator: ctypes.CDLL, channels: int, rows: int, most_blocks: int, shift: int
) -> None:
    rng = np.random.default_rng(channels)

    # From a place that is a multiple of 16 bytes, or of 4 only.
    def placed(values: Any) -> Buffer:
        buffer = Buffer((values.size + shift,), (1,), "float32")
        buffer.fill(np.pad(values.ravel(), (shift, 0)))
        return buffer

    values, grad = rng.standard_normal((2, rows, channels)).astype(np.float32)
    values = 5 + 3 * values
    weight = rng.standard_normal(channels).astype(np.float32)
    sources = [placed(grad), placed(values)]
    wide = values.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-3)
    normalized, weighted = centred * scale, grad * weight.astype(np.float64)
    steep = (weighted * normalized).mean(axis=1, keepdims=True)
    expected = (
        scale * (weighted - weighted.mean(axis=1, keepdims=True) - normalized * steep),
        (grad * normalized).sum(axis=0),
        grad.sum(axis=0, dtype=np.float64),
    )
    found = []
    for reverse in (False, True):
        results = [Buffer(shape, (*shape[1:], 1), "float32") for shape in ((rows, channels), (channels,), (channels,))]
        message = emulator.ddf_channel_norm_backward(
            *(source.address + 4 * shift for source in sources),
            rows,
            channels,
            weight.ctypes.data,
            1e-3,
            most_blocks,
            reverse,
            *(result.address for result in results),
        )
        assert not message, message
        assert all(result.outside_untouched() for result in results)
        found.append([result.values() for result in results])
    for once, again, wanted in zip(*found, expected, strict=True):
        np.testing.assert_array_equal(once, again, err_msg="depends on the order of threads")
        np.testing.assert_allclose(once, wanted, rtol=0, atol=5e-6 * np.abs(wanted).max(initial=1.0))


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
