"""Two reports against each other: the statistics against scipy, the command, what does not fit together."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from depth_folders import write_folders
from scipy import stats

from ddfup import cli
from ddfup.errors import InputError, PairingError
from ddfup.metrics import METRICS
from ddfup.report import Report, Row, compare
from ddfup.report.compare import student_quantile
from ddfup.report.page import render_comparison

SETTINGS = {"unit": None, "crop_border": 0, "max_depth": None, "thresholds": {}}


def made_up(seed, count=12, shift=0.0):
    rng = np.random.default_rng(seed)
    rows = [
        Row(f"{i:02d}", "p", "t", "ok", None, 8, 8, {name: float(rng.random() + shift) for name in METRICS})
        for i in range(count)
    ]
    return Report("p", "t", "m", SETTINGS, METRICS, rows)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 10, 29, 999])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_student_quantile_is_that_of_scipy(degrees, confidence):
    expected = stats.t.ppf(0.5 + confidence / 2, degrees)
    assert student_quantile(degrees, confidence=confidence) == pytest.approx(expected, rel=1e-9)


def test_differences_are_paired():
    a, b = made_up(1), made_up(2, shift=0.1)
    result = compare(a, b, name_a="a", name_b="b")
    for name, line in result.lines.items():
        one, two = (np.array([row.figures[name] for row in each.rows]) for each in (a, b))
        interval = stats.ttest_rel(two, one).confidence_interval(0.95)
        assert line.difference == pytest.approx(float(np.mean(two - one)))
        assert (line.low, line.high) == pytest.approx((interval.low, interval.high))
        assert (line.mean_a, line.mean_b) == pytest.approx((one.mean(), two.mean()))
        better = two < one if METRICS[name].better == "lower" else two > one
        assert (line.wins, line.losses, line.ties) == (better.sum(), 12 - better.sum(), 0)
        assert line.differences["03"] == two[3] - one[3]


def test_a_verdict_needs_an_interval_without_0():
    a = made_up(1)
    same = compare(a, a, name_a="a", name_b="b")
    assert all(line.better == "" and line.ties == 12 for line in same.lines.values())
    higher = compare(a, made_up(1, shift=0.5), name_a="a", name_b="b")
    assert (higher.lines["rmse"].better, higher.lines["ssim"].better) == ("A", "B")
    lower = compare(made_up(1, shift=0.5), a, name_a="a", name_b="b")
    assert (lower.lines["rmse"].better, lower.lines["ssim"].better) == ("B", "A")
    single = compare(made_up(1, count=1), made_up(2, count=1), name_a="a", name_b="b")
    assert single.lines["rmse"].better == "" and math.isnan(single.lines["rmse"].low)
    assert single.record()["metrics"]["rmse"]["low"] is None


def test_only_what_both_have_counts():
    a, b = made_up(1), made_up(2)
    b = replace(b, rows=[*b.rows[2:], replace(b.rows[0], name="new")])
    b.rows[0].figures["psnr"] = math.inf
    result = compare(a, b, name_a="old", name_b="young")
    assert (len(result.images), result.lines["rmse"].images, result.lines["psnr"].images) == (10, 10, 9)
    assert result.notes == [
        "2 images that only old has are left out",
        "1 images that only young has are left out",
    ]
    other = replace(
        b, metrics={k: v for k, v in METRICS.items() if k != "ssim"}, settings=SETTINGS | {"crop_border": 6}
    )
    result = compare(a, other, name_a="old", name_b="young")
    assert "ssim" not in result.lines
    assert "measures that not both have, with one definition, are left out" in result.notes
    assert "the reports were made with different crop_border: 0 and 6" in result.notes


def test_what_does_not_fit_is_refused():
    a = made_up(1)
    with pytest.raises(PairingError, match="have no image name in common"):
        compare(a, replace(a, rows=[replace(row, name=row.name + "x") for row in a.rows]), name_a="a", name_b="b")
    with pytest.raises(InputError, match="must have one unit; got 'm' and ''"):
        compare(a, replace(a, unit=""), name_a="a", name_b="b")
    with pytest.raises(InputError, match="no measure in common"):
        compare(a, replace(a, metrics={}), name_a="a", name_b="b")


@pytest.fixture
def reports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, noise in (("one", 0.01), ("two", 0.03)):
        write_folders(tmp_path / name, ["a", "b", "c/<b>&"], noise=noise)
        assert cli.main(["report", f"{name}/pred", f"{name}/gt", "-o", f"{name}_report", "-q"]) == 0
    return tmp_path


def test_the_command(reports, capsys):
    before = sorted(reports.rglob("*"))
    assert cli.main(["report", "compare", "one_report", "two_report/metrics.json"]) == 0
    out, err = capsys.readouterr()
    assert sorted(reports.rglob("*")) == before
    row = next(line.split() for line in out.splitlines() if line.startswith("rmse"))
    assert row[-2:] == ["0/0/3", "A"] or row[-1] == "0/0/3"
    assert "A = one_report, B = two_report, 3 images" in err

    assert cli.main(["report", "compare", "one_report", "two_report", "-o", "cmp/x"]) == 0
    assert sorted(path.name for path in (reports / "cmp/x").iterdir()) == [
        "compare.csv",
        "compare.html",
        "compare.json",
    ]
    record = json.loads((reports / "cmp/x/compare.json").read_text())
    assert record["metrics"]["rmse"]["losses"] == 3
    with (reports / "cmp/x/compare.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert float(rows[0]["rmse B-A"]) == record["metrics"]["rmse"]["differences"]["a"]
    page = (reports / "cmp/x/compare.html").read_text()
    assert "c/&lt;b&gt;&amp;" in page and "<b>" not in page

    capsys.readouterr()
    assert cli.main(["report", "compare", "one_report", "two_report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == record
    assert cli.main(["report", "compare", "one_report", "two_report", "-o", "cmp/x"]) == 6
    assert cli.main(["report", "compare", "one_report", "two_report", "-o", "cmp/x", "--overwrite"]) == 0


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": "other", "version": 1}', '{"format": "ddfup-metrics", "version": 1}', "[" * 100_000],
)
def test_other_files_are_refused(reports, capsys, content):
    (reports / "x.json").write_text(content)
    assert cli.main(["report", "compare", "one_report", "x.json"]) == 4
    assert "x.json: must be the metrics.json of a report; got" in capsys.readouterr().err


def test_damaged_reports_are_refused(reports, capsys):
    content = json.loads((reports / "one_report/metrics.json").read_text())
    for path, value in (
        (("images", 0, "metrics"), []),
        (("images", 0, "metrics"), {"rmse": "x"}),
        (("images",), {"a": 1}),
        (("metrics", "rmse", "better"), "x"),
        (("settings",), 3),
    ):
        changed = json.loads(json.dumps(content))
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (reports / "x.json").write_text(json.dumps(changed))
        assert cli.main(["report", "compare", "x.json", "one_report"]) == 4, path
    assert cli.main(["report", "compare", "nowhere", "one_report"]) == 4


def test_a_folder_called_compare_is_a_folder(reports, capsys, tmp_path):
    (reports / "one" / "pred").rename(reports / "compare")
    assert cli.main(["report", "compare", "one/gt"]) == 0
    assert (reports / "compare_report" / "report.html").is_file()


def test_a_difference_too_small_to_show_is_no_loss():
    """What reads as 0.00 must not be marked as worse."""
    a = made_up(1, shift=100)
    rows = [replace(row, figures=row.figures | {"psnr": row.figures["psnr"] - 1e-6}) for row in a.rows]
    result = compare(a, replace(a, rows=rows), name_a="a", name_b="b")
    assert result.lines["psnr"].losses == 12
    page = render_comparison(result).decode()
    body = page[page.index('<table id="table">') :]
    assert body.count('class="poor"') == 0 and body.count(">0.00</td>") >= 12
    rows = [replace(row, figures=row.figures | {"psnr": row.figures["psnr"] - 1}) for row in a.rows]
    page = render_comparison(compare(a, replace(a, rows=rows), name_a="a", name_b="b")).decode()
    assert page[page.index('<table id="table">') :].count('class="poor"') == 12
