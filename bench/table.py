"""Markdown tables of the documentation: from bench/results, from the plan, and from the schema.

    python -m bench.table            # print all
    python -m bench.table steps      # print one
    python -m bench.table --write    # write them into README.md and docs/, between their comments

A table whose rows were measured with more than one state of the code has a column that says with which.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.plan_table import list_gpu_rows, plan_peaks
from bench.settings_table import (
    list_overview_rows,
    list_preset_rows,
    list_published_rows,
    list_setting_lines,
    list_task_rows,
)

RESULTS = Path(__file__).parent / "results"
_ROOT = Path(__file__).parents[1]
PAGES = (_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md")))
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_MODELS = {
    "i2v-14B-832x480x81": "i2v-14B 832x480, 81 frames",
    "i2v-14B-1280x720x81": "i2v-14B 1280x720, 81 frames",
    "t2v-1.3B-832x480x81": "t2v-1.3B 832x480, 81 frames",
    "ti2v-5B-1280x704x121": "ti2v-5B 1280x704, 121 frames",
    "vace-14B-832x480x81": "vace-14B 832x480, 81 frames",
}
_ATTENTION = {"fa4": "FlashAttention-4", "cudnn": "cuDNN", "8bit": "`8bit`", "flash": "`flash`"}
_ORDER = [
    "ours, fa4, none",
    "ours, cudnn, none",
    "ours, 8bit, none",
    "ours, fa4, fp8",
    "ours, cudnn, fp8",
    "ours, 8bit, fp8",
    "diffusers, cudnn, compiled",
]
_DIFFUSERS = "diffusers 0.42"
_SPREADS = {
    "dp 1 x cfg 2 x ring 1 x ulysses 1": "cfg 2",
    "dp 1 x cfg 1 x ring 1 x ulysses 2": "ulysses 2",
    "dp 1 x cfg 1 x ring 1 x ulysses 4": "ulysses 4",
    "dp 1 x cfg 2 x ring 1 x ulysses 2": "cfg 2 x ulysses 2",
    "dp 1 x cfg 2 x ring 2 x ulysses 1": "cfg 2 x ring 2",
    "dp 1 x cfg 1 x ring 2 x ulysses 2": "ring 2 x ulysses 2",
}

_ADDED_BY = {
    ("step-i2v-14B-832x480x81", 3): "7eff9ce",
    ("step-t2v-1.3B-832x480x81", 3): "7eff9ce",
    ("step-ti2v-5B-1280x704x121", 3): "7eff9ce",
}
"""Commits that added the rows of a run, by file and run, where the record has no commit of its own."""
_ADDED_BY_DEFAULT = "21c5c08"

Json = dict[str, Any]


def _load(name: str) -> Json:
    content: Json = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def _format_table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    titles = list(titles)
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.{1 if seconds >= 10 else 2}f}"


def _format_run(name: str, content: Json, row: Json) -> str:
    """Return date and commit of a row's run; the commit that added the row, where the record has none."""
    run = content["runs"][row["run"] - 1]
    commit = run["commit"]
    if commit == "unknown":
        commit = _ADDED_BY.get((name, row["run"]), _ADDED_BY_DEFAULT)
    return f"{run['date']}, {commit}"


def steps() -> list[str]:
    """Return the step times of one GPU, by model."""
    rows = []
    for name, model in _MODELS.items():
        file = f"step-{name}"
        content = _load(file)
        previous_title = ""
        for what in _ORDER:
            for row in (row for row in content["rows"] if row["what"] == what):
                whose, attention, kind = what.split(", ")
                title = f"{_DIFFUSERS}, compiled"
                if whose == "ours":
                    title = model if kind == "none" else f"with `quant={kind}`"
                rows.append(
                    [
                        "" if title == previous_title else title,
                        _ATTENTION[attention],
                        _format_seconds(row["seconds_per_step"]),
                        f"{row['all_seconds'][0]:.1f} s",
                        f"{row['peak_gib']:.1f}",
                        _format_run(file, content, row),
                    ]
                )
                previous_title = title
    return _format_table(["", "attention", "s/it", "first", "peak GiB", "date, commit"], rows)


