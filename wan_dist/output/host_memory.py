"""The host memory of this process, watched while a run goes on."""

import resource
import threading
import time
import weakref
from collections import deque
from pathlib import Path


class HostMemoryWatch:
    """Notes the memory that this process has for itself (not files'), ten times a second, while it exists."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()
        thread = threading.Thread(
            target=_sample_periodically, args=(weakref.ref(self),), daemon=True
        )
        thread.start()

    def record_sample(self) -> None:
        """Look now; of moments between two larger ones nothing is kept."""
        with self._lock:
            now, host_bytes = time.perf_counter(), read_own_host_bytes()
            while self._samples and self._samples[-1][1] <= host_bytes:
                self._samples.pop()
            self._samples.append((now, host_bytes))

    def get_peak_since(self, start: float) -> int:
        """Return the most bytes seen since ``start``, in seconds of the performance counter."""
        self.record_sample()
        with self._lock:
            return max(
                host_bytes for sample_time, host_bytes in self._samples if sample_time >= start
            )


def _sample_periodically(watch_reference: "weakref.ref[HostMemoryWatch]") -> None:
    while (watch := watch_reference()) is not None:
        watch.record_sample()
        del watch
        time.sleep(0.1)


def read_own_host_bytes() -> int:
    """Return the bytes that this process has for itself, in memory or swapped out, not those of mapped files."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(
        int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:"))
    )


def read_peak_host_bytes() -> int:
    """Return the largest resident set that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
