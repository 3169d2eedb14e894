"""Updates of weights as LoRA files hold them, computed for some rows of a weight at a time, in float32.

A weight (out, in) is never needed whole, nor is its update: memory holds the factors of one update and the
rows in question. Convolutions count as matrices of ``in`` times their kernel's volume.

Sources: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), LoHa and LoKr (LyCORIS, arXiv:2309.14859), DoRA
(arXiv:2402.09353).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from wan_dist.planning.lora_memory import count_merged_rows
from wan_dist.weights.files import TensorFiles

RowReader = Callable[[int, int], Tensor]
"""(start, stop) -> these rows of a weight, float32, on the device that computes."""


@dataclass(frozen=True)
class Factor:
    """A tensor of a LoRA file, as a matrix: all dims but the first are one."""

    files: TensorFiles
    key: str
    values: Tensor | None = field(default=None, compare=False)
    """The matrix, float32 on the device, after `hold`."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        num_rows, *others = (*self.files.shapes[self.key], 1)
        return num_rows, math.prod(others)

    def read(self, device: torch.device) -> Tensor:
        """Return the matrix, float32."""
        return self.read_rows(0, self.shape[0], device)

    def hold(self, device: torch.device) -> Self:
        """Return it with its values in memory, for a matrix that is read more than once."""
        return self if self.values is not None else replace(self, values=self.read(device))

    def read_rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Return some rows of it, float32."""
        if self.values is not None:
            return self.values[start:stop]
        rows = self.files.read_values(self.key, start, stop, device)
        return rows.float().reshape(len(rows), -1)


class Delta(Protocol):
    """The update of a weight, without its scale."""

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and columns of the weight that it belongs to; None if its tensors do not fit together."""

    @property
    def rank(self) -> int | None:
        """What alpha is divided by; None where alpha does not count."""

    def hold(self, device: torch.device) -> Self:
        """Return it with what every row needs in memory on ``device``."""

    def compute_rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Return rows (n, in) of it, float32."""


@dataclass(frozen=True)
class LowRank:
    """LoRA: up (out, r) times down (r, in)."""

    down: Factor
    up: Factor
    kind: ClassVar[str] = "LoRA"

    @property
    def shape(self) -> tuple[int, int] | None:
        """See `Delta`."""
        fits = self.up.shape[1] == self.down.shape[0]
        return (self.up.shape[0], self.down.shape[1]) if fits else None

    @property
    def rank(self) -> int | None:
        """See `Delta`."""
        return self.down.shape[0]

    def hold(self, device: torch.device) -> Self:
        """See `Delta`."""
        return replace(self, down=self.down.hold(device))

    def compute_rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """See `Delta`."""
        return self.up.read_rows(start, stop, device) @ self.down.read(device)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: the elementwise product of two low-rank products."""

    first: LowRank
    second: LowRank
    kind: ClassVar[str] = "LoHa"

    @property
    def shape(self) -> tuple[int, int] | None:
        """See `Delta`."""
        return self.first.shape if self.first.shape == self.second.shape else None

    @property
    def rank(self) -> int | None:
        """See `Delta`."""
        return self.first.rank

    def hold(self, device: torch.device) -> Self:
        """See `Delta`."""
        return replace(self, first=self.first.hold(device), second=self.second.hold(device))

    def compute_rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """See `Delta`."""
        rows = self.first.compute_rows(start, stop, device)
        return rows.mul_(self.second.compute_rows(start, stop, device))


