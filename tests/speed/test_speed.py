"""Measuring: the clock, the memory, the bytes that must move, the figures that follow from them."""

import statistics
import sys

import numpy as np
import pytest
import torch

from ddfup.errors import ArgumentError, DDFUpError, DeviceError, WeightsError
from ddfup.speed import end_to_end, memory, module, network, op, pairs, results, run, timing
from ddfup.speed.results import Row
from ddfup.speed.timing import Timing

CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak of a process")


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self):
        self.wall = self.cpu = 0.0
        self.calls = []

    def worker(self, name, seconds, cpu):
        durations = iter(seconds)

        def work():
            self.calls.append(name)
            self.wall += next(durations)
            self.cpu += cpu

        return work

    def perf_counter(self):
        return self.wall

    def process_time(self):
        return self.cpu


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


# --- the clock ---


def test_methods_take_turns_and_the_warm_up_does_not_count(clock):
    slow = clock.worker("slow", [100, 100, 3, 5, 4, 7, 6], 0.25)
    fast = clock.worker("fast", [50, 50, 1, 1, 1, 1, 2], 0.5)
    found = timing.time_in_turns({"slow": slow, "fast": fast}, seconds=0, device=CPU)
    assert clock.calls == ["slow"] * 2 + ["fast"] * 2 + ["slow", "fast"] * 5
    assert found["slow"] == Timing(5.0, 4.0, 6.0, 0.25, 5)
    assert found["fast"] == Timing(1.0, 1.0, 1.0, 0.5, 5)


def test_rounds_go_on_until_the_time_is_spent(clock):
    work = clock.worker("one", [1] * 100, 1)
    assert timing.time_in_turns({"one": work}, seconds=12, device=CPU)["one"].rounds == 12
    assert timing.time_in_turns({"one": work}, seconds=1, device=CPU, rounds=3)["one"].rounds == 3


@pytest.mark.parametrize("count", [1, 2, 3, 8, 21])
def test_quartiles_are_those_of_numpy(count):
    wall = np.random.default_rng(count).random(count).tolist()
    found = timing.summarize(wall, wall[::-1])
    np.testing.assert_allclose((found.low, found.median, found.high), np.percentile(wall, (25, 50, 75)), rtol=1e-12)
    assert found.cpu == statistics.median(wall) and found.rounds == count


# --- memory ---


@LINUX
def test_the_peak_of_a_call_holds_inputs_and_what_is_needed_in_between():
    size = 96 << 20

    def work():
        held = np.ones(size, np.uint8)
        return held[:10].copy()

    # What the process holds beside moves by a few megabytes.
    assert memory.peak_of(work, held=40 << 20, device=CPU) == pytest.approx(size + (40 << 20), abs=12 << 20)
    assert memory.peak_of(work, held=1 << 20, device=CPU) is None


@LINUX
def test_the_peak_of_the_process_begins_anew():
    block = np.ones(128 << 20, np.uint8)
    high = memory.resident_peak()
    del block
    assert memory.forget_peak() < high - (100 << 20)
    assert memory.resident_peak(2**22 + 1) is None


# --- bytes ---

