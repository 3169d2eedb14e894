"""Ways to decode and encode a video that does not fit: tiles are exact, and what they need is known."""

import pytest
import torch

from tests.ranks.vae_worker import VAES, random_vae
from wan_dist.models.dims import VaeDims
from wan_dist.models.vae.model import split_frames_into_chunks
from wan_dist.parallel.mesh import Axis
from wan_dist.parallel.vae_split import split_length_evenly
from wan_dist.pipeline.decode import convert_to_float32_frames, decode_latents, encode_video
from wan_dist.planning.vae_memory import (
    VaeStrategy,
    estimate_vae_bytes,
    find_fitting_strategies,
    list_vae_strategies,
)

WHOLE = VaeStrategy("whole")
TILES = [f"in {number} tiles" for number in (2, 4, 6, 8, 16)]


def frames_of(name: str, way: VaeStrategy, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            list(
                decode_latents(
                    random_vae(VAES[name]), latents, convert_to_float32_frames, way, Axis()
                )
            )
        )


@pytest.mark.parametrize(("name", "side"), [("2.1", (2, 36)), ("2.1", (35, 2)), ("2.2", (2, 36))])
def test_tiles_are_exact(name: str, side: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    latents = torch.randn(VAES[name].latent_dim, 2, *side)
    whole = frames_of(name, WHOLE, latents)
    for num_tiles in (2, 3):
        tiles = frames_of(name, VaeStrategy("tiled", num_tiles), latents)
        torch.testing.assert_close(tiles, whole, rtol=0, atol=2e-5)
    monkeypatch.setattr(VaeDims, "tile_overlap", 13)
    with pytest.raises((AssertionError, RuntimeError)):  # it is 14
        torch.testing.assert_close(
            frames_of(name, VaeStrategy("tiled", 2), latents), whole, rtol=0, atol=2e-5
        )


@pytest.mark.parametrize(("name", "side"), [("2.1", (2, 36)), ("2.2", (19, 2))])
def test_tiles_of_the_encoder_are_exact(
    name: str, side: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    vae, scale = random_vae(VAES[name]), VAES[name].spatial_scale
    video = torch.rand(1, 3, 5, side[0] * scale, side[1] * scale) * 2 - 1
    with torch.no_grad():
        whole = encode_video(vae, lambda: split_frames_into_chunks(video), WHOLE, Axis())
        for num_tiles in (2, 3):
            tiles = encode_video(
                vae,
                lambda: split_frames_into_chunks(video),
                VaeStrategy("tiled", num_tiles),
                Axis(),
            )
            torch.testing.assert_close(tiles, whole, rtol=0, atol=2e-5)
        monkeypatch.setattr(VaeDims, "tile_overlap", 2)
        assert (
            encode_video(
                vae, lambda: split_frames_into_chunks(video), VaeStrategy("tiled", 2), Axis()
            )
            - whole
        ).abs().max() > 1e-3


@pytest.mark.parametrize("name", VAES)
def test_frames_at_once_make_no_difference(name: str) -> None:
    torch.manual_seed(1)
    video = torch.rand(1, 3, 21, 32, 32) * 2 - 1
    with torch.no_grad():
        encoded = [
            encode_video(
                random_vae(VAES[name]),
                lambda: split_frames_into_chunks(video),
                VaeStrategy("whole", at_once=n),
                Axis(),
            )
            for n in (1, 2, 8)  # 2: the last chunk is shorter; 8: all in one
        ]
    for other in encoded[1:]:
        torch.testing.assert_close(other, encoded[0], rtol=0, atol=2e-5)
    latents = torch.randn(VAES[name].latent_dim, 6, 2, 3)
    whole = frames_of(name, WHOLE, latents)
    for at_once in (2, 8):
        torch.testing.assert_close(
            frames_of(name, VaeStrategy("whole", at_once=at_once), latents),
            whole,
            rtol=0,
            atol=2e-5,
        )


def test_ways_need_less_and_less() -> None:
    assert [str(way) for way in list_vae_strategies("parallel", 104)] == [
        "parallel",
        *TILES,
        "on the CPU",
    ]
    assert [str(way) for way in list_vae_strategies("whole", 6)] == [
        "whole",
        "in 2 tiles",
        "on the CPU",
    ]
    assert [str(way) for way in list_vae_strategies("tiled", 104)] == [*TILES, "on the CPU"]
    assert [str(way) for way in list_vae_strategies("cpu", 104)] == ["on the CPU"]


def test_what_fits_is_taken() -> None:
    dims = VaeDims(dim=96, decoder_dim=96)

    def found(gib: float, name: str = "whole", num_ranks: int = 1) -> list[tuple[str, int]]:
        ways = find_fitting_strategies(
            name, dims, (21, 90, 160), num_ranks, free_bytes=int(gib * 2**30), itemsize=2
        )
        return [(str(way), way.at_once) for way in ways]

    assert found(80)[0] == ("whole", 2)
    assert found(80, "parallel", 4)[0] == ("parallel", 5)
    assert found(1.06 * estimate_vae_bytes(dims, (90, 160, 0), 2) / 2**30)[0] == ("whole", 1)
    assert found(1.04 * estimate_vae_bytes(dims, (90, 160, 0), 2) / 2**30)[0] == ("in 2 tiles", 1)
    assert found(0.5) == [("on the CPU", 1)]
    assert estimate_vae_bytes(dims, (90, 160, 0), 2, encode=True) < estimate_vae_bytes(
        dims, (90, 160, 0), 2
    )


@pytest.mark.parametrize("num_ranks", range(1, 65))
def test_shares_differ_by_one_at_most(num_ranks: int) -> None:
    for length in (num_ranks, 104, 160, 161):
        found = split_length_evenly(length, num_ranks)
        assert sum(found) == length
        assert max(found) - min(found) <= 1
