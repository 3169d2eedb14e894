"""Markdown table of step times for the README, from bench/results/step-*.json.

python -m bench.table
"""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "i2v-14B-832x480x81": "i2v-14B 832x480, 81 frames",
    "i2v-14B-1280x720x81": "i2v-14B 1280x720, 81 frames",
    "t2v-1.3B-832x480x81": "t2v-1.3B 832x480, 81 frames",
    "ti2v-5B-1280x704x121": "ti2v-5B 1280x704, 121 frames",
}
ATTENTION = {"fa4": "FlashAttention-4", "cudnn": "cuDNN", "8bit": "`8bit`"}
ORDER = [
    "ours, fa4, none",
    "ours, cudnn, none",
    "ours, 8bit, none",
    "ours, fa4, fp8",
    "ours, 8bit, fp8",
    "diffusers, cudnn, compiled",
]


def lines() -> list[str]:
    """Return the table's lines."""
    table = ["| | attention | s/it | first | peak GiB |", "|---|---|---|---|---|"]
    for name, model in MODELS.items():
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in json.loads((RESULTS / f"step-{name}.json").read_text())["rows"]:
            rows.setdefault(row["what"], []).append(row)
        before = ""
        for what in (what for what in ORDER if what in rows):
            whose, attention, kind = what.split(", ")
            if whose == "diffusers":
                title = "diffusers 0.42, compiled"
            else:
                title = model if kind == "none" else f"with `quant={kind}`"
            label, before = "" if title == before else title, title
            each = [row["seconds_per_step"] for row in rows[what]]  # of several machines
            seconds = ", ".join(f"{second:.{1 if second >= 10 else 2}f}" for second in each)
            first = rows[what][0]
            table.append(
                f"| {label} | {ATTENTION[attention]} | {seconds} "
                f"| {first['all_seconds'][0]:.1f} s | {first['peak_gib']:.1f} |"
            )
    return table


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