BYTES = [
    op.Case((1, 3, 5, 7), 5, 2),
    op.Case((2, 4, 6, 3), 3, 1, True),
    op.Case((3, 2, 4, 4), 1, 3),
    *op.QUICK,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", BYTES, ids=str)
def test_bytes_are_those_of_the_tensors(case, dtype):
    n, c, h, w = case.shape
    features = torch.ones(case.shape, dtype=dtype)
    channel = torch.ones(n, case.scale**2, c, case.kernel_size, case.kernel_size, dtype=dtype)
    spatial = torch.ones(n, case.scale**2 * case.kernel_size**2, h, w, dtype=dtype)
    options = (case.scale, case.kernel_size, 1, 1, 1, 0, 0)
    out = torch.ops.ddfup.ddf(features, channel, spatial, *options)
    moved = features.nbytes + spatial.nbytes + out.nbytes
    assert case.bytes("forward", dtype.itemsize) == moved
    grads = torch.ops.ddfup.ddf_backward(out, features, channel, spatial, *options, True, False, True)
    assert case.bytes("backward", dtype.itemsize) == moved + grads[0].nbytes + grads[2].nbytes


def test_the_sizes_are_those_of_the_paper():
    assert module.TABLE_2 == (2, 256, 200, 300)
    assert [shape[2:] for shape in module.SUPPLEMENT_A] == [
        (224, 224),
        (112, 112),
        (56, 56),
        (28, 28),
        (14, 14),
        (7, 7),
    ]
    # Anchors of the op on the CPU: 9.8 MB of features, 11.1 or 30.7 of filters, 39.3 out.
    assert [case.bytes("forward", 4) for case in op.CASES[:2]] == [60_211_200, 79_872_000]
    assert op.Case((2, 256, 200, 300)) in op.CASES and op.Case((1, 64, 1080, 1920), 3, 2) in op.GPU_CASES


# --- rows ---


def test_bandwidth_is_bytes_over_time_and_the_roofline_a_ratio_of_times():
    row = Row("op", "case", "op", "forward", 2, Timing(0.5, 0.4, 0.7, 0.9, 5), bytes=3_000_000_000, copy=12e9)
    assert (row.bandwidth, row.roofline) == (6e9, 0.5)
    record = row.record()
    assert record["bytes_per_s"] == record["bytes"] / record["median_s"]
    assert record["roofline"] == record["bytes_per_s"] / record["copy_bytes_per_s"]
    assert record["pixels_per_s"] is None and record["threads"] == 2
    whole = Row("network", "case", "base", "forward", 1, Timing(0.5, 0.4, 0.7, 0.9, 5), pixels=300_000).record()
    assert whole["pixels_per_s"] == 600_000 and whole["roofline"] is None


def test_op_rows_share_one_copy():
    rows = list(op.bench(op.QUICK[0], device=CPU, dtype=torch.float32, seconds=0))
    assert [(row.direction, row.method) for row in rows] == [
        (direction, method)
        for direction in ("forward", "backward")
        for method in ("op", "copy", "copy, new memory", "depth-wise conv", "PyTorch kernels", "unfold")
        if (direction, method) != ("backward", "unfold")
    ]
    for direction in ("forward", "backward"):
        chosen = {row.method: row for row in rows if row.direction == direction}
        assert chosen["copy"].roofline == pytest.approx(1)
        assert chosen["op"].bytes == chosen["copy"].bytes == op.QUICK[0].bytes(direction, 4)
        # Same bytes, so the share of the roof is the ratio of the times.
        expected = chosen["copy"].timing.median / chosen["op"].timing.median
        assert chosen["op"].roofline == pytest.approx(expected)


@pytest.mark.parametrize("case", op.QUICK, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_compared_computes_the_same(case, dtype):
    forward = {name: work for name, (work, _) in op._methods(case, CPU, dtype)["forward"].items()}
    ours, reference = forward["op"](), forward["PyTorch kernels"]()
    torch.testing.assert_close(ours, reference, rtol=2e-2, atol=2e-1 if dtype == torch.bfloat16 else 1e-4)
    torch.testing.assert_close(forward["unfold"](), ours, rtol=2e-2, atol=4e-1 if dtype == torch.bfloat16 else 1e-4)
    assert forward["depth-wise conv"]().numel() == ours.numel()
    with torch.no_grad():
        outputs = {name: work() for name, work in module._methods(torch.ones(1, 8, 6, 7)).items()}
    assert {tuple(value.shape) for value in outputs.values()} == {(1, 8, 6, 7)}


# --- tables ---


def test_tables_show_ratios_beside_those_of_the_paper():
    paper = {"conv 3 x 3": (8.0, 400), "DDF module": (2.0, 100), "depth-wise conv": (1.0, None)}
    seconds = {"conv 3 x 3": 1.0, "depth-wise conv": 0.25, "DDF module": 0.5}
    rows = [
        Row("module", "c", name, "forward", 1, Timing(s, s, s, s, 5), peak=int(s * 1e8), paper=paper[name])
        for name, s in seconds.items()
    ]
    ((title, head, lines),) = results.tables(rows)
    assert title == "c" and len(head) == 8
    assert [line[3:5] for line in lines] == [("0.50", "0.25"), ("2.00", "2.00"), ("1.00", "1.00")]
    assert [line[5:] for line in lines] == [("100", "0.50", "0.25"), ("25", "2.00", "-"), ("50", "1.00", "1.00")]


# --- pairs ---


@pytest.mark.parametrize(("size", "ratio"), [((640, 480), 8), ((1920, 1440), 7.5), ((33, 25), 1), ((64, 64), 32)])
def test_a_made_up_pair_fits(size, ratio):
    depth, guide = pairs.make_pair(size, ratio)
    assert guide.shape == (size[1], size[0], 3) and guide.dtype == np.uint8
    assert depth.shape == (round(size[1] / ratio), round(size[0] / ratio)) and depth.dtype == np.float32
    assert 0.9 < depth.min() and depth.max() < 4 and guide.std() > 20


def test_a_pair_that_cannot_be():
    with pytest.raises(ArgumentError, match=r"at least 1; got 0\.5"):
        pairs.depth_size((640, 480), 0.5)
    with pytest.raises(ArgumentError, match="larger than the ratio, 32; got 640x8"):
        pairs.depth_size((640, 8), 32)


# --- child processes ---


def test_a_network_is_measured_in_a_process_of_its_own(tmp_path, weights):
    task = network.Task(str(weights), (64, 48), 4, threads=(1, 2), seconds=0)
    one, two = network.bench(task)
    assert (one.threads, two.threads) == (1, 2)
    assert one.method == "tiny.safetensors" and one.pixels == 64 * 48 and one.timing.rounds == 1
    assert 0 < one.timing.median < 60 and "torch" not in one.case
    if sys.platform.startswith("linux"):
        # PyTorch is in there, and this process's own memory is not.
        ballast = np.ones(1 << 30, np.uint8)
        assert 60e6 < one.peak < 0.9e9
        (again,) = network.bench(network.Task(str(weights), (64, 48), 4, seconds=0))
        assert again.peak < ballast.nbytes


def test_errors_of_the_child_are_those_of_the_library(tmp_path, weights):
    with pytest.raises(WeightsError, match="no model named 'nobody'") as error:
        list(network.bench(network.Task("nobody", (64, 48), 4)))
    assert "known models" in error.value.hint
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(DDFUpError):
        list(network.bench(network.Task(str(weights), (64, 48), 4)))


def test_a_child_that_is_killed_is_told(monkeypatch, weights):
    monkeypatch.setattr(network.sys, "executable", "/bin/false")
    with pytest.raises(DeviceError, match="must not die; got exit code 1"):
        list(network.bench(network.Task(str(weights), (64, 48), 4)))


def test_a_command_that_fails_is_told(weights):
    weights.write_bytes(b"")
    with pytest.raises(DeviceError, match=r"it says: .*tiny\.safetensors"):
        list(
            end_to_end.bench(
                str(weights), size=(64, 48), ratio=4, device="cpu", precision="fp32", threads=1, seconds=0, runs=1
            )
        )


# --- settings ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ("op", "speed")}, "--part must be one of op, module, network, end-to-end, export; got 'speed'"),
        ({"ratio": 0.0}, "at least 1"),
        ({"dtype": "float64"}, "--dtype of network"),
        ({"dtype": "float16", "device": "cpu"}, "--dtype of network"),
    ],
    ids=str,
)
def test_settings_that_are_refused(change, message):
    with pytest.raises(ArgumentError, match=message):
        run.Settings(**change)


def test_settings_that_do_not_matter_are_not_refused():
    settings = run.Settings(parts=("op", "module"), dtype="float64", ratio=0, device="cpu")
    assert (settings.dtype, settings.ratio) == ("float64", 0)


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    wanted = before + 1
    rows = list(run.run(run.Settings(parts=("module",), quick=True, device="cpu", threads=wanted)))
    assert {row.threads for row in rows} == {wanted} and torch.get_num_threads() == before
