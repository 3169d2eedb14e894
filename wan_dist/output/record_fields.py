"""Record fields that follow from a video's settings and plan: what it is, lossy settings, and speed.

And the settings that its file carries.
"""

from pathlib import Path

from wan_dist import __version__
from wan_dist.config.choices import EIGHT_BIT_BACKENDS
from wan_dist.config.model_settings import ModelSettings
from wan_dist.config.recorded_settings import format_settings
from wan_dist.config.settings import SettingValues
from wan_dist.output.record import SourceEntry, VideoRecord
from wan_dist.planning.flops import count_forward_flops
from wan_dist.planning.plan import RunPlan
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.runtime.file_hash import hash_unchanged_file
from wan_dist.tasks.animate import DrivingVideo


def describe_video(record: VideoRecord, plan: VideoPlan) -> None:
    """Set the fields that identify a video, made or not: name, prompt, seed, size and lossy settings."""
    record.name = plan.name
    record.prompt = plan.prompt
    record.seed = plan.seed
    left, top, right, bottom = plan.crop
    record.width, record.height = right - left, bottom - top
    record.num_frames = plan.num_shown_frames
    if plan.num_clips > 1:
        record.num_clips = plan.num_clips
    record.fps = plan.fps
    if (source := _describe_source(plan)) is not None:
        record.source = source
    record.distance = list_lossy_settings(plan.model_settings)


def _describe_source(plan: VideoPlan) -> SourceEntry | None:
    """Return the source video, of a driving video its poses; None without one that can be read."""
    if isinstance(plan.driving, DrivingVideo):
        setting, video = "src_pose", plan.driving.pose
    elif plan.driving is not None:
        setting, video = "src_video", plan.driving.video
    elif plan.source is not None:
        setting, video = "src_video", plan.source.video
    else:
        return None
    path = Path(video.file).expanduser().absolute()
    try:
        return {"setting": setting, "file": str(path), "sha256": hash_unchanged_file(path)}
    except OSError:
        return None


def describe_settings(settings: SettingValues, plan: VideoPlan, digest: str) -> str:
    """Return the text that a result's file carries, from which ``from=FILE`` makes it again.

    ``settings``: of `select_recorded_settings`; ``digest``: the result's.
    """
    resolved_settings: dict[str, object] = {"seed": plan.seed}
    if settings["prompt"] is not None:
        resolved_settings["prompt"] = plan.prompt
    if settings.get("prompt_ref") is not None:
        resolved_settings["prompt_ref"] = plan.driving_prompt
    # without guidance it is not read
    resolved_settings["negative_prompt"] = plan.negative_prompt
    return format_settings({**settings, **resolved_settings}, version=__version__, digest=digest)


def list_lossy_settings(settings: ModelSettings) -> list[str]:
    """Return the settings that change a result beyond rounding errors."""
    lossy_settings = {
        "quant": settings.quant if settings.quant != "none" else None,
        "attention": settings.attention if settings.attention in EIGHT_BIT_BACKENDS else None,
        "cache.steps": settings.step_cache,
    }
    return [f"{key}={value}" for key, value in lossy_settings.items() if value is not None]


def record_speed(record: VideoRecord, plan: RunPlan, seconds: float, num_steps: int) -> None:
    """Set seconds per step, and TFLOP/s of one rank in the steps that the cache did not guess.

    Neither is set where there is nothing to measure. ``seconds`` are those of all ``num_steps`` steps.
    """
    if num_steps == 0 or seconds == 0:
        return
    operations_per_step = len(plan.workload.text_lengths) * count_forward_flops(
        plan.workload.model_dims.transformer, plan.num_tokens
    )
    num_computed_steps = num_steps - (record.guessed_steps or 0)
    rank_operations = num_computed_steps * operations_per_step / plan.workload.num_ranks
    record.step_seconds = round(seconds / num_steps, 4)
    record.tflops = round(rank_operations / seconds / 1e12, 3)
