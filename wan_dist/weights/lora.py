"""LoRA files of a run: opened, checked against its transformers, and turned into updates of their weights.

Everything is checked before a weight is read: that tensors are complete, fit their modules, and are finite.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from wan_dist.config.loras import EXPERTS, LoraSetting, check_experts
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.file_hash import hash_file
from wan_dist.runtime.log import logger
from wan_dist.runtime.text_files import (
    UnreadableFileError,
    check_regular_file,
    read_checkpoint_json,
)
from wan_dist.weights.file_kinds import find_kind
from wan_dist.weights.files import Shape, TensorFiles, format_first_ten
from wan_dist.weights.lora_match import LoraMatch, match_lora
from wan_dist.weights.lora_names import ModuleNames, find_refused_kind, parse_key
from wan_dist.weights.lora_updates import Update, WeightUpdate

_PEFT_STEM, _PEFT_CONFIG = "adapter_model", "adapter_config.json"
_PEFT_TYPES = ("LORA", "LOHA", "LOKR")
_HEADER_CONFIG, _HEADER_PREFIX = "lora_adapter_metadata", "transformer."


class LoraFile:
    """An opened LoRA file; raises InputError for one that cannot be read, or of a kind that is not read."""

    def __init__(self, setting: LoraSetting) -> None:
        self.setting = setting
        if setting.path.is_dir():
            raise InputError(f"{setting} is a folder; give the file in it")
        try:
            check_regular_file(setting.path)
        except UnreadableFileError as error:
            raise InputError(f"{setting} cannot be read: {error}") from None
        self.files = TensorFiles([setting.path])
        self.config = self._read_config()
        self.keys = {key: parse_key(key) for key in self.files.shapes}
        self._check_kind()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the file."""
        return hash_file(self.setting.path)

    @property
    def digest(self) -> str:
        """Digest of everything that its updates depend on."""
        config_text = json.dumps(self.config, sort_keys=True)
        return repr((self.hash, config_text, self.setting.strength, self.setting.expert))

    def match(self, names: ModuleNames, *, allow_unmatched: bool) -> LoraMatch:
        """Return the updates of one transformer.

        Raises one InputError with all that does not fit, unless it is only of other modules and that is
        allowed.
        """
        match = match_lora(self.files, self.keys, self.config, names)
        if match.incomplete:
            raise InputError(
                f"{self.setting} is not complete: {format_first_ten(match.incomplete)}; download it again"
            )
        if match.misfits:
            raise InputError(self._explain_misfits(match, names))
        if match.unmatched and not (allow_unmatched and match.updates):
            advice = (
                f"its other {len(match.modules)} modules do; lora_unmatched=allow leaves the rest out"
                if match.updates
                else "nothing does"
            )
            raise InputError(
                f"{self.setting} does not fit this model: {describe_unmatched(match)}; {advice}"
            )
        return match

    def _read_config(self) -> dict[str, Any]:
        """Return the training configuration that peft stores beside the file, or diffusers in its header."""
        path = self.setting.path
        config_path = path.parent / _PEFT_CONFIG
        if path.name.startswith(_PEFT_STEM) and config_path.exists():
            config = read_checkpoint_json(config_path)
            if (peft_type := str(config.get("peft_type", "LORA")).upper()) not in _PEFT_TYPES:
                raise InputError(f"{self.setting} is peft's {peft_type}, which is not supported")
            if config.get("fan_in_fan_out"):
                raise InputError(f"{self.setting} has fan_in_fan_out=true, which is not supported")
            return config
        return self._read_header_config()

    def _read_header_config(self) -> dict[str, Any]:
        try:
            config: Any = json.loads(str(self.files.metadata.get(_HEADER_CONFIG, "{}")))
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise InputError(f"{self.setting}: {_HEADER_CONFIG} in its header is not a JSON object")
        return {
            key.removeprefix(_HEADER_PREFIX): value
            for key, value in config.items()
            if key.startswith(_HEADER_PREFIX)
        }

    def _check_kind(self) -> None:
        if kind := find_refused_kind(self.keys):
            raise InputError(
                f"{self.setting} is {kind}, which is not supported; LoRA, LoHa, LoKr, DoRA and full "
                "differences are"
            )
        if any(key is not None and key.role != "alpha" for key in self.keys.values()):
            return
        if (file_kind := find_kind(self.keys)) is not None:
            raise InputError(
                f"{self.setting} is {file_kind.description}, not a LoRA; use {file_kind.setting}= for it"
            )
        raise InputError(
            f"{self.setting} has no tensors of a LoRA (found: {format_first_ten(sorted(self.keys))})"
        )

    def _explain_misfits(self, match: LoraMatch, names: ModuleNames) -> str:
        misfits = (
            f"{len(match.misfits)} of its modules do not fit: {format_first_ten(match.misfits)}"
        )
        if match.made_for_width is not None:
            return (
                f"{self.setting} was made for a model {match.made_for_width} wide, and this one is "
                f"{names.width} wide; {misfits}"
            )
        is_wider_input = any(text.startswith("patch_embedding ") for text in match.misfits)
        hint = (
            "; LoRAs that give the model more input channels are not supported"
            if is_wider_input
            else ""
        )
        return f"{self.setting} does not fit this model; {misfits}{hint}"

    def check_finite(self) -> None:
        """Raise InputError for values that are not finite; reads the whole file."""
        for key in self.keys:
            values = self.files.read(key)
            # Their sum is not finite if one of them is not, and is the fastest look at all.
            if not torch.isfinite(values.float().sum()):
                raise InputError(
                    f"{self.setting} has numbers that are not finite (in {key}): "
                    "its training diverged, or the file is damaged"
                )
            self.files.release_pages(values)

    def describe(self, matches: Sequence[LoraMatch]) -> str:
        """Return one line that describes its kind, modules and expert."""
        updates = [
            update for match in matches for some in match.updates.values() for update in some
        ]
        kinds = Counter(update.kind for update in updates)
        ranks = {rank for update in updates if (rank := update.delta.rank) is not None}
        alphas = {alpha for match in matches for alpha in match.alphas}
        prefixes = sorted({key.prefix for key in self.keys.values() if key and key.prefix})
        namings = sorted({naming for match in matches for naming in match.namings})
        num_modules = len({module for match in matches for module in match.modules})
        parts = [
            f"{' and '.join(sorted(kinds))} of {num_modules} module{'' if num_modules == 1 else 's'}",
            _format_range("rank", ranks),
            _format_range("alpha", alphas) or "no alpha",
            f"{' and '.join(namings)} names{' after ' + ', '.join(prefixes) if prefixes else ''}",
            f"strength {self.setting.strength:g}",
            f"for {self.setting.expert} noise" if self.setting.expert else "",
        ]
        return f"{self.setting.path.name}: {', '.join(filter(None, parts))}"


