"""Batches whose files lie behind URLs: fsspec's memory store in this process, and S3 where a server can be had."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from networks import tiny_pyramid
from stand_ins import s3_server
from torture.batches import tree, write_scene

from ddfup import cli, models
from ddfup.batch import pool, remote
from ddfup.batch.journal import Entry, StoreJournal, open_journal
from ddfup.batch.outputs import open_outputs
from ddfup.batch.pairing import Pair
from ddfup.batch.places import find_files
from ddfup.batch.remote import RemotePath, local_copies, parse_location
from ddfup.errors import ArgumentError, InputError, OutputError

PLACES = ("memory://in/depths", "memory://in/guides", "memory://results/run")


@pytest.fixture
def store():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.fixture
def scene(tmp_path, monkeypatch, store):
    """Six pairs, in a folder and in the store; a network that is ready at once."""
    from torture.batches import DRIVER

    stand_in: dict = {}
    # Its last lines, which put it in the place of the network, are undone after the test.
    exec(DRIVER.partition("pool.make_pool =")[0], stand_in)
    monkeypatch.setattr(pool, "make_pool", lambda *arguments: pool.LocalPool(stand_in["Nearest"]()))
    known = models.ModelInfo("nearest", "none", Path("none"), 1, "5eed", "", {})
    monkeypatch.setattr(models, "find_model", lambda name: known)
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(name, raising=False)
    write_scene(tmp_path, 6)
    for folder in ("depths", "guides"):
        for path in (tmp_path / folder).rglob("*.*"):
            store.pipe_file(f"/in/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capfd):
    def call(*arguments, places=PLACES):
        code = cli.main(["batch", *map(str, (*places, *arguments)), "--json"])
        captured = capfd.readouterr()
        records = [json.loads(line) for line in captured.out.splitlines()]
        return code, {record["out"]: record for record in records}, captured.err

    return call


def statuses(records):
    return tuple(sum(r["status"] == status for r in records.values()) for status in ("ok", "skipped", "failed"))


def results(store, below="/results/run/"):
    """Content of the outputs in the store, by name; the batch's own state left out."""
    found = {path.removeprefix(below): store.cat_file(path) for path in store.find(below)}
    return {name: data for name, data in found.items() if not name.startswith(".ddfup")}


def test_a_batch_on_a_store_gives_what_one_in_a_folder_gives(scene, run, store):
    assert run(places=("depths", "guides", "out"))[0] == 0
    local = {name: (scene / "out" / name).read_bytes() for name in tree(scene / "out", hidden=False)}
    inputs = {path: store.cat_file(path) for path in store.find("/in")}
    code, records, err = run()
    assert code == 0 and statuses(records) == (6, 0, 0), err
    assert results(store) == local and len(local) == 6
    assert {path: store.cat_file(path) for path in store.find("/in")} == inputs
    record = records["memory://results/run/room0/0000.png"]
    assert record["depth"] == "memory://in/depths/room0/0000.png" and record["width"] == 32
    # Each pair's entry is an object; at the end they are one.
    (journal,) = store.find("/results/run/.ddfup")
    assert len(store.cat_file(journal).splitlines()) == 6
    assert statuses(run()[1]) == (0, 6, 0)


def test_a_second_run_does_what_is_missing_or_changed(scene, run, store):
    assert run()[0] == 0
    before = results(store)
    store.rm_file("/results/run/room0/0000.png")
    store.pipe_file("/results/run/room1/0001.npy", b"altered")
    store.pipe_file("/in/guides/room2/0002.jpg", store.cat_file("/in/guides/room0/0003.jpg"))
    assert statuses(run()[1]) == (3, 3, 0)
    assert {name: data for name, data in results(store).items() if "0002" not in name} == {
        name: data for name, data in before.items() if "0002" not in name
    }
    assert statuses(run("--unit", "tum")[1]) == (6, 0, 0)
    store.rm_file("/results/run/room0/0000.png")
    before = store.find("/results")
    assert statuses(run("-n", "--unit", "tum")[1]) == (1, 5, 0)
    assert store.find("/results") == before


@pytest.mark.parametrize("arguments", [(), ("-n",)])
def test_the_journal_is_not_listed_for_every_pair(scene, run, monkeypatch, arguments):
    original, calls = StoreJournal.refresh, []

    def refresh(self):
        calls.append(self)
        original(self)

    monkeypatch.setattr(StoreJournal, "refresh", refresh)
    assert statuses(run(*arguments)[1]) == (6, 0, 0)
    # Once when it is opened, once to see what is in the way of the outputs.
    assert len(calls) == 2


