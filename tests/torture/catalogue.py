"""How a case of bad input is tried, and what is promised of every one: code, message, nothing left over."""

import contextlib
import io as stdio
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from depth_files import exr, npy, npz, pfm
from PIL import Image

from torture import disks
from torture.stand_in import call, nearest

UPSAMPLE = ("upsample", "depth.png", "guide.jpg")
LOW, HIGH = (6, 8), (24, 32)


@dataclass(frozen=True)
class Case:
    """One way in which things are bad.

    Attributes:
        group: Heading in the catalogue.
        name: What is bad.
        code: Exit code that is promised; 0: it is not bad after all.
        message: Part of the error line.
        names: File or argument that the error line names.
        prepare: Changes a folder with a good depth.png and guide.jpg.
        arguments: Command line.
        around: Context in which the command runs, made for the folder.
        made: Outputs that there are afterwards, and nothing else.
        network: Whether the real network is needed.
        has_record: Whether there is a pair to print a JSON object for.
    """

    group: str
    name: str
    code: int
    message: str = ""
    names: str = ""
    prepare: Callable[[Path], Any] = lambda folder: None
    arguments: tuple[str, ...] = UPSAMPLE
    around: Callable[[Path], Any] = lambda folder: contextlib.nullcontext()
    made: tuple[str, ...] = ()
    network: bool = False
    has_record: bool = True

    @property
    def is_pair(self):
        """Whether a pair of files alone is what is bad."""
        files = self.group in ("decode", "bombs", "type", "values", "size") and len(self.arguments) == 3
        return files and self.around is Case.around


# --- good files, and what can be done to them ---

METRES = np.linspace(1, 5, 48, dtype=np.float32).reshape(LOW)
MILLIMETRES = (METRES * 1000).astype(np.uint16)
PICTURE = np.random.default_rng(0).integers(0, 255, (*HIGH, 3), dtype=np.uint8)


def pillow(picture, kind, **options):
    buffer = stdio.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(array, **options):
    buffer = stdio.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


DEPTHS = {
    "png": pillow(MILLIMETRES, "PNG"),
    "tif": tiff(METRES, compression="zlib"),
    "exr": exr({"Z": METRES}),
    "pfm": pfm(METRES),
    "npy": npy(METRES),
    "npz": npz(depth=METRES),
}
GUIDES = {
    "jpg": pillow(PICTURE, "JPEG", quality=90),
    "png": pillow(PICTURE, "PNG"),
    "webp": pillow(PICTURE, "WEBP", lossless=True),
    "tif": pillow(PICTURE, "TIFF", compression="tiff_adobe_deflate"),
    "exr": exr({"RGB": (PICTURE / 255).astype(np.float32)}),
}


def lay(folder):
    """Put a good pair into a folder."""
    (folder / "depth.png").write_bytes(DEPTHS["png"])
    (folder / "guide.jpg").write_bytes(GUIDES["jpg"])


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        case: The case.
        code: Exit code.
        lines: Error and hint lines.
        faults: What is not as promised; empty: all is well.
        skipped: Why it could not be tried here.
    """

    case: Case
    code: int | None
    lines: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    skipped: str = ""


def try_case(case, folder, ways=(False, True)):
    """Run a case in an empty folder, plainly and with --json (``ways``), and say what is not as promised."""
    faults, said, code = [], (), None
    for number, extra in enumerate(((), ("--json",))):
        home = folder / str(number)
        home.mkdir(parents=True)
        lay(home)
        try:
            case.prepare(home)
            before = _tree(home)
            with contextlib.nullcontext() if case.network else nearest(), case.around(home):
                result = (
                    call(home, case.arguments[0], *extra, *case.arguments[1:])
                    if case.group != "usage" or not extra
                    else None
                )
                if result is None:
                    continue
        except disks.Unavailable as reason:
            return Verdict(case, None, skipped=str(reason))
        after = _tree(home)
        faults += _judge(case, result, before, after, as_json=bool(extra))
        if not extra:
            code, said = (
                result.code,
                tuple(line for line in result.err.splitlines() if line.startswith(("error", "hint"))),
            )
    return Verdict(case, code, said, tuple(dict.fromkeys(faults)))


def _tree(folder):
    """Content of every file, without opening pipes, devices or what may not be read."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if ".ddfup" in name.split("/"):
            continue
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = zlib.crc32(path.read_bytes())
    return found


def _judge(case, result, before, after, *, as_json):
    kind = "with --json: " if as_json else ""
    if result.code != case.code:
        yield f"{kind}exit code {result.code}, not {case.code}"
    made = set(after) - set(before)
    if any(after.get(name) != content for name, content in before.items()):
        yield f"{kind}an input or older file was changed"
    if made != set(case.made):
        yield f"{kind}there is {sorted(made)}, not {sorted(case.made)}"
    lines = result.err.splitlines()
    if stray := [line for line in lines if not line.startswith(("error: ", "hint: ", "note: ", "wrote ", "0 ", "1 "))]:
        yield f"{kind}stray line on stderr: {stray[0]!r}"
    if as_json:
        try:
            records = result.records
        except ValueError:
            yield f"stdout is not JSON: {result.out[:80]!r}"
            return
        if len(records) != case.has_record:
            yield f"{len(records)} JSON records, not {int(case.has_record)}"
        if not records:
            return
        wanted = "failed" if case.code else "ok"
        if records[0]["status"] != wanted or bool(records[0]["error"]) != bool(case.code):
            yield f"JSON says {records[0]['status']}, {records[0]['error']}"
    elif result.out:
        yield f"stdout is not empty: {result.out[:80]!r}"
    if not case.code:
        return
    errors = result.lines("error")
    if len(errors) != 1:
        yield f"{kind}{len(errors)} error lines"
        return
    for part in (case.message, case.names):
        if part.encode("unicode_escape").decode() not in errors[0] and part not in errors[0]:
            yield f"{kind}the error does not say {part!r}: {errors[0]}"
    if "internal error" in result.err or "Traceback" in result.err:
        yield f"{kind}an internal error"
    # A batch keeps its lines short; there the remedy comes with -v.
    if not result.lines("hint") and not (case.arguments[0] == "batch" and case.code in (3, 4)):
        yield f"{kind}no remedy: {errors[0]}"
