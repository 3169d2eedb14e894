"""Which models stay loaded between the videos of a run."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from wan_dist.planning.hardware import Hardware
from wan_dist.planning.plan import RunPlan, make_plan, plan_memory
from wan_dist.planning.residency import can_buffer_frames, can_keep_experts, can_keep_models
from wan_dist.tasks.registry import get_task
from wan_dist.tasks.run_config import read_config

GIB = 2**30


def plan_on(hardware: Hardware, *settings: str) -> RunPlan:
    config = read_config([*settings, "prompt=a cat"])
    assert config is not None
    return plan_memory(make_plan(config), hardware, get_task(config.task).model_dims)


@pytest.mark.parametrize(
    ("settings", "gib", "host", "stay"),
    [
        ("task=t2v-14B", 80, 100, True),
        ("task=t2v-14B memory.dit=resident", 40, 100, True),
        ("task=t2v-14B memory.dit=resident", 31, 100, False),  # not while a video is decoded
        ("task=t2v-14B", 24, 100, True),  # streamed: the host has the weights
        ("task=t2v-14B", 24, 23.6, False),  # but not what decoding takes too
        ("task=t2v-14B memory.dit=disk", 80, 100, False),
        ("task=i2v-14B image=in.png", 48, 100, True),
        ("task=toy", None, 8, True),
    ],
)
def test_which_models_stay(
    settings: str,
    gib: int | None,
    host: float,
    stay: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (832, 480)).save("in.png")
    hardware = Hardware(None if gib is None else gib * GIB, int(host * GIB))
    plan = plan_on(hardware, *settings.split())
    assert can_keep_models(plan) is stay
    assert not can_keep_experts(plan)  # there is one
    if gib is not None and stay:
        less = replace(
            plan, budget=replace(plan.budget, gpu_bytes=plan.stage_memories[-2].gpu_bytes)
        )
        assert not can_keep_models(less)


@pytest.mark.parametrize(
    ("settings", "gib", "stay"),
    [("", 80, True), ("", 52, False), ("memory.dit=stream", 80, False), ("quant=fp8", 48, True)],
)
def test_when_both_experts_stay(settings: str, gib: int, stay: bool) -> None:
    hardware = Hardware(gib * GIB, 100 * GIB)
    plan = plan_on(hardware, "task=t2v-A14B", "size=832*480", *settings.split())
    assert can_keep_experts(plan) is stay
    if stay:
        assert can_buffer_frames(plan, 4)
        assert (
            plan.stage_memories[-2].gpu_bytes + plan.stage_memories[-2].gpu_parts["weights"]
            < gib * GIB
        )


def test_frames_wait_where_the_host_has_room() -> None:
    plan = plan_on(Hardware(80 * GIB, 100 * GIB), "task=t2v-1.3B", "size=832*480")
    most, frames = max(use.host_bytes for use in plan.stage_memories), 81 * 832 * 480 * 3
    for host, does in ((most + 2 * frames, True), (most + 2 * frames - 1, False)):
        assert (
            can_buffer_frames(replace(plan, budget=replace(plan.budget, host_bytes=host)), 1)
            is does
        )
