"""Optimizer of the toy model: Muon for matrices, AdamW for the rest; a step is captured as a CUDA graph."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")
_MOMENTUM = 0.95
_DECAY = 0.01
_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration, which drives singular values towards 1."""


def orthogonal(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """Return approximations of the nearest matrices (N, A, B) whose singular values are all 1.

    Newton-Schulz in bfloat16, as in https://kellerjordan.github.io/posts/muon.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Descent:
    """Muon with Nesterov momentum for the matrices (N, M) chosen by ``is_matrix``, AdamW for the rest.

    All matrices of one shape are orthogonalized at once. ``rate``, the learning rate, is a tensor, so that a
    captured step reads its current value.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        is_matrix: Callable[[str, nn.Parameter], bool],
    ) -> None:
        shapes, rest = defaultdict(list), []
        for name, parameter in named:
            (shapes[parameter.shape] if is_matrix(name, parameter) else rest).append(parameter)
        self._parameters = [*rest, *(matrix for matrices in shapes.values() for matrix in matrices)]
        device = self._parameters[0].device
        self.rate = torch.zeros((), device=device)
        self._groups = [
            (matrices, [torch.zeros_like(matrix) for matrix in matrices])
            for matrices in shapes.values()
        ]
        is_cuda = device.type == "cuda"
        self._rest = None
        if rest:  # a LoRA has matrices alone
            self._rest = torch.optim.AdamW(
                rest,
                lr=self.rate,
                betas=(0.9, 0.98),
                weight_decay=_DECAY,
                fused=True,
                capturable=is_cuda,
            )

    def step(self, loss: Tensor) -> None:
        """Update the parameters by the loss's gradient, clipped to a norm of 1."""
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        if self._rest is not None:
            self._rest.step()
        with torch.no_grad():
            for matrices, momenta in self._groups:
                self._step_matrices(matrices, momenta)

    def _step_matrices(self, matrices: list[nn.Parameter], momenta: list[Tensor]) -> None:
        gradients = [matrix.grad for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, _MOMENTUM)
        rows, columns = matrices[0].shape
        scale = 0.2 * max(rows, columns) ** 0.5  # the RMS of AdamW's steps, arXiv:2502.16982
        changes = orthogonal(torch.stack(ahead)).float() * (scale * self.rate)
        torch._foreach_mul_(matrices, 1 - _DECAY * self.rate)
        torch._foreach_sub_(matrices, list(changes))


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is updated by Muon: the matrices of all blocks."""
    return (
        parameter.dim() == 2
        and (".blocks." in name or ".block." in name)
        and "relative_attention_bias" not in name
    )


def compute_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: up for a fortieth of the steps, then down along a cosine."""
    warm = max(1, steps // 40)
    fraction = max(0, step - warm) / max(1, steps - warm)
    return peak * min(1.0, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * fraction)) + 1e-6


class Averages:
    """Exponential averages of parameters over about 1 / (1 - decay) updates, of fewer at first."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters = [parameter.detach() for parameter in parameters]
        self.decay = decay
        self.values = [parameter.clone() for parameter in self.parameters]
        self._num_updates = 0

    def update(self) -> None:
        """Add the parameters' present values."""
        decay = min(self.decay, (self._num_updates + 1) / (self._num_updates + 10))
        torch._foreach_lerp_(self.values, self.parameters, 1 - decay)
        self._num_updates += 1

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Give the parameters the averages."""
        torch._foreach_copy_(self.parameters, self.values)


def recorded(step: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Return a function that does ``step``: on a GPU a CUDA graph, captured after three steps."""
    if device.type != "cuda":
        return step
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def again() -> Result:
        graph.replay()
        return result

    return again
