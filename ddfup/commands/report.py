"""`ddfup report`: how good depth is against ground truth, and one such report against another."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddfup.errors import ArgumentError, InputError
from ddfup.options import (
    ConfigOption,
    DebugOption,
    DryRunOption,
    InvalidOption,
    JsonOption,
    MaxPixelsOption,
    OverwriteOption,
    QuietOption,
    UnitOption,
    VerboseOption,
)
from ddfup.terminal import Terminal, one_line, print_json, print_table

if TYPE_CHECKING:
    from ddfup.report import Options, Report, Row

_NAME_COLUMNS = 22
_NAMES_HELP = "Depth to judge: a file, or a folder (searched with all its folders)."
_TRUTH_HELP = "Ground truth: a file, or a folder with the same relative names; the suffixes may differ."
_THIRD_HELP = "Only with `compare`: ddfup report compare A B, two reports' folders or metrics.json."


def _folder_option(name: str, what: str) -> Any:
    return typer.Option(name, metavar="DIR", help=f"{what} with the same relative names.", show_default=False)


def report(
    ctx: typer.Context,
    prediction: Annotated[Path, typer.Argument(metavar="PRED", help=_NAMES_HELP, show_default=False, readable=False)],
    truth: Annotated[Path, typer.Argument(metavar="GT", help=_TRUTH_HELP, show_default=False, readable=False)],
    third: Annotated[Path | None, typer.Argument(metavar="B", help=_THIRD_HELP, show_default=False)] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="OUT_DIR",
            help="Folder of the report. Default: PRED's name + _report, beside it; none with compare.",
            show_default=False,
        ),
    ] = None,
    unit: UnitOption = None,
    gt_unit: Annotated[
        str | None,
        typer.Option("--gt-unit", metavar="UNIT", help="Unit of GT, if not that of PRED.", show_default=False),
    ] = None,
    invalid: InvalidOption = "0,nan,inf",
    guides: Annotated[Path | None, _folder_option("--guides", "Pictures")] = None,
    inputs: Annotated[Path | None, _folder_option("--inputs", "Low-resolution depth")] = None,
    mask: Annotated[Path | None, _folder_option("--mask", "Images, of which pixels other than 0 count,")] = None,
    crop_border: Annotated[
        int, typer.Option("--crop-border", metavar="PX", min=0, help="Pixels to leave out along each side.")
    ] = 0,
    max_depth: Annotated[
        float | None,
        typer.Option("--max-depth", metavar="METRES", help="Leave out what is truly farther.", show_default=False),
    ] = None,
    bad: Annotated[
        str | None,
        typer.Option(
            "--bad",
            metavar="METRES[,METRES]",
            help="Errors above which a pixel is bad. Default: 0.05,0.1 (disparity: 1,3).",
            show_default=False,
        ),
    ] = None,
    bad_relative: Annotated[
        str, typer.Option("--bad-relative", metavar="SHARE[,SHARE]", help="The same, as a share of the true depth.")
    ] = "0.05",
    edge_jump: Annotated[
        float, typer.Option("--edge-jump", metavar="SHARE", help="Jump between neighbours that makes a depth edge.")
    ] = 0.05,
    max_pixels: MaxPixelsOption = 200_000_000,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Measure depth against ground truth and write report.html, metrics.json, metrics.csv.

    `ddfup report compare A B` compares two reports image by image. (A folder called compare is ./compare.)
    """
    terminal = ctx.ensure_object(Terminal)
    if third is not None:
        if str(prediction) != "compare":
            raise ArgumentError(
                f"report takes PRED and GT, or the word compare and two reports; got {prediction} first",
                "example: ddfup report compare run1_report run2_report",
            )
        _compare(terminal, truth, third, out, overwrite=overwrite, dry_run=dry_run, as_json=as_json)
        return

    from ddfup import io
    from ddfup.metrics import Thresholds
    from ddfup.report import Options, check_outputs, find_samples, write_report

    stored = io.parse_unit(unit) if unit else None
    disparity = stored is not None and stored.per_metre is None
    if max_depth is not None and not max_depth > 0:
        raise ArgumentError(f"--max-depth must be above 0; got {max_depth:g}")
    options = Options(
        unit=stored,
        truth_unit=io.parse_unit(gt_unit) if gt_unit else None,
        invalid=io.parse_invalid(invalid),
        crop_border=crop_border,
        max_depth=max_depth,
        thresholds=Thresholds(
            bad=_numbers("--bad", bad or ("1,3" if disparity else "0.05,0.1")),
            bad_relative=_numbers("--bad-relative", bad_relative),
            edge_jump=edge_jump,
            unit="" if disparity else "m",
        ),
        max_pixels=max_pixels,
    )
    folder = out or prediction.absolute().with_name(
        (prediction.absolute().name if prediction.is_dir() else prediction.stem) + "_report"
    )
    found = find_samples(prediction, truth, guides=guides, inputs=inputs, masks=mask, leave_out=folder)
    check_outputs(folder, overwrite=overwrite)
    for note in found.notes:
        terminal.note(f"note: {note}")
    if dry_run:
        for sample in found.samples:
            terminal.note(f"{sample.prediction} - {sample.truth}")
        terminal.note(f"would write {folder}: {len(found.samples)} pairs")
        return
    with terminal.progress(len(found.samples)) as show:
        result = write_report(
            found.samples,
            folder,
            options,
            prediction=str(prediction),
            truth=str(truth),
            overwrite=overwrite,
            progress=_listener(as_json, show),
        )
    _finish(terminal, result, options, folder, as_json=as_json)


