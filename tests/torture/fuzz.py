"""Every reader fed with spoilt files, in processes of their own that may take neither 5 seconds nor 1.5 GB.

A process writes each input to a file before it is read: whatever kills it, the input is there.
"""

import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SECONDS, BYTES = 5.0, 1_500_000_000
# Share of inputs: weights and settings take much longer than pictures.
TARGETS = {
    **dict.fromkeys((f"depth {kind}" for kind in ("png", "tiff", "exr", "pfm", "npy", "npz", "raw")), 1.0),
    **dict.fromkeys((f"guide {kind}" for kind in ("jpg", "png", "tif", "webp", "exr")), 1.0),
    **dict.fromkeys(("manifest csv", "manifest jsonl", "camera", "journal"), 0.8),
    **dict.fromkeys(("config", "weights", "metrics"), 0.2),
}
_PROGRESS = struct.Struct("<qqdqq")


@dataclass
class Finding:
    """One input that did what none may.

    Attributes:
        target: The reader.
        what: What happened.
        file: The input.
    """

    target: str
    what: str
    file: str


@dataclass
class Fuzzed:
    """What came of it.

    Attributes:
        inputs: Number of inputs, by engine.
        refused: How many of them were refused with an error of ours.
        findings: Those that did what none may.
        slowest: Longest CPU time of one, seconds.
        largest: Largest growth of the address space by one, bytes.
    """

    inputs: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    findings: list[Finding] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0

    @property
    def total(self):
        """Number of inputs of all engines."""
        return sum(self.inputs.values())


# --- the readers ---


def _reader(target, folder):
    """Return where a target's input goes, how it is read, and the valid files."""
    from ddfup import io
    from torture import mutations

    kind = target.split()[-1]
    if target.startswith("depth"):
        suffix = {"raw": "depth"}.get(kind, kind)
        path = folder / f"d.{suffix}"

        def read_depth():
            io.read_depth(path, unit=io.UNITS["mm"], raw=(30, 20))
            if kind != "raw":
                io.read_notes(path)

        return path, read_depth, mutations.depth_seeds()[suffix]
    if target.startswith("guide"):
        path = folder / f"g.{kind}"
        return path, lambda: io.read_guide(path), mutations.guide_seeds()[kind]
    if target.startswith("manifest"):
        from ddfup.batch.manifest import read_manifest

        path = folder / f"list.{kind}"
        return path, lambda: read_manifest(path), mutations.text_seeds()[kind]
    if target == "camera":
        from ddfup.pointcloud import read_camera

        path = folder / "camera.json"
        return path, lambda: read_camera(path, 36, 24), mutations.text_seeds()["camera"]
    if target == "journal":
        from ddfup.batch.journal import open_journal

        (folder / ".ddfup").mkdir(exist_ok=True)
        return (
            folder / ".ddfup/journal.x.jsonl",
            lambda: open_journal(folder).refresh(),
            mutations.text_seeds()["journal"],
        )
    if target == "config":
        return _config_reader(folder)
    if target == "metrics":
        return _metrics_reader(folder)
    from ddfup import models

    path = folder / "w.safetensors"
    return path, lambda: models.load_model(path), [mutations.weights_seed(folder)]


def _config_reader(folder):
    from torture import mutations
    from torture.catalogue import UPSAMPLE, lay
    from torture.stand_in import call, nearest

    lay(folder)
    path = folder / "c.toml"

    def read():
        with nearest():
            result = call(folder, *UPSAMPLE, "-n", "--config", "c.toml")
        if result.code not in (0, 2, 4, 6) or (result.code and len(result.lines("error")) != 1):
            raise AssertionError(f"exit code {result.code}: {result.err}")

    return path, read, mutations.text_seeds()["toml"]


def _metrics_reader(folder):
    import numpy as np

    from ddfup import cli
    from ddfup.report import read_report

    for name in ("a", "b"):
        (folder / name).mkdir(exist_ok=True)
        np.save(folder / name / "x.npy", np.linspace(1, 2, 600, dtype=np.float32).reshape(20, 30))
    out = folder / "seed"
    if not out.exists():
        assert cli.main(["report", str(folder / "a"), str(folder / "b"), "-o", str(out), "-q", "--json"]) == 0
    path = folder / "r" / "metrics.json"
    path.parent.mkdir(exist_ok=True)
    return path, lambda: read_report(path.parent), [(out / "metrics.json").read_bytes()]


# --- inside the process ---


