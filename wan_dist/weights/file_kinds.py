"""Kinds of weight files, distinguished by the names of their tensors, never by file names."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from wan_dist.runtime.errors import InputError
from wan_dist.weights.files import TensorFiles


@dataclass(frozen=True)
class FileKind:
    """A kind of model: the setting for its file, its description, and a pattern that only its keys match."""

    setting: str
    description: str
    pattern: str


_LORA = FileKind(
    "lora",
    "a LoRA",
    r"[._]lora[._]?(?:A|B|a|b|up|down|mid|linear_layer|magnitude_vector)\b|[._]lora_(?:A|B|up|down)\."
    r"|\.(?:hada_w[12]|lokr_w[12]|oft_blocks|oft_diag|dora_scale|diff|diff_b|diff_m)(?:_[ab])?$",
)
FILE_KINDS = (
    FileKind(
        "dit_file",
        "a transformer",
        r"(?:^|\.)blocks\.0\.(?:block\.)?(?:self_attn\.q|attn1\.to_q)\.(?:int8_)?weight$",
    ),
    FileKind(
        "t5_file",
        "a umT5 text encoder",
        # T5 has the table in its first block only.
        r"^(?:encoder\.)?block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.weight$"
        r"|^blocks\.1\.pos_embedding\.embedding\.weight$|^enc\.blk\.1\.attn_rel_b\.weight$",
    ),
    FileKind(
        "vae_file",
        "a VAE",
        r"^decoder\.(?:middle\.0\.residual\.0|mid_block\.resnets\.0\.norm1)\.gamma$",
    ),
    FileKind(
        "clip_file",
        "a CLIP vision tower",
        r"^(?:vision_model\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight$"
        r"|^visual\.transformer\.0\.attn\.to_qkv\.weight$",
    ),
)
_OTHER_TASKS = (
    (r"(?:^|\.)(?:audio_proj|audio_model)\.", "a model driven by sound, as HuMo and MultiTalk"),
    (r"(?:^|\.)(?:double_blocks|transformer_blocks|joint_blocks)\.0\.", "a model other than Wan"),
)
"""Patterns of keys that only transformers of unsupported tasks have, and the tasks' names."""


def find_kind(keys: Collection[str]) -> FileKind | None:
    """Return the kind of the file that has these tensors, None for an unknown one."""
    return next(
        (
            kind
            for kind in (_LORA, *FILE_KINDS)
            if any(re.search(kind.pattern, key) for key in keys)
        ),
        None,
    )


def check_kind(files: TensorFiles, setting: str) -> None:
    """Raise InputError unless a file is of the kind that ``setting`` takes, and of a task known here."""
    expected_kind = next(kind for kind in FILE_KINDS if kind.setting == setting)
    actual_kind = find_kind(files.shapes)
    if actual_kind is not None and actual_kind != expected_kind:
        raise InputError(
            f"{setting}={files} is {actual_kind.description}; "
            f"use {actual_kind.setting}= for it, and give {expected_kind.description} here"
        )
    for pattern, task_name in _OTHER_TASKS if setting == "dit_file" else ():
        if key := next((key for key in files.shapes if re.search(pattern, key)), None):
            raise InputError(
                f"{setting}={files} is the transformer of {task_name}, which no task here is for "
                f"(it has {key})"
            )
    if actual_kind is None:
        raise InputError(
            f"{setting}={files} is not {expected_kind.description}: it has none of the keys of one "
            f"(it begins with {', '.join(sorted(files.shapes)[:3]) or 'nothing'})"
        )
