"""Fully sharded weights (PyTorch's FSDP2, `fully_shard`) over the ranks of a replica, block by block."""

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def apply_fsdp(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard every block and each of the model's other parts over the ranks of ``mesh``.

    While a block computes, the weights of the next one are all-gathered, and of no other. Vectors of a
    block (norms, modulation) are replicated: they are small, and of another dtype than the matrices, which
    would slow down every all-gather.
    """
    from torch.distributed.fsdp import fully_shard  # which takes seconds

    model.requires_grad_(False)  # then one FSDP unit may hold parameters of several dtypes
    sharded_blocks = []
    for block in blocks:
        vectors = {
            parameter
            for name, parameter in block.named_parameters()
            if parameter.numel() <= 8 * max(parameter.shape)
            and not name.endswith((".scale", ".offset"))  # sharded like the rows of their weight
        }
        sharded_blocks.append(
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=vectors)
        )
    for part in model.children():
        has_blocks = not set(part.modules()).isdisjoint(sharded_blocks)
        if any(True for _ in part.parameters()) and not has_blocks:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    sharded_model = fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for module, next_module in itertools.pairwise([sharded_model, *sharded_blocks]):
        _prefetch_weights(module, next_module)


def _prefetch_weights(module: "FSDPModule", next_module: "FSDPModule") -> None:
    """Start to all-gather the weights of ``next_module`` when the forward pass of ``module`` starts.

    Unlike `set_modules_to_forward_prefetch`, this frees the buffer of a block's all-gather as soon as the
    block's weights have been copied out of it, so that two blocks are in memory at a time instead of three.
    """

    def start_unshard(*_: object) -> None:
        next_module.unshard(async_op=True)

    assert isinstance(module, nn.Module)
    module.register_forward_pre_hook(start_unshard)
