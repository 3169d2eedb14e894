"""What each task is: shapes of its models, where its checkpoint is published, which files that has.

Defaults of a run (frames, steps, guidance ...) are in ``conf/task/*.yaml``; this file holds what the user cannot change.
"""

from dataclasses import dataclass

from wan_dist.errors import InputError, nearest

NUM_TRAIN_TIMESTEPS = 1000
TEXT_LEN = 512


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """Published sizes of a diffusion transformer, for planning without the files."""

    num_layers: int
    dim: int
    ffn_dim: int
    num_heads: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of generation.

    ``stride`` is the VAE's compression (time, height, width), ``patch`` the transformer's patch; ``sizes`` are the published
    (width, height) pairs, others work if their sides are multiples of stride times patch.
    """

    name: str
    repository: str
    transformer: TransformerShape | None
    latent_channels: int = 16
    stride: tuple[int, int, int] = (4, 8, 8)
    patch: tuple[int, int, int] = (1, 2, 2)
    sizes: tuple[tuple[int, int], ...] = ()
    still: bool = False
    """One frame, saved as PNG."""

    @property
    def multiple(self) -> tuple[int, int]:
        """What (width, height) in pixels must be multiples of."""
        return self.stride[2] * self.patch[2], self.stride[1] * self.patch[1]


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """File names of the layout that Wan publishes, relative to the checkpoint's folder."""

    config: str = "config.json"
    transformer: str = "diffusion_pytorch_model"
    text_encoder: str = "models_t5_umt5-xxl-enc-bf16.pth"
    vae: str = "Wan2.1_VAE.pth"
    tokenizer: str = "google/umt5-xxl"

    @property
    def patterns(self) -> list[str]:
        """Glob patterns of everything a run reads: what to download and nothing else."""
        return [self.config, f"{self.transformer}*.safetensors*", self.text_encoder, self.vae, f"{self.tokenizer}/*"]


ORIGINAL_LAYOUT = CheckpointFiles()

_SIZES_480P = ((832, 480), (480, 832))
_SIZES_720P = (*_SIZES_480P, (1280, 720), (720, 1280))
_WAN_1_3B = TransformerShape(num_layers=30, dim=1536, ffn_dim=8960, num_heads=12)
_WAN_14B = TransformerShape(num_layers=40, dim=5120, ffn_dim=13824, num_heads=40)
_T2V_14B = "Wan-AI/Wan2.1-T2V-14B"

TASKS = {
    task.name: task
    for task in (
        Task(name="t2v-1.3B", repository="Wan-AI/Wan2.1-T2V-1.3B", transformer=_WAN_1_3B, sizes=_SIZES_480P),
        Task(name="t2v-14B", repository=_T2V_14B, transformer=_WAN_14B, sizes=_SIZES_720P),
        Task(
            name="t2i-14B",
            repository=_T2V_14B,
            transformer=_WAN_14B,
            sizes=(*_SIZES_720P, (1024, 1024)),
            still=True,
        ),
        Task(name="toy", repository="", transformer=None),
    )
}

KNOWN_BUT_UNSUPPORTED = (
    "i2v-14B",
    "flf2v-14B",
    "vace-1.3B",
    "vace-14B",
    "t2v-A14B",
    "i2v-A14B",
    "ti2v-5B",
    "s2v-14B",
    "animate-14B",
)


def get_task(name: str) -> Task:
    """Return the task called ``name``; raises InputError if there is none, or none yet."""
    if name in TASKS:
        return TASKS[name]
    supported = ", ".join(TASKS)
    if name in KNOWN_BUT_UNSUPPORTED:
        raise InputError(f"task {name} is not supported yet; supported: {supported}")
    raise InputError(f"there is no task {name!r}{nearest(name, (*TASKS, *KNOWN_BUT_UNSUPPORTED))} (supported: {supported})")
