"""Unified sequence parallelism (USP) of xfuser: Ulysses, ring, or both (arXiv:2405.07719).

Used with `parallel.usp=xfuser` only. It attends to padding and relies on PyTorch's private context-parallel
code, so it is not the default. xfuser is imported in this module only.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.parallel.mesh import ProcessGroups
from wan_dist.runtime.errors import InputError

_XFUSER_BACKENDS = {"fa4": "FLASH_4", "cudnn": "CUDNN", "flash": "SDPA_FLASH", "sdpa": "SDPA_FLASH"}
"""Names of our attention kernels -> names of xfuser's."""


def check_usp(device: torch.device, attention: str) -> None:
    """Raise InputError if xfuser's USP cannot run on this device, or not with this attention kernel."""
    if device.type != "cuda":
        raise InputError("parallel.usp=xfuser needs GPUs; use parallel.usp=plain")
    for package in ("xfuser", "yunchang"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"parallel.usp=xfuser: package {package} is not installed "
                "(pip install wan-dist[usp]); or use parallel.usp=plain"
            )
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError(
            "parallel.usp=xfuser: its ring and Ulysses need a GPU of Ampere or later; "
            "use parallel.usp=plain"
        )
    if attention not in _XFUSER_BACKENDS:
        raise InputError(
            f"parallel.usp=xfuser supports attention={', '.join(_XFUSER_BACKENDS)}, not {attention}; "
            "use parallel.usp=plain"
        )


class UspAttention(InnerAttention):
    """Attention over the tokens of all ranks by xfuser; all ranks have equally many, and none is padding."""

    accepts_partial_queries = False

    def __init__(
        self, inner: InnerAttention, attend_with_usp: Callable[..., Tensor], backend: Any
    ) -> None:
        super().__init__(inner.kernel, inner.name, inner.reason)
        self.attend_with_usp = attend_with_usp
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention (B, l, H, D) of q, k, v (B, l, H, D) of this rank's tokens."""
        out = self.attend_with_usp(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            combine_qkv_a2a=True,
            backend=self.backend,
        )
        return out.transpose(1, 2)


def open_usp_attention(inner: InnerAttention, groups: ProcessGroups) -> UspAttention:
    """Return the attention that uses xfuser's process groups, which are created on the first call.

    They have our axes in our order.
    """
    from xfuser import xFuserArgs
    from xfuser.core.distributed import (
        init_distributed_environment,
        model_parallel_is_initialized,
        runtime_state,
    )
    from xfuser.core.distributed.attention_backend import AttentionBackendType
    from xfuser.model_executor.layers.usp import USP

    if not model_parallel_is_initialized():
        init_distributed_environment(
            rank=dist.get_rank(), world_size=dist.get_world_size(), local_rank=groups.local_rank
        )
        config, _ = xFuserArgs(
            model="Wan",
            data_parallel_degree=1,  # the default process group is one replica's
            use_cfg_parallel=groups.cfg.size == 2,
            ring_degree=groups.ring.size,
            ulysses_degree=groups.ulysses.size,
            attention_backend=_XFUSER_BACKENDS[inner.name],
        ).create_config()
        # `initialize_runtime_state` wants a diffusers pipeline
        runtime_state._RUNTIME = runtime_state.RuntimeState(config)
    return UspAttention(inner, USP, AttentionBackendType[_XFUSER_BACKENDS[inner.name]])


def apply_usp(model: FusedTransformer, groups: ProcessGroups) -> None:
    """Replace every block's self-attention by xfuser's; used instead of `apply_ring` and `apply_ulysses`."""
    usp_attention: UspAttention | None = None
    for block_attention in model.self_attentions:
        usp_attention = usp_attention or open_usp_attention(block_attention.inner_attention, groups)
        block_attention.inner_attention = usp_attention
