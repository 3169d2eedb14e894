"""Settings of a video's frames, as requested; `planning.video_settings` resolves them."""

from dataclasses import dataclass
from typing import NamedTuple

from wan_dist.config.schema import RunConfig


class AnimateSettings(NamedTuple):
    """Settings that only tasks with a driving video have."""

    src_root_path: str | None
    replace_flag: bool
    use_relighting_lora: bool
    refert_num: int


class SpeechSettings(NamedTuple):
    """Settings that only tasks with a speaking picture have."""

    num_clip: int | None
    infer_frames: int
    start_from_ref: bool
    sync: str


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """What is requested of a video's frames."""

    size: tuple[int, int]
    """(width, height) in pixels; with an image, an area."""
    max_area: int | None
    """In pixels, instead of the size, where there is an image."""
    frame_num: int
    num_clips: int
    input_files: dict[str, str]
    """By setting, see `list_input_files`."""
    context_scale: float
    camera: str | None
    fit: str
    fps: int
    prompt_ref: str | None
    first_frame_bias: float
    usp: str
    """The implementation of sequence parallelism."""
    animate: AnimateSettings
    speech: SpeechSettings
    latents_file: str | None
    """Saved latents, which have their own size and number of frames."""


def collect_video_settings(config: RunConfig, input_files: dict[str, str]) -> VideoSettings:
    """Return the settings of a video's frames; ``input_files`` as of `list_input_files`."""
    return VideoSettings(
        size=config.parse_size(),
        max_area=config.max_area,
        frame_num=config.frame_num,
        num_clips=config.clips,
        input_files=input_files,
        context_scale=config.context_scale,
        camera=config.camera,
        fit=config.fit,
        fps=config.fps,
        prompt_ref=config.prompt_ref,
        first_frame_bias=config.first_frame_bias,
        usp=config.parallel.usp,
        animate=AnimateSettings(
            config.src_root_path,
            config.replace_flag,
            config.use_relighting_lora,
            config.refert_num,
        ),
        speech=SpeechSettings(
            config.num_clip, config.infer_frames, config.start_from_ref, config.sync
        ),
        latents_file=config.latents,
    )
