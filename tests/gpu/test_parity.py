"""On a GPU: attention kernels against each other, and the reference's outputs."""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import FIXTURES, relative_error
from wan_dist.models.attention.inner import InnerAttention, choose_attention
from wan_dist.models.attention.log_sum_exp import attend_with_lse
from wan_dist.models.vae.model import split_frames_into_chunks
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("backend", ["fa4", "cudnn", "flash", "sdpa"])
@pytest.mark.parametrize(("queries", "keys"), [(1560, 1560), (1003, 1003), (1003, 512)])
def test_attention_kernels_agree_with_float64(backend: str, queries: int, keys: int) -> None:
    try:
        attention = choose_attention(backend, device=CUDA, dtype=torch.bfloat16, head_dim=128)
    except InputError as fault:
        if "is not installed" in str(fault):
            pytest.skip(str(fault))
        raise
    q, k, v = (
        torch.randn(1, length, 5, 128, device=CUDA).bfloat16() for length in (queries, keys, keys)
    )
    out = attention(q, k, v)
    exact = InnerAttention()(q.double(), k.double(), v.double())
    assert out.shape == q.shape
    assert relative_error(out, exact) < 5e-3  # bf16 has 8 bits: one rounding of the result is 2e-3


@pytest.mark.parametrize(("queries", "keys"), [(1560, 1560), (1003, 1003), (64, 5), (1003, 2000)])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 8.0])
def test_attention_in_8_bits_is_near_float64(queries: int, keys: int, sharpness: float) -> None:
    try:
        attention = choose_attention("8bit", device=CUDA, dtype=torch.bfloat16, head_dim=128)
    except InputError as fault:
        if "needs a Hopper GPU" in str(fault):
            pytest.skip(str(fault))
        raise
    torch.manual_seed(0)
    q = sharpness * torch.randn(2, queries, 3, 128, device=CUDA).bfloat16()
    k, v = (
        torch.randn(2, keys, 2, 3, 128, device=CUDA).bfloat16().unbind(2)
    )  # with gaps between tokens
    k = k + 5 * torch.randn(3, 128, device=CUDA).bfloat16()  # what all tokens share does not count
    exact = InnerAttention()(q.double(), k.double(), v.double())
    assert relative_error(attention(q, k, v), exact) < 0.055
    same = v[:, :1].expand_as(v)
    assert (
        relative_error(attention(q, k, same), same[:, :1].expand_as(q)) < 5e-3
    )  # weights are divided by their own sum


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_transformer_steps(dtype: torch.dtype, tolerance: float) -> None:
    checkpoint = open_checkpoint(FIXTURES / "wan2.1-t2v", TASKS["t2v-1.3B"], dtype)
    expected = {
        key: value.to(CUDA)
        for key, value in load_file(FIXTURES / "wan2.1-t2v/expected/unipc.safetensors").items()
    }
    contexts = checkpoint.context_projections[0].load(CUDA)(
        [expected["input.context"], expected["input.context_null"]]
    )
    model, latents = checkpoint.transformers[0].load(CUDA), expected["step1.latent"].unsqueeze(0)
    velocities = model(
        latents, expected["timesteps"][1:2].unsqueeze(0), contexts, model.compute_rotary(latents)
    )
    for branch, velocity in zip(("cond", "uncond"), velocities, strict=True):
        error = relative_error(velocity[0], expected[f"step1.{branch}"])
        print(f"{dtype} {branch} {error:.2e}")
        assert error < tolerance


def test_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as a run in float32 does
    vae = open_checkpoint(FIXTURES / "wan2.1-t2v", TASKS["t2v-1.3B"], torch.float32).vae.load(CUDA)
    golden = load_file(FIXTURES / "components/wan21.safetensors")
    frames = torch.cat(list(vae.decode(golden["vae21.latent"][None].to(CUDA))), dim=2)[0]
    torch.testing.assert_close(frames.cpu(), golden["vae21.decoded"], atol=1e-4, rtol=0)
    latents = vae.encode(split_frames_into_chunks(golden["vae21.video"][None].to(CUDA)))[0]
    torch.testing.assert_close(latents.cpu(), golden["vae21.latent"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["fa4", "cudnn"])
def test_partial_attention_is_exact_when_merged(name: str) -> None:
    """Ring attention merges parts by their log-sum-exp: result and log-sum-exp of each part against
    float64.
    """
    if name == "fa4":
        pytest.importorskip("flash_attn.cute")
    q, k, v = (
        torch.randn(1, length, 5, 128, device=CUDA).bfloat16() for length in (1003, 515, 515)
    )
    out, lse = attend_with_lse(name, q, k, v)
    scores = torch.einsum("bqhd,bkhd->bqhk", q.double(), k.double()) / 128**0.5
    assert out.shape == q.shape
    assert relative_error(lse, scores.logsumexp(dim=-1)) < 1e-3
    assert (
        relative_error(out, torch.einsum("bqhk,bkhd->bqhd", scores.softmax(dim=-1), v.double()))
        < 5e-3
    )
