"""``python -m launch submit``: the scripts that it makes, and what it refuses. tests/slurm
submits some.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from launch.__main__ import main
from launch.slurm.cluster import parse_minutes
from launch.slurm.sbatch import REQUEUE_SCRIPT
from tests.conftest import FIXTURES
from wan_dist.config.compose import CONFIG_FOLDER

FOLDER = FIXTURES / "submit"
PROMPTS = ["a red ball", 'a "blue" cube, $HOME; rm -rf `x`', '"quoted"', "一只猫"]
CASES = {
    "one-node": ["cluster=h100", "task=t2v-14B", 'prompt=It\'s a "cat", $HOME'],
    "two-nodes": [
        "cluster=h200",
        "nodes=2",
        "cluster.partition=gpu",
        "task=t2v-14B",
        "prompt=a cat",
        "size=832*480",
        "after=4711",
    ],
    "slow-steps": ["cluster=a100", "gpus=1", "task=t2v-14B", "prompt=a cat"],
    "array": [
        "cluster=l40s",
        "gpus=1",
        "array=prompts.txt",
        "at_once=2",
        "task=t2v-1.3B",
        "time=30",
        "mem=20GB",
    ],
    "site": [
        "cluster=FOLDER/site.yaml",
        "fetch=/shared/Wan2.1-T2V-1.3B",
        "task=t2v-1.3B",
        "prompt=a cat",
    ],
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "/env of mine/bin/python")
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    return tmp_path


def rendered(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert (
        main(
            [
                "submit",
                *(argument.replace("FOLDER", str(FOLDER)) for argument in arguments),
                "--dry-run",
            ]
        )
        == 0
    )
    return capsys.readouterr().out


@pytest.mark.parametrize("name", CASES)
def test_scripts_are_as_they_were(
    name: str, capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    script = rendered(CASES[name], capsys)
    if os.environ.get("WRITE_SCRIPTS"):  # after a change that is meant
        (FOLDER / f"{name}.sbatch").write_text(script)
    assert script == (FOLDER / f"{name}.sbatch").read_text()
    for number, part in enumerate(script.split("\n# and, once it is submitted as job FETCH:\n\n")):
        file = place / f"{number}.sbatch"
        file.write_text(part)
        subprocess.run(["bash", "-n", file], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "--severity=warning", file], check=True)


def test_elements_of_an_array_get_what_was_written(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    """The shell's own reading of the script, and Hydra's of that, against the file."""
    from wan_dist.tasks.run_config import read_config

    script = rendered(CASES["array"], capsys)
    part = script[script.index("case ") : script.index("esac") + 4]
    for number, prompt in enumerate(PROMPTS):
        told = subprocess.run(
            ["bash", "-c", f'{part}\nprintf "%s\\0" "${{settings[@]}}"'],
            env={"SLURM_ARRAY_TASK_ID": str(number)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        config = read_config(told.split("\0")[:-1])
        assert config is not None
        assert config.prompt == prompt
        assert config.output.name in part


def test_every_cluster_has_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    clusters = sorted(path.stem for path in (CONFIG_FOLDER / "cluster").glob("*.yaml"))
    assert clusters
    for name in clusters:
        assert "--ntasks-per-node=" in rendered(
            [f"cluster={name}", "task=t2v-14B", "prompt=a cat"], capsys
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("task=t2v-14B prompt=x", "cluster=h100"),
        ("cluster=h101 task=t2v-14B prompt=x", "did you mean 'h100'"),
        ("cluster=h100 prompt=x", "task=NAME"),
        ("cluster=h100 task=t2v-14B", "prompt is missing"),
        ("cluster=h100 task=t2v-14B prompt=x gpus=9", "has 8"),
        ("cluster=h100 task=t2v-14B prompt=x nodes=0", "nodes=0"),
        ("cluster=h100 task=t2v-14B prompt=x time=3h", "time=02:30:00"),
        ("cluster=h100 task=t2v-14B prompt=x mem=lots", "mem=lots"),
        ("cluster=h100 task=t2v-14B prompt=x cluster.partion=x", "partion"),
        ("cluster=h100 task=t2v-14B prompt=x cluster.cpus_per_gpu=no", "cpus_per_gpu"),
        ("cluster=h100 task=t2v-14B prompt=x cluster.gpu_memory=2GB memory.dit=resident", "GiB"),
        ("cluster=h100 task=t2v-14B prompt=x fetch=/a ckpt_dir=/b", "leave ckpt_dir=/b out"),
        ("cluster=h100 task=t2v-14B array=nowhere.txt", "nowhere.txt cannot be read"),
        ("cluster=h100 task=i2v-14B array=prompts.txt", "prompts.txt, line 1: image is missing"),
        (
            "cluster=h100 task=t2v-14B array=prompts.txt --cfg job",
            "cannot be combined with array=FILE",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a: [", "- 1", "gpus_per_node: many"])
def test_a_broken_file_of_a_cluster_is_refused(
    text: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "mine.yaml").write_text(text)
    assert main(["submit", "cluster=mine.yaml", "task=t2v-14B", "prompt=x"]) == 2
    assert capsys.readouterr().err.startswith("launch: error: cluster=mine.yaml: ")


@pytest.mark.parametrize(
    ("text", "minutes"), [("30", 30), ("02:30:00", 150), ("1-00:00:00", 1440), ("00:00:30", 1)]
)
def test_times(text: str, minutes: int) -> None:
    assert parse_minutes(text, "time") == minutes


def test_a_machine_without_slurm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["submit", *CASES["one-node"]]) == 2
    assert "--dry-run prints the script" in capsys.readouterr().err


def test_a_thousand_lines_are_checked_soon(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [{"prompt": f"a ball, number {number}", "seed": number} for number in range(1000)]
    jobs[998]["size"] = "833*480"
    (place / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    assert main(["submit", "cluster=h100", "array=jobs.jsonl", "task=t2v-14B"]) == 2
    assert "jobs.jsonl, line 999: size=833x480" in capsys.readouterr().err


def test_a_video_of_ten_clips_takes_longer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["cluster=h100", "gpus=1", "task=i2v-14B", "image=first.png", "prompt=x"]
    Image.new("RGB", (832, 480)).save(place / "first.png")
    minutes = []
    for clips in (1, 10):
        script = rendered([*arguments, "size=832x480", f"clips={clips}"], capsys)
        limit = script.partition("#SBATCH --time=")[2].partition("\n")[0]
        minutes.append(parse_minutes(limit, "time"))
    assert 5 * minutes[0] < minutes[1] < 10 * minutes[0]


def test_a_file_of_videos_is_one_job(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["cluster=h100", "gpus=4", "task=t2v-14B", "output.dir=videos", "jobs=prompts.txt"]
    script = rendered(arguments, capsys)
    assert "# 4 ranks, dp 4 x cfg 1 x ring 1 x ulysses 1; transformer resident" in script
    assert "# 4 videos: " in script
    assert "settings=(task=t2v-14B output.dir=videos jobs=prompts.txt)" in script
    (place / "prompts.txt").write_text(
        "\n".join(f"{prompt}, {number}" for number in range(5) for prompt in PROMPTS)
    )
    clock = [
        line
        for line in (script + rendered(arguments, capsys)).splitlines()
        if line.startswith("#SBATCH --time")
    ]
    assert clock[0] < clock[1], "five times as many take longer"
    (place / "prompts.txt").write_text("a cat\n@nowhere.txt\n")
    assert main(["submit", *arguments]) == 2
    assert "prompts.txt, line 2: prompt=@" in capsys.readouterr().err


class Requeued:
    """A script's attempts, with a run and a queue that are stand-ins."""

    def __init__(self, folder: Path, script: str, *settings: str) -> None:
        self.folder, self.settings = folder, settings
        (folder / "bin").mkdir()
        (folder / "script").write_text(script)
        for name, does in (
            ("srun", 'bash "$ATTEMPT"; exit "$CODE"'),
            ("scontrol", 'echo "$@" >>requeues'),
        ):
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
            (folder / "bin" / name).chmod(0o755)

    def __call__(self, attempt: str, code: int = 75) -> tuple[bool, str]:
        """Run the script with one that does ``attempt`` as its run; returns whether it was
        requeued, and what it says.
        """
        (self.folder / "attempt").write_text(attempt)
        (self.folder / "requeues").unlink(missing_ok=True)
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_ARRAY_TASK_ID": "0",
        }
        environment |= {
            "HOME": str(self.folder / "home"),
            "ATTEMPT": str(self.folder / "attempt"),
            "CODE": str(code),
        }
        command = ["bash", self.folder / "script", *self.settings]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        return (self.folder / "requeues").exists(), done.stderr


