"""Shared counters of all ranks, which any rank may increment without waiting for the others."""

from wan_dist.parallel.team import Coordinator


class SharedCounters:
    """Counters in the store of a run, by name; each starts at 0."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def add(self, name: str, amount: int = 1) -> int:
        """Add ``amount`` to a counter and return its new value."""
        return self._coordinator.add_to_counter(f"counts/{name}", amount)

    def __getitem__(self, name: str) -> int:
        """Return the value of a counter."""
        return self.add(name, 0)
