"""Which attention kernel is taken, and what float16 cannot hold."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.conftest import relative_error
from wan_dist.config import ATTENTION_BACKENDS, EIGHT_BIT_ATTENTION
from wan_dist.errors import InputError
from wan_dist.models import attention
from wan_dist.models.attention import choose_attention

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BFLOAT16 = {"dtype": torch.bfloat16, "head_dim": 64}


def test_names_are_the_kernels() -> None:
    assert set(ATTENTION_BACKENDS) == {"auto", *attention._KERNELS}
    assert set(attention._LOSSY) == set(EIGHT_BIT_ATTENTION)
    assert set(attention._FASTEST_FIRST).isdisjoint(attention._LOSSY)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Hopper GPU, as far as can be told from the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *arguments, device=None: linspace(*arguments))
    return monkeypatch


def test_what_is_not_there_is_said(on_gpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="attention=fa3 does not work here: package FlashAttention-3 is not installed; attention=auto"):
        choose_attention("fa3", device=CUDA, **BFLOAT16)
    found = choose_attention("auto", device=CUDA, **BFLOAT16)
    assert "no fa4: package flash-attn-4 is not installed" in found.reason
    assert found.name in ("flash", "sdpa")  # what a CPU can do of those
    assert choose_attention("auto", device=CPU, **BFLOAT16).name == "sdpa"


@pytest.mark.parametrize("off", [0.0, 0.05, 0.5])
def test_kernels_in_8_bits_are_taken_by_name_only(off: float, on_gpu: pytest.MonkeyPatch) -> None:
    package = ModuleType("sageattention")
    package.__spec__ = sys.__spec__
    package.sageattn = lambda q, k, v, tensor_layout: attention._sdpa(q, k, v) + off  # type: ignore[attr-defined]
    on_gpu.setitem(sys.modules, "sageattention", package)
    assert choose_attention("auto", device=CUDA, **BFLOAT16).name != "sage"
    if off < 0.1:
        assert choose_attention("sage", device=CUDA, **BFLOAT16).name == "sage"
    else:
        with pytest.raises(InputError, match="attention=sage does not work here: its result is off by"):
            choose_attention("sage", device=CUDA, **BFLOAT16)


def test_old_gpus_get_float16(on_gpu: pytest.MonkeyPatch) -> None:
    on_gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert choose_attention("auto", device=CUDA, **BFLOAT16).name == "sdpa16"
    with pytest.raises(InputError, match="attention=fa2 does not work here: package flash-attn is not installed"):
        choose_attention("fa2", device=CUDA, **BFLOAT16)


@pytest.mark.parametrize("size", [1.0, 1e5])
def test_what_float16_cannot_hold_is_computed_in_float32(size: float) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 20, 2, 16).bfloat16()
    v = v * size

    def exact(*parts: Tensor) -> Tensor:
        return attention._sdpa(*(part.float() for part in parts))

    found = attention._in_float16(q, k, v)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, exact(q, k, v)) < 5e-3
