"""Videos of several clips: each further one starts from the last frame of the one before."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import FIXTURES, golden_folder
from tests.forked import run_forked, run_ranks
from tests.test_batch import write_jobs
from tests.test_command import reference_arguments
from tests.test_preemption import start
from wan_dist.models.vae.video_state import VideoState
from wan_dist.output.video_file import VideoWriter, save_video
from wan_dist.pipeline.conditioning import image, known_first_frame
from wan_dist.pipeline.decode import convert_to_uint8_frames
from wan_dist.run import main
from wan_dist.runtime.ffmpeg import read_comment

IMAGE = FIXTURES / "circle.png"
TOY = [
    *("task=toy", "dtype=float32", "device=cpu", "size=80*48", "frame_num=5", "sample.steps=3"),
    *("prompt=a ball", "seed=7", "cache.dir=null", f"image={IMAGE}", "output.save_tensor=true"),
]


def frames_of(file: Path) -> torch.Tensor:
    """Return the frames (3, F, H, W) of a video, whose file is what they give in one piece."""
    frames = load_file(file.with_suffix(".safetensors"))["video"]
    expected_file = file.with_name(".expected.mp4")
    video = file.with_suffix(".mp4")
    save_video(
        expected_file,
        [convert_to_uint8_frames(frames)],
        fps=16,
        num_frames=frames.shape[1],
        comment=read_comment(video),
    )
    assert video.read_bytes() == expected_file.read_bytes()
    expected_file.unlink()
    return frames


def start_from(frame: torch.Tensor, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have runs start from a frame (3, H, W) in float32, which no image file has, instead of their image."""
    monkeypatch.setattr(module, "convert_image_to_tensor", lambda _: frame)


def names_in(folder: Path, *left_out: str) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*") if path.name not in left_out)


