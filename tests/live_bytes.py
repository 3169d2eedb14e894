"""Counts the bytes of tensors that exist, as operations make them and let them go: a GPU's peak,
found on meta without one.
"""

import weakref
from collections.abc import Callable, Hashable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_LAYOUTS: dict[Hashable, tuple[Any, ...] | None] = {}
"""What an operation made of arguments of these sizes: size, stride and dtype; None: it wrote into the
first. On meta it depends on nothing else, and PyTorch takes a millisecond to find out for some.
"""


class LiveBytes(TorchDispatchMode):
    """While it is on: ``now`` and ``peak`` of all storages on meta that were made since, without
    those of ``others``.
    """

    def __init__(self, others: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = _call_on_meta(function, args, kwargs or {})
        for tensor in (made,) if isinstance(made, Tensor) else tree_iter(made):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _call_on_meta(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return ``function(*args, **kwargs)``, without the call where `_LAYOUTS` has its result."""
    effect = _effect_of(function)
    if effect == "other":
        return function(*args, **kwargs)
    try:
        key = (function, _describe(args), _describe(tuple(kwargs.items())))
    except ValueError:
        return function(*args, **kwargs)
    if key in _LAYOUTS:
        found = _LAYOUTS[key]
        if found is None:
            return args[0]
        size, stride, dtype = found
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")
    made = function(*args, **kwargs)
    if effect == "writes" and made is args[0]:
        if _describe(args[:1]) == key[1][:1]:  # not resized
            _LAYOUTS[key] = None
    elif effect == "makes" and isinstance(made, Tensor) and made.is_meta:
        size, stride = made.shape, made.stride()
        alike = torch.empty_strided(size, stride, dtype=made.dtype, device="meta")
        storage, others = made.untyped_storage(), filter(torch.is_tensor, tree_iter((args, kwargs)))
        is_new = all(other.untyped_storage()._cdata != storage._cdata for other in others)
        # _unsafe_view returns a view that its schema does not tell of.
        if is_new and alike.untyped_storage().nbytes() == storage.nbytes():
            _LAYOUTS[key] = size, stride, made.dtype
    return made


@cache
def _effect_of(function: Callable[..., Any]) -> str:
    """Whether it ``makes`` one new tensor, ``writes`` into its first argument and returns that, or
    does something ``other``, as views do.
    """
    schema = function._schema  # type: ignore[attr-defined]
    aliases = [argument.alias_info for argument in schema.arguments]
    if len(schema.returns) != 1:
        return "other"
    if not any(aliases):
        return "makes"
    writes_first = aliases[0] is not None and aliases[0].is_write and not any(aliases[1:])
    return "writes" if writes_first else "other"


def _describe(value: Any) -> Any:
    """Return what the layout of a result depends on; raise ValueError for a tensor off meta."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise ValueError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_describe, value))
    return type(value), value
