"""Conditioning of speech to video: a clip's sound, the picture, the frames before the clip, and poses.

Source: `WanS2V` of the reference (Wan-Video/Wan2.2).
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from wan_dist.config.schema import RunConfig
from wan_dist.models.audio_encoder import encode_audio
from wan_dist.output.stage_report import StageReport
from wan_dist.pipeline.conditioning.encoders import (
    MakeChunks,
    convert_image_to_tensor,
    encode_videos,
    gather_chunks,
)
from wan_dist.pipeline.session import Session
from wan_dist.planning.plan import RunPlan
from wan_dist.planning.video_plan import VideoPlan
from wan_dist.runtime.file_hash import hash_file
from wan_dist.tasks.sound import read_speech_samples
from wan_dist.tasks.source_video import VideoFacts, iterate_frames
from wan_dist.tasks.speech import (
    NUM_HISTORY_FRAMES,
    NUM_REFERENCE_FRAMES,
    Speech,
    count_audio_vectors,
    fit_picture,
    list_audio_columns,
)

_NO_POSE, _BORDER = -1.0, 0.0
"""Pixels after the end of a pose video, and beside one of another shape."""


def encode_inputs(
    session: Session,
    config: RunConfig,
    plan: RunPlan,
    report: StageReport,
    first_frames: Tensor | None,
) -> dict[str, Tensor]:
    """Return all that one clip takes beside the text, on the ranks that encode.

    These are ``audio`` on the first rank, ``picture``, ``history`` unless nothing is before the clip, and
    ``pose`` where there is a pose video; see `Conditioning`. ``first_frames`` are all frames made so far, up
    to the 73 that are shown.
    """
    speech = plan.speech
    assert speech is not None
    tensors: dict[str, Tensor] = {}

    def encode_sound() -> None:
        if session.groups.replica.rank == 0:
            features = _find_audio_features(session, speech, report)
            start = plan.clip_index * speech.clip_frames
            tensors["audio"] = features[..., start : start + speech.clip_frames].to(report.device)

    session.run_together(encode_sound, "encode the sound", uses_collectives=False)
    picture = convert_image_to_tensor(pad_picture(plan.images[0], (plan.width, plan.height)))
    videos: dict[str, MakeChunks] = {"picture": lambda: iter([picture[None, :, None]])}
    if plan.num_context_latents > 1:
        history = make_history(picture, speech, first_frames)
        videos["history"] = lambda: gather_chunks(iter(history.unbind(1)))
    if speech.pose is not None:
        videos["pose"] = lambda: gather_chunks(iterate_poses(plan, speech))
    names = {"history": "frames before the clip", "pose": "poses"}
    description = " and ".join(names.get(name, name) for name in videos)
    latents = encode_videos(session, config, plan, report, list(videos.values()), description)
    if latents is not None:
        tensors |= dict(zip(videos, latents, strict=True))
        if "pose" in tensors:  # its first frame is there twice
            tensors["pose"] = tensors["pose"][:, :, 1:]
    return tensors


def _find_audio_features(session: Session, speech: Speech, report: StageReport) -> Tensor:
    """Return the features (1, layers, D, frames) of all frames' sound, kept from clip to clip."""
    component, sound = session.checkpoint.audio_encoder, speech.sound
    assert component is not None
    assert sound is not None
    num_frames = speech.num_made_frames
    key = f"{hash_file(sound.path)} {num_frames}"
    if key not in session.audio_features:
        with report.measure_stage("listen", f"wav2vec2 on the CPU, {sound.seconds:.1f} s of sound"):
            samples = read_speech_samples(sound)
            # In float32 on the CPU as in the reference; ten minutes take less time than a clip.
            encoder = component.load(torch.device("cpu"))
            features = encode_audio(
                encoder,
                component.dims,
                samples,
                count_audio_vectors(len(samples)),
                list_audio_columns(num_frames),
            )
            del encoder
        session.audio_features = {key: features}
    return session.audio_features[key]


def make_history(picture: Tensor, speech: Speech, frames: Tensor | None) -> Tensor:
    """Return the 73 frames (3, 73, H, W) before a clip: grey, the picture if it is first, ``frames``."""
    history = torch.zeros(3, NUM_HISTORY_FRAMES, *picture.shape[1:])
    if speech.starts_from_picture:
        history[:, -NUM_REFERENCE_FRAMES:] = picture.unsqueeze(1)
    if frames is None:
        return history
    return torch.cat([history, frames], dim=1)[:, -NUM_HISTORY_FRAMES:]


def pad_picture(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an image scaled and cut to ``size`` (width, height), black where it is narrower."""
    scaled_size = fit_picture(image.size, size)
    scaled = (
        image if image.size == scaled_size else image.resize(scaled_size, Image.Resampling.BILINEAR)
    )
    left, top = (
        _find_offset(side, scaled_side) for side, scaled_side in zip(size, scaled_size, strict=True)
    )
    canvas = Image.new("RGB", size)
    canvas.paste(scaled, (left, top))
    return canvas


def _find_offset(side: int, scaled_side: int) -> int:
    """Return where a side begins in one of another length: missing is halved down, excess half to even."""
    missing = side - scaled_side
    return missing // 2 if missing >= 0 else -round(-missing / 2)


def iterate_poses(plan: VideoPlan, speech: Speech) -> Iterator[Tensor]:
    """Yield the poses (3, H, W) of a clip's frames, the first one twice."""
    assert speech.pose is not None
    size = (plan.width, plan.height)
    indices = speech.list_pose_frames(plan.clip_index)
    shown = [index for index in indices if index is not None]
    poses = iterate_fitted_frames(speech.pose, shown, size)
    black = torch.full((3, plan.height, plan.width), _NO_POSE)
    for position, index in enumerate(indices):
        pose = black if index is None else next(poses)
        if position == 0:
            yield pose
        yield pose


def iterate_fitted_frames(
    video: VideoFacts, frame_indices: list[int], size: tuple[int, int]
) -> Iterator[Tensor]:
    """Yield frames (3, H, W) in [-1, 1] scaled and cut to ``size`` (width, height), mid-grey around them."""
    if not frame_indices:
        return
    width, height = fit_picture((video.width, video.height), size)
    for frame in iterate_frames(video, frame_indices):
        pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1).float() / 255 * 2 - 1
        if pixels.shape[1:] != (height, width):
            pixels = F.interpolate(
                pixels.unsqueeze(0), (height, width), mode="bilinear", antialias=True
            ).squeeze(0)
        left, top = _find_offset(size[0], width), _find_offset(size[1], height)
        # Negative padding cuts.
        padding = (left, size[0] - width - left, top, size[1] - height - top)
        yield F.pad(pixels, padding, value=_BORDER)
