"""Generation of one video: encode text and images, denoise, save the latents, decode, write, record."""

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

from wan_dist.config.checks import WEIGHT_FILE_KEYS
from wan_dist.config.recorded_settings import select_recorded_settings
from wan_dist.config.schema import RunConfig, read_settings
from wan_dist.config.settings import Effect
from wan_dist.output.locks import ResultLocks
from wan_dist.output.output_check import check_output_folder, estimate_output
from wan_dist.output.record import DONE, LoraEntry
from wan_dist.output.record_fields import describe_settings, describe_video, record_speed
from wan_dist.output.result_writer import ResultWriter
from wan_dist.output.stage_report import StageReport
from wan_dist.parallel.collectives import broadcast_object
from wan_dist.parallel.mesh import ProcessGroups, make_process_groups, process_group_session
from wan_dist.parallel.team import Coordinator
from wan_dist.pipeline import decode
from wan_dist.pipeline.clips import make_clips
from wan_dist.pipeline.denoise import VideoInProgress, read_latents
from wan_dist.pipeline.monitor import EndRequest, VideoCancelledError, find_end_request
from wan_dist.pipeline.out_of_memory import run_with_fallback
from wan_dist.pipeline.resume import DenoisingProgress, ResumeState, warn_about_old_states
from wan_dist.pipeline.session import Session, find_device, open_session
from wan_dist.planning.file_names import name_latents, name_preview
from wan_dist.planning.plan import RunPlan
from wan_dist.planning.vae_memory import VaeStrategy
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.runtime.errors import get_first_line
from wan_dist.runtime.file_hash import hash_file
from wan_dist.runtime.log import logger
from wan_dist.runtime.signals import CONTINUE_ADVICE, PreemptionInterrupt, preemption
from wan_dist.weights.checkpoint import Checkpoint
from wan_dist.weights.lora import MergedLora

_FILE_KEYS = ("output.video", "output.crf", "output.audio")
"""Settings of the file that is made of latents."""


@torch.no_grad()
def generate_video(config: RunConfig, plan: VideoPlan, coordinator: Coordinator) -> Path | None:
    """Generate one video on all ranks of the run; the first rank returns its path, the others None.

    A video that an earlier run generated with the same settings is not generated again. Raises InputError for
    what is wrong with checkpoint or output folder, before weights are read.
    """
    device = find_device(config)
    groups = make_process_groups(plan.degrees, coordinator, device, config.parallel.timeout)
    folder = Path(config.output.dir).expanduser()
    report = StageReport(asdict(config), device)
    with report.measure_stage("check", f"output {folder}"):
        if groups.rank == 0:
            check_output_folder(folder, [estimate_output(plan, config.output)])
            warn_about_old_states(folder)
        session = open_session(config, plan, groups, device)
    with closing(ResultLocks(folder)) as locks:
        resume_state = ResumeState(folder, config, plan, session.weights_digests, locks=locks)
        finished_file = coordinator.run_on_first_rank(
            resume_state.find_finished_result, "look for what is done"
        )
        if finished_file is not None:
            _report_finished_result(finished_file, resume_state.result_digest)
            return finished_file if groups.rank == 0 else None
        with process_group_session(groups):
            if plan.num_clips > 1:  # else each clip would load the models again
                session.run_together(
                    lambda: session.choose_resident_models(plan), "plan the memory"
                )
            video = prepare_video(session, config, plan, report, resume_state)
            for clip, latents in make_clips(video):
                decode_and_write(clip, latents)
            return video.result_file if video.is_first else None


def _report_finished_result(file: Path, digest: str) -> None:
    logger.info(
        "done      %s: an earlier run made it with the same settings (digest %s in its record)",
        file,
        digest,
    )
    logger.info(
        "note      seed=NUMBER makes another one, output.name=NAME this one again under another name"
    )


def prepare_video(
    session: Session,
    config: RunConfig,
    plan: VideoPlan,
    report: StageReport,
    resume_state: ResumeState,
    *,
    quiet: bool = False,
) -> VideoInProgress:
    """Restore saved progress, plan memory and reserve the result's name, on all ranks of the replica."""

    def restore_and_plan() -> tuple[RunPlan, Path]:
        resumed_plan = (
            resume_state.restore(session.groups.replica, session.device)
            if config.latents is None
            else plan
        )
        if config.latents is not None:
            # Unusable latents raise here, before anything is written.
            read_latents(Path(config.latents).expanduser())
        run_plan = session.plan_memory(resumed_plan, quiet=quiet)
        result_path = (
            resume_state.reserve_path(is_name_fixed=config.output.name is not None)
            if session.groups.replica.rank == 0
            else None
        )
        result_path = cast(Path, broadcast_object(result_path, session.groups.replica))
        return resume_state.rename_plan(run_plan, result_path.stem), result_path

    run_plan, result_file = session.run_together(restore_and_plan, "begin a video")
    report.record.checkpoint = str(session.checkpoint.folder)
    if session.checkpoint.loras and config.latents is None:
        report.record.loras = [_describe_lora(lora) for lora in session.checkpoint.loras]
    report.record.degrees = asdict(plan.degrees)
    latents_file = (
        result_file.with_name(name_latents(result_file.stem, 0))
        if config.latents is None
        else Path(config.latents).expanduser()
    )
    comment = None
    if config.output.metadata:
        settings = select_recorded_settings(config)
        comment = describe_settings(settings, run_plan, resume_state.result_digest)
    writer = ResultWriter(run_plan, result_file, config.output, comment)
    return VideoInProgress(
        session, config, run_plan, report, resume_state, result_file, latents_file, writer
    )


