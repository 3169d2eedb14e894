"""Registry of the tasks: dims of their models, images they take, published checkpoints and sizes.

Defaults of a run (frames, steps, guidance ...) are in ``conf/task/*.yaml``; this file holds what the user
cannot change.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from wan_dist.models.dims import (
    ImageEncoderDims,
    ModelDims,
    TextEncoderDims,
    TransformerDims,
    VaeDims,
)
from wan_dist.runtime.errors import InputError, suggest_nearest

NUM_TRAIN_TIMESTEPS = 1000
AREA_480P = 832 * 480
"""Pixels of a frame up to which a task's 480P checkpoint and settings are used."""


class ImageInput(Enum):
    """Which images a task starts from."""

    NONE = "no image"
    FIRST = "image=FILE"
    OPTIONAL = "image=FILE, or none"
    FIRST_AND_LAST = "first_frame=FILE last_frame=FILE"

    @property
    def setting_keys(self) -> tuple[str, ...]:
        """The settings that name the images."""
        if self is ImageInput.FIRST_AND_LAST:
            return ("first_frame", "last_frame")
        return () if self is ImageInput.NONE else ("image",)


_DIMS_1_3B = TransformerDims(num_layers=30, dim=1536, ffn_dim=8960, num_heads=12)
_DIMS_5B = TransformerDims(
    num_layers=30, dim=3072, ffn_dim=14336, num_heads=24, in_dim=48, out_dim=48
)
_DIMS_T2V_14B = TransformerDims(num_layers=40, dim=5120, ffn_dim=13824, num_heads=40)
_DIMS_I2V_A14B = replace(_DIMS_T2V_14B, in_dim=36)
_DIMS_I2V_14B = replace(_DIMS_I2V_A14B, image_dim=1280)
_DIMS_FLF2V_14B = replace(_DIMS_I2V_14B, image_positions=2 * 257)
_DIMS_TOY = TransformerDims(
    num_layers=7, dim=192, ffn_dim=512, num_heads=6, text_dim=128, text_len=64
)
_DIMS_UMT5_XXL = TextEncoderDims(
    num_layers=24, dim=4096, ffn_dim=10240, num_heads=64, head_dim=64, vocab_size=256384
)
_DIMS_TOY_UMT5 = TextEncoderDims(
    num_layers=2, dim=128, ffn_dim=256, num_heads=4, head_dim=32, vocab_size=640
)
_DIMS_CLIP_H = ImageEncoderDims(
    num_layers=32, dim=1280, ffn_dim=5120, num_heads=16, patch=14, image_size=224
)
_DIMS_VAE_21 = VaeDims(dim=96, decoder_dim=96)
_DIMS_VAE_22 = VaeDims(dim=160, decoder_dim=256, latent_dim=48, residual=True)


class TeaCacheFit(NamedTuple):
    """TeaCache's fit of a model's change to that of its timestep's embedding (arXiv:2411.19108)."""

    coefficients: tuple[float, ...]
    """Of a polynomial, from the highest power to the constant."""
    threshold: float
    """Summed change from which a step is computed again: the most conservative of those published."""


