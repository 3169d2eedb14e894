"""Score the toy model as it is run: how many of the held-out captions it shows rightly, and how far frames are from the float32 run's.

python -m toy.score toy/checkpoint                           # the table of toy/README.md
python -m toy.score toy/checkpoint --only "steps=4" --captions 16
"""

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from toy.judge import Verdict, judge
from toy.scenes import Scene, all_scenes, caption
from wan_dist.run import main as run


@dataclass(frozen=True)
class Way:
    """A way to run the model."""

    name: str
    settings: tuple[str, ...] = ()
    gpu: bool = False
    """Whether it needs one."""


WAYS = (
    Way("float32", ("dtype=float32",)),
    Way("bfloat16", ("dtype=bfloat16",)),
    *(Way(f"quant={quant}", ("dtype=bfloat16", f"quant={quant}"), gpu=quant == "fp8") for quant in ("fp8", "int8", "int4")),
    Way("attention=8bit", ("dtype=bfloat16", "attention=8bit"), gpu=True),
    *(Way(f"cache.steps={kind}", ("dtype=float32", f"cache.steps={kind}")) for kind in ("easy", "tea")),
    *(
        Way(f"{solver}, {steps} steps", ("dtype=float32", f"sample.solver={solver}", f"sample.steps={steps}"))
        for solver in ("unipc", "dpm++", "euler")
        for steps in (4, 8, 12, 20, 50)
    ),
)


def held_out(count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """Return scenes that were never trained on, with a caption each."""
    chance = random.Random(seed)
    scenes = [scene for scene in all_scenes() if scene.is_held_out]
    return [(scene, caption(scene, chance)) for scene in chance.sample(scenes, count)]


def video_of(prompt: str, folder: Path, settings: list[str]) -> NDArray[np.uint8]:
    """Make a video by the command and return its frames (F, H, W, 3)."""
    code = run(["task=toy", f"prompt={prompt}", *settings, f"output.dir={folder}", "output.name=out", "output.save_tensor=true"])
    if code:
        raise SystemExit(code)
    video = load_file(folder / "out.safetensors")["video"]  # (3, F, H, W) in [-1, 1]
    return (video * 127.5 + 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()


def psnr(video: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio in dB."""
    error = np.square(video.astype(np.float64) - reference).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def main() -> None:
    """Score each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--only", help="ways whose name holds this")
    parser.add_argument("--out", type=Path, help="a JSON file of what was found")
    options = parser.parse_args()
    found, references = {}, {}
    for way in WAYS:
        if (options.only and options.only not in way.name and way.name != "float32") or (way.gpu and not torch.cuda.is_available()):
            continue
        verdicts: list[Verdict] = []
        distances, begun = [], time.perf_counter()
        for number, (scene, text) in enumerate(held_out(options.captions)):
            with tempfile.TemporaryDirectory() as folder:
                frames = video_of(text, Path(folder), [f"ckpt_dir={options.checkpoint}", f"seed={number}", *way.settings])
            references.setdefault(number, frames)
            distances.append(psnr(frames, references[number]))
            verdicts.append(judge(frames, scene))
            if not verdicts[-1].right:
                print(f"{way.name}: {text!r} became {verdicts[-1].seen}", file=sys.stderr)
        share = {key: sum(getattr(each, key) for each in verdicts) / len(verdicts) for key in ("right", "background", "colors", "motions")}
        found[way.name] = {**share, "psnr": float(np.mean(distances)), "seconds": (time.perf_counter() - begun) / len(verdicts)}
        print(
            f"| {way.name} | " + " | ".join(f"{100 * value:.0f} %" for value in share.values()) + f" | {found[way.name]['psnr']:.1f} |",
            flush=True,
        )
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
