"""Rotary position embedding in 3 dimensions: frames, rows and columns."""

from collections.abc import Sequence

import torch
from torch import Tensor


def compute_rotary_tables(
    grid: tuple[int, int, int],
    head_dim: int,
    *,
    device: torch.device,
    offset: tuple[int, int, int] = (0, 0, 0),
    base: float = 10000.0,
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of 3-D rotary position embedding, each (L, 1, D / 2) float32.

    ``grid`` is (frames, rows, columns), L their product; ``offset``: the position of the first of each. The
    head's D / 2 pairs are split over (frame, row, column) as (D/2 - 2 (D//6), D//6, D//6): 22, 21, 21 for
    D = 128. Angles are computed in float64 and rounded once. Source: RoFormer (arXiv:2104.09864), per axis as
    in Wan2.1.
    """
    frames, rows, columns = (
        range(start, start + length) for start, length in zip(offset, grid, strict=True)
    )
    return compute_rotary_at((frames, rows, columns), head_dim, device=device, base=base)


def compute_rotary_at(
    positions: tuple[Sequence[int], Sequence[int], Sequence[int]],
    head_dim: int,
    *,
    device: torch.device,
    base: float = 10000.0,
) -> tuple[Tensor, Tensor]:
    """Return `compute_rotary_tables` of the grid of these frames, rows and columns, which may be negative."""
    grid = tuple(map(len, positions))
    num_spatial_pairs = head_dim // 6
    axis_angles = []
    for axis, (axis_positions, num_pairs) in enumerate(
        zip(
            positions,
            (head_dim // 2 - 2 * num_spatial_pairs, num_spatial_pairs, num_spatial_pairs),
            strict=True,
        )
    ):
        frequencies = base ** (
            -torch.arange(num_pairs, dtype=torch.float64, device=device) / num_pairs
        )
        shape = [1, 1, 1, num_pairs]
        shape[axis] = len(axis_positions)
        coordinates = torch.tensor(list(axis_positions), dtype=torch.float64, device=device)
        axis_angles.append(
            torch.outer(coordinates, frequencies).view(shape).expand(*grid, num_pairs)
        )
    token_angles = torch.cat(axis_angles, dim=-1).reshape(-1, 1, head_dim // 2)  # (L, 1, D / 2)
    return token_angles.cos().float(), token_angles.sin().float()


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair of neighbouring channels of x (B, L, H, D) float32 by its token's angles."""
    cos, sin = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
