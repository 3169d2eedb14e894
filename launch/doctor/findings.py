"""What `doctor` says of a thing that it looked at: a line, and advice where something should be done."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from wan_dist.runtime.errors import get_first_line

OK, NOTE, FAULT = "ok", "note", "FAULT"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; a note can be lived with, a fault makes runs fail."""

    subject: str
    message: str
    verdict: str = OK
    advice: str = ""

    def format_lines(self, host: str = "") -> Iterator[str]:
        """Return it as printed; ``where``: the host, if it is another one."""
        prefix = f"{host}: " if host else ""
        yield f"{self.verdict:6} {self.subject:12} {prefix}{self.message}"
        if self.advice:
            yield f"{'':19} -> {self.advice}"


Check = Callable[[], Iterable[Finding]]


def run_checks(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Return what the checks, each with its subject, find; one that cannot be made is a finding too."""
    for subject, check in checks:
        try:
            yield from check()
        except Exception as error:  # of whatever is broken here
            yield Finding(
                subject,
                f"could not be looked at: {type(error).__name__}: {get_first_line(error)}",
                FAULT,
            )
