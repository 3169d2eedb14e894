"""What a rank does at the end of a run, however it ends."""

import pytest

from wan_dist import run
from wan_dist.runtime.environment import RankLayout
from wan_dist.runtime.signals import PreemptionInterrupt


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt("^C"),
        SystemExit(3),
        MemoryError("host"),
        PreemptionInterrupt("SIGTERM"),
        ValueError("x"),
    ],
)
def test_the_others_learn_of_a_rank_that_ends_whatever_ends_it(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that leaves without a word is waited for, while it waits for the others: Ctrl-C on one of
    several ranks hung the run.

    It says what it met before it leaves: the others end then, and torchrun, which sees one of them
    go, asks this one to end as well.
    """
    told: list[str] = []

    class Others:
        def __init__(self, ranks: RankLayout, timeout: float) -> None:
            pass

        def announce_failure(self, kind: str, text: str) -> None:
            told.append("failed")

        def is_reported_by_lower_rank(self, text: str) -> bool:
            return False

        def leave(self) -> None:
            told.append("left")

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("wan_dist.parallel.team.Coordinator", Others)

    def report(fault: BaseException, ranks: RankLayout) -> int:
        told.append("said")
        return 1

    monkeypatch.setattr(run, "collect_rank_facts", fail)
    monkeypatch.setattr(run, "_report_failure", report)
    if isinstance(error, Exception | PreemptionInterrupt):
        assert (
            run._run_on_several_ranks(["task=toy", "prompt=a ball", "device=cpu"], RankLayout())
            == 1
        )
        assert told == ["failed", "said", "left"]
    else:
        with pytest.raises(type(error)):
            run._run_on_several_ranks(["task=toy", "prompt=a ball", "device=cpu"], RankLayout())
        assert told == ["failed", "left"]
