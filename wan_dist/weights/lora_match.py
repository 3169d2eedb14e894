"""Match of a LoRA file's tensors with a transformer: the updates of its parameters, and what does not fit.

No tensor is read but alphas.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from wan_dist.weights.files import Shape, TensorFiles
from wan_dist.weights.lora_names import LoraKey, ModuleNames
from wan_dist.weights.lora_updates import (
    Delta,
    Difference,
    Factor,
    Hadamard,
    Kronecker,
    LowRank,
    Magnitude,
    Update,
)

_ATTRIBUTES = {"diff_b": "bias", "diff_m": "modulation", "up_bias": "bias"}
"""Parameter of a module that a part of an update changes; all others change its weight."""
_WHOLE_SETS = (
    ("down", "up"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
)
"""Parts that require each other."""
_PUBLIC_NAMES = {"down": "lora_A (lora_down)", "up": "lora_B (lora_up)", "magnitude": "dora_scale"}


@dataclass(frozen=True)
class ModuleParts:
    """The tensors of one module."""

    module: str
    """In the original layout."""
    name: str
    """In the file, without prefix."""
    keys: dict[str, str] = field(default_factory=dict)
    """By role."""


@dataclass
class LoraMatch:
    """The updates of one transformer by a LoRA file, and what does not match."""

    updates: dict[str, list[Update]] = field(default_factory=lambda: defaultdict(list))
    """By the parameters' names in the original layout, at strength 1."""
    modules: set[str] = field(default_factory=set)
    """Modules that get an update."""
    namings: set[str] = field(default_factory=set)
    """Layouts whose names the file has: original, Diffusers."""
    alphas: set[float] = field(default_factory=set)
    unmatched: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Unmatched keys, by what they are, as "of an image branch that this model does not have"."""
    incomplete: list[str] = field(default_factory=list)
    """Modules that lack tensors or have some twice, and which."""
    misfits: list[str] = field(default_factory=list)
    """Modules whose tensors do not fit, and why."""
    made_for_width: int | None = None
    """Width of the model that it was made for, where that is another one's."""


def match_lora(
    files: TensorFiles,
    keys: Mapping[str, LoraKey | None],
    config: Mapping[str, Any],
    names: ModuleNames,
) -> LoraMatch:
    """Return what the file does to the model of these names.

    ``keys`` are its parsed keys, ``config`` peft's training configuration, if there is one.
    """
    match = LoraMatch()
    for parts in _group_by_module(files, keys, names, match):
        if problem := _find_missing_part(parts.keys):
            match.incomplete.append(f"{parts.module} has {problem}")
            continue
        alpha = _read_alpha(files, config, parts)
        match.alphas |= {alpha} if alpha is not None else set()
        for parameter, update in _build_updates(files, config, parts, names, alpha):
            if problem := _find_misfit(update, names.shapes[parameter]):
                match.misfits.append(f"{parts.module} {problem}")
                match.made_for_width = match.made_for_width or _find_width(update, parameter, names)
                continue
            match.updates[parameter].append(update)
            match.modules.add(parts.module)
    return match


def _group_by_module(
    files: TensorFiles,
    keys: Mapping[str, LoraKey | None],
    names: ModuleNames,
    match: LoraMatch,
) -> list[ModuleParts]:
    """Return the tensors of each module; unmatched and non-float tensors are added to ``match``."""
    parts_by_module: dict[str, ModuleParts] = {}
    for key, parsed_key in keys.items():
        if parsed_key is None:
            match.unmatched["of no known kind"].append(key)
            continue
        found = names.find(parsed_key.module, _ATTRIBUTES.get(parsed_key.role, "weight"))
        if found is None:
            match.unmatched[names.explain_absence(key, parsed_key.module)].append(key)
        elif found.name is None:
            match.unmatched["of parameters that their modules do not have"].append(key)
        else:
            match.namings.add(found.naming)
            parts = parts_by_module.setdefault(
                found.module, ModuleParts(found.module, parsed_key.module)
            )
            if (other_key := parts.keys.setdefault(parsed_key.role, key)) != key:
                match.incomplete.append(f"{found.module} has two adapters ({other_key}, {key})")
            if key in files.non_float_types and parsed_key.role != "alpha":
                type_name = files.non_float_types[key]
                match.misfits.append(f"{found.module} is of {type_name}, not of floats")
    return list(parts_by_module.values())


def _find_missing_part(keys: Mapping[str, str]) -> str | None:
    """Return which parts a module has without others that they need."""

    def name(role: str) -> str:
        return _PUBLIC_NAMES.get(role, role)

    for roles in _WHOLE_SETS:
        present, missing = (
            [role for role in roles if (role in keys) == it] for it in (True, False)
        )
        if present and missing:
            return f"{name(present[0])} and no {name(missing[0])}"
    sides = [
        next(
            (f"lokr_w{side}{suffix}" for suffix in ("", "_a") if f"lokr_w{side}{suffix}" in keys),
            None,
        )
        for side in (1, 2)
    ]
    if (sides[0] is None) != (sides[1] is None):
        return f"{sides[0] or sides[1]} and no lokr_w{2 if sides[0] else 1}"
    has_product = "down" in keys or "hada_w1_a" in keys or sides[0] is not None
    if "magnitude" in keys and not has_product:
        return f"{name('magnitude')} and no {name('down')}"
    if "up_bias" in keys and "down" not in keys:
        return f"a bias of {name('up')} and no {name('down')}"
    if set(keys) == {"alpha"}:
        return f"alpha and no {name('down')}"
    return None


