"""Timeline of a run: a lane of stages for each rank, and charts of measured and planned memory."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from wan_dist.output.gallery.lanes import Bar, build_bars
from wan_dist.output.gallery.runs import RunRecord, Span
from wan_dist.runtime.durations import format_duration

COLORED_STAGES = (
    "check",
    "text",
    "look",
    "image",
    "context",
    "load",
    "denoise",
    "decode",
    "save",
    "wait",
)
"""Stages that have a colour of their own."""
_NUM_BINS = 400
"""Bins along the time axis of the memory charts."""
_STAGES_PER_STACK = 2
"""Stages of a merged bar, on average, for the estimate of the number of bars."""
_LANE_HEIGHTS = ((8, 26), (16, 18), (40, 11), (4096, 6))
"""Pairs of a number of ranks, and the pixels of a lane for up to so many."""


@dataclass(frozen=True)
class AxisTick:
    """A labelled mark on an axis."""

    at: float
    """Percent of the axis."""
    label: str


@dataclass(frozen=True)
class RankLane:
    """One rank's stages."""

    label: str
    """Empty where there is no space for it."""
    top: int
    bars: list[Bar]


@dataclass(frozen=True)
class MemoryCurve:
    """A rank's memory: the outline as an SVG path in a box of 400 x 100, and the peak in GiB."""

    rank: int
    outline: str
    peak: float


@dataclass(frozen=True)
class MemoryChart:
    """Memory of one kind over time."""

    title: str
    summary: str
    curves: list[MemoryCurve]
    plan: str
    """Outline of the planned memory, empty where there is none."""
    budget: float | None
    """Position in percent from the top, None where the budget is beyond the chart."""
    budget_gib: float | None
    ticks: list[AxisTick]


@dataclass(frozen=True)
class StageShare:
    """A stage's part of all ranks' time, as texts."""

    stage: str
    css: str
    time: str
    percent: str
    average: str
    planned: str


@dataclass(frozen=True)
class Timeline:
    """All data that the template draws of a run."""

    run: RunRecord
    began: str
    duration: str
    height: int
    """Pixels of all lanes."""
    lane_height: int
    lanes: list[RankLane]
    ticks: list[AxisTick]
    charts: list[MemoryChart]
    shares: list[StageShare]


