"""Which files make a pair: every rule, what is not clear, places, and manifests that try to break out."""

import csv
import json
import os
from decimal import Decimal
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddfup.batch.engine import select_shard
from ddfup.batch.manifest import check_name, read_manifest
from ddfup.batch.pairing import Pair, output_name, pair_files, parse_rule, time_of
from ddfup.batch.places import Found, find_files
from ddfup.errors import ArgumentError, InputError, OutputError


def found(place, *names):
    return [Found(Path(place) / name, name) for name in names]


def pairs_of(depths, guides, rule="stem", regex=None, **options):
    result = pair_files(found("d", *depths), found("g", *guides), parse_rule(rule, regex), **options)
    return {pair.depth.as_posix(): pair.guide.as_posix() for pair in result.pairs}, result


# --- stems ---


def test_stems_pair_by_the_whole_relative_path_and_never_by_order():
    depths = ["b.png", "a/1.npy", "a/2.png", "1305031102.17.png"]
    guides = ["a/2.jpg", "1305031102.17.webp", "2.jpg", "b.png", "a/1.jpeg"]
    pairs, result = pairs_of(depths, guides)
    assert pairs == {
        "d/b.png": "g/b.png",
        "d/a/1.npy": "g/a/1.jpeg",
        "d/a/2.png": "g/a/2.jpg",
        "d/1305031102.17.png": "g/1305031102.17.webp",
    }
    assert [pair.name for pair in result.pairs] == depths
    assert result.orphans == ["g/2.jpg has no depth"] and not result.conflicts


def test_a_missing_file_shifts_nothing():
    pairs, result = pairs_of(["1.png", "3.png"], ["1.jpg", "2.jpg", "3.jpg"])
    assert pairs == {"d/1.png": "g/1.jpg", "d/3.png": "g/3.jpg"}
    pairs, result = pairs_of(["1.png", "2.png", "3.png"], ["1.jpg", "3.jpg"])
    assert pairs == {"d/1.png": "g/1.jpg", "d/3.png": "g/3.jpg"}
    assert result.orphans == ["d/2.png has no guide"]


def test_two_guides_of_one_stem_are_a_conflict_only_if_a_depth_wants_them():
    _, result = pairs_of(["a.png", "b.png"], ["a.jpg", "a.png", "b.jpg"])
    assert result.conflicts == ["d/a.png has 2 guides: g/a.jpg, g/a.png"]
    pairs, result = pairs_of(["b.png"], ["a.jpg", "a.png", "b.jpg"])
    assert pairs == {"d/b.png": "g/b.jpg"} and not result.conflicts


def test_two_depths_to_one_output_are_a_conflict():
    pairs, result = pairs_of(["a.png", "a.npy"], ["a.jpg"])
    assert len(pairs) == 2 and not result.conflicts
    _, result = pairs_of(["a.png", "a.npy"], ["a.jpg"], format_name="tiff")
    assert result.conflicts == ["d/a.png, d/a.npy would all become a.tif"]


def test_one_folder_for_both():
    files = found("x", "a.png", "a.jpg", "b.png")
    result = pair_files([files[0], files[2]], files, parse_rule("stem", None))
    assert [(p.depth.name, p.guide.name) for p in result.pairs] == [("a.png", "a.jpg")]


@pytest.mark.parametrize(
    ("name", "format_name", "expected"),
    [
        ("a/b.png", None, "a/b.png"),
        ("a/b.PNG", "png", "a/b.PNG"),
        ("b.tiff", "tiff", "b.tiff"),
        ("b.1.npy", "png", "b.1.png"),
        ("b.png", "tiff", "b.tif"),
    ],
)
def test_output_names(name, format_name, expected):
    assert output_name(name, format_name) == expected


# --- keys ---


@pytest.mark.parametrize(("rule", "regex"), [("stem", None), ("regex", r"(\w+)\.\w+$")])
def test_letters_with_marks_pair_in_either_form(rule, regex):
    """As Linux and macOS write them."""
    pairs, _ = pairs_of(["caf\u00e9.png"], ["cafe\u0301.jpg"], rule, regex)
    assert len(pairs) == 1


