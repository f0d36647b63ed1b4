"""`ddfup batch` from its command line: what is done, done again, left alone, refused, shared and cut short."""

import hashlib
import json
import os
import pty
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import torch
from networks import tiny_pyramid
from PIL import Image
from torture.batches import CHECKOUT, DRIVER, FORMATS, check_whole, finish, start, tree, write_pair, write_scene

from ddfup import cli, models, pair, writing
from ddfup.batch import engine, pool, processing
from ddfup.batch.claims import FolderClaims
from ddfup.batch.journal import Entry, FolderJournal
from ddfup.errors import DeviceError, InputError, OutputError, WeightsError

KEYS = [
    *("depth", "guide", "out", "status", "error", "width", "height", "factor", "model", "device", "kernels"),
    *("seconds", "valid_fraction"),
]


class Nearest:
    """Enlarges without a network, and tells how often."""

    model_name, weights_sha256, device, kernels = "nearest", "5eed", "cpu", "none"

    def __init__(self):
        self.calls = 0
        self.at_once = self.most = 0
        self.before = lambda: None

    def __call__(self, depth, guide, *, valid=None, fill=False):
        self.calls += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.before()
        height, width = guide.shape[:2]
        rows, columns = np.arange(height) * depth.shape[0] // height, np.arange(width) * depth.shape[1] // width
        values = np.where(valid, depth, 2.0 if fill else np.nan).astype(np.float32)
        self.at_once -= 1
        return values[np.ix_(rows, columns)]


@pytest.fixture
def nearest(monkeypatch):
    fake = Nearest()
    monkeypatch.setattr(pool, "make_pool", lambda *arguments: pool.LocalPool(fake))
    monkeypatch.setattr(
        models, "find_model", lambda name: models.ModelInfo("nearest", "n", Path("n"), 1, "5eed", "", {})
    )
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """Six pairs in three folders, three formats; the working folder."""
    write_scene(tmp_path, 6)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capfd):
    """Call the command with --json; give the exit code, the records by output, and stderr."""

    def call(*arguments, places=("depths", "guides", "out")):
        code = cli.main(["batch", *map(str, (*places, *arguments)), "--json"])
        captured = capfd.readouterr()
        records = [json.loads(line) for line in captured.out.splitlines()]
        assert all(list(record)[:13] == KEYS for record in records)
        return code, {record["out"]: record for record in records}, captured.err

    return call


def statuses(records):
    count = dict.fromkeys(("ok", "skipped", "failed"), 0)
    for record in records.values():
        count[record["status"]] += 1
    return tuple(count.values())


# --- what it writes ---


def test_a_batch_gives_what_single_runs_give(scene, nearest, run):
    inputs = tree(scene)
    code, records, err = run()
    assert code == 0 and statuses(records) == (6, 0, 0), err
    assert {name: digest for name, digest in tree(scene).items() if name in inputs} == inputs
    for name in sorted(tree(scene / "depths")):
        out, depth = Path("out") / name, Path("depths") / name
        guide = Path("guides", name).with_suffix(".jpg")
        options = pair.Options()
        plan = pair.plan(depth, guide, "-", options)
        assert out.read_bytes() == pair.run(plan, pair.read(plan, options), nearest, options).data
        record = records[str(out)]
        assert record["status"] == "ok" and record["error"] is None and record["model"] == "nearest"
        assert (record["depth"], record["guide"]) == (str(depth), str(guide))
        assert (record["width"], record["height"], record["factor"]) == (32, 24, 4.0)
        assert record["valid_fraction"] == 1.0 and record["seconds"] > 0
    assert len(tree(scene / "out", hidden=False)) == 6
    assert err.splitlines()[-1].startswith("6 written, 0 already done, 0 failed; ")
    assert nearest.most == 1


