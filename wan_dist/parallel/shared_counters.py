"""Numbers that all ranks share and any of them may raise without waiting for the others."""

from wan_dist.parallel.team import Coordinator


class SharedCounters:
    """Kept in the store of a run's ranks."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def add(self, name: str, amount: int = 1) -> int:
        """Raise a number, from 0 at first, and return it as it is then."""
        return self._coordinator.add_to_counter(f"counts/{name}", amount)

    def __getitem__(self, name: str) -> int:
        """Return a number."""
        return self.add(name, 0)