def _describe_lora(lora: MergedLora) -> LoraEntry:
    setting = lora.file.setting
    return {
        "file": str(setting.path),
        "bytes": setting.path.stat().st_size,
        "sha256": lora.file.hash,
        "strength": setting.strength,
        "expert": setting.expert,
    }


@torch.no_grad()
def decode_and_write(video: VideoInProgress, latents: Tensor) -> None:
    """Decode and write a clip, and after the last one the record.

    If decoding or writing fails, the latents are on disk and the log says how to resume from them.
    """
    with _recoverable_latents(video, latents):
        _decode_with_fallback(video, latents, partial(video.writer.write_clip, video.plan))
        if video.plan.is_last_clip:
            video.session.run_together(
                lambda: _finalize_video(video) if video.is_first else None,
                "write the record",
                uses_collectives=False,
            )


@torch.no_grad()
def decode_to_host(video: VideoInProgress, latents: Tensor) -> list[Tensor]:
    """Return the frames of a clip, chunks (n, H, W, 3), on the host of the first rank.

    The others return none. They are as the file has them, or float32 in [-1, 1] where a tensor is saved or
    another clip follows, and are for `write_decoded_frames`. Fails as `decode_and_write` does.
    """
    frame_chunks: list[Tensor] = []

    def collect_frames(chunks: Iterator[Tensor]) -> None:
        frame_chunks[:] = [chunk.cpu() for chunk in chunks]

    with _recoverable_latents(video, latents):
        _decode_with_fallback(video, latents, collect_frames)
    return frame_chunks


def write_decoded_frames(
    video: VideoInProgress, latents: Tensor, frame_chunks: Iterable[Tensor]
) -> None:
    """Write a clip's frames from `decode_to_host`, and after the last one the record.

    Runs on the first rank, in `jobs.worker` while the next video is denoised.
    """
    with _recoverable_latents(video, latents):
        with video.report.measure_stage("save", is_concurrent=True):
            video.writer.write_clip(video.plan, frame_chunks)
        if video.plan.is_last_clip:
            _finalize_video(video)


@contextmanager
def _recoverable_latents(video: VideoInProgress, latents: Tensor) -> Iterator[None]:
    """Log how to resume from the latents if the work inside fails.

    Saves the latents as progress if it fails because the run was requested to stop.
    """
    config = video.config
    try:
        yield
    except VideoCancelledError:
        video.writer.close()
        raise
    except (Exception, PreemptionInterrupt) as error:
        video.writer.close()
        # The signal may have ended ffmpeg first, whose error then comes before this process's request.
        if isinstance(error, PreemptionInterrupt) or preemption.wait_for_request():
            if video.is_first and config.latents is None:
                video.resume_state.save_progress(DenoisingProgress(config.sample.steps, latents))
            if isinstance(error, PreemptionInterrupt):
                raise
            raise PreemptionInterrupt(
                f"{preemption.describe_request()}: stopped while decoding ({get_first_line(error)}); "
                f"{CONTINUE_ADVICE}"
            ) from error
        if video.is_first and video.plan.num_clips > 1:
            logger.error("the latents are saved; %s", CONTINUE_ADVICE)
        elif video.is_first:
            command = _format_resume_command(
                config, video.session.checkpoint, video.latents_file, video.result_file
            )
            logger.error("the latents are saved; decode them with: %s", command)
        raise


def _finalize_video(video: VideoInProgress) -> None:
    """Write the record, and remove the saved progress; signals are deferred until then."""
    with preemption.deferred():
        _write_record(video)


def complete_record(video: VideoInProgress, result_file: Path | None) -> None:
    """Set the record's fields of a decoded video: description, digests, speed and memory."""
    plan, report = video.plan, video.report
    record = report.record
    describe_video(record, plan)
    record.status = DONE
    record.file = None if result_file is None else str(result_file)
    record.arrangement = asdict(plan.arrangement)
    if denoise_seconds := report.sum_seconds("denoise"):
        num_steps = (
            plan.num_clips * video.config.sample.steps - video.resume_state.num_resumed_steps
        )
        record_speed(record, plan, denoise_seconds, num_steps)
    record.digest = video.resume_state.result_digest
    record.latents_digest = video.resume_state.latents_digest
    record.video_digest = None if result_file is None else hash_file(result_file)
    report.compare_memory(plan.stage_memories, plan.ranks_per_node)


