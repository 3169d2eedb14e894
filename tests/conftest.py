import gc
import os
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.composing import parse_once
from wan_dist.runtime import signals

FIXTURES = Path(__file__).parent / "fixtures"
SHARED_GOLDENS = Path(__file__).parents[2] / "shared" / "goldens"


def has_golden(name: str) -> bool:
    return (FIXTURES / name).exists() or (SHARED_GOLDENS / name).exists()


def golden_folder(name: str) -> Path:
    """Return a golden checkpoint's folder: the one that travels with the code, or one of the larger
    set beside the checkout.
    """
    if not has_golden(name):
        pytest.skip(f"the golden {name} is not beside this checkout")
    here = FIXTURES / name
    return here if here.exists() else SHARED_GOLDENS / name


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def pytest_configure() -> None:
    parse_once()


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What earlier tests, or the user's runs, have encoded must not stand in for encoding it."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _keyboard_signals_are_not_ignored() -> None:
    """A shell ignores them in what it starts in the background, and so would all that is started here."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGQUIT: signal.SIG_DFL}
    for number, handler in defaults.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture
def restored_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After the test signals are handled as before it, and what has watched for them has ended.

    A run that was ended by a signal goes on watching, as its process would end too; what it logs a little
    later would reach another test.
    """
    monkeypatch.setattr(signals, "_log_preemption_request", lambda: None)
    handlers = {number: signal.getsignal(number) for number in signals._PREEMPTION_SIGNALS}
    earlier_threads, wakeup = set(threading.enumerate()), signal.set_wakeup_fd(-1)
    yield
    if (write_end := signal.set_wakeup_fd(wakeup)) != -1:
        os.close(write_end)
    for thread in set(threading.enumerate()) - earlier_threads:
        if thread.name == signals.WATCHER_NAME:
            thread.join(timeout=5)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signals.preemption.reset()


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collections, of which each run of the command does several."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else triton takes what is imported for leaks, and says so


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    value, reference = value.double().cpu(), reference.double().cpu()
    return ((value - reference).norm() / reference.norm()).item()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say of each group of tests how many ran, and of those that were skipped why."""
    num_run, reasons = Counter[str](), defaultdict[str, Counter[str]](Counter)
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            num_run[_group_of(report.nodeid)] += 1
    for report in terminalreporter.stats.get("skipped", ()):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[_group_of(report.nodeid)][reason.removeprefix("Skipped: ")] += 1
    terminalreporter.section("groups of tests")
    for group in sorted(num_run | reasons):
        skipped = "; ".join(f"{count} skipped: {why}" for why, count in reasons[group].items())
        terminalreporter.write_line(f"{group:24} {num_run[group]:5} ran  {skipped}".rstrip())


def _group_of(nodeid: str) -> str:
    """Return the folder of a test, or its file where it lies in no folder."""
    parts = nodeid.partition("::")[0].removeprefix("tests/").split("/")
    return "/".join(parts[:-1]) or parts[-1].removesuffix(".py")