def _format_range(name: str, numbers: set[Any]) -> str:
    """Return "rank 4", or "ranks 4 to 16", and nothing for no numbers."""
    if len(numbers) > 1:
        return f"{name}s {min(numbers):g} to {max(numbers):g}"
    return f"{name} {min(numbers):g}" if numbers else ""


def describe_unmatched(match: LoraMatch) -> str:
    """Return the file's unmatched tensors, grouped by reason."""
    return "; ".join(
        f"{len(keys)} tensor{'' if len(keys) == 1 else 's'} {reason} ({', '.join(sorted(keys)[:2])}"
        f"{', ...' if len(keys) > 2 else ''})"
        for reason, keys in sorted(match.unmatched.items())
    )


@dataclass(frozen=True)
class MergedLora:
    """A LoRA that is merged into a checkpoint's transformers."""

    file: LoraFile
    description: str
    """One line for the log."""
    warnings: tuple[str, ...] = ()


def merge_loras(
    settings: Sequence[LoraSetting],
    transformer_shapes: Sequence[Mapping[str, Shape]],
    *,
    allow_unmatched: bool,
) -> tuple[list[MergedLora], list[dict[str, WeightUpdate]]]:
    """Open and check LoRA files, and return them and the updates of each transformer, by original names.

    ``transformer_shapes``: of each transformer's parameters, by original names, in the order of `EXPERTS`
    where there are two. Raises InputError for a file that cannot be read or does not fit.
    """
    all_updates: list[dict[str, list[Update]]] = [defaultdict(list) for _ in transformer_shapes]
    all_names = [ModuleNames(shapes) for shapes in transformer_shapes]
    check_experts(settings, has_experts=len(all_names) > 1)
    loras = []
    for setting in settings:
        file = LoraFile(setting)
        indices = (
            range(len(all_names)) if setting.expert is None else [EXPERTS.index(setting.expert)]
        )
        matches = [
            file.match(all_names[index], allow_unmatched=allow_unmatched) for index in indices
        ]
        file.check_finite()  # once, also where it is for two experts
        for index, match in zip(indices, matches, strict=True):
            for name, updates in match.updates.items():
                all_updates[index][name] += [
                    replace(update, strength=setting.strength) for update in updates
                ]
        warnings = _list_warnings(setting, matches, has_experts=len(all_names) > 1)
        loras.append(MergedLora(file, file.describe(matches), tuple(warnings)))
    return loras, [
        {name: WeightUpdate(tuple(updates)) for name, updates in by_name.items()}
        for by_name in all_updates
    ]


def _list_warnings(
    setting: LoraSetting, matches: Sequence[LoraMatch], *, has_experts: bool
) -> list[str]:
    warnings = []
    if matches[0].unmatched:
        warnings.append(f"{setting}: left out are {describe_unmatched(matches[0])}")
    if has_experts:
        named = {
            expert for expert in EXPERTS if re.search(expert, setting.path.name, re.IGNORECASE)
        }
        given = set(EXPERTS) if setting.expert is None else {setting.expert}
        if len(named) == 1 and given - named:
            warnings.append(
                f"{setting}: its name says {named.pop()} noise, and it is used for "
                f"{' and '.join(sorted(given))} noise"
            )
    return warnings


def log_loras(loras: Sequence[MergedLora]) -> None:
    """Log a line for each LoRA, and its warnings."""
    for lora in loras:
        logger.info("lora      %s", lora.description)
        for warning in lora.warnings:
            logger.warning("%s", warning)