def work(folder, jobs):
    """Do jobs (target, engine, first input, number of inputs); progress and findings go to files."""
    from ddfup.errors import DDFUpError

    folder = Path(folder)
    progress = os.open(folder / "progress", os.O_RDWR | os.O_CREAT)
    state = _State(folder, progress)
    for number, (target, engine, first, count) in enumerate(jobs):
        home = folder / target.replace(" ", "-")
        home.mkdir(exist_ok=True)
        path, read, seeds = _reader(target, home)
        for seed in seeds:
            # What is valid must be read: else nothing here would mean anything.
            path.write_bytes(seed)
            read()
        state.limit()
        state.target, state.job = target, number

        def one(data, index, path=path, read=read):
            state.begin(index)
            path.write_bytes(data)
            state.arm()
            try:
                read()
            except DDFUpError:
                state.refused += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                state.found(path, "".join(traceback.format_exception(error)[-3:]).strip())
            state.end(path)

        _ENGINES[engine](target, seeds, first, count, one)
    state.save(done=True)


class _State:
    def __init__(self, folder, progress):
        self._folder, self._progress = folder, progress
        self.target, self.job, self.index = "", 0, 0
        self.refused = 0
        self.slowest, self.largest = 0.0, 0

    def limit(self):
        """From here on no input may take much more than the others."""
        self._base = _address_space("VmSize")
        self._peak = max(self._base, _address_space("VmPeak"))
        most = 2 * (self._base + BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def begin(self, index):
        self.index = index
        self.save()

    def save(self, done=False):
        data = _PROGRESS.pack(-1 if done else self.job, self.index, self.slowest, self.largest, self.refused)
        os.pwrite(self._progress, data, 0)

    def arm(self):
        # The system ends the process, wherever it hangs: CPU time, so that a busy machine does not matter; and, much
        # later, time on the clock, for what waits for nothing.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 20 * SECONDS)
        self._began = time.process_time()

    def end(self, path):
        self.slowest = max(self.slowest, time.process_time() - self._began)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        peak = _address_space("VmPeak")
        if peak > self._peak:
            self.largest = max(self.largest, peak - self._base)
            if peak - self._base > BYTES:
                self.found(path, f"took {(peak - self._base) / 1e9:.2f} GB")
            self._peak = peak

    def found(self, path, what):
        kept = self._folder / "findings" / f"{time.monotonic_ns()}{path.suffix}"
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(path, kept)
        with (self._folder / "findings.jsonl").open("a") as stream:
            stream.write(json.dumps({"target": self.target, "what": what, "file": str(kept)}) + "\n")


def _address_space(name):
    with Path("/proc/self/status").open("rb") as stream:
        text = stream.read()
    at = text.index(name.encode())
    return 1024 * int(text[at : at + 60].split()[1])


def _mutation_engine(target, seeds, first, count, one):
    from torture.mutations import mutate, mutate_weights

    spoil = mutate_weights if target == "weights" else mutate
    for index in range(first, first + count):
        generator = random.Random(f"{target} {index}")
        one(spoil(generator.choice(seeds), seeds, generator), index)


def _hypothesis_engine(target, seeds, first, count, one):
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    from torture.mutations import repair

    pieces = st.sampled_from([b"", b"\0", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"]) | st.binary(
        max_size=4
    )
    changes = st.lists(st.tuples(st.floats(0, 1), pieces, st.booleans()), min_size=1, max_size=4)
    index = first

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.sampled_from(seeds), changes, st.just(1.0) | st.floats(0, 1), st.booleans())
    def feed(seed, changes, end, right):
        nonlocal index
        content = bytearray(seed)
        for place, new, replaces in changes:
            at = min(4, len(content)) + int(place * max(0, len(content) - 4))
            content[at : at + (len(new) if replaces else 0)] = new
        data = bytes(content[: max(1, int(end * len(content)))])
        one(repair(data) if right else data, index)
        index += 1

    feed()


_ENGINES = {"mutation": _mutation_engine, "hypothesis": _hypothesis_engine}


def guided(folder, target, runs):
    """Let atheris find inputs by what they reach in ddfup; libFuzzer itself watches time and memory."""
    import atheris

    with atheris.instrument_imports(include=["ddfup"]):
        import ddfup.formats
        import ddfup.guides
        import ddfup.io  # noqa: F401
        from ddfup.errors import DDFUpError
    path, read, seeds = _reader(target, Path(folder))
    corpus = Path(folder) / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)

    def feed(data):
        path.write_bytes(data)
        try:
            read()
        except DDFUpError:
            pass

    most = (_address_space("VmRSS") + BYTES) >> 20
    options = [
        f"-runs={runs}",
        "-timeout=5",
        f"-rss_limit_mb={most}",
        "-max_len=20000",
        f"-artifact_prefix={folder}/found-",
    ]
    atheris.Setup([sys.argv[0], *options, "-seed=1", str(corpus)], feed)
    atheris.Fuzz()


