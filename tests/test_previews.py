"""Previews of runs: they change nothing, also on several ranks, and go on after an interruption."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FIXTURES
from tests.forked import run_forked, run_ranks
from tests.test_batch import write_jobs
from wan_dist.run import main

TOY = [
    *("task=toy", "dtype=float32", "device=cpu", "size=64x48", "frame_num=5", "sample.steps=6"),
    "cache.dir=null",
]
JOBS: list[dict[str, object]] = [
    {"name": "ball", "prompt": "a red ball"},
    {"name": "cube", "prompt": "a blue cube", "seed": 7},
]


def read_previews(file: Path) -> dict[str, list[int]]:
    """Return the steps that had a preview, by job, in the order of the events."""
    steps: dict[str, list[int]] = {}
    for line in file.read_text().splitlines():
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "preview":
            assert event["file"].endswith(f"{event['job']}.preview.jpg")
            steps.setdefault(event["job"], []).append(event["step"])
    return steps


@pytest.mark.parametrize(
    ("num_ranks", "degrees"),
    [
        (1, []),
        (2, ["parallel.dp=1", "parallel.cfg=1", "parallel.ulysses=2"]),
        (2, ["parallel.dp=2"]),
    ],
)
def test_previews_change_nothing(num_ranks: int, degrees: list[str], tmp_path: Path) -> None:
    jobs = write_jobs(tmp_path / "jobs.jsonl", JOBS)
    events = tmp_path / "events.jsonl"
    previews = ["output.preview=true", f"output.events={events}"]
    for name, settings in {"plain": [], "seen": previews}.items():
        out = f"output.dir={tmp_path / name}"
        run_ranks(num_ranks, "wan_dist.run", *TOY, *degrees, jobs, out, *settings)
    for job in ("ball", "cube"):
        plain, seen = ((tmp_path / name / f"{job}.mp4").read_bytes() for name in ("plain", "seen"))
        assert plain == seen
    steps = read_previews(events)
    assert set(steps) == {"ball", "cube"}
    for of_job in steps.values():
        assert of_job == sorted(set(of_job))
        assert of_job[0] == 1
        assert of_job[-1] <= 6
    assert not list((tmp_path / "seen").glob("*.preview.jpg"))


def test_previews_go_on_after_an_interruption(tmp_path: Path) -> None:
    jobs, events = write_jobs(tmp_path / "jobs.jsonl", JOBS[:1]), tmp_path / "events.jsonl"
    command = [*TOY, jobs, f"output.dir={tmp_path / 'out'}", "output.preview=1"]
    command.append(f"output.events={events}")
    assert run_forked("tests.preempted", "2", "0", *command).returncode == 75
    (begun,) = read_previews(events).values()
    assert set(begun) <= {1, 2, 3}
    assert (tmp_path / "out/ball.preview.jpg").exists()
    assert main(command) == 0
    (steps,) = read_previews(events).values()
    assert steps[: len(begun)] == begun
    assert steps[len(begun)] == 4
    assert not (tmp_path / "out/ball.preview.jpg").exists()


def test_steps_of_all_clips_are_counted(tmp_path: Path) -> None:
    jobs = write_jobs(tmp_path / "jobs.jsonl", JOBS[:1])
    events = tmp_path / "events.jsonl"
    command = [*TOY, jobs, f"output.dir={tmp_path / 'out'}", "output.preview=3", "clips=2"]
    image = f"image={FIXTURES / 'circle.png'}"
    assert main([*command, image, f"output.events={events}"]) == 0
    assert read_previews(events) == {"ball": [3, 6, 9, 12]}


def test_one_video_is_seen_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without jobs there are no events, and the picture is beside the result."""
    seen: list[list[str]] = []
    monkeypatch.setattr(
        "wan_dist.pipeline.generate.decode_and_write",
        lambda *_: seen.append(sorted(path.name for path in tmp_path.glob("a.*"))),
    )
    assert (
        main([*TOY, "prompt=a ball", f"output.dir={tmp_path}", "output.name=a", "output.preview=2"])
        == 0
    )
    assert seen == [["a.latents.safetensors", "a.preview.jpg"]]
