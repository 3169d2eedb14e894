"""Tasks that take an image, or none, as the first latent frame, which is never noisy."""

from dataclasses import dataclass

from wan_dist.models.dims import VaeDims
from wan_dist.tasks.base import Task, TaskInputs, TeaCacheFit
from wan_dist.tasks.images import fit_best_size_to_area
from wan_dist.tasks.published_dims import (
    DIMS_5B,
    DIMS_TOY,
    DIMS_TOY_UMT5,
    DIMS_VAE_22,
    SIZES_704P,
)


@dataclass(frozen=True)
class _KnownFirstFrame(TaskInputs):
    kind: str = "known_first_frame"
    file_keys: tuple[str, ...] = ("image",)
    usage: str = "image=FILE, or none"
    has_known_first_frame: bool = True

    def fit_size(
        self, image_size: tuple[int, int], area: int, size_multiple: tuple[int, int]
    ) -> tuple[int, int]:
        """Return (width, height) of a video with about the image's aspect, as the 5B reference does."""
        return fit_best_size_to_area(*image_size, area, size_multiple)


TASKS = (
    Task(
        name="ti2v-5B",
        repository="Wan-AI/Wan2.2-TI2V-5B",
        transformer_dims=DIMS_5B,
        inputs=_KnownFirstFrame(),
        vae_dims=DIMS_VAE_22,
        published_sizes=SIZES_704P,
    ),
    Task(
        name="toy",
        repository="",
        transformer_dims=DIMS_TOY,
        inputs=_KnownFirstFrame(),
        text_encoder_dims=DIMS_TOY_UMT5,
        vae_dims=VaeDims(dim=8, decoder_dim=12),
        published_sizes=((128, 128),),
        tea_fits=(TeaCacheFit((1.0, 0.0), 0.2),),
    ),
)
