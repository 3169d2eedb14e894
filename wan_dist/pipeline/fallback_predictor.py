"""Velocity prediction that falls back to an arrangement with less memory if the GPU's is exhausted."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from wan_dist.config.sections import MemoryConfig
from wan_dist.planning.memory_planner import list_fallbacks
from wan_dist.planning.workload import Arrangement
from wan_dist.runtime.log import logger
from wan_dist.sampling.step_cache import VelocityFunction

Result = TypeVar("Result")


class FallbackPredictor:
    """Prediction with the next of ``arrangements`` where the GPU's memory runs out, in loading too.

    Raises torch.OutOfMemoryError after the last one, with a note on what else would take less.
    ``error_type`` is the error to fall back at. ``on_fallback`` is called with each arrangement after the
    first.
    """

    def __init__(
        self,
        load_predictor: Callable[[Arrangement], VelocityFunction],
        arrangements: Sequence[Arrangement],
        *,
        can_split_passes: bool,
        error_type: type[torch.OutOfMemoryError],
        on_fallback: Callable[[Arrangement], None],
    ) -> None:
        (
            self._load_predictor,
            self._arrangements,
            self._can_split_passes,
            self._error_type,
            self._on_fallback,
        ) = (
            load_predictor,
            list(arrangements),
            can_split_passes,
            error_type,
            on_fallback,
        )
        self._predictor: VelocityFunction | None = None
        self._run_with_fallback(self._get_predictor)

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """Return the transformer's prediction."""
        return self._run_with_fallback(lambda: self._get_predictor()(latents, timestep))

    def _get_predictor(self) -> VelocityFunction:
        if self._predictor is None:
            self._predictor = self._load_predictor(self._arrangements[0])
        return self._predictor

    def _run_with_fallback(self, work: Callable[[], Result]) -> Result:
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                if len(self._arrangements) == 1 or not isinstance(error, self._error_type):
                    current = self._arrangements[0]
                    suggestion = _suggest_smaller_setting(
                        current, can_split_passes=self._can_split_passes
                    )
                    error.add_note(f"with the {_describe_transformer(current)}; {suggestion}")
                    raise
            self._predictor = None
            del self._arrangements[0]
            self._on_fallback(self._arrangements[0])
            logger.warning(
                "denoising ran out of GPU memory; the step is repeated with the %s",
                _describe_transformer(self._arrangements[0]),
            )


def _describe_transformer(arrangement: Arrangement) -> str:
    return arrangement.description.partition(";")[0]


def _suggest_smaller_setting(arrangement: Arrangement, *, can_split_passes: bool) -> str:
    """Return a description of a setting with which the transformer needs less memory."""
    fallbacks = list_fallbacks(arrangement, MemoryConfig(), can_split_passes=can_split_passes)[:1]
    settings = [
        f"memory.{key}={getattr(fallback, key)}"
        for fallback in fallbacks
        for key in ("slice_tokens", "passes", "dit")
        if getattr(fallback, key) != getattr(arrangement, key)
    ]
    return (
        f"{settings[0]} would take less"
        if settings
        else "a smaller size or fewer frames would take less"
    )
