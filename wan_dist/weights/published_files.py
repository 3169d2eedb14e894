"""Published files of few-step models: which files of which repository, for which task; no torch.

Repositories and files are those of ModelTC's LightX2V and Wan2.2-Lightning, of hao-ai-lab's FastVideo, and
LoRAs that others have extracted from these and other models.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from wan_dist.runtime.errors import InputError


@dataclass(frozen=True)
class PublishedFiles:
    """Files of one repository that are used together."""

    name: str
    description: str
    task: str
    preset: str
    repository: str
    files: Mapping[str, tuple[str, ...]]
    """By the setting that takes them, in its order; of ``ckpt_dir`` patterns of the files of a folder."""
    options: str = ""
    """Further settings that the files want."""

    @property
    def patterns(self) -> list[str]:
        """Glob patterns of the files in the repository."""
        return [pattern for patterns in self.files.values() for pattern in patterns]


def _make_pair(pattern: str) -> tuple[str, ...]:
    """Return the files for high and for low noise."""
    return tuple(pattern.format(expert=expert) for expert in ("high", "low"))


def _use_lora(file: str) -> dict[str, tuple[str, ...]]:
    return {"lora": (file,)}


def _use_lora_pair(pattern: str) -> dict[str, tuple[str, ...]]:
    high, low = _make_pair(pattern)
    return {"lora_high": (high,), "lora_low": (low,)}


_DIFFUSERS_FOLDER = (
    "model_index.json",
    *(f"{part}/*" for part in ("transformer", "text_encoder", "tokenizer", "vae")),
)
_LIGHTX2V_LORAS, _LIGHTX2V_MODELS = (
    "lightx2v/Wan{version}-Distill-Loras",
    "lightx2v/Wan{version}-Distill-Models",
)
_ALL_FILES = (
    PublishedFiles(
        "lightx2v-4step-t2v-14B",
        "LoRA of LightX2V",
        "t2v-14B",
        "lightx2v-4step",
        _LIGHTX2V_LORAS.format(version="2.1"),
        _use_lora("wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors"),
    ),
    PublishedFiles(
        "lightx2v-4step-i2v-14B",
        "LoRA of LightX2V",
        "i2v-14B",
        "lightx2v-4step",
        _LIGHTX2V_LORAS.format(version="2.1"),
        _use_lora("wan2.1_i2v_lora_rank64_lightx2v_4step.safetensors"),
    ),
    PublishedFiles(
        "lightx2v-4step-t2v-A14B",
        "LoRA pair of LightX2V",
        "t2v-A14B",
        "lightx2v-4step",
        _LIGHTX2V_LORAS.format(version="2.2"),
        _use_lora_pair(
            "wan2.2_t2v_A14b_{expert}_noise_lora_rank64_lightx2v_4step_1217.safetensors"
        ),
    ),
    PublishedFiles(
        "lightx2v-4step-i2v-A14B",
        "LoRA pair of LightX2V",
        "i2v-A14B",
        "lightx2v-4step",
        _LIGHTX2V_LORAS.format(version="2.2"),
        _use_lora_pair(
            "wan2.2_i2v_A14b_{expert}_noise_lora_rank64_lightx2v_4step_1022.safetensors"
        ),
    ),
    PublishedFiles(
        "lightning-4step-t2v-A14B",
        "LoRA pair of Wan2.2-Lightning",
        "t2v-A14B",
        "lightning-4step",
        "lightx2v/Wan2.2-Lightning",
        _use_lora_pair(
            "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/{expert}_noise_model.safetensors"
        ),
    ),
    PublishedFiles(
        "lightning-4step-i2v-A14B",
        "LoRA pair of Wan2.2-Lightning",
        "i2v-A14B",
        "lightning-4step",
        "lightx2v/Wan2.2-Lightning",
        _use_lora_pair(
            "Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1/{expert}_noise_model.safetensors"
        ),
    ),
    PublishedFiles(
        "lightx2v-bf16-t2v-14B",
        "transformer of LightX2V",
        "t2v-14B",
        "lightx2v-4step",
        _LIGHTX2V_MODELS.format(version="2.1"),
        {"dit_file": ("wan2.1_t2v_14b_lightx2v_4step.safetensors",)},
    ),
    PublishedFiles(
        "lightx2v-fp8-t2v-14B",
        "transformer of LightX2V, fp8",
        "t2v-14B",
        "lightx2v-4step",
        _LIGHTX2V_MODELS.format(version="2.1"),
        {"dit_file": ("wan2.1_t2v_14b_scaled_fp8_e4m3_lightx2v_4step.safetensors",)},
        "quant=fp8",
    ),
    PublishedFiles(
        "lightx2v-fp8-i2v-14B",
        "transformer of LightX2V for 480P, fp8",
        "i2v-14B",
        "lightx2v-4step",
        _LIGHTX2V_MODELS.format(version="2.1"),
        {"dit_file": ("wan2.1_i2v_480p_scaled_fp8_e4m3_lightx2v_4step.safetensors",)},
        "quant=fp8",
    ),
    PublishedFiles(
        "lightx2v-bf16-i2v-A14B",
        "both transformers of LightX2V",
        "i2v-A14B",
        "lightx2v-4step",
        _LIGHTX2V_MODELS.format(version="2.2"),
        {"dit_file": _make_pair("wan2.2_i2v_A14b_{expert}_noise_lightx2v_4step.safetensors")},
    ),
    PublishedFiles(
        "lightx2v-fp8-i2v-A14B",
        "both transformers of LightX2V, fp8",
        "i2v-A14B",
        "lightx2v-4step",
        _LIGHTX2V_MODELS.format(version="2.2"),
        {
            "dit_file": _make_pair(
                "wan2.2_i2v_A14b_{expert}_noise_scaled_fp8_e4m3_lightx2v_4step.safetensors"
            )
        },
        "quant=fp8",
    ),
    PublishedFiles(
        "fastwan-3step-ti2v-5B",
        "FastWan with full attention, a whole checkpoint",
        "ti2v-5B",
        "fastwan-3step",
        "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers",
        {"ckpt_dir": _DIFFUSERS_FOLDER},
    ),
    PublishedFiles(
        "fusionx-8step-t2v-14B",
        "LoRA of FusionX",
        "t2v-14B",
        "fusionx-8step",
        "vrgamedevgirl84/Wan14BT2VFusioniX",
        _use_lora("FusionX_LoRa/Wan2.1_T2V_14B_FusionX_LoRA.safetensors"),
    ),
    PublishedFiles(
        "fusionx-8step-i2v-14B",
        "LoRA of FusionX",
        "i2v-14B",
        "fusionx-8step",
        "vrgamedevgirl84/Wan14BT2VFusioniX",
        _use_lora("FusionX_LoRa/Wan2.1_I2V_14B_FusionX_LoRA.safetensors"),
    ),
    PublishedFiles(
        "causvid-lora-t2v-14B",
        "LoRA of CausVid, extracted by Kijai",
        "t2v-14B",
        "causvid-lora",
        "Kijai/WanVideo_comfy",
        _use_lora("Wan21_CausVid_14B_T2V_lora_rank32.safetensors"),
    ),
)
PUBLISHED_FILES = {files.name: files for files in _ALL_FILES}


def find_published_files(name: str) -> PublishedFiles | None:
    """Return the files with a name, None for a name that begins no file's.

    Raises InputError for the beginning of several names.
    """
    if name in PUBLISHED_FILES:
        return PUBLISHED_FILES[name]
    candidates = [key for key in PUBLISHED_FILES if key.startswith(f"{name}-")]
    if not candidates:
        return None
    raise InputError(f"{name} is published for several tasks: say {' or '.join(candidates)}")


def list_published_lines() -> Iterator[str]:
    """Yield a line for each of the published files: name, what they are, and the repository."""
    name_width = max(map(len, PUBLISHED_FILES))
    description_width = max(len(files.description) for files in _ALL_FILES)
    for files in _ALL_FILES:
        yield (
            f"{files.name:{name_width}}  {files.description:{description_width}}  {files.repository}"
        )
