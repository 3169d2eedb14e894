"""How ranks are cut into replicas for a file of jobs."""

import pytest

from wan_dist.config.schema import RunConfig
from wan_dist.jobs.replicas import assign_degrees
from wan_dist.planning.plan import make_plan
from wan_dist.runtime.errors import InputError
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
