"""What the documentation's cluster page needs around it: Slurm's commands, a Ray cluster, an S3 server.

They are small, but real: each command is run as the user would have it, with the variables that it would find.
"""

import contextlib
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

SBATCH = """#!{python}
# sbatch --array=FIRST-LAST ... --wrap COMMAND: all tasks at once, as on a cluster with room for them; waits.
import os, re, subprocess, sys
first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", " ".join(sys.argv)).groups())
command = sys.argv[sys.argv.index("--wrap") + 1]
count = last - first + 1
array = {{"COUNT": count, "MIN": first, "MAX": last, "STEP": 1}}
tasks = [
    subprocess.Popen(
        ["sh", "-c", command],
        env=os.environ | {{f"SLURM_ARRAY_TASK_{{name}}": str(value) for name, value in [*array.items(), ("ID", task)]}},
    )
    for task in range(first, last + 1)
]
sys.exit(max(task.wait() for task in tasks))
"""

SRUN = """#!{python}
# srun --ntasks=N COMMAND...: N copies at once; waits.
import os, subprocess, sys
count = int(sys.argv[1].removeprefix("--ntasks="))
tasks = [
    subprocess.Popen(sys.argv[2:], env=os.environ | {{"SLURM_PROCID": str(task), "SLURM_NTASKS": str(count)}})
    for task in range(count)
]
sys.exit(max(task.wait() for task in tasks))
"""

# A cluster of its own, found by its address only; it ends with its standard input.
RAY = """
import ray, sys
context = ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=10**8)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""

UPLOAD = """
import fsspec
store = fsspec.filesystem("s3")
store.mkdir("captures")
for name in ("depths", "photos"):
    store.put(f"{name}/", f"captures/{name}/", recursive=True)
"""


def write_slurm(programs):
    """Write sbatch and srun into a folder."""
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (programs / name).write_text(text.format(python=sys.executable))
        (programs / name).chmod(0o755)


@contextlib.contextmanager
def ray_cluster(environment):
    """Start a Ray cluster on this machine; yields its address."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ddfup[ray]'")
    command = [sys.executable, "-c", RAY]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as child:
        address = child.stdout.readline().strip()
        assert ":" in address, "Ray did not start"
        yield address
        child.stdin.close()
        child.wait(60)


@contextlib.contextmanager
def s3_server():
    """Start moto's server on this machine; yields the variables by which clients find it."""
    for name in ("s3fs", "moto", "flask", "flask_cors"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], **quiet) as child:
        try:
            address = f"http://127.0.0.1:{port}"
            _await_answer(f"{address}/moto-api/")
            keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
            yield {**keys, "AWS_ENDPOINT_URL": address}
        finally:
            child.terminate()


def _await_answer(url, seconds=60):
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.1)


@contextlib.contextmanager
def cluster(work: Path, environment):
    """All of it, around a folder with depths/ and photos/; yields the environment, and what the page calls the head."""
    write_slurm(work / "bin")
    with contextlib.ExitStack() as stack:
        environment = {**environment, **stack.enter_context(s3_server())}
        # As on a cluster of several users; and the store before Ray, so that its workers know it.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        address = stack.enter_context(ray_cluster(environment))
        subprocess.run([sys.executable, "-c", UPLOAD], cwd=work, env=environment, check=True, timeout=120)
        yield environment, {"head-node:6379": address}
