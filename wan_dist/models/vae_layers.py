"""Causal layers of the Wan video VAE, for one device.

Shapes: (B, C, F, H, W). Videos pass through in chunks of frames; what a layer must remember of earlier chunks is in a `VideoState`
that the caller makes for each video and passes along. Names are those of the published checkpoints.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.models.vae_elementwise import activate, add, interleave, phases_of, rms_norm


class VideoState:
    """One video's pass through an encoder or decoder, all of its rows and columns on one device.

    ``past`` holds for each causal layer the last frames of its input so far; empty: the next chunk starts the video. The methods are
    the seam for a video that is split over ranks: a layer that looks at neighbouring pixels asks for them and cuts them off again.
    """

    dim: int = 4
    """That along which the video is split."""
    has_before: bool = False
    """Whether a neighbour has the pixels before this rank's."""
    has_after: bool = False

    def __init__(self) -> None:
        self.past: dict[nn.Module, Tensor | None] = {}

    def trade(self, x: Tensor, num_pixels: int) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """Begin to trade ``num_pixels`` rows or columns of x (B, C, F, H, W) on each side; the call waits for the neighbours'."""
        return lambda: (None, None)

    def extend(self, x: Tensor, num_pixels: int) -> Tensor:
        """Return x (B, C, F, H, W) with ``num_pixels`` rows or columns more on each side that has a neighbour."""
        before, after = self.trade(x, num_pixels)()
        parts = [part for part in (before, x, after) if part is not None]
        return torch.cat(parts, dim=self.dim) if len(parts) > 1 else x

    def trim(self, x: Tensor, num_pixels: int) -> Tensor:
        """Cut ``num_pixels`` rows or columns off on each side that has a neighbour."""
        start = num_pixels if self.has_before else 0
        return x.narrow(self.dim, start, x.shape[self.dim] - start - (num_pixels if self.has_after else 0))

    def whole(self, x: Tensor) -> Tensor:
        """Return x with the rows and columns of all ranks."""
        return x


class CausalConv3d(nn.Conv3d):
    """Convolution that sees the present and the past only: its padding in time is all in front."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int], dtype: torch.dtype | None = None) -> None:
        t, h, w = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(in_dim, out_dim, (t, h, w), padding=(0, h // 2, w // 2), dtype=dtype)
        self.num_past = t - 1

    def forward(self, x: Tensor, state: VideoState) -> Tensor:  # type: ignore[override]
        """Convolve a chunk of frames; the frames before the first one are zeros."""
        if not self.num_past:
            return self._product(x, self.bias)
        frames = self.room(x, x.shape, state)
        frames[:, :, self.num_past :] = x
        return self.convolve(frames, state)

    def room(self, like: Tensor, size: Sequence[int], state: VideoState) -> Tensor:
        """Return the convolution's input for a chunk of this size: past frames, then room for the chunk's own, to be filled."""
        batch, channels, num_frames, height, width = size
        shape = (batch, channels, self.num_past + num_frames, height, width)
        frames = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like))
        past = state.past.get(self)
        frames[:, :, : self.num_past] = 0 if past is None else past
        return frames

    def convolve(self, frames: Tensor, state: VideoState, *, with_bias: bool = True) -> Tensor:
        """Convolve what `room` returned, filled; its last frames are kept for the next chunk."""
        state.past[self] = frames[:, :, -self.num_past :].clone()  # a view would keep the whole chunk alive
        return self._product(frames, self.bias if with_bias else None)

    def _product(self, frames: Tensor, bias: Tensor | None) -> Tensor:
        if frames.is_cpu and frames.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # PyTorch takes oneDNN for large inputs only; for small ones it is twenty times as fast too.
            return torch.ops.aten.mkldnn_convolution(frames, self.weight, bias, self.padding, self.stride, self.dilation, 1)
        return F.conv3d(frames, self.weight, bias, padding=self.padding)


def memory_format(x: Tensor) -> torch.memory_format:
    """Return whether channels are innermost in x, which convolutions on a GPU prefer."""
    return torch.channels_last_3d if x.stride(1) == 1 and x.shape[1] > 1 else torch.contiguous_format


class RMSNorm(nn.Module):
    """RMSNorm over channels, in float32."""

    def __init__(self, dim: int, num_trailing: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * num_trailing))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, ...) of any number of trailing dims -> the same shape."""
        return rms_norm(x, self.gamma).to(x.dtype)