def test_regex_keys():
    depths = ["s1/depth/f001.png", "s2/depth/f001.png", "s1/depth/other.png"]
    guides = ["s1/rgb/001.jpg", "s2/rgb/001.jpg", "s2/rgb/002.jpg"]
    pairs, result = pairs_of(depths, guides, "regex", r"(?P<scene>\w+)/\w+/f?(?P<frame>\d+)")
    assert pairs == {"d/s1/depth/f001.png": "g/s1/rgb/001.jpg", "d/s2/depth/f001.png": "g/s2/rgb/001.jpg"}
    assert set(result.orphans) == {"d/s1/depth/other.png has no guide", "g/s2/rgb/002.jpg has no depth"}
    # The first group alone does not tell the scenes apart.
    _, result = pairs_of(depths[:2], guides[:2], "regex", r"(\d+)\.")
    assert len(result.conflicts) == 2
    pairs, _ = pairs_of(["img_depth_7.png"], ["img_color_7.jpg"], "regex", r"\d+")
    assert len(pairs) == 1


@pytest.mark.parametrize(
    ("rule", "regex"),
    [
        *(("regex", None), ("stem", "a"), ("regex", "("), ("time", None), ("time:x", None), ("time:-1", None)),
        *(("time:nan", None), ("time:inf", None), ("index", None), ("", None), ("stem:1", None)),
    ],
)
def test_wrong_rules(rule, regex):
    with pytest.raises(ArgumentError, match="--pair-"):
        parse_rule(rule, regex)


# --- times ---


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("1305031102.175304.png", "1305031102.175304"),
        ("41069021_3603.337.png", "3603.337"),
        ("frame_12_0.5s.png", "0.5"),
        ("1305031102175.png", "1305031102.175"),
        ("cam0/1305031102175304123.jpg", "1305031102.175304123"),
        ("000123.png", "123"),
        ("a.png", None),
    ],
)
def test_times_in_names(name, seconds):
    assert time_of(name) == (None if seconds is None else Decimal(seconds))


def test_nearest_times():
    depths = ["1.00.png", "1.10.png", "1.20.png", "5.00.png", "x.png"]
    guides = ["1.011.jpg", "1.09.jpg", "1.26.jpg", "1.3.jpg"]
    pairs, result = pairs_of(depths, guides, "time:0.06")
    assert pairs == {"d/1.00.png": "g/1.011.jpg", "d/1.10.png": "g/1.09.jpg", "d/1.20.png": "g/1.26.jpg"}
    assert {"d/5.00.png has no guide", "d/x.png has no guide", "g/1.3.jpg has no depth"} == set(result.orphans)
    assert pairs_of(depths, guides, "time:0.059")[0].keys() == {"d/1.00.png", "d/1.10.png"}


def test_a_guide_serves_its_nearest_depth_only():
    pairs, result = pairs_of(["1.00.png", "1.02.png"], ["1.005.jpg", "1.05.jpg"], "time:1")
    # 1.02 is nearer to 1.005 than to 1.05, but 1.00 is nearer still: it goes without, not with a wrong one.
    assert pairs == {"d/1.00.png": "g/1.005.jpg"} and "d/1.02.png has no guide" in result.orphans


@pytest.mark.parametrize(
    ("depths", "guides"),
    [
        (["1.0.png"], ["0.9.jpg", "1.1.jpg"]),
        (["0.9.png", "1.1.png"], ["1.0.jpg"]),
        (["1.0.png"], ["1.0.jpg", "1.00.png"]),
    ],
)
def test_equal_times_are_a_conflict(depths, guides):
    _, result = pairs_of(depths, guides, "time:1")
    assert len(result.conflicts) == 1 and "1.0" in result.conflicts[0]


