"""Several runs share an output folder: a name is one's at a time, and what is done must be borne
out by its files.
"""

import errno
import fcntl
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from wan_dist.output.locks import ResultLocks
from wan_dist.planning.digests import FORMAT_VERSION
from wan_dist.runtime.file_hash import hash_file
from wan_dist.runtime.log import logger


@pytest.fixture(autouse=True)
def _a_log_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def plant(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("")


def test_leftovers_go_with_exactly_their_name(tmp_path: Path) -> None:
    of_g5 = [
        ".g5.01234567.partial.mp4",
        ".g5.89abcdef.partial.json",
        ".g5.0123456789ab.state.01234567.partial.safetensors",
        ".g5.preview.01234567.partial.jpg",
        *(f".g5.01234567.partial{suffix}" for suffix in (".webm", ".mov", ".mkv")),
    ]
    of_g55 = [
        ".g5.5.01234567.partial.mp4",
        ".g5.5.latents.01234567.partial.safetensors",
        ".g5.5.89abcdef.partial.safetensors",
    ]
    of_x = [".x.latents.01234567.partial.safetensors", ".x.01234567.partial.png"]
    others = [
        ".g5.mp4.v2.01234567.partial.mp4",
        "g5.mp4",
        ".g5.01234567.partial.html",
        ".g5.mp4",
        ".mp4.01234567.partial",
    ]
    plant(tmp_path, *of_g5, *of_g55, *of_x, *others)
    locks = ResultLocks(tmp_path)
    assert locks.acquire("g5")
    assert {path.name for path in tmp_path.iterdir()} == {".jobs.lock", *of_g55, *of_x, *others}
    assert locks.acquire("g5.5")
    assert locks.acquire("x.latents")
    assert {path.name for path in tmp_path.iterdir()} == {".jobs.lock", *of_x, *others}
    assert locks.acquire("x")
    assert {path.name for path in tmp_path.iterdir()} == {".jobs.lock", *others}
    locks.close()


def test_what_another_is_writing_stays(tmp_path: Path) -> None:
    first, second = ResultLocks(tmp_path), ResultLocks(tmp_path)
    assert first.acquire("a")
    plant(tmp_path, ".a.01234567.partial.mp4")
    assert not second.acquire("a")
    assert (tmp_path / ".a.01234567.partial.mp4").exists()
    first.close()
    assert second.acquire("a")
    assert not (tmp_path / ".a.01234567.partial.mp4").exists()
    second.close()


def test_two_ledgers_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    first, second, third = (ResultLocks(tmp_path) for _ in range(3))
    assert first.acquire("a")
    assert first.acquire("a")  # it has it
    assert not second.acquire("a")
    assert second.acquire("b")
    assert third.acquire("c")
    third.close()
    assert not second.acquire("a")  # though this process has closed the file
    first.release("a")
    assert second.acquire("a")
    assert not first.acquire("b")
    second.close()
    assert first.acquire("a")
    assert first.acquire("b")
    first.close()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("Clip", "clip"),
        ("caf\u00e9", "cafe\u0301"),
        ("\u00c9t\u00e9", "e\u0301te\u0301"),
        ("\u01f0\u0323", "J\u0323\u030c"),
    ],
)
def test_names_that_are_one_file_somewhere_share_a_lock(
    name: str, other: str, tmp_path: Path
) -> None:
    first, second = ResultLocks(tmp_path), ResultLocks(tmp_path)
    assert first.acquire(name)
    assert not second.acquire(other)
    assert second.acquire("another")
    first.close()
    second.close()


def test_the_probe_is_a_lock_of_no_name(tmp_path: Path) -> None:
    first, second = ResultLocks(tmp_path), ResultLocks(tmp_path)
    assert first.acquire_probe()
    assert not second.acquire_probe()
    assert second.acquire("a")
    first.release_probe()
    assert second.acquire_probe()
    assert second.is_visible()
    first.close()
    second.close()


