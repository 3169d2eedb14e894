"""Whole runs through the command, as a user types it, against the reference implementation's videos."""

import json
import re
import shlex
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import FIXTURES, golden_folder
from tests.forked import run_ranks
from tests.unit.output.test_video_file import read_video
from wan_dist.config.schema import list_settings
from wan_dist.models.vae.video_state import VideoState
from wan_dist.output.result_writer import ResultWriter
from wan_dist.output.video_file import SaveError
from wan_dist.run import main
from wan_dist.tasks.registry import TASKS

CHECKPOINT = FIXTURES / "wan2.1-t2v"
TINY = ["task=toy", "size=64*48", "frame_num=5", "sample.steps=2"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wan_dist"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def list_speech_settings(run: dict) -> list[str]:
    """Return the settings of a run of speech to video."""
    num_clip = "null" if run["num_clip"] is None else run["num_clip"]
    return [
        *(f"infer_frames={run['infer_frames']}", f"num_clip={num_clip}", "sync=reference"),
        f"start_from_ref={str(run['start_from_ref']).lower()}",
    ]


def reference_arguments(
    folder: Path, case: str, task: str, checkpoint: Path | None = None
) -> list[str]:
    """Return the command's arguments for a run of the reference implementation, with its checkpoint
    or another copy of that.
    """
    run = json.loads((folder / f"expected/{case}.json").read_text(encoding="utf-8"))
    scale = (
        run["guide_scale"]
        if "guide_scale" in run
        else str(run["guide_scale_low_high"]).replace(" ", "")
    )
    images = {"image": "image", "first": "first_frame", "last": "last_frame"}
    images |= {key: key for key in ("src_video", "src_ref_images", "src_root_path")}
    images |= {key: key for key in ("audio", "pose_video") if run.get(key)}
    return [
        f"task={task}",
        f"ckpt_dir={checkpoint or folder / run.get('checkpoint', '')}",
        f"prompt={run['prompt']}",
        f"negative_prompt={run['negative_prompt']}",
        *(f"{ours}={folder / run[theirs]}" for theirs, ours in images.items() if theirs in run),
        f"max_area={run['max_area']}"
        if "max_area" in run
        else f"size={run['size_wh'][0]}*{run['size_wh'][1]}",
        *([f"frame_num={run['frame_num']}"] if "frame_num" in run else list_speech_settings(run)),
        f"seed={run['seed']}",
        f"sample.solver={run['solver']}",
        f"sample.steps={run['steps']}",
        f"sample.shift={run['shift']}",
        f"sample.guide_scale={scale}",
        f"context_scale={run.get('context_scale', 1.0)}",
        f"refert_num={run.get('refert_num', 1)}",
        f"replace_flag={str(run.get('replace_flag', False)).lower()}",
        "output.name=out",
        "output.save_tensor=true",
    ]


RUNS = [
    ("t2v-1.3B", "wan2.1-t2v", "unipc"),
    ("t2v-1.3B", "wan2.1-t2v", "dpmpp"),
    ("t2v-1.3B", "wan2.1-t2v", "odd"),
    ("i2v-14B", "wan2.1-i2v", "unipc"),
    ("i2v-14B", "wan2.1-i2v", "dpmpp"),
    ("flf2v-14B", "wan2.1-flf2v", "unipc"),
    ("t2v-A14B", "wan2.2-t2v-a14b", "unipc"),
    ("t2v-A14B", "wan2.2-t2v-a14b", "dpmpp"),
    ("i2v-A14B", "wan2.2-i2v-a14b", "unipc"),
    ("ti2v-5B", "wan2.2-ti2v-5b", "t2v"),
    ("ti2v-5B", "wan2.2-ti2v-5b", "i2v"),
]


@pytest.mark.parametrize(("task", "name", "case"), RUNS)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_video_is_the_reference_implementations(
    task: str, name: str, case: str, layout: str, tmp_path: Path
) -> None:
    folder = golden_folder(name)
    checkpoint = folder if layout == "original" else golden_folder("diffusers") / name
    if not checkpoint.exists():
        pytest.skip("there is no golden of this task in this layout")
    assert main([*reference_arguments(folder, case, task, checkpoint), "dtype=float32"]) == 0
    out = tmp_path / "outputs"
    video = load_file(out / "out.safetensors")["video"]
    expected = load_file(folder / f"expected/{case}.safetensors")["video"]
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-3)
    facts, frames = read_video(out / "out.mp4", width=video.shape[3], height=video.shape[2])
    assert f"{24 if task == 'ti2v-5B' else 16} fps" in facts
    assert frames.shape == (*video.shape[1:], 3)
    record = json.loads((out / "out.json").read_text(encoding="utf-8"))
    experts = (" high", " low") if TASKS[task].expert_boundary else ("",)
    stages = {"check", "text", "denoise", "decode"} | {
        f"{stage}{expert}" for stage in ("context", "load") for expert in experts
    }
    has_image = record["config"]["image"] or record["config"]["first_frame"]
    seen = (
        {"image"} | ({"look"} if TASKS[task].has_image_encoder else set()) if has_image else set()
    )
    assert set(record["stages"]) == stages | seen
    assert record["peak_host_gib"] > 0
    assert record["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("case", ["unipc", "dpmpp", "odd"])
def test_bfloat16_stays_close(case: str, tmp_path: Path) -> None:
    """Stated distance: a mean of 0.02 over frames that span [-1, 1], that is 2.5 of 255 levels."""
    assert main([*reference_arguments(CHECKPOINT, case, "t2v-1.3B"), "dtype=bfloat16"]) == 0
    video = load_file(tmp_path / "outputs/out.safetensors")["video"]
    expected = load_file(CHECKPOINT / f"expected/{case}.safetensors")["video"]
    distance = (video - expected).abs().mean().item()
    print(f"{case}: {distance:.4f}")
    assert distance < 0.02


def test_the_toy_needs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TINY) == 0
    names = sorted(
        path.name for path in (tmp_path / "outputs").iterdir() if not path.name.startswith(".")
    )
    stem = names[0].removesuffix(".json")
    assert re.fullmatch("toy_a-red-circle-moving-right-on-a-blue-back_42_[0-9a-f]{6}", stem)
    assert names == [f"{stem}.json", f"{stem}.latents.safetensors", f"{stem}.mp4"]
    older_record = json.loads((FIXTURES / "records/single.json").read_text())
    record = json.loads((tmp_path / f"outputs/{names[0]}").read_text())
    assert list(record) == list(older_record)
    told = capsys.readouterr().err
    assert "toy: 5 frames of 64x48 at 16 fps = 0.3 s of video, seed 42" in told
    assert "2/2 steps" in told
    assert "0.0" not in re.sub(r"s/it, .*|planned .*", "", told)  # no table of zeros
    assert all(
        re.match(r"\[\d\d:\d\d:\d\d\] [a-z]+ ", line)
        for line in told.split("\n")
        if line[:1] == "["
    )
    assert f"saved     outputs/{stem}.mp4" in told


