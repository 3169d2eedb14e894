"""Distillation of the toy: a LoRA, or whole weights, that makes videos in four steps without guidance.

python -m toy.distill --out FOLDER                    # on one GPU; a LoRA of rank 32
python -m toy.distill --out FOLDER --rank 0           # whole weights
python -m toy.distill --out FOLDER --tiny             # a try on a CPU

The base toy with guidance, Euler's rule in many steps, is the teacher. Between the noise levels of two of the
student's steps it covers a segment; the student learns the segment's mean velocity at its beginning
(progressive distillation, arXiv:2202.00512, in one stage). First the segments are those of the teacher's
own videos; later they begin where the student gets to, so that its errors do not add up (DAgger,
arXiv:1011.0686).

A run goes on from what --out and --pool-folder hold: segments are added to, the student is trained further.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from toy.denoiser import (
    DIMS,
    TRANSFORMER_FILE,
    Denoiser,
    autocast,
    list_denoiser_tensors,
    load_caption_encoder,
    load_denoiser,
    load_vae,
)
from toy.descent import Averages, Descent, compute_rate, is_block_matrix, recorded
from toy.held_out import (
    LATENT_SIZE,
    draw_held_out,
    encode_first_frames,
    judge_videos,
    make_videos,
)
from toy.judge import psnr
from toy.lora import add_lora, list_lora_tensors
from toy.render import NUM_FRAMES, SIZE, render
from toy.scenes import caption, draw_scene
from toy.segments import Conditions, Course, Pool, Segments, hold_first
from wan_dist.models.vae.model import WanVae

STUDENT_FILE = "student.pt"
_STEPS_AN_AVERAGE = 10
_SECONDS_A_SAVE = 60
_TINY = {
    "size": 64, "frames": 9, "batch": 8, "substeps": 2, "conditions": 16, "pool": 128,
    "pool_seconds": 12.0, "seconds": 20.0, "captions": 2,
}  # fmt: skip


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA; 0: whole weights")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--shift", type=float, default=3.0, help="of the noise levels")
    parser.add_argument("--guidance", type=float, default=4.0, help="of the teacher")
    parser.add_argument("--num-steps", type=int, default=4, help="of the student")
    parser.add_argument("--substeps", type=int, default=6, help="the teacher's, in a segment")
    parser.add_argument("--conditions", type=int, default=10240, help="captions to learn from")
    parser.add_argument("--pool", type=int, default=40960, help="segments that are kept at most")
    parser.add_argument("--pool-folder", type=Path, help="for these; --out if not given")
    parser.add_argument("--pool-seconds", type=float, default=45, help="for the teacher's segments")
    parser.add_argument("--seconds", type=float, default=125, help="of training, new segments too")
    parser.add_argument("--steps", type=int, default=10**9, help="of training at most")
    parser.add_argument("--own-from", type=float, default=0.25, help="fraction of the training from "
                        "which segments that begin with the student replace others")  # fmt: skip
    parser.add_argument("--steps-an-own", type=int, default=10, help="steps for a batch of these")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--size", type=int, default=SIZE, help="pixels of a side")
    parser.add_argument("--frames", type=int, default=NUM_FRAMES)
    parser.add_argument("--captions", type=int, default=64, help="held-out ones to be scored by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="defaults for a minute on a CPU")
    if parser.parse_known_args(arguments)[0].tiny:
        parser.set_defaults(**_TINY)
    return parser.parse_args(arguments)


def draw_conditions(options: argparse.Namespace, vae: WanVae, device: torch.device) -> Conditions:
    """Return captions and first frames of random scenes, which hold none that is held out."""
    chance = random.Random(options.seed + 2)
    scenes = [draw_scene(chance) for _ in range(options.conditions)]
    encode = load_caption_encoder(device)
    texts = encode([caption(scene, chance) for scene in scenes])
    given = torch.arange(len(scenes)) % 4 == 0
    encoded = []
    for start in range(0, len(scenes), 256):
        drawn = render(
            scenes[start : start + 256 : 4], chance, device, size=options.size, num_frames=2
        )
        encoded.append(encode_first_frames(vae, drawn[:, :, :1]))
    first = torch.cat(encoded)
    known = first.new_zeros(len(scenes), *first.shape[1:])
    known[::4] = first
    return Conditions(texts, known, given.to(device), encode([""]))


def fill_pool(pool: Pool, course: Course, options: argparse.Namespace) -> None:
    """Add segments of the teacher's videos to the pool and to its folder."""
    folder: Path = options.pool_folder or options.out
    settings = {
        key: getattr(options, key)
        for key in (
            "seed",
            "conditions",
            "size",
            "frames",
            "shift",
            "guidance",
            "num_steps",
            "substeps",
        )
    }
    parts = sorted(folder.glob("pool-*.pt"))
    for part in parts:
        saved = torch.load(part, map_location=course.device)
        if saved["settings"] != settings:
            raise SystemExit(f"{part} was made with {saved['settings']}, not {settings}")
        pool.add(Segments(*saved["segments"]))
    follow = None
    begun = saved_at = time.perf_counter()
    num_saved = pool.num_filled
    num_parts = len(parts)
    while pool.num_filled < pool.size and time.perf_counter() - begun < options.pool_seconds:
        follow = follow or record_without_gradients(
            lambda: course.follow_teacher(options.batch), course.device
        )
        pool.add(follow())
        _wait(course.device)
        if time.perf_counter() - saved_at > _SECONDS_A_SAVE:
            save_part(pool, num_saved, settings, folder / f"pool-{num_parts:03}.pt")
            saved_at, num_saved, num_parts = time.perf_counter(), pool.num_filled, num_parts + 1
    if pool.num_filled > num_saved:
        save_part(pool, num_saved, settings, folder / f"pool-{num_parts:03}.pt")


