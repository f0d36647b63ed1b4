"""Precision on a GPU and out-of-memory errors, as far as they can be asked without one."""

import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from ddfup import devices
from ddfup.ops import native

# What users do before, in a process of its own each: PyTorch remembers which names were used.
SETTINGS = [
    "pass",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'ieee'",
]


def run(code):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)


@pytest.mark.parametrize("setting", SETTINGS)
def test_float32_is_whole_whatever_was_set_before_and_that_returns(setting):
    answer = run(f"""
        import torch
        from ddfup.devices import full_float32
        convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        {setting}
        def rounded():
            return convolutions.fp32_precision == "tf32", products.fp32_precision == "tf32"
        before = rounded()
        with full_float32:
            assert rounded() == (False, False), rounded()
            # What every product on a GPU asks; it fails where older and newer names say different things.
            assert not products.allow_tf32
        assert rounded() == before, (before, rounded())
    """)
    assert answer.returncode == 0, answer.stderr


def test_the_last_thread_to_leave_restores_it(monkeypatch):
    settings = torch.backends.cudnn.conv
    before, inside, go = settings.fp32_precision, threading.Event(), threading.Event()

    def other():
        with devices.full_float32:
            inside.set()
            go.wait(10)

    thread = threading.Thread(target=other)
    with devices.full_float32:
        thread.start()
        assert inside.wait(10)
    assert settings.fp32_precision == "ieee"
    go.set()
    thread.join()
    assert settings.fp32_precision == before == "tf32"


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("call", ["ddf_up(x, c, s, scale=64, kernel_size=1)", "torch.empty(1, 1, 64000, 64000)"])
def test_too_little_memory_is_told_from_other_errors(call):
    """The op's output alone would have 16 GB."""
    if "ddf_up" in call and not native.load("cpu"):
        pytest.skip("the native kernels are not in use")
    answer = run(f"""
        import resource
        import torch
        from ddfup.devices import is_out_of_memory
        from ddfup.ops import ddf_up, native
        native.load("cpu")
        x = torch.ones(1, 1, 1000, 1000)
        c = torch.ones(1, 1, 1, 1, 1).expand(1, 4096, 1, 1, 1)
        s = torch.ones(1, 1, 1, 1).expand(1, 4096, 1000, 1000)
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        try:
            {call}
        except RuntimeError as error:
            assert is_out_of_memory(error), error
        else:
            raise SystemExit("there was enough")
    """)
    assert answer.returncode == 0, answer.stderr


def test_other_failures_are_no_lack_of_memory():
    assert not devices.is_out_of_memory(RuntimeError('torch_call_dispatcher( "aten::sum" ) API call failed at ops.h'))
    assert not devices.is_out_of_memory(RuntimeError("shape '[2]' is invalid for input of size 3"))


def test_cudnn_searches_only_where_it_is_asked_to():
    settings = torch.backends.cudnn
    with devices.full_float32:
        assert not settings.benchmark
        with devices.cudnn_search:
            assert settings.benchmark
        assert not settings.benchmark
    settings.benchmark = True
    try:
        with devices.cudnn_search:
            pass
        assert settings.benchmark
    finally:
        settings.benchmark = False
