"""The host memory of this process, watched while a run goes on."""

import resource
import threading
import time
import weakref
from collections import deque
from pathlib import Path


class HostWatch:
    """Notes the memory that this process has for itself (not files'), ten times a second, while it exists."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()
        thread = threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True)
        thread.start()

    def note(self) -> None:
        """Look now; of moments between two larger ones nothing is kept."""
        with self._lock:
            now, size = time.perf_counter(), read_own_host_bytes()
            while self._seen and self._seen[-1][1] <= size:
                self._seen.pop()
            self._seen.append((now, size))

    def peak_since(self, start: float) -> int:
        """Return the most bytes seen since ``start``, in seconds of the performance counter."""
        self.note()
        with self._lock:
            return max(size for when, size in self._seen if when >= start)


def _watch(reference: "weakref.ref[HostWatch]") -> None:
    while (watch := reference()) is not None:
        watch.note()
        del watch
        time.sleep(0.1)


def read_own_host_bytes() -> int:
    """Return the bytes that this process has for itself, in memory or swapped out, not those of mapped files."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def read_peak_host_bytes() -> int:
    """Return the largest resident set that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
