"""All ranks of a run, reached without a collective: coordinators in one process stand for them."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from wan_dist.parallel import rendezvous
from wan_dist.parallel import team as module
from wan_dist.parallel.team import Coordinator, RankError, RankFailure
from wan_dist.runtime.environment import RankLayout
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger
from wan_dist.runtime.signals import preemption

MakeCoordinators = Callable[..., list[Coordinator]]


@pytest.fixture(autouse=True)
def _short_times_and_a_log_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {
        "_BEAT": 0.05,
        "_WATCH": 0.01,
        "_LEAVING": 0.3,
        "_GONE": 0.6,
        "GRACE": 0.1,
    }.items():
        monkeypatch.setattr(module, f"{name}_SECONDS", seconds)
    monkeypatch.setattr(module, "_num_coordinators", Counter())
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return number


@pytest.fixture
def make_coordinators(port: int) -> Iterator[MakeCoordinators]:
    made: list[Coordinator] = []

    def make(num_ranks: int, missing: int = 0) -> list[Coordinator]:
        made.extend(
            Coordinator(RankLayout(rank, num_ranks, rank, num_ranks), 5)
            for rank in range(num_ranks - missing)
        )
        return made

    yield make
    for coordinator in made:  # lets those go that still wait to leave
        coordinator.add_to_counter(f"left/{coordinator.rank}")
    for coordinator in made:
        kill(coordinator)


@pytest.fixture
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4)


def kill(coordinator: Coordinator) -> None:
    """Let a rank give no sign of life any more."""
    coordinator._stop_event.set()
    if coordinator._watcher_thread is not None:
        coordinator._watcher_thread.join()


def later(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() > until


def results(futures: list[Future[Any]]) -> list[Any]:
    return [future.result(timeout=120) for future in futures]


def test_values_are_gathered_in_the_order_of_ranks(
    make_coordinators: MakeCoordinators, pool: ThreadPoolExecutor
) -> None:
    coordinators = make_coordinators(3)
    for values in ("abc", "xyz"):
        futures = []
        for coordinator in reversed(coordinators):  # the last one comes first
            futures.append(pool.submit(coordinator.gather, values[coordinator.rank], "meet"))
            time.sleep(0.02)
        assert results(futures) == [list(values)] * 3


def test_what_the_first_rank_makes_is_shared(
    make_coordinators: MakeCoordinators, pool: ThreadPoolExecutor
) -> None:
    coordinators, made = make_coordinators(3), []

    def make(rank: int) -> dict[str, int]:
        made.append(rank)
        return {"made by": rank}

    for _ in range(2):
        shared = [
            pool.submit(
                coordinator.run_on_first_rank, lambda rank=coordinator.rank: make(rank), "plan"
            )
            for coordinator in coordinators
        ]
        assert results(shared) == [{"made by": 0}] * 3
    assert made == [0, 0]


def test_a_value_may_be_larger_than_the_store_takes(make_coordinators: MakeCoordinators) -> None:
    first, second = make_coordinators(2)
    value = bytes(range(256)) * 2**15 + b"the end"  # over 8 MiB
    assert (second.has("v"), second.get("v")) == (False, None)
    first.put("v", value)
    second.wait_until(lambda: second.has("v"), "read it", [0])
    assert second.get("v") == value


def test_who_waits_for_a_rank_that_has_failed_learns_why(
    make_coordinators: MakeCoordinators, pool: ThreadPoolExecutor
) -> None:
    first, second, third = make_coordinators(3)
    gathering = [pool.submit(coordinator.gather, None, "plan") for coordinator in (first, third)]
    time.sleep(0.05)
    second.announce_failure("input", "image=a.png cannot be read")
    for future in gathering:
        with pytest.raises(
            RankError, match=rf"image=a.png cannot be read \(rank 1 on {socket.gethostname()}\)"
        ) as raised:
            future.result(timeout=120)
        assert raised.value.fault == RankFailure(
            1, socket.gethostname(), "input", "image=a.png cannot be read"
        )


def test_a_rank_without_a_sign_of_life_is_not_waited_for(
    make_coordinators: MakeCoordinators,
) -> None:
    first, second, _ = make_coordinators(4, missing=1)
    with pytest.raises(RankError, match="no heartbeat from rank 3 on an unknown host"):
        first.wait_until(later(5), "plan", [0, 1, 2, 3], patience_seconds=0.3)
    kill(second)
    with pytest.raises(
        RankError,
        match=rf"no heartbeat from rank 1 on {socket.gethostname()}, which others waited for to plan",
    ):
        first.wait_until(later(5), "plan", [0, 1, 2], patience_seconds=0.5)


def test_a_rank_that_has_left_is_not_lost(make_coordinators: MakeCoordinators) -> None:
    first, second = make_coordinators(2)
    second.add_to_counter("left/1")
    kill(second)
    first.wait_until(later(0.5), "plan", [1], patience_seconds=0.1)


def test_a_slow_rank_is_waited_for(make_coordinators: MakeCoordinators) -> None:
    first, _ = make_coordinators(2)
    first.wait_until(later(1.2), "plan", [1], patience_seconds=0.3)


def test_ranks_that_have_not_come_are_named(
    make_coordinators: MakeCoordinators,
    port: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.05)
    first, _ = make_coordinators(4, missing=2)
    first.wait_until(later(0.2), "plan", [1, 2, 3])
    assert f"waiting for 2 of 4 ranks (2, 3) at 127.0.0.1:{port}" in caplog.messages


def test_one_rank_says_an_error_that_several_meet(make_coordinators: MakeCoordinators) -> None:
    first, second, third = make_coordinators(3)
    assert not first.is_reported_by_lower_rank("no room")
    assert not second.is_reported_by_lower_rank("no room")  # the first has met none
    threading.Timer(0.1, first.announce_failure, ("input", "no room")).start()
    assert second.is_reported_by_lower_rank("no room")
    assert third.is_reported_by_lower_rank("no room")
    assert not second.is_reported_by_lower_rank("another one")


def test_all_leave_together(make_coordinators: MakeCoordinators, pool: ThreadPoolExecutor) -> None:
    coordinators = make_coordinators(3)
    leaving = [pool.submit(coordinator.leave) for coordinator in coordinators[:2]]
    time.sleep(0.2)
    assert not any(future.done() for future in leaving)  # the third is at work
    results([*leaving, pool.submit(coordinators[2].leave)])


def test_one_that_is_gone_keeps_nobody_from_leaving(
    make_coordinators: MakeCoordinators, pool: ThreadPoolExecutor
) -> None:
    first, *others = make_coordinators(3)
    kill(first)
    results([pool.submit(coordinator.leave) for coordinator in others])


@pytest.mark.parametrize(
    "end",
    [
        lambda coordinator: coordinator.add_to_counter("work/1/faults"),
        lambda coordinator: coordinator.announce_failure("input", "no room"),
        kill,
    ],
)
def test_work_is_broken_off_where_another_rank_ends(
    end: Callable[[Coordinator], None], make_coordinators: MakeCoordinators
) -> None:
    first, second = make_coordinators(2)
    woken = threading.Event()
    first.start_watching("work/1", [0, 1], woken.set)
    assert not woken.wait(0.8)
    end(second)
    assert woken.wait(5)


def test_a_rank_that_the_launcher_says_is_dead_is_given_up_sooner(
    make_coordinators: MakeCoordinators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GONE_SECONDS", 60.0)
    monkeypatch.setattr(module, "_SUSPECTED_SECONDS", 0.6)
    first, second = make_coordinators(2)
    woken = threading.Event()
    first.start_watching("work/1", [0, 1], woken.set)
    kill(second)
    assert not woken.wait(1.5)
    monkeypatch.setattr(preemption, "has_lost_peer", True)
    assert woken.wait(5)


def test_a_port_that_another_has_is_named(port: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(
            InputError,
            match=f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port} cannot be listened on: ",
        ):
            Coordinator(RankLayout(0, 2, 0, 2), 2)


def test_a_first_rank_that_does_not_come_is_named(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "_PATIENCE_SECONDS", 0.1)
    with pytest.raises(RuntimeError) as raised:
        Coordinator(RankLayout(1, 2, 1, 2), 0.5)
    assert raised.value.__notes__ == [f"waiting for rank 0 at 127.0.0.1:{port}"]
    assert f"waiting for rank 0 at 127.0.0.1:{port}" in caplog.text
