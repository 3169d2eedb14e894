"""A rank's spans -> bars, few enough to draw."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from wan_dist.output.gallery.runs import Span

_MOST_NAMED = 2
_BESIDE = 0.4
"""Of a lane's height."""
_LEAST_SHARE = 0.08
"""Of a bar's time, to be seen in it."""


@dataclass(frozen=True)
class Bar:
    """A coloured part of a lane."""

    x: float
    """In percent of the lane's length, as the width."""
    width: float
    css: str
    tip: str
    top: float = 0.0
    """Where it begins in the lane's height, and how much of that it takes: 0 ... 1."""
    height: float = 1.0


def bars_of(spans: Iterable[Span], start: float, length: float, least: float, css_of: Callable[[str], str]) -> list[Bar]:
    """Return a rank's bars in the order they are painted: what is nested in a stage over it, what another job does beside it below it.

    Spans of less than ``least`` percent of the axis (from ``start``, ``length`` seconds long) that begin within so much of each other
    are bars one above the other, as high as their stages' shares of that time.
    """
    bars: list[Bar] = []
    thin: list[Span] = []
    percent = 100 / length

    def flush() -> None:
        if thin:
            bars.extend(_merged(thin, start, percent, least, css_of))
            thin.clear()

    in_order = sorted(spans, key=lambda span: (span.began, -span.seconds))
    beside = _beside(in_order)
    for span in sorted(in_order, key=lambda span: span in beside):
        if span.seconds * percent >= least:
            flush()
            place = (1 - _BESIDE, _BESIDE) if span in beside else (0.0, 1.0)
            x, width = round((span.began - start) * percent, 3), round(span.seconds * percent, 3)
            bars.append(Bar(x, width, css_of(span.stage), _tip(span), *place))
            continue
        if thin and (span.began + span.seconds - thin[0].began) * percent > least:
            flush()
        thin.append(span)
    flush()
    return bars


def _beside(spans: Sequence[Span]) -> set[Span]:
    """Return those, of spans by their beginning, that go on while a longer one of another job does."""
    found: set[Span] = set()
    for number, span in enumerate(spans):
        for place in range(number + 1, len(spans)):
            later = spans[place]
            if later.began >= span.began + span.seconds:
                break
            if span.job and later.job and later.job != span.job:
                found.add(min(span, later, key=lambda each: each.seconds))
    return found


def _merged(spans: list[Span], start: float, percent: float, least: float, css_of: Callable[[str], str]) -> Iterator[Bar]:
    """Yield what stands for thin spans: the stages' shares, one above the other."""
    x, tip = spans[0].began, _tip(spans[0]) if len(spans) == 1 else _tip_of_several(spans)
    width = max(least, (max(span.began + span.seconds for span in spans) - x) * percent)
    seconds: dict[str, float] = defaultdict(float)
    for span in spans:
        seconds[css_of(span.stage)] += span.seconds
    whole = sum(seconds.values())
    shares = (
        {css: took / whole for css, took in seconds.items() if took >= _LEAST_SHARE * whole}
        if whole
        else dict.fromkeys([*seconds][:1], 1.0)
    )
    top = 0.0
    for css in sorted(shares):
        height = shares[css] / sum(shares.values())
        yield Bar(round((x - start) * percent, 3), round(width, 3), css, tip, round(top, 3), round(height, 3))
        top += height


def _tip(span: Span) -> str:
    memory = [f"{value:.1f} GiB {of}" for value, of in ((span.gpu_gib, "GPU"), (span.host_gib, "host")) if value is not None]
    return " · ".join([f"{span.stage}, {span.seconds:.3g} s", *memory, *([span.job] if span.job else [])])


def _tip_of_several(spans: list[Span]) -> str:
    stages: dict[str, float] = defaultdict(float)
    for span in spans:
        stages[span.stage] += span.seconds
    parts = [f"{stage} {seconds:.3g} s" for stage, seconds in sorted(stages.items(), key=lambda item: -item[1])]
    jobs = list(dict.fromkeys(span.job for span in spans if span.job))
    named = ", ".join(jobs) if len(jobs) <= _MOST_NAMED else f"{len(jobs)} jobs, {jobs[0]} to {jobs[-1]}"
    gpu = [span.gpu_gib for span in spans if span.gpu_gib is not None]
    return " · ".join([", ".join(parts), *([f"{max(gpu):.1f} GiB GPU"] if gpu else []), *([named] if named else [])])