def save_part(pool: Pool, start: int, settings: dict[str, object], file: Path) -> None:
    """Write the segments from ``start`` on."""
    rows = slice(start, pool.num_filled)
    segments = tuple(tensor[rows].cpu() for tensor in pool.segments.tensors())
    torch.save({"settings": settings, "segments": segments}, file)


def record_without_gradients(
    make: Callable[[], Segments], device: torch.device
) -> Callable[[], Segments]:
    """Return a function that makes segments, on a GPU as a CUDA graph in bfloat16."""

    @torch.no_grad()
    def make_segments() -> Segments:
        with autocast(device):
            return make()

    return recorded(make_segments, device)


def name_lora(num_steps: int) -> str:
    """Return the LoRA's file name."""
    return f"toy-{num_steps}steps-lora.safetensors"


def make_student(options: argparse.Namespace, device: torch.device) -> Denoiser:
    """Return what is trained, which begins as the base toy."""
    student = load_denoiser(device)
    if options.rank:
        add_lora(student, options.rank)
    else:
        student.requires_grad_(True)
    return student


class Training:
    """The student, the average of its last weights, and what a step of its training is."""

    def __init__(self, student: Denoiser, course: Course, pool: Pool, batch: int) -> None:
        self.student, self.course, self.pool, self.batch = student, course, pool, batch
        named = [(name, each) for name, each in student.named_parameters() if each.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.averages = Averages(self.parameters, decay=0.98)
        self.descent = Descent(named, is_block_matrix)
        self.totals = torch.zeros(course.num_steps, 2, device=course.device)
        """Of each of the student's steps, sum of the losses and their number since `report`."""

    def descend(self) -> Tensor:
        """Do one step; return the loss."""
        rows = self.pool.draw(self.batch)
        with autocast(self.course.device):
            found = self.course.predict(self.student, rows.starts, rows.steps, rows.chosen)
        given = self.course.conditions.given[rows.chosen]
        error = hold_first(found.float() - rows.velocities, given).square()
        losses = error.mean((1, 2, 3, 4))
        self.descent.step(losses.mean())
        losses = losses.detach()
        self.totals.index_add_(0, rows.steps, torch.stack([losses, torch.ones_like(losses)], dim=1))
        return losses.mean()

    def report(self) -> str:
        """Return the mean loss at each of the student's steps since the last call."""
        sums, counts = self.totals.unbind(1)
        text = " ".join(f"{loss:.4f}" for loss in (sums / counts).tolist())
        self.totals.zero_()
        return text

    def averaged(self) -> Iterable[tuple[str, Tensor]]:
        """Yield the averaged weights by name."""
        return zip(self.names, self.averages.values, strict=True)

    def save(self, folder: Path) -> None:
        """Write the student, to be gone on from, and its averaged weights, to be used."""
        torch.save((self.names, self.parameters, self.averages.values), folder / STUDENT_FILE)
        if any(".down." in name for name in self.names):
            tensors = list_lora_tensors(self.averaged(), torch.float16)
            save_file(dict(tensors), folder / name_lora(self.course.num_steps))
        else:
            save_file(dict(list_denoiser_tensors(self.averaged())), folder / TRANSFORMER_FILE)

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Read the student again, if there is one."""
        file = folder / STUDENT_FILE
        if not file.exists():
            return
        names, *values = torch.load(file, map_location=self.course.device)
        shapes = [parameter.shape for parameter in self.parameters]
        if names != self.names or [value.shape for value in values[0]] != shapes:
            raise SystemExit(f"{file} is of another --rank")
        torch._foreach_copy_([each.detach() for each in self.parameters], values[0])
        torch._foreach_copy_(self.averages.values, values[1])


def train(training: Training, options: argparse.Namespace) -> None:
    """Train the student for some time."""
    device, course = training.course.device, training.course
    training.pool.close()  # a recorded step draws from as many
    one_step = recorded(training.descend, device)
    follow = None
    num_videos = max(1, options.batch // options.num_steps)
    every = 100 if device.type == "cuda" else 10
    begun = saved_at = time.perf_counter()
    step, progress = 0, 0.0
    while progress < 1:
        training.descent.rate.fill_(compute_rate(int(1000 * progress), 1000, options.rate))
        one_step()
        step += 1
        if step % _STEPS_AN_AVERAGE == 0:
            training.averages.update()
            _wait(device)
        if progress >= options.own_from and step % options.steps_an_own == 0:
            follow = follow or record_without_gradients(
                lambda: course.follow_student(training.student, num_videos), device
            )
            training.pool.add(follow())
        seconds = time.perf_counter() - begun
        progress = max(seconds / options.seconds, step / options.steps)
        if step % every == 0 or progress >= 1:
            print(f"step {step} losses {training.report()} {seconds:.0f} s", flush=True)
        if time.perf_counter() - saved_at > _SECONDS_A_SAVE:
            training.save(options.out)
            saved_at = time.perf_counter()
    training.save(options.out)


def score(options: argparse.Namespace, vae: WanVae, device: torch.device) -> None:
    """Print how well held-out captions are shown by the teacher, the base alone, and the student's file.

    PSNR is against the teacher's videos.
    """
    file, lora = options.out / TRANSFORMER_FILE, options.out / name_lora(options.num_steps)
    base = load_denoiser(device)
    student = load_denoiser(device, lora=lora) if options.rank else load_denoiser(device, file=file)
    encode = load_caption_encoder(device)
    no_text = encode([""])
    asked = draw_held_out(options.captions)

    def sample(denoiser: Denoiser | None, latents: Tensor, given: Tensor, texts: Tensor) -> Tensor:
        conditions = Conditions(texts, latents[:, :, :1], given, no_text)
        course = make_course(base, conditions, LATENT_SIZE, options)
        predict = course.lead if denoiser is None else partial(course.predict, denoiser)
        return course.walk(latents, torch.arange(len(texts), device=device), predict)[1]

    for is_given in (False, True):
        references = None
        for name, denoiser in (("teacher", None), ("base", base), ("student", student)):
            videos = make_videos(partial(sample, denoiser), asked, encode, vae, is_given=is_given)
            references = references or videos
            verdicts = judge_videos(videos, asked)
            distance = np.mean([psnr(*pair) for pair in zip(videos, references, strict=True)])
            for (_, text), verdict in zip(asked, verdicts, strict=True):
                if not verdict.right:
                    print(f"{name}: {text!r} became {verdict.seen}")
            counts = " ".join(
                f"{key} {sum(getattr(verdict, key) for verdict in verdicts)}"
                for key in ("right", "background", "colors", "motions")
            )
            print(
                f"{name}{', first frame given' if is_given else ''}, {len(asked)} videos: {counts}, "
                f"{distance:.1f} dB",
                flush=True,
            )


def make_course(
    teacher: Denoiser,
    conditions: Conditions,
    latent_size: tuple[int, ...],
    options: argparse.Namespace,
) -> Course:
    """Return the course that the options describe."""
    return Course(
        teacher,
        conditions,
        latent_size,
        num_steps=options.num_steps,
        num_substeps=options.substeps,
        guidance=options.guidance,
        shift=options.shift,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> None:
    """Distil the toy, write the student and score it."""
    options = parse_options(arguments)
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()

    def tell(part: str) -> None:
        _wait(device)
        print(f"{part}: {time.perf_counter() - begun:.0f} s", flush=True)

    vae = load_vae(device)
    conditions = draw_conditions(options, vae, device)
    tell("conditions")
    latent_size = (
        DIMS.vae.latent_dim,
        (options.frames - 1) // 4 + 1,
        options.size // 8,
        options.size // 8,
    )
    teacher, student = load_denoiser(device), make_student(options, device)
    if device.type == "cuda":
        for denoiser in (teacher, student):
            compile_blocks(denoiser)
    course = make_course(teacher, conditions, latent_size, options)
    pool = Pool(options.pool, latent_size, device)
    fill_pool(pool, course, options)
    tell(f"pool of {pool.num_filled} segments")
    training = Training(student, course, pool, options.batch)
    training.restore(options.out)
    if options.seconds > 0:
        train(training, options)
        tell("training")
    score(options, vae, device)
    tell("all")


def compile_blocks(denoiser: Denoiser) -> None:
    """Compile the blocks, which share their code: one takes as long as all."""
    for block in denoiser.transformer.blocks:
        block.compile(dynamic=False)


if __name__ == "__main__":
    main()