STATE = (
    "mkdir -p videos; echo %s >videos/a-cat.12ab.state.safetensors; touch videos/index.html; "
    "echo $RANDOM >videos/a-cat.latents.safetensors"
)


@pytest.fixture(params=["a job", "an element", "slurm/requeue.sbatch"])
def requeued(
    request: pytest.FixtureRequest, place: Path, capsys: pytest.CaptureFixture[str]
) -> Requeued:
    settings = ["task=t2v-14B", "output.dir=videos"]
    if request.param == "slurm/requeue.sbatch":
        return Requeued(place, (FOLDER.parents[2] / request.param).read_text(), *settings)
    (place / "jobs.csv").write_text("prompt,name\na cat,a-cat\na dog,a-dog\n")
    what = ["prompt=a cat"] if request.param == "a job" else ["array=jobs.csv"]
    return Requeued(place, rendered(["cluster=h100", *what, *settings], capsys))


def test_requeues_that_lead_nowhere_end(requeued: Requeued) -> None:
    again = STATE % "step 1"  # written anew, and the same
    assert [requeued(again)[0] for _ in range(2)] == [True, True]
    was_requeued, told = requeued(again)
    assert not was_requeued
    assert "two requeues in a row left no new step, text or video in videos" in told
    assert requeued("")[0], "submitted again, it has all its attempts"


