"""Means, tables, JSON and CSV of made-up records."""

import csv
import io
import json
import math

import pytest

from ddfup.benchmark import results
from ddfup.benchmark.protocols import setup
from ddfup.benchmark.run import Record
from ddfup.metrics import METRICS


def record(image="a", method="bicubic", factor=4.0, degradation="bicubic", **figures):
    values = dict.fromkeys([*METRICS, "hole_rmse", "rim_rmse"], 0.5) | figures
    return Record(image, degradation, factor, method, 0.25, values)


def test_means_are_over_images():
    records = [
        record("a", rmse=1.0, psnr=math.inf),
        record("a", "base", rmse=5.0),
        record("b", rmse=4.0, psnr=30.0),
        record("b", "base", rmse=6.0, edge_rmse=math.nan),
    ]
    first, second = results.means(records)
    assert (first.method, first.images, first.figures["rmse"], first.figures["psnr"]) == ("bicubic", 2, 2.5, 30.0)
    assert (second.method, second.figures["rmse"], second.figures["edge_rmse"]) == ("base", 5.5, 0.5)
    assert first.seconds == 0.25


def test_a_table():
    plan = setup(factors=[4, 16])
    records = [
        record(method=method, factor=factor, rmse=value, delta1=value / 100)
        for method, factor, value in (("bicubic", 4.0, 3.421), ("bicubic", 16.0, 10.5), ("base", 4.0, 1.234))
    ]
    records.append(record(method="base", factor=16.0, rmse=math.nan, delta1=1.0))
    cells = results.means(records)
    (table,) = results.tables(cells, plan, "rmse")
    assert table == (
        "RMSE (cm), bicubic low resolution",
        ["method", "   x4", "  x16"],
        [["bicubic", " 3.42", "10.50"], ["base", " 1.23", "    -"]],
    )
    (table,) = results.tables(cells, plan, "delta1")
    assert table[0] == "δ < 1.25 (%), bicubic low resolution"
    assert table[2] == [["bicubic", "  3.42", " 10.50"], ["base", "  1.23", "100.00"]]


@pytest.mark.parametrize("metric", METRICS)
def test_tables_fit_80_columns(metric):
    factors = [1, 1.5, 2, 3, 4, 6, 7.5, 8, 12, 16, 24, 32, 48, 64]
    plan = setup("robust", degradations=["bicubic", "sensor"], factors=factors)
    records = [
        record(method=method, factor=float(factor), degradation=degradation)
        for degradation in plan.degradations
        for factor in factors
        for method in ("fast-global-smoother", "n" * 100)
    ]
    found = results.tables(results.means(records), plan, metric)
    assert found[0][0].endswith(", bicubic low resolution")
    shown = {"bicubic": [], "sensor": []}
    for title, head, rows in found:
        shown[title.split(", ")[1].split()[0]] += [cell.strip() for cell in head[1:]]
        for row in [head, *rows]:
            widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
            assert len(row) == len(head) and sum(widths) + 2 * (len(widths) - 1) <= 80
        assert len(title) <= 80
    assert shown["bicubic"] == shown["sensor"] == [f"x{factor:g}" for factor in factors]


def test_files_hold_everything():
    plan = setup(factors=[4])
    records = [record("a", psnr=math.inf), record("b", rmse=1.5)]
    content = json.loads(results.to_json(records, plan, {"dataset": "room"}))
    assert (content["dataset"], content["protocol"], content["unit"], content["crop_border"]) == (
        "room",
        "bicubic",
        "cm",
        6,
    )
    assert [image["image"] for image in content["images"]] == ["a", "b"]
    assert content["images"][0]["psnr"] is None and content["images"][1]["rmse"] == 1.5
    assert content["means"][0]["rmse"] == 1.0 and content["means"][0]["images"] == 2
    assert (
        list(content["metrics"]) == [*METRICS, "hole_rmse", "rim_rmse"] and content["metrics"]["rmse"]["unit"] == "cm"
    )
    lines = list(csv.DictReader(io.StringIO(results.images_csv(records, plan).decode())))
    assert [line["image"] for line in lines] == ["a", "b"] and lines[0]["psnr"] == "" and lines[1]["rmse"] == "1.5"
    assert set(METRICS) < set(lines[0])
    (line,) = csv.DictReader(io.StringIO(results.means_csv(records, plan).decode()))
    assert (line["method"], line["factor"], line["images"], line["rmse"]) == ("bicubic", "4", "2", "1.0")


@pytest.mark.parametrize(
    ("name", "cell"),
    [(name, f"'{name}") for name in ("=1+1", "+1", "-1", "@SUM(A1)", " =1", "%x")]
    + [("\t=1", r"\t=1"), ("a=1", "a=1")],
)
def test_no_formulas_in_csv(name, cell):
    lines = list(csv.reader(io.StringIO(results.images_csv([record(name, name)], setup()).decode())))
    assert lines[1][0] == lines[1][3] == cell


def test_names_that_are_no_unicode():
    assert b"\\udcff" in results.images_csv([record("\udcff")], setup())
    assert json.loads(results.to_json([record("\udcff")], setup(), {}))["images"][0]["image"] == "\udcff"


def test_the_page_marks_the_best_and_scales_the_bars():
    plan = setup(factors=[4])
    records = [record("a", rmse=2.0, delta1=0.5), record("a", "base", rmse=1.0, delta1=0.25)]
    tables = {table.metric: table for table in results.page_tables(results.means(records), plan)}
    rmse, delta = (dict(tables[name].rows) for name in ("rmse", "delta1"))
    (worse,), (better,) = rmse["bicubic"], rmse["base"]
    assert (worse.text, worse.share, worse.best) == ("2.00", 1.0, False)
    assert (better.text, better.share, better.best) == ("1.00", 0.5, True)
    # Of shares the larger one is better, and they are shown in per cent.
    (best,), (other,) = delta["bicubic"], delta["base"]
    assert (best.text, best.share, best.best) == ("50.00", 1.0, True) and not other.best
    assert tables["rmse"].unit == "cm" and tables["delta1"].unit == "%" and tables["rmse"].columns == ["x4"]


def test_the_page_leaves_out_what_has_no_number():
    records = [record("a", hole_rmse=math.nan), record("a", "base", hole_rmse=math.nan, psnr=math.nan)]
    tables = {table.metric: table for table in results.page_tables(results.means(records), setup(factors=[4]))}
    assert "hole_rmse" not in tables
    (missing,) = dict(tables["psnr"].rows)["base"]
    assert (missing.text, missing.share, missing.best) == ("-", 0.0, False)