def trained_attention() -> list[str]:
    """Return the times of one pass with sparse attention that a model was trained with, beside dense."""
    rows = []
    names = {"sla": "SLA, 10 % of the keys", "vsa": "VSA"} | _ATTENTION
    for name in ("t2v-1.3B-832x480x81", "t2v-14B-832x480x81", "t2v-14B-1280x720x81"):
        file = f"step-{name}-one-pass"
        content = _load(file)
        for row in content["rows"]:
            _, attention, kind, _ = row["what"].split(", ")
            precision = "bfloat16" if kind == "none" else f"`quant={kind}`"
            figures = [_format_seconds(row["seconds_per_step"]), f"{row['peak_gib']:.1f}"]
            run = _format_run(file, content, row)
            task, _, size = name.rpartition("-")
            rows.append(
                [f"{task} {size.removesuffix('x81')}", names[attention], precision, *figures, run]
            )
    return _format_table(["", "self-attention", "", "s a pass", "peak GiB", "date, commit"], rows)


def animate() -> list[str]:
    """Return planned and measured memory of a clip of Animate, and its steps."""
    rows = []
    for row in _load("memory-Animate-1gpu")["rows"]:
        settings = re.sub(r"\S+=DRIVING ?", "", row["row"]).strip()
        cells = [f"`{settings}`"]
        for stage in ("face", "image", "denoise", "decode"):
            entry = row["memory"][stage]
            cells.append(f"{entry['planned_gpu_gib']:.1f}, {entry['peak_gpu_gib']:.1f}")
        rows.append([*cells, _format_seconds(row["seconds"][-1])])
    return _format_table(["", "faces", "VAE encodes", "denoise", "decode", "s a step"], rows)


def first_steps() -> list[str]:
    """Return the step times of the first version, without kernels of its own."""
    rows = [
        [
            f"t2v-14B {size}, 81 frames",
            _ATTENTION[row["attention"]],
            _format_seconds(row["seconds_per_step"]),
            f"{row['peak_gib']:.1f}",
        ]
        for size in ("832x480", "1280x720")
        for row in _load(f"step-t2v-14B-{size}x81")["rows"]
    ]
    return _format_table(["", "attention", "s/it", "peak GiB"], rows)


def summary() -> list[str]:
    """Return the six rows of the README."""
    wanted = [
        ("step-i2v-14B-832x480x81", "ours, fa4, none", "i2v-14B 832x480, 81 frames"),
        ("step-i2v-14B-832x480x81", "diffusers, cudnn, compiled", "the same by diffusers 0.42"),
        ("step-i2v-14B-832x480x81", "ours, 8bit, fp8", "the same with `quant=fp8`"),
        ("ranks-i2v-14B-832x480x81-2gpu", "cfg 2, sharded, fa4", "the same on two GPUs"),
        ("step-t2v-1.3B-832x480x81", "ours, fa4, none", "t2v-1.3B 832x480, 81 frames"),
        ("step-ti2v-5B-1280x704x121", "ours, fa4, none", "ti2v-5B 1280x704, 121 frames"),
    ]
    rows = []
    for name, what, title in wanted:
        content = _load(name)
        row = next(row for row in content["rows"] if what in (row.get("what"), _shorten(row)))
        attention = next(label for key, label in _ATTENTION.items() if key in what.split(", "))
        figures = [f"{row['seconds_per_step']:.2f}", f"{row['peak_gib']:.1f}"]
        num_gpus = content["runs"][row["run"] - 1]["gpus"]
        machine = f"{num_gpus} H200"
        rows.append([title, machine, attention, *figures, _format_run(name, content, row)])
    titles = ["", "machine", "attention", "s/it", "GiB a GPU", "date, commit"]
    return _format_table(titles, rows)


def _shorten(row: Json) -> str:
    spread, *others = row.get("spread", "").split(", ")
    return ", ".join([_SPREADS.get(spread, spread), *(word for word in others if word != "plain")])


