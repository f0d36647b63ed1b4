"""``ddfup export``: files that other runtimes run, checked, whole or not there at all."""

import json

import numpy as np
import pytest
import torch
from networks import pair, tiny_ddfupnet, tiny_pyramid

from ddfup import cli, models
from ddfup.errors import ExportError, InputError
from ddfup.export import checks, files, onnx_file, pt2_file, tracing
from ddfup.export import run as export_run
from ddfup.models.consistency import Alignment
from ddfup.speed import exported as speed_exported

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two weight files: the default kind of network, and the paper's."""
    root = tmp_path_factory.mktemp("weights")
    for name, network in (("pyramid", tiny_pyramid()), ("ddfupnet", tiny_ddfupnet(2))):
        models.save_weights(
            root / f"{name}.safetensors", network, architecture=name, name=f"tiny-{name}", description="a test"
        )
    return root


@pytest.fixture
def run(capfd):
    def call(*arguments):
        code = cli.main(["export", *map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def fixed(folder):
    """The default kind of network for one size, sides that no cell divides."""
    weights = folder / "pyramid.safetensors"
    settings = export_run.Settings("onnx", weights, guide=(45, 34), depth=(12, 9))
    path = folder / "fixed.onnx"
    exported = export_run.export(settings)
    export_run.write(path, exported)
    return path, exported


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def feed(case):
    return dict(zip(onnx_file.INPUTS, (value.numpy() for value in case.inputs()), strict=True))


def test_the_file_is_plain_onnx_and_says_what_it_is(folder, fixed):
    path, exported = fixed
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
    assert [(opset.domain, opset.version) for opset in model.opset_import if not opset.domain] == [("", 18)]
    info = models.read_info(folder / "pyramid.safetensors")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["model"] == "tiny-pyramid" and metadata["weights_sha256"] == info.sha256
    assert (metadata["guide_size"], metadata["depth_size"]) == ("45x34", "12x9")
    assert metadata.items() >= exported.metadata.items()
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert shapes == {"depth": [1, 1, 9, 12], "guide": [1, 3, 34, 45], "valid": [1, 1, 9, 12]}


def test_onnx_runtime_gives_what_the_network_gives(folder, fixed):
    path, exported = fixed
    assert exported.deviation <= checks.TOLERANCE and exported.cases == 2
    case = checks.Case((9, 12), (34, 45))
    network = models.load_model(folder / "pyramid.safetensors")
    depth, guide, valid = case.inputs()
    (found,) = session(path).run(None, feed(case))
    expected = network(torch.where(valid, depth, -7.0), guide, valid).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(depth[valid].max() - depth[valid].min()))
    # Holes change the result: they are no decoration.
    whole = feed(case) | {"depth": torch.where(valid, depth, 2.0).numpy(), "valid": np.ones(valid.shape, bool)}
    assert np.abs(session(path).run(None, whole)[0] - found).max() > 1e-3


def test_one_file_serves_all_sizes_and_ratios(folder):
    network = models.load_model(folder / "ddfupnet.safetensors")
    path = folder / "free.onnx"
    exported = export_run.export(export_run.Settings("onnx", folder / "ddfupnet.safetensors", ratio=2))
    export_run.write(path, exported)
    read = files.read(path)
    assert read.content == "onnx" and read.metadata["guide_multiple"] == "2"
    ready = session(path)
    assert [value.shape for value in ready.get_inputs()] == [
        [1, 1, "depth_height", "depth_width"],
        [1, 3, "guide_height", "guide_width"],
        [1, 1, "depth_height", "depth_width"],
    ]
    for case in (checks.Case((7, 9), (14, 18)), checks.Case((5, 33), (40, 264)), checks.Case((31, 20), (62, 40))):
        expected = network(*case.inputs())
        found = read.run(case.inputs())
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)
        np.testing.assert_array_equal(ready.run(None, feed(case))[0], found.numpy())


def test_a_program_serves_all_sizes_and_ratios(folder):
    weights = folder / "ddfupnet.safetensors"
    exported = export_run.export(export_run.Settings("pt2", weights, ratio=2, content="program"))
    path = folder / "free.pt2"
    export_run.write(path, exported)
    # As a user loads it, without this package.
    module = torch.export.load(path).module()
    network = models.load_model(weights)
    case = checks.Case((5, 33), (40, 264))
    with torch.no_grad():
        torch.testing.assert_close(module(*case.inputs()), network(*case.inputs()), rtol=0, atol=3e-5)
    read = files.read(path)
    assert read.content == "program" and read.metadata["weights_sha256"] == models.read_info(weights).sha256


class LowAndHigh(torch.nn.Module):
    """The filters between the resolutions, of which the whole default network would take minutes to export."""

    def forward(self, depth, guide, valid):
        sizes = guide.shape[-2:], depth.shape[-2:]
        ratio = sizes[0][0] / sizes[1][0], sizes[0][1] / sizes[1][1]
        alignment = Alignment(guide, (0, 0), ratio, sizes[1])
        return alignment.spread(alignment.degrade(guide[:, :1]).mean(dim=1, keepdim=True) * valid)


