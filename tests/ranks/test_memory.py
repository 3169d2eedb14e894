"""Loading a checkpoint of gigabytes on several ranks: each reads its own share, and holds little
more than it.
"""

import json
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.random_checkpoint import make_checkpoint
from tests.forked import run_ranks
from wan_dist.models.context import ContextProjection
from wan_dist.models.dims import ModelDims, TextEncoderDims, TransformerDims, VaeDims
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.weights.key_maps import map_original_transformer
from wan_dist.weights.layout import WEIGHTS_STEM

NUM_RANKS = 4
GIB = 2**30

# The published 14B transformer with a third of its width and half of its layers: 1.8 GB in bfloat16.
DIMS = TransformerDims(
    num_layers=20, dim=1792, ffn_dim=4608, num_heads=14, in_dim=16, out_dim=16, text_dim=4096
)


def big_checkpoint(folder: Path) -> int:
    """Make a whole checkpoint whose transformer is large; every row of a matrix holds its number.
    Returns the transformer's bytes.
    """
    text_encoder = TextEncoderDims(
        num_layers=1, dim=4096, ffn_dim=8, num_heads=2, head_dim=4, vocab_size=259
    )
    small = TransformerDims(**{**vars(DIMS), "num_layers": 1, "ffn_dim": 8})
    make_checkpoint(
        folder,
        ModelDims(transformer=small, text_encoder=text_encoder, vae=VaeDims(dim=4, decoder_dim=4)),
    )
    keys, tensors = map_original_transformer([]), {}
    with torch.device("meta"):
        models = FusedTransformer(DIMS, torch.bfloat16), ContextProjection(DIMS, torch.bfloat16)
    for name, parameter in chain.from_iterable(model.named_parameters() for model in models):
        sources = keys.find_sources(name)
        for source in sources:
            shape = (parameter.shape[0] // len(sources), *parameter.shape[1:])
            rows = torch.arange(shape[0]).remainder(200).to(parameter.dtype)
            tensors[source.key] = rows.view(-1, *(1,) * (len(shape) - 1)).expand(shape).contiguous()
    save_file(tensors, folder / f"{WEIGHTS_STEM}.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"num_layers": DIMS.num_layers, "ffn_dim": DIMS.ffn_dim})
    )
    return sum(tensor.nbytes for tensor in tensors.values())


def test_a_rank_holds_its_shard_and_little_more(tmp_path: Path) -> None:
    whole = big_checkpoint(tmp_path)
    run_ranks(NUM_RANKS, "tests.ranks.load_worker", str(tmp_path), str(NUM_RANKS))
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    print(f"{whole / GIB:.2f} GiB", json.dumps(ranks))
    assert whole > 1.6 * GIB
    for facts in ranks:
        assert (
            facts["held"] < facts["shard"] + 0.25 * GIB
        )  # 2 GiB would be allowed; a whole model would be 1.2 GiB more than its shard
        assert facts["shard"] < 0.27 * whole
        assert facts["read"] < 0.27 * whole
