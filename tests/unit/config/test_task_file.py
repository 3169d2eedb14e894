"""A user's own task: a file with a base and settings."""

import json
from pathlib import Path

import pytest

from wan_dist.config.schema import RunConfig
from wan_dist.config.task_file import expand_task_file
from wan_dist.planning.plan import make_plan
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.run_config import read_config

TEXT = """
base: t2v-14B
ckpt_dir: weights/base
dit_file: moviigen.safetensors
lora: [a.safetensors, "b, c.safetensors"]
lora_strength: [1, 0.5]
negative_prompt: "too dark, blurred"
size: 832x480
sample:
  steps: 8
  guide_scale: 1
"""


def write(folder: Path, text: str = TEXT) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def read(*arguments: str) -> RunConfig:
    config = read_config(arguments)
    assert config is not None
    return config


def test_its_settings_are_those_of_a_command(tmp_path: Path) -> None:
    config = read(f"task={write(tmp_path)}", "prompt=a cat")
    assert config == read(
        "task=t2v-14B",
        f"ckpt_dir={tmp_path / 'weights/base'}",
        f"dit_file={tmp_path / 'moviigen.safetensors'}",
        f'lora=["{tmp_path / "a.safetensors"}", "{tmp_path / "b, c.safetensors"}"]',
        "lora_strength=[1,0.5]",
        "negative_prompt=too dark, blurred",
        "size=832x480",
        "sample.steps=8",
        "sample.guide_scale=1",
        "prompt=a cat",
    )
    assert make_plan(config, ranks=(1, 1)).sampling.guide_scales == (1.0, 1.0)


def test_the_command_line_comes_first(tmp_path: Path) -> None:
    path = write(tmp_path)
    for arguments in (["sample.steps=3", f"task={path}"], [f"task={path}", "sample.steps=3"]):
        config = read(*arguments, "prompt=x")
        assert (config.sample.steps, config.sample.guide_scale) == (3, 1)


def test_texts_and_files_in_it_are_beside_it(tmp_path: Path) -> None:
    text = 'base: t2v-A14B\nprompt: "@p.txt"\ndit_file: high.gguf,low.gguf\nlora: ~/a.safetensors\n'
    config = read(f"task={write(tmp_path, text)}")
    assert config.prompt == f"@{tmp_path / 'p.txt'}"
    assert config.dit_file == f"{tmp_path / 'high.gguf'},{tmp_path / 'low.gguf'}"
    assert config.lora is not None
    assert json.loads(config.lora) == [str(Path("~/a.safetensors").expanduser())]


def test_a_preset_may_be_part_of_it(tmp_path: Path) -> None:
    path = write(tmp_path, "base: t2v-14B\npreset: lightx2v-4step\n")
    assert (
        read(f"task={path}", "prompt=x").sample
        == read("task=t2v-14B", "preset=lightx2v-4step", "prompt=x").sample
    )


def test_arguments_without_a_file_are_left_alone() -> None:
    arguments = ["task=toy", "prompt=task=x.yaml", "--cfg", "job"]
    assert expand_task_file(arguments) == arguments


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size: 832x480", "names no task to start from"),
        ("- base", "names no task to start from"),
        ("base: [", "is not YAML"),
        ("base: i2v", "there is no task 'i2v'"),
        ("base: toy\ntask: toy", "the task is named by base, not by task"),
        (
            "base: toy\nsteps: 4",
            "task=.*mine.yaml: unknown key 'steps'; did you mean 'sample.steps'",
        ),
        ("base: toy\nsample: {step: 4}", "unknown key 'sample.step'"),
        ("base: toy\nseed: ${oc.env:HOME}", "which job files do not evaluate"),
        ("base: toy\nseed: a", "seed"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read(f"task={write(tmp_path, text)}")


def test_a_file_that_is_missing_is_named() -> None:
    with pytest.raises(InputError, match=r"task=nowhere\.yaml: cannot read the file"):
        read("task=nowhere.yaml")
