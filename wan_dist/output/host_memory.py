"""Host memory of this process, sampled during a run."""

import resource
import threading
import time
import weakref
from collections import deque
from pathlib import Path


class HostMemoryWatch:
    """Samples the private memory of this process (without mapped files) ten times a second."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()
        # the thread has a weak reference only, and ends when the watch is collected
        thread = threading.Thread(
            target=_sample_periodically, args=(weakref.ref(self),), daemon=True
        )
        thread.start()

    def record_sample(self) -> None:
        """Take a sample; earlier samples that are not larger are dropped.

        They cannot be the peak since any time, so the samples that stay are in descending order.
        """
        with self._lock:
            now, host_bytes = time.perf_counter(), read_own_host_bytes()
            while self._samples and self._samples[-1][1] <= host_bytes:
                self._samples.pop()
            self._samples.append((now, host_bytes))

    def get_peak_since(self, start: float) -> int:
        """Return the most bytes since ``start``, in seconds of `time.perf_counter`."""
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
    """Return this process's resident anonymous and shared bytes, without mapped files; 0 if unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(
        int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:"))
    )


def read_peak_host_bytes() -> int:
    """Return the peak resident set size of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
