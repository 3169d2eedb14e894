"""Attention as parameter-free modules with the kernel chosen once, and rotary position embedding.

Layout everywhere: (B, L, H, D) = batch, tokens, heads, head width.
"""

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_dist.models.attention import eight_bit as attention_8bit
from wan_dist.runtime.errors import InputError, first_line

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

SCORE_BYTES = 2**26
"""Of the scores that are there at once where a ring attends by plain arithmetic; as in footprint.py."""


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)  # (B, L, H, D)


def _sdpa_with(backend: SDPBackend) -> Kernel:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v)

    return attend


def _from_package(module: str, function: str, **options: object) -> Callable[[], Kernel]:
    return lambda: _first_of(partial(getattr(importlib.import_module(module), function), **options))


def _first_of(work: Callable[..., object]) -> Kernel:
    """Return ``work`` without the log-sum-exp, which releases differ in whether they return too."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = work(q, k, v)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)

    return attend


@cache
def _flash_attention_4() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return FlashAttention-4's forward pass: (q, k, v, return_lse=False) -> (result, log-sum-exp (B, H, Lq) or None).

    On Hopper with wider tiles than its own choice for heads of 128 channels: the same result bit for bit, 2 to 5 % sooner
    (measured on an H200, bench/NOTES.md).
    """
    from flash_attn.cute import flash_attn_func, interface  # optional, and it imports a compiler

    work = getattr(interface, "_flash_attn_fwd", None)
    if torch.cuda.get_device_capability() != (9, 0) or work is None or "tile_mn" not in inspect.signature(work).parameters:
        return flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
        tiles = {"tile_mn": (192, 128), "mma_pv_is_rs": False} if q.shape[-1] == 128 else {}
        out, lse, *_ = work(q, k, v, **tiles, **options)
        return out, lse

    return attend


def _in_float16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention for GPUs without bfloat16 arithmetic; what float16 cannot hold is computed again in float32."""
    out = _sdpa(q.half(), k.half(), v.half())
    return (out if torch.isfinite(out).all() else _sdpa(q.float(), k.float(), v.float())).to(q.dtype)


_KERNELS: dict[str, Callable[[], Kernel]] = {
    "fa4": lambda: _first_of(_flash_attention_4()),
    "fa3": _from_package("flash_attn_interface", "flash_attn_func"),
    "fa2": _from_package("flash_attn", "flash_attn_func"),
    "cudnn": lambda: _sdpa_with(SDPBackend.CUDNN_ATTENTION),
    "flash": lambda: _sdpa_with(SDPBackend.FLASH_ATTENTION),
    "sdpa": lambda: _sdpa,
    "sdpa16": lambda: _in_float16,
    "sage": _from_package("sageattention", "sageattn", tensor_layout="NHD"),
    "8bit": lambda: attention_8bit.attend,
}
_FASTEST_FIRST = ("fa4", "fa3", "cudnn", "fa2", "flash", "sdpa")
_NEEDS = {
    "fa4": ("flash_attn.cute", "flash-attn-4", "Hopper or Blackwell", (9, 0)),
    "fa3": ("flash_attn_interface", "FlashAttention-3", "Hopper", (9, 0)),
    "fa2": ("flash_attn.flash_attn_interface", "flash-attn", "Ampere or later", (8, 0)),
    "sage": ("sageattention", "sageattention", "Ampere or later", (8, 0)),
}
"""Of kernels from packages: module, the package's name, GPUs, and their least compute capability."""
_LOSSY = {"sage": 0.1, "8bit": 0.1}
"""Kernels in 8 bits, which are taken only if they are asked for, and how far they may be off on the tensor that they are tried on."""


