"""Fused norm, SiLU, residual and upsampling operations between the VAE's convolutions.

Each is one pass over memory: a Triton kernel on a GPU, plain PyTorch elsewhere. Arithmetic is float32
whatever the dtype. The kernels take videos whose channels are innermost. A convolution's bias is added
here, in the pass that reads its result, because PyTorch would use a separate pass for it.
"""

from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_dist.models.kernels.dispatch import compute_block_size, load_verified_kernels


@cache
def _load_kernels(device: torch.device) -> ModuleType | None:
    video = (
        torch.linspace(-1, 2, 96 * 12, device=device)
        .view(1, 96, 2, 2, 3)
        .bfloat16()
        .contiguous(memory_format=torch.channels_last_3d)
    )
    bias, gamma = video[0, :, 0, 0, 0].contiguous(), video[0, :, 1, 1, 1].float().view(-1, 1, 1, 1)

    def run_trial(kernels: ModuleType | None) -> Tensor:
        out = torch.empty_like(video)
        _run_norm_silu(kernels, video, bias, gamma, out)
        _run_add_residual_(kernels, out, video, bias)
        return torch.cat(
            [
                out.flatten(),
                _run_interleave(kernels, video.expand(-1, -1, 2, 2, 3), bias[:24]).flatten(),
            ]
        )

    return load_verified_kernels("vae_kernels", run_trial)


def is_on_gpu(x: Tensor) -> bool:
    """Whether x is on a GPU, where the kernels and their memory layout are used."""
    return x.is_cuda


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """Return RMSNorm over channels, gamma x sqrt(C) / max(|x|, 1e-12), float32.

    x (B, C, ...), gamma (C, 1, ...).
    """
    return F.normalize(x.float(), dim=1) * gamma.shape[0] ** 0.5 * gamma


def write_norm_silu(x: Tensor, bias: Tensor | None, gamma: Tensor, out: Tensor) -> None:
    """Write silu(rms_norm(x + bias)) into ``out``.

    x and out (B, C, F, H, W), bias of C elements, gamma (C, 1, 1, 1).
    """
    _run_norm_silu(_select_kernels(x, out), x, bias, gamma, out)


def add_residual_(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """Add y and bias to x and return it; x and y (B, C, F, H, W), bias of C elements."""
    return _run_add_residual_(_select_kernels(x, y), x, y, bias)


def fold_phase_weights(weight: Tensor) -> Tensor:
    """Return 2 x 2 kernels for x that equal a 3 x 3 kernel on x upsampled by 2 (nearest neighbour).

    (C_out, C_in, 3, 3) -> (4 C_out, C_in, 2, 2). Upsampling repeats pixels, so two of the three rows under
    the kernel are the same, and their weights add up: an even row of the result sees (w0, w1 + w2) of the
    row before and its own, an odd one (w0 + w1, w2) of its own and the row after; columns likewise. Exact,
    at 4 / 9 of the arithmetic. The phases are (even, even), (even, odd), (odd, even), (odd, odd) rows and
    columns.
    """

    def fold_rows(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        before, middle, after = kernel.unbind(dim)
        return torch.stack([before, middle + after], dim), torch.stack(
            [before + middle, after], dim
        )

    return torch.cat(
        [
            phase_kernel
            for row_kernel in fold_rows(weight.float(), 2)
            for phase_kernel in fold_rows(row_kernel, 3)
        ]
    ).to(weight.dtype)


def interleave_phases(phases: Tensor, bias: Tensor) -> Tensor:
    """Return the upsampled frames (1, C, F, 2 H, 2 W) from their phases (1, 4 C, F, H + 1, W + 1).

    The phases are the output of convolution with `fold_phase_weights` kernels and padding 1; ``bias`` is
    added.
    """
    return _run_interleave(_select_kernels(phases), phases, bias)


def _run_norm_silu(
    kernels: ModuleType | None, x: Tensor, bias: Tensor | None, gamma: Tensor, out: Tensor
) -> None:
    if kernels is not None:
        _launch_pixel_kernel(
            kernels.activate_kernel, (x, out), bias, gamma.flatten() * gamma.numel() ** 0.5
        )
    else:
        out.copy_(F.silu(rms_norm(_add_bias(x, bias), gamma)))


def _run_add_residual_(
    kernels: ModuleType | None, x: Tensor, y: Tensor, bias: Tensor | None
) -> Tensor:
    if kernels is not None:
        _launch_pixel_kernel(kernels.add_kernel, (x, y), bias)
        return x
    return x.copy_(_add_bias(x.float() + y.float(), bias))


def _add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (B, C, F, H, W) plus the bias of its channels in float32, or x itself for None."""
    return x if bias is None else x.float() + bias.float().view(-1, 1, 1, 1)


def _run_interleave(kernels: ModuleType | None, phases: Tensor, bias: Tensor) -> Tensor:
    _, channels, frames, height, width = phases.shape
    shape = (1, channels // 4, frames, 2 * (height - 1), 2 * (width - 1))
    out = torch.empty(
        shape, dtype=phases.dtype, device=phases.device, memory_format=torch.channels_last_3d
    )
    if kernels is not None:
        _launch_pixel_kernel(kernels.interleave_kernel, (out, phases), bias)
        return out
    for phase_index, phase in enumerate(phases.chunk(4, dim=1)):
        row, column = divmod(phase_index, 2)
        shifted = phase[:, :, :, row : height - 1 + row, column : width - 1 + column]
        out[:, :, :, row::2, column::2] = shifted + bias.view(-1, 1, 1, 1)
    return out


def _select_kernels(*videos: Tensor) -> ModuleType | None:
    """Return the kernels if they support these: GPU, half precision, one video, channels innermost."""
    if all(
        is_on_gpu(x) and x.dtype != torch.float32 and x.shape[0] == 1 and x.stride(1) == 1
        for x in videos
    ):
        return _load_kernels(videos[0].device)
    return None


def _launch_pixel_kernel(
    kernel: Any, videos: tuple[Tensor, ...], bias: Tensor | None, *extra_tensors: Tensor
) -> None:
    """Launch a kernel over the pixels and channels of the first video."""
    _, channels, frames, height, width = videos[0].shape
    num_pixels = frames * height * width
    block_c = compute_block_size(channels)
    block_p = max(1, 4096 // block_c)
    kernel[(-(-num_pixels // block_p),)](
        *videos,
        videos[0] if bias is None else bias,
        *extra_tensors,
        *(stride for video in videos for stride in video.stride()[2:]),
        num_pixels,
        height,
        width,
        channels=channels,
        has_bias=bias is not None,
        block_p=block_p,
        block_c=block_c,
    )
