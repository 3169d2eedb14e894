"""Video settings resolved for a task: size, frames, texts, images; and the checks that cross fields."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from wan_dist.config.checks import MAX_PROMPT_CHARACTERS, split_files
from wan_dist.config.sections import CacheConfig
from wan_dist.config.settings import SettingValues
from wan_dist.models.dims import TransformerDims
from wan_dist.planning.saved_latents import MAX_VIDEO_SIDE, read_latents_size
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import UnreadableFileError, read_text_file
from wan_dist.tasks.base import AREA_480P, Task, TeaCacheFit
from wan_dist.tasks.camera import MOTIONS, CameraPath, read_camera
from wan_dist.tasks.fun import FunInputs, describe_fit, take_control_frames
from wan_dist.tasks.image_sizes import ImageSizeReader, read_image_sizes
from wan_dist.tasks.images import read_image
from wan_dist.tasks.input_files import check_input_files, list_input_files
from wan_dist.tasks.registry import TASKS
from wan_dist.tasks.source_video import SourceVideo, read_video_facts
from wan_dist.tasks.vace import VaceInputs, fit_source_video

_MAX_FRAMES = 10**6 + 1


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
    latents_file: str | None
    """Saved latents, which have their own size and number of frames."""


def collect_video_settings(settings: SettingValues, size: tuple[int, int]) -> VideoSettings:
    """Return what the settings of a run request of a video's frames; ``size``: (width, height)."""
    return VideoSettings(
        size=size,
        max_area=settings["max_area"],
        frame_num=settings["frame_num"],
        num_clips=settings["clips"],
        input_files=list_input_files(settings),
        context_scale=settings["context_scale"],
        camera=settings["camera"],
        fit=settings["fit"],
        fps=settings["fps"],
        latents_file=settings["latents"],
    )


class VideoInput(NamedTuple):
    """Size of a video, and the images and the source video that it is made from."""

    width: int
    height: int
    frame_num: int
    size_note: str = ""
    images: tuple[Image.Image, ...] = ()
    num_images: int = 0
    source: SourceVideo | None = None
    image_keys: tuple[str, ...] = ()
    """Settings that name the images, where these have roles of their own."""
    camera: CameraPath | None = None
    notes: tuple[str, ...] = ()
    """What is done with the inputs, a line each."""

    @property
    def area(self) -> int:
        """Pixels of a frame."""
        return self.width * self.height


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
    video = _resolve_video_size(settings, task, image_size_reader, is_dry_run=is_dry_run)
    _check_size(video.width, video.height, task)
    _check_frame_num(video.frame_num, task, video.num_images)
    return video


def _resolve_video_size(
    settings: VideoSettings,
    task: Task,
    image_size_reader: ImageSizeReader | None,
    *,
    is_dry_run: bool,
) -> VideoInput:
    if settings.latents_file is not None:
        return VideoInput(*read_latents_size(settings.latents_file, task))
    if isinstance(task.inputs, VaceInputs):
        return _read_vace_input(settings, task, image_size_reader)
    if isinstance(task.inputs, FunInputs):
        return _read_fun_input(settings, task, image_size_reader)
    images: tuple[Image.Image, ...] = ()
    if image_size_reader is not None:
        source_sizes = read_image_sizes(settings.input_files, task, image_size_reader)
    else:
        needs_blanks = is_dry_run and not settings.input_files and task.inputs.is_required
        images = (
            _make_blank_images(settings, task) if needs_blanks else _read_images(settings, task)
        )
        source_sizes = [image.size for image in images]
    width, height, size_note = _choose_video_size(settings, task, source_sizes)
    return VideoInput(width, height, settings.frame_num, size_note, images, len(source_sizes))