def test_with_a_network(scene, run, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    models.save_weights(Path("a.safetensors"), tiny_pyramid(), architecture="pyramid", name="tiny", description="t")
    models.save_weights(Path("b.safetensors"), tiny_pyramid(1), architecture="pyramid", name="tiny", description="t")
    torch.set_num_threads(1)
    code, records, err = run("--model", "a.safetensors", "--device", "cpu")
    assert code == 0 and statuses(records) == (6, 0, 0), err
    first = tree(scene / "out", hidden=False)
    assert statuses(run("--model", "a.safetensors", "--device", "cpu")[1]) == (0, 6, 0)
    # Other weights of the same name: nothing old is served.
    assert statuses(run("--model", "b.safetensors", "--device", "cpu")[1]) == (6, 0, 0)
    second = tree(scene / "out", hidden=False)
    assert all(first[name] != second[name] for name in first)
    assert (
        cli.main(
            [
                "upsample",
                "depths/room0/0000.png",
                "guides/room0/0000.jpg",
                "-o",
                "one.png",
                "--model",
                "a.safetensors",
                "--device",
                "cpu",
                "-q",
            ]
        )
        == 0
    )
    assert statuses(run("--model", "a.safetensors", "--device", "cpu")[1]) == (6, 0, 0)
    assert tree(scene / "out", hidden=False) == first
    assert Path("one.png").read_bytes() == Path("out/room0/0000.png").read_bytes()
    Path("a.safetensors").write_bytes(b"broken")
    code, records, err = run("--model", "a.safetensors")
    assert code == 7 and not records and "error: a.safetensors" in err


def test_previews_and_formats(scene, nearest, run):
    code, records, err = run("--preview", "look", "--format", "npy", "--workers", "1")
    assert code == 0, err
    assert set(records) == {f"out/room{i % 3}/{i:04}.npy" for i in range(6)}
    assert set(tree(scene / "look")) == {f"room{i % 3}/{i:04}.npy.jpg" for i in range(6)}
    with Image.open("look/room0/0000.npy.jpg") as picture:
        assert picture.format == "JPEG" and picture.width > 3 * picture.height
    before = tree(scene / "look")
    Path("look/room0/0000.npy.jpg").unlink()
    Path("look/room1/0001.npy.jpg").write_bytes(b"altered")
    assert statuses(run("--preview", "look", "--format", "npy")[1]) == (2, 4, 0)
    assert tree(scene / "look") == before
    assert statuses(run("--format", "npy")[1]) == (0, 6, 0)


def test_globs_and_the_shared_options(scene, nearest, run):
    code, records, _ = run("--unit", "tum", "--invalid", "0,1001", places=("depths/*/*.png", "guides/**/*.jpg", "out"))
    assert code == 0 and set(records) == {"out/room0/0000.png", "out/room0/0003.png"}
    assert run("--unit", "inch")[0] == 2 and run("--invalid", "x")[0] == 2


# --- pairs ---


def test_orphans_are_named_and_pairs_done(scene, nearest, run):
    Path("guides/room0/0000.jpg").unlink()
    Path("depths/room1/0001.npy").unlink()
    Path("depths/readme.txt").write_text("x")
    code, records, err = run()
    assert code == 0 and statuses(records) == (4, 0, 0)
    assert "note: depths/room0/0000.png has no guide" in err and "note: guides/room1/0001.jpg has no depth" in err
    assert "1 files in DEPTHS are of other kinds" in err


@pytest.mark.parametrize("index", range(4))
def test_no_part_of_a_batch_replaces_an_input_of_another(scene, nearest, run, index):
    """A pair's output is the other pair's guide, and the two are in different parts or in one."""
    Image.open("guides/room0/0000.jpg").save("guides/other.png")
    Path("list.csv").write_text(
        "depth,guide,out\n"
        "depths/room0/0000.png,guides/room0/0000.jpg,guides/other.png\n"
        "depths/room0/0000.png,guides/other.png,new/0001.png\n"
    )
    before = tree(scene)
    codes = {}
    for part in (None, index):
        shard = () if part is None else ("--shard", f"{part}/4")
        codes[part], _, err = run("--manifest", "list.csv", "--overwrite", *shard, places=(".",))
        if codes[part]:
            assert codes[part] == 6 and "guides/other.png: an output must not replace an input" in err
    assert codes[None] == 6
    assert tree(scene)["guides/other.png"] == before["guides/other.png"]


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="the system cannot refuse links")
@pytest.mark.parametrize(("name", "expected"), [("journal", 4), ("lock", 6)])
def test_no_state_is_written_through_a_link(scene, nearest, run, name, expected):
    Path("out/.ddfup").mkdir(parents=True)
    outside = scene / "outside.txt"
    outside.write_text("mine")
    run()
    own = next(Path("out/.ddfup").glob(f"{name}*"))
    shutil.rmtree("out")
    Path("out/.ddfup").mkdir(parents=True)
    (Path("out/.ddfup") / own.name).symlink_to(outside)
    code, _, err = run()
    assert code == expected and "must be writable" in err
    assert outside.read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("ambiguous", 5, "depths/room0/0000.png has 2 guides"),
        ("collision", 5, "would all become room0/0000.tif"),
        ("no pairs", 5, "6 depth files and 6 guides make no pair"),
        ("no folder", 4, "DEPTHS must be a folder, a file or a glob; there is no 'none'"),
        ("same folder", 6, "an output must not replace an input"),
        ("out is a file", 6, "afile: must be a folder"),
        ("two places", 2, "batch must have DEPTHS GUIDES OUT_DIR; got 2"),
        ("shard", 2, "--shard must be I/N with I from 0 to N - 1; got '4/4'"),
        ("rule", 2, "--pair-by must be stem, regex"),
        ("manifest", 2, "--pair-by manifest must come with --manifest"),
    ],
)
def test_refused_before_any_work(scene, nearest, run, change, code, message):
    arguments, places = (), ("depths", "guides", "out")
    if change == "ambiguous":
        shutil.copy("guides/room0/0000.jpg", "guides/room0/0000.jpeg")
    elif change == "collision":
        shutil.copy("depths/room0/0000.png", "depths/room0/0000.tif")
        arguments = ("--format", "tiff")
    elif change == "no pairs":
        arguments = ("--pair-regex", r"(guides)/")
    elif change == "no folder":
        places = ("none", "guides", "out")
    elif change == "same folder":
        places = ("depths", "guides", "depths")
    elif change == "out is a file":
        Path("afile").write_text("x")
        places = ("depths", "guides", "afile")
    elif change == "two places":
        places = ("depths", "guides")
    else:
        arguments = {"shard": ("--shard", "4/4"), "rule": ("--pair-by", "order")}.get(change, ("--pair-by", "manifest"))
    before = tree(scene)
    result = run(*arguments, places=places)
    assert result[0] == code and message in result[2] and not result[1]
    assert tree(scene) == before and nearest.calls == 0


def test_the_folder_of_the_depths_may_be_that_of_the_results(scene, nearest, run):
    Path("depths/room1/0001.npy").unlink()
    Path("depths/room1/0004.npy").unlink()
    inputs = tree(scene / "depths")
    for expected in ((4, 0, 0), (0, 4, 0)):
        code, records, err = run("--format", "npy", places=("depths", "guides", "depths"))
        assert code == 0 and statuses(records) == expected, err
    now = tree(scene / "depths", hidden=False)
    assert {name: now[name] for name in inputs} == inputs and len(now) == 8


# --- bad pairs ---


