"""Attention to a driving video beside the video's own tokens, as Animate-2 has it.

The driving video passes once through the same transformer, at timestep 1. Its keys and values are kept; from
then on each frame of the video but the first attends to those of its driving frame too. The softmax over
both is that of two attentions, merged by their log-sum-exp.

Source: Wan-Animate-2 (arXiv:2608.06009).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.attention.log_sum_exp import KeyBias, attend_with_lse, merge_attention_


@dataclass(frozen=True)
class DrivingLayout:
    """How the tokens of a clip and of its driving video lie."""

    num_frames: int
    """Latent frames of the clip: the reference image, then those of the video."""
    frame_tokens: int
    """Tokens of each of them."""
    driving_tokens: int
    """Tokens of each latent frame of the driving video, of which there is one less."""
    first_frame_bias: float = 0.0
    """Added to the scores of the keys of the video's first frame, as the distilled model has it."""
    slot_tokens: int | None = None
    """Tokens of a frame of the requested size, into whose slots frames are put; None: each fills its own."""
    num_slots: int | None = None
    """Latent frames of a clip of full length, None where this is one."""

    @property
    def bias(self) -> KeyBias | None:
        """What is added to the scores of the clip's keys."""
        if self.first_frame_bias == 0:
            return None
        return KeyBias(self.frame_tokens, 2 * self.frame_tokens, self.first_frame_bias)

    def count_zero_keys(self, frame: int) -> float:
        """Return the weight of the keys that a frame's queries have in empty slots, as in the release.

        Their keys and values are 0, so that each adds exp(0), or the exponential of the bias, to the
        denominator of the softmax alone.
        """
        slot = self.slot_tokens
        if slot is None:
            return 0.0
        empty = slot - self.frame_tokens
        num_slots = self.num_slots or self.num_frames
        in_clip = num_slots * slot - self.num_frames * self.frame_tokens
        in_driving = slot - self.driving_tokens if frame else 0
        return in_clip - empty + empty * math.exp(self.first_frame_bias) + in_driving


class DrivingStream:
    """What the attentions of all blocks share: the layout, and whether the driving video passes through."""

    def __init__(self) -> None:
        self.layout: DrivingLayout | None = None
        """None: attention is that to the sequence's own tokens."""
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer, keys and values (B, n, H, D) of the driving frames that the rows here attend to."""
        self.is_recording = False
        """Whether the sequence is the driving video, whose keys and values are kept."""
        self.locate_rows: Callable[[int], tuple[int, int]] = lambda num_tokens: (0, num_tokens)
        """Returns which rows, from and to, of a sequence of so many tokens attention has here."""
        self.gather_rows: Callable[[Tensor, int], Tensor] = lambda x, num_tokens: x
        """Returns all rows (B, n, H, D) of a sequence of so many tokens, from those that are here."""

    def split_frames(self) -> Iterator[tuple[int, slice]]:
        """Yield the clip's frames of which there are rows here, each with these rows."""
        assert self.layout is not None
        size = self.layout.frame_tokens
        start, stop = self.locate_rows(self.layout.num_frames * size)
        for frame in range(start // size, -(-stop // size)):
            yield (
                frame,
                slice(max(frame * size, start) - start, min((frame + 1) * size, stop) - start),
            )

    def select_driving_frames(self, x: Tensor) -> Tensor:
        """Return keys or values (B, n, H, D) of the driving frames that the clip's rows here attend to."""
        assert self.layout is not None
        size = self.layout.driving_tokens
        x = self.gather_rows(x, (self.layout.num_frames - 1) * size)
        frames = [frame - 1 for frame, _ in self.split_frames() if frame]
        return x[:, frames[0] * size : (frames[-1] + 1) * size].clone() if frames else x[:, :0]


class DrivenAttention(InnerAttention):
    """Attention of a clip's tokens to each other and to a driving video; see the module's docstring."""

    accepts_partial_queries = False

    def __init__(self, inner: InnerAttention, stream: DrivingStream, layer: int) -> None:
        super().__init__(inner.kernel, inner.name, inner.reason)
        self.inner = inner
        self.stream = stream
        self.layer = layer

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention (B, L, H, D) of q, k and v (B, L, H, D) of the clip, or of the driving video."""
        layout = self.stream.layout
        if layout is None or self.stream.is_recording:
            if layout is not None:
                self.stream.kept[self.layer] = (
                    self.stream.select_driving_frames(k),
                    self.stream.select_driving_frames(v),
                )
            out: Tensor = self.inner(q, k, v)
            return out
        merged = self.inner.attend_with_lse(q, k, v, layout.bias)
        return q if merged is None else self._add_driving(q, *merged, layout).to(q.dtype)

    def _add_driving(self, q: Tensor, out: Tensor, lse: Tensor, layout: DrivingLayout) -> Tensor:
        """Merge attention to the driving frames, and empty slots, into ``out`` and ``lse``, in place."""
        driving_kv = self.stream.kept[self.layer]
        position, size = 0, layout.driving_tokens
        for frame, rows in self.stream.split_frames():
            if frame:
                keys, values = (x[:, position : position + size] for x in driving_kv)
                part = attend_with_lse(self.name, q[:, rows], keys, values)
                merge_attention_(out[:, rows], lse[:, rows], *part)
                position += size
            if num_zero_keys := layout.count_zero_keys(frame):
                out[:, rows] *= torch.sigmoid(lse[:, rows] - math.log(num_zero_keys)).unsqueeze(-1)
        return out