def test_what_is_computed_from_sizes_survives_being_written(tmp_path):
    network, path = LowAndHigh(), tmp_path / "filters.pt2"
    torch.export.save(tracing.trace(network, checks.Case((6, 9), (48, 72)).inputs(), multiple=8), path)
    module = torch.export.load(path).module()
    for case in (checks.Case((6, 9), (48, 72)), checks.Case((9, 7), (80, 56))):
        torch.testing.assert_close(module(*case.inputs()), network(*case.inputs()), rtol=0, atol=1e-5)


@pytest.mark.skipif(not pt2_file.has_compiler(), reason="no C++ compiler")
def test_compiled_code_gives_what_the_network_gives(tmp_path):
    # Three levels of pixel shuffles, which PyTorch's compiler stumbles over, and little else, since it takes its time.
    network = tiny_pyramid(trunk_blocks=1, stage_blocks=(0,), guide_blocks=(0,))
    weights, path = tmp_path / "tiny.safetensors", tmp_path / "tiny.pt2"
    models.save_weights(weights, network, architecture="pyramid", name="tiny", description="a test")
    settings = export_run.Settings("pt2", weights, guide=(48, 36), depth=(12, 9), content="compiled")
    export_run.write(path, export_run.export(settings))
    # As a user loads it, without this package.
    package = torch._inductor.aoti_load_package(str(path))
    depth, guide = pair((9, 12), (36, 48), seed=5)
    valid = torch.rand(depth.shape, generator=torch.Generator().manual_seed(1)) > 0.1
    found = package(depth, guide, valid)
    found = found if isinstance(found, torch.Tensor) else found[0]
    with torch.no_grad():
        expected = network(depth, guide, valid)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(depth.max() - depth.min()))
    read = files.read(path)
    assert read.content == "compiled" and read.metadata["guide_size"] == "48x36"


def test_only_unknown_ranges_are_passed_over_while_compiling(monkeypatch):
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def fail(message):
        def evaluate(self, expression):
            raise AssertionError(message)

        monkeypatch.setattr(ShapeEnv, "_maybe_evaluate_static", evaluate)

    fail("vr must not be None for symbol q0")
    with pt2_file._unknown_ranges():
        assert ShapeEnv()._maybe_evaluate_static(1) is None
    fail("something else")
    with pt2_file._unknown_ranges(), pytest.raises(AssertionError, match="something else"):
        ShapeEnv()._maybe_evaluate_static(1)
    with pytest.raises(AssertionError):
        ShapeEnv()._maybe_evaluate_static(1)


def test_the_op_is_not_in_a_program(folder):
    network = models.load_model(folder / "ddfupnet.safetensors")
    program = tracing.trace(network, checks.Case((7, 9), (14, 18)).inputs(), multiple=None)
    used = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert used and not [name for name in used if "ddfup" in name]
    # Tracing leaves nothing behind.
    assert "ddfup" in str(torch.ops.ddfup.ddf)
    assert torch.SymInt.__truediv__ is tracing._true_divide


# --- the command ---


def fake(monkeypatch, data=b"data"):
    made = export_run.Exported(data, "onnx", {"guide_size": "8x8", "depth_size": "4x4"}, 1e-7, 2, 0.5)
    seen = []
    monkeypatch.setattr(export_run, "export", lambda settings: seen.append(settings) or made)
    return seen


def test_the_command_writes_and_reports(run, tmp_path, monkeypatch, folder):
    seen = fake(monkeypatch)
    weights = folder / "pyramid.safetensors"
    out = tmp_path / "net.onnx"
    code, text, err = run("onnx", "--model", weights, "-o", out, "--size", "64x48", "--depth-size", "16x12", "--json")
    assert code == 0, err
    record = json.loads(text)
    assert record["status"] == "ok" and record["out"] == str(out) and record["bytes"] == 4
    assert record["weights_sha256"] == models.read_info(weights).sha256 and record["deviation"] == 1e-7
    assert out.read_bytes() == b"data" and names(tmp_path) == ["net.onnx"]
    assert [(s.guide, s.depth, s.kind) for s in seen] == [((64, 48), (16, 12), "onnx")]
    assert "guides of 8x8 with depth of 4x4" in err


def test_the_default_name_says_model_and_ratio(run, tmp_path, monkeypatch):
    fake(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert run("pt2", "--ratio", "7.5")[0] == 0
    assert names(tmp_path) == ["base_x7.5.pt2"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("tflite",), 2, "'tflite' is not one of 'onnx', 'pt2'"),
        (("onnx", "--ratio", "40"), 2, "'--ratio': Input should be less than or equal to 32"),
        (("onnx", "--size", "8"), 2, "--size must be WIDTHxHEIGHT; got '8'"),
        (("onnx", "--depth-size", "8x8"), 2, "--depth-size must come with --size"),
        (("onnx", "--content", "compiled"), 2, "--content compiled is for pt2 files; got onnx"),
        (("onnx", "--model", "nobody"), 7, "no model named 'nobody'"),
        (("onnx", "-o", "nowhere/a.onnx"), 6, "nowhere/a.onnx: its folder must exist"),
    ],
    ids=str,
)
def test_what_is_refused_before_any_work(run, monkeypatch, arguments, code, message):
    monkeypatch.setattr(export_run, "export", lambda settings: pytest.fail("it began"))
    found, out, err = run(*arguments)
    assert (found, out) == (code, "") and err.startswith("error: ") and message in err


