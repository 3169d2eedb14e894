"""The page of a run that goes on: written beside it, never twice at once, for a small part of the time."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gallery_folder import RUN, write_record
from wan_dist.jobs import run_log as chronicle
from wan_dist.jobs.run_log import RunLog
from wan_dist.output.gallery import records
from wan_dist.output.gallery.background import PageWriter
from wan_dist.output.gallery.records import RecordCache, read_records
from wan_dist.runtime.signals import preemption

STANDING = {"done": 1, "failed": 0}


def chronicle_in(folder: Path) -> RunLog:
    write_record(folder, "one")
    return RunLog(folder, RUN, [], 1, 3, {"text": {"began": 1.8e9, "seconds": 2.0}})


def wait_for(answer: Any) -> None:
    until = time.monotonic() + 60
    while not answer():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_page_is_written_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chronicle, "_MIN_PAGE_INTERVAL_SECONDS", 0.0)
    kept = chronicle_in(tmp_path)
    monkeypatch.setattr(
        PageWriter, "write", lambda *_: pytest.fail("it was written in the run's own process")
    )
    kept.write_page(STANDING)
    assert not (tmp_path / "index.html").exists(), "nobody has waited"
    wait_for((tmp_path / "index.html").exists)
    monkeypatch.undo()
    assert kept._page_process is not None
    wait_for(
        lambda: (
            kept.write_page(STANDING) or not kept._page_process or not kept._page_process.is_busy
        )
    )
    told = json.loads((tmp_path / "runs" / f"{RUN}.json").read_text())
    assert (told["jobs"], told["ended"], told["spans"][0]["stage"]) == (3, None, "text")
    assert {span["job"] for span in told["spans"][1:]} == {"one"}
    write_record(tmp_path, "two")
    kept.write_page(STANDING, has_ended=True)
    assert kept._page_process._process is None
    assert "two" in (tmp_path / "index.html").read_text()
    assert json.loads((tmp_path / "runs" / f"{RUN}.json").read_text())["ended"] is not None


class Slow:
    """In place of the process: each page takes ``took`` seconds, by a clock of its own."""

    def __init__(self, took: float) -> None:
        self.took, self.now, self.began, self.num = took, 0.0, 0.0, 0
        self.is_busy = False

    def start_writing(self, request: object) -> None:
        assert not self.is_busy, "never two at once"
        self.is_busy, self.began, self.num = True, self.now, self.num + 1

    def poll_write_seconds(self) -> float | None:
        if self.now < self.began + self.took:
            return None
        self.is_busy = False
        return self.took


@pytest.mark.parametrize(("took", "most"), [(0.1, 60), (10, 19), (300, 1)])
def test_pages_take_a_twentieth_of_the_time(
    took: float, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(took)
    monkeypatch.setattr(chronicle.time, "monotonic", lambda: slow.now)
    kept = chronicle_in(tmp_path)
    monkeypatch.setattr(chronicle, "_PageProcess", lambda _: slow)
    for second in range(3600):
        slow.now = float(second)
        kept.write_page(STANDING)
    assert most - 2 <= slow.num <= most
    assert slow.num * took <= 3600 / 10


def test_a_process_that_fails_is_said_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chronicle, "_MIN_PAGE_INTERVAL_SECONDS", 0.0)
    kept = chronicle_in(tmp_path)
    (tmp_path / "runs").write_text("in the way")
    kept.write_page(STANDING)
    wait_for(lambda: kept.write_page(STANDING) or "could not be written" in caplog.text)
    kept._page_process._command = ["false"]  # type: ignore[union-attr]
    kept._page_process.close(wait=True)  # type: ignore[union-attr]
    caplog.clear()
    wait_for(lambda: kept.write_page(STANDING) or "could not be written" in caplog.text)
    kept.write_page(STANDING, has_ended=True)


def test_a_run_requested_to_stop_does_not_write_a_long_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "requested_by", 15)
    kept = chronicle_in(tmp_path)
    kept.write_page(STANDING, has_ended=True)
    assert (tmp_path / "index.html").exists()
    (tmp_path / "index.html").unlink()
    monkeypatch.setattr(chronicle, "_MAX_QUICK_RECORDS", 0)
    kept.write_page(STANDING, has_ended=True)
    assert not (tmp_path / "index.html").exists()


def test_only_changed_records_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        write_record(tmp_path, name)
    (tmp_path / "none.json").write_text("[]")
    read: list[str] = []
    read_object = records.read_json_object
    monkeypatch.setattr(
        records, "read_json_object", lambda path: read.append(path.name) or read_object(path)
    )
    seen: RecordCache = {}
    assert [record.name for record in read_records(tmp_path, seen)] == ["a", "b", "c"]
    assert len(read) == 4
    read.clear()
    assert read_records(tmp_path, seen) == read_records(tmp_path)
    assert len(read) == 4, "all by the one that remembers nothing"
    read.clear()
    write_record(tmp_path, "a", facts={"status": "failed", "error": "no"})
    (tmp_path / "b.json").unlink()
    (tmp_path / "c.mp4").touch()
    write_record(tmp_path, "d")
    found = read_records(tmp_path, seen)
    assert [(record.name, record.status, record.video is not None) for record in found] == [
        ("a", "failed", False),
        ("c", "done", True),
        ("d", "done", False),
    ]
    assert sorted(read) == ["a.json", "c.json", "d.json"]
