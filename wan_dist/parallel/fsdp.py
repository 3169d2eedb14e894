"""Weights sharded over the ranks of a replica, block by block (PyTorch's FSDP2, fully_shard)."""

import itertools
from collections.abc import Iterable, Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method


def apply_fsdp(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, *, methods: Sequence[tuple[nn.Module, str]] = ()) -> None:
    """Shard every block, and each of the model's other parts; while a block computes, the next one is gathered.

    ``methods`` are called beside ``forward`` and need the weights of their module too. Vectors of a block (norms, modulation) stay
    whole on every rank: they are small, and of another dtype than the matrices, which would slow each gathering down.
    """
    model.requires_grad_(False)  # parameters of several dtypes may then share a part
    sharded = []
    for block in blocks:
        vectors = {parameter for parameter in block.parameters() if parameter.numel() <= 8 * max(parameter.shape)}
        sharded.append(fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=vectors))
    for part in model.children():
        if any(True for _ in part.parameters()) and not isinstance(part, nn.ModuleList):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for now, after in itertools.pairwise(sharded):
        now.set_modules_to_forward_prefetch([after])
    for module, name in methods:
        register_fsdp_forward_method(module, name)
