"""Predicted bytes of the models against the models themselves, on meta."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from wan_dist.models import audio_encoder
from wan_dist.models.audio_encoder import build_audio_encoder
from wan_dist.models.audio_projection import AudioProjection
from wan_dist.models.build_transformer import build_transformer
from wan_dist.models.context import ContextProjection
from wan_dist.models.face_encoder import FaceVideoEncoder
from wan_dist.models.fused_transformer import FusedTransformer, list_time_layers
from wan_dist.models.image_encoder import build_image_encoder
from wan_dist.models.kernels import quantized_linear as quantized
from wan_dist.models.kernels import transformer_ops
from wan_dist.models.text_encoder import build_text_encoder
from wan_dist.models.vae.model import WanVae
from wan_dist.planning import (
    activation_memory,
    audio_memory,
    face_memory,
    memory_estimate,
    parameter_bytes,
)
from wan_dist.tasks.published_dims import DIMS_ANIMATE_FACE, DIMS_WAV2VEC_XLSR
from wan_dist.tasks.registry import TASKS
from wan_dist.weights import streaming


def size_of(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def test_bytes_of_the_audio_models_are_exact() -> None:
    dims = TASKS["s2v-14B"].transformer_dims
    for dtype in (torch.bfloat16, torch.float32):
        with torch.device("meta"):
            projection = AudioProjection(dims, dtype)
        num_injections = len(dims.audio_layers)
        counted = audio_memory.count_audio_projection_bytes(dims, dtype.itemsize, num_injections)
        assert counted == size_of(projection)
    with torch.device("meta"):
        encoder = build_audio_encoder(DIMS_WAV2VEC_XLSR)
    assert audio_memory.count_audio_encoder_bytes(DIMS_WAV2VEC_XLSR) == size_of(encoder)
    assert audio_memory._STEPS_AT_ONCE == audio_encoder._STEPS_AT_ONCE


def test_bytes_of_the_face_encoder_are_exact() -> None:
    with torch.device("meta"):
        model = FaceVideoEncoder(DIMS_ANIMATE_FACE)
    assert face_memory.count_face_encoder_bytes(DIMS_ANIMATE_FACE) == size_of(model)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_of_weights_are_exact(task: object, dtype: torch.dtype) -> None:
    dims = task.transformer_dims  # type: ignore[attr-defined]
    with torch.device("meta"):
        model, projection = build_transformer(dims, dtype), ContextProjection(dims, dtype)
        vae, text = WanVae(task.vae_dims, dtype), build_text_encoder(task.text_encoder_dims, dtype)  # type: ignore[attr-defined]
    sizes = {name: size_of(block) for name, block in model.layers().items()}
    assert parameter_bytes.count_block_bytes(dims, dtype.itemsize) == max(sizes.values())
    all_blocks_bytes = parameter_bytes.count_all_blocks_bytes(dims, dtype.itemsize, "none")
    assert all_blocks_bytes == sum(sizes.values())
    assert parameter_bytes.count_transformer_bytes(dims, dtype.itemsize) == size_of(model)
    assert parameter_bytes.count_projection_bytes(
        dims, dtype.itemsize, len(dims.context_block_names)
    ) == size_of(projection)
    assert parameter_bytes.count_vae_weight_bytes(vae.dims, dtype.itemsize) == pytest.approx(
        size_of(vae), rel=2e-3
    )  # norms are float32
    assert parameter_bytes.count_text_encoder_bytes(
        task.text_encoder_dims, dtype.itemsize
    ) == size_of(text)  # type: ignore[attr-defined]
    assert parameter_bytes.count_text_block_bytes(
        task.text_encoder_dims, dtype.itemsize
    ) == size_of(text.get_submodule("block.0"))  # type: ignore[attr-defined]


def test_bytes_of_a_second_time_embedding_are_counted() -> None:
    dims = replace(TASKS["t2v-14B"].transformer_dims, takes_next_timestep=True)
    with torch.device("meta"):
        model = FusedTransformer(dims, torch.bfloat16)
    assert parameter_bytes.count_transformer_bytes(dims, 2) == size_of(model)
    time_layers = [model.get_submodule(name) for name in list_time_layers(dims)]
    assert len(time_layers) == 3
    assert parameter_bytes.count_time_embedding_bytes(dims) == sum(map(size_of, time_layers))


def test_bytes_of_the_image_encoder_are_exact() -> None:
    dims = TASKS["i2v-14B"].image_encoder_dims
    assert dims is not None
    with torch.device("meta"):
        model = build_image_encoder(dims)
    assert parameter_bytes.count_image_encoder_bytes(dims) == size_of(model)


def test_what_the_plan_counts_is_what_the_models_do() -> None:
    """The plan is made without torch, so a few numbers stand in two places."""
    assert memory_estimate.STREAMED_BLOCKS == streaming.NUM_SLOTS
    assert streaming.BlockReader.num_ahead == memory_estimate.STAGED_BLOCKS
    assert parameter_bytes.INT4_GROUP_SIZE == quantized.INT4_GROUP_SIZE
    assert activation_memory.QUANTIZED_ROWS_PER_CHUNK == quantized._QUANTIZE_CHUNK_ROWS
    assert activation_memory.FLOAT32_CHUNK_TOKENS == transformer_ops.FLOAT32_CHUNK_TOKENS