def two_gpus() -> list[str]:
    """Return the step times of degrees on two GPUs, beside one."""
    one_gpu = {row["what"]: row for row in _load("step-i2v-14B-832x480x81")["rows"][::-1]}
    row_by_name = {_shorten(row): row for row in _load("ranks-i2v-14B-832x480x81-2gpu")["rows"]}
    ours = [one_gpu[f"ours, {attention}, none"] for attention in ("fa4", "cudnn")]
    rows = [["1 GPU", *_format_degrees_row(*ours)]]
    for name in ("cfg 2", "cfg 2, sharded", "ulysses 2", "ulysses 2, sharded"):
        title = f"{name} (what is planned)" if name == "cfg 2, sharded" else name
        found = [row_by_name.get(f"{name}, {attention}") for attention in ("fa4", "cudnn")]
        rows.append([title, *_format_degrees_row(*found)])
    titles = ["", "FlashAttention-4", "cuDNN", "weights a GPU", "peak a GPU"]
    return _format_table(titles, rows)


def _format_degrees_row(*rows: Json | None) -> list[str]:
    found = [row for row in rows if row is not None]
    times = ["" if row is None else f"{row['seconds_per_step']:.2f} s/it" for row in rows]
    return [*times, f"{found[0]['weights_gib']:.1f} GiB", f"{found[0]['peak_gib']:.1f} GiB"]


def four_gpus() -> list[str]:
    """Return the step times of degrees on four GPUs, of two states of the code."""
    rows = []
    for name, commit in (("-4gpu", "bc91088"), ("-4gpu-cudnn", "c5047d5")):
        for row in _load(f"ranks-i2v-14B-832x480x81{name}")["rows"]:
            title = _shorten(row)
            if title.startswith("diffusers"):
                title = f"{_DIFFUSERS}, ulysses 4, cudnn"
            title = title.replace("xfuser", "`parallel.usp=xfuser`")
            figures = [f"{row[key]:.1f} GiB" for key in ("weights_gib", "peak_gib")]
            rows.append([title, f"{row['seconds_per_step']:.2f}", *figures, commit])
    return _format_table(["", "s/it", "weights a GPU", "peak a GPU", "commit"], rows)


def vae() -> list[str]:
    """Return the times of both VAEs, whole frames or a strip a rank."""
    rows = []
    for size, files in (
        ("832x480x81", ["2.1-1gpu", "2.1-2gpu", "2.1-4gpu"]),
        ("1280x720x81", ["2.1-1gpu", "2.1-2gpu", "2.1-4gpu"]),
        ("1280x704x121", ["2.2-1gpu", "2.2-2gpu"]),
    ):
        found = [
            row for file in files for row in _load(f"vae-{file}")["rows"] if row["size"] == size
        ]
        for row in found:
            if "tiles" not in row["way"]:
                rows.append([f"{row['vae']}, {size}", *_format_vae_row(row)])
    return _format_table(["VAE", "", "GPUs", "seconds", "GiB a GPU", "PSNR"], rows)


def _format_vae_row(row: Json) -> list[str]:
    quality = f"{row['psnr']:.1f} dB" if "psnr" in row else ""
    way = row["way"].replace(", bfloat16", "")
    return [way, str(row["ranks"]), f"{row['seconds']:.2f}", f"{row['peak_gib']:.1f}", quality]


def vae_tiles() -> list[str]:
    """Return the times of VAE 2.1 in tiles."""
    rows = [
        [row["size"], *_format_vae_row(row)]
        for row in _load("vae-2.1-1gpu")["rows"]
        if "tiles" in row["way"]
    ]
    return _format_table(["VAE 2.1", "", "GPUs", "seconds", "GiB a GPU", "PSNR"], rows)


