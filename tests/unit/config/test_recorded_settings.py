"""Settings that a video carries: what is written, what is read again, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wan_dist.config.arguments import prepare_arguments
from wan_dist.config.compose import compose_config
from wan_dist.config.recorded_settings import (
    expand_recorded_settings,
    format_settings,
    select_recorded_settings,
)
from wan_dist.config.schema import RunConfig, read_settings
from wan_dist.config.settings import OUTPUTS
from wan_dist.jobs.planned_job import plan_jobs
from wan_dist.output.record_fields import describe_settings
from wan_dist.output.video_file import save_image, save_video
from wan_dist.planning.plan import make_plan
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.run_config import read_config

ODD_TEXTS = [
    'two cats, boxing = "fun"; [x] {y} $HOME \\n # 猫 é',
    "@home, a film",
    "line\none\r\n\ttwo",
    "null",
    "'quoted'",
    " spaces ",
    "\\",
]


def read(*arguments: str) -> RunConfig:
    config = read_config(arguments)
    assert config is not None
    return config


def write(path: Path, settings: dict[str, Any]) -> Path:
    frames = torch.zeros(2, 48, 64, 3, dtype=torch.uint8)
    comment = format_settings(settings, version="1", digest="d")
    save_video(path, [frames], fps=8, num_frames=2, comment=comment)
    return path


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_settings_come_back_as_they_were(text: str, tmp_path: Path) -> None:
    given = ["task=toy", "seed=5", "size=80x48", "sample.sigmas=[1.0,0.5]", "output.crf=20"]
    given += ["lora=[a, b.safetensors]", "lora_strength=[1.0,0.5]", "lora_unmatched=allow"]
    config = read(*given, "prompt=a cat")
    config.prompt = config.negative_prompt = f"@{text}" if text.startswith("@") else text
    recorded = {**select_recorded_settings(config), "prompt": text, "negative_prompt": text}
    again = read(f"from={write(tmp_path / 'a.mp4', recorded)}")
    assert read_settings(again, OUTPUTS) == read_settings(config, OUTPUTS)
    assert again.lora_unmatched == "allow"
    assert again.output.dir == "outputs"


def test_other_arguments_have_the_last_word(tmp_path: Path) -> None:
    settings = select_recorded_settings(read("task=toy", "prompt=a cat", "seed=5", "fps=8"))
    video = write(tmp_path / "a.mp4", settings)
    again = read("seed=6", f"from={video}", "output.dir=new")
    assert (again.task, again.prompt, again.seed, again.fps) == ("toy", "a cat", 6, 8)
    assert again.output.dir == "new"
    with pytest.raises(InputError, match=r"preset beside from=.*sampling settings count"):
        read(f"from={video}", "preset=lightx2v-4step")


def test_a_sweep_and_jobs_start_from_a_video(tmp_path: Path) -> None:
    config = read("task=toy", "prompt=a cat, a dog", "seed=5", "output.name=clip")
    video = write(tmp_path / "a.mp4", select_recorded_settings(config))
    sweep = [f"from={video}", "seed=1,2", "--multirun"]
    jobs = plan_jobs(read(*sweep), sweep, ranks=(1, 1), gpu_bytes=None)
    assert [(job.plan.prompt, job.plan.seed) for job in jobs] == [
        ("a cat, a dog", 1),
        ("a cat, a dog", 2),
    ]
    (tmp_path / "jobs.txt").write_text("a ball\na cube\n")
    listed = [f"from={video}", f"jobs={tmp_path / 'jobs.txt'}"]
    jobs = plan_jobs(read(*listed), listed, ranks=(1, 1), gpu_bytes=None)
    assert [(job.plan.prompt, job.plan.seed) for job in jobs] == [("a ball", 5), ("a cube", 5)]
    assert len({job.name for job in jobs}) == 2


def test_an_image_carries_settings_too(tmp_path: Path) -> None:
    settings = select_recorded_settings(read("task=t2i-14B", "prompt=猫", "seed=5"))
    frame = torch.zeros(48, 64, 3, dtype=torch.uint8)
    save_image(tmp_path / "a.png", frame, format_settings(settings, version="1", digest="d"))
    again = read(f"from={tmp_path / 'a.png'}")
    assert (again.task, again.prompt, again.seed) == ("t2i-14B", "猫", 5)


def test_a_services_videos_tell_no_paths() -> None:
    config = read("task=toy", "prompt=a cat", "ckpt_dir=/secret", "image=/secret/cat.png")
    assert "/secret" in json.dumps(select_recorded_settings(config))
    config.serve.port = 8000
    assert "/secret" not in json.dumps(select_recorded_settings(config))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": "toy", "output.dir": "/etc"}, "output.dir is no setting of a result"),
        ({"task": "toy", "nonsense": 1}, "unknown key 'nonsense'"),
        ({"task": "toy", "hydra.run.dir": "x"}, "unknown key 'hydra.run.dir'"),
        ({"task": "toy", "seed": "${oc.env:HOME}"}, "contains"),
        ({"task": "toy", "seed": {"a": 1}}, "seed is an object"),
    ],
)
def test_a_file_may_be_anybodys(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    video = write(tmp_path / "a.mp4", settings)
    with pytest.raises(InputError, match=f"from=.*a.mp4: .*{said}"):
        read(f"from={video}")


def test_a_prompt_in_a_file_names_no_file(tmp_path: Path) -> None:
    content = {"settings": {"task": "toy", "prompt": "@/etc/passwd"}}
    frames = torch.zeros(2, 48, 64, 3, dtype=torch.uint8)
    video = tmp_path / "a.mp4"
    save_video(video, [frames], fps=8, num_frames=2, comment=json.dumps(content))
    assert "prompt=@@/etc/passwd" in expand_recorded_settings([f"from={video}"])


def test_files_without_settings_are_refused_in_a_line(tmp_path: Path) -> None:
    frames = torch.zeros(2, 48, 64, 3, dtype=torch.uint8)
    for name, comment in {"plain": None, "other": "my holiday", "list": "[1]"}.items():
        save_video(tmp_path / f"{name}.mp4", [frames], fps=8, num_frames=2, comment=comment)
    texts = PngInfo()
    texts.add_text("parameters", "a cat")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", pnginfo=texts)
    for name in ("plain.mp4", "other.mp4", "list.mp4", "other.png"):
        with pytest.raises(InputError, match=rf"from=.*{name} holds no settings: another program"):
            read(f"from={tmp_path / name}")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.png").write_text("no image")
    for name, said in {
        "text.mp4": "ffmpeg says",
        "none.mp4": "No such file",
        "text.png": "",
    }.items():
        with pytest.raises(InputError, match=rf"from=.*{name} cannot be read: .*{said}"):
            read(f"from={tmp_path / name}")


def test_texts_of_files_are_recorded_and_not_the_files_names() -> None:
    config = compose_config(prepare_arguments(["task=animate-2-14B", "prompt=@a.txt"]))
    assert config is not None
    plan = replace(
        make_plan(replace(config, prompt="a man"), is_dry_run=True), driving_prompt="a woman"
    )
    settings = {"prompt": "@a.txt", "prompt_ref": "@b.txt"}
    recorded = json.loads(describe_settings(settings, plan, "digest"))["settings"]
    assert (recorded["prompt"], recorded["prompt_ref"]) == ("a man", "a woman")
