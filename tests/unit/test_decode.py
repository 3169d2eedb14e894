"""Ways to decode a video that do not fit: tiles are exact, and what they need is known."""

import pytest
import torch

from tests.ranks.vae_worker import VAES, random_vae
from wan_dist.decode import Way, decode, float32_frames, ways_from
from wan_dist.models.vae import VaeDims
from wan_dist.parallel.mesh import Axis
from wan_dist.parallel.vae import shares


def frames_of(name: str, way: Way, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(list(decode(random_vae(VAES[name]), latents, float32_frames, way, Axis())))


@pytest.mark.parametrize(("name", "side"), [("2.1", (3, 34)), ("2.1", (33, 2)), ("2.2", (2, 34))])
def test_tiles_are_exact(name: str, side: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    latents = torch.randn(VAES[name].latent_dim, 2, *side)
    whole = frames_of(name, Way("whole"), latents)
    for num_tiles in (2, 3):
        torch.testing.assert_close(frames_of(name, Way("tiled", num_tiles), latents), whole, rtol=0, atol=2e-5)
    monkeypatch.setattr(VaeDims, "reach", 6)
    assert (frames_of(name, Way("tiled", 2), latents) - whole).abs().max() > 1e-4


def test_ways_need_less_and_less() -> None:
    assert [str(way) for way in ways_from("parallel", 104)] == ["parallel", "in 2 tiles", "in 4 tiles", "in 8 tiles", "on the CPU"]
    assert [str(way) for way in ways_from("whole", 6)] == ["whole", "in 2 tiles", "on the CPU"]
    assert [str(way) for way in ways_from("tiled", 104)] == ["in 2 tiles", "in 4 tiles", "in 8 tiles", "on the CPU"]
    assert [str(way) for way in ways_from("cpu", 104)] == ["on the CPU"]


@pytest.mark.parametrize("num_ranks", range(1, 65))
def test_shares_differ_by_one_at_most(num_ranks: int) -> None:
    for length in (num_ranks, 104, 160, 161):
        found = shares(length, num_ranks)
        assert sum(found) == length
        assert max(found) - min(found) <= 1
