"""One model alone, from a folder or from its file, is the one that a run loads."""

from pathlib import Path

import pytest
import torch

import wan_dist
from wan_dist.config.paths import find_packaged_folder
from wan_dist.models.vae.model import split_frames_into_chunks

TOY = find_packaged_folder("toy", "toy/checkpoint")


def test_a_vae_encodes_and_decodes() -> None:
    of_folder = wan_dist.load_vae(TOY, task="toy")
    of_file = wan_dist.load_vae(TOY / "Wan2.1_VAE.safetensors")
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = of_folder.encode(split_frames_into_chunks(video))
        assert latents.shape == (1, 16, 2, 4, 4)
        assert torch.equal(of_file.encode(split_frames_into_chunks(video)), latents)
        decoded = torch.cat(list(of_folder.decode(latents)), dim=2)
    assert decoded.shape == video.shape


def test_a_text_encoder_embeds_a_prompt() -> None:
    encoder = wan_dist.load_text_encoder(TOY, task="toy", dtype=torch.float32)
    with torch.no_grad():
        embedding = encoder("a red ball")
    assert embedding.shape[1] == 128
    assert torch.isfinite(embedding).all()


def test_a_transformer_predicts() -> None:
    transformer, projection = wan_dist.load_transformer(TOY, task="toy", dtype=torch.float32)
    latents = torch.randn(1, 16, 2, 4, 4)
    with torch.no_grad():
        contexts = projection([torch.randn(5, 128)])
        (velocity,) = transformer(
            latents, torch.tensor([[500.0]]), contexts, transformer.compute_rotary(latents)
        )
    assert velocity.shape == latents.shape


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("", {}, "give the task of this checkpoint"),
        ("missing", {}, "neither a file nor a folder"),
        ("", {"task": "toy", "expert": 1}, "has 1 transformers"),
    ],
)
def test_what_cannot_be_loaded_is_named(name: str, options: dict[str, object], told: str) -> None:
    with pytest.raises(wan_dist.InputError, match=told):
        wan_dist.load_transformer(Path(TOY) / name, **options)  # type: ignore[arg-type]