def test_a_planted_link_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.jobs.lock").symlink_to(tmp_path / "others")
    locks = ResultLocks(tmp_path / "out")
    assert locks.acquire("a")
    assert not (tmp_path / "others").exists()
    assert len(warnings_in(caplog)) == 1
    locks.close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_a_folder_that_cannot_be_locked_is_warned_of_once(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "fcntl", fail)
    plant(tmp_path, ".a.01234567.partial.mp4")
    locks = ResultLocks(tmp_path)
    assert all(locks.acquire(name) for name in "abc")
    locks.release("a")
    assert warnings_in(caplog) == [
        f"{tmp_path} cannot be locked ({os.strerror(code)}): do not use it in two runs at once"
    ]
    assert (tmp_path / ".a.01234567.partial.mp4").exists()  # another run may be writing it
    locks.close()


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b'{"a": "\xff"}', b"[" * 100_000],
    ids=["cut short", "empty", "no UTF-8", "deep"],
)
def test_a_damaged_record_is_set_aside(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    locks = ResultLocks(tmp_path)
    assert locks.read_outcome("a", "digest") is None
    assert (tmp_path / "a.json.damaged").read_bytes() == content
    assert not (tmp_path / "a.json").exists()
    assert warnings_in(caplog) == [
        f"{tmp_path}/a.json is damaged; it is kept as a.json.damaged, and its job is run again"
    ]
    assert locks.read_outcome("a", "digest") is None
    assert len(warnings_in(caplog)) == 1


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_read(
    make: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipe would be waited for, for ever."""
    make(tmp_path / "a.json")
    with ThreadPoolExecutor() as pool:
        found = pool.submit(ResultLocks(tmp_path).read_outcome, "a", "digest")
        wait([found], timeout=2)
        if not found.done():
            (tmp_path / "a.json").write_text("{}")
        assert found.result() is None
    assert warnings_in(caplog) == [
        f"{tmp_path}/a.json cannot be read (it is not a file); its job is run again"
    ]


def write_record(folder: Path, *, save_tensor: bool = False, **changed: Any) -> None:
    (folder / "a.mp4").write_text("frames")
    if save_tensor:
        (folder / "a.safetensors").write_text("tensor")
    known = {
        "status": "done",
        "format": FORMAT_VERSION,
        "digest": "digest",
        "file": str(folder / "a.mp4"),
        "video_digest": hash_file(folder / "a.mp4"),
    }
    (folder / "a.json").write_text(
        json.dumps(known | {"config": {"output": {"save_tensor": save_tensor}}} | changed)
    )


def test_what_is_done_is_borne_out_by_its_files(tmp_path: Path) -> None:
    locks = ResultLocks(tmp_path)
    write_record(tmp_path, save_tensor=True)
    assert locks.read_outcome("a", "digest") == "done"
    assert locks.read_outcome("a", "other") is None
    (tmp_path / "a.safetensors").unlink()
    assert locks.read_outcome("a", "digest") is None
    write_record(tmp_path)
    assert locks.read_outcome("a", "digest") == "done"
    (tmp_path / "a.mp4").write_text("frameS")
    assert locks.read_outcome("a", "digest") is None
    (tmp_path / "a.mp4").unlink()
    assert locks.read_outcome("a", "digest") is None
    write_record(tmp_path, status="failed")
    assert locks.read_outcome("a", "digest") == "failed"
    write_record(tmp_path, format=FORMAT_VERSION - 1, digest="of another kind")
    assert (locks.read_outcome("a", "digest"), locks.num_older_records) == (None, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"file": "a\0.mp4"},
        {"file": "\ud800"},
        {"file": None},
        {"config": []},
        {"config": {"output": None}},
        {"file": "b.mp4"},
    ],
)
def test_a_record_of_nonsense_counts_as_not_made(
    changed: dict[str, object], tmp_path: Path
) -> None:
    write_record(tmp_path, **changed)
    assert ResultLocks(tmp_path).read_outcome("a", "digest") is None
