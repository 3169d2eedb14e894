"""Presets: what each sets, that every value can be overridden, and the advice about steps."""

from pathlib import Path

import pytest

from wan_dist.config.compose import CONFIG_FOLDER
from wan_dist.planning.few_steps import PRESETS_BY_NAME, find_few_step_model
from wan_dist.planning.plan import make_plan
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.run_config import read_config

PRESETS = sorted(path.stem for path in (CONFIG_FOLDER / "preset").glob("*.yaml"))


def read(*settings: str):
    config = read_config(["prompt=a cat", *settings])
    assert config is not None
    return config


def plan(*settings: str):
    return make_plan(read(*settings), ranks=(1, 1), is_dry_run=True)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "none"])
def test_a_preset_names_itself_and_turns_guidance_off(preset: str) -> None:
    task = "task=animate-2-14B" if preset.startswith("animate-2") else "task=t2v-A14B"
    made = plan(task, f"preset={preset}")
    assert read(task, f"preset={preset}").preset == preset
    assert (made.sampling.guide_scales, made.negative_prompt) == ((1, 1), None)
    assert 2 <= len(made.sampling.schedule) <= 10
    assert made.steps_advice is None


def test_presets_are_as_published() -> None:
    names = ("lightx2v-4step", "lightning-4step", "rcm-4step", "fastwan-3step", "meanflow-2step")
    schedules = {name: plan("task=t2v-14B", f"preset={name}").sampling.schedule for name in names}
    told = {
        name: [round(timestep, 2) for timestep in schedule.timesteps]
        for name, schedule in schedules.items()
    }
    assert told == {
        "lightx2v-4step": [1000, 937.5, 833.33, 625],
        "lightning-4step": [1000, 937.5, 833.33, 625],
        "rcm-4step": [988, 932, 852, 608],
        "fastwan-3step": [1000, 757, 522],
        "meanflow-2step": [1000, 833.33],
    }
    assert (
        plan("task=t2v-1.3B", "preset=none").sampling.schedule
        == plan("task=t2v-1.3B").sampling.schedule
    )


def test_values_of_a_preset_can_be_overridden() -> None:
    made = plan("task=t2v-14B", "preset=lightx2v-4step", "sample.steps=8", "sample.solver=lcm")
    assert made.sampling.description == "8 steps of lcm, shift 5, no guidance, one pass a step"
    with pytest.raises(InputError, match=r"preset/unknown"):
        read("task=t2v-14B", "preset=unknown")


@pytest.mark.parametrize(
    ("file", "preset"),
    [
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors", "lightx2v-4step"),
        (
            "wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors",
            "lightx2v-4step",
        ),
        (
            "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/high_noise_model.safetensors",
            "lightning-4step",
        ),
        ("Wan21_CausVid_14B_T2V_lora_rank32.safetensors", "causvid-lora"),
        ("Wan21_AccVid_T2V_14B_lora_rank32_fp16.safetensors", "accvideo-10step"),
        ("Wan2.1_I2V_14B_FusionX_LoRA.safetensors", "fusionx-8step"),
        ("Wan14BT2VFusioniX_fp16.safetensors", "fusionx-8step"),
        ("FastWan2.2-TI2V-5B-FullAttn-Diffusers", "fastwan-3step"),
        ("TurboWan2.1-T2V-14B-480P.pth", "turbowan-4step"),
        ("rCM_Wan2.1_T2V_1.3B_480p.pt", "rcm-4step"),
        ("wan2.1_mean_flow_distill.safetensors", "meanflow-2step"),
        ("wan_animate_2/wan_animate_2_bf16_distillation.safetensors", "animate-2-10step"),
        ("wan_animate_2/wan_animate_2_bf16.safetensors", None),
        ("Wan2.1-T2V-14B", None),
        ("diffusion_pytorch_model.safetensors", None),
        ("detailz-wan.safetensors", None),
    ],
)
def test_few_step_models_are_told_by_their_names(file: str, preset: str | None) -> None:
    found = find_few_step_model([Path("models") / file])
    assert (found and found[1]) == preset


def test_every_named_preset_exists() -> None:
    assert set(PRESETS_BY_NAME.values()) <= set(PRESETS)


def test_steps_that_do_not_fit_the_model_get_a_note(tmp_path: Path) -> None:
    distilled = f"lora={tmp_path / 'x_lightx2v_4step.safetensors'}"
    assert plan("task=t2v-14B").notes == []
    assert "few steps" not in str(plan("task=t2v-14B", distilled, "preset=lightx2v-4step").notes)
    (note,) = plan("task=t2v-14B", distilled).notes
    assert "makes 50 steps with guidance" in note
    assert "preset=lightx2v-4step" in note
    (note,) = plan("task=t2v-14B", distilled, "sample.steps=4").notes
    assert "4 steps with guidance" in note
    (note,) = plan("task=t2v-14B", "sample.steps=4").notes
    assert "too few for a base model" in note
    assert plan("task=toy", "sample.steps=4").notes == []


def test_a_job_may_have_a_preset_of_its_own(tmp_path: Path) -> None:
    from wan_dist.jobs.planned_job import plan_jobs

    file = tmp_path / "jobs.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "preset": "lightx2v-4step", "seed": 3}\n')
    arguments = ["task=t2v-1.3B", f"jobs={file}"]
    jobs = plan_jobs(read(*arguments), arguments, ranks=(1, 1), gpu_bytes=None)
    assert [len(job.plan.sampling.schedule) for job in jobs] == [50, 4]
    assert jobs[1].config.seed == 3
    assert len({job.model_key for job in jobs}) == 1
