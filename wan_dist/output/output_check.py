"""What a run will write is tried in its output folder before weights are read, so that it does not fail there after hours."""

import errno
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from wan_dist.output.video_file import SaveError, save_video
from wan_dist.planning.plan import Plan
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger

_VIDEO_BYTES = 0.03
"""Of a pixel of a frame, at least, at the rate factor that videos are encoded with; busy scenes take ten times as much."""
_LONGEST = ".{}.0123456789ab.state.01234567.partial.safetensors"
"""The longest name that a result's files have while they are written."""


@dataclass(frozen=True)
class Outcome:
    """What is written for one video; sizes in bytes."""

    name: str
    width: int
    height: int
    fps: int
    latents_bytes: int = 0
    frames_bytes: int = 0
    """Of the video, estimated from below, and of the tensor of frames if there is one."""


def outcome_of(plan: Plan, *, keeps_tensor: bool) -> Outcome:
    """Return what a plan's video will take on the disk."""
    pixels = plan.width * plan.height * plan.frame_num
    frames = int(pixels * _VIDEO_BYTES) + (3 * 4 * pixels if keeps_tensor else 0)
    return Outcome(plan.name, plan.width, plan.height, plan.fps, 4 * prod(plan.latent_shape), frames)


def check_output(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Make the folder, encode two frames into it, and see that the largest of the results has room; raises InputError."""
    probe = folder / f".wan-dist-probe-{secrets.token_hex(4)}.mp4"  # runs may begin at once in one folder
    largest = max(outcomes, key=lambda outcome: outcome.latents_bytes + outcome.frames_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("xb") as file:
            _check_room(folder, largest, file.fileno())
        _check_names(folder, outcomes)
    except OSError as fault:
        why = "it is a file" if isinstance(fault, FileExistsError) else fault.strerror
        raise InputError(f"output.dir={folder} cannot be written: {why}; choose another output.dir") from None
    finally:
        with suppress(OSError):
            probe.unlink()
    try:
        frames = torch.zeros(2, largest.height, largest.width, 3, dtype=torch.uint8)
        save_video(probe, [frames], fps=largest.fps, num_frames=2)
    except SaveError as fault:
        raise InputError(
            f"a test video could not be encoded to output.dir={folder}: {fault}. If ffmpeg lacks libx264, "
            "unset IMAGEIO_FFMPEG_EXE (the package imageio-ffmpeg brings a full one)"
        ) from None
    finally:
        probe.unlink(missing_ok=True)


def _check_room(folder: Path, largest: Outcome, probe: int) -> None:
    wanted = largest.latents_bytes + largest.frames_bytes
    system = os.statvfs(folder)
    free = system.f_bavail * system.f_frsize
    if system.f_blocks and free < wanted:
        _refuse(folder, wanted, f"only {_megabytes(free)} MB are free")
    if not largest.latents_bytes:
        return
    try:
        os.posix_fallocate(probe, 0, largest.latents_bytes)  # a quota is known to this alone
    except OSError as fault:
        if fault.errno in (errno.ENOSPC, errno.EDQUOT):
            _refuse(folder, wanted, f"the file system refuses it ({fault.strerror})")
        logger.debug("%s cannot be asked for room: %s", folder, fault)


def _refuse(folder: Path, wanted: int, why: str) -> None:
    raise InputError(
        f"output.dir={folder} has no room for the result: latents and video take {_megabytes(wanted)} MB or more, and {why}; "
        "make room, or choose another output.dir"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g}" if count < 1e8 else f"{count / 1e6:.0f}"


def _check_names(folder: Path, outcomes: Sequence[Outcome]) -> None:
    try:
        most = os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        return
    longest = max((outcome.name for outcome in outcomes), key=lambda name: len(os.fsencode(name)))
    spare = most - len(os.fsencode(_LONGEST.format("")))
    if len(os.fsencode(longest)) > spare:
        raise InputError(
            f"output.name={longest} has {len(os.fsencode(longest))} bytes; in output.dir={folder} names may have {spare}, "
            "as files have suffixes: give a shorter output.name"
        )