def _write_record(video: VideoInProgress) -> None:
    report, config = video.report, video.config
    complete_record(video, video.result_file)
    report.save(video.result_file.with_suffix(".json"))
    if config.output.preview_interval:
        preview_name = name_preview(video.result_file.stem)
        video.result_file.with_name(preview_name).unlink(missing_ok=True)
    if config.latents is None:  # latents given by the user have no saved progress
        video.resume_state.remove_file()
        if not config.output.save_latents:
            for clip_index in range(video.plan.num_clips):
                latents_name = name_latents(video.result_file.stem, clip_index)
                video.result_file.with_name(latents_name).unlink(missing_ok=True)
    logger.log(report.log_level, "saved     %s", video.result_file)


def _decode_with_fallback(
    video: VideoInProgress, latents: Tensor, consume_frames: Callable[[Iterator[Tensor]], None]
) -> None:
    """Decode latents (C, T, h, w); falls back to the next strategy when memory runs out.

    ``consume_frames`` is called on the first rank with an iterator of the frames as they are ready.
    """
    session = video.session
    strategies = session.run_together(
        lambda: _choose_strategies(video, latents), "choose how to decode"
    )
    if run_with_fallback(
        strategies,
        lambda strategy: session.run_together(
            lambda: _decode_with_strategy(video, latents, strategy, consume_frames),
            "decode",
            uses_collectives=strategy.name == "parallel",
        ),
        "decoding",
        "the latents are safe, ",
    ):
        video.report.record_out_of_memory("decode")


def _choose_strategies(video: VideoInProgress, latents: Tensor) -> list[VaeStrategy]:
    """Return the strategies to decode with, in order.

    Raises PreemptionInterrupt where a rank was requested to stop, VideoCancelledError for a cancelled video,
    FloatingPointError for latents that are not finite.
    """
    session = video.session
    axis = session.groups.replica
    request = find_end_request(video.monitor, axis, latents.device)
    if request is EndRequest.CANCEL:
        raise VideoCancelledError("cancelled before decoding")
    if request is EndRequest.STOP:
        raise PreemptionInterrupt(
            f"{preemption.describe_request()}: stopped before decoding; {CONTINUE_ADVICE}"
        )
    if not torch.isfinite(latents).all():
        raise FloatingPointError("the latents are not finite: the video would be black")
    return decode.choose_vae_strategies(
        video.config,
        video.plan,
        session.checkpoint.vae.dims,
        latents.device,
        axis,
        session.model_cache,
    )


def _decode_with_strategy(
    video: VideoInProgress,
    latents: Tensor,
    strategy: VaeStrategy,
    consume_frames: Callable[[Iterator[Tensor]], None],
) -> None:
    """Decode latents (C, T, h, w) with one strategy; see `_decode_with_fallback`."""
    session, config, checkpoint = video.session, video.config, video.session.checkpoint
    axis, frame_num = session.groups.replica, video.plan.frame_num
    is_parallel = strategy.name == "parallel"
    if axis.rank != 0 and not is_parallel:
        return  # the first rank decodes alone
    convert_frames = _choose_frame_converter(video)
    stage_detail = f"VAE {strategy}, {frame_num} frame{'' if frame_num == 1 else 's'}"
    with (
        video.report.measure_stage("decode", stage_detail),
        decode.cudnn_autotuning(checkpoint.vae.dims, strategy),
    ):
        vae_model = decode.load_vae(
            checkpoint, config, strategy, latents.device, session.model_cache
        )
        chunks = decode.decode_latents(vae_model, latents, convert_frames, strategy, axis)
        if axis.rank != 0:
            deque(chunks, maxlen=0)  # its shard of each chunk is sent to the first rank
            return
        consume_frames(_yield_verified_chunks(chunks, session.groups) if is_parallel else chunks)


def _choose_frame_converter(video: VideoInProgress) -> decode.FrameConverter:
    """Return what converts frames on the device: to float32 where a tensor or another clip needs it."""
    output = video.config.output
    if output.save_tensor or not video.plan.is_last_clip or video.keeps_floats:
        return decode.convert_to_float32_frames
    has_more_bits = output.format.bits > 8 and not video.plan.task.is_still
    return decode.convert_to_10_bit_frames if has_more_bits else decode.convert_to_uint8_frames


def _yield_verified_chunks(chunks: Iterator[Tensor], groups: ProcessGroups) -> Iterator[Tensor]:
    """Yield frames while the process groups are intact; raises RankError.

    After an abort, data gathered from other ranks may be corrupt.
    """
    for chunk in chunks:
        groups.raise_if_aborted()
        yield chunk
    groups.raise_if_aborted()


def _format_resume_command(
    config: RunConfig, checkpoint: Checkpoint, latents_file: Path, result_file: Path
) -> str:
    result_settings = read_settings(config, Effect.RESULT)
    settings = {
        "task": config.task,
        "ckpt_dir": checkpoint.folder,
        **{key: value for key in WEIGHT_FILE_KEYS if (value := getattr(config, key)) is not None},
        "latents": latents_file,
        "output.dir": result_file.parent,
        "output.name": result_file.stem,
        "fps": config.fps,
        **{key: value for key, value in result_settings.items() if key in _FILE_KEYS},
    }
    return shlex.join(
        ["python", "-m", "wan_dist.run", *(f"{key}={value}" for key, value in settings.items())]
    )
