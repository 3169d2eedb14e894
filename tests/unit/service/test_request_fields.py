"""Which settings a request may have."""

import json

from wan_dist.config.arguments import prepare_arguments
from wan_dist.config.compose import compose_config
from wan_dist.config.schema import list_settings
from wan_dist.service.request_fields import describe_fields, is_request_key
from wan_dist.tasks.registry import get_task

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


def test_a_client_is_told_what_a_request_may_have() -> None:
    config = compose_config(prepare_arguments(["task=i2v-A14B", "fps=20", "output.dir=private"]))
    assert config is not None
    described = json.dumps(describe_fields(config, get_task("i2v-A14B")))
    fields = json.loads(described)
    assert fields["images"] == ["image", "first_frame", "last_frame"]
    defaults = {setting["name"]: setting["default"] for setting in fields["settings"]}
    assert defaults["fps"] == 20
    assert defaults.keys() | {"prompt"} == {key for key in list_settings() if is_request_key(key)}
    assert "private" not in described
