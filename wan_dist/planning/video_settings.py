"""Video settings resolved for a task: size, frames, texts, images; and the checks that cross fields."""

from collections.abc import Collection

from wan_dist.config.sections import CacheConfig
from wan_dist.config.video_settings import AnimateSettings, SpeechSettings, VideoSettings
from wan_dist.models.dims import ModelDims
from wan_dist.planning.saved_latents import MAX_VIDEO_SIDE
from wan_dist.planning.video_input import VideoInput, resolve_video_input
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.animate import AnimateInputs, DrivingVideo
from wan_dist.tasks.animate_2 import Animate2Inputs, FollowedVideo
from wan_dist.tasks.base import AREA_480P, Task, TaskInputs, TeaCacheFit
from wan_dist.tasks.camera import MOTIONS
from wan_dist.tasks.fun import FunInputs
from wan_dist.tasks.image_sizes import ImageSizeReader
from wan_dist.tasks.registry import TASKS
from wan_dist.tasks.speech import CLIP_FRAMES, FRAME_RATE, SpeechInputs
from wan_dist.tasks.vace import VaceInputs

NamedSettings = AnimateSettings | SpeechSettings
_MAX_FRAMES = 10**6 + 1


def read_video_input(
    settings: VideoSettings,
    task: Task,
    image_size_reader: ImageSizeReader | None,
    *,
    is_dry_run: bool,
) -> VideoInput:
    """Return the size of the video, of saved latents or of settings and images, and the images if decoded.

    Raises InputError for one that the task does not make.
    """
    _check_clips(settings, task)
    if settings.context_scale != 1 and not isinstance(task.inputs, VaceInputs):
        raise InputError(
            f"context_scale={settings.context_scale} is for tasks with src_video, and {task.name} "
            "has no such input; leave it out"
        )
    _check_camera(settings, task, is_dry_run=is_dry_run)
    if not isinstance(task.inputs, AnimateInputs):
        defaults = AnimateSettings(None, False, False, 1)
        _check_defaults(settings.animate, defaults, "a driving video", AnimateInputs, task)
    if isinstance(task.inputs, SpeechInputs):
        _check_speech(settings)
    else:
        no_speech = SpeechSettings(None, CLIP_FRAMES, False, "exact")
        _check_defaults(settings.speech, no_speech, "a speaking picture", SpeechInputs, task)
    _check_followed_settings(settings, task)
    video = resolve_video_input(settings, task, image_size_reader, is_dry_run=is_dry_run)
    _check_size(video.width, video.height, task)
    if video.speech is None:
        _check_frame_num(video.frame_num, task, video.num_images)
    return video


def _check_defaults(
    settings: NamedSettings,
    defaults: NamedSettings,
    purpose: str,
    kind: type[TaskInputs],
    task: Task,
) -> None:
    """Raise InputError for settings of another kind of inputs than the task's, unless at their defaults."""
    default_values = defaults._asdict()
    given = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in settings._asdict().items()
        if value != default_values[key]
    ]
    if given:
        names = ", ".join(name for name, other in TASKS.items() if isinstance(other.inputs, kind))
        raise InputError(
            f"{' and '.join(given)} is for {purpose}, and {task.name} takes {task.inputs.usage}; "
            f"leave it out, or use task={names}"
        )


def _check_speech(settings: VideoSettings) -> None:
    """Raise InputError for settings that a speaking picture does not have."""
    if settings.fps != FRAME_RATE:
        raise InputError(
            f"fps={settings.fps}: s2v-14B makes {FRAME_RATE} frames a second, to which the sound belongs; "
            "leave fps out"
        )
    if settings.frame_num != CLIP_FRAMES:
        raise InputError(
            f"frame_num={settings.frame_num}: the length of a speaking picture follows from the sound; give "
            "num_clip for fewer clips, or infer_frames for their length"
        )


def _check_followed_settings(settings: VideoSettings, task: Task) -> None:
    """Raise InputError for settings that a driving video of Animate-2 has alone, or cannot have."""
    if isinstance(task.inputs, Animate2Inputs):
        if settings.usp != "plain":
            raise InputError(
                f"parallel.usp={settings.usp} cannot attend to a driving video as {task.name} does; "
                "leave it out"
            )
        if settings.max_area is not None:
            raise InputError(
                f"max_area={settings.max_area}: {task.name} takes size=WIDTHxHEIGHT as an area"
            )
        if settings.frame_num < 5:
            raise InputError(f"frame_num={settings.frame_num}: clips of {task.name} have 5 or more")
        return
    given = {
        "prompt_ref": settings.prompt_ref,
        "first_frame_bias": settings.first_frame_bias or None,
    }
    if names := [f"{key}={value}" for key, value in given.items() if value is not None]:
        raise InputError(
            f"{' and '.join(names)} is for animate-2-14B, and {task.name} has no such input; "
            "leave it out"
        )


def _check_camera(settings: VideoSettings, task: Task, *, is_dry_run: bool) -> None:
    """Raise InputError for settings of the Fun models that the task does not take, or misses."""
    if settings.fit != "stretch" and not isinstance(task.inputs, FunInputs):
        raise InputError(
            f"fit={settings.fit} is for the Fun models, and {task.name} fits images as its "
            "reference does; leave it out"
        )
    if settings.camera is not None and not task.inputs.takes_camera:
        families = {task.family for task in TASKS.values() if task.inputs.takes_camera}
        raise InputError(
            f"camera={settings.camera} is given, but {task.name} has no camera adapter; "
            f"{', '.join(families)} takes camera"
        )
    is_needed = task.inputs.takes_camera and settings.latents_file is None and not is_dry_run
    if is_needed and settings.camera is None:
        raise InputError(
            f"camera is missing: {task.name} takes camera=FILE, a file of poses, or "
            f"one of {', '.join(MOTIONS)}"
        )


