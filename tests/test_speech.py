"""Speech to video through the command, against the reference's videos; sound and poses at their times."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

import wan_dist
from tests.conftest import golden_folder, relative_error
from tests.forked import run_forked
from tests.test_batch import write_jobs
from tests.test_command import reference_arguments
from tests.unit.models.test_audio_encoder import write_wav
from tests.weight_files import write_gguf
from wan_dist.pipeline.monitor import VideoMonitor
from wan_dist.run import main
from wan_dist.runtime.ffmpeg import read_packets
from wan_dist.tasks.registry import TASKS
from wan_dist.tasks.sound import read_sound, read_speech_samples
from wan_dist.weights.download_patterns import list_download_patterns

GOLDEN = "wan2.2-s2v"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wan_dist"])


def list_settings(case: str) -> list[str]:
    """Return the arguments of a run of the reference."""
    folder = golden_folder(GOLDEN)
    arguments = reference_arguments(folder, case, "s2v-14B")
    return [*arguments, "dtype=float32", "device=cpu", "cache.dir=null", "output.dir=out"]


def list_quick_settings() -> list[str]:
    """Return those of a short run."""
    return [*list_settings("first"), "sample.steps=1", "sample.guide_scale=1", "num_clip=1"]


@pytest.mark.parametrize("case", ["unipc", "pose", "first", "long"])
def test_the_video_is_the_references(case: str) -> None:
    folder = golden_folder(GOLDEN) / "expected"
    run = json.loads((folder / f"{case}.json").read_text(encoding="utf-8"))
    assert main(list_settings(case)) == 0
    video = load_file("out/out.safetensors")["video"]
    assert video.shape[1] == run["frames"]
    if "stored_frames" in run:
        video = video[:, run["stored_frames"]]
    golden = load_file(folder / f"{case}.safetensors")
    torch.testing.assert_close(video, golden["video"], rtol=0, atol=1e-3)
    for clip in range(run["clips"]):
        # Before a clip's latents are those of the history, or of the picture where there is none.
        name = f"clip{clip}.motion_latents"
        context = golden[name if name in golden else "input.ref_latents"]
        file = f"out/out{f'.clip{clip + 1}' if clip else ''}.latents.safetensors"
        saved = load_file(file)["latents"][:, : context.shape[1]]
        assert relative_error(saved, context) < 1e-5


def test_five_clips_that_are_stopped_twice_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    """Within a clip, and between two."""
    settings = [
        *list_settings("first"),
        f"audio={golden_folder(GOLDEN) / 'long.wav'}",
        "num_clip=5",
    ]
    settings += ["start_from_ref=false", "sync=exact"]
    whole, stopped = ([*settings, f"output.dir={tmp_path / name}"] for name in ("whole", "stopped"))
    assert run_forked("wan_dist.run", *whole).returncode == 0
    for moment, continued in (("0 3", ""), ("decode 4", "clip 3 continues from step 1 of 2")):
        ended = run_forked("tests.preempted", moment, "0", *stopped)
        assert ended.returncode == 75, ended.stderr
        assert continued in ended.stderr
        assert not (tmp_path / "stopped/out.mp4").exists()
    resumed = run_forked("wan_dist.run", *stopped)
    assert resumed.returncode == 0, resumed.stderr
    assert "clip 4 continues from step 2 of 2" in resumed.stderr
    tensor_files = sorted(path.name for path in (tmp_path / "whole").glob("out*.safetensors"))
    assert len(tensor_files) == 6  # of each clip the latents, and the video
    for name in tensor_files:
        made, expected = (load_file(tmp_path / folder / name) for folder in ("stopped", "whole"))
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[key], expected[key]) for key in made), name
    videos = [(tmp_path / folder / "out.mp4").read_bytes() for folder in ("stopped", "whole")]
    assert videos[0] == videos[1]


def test_a_further_clip_is_previewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latents that are decoded before it are none of its own."""
    written: list[int] = []
    monkeypatch.setattr(
        VideoMonitor, "record_preview", lambda *arguments: written.append(arguments[2])
    )
    settings = [setting for setting in list_quick_settings() if not setting.startswith("num_clip=")]
    assert main([*settings, "num_clip=2", "output.preview=true"]) == 0
    assert written == [0, 1]


