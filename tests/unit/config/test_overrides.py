"""A job's own settings over what was composed once: equal to a composition of all of them, or left
to Hydra.
"""

import itertools
import json
import math
import pickle
import re
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from wan_dist.config.arguments import is_text_key
from wan_dist.config.overrides import HydraRequiredError, is_plain_key, override_config
from wan_dist.config.schema import RunConfig, list_settings
from wan_dist.jobs.job_file import Job, compose_job_configs
from wan_dist.jobs.planned_job import plan_jobs
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.image_sizes import read_image_size
from wan_dist.tasks.images import read_image
from wan_dist.tasks.run_config import read_config

BASE = ["task=toy"]
NUMBERS: list[Any] = [
    0,
    1,
    7,
    -3,
    2**31,
    2**63,
    2**64 - 1,
    10**30,
    1.0,
    7.0,
    0.5,
    -0.0,
    1e-7,
    1e16,
    1e22,
    1.5e300,
    math.inf,
]
OTHERS: list[Any] = [
    True,
    False,
    None,
    [3.0, 4.0],
    [3, 4.5],
    [1.0, 0.5],
    [1000, 757],
    [],
    [None],
    [True, 1],
    ["a", "b"],
    [[1, 2], [3]],
]
TEXTS = [
    "7",
    "7.0",
    "1e3",
    "1_000",
    "0x10",
    "010",
    " 7 ",
    "true",
    "True",
    "yes",
    "on",
    "null",
    "allow",
    "None",
    "nan",
    "inf",
    "-inf",
    "Infinity",
]
TEXTS += [
    "[3.0,4.0]",
    "[3.0, 4.0]",
    "(1,2)",
    "1,2",
    "range(1,3)",
    "choice(1,2)",
    "a",
    "'a'",
    '"a"',
    "???",
    "",
    "{a:1}",
    "7 8",
    "@x",
    "a=b",
]
TEXTS += ["\\", "a\\", "a'b", "é一", "glob(*)", "5.", "+5", ".5", "1e", "int(5)", "str(7)"]
TEXTS += ["$HOME", "a${b}", "\\${x}", "a\nb", "\t", "x" * 1001]
TEXTS += [
    "fp8",
    "av1",
    "float32",
    "cpu",
    "frames_first",
    "reference",
    "crop",
    "stream",
    "disk",
    "euler",
    "easy",
    "64*64",
    "48x64",
    "low",
    "gpu",
    "tiled",
    "apart",
    "8bit",
    "xfuser",
]
KEYS = [key for key in list_settings() if is_plain_key(key)]


def compose(settings: list[str]) -> RunConfig:
    config = read_config(settings)
    assert config is not None
    return config


def overridden(base: RunConfig, job: Job) -> RunConfig | None:
    try:
        return override_config(
            base,
            [
                (key, value, text)
                for (key, value), text in zip(job.values.items(), job.overrides, strict=True)
            ],
        )
    except HydraRequiredError:
        return None


def test_settings_over_a_composition_are_a_composition_of_them() -> None:
    """Of each key every odd value that is taken without Hydra, many keys at once."""
    base = compose(BASE)
    taken = {
        key: [
            value
            for value in [*NUMBERS, *OTHERS, *TEXTS]
            if overridden(base, Job(Path("jobs"), 1, {key: value})) is not None
        ]
        for key in KEYS
    }
    assert all(taken.values()), "every key can be set without Hydra"
    texts = [
        key for key in KEYS if is_text_key(key) and len(taken[key]) > 20
    ]  # all go the same way: each has a part of the values
    taken |= {key: taken[key][number % 9 :: 9] for number, key in enumerate(texts)}
    rounds = itertools.zip_longest(*taken.values(), fillvalue=...)
    num_rounds = 0
    for values in rounds:
        job = Job(
            Path("jobs"),
            1,
            {key: value for key, value in zip(KEYS, values, strict=True) if value is not ...},
        )
        own = overridden(base, job)
        assert own is not None
        composed = compose([*BASE, *job.overrides])
        assert own == composed
        assert repr(own) == repr(composed), "also in types"
        num_rounds += 1
    assert num_rounds > 15


@pytest.mark.parametrize(
    "values",
    [
        {"sample.steps": "many"},
        {"sample.steps": 7.5},
        {"sample.steps": "1,2"},
        {"sample.steps": 0},
        {"sample.guide_scale": "[1,2,3]"},
        {"seed": None},
        {"size": "???"},
        {"size": "x", "sample.steps": "many"},
        {"cache.size_gib": -1, "sample.steps": 0},
        {"fsdp.dit": "maybe"},
        {"seed": "x" * 1001},
    ],
)
def test_what_is_wrong_is_said_as_by_a_composition(values: dict[str, object]) -> None:
    job = Job(Path("jobs"), 3, values)
    with pytest.raises(InputError) as composed:
        compose([*BASE, *job.overrides])
    with pytest.raises(InputError, match=re.escape(f"jobs, line 3: {composed.value}")):
        list(compose_job_configs([job], BASE, compose))


