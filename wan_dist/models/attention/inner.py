"""Scaled dot-product attention of the transformer: a parameter-free module, its kernel chosen once."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wan_dist.models.attention.backends import (
    BACKEND_REQUIREMENTS,
    BACKENDS_BY_SPEED,
    AttentionKernel,
    attend_in_float16,
    attend_with_sdpa,
    format_dtype,
    try_attention,
)
from wan_dist.models.attention.log_sum_exp import (
    KeyBias,
    attend_with_lse,
    merge_parts,
    split_keys,
)
from wan_dist.runtime.errors import InputError


class InnerAttention(nn.Module):
    """Scaled dot-product attention without parameters: the seam that sequence-parallel attention wraps.

    Softmax statistics are float32 in every kernel. ``name`` is that of the kernel, ``reason`` says why it
    was chosen.
    """

    accepts_partial_queries = True
    """Whether q may have fewer tokens than k and v; not where ranks exchange them."""

    def __init__(
        self,
        kernel: AttentionKernel = attend_with_sdpa,
        name: str = "sdpa",
        reason: str = "default",
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.name = name
        self.reason = reason

    def copy(self) -> "InnerAttention":
        """Return another module of the same kernel, which may be wrapped alone."""
        return InnerAttention(self.kernel, self.name)

    def make_send_buffer(self, x: Tensor) -> Tensor:
        """Return the tensor into which q, k or v is best written for `start_exchange`.

        x (B, l, H, D) is the projection: the buffer is x itself, or a new tensor (B, l, N, H / N, D) for N
        ranks.
        """
        return x

    def start_exchange(self, x: Tensor) -> Callable[[], Tensor]:
        """Start the exchange of q, k or v of this device's tokens; the returned call waits for the result.

        x (B, l, H, D), or the buffer that `make_send_buffer` returned. Here nothing is exchanged.
        """
        return lambda: x

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax(q kᵀ / √D) v, (B, Lq, H, D), of exchanged q (B, Lq, H, D), k and v (B, Lk, H, D)."""
        return self.kernel(q, k, v)

    def attend_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, bias: KeyBias | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Return the same, float32, with the scores' log-sum-exp (B, Lq, H), and a bias of some keys."""
        return merge_parts(
            (out, lse + value if value else lse)
            for keys, value in split_keys(k.shape[1], bias)
            for out, lse in [attend_with_lse(self.name, q, k[:, keys], v[:, keys])]
        )


def choose_attention(
    name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int
) -> InnerAttention:
    """Return the attention called ``name``, tried on a tiny tensor first; ``auto`` selects the fastest.

    Raises InputError if a kernel requested by name does not work here, or if ``auto`` finds none.
    """
    if name != "auto":
        kernel, error = try_attention(name, device=device, dtype=dtype, head_dim=head_dim)
        if kernel is None:
            raise InputError(f"attention={name} does not work here: {error}; use attention=auto")
        return InnerAttention(kernel, name, "requested")
    if device.type != "cuda" or dtype == torch.float32:
        return InnerAttention(
            attend_with_sdpa, "sdpa", f"used for {format_dtype(dtype)} on {device.type}"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        return InnerAttention(
            attend_in_float16,
            "sdpa16",
            "this GPU has no bfloat16 arithmetic: computed in float16",
        )
    errors: list[str] = []
    for candidate in BACKENDS_BY_SPEED:
        kernel, error = try_attention(candidate, device=device, dtype=dtype, head_dim=head_dim)
        if kernel is not None:
            return InnerAttention(kernel, candidate, "; ".join(errors) or "the fastest known")
        errors.append(f"no {candidate}: {error}")
    raise InputError("no attention kernel works here: " + "; ".join(errors))


def compile_attention(*, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Try the kernels from packages, fastest first, until one works; some are compiled by that.

    This may run in a thread, unlike a trial of PyTorch's own kernels.
    """
    for name in BACKENDS_BY_SPEED:
        if (
            name in BACKEND_REQUIREMENTS
            and try_attention(name, device=device, dtype=dtype, head_dim=head_dim)[0] is not None
        ):
            return
