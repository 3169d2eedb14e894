"""Videos from Python: models are loaded once and kept.

python docs/examples/generate.py
torchrun --nproc_per_node=2 docs/examples/generate.py     # the same on two ranks
"""

# %% Open the models of a task. "toy" is a small model in this repository; others are in docs/tasks.md.
import sys
from pathlib import Path

import wan_dist

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs")
pipeline = wan_dist.open_pipeline("toy", dtype="float32")

# %% What a call will do, before it is done: sizes, arrangement of the models, memory of each stage.
plan = pipeline.plan(size="64x64", frame_num=17)
print(plan.summary)
print(plan.arrangement.description)

# %% A video. Settings are those of the command line; sections are dictionaries.
video = pipeline("a red circle", seed=7, size="64x64", frame_num=17, sample={"steps": 8})
video.save(folder / "circle.mp4")

# %% The models stay loaded: another prompt, seed or number of steps takes the steps and a decode.
for seed in (1, 2):
    video = pipeline("a blue star", seed=seed, size="64x64", frame_num=17, sample={"steps": 4})
    video.save(folder / f"star-{seed}.mp4")

# %% Frames and latents are at hand; under torchrun the first rank has the frames.
if video.frames is not None:
    print(video.frames.shape, video.frames.dtype, tuple(video.latents.shape))
    print({name: stage["seconds"] for name, stage in video.record.stages.items()})

# %% Free the memory, and end the process groups where there are several ranks.
pipeline.close()
