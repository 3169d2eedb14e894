"""One video, in call order: encode text and images, denoise, keep the latents, decode, write, record."""

import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from wan_dist import vae
from wan_dist.config import RunConfig
from wan_dist.encode import encode
from wan_dist.errors import InputError, first_line
from wan_dist.experts import Experts
from wan_dist.kept import Kept, Progress
from wan_dist.log import keep_log, logger
from wan_dist.memory import first_that_works, free_memory
from wan_dist.parallel.agreement import Agreeing, is_any
from wan_dist.parallel.collectives import broadcast, broadcast_object, gather_objects, name_those_awaited
from wan_dist.parallel.mesh import limit_waiting, open_groups
from wan_dist.plan import Plan
from wan_dist.preemption import Preempted, preemption
from wan_dist.record import described, digest_of, speed
from wan_dist.report import Report
from wan_dist.sampling.conditioning import initial_noise
from wan_dist.sampling.denoise import denoise
from wan_dist.sampling.solvers import make_solver
from wan_dist.session import Session, find_device, open_session
from wan_dist.vae import float32_frames, uint8_frames
from wan_dist.video import SaveError, check_output, save_image, save_tensors, save_video, to_uint8
from wan_dist.ways import Way
from wan_dist.weights.checkpoint import Checkpoint

_KEEP_SECONDS = 120.0
"""Between two times that progress is kept, for the case that a run is ended without being asked."""


@dataclass(frozen=True)
class Video:
    """One in the making."""

    session: Session
    config: RunConfig
    plan: Plan
    report: Report
    kept: Kept
    result: Path
    latents_file: Path

    @property
    def is_first(self) -> bool:
        """Whether this rank decodes and writes."""
        return self.session.groups.replica.rank == 0


@torch.no_grad()
def run_job(config: RunConfig, plan: Plan) -> Path | None:
    """Open the groups of ranks and make one video in them; the first rank returns its path.

    Raises InputError for what is wrong with checkpoint or output folder, before weights are read.
    """
    device = find_device(config)
    with open_groups(plan.degrees, device, timeout=config.parallel.timeout) as groups:
        seed, name = broadcast_object((plan.seed, plan.name), groups.replica)  # a drawn seed is the first rank's
        folder = Path(config.output.dir).expanduser()
        if plan.degrees.num_ranks > 1:
            keep_log(folder / "logs" / name)
        plan = replace(plan, seed=seed, name=name)
        logger.info(plan.summary)
        if plan.advice:
            logger.info("note      %s", plan.advice)
        report = Report(config, device)
        with report.stage("check", f"output {folder}"):
            if groups.rank == 0:
                check_output(folder, width=plan.width, height=plan.height, fps=plan.fps)
            session = open_session(config, plan, groups, device)
        kept = Kept(folder, config, plan, session.weights if groups.rank == 0 else "")
        video = begin(session, config, plan, report, kept)
        complete(video, make_latents(video))
        return video.result if video.is_first else None


def begin(session: Session, config: RunConfig, plan: Plan, report: Report, kept: Kept, *, quiet: bool = False) -> Video:
    """Read what was kept of this video, and arrange it; all ranks of the replica."""
    if config.latents is None:
        plan = kept.go_on(session.groups.replica, session.device)
    plan = session.arrange(plan, config, quiet=quiet)
    report.facts |= {"checkpoint": str(session.checkpoint.folder), "degrees": vars(plan.degrees)}
    result = _free_path(kept.folder, plan, fixed=config.output.name is not None)
    file = result.with_suffix(".latents.safetensors") if config.latents is None else Path(config.latents).expanduser()
    return Video(session, config, plan, report, kept, result, file)


@torch.no_grad()
def make_latents(video: Video) -> Tensor:
    """Return the latents (C, T, h, w), float32, on every rank, when the first one has them on disk."""
    if video.config.latents is not None:
        return _given_latents(video.latents_file).to(video.session.device)
    latents = _denoised(video)
    if video.is_first:
        save_tensors(video.latents_file, {"latents": latents.cpu()}, {"digest": video.kept.digest})
    return latents


@torch.no_grad()
def complete(video: Video, latents: Tensor) -> None:
    """Decode and write the result and its record.

    If decoding or writing fails, the latents are on disk and the error says how to go on from them.
    """
    with _latents_safe(video, latents):
        _decode(video, latents, partial(_write, video))
    if video.is_first:
        _finish(video)


@torch.no_grad()
def decode_first(video: Video, latents: Tensor) -> list[Tensor]:
    """Return the result's frames, chunks (n, H, W, 3) on the host of the first rank, for `complete_later`; fails as `complete` does."""
    frames: list[Tensor] = []

    def take(chunks: Iterator[Tensor]) -> None:
        frames[:] = [chunk.cpu() for chunk in chunks]

    with _latents_safe(video, latents):
        _decode(video, latents, take)
    return frames


