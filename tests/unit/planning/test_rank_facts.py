"""Ranks that cannot work together are told so before they plan, all of them the same."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from wan_dist.config.output_section import OutputConfig
from wan_dist.config.schema import RunConfig, read_all_settings
from wan_dist.config.sections import ParallelConfig
from wan_dist.planning.rank_facts import RankFacts, check_ranks_match, collect_rank_facts
from wan_dist.runtime.errors import InputError


def facts_of(rank: int, host: str = "one", **changed: object) -> RankFacts:
    made = RankFacts(
        {"seed": 1, "jobs": "jobs.txt", "output.dir": "out"},
        {"jobs": "abc"},
        f"GPU-{rank}",
        (90, 70, 80)[rank % 3],
        host,
    )
    return replace(made, **changed)  # type: ignore[arg-type]


def settings_of(**changed: object) -> dict[str, object]:
    return read_all_settings(
        RunConfig(task="toy", size="64*64", frame_num=5, fps=16, **changed)  # type: ignore[arg-type]
    )


def test_the_least_memory_is_planned_with() -> None:
    assert check_ranks_match([facts_of(rank) for rank in range(3)]) == 70
    assert (
        check_ranks_match([facts_of(rank, gpu=None, gpu_bytes=None) for rank in range(3)]) is None
    )
    assert check_ranks_match([facts_of(0)]) == 90


def test_a_setting_that_differs_is_named_with_both_values() -> None:
    other = facts_of(2, "two", settings={"seed": 7, "jobs": "jobs.txt", "output.dir": "out"})
    with pytest.raises(
        InputError,
        match=r"seed is 1 on rank 0 and 7 on rank 2 \(two\); give all ranks the same settings",
    ):
        check_ranks_match([facts_of(0), facts_of(1), other])


def test_another_jobs_file_is_refused_and_one_that_a_rank_does_not_see_is_not() -> None:
    assert check_ranks_match([facts_of(0), facts_of(1, files={})]) == 70
    assert check_ranks_match([facts_of(0, files={}), facts_of(1)]) == 70
    with pytest.raises(
        InputError, match=r"jobs=jobs.txt differs between rank 1 \(two\) and rank 0 \(one\)"
    ):
        check_ranks_match([facts_of(0), facts_of(1, "two", files={"jobs": "xyz"})])


def test_two_ranks_do_not_share_a_gpu() -> None:
    same = {"gpu": "GPU-0"}
    assert check_ranks_match([facts_of(0, **same), facts_of(1, "two", **same)]) == 70
    with pytest.raises(
        InputError, match=r"ranks 1 and 2 on one use the same GPU \(GPU-1\).*CUDA_VISIBLE_DEVICES"
    ):
        check_ranks_match([facts_of(0), facts_of(1), facts_of(2, gpu="GPU-1")])


@pytest.mark.parametrize("without", [0, 1])
def test_a_rank_with_no_gpu_among_others_is_named(without: int) -> None:
    facts = [facts_of(rank, f"host-{rank}") for rank in range(2)]
    facts[without] = replace(facts[without], gpu=None, gpu_bytes=None)
    has = 1 - without
    with pytest.raises(
        InputError,
        match=f"rank {without} on host-{without} has no GPU, and rank {has} on host-{has} has",
    ):
        check_ranks_match(facts)


def test_settings_are_compared_with_their_dotted_keys() -> None:
    first = settings_of(output=OutputConfig(dir="a"), parallel=ParallelConfig(timeout=60))
    facts = [
        collect_rank_facts(first, "GPU-0", 90),
        collect_rank_facts(settings_of(output=OutputConfig(dir="b")), "GPU-1", 80),
    ]
    assert facts[0].settings["parallel.timeout"] == 60
    with pytest.raises(InputError, match=r"parallel.timeout is 60 on rank 0 and 600.0 on rank 1"):
        check_ranks_match(facts)
    with pytest.raises(InputError, match=r"output.dir is a on rank 0 and b on rank 1"):
        check_ranks_match(
            [
                collect_rank_facts(settings_of(output=OutputConfig(dir=name)), None, None)
                for name in "ab"
            ]
        )


@pytest.mark.parametrize("key", ["jobs", "image", "first_frame", "last_frame", "camera", "latents"])
def test_files_of_one_name_are_told_apart(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = []
    for rank, content in enumerate(["a", "b", "a", None]):  # nodes have folders of their own
        node = tmp_path / str(rank)
        node.mkdir()
        monkeypatch.chdir(node)
        if content is not None:
            Path("given").write_text(content)
        facts.append(collect_rank_facts(settings_of(**{key: "given"}), None, None))
    assert check_ranks_match([facts[0], facts[2], facts[3]]) is None
    with pytest.raises(InputError, match=f"{key}=given differs between rank 1"):
        check_ranks_match(facts)


def test_files_of_a_folder_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = []
    for rank in (0, 1):
        folder = tmp_path / str(rank) / "driving"
        folder.mkdir(parents=True)
        for name in ("src_pose.mp4", "src_face.mp4", "src_ref.png"):
            (folder / name).write_text(f"{name} {rank if name == 'src_face.mp4' else ''}")
        monkeypatch.chdir(folder.parent)
        facts.append(collect_rank_facts(settings_of(src_root_path="driving"), None, None))
    with pytest.raises(InputError, match=r"src_face=driving/src_face.mp4 differs between rank 1"):
        check_ranks_match(facts)


def test_a_file_that_cannot_be_read_is_no_fact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with it is said as settings are checked, in an error of its own."""

    def forbid(*arguments: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "forbidden").write_text("")
    monkeypatch.setattr(Path, "open", forbid)
    for name in ("a" * 300, str(tmp_path / "forbidden"), str(tmp_path), "missing"):
        assert collect_rank_facts(settings_of(image=name), None, None).files == {}