@pytest.mark.parametrize("place", ["memory://results/run", "out"])
def test_what_another_batch_has_just_made_is_not_in_the_way(tmp_path, store, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    root, pair = parse_location(place), Pair("a.png", Path("d.png"), Path("g.jpg"))
    # As in a dry run, which looks at the journal only at its beginning.
    outputs = open_outputs(root, None, open_journal(root), overwrite=False)
    other = open_journal(root)
    theirs = open_outputs(root, None, other, overwrite=False)
    claims = theirs.open([pair])
    theirs.write(pair, {theirs.out(pair): b"x"}, Entry("a.png", "k", sha256="s"))
    claims.close()
    outputs.check(pair)
    (root / "b.png").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"b\.png: must not exist yet; it does"):
        outputs.check(Pair("b.png", Path("d.png"), Path("g.jpg")))


def test_places_globs_and_manifests(scene, run, store):
    code, records, _ = run(places=("memory://in/depths/*/*.png", "memory://in/guides/**/*.jpg", "out"))
    assert code == 0 and set(records) == {"out/room0/0000.png", "out/room0/0003.png"}
    store.pipe_file("/in/depths/.hidden/0009.png", b"x")
    store.pipe_file("/in/depths/notes.txt", b"x")
    place = find_files("memory://in/depths", {".png"}, what="DEPTHS")
    assert [found.name for found in place.files] == ["room0/0000.png", "room0/0003.png"] and place.ignored == 5
    assert find_files("memory://in/depths/room0/0000.png", {".png"}, what="DEPTHS").files[0].name == "0000.png"
    assert (
        find_files(f"file://{scene}/depths", {".png"}, what="DEPTHS").files[0].path == scene / "depths/room0/0000.png"
    )
    with pytest.raises(InputError, match="there are none in 'memory://none'"):
        find_files("memory://none", {".png"}, what="DEPTHS")
    rows = [
        {"depth": "memory://in/depths/room0/0000.png", "guide": "guides/room0/0000.jpg", "out": "a.png"},
        {"depth": "depths/room0/0003.png", "guide": "memory://in/guides/room0/0003.jpg"},
    ]
    Path("list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, records, err = run("--manifest", "list.jsonl", places=("memory://other",))
    assert code == 0 and set(records) == {"memory://other/a.png", "memory://other/depths/room0/0003.png"}, err


def test_what_is_not_ours_is_not_replaced(scene, run, store):
    store.pipe_file("/results/run/room0/0000.png", b"precious")
    code, records, err = run()
    assert code == 6 and not records
    assert "error: memory://results/run/room0/0000.png: must not exist yet unless from an earlier batch" in err
    assert statuses(run("--skip-existing")[1]) == (5, 1, 0)
    assert store.cat_file("/results/run/room0/0000.png") == b"precious"
    assert statuses(run("--overwrite")[1]) == (1, 5, 0)
    code, _, err = run(places=(*PLACES[:2], PLACES[0]))
    assert code == 6 and "an output must not replace an input" in err


def test_the_place_of_the_depths_may_be_that_of_the_results(scene, run, store):
    for name in ("room1/0001.npy", "room1/0004.npy"):
        store.rm_file(f"/in/depths/{name}")
    for expected in ((4, 0, 0), (0, 4, 0)):
        code, records, err = run("--format", "npy", places=(*PLACES[:2], PLACES[0]))
        assert code == 0 and statuses(records) == expected, err


def test_messages_name_the_url_and_nothing_is_left(scene, run, store, monkeypatch):
    temporary = scene / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    store.pipe_file("/in/depths/room0/0000.png", b"no depth at all")
    good = store.cat_file("/in/depths/room0/0003.png")
    store.pipe_file("/in/depths/room0/0003.png", good[: len(good) // 2])
    code, records, err = run()
    assert code == 3 and statuses(records) == (4, 0, 2)
    for name in ("0000", "0003"):
        error = records[f"memory://results/run/room0/{name}.png"]["error"]
        assert error.startswith(f"memory://in/depths/room0/{name}.png: ") and str(temporary) not in err
    # The same words when the journal is all that is asked.
    again = run()[1]
    assert {out: r["error"] for out, r in again.items()} == {out: r["error"] for out, r in records.items()}
    assert not list(temporary.iterdir())


def test_a_store_that_fails_for_one_file(scene, run, store, monkeypatch):
    original = type(store).get_file

    def get_file(self, path, *arguments, **options):
        if path.endswith("room2/0002.jpg"):
            raise PermissionError("Access Denied")
        return original(self, path, *arguments, **options)

    monkeypatch.setattr(type(store), "get_file", get_file)
    code, records, _ = run()
    assert code == 3 and statuses(records) == (5, 0, 1)
    assert "0002.jpg: must be readable; got Access Denied" in records["memory://results/run/room2/0002.tif"]["error"]
    monkeypatch.undo()


def test_previews_on_a_store(scene, run, store):
    code, _, err = run("--preview", "memory://results/look")
    assert code == 0, err
    looks = results(store, "/results/look/")
    assert len(looks) == 6 and all(data.startswith(b"\xff\xd8") for data in looks.values())
    store.rm_file("/results/look/room0/0000.png.jpg")
    assert statuses(run("--preview", "memory://results/look")[1]) == (1, 5, 0)
    assert results(store, "/results/look/") == looks
    code, _, err = run("--preview", "look")
    assert code == 2 and "--preview must be on the same store as OUT_DIR" in err


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ((*PLACES[:2], "http://example.org/out"), "OUT_DIR must be a folder or on an object store"),
        (("nostore://a", "memory://in/guides", "out"), "nostore://a: must be a URL that fsspec can open"),
        ((*PLACES[:2], "az://bucket/out"), "az://bucket/out/.ddfup: must be a URL that fsspec can open"),
    ],
)
def test_stores_that_cannot_be_used(scene, run, places, message):
    code, records, err = run(places=places)
    assert code == 2 and not records and message in err


def test_urls():
    assert parse_location("file:///a/b.png") == Path("/a/b.png")
    assert parse_location("a:b/c.png") == Path("a:b/c.png")
    place = parse_location("s3://bucket/a%20b/c.PNG/")
    assert place == RemotePath("s3://bucket/a%20b/c.PNG")
    assert (place.protocol, place.name, place.suffix, str(place / "d")) == ("s3", "c.PNG", ".PNG", f"{place}/d")


def test_the_journal_loses_nothing_while_it_is_merged(store, monkeypatch):
    root = RemotePath("memory://j")
    first = open_journal(root)
    assert isinstance(first, StoreJournal)
    entries = [Entry(f"{index}.png", "k", sha256=str(index)) for index in range(4)]
    for entry in entries:
        first.add(entry)
    store.pipe_file("/j/.ddfup/journal.part-torn.jsonl", b'{"out": "x')
    # Killed after the whole was written, before the parts were removed.
    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "unlink", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            first.merge()
    assert len(store.find("/j/.ddfup")) == 6
    first.merge()
    second = open_journal(root)
    assert [second.made(entry.out, "k")[0] for entry in entries] == entries
    assert len(store.find("/j/.ddfup")) == 2
    # One that is merged by another between listing and reading is found in what it became.
    first.add(Entry("late.png", "k", sha256="l"))
    first.add(Entry("later.png", "k", sha256="m"))
    original, calls = remote.RemotePath.read_bytes, []

    def read_bytes(self):
        if not calls and self.name.startswith("journal.part-"):
            calls.append(self)
            first.merge()
        return original(self)

    monkeypatch.setattr(RemotePath, "read_bytes", read_bytes)
    second.refresh()
    assert calls and second.made("late.png", "k") and second.made("later.png", "k")


def test_errors_of_a_store():
    place = RemotePath("memory://none/such.png")
    with pytest.raises(InputError, match=r"memory://none/such.png: must exist; there is no such file"):
        place.read_bytes()
    with pytest.raises(InputError, match="must exist"), local_copies(place, Path("x")):
        pass
    with pytest.raises(OutputError, match=r"memory://: must be writable \(1 bytes\); got"):
        RemotePath("memory://").write_bytes(b"x")
    with pytest.raises(ArgumentError, match="must be a URL"):
        _ = RemotePath("nostore://a").system


# --- S3 itself ---


@pytest.fixture
def s3():
    """An S3 server on this machine; the variables by which clients find it."""
    with s3_server() as variables:
        yield variables


def test_s3(tmp_path, s3):
    write_scene(tmp_path, 6)
    weights = tmp_path / "tiny.safetensors"
    models.save_weights(weights, tiny_pyramid(), architecture="pyramid", name="tiny", description="t")
    environment = {**os.environ, **s3, "OMP_NUM_THREADS": "1"}
    upload = (
        "import fsspec; s = fsspec.filesystem('s3'); s.mkdir('data');"
        "[s.put(f'{name}/', f'data/{name}/', recursive=True) for name in ('depths', 'guides')]"
    )
    subprocess.run([sys.executable, "-c", upload], cwd=tmp_path, env=environment, check=True, timeout=120)
    common = ["--model", str(weights), "--device", "cpu", "--json"]

    def batch(*places):
        command = [sys.executable, "-m", "ddfup", "batch", *places, *common]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return [json.loads(line)["status"] for line in done.stdout.splitlines()]

    stores = ("s3://data/depths", "s3://data/guides", "s3://data/results")
    assert batch("depths", "guides", "out") == ["ok"] * 6
    assert batch(*stores) == ["ok"] * 6
    assert batch(*stores) == ["skipped"] * 6
    download = "import fsspec; fsspec.filesystem('s3').get('data/results/', 'back/', recursive=True)"
    subprocess.run([sys.executable, "-c", download], cwd=tmp_path, env=environment, check=True, timeout=120)
    shutil.rmtree(tmp_path / "back" / ".ddfup")
    assert tree(tmp_path / "back") == tree(tmp_path / "out", hidden=False)
