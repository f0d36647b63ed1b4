"""Files made to harm: P7 no crash, hang or blow-up, P8 no code from data."""

import os
import shutil

import numpy as np

from torture import catalogue
from torture.stand_in import call, nearest
from torture.table import Line, verdict


def p7(counts, folder):
    """No crash, hang or blow-up on hostile files."""
    from torture.fuzz import fuzz, has_atheris

    short = counts.inputs < 2000
    targets = {"targets": _quick_targets()} if short else {}
    result = fuzz(counts.inputs, keep=folder / "found", seed=counts.seed, guided_share=0 if short else 0.1, **targets)
    kinds = ", ".join(f"{count} {engine}" for engine, count in result.inputs.items())
    figure = f"{len(result.findings)} deaths, hangs or blow-ups; "
    figure += f"longest {result.slowest:.2f} s, most {result.largest / 1e6:.0f} MB"
    faults = [f"{finding.target}: {finding.what[-300:]} ({finding.file})" for finding in result.findings]
    note = "" if has_atheris() or short else " (atheris is not installed)"
    yield verdict("P7", f"{result.total} inputs: {kinds}{note}; {result.refused} refused", figure, faults)


def _quick_targets():
    from torture.fuzz import TARGETS

    return tuple(target for target in TARGETS if target not in ("weights", "metrics"))


# --- P8: no code from data ---


class _Bomb:
    """Leaves a trace if it is unpickled."""

    def __init__(self, trace):
        self._trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self._trace),)


def p8(counts, folder):
    """No code from data."""
    import pickle

    from depth_files import npy, zipped

    trace = folder / "fired"
    payload = pickle.dumps(_Bomb(trace))
    objects = npy(np.array([[_Bomb(trace)]], dtype=object), allow_pickle=True)
    files = {
        **{
            f"p{index}{suffix}": payload
            for index, suffix in enumerate((".npy", ".npz", ".png", ".tif", ".exr", ".pfm"))
        },
        "objects.npy": objects,
        "objects.npz": zipped({"depth.npy": objects}),
        "bare.npz": zipped({"depth.npy": payload}),
        "note.npz": zipped({"depth.npy": npy(np.ones((6, 8), np.float32)), "ddfup:model.npy": objects}),
        "w.safetensors": payload,
        "w.pt": payload,
        "w.ckpt": zipped({"archive/data.pkl": payload, "archive/version": b"3"}),
        "conf.npy": objects,
    }
    catalogue.lay(folder)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    commands = [("upsample", name, "guide.jpg", "-o", "r.npy", "--overwrite") for name in files]
    commands += [("upsample", "depth.png", name, "-o", "r.npy", "--overwrite") for name in files]
    commands += [("info", name) for name in files]
    commands += [(*catalogue.UPSAMPLE, "--confidence", "conf.npy", "--overwrite"), ("batch", ".", ".", "out")]
    commands += [("report", name, name, "-o", "rep", "--overwrite") for name in files]
    real = [
        (*catalogue.UPSAMPLE, "--overwrite", "--device", "cpu", "--model", name)
        for name in files
        if name.startswith("w.")
    ]
    faults = []
    for command in commands:
        with nearest():
            result = call(folder, *command)
        if trace.exists() or "internal error" in result.err:
            faults.append(f"{' '.join(command)}: {result.err}")
            shutil.rmtree(trace, ignore_errors=True)
    for command in real:
        if call(folder, *command).code != 7 or trace.exists():
            faults.append(" ".join(command))
    # The canary can sing at all.
    pickle.loads(payload)
    if not trace.exists():
        faults.append("the canary is dead")
    tried = len(commands) + len(real)
    yield Line(
        "P8",
        f"pickle canaries in {len(files)} files through {tried} commands",
        f"{len(faults)} fired",
        not faults,
        faults,
    )
    yield from _injections(folder / "report")


_HOSTILE = ('"><script>alert(1)<', "'onmouseover='x", "{{ 7*7 }}", "=cmd|' -C calc'!A0", "@SUM(1)", "+1", "-1", "a\nb")


def _injections(folder):
    """File names that would be code in a page or a table."""
    import csv
    import html.parser

    for name in _HOSTILE:
        for side in ("pred", "gt"):
            path = folder / side / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.linspace(1, 2, 600, dtype=np.float32).reshape(20, 30))
    result = call(folder, "report", "pred", "gt", "-o", "out")
    faults = [] if result.code == 0 else [result.err]
    page = (folder / "out/report.html").read_text("utf-8")

    class Tags(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            scripts.extend([tag] * (tag == "script"))
            faults.extend(f"{tag} {name}" for name, _ in attributes if name.startswith("on"))

    scripts = []
    Tags().feed(page)
    if len(scripts) != 1:
        faults.append(f"{len(scripts)} scripts in the page")
    with (folder / "out/metrics.csv").open(newline="") as stream:
        for row in csv.reader(stream):
            faults += [f"cell {cell!r}" for cell in row if cell.lstrip()[:1] in tuple("=@") or cell in ("+1", "-1")]
    yield Line(
        "P8",
        f"{len(_HOSTILE)} file names as code in report.html and metrics.csv",
        f"{len(faults)} fired",
        not faults,
        faults,
    )
