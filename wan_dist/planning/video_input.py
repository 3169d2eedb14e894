"""Inputs of a video, by the kind of its task, and the size and frames that follow from them."""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from wan_dist.config.checks import split_files
from wan_dist.config.video_settings import VideoSettings
from wan_dist.planning.saved_latents import read_latents_size
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.animate import (
    FOLDER_KEY,
    AnimateInputs,
    DrivingVideo,
    check_mode,
    read_driving_video,
)
from wan_dist.tasks.animate_2 import Animate2Inputs, FollowedVideo, follow_video
from wan_dist.tasks.base import Task
from wan_dist.tasks.camera import CameraPath, read_camera
from wan_dist.tasks.fun import FunInputs, describe_fit, take_control_frames
from wan_dist.tasks.image_sizes import ImageSizeReader, read_image_sizes
from wan_dist.tasks.images import read_image
from wan_dist.tasks.input_files import check_input_files
from wan_dist.tasks.sound import read_sound
from wan_dist.tasks.source_video import SourceVideo, read_video_facts
from wan_dist.tasks.speech import Speech, SpeechInputs, describe_bars, plan_speech
from wan_dist.tasks.vace import VaceInputs, fit_source_video


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
    driving: DrivingVideo | FollowedVideo | None = None
    speech: Speech | None = None

    @property
    def area(self) -> int:
        """Pixels of a frame."""
        return self.width * self.height


def resolve_video_input(
    settings: VideoSettings,
    task: Task,
    image_size_reader: ImageSizeReader | None,
    *,
    is_dry_run: bool,
) -> VideoInput:
    """Return the size of the video, of saved latents or of settings and inputs, and the images if decoded.

    Raises InputError for inputs that are missing, unexpected or unreadable, or do not fit together.
    """
    if settings.latents_file is not None:
        return VideoInput(*read_latents_size(settings.latents_file, task))
    if isinstance(task.inputs, VaceInputs):
        return _read_vace_input(settings, task, image_size_reader)
    if isinstance(task.inputs, FunInputs):
        return _read_fun_input(settings, task, image_size_reader)
    if isinstance(task.inputs, AnimateInputs):
        if is_dry_run and not settings.input_files:
            return VideoInput(*settings.size, settings.frame_num, num_images=1)
        return _read_animate_input(settings, task, image_size_reader)
    if isinstance(task.inputs, SpeechInputs):
        return _read_speech_input(settings, task, image_size_reader, is_dry_run=is_dry_run)
    if isinstance(task.inputs, Animate2Inputs):
        if is_dry_run and not settings.input_files:
            return VideoInput(*settings.size, settings.frame_num, num_images=1)
        return _read_followed_input(settings, task, image_size_reader)
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


def _read_animate_input(
    settings: VideoSettings, task: Task, image_size_reader: ImageSizeReader | None
) -> VideoInput:
    """Return the size of a driving video, with it and the image of the character."""
    if (folder := settings.animate.src_root_path) is not None:
        path = Path(folder).expanduser()
        if not path.is_dir():
            problem = "is a file" if path.exists() else "does not exist"
            raise InputError(
                f"{FOLDER_KEY}={folder} {problem}; give the folder that the preprocessing wrote"
            )
    check_mode(settings.input_files, is_replacing=settings.animate.replace_flag)
    check_input_files(settings.input_files, task)
    driving = read_driving_video(
        settings.input_files,
        clip_frames=settings.frame_num,
        num_repeated=settings.animate.refert_num,
    )
    images: tuple[Image.Image, ...] = ()
    reference_file = settings.input_files["src_ref"]
    if image_size_reader is None:
        images = (read_image(reference_file, "src_ref"),)
    else:
        image_size_reader(reference_file, "src_ref")
    size = driving.pose.width, driving.pose.height
    rate_note = driving.describe_rate(settings.fps)
    notes = (driving.description, *([] if rate_note is None else [rate_note]))
    return VideoInput(*size, settings.frame_num, "", images, 1, notes=notes, driving=driving)


def _read_speech_input(
    settings: VideoSettings,
    task: Task,
    image_size_reader: ImageSizeReader | None,
    *,
    is_dry_run: bool,
) -> VideoInput:
    """Return the size of a picture that speaks, with it, the sound and the poses.

    A dry run without files is of one clip, or of as many as are requested, and of a picture of the size.
    """
    files = settings.input_files
    images: tuple[Image.Image, ...] = ()
    if not (is_dry_run and not files):
        check_input_files(files, task)
    if "image" not in files:
        image_size = settings.size
    elif image_size_reader is None:
        images = (read_image(files["image"], "image"),)
        image_size = images[0].size
    else:
        image_size = image_size_reader(files["image"], "image")
    wanted = settings.speech
    speech = plan_speech(
        read_sound(files["audio"], "audio") if "audio" in files else None,
        read_video_facts(files["pose_video"], "pose_video") if "pose_video" in files else None,
        clip_frames=wanted.infer_frames,
        num_clips=wanted.num_clip,
        starts_from_picture=wanted.start_from_ref,
        sync=wanted.sync,
    )
    width, height, size_note = _choose_video_size(settings, task, [image_size])
    bars = describe_bars(image_size, (width, height))
    return VideoInput(
        width,
        height,
        speech.clip_frames,
        size_note,
        images,
        num_images=1,
        notes=(*speech.notes, *([] if bars is None else [bars])),
        speech=speech,
    )


def _read_followed_input(
    settings: VideoSettings, task: Task, image_size_reader: ImageSizeReader | None
) -> VideoInput:
    """Return the size that the image of a character gives, and the video that it follows."""
    check_input_files(settings.input_files, task)
    images: tuple[Image.Image, ...] = ()
    reference_file = settings.input_files["src_ref"]
    if image_size_reader is None:
        images = (read_image(reference_file, "src_ref"),)
        reference_size = images[0].size
    else:
        reference_size = image_size_reader(reference_file, "src_ref")
    followed = follow_video(
        read_video_facts(settings.input_files["src_video"], "src_video"),
        reference_size,
        requested_size=settings.size,
        clip_frames=settings.frame_num,
        fps=settings.fps,
    )
    left, top, right, bottom = followed.crop
    size_note = (
        f" (size={settings.size[0]}x{settings.size[1]} is an area, src_ref gives the aspect), "
        f"cut to {right - left}x{bottom - top}"
    )
    return VideoInput(
        *followed.size,
        followed.count_frames(0),
        size_note,
        images,
        1,
        notes=(followed.description,),
        driving=followed,
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