def attend_with_lse(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention's result (B, Lq, H, D) and its log-sum-exp (B, Lq, H), float32; shapes as in `InnerAttention.forward`.

    FlashAttention-4 where ``name`` is fa4, cuDNN where it is cudnn, else FlashAttention-2 where the GPU and the dtype have it, else
    plain arithmetic in float32, a part of the scores at a time.
    """
    if name == "fa4":
        out, of_queries = _flash_attention_4()(q, k, v, return_lse=True)
        return out, cast(Tensor, of_queries).float().transpose(1, 2)
    has_flash = q.is_cuda and q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (8, 0)
    if name != "cudnn" and not has_flash:
        return _attend_in_parts(q, k, v)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, L, D)
    if name == "cudnn":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        lse = lse.squeeze(-1)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out.transpose(1, 2).to(v.dtype), lse.float().transpose(1, 2)


def _attend_in_parts(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same by plain arithmetic in float32: as many heads at a time, and of them queries, as `SCORE_BYTES` has room for."""
    (batch, num_queries, num_heads, width), num_keys = q.shape, k.shape[1]
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)
    most = SCORE_BYTES // (4 * batch * num_keys)  # rows of scores
    heads_at_once = min(max(most // max(num_queries, 2 * width), 1), num_heads)
    queries_at_once = max(most // heads_at_once, 1)
    for first_head in range(0, num_heads, heads_at_once):
        heads = slice(first_head, first_head + heads_at_once)
        keys, values = (part[:, :, heads].transpose(1, 2).float() for part in (k, v))  # (B, h, Lk, D)
        for first in range(0, num_queries, queries_at_once):
            some = slice(first, first + queries_at_once)
            queries = q[:, some, heads].transpose(1, 2).float() * width**-0.5  # (B, h, l, D)
            scores = queries @ keys.transpose(-1, -2)  # (B, h, l, Lk)
            largest = scores.amax(dim=-1, keepdim=True)
            total = scores.sub_(largest).exp_().sum(dim=-1, keepdim=True)
            out[:, some, heads] = (scores @ values / total).transpose(1, 2).to(out.dtype)
            lse[:, some, heads] = (largest + total.log()).squeeze(-1).transpose(1, 2)
            del scores  # it would be there beside the next
    return out, lse


class InnerAttention(nn.Module):
    """Scaled dot-product attention without parameters: the seam that sequence-parallel attention wraps.

    Softmax statistics are float32 in every kernel. ``name`` is the kernel's, ``reason`` says why it was taken.
    """

    takes_some_queries = True
    """Whether q may be of fewer tokens than k and v; where ranks trade them, it may not."""

    def __init__(self, kernel: Kernel = _sdpa, name: str = "sdpa", reason: str = "default") -> None:
        super().__init__()
        self.kernel = kernel
        self.name = name
        self.reason = reason

    def room_for(self, x: Tensor) -> Tensor:
        """Return where what becomes of q, k or v like x (B, l, H, D) is best written for `begin`: in x, or (B, l, N, H / N, D)."""
        return x

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin to bring q, k or v of this device's tokens to where they are attended to; the call returns them there.

        x (B, l, H, D), or what `room_for` returned.
        """
        return lambda: x

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax(q kᵀ / √D) v of what `begin` brought; q (B, Lq, H, D), k and v (B, Lk, H, D) -> (B, Lq, H, D)."""
        return self.kernel(q, k, v)


def choose_attention(name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> InnerAttention:
    """Return the attention called ``name``, tried on a tiny tensor first; ``auto`` takes the fastest that works.

    Raises InputError if a kernel asked for by name does not work here.
    """
    if name != "auto":
        kernel, fault = try_attention(name, device=device, dtype=dtype, head_dim=head_dim)
        if kernel is None:
            raise InputError(f"attention={name} does not work here: {fault}; attention=auto takes what does")
        return InnerAttention(kernel, name, "asked for")
    if device.type != "cuda" or dtype == torch.float32:
        return InnerAttention(_sdpa, "sdpa", f"the one for {dtype_name(dtype)} on {device.type}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return InnerAttention(_in_float16, "sdpa16", "this GPU has no bfloat16 arithmetic, so it is done in float16")
    faults: list[str] = []
    for candidate in _FASTEST_FIRST:
        kernel, fault = try_attention(candidate, device=device, dtype=dtype, head_dim=head_dim)
        if kernel is not None:
            return InnerAttention(kernel, candidate, "; ".join(faults) or "the fastest known")
        faults.append(f"no {candidate}: {fault}")
    raise InputError("no attention kernel works here: " + "; ".join(faults))


def compile_attention(*, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Try the kernels of packages, some of which are compiled then; may be done in a thread, unlike trying PyTorch's own."""
    for name in _FASTEST_FIRST:
        if name in _NEEDS and try_attention(name, device=device, dtype=dtype, head_dim=head_dim)[0] is not None:
            return


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype as people write it, e.g. bfloat16."""
    return str(dtype).removeprefix("torch.")


def try_attention(name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Kernel | None, str]:
    """Try a kernel on a tiny tensor; returns (kernel, "") or (None, what is wrong)."""
    if name != "sdpa":
        if device.type != "cuda":
            return None, f"needs a GPU, runs on {device.type}"
        if dtype == torch.float32:
            return None, "needs bfloat16 or float16, dtype is float32"
    if name in _NEEDS:
        module, package, gpus, capability = _NEEDS[name]
        if not _is_installed(module):
            return None, f"package {package} is not installed"
        if torch.cuda.get_device_capability(device) < capability:
            return None, f"needs a GPU of {gpus}"
    q = torch.linspace(-1, 1, 128 * head_dim, device=device).view(1, 128, 1, head_dim).to(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a kernel that is compiled here warns about its compiler's own code
            kernel = _KERNELS[name]()
            error = (kernel(q, q, q).float() - _sdpa(*(q.float() for _ in range(3)))).abs().max().item()
    except Exception as fault:  # kernels that are compiled here raise their compilers' own errors
        return None, first_line(fault)
    return (kernel, "") if error < _LOSSY.get(name, 2e-2) else (None, f"its result is off by {error:.2g}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, OSError):  # the package around it is not there, or broken
        return False


def rotary_tables(grid: tuple[int, int, int], head_dim: int, *, device: torch.device, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of 3-D rotary position embedding, each (L, 1, D / 2) float32, L = frames * rows * columns.

    The head's D / 2 pairs are split over (frame, row, column) as (D/2 - 2 (D//6), D//6, D//6): 22, 21, 21 for D = 128. Angles
    are computed in float64 and rounded once. Source: RoFormer (arXiv:2104.09864), per axis as in Wan2.1.
    """
    sixth = head_dim // 6
    angles = []
    for axis, (length, pairs) in enumerate(zip(grid, (head_dim // 2 - 2 * sixth, sixth, sixth), strict=True)):
        frequency = base ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
        shape = [1, 1, 1, pairs]
        shape[axis] = length
        position = torch.arange(length, dtype=torch.float64, device=device)
        angles.append(torch.outer(position, frequency).view(shape).expand(*grid, pairs))
    angle = torch.cat(angles, dim=-1).reshape(-1, 1, head_dim // 2)  # (L, 1, D / 2)
    return angle.cos().float(), angle.sin().float()


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair of neighbouring channels of x (B, L, H, D) float32 by its token's angles."""
    cos, sin = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
