"""Numbers that all ranks share and any of them may raise without waiting for the others."""

import time
from collections import Counter

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_POLL_SECONDS = 0.2


class Counts:
    """Kept where the ranks met at the start; in this process where it is alone."""

    def __init__(self) -> None:
        self._store = _get_default_store() if dist.is_initialized() else None
        self._own: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1) -> int:
        """Raise a number, from 0 at first, and return it as it is then."""
        if self._store is None:
            self._own[name] += amount
            return self._own[name]
        return int(self._store.add(f"wan_dist/{name}", amount))

    def __getitem__(self, name: str) -> int:
        """Return a number."""
        return self.add(name, 0)

    def wait(self, name: str, number: int, seconds: float = float("inf")) -> bool:
        """Return whether a number has come to this one within so many seconds."""
        until = time.monotonic() + seconds
        while self[name] < number:
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_SECONDS)
        return True