def complete_later(video: Video, latents: Tensor, frames: Iterable[Tensor]) -> None:
    """Write the result from what `decode_first` returned, and its record, on the first rank, while the next video is denoised."""
    with _latents_safe(video, latents), video.report.stage("save", beside=True):
        _write(video, iter(frames))
    _finish(video)


@contextmanager
def _latents_safe(video: Video, latents: Tensor) -> Iterator[None]:
    """Say how to go on from the latents if what is done inside fails; keep them as progress if it fails since the run was asked to end."""
    config = video.config
    try:
        yield
    except (Exception, Preempted) as fault:
        if isinstance(fault, Preempted) or preemption.was_asked():  # ffmpeg may have been asked as well
            if video.is_first and config.latents is None:
                video.kept.write(Progress(config.sample.steps, latents))
            if isinstance(fault, Preempted):
                raise
            raise Preempted(f"asked to end: stopped while decoding ({first_line(fault)}); the same command goes on from there") from fault
        if video.is_first:
            command = _resume_command(config, video.session.checkpoint, video.latents_file, video.result)
            logger.error("the latents are kept; make the video from them with: %s", command)
        raise


def _given_latents(file: Path) -> Tensor:
    latents = load_file(file)["latents"].float()
    if not torch.isfinite(latents).all():
        raise InputError(f"latents={file} are not finite: the video would be black")
    return latents


def _finish(video: Video) -> None:
    """Write the record; what was kept for the case of a failure goes."""
    plan, report, config = video.plan, video.report, video.config
    report.facts |= described(config, plan) | {"status": "done", "file": str(video.result), "arrangement": asdict(plan.arrangement)}
    if "denoise" in report.stages:
        num_steps = config.sample.steps - video.kept.progress.num_done
        seconds, guessed = report.stages["denoise"]["seconds"], report.facts.get("guessed_steps", 0)
        report.facts |= speed(plan, seconds, num_steps, guessed)
    report.facts |= {"digest": video.kept.digest, "video_digest": digest_of(video.result)}
    report.compare(plan.uses, plan.ranks_per_node)
    report.save(video.result.with_suffix(".json"))
    if config.latents is None:  # others' latents say nothing of what was kept
        video.kept.remove()
        if not config.output.save_latents:
            video.latents_file.unlink()
    logger.log(report.level, "saved     %s", video.result)


def _denoised(video: Video) -> Tensor:
    """Return the latents (C, T, h, w), float32, on every rank; models that are not to stay are gone from the device then.

    Goes on from the progress that was kept. Raises Preempted when this or another rank was asked to end, after a step.
    """
    session, config, plan, report, kept = video.session, video.config, video.plan, video.report, video.kept
    groups = session.groups
    start, num_done = kept.progress.latents, kept.progress.num_done
    if start is not None and num_done == config.sample.steps:
        return start
    limit_waiting(groups, config.parallel.load_timeout)
    conditioning = encode(session, config, plan, report)
    solver = make_solver(config.sample.solver, config.sample.steps, plan.shift)
    if start is None:
        noise = initial_noise(plan.latent_shape, seed=plan.seed, noise_device=config.noise_device, device=report.device)
        start = broadcast(noise, groups.replica, report.device)
        assert start is not None
    else:
        solver.go_on(num_done, kept.progress.solver)
    start = start.unsqueeze(0)
    attention = session.choose()
    report.facts["attention"] = attention.name
    logger.log(report.level, "attention %s (%s)", attention.name, attention.reason)
    if plan.degrees.num_ranks > 1:
        how = "sharded" if plan.arrangement.shard_dit else "on every rank"
        logger.log(report.level, "ranks     %s, transformer %s", plan.degrees, how)
    experts = Experts(session, config, plan, attention, report, conditioning, start, solver, num_done, kept.progress.guesses)
    predict = Agreeing(experts.predict(), groups.replica)
    with (
        report.stage("denoise", f"{len(solver) - num_done} steps of {config.sample.solver}"),
        preemption.until_asked(),
        logging_redirect_tqdm([logger]),
        name_those_awaited(groups.replica),  # where sharded weights are gathered, which is not done in our collectives
    ):
        bar = _progress_bar if groups.rank == 0 else iter
        known = conditioning.known_latents
        latents = denoise(predict, start, solver, first=num_done, known_latents=known, progress=bar, after_step=_keeper(video, experts))
        if config.cache.steps is not None:
            report.facts["guessed_steps"] = experts.counts["guessed"]
            logger.log(report.level, "cache     %d of %d steps were guessed", experts.counts["guessed"], len(solver))
        del predict
        if not session.shelf.keeps:
            free_memory()
    report.other_ranks = gather_objects(report.stages, groups.replica)[1:]
    return latents.squeeze(0)


