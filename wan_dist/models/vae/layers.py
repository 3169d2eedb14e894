"""Causal layers of the Wan video VAEs, for one device.

Shapes: (B, C, F, H, W). Videos are processed in chunks of frames; what a layer needs of earlier chunks is
in a `VideoState`, which the caller creates for each video and passes along. Layer names are those of the
published checkpoints.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.vae import ops
from wan_dist.models.vae.ops import (
    add_residual_,
    fold_phase_weights,
    interleave_phases,
    rms_norm,
    write_norm_silu,
)
from wan_dist.models.vae.video_state import VideoState

_MAX_ATTENTION_SCORES = 2**23
"""Attention scores that are in memory at once."""


class CausalConv3d(nn.Conv3d):
    """Causal convolution, which sees present and past frames only: all padding in time is in front."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel: int | tuple[int, int, int],
        dtype: torch.dtype | None = None,
    ) -> None:
        t, h, w = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(in_dim, out_dim, (t, h, w), padding=(0, h // 2, w // 2), dtype=dtype)
        self.num_past_frames = t - 1

    def forward(self, x: Tensor, state: VideoState) -> Tensor:  # type: ignore[override]
        """Convolve a chunk of frames; the frames before the first one are zeros."""
        if not self.num_past_frames:
            return self._apply_convolution(x, self.bias)
        frames = self.make_input_buffer(x, x.shape, state)
        frames[:, :, self.num_past_frames :] = x
        return self.convolve_buffer(frames, state)

    def make_input_buffer(self, like: Tensor, size: Sequence[int], state: VideoState) -> Tensor:
        """Return an input buffer for a chunk of ``size`` (B, C, F, H, W): past frames, then unfilled ones.

        The caller writes the chunk's own frames into it; dtype, device and memory format are those of
        ``like``.
        """
        batch, channels, num_frames, height, width = size
        shape = (batch, channels, self.num_past_frames + num_frames, height, width)
        frames = torch.empty(
            shape, dtype=like.dtype, device=like.device, memory_format=get_memory_format(like)
        )
        past_frames = state.past_frames.get(self)
        frames[:, :, : self.num_past_frames] = 0 if past_frames is None else past_frames
        return frames

    def convolve_buffer(
        self, frames: Tensor, state: VideoState, *, with_bias: bool = True
    ) -> Tensor:
        """Convolve the filled buffer of `make_input_buffer`; save its last frames for the next chunk."""
        last_frames, past_frames = (
            frames[:, :, -self.num_past_frames :],
            state.past_frames.get(self),
        )
        # A view would keep the whole chunk alive.
        state.past_frames[self] = (
            last_frames.clone() if past_frames is None else past_frames.copy_(last_frames)
        )
        return self._apply_convolution(frames, self.bias if with_bias else None)

    def _apply_convolution(self, frames: Tensor, bias: Tensor | None) -> Tensor:
        if frames.is_cpu and frames.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # PyTorch uses oneDNN for large inputs only; for small ones it is twenty times as fast too.
            return torch.ops.aten.mkldnn_convolution(
                frames, self.weight, bias, self.padding, self.stride, self.dilation, 1
            )
        return F.conv3d(frames, self.weight, bias, padding=self.padding)


def get_memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of x: channels innermost, which is faster on a GPU, or contiguous."""
    return (
        torch.channels_last_3d if x.stride(1) == 1 and x.shape[1] > 1 else torch.contiguous_format
    )


class RMSNorm(nn.Module):
    """RMSNorm over channels, in float32."""

    def __init__(self, dim: int, num_trailing: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * num_trailing))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, ...) of any number of trailing dims -> the same shape."""
        return rms_norm(x, self.gamma).to(x.dtype)


def prepare_conv_input(
    norm: nn.Module,
    conv: nn.Module,
    x: Tensor,
    state: VideoState,
    *,
    bias: Tensor | None = None,
    num_halo_pixels: int = 0,
) -> Tensor:
    """Return silu(norm(x + bias)) of a chunk x as the input buffer of ``conv``, with halos.

    See `CausalConv3d.make_input_buffer`. The halos are ``num_halo_pixels`` rows or columns from each
    neighbour; their exchange overlaps with the chunk's own norm.
    """
    assert isinstance(conv, CausalConv3d)
    assert isinstance(norm, RMSNorm)
    wait_for_halos = state.exchange_halos(x, num_halo_pixels)
    num_before, num_after = state.count_halo_pixels(num_halo_pixels)
    size = list(x.shape)
    size[state.dim] += num_before + num_after
    frames = conv.make_input_buffer(x, size, state)
    new_frames = frames[:, :, conv.num_past_frames :]
    own_frames = new_frames.narrow(state.dim, num_before, x.shape[state.dim])
    write_norm_silu(x, bias, norm.gamma, own_frames)  # while the halos are exchanged
    for halo, start in zip(wait_for_halos(), (0, size[state.dim] - num_after), strict=True):
        if halo is not None:
            write_norm_silu(
                halo, bias, norm.gamma, new_frames.narrow(state.dim, start, num_halo_pixels)
            )
    return frames


class ResidualBlock(nn.Module):
    """Residual block: two causal convolutions with a shortcut."""

    def __init__(self, in_dim: int, out_dim: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim),
            nn.SiLU(),
            CausalConv3d(in_dim, out_dim, 3, dtype),
            RMSNorm(out_dim),
            nn.SiLU(),
            nn.Identity(),  # dropout in training; the checkpoint's numbering counts it
            CausalConv3d(out_dim, out_dim, 3, dtype),
        )
        self.shortcut = CausalConv3d(in_dim, out_dim, 1, dtype) if in_dim != out_dim else None

    def forward(self, x: Tensor, state: VideoState) -> Tensor:
        """x (B, C_in, F, H, W) -> (B, C_out, F, H, W)."""
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        assert isinstance(conv1, CausalConv3d)
        assert isinstance(conv2, CausalConv3d)
        out = conv1.convolve_buffer(
            prepare_conv_input(norm1, conv1, x, state, num_halo_pixels=2), state, with_bias=False
        )
        frames = prepare_conv_input(norm2, conv2, out, state, bias=conv1.bias)
        del out  # so that one tensor of the chunk's size less is in memory during the convolution
        out = state.trim_halos(conv2.convolve_buffer(frames, state, with_bias=False), 2)
        x = state.crop_to_interior(x, 2)
        residual = x if self.shortcut is None else self.shortcut(x, state)
        return add_residual_(out, residual, conv2.bias)


class AttentionBlock(nn.Module):
    """Self-attention with one head within each frame."""

    def __init__(self, dim: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, num_trailing=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1, dtype=dtype)
        self.proj = nn.Conv2d(dim, dim, 1, dtype=dtype)

    def forward(self, x: Tensor, state: VideoState) -> Tensor:
        """x (B, C, F, H, W) -> the same shape."""
        frames = x.transpose(1, 2).flatten(0, 1)  # (B F, C, H, W)
        q, kv = self.to_qkv(self.norm(frames)).split((x.shape[1], 2 * x.shape[1]), dim=1)
        k, v = state.gather_whole(kv.unsqueeze(0)).squeeze(0).chunk(2, dim=1)
        attended = attend_single_head(
            *(tensor.flatten(2).transpose(1, 2) for tensor in (q, k, v))
        )  # (B F, H W, C)
        attended = self.proj(attended.transpose(1, 2).unflatten(2, frames.shape[2:]))
        return x + attended.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def attend_single_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention with one head, q (N, L, C), k and v (N, M, C) -> (N, L, C).

    The fast kernels support heads of at most 256 channels, this one has 384 or more, and PyTorch's fallback
    stores several L x M tensors. On a GPU, attention is therefore computed here for some rows of queries at
    a time; the softmax is float32.
    """
    if not ops.is_on_gpu(q):
        return F.scaled_dot_product_attention(
            q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        ).squeeze(1)
    rows_per_part = max(1, _MAX_ATTENTION_SCORES // (k.shape[0] * k.shape[1]))
    attended_parts = []
    for query_part in (q * q.shape[2] ** -0.5).split(rows_per_part, dim=1):
        scores = torch.bmm(query_part, k.transpose(1, 2), out_dtype=torch.float32)
        attended_parts.append(torch.bmm(scores.softmax(dim=2).to(v.dtype), v))
    return torch.cat(attended_parts, dim=1)


class Upsample(nn.Module):
    """Upsampling that doubles rows and columns, and frames too where ``temporal``."""

    def __init__(
        self, dim: int, out_dim: int, *, temporal: bool, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
            nn.Conv2d(dim, out_dim, 3, padding=1, dtype=dtype),
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1), dtype) if temporal else None
        self.phase_weight: Tensor | None = None
        """The convolution's weights, folded if it precedes the upsampling; see `fold_phase_weights`."""

    def forward(self, x: Tensor, state: VideoState) -> Tensor:
        """x (B, C, F, H, W) -> (B, C_out, F or 2 F, 2 H, 2 W); the video's first frame is never doubled."""
        if self.time_conv is not None:
            if self in state.past_frames:
                x = self.time_conv(x, state).unflatten(1, (2, -1))  # (B, 2, C, F, H, W)
                x = x.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            else:
                # The first frame has been seen; time_conv starts after it.
                state.past_frames[self] = None
        frames = state.attach_halos(x, 1).transpose(1, 2).flatten(0, 1)
        if self.phase_weight is None:
            return state.trim_halos(
                self.resample(frames).unflatten(0, (x.shape[0], -1)).transpose(1, 2), 2
            )
        phases = (
            F.conv2d(frames, self.phase_weight, padding=1)
            .unflatten(0, (x.shape[0], -1))
            .transpose(1, 2)
        )
        bias = self.resample[1].bias
        assert isinstance(bias, Tensor)
        return state.trim_halos(interleave_phases(phases, bias), 2)

    def prepare_phase_weight(self) -> None:
        """Fold the weights to convolve frames before upsampling; called when the weights are loaded."""
        weight = self.resample[1].weight
        assert isinstance(weight, Tensor)
        self.phase_weight = fold_phase_weights(weight).contiguous(memory_format=torch.channels_last)


class Downsample(nn.Module):
    """Downsampling that halves rows and columns, and frames too where ``temporal``."""

    def __init__(self, dim: int, *, temporal: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2, dtype=dtype)
        )
        self.time_conv = (
            nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1), dtype=dtype) if temporal else None
        )

    def forward(self, x: Tensor, state: VideoState) -> Tensor:
        """x (B, C, F, H, W) -> (B, C, F or F / 2, H / 2, W / 2); the video's first frame stays one."""
        batch = x.shape[0]
        frames = self.resample(state.attach_halos(x, 2).transpose(1, 2).flatten(0, 1))
        x = state.trim_halos(frames.unflatten(0, (batch, -1)).transpose(1, 2), 1)
        if self.time_conv is None:
            return x
        last_frame = state.past_frames.get(self)
        state.past_frames[self] = x[:, :, -1:].clone()
        return x if last_frame is None else self.time_conv(torch.cat([last_frame, x], dim=2))


