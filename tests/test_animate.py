"""Animate through the command, against the reference's videos."""

import json
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import wan_dist
from launch import plan
from tests.conftest import golden_folder, relative_error
from tests.forked import run_forked
from tests.gallery_folder import check_source
from wan_dist.config.loras import list_loras
from wan_dist.run import main
from wan_dist.tasks.animate import DrivingVideo, iterate_clip_frames
from wan_dist.tasks.run_config import read_config
from wan_dist.tasks.source_video import iterate_frames, read_video_facts

GOLDEN = "wan2.2-animate"
CASES = ["animate", "animate_ref5", "guided", "replace", "replace_relit"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wan_dist"])


def list_settings(case: str, layout: str = GOLDEN) -> list[str]:
    """Return the arguments of a run."""
    golden = golden_folder(GOLDEN)
    run = json.loads((golden / f"expected/{case}.json").read_text(encoding="utf-8"))
    loras = []
    if run["use_relighting_lora"]:
        loras = ["use_relighting_lora=true"]
    return [
        *("task=animate-14B", f"ckpt_dir={golden_folder(layout)}", f"prompt={run['prompt']}"),
        f"negative_prompt={run['negative_prompt']}",
        f"src_root_path={golden / run['src_root_path']}",
        *(f"replace_flag={str(run['replace_flag']).lower()}", *loras),
        *(f"frame_num={run['frame_num']}", f"refert_num={run['refert_num']}"),
        *(f"seed={run['seed']}", f"fps={run['fps']}", f"sample.steps={run['steps']}"),
        *(f"sample.shift={run['shift']}", f"sample.solver={run['solver']}"),
        f"sample.guide_scale={run['guide_scale']}",
        *("dtype=float32", "device=cpu", "cache.dir=null"),
        *("output.dir=out", "output.name=out", "output.save_tensor=true"),
    ]


def read_expected(case: str) -> torch.Tensor:
    return load_file(golden_folder(GOLDEN) / f"expected/{case}.safetensors")["video"]


@pytest.mark.parametrize("layout", [GOLDEN, f"diffusers/{GOLDEN}"])
@pytest.mark.parametrize("case", CASES)
def test_the_video_is_the_references(case: str, layout: str) -> None:
    settings = list_settings(case, layout)
    if "use_relighting_lora=true" in settings and layout != GOLDEN:
        settings.remove("use_relighting_lora=true")  # that repository has none
        settings.append(f"lora={golden_folder(GOLDEN) / 'relighting_lora.ckpt'}")
    assert main(settings) == 0
    video = load_file("out/out.safetensors")["video"]
    print((video - read_expected(case)).abs().max())
    torch.testing.assert_close(video, read_expected(case), rtol=0, atol=1e-3)
    check_source(Path("out"), settings)


def change_folder(tmp_path: Path, **files: str | None) -> Path:
    """Return a driving folder with other files; None: without one."""
    folder = tmp_path / "driving"
    folder.mkdir(parents=True)
    for file in (golden_folder(GOLDEN) / "driving").iterdir():
        target = files.get(file.stem, file.name)
        if target is not None:
            (folder / file.name).symlink_to(golden_folder(GOLDEN) / "driving" / target)
    return folder


REFUSALS: list[tuple[list[str], dict[str, str | None], str]] = [
    ([], {"src_pose": None}, "src_pose=FOLDER/src_pose.mp4: there is no such file"),
    ([], {"src_face": None}, "src_face=FOLDER/src_face.mp4: there is no such file"),
    ([], {"src_ref": None}, "src_ref=FOLDER/src_ref.png: there is no such file"),
    (["replace_flag=true"], {"src_bg": None}, "src_bg=FOLDER/src_bg.mp4: there is no such file"),
    (["replace_flag=true"], {"src_mask": "src_face.mp4"}, "they must be of one size"),
    ([], {"src_face": "src_pose.mp4"}, "is 64x48; its frames must be square"),
    (["refert_num=77"], {}, "refert_num=77: the model knows clips that start from 1 or 5 frames"),
    (["refert_num=5", "frame_num=5"], {}, "frame_num=5 must be more than refert_num=5"),
    (["frame_num=10"], {}, "frame_num=10 is not 4n + 1; the nearest that work are 9 and 13"),
    (["clips=2"], {}, "clips=2: further clips start from one image, and animate-14B takes"),
    (["src_bg=x.mp4"], {}, "src_bg is given without replace_flag=true"),
    (["src_root_path=nowhere"], {}, "src_root_path=nowhere does not exist"),
    (["src_root_path=null"], {}, "src_pose and src_face and src_ref are missing"),
    (["src_video=x.mp4"], {}, "src_video is given, but animate-14B takes src_root_path=FOLDER"),
    (["task=i2v-14B"], {}, "src_root_path=FOLDER is for a driving video, and i2v-14B takes"),
    (["use_relighting_lora=true", "ckpt_dir=null"], {}, "Hugging Face's cache has none"),
    (["use_relighting_lora=true", "ckpt_dir=FOLDER"], {}, "ckpt_dir=FOLDER has none"),
]


@pytest.mark.parametrize(("settings", "files", "message"), REFUSALS)
def test_what_does_not_fit_is_refused(
    settings: list[str],
    files: dict[str, str | None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = change_folder(tmp_path, **files)
    changes = [setting.replace("FOLDER", str(folder)) for setting in settings]
    arguments = [*list_settings("animate"), f"src_root_path={folder}", *changes]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err.replace(str(folder), "FOLDER")


def make_video(path: Path, frames: int, size: str = "64x64") -> Path:
    lossless = ["-c:v", "libx264rgb", "-crf", "0"]
    source = ["-f", "lavfi", "-i", f"testsrc=size={size}:rate=24", "-frames:v", str(frames)]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *source, *lossless, str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize(
    ("key", "size", "frames", "message"),
    [
        ("src_face", "64x64", 14, "has 14 frames and src_pose="),
        ("src_face", "32x32", 15, "takes faces of 64x64"),
        ("src_pose", "64x40", 15, "is 64x40, and both must be multiples of 16"),
    ],
)
def test_videos_that_do_not_fit_are_refused(
    key: str,
    size: str,
    frames: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file that is given by name counts before that of the folder."""
    video = make_video(tmp_path / "other.mp4", frames, size)
    assert main([*list_settings("animate"), f"{key}={video}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("0 1", "resume    continues from step 1 of 2"),
        ("0 2", "clip 2 continues from step 1 of 2"),
        ("decode 2", "clip 2 continues from step 2 of 2"),
    ],
)
def test_a_stopped_run_resumes(moment: str, step: str, tmp_path: Path) -> None:
    """Also in the second clip, which starts from five frames of the first."""
    settings = [*list_settings("replace_relit"), f"output.dir={tmp_path / 'out'}"]
    stopped = run_forked("tests.preempted", moment, "0", *settings)
    assert stopped.returncode == 75, stopped.stderr
    assert not Path("out/out.mp4").exists()
    resumed = run_forked("wan_dist.run", *settings)
    assert resumed.returncode == 0, resumed.stderr
    assert step in resumed.stderr
    video = load_file("out/out.safetensors")["video"]
    torch.testing.assert_close(video, read_expected("replace_relit"), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("num_frames", "clip_frames", "num_repeated", "expected"),
    [
        (15, 9, 1, [list(range(9)), [*range(8, 15), 13, 12]]),
        (15, 13, 5, [list(range(13)), [*range(8, 15), 13, 12, 11, 10, 9, 8]]),
        (3, 9, 1, [[0, 1, 2, 1, 0, 1, 2, 1, 0]]),
        (1, 5, 1, [[0] * 5]),  # which the reference cannot make
        (5, 9, 5, [[0, 1, 2, 3, 4, 3, 2, 1, 0]]),
    ],
)
def test_frames_run_backwards_after_the_end(
    num_frames: int, clip_frames: int, num_repeated: int, expected: list[list[int]], tmp_path: Path
) -> None:
    facts = read_video_facts(str(make_video(tmp_path / "in.mp4", num_frames, "32x32")), "src_pose")
    driving = DrivingVideo(facts, facts, None, None, clip_frames, num_repeated)
    assert driving.num_clips == len(expected)
    frames = list(iterate_frames(facts, range(num_frames)))
    for clip_index, indices in enumerate(expected):
        assert list(driving.list_frames(clip_index)) == indices
        for skip in (0, 1):
            read = list(iterate_clip_frames(facts, driving, clip_index, skip))
            assert len(read) == len(indices) - skip
            assert all(map(np.array_equal, read, (frames[index] for index in indices[skip:])))


@pytest.mark.parametrize(("fps", "times"), [(24, None), (30, "1.2"), (12, "0.5")])
def test_another_rate_than_the_driving_videos_is_told(
    fps: int, times: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"src_pose": make_video(tmp_path / "pose.mp4", 15, "64x48")}
    files["src_face"] = make_video(tmp_path / "face.mp4", 15, "512x512")
    settings = [f"{key}={file}" for key, file in files.items()]
    plan.main([*list_settings("animate"), *settings, f"fps={fps}"])
    printed = capsys.readouterr()
    told = printed.out + printed.err
    expected = f"the result moves {times} times as fast; give fps=24"
    assert (expected in told) if times else ("times as fast" not in told)


def test_one_driving_frame_makes_a_video_of_one_frame(tmp_path: Path) -> None:
    folder = golden_folder(GOLDEN) / "driving"
    still = {
        key: make_video(tmp_path / f"{key}.mp4", 1, size)
        for key, size in (("src_pose", "64x48"), ("src_face", "64x64"))
    }
    settings = [f"{key}={file}" for key, file in still.items()]
    settings += [f"src_ref={folder / 'src_ref.png'}", "src_root_path=null", "frame_num=5"]
    assert main([*list_settings("animate"), *settings]) == 0
    assert load_file("out/out.safetensors")["video"].shape == (3, 1, 48, 64)


def test_quantised_and_streamed_blocks_are_the_resident_ones() -> None:
    videos = []
    for more in (["quant=int8"], ["quant=int8", "memory.dit=stream", "memory.slice_tokens=17"]):
        folder = f"out{len(videos)}"
        assert main([*list_settings("guided"), *more, f"output.dir={folder}"]) == 0
        videos.append(load_file(f"{folder}/out.safetensors")["video"])
    torch.testing.assert_close(*videos, rtol=0, atol=1e-4)
    assert 1e-3 < relative_error(videos[0], read_expected("guided")) < 0.2


def test_a_driving_video_is_encoded_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first clip, which depends on nothing that was made; another mask or face is another one."""

    def run(case: str, *more: str) -> bool:
        name = f"{case}-{len(more)}"
        settings = [*list_settings(case), f"cache.dir={tmp_path / 'cache'}", f"output.name={name}"]
        assert main([*settings, *more]) == 0
        return "image     read from the cache" in capsys.readouterr().err

    assert [run("replace"), run("animate"), run("guided")] == [False] * 3
    assert run("replace", "seed=5")
    for case in ("replace", "animate", "guided"):
        settings = [f"src_root_path={change_folder(tmp_path / case)}", "output.dir=again"]
        assert run(case, *settings)  # copies of the same content
        video = load_file(f"again/{case}-2.safetensors")["video"]
        torch.testing.assert_close(video, read_expected(case), rtol=0, atol=1e-3)
    pose = golden_folder(GOLDEN) / "driving/src_pose.mp4"
    assert not run("replace", f"src_mask={pose}", "output.dir=mask", "sample.steps=1")


def test_both_files_of_the_relighting_lora_are_the_same(tmp_path: Path) -> None:
    expected = read_expected("replace_relit")
    settings = [
        setting for setting in list_settings("replace_relit") if "relighting" not in setting
    ]
    lora = golden_folder(GOLDEN) / "relighting_lora/adapter_model.safetensors"
    assert main([*settings, f"lora={lora}"]) == 0
    torch.testing.assert_close(
        load_file("out/out.safetensors")["video"], expected, rtol=0, atol=1e-3
    )


def test_the_relighting_lora_in_the_cache_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--Wan-AI--Wan2.2-Animate-14B"
    file = cached / "snapshots/0123456789/relighting_lora.ckpt"
    file.parent.mkdir(parents=True)
    file.symlink_to(golden_folder(GOLDEN) / "relighting_lora.ckpt")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123456789")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = read_config([*list_settings("replace_relit"), "ckpt_dir=null"])
    assert config is not None
    assert [lora.path for lora in list_loras(config)] == [file]


def test_from_python_the_video_is_the_commands() -> None:
    """Of two clips, of which the second has five frames of the first and four beyond the end."""
    case = "animate_ref5"
    settings = dict(setting.split("=", 1) for setting in list_settings(case))
    models = {key: settings.pop(key) for key in ("ckpt_dir", "dtype", "device")}
    task, prompt = settings.pop("task"), settings.pop("prompt")
    call = {
        key: value for key, value in settings.items() if not key.startswith(("output", "cache"))
    }
    for key in ("frame_num", "refert_num", "seed", "fps", "sample.steps"):
        call[key] = int(call[key])
    for key in ("sample.shift", "sample.guide_scale"):
        call[key] = float(call[key])
    call["replace_flag"] = call["replace_flag"] == "true"
    with wan_dist.open_pipeline(task, **models, cache={"dir": None}) as pipeline:
        video = pipeline(prompt, **call)
        call["src_face"] = str(make_video(Path("face.mp4"), 15, "32x32"))
        with pytest.raises(wan_dist.InputError, match="takes faces of 64x64"):
            pipeline(prompt, **call)
    expected = read_expected(case).permute(1, 2, 3, 0)
    assert video.frames is not None
    assert video.frames.shape == expected.shape
    difference = torch.from_numpy(video.frames).float() - (expected * 127.5 + 127.5)
    assert difference.abs().max() < 0.7
