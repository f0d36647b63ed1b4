"""`ddfup benchmark`: networks and classical methods on a data set with true depth."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddfup.commands.upsampler import make_upsampler
from ddfup.errors import ArgumentError
from ddfup.options import (
    ConfigOption,
    DebugOption,
    DeviceOption,
    InvalidOption,
    JsonOption,
    MaxPixelsOption,
    OverwriteOption,
    PrecisionOption,
    QuietOption,
    TileOption,
    UnitOption,
    VerboseOption,
)
from ddfup.terminal import Terminal, print_table, reported, say

if TYPE_CHECKING:
    from ddfup.benchmark.protocols import Setup
    from ddfup.benchmark.results import Mean
    from ddfup.inference import Upsampler

_FILES = ("benchmark.html", "benchmark.json", "images.csv", "means.csv")


def benchmark(
    ctx: typer.Context,
    dataset: Annotated[
        Path,
        typer.Argument(metavar="DATASET", help="Folder with rgb/ and depth/ of equal stems.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="DIR",
            help="Folder for benchmark.html, benchmark.json, images.csv and means.csv. Default: no files.",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            metavar="point|bicubic|robust|holes|custom",
            help="What is degraded how and which pixels count. Default: bicubic; custom with --degradation or "
            "--crop-border.",
            show_default=False,
        ),
    ] = None,
    factor: Annotated[
        list[str] | None,
        typer.Option(
            "--factor",
            metavar="N",
            help="High-resolution over low-resolution length; repeatable. Default: as the protocol says.",
            show_default=False,
        ),
    ] = None,
    degradation: Annotated[
        list[str] | None,
        typer.Option(
            "--degradation",
            metavar="NAME",
            help="How depth is made low: nearest, bilinear, bicubic, area, sensor, holes; repeatable.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="NAME|PATH",
            help="Model, weight file, nearest, bilinear, bicubic, inpainting, guided-filter, "
            "joint-bilateral or fast-global-smoother; repeatable. Default: all.",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="Measure to show: rmse, mae, delta1, edge_rmse, hole_rmse ...; repeatable. Default: rmse; "
            "files hold all.",
            show_default=False,
        ),
    ] = None,
    crop_border: Annotated[
        int | None,
        typer.Option(
            "--crop-border",
            metavar="PX",
            min=0,
            help="Pixels along each side that do not count. Default: as the protocol says.",
            show_default=False,
        ),
    ] = None,
    first: Annotated[int, typer.Option("--first", min=0, help="First image, in sorted order from 0.")] = 0,
    last: Annotated[
        int | None, typer.Option("--last", min=0, help="Last image. Default: the last there is.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Take so many images, spread evenly. Default: all.", show_default=False),
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    tile: TileOption = "auto",
    unit: UnitOption = None,
    invalid: InvalidOption = "0,nan,inf",
    overwrite: OverwriteOption = False,
    max_pixels: MaxPixelsOption = 200_000_000,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Compare methods: degrade true depth, upsample it again, measure the errors."""
    terminal = ctx.ensure_object(Terminal)
    record: dict[str, Any] = {"dataset": str(dataset), "out": None if out is None else str(out), "status": "failed"}
    record |= {"error": None}
    with reported(record, as_json), contextlib.ExitStack() as stack:
        import ddfup
        from ddfup import io, writing
        from ddfup.benchmark import protocols, results, run
        from ddfup.benchmark.baselines import BASELINES
        from ddfup.benchmark.measures import describe_measures
        from ddfup.models import list_models

        meaning = io.parse_unit(unit) if unit else None
        setup = protocols.setup(
            protocol,
            disparity=meaning is not None and meaning.per_metre is None,
            degradations=_parts(degradation),
            factors=_factors(factor),
            border=crop_border,
        )
        known = describe_measures(setup.thresholds)
        shown = _parts(metric) or ["rmse"]
        for name in shown:
            if name not in known:
                raise ArgumentError(f"--metric must be one of {', '.join(known)}; got {name!r}")
        chosen = _parts(method)
        models = [info.name for info in list_models()]
        for name in chosen:
            if name not in (*BASELINES, *models) and not (Path(name).suffix or Path(name).exists()):
                raise ArgumentError(
                    f"--method must be a weight file or one of {', '.join((*BASELINES, *models))}; got {name!r}"
                )
        pairs = run.find_pairs(dataset, first=first, last=last, limit=limit)
        files = []
        if out is not None:
            stack.enter_context(writing.output_folder(out))
            files = _check_files(out, overwrite)
        run.check(pairs, setup, unit=meaning, max_pixels=max_pixels)
        with terminal.working("loading the models"):
            methods, networks = run.make_methods(
                chosen or [*BASELINES, *models],
                lambda name: make_upsampler(name, device, precision, tile),
            )
        total = len(pairs) * len(setup.degradations) * len(setup.factors) * len(methods)
        records = []
        with terminal.progress(total) as step:
            for entry in run.run(
                pairs,
                setup,
                methods,
                unit=meaning,
                invalid=io.parse_invalid(invalid),
                max_pixels=max_pixels,
            ):
                records.append(entry)
                step(len(records), f"{entry.image}: {entry.method} x{entry.factor:g}")
        cells = results.means(records)
        record |= results.summary(cells, setup)
        if files:
            details = {
                "ddfup": ddfup.__version__,
                "dataset": str(dataset),
                "networks": [
                    {"name": n.model_name, "sha256": n.weights_sha256, "device": n.device, "kernels": n.kernels}
                    for n in networks
                ],
            }
            contents = (
                _page(dataset, setup, cells, networks, len(pairs)),
                results.to_json(records, setup, details),
                results.images_csv(records, setup),
                results.means_csv(records, setup),
            )
            writing.write_files(dict(zip(files, contents, strict=True)))
        record["status"] = "ok"
        if not as_json:
            for number, (title, head, rows) in enumerate(
                table for name in shown for table in results.tables(cells, setup, name)
            ):
                say(("\n" if number else "") + title)
                print_table(head, rows)
        border = f", border of {setup.border} px not counted" if setup.border else ""
        terminal.note(f"mean over {len(pairs)} images, protocol {setup.protocol}{border}")
        for path in files:
            terminal.note(f"wrote {path}")