def write_click(path: Path, seconds: float, click_seconds: float) -> Path:
    """Write silence with a click in it."""
    samples = np.zeros((int(seconds * 16000), 1))
    start = int(click_seconds * 16000)
    samples[start : start + 160] = 0.9
    return write_wav(path, samples, 16000)


def find_click(video: Path) -> float:
    """Return when the click in a video's sound is heard, in seconds."""
    samples = np.abs(read_speech_samples(read_sound(str(video), "audio")))
    return float(np.flatnonzero(samples > 0.3)[0]) / 16000


@pytest.mark.parametrize(
    ("settings", "lead"),
    [
        (["start_from_ref=false", "sync=exact"], 0.1875),
        (["start_from_ref=false", "sync=reference"], 0.0),
        (["start_from_ref=true", "sync=exact"], 0.0),
    ],
)
def test_the_sound_is_under_its_picture(settings: list[str], lead: float, tmp_path: Path) -> None:
    """Frame 0 of the file is the fourth that is made, unless the video begins with the picture."""
    sound = write_click(tmp_path / "click.wav", 0.9, 0.5)
    arguments = [*list_quick_settings(), f"audio={sound}", "infer_frames=12", *settings]
    assert main(arguments) == 0
    # AAC spreads a click by a few milliseconds, and a player starts where the file's edit list says.
    assert find_click(Path("out/out.mp4")) == pytest.approx(0.5 - lead, abs=0.012)


@pytest.mark.parametrize(
    ("seconds", "settings", "num_made", "num_shown"),
    [
        (0.9, ["sync=exact"], 13, 12),  # from frame 3 to the end of 14.4
        (0.9, ["sync=reference"], 13, 13),
        (0.9, ["num_clip=1"], 5, 5),
        (0.9, ["start_from_ref=true"], 16, 15),
        (0.1, [], 5, 2),
        (0.19, ["sync=exact"], 5, 1),
    ],
)
def test_the_file_ends_with_the_sound_and_the_tensor_with_the_clips(
    seconds: float, settings: list[str], num_made: int, num_shown: int, tmp_path: Path
) -> None:
    sound = write_click(tmp_path / "click.wav", seconds, 0.05)
    quick = [*list_quick_settings(), "num_clip=null", "infer_frames=8", "start_from_ref=false"]
    assert main([*quick, f"audio={sound}", *settings]) == 0
    assert load_file("out/out.safetensors")["video"].shape[1] == num_made
    assert len(read_packets(Path("out/out.mp4")).intervals) == num_shown
    heard = read_sound("out/out.mp4", "audio").seconds
    assert heard == pytest.approx(num_shown / 16, abs=0.07)


def test_another_sync_decodes_the_same_latents_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = write_click(tmp_path / "click.wav", 0.9, 0.5)
    arguments = [
        *list_quick_settings(),
        f"audio={sound}",
        "infer_frames=12",
        "start_from_ref=false",
    ]
    assert main([*arguments, "sync=reference"]) == 0
    first = find_click(Path("out/out.mp4"))
    Path("out/out.json").unlink()
    capsys.readouterr()
    assert main([*arguments, "sync=exact"]) == 0
    assert "denoise  " not in capsys.readouterr().err
    assert first - find_click(Path("out/out.mp4")) == pytest.approx(0.1875, abs=0.012)


def test_jobs_share_a_sound_and_name_it_beside_their_file(tmp_path: Path) -> None:
    write_click(tmp_path / "click.wav", 0.6, 0.3)
    jobs: list[dict[str, Any]] = [
        {"prompt": "a", "audio": "click.wav", "seed": seed, "output.name": f"v{seed}"}
        for seed in (1, 2)
    ]
    quick = [
        setting
        for setting in list_quick_settings()
        if not setting.startswith(("audio=", "prompt="))
    ]
    quick.remove("output.name=out")
    arguments = [*quick, write_jobs(tmp_path / "jobs.jsonl", jobs)]
    assert main(arguments) == 0
    videos = [load_file(f"out/v{seed}.safetensors")["video"] for seed in (1, 2)]
    assert not torch.equal(*videos)
    assert all(read_sound(f"out/v{seed}.mp4", "audio").seconds > 0.2 for seed in (1, 2))


