"""The scripts of slurm/, submitted to a real Slurm on this machine, with the toy model on the CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import FIXTURES
from tests.forked import HANG_SECONDS, run_ranks
from tests.service import Client
from tests.slurm.cluster import Cluster, ClusterError, find_missing

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
RUN = ["task=toy", "frame_num=5", "size=64*64", "cache.dir=null", "device=cpu"]
SMALL = ["--cpus-per-task=1", "--mem=2000", "--time=10"]
TWO_TASKS = ["--gpus-per-node=2", "--ntasks-per-node=2", *SMALL]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck; Debian's package: shellcheck")
    subprocess.run(["shellcheck", script], check=True)


class Slurm:
    """A cluster of two nodes; jobs run in ``folder``."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.environment = os.environ | cluster.environment
        self.environment |= {
            "PATH": f"{Path(sys.executable).parent}:{cluster.environment['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
        }

    def __call__(self, *command: str | Path, **environment: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=HANG_SECONDS,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-1000:]} {done.stderr[-2000:]}"
        return done.stdout.strip()

    def submit(self, options: list[str], script: str, *settings: str, **environment: str) -> str:
        return self(
            "sbatch",
            "--parsable",
            *options,
            ROOT / "slurm" / script,
            *RUN,
            *settings,
            **environment,
        )

    def ended(self, job: str) -> str:
        """Wait for the job's end and return its state, code and number of restarts."""
        return self.cluster.wait_for_job(job, HANG_SECONDS)

    def log(self, job: str) -> str:
        file = self.folder / f"wan-{job}.log"
        return file.read_text() if file.exists() else ""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if missing := find_missing():
        pytest.skip(missing)
    cluster = Cluster()
    try:
        try:
            cluster.start()
        except ClusterError as error:
            pytest.skip(f"no Slurm can be started here: {error}")
        yield Slurm(cluster, tmp_path_factory.mktemp("slurm"))
    finally:
        cluster.stop()


def latents(slurm: Slurm, name: str) -> torch.Tensor:
    return load_file(slurm.folder / f"outputs/{name}.latents.safetensors")["latents"]


def test_one_node_and_two_make_the_same(slurm: Slurm) -> None:
    jobs = [
        slurm.submit(TWO_TASKS, f"{name}.sbatch", "sample.steps=3", f"output.name={name}")
        for name in ("one-node", "several-nodes")
    ]
    for job in jobs:
        assert slurm.ended(job).startswith("COMPLETED 0:0"), slurm.log(job)
    record = json.loads((slurm.folder / "outputs/several-nodes.json").read_text())
    assert record["degrees"]["cfg"] * record["degrees"]["ulysses"] * record["degrees"]["ring"] == 4
    assert "rank 1" not in slurm.log(jobs[1])  # the first rank speaks for all
    torch.testing.assert_close(
        latents(slurm, "several-nodes"), latents(slurm, "one-node"), atol=1e-4, rtol=1e-4
    )


def test_an_array_makes_a_video_of_each_line(slurm: Slurm) -> None:
    lines = ['a "blue" cube, $HOME', "一只猫"]
    (slurm.folder / "prompts.txt").write_text("\n".join(lines) + "\n")
    options = ["--array=0-2%2", "--gpus-per-node=1", *SMALL]
    array = slurm.submit(options, "array.sbatch", "sample.steps=2", PROMPTS="prompts.txt")
    for number, line in enumerate(lines):
        assert slurm.ended(f"{array}_{number}").startswith("COMPLETED 0:0"), slurm.log(
            f"{array}-{number}"
        )
        assert (slurm.folder / f"outputs/line-{number}.mp4").stat().st_size > 1000
        assert (
            json.loads((slurm.folder / f"outputs/line-{number}.json").read_text())["prompt"] == line
        )
    assert slurm.ended(f"{array}_2").startswith("FAILED 2:0")
    assert "line 2 of prompts.txt is empty or not there" in slurm.log(f"{array}-2")


def test_a_job_that_is_requeued_makes_the_same_video(slurm: Slurm) -> None:
    settings = ["sample.steps=150", "output.metadata=false"]  # the names differ
    job = slurm.submit(TWO_TASKS, "requeue.sbatch", *settings, "output.name=parted")
    end = time.monotonic() + HANG_SECONDS
    while "attention " not in slurm.log(job):  # srun passes the bar on when its line ends
        assert time.monotonic() < end, slurm.log(job)
        time.sleep(0.05)
    time.sleep(1)
    slurm("scancel", "--signal=USR1", job)
    here = f"output.dir={slurm.folder / 'outputs'}"
    run_ranks(2, "wan_dist.run", *RUN, *settings, "output.name=whole", here)
    assert slurm.ended(job).startswith("COMPLETED 0:0 restarts=1"), slurm.log(job)
    assert "received SIGUSR1: stopped after step" in slurm.log(job), slurm.log(job)
    assert "resume    continues from step" in slurm.log(job)
    assert (slurm.folder / "outputs/parted.mp4").read_bytes() == (
        slurm.folder / "outputs/whole.mp4"
    ).read_bytes()
    assert not list((slurm.folder / "outputs").glob("*.state.safetensors"))


