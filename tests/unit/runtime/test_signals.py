"""What signals do to a run: noted or raised as the run wants it, from its first moment on; a second
one ends it at once.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from wan_dist import run
from wan_dist.parallel import team
from wan_dist.runtime import signals as module
from wan_dist.runtime.environment import RankLayout
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.signals import (
    EXIT_PREEMPTED,
    PreemptionInterrupt,
    exit_on_signal,
    handle_signals,
    preemption,
)
from wan_dist.tasks import run_config

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


pytestmark = pytest.mark.usefixtures("restored_signals")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Codes with which the process would have ended at once."""
    codes: list[int] = []
    monkeypatch.setattr(module.os, "_exit", codes.append)
    return codes


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def send_and_wait(number: int) -> None:
    send(number)
    time.sleep(5)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_asks_a_run_to_end(number: signal.Signals) -> None:
    with handle_signals():
        with (
            pytest.raises(
                PreemptionInterrupt, match=f"received {number.name}; run the same command again"
            ),
            preemption.interruptible(),
        ):
            send_and_wait(number)
        assert preemption.requested_by == number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_step_is_finished_first(number: signal.Signals) -> None:
    with handle_signals(), preemption.interruptible(), preemption.deferred_after_check():
        send(number)
        time.sleep(0.01)
        assert preemption.requested_by == number


def test_what_came_too_early_or_was_swallowed_is_heeded_later() -> None:
    with handle_signals():
        send(signal.SIGTERM)
        with pytest.raises(PreemptionInterrupt), preemption.interruptible():
            pytest.fail("it was asked before")
        preemption.is_deferred = False
        with pytest.raises(PreemptionInterrupt), preemption.deferred_after_check():
            pytest.fail("it was asked before")


def test_while_modules_are_imported_it_just_ends(
    ends: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    exit_on_signal()
    for number in SIGNALS:
        send(number)
    time.sleep(0.01)
    assert ends == [EXIT_PREEMPTED] * 4
    assert "received SIGHUP before the run began" in capfd.readouterr().err


def test_what_is_ignored_stays_ignored(ends: list[int]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    exit_on_signal()
    send(signal.SIGHUP)
    with handle_signals(), preemption.interruptible():
        send(signal.SIGHUP)
        time.sleep(0.01)
        assert preemption.requested_by is None
    assert not ends


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGTERM, 143),
        (signal.SIGINT, signal.SIGTERM, 143),
        (signal.SIGUSR1, signal.SIGTERM, None),
        (signal.SIGHUP, signal.SIGINT, None),
        (signal.SIGTERM, signal.SIGUSR1, None),
    ],
)
def test_a_second_one_ends_at_once(
    first: int, second: int, code: int | None, ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DUPLICATE_SIGNAL_SECONDS", 0.05)
    with handle_signals():
        send(first)
        time.sleep(0.1)
        send(second)
        time.sleep(0.05)
    assert ends == ([] if code is None else [code])


def test_an_echo_is_no_second_one(ends: list[int]) -> None:
    with handle_signals():
        for _ in range(3):
            send(signal.SIGINT)
            time.sleep(0.02)
    assert not ends


def test_the_command_keeps_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(arguments: list[str]) -> list[str]:
        send_and_wait(signal.SIGHUP)
        return arguments

    monkeypatch.setattr(sys, "argv", ["wan_dist"])
    monkeypatch.setattr(run_config, "prepare_arguments", asked)
    assert run.main(["task=toy"]) == EXIT_PREEMPTED
    assert (
        "wan_dist: received SIGHUP; run the same command again to continue"
        in capsys.readouterr().err
    )


def test_an_error_keeps_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(arguments: list[str]) -> list[str]:
        raise InputError("no such thing")

    def told(message: object) -> str:
        send(signal.SIGTERM)
        time.sleep(0.01)
        return str(message)

    monkeypatch.setattr(run_config, "prepare_arguments", refused)
    monkeypatch.setattr(run, "format_message", told)
    assert run.main(["task=toy"]) == 2
    assert "no such thing" in capsys.readouterr().err


def test_handlers_come_before_heavy_imports() -> None:
    lines = Path(run.__file__).read_text(encoding="utf-8").splitlines()
    assert lines.index(
        "    exit_on_signal()  # before the imports below, which take a second"
    ) < lines.index("from wan_dist.tasks.run_config import read_config")


def test_ranks_that_never_came_are_not_waited_for_after_ctrl_c(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = HashStore()
    monkeypatch.setattr(team, "open_stores", lambda ranks, timeout, **_: (store, store))
    alone = team.Coordinator(RankLayout(0, 4, 0, 4), timeout_seconds=600)
    preemption.requested_by = signal.SIGINT
    began = time.monotonic()
    alone.leave()
    assert time.monotonic() - began < 60  # it has the store, and stays for two seconds