def test_times_are_compared_within_a_folder_or_a_key():
    pairs, _ = pairs_of(["a/1.0.png", "b/1.0.png"], ["a/1.01.jpg", "b/1.02.jpg", "c/1.0.jpg"], "time:1")
    assert pairs == {"d/a/1.0.png": "g/a/1.01.jpg", "d/b/1.0.png": "g/b/1.02.jpg"}
    pairs, _ = pairs_of(["s1/d/1.0.png", "s2/d/1.0.png"], ["s1/c/1.01.jpg", "s2/c/1.02.jpg"], "time:1", r"^(\w+)/")
    assert pairs == {"d/s1/d/1.0.png": "g/s1/c/1.01.jpg", "d/s2/d/1.0.png": "g/s2/c/1.02.jpg"}


TIMES = st.lists(st.integers(0, 60), max_size=8)


@given(depths=TIMES, guides=TIMES, tolerance=st.integers(0, 20))
def test_times_against_every_combination(depths, guides, tolerance):
    # The oracle: each one is the other's only nearest, within the tolerance.
    d = [f"{index}_{time / 10:.1f}.png" for index, time in enumerate(depths)]
    g = [f"{index}_{time / 10:.1f}.jpg" for index, time in enumerate(guides)]
    pairs, result = pairs_of(d, g, f"time:{tolerance / 10}")

    def nearest(time, others):
        least = min((abs(time - other) for other in others), default=99)
        return [i for i, other in enumerate(others) if abs(time - other) == least] if least <= tolerance else []

    wishes = {i: nearest(time, guides) for i, time in enumerate(depths)}
    expected, clear = {}, all(len(wish) <= 1 for wish in wishes.values())
    for j, time in enumerate(guides):
        suitors = [i for i, wish in wishes.items() if wish == [j]]
        best = min((abs(depths[i] - time) for i in suitors), default=0)
        best_ones = [i for i in suitors if abs(depths[i] - time) == best]
        clear &= len(best_ones) <= 1
        if len(best_ones) == 1:
            expected[f"d/{d[best_ones[0]]}"] = f"g/{g[j]}"
    assert pairs == expected
    assert (not result.conflicts) == clear


# --- places ---


@pytest.fixture
def scene(tmp_path, monkeypatch):
    for name in ("a/1.png", "a/2.PNG", "a/b/3.npy", "a/note.txt", ".hidden/4.png", "a/.5.png", "z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(place, suffixes=(".png", ".npy")):
    return [file.name for file in find_files(str(place), suffixes, what="DEPTHS").files]


def test_folders_and_globs(scene):
    assert names(".") == ["a/1.png", "a/2.PNG", "a/b/3.npy", "z.png"]
    assert find_files(".", [".png", ".npy"], what="DEPTHS").ignored == 1
    assert names("a/1.png") == ["1.png"]
    assert names("a/*.png") == ["1.png"]
    assert names("**/*.npy") == ["a/b/3.npy"]
    assert names(scene / "a" / "*") == ["1.png", "2.PNG", "note.txt"]
    assert names("none/*") == []
    with pytest.raises(InputError, match="DEPTHS must be a folder, a file or a glob; there is no 'none'"):
        names("none")


def test_links_in_circles_end(scene):
    (scene / "a" / "loop").symlink_to(scene)
    (scene / "a" / "self").symlink_to("self")
    (scene / "linked").symlink_to(scene / "a" / "b")
    expected = ["a/1.png", "a/2.PNG", "a/b/3.npy", "linked/3.npy", "z.png"]
    assert names(".") == expected
    assert names("**/*.npy") == ["a/b/3.npy", "linked/3.npy"]


# --- manifests ---


def write_manifest(path, rows, columns=("depth", "guide", "out")):
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerows([columns, *rows])
    else:
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=False))) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_manifest(tmp_path, kind):
    rows = [
        ("x/a, b.png", "g.jpg", "one/a.png"),
        ("/abs/ü.npy", "../g.jpg", "./two//b.npy"),
        ("x/c.png", "g.jpg", ""),
        ("../d.png", "g.jpg", ""),
    ]
    result = read_manifest(write_manifest(tmp_path / f"m.{kind}", rows))
    assert not result.conflicts and all(pair.problem is None for pair in result.pairs)
    assert [pair.name for pair in result.pairs] == ["one/a.png", "two/b.npy", "x/c.png", "d.png"]
    assert [pair.depth for pair in result.pairs] == [
        *(tmp_path / "x/a, b.png", Path("/abs/ü.npy"), tmp_path / "x/c.png", tmp_path / "../d.png")
    ]
    assert result.pairs[1].guide == tmp_path / "../g.jpg"
    collision = read_manifest(
        write_manifest(tmp_path / f"n.{kind}", [("a.png", "g", "o.png"), ("b.png", "g", "./o.png")])
    )
    assert len(collision.conflicts) == 1 and "would all become o.png" in collision.conflicts[0]


