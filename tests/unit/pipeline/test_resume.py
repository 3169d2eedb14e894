"""What a run keeps to go on from: what is damaged is in nobody's way, and what still holds is not
made again.
"""

import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from wan_dist.config.arguments import prepare_arguments
from wan_dist.config.compose import compose_config
from wan_dist.config.overrides import override_config
from wan_dist.config.schema import RunConfig
from wan_dist.output.locks import ResultLocks
from wan_dist.output.video_file import save_tensors
from wan_dist.parallel.mesh import Axis
from wan_dist.pipeline.resume import DenoisingProgress, ResumeState, warn_about_old_states
from wan_dist.planning.digests import FORMAT_VERSION, WeightsDigests
from wan_dist.planning.plan import make_plan
from wan_dist.runtime.log import logger

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _a_log_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@cache
def first_config() -> RunConfig:
    config = compose_config(
        prepare_arguments(
            ["task=toy", "prompt=a ball", "seed=7", "size=64*64", "frame_num=5", "output.name=clip"]
        )
    )
    assert config is not None
    return config


def kept(folder: Path, *, is_job: bool = False, **settings: object) -> ResumeState:
    config = override_config(
        first_config(), [(key, value, f"{key}={value}") for key, value in settings.items()]
    )
    return ResumeState(
        folder, config, make_plan(config), WeightsDigests("all", "vae"), is_job=is_job
    )


def progress(num_done: int = 3) -> DenoisingProgress:
    return DenoisingProgress(
        num_done, torch.randn(16, 2, 8, 8), {"start": torch.randn(1, 16, 2, 8, 8)}
    )


def num_done(one: ResumeState) -> int:
    one.restore(Axis(), CPU)
    one.locks.close()
    return one.progress.num_done


def state_in(folder: Path) -> Path:
    (file,) = folder.glob("*.state.safetensors")
    return file


