"""Malformed inputs, all of them: each ends in one clear error before weights are read, or in a
correct result.
"""

import json
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.random_checkpoint import make_checkpoint
from tests.malformed import checkpoints, images, job_files, kept_latents, prompts, settings
from tests.malformed.case import DIMS, WHOLE, Case
from wan_dist.run import main
from wan_dist.runtime.errors import InputError, format_message
from wan_dist.runtime.log import configure_logging
from wan_dist.weights.files import TensorFiles

KINDS = {
    "jobs": job_files.CASES,
    "settings": settings.CASES,
    "prompts": prompts.CASES,
    "images": images.CASES,
    "checkpoints": checkpoints.CASES,
    "latents": kept_latents.CASES,
}
TABLE = [
    pytest.param(case, id=f"{kind}: {case.name}".encode("unicode_escape").decode())
    for kind, cases in KINDS.items()
    for case in cases
]
OBEYED = (
    *range(32),
    *range(127, 160),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    0x2028,
    0x2029,
)
STRANGE = {chr(code) for code in OBEYED} - set("\n\r")
"""What a terminal obeys rather than shows, but for the ends of lines."""
CPU_SECONDS = 20
"""The most that a case may compute; what counts to 2^60 takes longer."""
SECONDS = 300
"""The longest that a case may take, on a machine with much else to do; what waits for a pipe takes longer."""
BYTES = 4 * 2**30
"""The most that a case may allocate."""


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, DIMS)
    return folder


@pytest.fixture
def place(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in an empty folder, two below that which is watched, with a home and a cache of one's own."""
    place = tmp_path / "watched/here"
    place.mkdir(parents=True)
    (tmp_path / "watched/home").mkdir()
    (place / WHOLE).symlink_to(whole)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["wan_dist"])
    monkeypatch.setenv("HOME", str(tmp_path / "watched/home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return place


@pytest.fixture(autouse=True)
def _limits() -> Iterator[None]:
    """End what hangs, and what allocates as much as a broken file asks for."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"not done after {CPU_SECONDS} s of computing, or {SECONDS} s")

    before = {name: signal.signal(name, give_up) for name in (signal.SIGALRM, signal.SIGPROF)}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, limits[1]))
    signal.alarm(SECONDS)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    yield
    signal.alarm(0)
    signal.setitimer(signal.ITIMER_PROF, 0)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    for name, handler in before.items():
        signal.signal(name, handler)


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return kind, size and time of change of everything in a folder but for the results."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if name.parts[:2] != ("here", "outputs") and name != Path("here"):
            status = path.lstat()
            found[str(name)] = (
                status.st_mode,
                0 if path.is_dir() else status.st_size,
                0 if path.is_dir() else status.st_mtime_ns,
            )
    return found


def outcome(case: Case, arguments: list[str]) -> tuple[int, Any]:
    """Return the exit code, and what a correct result is."""
    if case.read is None:
        named = any(argument.startswith("ckpt_dir=") for argument in arguments)
        code = main(arguments if named else [*arguments, f"ckpt_dir={WHOLE}"])
        records = sorted(Path("outputs").glob("*.json"))
        return code, json.loads(
            records[0].read_text(encoding="utf-8")
        ) if code == 0 and records else None
    configure_logging()
    try:
        return 0, case.read(arguments)
    except InputError as fault:
        sys.stderr.write(f"wan_dist: error: {format_message(fault)}\n")
        return 2, None


@pytest.mark.parametrize("case", TABLE)
def test_one_clear_error_or_a_correct_result(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = list(case.make(place))
    before, reads = tree(place.parent) | tree(place / WHOLE), []
    for name in ("read", "read_rows"):
        original = getattr(TensorFiles, name)
        monkeypatch.setattr(
            TensorFiles,
            name,
            lambda *given, original=original: reads.append(given) or original(*given),
        )
    code, result = outcome(case, arguments)
    told = capfd.readouterr()
    assert tree(place.parent) | tree(place / WHOLE) == before, (
        "something was written outside the output folder, or code ran"
    )
    shown = told.out + told.err
    assert not [sign for sign in shown if sign in STRANGE], "control characters reach the terminal"
    assert "Traceback" not in shown
    if not case.says:
        assert case.check is not None
        assert code == 0, told.err
        case.check(result, place / "outputs")
        return
    errors = [line for line in told.err.split("\n") if line.startswith("wan_dist: error: ")]
    assert code == 2, told.err
    assert told.err.endswith(f"{errors[0]}\n")
    assert len(errors) == 1
    assert not [part for part in case.says if part not in errors[0]], errors[0]
    assert len(errors[0]) < 2500
    assert not reads, "weights were read before the checks"
    left = [str(path.relative_to(place)) for path in (place / "outputs").rglob("*")]
    assert not left, "a run that was refused left files"


def test_the_table_is_whole() -> None:
    """No case is in it twice, each says what it expects, and none expects both."""
    names = [param.id for param in TABLE]
    assert not {name for name in names if names.count(name) > 1}
    assert all(
        all(case.says) and bool(case.says) != bool(case.check)
        for cases in KINDS.values()
        for case in cases
    )
    assert {kind: len(cases) for kind, cases in KINDS.items() if len(cases) < 15} == {}
