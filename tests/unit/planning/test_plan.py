import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import FIXTURES
from wan_dist.config.arguments import prepare_arguments
from wan_dist.config.compose import compose_config
from wan_dist.planning.degrees import plan_degrees
from wan_dist.planning.plan import make_plan
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import TASKS


def plan(*arguments: str) -> VideoPlan:
    config = compose_config(prepare_arguments(list(arguments)))
    assert config is not None
    return make_plan(config)


# Rows of the published table: size, frames, fps, solver, steps, shift, guidance for low and high noise.
PUBLISHED = {
    "t2v-1.3B": ("832x480", 81, 16, "unipc", 50, 5.0, (5.0, 5.0)),
    "t2v-14B": ("1280x720", 81, 16, "unipc", 50, 5.0, (5.0, 5.0)),
    "t2i-14B": ("1024x1024", 1, 16, "unipc", 50, 5.0, (5.0, 5.0)),
    "i2v-14B": ("1280x720", 81, 16, "unipc", 40, 5.0, (5.0, 5.0)),
    "flf2v-14B": ("1280x720", 81, 16, "unipc", 50, 16.0, (5.0, 5.0)),
    "t2v-A14B": ("1280x720", 81, 16, "unipc", 40, 12.0, (3.0, 4.0)),
    "i2v-A14B": ("1280x720", 81, 16, "unipc", 40, 5.0, (3.5, 3.5)),
    "vace-1.3B": ("832x480", 81, 16, "unipc", 50, 16.0, (5.0, 5.0)),
    "vace-14B": ("1280x720", 81, 16, "unipc", 50, 16.0, (5.0, 5.0)),
    "vace-A14B": ("1280x720", 81, 16, "unipc", 50, 12.0, (5.0, 5.0)),
    **{
        f"fun-{kind}-{size}": ("832x480", 81, 16, "fun_euler", 50, 5.0, (6.0, 6.0))
        for kind in ("inp", "control", "camera")
        for size in ("1.3B", "14B", "A14B")
    },
    "fun-inp-5B": ("1280x704", 121, 24, "fun_euler", 50, 5.0, (6.0, 6.0)),
    "fun-control-5B": ("1280x704", 121, 24, "fun_euler", 40, 5.0, (6.0, 6.0)),
    "fun-camera-5B": ("1280x704", 81, 24, "fun_euler", 50, 5.0, (6.0, 6.0)),
    "animate-14B": ("1280x720", 77, 30, "unipc", 20, 5.0, (1.0, 1.0)),
    "animate-2-14B": ("1280x720", 81, 24, "dpm++", 40, 5.0, (3.0, 3.0)),
    "s2v-14B": ("1024x704", 80, 16, "unipc", 40, 3.0, (4.5, 4.5)),
    "ti2v-5B": ("1280x704", 121, 24, "unipc", 50, 5.0, (5.0, 5.0)),
}
BOUNDARIES = {"t2v-A14B": 0.875, "vace-A14B": 0.875, "i2v-A14B": 0.9}
BOUNDARIES |= {f"fun-{kind}-A14B": 0.9 for kind in ("inp", "control", "camera")}
STARTS = {
    "i2v-14B": "镜头晃动，色调艳丽，过曝，静态",
    "flf2v-14B": "镜头切换，镜头晃动，色调艳丽，过曝，静态",
}
STARTS |= {"s2v-14B": "画面模糊，最差质量，画面模糊，细节模糊不清"}
"""Of the negative prompts that do not begin as the others."""


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.new("RGB", (1920, 1080)).save(tmp_path / "wide.png")
    return str(tmp_path / "wide.png")


def inputs(task: str, image: str) -> list[str]:
    """Return what the task needs beside a prompt."""
    inputs = TASKS[task].inputs
    files = [f"{key}={image}" for key in inputs.file_keys if inputs.is_required]
    return [*files, *["camera=static"] * inputs.takes_camera]