@pytest.mark.parametrize("is_job", [False, True])
@pytest.mark.parametrize(
    "cut", [lambda size: 0, lambda size: 5, lambda size: 60, lambda size: size - 1]
)
def test_a_state_that_is_cut_short_is_set_aside(
    cut: Callable[[int], int], is_job: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = kept(tmp_path, is_job=is_job)
    assert first.save_progress(progress())
    file = state_in(tmp_path)
    os.truncate(file, cut(file.stat().st_size))
    again = kept(tmp_path, is_job=is_job)
    assert num_done(again) == 0
    assert (again.plan.seed, again.plan.name, again.progress.latents) == (7, "clip", None)
    (warning,) = warnings_in(caplog)
    assert warning.startswith(f"{file} is damaged (")
    assert warning.endswith(f"it is kept as {file.name}.damaged, and its steps are computed again")
    assert {path.name for path in tmp_path.iterdir()} - {".jobs.lock"} == {f"{file.name}.damaged"}
    assert again.save_progress(progress(5))
    assert num_done(kept(tmp_path, is_job=True)) == 5


def test_a_state_of_other_contents_is_not_gone_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = kept(tmp_path, is_job=True)
    for facts in (
        first.metadata | {"digest": "0123456789ab", "num_done": "3"},
        {},
        first.metadata,
    ):  # another's, nobody's, one without steps
        save_file(
            {"latents": torch.zeros(1)},
            tmp_path / f"clip.{first.latents_digest}.state.safetensors",
            facts,
        )
        assert num_done(kept(tmp_path, is_job=True)) == 0
    assert not warnings_in(caplog)


def test_a_newer_state_replaces_the_older_one(tmp_path: Path) -> None:
    for number in (2, 4):
        assert kept(tmp_path).save_progress(progress(number))
        assert num_done(kept(tmp_path)) == number
    assert [path.name for path in tmp_path.iterdir() if path.name != ".jobs.lock"] == [
        state_in(tmp_path).name
    ]


def test_progress_in_use_by_another_run_is_not_taken(tmp_path: Path) -> None:
    assert kept(tmp_path).save_progress(progress())
    other = ResultLocks(tmp_path)
    assert other.acquire("clip")
    assert num_done(kept(tmp_path)) == 0
    other.close()
    assert num_done(kept(tmp_path)) == 3


def keep_latents(folder: Path, of: ResumeState) -> torch.Tensor:
    latents = torch.randn(16, 2, 8, 8)
    save_tensors(folder / "clip.latents.safetensors", {"latents": latents}, of.metadata)
    return latents


@pytest.mark.parametrize(
    "settings", [{"fps": 8}, {"output.save_tensor": True}, {"memory.dit": "stream"}]
)
def test_latents_of_a_job_are_taken_where_only_its_frames_change(
    settings: dict[str, object], tmp_path: Path
) -> None:
    first = kept(tmp_path, is_job=True)
    latents = keep_latents(tmp_path, first)
    (tmp_path / "clip.json").write_text("{}")
    again = kept(tmp_path, is_job=True, **settings)
    assert (again.result_digest == first.result_digest) == ("memory.dit" in settings)
    assert num_done(again) == again.config.sample.steps
    assert again.progress.latents is not None
    assert torch.equal(again.progress.latents, latents)
    for key, value in {
        "seed": 8,
        "prompt": "a cube",
        "sample.steps": 9,
        "output.name": "other",
    }.items():
        assert num_done(kept(tmp_path, is_job=True, **settings, **{key: value})) == 0
    assert (
        num_done(kept(tmp_path, **settings)) == 0
    )  # a single run that is done is made again when it is asked for again


def test_latents_of_a_single_run_are_taken_if_it_was_not_finished(tmp_path: Path) -> None:
    latents = keep_latents(tmp_path, kept(tmp_path))
    other = ResultLocks(tmp_path)
    assert other.acquire("clip")
    assert num_done(kept(tmp_path)) == 0  # it is being finished
    other.close()
    again = kept(tmp_path)
    assert num_done(again) == again.config.sample.steps
    assert again.progress.latents is not None
    assert torch.equal(again.progress.latents, latents)


def test_damaged_latents_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep_latents(tmp_path, kept(tmp_path, is_job=True))
    file = tmp_path / "clip.latents.safetensors"
    os.truncate(file, 3000)
    assert num_done(kept(tmp_path, is_job=True)) == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{file.name}.damaged"]
    assert len(warnings_in(caplog)) == 1


def test_states_of_an_earlier_version_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert kept(tmp_path).save_progress(progress())
    (tmp_path / "cut.0123456789ab.state.safetensors").write_bytes(b"")
    warn_about_old_states(tmp_path)
    assert not warnings_in(caplog)
    older = [tmp_path / f"{name}.0123456789ab.state.safetensors" for name in ("a", "b")]
    for file, facts in zip(
        older,
        ({"num_done": "3"}, {"num_done": "3", "format": str(FORMAT_VERSION - 1)}),
        strict=True,
    ):
        save_file({"latents": torch.zeros(1)}, file, facts)
    warn_about_old_states(tmp_path)
    said = "was saved by an earlier version of wan-dist, which alone can resume from it; "
    said += "use that version, or remove the file"
    assert sorted(warnings_in(caplog)) == [f"{file} {said}" for file in older]


def test_a_full_disk_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    assert kept(tmp_path).save_progress(progress())
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        assert not kept(tmp_path).save_progress(progress(5))
    (warning,) = warnings_in(caplog)
    assert warning.startswith("the progress cannot be saved: cannot write ")
    assert "No space left on device" in warning
    assert [path.name for path in tmp_path.iterdir()] == [state_in(tmp_path).name]
    assert num_done(kept(tmp_path)) == 3


def test_an_image_that_is_gone_keeps_no_progress(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    first = kept(tmp_path, image=str(tmp_path / "a.png"))
    (tmp_path / "a.png").unlink()
    assert not first.save_progress(progress())
    assert warnings_in(caplog) == [
        f"the progress cannot be saved: image={tmp_path / 'a.png'} cannot be read: No such file or directory"
    ]
