"""`ddfup demo`: the bundled scene."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddfup.commands.upsampler import make_upsampler
from ddfup.options import (
    ConfigOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    OverwriteOption,
    PrecisionOption,
    QuietOption,
    TileOption,
    VerboseOption,
)
from ddfup.terminal import Terminal, print_json, print_table


def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for the files.")] = Path("ddfup-demo"),
    model: ModelOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    tile: TileOption = "auto",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Upsample a bundled scene eight-fold and compare with plain interpolation."""
    terminal = ctx.ensure_object(Terminal)
    from ddfup import demo as scene
    from ddfup import writing

    with writing.output_folder(out):
        scene.check_files(out, overwrite=overwrite)
        with terminal.working("loading the model"):
            upsampler = make_upsampler(model, device, precision, tile)
        with terminal.working("upsampling the demo scene"):
            outcome = scene.run(out, upsampler)
    if as_json:
        print_json(
            {
                "out": str(out),
                "files": [str(path) for path in outcome.files],
                "factor": scene.FACTOR,
                "width": outcome.width,
                "height": outcome.height,
                "model": upsampler.model_name,
                "device": upsampler.device,
                "kernels": upsampler.kernels,
                "seconds": outcome.seconds,
                "rmse_mm": outcome.rmse_mm,
            }
        )
        return
    best = outcome.rmse_mm["bicubic"]
    print_table(
        ("method", "RMSE (mm)", "of bicubic"),
        [(name, f"{value:.1f}", f"{value / best:.0%}") for name, value in outcome.rmse_mm.items()],
    )
    terminal.note(
        f"x{scene.FACTOR} to {outcome.width}x{outcome.height} in {outcome.seconds:.2f} s "
        f"on {upsampler.device} ({upsampler.kernels} kernels)"
    )
    terminal.note(f"wrote {', '.join(path.name for path in outcome.files)} to {out}")
