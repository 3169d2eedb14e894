"""A check that all ranks of a replica work on the same latents: half-noise videos come from ranks that do not."""

import torch
from torch import Tensor

from wan_dist.parallel.collectives import all_gather
from wan_dist.parallel.mesh import Axis
from wan_dist.sampling.step_cache import Predict


def is_any(flag: bool, axis: Axis, device: torch.device) -> bool:
    """Whether the flag is set on any rank of the axis."""
    return flag if axis.size == 1 else bool(all_gather(torch.tensor([int(flag)], device=device), axis).any())


class Agreeing:
    """A prediction that first compares a checksum of the latents over the ranks of an axis, in the first two steps."""

    def __init__(self, predict: Predict, axis: Axis) -> None:
        self.predict = predict
        self.axis = axis
        self.num_checks = 2

    def __call__(self, latents: Tensor, timestep: int) -> Tensor:
        """Return the prediction; raises RuntimeError, naming the ranks, if they disagree."""
        if self.axis.size > 1 and self.num_checks:
            self.num_checks -= 1
            weights = torch.linspace(1, 2, latents.numel(), device=latents.device, dtype=torch.float64)
            sums = all_gather((latents.flatten().double() * weights).sum().view(1), self.axis).flatten().tolist()
            strangers = [rank for rank, value in enumerate(sums) if value != sums[0]]
            if strangers:
                raise RuntimeError(
                    f"ranks {strangers} of the replica hold other latents than its first rank at timestep {timestep}: the video would "
                    f"be noise (checksums {sums})"
                )
        return self.predict(latents, timestep)