class DownStage(nn.Module):
    """Encoder stage of VAE 2.2: residual blocks and downsampling, with a shortcut that averages."""

    def __init__(
        self, layers: list[nn.Module], out_dim: int, *, temporal: int, spatial: int
    ) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList(layers)
        self.out_dim, self.temporal, self.spatial = out_dim, temporal, spatial

    def forward(self, x: Tensor, state: VideoState) -> Tensor:
        """x (B, C, F, H, W) -> (B, C_out, F / temporal, H / spatial, W / spatial)."""
        out = x
        for layer in self.downsamples:
            out = layer(out, state)
        return out + downsample_by_averaging(
            x, self.out_dim, temporal=self.temporal, spatial=self.spatial
        )


class UpStage(nn.Module):
    """Decoder stage of VAE 2.2: residual blocks and upsampling, with a shortcut that repeats channels."""

    def __init__(self, layers: list[nn.Module], out_dim: int, *, temporal: int) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList(layers)
        self.out_dim, self.temporal = out_dim, temporal

    def forward(self, x: Tensor, state: VideoState) -> Tensor:
        """x (B, C, F, H, W) -> (B, C_out, F * temporal, 2 H, 2 W); the video's first frame stays one."""
        is_first = self not in state.past_frames
        state.past_frames[self] = None
        out = x
        for layer in self.upsamples:
            out = layer(out, state)
        # The blocks see 2 pixels each, the upsampling 1.
        x = state.crop_to_interior(x, 2 * (len(self.upsamples) - 1) + 1)
        return add_repeated_channels_(out, x, temporal=self.temporal, is_first=is_first)