def check_models_take_inputs(
    task: Task,
    image_keys: Collection[str],
    driving: DrivingVideo | FollowedVideo | None,
    models: ModelDims,
) -> None:
    """Raise InputError for a reference image without a layer for it, and faces of another size."""
    if isinstance(driving, DrivingVideo) and models.face_encoder is not None:
        face, size = driving.face, models.face_encoder.image_size
        if face.width != size:
            raise InputError(
                f"src_face={face.file} is {face.width}x{face.height}, and this checkpoint takes faces of "
                f"{size}x{size}; write them in this size, as the preprocessing does"
            )
    has_reference = isinstance(task.inputs, FunInputs) and "src_ref_images" in image_keys
    if has_reference and not models.transformer.ref_conv_in_dim:
        raise InputError(
            "src_ref_images is given, but this checkpoint has no ref_conv, which takes a reference "
            "image, as the first Fun Control models; use version 1.1, or leave src_ref_images out"
        )


def choose_tea_fit(cache: CacheConfig, task: Task, area: int) -> TeaCacheFit | None:
    """Return TeaCache's fit to the task's model, None where it is not requested.

    ``area``: pixels of a frame. Raises InputError for a task whose model it has not been fitted to.
    """
    if cache.steps != "tea":
        return None
    if not task.tea_fits:
        supported_names = ", ".join(
            name for name, other_task in TASKS.items() if other_task.tea_fits
        )
        raise InputError(
            f"cache.steps=tea is fitted to the models of {supported_names}, "
            f"not to that of {task.name}; use cache.steps=easy"
        )
    tea_fit = task.tea_fits[0 if area <= AREA_480P else -1]
    return tea_fit if cache.threshold is None else tea_fit._replace(threshold=cache.threshold)


def _check_frame_num(frame_num: int, task: Task, num_images: int) -> None:
    """Raise InputError unless the task makes videos of ``frame_num`` frames from so many images."""
    if task.is_still and frame_num != 1:
        raise InputError(f"frame_num={frame_num} must be 1: {task.name} generates one image")
    stride = task.vae_stride[0]
    if frame_num < 1 or (frame_num - 1) % stride:
        nearest_below = max(frame_num - 1, 0) // stride * stride + 1
        raise InputError(
            f"frame_num={frame_num} is not {stride}n + 1; "
            f"the nearest that work are {nearest_below} and {nearest_below + stride}"
        )
    if frame_num > _MAX_FRAMES:
        raise InputError(f"frame_num={frame_num} must be at most {_MAX_FRAMES}")
    if frame_num < (min_frame_num := task.inputs.find_min_frame_num(num_images)):
        raise InputError(
            f"frame_num={frame_num} must be at least {min_frame_num} for a first and a last frame"
        )


def _check_clips(settings: VideoSettings, task: Task) -> None:
    """Raise InputError unless the task makes videos of several clips, if several are requested."""
    num_clips, frame_num = settings.num_clips, settings.frame_num
    if num_clips == 1:
        return
    if settings.latents_file is not None:
        raise InputError(
            f"clips={num_clips}: latents={settings.latents_file} are those of one clip; leave clips out"
        )
    if len(settings.input_files) > 1 and task.inputs.takes_clips:
        raise InputError(
            f"clips={num_clips}: further clips start from one image, and "
            f"{' and '.join(settings.input_files)} are given; give image=FILE, or leave clips out"
        )
    if not task.inputs.takes_clips:
        supported_names = ", ".join(
            name for name, other_task in TASKS.items() if other_task.inputs.takes_clips
        )
        raise InputError(
            f"clips={num_clips}: further clips start from one image, and {task.name} takes "
            f"{task.inputs.usage}; {supported_names} take clips"
        )
    if frame_num == 1:
        raise InputError(
            f"clips={num_clips}: further clips repeat one frame of the clip before, so they need "
            f"frame_num={task.vae_stride[0] + 1} or more"
        )
    if num_clips * (frame_num - 1) >= _MAX_FRAMES:
        raise InputError(
            f"clips={num_clips}: more than {_MAX_FRAMES} frames are not made in one video"
        )


def _check_size(width: int, height: int, task: Task) -> None:
    """Raise InputError unless the task's models take width and height."""
    width_multiple, height_multiple = task.size_multiple
    if max(width, height) > MAX_VIDEO_SIDE:
        raise InputError(
            f"size={width}x{height} must be at most {MAX_VIDEO_SIDE} pixels a side, for H.264"
        )
    if width % width_multiple == 0 and height % height_multiple == 0:
        return
    smaller_width = max(width // width_multiple, 1) * width_multiple
    smaller_height = max(height // height_multiple, 1) * height_multiple
    larger_width = -(-width // width_multiple) * width_multiple
    larger_height = -(-height // height_multiple) * height_multiple
    raise InputError(
        f"size={width}x{height}: the width must be a multiple of {width_multiple} "
        f"and the height of {height_multiple}; the nearest that work are "
        f"{smaller_width}x{smaller_height} and {larger_width}x{larger_height}"
    )