REFUSALS = [
    (["audio=null"], "audio is missing: s2v-14B takes image=FILE audio=FILE"),
    (["image=null"], "image is missing: s2v-14B takes image=FILE audio=FILE"),
    (["audio=gone.wav"], "audio=gone.wav: there is no such file"),
    (["audio=POSES"], "POSES cannot be read as sound"),
    (["pose_video=SOUND"], "cannot be read as a video"),
    (["fps=24"], "fps=24: s2v-14B makes 16 frames a second"),
    (["frame_num=81"], "frame_num=81: the length of a speaking picture follows from the sound"),
    (["clips=2"], "clips=2: further clips start from one image"),
    (
        ["infer_frames=10"],
        "infer_frames=10 is not a multiple of 4; the nearest that work are 8 and 12",
    ),
    (["infer_frames=0"], "infer_frames=0 is not a multiple of 4"),
    (["num_clip=0"], "num_clip=0 must be at least 1"),
    (["sync=late"], "sync=late is not one of exact, reference"),
    (["max_area=4095"], "an area of 4095 pixels is too small for a picture of 150x90"),
    (["task=i2v-14B", "audio=null"], "infer_frames=4 and start_from_ref=true and sync=reference"),
    (["task=t2v-14B", "image=null"], "audio is given, but t2v-14B takes no image; s2v-14B would"),
    (["src_video=x.mp4"], "src_video is given, but s2v-14B takes image=FILE audio=FILE"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSALS)
def test_what_does_not_fit_is_refused(
    settings: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = golden_folder(GOLDEN)
    files = {"POSES": str(folder / "pose.mp4"), "SOUND": str(folder / "talk.wav")}
    for name, file in files.items():
        settings = [setting.replace(name, file) for setting in settings]
        message = message.replace(name, file)
    arguments = [
        setting for setting in list_settings("first") if not setting.startswith("num_clip")
    ]
    if settings == ["task=t2v-14B", "image=null"]:
        defaults = ("infer_frames=80", "start_from_ref=false", "sync=exact")
        settings = [*settings, *defaults, "max_area=null"]
    if settings == ["task=i2v-14B", "audio=null"]:
        settings = [*settings, "max_area=null"]
    assert main([*arguments, *settings]) == 2
    assert message in capsys.readouterr().err


def test_a_sound_that_is_too_short_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = write_click(tmp_path / "click.wav", 0.05, 0.01)
    arguments = [*list_settings("first"), f"audio={sound}"]
    assert main(arguments) == 2
    assert "has 0.050 s of sound; more than 0.05 s are needed" in capsys.readouterr().err
    sound = write_click(tmp_path / "click.wav", 0.18, 0.01)  # before the first frame that is shown
    assert main([*arguments, "sync=exact", "start_from_ref=false"]) == 2
    assert "has 0.180 s of sound; more than 0.1875 s are needed" in capsys.readouterr().err


def test_a_checkpoint_without_its_audio_encoder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in golden_folder(GOLDEN).iterdir():
        if not file.name.startswith("wav2vec2"):
            (folder / file.name).symlink_to(file)
    assert main([*list_settings("first"), f"ckpt_dir={folder}"]) == 2
    assert "it has no wav2vec2-large-xlsr-53-english/config.json" in capsys.readouterr().err


def test_bars_and_times_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*list_settings("pose"), "num_clip=1", "sample.steps=1"]) == 0
    told = capsys.readouterr().err
    assert "s2v-14B: 5 frames of 128x64" in told
    assert "audio has 0.60 s, which take 2 clips of 8 frames, and 1 are made" in told
    assert "sync=reference: the picture runs 187.5 ms ahead of the sound" in told
    assert "pose_video has 1.00 s in 24 frames" in told
    assert "the picture of 150x90 is shown with black columns of 11 and 11 at its sides" in told


