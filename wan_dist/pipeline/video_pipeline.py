"""Python API: a pipeline whose models stay loaded from video to video."""

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wan_dist.config.overrides import HydraRequiredError, is_plain_key, override_config
from wan_dist.config.schema import RunConfig, list_settings, read_all_settings
from wan_dist.config.settings import LOADING, Effect
from wan_dist.config.typed_settings import check_setting, format_override
from wan_dist.output.locks import ResultLocks
from wan_dist.output.output_check import check_output_folder, estimate_output
from wan_dist.output.record import VideoRecord
from wan_dist.output.result_writer import find_sound_track
from wan_dist.output.stage_report import StageReport
from wan_dist.output.video_encoding import SoundTrack, VideoEncoding
from wan_dist.output.video_file import convert_to_uint8, save_image, save_video
from wan_dist.parallel.local_gpu import find_gpu_bytes, find_gpu_id
from wan_dist.parallel.mesh import make_process_groups, process_group_session
from wan_dist.parallel.team import Coordinator
from wan_dist.pipeline.clips import make_clips
from wan_dist.pipeline.denoise import VideoInProgress
from wan_dist.pipeline.generate import (
    complete_record,
    decode_to_host,
    prepare_video,
    write_decoded_frames,
)
from wan_dist.pipeline.rank_processes import PipelineProcesses
from wan_dist.pipeline.resume import ResumeState
from wan_dist.pipeline.session import Session, find_device, open_session
from wan_dist.planning.plan import RunPlan, make_plan
from wan_dist.planning.rank_facts import check_ranks_match, collect_rank_facts
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.runtime.cache_folders import configure_library_caches
from wan_dist.runtime.environment import read_rank_layout, sanitize_environment
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.launcher import translate_slurm_variables
from wan_dist.runtime.network import choose_network_interface
from wan_dist.tasks.run_config import read_config

_COMMAND_KEYS = ("jobs", "retry_failed", "latents", "output.name", "output.events")
_DEGREE_KEYS = ("dp", "cfg", "ring", "ulysses")
_CALL_EFFECTS = Effect.LATENTS | Effect.RESULT


