"""Metrics of a service for Prometheus: videos by state, steps, seconds of steps and stages."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from wan_dist.service.video_states import STATUSES, VideoStates


class ServiceCollector(Collector):
    """Collects the metrics from the states of all videos, whenever they are read.

    They follow from what is on disk, so they continue after a restart.
    """

    def __init__(self, states: VideoStates) -> None:
        self._states = states

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        states = self._states.list_all()
        totals = self._states.totals
        counts = Counter(state.status for state in states)
        videos = GaugeMetricFamily("wan_dist_videos", "Videos by state", labels=["state"])
        for status in STATUSES:
            videos.add_metric([status], counts[status])
        yield videos
        running_steps = sum(state.step for state in states if not state.is_final)
        yield CounterMetricFamily(
            "wan_dist_steps", "Denoising steps completed", value=totals.num_steps + running_steps
        )
        num_steps, seconds = totals.step_seconds
        yield SummaryMetricFamily(
            "wan_dist_step_seconds",
            "Seconds of a denoising step",
            count_value=num_steps,
            sum_value=seconds,
        )
        stages = SummaryMetricFamily(
            "wan_dist_stage_seconds", "Seconds of a video's stage", labels=["stage"]
        )
        for stage, (count, stage_seconds) in sorted(totals.stage_seconds.items()):
            stages.add_metric([stage], count, stage_seconds)
        yield stages