@dataclass(frozen=True)
class Kronecker:
    """LoKr: the Kronecker product of two matrices, each whole or in factors.

    Alpha counts only where one is in factors: for two whole ones programs write numbers without a meaning.
    """

    left: Factor | LowRank
    right: Factor | LowRank
    kind: ClassVar[str] = "LoKr"

    @property
    def shape(self) -> tuple[int, int] | None:
        """See `Delta`."""
        if self.left.shape is None or self.right.shape is None:
            return None
        return self.left.shape[0] * self.right.shape[0], self.left.shape[1] * self.right.shape[1]

    @property
    def rank(self) -> int | None:
        """See `Delta`."""
        ranks = [part.rank for part in (self.right, self.left) if isinstance(part, LowRank)]
        return ranks[0] if ranks else None

    def hold(self, device: torch.device) -> Self:
        """See `Delta`."""
        return replace(self, left=self.left.hold(device), right=self.right.hold(device))

    def compute_rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """See `Delta`."""
        left, right = (_compute_whole(part, device) for part in (self.left, self.right))
        indices = torch.arange(start, stop, device=device)
        left_rows, right_rows = left[indices // len(right)], right[indices % len(right)]
        return (left_rows.unsqueeze(2) * right_rows.unsqueeze(1)).flatten(1)


def _compute_whole(part: Factor | LowRank, device: torch.device) -> Tensor:
    if isinstance(part, Factor):
        return part.read(device)
    return part.compute_rows(0, part.up.shape[0], device)


@dataclass(frozen=True)
class Difference:
    """A whole difference, of a weight or of a vector."""

    values: Factor
    num_rows: int
    """Rows of the parameter; the stored tensor may have further dims of length 1 before them."""
    kind: ClassVar[str] = "differences"

    @property
    def shape(self) -> tuple[int, int] | None:
        """See `Delta`."""
        num_rows, num_columns = self.values.shape
        return self.num_rows, num_rows * num_columns // self.num_rows

    @property
    def rank(self) -> int | None:
        """See `Delta`."""
        return None

    def hold(self, device: torch.device) -> Self:
        """See `Delta`."""
        return self  # each row is read once

    def compute_rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """See `Delta`."""
        if self.values.shape[0] == self.num_rows:
            return self.values.read_rows(start, stop, device)
        return self.values.read(device).reshape(self.num_rows, -1)[start:stop]


@dataclass(frozen=True)
class Magnitude:
    """DoRA's lengths of the merged weight's rows (out, 1), or of its columns (1, in)."""

    lengths: Factor
    is_of_rows: bool
    _column_lengths: list[Tensor] = field(default_factory=list, compare=False)
    """(1, in), float32: of the merged weight's columns before they are scaled, once they are known."""

    def scale_rows(
        self, rows: Tensor, start: int, compute_rows: RowReader, num_rows: int
    ) -> Tensor:
        """Return the rows (n, in) of a weight of ``num_rows`` rows with the lengths of this."""
        if self.is_of_rows:
            wanted = self.lengths.read(rows.device).reshape(-1, 1)[start : start + len(rows)]
            return rows * (wanted / _avoid_zero(rows.norm(dim=1, keepdim=True)))
        if not self._column_lengths:
            squares = torch.zeros(1, rows.shape[1], dtype=torch.float64)
            num_at_once = count_merged_rows(rows.shape[1])
            for first in range(0, num_rows, num_at_once):
                some_rows = compute_rows(first, min(first + num_at_once, num_rows))
                squares += some_rows.double().square().sum(dim=0, keepdim=True).cpu()
            self._column_lengths.append(squares.sqrt().float())
        wanted = self.lengths.read(rows.device).reshape(1, -1)
        return rows * (wanted / _avoid_zero(self._column_lengths[0].to(rows.device)))


def _avoid_zero(lengths: Tensor) -> Tensor:
    """Return lengths to divide by: a row of zeros stays one."""
    return lengths.clamp_min(torch.finfo(lengths.dtype).tiny)


@dataclass(frozen=True)
class Update:
    """One LoRA's update of one parameter W: strength times scale times delta.

    With a magnitude m it is strength * (W' - W), where W' is W + scale * delta, brought to the lengths m.
    """

    delta: Delta
    scale: float
    strength: float = 1.0
    magnitude: Magnitude | None = None

    @property
    def kind(self) -> str:
        """Name of its kind."""
        return self.delta.kind if self.magnitude is None else f"DoRA of {self.delta.kind}"

    def hold(self, device: torch.device) -> Self:
        """See `Delta`."""
        return replace(self, delta=self.delta.hold(device))

    def compute_rows(self, weight_rows: Tensor, start: int, read_rows: RowReader) -> Tensor:
        """Return the update (n, in) of some rows of the weight, which ``read_rows`` reads."""
        device, stop = weight_rows.device, start + len(weight_rows)
        # Not in place: rows of a difference may be the file's own memory.
        if self.magnitude is None:
            return self.delta.compute_rows(start, stop, device) * (self.scale * self.strength)
        delta_rows = self.delta.compute_rows(start, stop, device) * self.scale

        def compute_direction(first: int, last: int) -> Tensor:
            delta = self.delta.compute_rows(first, last, device) * self.scale
            return delta.add_(read_rows(first, last).flatten(1))

        shape = self.delta.shape
        assert shape is not None
        merged_rows = self.magnitude.scale_rows(
            delta_rows.add_(weight_rows), start, compute_direction, shape[0]
        )
        return merged_rows.sub_(weight_rows).mul_(self.strength)


@dataclass(frozen=True)
class WeightUpdate:
    """The updates of one parameter, of all LoRAs; they are added in float32, and rounded once."""

    updates: tuple[Update, ...]

    def hold(self, device: torch.device) -> Self:
        """Return it with what every row needs in memory on ``device``, while one weight is filled."""
        return replace(self, updates=tuple(update.hold(device) for update in self.updates))

    def merge_rows(self, read_rows: RowReader, start: int, stop: int) -> Tensor:
        """Return merged rows (n, ...), float32; see `count_merged_rows` for how many to ask for at once."""
        stored_rows = read_rows(start, stop)
        weight_rows = stored_rows.reshape(len(stored_rows), -1)
        first, *others = self.updates
        total = first.compute_rows(weight_rows, start, read_rows)
        for update in others:
            total += update.compute_rows(weight_rows, start, read_rows)
        return total.add_(weight_rows).reshape(stored_rows.shape)