BAD_OUTS = ["/tmp/x.png", "../x.png", "a/../../x.png", "a/../b.png", ".ddfup/x.png", "x.exe", "x", "..", "a\0.png"]


@pytest.mark.parametrize("out", BAD_OUTS)
def test_a_bad_row_fails_alone(tmp_path, out):
    path = write_manifest(tmp_path / "m.jsonl", [("a.png", "a.jpg", out), ("b.png", "b.jpg", "b.png")])
    first, second = read_manifest(path).pairs
    assert isinstance(first.problem, OutputError) and first.problem.message.startswith(f"{path}:1: out must")
    assert second == Pair("b.png", tmp_path / "b.png", tmp_path / "b.jpg")


def test_rows_that_are_none(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"depth": "a.png"}\n[1]\nnot json\n\n{"depth": 3, "guide": "g"}\n' + "[" * 100_000 + "\n"
        '{"depth": "\\ud800.png", "guide": "g"}\n{"depth": "a.png", "guide": "g\\u0000"}\n'
    )
    problems = [pair.problem for pair in read_manifest(path).pairs]
    assert len(problems) == 7 and all(isinstance(problem, InputError) for problem in problems)
    assert [problem.message.split(": ")[0] for problem in problems] == [f"{path}:{n}" for n in (1, 2, 3, 5, 6, 7, 8)]
    path = tmp_path / "m.csv"
    path.write_text("Depth, GUIDE\na.png\na.png,b,c,d\n\na.png,b\n")
    assert [pair.problem is None for pair in read_manifest(path).pairs] == [False, False, True]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("m.txt", b""),
        ("m.csv", b"a,b\n1,2\n"),
        ("m.csv", b""),
        ("m.csv", b"depth,guide\n\xff,b\n"),
        ("m.csv", b'depth,guide\n"a' + b"x" * 200_000),
        ("missing.csv", None),
    ],
)
def test_files_that_are_no_manifest(tmp_path, name, data):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ArgumentError, match="--manifest"):
        read_manifest(tmp_path / name)


def test_other_separators_than_commas_are_named(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("depth;guide;out\na.png;b.jpg;c.png\n")
    with pytest.raises(ArgumentError, match="got depth;guide;out") as caught:
        read_manifest(path)
    assert caught.value.hint == "separate the columns by commas"


PARTS = st.sampled_from(["..", ".", "", "a", "b.png", "/", "~", ".ddfup", "c:", "\\", "a\nb", "é", "\0", "-x.npy"])


@given(st.one_of(st.text(max_size=30), st.lists(PARTS, max_size=6).map("/".join)))
def test_accepted_outs_lie_below_the_folder(text):
    try:
        check_name(text)
    except OutputError:
        return
    path = os.path.normpath(f"/some/where/{text}")
    assert not text.startswith("/") and path.startswith("/some/where/") and "\0" not in text
    assert PurePosixPath(path).parts[3] != ".ddfup"


# --- shards ---


def test_shards_are_parts_and_do_not_depend_on_the_rest():
    pairs = [Pair(f"room/{index}.png", Path("d"), Path("g")) for index in range(200)]
    parts = [select_shard(pairs, index, 4) for index in range(4)]
    assert sorted(p.name for part in parts for p in part) == sorted(p.name for p in pairs)
    assert all(len(part) > 25 for part in parts)
    assert select_shard(pairs[::2], 1, 4) == [pair for pair in pairs[::2] if pair in parts[1]]
    # By `printf room/7.png | sha256sum`: machines of one array must agree.
    assert [index for index in range(4) for p in parts[index] if p.name == "room/7.png"] == [2]