def test_a_lora_changes_the_sounds_projection_and_the_blocks(tmp_path: Path) -> None:
    """The same as a file of the transformer with its changes; wav2vec2 is still the folder's."""
    folder = golden_folder(GOLDEN)
    weights = {
        key: value
        for file in sorted(folder.glob("diffusion_pytorch_model-*.safetensors"))
        for key, value in load_file(file).items()
    }
    generator = torch.Generator().manual_seed(1)
    names = ["blocks.1.self_attn.q", "audio_injector.injector.1.k", "audio_injector.injector.0.o"]
    names += ["audio_injector.injector_adain_layers.0.linear"]
    lora = {}
    for name in names:
        rows, columns = weights[f"{name}.weight"].shape
        down, up = (
            torch.randn(shape, generator=generator) * 0.3 for shape in ((2, columns), (rows, 2))
        )
        lora |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + up @ down
    save_file(lora, tmp_path / "lora.safetensors")
    save_file(weights, tmp_path / "merged.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    videos = []
    for setting in (
        "lora=null",
        f"lora={tmp_path / 'lora.safetensors'}",
        f"dit_file={tmp_path / 'merged.safetensors'}",
    ):
        out = f"output.dir=out{len(videos)}"
        assert main([*list_quick_settings(), setting, out]) == 0
        videos.append(load_file(f"out{len(videos)}/out.safetensors")["video"])
    torch.testing.assert_close(videos[1], videos[2], rtol=0, atol=1e-4)
    assert (videos[0] - videos[1]).abs().max() > 0.01


def test_quantised_and_streamed_blocks_are_the_resident_ones() -> None:
    videos = []
    for more in (["quant=int8"], ["quant=int8", "memory.dit=stream", "memory.slice_tokens=7"]):
        out = f"output.dir=out{len(videos)}"
        assert main([*list_quick_settings(), *more, out]) == 0
        videos.append(load_file(f"out{len(videos)}/out.safetensors")["video"])
    torch.testing.assert_close(*videos, rtol=0, atol=1e-4)


def test_saved_latents_of_a_clip_are_decoded_with_what_they_depend_on() -> None:
    """Of the first clip of a video that begins with the picture: 73 frames before it."""
    assert main(list_quick_settings()) == 0
    made = load_file("out/out.safetensors")["video"]
    (latents,) = Path("out").glob("*.latents.safetensors")
    again = ["task=s2v-14B", f"ckpt_dir={golden_folder(GOLDEN)}", f"latents={latents}"]
    again += ["dtype=float32", "device=cpu", "output.dir=again", "output.name=out"]
    assert main([*again, "output.save_tensor=true"]) == 0
    decoded = load_file("again/out.safetensors")["video"]
    assert decoded.shape[1] == 73 + made.shape[1]
    torch.testing.assert_close(decoded[:, 73:], made)


@pytest.mark.parametrize("writes_output", [True, False])
def test_python_gets_all_frames_and_saves_the_sound(writes_output: bool, tmp_path: Path) -> None:
    folder = golden_folder(GOLDEN)
    sound = write_click(tmp_path / "click.wav", 0.9, 0.5)
    settings: dict[str, Any] = {
        "image": folder / "input.png",
        "max_area": 4096,
        "infer_frames": 8,
        "sample": {"steps": 1, "guide_scale": 1},
        "audio": sound,
    }
    if writes_output:
        settings["output"] = {"dir": tmp_path / "called", "name": "a"}
    options = {"dtype": "float32", "device": "cpu", "cache": {"dir": None}}
    with wan_dist.open_pipeline("s2v-14B", ckpt_dir=folder, **options) as pipeline:
        videos = [pipeline("a man speaks", seed=seed, **settings) for seed in (1, 2)]
    assert "listen" in videos[0].record.stages
    assert "listen" not in videos[1].record.stages  # the same sound
    assert videos[0].frames is not None
    assert videos[0].frames.shape == (13, 64, 64, 3)
    assert not np.array_equal(videos[0].frames, videos[1].frames)
    videos[0].save(tmp_path / "saved.mp4")
    files = [tmp_path / "saved.mp4", *(tmp_path / "called").glob("a*.mp4")]
    assert len(files) == (2 if writes_output else 1)
    for file in files:
        assert len(read_packets(file).intervals) == 12
        assert find_click(file) == pytest.approx(0.5 - 0.1875, abs=0.012)


def test_comfyui_keeps_the_audio_encoder_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """In half precision, without a config."""
    folder = golden_folder(GOLDEN)
    parts = sorted(folder.glob("diffusion_pytorch_model-*.safetensors"))
    transformer = {key: value for file in parts for key, value in load_file(file).items()}
    models = tmp_path / "models"
    for name in ("diffusion_models", "text_encoders", "vae", "audio_encoders"):
        (models / name).mkdir(parents=True)
    save_file(transformer, models / "diffusion_models/s2v.safetensors")
    (models / "diffusion_models/config.json").write_bytes((folder / "config.json").read_bytes())
    (models / "text_encoders/umt5.pth").symlink_to(folder / "models_t5_umt5-xxl-enc-bf16.pth")
    (models / "vae/wan.pth").symlink_to(folder / "Wan2.1_VAE.pth")
    (models / "google").symlink_to(folder / "google")
    audio_encoder = load_file(folder / "wav2vec2-large-xlsr-53-english/model.safetensors")
    halves = {key: value.half() for key, value in audio_encoder.items()}
    save_file(halves, models / "audio_encoders/wav2vec2_large_english_fp16.safetensors")
    videos = []
    for ckpt_dir in (folder, models):
        out = f"output.dir=out{len(videos)}"
        assert main([*list_quick_settings(), f"ckpt_dir={ckpt_dir}", out]) == 0
        videos.append(load_file(f"out{len(videos)}/out.safetensors")["video"])
    # Its two heads are not in a file without a config, which takes them to be 64 wide: one here.
    assert 0 < (videos[0] - videos[1]).abs().max() < 0.5


def test_what_is_downloaded_has_the_audio_encoder_and_no_more_of_its_folder() -> None:
    patterns = list_download_patterns(TASKS["s2v-14B"])
    wav2vec2 = [pattern for pattern in patterns if pattern.startswith("wav2vec2")]
    names = ("config.json", "model.safetensors")
    assert wav2vec2 == [f"wav2vec2-large-xlsr-53-english/{name}" for name in names]
    assert "config.json" in patterns
    assert "models_clip" not in " ".join(patterns)


def test_gguf_with_compressed_audio_layers(tmp_path: Path) -> None:
    """Decoded as it is read, and kept in the file's blocks, it gives the same bit for bit."""
    folder = golden_folder(GOLDEN)
    parts = sorted(folder.glob("diffusion_pytorch_model-*.safetensors"))
    transformer = {key: value for file in parts for key, value in load_file(file).items()}

    def choose_type(name: str, value: torch.Tensor) -> GgmlType:
        is_linear = value.dim() == 2 and re.search(r"_attn\.|injector\.", name)
        return GgmlType.Q8_0 if is_linear else GgmlType.F32

    five_dims = {name: value for name, value in transformer.items() if value.dim() > 4}

    def add_shapes(writer: GGUFWriter) -> None:
        for name, value in five_dims.items():
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(value.shape))

    flat = {name: value.flatten(1) for name, value in five_dims.items()}
    write_gguf(tmp_path / "s2v.gguf", transformer | flat, "wan", choose_type, add_shapes)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    videos = []
    for kept in ("decoded", "compressed"):
        more = [f"dit_file={tmp_path / 's2v.gguf'}", f"memory.gguf={kept}", f"output.dir={kept}"]
        assert main([*list_quick_settings(), *more]) == 0
        videos.append(load_file(f"{kept}/out.safetensors")["video"])
    assert torch.equal(*videos)
