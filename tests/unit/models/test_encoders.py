"""umT5 and CLIP against the Transformers library's modules with the same weights."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from tests.conftest import relative_error
from wan_dist.models.dims import ImageEncoderDims, TextEncoderDims
from wan_dist.models.image_encoder import build_image_encoder
from wan_dist.models.text_encoder import build_text_encoder


@pytest.mark.parametrize("num_tokens", [1, 9, 300])
def test_umt5_is_that_of_transformers(num_tokens: int) -> None:
    """300 tokens: distances beyond the last bucket's."""
    torch.manual_seed(0)
    dims = TextEncoderDims(
        num_layers=2, dim=64, ffn_dim=96, num_heads=4, head_dim=8, vocab_size=200
    )
    config = UMT5Config(
        vocab_size=200,
        d_model=64,
        d_kv=8,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    expected = UMT5EncoderModel(config).encoder.eval()
    ours = build_text_encoder(dims, torch.float32).eval()
    ours.load_state_dict(expected.state_dict())
    ids = torch.randint(200, (2, num_tokens))
    mask = torch.ones_like(ids)
    mask[1, num_tokens // 2 + 1 :] = 0
    for attended in (torch.ones_like(ids), mask):
        found = ours(ids, attended.bool())
        reference = expected(input_ids=ids, attention_mask=attended).last_hidden_state
        assert relative_error(found[attended.bool()], reference[attended.bool()]) < 1e-6
    assert torch.equal(ours(ids), ours(ids, torch.ones_like(ids).bool()))


def test_clip_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    dims = ImageEncoderDims(num_layers=4, dim=64, ffn_dim=128, num_heads=4, patch=14, image_size=56)
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        patch_size=14,
        image_size=56,
        hidden_act="gelu",
    )
    reference = CLIPVisionModel(config).eval()
    tower = getattr(reference, "vision_model", reference)
    ours = build_image_encoder(dims).eval()
    weights = {
        name: value for name, value in tower.state_dict().items() if name in ours.state_dict()
    }
    ours.load_state_dict(weights)
    pixels = torch.randn(2, 3, 56, 56)
    expected = reference(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert relative_error(ours(pixels), expected) < 1e-6
