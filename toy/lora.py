"""LoRA of the toy's denoiser (arXiv:2106.09685): trainable factors, and the file that they are written to."""

import re
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_dist.weights.key_maps import map_original_transformer

PREFIX = "diffusion_model."


class LoraLinear(nn.Module):
    """A frozen linear whose weight gets the product of two trainable factors, scaled by 1 (alpha = rank).

    A fused linear has a pair of factors for each of the checkpoint's linears that it is made of.
    """

    def __init__(self, linear: nn.Linear, num_parts: int, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        num_outputs, num_inputs = linear.weight.shape
        device = linear.weight.device
        self.down = nn.ParameterList(
            torch.randn(rank, num_inputs, device=device) * num_inputs**-0.5
            for _ in range(num_parts)
        )
        self.up = nn.ParameterList(
            torch.zeros(num_outputs // num_parts, rank, device=device) for _ in range(num_parts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        products = [up @ down for up, down in zip(self.up, self.down, strict=True)]
        return F.linear(x, self.weight + torch.cat(products), self.bias)


def add_lora(denoiser: nn.Module, rank: int) -> None:
    """Give all linears of the blocks factors of this rank; all else is frozen."""
    denoiser.requires_grad_(False)
    for name, linear in list(denoiser.named_modules()):
        if isinstance(linear, nn.Linear) and ".blocks." in name:
            parent, _, attribute = name.rpartition(".")
            num_parts = len(_list_linears(name))
            setattr(denoiser.get_submodule(parent), attribute, LoraLinear(linear, num_parts, rank))


def list_lora_tensors(
    named: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield factors, named as in the denoiser, and alphas, as a LoRA's file has them, on the CPU."""
    for name, value in named:
        if match := re.fullmatch(r"(.+)\.(down|up)\.(\d+)", name):
            linear = f"{PREFIX}{_list_linears(match[1])[int(match[3])]}"
            yield f"{linear}.lora_{match[2]}.weight", value.to("cpu", dtype)
            if match[2] == "down":
                yield f"{linear}.alpha", torch.tensor(float(value.shape[0]))


def _list_linears(name: str) -> list[str]:
    """Return the checkpoint's linears that a linear of the denoiser is made of."""
    _, _, inner = name.partition(".")  # projection or transformer
    sources = map_original_transformer([]).find_sources(f"{inner}.weight")
    return [source.key.removesuffix(".weight") for source in sources]