@pytest.mark.parametrize("task", PUBLISHED)
def test_defaults_are_the_published_ones(task: str, image: str) -> None:
    # Those that take videos and sound.
    is_dry_run = TASKS[task].inputs.kind in ("animate", "animate_2", "speech")
    files = [] if is_dry_run else inputs(task, image)
    config = compose_config(prepare_arguments([f"task={task}", *files, "prompt=x"]))
    assert config is not None
    made, sample = make_plan(config, is_dry_run=is_dry_run), config.sample
    found = (
        config.size,
        made.frame_num,
        made.fps,
        sample.solver,
        sample.steps,
        made.sampling.shift,
        made.sampling.guide_scales,
    )
    assert found == PUBLISHED[task]
    assert made.negative_prompt == (config.negative_prompt if made.sampling.is_guided else None)
    assert config.negative_prompt is not None
    assert config.negative_prompt.startswith(STARTS.get(task, "色调艳丽，过曝，静态"))
    assert config.negative_prompt.endswith("背景人很多，倒着走")
    assert config.parse_size() in (*TASKS[task].published_sizes, (1024, 1024))
    assert TASKS[task].expert_boundary == BOUNDARIES.get(task)


def test_every_task_is_in_the_table() -> None:
    assert {*PUBLISHED, "toy"} == set(TASKS)


def test_the_shift_of_i2v_follows_the_size(image: str) -> None:
    shifts = {
        size: plan("task=i2v-14B", f"image={image}", "prompt=x", size).sampling.shift
        for size in ("size=832*480", "size=1280*720")
    }
    assert shifts == {"size=832*480": 3.0, "size=1280*720": 5.0}
    assert (
        plan("task=i2v-14B", f"image={image}", "prompt=x", "max_area=399360").sampling.shift == 3.0
    )
    assert (
        plan(
            "task=i2v-14B", f"image={image}", "prompt=x", "size=832*480", "sample.shift=7"
        ).sampling.shift
        == 7.0
    )


def test_a_size_with_an_image_is_an_area(image: str) -> None:
    made = plan("task=i2v-14B", f"image={image}", "prompt=x", "size=832*480")
    assert (made.width, made.height) == (832, 464)
    assert (
        "81 frames of 832x464 (size=832x480 is an area, the image of 1920x1080 gives the aspect)"
        in made.summary
    )
    assert made.size_advice is None


# Worked by hand from the formulas of the reference (Wan2.1 image2video.py, Wan2.2 textimage2video.py).
@pytest.mark.parametrize(
    ("task", "shape", "area", "expected"),
    [
        ("i2v-14B", (1920, 1080), "size=1280*720", (1280, 720)),
        ("i2v-14B", (1080, 1920), "size=832*480", (464, 832)),
        ("i2v-14B", (1000, 1000), "size=832*480", (624, 624)),
        ("i2v-A14B", (400, 300), "size=832*480", (720, 544)),
        ("ti2v-5B", (1920, 1080), "size=1280*704", (1248, 704)),
        ("ti2v-5B", (170, 120), "max_area=12288", (128, 96)),
    ],
)
def test_sizes_from_areas(
    task: str, shape: tuple[int, int], area: str, expected: tuple[int, int], tmp_path: Path
) -> None:
    Image.new("RGB", shape).save(tmp_path / "x.png")
    made = plan(f"task={task}", f"image={tmp_path / 'x.png'}", "prompt=x", area)
    assert (made.width, made.height) == expected