def memory() -> list[str]:
    """Return today's plan beside the peaks measured of 26 arrangements."""
    rows = []
    for name in ("14B-1gpu", "5B-1.3B-1gpu", "ranks-2gpu"):
        for row in _load(f"memory-{name}")["rows"]:
            planned, measured = plan_peaks(row), row["memory"]
            peaks = []
            for stage in ("denoise", "decode"):
                is_comparable = stage not in row.get("ran_out", ())
                plan_text = f"{planned[stage]:.1f}" if is_comparable else "ran out"
                peaks += [plan_text, f"{measured[stage]['peak_gpu_gib']:.1f}"]
            name = row["row"].replace("*", "x")
            step = f"{row['seconds'][-1]:.2f}" if len(row["seconds"]) > 1 else ""
            rows.append(
                [f"`{name}`", str(row["ranks"]), _ATTENTION[row["attention"]], *peaks, step]
            )
    titles = [
        "",
        "GPUs",
        "attention",
        "denoise, planned",
        "measured",
        "decode, planned",
        "measured",
    ]
    return _format_table([*titles, "s/it"], rows)


def end_to_end() -> list[str]:
    """Return the seconds of whole runs, by stage."""
    rows = []
    for number, file in (("one", "1gpu"), ("two", "2gpu")):
        content = _load(f"end-to-end-i2v-14B-832x480-{file}")
        seconds = {name: stage["seconds"] for name, stage in content["stages"].items()}
        step = statistics.median(content["step_seconds"][1:])
        image = seconds["look"] + seconds["image"]
        figures = [seconds["text"], image, seconds["context"], seconds["load"]]
        cells = [f"{figure:.1f}" for figure in figures]
        cells += [f"{step:.2f}", f"{seconds['decode']:.1f}", f"{content['with_default_steps']:.0f}"]
        rows.append([number, *cells])
    titles = ["H200", "texts", "image", "keys and values of the text", "transformer loaded"]
    return _format_table([*titles, "a step", "decode and write", "in all"], rows)


def few_steps() -> list[str]:
    """Return when runs of few steps had done what, from the command on."""
    rows = []
    for row in _load("command-time")["rows"]:
        task, _, rest = row["what"].partition(" ")
        settings = re.sub(r" ?(cache.dir=null|\d+ videos|\d+ GPUs)", "", rest)
        step = min(row["step_seconds"])
        decode = row["stages"]["decode"][1] + row["stages"].get("save", [0, 0])[1]
        following = f"{min(row['following']):.1f}" if row["following"] else ""
        rows.append(
            [
                f"{task} `{settings}`, run {row['time']}",
                f"{row['first_line']:.1f}",
                f"{row['stages']['denoise'][0]:.1f}",
                f"{row['stages']['denoise'][1]:.1f}",
                f"{step:.2f}",
                f"{decode:.1f}",
                f"{row['video_finished'][0]:.1f}",
                following,
            ]
        )
    titles = ["one H200", "first line at", "steps begin at", "steps take", "best s/it"]
    return _format_table([*titles, "decode and write", "video at", "each following video"], rows)


def weight_files() -> list[str]:
    """Return load time, peak and step time of a transformer from files of each kind."""
    rows = []
    for row in _load("weight-files-i2v-14B")["rows"]:
        memory = row["memory"]["denoise"]
        rows.append(
            [
                row["what"],
                f"{row['stages']['load']['seconds']:.1f}",
                f"{memory['planned_gpu_gib']:.1f}",
                f"{memory['peak_gpu_gib']:.1f}",
                f"{min(row['step_seconds'][1:]):.2f}",
            ]
        )
    return _format_table(["file", "load, s", "GiB, planned", "measured", "s/it"], rows)


def weight_files_loading() -> list[str]:
    """Return load times of a transformer, merging in larger parts, where few frames were made."""
    rows = [
        [row["what"], f"{row['stages']['load']['seconds']:.1f}"]
        for row in _load("weight-files-i2v-14B-5frames")["rows"]
    ]
    return _format_table(["file", "load, s"], rows)


