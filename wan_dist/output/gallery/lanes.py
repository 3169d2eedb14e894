"""Timeline lanes: a rank's spans merged into bars, few enough to draw."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from wan_dist.output.gallery.runs import Span

_MAX_NAMED_JOBS = 2
_SIDE_BAR_HEIGHT = 0.4
"""Height of a bar of another job beside the main one, as a fraction of the lane."""
_MIN_VISIBLE_FRACTION = 0.08
"""Fraction of a merged bar's time from which a stage is drawn in it."""


@dataclass(frozen=True)
class Bar:
    """A coloured part of a lane."""

    x: float
    """Left edge, in percent of the lane's length, as the width."""
    width: float
    css: str
    tip: str
    top: float = 0.0
    """Upper edge, as a fraction of the lane's height, as the height of the bar."""
    height: float = 1.0


def build_bars(
    spans: Iterable[Span],
    start_seconds: float,
    length_seconds: float,
    min_percent: float,
    choose_css_class: Callable[[str], str],
) -> list[Bar]:
    """Return a rank's bars in the order in which they are painted.

    Nested stages are painted over the stage around them; a concurrent stage of another job takes the lower
    part of the lane. Neighbouring spans shorter than ``min_percent`` percent of the axis (which begins at
    ``start_seconds`` and is ``length_seconds`` long) are merged while they fit in that width: into bars one
    above the other, as high as their stages' parts of the time.
    """
    bars: list[Bar] = []
    thin_spans: list[Span] = []
    percent_per_second = 100 / length_seconds

    def flush_thin_spans() -> None:
        if thin_spans:
            bars.extend(
                _merge_thin_spans(
                    thin_spans, start_seconds, percent_per_second, min_percent, choose_css_class
                )
            )
            thin_spans.clear()

    sorted_spans = sorted(spans, key=lambda span: (span.began, -span.seconds))
    side_spans = _find_side_spans(sorted_spans)
    for span in sorted(sorted_spans, key=lambda span: span in side_spans):
        if span.seconds * percent_per_second >= min_percent:
            flush_thin_spans()
            top_and_height = (
                (1 - _SIDE_BAR_HEIGHT, _SIDE_BAR_HEIGHT) if span in side_spans else (0.0, 1.0)
            )
            x, width = (
                round((span.began - start_seconds) * percent_per_second, 3),
                round(span.seconds * percent_per_second, 3),
            )
            bars.append(
                Bar(x, width, choose_css_class(span.stage), _format_tip(span), *top_and_height)
            )
            continue
        if (
            thin_spans
            and (span.began + span.seconds - thin_spans[0].began) * percent_per_second > min_percent
        ):
            flush_thin_spans()
        thin_spans.append(span)
    flush_thin_spans()
    return bars


def _find_side_spans(spans: Sequence[Span]) -> set[Span]:
    """Return the spans, sorted by begin, that overlap a longer one of another job."""
    side_spans: set[Span] = set()
    for index, span in enumerate(spans):
        for later_index in range(index + 1, len(spans)):
            later_span = spans[later_index]
            if later_span.began >= span.began + span.seconds:
                break
            if span.job and later_span.job and later_span.job != span.job:
                side_spans.add(min(span, later_span, key=lambda each: each.seconds))
    return side_spans


def _merge_thin_spans(
    spans: list[Span],
    start_seconds: float,
    percent_per_second: float,
    min_percent: float,
    choose_css_class: Callable[[str], str],
) -> Iterator[Bar]:
    """Yield the bars of merged thin spans: the stages' parts of the time, one above the other."""
    x, tip = spans[0].began, _format_tip(spans[0]) if len(spans) == 1 else _format_merged_tip(spans)
    width = max(
        min_percent, (max(span.began + span.seconds for span in spans) - x) * percent_per_second
    )
    seconds_by_class: dict[str, float] = defaultdict(float)
    for span in spans:
        seconds_by_class[choose_css_class(span.stage)] += span.seconds
    total_seconds = sum(seconds_by_class.values())
    fraction_by_class = (
        {
            css: class_seconds / total_seconds
            for css, class_seconds in seconds_by_class.items()
            if class_seconds >= _MIN_VISIBLE_FRACTION * total_seconds
        }
        if total_seconds
        else dict.fromkeys([*seconds_by_class][:1], 1.0)
    )
    top = 0.0
    for css in sorted(fraction_by_class):
        height = fraction_by_class[css] / sum(fraction_by_class.values())
        yield Bar(
            round((x - start_seconds) * percent_per_second, 3),
            round(width, 3),
            css,
            tip,
            round(top, 3),
            round(height, 3),
        )
        top += height


def _format_tip(span: Span) -> str:
    memory_texts = [
        f"{value:.1f} GiB {memory_kind}"
        for value, memory_kind in ((span.gpu_gib, "GPU"), (span.host_gib, "host"))
        if value is not None
    ]
    return " · ".join(
        [f"{span.stage}, {span.seconds:.3g} s", *memory_texts, *([span.job] if span.job else [])]
    )


def _format_merged_tip(spans: list[Span]) -> str:
    seconds_by_stage: dict[str, float] = defaultdict(float)
    for span in spans:
        seconds_by_stage[span.stage] += span.seconds
    stage_texts = [
        f"{stage} {seconds:.3g} s"
        for stage, seconds in sorted(seconds_by_stage.items(), key=lambda item: -item[1])
    ]
    job_names = list(dict.fromkeys(span.job for span in spans if span.job))
    jobs_text = (
        ", ".join(job_names)
        if len(job_names) <= _MAX_NAMED_JOBS
        else f"{len(job_names)} jobs, {job_names[0]} to {job_names[-1]}"
    )
    gpu_peaks = [span.gpu_gib for span in spans if span.gpu_gib is not None]
    return " · ".join(
        [
            ", ".join(stage_texts),
            *([f"{max(gpu_peaks):.1f} GiB GPU"] if gpu_peaks else []),
            *([jobs_text] if jobs_text else []),
        ]
    )
