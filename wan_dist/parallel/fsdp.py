"""Weights sharded over the ranks of a replica, block by block (PyTorch's FSDP2, fully_shard)."""

import itertools
from collections.abc import Iterable, Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method


def apply_fsdp(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, *, methods: Sequence[tuple[nn.Module, str]] = ()) -> None:
    """Shard every block, and the rest of the model as one more; while a block computes, the next one is gathered.

    ``methods`` are called beside ``forward`` and need the weights of their module too.
    """
    model.requires_grad_(False)  # parameters of several dtypes may then share a block
    sharded = [fully_shard(block, mesh=mesh, reshard_after_forward=True) for block in blocks]
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for block, after in itertools.pairwise(sharded):
        block.set_modules_to_forward_prefetch([after])
    for module, name in methods:
        register_fsdp_forward_method(module, name)