def build_timeline(run: RunRecord, max_bars: int = 4000) -> Timeline:
    """Return the timeline of a run; with more than ``max_bars`` bars, thin neighbours are merged."""
    start_seconds = min((span.began for span in run.spans), default=run.began or 0.0)
    end_seconds = max(
        (span.began + span.seconds for span in run.spans), default=run.ended or start_seconds
    )
    length_seconds = max(end_seconds - start_seconds, 1e-3)
    spans_by_rank: dict[int, list[Span]] = defaultdict(list)
    for span in run.spans:
        spans_by_rank[span.rank].append(span)
    lane_height = next(
        pixels for max_ranks, pixels in _LANE_HEIGHTS if len(spans_by_rank) <= max_ranks
    )
    min_percent = max(0.1, 100 * _STAGES_PER_STACK * len(spans_by_rank) / max_bars)
    label_interval = max(1, -(-15 // lane_height))
    lanes = [
        RankLane(
            f"rank {rank}" if lane_index % label_interval == 0 else "",
            lane_index * lane_height,
            build_bars(
                spans_by_rank[rank], start_seconds, length_seconds, min_percent, choose_css_class
            ),
        )
        for lane_index, rank in enumerate(sorted(spans_by_rank))
    ]
    charts = [
        _build_memory_chart(run, spans_by_rank, start_seconds, length_seconds, memory_key)
        for memory_key in ("gpu_gib", "host_gib")
    ]
    began_text = (
        "" if run.began is None else time.strftime("%d %b %Y, %H:%M", time.localtime(run.began))
    )
    return Timeline(
        run=run,
        began=began_text,
        duration=format_duration(run.seconds if run.seconds is not None else length_seconds),
        height=lane_height * len(spans_by_rank),
        lane_height=lane_height,
        lanes=lanes,
        ticks=_build_time_ticks(length_seconds),
        charts=[chart for chart in charts if chart is not None],
        shares=_compute_stage_shares(run),
    )


def choose_css_class(stage: str) -> str:
    """Return the CSS class of a stage's colour."""
    stage_kind = stage.split()[0]
    return (
        f"s-{stage_kind}"
        if stage_kind in COLORED_STAGES
        else f"s-other{sum(map(ord, stage_kind)) % 3}"
    )


def _build_time_ticks(length_seconds: float) -> list[AxisTick]:
    candidate_steps = [
        unit * count for unit in (1, 60, 3600, 86400) for count in (1, 2, 5, 10, 15, 30)
    ]
    step: float = next(
        (step for step in sorted(candidate_steps) if length_seconds / step <= 5),
        math.ceil(length_seconds / 5),
    )
    step = step if length_seconds > 3 else length_seconds / 2
    if step < 60:
        unit, unit_name = 1, "s"
    else:
        unit, unit_name = (60, "min") if step < 3600 else (3600, "h")
    return [
        AxisTick(
            round(100 * tick_index * step / length_seconds, 2),
            f"{tick_index * step / unit:.3g} {unit_name}",
        )
        for tick_index in range(1, int(0.97 * length_seconds / step) + 1)
    ]


def _build_memory_chart(
    run: RunRecord,
    spans_by_rank: Mapping[int, Sequence[Span]],
    start_seconds: float,
    length_seconds: float,
    memory_key: str,
) -> MemoryChart | None:
    """Return the chart of one kind of memory, gpu_gib or host_gib; None where nothing was measured."""
    bins_by_rank = {
        rank: _compute_bin_peaks(
            spans, start_seconds, length_seconds, lambda span: getattr(span, memory_key)
        )
        for rank, spans in sorted(spans_by_rank.items())
    }
    peak_by_rank = {rank: max(bins) for rank, bins in bins_by_rank.items()}
    if not any(peak > 0 for peak in peak_by_rank.values()):
        return None
    planned_bins = _compute_bin_peaks(
        run.spans,
        start_seconds,
        length_seconds,
        lambda span: run.plan_by_stage.get(span.stage_kind, {}).get(memory_key),
    )
    budget_gib = run.memory_budget.get(memory_key)
    highest_gib = max(*peak_by_rank.values(), *planned_bins)
    axis_top, budget_percent = highest_gib, None
    if (
        budget_gib is not None and budget_gib < 1.8 * highest_gib
    ):  # a larger one would flatten the curves
        axis_top = max(highest_gib, budget_gib)
    axis_top = _round_up(1.08 * axis_top)
    if budget_gib is not None and budget_gib <= axis_top:
        budget_percent = round(100 - 100 * budget_gib / axis_top, 2)
    curves = [
        MemoryCurve(rank, _build_outline(bins, axis_top), peak_by_rank[rank])
        for rank, bins in bins_by_rank.items()
        if peak_by_rank[rank] > 0
    ]
    peak_rank = max(peak_by_rank, key=lambda rank: peak_by_rank[rank])
    rank_text = f", on rank {peak_rank}" if len(spans_by_rank) > 1 else ""
    return MemoryChart(
        title="GPU memory" if memory_key == "gpu_gib" else "Host memory",
        summary=f"at most {peak_by_rank[peak_rank]:.1f} GiB{rank_text}",
        curves=curves,
        plan=_build_outline(planned_bins, axis_top) if any(planned_bins) else "",
        budget=budget_percent,
        budget_gib=budget_gib,
        ticks=[
            AxisTick(round(100 - 100 * fraction, 2), f"{fraction * axis_top:.3g}")
            for fraction in (0.5, 1.0)
        ],
    )


def _compute_bin_peaks(
    spans: Sequence[Span],
    start_seconds: float,
    length_seconds: float,
    get_gib: Callable[[Span], float | None],
) -> list[float]:
    """Return the largest value in each bin along the time axis, 0 where there is none."""
    bins = [0.0] * _NUM_BINS
    for span in spans:
        gib = get_gib(span)
        if gib is None or gib <= 0:
            continue
        first_bin = min(
            _NUM_BINS - 1, int(_NUM_BINS * (span.began - start_seconds) / length_seconds)
        )
        last_bin = max(
            first_bin + 1,
            min(
                _NUM_BINS,
                round(_NUM_BINS * (span.began + span.seconds - start_seconds) / length_seconds),
            ),
        )
        for bin_index in range(first_bin, last_bin):
            if bins[bin_index] < gib:
                bins[bin_index] = gib
    return bins


def _build_outline(bins: Sequence[float], axis_top: float) -> str:
    """Return bins as a step curve, an SVG path 400 wide and 100 high; gaps where nothing was measured."""
    parts: list[str] = []
    previous_gib = 0.0
    for bin_index, gib in enumerate([*bins, 0.0]):
        if gib == previous_gib:
            continue
        if previous_gib:
            parts.append(f"H{bin_index}")
        if gib:
            height = f"{100 - 100 * gib / axis_top:.1f}"
            parts.append(f"V{height}" if previous_gib else f"M{bin_index} {height}")
        previous_gib = gib
    return "".join(parts)


def _round_up(value: float) -> float:
    """Return the next larger round number."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(
        unit * count for count in (1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10) if unit * count >= value
    )


def _compute_stage_shares(run: RunRecord) -> list[StageShare]:
    seconds_by_stage: dict[str, float] = defaultdict(float)
    count_by_stage: dict[str, int] = defaultdict(int)
    for span in run.spans:
        seconds_by_stage[span.stage_kind] += span.seconds
        count_by_stage[span.stage_kind] += 1
    total_seconds = max(sum(seconds_by_stage.values()), 1e-9)
    shares = []
    for stage in sorted(seconds_by_stage, key=lambda stage: -seconds_by_stage[stage]):
        planned_seconds = run.plan_by_stage.get(stage, {}).get("seconds")
        percent = 100 * seconds_by_stage[stage] / total_seconds
        average_text = format_duration(seconds_by_stage[stage] / count_by_stage[stage])
        percent_text = f"{percent:.0f} %" if percent >= 1 else "under 1 %"
        shares.append(
            StageShare(
                stage,
                choose_css_class(stage),
                format_duration(seconds_by_stage[stage]),
                percent_text,
                average_text,
                "" if planned_seconds is None else format_duration(planned_seconds),
            )
        )
    return shares
