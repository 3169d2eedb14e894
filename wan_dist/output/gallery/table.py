"""CSV table of a run's videos, one row a video, for spreadsheets and programs."""

import csv
import io
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from wan_dist.output.gallery.records import GalleryVideo, is_plain_name
from wan_dist.runtime.atomic_write import atomic_write
from wan_dist.runtime.errors import InputError

_FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_BYTE_ORDER_MARK = "\ufeff"


def write_table(run: Path | str, records: Iterable[GalleryVideo]) -> Path:
    """Write the table of a run's videos and return its path.

    ``run`` is the path of the run's record RUN.json, beside which RUN.csv is written, or a run id, for which
    it is written to ``runs`` in the folder of the videos. Of ``records``, those of the run are used. The
    encoding is UTF-8 with a byte order mark, which spreadsheets need (Python reads it as ``utf-8-sig``);
    texts that a spreadsheet would evaluate as formulas are prefixed with a '. The file appears when it is
    complete. Raises InputError where the id is invalid or no record has it.
    """
    run_name = run.stem if isinstance(run, Path) else run
    run_records = [record for record in records if record.run == run_name]
    if not is_plain_name(run_name) or not run_records:
        raise InputError(f"no records of run {run_name!r} found")
    table_path = (
        run.with_suffix(".csv")
        if isinstance(run, Path)
        else run_records[0].path.parent / "runs" / f"{run_name}.csv"
    )
    rows = [_build_row(record) for record in run_records]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    csv_text = io.StringIO(newline="")
    writer = csv.writer(csv_text)
    writer.writerow([_format_cell(column) for column in columns])
    writer.writerows([_format_cell(row.get(column)) for column in columns] for row in rows)
    table_path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(table_path) as temporary_path:
        temporary_path.write_text(
            _BYTE_ORDER_MARK + csv_text.getvalue(), encoding="utf-8", errors="replace", newline=""
        )
    return table_path


def _build_row(record: GalleryVideo) -> dict[str, object]:
    began_text = (
        None
        if record.began is None
        else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.began))
    )
    row: dict[str, object] = {
        "run": record.run,
        "name": record.name,
        "status": record.status,
        "error": record.error,
    }
    row |= {
        key: getattr(record, key)
        for key in ("task", "prompt", "seed", "width", "height", "num_frames", "fps", "steps")
    }
    row |= {
        key: getattr(record, key)
        for key in ("seconds", "step_seconds", "tflops", "peak_gpu_gib", "peak_host_gib")
    }
    row |= {
        "distance": record.lossy_options,
        "machine": record.machine,
        "job": record.job_source,
        "began": began_text,
    }
    row |= {"digest": record.digest, "video_digest": record.video_digest}
    row |= {f"settings.{key}": value for key, value in record.settings.items()}
    row |= {f"versions.{key}": value for key, value in record.versions.items()}
    for stage, entry in record.memory_by_stage.items():
        row |= {f"memory.{stage}.{key}": value for key, value in entry.items()}
    for rank, stages in enumerate(record.stages_by_rank):
        row |= {
            f"seconds.rank{rank}.{stage}": entry.get("seconds") for stage, entry in stages.items()
        }
    return row


def _format_cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | Sequence):
        return json.dumps(value)
    if isinstance(value, tuple):
        text = " ".join(map(str, value))
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    text = text.replace("\0", "")
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA_PREFIXES) else text
