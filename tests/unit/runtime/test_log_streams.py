"""Whoever reads what a run prints, or its events, may go away: the run goes on."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from wan_dist.jobs import events as module
from wan_dist.jobs.events import JobEvents
from wan_dist.runtime.environment import RankLayout
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import add_log_file, configure_logging, logger

PRINTING = """
import sys
from wan_dist.runtime.log import logger, configure_logging, protect_streams
protect_streams()
configure_logging()
from tqdm import tqdm
for _ in tqdm(range(3), mininterval=0):
    print("out")
    logger.info("log")
    sys.stdout.flush()
open(sys.argv[1], "w").write("done")
"""


@pytest.fixture(autouse=True)
def _a_log_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)


@pytest.mark.parametrize("how", ["no reader", "full disk", "closed"])
def test_printing_never_fails(how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PRINTING, str(tmp_path / "done")]
    if how == "no reader":
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(command, stdout=writer, stderr=writer, check=False)
        os.close(writer)
    elif how == "full disk":
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command, stdout=full, stderr=full, check=False)
    else:
        done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=False)
    assert done.returncode == 0
    assert (
        tmp_path / "done"
    ).read_text() == "done"  # and nothing that was printed, where descriptors were closed


def test_what_can_be_written_is(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTING, str(tmp_path / "done")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()) == (0, ["out"] * 3)
    assert done.stderr.count("] log\n") == 3
    assert "3/3" in done.stderr


def test_lines_of_all_ranks_and_levels_have_their_text_in_one_column(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = [RankLayout(rank, 12, rank, 12) for rank in (0, 11)]
    for layout in ranks:
        monkeypatch.setattr("wan_dist.runtime.log.read_rank_layout", lambda layout=layout: layout)
        configure_logging()
        logger.info("note      text")
        logger.warning("text")
        logger.error("text")
    lines = capsys.readouterr().err.splitlines()
    assert [line[line.index("]") + 2 :].split()[0] for line in lines] == [
        *("note", "warning", "error"),
        "error",  # other ranks print errors only
    ]
    assert len({line.index("text") for line in lines}) == 1


def test_a_log_file_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank-0.log").symlink_to("/dev/full")
    add_log_file(tmp_path)
    logger.error("lost")
    (handler,) = logger.handlers
    handler.stream.close()  # type: ignore[attr-defined]
    assert "Logging error" not in capsys.readouterr().err


class Counts(dict[str, int]):
    def __missing__(self, key: str) -> int:
        return 0


def events(target: Path) -> JobEvents:
    return JobEvents(str(target), 2, Counts())  # type: ignore[arg-type]


def jobs_in(text: str) -> list[str]:
    return [json.loads(line)["job"] for line in text.splitlines()]


def test_a_disk_that_fills_up_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "events"
    told = events(file)
    told.write_event("done", job="a")
    write, room = os.write, [7]

    def short(number: int, data: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(number, data[: room.pop()])

    with monkeypatch.context() as full:
        full.setattr(module.os, "write", short)
        told.write_event("done", job="b")
        told.write_event("done", job="c")
    told.write_event("done", job="d")
    lines = file.read_text().splitlines()
    assert (jobs_in(lines[0]), lines[1], jobs_in(lines[2])) == (
        ["a"],
        '{"time"'[:7],
        ["d"],
    )  # what was cut short ends in its own line
    assert caplog.text.count("No space left on device") == 1


def test_a_pipe_without_a_reader(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    told = events(pipe)
    told.write_event("done", job="nobody reads")
    for name in "ab":  # one reader after the other
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        told.write_event("done", job=name)
        told.write_event("done", job=f"{name}2")
        assert jobs_in(os.read(reader, 10000).decode()) == [name, f"{name}2"]
        os.close(reader)
        told.write_event("done", job="nobody reads")
    assert len(caplog.messages) == 1


def test_a_reader_that_is_slow_gets_whole_lines(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    told = events(pipe)
    os.set_blocking(reader, True)
    found: list[bytes] = []

    def read() -> None:
        while data := os.read(reader, 1000):
            found.append(data)

    thread = threading.Thread(target=read)
    thread.start()
    names = [f"{index}" * 2000 for index in range(40)]
    for name in names:
        told.write_event("done", job=name)
    assert told._pipe_descriptor is not None
    os.close(told._pipe_descriptor)
    thread.join()
    os.close(reader)
    assert jobs_in(b"".join(found).decode()) == names


@pytest.mark.parametrize("target", [".", "none/events"])
def test_what_cannot_be_written_at_the_start_is_refused(target: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        events(tmp_path / target)


@pytest.mark.parametrize(("target", "code"), [("/dev/full", 2), ("/dev/null", 0)])
def test_a_plan_that_cannot_be_printed(target: str, code: int) -> None:
    command = [sys.executable, "-m", "launch", "plan", "task=t2v-1.3B", "gpus=24GB", "host=64GB"]
    with Path(target).open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == code
    assert done.stderr == (
        "launch: error: standard output is incomplete: No space left on device\n" if code else ""
    )
