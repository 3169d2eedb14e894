"""CPU time of a run with many jobs besides making videos: planning, sending, prompt cache, gallery page.

    python -m bench.jobs --jobs 10000

Each line has an image and settings of its own. Prints the CPU seconds of each part; needs no GPU and no
checkpoint.
"""

import argparse
import json
import pickle
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from tests.gallery_folder import RUN, write_record
from wan_dist.jobs.planned_job import plan_jobs
from wan_dist.output.gallery.background import PageWriter
from wan_dist.pipeline.prompt_cache import PromptCache
from wan_dist.pipeline.resume import ResumeState
from wan_dist.planning.digests import WeightsDigests
from wan_dist.tasks.run_config import read_config


def write_jobs(folder: Path, number: int) -> Path:
    """Write a file of ``number`` jobs with an image for each; returns the file."""
    Image.effect_noise((1280, 720), 40).convert("RGB").save(folder / "image.jpg")
    lines = []
    for place in range(number):
        (folder / f"{place}.jpg").hardlink_to(folder / "image.jpg")
        own = {
            "seed": place,
            "steps": 10 + place % 40,
            "shift": 2 + place / number,
            "guide_scale": 3 + place / number,
        }
        lines.append(
            json.dumps(
                {
                    "prompt": f"a ball rolling over wet grass, number {place}",
                    "image": f"{place}.jpg",
                    **own,
                }
            )
        )
    (folder / "jobs.jsonl").write_text("\n".join(lines))
    return folder / "jobs.jsonl"


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print the CPU seconds, and the elapsed ones, of a block."""
    cpu, clock = time.process_time(), time.perf_counter()
    yield
    print(
        f"{what:48} {time.process_time() - cpu:7.2f} s of CPU, {time.perf_counter() - clock:7.2f} s"
    )


def main() -> None:
    """Time the parts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    number = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = ["task=i2v-14B", f"jobs={write_jobs(folder, number)}"]
        config = read_config(arguments)
        assert config is not None
        with timed(f"check {number} jobs for 16 ranks"):
            checked = plan_jobs(config, arguments, ranks=(16, 8), gpu_bytes=80 * 2**30)
        with timed("send them to another rank"):
            sent = pickle.dumps(checked)
            pickle.loads(sent)
        print(f"{'':48} {len(sent) / 1e6:7.2f} MB")
        with timed("find their digests and kept states"):
            for job in checked:
                weights = WeightsDigests("", "")
                ResumeState(folder, job.config, job.plan, weights, is_job=True)._find_file()
        cache, context = PromptCache(folder / "cache", "", 2**30), torch.zeros(1, 8)
        with timed("keep a text of each"):
            for job in checked:
                cache.put(job.plan.prompt, context)
        (folder / "videos").mkdir()
        for seed, job in enumerate(checked):
            write_record(folder / "videos", job.name, prompt=job.plan.prompt, seed=seed)
        writer = PageWriter(folder / "videos")
        for when in ("write the page", "write it again"):
            with timed(when):
                writer.write({"run": RUN}, {})


if __name__ == "__main__":
    main()
