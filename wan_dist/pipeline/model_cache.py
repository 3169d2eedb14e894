"""Cache of loaded models, reused from one video to the next."""

from collections.abc import Callable, Hashable
from typing import TypeVar, cast

from torch import nn

from wan_dist.pipeline.out_of_memory import free_memory

Model = TypeVar("Model", bound=nn.Module)


class ModelCache:
    """Cache with one slot for each kind of model; another variant in a slot evicts the previous one.

    A cache that is not persistent holds nothing, and reloads the model each time.
    """

    def __init__(self, *, is_persistent: bool = False) -> None:
        self.is_persistent = is_persistent
        self._models_by_slot: dict[str, tuple[Hashable, nn.Module]] = {}

    def get_or_load(self, slot: str, variant: Hashable, load_model: Callable[[], Model]) -> Model:
        """Return this variant of a slot's model, loaded if it is not cached."""
        if not self.is_persistent:
            return load_model()
        self.evict_others(slot, variant)
        if slot not in self._models_by_slot:
            self._models_by_slot[slot] = (variant, load_model())
        return cast(Model, self._models_by_slot[slot][1])

    def evict_others(self, slot: str, variant: Hashable) -> None:
        """Evict the slot's model unless it is the requested variant."""
        if slot in self._models_by_slot and self._models_by_slot[slot][0] != variant:
            del self._models_by_slot[slot]
            free_memory()

    def clear(self) -> bool:
        """Evict all models; returns whether there was any."""
        if not self._models_by_slot:
            return False
        self._models_by_slot.clear()
        free_memory()
        return True
