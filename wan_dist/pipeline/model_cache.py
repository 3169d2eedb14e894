"""Loaded models that stay from one video to the next."""

from collections.abc import Callable, Hashable
from typing import TypeVar, cast

from torch import nn

from wan_dist.pipeline.out_of_memory import free_memory

Model = TypeVar("Model", bound=nn.Module)


class Shelf:
    """A place for each model; what stands there goes when another model is to stand there. One that does not keep loads anew each time."""

    def __init__(self, *, keeps: bool = False) -> None:
        self.keeps = keeps
        self._held: dict[str, tuple[Hashable, nn.Module]] = {}

    def take(self, place: str, kind: Hashable, load: Callable[[], Model]) -> Model:
        """Return the model of this kind from its place, loaded if it is not there."""
        if not self.keeps:
            return load()
        self.make_way(place, kind)
        if place not in self._held:
            self._held[place] = (kind, load())
        return cast(Model, self._held[place][1])

    def make_way(self, place: str, kind: Hashable) -> None:
        """Let go of what stands there, unless it is of this kind."""
        if place in self._held and self._held[place][0] != kind:
            del self._held[place]
            free_memory()

    def clear(self) -> bool:
        """Let go of all; returns whether there was any."""
        if not self._held:
            return False
        self._held.clear()
        free_memory()
        return True
