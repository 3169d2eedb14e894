import random

import pytest

from wan_dist.config.arguments import prepare_arguments
from wan_dist.config.compose import compose_config
from wan_dist.config.hydra_quoting import quote_if_needed
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import require_task

PROMPTS = [
    "two cats, boxing",
    "it's a cat's world",
    'she said "hello, world"',
    "'tis the season, isn't it",
    "a = b",
    "[1, 2] {a: b} (c)",
    "costs $5, or ${10}, or \\${x}",
    "${oc.env:HOME}",
    "back\\slash, C:\\new\\table\\",
    "trailing backslash and quote \\'",
    "一只猫，在下雨。",
    "emoji 😀🐈, mixed",
    "two\nlines,\ttabbed",
    "true",
    "42",
    "@ at, # hash; semicolon: colon | pipe & and * star ? mark ! bang ~ tilde ` tick % percent",
    "choice(a,b)",
    "  spaces around  ",
    "Null",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_plain_text(prompt: str) -> None:
    config = compose_config(
        prepare_arguments(["task=toy", f"prompt={prompt}", f"output.dir={prompt}"])
    )
    assert config is not None
    assert config.prompt == prompt
    assert config.output.dir == prompt


def test_any_text_survives_hydra_and_omegaconf() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    parser, draw = OverridesParser.create(), random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choice("\\'\"${}[](),=: ab\n猫") for _ in range(draw.randrange(1, 12)))
        if quote_if_needed(text) == text:
            continue  # quoted by the user already
        value = parser.parse_override(f"prompt={quote_if_needed(text)}").value()
        assert OmegaConf.create({"prompt": value}).prompt == text


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("'two cats, boxing'", "two cats, boxing"),
        ('"it\'s"', "it's"),
        ("null", "two cats boxing on a stage"),
    ],
)
def test_quotes_for_hydra_still_work(typed: str, expected: str) -> None:
    config = compose_config(prepare_arguments(["task=toy", f"prompt={typed}"]))
    assert config is not None
    assert (config.prompt or "two cats boxing on a stage") == expected


@pytest.mark.parametrize(
    "setting", ["seed=7", "memory=auto", "sample.guide_scale=[3,4]", "fps=${seed}"]
)
def test_a_run_flag_changes_nothing(setting: str) -> None:
    """Flags are left to Hydra's own command; without them the configuration is composed here."""
    prepared = prepare_arguments(["task=toy", setting])
    config = compose_config(prepared)
    assert config is not None
    assert compose_config([*prepared, "--run"]) == config


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("seed=a", "seed: Value 'a' of type 'str' could not be converted to Integer"),
        ("seed=1,2", "Ambiguous value for argument 'seed=1,2': a setting takes one value"),
        ("memory=nope", "In 'config': Could not find 'memory/nope'"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--run"]])
def test_what_hydra_refuses_is_one_line(argument: str, message: str, flags: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        compose_config([*prepare_arguments(["task=toy", argument]), *flags])
    assert str(caught.value) == message


def test_flags_may_stand_anywhere() -> None:
    assert prepare_arguments(["--cfg", "job", "task=toy", "--resolve", "seed=1"]) == [
        "task=toy",
        "seed=1",
        "--cfg",
        "job",
        "--resolve",
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("frames_num=5", "unknown key 'frames_num'; did you mean 'frame_num'?"),
        ("steps=5", "did you mean 'sample.steps'?"),
        ("sample.stepz=5", "did you mean 'sample.steps'?"),
        ("+new.key=5", "unknown key 'new.key'"),
        ("cats", "'cats' is not key=value"),
        ("--sample_steps", "unknown flag --sample_steps; use sample.steps=..."),
        ("--base_seed=3", "unknown flag --base_seed; use seed=3"),
        ("--multirun", "unknown flag --multirun"),
    ],
)
def test_bad_arguments_are_explained(argument: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        prepare_arguments(["task=toy", argument])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "task is missing: give task=NAME, one of t2v-1.3B, t2v-14B, t2i-14B, t2v-A14B"),
        (["task=t2v"], "did you mean 't2v-1.3B'?"),
    ],
)
def test_the_task_must_be_one_of_ours(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        require_task(arguments)
    assert message in str(caught.value)
