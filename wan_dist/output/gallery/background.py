"""Background writer of a run's record, table and page, in a process of its own.

``python -m wan_dist.output.gallery.background FOLDER`` reads requests, a line of JSON each with the run's
record, and answers each with a line: how long the write took, and the error if it failed. It ends when its
input ends, so with the run. In the run's own process, writing the page of 10,000 videos would keep Python
from launching kernels for ten seconds.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from wan_dist.output.gallery.page import write_page
from wan_dist.output.gallery.records import GalleryVideo, RecordCache, read_records
from wan_dist.output.gallery.table import write_table
from wan_dist.runtime.atomic_write import atomic_write

_NICENESS = 19


class PageWriter:
    """Writes the record, table and page of a run.

    Video records that have not changed since the last write are not read again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._record_cache: RecordCache = {}

    def write(self, run: Mapping[str, Any], stages: Mapping[str, Mapping[str, float]]) -> Path:
        """Write ``runs/RUN.json``, a table of the run's videos, and the page, and return the page.

        ``run`` is the run's record without its spans; ``stages`` are those of no job, such as text encoding.
        Raises InputError where there is no such folder, and OSError where it cannot be written to.
        """
        records = read_records(self.folder, self._record_cache)
        run_records = [record for record in records if record.run == run["run"]]
        run_path = self.folder / "runs" / f"{run['run']}.json"
        run_path.parent.mkdir(exist_ok=True)
        with atomic_write(run_path) as temporary_path:
            run_entry = {**run, "spans": _list_run_spans(stages, run_records)}
            temporary_path.write_text(
                json.dumps(run_entry, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        if run_records:
            write_table(run_path, run_records)
        return write_page(self.folder, records)


def _list_run_spans(
    stages: Mapping[str, Mapping[str, float]], records: Iterable[GalleryVideo]
) -> list[dict[str, Any]]:
    spans = _build_spans(0, None, stages)
    for record in records:
        for rank_offset, rank_stages in enumerate(record.stages_by_rank):
            spans += _build_spans((record.rank or 0) + rank_offset, record.name, rank_stages)
    return spans


def _build_spans(
    rank: int, job_name: str | None, stages: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    return [
        {
            "rank": rank,
            "stage": stage,
            "job": job_name,
            "began": entry["began"],
            "seconds": entry["seconds"],
            "gpu_gib": entry.get("peak_gpu_gib"),
            "host_gib": entry.get("host_gib"),
        }
        for stage, entry in stages.items()
        if "began" in entry and "seconds" in entry
    ]


def main(folder: str) -> None:
    """Answer requests until standard input ends."""
    os.nice(_NICENESS)
    # these signals are meant for the run, which ends this process by closing its input
    for signal_number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signal_number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    writer = PageWriter(Path(folder))
    for line in sys.stdin:
        start_seconds, error_text = time.monotonic(), None
        try:
            writer.write(**json.loads(line))
        except Exception as error:
            error_text = f"{type(error).__name__}: {error}"
        sys.stdout.write(
            json.dumps({"seconds": round(time.monotonic() - start_seconds, 3), "fault": error_text})
            + "\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