def _page(dataset: Path, setup: Setup, cells: Sequence[Mean], networks: Sequence[Upsampler], images: int) -> bytes:
    import ddfup
    from ddfup.benchmark import results
    from ddfup.benchmark.protocols import PROTOCOLS
    from ddfup.report.page import render_benchmark

    border = f"{setup.border} pixels along each side" if setup.border else "none"
    facts = [
        ("Protocol", f"{setup.protocol}: {PROTOCOLS[setup.protocol].description}"),
        ("Images", str(images)),
        ("Unit of depth errors", {"levels": "levels of the stored disparity"}.get(setup.unit, setup.unit)),
        ("Border that does not count", border),
        *((f"Network {n.model_name}", f"weights {n.weights_sha256[:16]}, on {n.device}") for n in networks),
        ("ddfup", ddfup.__version__),
    ]
    degradations = ", ".join(setup.degradations)
    return render_benchmark(
        dataset=dataset.resolve().name,
        lead=f"{images} image{'' if images == 1 else 's'}, low resolution made by: {degradations}",
        tables=results.page_tables(cells, setup),
        facts=facts,
    )


def _parts(values: list[str] | None) -> list[str]:
    """Take repeated options and lists with commas (a config file's) alike."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def _factors(values: list[str] | None) -> list[float]:
    factors = []
    for part in _parts(values):
        try:
            factors.append(float(part.removeprefix("x")))
        except ValueError:
            raise ArgumentError(
                f"--factor must be a number; got {part!r}", "example: --factor 4 --factor 7.5"
            ) from None
    return factors


def _check_files(folder: Path, overwrite: bool) -> list[Path]:
    """List the files to write; refuse, before any work, what could not be written."""
    from ddfup import writing

    files = [folder / name for name in _FILES]
    for path in files:
        writing.check_writable(path)
        writing.refuse_existing(path, overwrite=overwrite)
    return files
