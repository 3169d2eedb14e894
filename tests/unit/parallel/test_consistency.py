"""The checksum by which ranks compare latents, and how a ring merges what it has attended to."""

import pytest
import torch

from wan_dist.models.attention.log_sum_exp import merge_attention_
from wan_dist.parallel import consistency as agreement
from wan_dist.parallel.consistency import ConsistencyCheck, compute_checksum
from wan_dist.parallel.mesh import Axis


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool]
)
def test_a_checksum_is_of_bits_in_their_places(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5)
    x = x > 0 if dtype == torch.bool else (8 * x).to(dtype)
    assert compute_checksum(x).dtype == torch.int64
    assert torch.equal(
        compute_checksum(x), compute_checksum(x.transpose(0, 2).contiguous().transpose(0, 2))
    )
    for place in range(x.numel()):
        other = x.clone()
        other.view(torch.uint8).view(x.numel(), -1)[place, -1] ^= 1
        assert not torch.equal(compute_checksum(x), compute_checksum(other))
    assert not torch.equal(compute_checksum(x), compute_checksum(x.flip(2)))


def test_a_checksum_does_not_depend_on_how_it_is_summed() -> None:
    """As floats, the same values in other parts have other sums: a device with other kernels, or
    more threads, is no fault.
    """
    torch.manual_seed(0)
    x = torch.randn(100_003)
    words = x.view(torch.int32).long() * (2 * torch.arange(x.numel()) + 1)
    sums = {
        int(sum(part.sum() for part in words.split(length))) & (2**64 - 1)
        for length in (1000, 777, 100_003)
    }
    assert sums == {int(compute_checksum(x)) & (2**64 - 1)}


def test_ranks_that_hold_other_latents_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "all_gather", lambda x, axis: torch.stack([x, x, x + 1]))
    predict = ConsistencyCheck(lambda latents, timestep: latents, Axis(0, 3))
    with pytest.raises(
        RuntimeError,
        match=r"ranks \[2\] of the replica differ from its first rank in the latents at timestep 500",
    ):
        predict(torch.full((1, 2, 3), torch.nan), 500)
    monkeypatch.setattr(agreement, "all_gather", lambda x, axis: torch.stack([x, x, x]))
    assert (
        predict(torch.full((1, 2, 3), torch.nan), 500).isnan().all()
    )  # equal bits, though not equal floats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_ring_are_merged_in_place(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan_dist.models.attention.log_sum_exp.FLOAT32_CHUNK_TOKENS", 7)
    torch.manual_seed(0)
    scores, values = (
        20 * torch.randn(2, 18, 3, 30),
        torch.randn(2, 30, 3, 8),
    )  # (B, L, H, keys), (B, keys, H, D)

    def attend(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        some = scores[..., keys]
        return torch.einsum("bqhk,bkhd->bqhd", some.softmax(-1), values[:, keys]), some.logsumexp(
            -1
        )

    out, lse = attend(slice(0, 4))
    places = out.data_ptr(), lse.data_ptr()
    for keys in (slice(4, 5), slice(5, 30)):
        part, part_lse = attend(keys)
        merge_attention_(out, lse, part.to(dtype), part_lse)
    expected, expected_lse = attend(slice(0, 30))
    assert (out.data_ptr(), lse.data_ptr()) == places
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
