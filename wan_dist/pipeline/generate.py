"""One video, in call order: encode text and images, denoise, keep the latents, decode, write, record."""

import shlex
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from wan_dist.config.schema import RunConfig
from wan_dist.output.locks import Ledger
from wan_dist.output.output_check import check_output, outcome_of
from wan_dist.output.record import described, speed
from wan_dist.output.stage_report import Report
from wan_dist.output.video_file import save_image, save_tensors, save_video, to_uint8
from wan_dist.parallel.collectives import broadcast_object
from wan_dist.parallel.consistency import is_any
from wan_dist.parallel.mesh import Groups, make_groups, opened
from wan_dist.parallel.team import Team
from wan_dist.pipeline import decode as vae
from wan_dist.pipeline.decode import float32_frames, uint8_frames
from wan_dist.pipeline.denoise import Video, make_latents, read_latents
from wan_dist.pipeline.out_of_memory import first_that_works
from wan_dist.pipeline.resume import Kept, Progress, warn_of_older
from wan_dist.pipeline.session import Session, find_device, open_session
from wan_dist.planning.plan import Plan
from wan_dist.planning.vae_memory import Way
from wan_dist.runtime.errors import first_line
from wan_dist.runtime.file_hash import hash_file
from wan_dist.runtime.log import keep_log, logger
from wan_dist.runtime.signals import Preempted, preemption
from wan_dist.weights.checkpoint import Checkpoint


@torch.no_grad()
def run_job(config: RunConfig, plan: Plan, team: Team) -> Path | None:
    """Make one video on all ranks of the team; the first rank returns its path.

    Raises InputError for what is wrong with checkpoint or output folder, before weights are read.
    """
    device = find_device(config)
    groups = make_groups(plan.degrees, team, device, config.parallel.timeout)
    folder = Path(config.output.dir).expanduser()
    if plan.degrees.num_ranks > 1:
        keep_log(folder / "logs" / plan.name)
    logger.info(plan.summary)
    if plan.advice:
        logger.info("note      %s", plan.advice)
    report = Report(config, device)
    with report.stage("check", f"output {folder}"):
        if groups.rank == 0:
            check_output(folder, [outcome_of(plan, keeps_tensor=config.output.save_tensor)])
            warn_of_older(folder)
        session = open_session(config, plan, groups, device)
    with closing(Ledger(folder)) as ledger, opened(groups):
        kept = Kept(folder, config, plan, session.digests, ledger=ledger)
        video = begin(session, config, plan, report, kept)
        complete(video, make_latents(video))
        return video.result if video.is_first else None


def begin(session: Session, config: RunConfig, plan: Plan, report: Report, kept: Kept, *, quiet: bool = False) -> Video:
    """Read what was kept of this video, arrange it, and reserve its name; all ranks of the replica."""

    def work() -> tuple[Plan, Path]:
        found = kept.go_on(session.groups.replica, session.device) if config.latents is None else plan
        if config.latents is not None:
            read_latents(Path(config.latents).expanduser())  # what is wrong with them is said before anything is there
        found = session.arrange(found, config, quiet=quiet)
        path = kept.reserve(fixed=config.output.name is not None) if session.groups.replica.rank == 0 else None
        path = cast(Path, broadcast_object(path, session.groups.replica))
        return kept.rename(found, path.stem), path

    plan, result = session.together(work, "begin a video")
    report.facts |= {"checkpoint": str(session.checkpoint.folder), "degrees": vars(plan.degrees)}
    file = result.with_suffix(".latents.safetensors") if config.latents is None else Path(config.latents).expanduser()
    return Video(session, config, plan, report, kept, result, file)


@torch.no_grad()
def complete(video: Video, latents: Tensor) -> None:
    """Decode and write the result and its record.

    If decoding or writing fails, the latents are on disk and the error says how to go on from them.
    """
    with _latents_safe(video, latents):
        _decode(video, latents, partial(_write, video))
        video.session.together(lambda: _finish(video) if video.is_first else None, "write the record", exchanges=False)


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
    with _latents_safe(video, latents):
        with video.report.stage("save", beside=True):
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


def _finish(video: Video) -> None:
    """Write the record; what was kept for the case of a failure goes. A signal waits until that is done."""
    with preemption.noted():
        _record(video)


def _record(video: Video) -> None:
    plan, report, config = video.plan, video.report, video.config
    report.facts |= described(config, plan) | {"status": "done", "file": str(video.result), "arrangement": asdict(plan.arrangement)}
    if "denoise" in report.stages:
        num_steps = config.sample.steps - video.kept.num_found
        seconds, guessed = report.stages["denoise"]["seconds"], report.facts.get("guessed_steps", 0)
        report.facts |= speed(plan, seconds, num_steps, guessed)
    digests = {"digest": video.kept.digest, "latents_digest": video.kept.latents_digest, "video_digest": hash_file(video.result)}
    report.facts |= digests
    report.compare(plan.uses, plan.ranks_per_node)
    report.save(video.result.with_suffix(".json"))
    if config.latents is None:  # others' latents say nothing of what was kept
        video.kept.remove()
        if not config.output.save_latents:
            video.latents_file.unlink(missing_ok=True)
    logger.log(report.level, "saved     %s", video.result)


def _decode(video: Video, latents: Tensor, take: Callable[[Iterator[Tensor]], None]) -> None:
    """Decode latents (C, T, h, w); the first rank takes frames as they are ready; where memory runs out, again in a way that needs less."""
    session, config, plan = video.session, video.config, video.plan
    axis, checkpoint = session.groups.replica, session.checkpoint

    def choose() -> list[Way]:
        if is_any(preemption.asked_by is not None, axis, latents.device):
            raise Preempted("asked to end: stopped before decoding; the same command goes on from there")
        if not torch.isfinite(latents).all():
            raise FloatingPointError("the latents are not finite: the video would be black")
        ways = vae.find_ways(config, plan, checkpoint.vae.dims, latents.device, axis)
        if ways[0].name == "cpu" and config.memory.vae is None:  # sooner read the transformer again
            session.shelf.clear()
            ways = vae.find_ways(config, plan, checkpoint.vae.dims, latents.device, axis)
        return ways

    def work(way: Way) -> None:
        if axis.rank != 0 and way.name != "parallel":
            return  # the first rank goes on alone
        detail = f"VAE {way}, {plan.frame_num} frame{'' if plan.frame_num == 1 else 's'}"
        with video.report.stage("decode", detail), vae.kernels_tried(checkpoint.vae.dims, way):
            model = vae.load(checkpoint, config, way, latents.device, session.shelf)
            chunks = vae.decode(model, latents, float32_frames if config.output.save_tensor else uint8_frames, way, axis)
            if axis.rank == 0:
                take(_checked(chunks, session.groups) if way.name == "parallel" else chunks)
            else:
                deque(chunks, maxlen=0)  # its share of each is sent to the first rank

    ways = session.together(choose, "choose how to decode")
    if first_that_works(
        ways,
        lambda way: session.together(lambda: work(way), "decode", exchanges=way.name == "parallel"),
        "decoding",
        "the latents are safe, ",
    ):
        video.report.ran_out("decode")


def _checked(chunks: Iterator[Tensor], groups: Groups) -> Iterator[Tensor]:
    """Yield frames while those of other ranks are what they sent; raises RankError."""
    for chunk in chunks:
        groups.check()
        yield chunk
    groups.check()


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
