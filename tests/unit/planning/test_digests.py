"""A result is made again where something that it depends on has changed, and only there."""

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from wan_dist.config import schema
from wan_dist.config.arguments import prepare_arguments
from wan_dist.config.compose import compose_config
from wan_dist.config.output_section import OutputConfig
from wan_dist.config.overrides import override_config
from wan_dist.config.schema import RunConfig, list_settings, read_settings
from wan_dist.config.settings import Effect, add_setting
from wan_dist.output.video_file import save_tensors
from wan_dist.planning import digests
from wan_dist.planning.digests import WeightsDigests
from wan_dist.planning.plan import make_plan
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.runtime.errors import InputError

DIFFERENT = {
    "seed": 4,
    "prompt": "a cube",
    "negative_prompt": "blurry",
    "size": "80*64",
    "frame_num": 9,
    "clips": 2,
    "noise_device": "cuda",
    "dtype": "bfloat16",
    "quant": "int8",
    "attention": "8bit",
    "sample.steps": 9,
    "sample.solver": "euler",
    "sample.shift": 4.0,
    "sample.guide_scale": 3.0,
    "sample.sigmas": [1.0, 0.5],
    "sample.timesteps": "float",
    "sample.sigma_max": 200.0,
    "noise_layout": "frames_first",
    "sla_topk": 0.2,
    "vsa_sparsity": 0.5,
    "cache.steps": "easy",
    "output.name": "other",
}
OF_THE_RESULT = {
    "fps": 8,
    "output.save_tensor": True,
    "output.video": "ffv1",
    "output.crf": 20,
    "output.metadata": False,
    "memory.vae_dtype": "bfloat16",
}
WITHOUT_EFFECT = {
    "lora_unmatched": "allow",
    "parallel.timeout": 60.0,
    "parallel.load_timeout": 60.0,
    "parallel.dp": 1,
    "output.dir": "elsewhere",
    "output.save_latents": False,
    "output.events": "events.jsonl",
    "output.preview": 2,
    "memory.dit": "stream",
    "memory.gguf": "compressed",
    "memory.slice_tokens": 64,
    "memory.passes": "apart",
    "cache.dir": "elsewhere",
    "cache.threshold": 0.5,
    "device": "cpu",
    "retry_failed": True,
    "serve.port": 8000,
    "serve.host": "::1",
    "serve.token_file": "token.txt",
    "serve.max_queue": 7,
    "serve.max_upload_mib": 5.0,
}
ELSEWHERE = {
    *("task", "ckpt_dir", "dit_file", "image", "first_frame", "last_frame", "max_area", "latents"),
    *("t5_file", "vae_file", "clip_file"),
    "output.audio",
    *("src_video", "src_mask", "src_ref_images", "context_scale", "camera", "fit"),
    *("src_root_path", "src_pose", "src_face", "src_ref", "src_bg"),
    *("replace_flag", "use_relighting_lora", "refert_num", "prompt_ref", "first_frame_bias"),
    *("audio", "pose_video", "num_clip", "infer_frames", "start_from_ref", "sync"),
    "preset",
    *("jobs", "parallel.cfg", "parallel.ring", "parallel.ulysses", "parallel.usp"),
    *("fsdp.dit", "fsdp.t5", "memory.t5", "memory.vae", "cache.size_gib"),
    *("memory.budget_gib", "memory.host_budget_gib"),
    *("lora", "lora_strength", "lora_high", "lora_high_strength", "lora_low", "lora_low_strength"),
}
"""Tried with their files, on several ranks, or together with another setting."""


@cache
def first() -> RunConfig:
    config = compose_config(
        prepare_arguments(
            ["task=toy", "prompt=a ball", "seed=3", "size=64*64", "frame_num=5", "output.name=clip"]
        )
    )
    assert config is not None
    return config


WEIGHTS = WeightsDigests("all", "vae")


def compute_latents_digest(
    config: RunConfig, plan: VideoPlan, weights: WeightsDigests, *, is_job: bool = False
) -> str:
    settings = read_settings(config, Effect.LATENTS)
    return digests.compute_latents_digest(settings, plan, weights, is_job=is_job)


def compute_result_digest(
    config: RunConfig, plan: VideoPlan, latents: str, weights: WeightsDigests
) -> str:
    settings = read_settings(config, Effect.RESULT)
    return digests.compute_result_digest(settings, plan, latents, weights)


def both(
    weights: WeightsDigests = WEIGHTS,
    *,
    is_job: bool = False,
    num_ranks: int = 1,
    **settings: object,
) -> tuple[str, str]:
    """Return the digests of the latents and of the result."""
    config = override_config(
        first(), [(key, value, f"{key}={value}") for key, value in settings.items()]
    )
    plan = make_plan(config, ranks=(num_ranks, num_ranks))
    latents = compute_latents_digest(config, plan, weights, is_job=is_job)
    return latents, compute_result_digest(config, plan, latents, weights)


def differing(one: tuple[str, str], other: tuple[str, str]) -> tuple[bool, bool]:
    return one[0] != other[0], one[1] != other[1]


@pytest.mark.parametrize("key", DIFFERENT)
def test_both_change_with_what_latents_depend_on(key: str) -> None:
    assert differing(both(), both(**{key: DIFFERENT[key]})) == (True, True)


@pytest.mark.parametrize("key", OF_THE_RESULT)
def test_only_the_results_changes_with_what_is_made_of_latents(key: str) -> None:
    assert differing(both(), both(**{key: OF_THE_RESULT[key]})) == (False, True)


