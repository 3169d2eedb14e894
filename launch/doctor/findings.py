"""Findings of ``doctor``: a line each, with advice where something should be done."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from wan_dist.runtime.errors import get_first_line

OK, NOTE, FAULT = "ok", "note", "FAULT"


@dataclass(frozen=True)
class Finding:
    """Result of a check: OK, a NOTE that runs can live with, or a FAULT that makes runs fail."""

    subject: str
    message: str
    verdict: str = OK
    advice: str = ""

    def format_lines(self, host: str = "") -> Iterator[str]:
        """Yield the lines to print; ``host``: the host's name, if it is another one."""
        prefix = f"{host}: " if host else ""
        yield f"{self.verdict:6} {self.subject:12} {prefix}{self.message}"
        if self.advice:
            yield f"{'':19} -> {self.advice}"


Check = Callable[[], Iterable[Finding]]


def run_checks(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Yield the findings of checks, given with their subjects; an exception in a check is a FAULT."""
    for subject, check in checks:
        try:
            yield from check()
        except Exception as error:  # whatever is broken on this machine
            yield Finding(
                subject,
                f"check failed: {type(error).__name__}: {get_first_line(error)}",
                FAULT,
            )
