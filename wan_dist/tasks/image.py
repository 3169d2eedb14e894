"""Tasks that start from an image, or from a first and a last one, beside which the video is noise."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from wan_dist.tasks.base import Task, TaskInputs, TeaCacheFit
from wan_dist.tasks.images import compute_covering_size, crop_to_cover
from wan_dist.tasks.published_dims import DIMS_FLF2V_14B, DIMS_I2V_14B, DIMS_I2V_A14B, SIZES_720P

_FIRST_FRAME = TaskInputs("image", ("image",), usage="image=FILE", is_required=True)


@dataclass(frozen=True)
class _FirstAndLastFrame(TaskInputs):
    """Two images, of which the second is scaled and cut to the shape of the first."""

    kind: str = "image"
    file_keys: tuple[str, ...] = ("first_frame", "last_frame")
    usage: str = "first_frame=FILE last_frame=FILE"
    is_required: bool = True

    def check_image_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Raise InputError where the second image cannot be cut to the shape of the first."""
        if len(sizes) == 2 and sizes[0] != sizes[1]:
            compute_covering_size(sizes[1], sizes[0])

    def prepare_images(self, images: tuple[Image.Image, ...]) -> tuple[Image.Image, ...]:
        """Return the images, the second cut to the shape of the first."""
        first_image, *last_images = images
        return first_image, *(crop_to_cover(image, first_image.size) for image in last_images)


@dataclass(frozen=True)
class _FirstFrameOrBoth(_FirstAndLastFrame):
    """The first image, or the first and the last one, whose model was trained for the first alone."""

    file_keys: tuple[str, ...] = ("image",)
    alternative_keys: tuple[str, ...] = ("first_frame", "last_frame")
    usage: str = "image=FILE, or first_frame=FILE last_frame=FILE"


TASKS = (
    Task(
        name="i2v-14B",
        repository="Wan-AI/Wan2.1-I2V-14B-720P",
        repository_480p="Wan-AI/Wan2.1-I2V-14B-480P",
        transformer_dims=DIMS_I2V_14B,
        inputs=_FIRST_FRAME,
        default_shifts=(3.0, 5.0),
        published_sizes=SIZES_720P,
        tea_fits=(
            TeaCacheFit(
                (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
                0.20,
            ),
            TeaCacheFit(
                (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
                0.20,
            ),
        ),
    ),
    Task(
        name="flf2v-14B",
        repository="Wan-AI/Wan2.1-FLF2V-14B-720P",
        transformer_dims=DIMS_FLF2V_14B,
        inputs=_FirstAndLastFrame(),
        published_sizes=SIZES_720P,
    ),
    Task(
        name="i2v-A14B",
        repository="Wan-AI/Wan2.2-I2V-A14B",
        transformer_dims=DIMS_I2V_A14B,
        inputs=_FirstFrameOrBoth(),
        expert_boundary=0.9,
        published_sizes=SIZES_720P,
    ),
)
