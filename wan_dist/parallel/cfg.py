"""CFG parallelism: each branch of classifier-free guidance is computed on ranks of its own."""

from torch import Tensor

from wan_dist.parallel.collectives import all_gather
from wan_dist.parallel.mesh import Axis
from wan_dist.sampling.guidance import VelocityPredictor, apply_guidance


class ParallelGuidance:
    """Classifier-free guidance over the two ranks of an axis, with one small all-gather per step.

    The first rank computes the prompt's velocity, the second the negative prompt's. Both are computed
    whatever the scale, so that all ranks make the same number of forward calls, as sharded weights need.
    """

    def __init__(self, velocities: VelocityPredictor, *, scale: float, axis: Axis) -> None:
        self.velocities, self.scale, self.axis = velocities, scale, axis

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """Return the guided velocity (B, C, T, h, w), float32, the same on both ranks."""
        conditional, unconditional = all_gather(self.velocities(latents, timestep)[0], self.axis)
        return (
            conditional
            if self.scale == 1
            else apply_guidance(conditional, unconditional, self.scale)
        )
