"""What `doctor` says of a thing that it looked at: a line, and advice where something should be done."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from wan_dist.runtime.errors import first_line

OK, NOTE, FAULT = "ok", "note", "FAULT"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; a note can be lived with, a fault makes runs fail."""

    subject: str
    found: str
    verdict: str = OK
    advice: str = ""

    def lines(self, where: str = "") -> Iterator[str]:
        """Return it as printed; ``where``: the host, if it is another one."""
        place = f"{where}: " if where else ""
        yield f"{self.verdict:6} {self.subject:12} {place}{self.found}"
        if self.advice:
            yield f"{'':19} -> {self.advice}"


Check = Callable[[], Iterable[Finding]]


def examine(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Return what the checks, each with its subject, find; one that cannot be made is a finding too."""
    for subject, check in checks:
        try:
            yield from check()
        except Exception as fault:  # of whatever is broken here
            yield Finding(subject, f"could not be looked at: {type(fault).__name__}: {first_line(fault)}", FAULT)