def _read_alpha(files: TensorFiles, config: Mapping[str, Any], parts: ModuleParts) -> float | None:
    """Return a module's alpha, None where there is none, also for 0, which kohya's trainers write for it.

    Its own tensor decides, else peft's configuration, whose patterns are of the ends of modules' names.
    """
    if (key := parts.keys.get("alpha")) is not None:
        return float(files.read(key).float().reshape(-1)[0]) or None
    alpha = config.get("lora_alpha", config.get("alpha"))
    patterns = config.get("alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", parts.name):
            alpha = value
    return float(alpha) if isinstance(alpha, int | float) and alpha else None


def _build_updates(
    files: TensorFiles,
    config: Mapping[str, Any],
    parts: ModuleParts,
    names: ModuleNames,
    alpha: float | None,
) -> Iterator[tuple[str, Update]]:
    """Yield the updates of one module's parameters, each with the parameter's name."""
    factors = {role: Factor(files, key) for role, key in parts.keys.items()}

    def find(attribute: str) -> str:
        found = names.find(parts.module, attribute)
        assert found is not None
        assert found.name is not None
        return found.name

    for role in ("diff", "diff_b", "diff_m"):
        if role in factors:
            parameter = find("weight" if role == "diff_m" else _ATTRIBUTES.get(role, "weight"))
            yield parameter, Update(Difference(factors[role], names.shapes[parameter][0]), 1.0)
    for delta in _build_products(factors):
        scale = 1.0
        if delta.rank and alpha is not None:
            is_stabilized = bool(config.get("use_rslora"))
            scale = alpha / (math.sqrt(delta.rank) if is_stabilized else delta.rank)
        magnitude = None
        if (lengths := factors.get("magnitude")) is not None:
            # (out, 1) or (out,) is of rows, also where the weight is square.
            magnitude = Magnitude(lengths, is_of_rows=lengths.shape[0] != 1)
        yield find("weight"), Update(delta, scale, magnitude=magnitude)
        if "up_bias" in factors and isinstance(delta, LowRank):
            parameter = find("bias")
            num_rows = names.shapes[parameter][0]
            yield parameter, Update(Difference(factors["up_bias"], num_rows), scale)


def _build_products(factors: Mapping[str, Factor]) -> Iterator[Delta]:
    """Yield the matrices that a module's factors are multiplied to."""
    if "down" in factors:
        yield LowRank(factors["down"], factors["up"])
    if "hada_w1_a" in factors:
        first, second = (
            LowRank(factors[f"hada_w{side}_b"], factors[f"hada_w{side}_a"]) for side in (1, 2)
        )
        yield Hadamard(first, second)
    if "lokr_w1" in factors or "lokr_w1_a" in factors:
        left, right = (
            factors.get(f"lokr_w{side}")
            or LowRank(factors[f"lokr_w{side}_b"], factors[f"lokr_w{side}_a"])
            for side in (1, 2)
        )
        yield Kronecker(left, right)


def _find_misfit(update: Update, shape: Shape) -> str | None:
    """Return why an update does not fit a parameter of this shape."""
    delta, expected = update.delta, (shape[0], math.prod(shape[1:]))
    if isinstance(delta, Difference):
        stored_shape = delta.values.files.shapes[delta.values.key]
        num_extra = len(stored_shape) - len(shape)
        is_equal = stored_shape[max(0, num_extra) :] == shape and set(stored_shape[:num_extra]) <= {
            1
        }
        return None if is_equal else f"is a difference of {stored_shape}, not of {shape}"
    if delta.shape is None:
        return "has factors that do not fit each other"
    if delta.shape != expected:
        num_outputs, num_inputs = delta.shape
        return (
            f"is for {num_inputs} inputs and {num_outputs} outputs, "
            f"not {expected[1]} and {expected[0]}"
        )
    if (magnitude := update.magnitude) is not None:
        num_lengths = math.prod(magnitude.lengths.shape)
        if num_lengths != expected[0 if magnitude.is_of_rows else 1]:
            return f"has a dora_scale of {num_lengths} numbers for a weight of {expected}"
    return None


def _find_width(update: Update, parameter: str, names: ModuleNames) -> int | None:
    """Return the width of the model that a linear's update was made for, where it is another one."""
    shape, expected = update.delta.shape, names.shapes[parameter]
    if isinstance(update.delta, Difference) or shape is None or len(expected) != 2:
        return None
    return next(
        (
            found
            for found, wanted in zip(reversed(shape), reversed(expected), strict=True)
            if wanted == names.width != found
        ),
        None,
    )
