"""Animate: pose tokens added to the video's, and a face adapter between the blocks.

The sequence begins with a latent frame of the reference image, which has neither pose nor face. The face
adapter's blocks let each token attend to the few vectors of its own latent frame, so that sequence
parallelism exchanges nothing for them.

Source: Wan-Animate (arXiv:2509.14055); names are those of the published checkpoints.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.dims import TransformerDims
from wan_dist.models.fused_block import FusedBlock
from wan_dist.models.fused_transformer import BlockInputs, FusedTransformer
from wan_dist.models.kernels.transformer_ops import (
    Scaling,
    layer_norm,
    split_by_length,
    split_by_segment,
)
from wan_dist.models.transformer import PatchEmbedding, RMSNorm, attend, split_heads


class FaceBlock(nn.Module):
    """Attention from each token to the face vectors of its latent frame, added to the residual stream."""

    def __init__(self, dims: TransformerDims, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = dims.num_heads
        self.eps = dims.eps
        self.linear1_q = nn.Linear(dims.dim, dims.dim, dtype=dtype)
        self.linear1_kv = nn.Linear(dims.dim, 2 * dims.dim, dtype=dtype)
        self.linear2 = nn.Linear(dims.dim, dims.dim, dtype=dtype)
        self.q_norm = RMSNorm(dims.head_dim, dims.eps)
        self.k_norm = RMSNorm(dims.head_dim, dims.eps)
        self.slice_tokens: int | None = None
        """See `FusedBlock.slice_tokens`."""

    def forward(
        self, streams: list[Tensor], faces: Sequence[Tensor], segments: tuple[int, ...]
    ) -> list[Tensor]:
        """Return the residual streams x (B, L, D), which are changed in place.

        faces: of each stream the vectors (T, n, D) of all latent frames. ``segments``: how many of the tokens
        are of each latent frame.
        """
        no_scaling = streams[0].new_zeros(1, 1, 1, streams[0].shape[-1], dtype=torch.float32)
        scaling = Scaling(no_scaling, no_scaling)
        for x, face in zip(streams, faces, strict=True):
            keys, values = self._project_face(face.to(x))
            for token_slice, slice_segments in split_by_length(segments, self.slice_tokens):
                tokens = x[:, token_slice]
                # One run: the norm has no weights of a segment.
                normed = layer_norm(
                    tokens, scaling, (tokens.shape[1],), self.eps, torch.empty_like(tokens)
                )
                q = self.linear1_q(normed)
                del normed
                for frame, run in split_by_segment(slice_segments):
                    heads = self.q_norm(split_heads(q[:, run], self.num_heads)).to(q.dtype)
                    q[:, run] = attend(heads, keys[frame, None], values[frame, None])
                tokens += self.linear2(q)
                del q
        return streams

    def _project_face(self, face: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (T, n, H, D / H) of vectors (T, n, D)."""
        normed = F.layer_norm(face.float(), face.shape[-1:], eps=self.eps).to(face.dtype)
        k, v = self.linear1_kv(normed).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.k_norm(k).to(v.dtype), v


class AnimateTransformer(FusedTransformer):
    """`FusedTransformer` with pose tokens and face adapter.

    The pose video's latents are the last channels of its input; face vectors come with the contexts.
    """

    def __init__(
        self,
        dims: TransformerDims,
        dtype: torch.dtype,
        inner_attention: InnerAttention | None = None,
    ) -> None:
        super().__init__(dims, dtype, inner_attention)
        self.pose_patch_embedding = PatchEmbedding(replace(dims, in_dim=dims.pose_dim), dtype)
        fuser_blocks = nn.ModuleList(FaceBlock(dims, dtype) for _ in dims.face_layers)
        self.face_adapter = nn.ModuleDict({"fuser_blocks": fuser_blocks})

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Return the tokens (B, L, D) of latents (B, C_in + C_pose, T, h, w); the first frame has no pose."""
        tokens = super().embed_latents(latents[:, : self.dims.in_dim])
        pose_tokens = self.pose_patch_embedding(latents[:, self.dims.in_dim :, 1:])
        tokens[:, -pose_tokens.shape[1] :] += pose_tokens
        return tokens

    def run_blocks(
        self, streams: list[Tensor], inputs: BlockInputs, latents: Tensor
    ) -> list[Tensor]:
        """See `FusedTransformer.run_blocks`; a block of the face adapter runs after its block."""
        num_frames = latents.shape[2]
        faces = [_add_frame_without_face(context.face) for context in inputs.contexts]
        frame_tokens = sum(self.count_segment_tokens(latents, 1)) // num_frames
        frame_segments = self.sequence.split_segments((frame_tokens,) * num_frames)
        context_index = 0
        for block in self.layers().values():
            if isinstance(block, FusedBlock):
                streams = block(streams, *inputs.select_block(context_index))
                context_index += 1
            else:
                streams = block(streams, faces, frame_segments)
        return streams


def _add_frame_without_face(face: Tensor | None) -> Tensor:
    """Return face vectors (T, n, D) with zeros for the reference image's frame before them."""
    if face is None:
        raise ValueError("a context has no face vectors")
    return F.pad(face, (0, 0, 0, 0, 1, 0))