def test_a_setting_declares_the_effect_that_it_has() -> None:
    effects = {key: setting.metadata["effect"] for key, setting in list_settings().items()}
    assert set(effects) == {*DIFFERENT, *OF_THE_RESULT, *WITHOUT_EFFECT, *ELSEWHERE}
    for key in DIFFERENT:
        assert Effect.LATENTS in effects[key], key
    for key in OF_THE_RESULT:
        assert Effect.RESULT in effects[key], key
    for key in WITHOUT_EFFECT.keys() - {"cache.threshold"}:  # which needs cache.steps
        assert not effects[key] & (Effect.LATENTS | Effect.RESULT), key


def test_a_new_setting_counts_unless_it_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    before = both(), make_plan(replace(first(), output=OutputConfig())).name
    new_setting = add_setting(False, "", Effect.LATENTS, is_new=True)
    settings = list_settings() | {"retry_failed": new_setting}
    monkeypatch.setattr(schema, "list_settings", lambda: settings)
    assert (both(), make_plan(replace(first(), output=OutputConfig())).name) == before
    assert differing(before[0], both(retry_failed=True)) == (True, True)


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_neither_changes_with_how_a_video_is_made(key: str) -> None:
    assert differing(both(), both(**{key: WITHOUT_EFFECT[key]})) == (False, False)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"parallel.cfg": 2},
        {"parallel.cfg": 1, "parallel.ring": 2},
        {"fsdp.dit": True, "fsdp.t5": True},
    ],
)
def test_neither_changes_with_the_ranks(settings: dict[str, object]) -> None:
    assert differing(both(), both(num_ranks=2, **settings)) == (False, False)  # type: ignore[arg-type]


def test_both_change_with_the_weights() -> None:
    assert differing(both(), both(WeightsDigests("others", "vae"))) == (True, True)
    assert differing(both(), both(WeightsDigests("all", "other"))) == (False, True)


def test_no_two_changes_are_taken_for_one_another() -> None:
    changes = DIFFERENT | OF_THE_RESULT
    found = [both(**{key: value})[1] for key, value in changes.items()]
    assert len({both()[1], *found}) == len(found) + 1


@pytest.mark.parametrize("name", ["FORMAT_VERSION", "NUMERICS_VERSION"])
def test_both_change_with_the_version_of_what_is_computed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = both()
    monkeypatch.setattr(digests, name, getattr(digests, name) + 1)
    config, plan = first(), make_plan(first())
    assert differing(before, both()) == (True, True)
    assert compute_result_digest(config, plan, before[0], WEIGHTS) != before[1]  # of itself, too


def test_an_image_counts_with_what_is_in_it(tmp_path: Path) -> None:
    file, copy = tmp_path / "a.png", tmp_path / "b.png"
    Image.new("RGB", (64, 64), "red").save(file)
    red = both(image=str(file))
    assert differing(both(), red) == (True, True)
    assert differing(red, both(**{"image": str(file), "memory.vae_dtype": "bfloat16"})) == (
        True,
        True,
    )  # which encodes it
    copy.write_bytes(file.read_bytes())
    assert both(image=str(copy)) == red
    Image.new("RGB", (64, 64), "blue").save(file)
    os.utime(file, (1, 1))  # two writings within a tick of the clock look alike
    assert differing(red, both(image=str(file))) == (True, True)
    copy.replace(file)
    assert both(image=str(file)) == red


def test_which_frame_an_image_is_counts(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "red").save(file)
    plan = make_plan(first())
    found = {
        compute_latents_digest(replace(first(), **{key: str(file)}), plan, WEIGHTS)
        for key in ("image", "first_frame", "last_frame")
    }
    assert len(found) == 3


def test_given_latents_count_with_what_is_in_them(tmp_path: Path) -> None:
    file = tmp_path / "a.latents.safetensors"
    save_tensors(file, {"latents": torch.zeros(16, 2, 8, 8)})
    zeros = both(latents=str(file))
    assert differing(zeros, both(WeightsDigests("others", "vae"), latents=str(file))) == (
        False,
        False,
    )
    assert both(latents=str(file), **{"seed": 5, "sample.steps": 9}) == zeros
    for setting in ({"fps": 8}, {"output.save_tensor": True}, {"memory.vae_dtype": "bfloat16"}):
        assert differing(zeros, both(latents=str(file), **setting)) == (False, True)
    save_tensors(file, {"latents": torch.ones(16, 2, 8, 8)})
    assert differing(zeros, both(latents=str(file))) == (True, True)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    config, plan = replace(first(), image=str(tmp_path / "gone.png")), make_plan(first())
    with pytest.raises(
        InputError, match=r"image=.*gone.png cannot be read: No such file or directory"
    ):
        compute_latents_digest(config, plan, WEIGHTS)


def test_a_seed_that_is_drawn_is_drawn_once_for_a_job_of_slurm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for number in ("1", "2"):
        monkeypatch.setenv("SLURM_JOB_ID", number)
        assert both(seed=-1) == both(seed=-1)
        found.append((both(seed=-1), both(seed=-1, is_job=True), both()))
    assert [one == other for one, other in zip(*found, strict=True)] == [False, True, True]


def test_sound_counts_by_its_content(tmp_path: Path) -> None:
    sound, copy, other = (tmp_path / name for name in ("a.wav", "b.wav", "c.wav"))
    for path, content in ((sound, b"one"), (copy, b"one"), (other, b"two")):
        path.write_bytes(content)
    results = [both(**{"output.audio": str(path)}) for path in (sound, copy, other)]
    assert differing(both(), results[0]) == (False, True)
    assert differing(results[0], results[1]) == (False, False)
    assert differing(results[0], results[2]) == (False, True)
    with pytest.raises(InputError, match=r"output.audio=.*none.wav cannot be read: No such file"):
        both(**{"output.audio": str(tmp_path / "none.wav")})
