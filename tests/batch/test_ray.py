"""`ddfup batch --engine ray`: a worker by itself, the hand that deals on a cluster of stand-ins, and Ray itself."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from networks import tiny_pyramid
from torture.batches import CHECKOUT, tree, write_scene

from ddfup import __version__, io, models, pair
from ddfup.batch import ray_engine, ray_worker
from ddfup.batch.claims import FolderClaims
from ddfup.batch.engine import PAIRS_PER_NETWORK
from ddfup.batch.journal import open_journal
from ddfup.batch.pairing import Pair
from ddfup.batch.pool import LocalPool, Stopped
from ddfup.batch.processing import Outcome, Settings
from ddfup.batch.ray_engine import Plan, RayBatch
from ddfup.batch.ray_worker import Job, Worker
from ddfup.errors import ArgumentError, DeviceError, InputError, OutputError, WeightsError
from ddfup.terminal import Terminal, data_only, print_json

SETTINGS = Settings(Path("out"), pair.Options(), "5eed")


def names(count):
    return [Pair(f"{index:03}.png", Path(f"d/{index:03}.png"), Path(f"g/{index:03}.jpg")) for index in range(count)]


# --- a cluster of stand-ins ---


class RayError(Exception):
    pass


@dataclass(eq=False)
class Ref:
    """What a call gives: at first nothing."""

    actor: "Actor"
    method: str
    arguments: tuple


class Method:
    def __init__(self, actor, name):
        self.actor, self.name = actor, name

    def remote(self, *arguments, **options):
        self.actor.cluster.calls.append((self.actor.number, self.name, *arguments, *options.items()))
        return Ref(self.actor, self.name, arguments)


class Actor:
    def __init__(self, cluster, number):
        self.cluster, self.number, self.dead, self.served = cluster, number, False, 0
        self.check, self.process, self.stop = (Method(self, name) for name in ("check", "process", "stop"))


class Cluster:
    """So much of the module `ray` as a batch uses; each call is carried out when its answer is fetched.

    Args:
        resources: What there is.
        process: What a worker does: gets its number and the pair; may raise RayError, and then has died.
        check: What a worker's first word is.
    """

    class exceptions:
        RayError = RayError

    def __init__(self, process=None, check=lambda number: (number, None), **resources):
        self.resources, self.process, self.check = resources, process, check
        self.actors, self.calls, self.most, self.killed = [], [], {}, []
        self.starts = lambda number: True

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return self.resources

    available_resources = cluster_resources

    def put(self, value):
        return value

    def remote(self, kind):
        assert kind is Worker
        return self

    def options(self, **options):
        self.options_given = options
        outer = self

        class Factory:
            @staticmethod
            def remote(job, weights):
                outer.job, outer.weights = job, weights
                outer.actors.append(Actor(outer, len(outer.actors)))
                return outer.actors[-1]

        return Factory

    def wait(self, refs, *, num_returns, timeout):
        # Whoever has done least is ready first.
        ready = [ref for ref in refs if self.starts(ref.actor.number)]
        ready = sorted(ready, key=lambda ref: ref.actor.served)[:num_returns]
        for ref in refs:
            count = sum(other.actor is ref.actor and other.method == "process" for other in refs)
            self.most[ref.actor.number] = max(self.most.get(ref.actor.number, 0), count)
        if not ready:
            time.sleep(min(timeout, 0.02))
        return ready, []

    def get(self, ref):
        actor = ref.actor
        actor.served += 1
        if actor.dead:
            raise RayError("it is dead")
        try:
            return self.check(actor.number) if ref.method == "check" else self.process(actor.number, *ref.arguments)
        except RayError:
            actor.dead = True
            raise

    def kill(self, actor):
        self.killed.append(actor.number)


def fine(number, work):
    return Outcome(work, Path("out") / work.name, "ok")


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """Make a batch on a cluster of stand-ins."""
    monkeypatch.chdir(tmp_path)
    Path("weights").write_bytes(b"the weights")

    def make(cluster, count=12, settings=SETTINGS, **plan):
        monkeypatch.setattr(ray_engine, "_import_ray", lambda: cluster)
        return RayBatch(names(count), settings, open_journal(settings.out_dir), Plan(Path("weights"), **plan))

    return make


def test_each_cpu_gets_a_worker_and_each_worker_a_few_pairs(batch):
    cluster = Cluster(fine, CPU=3.0, memory=1e9)
    outcomes = list(batch(cluster).results())
    assert sorted(outcome.pair.name for outcome in outcomes) == [work.name for work in names(12)]
    assert len(cluster.actors) == 3 and set(cluster.most.values()) == {PAIRS_PER_NETWORK}
    assert cluster.options_given["num_cpus"] == 1 and cluster.options_given["num_gpus"] == 0
    assert cluster.job.device == "cpu" and cluster.weights == b"the weights"
    assert sorted(cluster.killed) == [0, 1, 2]
    # No more workers than pairs, nor than were asked for.
    few = Cluster(fine, CPU=64.0)
    assert len(list(batch(few, 2).results())) == 2 and len(few.actors) == 2
    chosen = Cluster(fine, CPU=64.0)
    assert len(list(batch(chosen, settings=replace(SETTINGS, workers=2)).results())) == 12 and len(chosen.actors) == 2


@pytest.mark.parametrize(
    ("device", "gpus", "workers", "chosen"), [("auto", 2.0, 2, "cuda"), ("cpu", 2.0, 4, "cpu"), ("auto", 0.0, 4, "cpu")]
)
def test_each_gpu_gets_a_worker(batch, device, gpus, workers, chosen):
    cluster = Cluster(fine, CPU=4.0, GPU=gpus)
    assert len(list(batch(cluster, device=device).results())) == 12
    assert len(cluster.actors) == workers and cluster.job.device == chosen
    assert cluster.options_given["num_gpus"] == (chosen == "cuda")


def test_pairs_of_a_worker_that_died_are_done_by_others(batch, caplog):
    died = []

    def process(number, work):
        if work.name == "005.png" and not died:
            died.append(number)
            raise RayError("killed")
        return fine(number, work)

    cluster = Cluster(process, CPU=2.0)
    outcomes = list(batch(cluster).results())
    assert len(outcomes) == 12 and {outcome.status for outcome in outcomes} == {"ok"}
    assert len({outcome.pair.name for outcome in outcomes}) == 12
    assert died and len(cluster.actors) == 3 and "a worker ended unexpectedly" in caplog.text


def test_a_pair_that_kills_its_worker_fails_alone(batch):
    def process(number, work):
        if work.name == "005.png":
            raise RayError("killed")
        return fine(number, work)

    for cpus in (1.0, 3.0):
        cluster = Cluster(process, CPU=cpus)
        outcomes = {outcome.pair.name: outcome for outcome in batch(cluster).results()}
        assert len(outcomes) == 12
        assert {name for name, outcome in outcomes.items() if outcome.status == "failed"} == {"005.png"}
        message = outcomes["005.png"].failure.message
        assert "d/005.png: its worker must not end before it; 2 did, with no other pair" in message
        # Once among others, twice alone.
        assert sum(call[1] == "process" and call[2].name == "005.png" for call in cluster.calls) == 3


def test_pairs_that_others_have_are_asked_for_again(batch):
    asked = []

    def process(number, work):
        asked.append(work.name)
        return None if work.name == "003.png" and asked.count(work.name) < 3 else fine(number, work)

    outcomes = list(batch(Cluster(process, CPU=1.0), 5).results())
    assert len(outcomes) == 5 and asked.count("003.png") == 3


def test_short_resources_are_said_and_end_the_batch(batch, caplog, monkeypatch):
    monkeypatch.setattr(ray_engine, "_NOTE", 0.05)
    cluster = Cluster(fine, CPU=2.0)
    cluster.starts = lambda number: False
    with pytest.raises(DeviceError, match=r"room for a worker \(1 CPU\); none has started in 0 s: 2 of 2 CPU free"):
        list(batch(cluster, wait=0.2).results())
    assert "waiting for the cluster to start a worker (1 CPU)" in caplog.text
    assert len(cluster.killed) == 2
    no_gpu = Cluster(fine, CPU=2.0)
    no_gpu.starts = lambda number: False
    with pytest.raises(DeviceError, match=r"\(1 CPU and 1 GPU\); .* 0 of 0 GPU free"):
        list(batch(no_gpu, wait=0.1, device="cuda").results())
    # Late is not never.
    late = Cluster(fine, CPU=2.0)
    begin = time.monotonic()
    late.starts = lambda number: time.monotonic() - begin > 0.3
    assert len(list(batch(late, wait=20).results())) == 12


def test_workers_that_cannot_start(batch):
    def check(number):
        raise RayError("Traceback ...\n  File x\nModuleNotFoundError: No module named 'ddfup'")

    with pytest.raises(DeviceError, match="3 did not: ModuleNotFoundError: No module named 'ddfup'") as caught:
        list(batch(Cluster(fine, check, CPU=1.0)).results())
    assert "installed on every machine" in caught.value.hint

    def check_some(number):
        return (number, None) if number >= 4 else check(number)

    # A bad machine among good ones.
    some = Cluster(fine, check_some, CPU=6.0)
    assert len(list(batch(some).results())) == 12 and len(some.actors) < 12
    problem = OutputError("out: must be one folder")
    with pytest.raises(OutputError, match="must be one folder"):
        list(batch(Cluster(fine, lambda number: (number, problem), CPU=2.0)).results())


def test_stop_and_fail_fast_and_fatal(batch):
    cluster = Cluster(fine, CPU=1.0)
    stopped = batch(cluster)
    outcomes = []
    for outcome in stopped.results():
        outcomes.append(outcome)
        stopped.stop()
    # What was under way is finished, and nothing more begun.
    assert len(outcomes) == PAIRS_PER_NETWORK
    assert [call for call in cluster.calls if call[1] == "stop"] == [(0, "stop", ("drop", False))]

    def fail(number, work):
        return Outcome(work, Path("out"), failure=InputError("bad"))

    cluster = Cluster(fail, CPU=1.0)
    assert len(list(batch(cluster, settings=replace(SETTINGS, fail_fast=True)).results())) == PAIRS_PER_NETWORK
    assert [call for call in cluster.calls if call[1] == "stop"] == [(0, "stop", ("drop", True))]

    def full(number, work):
        return Outcome(work, Path("out"), failure=OutputError("no space"), fatal=True)

    # A failure that all share ends what a signal had let go on.
    cluster = Cluster(lambda number, work: (full if work.name == "001.png" else fine)(number, work), CPU=1.0)
    stopped = batch(cluster)
    with pytest.raises(OutputError, match="no space"):
        for _ in stopped.results():
            stopped.stop()
    words = [call for call in cluster.calls if call[1] == "stop"]
    assert words == [(0, "stop", ("drop", False)), (0, "stop", ("drop", True))]


def test_devices_and_missing_ray(batch, monkeypatch):
    with pytest.raises(ArgumentError, match="must be auto, cpu or cuda with --engine ray; got 'cuda:1'"):
        batch(Cluster(fine, CPU=1.0), device="cuda:1")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ArgumentError, match="--engine ray must have Ray") as caught:
        ray_engine._import_ray()
    assert "ddfup[ray]" in caught.value.hint


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_where_nobody_answers(address):
    with pytest.raises(DeviceError, match=f"RAY_ADDRESS must be that of a running Ray cluster; got '{address}'"):
        ray_engine._check_address(address)
    ray_engine._check_address("auto")


class Starting:
    """So much of the module `ray` as connecting uses."""

    def __init__(self, *, fails):
        self.fails, self.started, self.shutdowns = fails, [], 0

    def is_initialized(self):
        return False

    def init(self, **settings):
        self.started.append(settings)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.fails:
            raise RuntimeError("Traceback ...\nnode timed out")

    def shutdown(self):
        self.shutdowns += 1


def test_starting_a_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_engine.os, "cpu_count", lambda: 4)
    before = signal.getsignal(signal.SIGTERM)
    ray = Starting(fails=False)
    with ray_engine._connected(ray, 7):
        # Ray's own handlers would end the command at once.
        assert signal.getsignal(signal.SIGTERM) is before
    (settings,) = ray.started
    assert (settings["address"], settings["num_cpus"], ray.shutdowns) == ("local", 7, 1)
    for address in ("", "auto"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        ray = Starting(fails=True)
        with pytest.raises(DeviceError, match="got node timed out"), ray_engine._connected(ray, None):
            pass
        assert ray.started[0]["address"] == (address or "local") and ray.shutdowns == 1
        assert signal.getsignal(signal.SIGTERM) is before


def test_what_ray_prints_is_kept_off_stdout(capfd):
    for verbose in (False, True):
        with data_only(Terminal(verbose=verbose)):
            thread = threading.Thread(target=print, args=("news of the cluster",))
            thread.start()
            thread.join()
            print_json({"a": 1})
        print_json({"b": 2})
        out, err = capfd.readouterr()
        assert out == '{"a": 1}\n{"b": 2}\n' and ("news" in err) == verbose


# --- a worker ---


class Doubling:
    """A network that enlarges by whole pixels."""

    model_name, weights_sha256, device, kernels = "doubling", "5eed", "cpu", "none"

    def __call__(self, depth, guide, *, valid=None, fill=False):
        factor = guide.shape[0] // depth.shape[0]
        return np.kron(depth, np.ones((factor, factor), np.float32))


@pytest.fixture
def job(tmp_path, monkeypatch):
    write_scene(tmp_path, 3)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    # Workers set it; what was there comes back after the test.
    monkeypatch.setenv("DDFUP_KERNELS", "native")
    monkeypatch.setattr(ray_worker, "make_pool", lambda *arguments: LocalPool(Doubling()))
    claims = FolderClaims(tmp_path / "out")
    mark = claims.identity()
    assert mark == claims.identity() and len(mark) == 32
    yield Job(__version__, SETTINGS, "cpu", "fp32", "auto", mark, tmp_path, True, "torch")
    claims.close()


def test_a_worker_does_pairs(job):
    work = Pair("room0/0000.png", Path("depths/room0/0000.png"), Path("guides/room0/0000.jpg"))
    worker = Worker(job, b"weights")
    assert worker.check() == (os.getpid(), None)
    assert os.environ["DDFUP_KERNELS"] == "torch" and "LOCAL_RANK" not in os.environ
    assert worker.process(work).status == "ok" and worker.process(work).status == "skipped"
    before, after = io.read_depth(work.depth), io.read_depth(Path("out/room0/0000.png"))
    np.testing.assert_array_equal(after.depth, np.kron(before.depth, np.ones((4, 4))).astype(np.float32))
    missing = worker.process(replace(work, depth=Path("none.png")))
    assert missing.status == "failed" and "none.png: must exist" in missing.failure.message
    worker.stop()
    assert worker.process(Pair("b.png", work.depth, work.guide)) is None


@pytest.mark.parametrize("drop", [False, True])
def test_a_worker_that_is_stopped_writes_what_its_network_has(job, monkeypatch, drop):
    class Stopping(Doubling):
        def __call__(self, *arguments, **options):
            worker.stop(drop=drop)
            return super().__call__(*arguments, **options)

    monkeypatch.setattr(ray_worker, "make_pool", lambda *arguments: LocalPool(Stopping()))
    worker = Worker(job, b"")
    outcome = worker.process(Pair("a.png", Path("depths/room0/0000.png"), Path("guides/room0/0000.jpg")))
    assert (outcome is None) == drop and Path("out/a.png").exists() == (not drop)


def test_what_a_network_raises_can_be_sent(job, monkeypatch):
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__("odd")

    def infer(self, *arguments):
        raise Odd(1, 2)

    monkeypatch.setattr(LocalPool, "infer", infer)
    outcome = Worker(job, b"").process(Pair("a.png", Path("depths/room0/0000.png"), Path("guides/room0/0000.jpg")))
    assert type(outcome.failure) is RuntimeError and "Odd: odd" in str(outcome.failure) and not outcome.fatal


def test_weights_that_a_worker_cannot_load_end_the_batch(job, monkeypatch):
    def load(*arguments):
        raise WeightsError("damaged")

    monkeypatch.setattr(ray_worker, "make_pool", load)
    outcome = Worker(job, b"").process(Pair("a.png", Path("depths/room0/0000.png"), Path("guides/room0/0000.jpg")))
    assert outcome.fatal and isinstance(outcome.failure, WeightsError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.0.1"}, "ddfup must be the same on all machines of the cluster; got 0.0.1"),
        ({"mark": "another"}, "out: must be one and the same folder for all machines of the cluster"),
        ({"folder": Path("/no/such/folder")}, "/no/such/folder: must be there on all machines"),
    ],
)
def test_what_a_worker_refuses(job, change, message):
    _, problem = Worker(replace(job, **change), b"").check()
    assert message in problem.message and problem.hint


def test_a_stopped_worker_loads_nothing(job):
    worker = Worker(job, b"")
    worker.stop()
    with pytest.raises(Stopped):
        worker.get()


# --- Ray itself ---


def workers_of(process):
    """Process numbers of the Ray workers below a process."""
    parents, workers = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if (path / "cmdline").read_bytes().startswith(b"ray::Worker"):
                workers.append(int(path.name))
        except OSError:
            continue

    def is_below(number):
        while number > 1 and number != process:
            number = parents.get(number, 0)
        return number == process

    return [number for number in workers if is_below(number)]


def test_a_cluster_with_more_workers_than_cores_one_of_them_killed(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ddfup[ray]'")
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc to find a worker")
    write_scene(tmp_path, 30)
    weights = tmp_path / "tiny.safetensors"
    models.save_weights(weights, tiny_pyramid(), architecture="pyramid", name="tiny", description="t")
    (tmp_path / "depths/room0/0000.png").write_bytes(b"no depth")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    common = ["--model", str(weights), "--device", "cpu", "--json"]
    # With as many threads as Ray gives a worker: the order of sums, and with it the last bit, depends on them.
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    here = [sys.executable, "-m", "ddfup", "batch", "depths", "guides", "local", *common]
    assert subprocess.run(here, env=environment, capture_output=True, timeout=300).returncode == 3
    # A pair that this process has: however fast the workers are, they are not done before one of them is killed.
    (tmp_path / "out").mkdir()
    claims = FolderClaims(tmp_path / "out")
    assert claims.take("room0/0003.png")
    command = [sys.executable, "-m", "ddfup", "batch", "depths", "guides", "out", *common]
    with subprocess.Popen(
        [*command, "--engine", "ray", "--workers", "3"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        first = child.stdout.readline()
        victim = workers_of(child.pid)[0]
        os.kill(victim, signal.SIGKILL)
        claims.close()
        rest, err = child.communicate(timeout=300)
    records = [json.loads(line) for line in [first, *rest.splitlines()]]
    assert child.returncode == 3, err
    assert len(records) == 30 and len({record["out"] for record in records}) == 30
    failed = [record for record in records if record["status"] != "ok"]
    assert [record["out"] for record in failed] == ["out/room0/0000.png"] and "not PNG" in failed[0]["error"]
    assert tree(tmp_path / "out", hidden=False) == tree(tmp_path / "local", hidden=False)
    assert "Traceback" not in err and "29 written, 0 already done, 1 failed" in err