_TEA_FIT_T2V_14B = TeaCacheFit(
    (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01), 0.10
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of generation, with what its published models determine.

    ``published_sizes`` are (width, height) pairs; others work if their sides are multiples of
    ``size_multiple``.
    """

    name: str
    repository: str
    """Of the checkpoint on the Hugging Face hub, in the original layout."""
    repository_480p: str | None = None
    """Another checkpoint of the same task, for areas up to 480P."""
    transformer_dims: TransformerDims
    image_input: ImageInput = ImageInput.NONE
    expert_boundary: float | None = None
    """Noise level of the switch between two experts, as a fraction of the timesteps; None without experts."""
    default_shifts: tuple[float, float] | None = None
    """Schedule shifts for areas up to 480P and above, if different; else the shift is in the task's YAML."""
    text_encoder_dims: TextEncoderDims = _DIMS_UMT5_XXL
    vae_dims: VaeDims = _DIMS_VAE_21
    published_sizes: tuple[tuple[int, int], ...] = ()
    is_still: bool = False
    """The task generates one frame, saved as PNG."""
    tea_fits: tuple[TeaCacheFit, ...] = ()
    """TeaCache's fits for areas up to 480P and above, or one for both.

    From ali-vilab/TeaCache, TeaCache4Wan2.1: those for the transformer's e0.
    """

    @property
    def latent_channels(self) -> int:
        """Number of channels of the latents."""
        return self.vae_dims.latent_dim

    @property
    def vae_stride(self) -> tuple[int, int, int]:
        """The VAE's compression (time, height, width)."""
        return 4, self.vae_dims.spatial_scale, self.vae_dims.spatial_scale

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """The transformer's patch (time, height, width)."""
        return self.transformer_dims.patch

    @property
    def image_encoder_dims(self) -> ImageEncoderDims | None:
        """Dims of the CLIP encoder, None where cross-attention takes no image features."""
        return _DIMS_CLIP_H if self.has_image_encoder else None

    @property
    def model_dims(self) -> ModelDims:
        """Dims of all models."""
        return ModelDims(
            transformer=self.transformer_dims,
            text_encoder=self.text_encoder_dims,
            image_encoder=self.image_encoder_dims,
            vae=self.vae_dims,
        )

    @property
    def size_multiple(self) -> tuple[int, int]:
        """The pixels of which (width, height) must be multiples: stride times patch."""
        return self.vae_stride[2] * self.patch_size[2], self.vae_stride[1] * self.patch_size[1]

    @property
    def has_image_encoder(self) -> bool:
        """Whether cross-attention takes CLIP features of the images."""
        return self.transformer_dims.image_dim > 0

    @property
    def has_fixed_first_frame(self) -> bool:
        """Whether the image is the first latent frame, with a timestep of its own, not extra channels."""
        return self.image_input is ImageInput.OPTIONAL

    def choose_repository(self, area: int) -> str:
        """Return the repository with the checkpoint trained for videos of ``area`` pixels a frame."""
        return (
            self.repository_480p if self.repository_480p and area <= AREA_480P else self.repository
        )


_SIZES_480P = ((832, 480), (480, 832))
_SIZES_720P = (*_SIZES_480P, (1280, 720), (720, 1280))
_SIZES_704P = ((1280, 704), (704, 1280))
TASKS = {
    task.name: task
    for task in (
        Task(
            name="t2v-1.3B",
            repository="Wan-AI/Wan2.1-T2V-1.3B",
            transformer_dims=_DIMS_1_3B,
            published_sizes=_SIZES_480P,
            tea_fits=(
                TeaCacheFit(
                    (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
                    0.05,
                ),
            ),
        ),
        Task(
            name="t2v-14B",
            repository="Wan-AI/Wan2.1-T2V-14B",
            transformer_dims=_DIMS_T2V_14B,
            published_sizes=_SIZES_720P,
            tea_fits=(_TEA_FIT_T2V_14B,),
        ),
        Task(
            name="t2i-14B",
            repository="Wan-AI/Wan2.1-T2V-14B",
            transformer_dims=_DIMS_T2V_14B,
            published_sizes=(*_SIZES_720P, (1024, 1024)),
            is_still=True,
            tea_fits=(_TEA_FIT_T2V_14B,),
        ),
        Task(
            name="i2v-14B",
            repository="Wan-AI/Wan2.1-I2V-14B-720P",
            repository_480p="Wan-AI/Wan2.1-I2V-14B-480P",
            transformer_dims=_DIMS_I2V_14B,
            image_input=ImageInput.FIRST,
            default_shifts=(3.0, 5.0),
            published_sizes=_SIZES_720P,
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
            transformer_dims=_DIMS_FLF2V_14B,
            image_input=ImageInput.FIRST_AND_LAST,
            published_sizes=_SIZES_720P,
        ),
        Task(
            name="t2v-A14B",
            repository="Wan-AI/Wan2.2-T2V-A14B",
            transformer_dims=_DIMS_T2V_14B,
            expert_boundary=0.875,
            published_sizes=_SIZES_720P,
        ),
        Task(
            name="i2v-A14B",
            repository="Wan-AI/Wan2.2-I2V-A14B",
            transformer_dims=_DIMS_I2V_A14B,
            image_input=ImageInput.FIRST,
            expert_boundary=0.9,
            published_sizes=_SIZES_720P,
        ),
        Task(
            name="ti2v-5B",
            repository="Wan-AI/Wan2.2-TI2V-5B",
            transformer_dims=_DIMS_5B,
            image_input=ImageInput.OPTIONAL,
            vae_dims=_DIMS_VAE_22,
            published_sizes=_SIZES_704P,
        ),
        Task(
            name="toy",
            repository="",
            transformer_dims=_DIMS_TOY,
            image_input=ImageInput.OPTIONAL,
            text_encoder_dims=_DIMS_TOY_UMT5,
            vae_dims=VaeDims(dim=8, decoder_dim=12),
            published_sizes=((128, 128),),
            tea_fits=(TeaCacheFit((1.0, 0.0), 0.2),),
        ),
    )
}

UNSUPPORTED_TASKS = ("vace-1.3B", "vace-14B", "s2v-14B", "animate-14B")


def get_task(name: str) -> Task:
    """Return the task called ``name``; raises InputError if it does not exist or is not supported yet."""
    if name in TASKS:
        return TASKS[name]
    supported_names = ", ".join(TASKS)
    if name in UNSUPPORTED_TASKS:
        raise InputError(f"task {name} is not supported yet; supported: {supported_names}")
    hint = suggest_nearest(name, (*TASKS, *UNSUPPORTED_TASKS))
    raise InputError(f"there is no task {name!r}{hint} (supported: {supported_names})")


def require_task(arguments: Iterable[str]) -> None:
    """Raise InputError unless ``task=NAME`` is among the arguments and NAME is a supported task."""
    task_names = [
        argument.partition("=")[2] for argument in arguments if argument.startswith("task=")
    ]
    if not task_names:
        raise InputError(f"say what to generate: task=NAME, one of {', '.join(TASKS)} (see --help)")
    get_task(task_names[-1])
