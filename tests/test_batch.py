"""Runs with a file of jobs: equal to single runs, made once, gone on with after anything, on one
rank and on several.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import FIXTURES, golden_folder
from tests.forked import run_forked, run_ranks, run_together
from tests.test_command import reference_arguments
from wan_dist.jobs import worker
from wan_dist.pipeline.denoise import VideoInProgress
from wan_dist.run import main
from wan_dist.weights.component import Component

TINY = [
    "task=toy",
    "dtype=float32",
    "size=64*48",
    "frame_num=5",
    "sample.steps=3",
    "output.save_tensor=true",
]
JOBS: list[dict[str, object]] = [
    {"name": "plain", "prompt": "a red ball"},
    {"name": "other-size", "prompt": "a blue cube, <b>bold</b>", "size": "48*64", "steps": 2},
    {"name": "unguided", "prompt": "a red ball", "guide_scale": 1, "seed": 7},
    {"name": "longer", "prompt": "一个红色圆形", "frames": 9, "solver": "euler", "shift": 2.0},
]


def write_jobs(file: Path, jobs: list[dict[str, object]]) -> str:
    file.write_text(
        "".join(json.dumps(job, ensure_ascii=False) + "\n" for job in jobs), encoding="utf-8"
    )
    return f"jobs={file}"


def videos(folder: Path) -> dict[str, torch.Tensor]:
    return {
        file.stem: load_file(file)["video"]
        for file in sorted(folder.glob("*.safetensors"))
        if not file.name.endswith(".latents.safetensors")
    }


def record(folder: Path, name: str) -> dict[str, object]:
    found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def written(folder: Path) -> dict[str, int]:
    """When each video was written, in nanoseconds."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.mp4")}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The jobs' videos, each from a run of its own."""
    folder = tmp_path_factory.mktemp("single")
    keys = {
        "name": "output.name",
        "steps": "sample.steps",
        "guide_scale": "sample.guide_scale",
        "frames": "frame_num",
        "solver": "sample.solver",
        "shift": "sample.shift",
    }
    with torch.no_grad():
        for job in JOBS:
            own = [f"{keys.get(key, key)}={value}" for key, value in job.items()]
            assert main([*TINY, *own, f"output.dir={folder}"]) == 0
    return videos(folder)


def test_jobs_are_what_single_runs_are(single: dict[str, torch.Tensor], tmp_path: Path) -> None:
    out, events = tmp_path / "out", tmp_path / "events.jsonl"
    command = [
        *TINY,
        write_jobs(tmp_path / "jobs.jsonl", JOBS),
        f"output.dir={out}",
        f"output.events={events}",
    ]
    assert main(command) == 0
    made = videos(out)
    assert made.keys() == single.keys()
    for name, video in made.items():
        assert torch.equal(video, single[name]), name
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert [line["event"] for line in lines].count("done") == 4
    assert (lines[-1]["event"], lines[-1]["done"], lines[-1]["left"]) == ("ended", 4, 0)
    plain = record(out, "plain")
    assert (plain["status"], plain["job"], plain["num_frames"]) == (
        "done",
        {"file": str(tmp_path / "jobs.jsonl"), "line": 1},
        5,
    )
    assert float(str(plain["tflops"])) > 0
    assert list(plain) == list(record(FIXTURES / "records", "batch"))

    before = written(out)  # and again: nothing is made that is whole
    assert main(command) == 0
    assert written(out) == before
    (out / "plain.mp4").write_bytes((out / "plain.mp4").read_bytes()[:-1])
    (out / "longer.json").unlink()
    assert main(command) == 0
    after = written(out)
    assert {name for name in after if after[name] != before[name]} == {"plain.mp4", "longer.mp4"}
    changed = [dict(job, prompt="another") if job["name"] == "unguided" else job for job in JOBS]
    write_jobs(tmp_path / "jobs.jsonl", changed)
    assert main(command) == 0
    assert {name for name in after if written(out)[name] != after[name]} == {"unguided.mp4"}