def convolve_activated(
    norm: nn.Module, conv: nn.Module, x: Tensor, state: VideoState, *, bias: Tensor | None = None, sees: int = 0, with_bias: bool = False
) -> Tensor:
    """Return conv(silu(norm(x + bias))) for a chunk x with ``sees`` pixels of each neighbour; ``with_bias``: of ``conv`` too."""
    assert isinstance(conv, CausalConv3d)
    assert isinstance(norm, RMSNorm)
    arriving = state.trade(x, sees)
    before, after = (sees if has_one else 0 for has_one in (state.has_before, state.has_after))
    size = list(x.shape)
    size[state.dim] += before + after
    frames = conv.room(x, size, state)
    inside = frames[:, :, conv.num_past :]
    activate(x, bias, norm.gamma, inside.narrow(state.dim, before, x.shape[state.dim]))  # while the neighbours' are on their way
    for edge, start in zip(arriving(), (0, size[state.dim] - after), strict=True):
        if edge is not None:
            activate(edge, bias, norm.gamma, inside.narrow(state.dim, start, sees))
    return conv.convolve(frames, state, with_bias=with_bias)


class ResidualBlock(nn.Module):
    """Two causal convolutions with a shortcut."""

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
        out = convolve_activated(norm1, conv1, x, state, sees=2)
        out = state.trim(convolve_activated(norm2, conv2, out, state, bias=conv1.bias), 2)
        return add(x if self.shortcut is None else self.shortcut(x, state), out, conv2.bias)


class AttentionBlock(nn.Module):
    """Self-attention with one head inside each frame."""

    def __init__(self, dim: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, num_trailing=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1, dtype=dtype)
        self.proj = nn.Conv2d(dim, dim, 1, dtype=dtype)

    def forward(self, x: Tensor, state: VideoState) -> Tensor:
        """x (B, C, F, H, W) -> the same shape."""
        frames = x.transpose(1, 2).flatten(0, 1)  # (B F, C, H, W)
        q, kv = self.to_qkv(self.norm(frames)).split((x.shape[1], 2 * x.shape[1]), dim=1)
        k, v = state.whole(kv.unsqueeze(0)).squeeze(0).chunk(2, dim=1)
        q, k, v = (part.flatten(2).transpose(1, 2).unsqueeze(1) for part in (q, k, v))  # (B F, 1, H W, C)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        out = self.proj(out.transpose(1, 2).unflatten(2, frames.shape[2:]))
        return x + out.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Upsample(nn.Module):
    """Double rows and columns, and frames too where ``temporal``."""

    def __init__(self, dim: int, out_dim: int, *, temporal: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, out_dim, 3, padding=1, dtype=dtype)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1), dtype) if temporal else None
        self.phases: Tensor | None = None
        """The convolution's weights for frames that have not been doubled yet, where that is how it is done; see `phases_of`."""

    def forward(self, x: Tensor, state: VideoState) -> Tensor:
        """x (B, C, F, H, W) -> (B, C_out, F or 2 F, 2 H, 2 W); the video's first frame is never doubled."""
        if self.time_conv is not None:
            if self in state.past:
                x = self.time_conv(x, state).unflatten(1, (2, -1))  # (B, 2, C, F, H, W)
                x = x.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            else:
                state.past[self] = None  # the first frame was seen; time_conv starts after it
        frames = state.extend(x, 1).transpose(1, 2).flatten(0, 1)
        if self.phases is None:
            return state.trim(self.resample(frames).unflatten(0, (x.shape[0], -1)).transpose(1, 2), 2)
        phases = F.conv2d(frames, self.phases, padding=1).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        bias = self.resample[1].bias
        assert isinstance(bias, Tensor)
        return state.trim(interleave(phases, bias), 2)

    def lay_out(self) -> None:
        """Prepare to convolve frames before they are doubled; called when the weights are there."""
        weight = self.resample[1].weight
        assert isinstance(weight, Tensor)
        self.phases = phases_of(weight).contiguous(memory_format=torch.channels_last)


