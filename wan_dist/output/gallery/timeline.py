"""A run -> what its timeline draws: a lane of stages for each rank, and below it the memory, beside what was planned."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from wan_dist.output.gallery.lanes import Bar, bars_of
from wan_dist.output.gallery.runs import Run, Span
from wan_dist.runtime.durations import duration

STAGES = ("check", "text", "look", "image", "context", "load", "denoise", "decode", "save", "wait")
"""That have a colour of their own."""
_BINS = 400
"""Places along the memory charts."""
_STACKED = 2
"""Stages that stand one above the other where bars are thin, about."""
_HEIGHTS = ((8, 26), (16, 18), (40, 11), (4096, 6))
"""Pixels of a lane, for up to so many ranks."""


@dataclass(frozen=True)
class Tick:
    """A mark at so many percent of the axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Lane:
    """One rank's stages."""

    label: str
    """Empty where there is no room for it."""
    top: int
    bars: list[Bar]


@dataclass(frozen=True)
class Curve:
    """A rank's memory: the outline in a box of 400 x 100, and the most in GiB."""

    rank: int
    outline: str
    peak: float


@dataclass(frozen=True)
class Chart:
    """Memory of one kind over time."""

    title: str
    summary: str
    curves: list[Curve]
    plan: str
    """The plan's outline, empty where there is none."""
    budget: float | None
    """Percent from above, None where it is beyond the chart."""
    budget_gib: float | None
    ticks: list[Tick]


@dataclass(frozen=True)
class Share:
    """A stage's part in all ranks' time."""

    stage: str
    css: str
    time: str
    percent: str
    average: str
    planned: str


@dataclass(frozen=True)
class Timeline:
    """All that is drawn of a run."""

    run: Run
    began: str
    duration: str
    height: int
    """Pixels of all lanes."""
    lane_height: int
    lanes: list[Lane]
    ticks: list[Tick]
    charts: list[Chart]
    shares: list[Share]


def timeline_of(run: Run, most_bars: int = 4000) -> Timeline:
    """Return what to draw of a run; with more bars than ``most_bars``, thin neighbours are drawn as one."""
    start = min((span.began for span in run.spans), default=run.began or 0.0)
    end = max((span.began + span.seconds for span in run.spans), default=run.ended or start)
    length = max(end - start, 1e-3)
    ranks: dict[int, list[Span]] = defaultdict(list)
    for span in run.spans:
        ranks[span.rank].append(span)
    height = next(pixels for count, pixels in _HEIGHTS if len(ranks) <= count)
    least = max(0.1, 100 * _STACKED * len(ranks) / most_bars)
    every = max(1, -(-15 // height))
    lanes = [
        Lane(f"rank {rank}" if place % every == 0 else "", place * height, bars_of(ranks[rank], start, length, least, css_of))
        for place, rank in enumerate(sorted(ranks))
    ]
    charts = [_chart(run, ranks, start, length, kind) for kind in ("gpu_gib", "host_gib")]
    return Timeline(
        run=run,
        began="" if run.began is None else time.strftime("%d %b %Y, %H:%M", time.localtime(run.began)),
        duration=duration(run.seconds if run.seconds is not None else length),
        height=height * len(ranks),
        lane_height=height,
        lanes=lanes,
        ticks=_time_ticks(length),
        charts=[chart for chart in charts if chart is not None],
        shares=_shares(run),
    )


def css_of(stage: str) -> str:
    """Return the class of a stage's colour."""
    first = stage.split()[0]
    return f"s-{first}" if first in STAGES else f"s-other{sum(map(ord, first)) % 3}"


def _time_ticks(length: float) -> list[Tick]:
    steps = [unit * count for unit in (1, 60, 3600, 86400) for count in (1, 2, 5, 10, 15, 30)]
    step: float = next((step for step in sorted(steps) if length / step <= 5), math.ceil(length / 5))
    step = step if length > 3 else length / 2
    unit, name = (1, "s") if step < 60 else (60, "min") if step < 3600 else (3600, "h")
    return [
        Tick(round(100 * place * step / length, 2), f"{place * step / unit:.3g} {name}")
        for place in range(1, int(0.97 * length / step) + 1)
    ]


def _chart(run: Run, ranks: Mapping[int, Sequence[Span]], start: float, length: float, kind: str) -> Chart | None:
    """Return the memory of a kind, gpu_gib or host_gib; None where nothing was measured."""
    binned = {rank: _highest(spans, start, length, lambda span: getattr(span, kind)) for rank, spans in sorted(ranks.items())}
    peaks = {rank: max(bins) for rank, bins in binned.items()}
    if not any(peak > 0 for peak in peaks.values()):
        return None
    planned = _highest(run.spans, start, length, lambda span: run.plan.get(span.kind, {}).get(kind))
    budget = run.budget.get(kind)
    seen = max(*peaks.values(), *planned)
    top = _nice(1.08 * (max(seen, budget) if budget is not None and budget < 1.8 * seen else seen))
    curves = [Curve(rank, _outline(bins, top), peaks[rank]) for rank, bins in binned.items() if peaks[rank] > 0]
    highest = max(peaks, key=lambda rank: peaks[rank])
    return Chart(
        title="GPU memory" if kind == "gpu_gib" else "Host memory",
        summary=f"at most {peaks[highest]:.1f} GiB" + (f", on rank {highest}" if len(ranks) > 1 else ""),
        curves=curves,
        plan=_outline(planned, top) if any(planned) else "",
        budget=round(100 - 100 * budget / top, 2) if budget is not None and budget <= top else None,
        budget_gib=budget,
        ticks=[Tick(round(100 - 100 * share, 2), f"{share * top:.3g}") for share in (0.5, 1.0)],
    )


def _highest(spans: Sequence[Span], start: float, length: float, of: Callable[[Span], float | None]) -> list[float]:
    """Return the largest value in each place along the axis, 0 where there is none."""
    bins = [0.0] * _BINS
    for span in spans:
        value = of(span)
        if value is None or value <= 0:
            continue
        first = min(_BINS - 1, int(_BINS * (span.began - start) / length))
        last = max(first + 1, min(_BINS, round(_BINS * (span.began + span.seconds - start) / length)))
        for place in range(first, last):
            if bins[place] < value:
                bins[place] = value
    return bins


def _outline(bins: Sequence[float], top: float) -> str:
    """Return the steps as the path of an SVG, 400 wide and 100 high; gaps where nothing was measured."""
    parts: list[str] = []
    before = 0.0
    for place, value in enumerate([*bins, 0.0]):
        if value == before:
            continue
        if before:
            parts.append(f"H{place}")
        if value:
            parts.append(f"V{100 - 100 * value / top:.1f}" if before else f"M{place} {100 - 100 * value / top:.1f}")
        before = value
    return "".join(parts)


def _nice(value: float) -> float:
    """Return the next larger round number."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * count for count in (1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10) if unit * count >= value)


def _shares(run: Run) -> list[Share]:
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for span in run.spans:
        seconds[span.kind] += span.seconds
        counts[span.kind] += 1
    whole = max(sum(seconds.values()), 1e-9)
    shares = []
    for stage in sorted(seconds, key=lambda stage: -seconds[stage]):
        planned = run.plan.get(stage, {}).get("seconds")
        percent = 100 * seconds[stage] / whole
        average = duration(seconds[stage] / counts[stage])
        text = f"{percent:.0f} %" if percent >= 1 else "under 1 %"
        shares.append(Share(stage, css_of(stage), duration(seconds[stage]), text, average, "" if planned is None else duration(planned)))
    return shares
