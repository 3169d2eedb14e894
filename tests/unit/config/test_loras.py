"""Settings of LoRA files: which, how strong, for which expert, on the command line and in files of jobs."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan_dist.config.loras import LoraSetting, list_loras
from wan_dist.config.schema import RunConfig
from wan_dist.jobs.planned_job import plan_jobs
from wan_dist.planning.hardware import Hardware
from wan_dist.planning.memory_planner import StageMemory
from wan_dist.planning.plan import make_plan, plan_memory
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import get_task
from wan_dist.tasks.run_config import read_config


def read(*settings: str, task: str = "t2v-A14B") -> RunConfig:
    config = read_config([f"task={task}", "prompt=a cat", *settings])
    assert config is not None
    return config


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["lora=a b(1).safetensors"], [("lora", "a b(1).safetensors", 1.0, None)]),
        (["lora=x/a, y/b"], [("lora", "x/a", 1.0, None), ("lora", "y/b", 1.0, None)]),
        (
            ["lora=[a,b]", "lora_strength=[0.7,-3]"],
            [("lora", "a", 0.7, None), ("lora", "b", -3.0, None)],
        ),
        (
            ['lora=["a,1","b"]', "lora_strength=2"],
            [("lora", "a,1", 2.0, None), ("lora", "b", 2.0, None)],
        ),
        (
            [
                "lora_high=h",
                "lora_high_strength=3",
                "lora_low=l",
                "lora_low_strength=1.5",
                "lora=s",
            ],
            [
                ("lora", "s", 1.0, None),
                ("lora_high", "h", 3.0, "high"),
                ("lora_low", "l", 1.5, "low"),
            ],
        ),
        (["lora_strength=0.5"], []),
        (["lora=null"], []),
        (["lora=[]"], []),
    ],
)
def test_files_strengths_and_experts(
    settings: list[str], expected: list[tuple[str, str, float, str | None]]
) -> None:
    assert list_loras(read(*settings)) == [
        LoraSetting(key, Path(path), strength, expert) for key, path, strength, expert in expected
    ]


def test_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [lora.path for lora in list_loras(read("lora=[~/a,~/b]"))] == [
        tmp_path / "a",
        tmp_path / "b",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["lora=[a,b]", "lora_strength=[1]"],
            "lora_strength=[1] has 1 numbers for 2 files in lora",
        ),
        (
            ["lora=a", "lora_strength=[1,2]"],
            "lora_strength=[1, 2] has 2 numbers for 1 file in lora",
        ),
        (["lora=a", "lora_strength=much"], "lora_strength=much is neither a number nor a list"),
        (["lora=a", "lora_strength=true"], "lora_strength=True is neither a number nor a list"),
        (["lora_low=a", "lora_low_strength=[inf]"], "lora_low_strength=[inf] is neither a number"),
        (["lora="], "lora is empty"),
        (["lora_unmatched=warn"], "lora_unmatched=warn is not one of error, allow"),
    ],
)
def test_settings_that_do_not_fit(settings: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(*settings)
    assert message in str(caught.value)


def test_an_expert_of_a_task_without_experts() -> None:
    config = read("lora_high=a.safetensors", task="t2v-14B")
    with pytest.raises(InputError, match=r"lora_high=a.safetensors: this task has one transformer"):
        make_plan(config, ranks=(1, 1))
    make_plan(read("lora_high=a.safetensors"), ranks=(1, 1))


JOBS: list[dict[str, object]] = [
    {"name": "none"},
    {"name": "one", "lora": "styles/a.safetensors", "lora_strength": 0.5},
    {"name": "two", "lora": ["a,b.safetensors", "~/c.safetensors"], "lora_strength": [1, -1]},
    {"name": "text", "lora": "a.safetensors,/b.safetensors"},
    {"name": "again", "lora": "styles/a.safetensors", "lora_strength": 0.5, "seed": 3},
    {"name": "stronger", "lora": "styles/a.safetensors", "lora_strength": 0.75},
]


def test_jobs_differ_in_their_loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    file = tmp_path / "jobs.jsonl"
    file.write_text("\n".join(json.dumps(job | {"prompt": "a cat"}) for job in JOBS))
    arguments = ["task=toy", f"jobs={file}"]
    config = read_config(arguments)
    assert config is not None
    jobs = pickle.loads(pickle.dumps(plan_jobs(config, arguments, ranks=(1, 1), gpu_bytes=None)))
    loras = {
        job.name: [(str(lora.path), lora.strength) for lora in list_loras(job.config)]
        for job in jobs
    }
    assert loras == {
        "none": [],
        "one": [(f"{tmp_path}/styles/a.safetensors", 0.5)],
        "two": [(f"{tmp_path}/a,b.safetensors", 1.0), ("/home/user/c.safetensors", -1.0)],
        "text": [(f"{tmp_path}/a.safetensors", 1.0), ("/b.safetensors", 1.0)],
        "again": [(f"{tmp_path}/styles/a.safetensors", 0.5)],
        "stronger": [(f"{tmp_path}/styles/a.safetensors", 0.75)],
    }
    keys = {job.name: job.model_key for job in jobs}
    assert keys["one"] == keys["again"]
    assert len(set(keys.values())) == len(JOBS) - 1


def test_only_texts_are_files_of_a_job(tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    for value in ([1], True, ["a", None]):
        file.write_text(json.dumps({"prompt": "a cat", "lora": value}))
        with pytest.raises(InputError, match="is not text; write it in quotes"):
            plan_jobs(read(f"jobs={file}", task="toy"), ["task=toy"], ranks=(1, 1), gpu_bytes=None)


def test_the_plan_counts_what_merging_takes(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    pair = {"x.lora_A.weight": torch.zeros(64, 13824), "x.lora_B.weight": torch.zeros(5120, 64)}
    save_file(pair | {"x.diff": torch.zeros(2500, 4000)}, file)

    def estimate(*settings: str) -> dict[str, StageMemory]:
        config = read(*settings, task="t2v-14B")
        plan = make_plan(config, ranks=(1, 1))
        models = get_task("t2v-14B").model_dims
        found = plan_memory(plan, Hardware(80 * 2**30, 256 * 2**30), models)
        return {stage.name: stage for stage in found.stage_memories}

    rows, factors = 5 * 2**23 * 4, 2 * 2**23 * 4
    for placement, num_at_once, has_part in (
        ("resident", 4, False),
        ("stream", 3, True),
        ("disk", 3, True),
    ):
        plain, merging = (
            estimate(f"memory.dit={placement}", *settings) for settings in ([], [f"lora={file}"])
        )
        for name, stage in merging.items():
            is_read = name in ("context", "load") or (name == "denoise" and has_part)
            part = num_at_once * (rows + factors) if is_read else 0
            assert stage.gpu_parts.get("loras", 0) == part, name
            assert stage.gpu_bytes == plain[name].gpu_bytes + part


def test_the_plan_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    config = replace(read(), lora=str(tmp_path / "gone.safetensors"))
    with pytest.raises(InputError, match=r"lora=.*gone.safetensors cannot be read: No such file"):
        plan_memory(
            make_plan(config, ranks=(1, 1)),
            Hardware(80 * 2**30, 256 * 2**30),
            get_task(config.task).model_dims,
        )
