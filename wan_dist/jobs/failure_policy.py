"""Failure policy of a batch run: which job failures end the whole run."""

from wan_dist.parallel.shared_work import classify_error
from wan_dist.parallel.team import RankError
from wan_dist.runtime.errors import InputError

_MAX_CONSECUTIVE_FAILURES = 10
"""Failures in a row that end the run: something is wrong with more than the jobs."""


class FailurePolicy:
    """Counts failures in a row; an InputError is about one job alone and does not count."""

    def __init__(self) -> None:
        self._num_consecutive = 0

    def record_success(self) -> None:
        """Reset the count."""
        self._num_consecutive = 0

    def record_failure(self, error: Exception) -> None:
        """Count a job's failure; raise its error if the other jobs would meet it too."""
        if not isinstance(error, InputError):
            self._num_consecutive += 1
        is_last = self._num_consecutive == _MAX_CONSECUTIVE_FAILURES
        if is_last:
            error.add_note(
                f"the last of {_MAX_CONSECUTIVE_FAILURES} jobs that failed one after the other"
            )
        is_final = isinstance(error, RankError) and error.is_final
        if is_final or is_last or classify_error(error) == "machine":
            raise error
