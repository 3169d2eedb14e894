"""Consistency checks across ranks: all ranks of a replica must hold the same latents.

If they do not, the video is partly noise.
"""

import torch
from torch import Tensor

from wan_dist.parallel.collectives import all_gather
from wan_dist.parallel.mesh import Axis
from wan_dist.sampling.step_cache import VelocityFunction

_INTEGER_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by element size in bytes."""


def find_maximum(value: int, axis: Axis, device: torch.device) -> int:
    """Return the largest of the values that the ranks of the axis pass."""
    if axis.size == 1:
        return value
    return int(all_gather(torch.tensor([int(value)], device=device), axis).max())


def compute_checksum(x: Tensor) -> Tensor:
    """Return a checksum (1,), int64, of the bits of x, the same on any device and with any number of threads.

    It is the sum of each value's bits times an odd number given by the value's position, modulo 2^64.
    Integer sums do not depend on the order of summation, as float sums do, and tensors that differ in
    exactly one value never have the same checksum.
    """
    bits = x.flatten().contiguous().view(_INTEGER_DTYPES[x.element_size()]).long()
    return (bits * (2 * torch.arange(x.numel(), device=x.device) + 1)).sum().view(1)


class ConsistencyCheck:
    """A velocity prediction preceded by a check that the ranks of an axis hold the same latents.

    In the first two steps the ranks compare checksums of their latents.
    """

    def __init__(self, predict: VelocityFunction, axis: Axis) -> None:
        self.predict = predict
        self.axis = axis
        self.num_checks_left = 2

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """Return the prediction; raises RuntimeError, which names the ranks, if their latents differ."""
        if self.axis.size > 1 and self.num_checks_left:
            self.num_checks_left -= 1
            checksums = all_gather(compute_checksum(latents), self.axis).flatten().tolist()
            mismatched_ranks = [
                rank for rank, value in enumerate(checksums) if value != checksums[0]
            ]
            if mismatched_ranks:
                raise RuntimeError(
                    f"ranks {mismatched_ranks} of the replica differ from its first rank in the latents "
                    f"at timestep {timestep}, so the video would be noise (checksums {checksums}); "
                    "check the GPUs with torchrun --nproc_per_node=COUNT -m launch doctor"
                )
        return self.predict(latents, timestep)