def test_defaults_that_jobs_choose_are_composed_once_each() -> None:
    choices: list[dict[str, object]] = [
        {},
        {"task": "t2v-14B"},
        {"memory": "low"},
        {"task": "t2v-14B", "memory": "minimal"},
    ]
    jobs = [
        Job(
            Path("jobs"),
            number,
            choices[number % 4] | {"seed": number, "memory.slice_tokens": 7, "sample.shift": 2.5},
        )
        for number in range(1, 41)
    ]
    composed = []

    def counted(settings: list[str]) -> RunConfig:
        composed.append(settings)
        return compose(settings)

    found = dict(configs_of_by_line(jobs, counted))
    assert len(composed) == 4
    for number in (1, 2, 3, 40):
        assert found[number] == compose(["task=toy", "sample.steps=3", *jobs[number - 1].overrides])


def configs_of_by_line(jobs: list[Job], composer: Any) -> list[tuple[int, RunConfig]]:
    return [
        (job.line, config)
        for job, config in compose_job_configs(jobs, [*BASE, "sample.steps=3"], composer)
    ]


def test_a_job_may_mend_what_is_wrong_for_all() -> None:
    ((_, config),) = compose_job_configs(
        [Job(Path("jobs"), 1, {"size": "64*64"})], [*BASE, "size=large"], compose
    )
    assert config.size == "64*64"


def test_many_jobs_are_checked_soon_and_sent_small(tmp_path: Path) -> None:
    """Ten thousand in a minute of CPU, and in 20 MB; if each were composed, it would take twenty minutes."""
    number_of_jobs = 1000
    Image.new("RGB", (640, 480)).save(tmp_path / "0.jpg")
    lines = []
    for number in range(number_of_jobs):
        (tmp_path / f"{number}.jpg").exists() or (tmp_path / f"{number}.jpg").hardlink_to(
            tmp_path / "0.jpg"
        )
        own = {
            "seed": number,
            "steps": 10 + number % 40,
            "shift": 2 + number / 5000,
            "guide_scale": [3.0, 1 + number / 1000],
        }
        lines.append(
            json.dumps({"prompt": f"a ball, number {number}", "image": f"{number}.jpg", **own})
        )
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    arguments = ["task=i2v-A14B", f"jobs={tmp_path / 'jobs.jsonl'}"]
    began = time.process_time()
    checked = plan_jobs(compose(arguments), arguments, ranks=(16, 8), gpu_bytes=80 * 2**30)
    assert time.process_time() - began < 60 * number_of_jobs / 10_000
    sent = pickle.dumps(checked)
    assert len(sent) < 2000 * number_of_jobs
    assert pickle.loads(sent) == checked
    assert checked[999].config.sample.guide_scale == [3.0, 1.999]
    assert {job.plan.num_images for job in checked} == {1}


def picture(path: Path, **options: Any) -> Path:
    Image.linear_gradient("L").resize((64, 40)).convert("RGB").save(path, **options)
    return path


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("orientation", [None, 3, 6])
def test_sizes_are_those_of_decoded_images(
    kind: str, orientation: int | None, tmp_path: Path
) -> None:
    file = picture(
        tmp_path / f"a.{kind}", **({} if orientation is None else {"exif": turned(orientation)})
    )
    assert read_image_size(str(file), "image") == read_image(str(file), "image").size


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_plain_images_are_not_decoded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = picture(tmp_path / f"a.{kind}", exif=turned(8))
    monkeypatch.setattr(
        "wan_dist.tasks.image_sizes.read_image", lambda *_: pytest.fail("it was decoded")
    )
    assert read_image_size(str(file), "image") == (40, 64)


def test_a_turn_that_is_said_after_the_pixels_counts(tmp_path: Path) -> None:
    data = picture(tmp_path / "a.png", exif=turned(6)).read_bytes()
    place = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[place : place + 4], "big")
    late = data[:place] + data[place + length : -12] + data[place : place + length] + data[-12:]
    (tmp_path / "b.png").write_bytes(late)
    assert (
        read_image_size(str(tmp_path / "b.png"), "image")
        == read_image(str(tmp_path / "b.png"), "image").size
        == (40, 64)
    )


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "gif", "none"])
def test_images_that_cannot_be_read_are_refused_without_decoding_the_others(
    kind: str, tmp_path: Path
) -> None:
    file = tmp_path / f"a.{kind}"
    if kind != "none":
        data = picture(file).read_bytes()
        file.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="image="):
        read_image_size(str(file), "image")
