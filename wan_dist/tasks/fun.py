"""Tasks of the Fun models: images, a control video, a reference image or a camera's path.

Source: VideoX-Fun (aigc-apps/VideoX-Fun), whose models are alibaba-pai's.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from PIL import Image

from wan_dist.models.dims import TransformerDims, VaeDims
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.base import Task, TaskInputs
from wan_dist.tasks.images import compute_covering_size, crop_to_cover
from wan_dist.tasks.published_dims import (
    DIMS_1_3B,
    DIMS_5B,
    DIMS_CLIP_H,
    DIMS_T2V_14B,
    DIMS_VAE_21,
    DIMS_VAE_22,
    SIZES_480P,
    SIZES_704P,
)
from wan_dist.tasks.source_video import SourceVideo, VideoFacts

START_KEYS = ("image", "first_frame")
"""Settings of the first image, of which one may be given."""


@dataclass(frozen=True)
class FunInputs(TaskInputs):
    """Images at the video's ends, and what else controls the video; each may be left out."""

    kind: str = "fun"
    is_always_encoded: bool = True

    @property
    def takes_clips(self) -> bool:
        """Whether a clip can start from a frame of the one before: no."""
        return False

    @property
    def takes_last_frame(self) -> bool:
        """Whether there may be an image at the end: where a mask says which frames are given."""
        return "mask" in self.channels

    def check_keys(self, given_keys: Collection[str]) -> None:
        """Raise InputError for two first images."""
        if set(START_KEYS) <= set(given_keys):
            raise InputError("image and first_frame are given, which mean the same; leave one out")

    def find_min_frame_num(self, num_images: int) -> int:
        """Return the fewest frames: a last image needs a latent frame of its own."""
        return 5 if num_images > 1 and self.takes_last_frame else 1

    def count_image_features(self, num_images: int) -> int:
        """Return 1: features of one image, or zeros without one."""
        return 1


def fit_image(image: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """Return an image of ``size`` (width, height): stretched, as the makers do, or cut to its shape."""
    if image.size == size:
        return image
    if fit == "stretch":
        return image.resize(size, Image.Resampling.BICUBIC)
    return crop_to_cover(image, size)


def describe_fit(
    image_sizes: Mapping[str, tuple[int, int]], size: tuple[int, int], fit: str
) -> list[str]:
    """Return a note for each picture, by its setting, that is not of the video's size (width, height).

    Raises InputError for one that is to be cut and whose shape is too different.
    """
    notes = []
    for key, (width, height) in image_sizes.items():
        if (width, height) == size:
            continue
        if fit == "crop":
            compute_covering_size((width, height), size)
        done, other = (
            ("stretched", "crop cuts it") if fit == "stretch" else ("cut", "stretch stretches it")
        )
        notes.append(
            f"{key} of {width}x{height} is {done} to {size[0]}x{size[1]}; fit={other} instead"
        )
    return notes


def take_control_frames(
    video: VideoFacts, frame_num: int, fps: int, size: tuple[int, int]
) -> SourceVideo:
    """Return the frames that steer a video of ``frame_num`` frames: the first, at about ``fps``.

    Of a faster video every k-th frame is taken, k being the ratio of the rates, rounded down. Raises
    InputError, with both counts, for a video that is too short.
    """
    rate = round(video.num_frames / video.seconds, 3) if video.seconds > 0 else 0.0
    step = max(1, int(rate // fps))
    num_taken = -(-video.num_frames // step)
    if num_taken < frame_num:
        every = "all are" if step == 1 else f"one in {step} is"
        raise InputError(
            f"src_video={video.file} has {video.num_frames} frames at {rate:g} fps, of which {every} taken "
            f"for fps={fps}: {num_taken}, and frame_num={frame_num} needs as many; use at most "
            f"frame_num={(num_taken - 1) // 4 * 4 + 1}, or a longer video"
        )
    return SourceVideo(video, None, size, tuple(range(0, frame_num * step, step)))


_FILE_KEYS = {"inp": (), "control": ("src_video", "src_ref_images"), "camera": ()}
"""Settings of each kind that name files, beside those of images."""
_REPOSITORY_NAMES = {"inp": "InP", "control": "Control", "camera": "Control-Camera"}
_SIZES = {
    "1.3B": (DIMS_1_3B, DIMS_VAE_21, "Wan2.1-Fun-V1.1-1.3B"),
    "14B": (DIMS_T2V_14B, DIMS_VAE_21, "Wan2.1-Fun-V1.1-14B"),
    "A14B": (DIMS_T2V_14B, DIMS_VAE_21, "Wan2.2-Fun-A14B"),
    "5B": (DIMS_5B, DIMS_VAE_22, "Wan2.2-Fun-5B"),
}


def _list_channels(kind: str, *, is_wan_21: bool) -> tuple[str, ...]:
    """Return the parts of the channels beside the noisy latents."""
    has_mask = kind == "inp" or not is_wan_21
    control, mask = ("control",) * (kind == "control"), ("mask",) * has_mask
    return *control, *mask, "image"


def _extend_dims(
    dims: TransformerDims, vae: VaeDims, kind: str, channels: tuple[str, ...], *, has_clip: bool
) -> TransformerDims:
    """Return the dims of a text-to-video transformer with what a kind of Fun models adds."""
    widths = {"control": vae.latent_dim, "mask": 4, "image": vae.latent_dim}
    return replace(
        dims,
        in_dim=vae.latent_dim + sum(widths[channel] for channel in channels),
        image_dim=DIMS_CLIP_H.dim if has_clip else 0,
        ref_conv_in_dim=vae.latent_dim if kind == "control" else 0,
        # A frame of six channels, in squares of the VAE's stride, four frames to a latent one.
        camera_in_dim=6 * 4 * vae.spatial_scale**2 if kind == "camera" else 0,
    )


def _list_tasks() -> Iterator[Task]:
    for kind, file_keys in _FILE_KEYS.items():
        for size, (dims, vae, repository) in _SIZES.items():
            is_wan_21 = repository.startswith("Wan2.1")
            channels = _list_channels(kind, is_wan_21=is_wan_21)
            end_keys = ("first_frame", "last_frame") if "mask" in channels else ()
            keys = (*file_keys, "image", *end_keys)
            yield Task(
                name=f"fun-{kind}-{size}",
                repository=f"alibaba-pai/{repository}-{_REPOSITORY_NAMES[kind]}",
                transformer_dims=_extend_dims(dims, vae, kind, channels, has_clip=is_wan_21),
                inputs=FunInputs(
                    file_keys=keys,
                    usage=f"{' '.join(f'{key}=FILE' for key in keys)}, each of them or none",
                    channels=channels,
                    takes_camera=kind == "camera",
                    has_known_first_frame=size == "5B",
                ),
                expert_boundary=0.9 if size == "A14B" else None,
                vae_dims=vae,
                published_sizes=SIZES_704P if size == "5B" else SIZES_480P,
            )


TASKS = tuple(_list_tasks())
