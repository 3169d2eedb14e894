"""Command-line arguments: keys are checked and text values quoted, so that Hydra reads them as meant.

Hydra's grammar gives commas, quotes, brackets and ``$`` a meaning (``prompt=two cats, boxing`` is a sweep to
it), so values of text keys are quoted here, before Hydra parses them. For unknown keys and the flags of the
reference implementation, the error names the key to use.
"""

from wan_dist.config.hydra_quoting import quote_if_needed
from wan_dist.config.schema import list_settings
from wan_dist.config.settings import GROUP_KEYS
from wan_dist.runtime.errors import InputError, suggest_nearest

REFERENCE_FLAG_KEYS = {
    "--task": "task",
    "--size": "size",
    "--frame_num": "frame_num",
    "--ckpt_dir": "ckpt_dir",
    "--prompt": "prompt",
    "--image": "image",
    "--src_video": "src_video",
    "--src_mask": "src_mask",
    "--src_ref_images": "src_ref_images",
    "--src_root_path": "src_root_path",
    "--replace_flag": "replace_flag",
    "--use_relighting_lora": "use_relighting_lora",
    "--refert_num": "refert_num",
    "--audio": "audio",
    "--pose_video": "pose_video",
    "--num_clip": "num_clip",
    "--infer_frames": "infer_frames",
    "--start_from_ref": "start_from_ref",
    "--base_seed": "seed",
    "--sample_solver": "sample.solver",
    "--sample_steps": "sample.steps",
    "--sample_shift": "sample.shift",
    "--sample_guide_scale": "sample.guide_scale",
    "--save_file": "output.dir=FOLDER output.name",
}
"""Flags of the reference implementation's ``generate.py``, and the equivalent key here."""

_HYDRA_FLAGS_WITH_VALUE = {
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
}
_HYDRA_FLAGS = {
    "--hydra-help",
    "--version",
    "--resolve",
    "--run",
    "-r",
    "--info",
    "-i",
    "--shell-completion",
    "-sc",
} | _HYDRA_FLAGS_WITH_VALUE

_MAX_VALUE_CHARACTERS = 1000
"""Limit of values that are not text."""


def prepare_arguments(arguments: list[str]) -> list[str]:
    """Check the arguments' keys, and quote the text values.

    Raises InputError for what Hydra could only reject or misread.
    """
    overrides: list[str] = []
    flags: list[str] = []
    awaits_value = False
    for argument in arguments:
        if awaits_value:
            flags.append(argument)
        elif argument.startswith("-"):
            _check_flag(argument)
            flags.append(argument)
        else:
            overrides.append(_prepare_override(argument))
        awaits_value = not awaits_value and argument in _HYDRA_FLAGS_WITH_VALUE
    return overrides + flags  # Hydra does not take them mixed


def _check_flag(argument: str) -> None:
    flag, _, value = argument.partition("=")
    if flag in REFERENCE_FLAG_KEYS:
        raise InputError(f"unknown flag {flag}; use {REFERENCE_FLAG_KEYS[flag]}={value or '...'}")
    if flag not in _HYDRA_FLAGS:
        raise InputError(
            f"unknown flag {flag}; settings are given as key=value (--help lists them)"
        )


def _prepare_override(argument: str) -> str:
    key, equals_sign, value = argument.partition("=")
    if not equals_sign:
        raise InputError(
            f"{argument!r} is not key=value; quote a value with spaces for the shell, "
            "e.g. 'prompt=two cats boxing'"
        )
    plain_key = key.lstrip("+")
    check_setting_key(plain_key)
    if len(value) > _MAX_VALUE_CHARACTERS and not is_text_key(plain_key):
        raise InputError(
            f"{key}={value[:40]}... has {len(value)} characters; "
            f"the limit is {_MAX_VALUE_CHARACTERS}"
        )
    return f"{key}={quote_if_needed(value)}" if is_text_key(plain_key) else argument


def check_setting_key(name: str) -> None:
    """Raise InputError unless ``name`` is a setting of a run, or a section of them.

    Hydra's own keys are not: they can run code.
    """
    keys = list_settings()
    if name in keys or name in {key.rpartition(".")[0] for key in keys} - {""}:
        return
    # people drop the section: steps for sample.steps
    keys_by_short_name = {key.rpartition(".")[2]: key for key in keys}
    hint = (
        f"; did you mean {keys_by_short_name[name]!r}?"
        if name in keys_by_short_name
        else suggest_nearest(name, keys)
    )
    raise InputError(f"unknown key {name!r}{hint} (--help lists them all)")


def is_text_key(key: str) -> bool:
    """Return whether a key's values are text, which is taken literally."""
    setting = list_settings().get(key)
    return setting is not None and setting.type in (str, str | None) and key not in GROUP_KEYS
