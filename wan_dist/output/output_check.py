"""Output folder check: a trial of what a run will write, before weights are read.

A run should not fail there after hours: permissions, free space, quota, name lengths and encoding are tested.
"""

import errno
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from wan_dist.config.output_section import OutputConfig
from wan_dist.output.video_encoding import VideoEncoding
from wan_dist.output.video_file import SaveError, save_video
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger

_PROBE_NAME = "wan-dist-probe"
_MAX_PROBE_SECONDS = 300.0
"""Seconds that a check takes at most; files that are older were left by one that was killed."""
_LONGEST_FILE_NAME = ".{}.0123456789ab.state.01234567.partial.safetensors"
"""Longest name that a file of a result has while it is written."""


@dataclass(frozen=True)
class OutputEstimate:
    """Estimate of the files of one video; sizes in bytes."""

    name: str
    width: int
    height: int
    fps: int
    latents_bytes: int = 0
    frames_bytes: int = 0
    """The video, a lower estimate, and the tensor of frames if it is saved."""
    encoding: VideoEncoding = field(default_factory=VideoEncoding)


def estimate_output(plan: VideoPlan, output: OutputConfig) -> OutputEstimate:
    """Return the disk space that a plan's video will take."""
    encoding = VideoEncoding.from_config(output)
    num_pixels = plan.width * plan.height * plan.num_frames
    frames_bytes = int(num_pixels * encoding.format.min_bytes_per_pixel) + (
        3 * 4 * num_pixels if output.save_tensor else 0
    )
    latents_bytes = plan.num_clips * 4 * prod(plan.latent_shape)
    size = (plan.width, plan.height)
    return OutputEstimate(plan.name, *size, plan.fps, latents_bytes, frames_bytes, encoding)


def check_output_folder(folder: Path, estimates: Sequence[OutputEstimate]) -> None:
    """Create the folder, check that the largest result fits, and encode two frames; raises InputError.

    They are encoded as each of the results.
    """
    # a random name, as several runs may start in one folder at once
    probe_file = folder / f".{_PROBE_NAME}-{secrets.token_hex(4)}"
    largest = max(estimates, key=lambda estimate: estimate.latents_bytes + estimate.frames_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old_probes(folder)
        with probe_file.open("xb") as file:
            _check_free_space(folder, largest, file.fileno())
        _check_name_lengths(folder, estimates)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise InputError(
            f"output.dir={folder} cannot be written: {reason}; use another output.dir"
        ) from None
    finally:
        with suppress(OSError):
            probe_file.unlink()
    largest_by_encoding = {
        estimate.encoding: estimate
        for estimate in sorted(estimates, key=lambda one: one.width * one.height)
    }
    for encoding, estimate in largest_by_encoding.items():
        encoding.check()
        _encode_test_frames(probe_file.with_suffix(encoding.format.suffix), estimate)


def _encode_test_frames(probe_file: Path, estimate: OutputEstimate) -> None:
    try:
        frames = torch.zeros(2, estimate.height, estimate.width, 3, dtype=torch.uint8)
        save_video(probe_file, [frames], fps=estimate.fps, num_frames=2, encoding=estimate.encoding)
    except SaveError as error:
        raise InputError(
            f"a test video could not be encoded to output.dir={probe_file.parent} "
            f"(output.video={estimate.encoding.name}): {error}"
        ) from None
    finally:
        probe_file.unlink(missing_ok=True)


def _remove_old_probes(folder: Path) -> None:
    """Remove what checks of this kind have left that were killed; those of now may be at work."""
    for file in folder.glob(f".*{_PROBE_NAME}-*"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > _MAX_PROBE_SECONDS:
                file.unlink()


def _check_free_space(folder: Path, largest: OutputEstimate, probe_descriptor: int) -> None:
    required_bytes = largest.latents_bytes + largest.frames_bytes
    file_system = os.statvfs(folder)
    free_bytes = file_system.f_bavail * file_system.f_frsize
    if file_system.f_blocks and free_bytes < required_bytes:
        _raise_no_space(folder, required_bytes, f"only {_format_megabytes(free_bytes)} MB are free")
    if not largest.latents_bytes:
        return
    try:
        # statvfs does not know of a quota; only allocating shows it
        os.posix_fallocate(probe_descriptor, 0, largest.latents_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _raise_no_space(
                folder, required_bytes, f"the file system refuses it ({error.strerror})"
            )
        logger.debug("%s cannot be asked for room: %s", folder, error)


def _raise_no_space(folder: Path, required_bytes: int, reason: str) -> None:
    raise InputError(
        f"output.dir={folder} has no room for the result: latents and video need "
        f"{_format_megabytes(required_bytes)} MB or more, and {reason}; "
        "free some space, or use another output.dir"
    )


def _format_megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.3g}" if num_bytes < 1e8 else f"{num_bytes / 1e6:.0f}"


def _check_name_lengths(folder: Path, estimates: Sequence[OutputEstimate]) -> None:
    try:
        max_file_name_bytes = os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        return
    longest_name = max(
        (estimate.name for estimate in estimates), key=lambda name: len(os.fsencode(name))
    )
    max_name_bytes = max_file_name_bytes - len(os.fsencode(_LONGEST_FILE_NAME.format("")))
    if len(os.fsencode(longest_name)) > max_name_bytes:
        raise InputError(
            f"output.name={longest_name} has {len(os.fsencode(longest_name))} bytes; "
            f"the limit in output.dir={folder} is {max_name_bytes}, "
            "as suffixes are added; give a shorter output.name"
        )