@dataclass(frozen=True)
class GeneratedVideo:
    """A video, or the image of a text-to-image task, as it came from the VAE.

    On ranks other than the first one ``frames`` is None, and `save` does nothing.
    """

    frames: np.ndarray[Any, Any] | None
    """(F, H, W, 3), uint8; of several clips without the frames that each repeats of the one before."""
    latents: Tensor
    """(C, T, h, w), float32, on the CPU; of several clips one after another along T."""
    record: VideoRecord
    """Settings, seed, seconds and memory of each stage."""
    fps: int
    sound: SoundTrack | None = None
    """Sound of the video's file, which ends with it."""

    def save(self, file: str | Path) -> None:
        """Write an .mp4 (H.264), or a .png of a single frame.

        Raises InputError for another suffix, SaveError where the file cannot be written.
        """
        path = Path(file).expanduser()
        if path.suffix not in (".mp4", ".png"):
            raise InputError(f"{path}: a video is saved as .mp4, a single frame as .png")
        if self.frames is None:
            return
        if path.suffix == ".png" and len(self.frames) > 1:
            raise InputError(f"{path}: the video has {len(self.frames)} frames; save it as .mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = torch.from_numpy(self.frames)
        if path.suffix == ".png":
            save_image(path, frames[0])
        else:
            if self.sound is not None:
                frames = frames[: round(self.sound.seconds * self.fps)]
            encoding = VideoEncoding(track=self.sound)
            save_video(
                path, iter([frames]), fps=self.fps, num_frames=len(frames), encoding=encoding
            )


class VideoPipeline:
    """The models of one task on one device, or on the ranks that a launcher has started.

    All ranks open it and call it with the same arguments. Close it, or use it as a context manager, to end
    the process groups.
    """

    def __init__(self, config: RunConfig) -> None:
        ranks = read_rank_layout()
        self._config = config
        self._exit_stack = ExitStack()
        self._coordinator = Coordinator(ranks, config.parallel.timeout)
        self._exit_stack.callback(self._coordinator.leave)
        try:
            self._session = self._open_session()
        except BaseException:
            self.close()
            raise

    def __call__(
        self, prompt: str, *, image: str | Path | Image.Image | None = None, **settings: Any
    ) -> GeneratedVideo:
        """Generate one video.

        ``settings`` are those of the command line that do not change the models: ``seed=7``,
        ``frame_num=81``, ``size="832x480"``, ``sample={"steps": 4}``, ``first_frame=``, ``clips=3``. With
        ``output={"dir": FOLDER}`` video, latents and record are written there too, and an interrupted call
        resumes from its completed steps. Raises InputError for settings that do not work.
        """
        with tempfile.TemporaryDirectory(prefix="wan-dist-") as work_folder:
            if isinstance(image, Image.Image):
                image_file = Path(work_folder) / "image.png"
                image.save(image_file)
                image = image_file
            values = {"prompt": prompt.replace("@", "@@", 1) if prompt[:1] == "@" else prompt}
            values |= {} if image is None else {"image": str(image)}
            values |= flatten_settings(settings)
            writes_output = "output.dir" in values
            config = self._override_config({"output.dir": work_folder} | values)
            return self._generate(config, writes_output=writes_output)

    def plan(self, prompt: str = "", **settings: Any) -> RunPlan:
        """Return what `__call__` would do: sizes, arrangement of the models, memory of each stage."""
        config = self._override_config({"prompt": prompt or None} | flatten_settings(settings))
        return self._session.plan_memory(self._plan_video(config, is_dry_run=True))

    def close(self) -> None:
        """Free the models and end the process groups; waits for the other ranks to close too."""
        self.__dict__.pop("_session", None)
        self._exit_stack.close()

    def __enter__(self) -> "VideoPipeline":
        """Return the pipeline itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the pipeline."""
        self.close()

    def _open_session(self) -> Session:
        config, coordinator = self._config, self._coordinator
        facts = collect_rank_facts(
            read_all_settings(config), find_gpu_id(config.device), find_gpu_bytes(config.device)
        )
        check_ranks_match(coordinator.gather(facts, "open the pipeline"))
        plan = self._plan_video(config, is_dry_run=True)
        for key in _DEGREE_KEYS:  # each video uses the process groups that are opened here
            setattr(config.parallel, key, getattr(plan.degrees, key))
        device = find_device(config)
        groups = make_process_groups(plan.degrees, coordinator, device, config.parallel.timeout)
        session = open_session(config, plan, groups, device)
        self._exit_stack.enter_context(process_group_session(groups))
        return session

    def _override_config(self, values: Mapping[str, object]) -> RunConfig:
        """Return the pipeline's configuration with settings of one call."""
        for key, value in values.items():
            check_setting(key, value)
            setting = list_settings().get(key)
            effect = Effect.NOTHING if setting is None else setting.metadata["effect"]
            if not key.startswith("output.") and (
                effect & LOADING or not effect & _CALL_EFFECTS or not is_plain_key(key)
            ):
                raise InputError(f"{key} applies to the whole pipeline; pass it to open_pipeline")
        overrides = [(key, value, format_override(key, value)) for key, value in values.items()]
        try:
            return override_config(self._config, overrides)
        except HydraRequiredError as error:
            raise InputError(str(error)) from None

    def _plan_video(self, config: RunConfig, *, is_dry_run: bool = False) -> VideoPlan:
        """Return the first rank's plan; raises its InputError on all ranks."""

        def make_plan_or_error() -> VideoPlan | InputError:
            ranks = read_rank_layout()
            try:
                return make_plan(
                    config, ranks=(ranks.num_ranks, ranks.ranks_per_node), is_dry_run=is_dry_run
                )
            except InputError as error:
                return error

        plan = self._coordinator.run_on_first_rank(make_plan_or_error, "plan a video")
        if isinstance(plan, InputError):
            raise plan
        return plan

    @torch.no_grad()
    def _generate(self, config: RunConfig, *, writes_output: bool) -> GeneratedVideo:
        session, folder = self._session, Path(config.output.dir).expanduser()
        plan = self._plan_video(config)
        if session.groups.rank == 0:
            check_output_folder(folder, [estimate_output(plan, config.output)])
        session.run_together(lambda: session.choose_resident_models(plan), "plan the memory")
        report = StageReport(asdict(config), session.device)
        with closing(ResultLocks(folder)) as locks:
            resume_state = ResumeState(folder, config, plan, session.weights_digests, locks=locks)
            video = prepare_video(session, config, plan, report, resume_state, quiet=True)
            video = replace(video, keeps_floats=config.output.format.bits > 8)
            clip_frames: list[Tensor] = []
            clip_latents: list[Tensor] = []
            for clip, latents in make_clips(video):
                frame_chunks = decode_to_host(clip, latents)
                self._finish_clip(clip, latents, frame_chunks, writes_output=writes_output)
                clip_latents.append(latents.cpu())
                if video.is_first:
                    frames = torch.cat([convert_to_uint8(chunk) for chunk in frame_chunks])
                    left, top, right, bottom = clip.plan.crop
                    clip_frames.append(frames[clip.plan.new_frames, top:bottom, left:right])
        return GeneratedVideo(
            torch.cat(clip_frames).numpy() if video.is_first else None,
            torch.cat(clip_latents, dim=1),
            report.build_record(),
            plan.fps,
            find_sound_track(plan),
        )

    def _finish_clip(
        self,
        video: VideoInProgress,
        latents: Tensor,
        frame_chunks: list[Tensor],
        *,
        writes_output: bool,
    ) -> None:
        def write_or_complete() -> None:
            if not video.is_first:
                return
            if writes_output:
                write_decoded_frames(video, latents, frame_chunks)
            elif video.plan.is_last_clip:
                complete_record(video, None)
            else:
                video.writer.set_last_frames(video.plan, frame_chunks)

        self._session.run_together(write_or_complete, "write the video", uses_collectives=False)


def flatten_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted key; sections may be dictionaries, as ``sample={"steps": 4}``."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        items = (
            {f"{key}.{name}": item for name, item in value.items()}
            if isinstance(value, Mapping)
            else {key: value}
        )
        values |= {
            name: str(item) if isinstance(item, Path) else item for name, item in items.items()
        }
    return values