def wait_for_front(slurm: Slurm, job: str) -> Client:
    """Return a client of the service, once it listens; the file with its address is gone then."""
    file, end = slurm.folder / "served/service/front.json", time.monotonic() + HANG_SECONDS
    while not file.exists():
        assert time.monotonic() < end, slurm.log(job)
        time.sleep(0.05)
    url = json.loads(file.read_text())["url"]
    file.unlink()
    return Client(url)


def test_a_service_that_is_requeued_has_the_same_queue(slurm: Slurm) -> None:
    settings = ["serve.port=0", "output.dir=served"]
    job = slurm.submit(TWO_TASKS, "serve.sbatch", *settings, "parallel.dp=1", "parallel.cfg=2")
    client = wait_for_front(slurm, job)
    ids = [client.post({"prompt": "a ball", "steps": steps}).json["id"] for steps in (150, 2)]
    client.wait(ids[0], "in_progress", step=1)
    slurm("scancel", "--signal=USR1", job)
    client = wait_for_front(slurm, job)
    assert client.list_ids() == ids
    for video_id in ids:
        client.wait(video_id)
    assert "resume    continues from step" in slurm.log(job)
    slurm("scancel", job)
    assert slurm.ended(job).startswith("CANCELLED"), slurm.log(job)


HERE = "gpus_per_node: 2\ncpus_per_gpu: 1\nhost_memory: 64GB\nfetch_time: 10\nmax_time: 10\n"
STAND_IN = """
import shutil, sys
if "fetch" in sys.orig_argv:
    import huggingface_hub
    def snapshot_download(repository, local_dir=None, **options):
        return shutil.copytree({found!r}, local_dir)
    huggingface_hub.snapshot_download = snapshot_download
"""


def launch(slurm: Slurm, *arguments: str, cluster: str = "here", **environment: str) -> list[str]:
    """Submit with ``python -m launch submit`` and return the jobs."""
    told = slurm(
        sys.executable,
        "-m",
        "launch",
        "submit",
        f"cluster={slurm.folder / f'{cluster}.yaml'}",
        *arguments,
        **environment,
    )
    return re.findall(r"^job (\d+)", told, re.MULTILINE)


def test_jobs_that_are_submitted_from_a_plan(slurm: Slurm) -> None:
    (slurm.folder / "here.yaml").write_text(HERE)
    (slurm.folder / "single.yaml").write_text(HERE.replace("per_node: 2", "per_node: 1"))
    (slurm.folder / "stand-in").mkdir()
    (slurm.folder / "stand-in/sitecustomize.py").write_text(
        STAND_IN.format(found=str(FIXTURES / "wan2.1-t2v"))
    )
    small = ["mem=2GB", "sample.steps=2", *RUN[1:]]
    (slurm.folder / "jobs.jsonl").write_text(
        '{"name": "ball", "prompt": "a red ball, \\"$HOME\\""}\n'
        '{"name": "cat", "prompt": "一只猫", "seed": 7}\n'
    )
    path = f"{slurm.folder / 'stand-in'}:{ROOT}"
    fetched = launch(
        slurm,
        "gpus=1",
        "fetch=fetched",
        "task=t2v-1.3B",
        "prompt=a cat",
        "output.name=fetched",
        *small,
        PYTHONPATH=path,
    )
    (array,) = launch(slurm, "gpus=1", "array=jobs.jsonl", "task=toy", *small)
    video = ["nodes=2", "task=toy", "prompt=a cat", "output.name=spread"]
    (spread,) = launch(slurm, *video, *small, cluster="single")
    (together,) = launch(
        slurm, "nodes=2", "jobs=jobs.jsonl", "task=toy", "output.dir=together", *small
    )
    for job in (*fetched, f"{array}_0", f"{array}_1", spread, together):
        assert slurm.ended(job).startswith("COMPLETED 0:0"), slurm.log(job.replace("_", "-"))
    records = {
        name: json.loads((slurm.folder / f"outputs/{name}.json").read_text())
        for name in ("fetched", "ball", "cat", "spread")
    }
    assert records["fetched"]["checkpoint"] == "fetched"
    assert (records["ball"]["prompt"], records["cat"]["prompt"]) == (
        'a red ball, "$HOME"',
        "一只猫",
    )
    assert records["cat"]["seed"] == 7
    assert len(records["spread"]["other_ranks"]) == 1
    made = [
        json.loads((slurm.folder / f"together/{name}.json").read_text()) for name in ("ball", "cat")
    ]
    assert [record["status"] for record in made] == ["done", "done"]
    assert {record["degrees"]["dp"] for record in made} == {2}, "of four ranks two for each job"
    assert (slurm.folder / "together/index.html").exists()


def test_a_video_waits_for_its_download(slurm: Slurm) -> None:
    (slurm.folder / "here.yaml").write_text(HERE)
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(slurm.folder / "empty")}
    fetching, video = launch(
        slurm, "gpus=1", "mem=2GB", "fetch=nothing", "task=t2v-1.3B", "prompt=a cat", **nowhere
    )
    assert slurm.ended(fetching).startswith("FAILED 2:0")
    assert slurm.ended(video).startswith("CANCELLED")