def _listener(as_json: bool, show: Callable[[int, str], None]) -> Callable[[Row], None]:
    """Return what is told of each image as it is done."""
    done = 0

    def listen(row: Row) -> None:
        nonlocal done
        done += 1
        show(done, row.name)
        if as_json:
            print_json(row.record())

    return listen


def _finish(terminal: Terminal, result: Report, options: Options, folder: Path, *, as_json: bool) -> None:
    """Say what came out of it, and end with the exit code for it."""
    from ddfup.report.page import styles
    from ddfup.report.results import summarise

    if not result.good:
        more = f" (and {len(result.bad) - 1} other pairs failed)" if len(result.bad) > 1 else ""
        raise InputError(f"{result.bad[0].error}{more}", "nothing was written")
    for row in result.bad:
        terminal.note(f"failed: {row.name}: {row.error}")
    if not as_json:
        written = styles(result)
        rows = []
        for name, entry in summarise(result).items():
            numbers = [written[name].plain(entry[key]) for key in ("mean", "median", "best", "worst")]
            rows.append([name, *numbers, written[name].unit, _shortened(one_line(entry["worst_image"] or ""))])
        print_table(["", "mean", "median", "best", "worst", "", "worst image"], rows)
    count = f"{len(result.good)} of {len(result.rows)} images"
    terminal.note(f"wrote {folder / 'report.html'}: {count}")
    if result.bad:
        raise typer.Exit(3)


def _shortened(name: str) -> str:
    """Cut a long name at its front: the end tells images apart, and the table has 80 columns."""
    return name if len(name) <= _NAME_COLUMNS else "..." + name[3 - _NAME_COLUMNS :]


def _compare(
    terminal: Terminal, a: Path, b: Path, out: Path | None, *, overwrite: bool, dry_run: bool, as_json: bool
) -> None:
    from ddfup.report import check_outputs, compare, read_report, write_comparison
    from ddfup.report.compare import COMPARISON_FILES, labels
    from ddfup.report.page import comparison_styles

    name_a, name_b = labels(a, b)
    result = compare(read_report(a), read_report(b), name_a=name_a, name_b=name_b)
    if out is not None:
        check_outputs(out, COMPARISON_FILES, overwrite=overwrite)
    for note in result.notes:
        terminal.note(f"note: {note}")
    if as_json:
        print_json(result.record())
    else:
        written = comparison_styles(result)
        rows = []
        for name, line in result.lines.items():
            style = written[name]
            ends = f"{style.plain(line.low)} to {style.plain(line.high)}" if math.isfinite(line.low) else "-"
            numbers = [style.plain(value) for value in (line.mean_a, line.mean_b, line.difference)]
            counts = f"{line.wins}/{line.ties}/{line.losses}"
            rows.append([name, *numbers, style.unit, ends, counts, line.better])
        terminal.note(f"A = {name_a}, B = {name_b}, {len(result.images)} images")
        print_table(["", "A", "B", "B-A", "", "95 % interval", "B +/=/-", "better"], rows)
    if out is not None and dry_run:
        terminal.note(f"would write {out / COMPARISON_FILES[0]}")
    elif out is not None:
        write_comparison(result, out)
        terminal.note(f"wrote {out / COMPARISON_FILES[0]}")


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ArgumentError(f"{option} must be numbers with commas between them; got {text!r}") from None
