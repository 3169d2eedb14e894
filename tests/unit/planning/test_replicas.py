"""How ranks are cut into replicas for a file of jobs, and which models stay between videos."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from wan_dist.config.schema import RunConfig
from wan_dist.planning.hardware import Hardware
from wan_dist.planning.plan import make_plan, plan_memory
from wan_dist.planning.replicas import assign_degrees
from wan_dist.planning.residency import can_buffer_frames, can_keep_experts, can_keep_models
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import get_task
from wan_dist.tasks.run_config import read_config

GIB = 2**30


def config(*settings: str) -> RunConfig:
    found = read_config([*settings, "prompt=a cat"])
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("task", "settings", "num_jobs", "ranks", "gib", "wanted"),
    [
        ("t2v-14B", "", 100, (8, 8), 80, (8, 1, 1, 1)),  # it fits one GPU
        ("t2v-14B", "", 100, (8, 8), 24, (4, 2, 1, 1)),  # two shards of 12 GiB do
        ("t2v-14B", "", 100, (8, 8), 16, (2, 2, 1, 2)),
        ("t2v-14B", "", 3, (8, 8), 80, (2, 2, 1, 2)),  # no more than jobs
        ("t2v-14B", "", 1, (8, 8), 80, (1, 2, 1, 4)),
        ("t2v-14B", "", 100, (16, 8), 80, (16, 1, 1, 1)),
        ("t2v-14B", "parallel.ulysses=8", 100, (8, 8), 80, (1, 1, 1, 8)),
        ("t2v-14B", "parallel.dp=2 parallel.cfg=1", 100, (8, 8), 80, (2, 1, 1, 4)),
        ("toy", "", 5, (4, 4), None, (4, 1, 1, 1)),
        ("toy", "", 5, (1, 1), None, (1, 1, 1, 1)),
    ],
)
def test_replicas(
    task: str,
    settings: str,
    num_jobs: int,
    ranks: tuple[int, int],
    gib: int | None,
    wanted: tuple[int, int, int, int],
) -> None:
    configs = [config(f"task={task}", *settings.split())] * num_jobs
    found = assign_degrees(configs, *ranks, None if gib is None else gib * GIB)
    assert len(found) == num_jobs
    degrees = {
        (each.parallel.dp, each.parallel.cfg, each.parallel.ring, each.parallel.ulysses)
        for each in found
    }
    assert degrees == {wanted}


def test_degrees_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"parallel\.dp=3 does not fit 8 ranks"):
        assign_degrees([config("task=t2v-14B", "parallel.dp=3")] * 9, 8, 8, 80 * GIB)


MIXED = {
    "guidance": (["task=t2v-14B"], ["task=t2v-14B", "sample.guide_scale=1"]),
    "heads": (["task=t2v-14B", "sample.guide_scale=1"], ["task=t2v-1.3B", "sample.guide_scale=1"]),
    "both": (["task=t2v-14B"], ["task=t2v-1.3B", "sample.guide_scale=1"]),
}


@pytest.mark.parametrize("lines", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("shared", ["", "parallel.ulysses=4", "parallel.usp=xfuser"])
def test_one_mesh_suits_all_jobs_in_either_order(
    lines: tuple[list[str], list[str]], shared: str
) -> None:
    jobs = [config(*line, "size=832*480", *shared.split()) for line in lines]
    meshes = []
    for order in (jobs, jobs[::-1]):
        found = assign_degrees(order, 16, 8, 24 * GIB)
        meshes += [
            make_plan(each, ranks=(16, 8), is_job=True).degrees for each in found
        ]  # refused if it does not suit
    assert len(set(map(str, meshes))) == 1
    assert meshes[0].cfg == 1


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        (
            "guidance",
            "parallel.cfg=2",
            r"parallel\.cfg=2 needs guidance.*some jobs \(second, of t2v-14B\).*use parallel\.cfg=1",
        ),
        (
            "heads",
            "parallel.ulysses=8",
            r"ulysses=8 does not divide the 12 heads of some jobs "
            r"\(second, of t2v-1\.3B\).*may be 1, 2, 4: use",
        ),
        ("heads", "parallel.ulysses=5", r"ulysses=5 does not divide the 12 heads of some jobs"),
        (
            "heads",
            "parallel.ulysses=7",
            r"ulysses=7 does not divide the (40|12) heads of some jobs .* may be 1, 2, 4:",
        ),
    ],
)
def test_given_degrees_that_suit_some_jobs_are_refused_in_either_order(
    kind: str, setting: str, message: str
) -> None:
    jobs = [
        config(*line, f"output.name={name}", setting)
        for name, line in zip(("first", "second"), MIXED[kind], strict=True)
    ]
    for order in (jobs, jobs[::-1]):
        with pytest.raises(InputError, match=message):
            assign_degrees(order, 16, 8, 24 * GIB)


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
    own = config(*settings.split())
    hardware = Hardware(None if gib is None else gib * GIB, int(host * GIB))
    plan = plan_memory(make_plan(own), own, hardware, get_task(own.task).model_dims)
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
    own = config("task=t2v-A14B", "size=832*480", *settings.split())
    plan = plan_memory(
        make_plan(own), own, Hardware(gib * GIB, 100 * GIB), get_task(own.task).model_dims
    )
    assert can_keep_experts(plan) is stay
    if stay:
        assert can_buffer_frames(plan, 4)
        assert (
            plan.stage_memories[-2].gpu_bytes + plan.stage_memories[-2].gpu_parts["weights"]
            < gib * GIB
        )


def test_frames_wait_where_the_host_has_room() -> None:
    own = config("task=t2v-1.3B", "size=832*480")
    plan = plan_memory(
        make_plan(own), own, Hardware(80 * GIB, 100 * GIB), get_task(own.task).model_dims
    )
    most, frames = max(use.host_bytes for use in plan.stage_memories), 81 * 832 * 480 * 3
    for host, does in ((most + 2 * frames, True), (most + 2 * frames - 1, False)):
        assert (
            can_buffer_frames(replace(plan, budget=replace(plan.budget, host_bytes=host)), 1)
            is does
        )