def test_requeues_go_on_while_there_is_progress(requeued: Requeued) -> None:
    keeps_text = (
        "mkdir -p home/.cache/wan-dist/prompts; "
        "touch home/.cache/wan-dist/prompts/$RANDOM.safetensors"
    )
    makes = "touch videos/a-cat-%s.mp4"
    for attempt in (
        STATE % 1,
        "",
        STATE % 2,
        "",
        makes % 1,
        "",
        keeps_text,
        "",
        makes % 2,
        "",
        keeps_text,
        "",
    ):
        assert requeued(attempt)[0], attempt
    assert not requeued("")[0]
    assert not list(requeued.folder.glob(".wan-*"))


def test_a_run_that_has_ended_leaves_nothing_behind(requeued: Requeued) -> None:
    for code in (0, 1, 2):
        assert requeued(STATE % 1)[0]
        assert not requeued("", code)[0]
        assert not list(requeued.folder.glob(".wan-*"))


def test_others_in_the_folder_are_no_progress_of_an_element(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "jobs.csv").write_text("prompt,name\na cat,a-cat\na dog,a-dog\n")
    element = Requeued(place, rendered(["cluster=h100", "array=jobs.csv", "task=t2v-14B"], capsys))
    attempts = ["mkdir -p outputs; touch outputs/a-dog-$RANDOM.mp4"] * 3
    assert [element(attempt)[0] for attempt in attempts] == [True, True, False]


def test_the_requeue_script_does_as_those_that_are_made() -> None:
    assert (FOLDER.parents[2] / "slurm/requeue.sbatch").read_text().endswith(REQUEUE_SCRIPT)


def test_a_sweep_is_one_job_or_an_array(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["cluster=h100", "gpus=1", "task=t2v-1.3B", "prompt=a cat, asleep", "seed=1,2"]
    one_job = rendered([*command, "--multirun"], capsys)
    assert "settings=(task=t2v-1.3B 'prompt=a cat, asleep' seed=1,2 --multirun)" in one_job
    assert "#SBATCH --array" not in one_job
    assert "2 videos: " in one_job
    array = rendered([*command, "--multirun", "array=sweep"], capsys)
    assert "#SBATCH --array=0-1" in array
    assert "1) settings=(task=t2v-1.3B 'prompt=a cat, asleep' seed=2 output.name=" in array


@pytest.mark.parametrize("given", [["array=sweep"], ["--multirun", "array=prompts.txt"]])
def test_an_array_of_a_sweep_needs_both(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "cluster=h100", "task=t2v-1.3B", "prompt=x", *given, "--dry-run"]) == 2
    assert "array=sweep and --multirun belong together" in capsys.readouterr().err
