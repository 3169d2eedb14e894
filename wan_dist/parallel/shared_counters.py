"""Numbers that all ranks share and any of them may raise without waiting for the others."""

from wan_dist.parallel.team import Team


class Counts:
    """Kept in the store of a run's ranks."""

    def __init__(self, team: Team) -> None:
        self._team = team

    def add(self, name: str, amount: int = 1) -> int:
        """Raise a number, from 0 at first, and return it as it is then."""
        return self._team.add(f"counts/{name}", amount)

    def __getitem__(self, name: str) -> int:
        """Return a number."""
        return self.add(name, 0)