def _read_vace_input(
    settings: VideoSettings, task: Task, image_size_reader: ImageSizeReader | None
) -> VideoInput:
    """Return the size of the video that a source video makes, or of the settings without one."""
    check_input_files(settings.input_files, task)
    reference_files = split_files(settings.input_files.get("src_ref_images", "[]"))
    images: tuple[Image.Image, ...] = ()
    if image_size_reader is None:
        images = tuple(read_image(str(file), "src_ref_images") for file in reference_files)
    else:
        for file in reference_files:
            image_size_reader(str(file), "src_ref_images")
    num_images = len(reference_files)
    if "src_video" not in settings.input_files:
        width, height, _ = _choose_video_size(settings, task, [])
        return VideoInput(width, height, settings.frame_num, "", images, num_images)
    video = read_video_facts(settings.input_files["src_video"], "src_video")
    mask_file = settings.input_files.get("src_mask")
    mask = None if mask_file is None else read_video_facts(mask_file, "src_mask")
    source = fit_source_video(video, mask, settings.max_area or prod(settings.size))
    frame_num = len(source.frame_indices)
    return VideoInput(
        *source.size, frame_num, "", images, num_images, source, notes=(source.description,)
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


def _read_fun_input(
    settings: VideoSettings, task: Task, image_size_reader: ImageSizeReader | None
) -> VideoInput:
    """Return the inputs of a Fun model, whose video has the size of the settings."""
    check_input_files(settings.input_files, task)
    if settings.max_area is not None:
        raise InputError(
            f"max_area={settings.max_area}: {task.name} takes size=WIDTHxHEIGHT, to which pictures are fitted"
        )
    size, frame_num = settings.size, settings.frame_num
    image_files = {key: file for key, file in settings.input_files.items() if key != "src_video"}
    if "src_ref_images" in image_files:
        references = split_files(image_files["src_ref_images"])
        if len(references) != 1:
            raise InputError(
                f"src_ref_images has {len(references)} images, and {task.name} takes one"
            )
        image_files["src_ref_images"] = str(references[0])
    images: tuple[Image.Image, ...] = ()
    if image_size_reader is None:
        images = tuple(read_image(file, key) for key, file in image_files.items())
        sizes = dict(zip(image_files, (image.size for image in images), strict=True))
    else:
        sizes = {key: image_size_reader(file, key) for key, file in image_files.items()}
    source = None
    if "src_video" in settings.input_files:
        video = read_video_facts(settings.input_files["src_video"], "src_video")
        source = take_control_frames(video, frame_num, settings.fps, size)
    return VideoInput(
        *size,
        frame_num,
        "",
        images,
        len(image_files),
        source,
        tuple(image_files),
        None if settings.camera is None else read_camera(settings.camera, frame_num, size),
        tuple(describe_fit(sizes, size, settings.fit)),
    )


def check_reference_image(task: Task, image_keys: Collection[str], dims: TransformerDims) -> None:
    """Raise InputError for a reference image that a Fun model has no layer for."""
    has_reference = isinstance(task.inputs, FunInputs) and "src_ref_images" in image_keys
    if has_reference and not dims.ref_conv_in_dim:
        raise InputError(
            "src_ref_images is given, but this checkpoint has no ref_conv, which takes a reference "
            "image, as the first Fun Control models; use version 1.1, or leave src_ref_images out"
        )


def _make_blank_images(settings: VideoSettings, task: Task) -> tuple[Image.Image, ...]:
    """Return blank images of the video's size, as many as the task needs."""
    return tuple(Image.new("RGB", settings.size) for _ in task.inputs.file_keys)


def _read_images(settings: VideoSettings, task: Task) -> tuple[Image.Image, ...]:
    """Return the images the task starts from; raises InputError for one missing, unreadable or unexpected."""
    check_input_files(settings.input_files, task)
    images = tuple(read_image(file, key) for key, file in settings.input_files.items())
    return task.inputs.prepare_images(images)


def _choose_video_size(
    settings: VideoSettings, task: Task, source_sizes: Sequence[tuple[int, int]]
) -> tuple[int, int, str]:
    """Return width, height and a note on how they came about, empty where that is plain.

    With an image, the size of the settings is an area, and the image gives the aspect. Raises InputError for
    ``max_area`` without an image.
    """
    (width, height), max_area = settings.size, settings.max_area
    if not source_sizes:
        if max_area is not None:
            raise InputError(
                f"max_area={max_area} needs an image or a source video; "
                f"for {task.name} without one use size=WIDTHxHEIGHT"
            )
        return width, height, ""
    area = max_area or width * height
    image_width, image_height = source_sizes[0]
    fitted_size = task.inputs.fit_size(source_sizes[0], area, task.size_multiple)
    requested_size = f"max_area={max_area}" if max_area else f"size={width}x{height}"
    if fitted_size == (width, height):
        return width, height, ""
    image_size = f"{image_width}x{image_height}"
    size_note = f" ({requested_size} is an area, the image of {image_size} gives the aspect)"
    return *fitted_size, size_note


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


def read_text_setting(key: str, value: str | None) -> str | None:
    """Return the text, or the contents of the file after ``@``; ``@@`` begins a text with ``@``.

    ``key`` names the setting in errors. Raises InputError for a file that cannot be read, and for an empty
    one if ``key`` is prompt.
    """
    if value is None or not value.startswith("@"):
        return value
    if value.startswith("@@"):
        return value[1:]
    try:
        path = Path(value[1:]).expanduser()
        text = read_text_file(path, max_bytes=MAX_PROMPT_CHARACTERS).strip()
    except UnreadableFileError as error:
        raise InputError(
            f"{key}={value}: cannot read {path} ({error}); write @@ for a text that begins with @"
        ) from None
    except RuntimeError as error:
        raise InputError(f"{key}={value}: {error}") from None
    if not text and key == "prompt":
        raise InputError(f"{key}={value}: the file is empty")
    return text
