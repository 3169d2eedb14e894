"""A task: its inputs, and the settings that its published models determine; no torch.

Each kind of inputs is a pair of modules of one name: here what the inputs are and the tasks that take them,
in `pipeline.conditioning` how they become conditioning of the transformer.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from wan_dist.models.dims import (
    AudioEncoderDims,
    FaceEncoderDims,
    ImageEncoderDims,
    ModelDims,
    TextEncoderDims,
    TransformerDims,
    VaeDims,
)
from wan_dist.tasks.images import fit_size_to_area
from wan_dist.tasks.published_dims import DIMS_CLIP_H, DIMS_UMT5_XXL, DIMS_VAE_21

AREA_480P = 832 * 480
"""Pixels of a frame up to which a task's 480P checkpoint and settings are used."""


class TeaCacheFit(NamedTuple):
    """TeaCache's fit of a model's change to that of its timestep's embedding (arXiv:2411.19108)."""

    coefficients: tuple[float, ...]
    """Of a polynomial, from the highest power to the constant."""
    threshold: float
    """Summed change from which a step is computed again: the most conservative of those published."""


@dataclass(frozen=True)
class TaskInputs:
    """A task's inputs beside the prompt: none, unless a subclass overrides this."""

    kind: str = "text"
    """Name of the module in `tasks`, and of its pair in `pipeline.conditioning`."""
    file_keys: tuple[str, ...] = ()
    """Settings that name image files; their content is part of the digest."""
    alternative_keys: tuple[str, ...] = ()
    """Settings that may be given instead of all ``file_keys``."""
    folder_key: str | None = None
    """Setting of a folder that holds files for all ``file_keys``."""
    usage: str = "no image"
    """The settings as a user writes them."""
    is_required: bool = False
    is_always_encoded: bool = False
    """The VAE encodes an input of the transformer also where no file is given."""
    has_reference_frames: bool = False
    """Each image is a latent frame before those of the video."""
    has_known_first_frame: bool = False
    """The first image is the first latent frame, with its own timestep."""
    takes_camera: bool = False
    """The path of a camera is an input, and required."""
    channels: tuple[str, ...] = ()
    """Parts of the channels beside the noisy latents, in their order, where tasks differ in it."""

    def choose_keys(self, given_keys: Collection[str]) -> tuple[str, ...]:
        """Return the settings that belong together, by those that are given."""
        is_alternative = not set(self.alternative_keys).isdisjoint(given_keys)
        return self.alternative_keys if is_alternative else self.file_keys

    def check_keys(self, given_keys: Collection[str]) -> None:
        """Raise InputError where the given settings do not make sense together."""

    def find_min_frame_num(self, num_images: int) -> int:
        """Return the fewest frames of a video from so many images: two need latent frames of their own."""
        return 5 if num_images > 1 else 1

    def count_image_features(self, num_images: int) -> int:
        """Return of how many images cross-attention takes features, where it takes any."""
        return num_images

    @property
    def takes_clips(self) -> bool:
        """Whether a clip can start from a frame of the one before, as the input is one image."""
        return len(self.file_keys) == 1

    def fit_size(
        self, image_size: tuple[int, int], area: int, size_multiple: tuple[int, int]
    ) -> tuple[int, int]:
        """Return (width, height) of a video with the first image's aspect and about ``area`` pixels."""
        return fit_size_to_area(*image_size, area, size_multiple)

    def check_image_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Raise InputError where images of these sizes (width, height) do not fit together."""

    def prepare_images(self, images: tuple[Image.Image, ...]) -> tuple[Image.Image, ...]:
        """Return the images as they are encoded."""
        return images


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of generation, with the settings that its published models determine.

    ``published_sizes`` are (width, height) pairs; others work if their sides are multiples of
    ``size_multiple``.
    """

    name: str
    repository: str
    """Of the checkpoint on the Hugging Face hub, in the original layout."""
    lora_files: tuple[str, ...] = ()
    """LoRAs in the repository, which a setting adds; they are downloaded with the checkpoint."""
    repository_480p: str | None = None
    """Another checkpoint of the same task, for areas up to 480P."""
    transformer_dims: TransformerDims
    inputs: TaskInputs = TaskInputs()
    """Its inputs beside the prompt."""
    expert_boundary: float | None = None
    """Noise level of the switch between two experts, as a fraction of the timesteps; None without experts."""
    default_shifts: tuple[float, float] | None = None
    """Schedule shifts for areas up to 480P and above, if different; else the shift is in the task's YAML."""
    text_encoder_dims: TextEncoderDims = DIMS_UMT5_XXL
    vae_dims: VaeDims = DIMS_VAE_21
    face_encoder_dims: FaceEncoderDims | None = None
    audio_encoder_dims: AudioEncoderDims | None = None
    published_sizes: tuple[tuple[int, int], ...] = ()
    is_still: bool = False
    """The task generates one frame, saved as PNG."""
    tea_fits: tuple[TeaCacheFit, ...] = ()
    """TeaCache's fits for areas up to 480P and above, or one for both.

    From ali-vilab/TeaCache, TeaCache4Wan2.1: those for the transformer's e0.
    """

    @property
    def family(self) -> str:
        """The task's name, or a pattern of the names of tasks that differ in size alone."""
        return re.sub(r"^(fun-\w+)-.*", r"\1-*", self.name)

    @property
    def is_animate_2(self) -> bool:
        """Whether a driving video passes through the transformer."""
        return self.inputs.kind == "animate_2"

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
        return DIMS_CLIP_H if self.has_image_encoder else None

    @property
    def model_dims(self) -> ModelDims:
        """Dims of all models."""
        return ModelDims(
            transformer=self.transformer_dims,
            text_encoder=self.text_encoder_dims,
            image_encoder=self.image_encoder_dims,
            face_encoder=self.face_encoder_dims,
            audio_encoder=self.audio_encoder_dims,
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

    def choose_repository(self, area: int) -> str:
        """Return the repository with the checkpoint trained for videos of ``area`` pixels a frame."""
        return (
            self.repository_480p if self.repository_480p and area <= AREA_480P else self.repository
        )