def test_a_job_that_fails_leaves_the_others_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = torch.full((16, 2, 6, 8), float("nan"))
    save_file({"latents": bad}, tmp_path / "bad.safetensors")
    jobs: list[dict[str, object]] = [{"name": "bad", "latents": "bad.safetensors"}, JOBS[0]]
    out = tmp_path / "out"
    command = [*TINY, write_jobs(tmp_path / "jobs.jsonl", jobs), f"output.dir={out}"]
    assert main(command) == 1
    assert record(out, "bad")["status"] == "failed"
    assert str(record(out, "bad")["error"]).startswith("latents=")
    assert record(out, "plain")["status"] == "done"
    assert "bad of " in capfd.readouterr().err
    before = (out / "bad.json").stat().st_mtime_ns
    assert main(command) == 1, "it is still not there"
    assert (out / "bad.json").stat().st_mtime_ns == before, "but not tried again"
    assert "1 failed before (retry_failed=true runs them again)" in capfd.readouterr().err
    assert main([*command, "retry_failed=true"]) == 1
    assert (out / "bad.json").stat().st_mtime_ns > before
    save_file({"latents": torch.zeros_like(bad)}, tmp_path / "bad.safetensors")
    assert main([*command, "retry_failed=true"]) == 0


@pytest.mark.parametrize("frames", [True, False], ids=["written later", "written at once"])
def test_a_full_disk_ends_the_run_and_not_each_job(
    frames: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan_dist.jobs.worker.can_buffer_frames", lambda *_: frames)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("wan_dist.output.result_writer.ResultWriter.write_clip", full)
        command = [
            *TINY,
            write_jobs(tmp_path / "jobs.jsonl", JOBS),
            f"output.dir={tmp_path / 'out'}",
        ]
        assert main(command) == 1
    assert not list((tmp_path / "out").glob("*.json"))
    kept = [file.name for file in (tmp_path / "out").glob("*.latents.safetensors")]
    assert "plain.latents.safetensors" in kept
    with monkeypatch.context() as patch:  # what was denoised is not denoised again
        patch.setattr(
            "wan_dist.pipeline.denoise.encode_conditioning",
            lambda *_: pytest.fail("it has its latents"),
        )
        one = write_jobs(tmp_path / "one.jsonl", JOBS[:1])
        assert main([*TINY, one, f"output.dir={tmp_path / 'out'}"]) == 0
    assert ("save" in record(tmp_path / "out", "plain")["stages"]) is frames  # type: ignore[operator]


def test_a_run_whose_jobs_all_fail_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the kernel is broken")

    jobs: list[dict[str, object]] = [
        {"name": f"job-{number:02}", "prompt": "a ball", "seed": number} for number in range(12)
    ]
    monkeypatch.setattr("wan_dist.pipeline.denoise.encode_conditioning", broken)
    assert main([*TINY, write_jobs(tmp_path / "jobs.jsonl", jobs), f"output.dir={tmp_path}"]) == 1
    assert (
        "the kernel is broken (the last of 10 jobs that failed one after the other)"
        in capsys.readouterr().err
    )
    assert len(list(tmp_path.glob("job-*.json"))) == 9


def test_events_that_cannot_be_written_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*TINY, write_jobs(tmp_path / "jobs.jsonl", JOBS[:1]), f"output.dir={tmp_path}"]
    assert main([*command, f"output.events={tmp_path}"]) == 2
    assert "cannot be written: Is a directory" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.mp4"))


def test_a_picture_that_has_the_name_of_a_sheet_stays(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "plain.jpg")
    before = (tmp_path / "plain.jpg").read_bytes()
    assert (
        main([*TINY, write_jobs(tmp_path / "jobs.jsonl", JOBS[:1]), f"output.dir={tmp_path}"]) == 0
    )
    assert (tmp_path / "plain.jpg").read_bytes() == before
    (tmp_path / "plain.jpg").unlink()
    (tmp_path / "plain.json").unlink()
    assert (
        main([*TINY, write_jobs(tmp_path / "jobs.jsonl", JOBS[:1]), f"output.dir={tmp_path}"]) == 0
    )
    with Image.open(tmp_path / "plain.jpg") as sheet:
        assert sheet.size == (4 * 64, 2 * 48)