def downsample_by_averaging(x: Tensor, out_dim: int, *, temporal: int, spatial: int) -> Tensor:
    """Move blocks of (temporal, spatial, spatial) pixels into channels, averaged in ``out_dim`` groups.

    x (B, C, F, H, W); frames that do not fill a block are padded with zeros in front.
    """
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % temporal, 0))
    for dim, factor in ((2, temporal), (4, spatial), (6, spatial)):
        x = x.unflatten(dim, (-1, factor))  # in the end (B, C, F, ft, H, fh, W, fw)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
    return x.unflatten(1, (out_dim, -1)).mean(dim=2)


def add_repeated_channels_(out: Tensor, x: Tensor, *, temporal: int, is_first: bool) -> Tensor:
    """Add to ``out`` the channels of x, repeated and moved into blocks of (temporal, 2, 2) pixels; return it.

    x (B, C, F, H, W), out (B, C_out, F * temporal, 2 H, 2 W); the video's first frame has only the last
    frame of its block.
    """
    channel_step = x.shape[1] // out.shape[1]
    num_repeats = 4 * temporal // channel_step
    frame_offsets = range(temporal - 1 if is_first else 0, temporal)
    for channel_index, (frame, row, column) in enumerate(
        itertools.product(frame_offsets, range(2), range(2)), start=4 * frame_offsets.start
    ):
        block_pixels = out[
            :, :, frame - frame_offsets.start :: len(frame_offsets), row::2, column::2
        ]
        block_pixels += x[:, channel_index // num_repeats :: channel_step]
    return out


def patchify_pixels(video: Tensor) -> Tensor:
    """Move each 2 x 2 block of pixels into channels, columns before rows.

    (B, 3, F, H, W) -> (B, 12, F, H / 2, W / 2).
    """
    x = video.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # (B, C, F, h, row, w, column)
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify_pixels(x: Tensor) -> Tensor:
    """Undo `patchify_pixels`."""
    x = x.unflatten(1, (-1, 2, 2))  # (B, C, column, row, F, h, w)
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