def first_runs() -> list[str]:
    """Return the seconds of whole runs of the first version."""
    rows = []
    for name in (
        "t2v-1.3B-832x480x81",
        "t2v-14B-832x480x81",
        "t2v-14B-1280x720x81",
        "i2v-A14B-832x464x81",
        "ti2v-5B-1248x704x121",
    ):
        content = _load(f"run-{name}")
        stages = content["stages"]
        load = " and ".join(
            f"{stage['seconds']:.1f}" for key, stage in stages.items() if key.startswith("load")
        )
        steps = str(content["config"]["sample"]["steps"])
        seconds = [f"{stages[key]['seconds']:.1f}" for key in ("denoise", "decode")]
        peaks = [f"{content['peak_gpu_gib']:.1f}", f"{content['peak_host_gib']:.1f}"]
        task, _, size = name.rpartition("-")
        text = f"{stages['text']['seconds']:.1f}"
        rows.append([f"{task} {size}", text, load, steps, *seconds, *peaks])
    titles = ["", "texts", "load", "steps", "denoise", "decode and write", "GPU GiB", "host GiB"]
    return _format_table(titles, rows)


def lossy() -> list[str]:
    """Return what caches, fewer steps and fewer bits did to the toy model's videos."""
    content = _load("toy-scores-1gpu")
    rows = []
    for row in content["rows"]:
        if row["way"].startswith("float32"):
            continue
        way = f"`{row['way']}`" if "=" in row["way"] else row["way"]
        right = f"{row['right'] * row['captions']:.0f} of {row['captions']}"
        distance = "the same" if row["way"] == "unipc, 20 steps" else f"{row['psnr']:.1f} dB"
        rows.append([way, f"{row['computed_steps']:.1f}", right, distance])
    return _format_table(["", "steps computed", "captions shown rightly", "PSNR"], rows)


def drills() -> list[str]:
    """Return the drills of many jobs under faults."""
    rows = []
    for name in ("1000-jobs-4-ranks", "200-jobs-2-replicas"):
        content = _load(f"drill-{name}")
        faults = content["faults"]
        counts = [content["jobs"], content["ranks"], content["replicas"] or "planned"]
        times = [f"{content[f'seconds_{key}']:.0f} s" for key in ("alone", "under_faults")]
        kinds = f"{sum(faults.values())} of {len(faults)} kinds"
        run = f"{content['date']}, {content['commit']}"
        found = str(len(content["found"]) or "none")
        rows.append([*map(str, counts), kinds, *times, found, run])
    titles = ["jobs", "ranks", "replicas", "faults", "undisturbed", "under faults"]
    return _format_table([*titles, "problems found", "date, commit"], rows)


def gpus() -> list[str]:
    """Return what the plan takes on GPUs of several sizes."""
    titles, *rows = list_gpu_rows()
    return _format_table(titles, rows)


def tasks() -> list[str]:
    """Return the defaults of the tasks."""
    titles, *rows = list_task_rows()
    return _format_table(titles, rows)


def overview() -> list[str]:
    """Return input and GPU memory of the tasks, for the README."""
    titles, *rows = list_overview_rows()
    return _format_table(titles, rows)


def presets() -> list[str]:
    """Return the presets of few-step models."""
    titles, *rows = list_preset_rows()
    return _format_table(titles, rows)


def published() -> list[str]:
    """Return the files that fetch knows by short names."""
    titles, *rows = list_published_rows()
    return _format_table(titles, rows)


def settings() -> list[str]:
    """Return all keys by section."""
    return list(list_setting_lines())[:-1]


TABLES: dict[str, Callable[[], list[str]]] = {
    table.__name__: table
    for table in (
        summary,
        steps,
        trained_attention,
        animate,
        first_steps,
        two_gpus,
        four_gpus,
        vae,
        vae_tiles,
        memory,
        end_to_end,
        few_steps,
        weight_files,
        weight_files_loading,
        first_runs,
        lossy,
        drills,
        gpus,
        tasks,
        overview,
        presets,
        published,
        settings,
    )
}


def fill_tables(text: str) -> str:
    """Return a page with its tables, each between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    return _PLACE.sub(lambda place: "\n".join([place[1], *TABLES[place[2]](), "", place[3]]), text)


def main(arguments: list[str]) -> None:
    """Print tables, or write all into the pages."""
    if arguments == ["--write"]:
        for page in PAGES:
            page.write_text(fill_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name in arguments or TABLES:
        sys.stdout.write("\n".join([f"{name}:", "", *TABLES[name](), "", ""]))


if __name__ == "__main__":
    main(sys.argv[1:])
