"""Which settings a request may have."""

from wan_dist.config.schema import list_settings
from wan_dist.service.request_fields import is_request_key

TEXTS = {"prompt", "negative_prompt", "prompt_ref", "size", "fit", "noise_device", "noise_layout"}
TEXTS |= {"sample.solver", "cache.steps", "sync", "output.video"}
"""Settings of a video that are text, and name no file."""


def test_a_request_sets_what_is_of_the_video_alone() -> None:
    settings = list_settings()
    allowed = {key for key in settings if is_request_key(key)}
    assert {key for key in allowed if settings[key].type in (str, str | None)} == TEXTS
    assert {key.partition(".")[0] for key in allowed if "." in key} == {"sample", "cache", "output"}
    assert {"seed", "fps", "frame_num", "clips", "sample.steps", "output.save_tensor"} <= allowed
    assert "memory.vae_dtype" not in allowed
    assert {"output.video", "output.crf", "output.metadata"} <= allowed
    assert "output.audio" not in allowed
    assert "task" not in allowed
    assert "memory" not in allowed