def test_a_file_is_not_replaced_unasked(run, tmp_path, monkeypatch):
    seen = fake(monkeypatch)
    out = tmp_path / "net.onnx"
    out.write_text("mine")
    assert run("onnx", "-o", out)[0] == 6 and out.read_text() == "mine" and not seen
    assert run("onnx", "-o", tmp_path / "new.onnx", "-n")[0] == 0 and not seen
    assert run("onnx", "-o", out, "--overwrite")[0] == 0 and out.read_bytes() == b"data"


def test_a_file_that_is_not_the_network_is_never_written(run, tmp_path, monkeypatch, folder, fixed):
    data = fixed[0].read_bytes()
    real = onnx_file.load

    def off(data, **options):
        function = real(data, **options)
        return lambda inputs: function(inputs) + 1e-2

    monkeypatch.setattr(onnx_file, "make", lambda program, metadata: data)
    monkeypatch.setattr(tracing, "trace", lambda *arguments, **options: None)
    arguments = ("--model", folder / "pyramid.safetensors", "--size", "45x34", "--depth-size", "12x9")
    assert run("onnx", *arguments, "-o", tmp_path / "right.onnx")[0] == 0
    monkeypatch.setattr(onnx_file, "load", off)
    code, _, err = run("onnx", *arguments, "-o", tmp_path / "wrong.onnx")
    assert code == 1 and "must give what the network gives" in err and "is off by" in err
    assert names(tmp_path) == ["right.onnx"]


def test_a_missing_package_is_told(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    code, _, err = run("onnx", "-o", tmp_path / "a.onnx")
    assert code == 2 and "onnxscript is not" in err and "pip install 'ddfup[export]'" in err


def test_what_cannot_be_translated_is_told(monkeypatch, folder):
    network = models.load_model(folder / "ddfupnet.safetensors")
    program = tracing.trace(network, checks.Case((7, 9), (14, 18)).inputs(), multiple=None)

    def fail(*arguments, **options):
        raise RuntimeError("a summary") from ValueError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match="must have a translation to ONNX; got no such operator"):
        onnx_file.make(program, {})


@pytest.mark.parametrize("name", ["a.onnx", "a.pt2"])
def test_other_files_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="must be a file of `ddfup export`"):
        files.read(path)


# --- bench ---


def test_bench_times_files_beside_their_network(folder, fixed, capfd):
    arguments = ["bench", "--quick", "--part", "export", "--exported", str(fixed[0]), "--device", "cpu"]
    arguments += ["--model", str(folder / "pyramid.safetensors"), "--threads", "1", "--json"]
    assert cli.main([*arguments, "--size", "45x34", "--ratio", "3.75"]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [(row["part"], row["method"], row["threads"]) for row in rows] == [
        ("export", "tiny-pyramid, PyTorch", 1),
        ("export", "fixed.onnx", 1),
    ]
    assert all(row["median_s"] > 0 and row["pixels"] == 45 * 34 for row in rows)
    assert cli.main([*arguments, "--size", "64x48", "--ratio", "4"]) == 2
    assert "guides of 45x34 with depth of 12x9; got 64x48 with 16x12" in capfd.readouterr().err
    assert cli.main([*arguments[:3], "export"]) == 2
    assert "must come with --exported FILE" in capfd.readouterr().err


def test_bench_wants_the_weights_of_the_file(fixed, capfd):
    arguments = ["bench", "--quick", "--part", "export", "--exported", str(fixed[0]), "--size", "45x34"]
    assert cli.main([*arguments, "--ratio", "3.75", "--device", "cpu"]) == 7
    assert "its weights must be at hand" in capfd.readouterr().err


def test_sizes_that_a_file_does_not_serve():
    metadata = {"guide_multiple": "8", "ratio_from": "7.464", "ratio_below": "14.93"}
    speed_exported._check_size("a.onnx", metadata, (640, 480), (80, 60))
    with pytest.raises(ValueError, match="whole 8s"):
        speed_exported._check_size("a.onnx", metadata, (641, 480), (80, 60))
    with pytest.raises(ValueError, match=r"--ratio must be 7\.464 to 14\.93 for it; got 4"):
        speed_exported._check_size("a.onnx", metadata, (640, 480), (160, 120))


def test_compiling_takes_a_compiler(run, monkeypatch, tmp_path):
    monkeypatch.setattr(pt2_file, "has_compiler", lambda: False)
    code, _, err = run("pt2", "--content", "compiled", "-o", tmp_path / "a.pt2")
    assert code == 2 and "must have a C++ compiler; there is none" in err and "hint: install a C++17 compiler" in err