# --- outside of it ---


def has_atheris():
    import importlib.util

    return importlib.util.find_spec("atheris") is not None


def _start(code, *arguments, **settings):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))),
        "PYTHONWARNINGS": "ignore",
    }
    environment |= {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", f"import json, sys; from torture import fuzz; {code}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=environment, **settings)


def fuzz(count, *, targets=tuple(TARGETS), keep=None, guided_share=0.1, seed=0):
    """Feed readers with so many inputs.

    Args:
        count: Number of inputs of all targets and engines together.
        targets: Which readers.
        keep: Folder for inputs that did what none may; None: they are not kept.
        guided_share: Share of the inputs that atheris makes, where it is installed.
        seed: Number of the first input of each target.
    """
    result = Fuzzed()
    guided_count = int(guided_share * count) if has_atheris() else 0
    total = sum(TARGETS[target] for target in targets)
    jobs = []
    for target in targets:
        share = (count - guided_count) * TARGETS[target] / total
        jobs.append((target, "mutation", seed, max(1, round(0.875 * share))))
        jobs.append((target, "hypothesis", 0, max(1, round(0.125 * share))))
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        folder = Path(name)
        _run_jobs(folder, jobs, result)
        if guided_count:
            _run_guided(folder, [t for t in targets if t.startswith(("depth", "guide"))], guided_count, result)
        if keep is not None and result.findings:
            keep.mkdir(parents=True, exist_ok=True)
            for finding in result.findings:
                if Path(finding.file).exists():
                    finding.file = shutil.copy(finding.file, keep)
    return result


def _run_jobs(folder, jobs, result):
    """Start a process for the jobs, and another for what is left when it dies."""
    sizes = {}
    for _, engine, _, count in jobs:
        sizes[engine] = sizes.get(engine, 0) + count
    while jobs:
        # What a process never said must not be taken for its word.
        (folder / "progress").write_bytes(_PROGRESS.pack(0, jobs[0][2] - 1, 0.0, 0, 0))
        done = _start("fuzz.work(sys.argv[1], json.loads(sys.argv[2]))", folder, json.dumps(jobs))
        job, index, slowest, largest, refused = _PROGRESS.unpack((folder / "progress").read_bytes())
        result.slowest, result.largest = max(result.slowest, slowest), max(result.largest, largest)
        result.refused += refused
        if done.returncode == 0 and job == -1:
            break
        target, engine, first, count = jobs[job]
        if index < first:
            raise RuntimeError(f"{target}: cannot begin: {done.stderr.decode(errors='replace')[-2000:]}")
        if done.returncode == -signal.SIGPROF:
            what = f"took over {SECONDS:g} s"
        elif done.returncode == -signal.SIGALRM:
            what = f"waited over {20 * SECONDS:g} s"
        else:
            what = f"ended with {done.returncode}: {done.stderr.decode(errors='replace')[-300:]}"
        inputs = [p for p in (folder / target.replace(" ", "-")).rglob("*") if p.is_file()]
        latest = max(inputs, key=lambda p: p.stat().st_mtime_ns)
        kept = folder / "findings" / f"{time.monotonic_ns()}{latest.suffix}"
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(latest, kept)
        result.findings.append(Finding(target, what, str(kept)))
        left = first + count - index - 1
        jobs = [(target, engine, index + 1, left)] * (left > 0) + jobs[job + 1 :]
    for engine, count in sizes.items():
        result.inputs[engine] = result.inputs.get(engine, 0) + count
    found = folder / "findings.jsonl"
    if found.exists():
        result.findings += [Finding(**json.loads(line)) for line in found.read_text().splitlines()]


def _run_guided(folder, targets, count, result):
    for target in targets:
        home = folder / f"guided-{target.replace(' ', '-')}"
        home.mkdir()
        done = _start("fuzz.guided(*sys.argv[1:])", home, target, count // len(targets))
        said = done.stderr.decode(errors="replace")
        runs = [line for line in said.splitlines() if line.startswith("Done ")]
        artifacts = sorted(home.glob("found-*"))
        if artifacts or not runs:
            file = str(artifacts[0]) if artifacts else ""
            result.findings.append(Finding(target, f"atheris: {said[-1500:]}", file))
            continue
        result.inputs["atheris"] = result.inputs.get("atheris", 0) + int(runs[-1].split()[1])
