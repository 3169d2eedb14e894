"""What each task is: which models it takes and their shapes, where its checkpoint is published.

Defaults of a run (frames, steps, guidance ...) are in ``conf/task/*.yaml``; this file holds what the user cannot change.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from wan_dist.models.dims import ImageEncoderDims, ModelDims, TextEncoderDims, TransformerDims, VaeDims
from wan_dist.runtime.errors import InputError, nearest

NUM_TRAIN_TIMESTEPS = 1000
AREA_480P = 832 * 480


class Images(Enum):
    """Which images a task starts from."""

    NONE = "no image"
    FIRST = "image=FILE"
    OPTIONAL = "image=FILE, or none"
    FIRST_AND_LAST = "first_frame=FILE last_frame=FILE"

    @property
    def keys(self) -> tuple[str, ...]:
        """The settings that name them."""
        if self is Images.FIRST_AND_LAST:
            return ("first_frame", "last_frame")
        return () if self is Images.NONE else ("image",)


_1_3B = TransformerDims(num_layers=30, dim=1536, ffn_dim=8960, num_heads=12)
_5B = TransformerDims(num_layers=30, dim=3072, ffn_dim=14336, num_heads=24, in_dim=48, out_dim=48)
_T2V_14B = TransformerDims(num_layers=40, dim=5120, ffn_dim=13824, num_heads=40)
_I2V_A14B = replace(_T2V_14B, in_dim=36)
_I2V_14B = replace(_I2V_A14B, image_dim=1280)
_FLF2V_14B = replace(_I2V_14B, image_positions=2 * 257)
_TOY = TransformerDims(num_layers=7, dim=192, ffn_dim=512, num_heads=6, text_dim=128, text_len=64)
_UMT5_XXL = TextEncoderDims(num_layers=24, dim=4096, ffn_dim=10240, num_heads=64, head_dim=64, vocab_size=256384)
_TOY_UMT5 = TextEncoderDims(num_layers=2, dim=128, ffn_dim=256, num_heads=4, head_dim=32, vocab_size=640)
_CLIP_H = ImageEncoderDims(num_layers=32, dim=1280, ffn_dim=5120, num_heads=16, patch=14, image_size=224)
_VAE_21 = VaeDims(dim=96, decoder_dim=96)
_VAE_22 = VaeDims(dim=160, decoder_dim=256, latent_dim=48, residual=True)


class TeaFit(NamedTuple):
    """How TeaCache foresees a model's change from that of its timestep's embedding (arXiv:2411.19108)."""

    coefficients: tuple[float, ...]
    """Of a polynomial, the highest power first."""
    threshold: float
    """Of the summed change, after which a step is computed: the more careful one of those published."""


_TEA_T2V_14B = TeaFit((-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01), 0.10)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of generation.

    ``sizes`` are the published (width, height) pairs, others work if their sides are multiples of stride times patch.
    """

    name: str
    repository: str
    """On the Hugging Face hub, in the original layout."""
    repository_480p: str | None = None
    """Another checkpoint of the same task, for areas up to 480P."""
    transformer: TransformerDims
    images: Images = Images.NONE
    boundary: float | None = None
    """Where the noise level of the two experts' switch is, as a fraction of the timesteps; None: there is one transformer."""
    shifts: tuple[float, float] | None = None
    """Schedule shift for areas up to 480P and above, where it depends on that; else it is in the task's YAML."""
    text_encoder: TextEncoderDims = _UMT5_XXL
    vae: VaeDims = _VAE_21
    sizes: tuple[tuple[int, int], ...] = ()
    still: bool = False
    """One frame, saved as PNG."""
    tea: tuple[TeaFit, ...] = ()
    """TeaCache's for areas up to 480P and above, or one for both: those for the transformer's e0 of ali-vilab/TeaCache, TeaCache4Wan2.1."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.vae.latent_dim

    @property
    def stride(self) -> tuple[int, int, int]:
        """The VAE's compression (time, height, width)."""
        return 4, self.vae.scale, self.vae.scale

    @property
    def patch(self) -> tuple[int, int, int]:
        """The transformer's patch (time, height, width)."""
        return self.transformer.patch

    @property
    def image_encoder(self) -> ImageEncoderDims | None:
        """What looks at the images, where cross-attention wants that."""
        return _CLIP_H if self.looks_at_images else None

    @property
    def models(self) -> ModelDims:
        """All of its models."""
        return ModelDims(transformer=self.transformer, text_encoder=self.text_encoder, image_encoder=self.image_encoder, vae=self.vae)

    @property
    def multiple(self) -> tuple[int, int]:
        """What (width, height) in pixels must be multiples of."""
        return self.stride[2] * self.patch[2], self.stride[1] * self.patch[1]

    @property
    def looks_at_images(self) -> bool:
        """Whether CLIP features of the images go into cross-attention."""
        return self.transformer.image_dim > 0

    @property
    def known_first_frame(self) -> bool:
        """Whether an image becomes the first latent frame as it is, with a timestep of its own, rather than extra channels."""
        return self.images is Images.OPTIONAL

    def hub_repository(self, area: int) -> str:
        """Return the repository whose checkpoint was trained for videos of this area, in pixels."""
        return self.repository_480p if self.repository_480p and area <= AREA_480P else self.repository


