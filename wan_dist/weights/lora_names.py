"""Names in LoRA files: which module a tensor belongs to, and what part of an update it is.

A key is PREFIX + MODULE + SUFFIX, and programs combine the three in nearly every way: a module is named as in
the original or in the Diffusers layout, with dots, with underscores or with both. An underscored name cannot
be split without a guess, so the model's own names are put into that form and looked up.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wan_dist.weights.files import Shape
from wan_dist.weights.key_maps import map_diffusers_transformer, map_original_transformer

_PREFIX_PATTERN = re.compile(
    r"(?:base_model\.model\.|(?:model\.)?diffusion_model\.|pipe\.dit\.|transformer\.|unet\.|model\."
    r"|lora_unet__?|lora_transformer_|lycoris_)+"
)
_TEXT_ENCODER_PATTERN = re.compile(
    r"(?:base_model\.model\.)?(?:lora_te\d?_|lora_text_encoder|text_encoder)"
)
_ADAPTER = r"(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?"
"""Optional suffix: the adapter's name in peft's files, and ``.weight``."""
_ROLE_PATTERNS = tuple(
    (re.compile(rf"(?P<stem>.+?){pattern}"), role)
    for pattern, role in (
        (r"\.lora_(?:B|up)(?:\.\w+)?\.bias", "up_bias"),
        (rf"(?:\.lora_A|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down){_ADAPTER}", "down"),
        (rf"(?:\.lora_B|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up){_ADAPTER}", "up"),
        (rf"(?:\.dora_scale|\.lora_magnitude_vector){_ADAPTER}", "magnitude"),
        (r"\.alpha", "alpha"),
        (r"\.(?:diff|w_norm)", "diff"),
        (r"\.(?:diff_b|b_norm)", "diff_b"),
        (r"\.diff_m", "diff_m"),
        *(
            (rf"\.{name}{_ADAPTER}", name)
            for name in (
                *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
                *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
            )
        ),
    )
)
_REFUSED_PATTERNS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\.(?:oft_|boft_)", "OFT, which rotates weights"),
        (r"\.(?:a1|a2|b1|b2|bm|am)\.weight$", "GLoRA"),
        (r"vera_(?:lambda|A|B)", "VeRA"),
        (r"\.ia3_|\.on_input$", "IA3"),
        (r"\.lora_mid", "LoCon with a core (lora_mid)"),
        (r"\.(?:hada_t|lokr_t)[12]", "LoHa or LoKr of convolutions (hada_t1, lokr_t2)"),
        (r"\.set_weight$", "whole weights that replace the model's (set_weight)"),
        (r"\.reshape_weight$", "weights of another shape (reshape_weight)"),
        (r"\.lora_embedding_", "LoRA of an embedding"),
        (r"\.(?:smooth_factor|proj_down|proj_up)$", "Nunchaku"),
    )
)
"""Kinds of updates that are not supported, by patterns of their keys."""
_FOREIGN_PARTS = (
    (
        r"_[kv]_img$|_add_[kv]_proj$|norm_k_img|norm_added_k|img_emb|image_embedder",
        "of an image branch",
    ),
    (r"^vace_", "of VACE"),
    (r"face_adapter|motion_encoder|pose_patch", "of Animate"),
    (r"audio", "of an audio branch"),
    (r"control_adapter|ref_conv", "of a control branch"),
)
"""Modules of other Wan models, by their underscored names."""


@dataclass(frozen=True)
class LoraKey:
    """The parts of a key: prefix, module as the file names it, and the tensor's part of the update."""

    prefix: str
    module: str
    role: str


def parse_key(key: str) -> LoraKey | None:
    """Return the parts of a key, None for a key that no LoRA has."""
    for pattern, role in _ROLE_PATTERNS:
        if match := pattern.fullmatch(key):
            prefix_match = _PREFIX_PATTERN.match(match["stem"])
            prefix = prefix_match[0] if prefix_match else ""
            return LoraKey(prefix, match["stem"].removeprefix(prefix), role)
    return None


def find_refused_kind(keys: Iterable[str]) -> str | None:
    """Return the name of a kind of update in these keys that is not read, None if there is none."""
    return next(
        (kind for key in keys for pattern, kind in _REFUSED_PATTERNS if pattern.search(key)), None
    )


@dataclass(frozen=True)
class FoundParameter:
    """A parameter of the model that a name in a LoRA file means."""

    module: str
    """In the original layout."""
    name: str | None
    """In the original layout; None where the module has no such parameter."""
    naming: str
    """Layout whose name the file has: original or Diffusers."""


class ModuleNames:
    """The modules of a transformer by every name that a LoRA file may have for them.

    ``shapes`` has the shape of each parameter, by its name in the original layout.
    """

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes
        self.num_blocks = 1 + max(
            (int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))),
            default=-1,
        )
        self.width = shapes["patch_embedding.weight"][0]
        self._found: dict[str, tuple[str, str]] = {}
        rename_key = map_diffusers_transformer(()).find_sources
        for name in shapes:
            for naming, key in (("Diffusers", rename_key(name)[0].key), ("original", name)):
                module, _, attribute = key.rpartition(".")
                if attribute in ("weight", "bias"):
                    self._found[_underscore(module)] = (name.rpartition(".")[0], naming)
                else:  # a parameter beside its module's others, such as modulation
                    self._found[_underscore(key)] = (name, naming)

    def find(self, module: str, attribute: str) -> FoundParameter | None:
        """Return a module's parameter, None for a module that the model does not have.

        ``attribute`` is weight, bias or modulation. A module that is itself a parameter is its own weight.
        """
        if attribute == "modulation":
            module, attribute = f"{module}.modulation", "weight"
        # LoRAs that were trained on Animate-2's own files have its wrapped blocks.
        name_in_model = re.sub(r"^(blocks_\d+)_block_", r"\1_", _underscore(module))
        if (found := self._found.get(name_in_model)) is None:
            return None
        owner, naming = found
        if owner in self.shapes:
            return FoundParameter(owner, owner if attribute == "weight" else None, naming)
        name = f"{owner}.{attribute}"
        return FoundParameter(owner, name if name in self.shapes else None, naming)

    def explain_absence(self, key: str, module: str) -> str:
        """Return of what part a module is that this model does not have."""
        if _TEXT_ENCODER_PATTERN.match(key):
            return "of the text encoder, which LoRAs are not merged into"
        name = _underscore(module)
        for pattern, part in _FOREIGN_PARTS:
            if re.search(pattern, name):
                return f"{part} that this model does not have"
        block = re.match(r"blocks_(\d+)_", name)
        if block and int(block[1]) >= self.num_blocks:
            return f"of blocks beyond the {self.num_blocks} that this model has"
        return "of no module of this model"


def list_original_shapes(parameters: Iterable[tuple[str, Shape]]) -> dict[str, Shape]:
    """Return the shapes of a transformer's parameters by their original names, of which one may be a part."""
    find_sources = map_original_transformer(()).find_sources
    return {
        source.key: (shape[0] // len(sources), *shape[1:])
        for name, shape in parameters
        for sources in [find_sources(name)]
        for source in sources
    }


def _underscore(name: str) -> str:
    return name.replace(".", "_")