def spoil(kind, depth, guide):
    """Make a good pair a bad one; return a part of the message that must come."""
    if kind == "empty":
        depth.write_bytes(b"")
    elif kind.startswith("cut"):
        data = depth.read_bytes()
        depth.write_bytes(data[: int(len(data) * float(kind[3:]))])
    elif kind == "flipped":
        data = bytearray(depth.read_bytes())
        data[len(data) // 2] ^= 0xFF
        depth.write_bytes(data)
    elif kind == "guide is text":
        guide.write_text("hello")
    elif kind == "guide cut":
        guide.write_bytes(guide.read_bytes()[:300])
    elif kind == "fifo":
        depth.unlink()
        os.mkfifo(depth)
    elif kind == "dangling":
        depth.unlink()
        depth.symlink_to("nowhere.png")
    elif kind == "colour":
        Image.new("RGB", (8, 6)).save(depth)
    elif kind == "8 bit":
        Image.new("L", (8, 6), 9).save(depth)
    elif kind == "zeros":
        Image.fromarray(np.zeros((6, 8), np.uint16)).save(depth)
    elif kind == "aspect":
        Image.new("RGB", (64, 24)).save(guide)
    elif kind == "larger":
        Image.new("RGB", (4, 3)).save(guide)
    elif kind == "object":
        depth.unlink()
        np.save(depth.with_suffix(".npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif kind == "other kind":
        np.save(depth.with_suffix(".npy"), np.ones((6, 8)))
        depth.with_suffix(".npy").replace(depth)
    elif kind == "bomb":
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (200000, 200000), }"
        depth.unlink()
        depth.with_suffix(".npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


BAD = [
    *("empty", "cut0.1", "cut0.5", "cut0.99", "flipped", "guide is text", "guide cut", "fifo", "dangling", "colour"),
    *("8 bit", "zeros", "aspect", "larger", "object", "other kind", "bomb"),
]


def test_a_bad_pair_never_stops_others(tmp_path, monkeypatch, nearest, run):
    monkeypatch.chdir(tmp_path)
    names = [f"good{index}" for index in range(20)] + [f"bad {kind}" for kind in BAD]
    random.Random(3).shuffle(names)
    for index, name in enumerate(names):
        good = name.startswith("good")
        depth, guide = write_pair(tmp_path, f"{index:03} {name}", kind=FORMATS[index % 3] if good else "png")
        if not good:
            spoil(name[4:], depth, guide)
    code, records, err = run()
    assert code == 3 and statuses(records) == (20, 0, len(BAD)), err
    for out, record in records.items():
        assert (record["status"] == "ok") == ("good" in out) == Path(out).exists()
        assert (record["error"] is None) == ("good" in out)
    # One line for each failure, which names the pair.
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(BAD) and all(any(f"bad {kind}" in line for line in errors) for kind in BAD)
    assert len(tree(tmp_path / "out", hidden=False)) == 20 and "internal error" not in err
    check_whole(tmp_path / "out")
    # Again: nothing to do, still not all well.
    calls = nearest.calls
    code, again, err = run()
    assert code == 3 and statuses(again) == (0, 20, len(BAD)) and nearest.calls == calls
    assert {out: r["error"] for out, r in again.items()} == {out: r["error"] for out, r in records.items()}
    assert "--retry-failed tries them again" in err
    for index, name in enumerate(names):
        if name.startswith("bad"):
            for path in [*Path("depths").glob(f"{index:03} *"), *Path("guides").glob(f"{index:03} *")]:
                path.unlink()
            write_pair(tmp_path, f"{index:03} {name}")
    assert run()[0] == 0 and nearest.calls == 20 + len(BAD)


def test_all_bad_and_fail_fast(scene, nearest, run):
    for path in Path("guides").rglob("*.jpg"):
        path.write_bytes(b"no picture")
    code, records, _ = run()
    assert code == 4 and statuses(records) == (0, 0, 6)
    code, records, err = run("--fail-fast", "--workers", "1")
    assert code == 4 and len(records) == 1 and "5 not reached" in err


def test_what_failed_for_its_content_is_not_tried_again_unasked(scene, nearest, run, monkeypatch):
    def fail():
        raise InputError("depth is strange", "look at it")

    nearest.before = fail
    assert run()[0] == 4 and nearest.calls == 6
    nearest.before = lambda: None
    code, records, _ = run()
    assert code == 4 and nearest.calls == 6 and {r["error"] for r in records.values()} == {"depth is strange"}
    assert statuses(run("--retry-failed")[1]) == (6, 0, 0)
    assert statuses(run()[1]) == (0, 6, 0)
    # Having succeeded, it is not what failed before.
    Path("out/room0/0000.png").unlink()
    assert statuses(run()[1]) == (1, 5, 0)


@pytest.mark.parametrize(
    "error", [DeviceError("cpu: out of memory", "smaller tiles"), ValueError("a fault"), MemoryError()]
)
def test_a_failure_of_the_moment_is_tried_again(scene, nearest, run, error):
    def fail():
        if nearest.calls == 2:
            raise error

    nearest.before = fail
    code, records, err = run()
    assert code == 3 and statuses(records) == (5, 0, 1) and "Traceback" not in err
    assert statuses(run()[1]) == (1, 5, 0)


def test_a_network_that_cannot_be_loaded_ends_all(scene, nearest, run, monkeypatch):
    def load(*arguments):
        raise WeightsError("the weights do not match their sha256", "download them")

    monkeypatch.setattr(pool, "make_pool", load)
    code, records, err = run()
    assert code == 7 and not records and "error: the weights do not match" in err


def test_a_full_disk_ends_all(scene, nearest, run, monkeypatch):
    def write(files):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise OutputError("out: must be writable; got No space left on device") from error

    monkeypatch.setattr(writing, "write_files", write)
    code, records, _ = run("--workers", "1")
    assert code == 6 and len(records) == 1 and nearest.calls == 1


@pytest.fixture
def halted(monkeypatch):
    """Set when the network is told to begin nothing more."""
    event, original = threading.Event(), pool.LocalPool.stop

    def stop(self):
        original(self)
        event.set()

    monkeypatch.setattr(pool.LocalPool, "stop", stop)
    return event


def test_a_full_disk_ends_what_the_network_has_just_then(scene, nearest, run, monkeypatch, halted):
    second, writes = threading.Event(), []

    def before():
        if nearest.calls == 2:
            second.set()
            assert halted.wait(20)

    def write(files):
        if not files:  # as when a pair is run for its bytes only
            return
        writes.append(files)
        assert second.wait(20)
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise OutputError("out: must be writable; got No space left on device") from error

    nearest.before = before
    monkeypatch.setattr(writing, "write_files", write)
    code, records, _ = run()
    assert code == 6 and len(records) == 1 and nearest.calls == 2 and len(writes) == 1


def test_an_input_that_changes_meanwhile_is_not_recorded(scene, nearest, run, monkeypatch):
    original = pair.read

    def read(work, options):
        inputs = original(work, options)
        if work.depth.name == "0000.png":
            os.utime(work.depth, ns=(1, 1))
        return inputs

    monkeypatch.setattr(processing.pair, "read", read)
    code, records, _ = run()
    assert code == 3 and "must not change while they are read" in records["out/room0/0000.png"]["error"]
    assert statuses(run()[1]) == (1, 5, 0)


# --- again ---


def change_depth():
    path = Path("depths/room0/0000.png")
    values = np.array(Image.open(path))
    values[0, 0] += 1
    Image.fromarray(values).save(path)


CHANGES = {
    "nothing": (lambda: None, (), 0),
    "a pixel": (change_depth, (), 1),
    "a guide": (lambda: Path("guides/room0/0003.jpg").write_bytes(Path("guides/room0/0000.jpg").read_bytes()), (), 1),
    "times": (lambda: [os.utime(path, (1, 1)) for path in Path("depths").rglob("*.*")], (), 0),
    "deleted": (lambda: Path("out/room0/0000.png").unlink(), (), 1),
    "altered": (lambda: Path("out/room0/0000.png").write_bytes(b"x"), (), 1),
    "fill": (lambda: None, ("--fill",), 6),
    "unit": (lambda: None, ("--unit", "tum"), 6),
    "invalid": (lambda: None, ("--invalid", "0,7"), 6),
    "precision": (lambda: None, ("--precision", "bf16"), 6),
    "same precision": (lambda: None, ("--precision", "fp32"), 0),
    "tile": (lambda: None, ("--tile", "512"), 6),
    "limit": (lambda: None, ("--max-pixels", "1000"), 0),
    "journal lost, overwritten": (lambda: shutil.rmtree("out/.ddfup"), ("--overwrite",), 6),
    "journal lost, kept": (lambda: shutil.rmtree("out/.ddfup"), ("--skip-existing",), 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_second_run_does_what_is_missing_or_changed(scene, nearest, run, change):
    assert run()[0] == 0
    act, arguments, count = CHANGES[change]
    act()
    code, records, err = run(*arguments)
    assert code == 0 and statuses(records) == (count, 6 - count, 0) and nearest.calls == 6 + count, err
    after = tree(scene / "out", hidden=False)
    if not arguments:
        shutil.rmtree("out")
        assert run()[0] == 0 and tree(scene / "out", hidden=False) == after
    assert statuses(run(*arguments)[1])[0] == 0 or not arguments


def test_what_is_not_ours_is_not_replaced(scene, nearest, run):
    mine = Path("out/room0/0000.png")
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"precious")
    before = tree(scene)
    code, records, err = run()
    assert code == 6 and not records and tree(scene) == before
    assert "error: out/room0/0000.png: must not exist yet unless from an earlier batch; it does" in err
    code, records, _ = run("--skip-existing")
    assert code == 0 and statuses(records) == (5, 1, 0) and mine.read_bytes() == b"precious"
    code, records, _ = run("--overwrite")
    assert code == 0 and statuses(records) == (1, 5, 0) and mine.read_bytes() != b"precious"
    assert run("--overwrite", "--skip-existing")[0] == 2
    look = Path("look/room0/0000.png.jpg")
    look.parent.mkdir(parents=True)
    look.write_bytes(b"precious")
    assert run("--preview", "look")[0] == 6 and look.read_bytes() == b"precious"


def test_a_dry_run_writes_nothing(scene, nearest, run):
    Path("guides/room2/0002.jpg").write_bytes(b"")
    before = tree(scene)
    code, records, err = run("-n")
    assert code == 3 and statuses(records) == (5, 0, 1) and tree(scene) == before and nearest.calls == 0
    assert all(record["dry_run"] for record in records.values())
    assert "would write out/room0/0000.png: 32x24 (x4) from depths/room0/0000.png and guides/room0/0000.jpg" in err
    run()
    assert statuses(run("-n")[1]) == (0, 5, 1)


# --- the output folder ---


def test_nothing_is_written_through_links(scene, nearest, run):
    outside = scene / "outside"
    outside.mkdir()
    Path("out").mkdir()
    Path("out/room0").symlink_to(outside)
    Path("out/room1").symlink_to(scene / "nowhere")
    code, records, _ = run()
    assert code == 3 and statuses(records) == (2, 0, 4)
    assert "must not lead out of out by a link" in records["out/room0/0000.png"]["error"]
    assert not any(outside.iterdir()) and not Path("nowhere").exists()
    shutil.rmtree("out")
    Path("out").mkdir()
    Path("out/.ddfup").symlink_to(outside)
    code, records, _ = run()
    assert code == 6 and not records and not any(outside.iterdir())


def test_a_manifest_writes_below_the_output_folder_only(scene, nearest, run):
    depth, guide = "depths/room0/0000.png", "guides/room0/0000.jpg"
    bad = ["../x.png", str(scene / "y.png"), "a/../../z.png", ".ddfup/lock.png", "a.exe"]
    rows = [{"depth": depth, "guide": guide, "out": out} for out in ["good/1.png", *bad, "good/2.npy"]]
    Path("list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = tree(scene)
    code, records, _ = run("--manifest", "list.jsonl", places=("out",))
    assert code == 3 and statuses(records) == (2, 0, 5)
    assert set(tree(scene)) - set(before) >= {"out/good/1.png", "out/good/2.npy"}
    assert all(name.startswith("out/") for name in set(tree(scene)) - set(before))
    assert set(tree(scene / "out", hidden=False)) == {"good/1.png", "good/2.npy"}
    assert run("--manifest", "list.jsonl")[0] == 2
    Path("twice.csv").write_text(f"depth,guide,out\n{depth},{guide},a.png\n{depth},{guide},a.png\n")
    code, _, err = run("--manifest", "twice.csv", places=("out",))
    assert code == 5 and "hint: give each row of the manifest an out of its own" in err
    Path("none.csv").write_text(f"depth,guide\n{depth},{guide}\n,\n")
    code, records, _ = run("--manifest", "none.csv", places=("out",))
    assert code == 3 and [records[None][key] for key in ("depth", "guide", "status")] == [None, None, "failed"]
    Path("empty.jsonl").write_text("\n")
    assert run("--manifest", "empty.jsonl", places=("out",))[0] == 5


def write_confidence(scene):
    """A map of the highest confidence for each depth, but low in the corner of one; returns that one's name."""
    for path in tree(scene / "depths"):
        marks = np.full((6, 8), 2, np.uint8)
        if path == "room0/0000.png":
            marks[:2, :2] = 0
        target = (scene / "marks" / path).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(marks).save(target)
    return "room0/0000.png"


def test_pixels_of_low_confidence_are_holes(scene, nearest, run):
    marked = write_confidence(scene)
    code, records, err = run("--confidence", "marks")
    assert code == 0 and statuses(records) == (6, 0, 0), err
    # As a single run gives it.
    options = pair.Options(confidence=Path("marks") / marked)
    plan = pair.plan(Path("depths") / marked, Path("guides/room0/0000.jpg"), "-", options)
    expected = pair.run(plan, pair.read(plan, options), nearest, options).data
    assert (Path("out") / marked).read_bytes() == expected
    assert (np.array(Image.open(Path("out") / marked)) == 0).sum() == 8 * 8
    assert records[f"out/{marked}"]["valid_fraction"] == pytest.approx(1 - 4 / 48)
    # They are inputs like the others: what changes there is done again, and nothing else.
    assert statuses(run("--confidence", "marks")[1]) == (0, 6, 0)
    Image.fromarray(np.full((6, 8), 2, np.uint8)).save(Path("marks") / marked)
    assert statuses(run("--confidence", "marks")[1]) == (1, 5, 0)
    assert records[f"out/{marked}"] and (np.array(Image.open(Path("out") / marked)) == 0).sum() == 0
    # A higher bar, and none at all, are other work.
    assert statuses(run("--confidence", "marks", "--min-confidence", 2)[1]) == (6, 0, 0)
    assert statuses(run()[1]) == (6, 0, 0)


def test_confidence_by_a_manifest(scene, nearest, run):
    marked = write_confidence(scene)
    rows = [("depth", "guide", "Confidence"), (f"depths/{marked}", "guides/room0/0000.jpg", f"marks/{marked}")]
    rows.append(("depths/room0/0003.png", "guides/room0/0003.jpg", ""))
    Path("list.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    code, records, err = run("--manifest", "list.csv", places=("out",))
    assert code == 0 and statuses(records) == (2, 0, 0), err
    shares = {Path(name).name: record["valid_fraction"] for name, record in records.items()}
    assert shares == {"0000.png": pytest.approx(1 - 4 / 48), "0003.png": 1.0}
    Path("list.jsonl").write_text(json.dumps({"depth": "a.png", "guide": "b.jpg", "confidence": 3}))
    code, records, _ = run("--manifest", "list.jsonl", places=("out",))
    assert code == 4 and "confidence must be a text; got 3" in next(iter(records.values()))["error"]
    code, _, err = run("--manifest", "list.csv", "--confidence", "marks", places=("out",))
    assert code == 2 and "list the maps in a column confidence" in err


def test_what_is_wrong_with_a_confidence_map_is_one_pairs_failure(scene, nearest, run):
    marked = write_confidence(scene)
    (Path("marks") / marked).unlink()
    Image.fromarray(np.zeros((3, 3), np.uint8)).save("marks/room0/0003.png")
    Image.fromarray(np.zeros((6, 8), np.uint8)).save("marks/room0/9999.png")
    code, records, err = run("--confidence", "marks")
    assert code == 3 and statuses(records) == (4, 0, 2)
    assert "must have a confidence map, by stem; there is none" in records[f"out/{marked}"]["error"]
    assert "confidence must have the size of its depth = 8x6; got 3x3" in records["out/room0/0003.png"]["error"]
    assert "marks/room0/9999.png has no depth" in err
    shutil.copy("marks/room0/9999.png", "marks/room0/0003.npy")
    code, records, err = run("--confidence", "marks")
    assert code == 5 and records == {} and "has 2 confidence maps" in err
    code, _, err = run("--confidence", "nowhere")
    assert code == 4 and "--confidence" in err and "nowhere" in err


def test_confidence_maps_may_lie_among_the_depths(scene, nearest, run):
    write_confidence(scene)
    for path in tree(scene / "marks"):
        target = Path("depths", path).with_suffix(".conf.png")
        shutil.copy(Path("marks") / path, target)
    rule = ("--pair-by", "regex", "--pair-regex", r"(\d+)\.[.\w]+$")
    code, records, err = run("--confidence", "depths/**/*.conf.png", *rule)
    assert code == 0 and statuses(records) == (6, 0, 0), err


def write_recording(folder):
    """Three frames as Record3D keeps them, depth and confidence packed, without a header, beside the photo."""
    folder.mkdir()
    for index in range(3):
        depth = np.linspace(0.5 + index, 4, 48, dtype="<f4").reshape(6, 8)
        marks = np.full((6, 8), 2, np.uint8)
        marks[0, :index] = 0
        (folder / f"{index}.depth").write_bytes(imagecodecs.lzfse_encode(depth.tobytes()))
        (folder / f"{index}.conf").write_bytes(imagecodecs.lzfse_encode(marks.tobytes()))
        Image.fromarray(np.full((24, 32, 3), 99, np.uint8)).save(folder / f"{index}.jpg")
    return folder


def test_files_without_a_header(tmp_path, monkeypatch, nearest, run):
    monkeypatch.chdir(tmp_path)
    folder = write_recording(Path("take"))
    (folder / "metadata.json").write_text("{}")
    places = ("take", "take", "out")
    code, records, err = run(places=places)
    assert code == 5 and records == {} and "make no pair" in err
    code, records, err = run("--raw", "8x6", "--confidence", "take", places=places)
    assert code == 0 and statuses(records) == (3, 0, 0), err
    for index in range(3):
        own = folder / f"{index}.depth"
        options = pair.Options(raw=(8, 6), confidence=own.with_suffix(".conf"))
        plan = pair.plan(own, own.with_suffix(".jpg"), "-", options)
        expected = pair.run(plan, pair.read(plan, options), nearest, options).data
        assert Path(f"out/{index}.npy").read_bytes() == expected
        assert records[f"out/{index}.npy"]["valid_fraction"] == pytest.approx(1 - index / 48)
    assert statuses(run("--raw", "8x6", "--confidence", "take", places=places)[1]) == (0, 3, 0)
    # Another size is other work, which here does not fit the photos.
    code, records, _ = run("--raw", "6x8", places=("take/*.depth", "take/*.jpg", "out"))
    assert code == 4 and statuses(records) == (0, 0, 3)


def test_what_is_wrong_with_a_file_without_a_header_is_one_pairs_failure(tmp_path, monkeypatch, nearest, run):
    monkeypatch.chdir(tmp_path)
    folder = write_recording(Path("take"))
    (folder / "1.depth").write_bytes(bytes(31))
    code, records, _ = run("--raw", "8x6", "--format", "tiff", places=("take", "take", "out"))
    assert code == 3 and statuses(records) == (2, 0, 1)
    assert "raw 8x6 must have 1, 2 or 4 bytes per pixel; got 31 bytes" in records["out/1.tif"]["error"]
    code, records, err = run("--raw", "8", places=("take", "take", "out"))
    assert code == 2 and records == {} and "WIDTHxHEIGHT; got '8'" in err
    Path("list.csv").write_text("depth,guide,confidence\ntake/0.depth,take/0.jpg,take/0.conf\n")
    code, records, err = run("--manifest", "list.csv", "--raw", "8x6", places=("listed",))
    assert code == 0 and list(records) == ["listed/take/0.npy"], err


def test_a_torn_journal(scene, nearest, run):
    assert run()[0] == 0
    (journal,) = Path("out/.ddfup").glob("journal.*.jsonl")
    whole = journal.read_bytes()
    lines = [line for line in whole.splitlines() if line]
    assert len(lines) == 6
    for garbage in (
        b'{"out": "room0/0000.png", "ke',
        b"\0\xff\n",
        b"[" * 9999 + b"\n",
        b'{"out": 3, "key": []}\n',
        b"7\n",
    ):
        journal.write_bytes(whole + garbage)
        assert statuses(run()[1]) == (0, 6, 0)
    # Torn in its only line for an output: that is known no more, and so not replaced unasked.
    journal.write_bytes(b"\n".join(lines[:5]) + b"\n" + lines[5][:40])
    assert run()[0] == 6
    assert statuses(run("--overwrite")[1]) == (1, 5, 0)
    assert statuses(run()[1]) == (0, 6, 0)


def test_journal_entries_survive_and_are_seen_by_others(tmp_path):
    (tmp_path / ".ddfup").mkdir()
    first, second = FolderJournal(tmp_path), FolderJournal(tmp_path)
    entry = Entry("ü/\udcff\n.png", "k", sha256="s", preview="../p.jpg", preview_sha256="t", valid_fraction=0.5)
    first.add(entry)
    first.add(Entry("b.png", "k", error="bad", hint="h"))
    assert not second.knows(entry.out)
    second.refresh()
    assert second.made(entry.out, "k") == [entry] and second.made(entry.out, "other") == []
    assert second.knows(entry.out) and not second.knows("b.png")
    assert second.failure("b.png", "k").error == "bad" and second.failure(entry.out, "k") is None
    # A success of the same work takes it back, whichever is read first: on two hosts or a store there is no order.
    first.add(Entry("b.png", "k", sha256="s"))
    first.add(Entry("c.png", "k", sha256="s"))
    first.add(Entry("c.png", "k", error="bad"))
    first.add(Entry("c.png", "other", error="bad"))
    second.refresh()
    assert second.failure("b.png", "k") is None and second.failure("c.png", "k") is None
    assert second.failure("c.png", "other") is not None
    assert second.files() == {entry.out, "../p.jpg", "b.png", "c.png"}
    assert socket.gethostname()[:3] in next((tmp_path / ".ddfup").iterdir()).name


# --- many at once ---


def test_shards_by_option_and_environment(scene, nearest, run, monkeypatch):
    _, first, _ = run("--shard", "0/2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, second, err = run()
    assert code == 0 and "part 1/2 by RANK/WORLD_SIZE" in err
    assert not first.keys() & second.keys() and len(first) + len(second) == 6 and first and second
    monkeypatch.delenv("RANK")
    for name, value in {"ID": "5", "COUNT": "2", "MIN": "3", "STEP": "2"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert run()[1].keys() == second.keys()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "x")
    assert run()[0] == 2
    assert statuses(run("--shard", "0/1")[1]) == (0, 6, 0)


def test_claims_die_with_their_process(tmp_path):
    claims = FolderClaims(tmp_path)
    with claims.alone() as alone:
        assert alone
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        other = FolderClaims(tmp_path)
        os.write(write, b"y" if other.take("a.png") else b"n")
        time.sleep(60)
        os._exit(0)
    assert os.read(read, 1) == b"y"
    assert not claims.take("a.png") and claims.take("b.png")
    with claims.alone() as alone:
        assert not alone
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert claims.take("a.png")
    with claims.alone() as alone:
        assert alone
    claims.close()
    os.close(read)
    os.close(write)


def test_two_processes_share_the_work(tmp_path):
    write_scene(tmp_path, 12)
    meet = tmp_path / "meet"
    meet.mkdir()
    children = [start(tmp_path, "--json", seconds=0.05, meet=meet) for _ in range(2)]
    made = []
    for child in children:
        code, out, err = finish(child)
        assert code == 0, err
        records = [json.loads(line) for line in out.splitlines()]
        assert len(records) == 12
        made.append({record["out"] for record in records if record["status"] == "ok"})
    assert not made[0] & made[1] and len(made[0] | made[1]) == 12
    assert all(made), "one process did all"
    check_whole(tmp_path / "out")


def test_what_another_batch_made_otherwise_meanwhile_is_not_replaced(scene, nearest, run):
    """Two batches with different options would leave a mixture, and both would say that all is done."""
    later = sorted(tree(scene / "depths"))[-1]

    def other_batch():
        nearest.before = lambda: None
        (Path("out") / later).parent.mkdir(parents=True, exist_ok=True)
        (Path("out") / later).write_bytes(b"theirs")
        entry = Entry(later, "of other options", sha256=hashlib.sha256(b"theirs").hexdigest())
        line = json.dumps({"out": entry.out, "key": entry.key, "sha256": entry.sha256})
        Path("out/.ddfup/journal.another-host.jsonl").write_text(line + "\n")

    nearest.before = other_batch
    code, records, err = run("--workers", 1)
    assert code == 3 and statuses(records) == (5, 0, 1), err
    assert "must be made by one batch at a time" in records[f"out/{later}"]["error"]
    assert (Path("out") / later).read_bytes() == b"theirs"
    # When nobody is at work any more, changed options are what they always are.
    assert statuses(run()[1]) == (1, 5, 0)


def test_a_confidence_limit_without_confidence_is_refused(scene, nearest, run):
    code, records, err = run("--min-confidence", 2)
    assert code == 2 and not records
    assert err.startswith("error: --min-confidence must come with --confidence; it is missing")
    # In a file of defaults it waits for the runs that have one.
    Path("defaults.toml").write_text("min-confidence = 2\n")
    assert run("--config", "defaults.toml")[0] == 0


def test_leftovers_of_killed_processes_are_removed(scene, nearest, run):
    assert run()[0] == 0
    # Who writes the young one may be a batch into this folder alone, or `ddfup upsample -o`: it has no claim in out.
    dead, young = Path("out/room0/.ddfup-0123456789abcdef.tmp"), Path("out/room0/.ddfup-fedcba9876543210.tmp")
    other = Path("out/room0/.ddfup-notes.tmp")
    for path in (dead, young, other):
        path.write_bytes(b"x")
    for path in (dead, other):
        os.utime(path, (1, 1))
    assert run()[0] == 0
    assert not dead.exists() and young.exists() and other.exists()


# --- cut short ---


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_pair_under_way_be_written(scene, nearest, run, halted, number, expected):
    def interrupt():
        os.kill(os.getpid(), number)
        assert halted.wait(20)

    nearest.before = interrupt
    code, records, err = run()
    assert code == expected and statuses(records) == (1, 0, 0) and nearest.calls == 1, err
    assert err.startswith("1 written, 0 already done, 0 failed, 5 not reached; ")
    assert [f"out/{name}" for name in tree(scene / "out", hidden=False)] == list(records)
    nearest.before = lambda: None
    assert statuses(run()[1]) == (5, 1, 0)


# Whoever is at work says so, and goes on for two minutes.
STUCK = (
    DRIVER
    + """
import pathlib
def stick():
    print("working", file=sys.stderr, flush=True)
    time.sleep(120)
if os.environ["WHERE"] == "network":
    Nearest.__call__ = lambda *arguments, **options: stick()
else:
    os.fsync = lambda file: stick() if list(pathlib.Path("out").rglob("*.tmp")) else None
original = pool.LocalPool.stop
def stop(self):
    original(self)
    print("stopping", file=sys.stderr, flush=True)
pool.LocalPool.stop = stop
sys.exit(cli.main())
"""
)


@pytest.mark.parametrize("where", ["network", "disk"])
@pytest.mark.parametrize(("second", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_acts_at_once(tmp_path, where, second, expected):
    write_scene(tmp_path, 3)
    child = subprocess.Popen(
        [sys.executable, "-c", STUCK, "batch", "depths", "guides", "out", "--json", "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "WHERE": where},
        cwd=tmp_path,
    )
    with child:
        assert child.stderr.readline() == b"working\n"
        child.send_signal(signal.SIGINT)
        assert child.stderr.readline() == b"stopping\n"
        begin = time.monotonic()
        child.send_signal(second)
        out, err = child.stdout.read(), child.stderr.read()
        assert child.wait(timeout=60) == expected, err
        # Much for a busy machine; little of two minutes.
        assert time.monotonic() - begin < 30
    assert out == b"" and b"Traceback" not in err
    left = [tmp_path / "out" / name for name in tree(tmp_path / "out", hidden=False)]
    assert len(left) == (where == "disk") and all(path.name.endswith(".tmp") for path in left)
    for path in left:
        os.utime(path, (1, 1))
    code, out, err = finish(start(tmp_path, "--json"))
    assert code == 0 and [json.loads(line)["status"] for line in out.splitlines()] == ["ok"] * 3, err
    names = tree(tmp_path / "out", hidden=False)
    assert len(names) == 3 and not any(name.endswith(".tmp") for name in names)


# --- the network's turn ---


def test_the_network_does_not_wait_for_files(scene, nearest, run, monkeypatch):
    # Reading a second pair must begin while the network has the first: it waits for that.
    reading = threading.Semaphore(0)
    original = pair.read

    def read(work, options):
        inputs = original(work, options)
        reading.release()
        return inputs

    monkeypatch.setattr(processing.pair, "read", read)
    waited = []
    nearest.before = lambda: nearest.calls == 1 and waited.extend(reading.acquire(timeout=20) for _ in range(2))
    assert run("--workers", "3")[0] == 0 and waited == [True, True]


@pytest.mark.parametrize(
    ("device", "count", "one_of_many", "expected"),
    [
        ("auto", 0, False, ["auto"]),
        ("auto", 1, False, ["auto"]),
        ("auto", 3, False, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda", 2, False, ["cuda:0", "cuda:1"]),
        ("cuda:1", 2, False, ["cuda:1"]),
        ("cpu", 2, False, ["cpu"]),
        # Under torchrun each process has its own.
        ("auto", 2, True, ["auto"]),
        ("cuda", 2, True, ["cuda"]),
    ],
)
def test_which_devices_get_a_network(device, count, one_of_many, expected):
    assert pool.assign_devices(device, count, one_of_many=one_of_many) == expected


def test_several_gpus_get_a_process_each(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(pool, "ProcessPool", lambda *arguments: asked.append(arguments))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    pool.make_pool("w", "auto", "fp32", "auto")
    assert asked == [("w", ["cuda:0", "cuda:1"], "fp32", "auto")]


def test_several_networks_have_enough_pairs(scene, nearest, run, monkeypatch):
    # Each pair waits, when it is read, until as many are at hand as three networks want.
    write_scene(scene, 12)
    monkeypatch.setattr(engine.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(pool.LocalPool, "size", 3)
    original, lock, enough, entered = pair.read, threading.Lock(), threading.Event(), []

    def read(work, options):
        with lock:
            entered.append(work)
            if len(entered) == 9:
                enough.set()
        assert enough.wait(20), f"only {len(entered)} pairs at once"
        return original(work, options)

    monkeypatch.setattr(processing.pair, "read", read)
    code, records, err = run()
    assert code == 0 and statuses(records) == (12, 0, 0), err


def test_one_process_for_each_device(tmp_path):
    weights = tmp_path / "tiny.safetensors"
    models.save_weights(weights, tiny_pyramid(), architecture="pyramid", name="tiny", description="t")
    from ddfup.inference import Upsampler

    depth, guide = np.linspace(1, 2, 48, dtype=np.float32).reshape(6, 8), np.zeros((24, 32, 3), np.uint8)
    expected = Upsampler(weights, device="cpu")(depth, guide)
    both = pool.ProcessPool(str(weights), ["cpu", "cpu"], "fp32", "auto")
    try:
        assert (both.model_name, both.size) == ("tiny", 2)
        for _ in range(3):
            answer = both.infer(depth, guide, None, False)
            np.testing.assert_allclose(answer.depth, expected, rtol=1e-5)
            assert answer.device == "cpu"
        with pytest.raises(InputError, match="depth is 8x6"):
            both.infer(depth, guide[:3, :4], None, False)
        # As a second signal does it.
        both.abandon()
        for _ in range(2):
            with pytest.raises(DeviceError, match="must not end before the batch; got exit code -15"):
                both.infer(depth, guide, None, False)
        with pytest.raises(DeviceError, match="no process with a network is left"):
            both.infer(depth, guide, None, False)
        both.stop()
        with pytest.raises(pool.Stopped):
            both.infer(depth, guide, None, False)
    finally:
        both.close()


def test_a_network_that_a_process_cannot_load(tmp_path):
    with pytest.raises(WeightsError, match="no such weight file"):
        pool.ProcessPool(str(tmp_path / "none.safetensors"), ["cpu"], "fp32", "auto")


# --- on a screen ---


def test_a_bar_on_the_screen_leaves_data_in_the_pipe(tmp_path):
    write_scene(tmp_path, 4)
    ours, theirs = pty.openpty()
    seen = []

    def watch():
        try:
            while data := os.read(ours, 4096):
                seen.append(data)
        except OSError:
            pass  # the other side hung up

    watcher = threading.Thread(target=watch)
    watcher.start()
    child = start(tmp_path, "--json", stderr=theirs)
    os.close(theirs)
    with child:
        out = child.stdout.read()
    watcher.join()
    os.close(ours)
    assert child.returncode == 0 and len([json.loads(line) for line in out.splitlines()]) == 4
    assert b"4/4" in b"".join(seen) and b"pairs/s" in b"".join(seen)
