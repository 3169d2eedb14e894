"""Score of the toy model in each configuration: held-out captions shown correctly, PSNR against float32.

    python -m bench.toy_quality --at-once 8 --out scores.json   # all: the table of toy/README.md
    python -m bench.toy_quality --only float32 --ranks 2
    python -m bench.toy_quality --only "4 steps" --captions 16 --checkpoint FOLDER

Configurations that need a GPU are left out where there is none, and `attention=8bit` everywhere: its heads
have 128 channels, the toy's 32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from bench.record import Record
from launch.local import build_run_command
from toy.held_out import draw_first_frame, draw_held_out
from toy.judge import Verdict, judge, psnr
from toy.scenes import Scene
from wan_dist.output.record import VideoRecord
from wan_dist.pipeline.decode import convert_to_uint8_frames

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Way:
    """A configuration of the run."""

    name: str
    settings: tuple[str, ...] = ()
    gpu: bool = False
    """Whether it needs a GPU."""
    image: bool = False
    """Whether a first frame is given."""


WAYS = (
    Way("float32", ("dtype=float32",)),
    Way("float32, first frame given", ("dtype=float32",), image=True),
    Way("bfloat16", ("dtype=bfloat16",)),
    *(
        Way(f"quant={quant}", ("dtype=bfloat16", f"quant={quant}"), gpu=quant == "fp8")
        for quant in ("fp8", "int8", "int4")
    ),
    *(
        Way(
            f"cache.steps={kind} cache.threshold={threshold}",
            ("dtype=float32", f"cache.steps={kind}", f"cache.threshold={threshold}"),
        )
        for kind, threshold in (
            ("easy", 0.05),
            ("easy", 0.1),
            ("easy", 0.2),
            ("tea", 0.1),
            ("tea", 0.2),
            ("tea", 0.4),
        )
    ),
    *(
        Way(
            f"{solver}, {steps} steps",
            ("dtype=float32", f"sample.solver={solver}", f"sample.steps={steps}"),
        )
        for solver in ("unipc", "dpm++", "euler")
        for steps in (4, 8, 12, 20, 50)
    ),
    *(
        Way(
            f"euler, {steps} steps, no guidance",
            ("dtype=float32", "preset=toy-4step", f"sample.steps={steps}"),
        )
        for steps in (1, 2, 4)
    ),
)


@dataclass(frozen=True)
class Made:
    """A video that a run has made."""

    frames: NDArray[np.uint8]
    """Frames (F, H, W, 3)."""
    num_steps: int
    """Steps that were computed, not taken from the step cache."""


def run_command(num_ranks: int, settings: Sequence[str], threads: int) -> None:
    """Run the command on these ranks; raises RuntimeError if it fails."""
    done = subprocess.run(
        build_run_command(num_ranks, list(settings)),
        cwd=_ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(settings)}: exit {done.returncode}\n{done.stderr[-2000:]}")


def videos_of(
    asked: Sequence[tuple[Scene, str]],
    settings: Sequence[str],
    *,
    num_ranks: int = 1,
    threads: int = 1,
    image: bool = False,
    run: Callable[[int, Sequence[str], int], None] = run_command,
) -> list[Made]:
    """Make a video of each caption in one run of the command, which ``run`` starts.

    Several ranks compute each video together. With ``image`` each is given the first frame of a rendered
    video of its scene. Raises RuntimeError if the run fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs: list[dict[str, object]] = []
        for number, (scene, text) in enumerate(asked):
            jobs.append({"name": f"{number:03}", "prompt": text, "seed": number})
            if image:
                Image.fromarray(draw_first_frame(scene, number).numpy()).save(
                    folder / f"{number:03}.first.png"
                )
                jobs[-1]["image"] = f"{number:03}.first.png"
        (folder / "jobs.jsonl").write_text(
            "".join(json.dumps(job, ensure_ascii=False) + "\n" for job in jobs), encoding="utf-8"
        )
        shared = [
            f"jobs={folder}/jobs.jsonl",
            f"output.dir={folder}",
            "output.save_tensor=true",
            f"parallel.ulysses={num_ranks}",
        ]
        run(num_ranks, ["task=toy", *shared, *settings], threads)
        return [_made(folder, f"{number:03}") for number in range(len(asked))]


def _made(folder: Path, name: str) -> Made:
    record = VideoRecord.from_json(
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    )
    assert record.config is not None
    return Made(
        convert_to_uint8_frames(load_file(folder / f"{name}.safetensors")["video"]).numpy(),
        record.config["sample"]["steps"] - (record.guessed_steps or 0),
    )


def main() -> None:
    """Score each configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="another than the one that comes with the program"
    )
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument(
        "--only",
        help="ways whose name holds this; float32, which the others are compared with, is always run",
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1, help="ways that are run side by side")
    parser.add_argument(
        "--out",
        type=Path,
        help="a JSON file of what was found; ways that are scored again are replaced in it",
    )
    options = parser.parse_args()
    ways = [
        way for way in WAYS if way.name == "float32" or not options.only or options.only in way.name
    ]
    ways = [way for way in ways if not way.gpu or torch.cuda.is_available()]
    asked = draw_held_out(options.captions)
    given = [] if options.checkpoint is None else [f"ckpt_dir={options.checkpoint.resolve()}"]
    threads = max(1, (os.cpu_count() or 1) // options.at_once // options.ranks)
    record = None if options.out is None else Record(options.out, ("way", "ranks", "captions"))

    def made(way: Way) -> list[Made]:
        try:
            return videos_of(
                asked,
                [*given, *way.settings],
                num_ranks=options.ranks,
                threads=threads,
                image=way.image,
            )
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return []

    print(
        "| | steps computed | right | background | colours | motions | PSNR |\n"
        "|---|---|---|---|---|---|---|",
        flush=True,
    )
    references: list[Made] = []
    with ThreadPoolExecutor(options.at_once) as pool:
        for way, videos in zip(ways, pool.map(made, ways), strict=True):
            references = references or videos
            if not references:
                raise SystemExit(1)
            if videos:
                row = _score(way, asked, videos, references)
                if record is not None:
                    record.add({"ranks": options.ranks, **row})


def _score(
    way: Way, asked: Sequence[tuple[Scene, str]], videos: Sequence[Made], references: Sequence[Made]
) -> dict[str, object]:
    """Print and return a row of the table."""
    verdicts: list[Verdict] = []
    for (scene, text), made in zip(asked, videos, strict=True):
        verdicts.append(judge(made.frames, scene))
        if not verdicts[-1].right:
            print(f"{way.name}: {text!r} became {verdicts[-1].seen}", file=sys.stderr)
    shares = {
        key: sum(getattr(each, key) for each in verdicts) / len(verdicts)
        for key in ("right", "background", "colors", "motions")
    }
    steps = float(np.mean([made.num_steps for made in videos]))
    pairs = [(one.frames, other.frames) for one, other in zip(videos, references, strict=True)]
    distance = float(np.mean([psnr(*pair) for pair in pairs]))
    far = ""
    if way is not WAYS[0] and not way.image:
        is_same = all(np.array_equal(*pair) for pair in pairs)
        far = "the same" if is_same else f"{distance:.1f} dB"
    print(
        f"| {way.name} | {steps:.1f} | "
        + " | ".join(f"{100 * share:.0f} %" for share in shares.values())
        + f" | {far} |",
        flush=True,
    )
    return {
        "way": way.name,
        "captions": len(verdicts),
        "computed_steps": steps,
        **shares,
        "psnr": distance,
    }


if __name__ == "__main__":
    main()
