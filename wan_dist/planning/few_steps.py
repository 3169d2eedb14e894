"""Few-step models, told by the names of their files, and the presets that they want; no torch."""

import re
from collections.abc import Sequence
from pathlib import Path

from wan_dist.config.sections import SampleConfig
from wan_dist.planning.sampling_plan import SamplingPlan

PRESETS_BY_NAME = {
    r"animate[-_ ]?2.*distill": "animate-2-10step",
    r"fusioni?[-_ ]?x": "fusionx-8step",
    r"acc[-_]?vid": "accvideo-10step",
    r"causvid": "causvid-lora",
    r"fast[-_]?wan": "fastwan-3step",
    r"turbo(wan|diffusion)": "turbowan-4step",
    r"\brcm": "rcm-4step",
    r"mean[-_]?flow": "meanflow-2step",
    r"lightning|seko": "lightning-4step",
    r"lightx2v|step[-_ ]?distill|[48][-_ ]?steps?": "lightx2v-4step",
}
"""Preset of a few-step model by what its name has, the more particular first."""
_MAX_DISTILLED_STEPS = 12
_MIN_BASE_STEPS = 10


def find_few_step_model(files: Sequence[Path]) -> tuple[str, str] | None:
    """Return the name of the first file that says it is of a few-step model, and that model's preset.

    The folder's name counts too: Wan2.2-Lightning's files have the same names for each model.
    """
    for file in files:
        name = f"{file.parent.name}/{file.name}"
        for pattern, preset in PRESETS_BY_NAME.items():
            if re.search(pattern, name, re.IGNORECASE):
                return file.name, preset
    return None


def advise_on_steps(
    sample: SampleConfig,
    sampling: SamplingPlan,
    files: Sequence[Path] | None,
    preset: str | None,
) -> str | None:
    """Return a warning where a few-step model is run as a base model, or the other way round; else None.

    ``files``: of the transformer, its LoRAs and its folder; None for a task without published models.
    """
    if files is None:
        return None
    if (found := find_few_step_model(files)) is not None:
        name, fitting_preset = found
        if not sampling.is_guided and sample.steps <= _MAX_DISTILLED_STEPS:
            return None
        guidance_text = " with guidance" if sampling.is_guided else ""
        return (
            f"{name} is a few-step model by its name, and this run makes {sample.steps} steps"
            f"{guidance_text}: such videos are blurred or burnt; use preset={fitting_preset}"
        )
    if sample.steps >= _MIN_BASE_STEPS or preset is not None:
        return None
    return (
        f"{sample.steps} steps are too few for a base model, the video will be blurred; "
        "use a few-step LoRA with its preset (e.g. lora=FILE preset=lightx2v-4step), or 20 steps or more"
    )
