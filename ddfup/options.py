"""Options that mean the same in every command, and the TOML file they may come from."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ddfup.errors import ArgumentError

# Below this no bundled network can work in tiles: they overlap by more. What larger ones need depends on network and
# ratio, and shows when they are known.
LEAST_TILE = 48


def _set_terminal(ctx: typer.Context, param: typer.CallbackParam, value: bool) -> bool:
    setattr(ctx.obj, str(param.name), value)
    return value


def _load_config(ctx: typer.Context, value: Path | None) -> Path | None:
    """Make the TOML file's values the defaults of this command's options."""
    if value is not None:
        ctx.default_map = _read_config(ctx, value)
    return value


def _read_config(ctx: typer.Context, path: Path) -> dict[str, Any]:
    """Read option values: keys before any table hold for every command, a table for its command."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ArgumentError(
            f"--config: {path} must be a readable TOML file; got {reason}",
            'example of its lines: model = "base" and, under [upsample], tile = 1024',
        ) from error
    group: Any = ctx.parent.command if ctx.parent else None
    # Name without its dashes -> name of the function's argument.
    options: dict[str, dict[str, str]] = {
        name: {
            option.opts[-1].removeprefix("--"): option.name
            for option in command.params
            if option.param_type_name == "option" and option.name not in ("config", "help")
        }
        for name, command in group.commands.items()
    }
    tables = {name: content.pop(name) for name in options if isinstance(content.get(name), dict)}
    for name, values in {"": content, **tables}.items():
        known = set(options[name]) if name else set().union(*options.values())
        for key in values:
            if key not in known:
                raise ArgumentError(
                    f"--config: {path}: {key!r} must be an option" + (f" of {name}" if name else ""),
                    f"options: {', '.join(sorted(known))}",
                )
    mine = options[str(ctx.info_name)]
    chosen = {**content, **tables.get(str(ctx.info_name), {})}
    repeatable = {option.name for option in ctx.command.params if getattr(option, "multiple", False)}
    values = {mine[key]: value for key, value in chosen.items() if key in mine}
    for argument, value in values.items():
        parts = [str(part) for part in value] if isinstance(value, list) else [str(value)]
        if argument in repeatable:
            values[argument] = parts
        elif isinstance(value, list):
            values[argument] = ",".join(parts)
    return values


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", value):
        raise ArgumentError(
            f"--device must be auto, cpu, cuda or cuda:NUMBER; got {value!r}", "leave it out to let ddfup choose"
        )
    return value


def _check_tile(value: str) -> str:
    if not re.fullmatch(r"auto|none|[1-9][0-9]{0,6}", value):
        raise ArgumentError(f"--tile must be auto, none or a number of pixels; got {value!r}", "try --tile 1024")
    if value.isdigit() and int(value) < LEAST_TILE:
        raise ArgumentError(f"--tile must be at least {LEAST_TILE} pixels; got {value}", "try --tile 1024")
    return value


def read_size(name: str, text: str) -> tuple[int, int]:
    """Read (width, height) of an option's text such as ``640x480``."""
    sides = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text.strip().lower())
    if sides is None:
        raise ArgumentError(f"{name} must be WIDTHxHEIGHT; got {text!r}", f"example: {name} 640x480")
    return int(sides[1]), int(sides[2])


def one_of(ctx: typer.Context, **flags: bool) -> tuple[bool, ...]:
    """Refuse two flags that contradict each other; one on the command line beats one in a config file."""
    if sum(flags.values()) > 1:
        sources = {name: getattr(ctx.get_parameter_source(name), "name", "") for name in flags}
        flags = {name: sources[name] == "COMMANDLINE" for name in flags}
        if sum(flags.values()) != 1:
            names = " and ".join("--" + name.replace("_", "-") for name in flags)
            raise ArgumentError(f"{names} must not be given together", "choose one")
    return tuple(flags.values())


def refuse_alone(ctx: typer.Context, option: str, needed: str, present: object) -> None:
    """Refuse an option on the command line that says nothing without another; in a config file it may wait for it."""
    source = getattr(ctx.get_parameter_source(option), "name", "")
    if source == "COMMANDLINE" and not present:
        name = "--" + option.replace("_", "-")
        raise ArgumentError(f"{name} must come with {needed}; it is missing", f"add {needed}, or leave {name} out")


Precision = Literal["auto", "fp32", "bf16", "fp16"]
DepthFormat = Literal["png", "tiff", "exr", "pfm", "pgm", "npy", "npz"]

# Paths are not checked for being readable here: the readers do, with a message and an exit code of their own.
DepthArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DEPTH",
        help="Low-resolution depth: png, tif, exr, pfm, pgm, npy, npz.",
        show_default=False,
        readable=False,
    ),
]
GuideArgument = Annotated[
    Path,
    typer.Argument(
        metavar="GUIDE",
        help="Picture of the same view: JPEG, PNG, TIFF, WebP, EXR.",
        show_default=False,
        readable=False,
    ),
]
OutOption = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--out",
        metavar="OUT",
        help="Output; - = stdout. Default: DEPTH's name + _up, beside it.",
        show_default=False,
    ),
]
RawOption = Annotated[
    str | None,
    typer.Option(
        "--raw",
        metavar="WIDTHxHEIGHT[:TYPE]",
        help="Depth and confidence files of unknown suffix have no header but this size; TYPE of depth u16, f16, f32.",
        show_default=False,
    ),
]
FillOption = Annotated[bool, typer.Option("--fill", help="Give depth where DEPTH has none, too.")]
PreviewOption = Annotated[
    Path | None,
    typer.Option(
        "--preview",
        metavar="FILE",
        help="Also write a picture (.png, .jpg): guide, input, result.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME|PATH", help="Model; see `ddfup models`.", show_default=False),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", metavar="auto|cpu|cuda[:i]", callback=_check_device, help="Where to compute."),
]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="Number type of the network.")]
TileOption = Annotated[
    str,
    typer.Option(
        "--tile",
        metavar="auto|none|PIXELS",
        callback=_check_tile,
        help="Side of the tiles that bound memory.",
    ),
]
UnitOption = Annotated[
    str | None,
    typer.Option(
        "--unit",
        metavar="mm|m|disparity|N|PRESET",
        help="Meaning of stored depth: a unit, units per metre, or tum, kitti, vkitti, scannet, arkit, "
        "realsense, sunrgbd, nyu-raw. Default: integer files mm, float files m.",
        show_default=False,
    ),
]
InvalidOption = Annotated[
    str, typer.Option("--invalid", metavar="VALUE[,VALUE]", help='Stored values that mean "no measurement".')
]
FormatOption = Annotated[
    DepthFormat | None,
    typer.Option("--format", help="Output format. Default: by OUT's suffix, else DEPTH's own.", show_default=False),
]
MinConfidenceOption = Annotated[
    int, typer.Option("--min-confidence", min=0, max=2, help="With --confidence: less is no measurement.")
]
MaxPixelsOption = Annotated[int, typer.Option("--max-pixels", min=1, help="Refuse larger images, by their headers.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")]
SkipOption = Annotated[bool, typer.Option("--skip-existing", help="Do nothing if the output exists.")]
DryRunOption = Annotated[bool, typer.Option("-n", "--dry-run", help="Check everything, write nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", callback=_set_terminal, help="Errors only.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", callback=_set_terminal, help="More details.")]
DebugOption = Annotated[bool, typer.Option("--debug", callback=_set_terminal, help="Show tracebacks with errors.")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        callback=_load_config,
        is_eager=True,
        help="Options from a file; flags win.",
        show_default=False,
        readable=False,
    ),
]
