"""Stage report: peaks of GPU memory with nested stages, on a CUDA memory counter that the test drives."""

import logging
from dataclasses import asdict, dataclass

import pytest
import torch

from wan_dist.output.stage_report import StageReport
from wan_dist.runtime.log import logger
from wan_dist.tasks.run_config import read_config

GIB = 2**30


@dataclass
class FakeCudaMemory:
    """CUDA's counters of allocated bytes."""

    allocated_bytes: int = 0
    peak_bytes: int = 0

    def use(self, gib: int) -> None:
        """Allocate so many GiB and free them."""
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes + gib * GIB)

    def reset_peak(self, device: torch.device) -> None:
        self.peak_bytes = self.allocated_bytes


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> FakeCudaMemory:
    memory = FakeCudaMemory()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "fake")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory.peak_bytes)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", memory.reset_peak)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: memory.peak_bytes)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: memory.allocated_bytes)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    return memory


@pytest.fixture
def report(memory: FakeCudaMemory) -> StageReport:
    config = read_config(["task=t2v-1.3B", "prompt=x", "ckpt_dir=x"])
    assert config is not None
    return StageReport(asdict(config), torch.device("cuda"), quiet=True)


def get_peak(report: StageReport, stage: str) -> float:
    return report.stages[stage]["peak_gpu_gib"]


def fail_in_stage(report: StageReport, memory: FakeCudaMemory, stage: str, gib: int) -> None:
    """Run a stage that fails after using so many GiB, and catch its error."""

    def run_stage() -> None:
        with report.measure_stage(stage):
            memory.use(gib)
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError, match="no memory") as caught:
        run_stage()
    assert f"in stage {stage}" in caught.value.__notes__[0]


def test_the_peak_of_a_stage_is_the_largest_before_in_and_after_its_inner_stages(
    report: StageReport, memory: FakeCudaMemory
) -> None:
    for before, inside, after in ((3, 2, 1), (1, 3, 2), (1, 2, 3)):
        with report.measure_stage("outer"):
            memory.use(before)
            with report.measure_stage("inner"):
                memory.use(inside)
            memory.use(after)
        assert get_peak(report, "outer") == 3
        assert get_peak(report, "inner") == inside


@pytest.mark.parametrize(("before", "inside", "after"), [(5, 2, 1), (1, 5, 2), (1, 2, 5)])
def test_a_failed_inner_stage_that_is_caught_leaves_the_peak_of_the_outer_one_right(
    report: StageReport, memory: FakeCudaMemory, before: int, inside: int, after: int
) -> None:
    with report.measure_stage("outer"):
        memory.use(before)
        fail_in_stage(report, memory, "inner", inside)
        with report.measure_stage("retry"):
            memory.use(1)
        memory.use(after)
    assert get_peak(report, "outer") == 5
    assert get_peak(report, "retry") == 1
    assert "inner" not in report.stages


def test_a_stage_after_a_failed_one_does_not_count_its_peak(
    report: StageReport, memory: FakeCudaMemory
) -> None:
    fail_in_stage(report, memory, "failed", 7)
    with report.measure_stage("next"):
        memory.use(2)
    assert get_peak(report, "next") == 2


def test_a_stage_that_is_concurrent_has_no_gpu_memory(
    report: StageReport, memory: FakeCudaMemory
) -> None:
    with report.measure_stage("outer"):
        memory.use(2)
        with report.measure_stage("save", is_concurrent=True):
            memory.use(4)
    assert "peak_gpu_gib" not in report.stages["save"]
    assert get_peak(report, "outer") == 4


def test_log_lines_have_columns(
    report: StageReport,
    memory: FakeCudaMemory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seconds, memory and details of all stages begin in the same columns; 0.0 is not printed."""
    lines: list[str] = []
    monkeypatch.setattr(
        logger, "log", lambda level, text, *values: lines.append(text % values if level else "")
    )
    report.log_level = logging.INFO
    now = [0.0]
    monkeypatch.setattr("wan_dist.output.stage_report.time.perf_counter", lambda: now[0])
    for name, seconds, gib, detail in (
        ("text", 12.34, 70, "umT5"),
        ("check", 2.0, 0, "output x"),
        ("context high", 1.5, 2, "keys"),
        ("quick", 0.04, 0, "nothing"),
    ):
        with report.measure_stage(name, detail):
            memory.use(gib)
            now[0] += seconds
    report.record_read_speed("quick", 10**7)
    assert lines == [
        "text        12.3 s  GPU  70.0 GiB  umT5",
        "check        2.0 s                 output x",
        "context high 1.5 s  GPU   2.0 GiB  keys",
    ]
