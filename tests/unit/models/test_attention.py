"""Which attention kernel is taken, and what float16 cannot hold."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.conftest import relative_error
from tests.live_bytes import LiveBytes
from wan_dist.config.choices import ATTENTION_BACKENDS, EIGHT_BIT_BACKENDS, TRAINED_ATTENTIONS
from wan_dist.models.attention import backends as attention
from wan_dist.models.attention import log_sum_exp
from wan_dist.models.attention.inner import choose_attention
from wan_dist.models.attention.log_sum_exp import attend_with_lse
from wan_dist.parallel.usp import check_usp
from wan_dist.planning.activation_memory import SCORE_BYTES
from wan_dist.runtime.errors import InputError

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BFLOAT16 = {"dtype": torch.bfloat16, "head_dim": 64}


def test_names_are_the_kernels() -> None:
    assert log_sum_exp.RING_SCORE_BYTES == SCORE_BYTES  # what is planned is what is taken
    assert set(ATTENTION_BACKENDS) == {"auto", *TRAINED_ATTENTIONS, *attention._KERNEL_LOADERS}
    assert set(attention._LOSSY_TOLERANCES) == set(EIGHT_BIT_BACKENDS)
    assert set(attention.BACKENDS_BY_SPEED).isdisjoint(attention._LOSSY_TOLERANCES)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Hopper GPU, as far as can be told from the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *arguments, device=None: linspace(*arguments))
    return monkeypatch


def test_what_is_not_there_is_said(on_gpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError,
        match="attention=fa3 does not work here: package fa3-fwd is not installed; use",
    ):
        choose_attention("fa3", device=CUDA, **BFLOAT16)
    found = choose_attention("auto", device=CUDA, **BFLOAT16)
    assert "no fa4: package flash-attn-4 is not installed" in found.reason
    assert found.name in ("flash", "sdpa")  # what a CPU can do of those
    assert choose_attention("auto", device=CPU, **BFLOAT16).name == "sdpa"


@pytest.mark.parametrize("off", [0.0, 0.05, 0.5])
def test_kernels_in_8_bits_are_taken_by_name_only(off: float, on_gpu: pytest.MonkeyPatch) -> None:
    package = ModuleType("sageattention")
    package.__spec__ = sys.__spec__
    package.sageattn = lambda q, k, v, tensor_layout: attention.attend_with_sdpa(q, k, v) + off  # type: ignore[attr-defined]
    on_gpu.setitem(sys.modules, "sageattention", package)
    assert choose_attention("auto", device=CUDA, **BFLOAT16).name != "sage"
    if off < 0.1:
        assert choose_attention("sage", device=CUDA, **BFLOAT16).name == "sage"
    else:
        with pytest.raises(
            InputError, match="attention=sage does not work here: its result is off by"
        ):
            choose_attention("sage", device=CUDA, **BFLOAT16)


@pytest.mark.parametrize("module", ["flash_attn_interface", "fa3_fwd_interface"])
def test_flash_attention_3_comes_from_either_package(
    module: str, on_gpu: pytest.MonkeyPatch
) -> None:
    package = ModuleType(module)
    package.__spec__ = sys.__spec__
    package.flash_attn_func = attention.attend_with_sdpa  # type: ignore[attr-defined]
    on_gpu.setitem(sys.modules, module, package)
    for name in ("auto", "fa3"):
        assert choose_attention(name, device=CUDA, **BFLOAT16).name == "fa3"


def test_old_gpus_get_float16(on_gpu: pytest.MonkeyPatch) -> None:
    on_gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert choose_attention("auto", device=CUDA, **BFLOAT16).name == "sdpa16"
    with pytest.raises(
        InputError, match="attention=fa2 does not work here: package flash-attn is not installed"
    ):
        choose_attention("fa2", device=CUDA, **BFLOAT16)


@pytest.mark.parametrize("size", [1.0, 1e5])
def test_what_float16_cannot_hold_is_computed_in_float32(size: float) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 20, 2, 16).bfloat16()
    v = v * size

    def exact(*parts: Tensor) -> Tensor:
        return attention.attend_with_sdpa(*(part.float() for part in parts))

    found = attention.attend_in_float16(q, k, v)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, exact(q, k, v)) < 5e-3


@pytest.mark.parametrize("most_bytes", [2**26, 4 * 33 * 40, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_in_parts_is_attention(
    most_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_sum_exp, "RING_SCORE_BYTES", most_bytes)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 16).to(dtype) for length in (20, 33, 33))
    out, lse = attend_with_lse("sdpa16", 4 * q, k, v)
    scores = torch.einsum("bqhd,bkhd->bqhk", 4 * q.double(), k.double()) / 4
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)
    exact = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v.double())
    torch.testing.assert_close(
        out.double(), exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-3
    )


@pytest.mark.parametrize(
    ("num_queries", "dtype"), [(37800, torch.float32), (37800, torch.float16), (7, torch.float16)]
)
def test_a_ring_without_flash_attention_never_has_all_scores(
    num_queries: int, dtype: torch.dtype
) -> None:
    """At the size of 720p on a ring of two, where a head's scores are 5.3 GiB: float32, and GPUs
    before Ampere.
    """
    with torch.device("meta"):
        q, k, v = (
            torch.empty(1, length, 2, 128, dtype=dtype) for length in (num_queries, 37800, 37800)
        )
    with LiveBytes([q, k, v]) as live:
        out, lse = attend_with_lse("sdpa16", q, k, v)
    assert live.peak <= out.nbytes + lse.nbytes + 2 * SCORE_BYTES


@pytest.mark.parametrize(
    ("capability", "dtype", "has_flash"),
    [((7, 5), "float16", False), ((9, 0), "float32", False), ((8, 0), "bfloat16", True)],
)
def test_a_ring_takes_flash_attention_where_there_is_one(
    capability: tuple[int, int], dtype: str, has_flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(log_sum_exp, "_attend_in_parts", lambda q, k, v: ("in parts", None))
    flash = SimpleNamespace(_scaled_dot_product_flash_attention=lambda q, k, v: (q, q[..., 0]))
    monkeypatch.setattr(torch.ops, "aten", flash)
    q = torch.zeros(1, 4, 2, 8, dtype=getattr(torch, dtype))
    assert isinstance(attend_with_lse("sdpa", q, q, q)[0], Tensor) == has_flash


def test_xfuser_is_refused_before_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(InputError, match="its ring and Ulysses need a GPU of Ampere or later"):
        check_usp(CUDA, "sdpa")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    check_usp(CUDA, "sdpa")
