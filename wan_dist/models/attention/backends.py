"""Attention backends: a kernel for each name, tried on a tiny tensor before it is used.

Layout everywhere: (B, L, H, D) = batch, tokens, heads, head width.
"""

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_dist.models.attention import eight_bit
from wan_dist.runtime.c_compiler import explain_missing_compiler
from wan_dist.runtime.errors import get_first_line

AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_with_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return PyTorch's scaled dot-product attention, (B, L, H, D) in and out."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)  # (B, L, H, D)


def _make_sdpa_kernel(backend: SDPBackend) -> AttentionKernel:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attend_with_sdpa(q, k, v)

    return attend


def _make_package_loader(
    name: str, function: str, **options: object
) -> Callable[[], AttentionKernel]:
    def load() -> AttentionKernel:
        module = _find_module(BACKEND_REQUIREMENTS[name][0])
        return _drop_log_sum_exp(
            partial(getattr(importlib.import_module(str(module)), function), **options)
        )

    return load


def _drop_log_sum_exp(attention_function: Callable[..., object]) -> AttentionKernel:
    """Return ``attention_function`` without the log-sum-exp in its result.

    Releases of the packages differ in whether they return it too.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention_function(q, k, v)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)

    return attend


@cache
def load_flash_attention_4() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return FlashAttention-4's forward pass: (q, k, v, return_lse=False) -> (result, log-sum-exp).

    The log-sum-exp is (B, H, Lq), or None where it was not requested. On Hopper, heads of 128 channels
    are computed with wider tiles than the package's own choice: the same result bit for bit, 2 to 5 %
    faster (measured on an H200, bench/NOTES.md).
    """
    from flash_attn.cute import flash_attn_func, interface  # optional, and it imports a compiler

    forward_pass = getattr(interface, "_flash_attn_fwd", None)
    if (
        torch.cuda.get_device_capability() != (9, 0)
        or forward_pass is None
        or "tile_mn" not in inspect.signature(forward_pass).parameters
    ):
        return flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
        tiles = {"tile_mn": (192, 128), "mma_pv_is_rs": False} if q.shape[-1] == 128 else {}
        out, lse, *_ = forward_pass(q, k, v, **tiles, **options)
        return out, lse

    return attend


def attend_in_float16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float16, for GPUs without bfloat16 arithmetic; repeated in float32 if it overflows."""
    out = attend_with_sdpa(q.half(), k.half(), v.half())
    return (
        out if torch.isfinite(out).all() else attend_with_sdpa(q.float(), k.float(), v.float())
    ).to(q.dtype)


_KERNEL_LOADERS: dict[str, Callable[[], AttentionKernel]] = {
    "fa4": lambda: _drop_log_sum_exp(load_flash_attention_4()),
    "fa3": _make_package_loader("fa3", "flash_attn_func"),
    "fa2": _make_package_loader("fa2", "flash_attn_func"),
    "cudnn": lambda: _make_sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    "flash": lambda: _make_sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "sdpa": lambda: attend_with_sdpa,
    "sdpa16": lambda: attend_in_float16,
    "sage": _make_package_loader("sage", "sageattn", tensor_layout="NHD"),
    "8bit": lambda: eight_bit.attend_in_8bit,
}
BACKENDS_BY_SPEED = ("fa4", "fa3", "cudnn", "fa2", "flash", "sdpa")
BACKEND_REQUIREMENTS = {
    "fa4": (("flash_attn.cute",), "flash-attn-4", "Hopper or Blackwell", (9, 0)),
    # FlashAttention-3 as its authors' build, which has to be compiled, and as a wheel of its forward pass.
    "fa3": (("flash_attn_interface", "fa3_fwd_interface"), "fa3-fwd", "Hopper", (9, 0)),
    "fa2": (("flash_attn.flash_attn_interface",), "flash-attn", "Ampere or later", (8, 0)),
    "sage": (("sageattention",), "sageattention", "Ampere or later", (8, 0)),
}
"""For each kernel from a package: modules that may have it, package, GPU generation, minimum capability."""
_LOSSY_TOLERANCES = {"sage": 0.1, "8bit": 0.1}
"""8-bit kernels, which are used only if requested, and their largest permitted error on the trial tensor."""


def format_dtype(dtype: torch.dtype) -> str:
    """Return the name of the dtype without its module, e.g. bfloat16."""
    return str(dtype).removeprefix("torch.")


def try_attention(
    name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[AttentionKernel | None, str]:
    """Try a kernel on a tiny tensor; return (kernel, "") or (None, why it does not work here)."""
    if name != "sdpa":
        if device.type != "cuda":
            return None, f"needs a GPU, and the device is {device.type}"
        if dtype == torch.float32:
            return None, "needs bfloat16 or float16, and dtype=float32"
    if name in BACKEND_REQUIREMENTS:
        modules, package, gpu_generation, min_capability = BACKEND_REQUIREMENTS[name]
        if _find_module(modules) is None:
            return None, f"package {package} is not installed"
        if torch.cuda.get_device_capability(device) < min_capability:
            return None, f"needs a GPU of {gpu_generation}"
    q = torch.linspace(-1, 1, 128 * head_dim, device=device).view(1, 128, 1, head_dim).to(dtype)
    try:
        with warnings.catch_warnings():
            # A kernel that is compiled here warns about its compiler's own code.
            warnings.simplefilter("ignore")
            kernel = _KERNEL_LOADERS[name]()
            max_error = (
                (kernel(q, q, q).float() - attend_with_sdpa(*(q.float() for _ in range(3))))
                .abs()
                .max()
                .item()
            )
    except Exception as error:  # kernels that are compiled here raise their compilers' own errors
        return None, explain_missing_compiler() or get_first_line(error)
    return (
        (kernel, "")
        if max_error < _LOSSY_TOLERANCES.get(name, 2e-2)
        else (None, f"its result is off by {max_error:.2g}")
    )


def _find_module(names: Sequence[str]) -> str | None:
    """Return the first of the modules that is installed."""
    for name in names:
        with suppress(ImportError, OSError):  # its parent package is missing or broken
            if importlib.util.find_spec(name) is not None:
                return name
    return None
