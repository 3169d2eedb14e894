"""The request log: what was accepted is on the disk, and what was not is nowhere."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from wan_dist.runtime.errors import InputError
from wan_dist.service import request_log
from wan_dist.service.request_log import RequestLog, RequestLogWriter, VideoRequest

REQUEST = VideoRequest(
    id=f"video_{0:032x}",
    created_at=1.0,
    task="toy",
    values={"prompt": "一个\u2028球\n", "seed": 3},
    images={},
    size="64x64",
    num_frames=5,
    fps=16,
    num_steps=3,
)


def make_request(number: int) -> VideoRequest:
    return replace(REQUEST, id=f"video_{number:032x}")


def open_log(folder: Path) -> RequestLogWriter:
    log = RequestLogWriter(folder)
    log.open()
    return log


def test_what_one_writes_the_other_reads(tmp_path: Path) -> None:
    reader = RequestLog(tmp_path)
    reader.read_new()
    assert reader.requests == {}
    writer = open_log(tmp_path)
    for number in range(3):
        writer.append_request(make_request(number))
        reader.read_new()
        assert list(reader.requests.values())[-1] == replace(make_request(number), line=number + 1)
    writer.append_deletion(make_request(1).id)
    reader.read_new()
    again = RequestLog(tmp_path)
    again.read_new()
    for log in (writer, reader, again):
        assert list(log.requests) == [make_request(0).id, make_request(2).id]
        assert log.deleted_ids == {make_request(1).id}


def test_a_line_that_was_cut_is_none(tmp_path: Path) -> None:
    writer = open_log(tmp_path)
    writer.append_request(REQUEST)
    whole = writer.path.read_bytes()
    with writer.path.open("ab") as file:
        file.write(whole[:-1])
    reader = RequestLog(tmp_path)
    reader.read_new()
    assert len(reader.requests) == 1
    os.close(writer._descriptor)
    open_log(tmp_path)
    assert writer.path.read_bytes() == whole


def test_a_damaged_line_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = open_log(tmp_path)
    with writer.path.open("ab") as file:
        file.write(b'[]\n{"id": "../x"}\n\xff\n{"deleted": ["x"]}\n')
    writer.append_request(REQUEST)
    assert list(writer.requests) == [REQUEST.id]
    assert writer.requests[REQUEST.id].line == 5


@pytest.mark.parametrize("function", ["write", "fsync"])
def test_what_cannot_be_saved_is_not_accepted(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = open_log(tmp_path)
    writer.append_request(REQUEST)
    whole = writer.path.read_bytes()

    def fail(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(OSError, match="No space"):
            writer.append_request(make_request(1))
    assert writer.path.read_bytes() == whole
    writer.append_request(make_request(2))
    assert list(writer.requests) == [REQUEST.id, make_request(2).id]


def test_a_folder_has_one_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "_OWNER_TIMEOUT_SECONDS", 0.2)
    first = open_log(tmp_path)
    with pytest.raises(InputError, match="another service uses it"):
        open_log(tmp_path)
    os.close(first._descriptor)
    open_log(tmp_path)