def open_pipeline(
    task: str,
    *,
    ckpt_dir: str | Path | None = None,
    gpus: int | None = None,
    **settings: Any,
) -> VideoPipeline | PipelineProcesses:
    """Open the models of a task: checked at once, loaded with the first video, and reused by later ones.

    ``settings`` are those of the command line, sections as dictionaries: ``dtype="float32"``,
    ``quant="fp8"``, ``memory={"dit": "stream"}``, ``parallel={"ulysses": 2}``. Without ``ckpt_dir`` the
    checkpoint is the task's from the Hugging Face cache, downloaded if it is not there. ``gpus`` starts a
    process for each of so many GPUs of this machine, from a script or a notebook. Under torchrun or srun,
    which have started the processes, all ranks open the pipeline and share each video. Raises InputError
    for what is wrong with settings, checkpoint or environment, before weights are read.
    """
    values = flatten_settings(settings)
    if ckpt_dir is not None:
        values["ckpt_dir"] = str(ckpt_dir)
    for key, value in values.items():
        check_setting(key, value)
        if key in _COMMAND_KEYS:
            raise InputError(f"{key} is for the command line; a pipeline makes one video a call")
    if gpus is not None:
        if gpus < 1 or read_rank_layout().num_ranks > 1:
            raise InputError(
                f"gpus={gpus}: must be at least 1, in a program that was not "
                "started on several ranks by a launcher"
            )
        return PipelineProcesses(task, gpus, values)
    sanitize_environment()
    translate_slurm_variables()
    configure_library_caches()
    choose_network_interface()
    config = read_config(
        [f"task={task}", *(format_override(key, value) for key, value in values.items())]
    )
    if config is None:  # after a flag that only prints, which is not among the arguments
        raise AssertionError("the settings gave no configuration")
    return VideoPipeline(config)
