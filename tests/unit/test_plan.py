from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan_dist.arguments import prepare
from wan_dist.catalog import TASKS
from wan_dist.errors import InputError
from wan_dist.plan import Plan, make_plan
from wan_dist.run import compose


def plan(*arguments: str) -> Plan:
    config = compose(prepare(list(arguments)))
    assert config is not None
    return make_plan(config)


# Rows of the published table: size, frames, fps, solver, steps, shift, guidance.
PUBLISHED = {
    "t2v-1.3B": ("832*480", 81, 16, "unipc", 50, 5.0, 5.0),
    "t2v-14B": ("1280*720", 81, 16, "unipc", 50, 5.0, 5.0),
    "t2i-14B": ("1024*1024", 1, 16, "unipc", 50, 5.0, 5.0),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_defaults_are_the_published_ones(task: str) -> None:
    config = compose(["task=" + task])
    assert config is not None
    sample = config.sample
    assert (
        config.size,
        config.frame_num,
        config.fps,
        sample.solver,
        sample.steps,
        sample.shift,
        sample.guide_scale,
    ) == PUBLISHED[task]
    assert config.negative_prompt is not None
    assert config.negative_prompt.startswith("色调艳丽，过曝，静态")
    assert config.negative_prompt.endswith("背景人很多，倒着走")
    assert config.width_height() in TASKS[task].sizes


@pytest.mark.parametrize(
    ("arguments", "latent_shape", "num_tokens"),
    [
        (["task=t2v-14B"], (16, 21, 90, 160), 75600),
        (["task=t2v-1.3B"], (16, 21, 60, 104), 32760),
        (["task=t2v-1.3B", "size=480x832", "frame_num=1"], (16, 1, 104, 60), 1560),
        (["task=t2i-14B"], (16, 1, 128, 128), 4096),
    ],
)
def test_token_counts(arguments: list[str], latent_shape: tuple[int, ...], num_tokens: int) -> None:
    made = plan(*arguments, "prompt=x")
    assert (made.latent_shape, made.num_tokens) == (latent_shape, num_tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=toy", "frame_num=80"], "frame_num=80 is not 4n + 1; the nearest that work are 77 and 81"),
        (["task=toy", "frame_num=0"], "the nearest that work are 1 and 5"),
        (["task=t2i-14B", "prompt=x", "frame_num=5"], "t2i-14B makes one image, frame_num=1"),
        (["task=toy", "size=830*480"], "the nearest that work are 816*480 and 832*480"),
        (["task=toy", "size=8*8"], "the nearest that work are 16*16 and 16*16"),
        (["task=toy", "size=0*480"], "size=0*480 is not width*height"),
        (["task=toy", "size=big"], "size=big is not width*height, e.g. size=832*480"),
        (["task=toy", "prompt="], "the prompt is empty"),
        (["task=toy", "prompt=  "], "the prompt is empty"),
        (["task=t2v-14B"], "prompt is missing"),
        (["task=toy", "prompt=@nowhere.txt"], "cannot read nowhere.txt (No such file or directory)"),
        (["task=toy", "sample.steps=0"], "at least 1 step is needed"),
        (["task=toy", "sample.shift=0"], "sample.shift=0.0: it must be above 0"),
        (["task=toy", "sample.solver=dpm"], "is not one of unipc, dpm++, euler; did you mean 'dpm++'?"),
        (["task=toy", "dtype=bf16"], "is not one of bfloat16, float32; did you mean 'bfloat16'?"),
        (["task=toy", "fps=0"], "at least 1 frame a second is needed"),
        (["task=toy", "seed=-2"], "use a number from 0 on, or -1"),
        (["task=toy", "output.name=a/b"], "folders go into output.dir"),
        (["task=toy", "latents=nowhere.safetensors"], "cannot be read as kept latents"),
    ],
)
def test_bad_input_says_what_would_work(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(*arguments)
    assert message in str(caught.value)


def test_prompt_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("two cats,\nboxing\n", encoding="utf-8")
    assert plan("task=toy", f"prompt=@{tmp_path / 'p.txt'}").prompt == "two cats,\nboxing"


def test_guidance_of_one_needs_no_negative_prompt() -> None:
    assert plan("task=toy", "sample.guide_scale=1").negative_prompt is None
    assert plan("task=toy", "negative_prompt=").negative_prompt == ""


def test_a_drawn_seed_is_known() -> None:
    seeds = {plan("task=toy", "seed=-1").seed for _ in range(3)}
    assert len(seeds) == 3
    assert min(seeds) >= 0


def test_names_are_safe_file_names() -> None:
    assert plan("task=toy", "prompt=a/b: c*?", "seed=3").name == "toy_a-b-c_3"
    assert len(plan("task=toy", "prompt=" + "猫" * 500).name.encode()) < 200
    assert plan("task=toy", "output.name=clip.mp4").name == "clip"


def test_kept_latents_decide_the_size(tmp_path: Path) -> None:
    file = tmp_path / "x.latents.safetensors"
    save_file({"latents": torch.zeros(16, 3, 6, 10)}, file)
    made = plan("task=t2v-14B", f"latents={file}")
    assert (made.width, made.height, made.frame_num, made.name) == (80, 48, 9, "x")
    save_file({"latents": torch.zeros(8, 3, 6, 10)}, file)
    with pytest.raises(InputError, match=r"needs \(16, T, h, w\)"):
        plan("task=t2v-14B", f"latents={file}")


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="4 ranks were launched"):
        plan("task=toy")
