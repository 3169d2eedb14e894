"""Cache of encoded images: a batch that varies the prompt or the seed encodes its image once."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from wan_dist.config.schema import RunConfig
from wan_dist.parallel.collectives import broadcast_object
from wan_dist.pipeline.session import Session
from wan_dist.pipeline.tensor_cache import TensorCache
from wan_dist.planning.plan import RunPlan
from wan_dist.runtime.file_hash import hash_unchanged_file
from wan_dist.tasks.animate_2 import FollowedVideo
from wan_dist.tasks.source_video import SourceVideo, VideoFacts
from wan_dist.weights.checkpoint import Checkpoint


class InputCache:
    """What a plan's inputs were encoded to, on the replica's first rank."""

    def __init__(self, session: Session, config: RunConfig, plan: RunPlan) -> None:
        self.axis = session.groups.replica
        folder = config.cache.resolve_folder()
        self._cache: TensorCache | None = None
        if folder is not None and self.axis.rank == 0:
            self._key = _describe_inputs(session, plan, config.fit)
            self._cache = _open_cache(folder, int(config.cache.size_gib * 2**30))

    def find(self) -> dict[str, Tensor] | None:
        """Return the tensors on the first rank, and none on others; None on all if they are not cached."""
        tensors = None if self._cache is None else self._cache.get(self._key)
        is_found = broadcast_object(tensors is not None, self.axis)
        return (tensors or {}) if is_found else None

    def store(self, tensors: dict[str, Tensor]) -> None:
        """Store the tensors that the first rank has."""
        if self._cache is not None:
            self._cache.put(self._key, tensors)


def _describe_inputs(session: Session, plan: RunPlan, fit: str) -> str:
    """Return all that encoded images depend on: pixels, size, models, and how these are run."""
    checkpoint, settings = session.checkpoint, plan.model_settings
    pixels = [(image.size, hashlib.sha256(image.tobytes()).hexdigest()) for image in plan.images]
    depends_on = (
        pixels,
        (plan.task.inputs.kind, plan.width, plan.height, plan.frame_num),
        None if plan.source is None else _describe_source(plan.source),
        _describe_driving(checkpoint, plan),
        (plan.image_keys, plan.task.inputs.channels, plan.camera, fit),
        checkpoint.transformers[0].dims.ref_conv_in_dim,
        checkpoint.vae_digest,
        checkpoint.image_encoder_digest,
        (settings.dtype, settings.memory.vae_dtype, session.device.type),
        (plan.arrangement.clip, str(plan.arrangement.image)),
        session.groups.replica.size,
    )
    return json.dumps(depends_on)


def _describe_source(source: SourceVideo) -> tuple[object, ...]:
    """Return all that depends on a source video and its mask: their content, and which frames are taken."""
    return (_hash_videos(source.video, source.mask), source.frame_indices)


def _describe_driving(checkpoint: Checkpoint, plan: RunPlan) -> tuple[object, ...] | None:
    """Return all that depends on a driving video; weights of the transformer's files encode its faces."""
    driving = plan.driving
    if driving is None:
        return None
    frames = driving.list_frames(plan.clip_index)
    if isinstance(driving, FollowedVideo):
        return (_hash_videos(driving.video), driving.driving_size, frames)
    return (
        _hash_videos(driving.pose, driving.face, driving.background, driving.mask),
        frames,
        plan.negative_prompt is not None,
        checkpoint.digest,
    )


def _hash_videos(*videos: VideoFacts | None) -> list[str | None]:
    return [
        None if video is None else hash_unchanged_file(Path(video.file).expanduser())
        for video in videos
    ]


@lru_cache
def _open_cache(folder: Path, limit_bytes: int) -> TensorCache:
    """Return a cache that records, for as long as the process lives, what was used."""
    return TensorCache(folder, "images", limit_bytes)