class Downsample(nn.Module):
    """Halve rows and columns, and frames too where ``temporal``."""

    def __init__(self, dim: int, *, temporal: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2, dtype=dtype))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1), dtype=dtype) if temporal else None

    def forward(self, x: Tensor, state: VideoState) -> Tensor:
        """x (B, C, F, H, W) -> (B, C, F or F / 2, H / 2, W / 2); the video's first frame stays one."""
        batch = x.shape[0]
        frames = self.resample(state.extend(x, 2).transpose(1, 2).flatten(0, 1))
        x = state.trim(frames.unflatten(0, (batch, -1)).transpose(1, 2), 1)
        if self.time_conv is None:
            return x
        past = state.past.get(self)
        state.past[self] = x[:, :, -1:].clone()
        return x if past is None else self.time_conv(torch.cat([past, x], dim=2))


class DownStage(nn.Module):
    """Residual blocks and a downsampling beside a shortcut that averages (VAE 2.2)."""

    def __init__(self, layers: list[nn.Module], out_dim: int, *, temporal: int, spatial: int) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList(layers)
        self.out_dim, self.temporal, self.spatial = out_dim, temporal, spatial

    def forward(self, x: Tensor, state: VideoState) -> Tensor:
        """x (B, C, F, H, W) -> (B, C_out, F / temporal, H / spatial, W / spatial)."""
        out = x
        for layer in self.downsamples:
            out = layer(out, state)
        return out + average_down(x, self.out_dim, temporal=self.temporal, spatial=self.spatial)


class UpStage(nn.Module):
    """Residual blocks and an upsampling beside a shortcut that repeats (VAE 2.2)."""

    def __init__(self, layers: list[nn.Module], out_dim: int, *, temporal: int) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList(layers)
        self.out_dim, self.temporal = out_dim, temporal

    def forward(self, x: Tensor, state: VideoState) -> Tensor:
        """x (B, C, F, H, W) -> (B, C_out, F * temporal, 2 H, 2 W); the video's first frame stays one."""
        is_first = self not in state.past
        state.past[self] = None
        out = x
        for layer in self.upsamples:
            out = layer(out, state)
        repeated = repeat_up(x, self.out_dim, temporal=self.temporal)
        return out + (repeated[:, :, self.temporal - 1 :] if is_first else repeated)


def average_down(x: Tensor, out_dim: int, *, temporal: int, spatial: int) -> Tensor:
    """Move blocks of (temporal, spatial, spatial) neighbours into channels and average groups of those down to ``out_dim``.

    x (B, C, F, H, W); frames that do not fill a block are preceded by zeros.
    """
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % temporal, 0))
    for dim, factor in ((2, temporal), (4, spatial), (6, spatial)):
        x = x.unflatten(dim, (-1, factor))  # at last (B, C, F, ft, H, fh, W, fw)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
    return x.unflatten(1, (out_dim, -1)).mean(dim=2)


def repeat_up(x: Tensor, out_dim: int, *, temporal: int) -> Tensor:
    """Repeat channels and move them into blocks of (temporal, 2, 2) neighbours, to ``out_dim`` channels; x (B, C, F, H, W)."""
    x = x.repeat_interleave(out_dim * temporal * 4 // x.shape[1], dim=1)
    x = x.unflatten(1, (out_dim, temporal, 2, 2))  # (B, C_out, ft, fh, fw, F, H, W)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def pixels_to_channels(video: Tensor) -> Tensor:
    """video (B, 3, F, H, W) -> (B, 12, F, H / 2, W / 2): each 2 x 2 block of pixels becomes channels, columns before rows."""
    x = video.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # (B, C, F, h, row, w, column)
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def channels_to_pixels(x: Tensor) -> Tensor:
    """Undo `pixels_to_channels`."""
    x = x.unflatten(1, (-1, 2, 2))  # (B, C, column, row, F, h, w)
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