def _keeper(video: Video, experts: Experts) -> Callable[[int, Tensor], None]:
    """Return what is called after each step: it keeps the progress from time to time, and when this or another rank was asked to end."""
    axis, solver = video.session.groups.replica, experts.solver
    kept_at = time.monotonic()

    def after_step(num_done: int, latents: Tensor) -> None:
        nonlocal kept_at
        asked = is_any(preemption.asked_by is not None, axis, latents.device)
        if num_done == len(solver):
            return
        if video.is_first and (asked or time.monotonic() - kept_at > _KEEP_SECONDS):
            video.kept.write(Progress(num_done, latents.squeeze(0), solver.state(), experts.state()))
            kept_at = time.monotonic()
        if asked:
            is_any(True, axis, latents.device)  # the first rank has written it: one that ends may have the others ended
            raise Preempted(f"asked to end: stopped after step {num_done} of {len(solver)}; the same command goes on from there")

    return after_step


def _decode(video: Video, latents: Tensor, take: Callable[[Iterator[Tensor]], None]) -> None:
    """Decode latents (C, T, h, w); the first rank takes frames as they are ready; where memory runs out, again in a way that needs less."""
    session, config, plan = video.session, video.config, video.plan
    axis, checkpoint = session.groups.replica, session.checkpoint
    if is_any(preemption.asked_by is not None, axis, latents.device):
        raise Preempted("asked to end: stopped before decoding; the same command goes on from there")
    if not torch.isfinite(latents).all():
        raise FloatingPointError("the latents are not finite: the video would be black")

    def work(way: Way) -> None:
        if axis.rank != 0 and way.name != "parallel":
            return  # the first rank goes on alone
        detail = f"VAE {way}, {plan.frame_num} frame{'' if plan.frame_num == 1 else 's'}"
        with video.report.stage("decode", detail), vae.kernels_tried(checkpoint.vae.dims, way):
            model = vae.load(checkpoint, config, way, latents.device, session.shelf)
            chunks = vae.decode(model, latents, float32_frames if config.output.save_tensor else uint8_frames, way, axis)
            if axis.rank == 0:
                try:
                    take(chunks)
                except SaveError:
                    deque(chunks, maxlen=0)  # the other ranks send their shares of all
                    raise
            else:
                deque(chunks, maxlen=0)  # none come here: this rank's strips go to the first one

    ways = vae.find_ways(config, plan, checkpoint.vae.dims, latents.device, axis)
    if ways[0].name == "cpu" and config.memory.vae is None and session.shelf.clear():  # sooner read the transformer again
        ways = vae.find_ways(config, plan, checkpoint.vae.dims, latents.device, axis)
    if first_that_works(ways, work, "decoding", "the latents are safe, "):
        video.report.ran_out("decode")


def _write(video: Video, chunks: Iterator[Tensor]) -> None:
    """Write frames (n, H, W, 3), uint8, or float32 in [-1, 1] which are kept too."""
    config, plan, result = video.config, video.plan, video.result
    floats: list[Tensor] = []

    def seen() -> Iterator[Tensor]:
        for chunk in chunks:
            if config.output.save_tensor:
                floats.append(chunk.cpu())
            yield to_uint8(chunk)

    if plan.task.still:
        save_image(result, next(seen())[0])
    else:
        save_video(result, seen(), fps=plan.fps, num_frames=plan.frame_num)
    if floats:
        save_tensors(result.with_suffix(".safetensors"), {"video": torch.cat(floats).permute(3, 0, 1, 2).contiguous()})


def _free_path(folder: Path, plan: Plan, *, fixed: bool) -> Path:
    """Return the result's path: a name the user chose is replaced, one we made up gets a number rather than overwrite."""
    suffix = ".png" if plan.task.still else ".mp4"
    path, number = folder / f"{plan.name}{suffix}", 1
    while not fixed and path.exists():
        number += 1
        path = folder / f"{plan.name}_{number}{suffix}"
    return path


def _resume_command(config: RunConfig, checkpoint: Checkpoint, kept: Path, result: Path) -> str:
    settings = {
        "task": config.task,
        "ckpt_dir": checkpoint.folder,
        "latents": kept,
        "output.dir": result.parent,
        "output.name": result.stem,
        "fps": config.fps,
    }
    return shlex.join(["python", "-m", "wan_dist.run", *(f"{key}={value}" for key, value in settings.items())])


def _progress_bar(steps: range) -> Iterable[int]:
    form = "denoise   {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} steps, {rate_inv_fmt}, {remaining} left"
    return tqdm(steps, bar_format=form, initial=steps.start, total=steps.stop, mininterval=0.1 if sys.stderr.isatty() else 10.0)
