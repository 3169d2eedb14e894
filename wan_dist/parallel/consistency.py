"""A check that all ranks of a replica work on the same latents: half-noise videos come from ranks that do not."""

import torch
from torch import Tensor

from wan_dist.parallel.collectives import all_gather
from wan_dist.parallel.mesh import Axis
from wan_dist.sampling.step_cache import VelocityFunction

_INTEGER_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers, by bytes."""


def is_set_on_any_rank(flag: bool, axis: Axis, device: torch.device) -> bool:
    """Whether the flag is set on any rank of the axis."""
    return (
        flag
        if axis.size == 1
        else bool(all_gather(torch.tensor([int(flag)], device=device), axis).any())
    )


def compute_checksum(x: Tensor) -> Tensor:
    """Return a checksum (1,), int64, of the bits of x, which any device and number of threads computes alike.

    Each value's bits count times an odd number that goes by its place, modulo 2^64: integers sum up to the same in any order, which
    floats do not, and tensors that differ in one value never have the same sum.
    """
    bits = x.flatten().contiguous().view(_INTEGER_DTYPES[x.element_size()]).long()
    return (bits * (2 * torch.arange(x.numel(), device=x.device) + 1)).sum().view(1)


class ConsistencyCheck:
    """A prediction that first compares a checksum of the latents over the ranks of an axis, in the first two steps."""

    def __init__(self, predict: VelocityFunction, axis: Axis) -> None:
        self.predict = predict
        self.axis = axis
        self.num_checks_left = 2

    def __call__(self, latents: Tensor, timestep: int) -> Tensor:
        """Return the prediction; raises RuntimeError, naming the ranks, if they disagree."""
        if self.axis.size > 1 and self.num_checks_left:
            self.num_checks_left -= 1
            checksums = all_gather(compute_checksum(latents), self.axis).flatten().tolist()
            mismatched_ranks = [
                rank for rank, value in enumerate(checksums) if value != checksums[0]
            ]
            if mismatched_ranks:
                raise RuntimeError(
                    f"ranks {mismatched_ranks} of the replica hold other latents than its first rank at timestep {timestep}: the video would "
                    f"be noise (checksums {checksums})"
                )
        return self.predict(latents, timestep)