def test_both_experts_stay_from_video_to_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []
    load = Component.load

    def counted(
        self: Component[torch.nn.Module, object], device: torch.device, **options: object
    ) -> torch.nn.Module:
        loads.append(self)
        return load(self, device, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Component, "load", counted)
    folder = golden_folder("wan2.2-t2v-a14b")
    run = [
        *reference_arguments(folder, "unipc", "t2v-A14B"),
        "dtype=float32",
        f"output.dir={tmp_path}",
    ]
    jobs = write_jobs(
        tmp_path / "jobs.jsonl",
        [{"name": "one"}, {"name": "two", "seed": 1}, {"name": "three", "steps": 3}],
    )
    assert (
        main(
            [
                *(setting for setting in run if not setting.startswith("output.name")),
                jobs,
                "cache.dir=null",
            ]
        )
        == 0
    )
    assert len(loads) == 6  # text encoder, VAE, two transformers with their projections
    expected = load_file(folder / "expected/unipc.safetensors")["video"]
    torch.testing.assert_close(videos(tmp_path)["one"], expected, rtol=0, atol=1e-3)
    assert not any(
        stage.startswith("load")
        for name in ("two", "three")
        for stage in record(tmp_path, name)["stages"]
    )  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_sweep_is_a_run_of_jobs(num_ranks: int, tmp_path: Path) -> None:
    """Its videos are those of single runs; once more with one value more, only the new ones are made."""
    prompt = "prompt=a red ball, moving left"
    command = [*TINY, prompt, "parallel.cfg=1", "device=cpu", f"output.dir={tmp_path / 'out'}"]
    alone = ["seed=2", "sample.guide_scale=5", "output.name=alone", f"output.dir={tmp_path}"]
    assert main([*TINY, prompt, *alone]) == 0
    sweeps = [
        ["--multirun", "seed=1,2", "sample.guide_scale=3,5.0"],
        ["--multirun", "seed=1,2,3", "sample.guide_scale=3,5.0"],
    ]
    for number, sweep in enumerate(sweeps, start=1):
        if num_ranks == 1:
            assert main([*command, *sweep]) == 0
        else:
            run_ranks(num_ranks, "wan_dist.run", *command, *sweep)
        if number == 1:
            before = written(tmp_path / "out")
    made = videos(tmp_path / "out")
    assert len(made) == 6
    assert before.items() <= written(tmp_path / "out").items()
    (swept,) = (name for name in made if "seed-2_guide_scale-5.0" in name)
    torch.testing.assert_close(made[swept], videos(tmp_path)["alone"], rtol=0, atol=1e-4)
    assert "guide_scale" in (tmp_path / "out/index.html").read_text(encoding="utf-8")


def test_an_image_that_vanishes_fails_its_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        Image.new("RGB", (64, 48), "blue").save(tmp_path / f"{name}.png")
    jobs: list[dict[str, object]] = [
        {"name": name, "prompt": "a red ball", "image": f"{name}.png"} for name in "abc"
    ]
    make = worker.make_clips

    def make_and_lose(video: VideoInProgress) -> Iterator[tuple[VideoInProgress, torch.Tensor]]:
        (tmp_path / "b.png").unlink(missing_ok=True)
        return make(video)

    monkeypatch.setattr(worker, "make_clips", make_and_lose)
    assert (
        main([*TINY, write_jobs(tmp_path / "jobs.jsonl", jobs), f"output.dir={tmp_path / 'out'}"])
        == 1
    )
    assert [record(tmp_path / "out", name)["status"] for name in "abc"] == [
        "done",
        "failed",
        "done",
    ]
    assert "b.png" in str(record(tmp_path / "out", "b")["error"])


