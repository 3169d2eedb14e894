"""Planned bytes of activations against those that the models make, counted on meta at full size."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.live_bytes import LiveBytes
from wan_dist.models.attention import eight_bit as attention_8bit
from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.fused_block import ContextKV
from wan_dist.models.fused_transformer import FusedTransformer, ResidualCache
from wan_dist.models.gguf_linear import WeightPart, compress_blocks
from wan_dist.models.kernels import quantized_linear as quantized
from wan_dist.models.vae import ops as vae_elementwise
from wan_dist.models.vae.model import WanVae
from wan_dist.parallel import ring, sequence, ulysses
from wan_dist.parallel.mesh import Axis
from wan_dist.pipeline import vae_tiles as tiles
from wan_dist.pipeline.decode import convert_to_uint8_frames, decode_latents, encode_video
from wan_dist.planning.activation_memory import estimate_activation_bytes
from wan_dist.planning.memory_estimate import estimate_step_bytes
from wan_dist.planning.vae_memory import VaeStrategy, estimate_vae_bytes
from wan_dist.planning.workload import GIB, Arrangement, CompressedBlocks, Workload
from wan_dist.tasks.registry import TASKS

ALONE = Axis()
TIMES = torch.tensor([[500]])
SLICE = 3072
"""Below FLOAT32_CHUNK_TOKENS, so that a slice limits what is in float32 too."""


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def list_q4_k_parts(model: FusedTransformer) -> dict[str, list[WeightPart]]:
    return {
        f"{block_name}.{name}": [WeightPart("Q4_K")]
        for block_name, block in model.layers().items()
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


class NoKernels:
    """In place of a module of kernels, none of which does anything."""

    def __getattr__(self, name: str) -> "NoKernels":
        return self

    def __getitem__(self, grid: object) -> "NoKernels":
        return self

    def __call__(self, *arguments: object, **options: object) -> None:
        return None


def in_8_bits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_8bit._run_8bit_attention(NoKernels(), q, k, v)  # type: ignore[arg-type]


@pytest.mark.parametrize("slice_tokens", [None, SLICE])
@pytest.mark.parametrize("passes", ["together", "apart"])
@pytest.mark.parametrize(
    ("task", "size", "quant"),
    [
        ("t2v-1.3B", (832, 480, 81), "none"),
        ("t2v-1.3B", (832, 480, 81), "none, and tea"),
        ("ti2v-5B", (1280, 704, 121), "none"),
        ("i2v-14B", (832, 480, 81), "none"),
        ("i2v-14B", (832, 480, 81), "none, and 8bit"),
        ("i2v-14B", (832, 480, 81), "none, and gguf"),
        ("i2v-14B", (832, 480, 81), "fp8"),
        ("i2v-14B", (832, 480, 81), "int8"),
        ("i2v-14B", (832, 480, 81), "int4"),
    ],
)
def test_a_step_takes_what_is_planned(
    task: str,
    size: tuple[int, int, int],
    quant: str,
    passes: str,
    slice_tokens: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantized, "supports_fp8_matmul", lambda device: True)
    quant, _, more = quant.partition(", and ")
    found, (width, height, frames) = TASKS[task], size
    # In fp8 the peak is in the third block.
    dims = replace(found.transformer_dims, num_layers=3 if quant == "fp8" else 2)
    shape = (
        found.latent_channels,
        (frames - 1) // 4 + 1,
        height // found.vae_stride[1],
        width // found.vae_stride[2],
    )
    num_tokens = shape[1] * shape[2] * shape[3] // 4
    with torch.device("meta"):
        kernel = in_8_bits if more == "8bit" else lambda q, k, v: torch.empty_like(q)
        model = FusedTransformer(dims, torch.bfloat16, InnerAttention(kernel, "like q"))
        if more == "gguf":
            compress_blocks(model.layers(), list_q4_k_parts(model))
        if quant != "none":
            quantized.quantize_blocks(model.layers().values(), quant)
    model.requires_grad_(False).set_slice_tokens(slice_tokens)
    model.precompute_time_embeddings([TIMES])
    rotary = (empty(num_tokens, 1, dims.head_dim // 2), empty(num_tokens, 1, dims.head_dim // 2))
    heads = (dims.num_heads, dims.head_dim)
    image = (
        empty(dims.num_layers, 2, 1, 257, *heads, dtype=torch.bfloat16) if dims.image_dim else None
    )
    contexts = [
        ContextKV(empty(dims.num_layers, 2, 1, n + 1, *heads, dtype=torch.bfloat16), image)
        for n in (20, 200)
    ]
    kept = [
        *model.parameters(),
        *rotary,
        *model.time_embeddings[str(TIMES.tolist())],
        *(context.text for context in contexts),
    ]
    with torch.no_grad(), LiveBytes([*kept, *([image] if image is not None else [])]) as live:
        latents = empty(1, dims.in_dim, *shape[1:])
        groups = [contexts] if passes == "together" else [[context] for context in contexts]
        added = [ResidualCache(lambda embedding: False) if more == "tea" else None for _ in groups]
        num_steps = 2 if more == "tea" else 1  # only a cache outlives a step
        for group, of_group in [*zip(groups, added, strict=True)] * num_steps:
            model(latents, TIMES, group, rotary, of_group)
    load = Workload(
        model_dims=found.model_dims,
        latent_shape=shape,
        num_tokens=num_tokens,
        text_lengths=(20, 200),
        quant=quant,
        has_step_cache=more == "tea",
        has_8bit_attention=more == "8bit",
        compressed_blocks=CompressedBlocks(
            block_bytes=0,
            all_bytes=0,
            decoded_bytes=2 * (6 * dims.dim + 2 * dims.ffn_dim) * dims.dim,
            num_weights=0,
        ),
    )
    arrangement = Arrangement(
        slice_tokens=slice_tokens,
        passes=passes,
        gguf="compressed" if more == "gguf" else "decoded",
    )
    planned = estimate_step_bytes(load, arrangement)
    print(
        f"{task} {size} {quant} {passes} {slice_tokens}: "
        f"planned {planned / GIB:.2f}, made {live.peak / GIB:.2f} GiB"
    )
    assert live.peak <= planned * 1.02
    assert live.peak >= planned * 0.85 - 0.1 * GIB


@pytest.mark.parametrize("slice_tokens", [None, SLICE])
@pytest.mark.parametrize(
    ("ring_size", "ulysses_size", "num_contexts", "dtype"),
    [
        (2, 1, 2, torch.bfloat16),
        (4, 1, 1, torch.bfloat16),
        (3, 1, 1, torch.float32),
        (2, 4, 1, torch.bfloat16),
        (4, 4, 2, torch.bfloat16),
        (1, 8, 2, torch.bfloat16),
    ],
)
def test_a_step_on_several_ranks_takes_what_is_planned(
    ring_size: int,
    ulysses_size: int,
    num_contexts: int,
    dtype: torch.dtype,
    slice_tokens: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def send(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
        sent = [x.contiguous()]  # there until it has arrived
        received = torch.empty_like(sent[0])
        return lambda: [received, sent.clear()][0]

    def pass_on(parts: list[Tensor], axis: Axis) -> Callable[[], list[Tensor]]:
        arriving = [send(part, axis) for part in parts]
        return lambda: [part() for part in arriving]

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    monkeypatch.setattr(ulysses, "all_to_all", send)
    monkeypatch.setattr(ring, "send_to_next", pass_on)
    monkeypatch.setattr(ring, "attend_with_lse", attend)
    monkeypatch.setattr(sequence, "all_gather", lambda x, axis: x.new_empty(axis.size, *x.shape))
    found, shape, num_tokens, num_parts = (
        TASKS["t2v-14B"],
        (16, 21, 90, 160),
        75600,
        ring_size * ulysses_size,
    )
    dims = replace(found.transformer_dims, num_layers=2)
    with torch.device("meta"):
        model = FusedTransformer(
            dims, dtype, InnerAttention(lambda q, k, v: torch.empty_like(q), "fa4")
        )
    model.requires_grad_(False).set_slice_tokens(slice_tokens)
    model.precompute_time_embeddings([TIMES])
    split = sequence.apply_sequence_split(model, Axis(0, num_parts))
    ring.apply_ring(model, split, Axis(0, ring_size), ulysses_size=ulysses_size)
    ulysses.apply_ulysses(model, split, Axis(0, ulysses_size))
    rotary = (empty(num_tokens, 1, 64), empty(num_tokens, 1, 64))
    contexts = [
        ContextKV(empty(2, 2, 1, 61, dims.num_heads, dims.head_dim, dtype=dtype))
        for _ in range(num_contexts)
    ]
    others = [
        *model.parameters(),
        *rotary,
        *model.time_embeddings[str(TIMES.tolist())],
        *(context.text for context in contexts),
    ]
    with LiveBytes(others) as live:
        model(empty(1, dims.in_dim, *shape[1:]), TIMES, contexts, rotary)
    cfg = 3 - num_contexts
    load = Workload(
        model_dims=found.model_dims,
        latent_shape=shape,
        num_tokens=num_tokens,
        text_lengths=(60, 60),
        num_ranks=cfg * num_parts,
        cfg_degree=cfg,
        num_sequence_parts=num_parts,
        itemsize=dtype.itemsize,
    )
    planned = estimate_activation_bytes(load, Arrangement(slice_tokens=slice_tokens))
    print(
        f"ring {ring_size} ulysses {ulysses_size} {dtype}: "
        f"planned {planned / GIB:.2f}, made {live.peak / GIB:.2f} GiB"
    )
    assert live.peak <= planned
    assert live.peak >= planned * 0.7 - 0.15 * GIB


WAYS = [
    VaeStrategy("whole"),
    VaeStrategy("whole", at_once=2),
    *(VaeStrategy("tiled", number) for number in (2, 4, 16)),
]
CASES = [*((way, 3) for way in WAYS), (VaeStrategy("whole"), 1), (VaeStrategy("tiled", 4), 1)]


@pytest.mark.parametrize(
    ("way", "num_latents"), CASES, ids=[f"{way} {way.at_once} of {number}" for way, number in CASES]
)
@pytest.mark.parametrize(
    ("task", "size", "dtype"),
    [
        ("t2v-1.3B", (832, 480), torch.bfloat16),
        ("t2v-1.3B", (1280, 720), torch.bfloat16),
        ("ti2v-5B", (1280, 704), torch.bfloat16),
        ("t2v-1.3B", (832, 480), torch.float32),
    ],
)
@pytest.mark.parametrize("work", ["decode", "encode"])
def test_the_vae_takes_what_is_planned(
    work: str,
    task: str,
    size: tuple[int, int],
    dtype: torch.dtype,
    way: VaeStrategy,
    num_latents: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vae_elementwise, "is_on_gpu", lambda x: True)
    kernels = (
        SimpleNamespace(activate_kernel=0, add_kernel=0, interleave_kernel=0)
        if dtype == torch.bfloat16
        else None
    )
    monkeypatch.setattr(vae_elementwise, "_select_kernels", lambda *videos: kernels)
    monkeypatch.setattr(vae_elementwise, "_launch_pixel_kernel", lambda *arguments: None)
    monkeypatch.setattr(tiles, "_copy_to_host", lambda x: torch.empty(x.shape, dtype=x.dtype))
    dims, (width, height) = TASKS[task].vae_dims, size
    rows, columns = height // dims.spatial_scale, width // dims.spatial_scale
    chunks = [1, *[4] * (num_latents - 1)]
    with torch.no_grad(), LiveBytes() as live:
        with torch.device("meta"):
            vae = WanVae(dims, dtype).requires_grad_(False)
        weights = live.peak = live.now
        vae.optimize_memory_format()
        if work == "decode":
            for frames in decode_latents(
                vae,
                empty(dims.latent_dim, num_latents, rows, columns),
                convert_to_uint8_frames,
                way,
                ALONE,
            ):
                del frames
        elif way.name == "tiled":
            monkeypatch.setattr(Tensor, "cpu", lambda x: torch.empty(x.shape, dtype=x.dtype))
            encode_video(vae, lambda: (empty(1, 3, n, height, width) for n in chunks), way, ALONE)
        else:
            encode_video(vae, lambda: (empty(1, 3, n, height, width) for n in chunks), way, ALONE)
    length, margin = way.compute_largest_part(columns, 1, dims)
    planned = estimate_vae_bytes(
        dims,
        (rows, length, margin),
        dtype.itemsize,
        at_once=way.at_once,
        encode=work == "encode",
        is_still=num_latents == 1,
    )
    made = live.peak - weights
    print(
        f"{work} {task} {size} {dtype} {way} {way.at_once}: "
        f"planned {planned / GIB:.2f}, made {made / GIB:.2f} GiB"
    )
    assert planned == pytest.approx(made, rel=0.12, abs=0.1 * GIB)
