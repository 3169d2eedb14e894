"""Files of jobs: what is read from them, and what is refused, by line."""

import csv
import io
import json
from pathlib import Path

import pytest

from wan_dist.config.schema import RunConfig
from wan_dist.jobs.job_file import compose_job_configs, read_jobs
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.run_config import read_config

HARD = [
    "two cats, boxing",
    '"in quotes"',
    "'in others'",
    "null",
    "a = b, ${oc.env:HOME} [1] {x}",
    "ends with \\",
    "一只猫 🐈",
]


def compose(settings: list[str]) -> RunConfig:
    config = read_config(settings)
    assert config is not None
    return config


def configs(file: Path) -> list[RunConfig]:
    return [config for _, config in compose_job_configs(read_jobs(file), ["task=toy"], compose)]


@pytest.mark.parametrize("prompt", HARD)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_text_comes_through_both_ways(prompt: str, kind: str, tmp_path: Path) -> None:
    if kind == "csv":
        table = io.StringIO()
        csv.writer(table).writerows([["prompt", "seed"], [prompt, 7]])
        text = table.getvalue()
    else:
        text = (
            prompt
            if kind == "txt"
            else json.dumps({"prompt": prompt, "seed": 7}, ensure_ascii=False)
        )
    file = tmp_path / f"jobs.{kind}"
    file.write_text(text, encoding="utf-8")
    (config,) = configs(file)
    (job,) = read_jobs(file)
    assert config.prompt == prompt
    assert compose(["task=toy", *job.overrides]) == config  # as the elements of an array read it
    assert config.seed == (42 if kind == "txt" else 7)


def test_settings_of_each_line(tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text(
        '{"prompt": "a", "sample.steps": 7, "size": "64*64", "output.name": "first"}\n\n'
        '{"prompt": "@words.txt", "image": "cat.png", "sample.guide_scale": [3.0, 4.0], "cache.dir": null}\n'
    )
    first, second = configs(file)
    assert (first.sample.steps, first.size, first.output.name) == (7, "64*64", "first")
    assert second.prompt == f"@{tmp_path / 'words.txt'}"
    assert second.image == str(tmp_path / "cat.png")
    assert (second.sample.guide_scale, second.cache.dir, second.output.name) == (
        [3.0, 4.0],
        None,
        "words-txt-84b4dfda",
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "has no jobs"),
        ("a.txt", "\n \n", "has no jobs"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"', "line 2: not JSON"),
        ("a.jsonl", '["x"]', "line 1: not an object"),
        ("a.jsonl", '{"sample": {"steps": 3}}', "sample is an object"),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"promt": "x"}',
            "line 2: unknown key 'promt'; did you mean 'prompt'",
        ),
        ("a.jsonl", '{"prompt": "x", "seed": -7}', "line 1: seed=-7"),
        ("a.jsonl", '{"prompt": " "}', "line 1: prompt is empty"),
        ("a.jsonl", '{"prompt": "x", "output.name": "../x"}', "line 1: output.name='../x'"),
        (
            "a.jsonl",
            '{"prompt": "x", "output.name": "y"}\n{"prompt": "z", "output.name": "y"}',
            "line 2: output.name=y is that of line 1",
        ),
        ("a.jsonl", "[" * 100000, "line 1: not JSON"),
        ("a.csv", "prompt,seed\nx\n", "line 2: 1 values for the 2 keys"),
        ("a.csv", 'prompt\n"x', "not a table"),
        ("a.csv", "prompt,seed\nx,no\n", "line 2: seed"),
    ],
)
def test_what_cannot_be_read_is_refused_by_line(
    name: str, text: str | bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError) as refused:
        configs(file)
    assert message in str(refused.value)
    assert str(file) in str(refused.value)
