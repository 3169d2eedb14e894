"""Sweeps of settings: one job a combination, free text stays text."""

import pytest

from wan_dist.config.sweep import is_sweep
from wan_dist.jobs.sweep_jobs import make_sweep_jobs
from wan_dist.runtime.errors import InputError


def values_of(*arguments: str) -> list[dict[str, object]]:
    jobs, _ = make_sweep_jobs(["--multirun", "task=toy", *arguments])
    return [
        {key: value for key, value in job.values.items() if key != "output.name"} for job in jobs
    ]


def test_without_the_flag_nothing_is_swept() -> None:
    assert not is_sweep(["task=toy", "seed=1,2"])


def test_a_job_for_each_combination() -> None:
    found = values_of("seed=1,2,3", "sample.guide_scale=3,5")
    assert len(found) == 6
    assert found[0] == {"seed": "1", "sample.guide_scale": "3"}
    assert found[-1] == {"seed": "3", "sample.guide_scale": "5"}


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("seed=range(1,4)", ["1", "2", "3"]),
        ("seed=choice(4,7)", ["4", "7"]),
        ("sample.guide_scale=[3,4],[5,6]", ["[3,4]", "[5,6]"]),
        ("sample.shift=null,3", [None, "3"]),
        ("quant=none,fp8", ["none", "fp8"]),
        ("size=64*48,48*64", ["64*48", "48*64"]),
        ("memory=low,minimal", ["low", "minimal"]),
    ],
)
def test_values_are_read_by_kind(setting: str, values: list[object]) -> None:
    key = setting.partition("=")[0]
    assert [found[key] for found in values_of(setting)] == values


@pytest.mark.parametrize(
    "setting", ["prompt=two cats, boxing", "image=a,b.png", "output.dir=a,b", "negative_prompt=a,b"]
)
def test_free_text_stays_text(setting: str) -> None:
    jobs, shared_settings = make_sweep_jobs(["task=toy", setting, "-m"])
    assert shared_settings == ["task=toy", setting]
    assert [set(job.values) for job in jobs] == [{"output.name"}]


def test_a_value_that_is_given_twice_is_one() -> None:
    jobs, shared_settings = make_sweep_jobs(["task=toy", "--multirun", "seed=5,5"])
    assert len(jobs) == 1
    assert "seed=5" in shared_settings


def test_names_say_the_values_and_know_the_other_settings() -> None:
    def names(*arguments: str) -> list[object]:
        jobs, _ = make_sweep_jobs(["-m", "task=toy", "seed=1,2", *arguments])
        return [job.values["output.name"] for job in jobs]

    first, second = names("prompt=a red ball")
    assert str(first).startswith("a-red-ball_seed-1_")
    assert str(second).startswith("a-red-ball_seed-2_")
    assert names("prompt=a red ball", "output.dir=x", "parallel.cfg=1") == [first, second]
    assert not set(names("prompt=a red ball", "sample.steps=3")) & {first, second}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["jobs=list.txt", "seed=1,2"], "jobs=FILE and --multirun"),
        (["sede=1,2"], "did you mean 'seed'"),
        (["seed=range(0,1000)", "sample.steps=range(1,1000)"], "combinations"),
        (["seed=[1,2"], "seed="),
        (["parallel.cfg=1,2"], "parallel.cfg applies to the whole run"),
    ],
)
def test_what_cannot_be_swept_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        make_sweep_jobs(["--multirun", "task=toy", *arguments])