def test_the_last_frame_takes_the_shape_of_the_first(tmp_path: Path) -> None:
    Image.new("RGB", (160, 120), "red").save(tmp_path / "first.png")
    last = Image.new("RGB", (400, 100), "white")
    last.paste("blue", (133, 0, 267, 100))  # what remains when the centre is cut out
    last.save(tmp_path / "last.png")
    files = [f"first_frame={tmp_path / 'first.png'}", f"last_frame={tmp_path / 'last.png'}"]
    made = plan("task=flf2v-14B", *files, "prompt=x", "frame_num=13")
    assert [image.size for image in made.images] == [(160, 120), (160, 120)]
    assert made.images[1].getpixel((80, 60)) == (0, 0, 255)
    assert made.latent_shape[1] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=i2v-14B"], "image is missing: i2v-14B takes image=FILE"),
        (["task=i2v-14B", "image=nowhere.png"], "image=nowhere.png: there is no such file"),
        (["task=i2v-14B", "image=broken.png"], "image=broken.png cannot be read as an image"),
        (
            ["task=i2v-14B", "first_frame=IMAGE"],
            "first_frame is given, but i2v-14B takes image=FILE; flf2v-14B, i2v-A14B, fun-",
        ),
        (
            ["task=t2v-14B", "image=IMAGE"],
            "image is given, but t2v-14B takes no image; i2v-14B, i2v-A14B, fun-inp-*, "
            "fun-control-*, fun-camera-*, s2v-14B, ti2v-5B would take image",
        ),
        (
            ["task=flf2v-14B"],
            "first_frame and last_frame are missing: flf2v-14B takes first_frame=FILE last_frame=FILE",
        ),
        (["task=flf2v-14B", "first_frame=IMAGE"], "last_frame is missing"),
        (["task=flf2v-14B", "last_frame=IMAGE"], "first_frame is missing"),
        (
            ["task=flf2v-14B", "first_frame=IMAGE", "last_frame=IMAGE", "frame_num=1"],
            "must be at least 5",
        ),
        (["task=ti2v-5B", "max_area=1000"], "max_area=1000 needs an image"),
        (["task=ti2v-5B", "size=1280*720"], "the nearest that work are 1280x704 and 1280x736"),
        (
            ["task=ti2v-5B", "image=IMAGE", "max_area=10"],
            "an area of 10 pixels is too small for this image's shape",
        ),
        (
            ["task=t2v-14B", "sample.guide_scale=[3,4]"],
            "t2v-14B has one transformer and needs one number",
        ),
        (["task=t2v-A14B", "sample.guide_scale=[3]"], "is neither a number nor [low, high]"),
        (["task=t2v-A14B", "sample.guide_scale=high"], "is neither a number nor [low, high]"),
        (["task=t2v-14B", "sample.shift=null"], "t2v-14B has no default by size"),
        (["task=t2v-14B", "max_area=0"], "max_area=0 must be above 0"),
    ],
)
def test_bad_images_say_what_would_work(
    arguments: list[str], message: str, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(InputError) as caught:
        plan(*(argument.replace("IMAGE", image) for argument in arguments), "prompt=x")
    assert message in str(caught.value)


def test_one_scale_is_for_both_experts() -> None:
    assert plan("task=t2v-A14B", "prompt=x", "sample.guide_scale=2").sampling.guide_scales == (
        2.0,
        2.0,
    )
    assert plan("task=t2v-A14B", "prompt=x", "sample.guide_scale=1").negative_prompt is None
    assert plan("task=t2v-A14B", "prompt=x", "sample.guide_scale=[1,2]").negative_prompt is not None


@pytest.mark.parametrize(
    ("arguments", "latent_shape", "num_tokens"),
    [
        (["task=t2v-14B"], (16, 21, 90, 160), 75600),
        (["task=t2v-1.3B"], (16, 21, 60, 104), 32760),
        (["task=t2v-1.3B", "size=480x832", "frame_num=1"], (16, 1, 104, 60), 1560),
        (["task=t2i-14B"], (16, 1, 128, 128), 4096),
        (["task=ti2v-5B"], (48, 31, 44, 80), 27280),
        (["task=t2v-A14B"], (16, 21, 90, 160), 75600),
    ],
)
def test_token_counts(arguments: list[str], latent_shape: tuple[int, ...], num_tokens: int) -> None:
    made = plan(*arguments, "prompt=x")
    assert (made.latent_shape, made.num_tokens) == (latent_shape, num_tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["task=toy", "frame_num=80"],
            "frame_num=80 is not 4n + 1; the nearest that work are 77 and 81",
        ),
        (["task=toy", "frame_num=0"], "the nearest that work are 1 and 5"),
        (["task=t2i-14B", "prompt=x", "frame_num=5"], "must be 1: t2i-14B generates one image"),
        (["task=toy", "size=830*480"], "the nearest that work are 816x480 and 832x480"),
        (["task=toy", "size=8*8"], "the nearest that work are 16x16 and 16x16"),
        (["task=toy", "size=0*480"], "size=0*480 is not WIDTHxHEIGHT"),
        (["task=toy", "size=big"], "size=big is not WIDTHxHEIGHT, e.g. size=832x480"),
        (["task=toy", "prompt="], "prompt is empty"),
        (["task=toy", "prompt=  "], "prompt is empty"),
        (["task=t2v-14B"], "prompt is missing"),
        (
            ["task=toy", "prompt=@nowhere.txt"],
            "cannot read nowhere.txt (No such file or directory)",
        ),
        (["task=toy", "sample.steps=0"], "sample.steps=0 must be at least 1"),
        (["task=toy", "sample.shift=0"], "sample.shift=0.0 must be above 0"),
        (
            ["task=toy", "sample.solver=dpm"],
            "is not one of unipc, dpm++, euler, fun_euler, lcm, rcm, rcm_ode; did you mean 'dpm++'?",
        ),
        (["task=toy", "dtype=bf16"], "is not one of bfloat16, float32; did you mean 'bfloat16'?"),
        (["task=toy", "fps=0"], "fps=0 must be at least 1"),
        (["task=toy", "seed=-2"], "seed=-2 must be 0 or larger, or -1"),
        (["task=toy", "output.name=a/b"], "folders go into output.dir"),
        (["task=toy", "latents=nowhere.safetensors"], "cannot be read as saved latents"),
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


@pytest.mark.parametrize("size", [[], ["size=128x128"], ["size=128*128"]])
def test_names_are_those_of_earlier_versions(size: list[str]) -> None:
    """However the size is written, the name is the one that 16655d2 gave for 128*128."""
    assert plan("task=toy", "prompt=a red circle", *size).name == "toy_a-red-circle_42_3e4325"


def test_names_are_safe_file_names() -> None:
    name = plan("task=toy", "prompt=a/b: c*?", "seed=3").name
    assert re.fullmatch("toy_a-b-c_3_[0-9a-f]{6}", name)
    others = [
        ("prompt=a/b: c+?", "seed=3"),
        ("prompt=a/b: c*?", "seed=3", "sample.steps=2"),
        ("prompt=a/b: c*?", "seed=3", "quant=int8"),
    ]
    assert len({name, *(plan("task=toy", *settings).name for settings in others)}) == 4
    assert (
        plan(
            "task=toy", "prompt=a/b: c*?", "seed=3", "parallel.timeout=9", "output.dir=elsewhere"
        ).name
        == name
    )
    assert len(plan("task=toy", "prompt=" + "猫" * 500).name.encode()) < 200
    assert plan("task=toy", "output.name=clip.mp4").name == "clip"


def test_saved_latents_decide_the_size(tmp_path: Path) -> None:
    file = tmp_path / "x.latents.safetensors"
    save_file({"latents": torch.zeros(16, 3, 6, 10)}, file)
    made = plan("task=t2v-14B", f"latents={file}")
    assert (made.width, made.height, made.frame_num, made.name) == (80, 48, 9, "x")
    save_file({"latents": torch.zeros(8, 3, 6, 10)}, file)
    with pytest.raises(InputError, match=r"needs \(16, T, h, w\)"):
        plan("task=t2v-14B", f"latents={file}")


def launched(monkeypatch: pytest.MonkeyPatch, num_ranks: int, ranks_per_node: int) -> None:
    place = {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": ranks_per_node,
    }
    for key, value in (place | {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500}).items():
        monkeypatch.setenv(key, str(value))


@pytest.mark.parametrize(
    ("task", "num_ranks", "ranks_per_node", "arguments", "degrees"),
    [
        ("t2v-14B", 8, 8, [], (1, 2, 1, 4)),
        ("t2v-14B", 8, 8, ["sample.guide_scale=1"], (1, 1, 1, 8)),
        ("t2v-1.3B", 8, 8, [], (1, 2, 1, 4)),
        ("t2v-1.3B", 8, 8, ["parallel.cfg=1"], (1, 1, 2, 4)),
        ("t2v-14B", 16, 8, [], (1, 2, 1, 8)),
        ("t2v-14B", 16, 8, ["parallel.cfg=1"], (1, 1, 2, 8)),
        ("t2v-14B", 3, 3, [], (1, 1, 3, 1)),
        ("t2v-14B", 5, 5, [], (1, 1, 1, 5)),
        ("t2v-14B", 7, 7, [], (1, 1, 7, 1)),
        ("ti2v-5B", 6, 6, [], (1, 2, 1, 3)),
        ("t2v-14B", 4, 2, [], (1, 2, 1, 2)),
        ("t2v-14B", 8, 8, ["parallel.ulysses=2"], (1, 2, 2, 2)),
        ("t2v-14B", 8, 8, ["parallel.ring=8"], (1, 1, 8, 1)),
    ],
)
def test_degrees(
    task: str,
    num_ranks: int,
    ranks_per_node: int,
    arguments: list[str],
    degrees: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched(monkeypatch, num_ranks, ranks_per_node)
    found = plan(f"task={task}", "prompt=x", *arguments).degrees
    assert (found.dp, found.cfg, found.ring, found.ulysses) == degrees


@pytest.mark.parametrize("num_heads", [4, 12, 24, 40])
@pytest.mark.parametrize("guided", [True, False])
def test_any_number_of_ranks_works(num_heads: int, guided: bool) -> None:
    for num_ranks in range(1, 65):
        for ranks_per_node in (
            degree for degree in range(1, num_ranks + 1) if num_ranks % degree == 0
        ):
            found = plan_degrees(
                num_ranks, ranks_per_node=ranks_per_node, num_heads=num_heads, is_guided=guided
            )
            assert found.num_ranks == num_ranks
            assert num_heads % found.ulysses == 0
            assert ranks_per_node % found.ulysses == 0
            assert found.cfg == (2 if guided and num_ranks % 2 == 0 else 1)


@pytest.mark.parametrize(
    ("num_ranks", "arguments", "message"),
    [
        (
            8,
            ["parallel.ulysses=8"],
            "does not divide the 12 heads (it may be 1, 2, 3, 4, 6, 12); "
            "on 8 ranks use parallel.cfg=2 parallel.ulysses=4",
        ),
        (
            4,
            ["parallel.ulysses=2", "parallel.ring=4"],
            "parallel.ring=4 x parallel.ulysses=2 does not fit 4 ranks",
        ),
        (3, ["parallel.cfg=2"], "parallel.cfg=2 does not fit 3 ranks"),
        (4, ["parallel.cfg=4"], "guidance has two passes"),
        (
            4,
            ["parallel.ring=2", "attention=8bit"],
            "attention=8bit returns no log-sum-exp, which parallel.ring needs to merge partial results",
        ),
        (
            4,
            ["parallel.usp=xfuser", "dtype=float32"],
            "parallel.usp=xfuser uses FlashAttention, which does not support dtype=float32",
        ),
        (4, ["parallel.cfg=2", "sample.guide_scale=1"], "parallel.cfg=2 needs guidance"),
        (4, ["parallel.ring=0"], "parallel.ring=0 must be at least 1"),
        (
            4,
            ["parallel.dp=2"],
            "needs several videos (jobs=FILE), and this run generates one",
        ),
        (1, ["fsdp.dit=true"], "fsdp.dit=true needs several ranks to shard over, but there is one"),
        (1, ["fsdp.t5=true"], "fsdp.t5=true needs several ranks to shard over, but there is one"),
        (1, ["parallel.ulysses=2"], "parallel.ulysses=2 does not fit 1 rank"),
    ],
)
def test_impossible_degrees(
    num_ranks: int, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, num_ranks, num_ranks)
    with pytest.raises(InputError) as caught:
        plan("task=t2v-1.3B", "prompt=x", *arguments)
    assert message in str(caught.value)


def test_heads_are_the_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, 3, 3)
    assert plan("task=t2v-1.3B", "prompt=x").degrees.ulysses == 3
    assert (
        plan("task=t2v-1.3B", "prompt=x", f"ckpt_dir={FIXTURES / 'wan2.1-t2v'}").degrees.ring == 3
    )  # it has 4


def test_large_weights_are_sharded_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not plan("task=t2v-14B", "prompt=x").base_arrangement.shard_dit
    launched(monkeypatch, 4, 4)
    assert plan("task=t2v-14B", "prompt=x").base_arrangement.shard_dit
    assert not plan("task=t2v-1.3B", "prompt=x").base_arrangement.shard_dit
    assert not plan("task=t2v-14B", "prompt=x", "fsdp.dit=false").base_arrangement.shard_dit
    assert plan(
        "task=t2v-1.3B", "prompt=x", "fsdp.dit=true", "fsdp.t5=true"
    ).base_arrangement.shard_t5