@pytest.fixture(scope="module")
def three_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a video of three clips, made in one go."""
    folder = tmp_path_factory.mktemp("clips")
    with torch.no_grad():
        assert main([*TOY, "clips=3", f"output.dir={folder}", "output.name=clip"]) == 0
    return folder


def test_models_are_loaded_once_for_all_clips(three_clips: Path) -> None:
    record = json.loads((three_clips / "clip.json").read_text(encoding="utf-8"))
    assert [name for name in record["stages"] if name.startswith("load")] == ["load"]
    assert "denoise clip3" in record["stages"]


def test_a_further_clip_is_what_a_run_from_the_last_frame_gives(
    three_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand: list[torch.Tensor] = []
    for number, seed in enumerate((7, 8, 9)):
        name = f"by-hand-{number}"
        assert main([*TOY, f"seed={seed}", f"output.dir={tmp_path}", f"output.name={name}"]) == 0
        made = frames_of(tmp_path / f"{name}.mp4")
        by_hand.append(made[:, 1:] if number else made)
        start_from(made[:, -1], known_first_frame, monkeypatch)
    frames = frames_of(three_clips / "clip.mp4")
    assert frames.shape == (3, 13, 48, 80)
    torch.testing.assert_close(frames, torch.cat(by_hand, dim=1), rtol=0, atol=1e-5)
    assert not torch.allclose(frames[:, 5:9], frames[:, 9:13], atol=1e-2)


def test_latents_of_each_clip_and_one_record_are_saved(three_clips: Path, tmp_path: Path) -> None:
    assert names_in(three_clips) == [
        *("clip.clip2.latents.safetensors", "clip.clip3.latents.safetensors", "clip.json"),
        *("clip.latents.safetensors", "clip.mp4", "clip.safetensors"),
    ]
    record = json.loads((three_clips / "clip.json").read_text())
    assert (record["num_clips"], record["num_frames"], record["seed"]) == (3, 13, 7)
    assert {"text", "denoise", "denoise clip2", "decode clip3"} <= set(record["stages"])
    denoise_seconds = sum(
        stage["seconds"] for name, stage in record["stages"].items() if name.startswith("denoise")
    )
    assert record["step_seconds"] == pytest.approx(denoise_seconds / 9, abs=1e-3)
    latents = three_clips / "clip.clip2.latents.safetensors"
    settings = ["task=toy", "dtype=float32", "device=cpu", "output.save_tensor=true"]
    assert main([*settings, f"latents={latents}", f"output.dir={tmp_path}"]) == 0
    torch.testing.assert_close(
        frames_of(tmp_path / "clip.clip2.mp4")[:, 1:],
        frames_of(three_clips / "clip.mp4")[:, 5:9],
        rtol=0,
        atol=1e-5,
    )


def test_latents_that_are_not_wanted_are_removed(tmp_path: Path) -> None:
    settings = ["clips=2", f"output.dir={tmp_path}", "output.name=a", "output.save_latents=false"]
    assert main([*TOY, *settings]) == 0
    assert names_in(tmp_path) == ["a.json", "a.mp4", "a.safetensors"]


@pytest.mark.parametrize("spread", ["parallel.ulysses=2", "parallel.ring=2 fsdp.dit=true"])
def test_ranks_make_the_same_clips(spread: str, three_clips: Path, tmp_path: Path) -> None:
    settings = ["clips=3", f"output.dir={tmp_path}", "output.name=clip", *spread.split()]
    run_ranks(2, "wan_dist.run", *TOY, *settings)
    torch.testing.assert_close(
        frames_of(tmp_path / "clip.mp4"), frames_of(three_clips / "clip.mp4"), rtol=0, atol=1e-3
    )


def test_clips_start_from_text_where_an_image_is_optional(tmp_path: Path) -> None:
    settings = [setting for setting in TOY if not setting.startswith("image=")]
    assert main([*settings, "clips=2", f"output.dir={tmp_path}", "output.name=a"]) == 0
    assert frames_of(tmp_path / "a.mp4").shape[1] == 9
    stages = json.loads((tmp_path / "a.json").read_text())["stages"]
    assert "image" not in stages
    assert "image clip2" in stages


@pytest.mark.parametrize(
    ("task", "name"), [("i2v-14B", "wan2.1-i2v"), ("i2v-A14B", "wan2.2-i2v-a14b")]
)
def test_tasks_with_image_channels_take_clips(
    task: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        *reference_arguments(golden_folder(name), "unipc", task),
        *("dtype=float32", "device=cpu", f"output.dir={tmp_path}", "cache.dir=null", "seed=3"),
    ]
    assert main([*arguments, "clips=2", "output.name=clips"]) == 0
    assert main([*arguments, "output.name=a"]) == 0
    first = load_file(tmp_path / "a.safetensors")["video"]
    start_from(first[:, -1], image, monkeypatch)
    assert main([*arguments, "seed=4", "output.name=b"]) == 0
    by_hand = torch.cat([first, load_file(tmp_path / "b.safetensors")["video"][:, 1:]], dim=1)
    made = load_file(tmp_path / "clips.safetensors")["video"]
    torch.testing.assert_close(made, by_hand, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_stopped_run_resumes_in_its_clip(
    num_ranks: int, three_clips: Path, tmp_path: Path
) -> None:
    """In a step of the second clip; one rank is also killed in the third, then stopped in decoding it."""
    settings = [*TOY, "clips=3", f"output.dir={tmp_path}", "output.name=clip"]
    said = [
        f"resume    clip {clip} continues from step {step} of 3 ("
        for clip, step in ((2, 2), (3, 0), (3, 3))
    ]
    moments = ["1 2", "1 1 SIGKILL", "decode 3"] if num_ranks == 1 else ["1 2"]
    for index, moment in enumerate(moments):
        command = ["tests.preempted", moment, "0", *settings]
        stopped = run_forked(*command) if num_ranks == 1 else start(num_ranks, *command)
        assert stopped.returncode != 0
        assert index == 0 or said[index - 1] in stopped.stderr, stopped.stderr[-3000:]
        assert not list(tmp_path.glob("[!.]*.mp4"))
        assert len(list(tmp_path.glob("clip.*.state.safetensors"))) == 1
    last, *_ = run_ranks(num_ranks, "wan_dist.run", *settings)
    assert said[len(moments) - 1] in last.stderr
    stages = json.loads((tmp_path / "clip.json").read_text(encoding="utf-8"))["stages"]
    num_denoised = sum(name.startswith("denoise") for name in stages)
    assert num_denoised == (0 if num_ranks == 1 else 2)
    assert not list(tmp_path.glob(".*.partial*"))
    assert names_in(tmp_path, "logs") == names_in(three_clips)
    torch.testing.assert_close(
        frames_of(tmp_path / "clip.mp4"),
        frames_of(three_clips / "clip.mp4"),
        rtol=0,
        atol=1e-5 if num_ranks == 1 else 1e-3,
    )


@pytest.mark.parametrize("has_memory_for_frames", [True, False])
def test_jobs_take_clips(
    has_memory_for_frames: bool,
    three_clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wan_dist.jobs.worker.can_buffer_frames", lambda *_: has_memory_for_frames)
    jobs: list[dict[str, object]] = [{"name": "clip", "clips": 3}, {"name": "one"}]
    settings = [write_jobs(tmp_path / "jobs.jsonl", jobs), f"output.dir={tmp_path / 'out'}"]
    assert main([*TOY, *settings]) == 0
    expected = frames_of(three_clips / "clip.mp4")
    made = frames_of(tmp_path / "out/clip.mp4")
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    one = frames_of(tmp_path / "out/one.mp4")
    torch.testing.assert_close(one, expected[:, :5], rtol=0, atol=1e-5)
    record = json.loads((tmp_path / "out/clip.json").read_text())
    assert ("save clip3" in record["stages"]) is has_memory_for_frames
    assert main([*TOY, *settings, "fps=8", "output.save_tensor=false"]) == 0
    again = json.loads((tmp_path / "out/clip.json").read_text())
    assert not [stage for stage in again["stages"] if stage.startswith("denoise")]


def test_a_decoder_without_memory_writes_no_frame_twice(
    three_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wan_dist.models.vae.model import Decoder

    compute, tries = Decoder.compute_frames, []

    def scarce(self: Decoder, x: torch.Tensor, state: VideoState) -> torch.Tensor:
        if state.past_frames:  # the second chunk of a clip
            tries.append(state)
            if len(tries) == 2:
                raise torch.OutOfMemoryError("as on a GPU that is full")
        return compute(self, x, state)

    monkeypatch.setattr(Decoder, "compute_frames", scarce)
    assert main([*TOY, "clips=3", f"output.dir={tmp_path}", "output.name=clip"]) == 0
    record = json.loads((tmp_path / "clip.json").read_text())
    assert record["ran_out"] == ["decode"]
    torch.testing.assert_close(
        frames_of(tmp_path / "clip.mp4"), frames_of(three_clips / "clip.mp4"), rtol=0, atol=1e-4
    )


def test_a_failed_write_says_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*TOY, "clips=2", f"output.dir={tmp_path}", "output.name=clip"]

    class FullWriter(VideoWriter):
        def finish(self) -> None:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("wan_dist.output.result_writer.VideoWriter", FullWriter)
        assert main(settings) == 1
    assert (
        "the latents are saved; run the same command again to continue" in capsys.readouterr().err
    )
    assert not list(tmp_path.glob(".*.partial*"))
    monkeypatch.setattr(
        "wan_dist.pipeline.denoise.encode_conditioning",
        lambda *_: pytest.fail("it has its latents"),
    )
    assert main(settings) == 0
    assert frames_of(tmp_path / "clip.mp4").shape[1] == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["task=t2v-14B"], "further clips start from one image, and t2v-14B takes no image; "),
        (["task=t2i-14B"], "i2v-14B, i2v-A14B, ti2v-5B, toy take clips"),
        (
            ["task=flf2v-14B", "first_frame=a.png", "last_frame=b.png"],
            "flf2v-14B takes first_frame=FILE last_frame=FILE; i2v-14B",
        ),
        (["task=toy", "frame_num=1"], "so they need frame_num=5 or more"),
        (["task=toy", "latents=a.latents.safetensors"], "are those of one clip; leave clips out"),
        (["task=toy", "clips=0"], "clips=0 must be at least 1"),
        (["task=toy", "clips=1000000"], "frames are not made in one video"),
    ],
)
def test_clips_that_cannot_be_made_are_refused(
    settings: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["clips=2", "prompt=x", *settings, f"output.dir={tmp_path}"]) == 2
    assert message in capsys.readouterr().err
