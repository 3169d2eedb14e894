"""Wan-dist: a launcher for the Wan2.1 and Wan2.2 video models.

    pipeline = wan_dist.open_pipeline("t2v-1.3B", ckpt_dir="/models/Wan2.1-T2V-1.3B")
    video = pipeline("Two cats, boxing on a stage", seed=7, frame_num=81)
    video.save("cats.mp4")

Names are imported when they are used: importing the package alone does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from wan_dist.runtime.python_version import check_python_version

check_python_version()

if TYPE_CHECKING:
    from wan_dist.pipeline.video_pipeline import GeneratedVideo, VideoPipeline, open_pipeline
    from wan_dist.runtime.errors import InputError
    from wan_dist.service.client import RequestedVideo, ServiceError, VideoClient
    from wan_dist.weights.components import load_text_encoder, load_transformer, load_vae

__version__ = "0.1.0"
__all__ = [
    "GeneratedVideo",
    "InputError",
    "RequestedVideo",
    "ServiceError",
    "VideoClient",
    "VideoPipeline",
    "__version__",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "open_pipeline",
]

_MODULE_BY_NAME = {
    "GeneratedVideo": "wan_dist.pipeline.video_pipeline",
    "InputError": "wan_dist.runtime.errors",
    "RequestedVideo": "wan_dist.service.client",
    "ServiceError": "wan_dist.service.client",
    "VideoClient": "wan_dist.service.client",
    "VideoPipeline": "wan_dist.pipeline.video_pipeline",
    "load_text_encoder": "wan_dist.weights.components",
    "load_transformer": "wan_dist.weights.components",
    "load_vae": "wan_dist.weights.components",
    "open_pipeline": "wan_dist.pipeline.video_pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used first."""
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_BY_NAME[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