def list_results(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*")}


@pytest.mark.parametrize("named", [[], ["output.name=mine"]])
def test_a_finished_run_started_again_says_so(
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is loaded, and no file changes; what was removed or asked for since is made."""
    outputs, settings = tmp_path / "outputs", [*TINY, *named]
    assert main([*settings, "output.save_latents=false"]) == 0
    assert main(settings) == 0  # with its latents now
    (latents,) = outputs.glob("*.latents.safetensors")
    result = outputs / latents.name.removesuffix(".latents.safetensors")
    digest = json.loads(result.with_suffix(".json").read_text())["digest"]
    capsys.readouterr()
    before = list_results(outputs)
    with monkeypatch.context() as patch:
        patch.setattr(
            "wan_dist.weights.component.Component.load",
            lambda *_, **__: pytest.fail("a model was loaded"),
        )
        assert main(settings) == 0
    told = capsys.readouterr().err
    assert f"done      outputs/{result.name}.mp4: " in told
    assert f"digest {digest}" in told
    assert "seed=" in told
    assert "output.name=" in told
    assert list_results(outputs) == before
    result.with_suffix(".mp4").write_bytes(b"cut short")
    assert main(settings) == 0
    assert list_results(outputs) != before


def test_a_finished_run_is_found_on_two_ranks(tmp_path: Path) -> None:
    first, again = (
        run_ranks(2, "wan_dist.run", *TINY, f"output.dir={tmp_path / 'outputs'}") for _ in range(2)
    )
    assert [one.returncode for one in (*first, *again)] == [0, 0, 0, 0]
    assert "the same settings" not in first[0].stderr
    assert [one.stderr.count("with the same settings") for one in again] == [1, 0]
    assert len(list((tmp_path / "outputs").glob("*.mp4"))) == 1


def test_a_made_up_name_never_overwrites(tmp_path: Path) -> None:
    """A video of other weights has another digest under the same name."""
    assert main(TINY) == 0
    (file,) = (tmp_path / "outputs").glob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"digest": "0123456789ab"}))
    for _ in range(2):  # the numbered one is found too
        assert main(TINY) == 0
        videos = {path.name for path in (tmp_path / "outputs").glob("*.mp4")}
        assert videos == {f"{file.stem}.mp4", f"{file.stem}_2.mp4"}
        assert len(list((tmp_path / "outputs").glob("*.latents.safetensors"))) == 2


def test_a_drawn_seed_gives_another_video_each_time(tmp_path: Path) -> None:
    seeds = set()
    for _ in range(2):
        assert main([*TINY, "output.name=mine", "seed=-1"]) == 0
        seeds.add(json.loads((tmp_path / "outputs/mine.json").read_text())["seed"])
    assert len(seeds) == 2


def test_the_same_seed_gives_the_same_video(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main([*TINY, f"output.name={name}", f"seed={seed}", "output.save_tensor=true"]) == 0
    a, b, c = (load_file(tmp_path / f"outputs/{name}.safetensors")["video"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_guidance_of_one_is_the_prompt_alone(tmp_path: Path) -> None:
    for name, negative in (("a", "x"), ("b", "something else")):
        assert (
            main(
                [
                    *TINY,
                    f"output.name={name}",
                    "sample.guide_scale=1",
                    f"negative_prompt={negative}",
                    "output.save_tensor=true",
                ]
            )
            == 0
        )
    assert torch.equal(
        *(load_file(tmp_path / f"outputs/{name}.safetensors")["video"] for name in "ab")
    )


def test_t2i_saves_a_png(tmp_path: Path) -> None:
    assert (
        main(
            [
                *(
                    a
                    for a in reference_arguments(CHECKPOINT, "unipc", "t2i-14B")
                    if not a.startswith("frame_num")
                ),
                "dtype=float32",
            ]
        )
        == 0
    )
    from PIL import Image

    with Image.open(tmp_path / "outputs/out.png") as image:
        assert image.size == (80, 48)
        first = image.tobytes()
    assert not list((tmp_path / "outputs").glob("*.mp4"))
    again = [f"from={tmp_path / 'outputs/out.png'}", f"output.dir={tmp_path / 'again'}"]
    assert main([*again, "device=cpu"]) == 0
    with Image.open(tmp_path / "again/out.png") as image:
        assert image.tobytes() == first


def test_a_failed_save_keeps_the_latents_and_says_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "output.name=whole", "output.save_tensor=true"]) == 0

    def fail(*_: object, **__: object) -> None:
        raise SaveError("cannot write: disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(ResultWriter, "write_clip", fail)
        video = ["output.name=two words", "output.video=prores"]
        assert main([*TINY, *video, "output.save_latents=false"]) == 1
    out = tmp_path / "outputs"
    assert sorted(path.name for path in out.glob("two*")) == ["two words.latents.safetensors"]
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith(
        "wan_dist: error: SaveError: cannot write: disk is full (in stage decode"
    )
    command = shlex.split(
        next(line for line in told.splitlines() if "the latents are saved" in line).partition(
            "with: "
        )[2]
    )
    assert command[:3] == ["python", "-m", "wan_dist.run"]
    assert main([*command[3:], "output.save_tensor=true"]) == 0
    again, whole = (
        load_file(out / f"{name}.safetensors")["video"] for name in ("two words", "whole")
    )
    assert torch.equal(again, whole)
    assert (out / "two words.mov").exists()


@pytest.mark.parametrize(("num_failing", "told"), [(1, "in 2 tiles"), (6, "on the CPU")])
def test_a_decoder_without_memory_falls_back(
    num_failing: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whole, in more and more tiles, on the CPU: the video is the same, and nothing is left of the
    tries before.
    """
    from wan_dist.models.vae.model import Decoder

    finish, tries = Decoder.compute_frames, []

    def scarce(self: Decoder, x: torch.Tensor, state: VideoState) -> torch.Tensor:
        if state.past_frames and state not in tries:  # its second chunk
            tries.append(state)
            if len(tries) <= num_failing:
                raise torch.OutOfMemoryError("as on a GPU that is full")
        return finish(self, x, state)

    settings = [*TINY, "size=256*32", "frame_num=9", "dtype=float32", "output.save_tensor=true"]
    assert main([*settings, "output.name=a"]) == 0
    monkeypatch.setattr(Decoder, "compute_frames", scarce)
    assert main([*settings, "output.name=b"]) == 0
    words = capsys.readouterr().err
    assert words.count("ran out of GPU memory; the latents are safe, trying") == num_failing
    assert f"trying {told}" in words
    assert [
        json.loads((tmp_path / f"outputs/{name}.json").read_text()).get("ran_out") for name in "ab"
    ] == [None, ["decode"]]
    expected, video = (
        load_file(tmp_path / f"outputs/{name}.safetensors")["video"] for name in "ab"
    )
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)
    assert (
        len(list((tmp_path / "outputs").glob("[!.]*"))) == 8
    )  # for each: video, record, latents, tensor


@pytest.mark.parametrize(
    "settings",
    [
        "memory.dit=stream",
        "memory.dit=disk memory.t5=stream memory.slice_tokens=16 memory.passes=apart",
        "memory.slice_tokens=1000 memory.t5=cpu",
    ],
)
def test_saving_memory_changes_no_bit(settings: str, tmp_path: Path) -> None:
    arguments = [
        *reference_arguments(CHECKPOINT, "unipc", "t2v-1.3B"),
        "dtype=float32",
        "cache.dir=null",
    ]
    assert main([*arguments, "output.dir=a"]) == 0
    assert main([*arguments, "output.dir=b", *settings.split()]) == 0
    videos = [load_file(tmp_path / folder / "out.safetensors")["video"] for folder in "ab"]
    assert torch.equal(*videos)


def test_a_prompt_seen_before_needs_no_text_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wan_dist.pipeline import text_embeddings

    settings = [*TINY, "output.save_tensor=true", "prompt=a red circle"]
    assert main([*settings, "output.name=a"]) == 0
    assert "from the cache" not in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(text_embeddings, "TextEncoder", None)
        assert main([*settings, "output.name=b"]) == 0
        assert (
            f"read from the cache in {tmp_path / 'cache/wan-dist/prompts'}"
            in capsys.readouterr().err
        )
        for changed in ("cache.dir=null", "cache.dir=other", "prompt=a blue circle"):
            assert main([*settings, changed]) == 1  # it is needed there
    videos = [load_file(tmp_path / f"outputs/{name}.safetensors")["video"] for name in "ab"]
    assert torch.equal(*videos)


def test_a_gpu_without_memory_denoises_with_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step that ran out is repeated, once a rung, and the video is the same."""
    from wan_dist.models.fused_block import FusedBlock

    attend, calls = FusedBlock._add_self_attention, []

    def scarce(self: FusedBlock, *arguments: object) -> object:
        calls.append(self.slice_tokens)
        if len(calls) in (6, 8, 10):  # in the second step, then at once, twice
            raise torch.OutOfMemoryError("as on a GPU that is full")
        return attend(self, *arguments)  # type: ignore[arg-type]

    settings = [*TINY, "output.save_tensor=true", "dtype=float32"]
    assert main([*settings, "output.name=a"]) == 0
    monkeypatch.setattr(FusedBlock, "_add_self_attention", scarce)
    assert main([*settings, "output.name=b"]) == 0
    words = capsys.readouterr().err
    told = [
        line.partition("repeated with the ")[2]
        for line in words.splitlines()
        if "ran out of GPU memory" in line
    ]
    resident = "transformer resident, 8192 tokens at a time"
    assert told == [
        resident,
        f"{resident}, passes apart",
        "transformer resident, 2048 tokens at a time, passes apart",
    ]
    taken = json.loads((tmp_path / "outputs/b.json").read_text())["stepped_down_to"]
    assert (taken["slice_tokens"], taken["passes"]) == (2048, "apart")
    videos = [load_file(tmp_path / f"outputs/{name}.safetensors")["video"] for name in "ab"]
    assert torch.equal(*videos)


@pytest.mark.parametrize(("kind", "guessed"), [("easy", 8), ("tea", 7)])
def test_guessed_steps_are_said_and_recorded(
    kind: str,
    guessed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from wan_dist.models.fused_block import FusedBlock

    forward, calls = FusedBlock.forward, []

    def counted(
        self: FusedBlock, streams: list[torch.Tensor], *arguments: Any
    ) -> list[torch.Tensor]:
        calls.append(len(arguments[1]))
        return forward(self, streams, *arguments)

    settings = [
        *TINY,
        "size=128*128",
        "sample.steps=12",
        "dtype=float32",
        "output.save_tensor=true",
    ]
    for name, more in {
        "all": [],
        "a": [f"cache.steps={kind}"],
        "b": [f"cache.steps={kind}", "memory.passes=apart"],
    }.items():
        monkeypatch.setattr(FusedBlock, "forward", counted)
        calls.clear()
        assert (
            main(
                [
                    *settings,
                    *more,
                    *(["cache.threshold=1e6"] if more else []),
                    f"output.name={name}",
                ]
            )
            == 0
        )
        num_steps = sum(calls) / 2 / TASKS["toy"].transformer_dims.num_layers  # of two passes
        assert num_steps == (12 - guessed if more else 12)
        if more:
            assert f"{guessed} of 12 steps were guessed" in capsys.readouterr().err
            assert (
                json.loads((tmp_path / f"outputs/{name}.json").read_text())["guessed_steps"]
                == guessed
            )
    everything, together, apart = (
        load_file(tmp_path / f"outputs/{name}.safetensors")["video"] for name in ("all", "a", "b")
    )
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    assert 0 < (together - everything).abs().mean() < 0.05  # another seed's video is 0.1 away


def test_a_gpu_that_is_too_small_is_told_what_would_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wan_dist.pipeline.predictor import ExpertPredictor

    def full(self: ExpertPredictor, *arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("as on a GPU that is full")

    monkeypatch.setattr(ExpertPredictor, "_open_with_arrangement", full)
    assert (
        main([*TINY, "memory.dit=stream", "memory.slice_tokens=2048", "memory.passes=apart"]) == 1
    )
    words = (
        "with the transformer streamed, 2048 tokens at a time, passes apart; "
        "memory.slice_tokens=512 would take less"
    )
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_black_video_is_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wan_dist.models.fused_transformer import FusedTransformer

    monkeypatch.setattr(
        FusedTransformer, "forward", lambda self, latents, *_: [latents * float("nan")] * 2
    )
    assert main(TINY) == 1
    assert "the latents are not finite after step 2" in capsys.readouterr().err
    assert not list((tmp_path / "outputs").glob("[!.]*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*TINY, "memory.vae=parallel"],
            "memory.vae=parallel cannot be used: there is one rank; use memory.vae=whole",
        ),
        (
            [*TINY, "memory.vae=tield"],
            "memory.vae=tield is not one of parallel, whole, tiled, cpu; did you mean 'tiled'?",
        ),
        (
            [*TINY, "memory.budget_gib=4", "device=cpu"],
            "memory.budget_gib=4.0 limits GPU memory, and this run is on the CPU",
        ),
        ([*TINY, "cache.steps=mag"], "cache.steps=mag is not one of easy, tea"),
        (
            ["task=t2v-A14B", "prompt=a", "cache.steps=tea"],
            "cache.steps=tea is fitted to the models of t2v-1.3B, t2v-14B, t2i-14B, i2v-14B, toy, "
            "not to that of t2v-A14B",
        ),
        ([*TINY, "cache.threshold=0"], "cache.threshold=0.0 must be above 0, e.g. 0.05"),
        (
            ["task=toy", "frame_num=abc"],
            "frame_num: Value 'abc' of type 'str' could not be converted to Integer",
        ),
        (["task=toy", "frame_num=80"], "the nearest that work are 77 and 81"),
        (["task=toy", "ckpt_dir=nowhere"], "ckpt_dir=nowhere is not a folder"),
        (
            ["task=toy", "ckpt_dir=."],
            "is not a complete toy checkpoint in the original layout: it has no config.json",
        ),
        (["task=toy", "output.dir=/proc/nowhere"], "output.dir=/proc/nowhere cannot be written"),
        (
            ["task=toy", "attention=fa4", "device=cpu"],
            "attention=fa4 does not work here: needs a GPU",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("wan_dist: error: ")
    assert message in last


def test_weights_are_not_read_before_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    from wan_dist.weights.files import TensorFiles

    for method in ("read", "read_rows"):
        monkeypatch.setattr(TensorFiles, method, lambda *_: pytest.fail("weights were read"))
    assert main([*TINY, "attention=cudnn", "device=cpu"]) == 2


@pytest.mark.parametrize(
    ("task", "name", "models"),
    [("toy", "", 4), ("i2v-14B", "wan2.1-i2v", 6), ("t2v-A14B", "wan2.2-t2v-a14b", 6)],
)
def test_models_are_on_the_device_one_after_the_other(
    task: str, name: str, models: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When one is loaded, the one before is gone from memory; so it is for two experts."""
    from wan_dist.weights.component import Component

    load, alive = Component.load, []

    def counted(self: Component, device: torch.device, **options: object) -> torch.nn.Module:
        assert not [ref() for ref in alive if ref() is not None]
        model = load(self, device, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Component, "load", counted)
    arguments = reference_arguments(golden_folder(name), "unipc", task) if name else TINY
    assert main(arguments) == 0
    assert len(alive) == models


def test_help_and_cfg(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert (
        told.index("\nRequired:\n  task ") < told.index("\n  prompt ") < told.index("\nGeneral:\n")
    )
    assert re.search(r"\n  sample\.solver .*\[unipc\]\n", told)
    assert all(told.count(f"\n  {key} ") == 1 for key in list_settings())
    assert "python -m wan_dist.run task=toy" in told
    assert main(["task=t2v-1.3B", "--cfg", "job", "prompt=a, b"]) == 0
    assert "prompt: a, b" in capsys.readouterr().out


def test_the_module_is_the_command(tmp_path: Path) -> None:
    """In a process of its own: the installed entry, its exit codes, and nothing left in the folder
    but the outputs.
    """
    command = [sys.executable, "-m", "wan_dist.run"]
    done = subprocess.run(
        [*command, *TINY, "prompt=it's one, two"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "outputs").glob("toy_it-s-one-two_42_*.mp4"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "outputs"]
    bad = subprocess.run(
        [*command, "task=toy", "nothing"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
