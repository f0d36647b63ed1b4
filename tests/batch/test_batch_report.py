"""`ddfup batch --report`: the page and the table of what became of each pair."""

import csv
import html.parser
import io
import json
import os
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import fsspec
import pytest
from torture.batches import DRIVER, write_pair

from ddfup import cli, models
from ddfup.batch import pool
from ddfup.report import BATCH_FILES, batch_report, is_batch_report

HOSTILE = '=cmd|<script>alert(1)<script> "&'


class Page(html.parser.HTMLParser):
    """What a browser would find: elements with their attributes, text by element."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if data.strip() and not {"script", "style"} & set(self.open):
            self.texts.append(data.strip())

    def addresses(self, tag, name):
        return [attributes[name] for found, attributes in self.elements if found == tag and name in attributes]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    stand_in = {}
    exec(DRIVER.partition("pool.make_pool =")[0], stand_in)
    monkeypatch.setattr(pool, "make_pool", lambda *arguments: pool.LocalPool(stand_in["Nearest"]()))
    known = models.ModelInfo("nearest", "none", Path("none"), 1, "5eed", "", {})
    monkeypatch.setattr(models, "find_model", lambda name: known)
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b/c", f"b/{HOSTILE}"):
        write_pair(tmp_path, name)
    (tmp_path / "guides/b/c.jpg").write_bytes(b"no picture")

    def call(*arguments, places=("depths", "guides", "out")):
        code = cli.main(["batch", *places, "--report", "--json", *arguments])
        captured = capfd.readouterr()
        return code, [json.loads(line) for line in captured.out.splitlines()], captured.err

    return call


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_the_report_says_what_the_records_say(run):
    code, records, err = run("--preview", "look it")
    assert code == 3 and "report: out/batch.html" in err
    text = Path("out/batch.html").read_text("utf-8")
    page = Page(text)
    assert {"Written", "2", "Failed", "1", "3 pairs"} <= {part.rstrip(" ·") for part in page.texts}
    assert "<script>alert" not in text and text.count("<script>") == 1
    assert any(HOSTILE in part for part in page.texts)
    # Pictures are where the page says.
    pictures = page.addresses("img", "src")
    assert len(pictures) == 2 and all((Path("out") / unquote(address)).is_file() for address in pictures)
    assert not [address for address in pictures if "<" in address or '"' in address]
    rows = {row["depth"].removeprefix("'"): row for row in table(Path("out/batch.csv").read_text("utf-8"))}
    assert set(rows) == {record["depth"] for record in records}
    for record in records:
        row = rows[record["depth"]]
        assert row["status"] == record["status"] and row["error"] == (record["error"] or "")
        assert row["width"] == str(record["width"] or "") and (row["seconds"] == "") == (record["seconds"] is None)
    assert list(rows["depths/a.png"]) == list(records[0])


@pytest.mark.skipif(os.name != "posix" or sys.platform == "darwin", reason="names there are Unicode")
def test_names_that_are_no_text_are_in_the_report(run):
    for folder, suffix in (("depths", ".png"), ("guides", ".jpg")):
        Path(folder, f"a{suffix}").rename(Path(folder, os.fsdecode(b"a\xff") + suffix))
    code, _, err = run("--preview", "look")
    assert code == 3 and "internal error" not in err and "report: out/batch.html" in err
    text = Path("out/batch.html").read_text("utf-8")
    assert "a%FF.png.jpg" in text
    assert all(
        (Path("out") / unquote(address, errors="surrogateescape")).is_file()
        for address in Page(text).addresses("img", "src")
    )


def test_a_report_replaces_older_ones_and_nothing_else(run):
    assert run()[0] == 3
    before = Path("out/batch.html").read_bytes()
    code, records, _ = run()
    assert code == 3 and {record["status"] for record in records} == {"skipped", "failed"}
    assert Path("out/batch.html").read_bytes() != before
    assert {row["status"] for row in table(Path("out/batch.csv").read_text("utf-8"))} == {"skipped", "failed"}
    for name in BATCH_FILES:
        Path("out", name).write_bytes(b"mine")
        code, records, err = run()
        assert code == 6 and not records and f"out/{name}: must not exist yet; it is no report of a batch" in err
        assert Path("out", name).read_bytes() == b"mine"
        assert run("--overwrite")[0] == 3 and is_batch_report(name, Path("out", name).read_bytes())


def test_parts_stores_and_dry_runs(run):
    run("-n")
    assert not Path("out").exists()
    for index in range(2):
        run("--shard", f"{index}/2")
    parts = [table(Path(f"out/batch.{index}-of-2.csv").read_text("utf-8")) for index in range(2)]
    assert sorted(len(part) for part in parts) in ([0, 3], [1, 2]) and not Path("out/batch.csv").exists()
    shutil.rmtree("out")
    store = fsspec.filesystem("memory")
    run("--preview", "memory://b/look", places=("depths", "guides", "memory://b/out"))
    page = Page(store.cat_file("/b/out/batch.html").decode())
    assert sorted(page.addresses("img", "src"))[0] == "../look/a.png.jpg"
    store.store.clear()


def test_an_empty_report():
    files = batch_report([], title="out", seconds=0.0, previews={})
    assert all(is_batch_report(name, files[name]) for name in BATCH_FILES)
    assert not table(files["batch.csv"].decode())