def test_what_only_frames_depend_on_is_made_again_from_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    given = [f"{name}.latents.safetensors" for name in "ab"]
    for seed, file in enumerate(given):
        save_file(
            {"latents": torch.randn(16, 2, 6, 8, generator=torch.Generator().manual_seed(seed))},
            tmp_path / file,
        )

    def run(fps: int, latents: str, *settings: str) -> dict[str, bytes]:
        jobs: list[dict[str, object]] = [
            {"name": "rate", "prompt": "a ball", "fps": fps},
            {"name": "again", "latents": latents},
        ]
        assert (
            main(
                [
                    *TINY[:-1],
                    "output.metadata=false",  # the settings differ
                    *settings,
                    write_jobs(tmp_path / "jobs.jsonl", jobs),
                    f"output.dir={out}",
                ]
            )
            == 0
        )
        return {file.name: file.read_bytes() for file in out.glob("*.mp4")}

    first = run(8, given[0])
    monkeypatch.setattr(
        "wan_dist.pipeline.denoise.encode_conditioning",
        lambda *_: pytest.fail("the latents are there"),
    )
    second = run(16, given[1])
    assert all(second[name] != first[name] for name in first)
    assert not (out / "rate.safetensors").exists()
    assert run(16, given[1], "output.save_tensor=true") == second
    assert (out / "rate.safetensors").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ['{"prompt": "a", "parallel.dp": 2}'],
            "line 1: parallel.dp applies to the whole run; give it on the command line",
        ),
        (
            ['{"prompt": "a"}', '{"prompt": "b", "output.dir": "x"}'],
            "line 2: output.dir applies to the whole run",
        ),
        (
            ['{"prompt": "a"}', '{"prompt": "b", "frame_num": 6}'],
            "line 2: frame_num=6 is not 4n + 1",
        ),
        (
            ['{"prompt": "a"}', '{"prompt": "b", "last_frame": "no.png"}'],
            "line 2: last_frame is given, but toy",
        ),
        (['{"prompt": "a", "stepz": 3}'], "line 1: unknown key 'stepz'"),
    ],
)
def test_all_lines_are_checked_first(
    lines: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    assert main([*TINY, f"jobs={tmp_path / 'jobs.jsonl'}", f"output.dir={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_requested_to_stop_resumes(single: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The first job was in its second step, and the others are not begun."""
    command = [*TINY, write_jobs(tmp_path / "jobs.jsonl", JOBS), f"output.dir={tmp_path}"]
    done = run_forked("tests.preempted", "1", "0", *command)
    assert done.returncode == 75, done.stderr
    assert len(list(tmp_path.glob("plain.*.state.safetensors"))) == 1
    assert main(command) == 0
    for name, video in videos(tmp_path).items():
        assert torch.equal(video, single[name]), name
    assert not list(tmp_path.glob("*.state.safetensors"))


@pytest.mark.parametrize(
    ("num_ranks", "degrees"), [(2, ""), (4, "parallel.dp=2 parallel.cfg=1 parallel.ulysses=2")]
)
def test_replicas_share_the_jobs(
    num_ranks: int, degrees: str, single: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    events = tmp_path / "events.jsonl"
    command = [
        *TINY,
        write_jobs(tmp_path / "jobs.jsonl", JOBS),
        *degrees.split(),
        f"output.dir={tmp_path}",
        f"output.events={events}",
    ]
    run_ranks(num_ranks, "wan_dist.run", *command)
    made = videos(tmp_path)
    assert made.keys() == single.keys()
    for name, video in made.items():
        assert (video - single[name]).abs().max() < 1e-3, name
    done = [
        line["job"]
        for line in map(json.loads, events.read_text().splitlines())
        if line["event"] == "done"
    ]
    assert sorted(done) == sorted(single)
    assert len({record(tmp_path, name)["rank"] for name in single}) == 2


def test_two_runs_on_a_folder_make_each_job_once(tmp_path: Path) -> None:
    jobs: list[dict[str, object]] = [
        {"name": f"job-{number}", "prompt": "a ball", "seed": number} for number in range(8)
    ]
    command = [*TINY, write_jobs(tmp_path / "jobs.jsonl", jobs), f"output.dir={tmp_path}"]
    runs = [
        ["wan_dist.run", *command, f"output.events={tmp_path / f'events-{number}.jsonl'}"]
        for number in range(2)
    ]
    for done in run_together(runs, [{}, {}]):
        assert done.returncode == 0, done.stderr
    lines = [
        json.loads(line)
        for file in tmp_path.glob("events-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert sorted(line["job"] for line in lines if line["event"] == "done") == [
        f"job-{number}" for number in range(8)
    ]
    assert len(list(tmp_path.glob("*.mp4"))) == 8
