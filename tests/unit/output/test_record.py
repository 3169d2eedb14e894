"""Record of a video: its file is what it has always been, and files of other programs are no harm.

The records of fixtures/records were written before `VideoRecord` was: of a single run, and of two jobs of a
batch, one of which failed.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FIXTURES
from wan_dist.output.gallery.records import read_records
from wan_dist.output.locks import ResultLocks
from wan_dist.output.record import DONE, FAILED, VideoRecord

RECORDS = FIXTURES / "records"


def read(content: Any) -> dict[str, Any]:
    return VideoRecord.from_json(content).to_json()


@pytest.mark.parametrize("name", ["single", "batch", "failed"])
def test_an_older_record_is_read_in_full_and_written_as_it_was(name: str, tmp_path: Path) -> None:
    file = RECORDS / f"{name}.json"
    VideoRecord.from_json(json.loads(file.read_bytes())).write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


def test_the_gallery_and_the_locks_read_older_records(tmp_path: Path) -> None:
    for file in RECORDS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    failed, batch, single = sorted(
        read_records(tmp_path), key=lambda video: ("failed", "batch", "single").index(video.name)
    )
    assert (failed.status, batch.status, single.status) == (FAILED, DONE, DONE)
    assert failed.error == "FloatingPointError: the latents are not finite"
    assert (failed.job_source, batch.job_source, single.job_source) == (
        "jobs.jsonl, line 2",
        "jobs.jsonl, line 1",
        "",
    )
    assert (batch.steps, batch.fps, batch.rank, single.rank) == (6, 16, 0, None)
    assert set(batch.memory_by_stage) == {"context", "load", "denoise", "decode"}
    assert batch.peak_memory == (batch.peak_host_gib, "host")
    locks = ResultLocks(tmp_path)
    assert locks.read_outcome("failed", failed.digest) == FAILED
    assert locks.read_outcome("batch", batch.digest) is None  # its video is not there


def test_fields_are_in_the_file_in_the_order_they_were_set_and_others_are_absent() -> None:
    record = VideoRecord()
    assert record.to_json() == {}
    record.seed, record.name = 3, "a"
    record.peak_gpu_gib = None
    record.seed = 4
    assert list(record.to_json().items()) == [("seed", 4), ("name", "a"), ("peak_gpu_gib", None)]
    assert record.status is None


def test_every_field_is_read_as_it_was_written() -> None:
    stages = {"decode": {"seconds": 1.5, "peak_gpu_gib": 2.0}}
    entry = {
        "checkpoint": "weights",
        "degrees": {"dp": 1, "cfg": 2},
        "attention": "sdpa",
        "distance": ["quant=int8"],
        "ran_out": ["image", "decode"],
        "stepped_down_to": {"dit": "stream", "slice_tokens": None},
        "guessed_steps": 5,
        "other_ranks": [stages, stages],
        "job": {"file": "jobs.txt", "line": 7},
        "source": {"setting": "src_video", "file": "/in.mp4", "sha256": "0a" * 32},
        "seed": 2**63,
    }
    assert read(entry) == entry


def test_of_what_is_no_record_nothing_is_read() -> None:
    for content in (None, 3, "text", [], [{"name": "a"}], {"package": 1, "to_json": 2, "": 3}):
        assert read(content) == {}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("name", 3, ""),
        ("prompt", "a\ud800", "a?"),
        ("seed", True, None),
        ("seed", 2**64, None),
        ("width", "64", None),
        ("began", 1e17, None),
        ("seconds", float("nan"), None),
        ("seconds", 10**400, None),
        ("distance", {"a": 1}, []),
        ("distance", ["quant=int8", 3], ["quant=int8"]),
        ("config", [], {}),
        ("versions", {"torch": 2}, {"torch": ""}),
        ("degrees", {"dp": 1, "cfg": "2"}, {"dp": 1}),
        ("job", [], None),
        ("job", {"line": "x"}, {"file": "", "line": None}),
        ("stages", {"a": 1, "b": {"seconds": "1", "host_gib": 2}}, {"b": {"host_gib": 2.0}}),
        ("other_ranks", 7, []),
        ("other_ranks", [1, {"a": {"seconds": 1.0}}], [{}, {"a": {"seconds": 1.0}}]),
    ],
)
def test_a_broken_value_is_none_or_empty(key: str, value: object, expected: object) -> None:
    assert read({key: value, "machine": "m"}) == {key: expected, "machine": "m"}