_480P = ((832, 480), (480, 832))
_720P = (*_480P, (1280, 720), (720, 1280))
_704P = ((1280, 704), (704, 1280))
TASKS = {
    task.name: task
    for task in (
        Task(
            name="t2v-1.3B",
            repository="Wan-AI/Wan2.1-T2V-1.3B",
            transformer=_1_3B,
            sizes=_480P,
            tea=(TeaFit((-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02), 0.05),),
        ),
        Task(name="t2v-14B", repository="Wan-AI/Wan2.1-T2V-14B", transformer=_T2V_14B, sizes=_720P, tea=(_TEA_T2V_14B,)),
        Task(
            name="t2i-14B",
            repository="Wan-AI/Wan2.1-T2V-14B",
            transformer=_T2V_14B,
            sizes=(*_720P, (1024, 1024)),
            still=True,
            tea=(_TEA_T2V_14B,),
        ),
        Task(
            name="i2v-14B",
            repository="Wan-AI/Wan2.1-I2V-14B-720P",
            repository_480p="Wan-AI/Wan2.1-I2V-14B-480P",
            transformer=_I2V_14B,
            images=Images.FIRST,
            shifts=(3.0, 5.0),
            sizes=_720P,
            tea=(
                TeaFit((2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01), 0.20),
                TeaFit((8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02), 0.20),
            ),
        ),
        Task(
            name="flf2v-14B",
            repository="Wan-AI/Wan2.1-FLF2V-14B-720P",
            transformer=_FLF2V_14B,
            images=Images.FIRST_AND_LAST,
            sizes=_720P,
        ),
        Task(
            name="t2v-A14B",
            repository="Wan-AI/Wan2.2-T2V-A14B",
            transformer=_T2V_14B,
            boundary=0.875,
            sizes=_720P,
        ),
        Task(
            name="i2v-A14B",
            repository="Wan-AI/Wan2.2-I2V-A14B",
            transformer=_I2V_A14B,
            images=Images.FIRST,
            boundary=0.9,
            sizes=_720P,
        ),
        Task(
            name="ti2v-5B",
            repository="Wan-AI/Wan2.2-TI2V-5B",
            transformer=_5B,
            images=Images.OPTIONAL,
            vae=_VAE_22,
            sizes=_704P,
        ),
        Task(
            name="toy",
            repository="",
            transformer=_TOY,
            images=Images.OPTIONAL,
            text_encoder=_TOY_UMT5,
            vae=VaeDims(dim=8, decoder_dim=12),
            sizes=((128, 128),),
            tea=(TeaFit((1.0, 0.0), 0.2),),
        ),
    )
}

KNOWN_BUT_UNSUPPORTED = ("vace-1.3B", "vace-14B", "s2v-14B", "animate-14B")


def get_task(name: str) -> Task:
    """Return the task called ``name``; raises InputError if there is none, or none yet."""
    if name in TASKS:
        return TASKS[name]
    supported = ", ".join(TASKS)
    if name in KNOWN_BUT_UNSUPPORTED:
        raise InputError(f"task {name} is not supported yet; supported: {supported}")
    hint = nearest(name, (*TASKS, *KNOWN_BUT_UNSUPPORTED))
    raise InputError(f"there is no task {name!r}{hint} (supported: {supported})")


def require_task(arguments: Iterable[str]) -> None:
    """Raise InputError unless ``task=NAME`` is among the arguments and NAME is a supported task."""
    names = [argument.partition("=")[2] for argument in arguments if argument.startswith("task=")]
    if not names:
        raise InputError(f"say what to generate: task=NAME, one of {', '.join(TASKS)} (see --help)")
    get_task(names[-1])
