"""A transformer with a second list of blocks: everything that goes by blocks sees it through `layers`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from wan_dist.models.attention.inner import InnerAttention
from wan_dist.models.dims import TransformerDims
from wan_dist.models.fused_block import FusedBlock
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.models.kernels.quantized_linear import QuantizedLinear, quantize_blocks
from wan_dist.parallel.fsdp import apply_fsdp

DIMS = TransformerDims(dim=64, ffn_dim=128, num_heads=4, num_layers=3, text_dim=32, freq_dim=32)


class TwoLists(FusedTransformer):
    def __init__(self) -> None:
        super().__init__(DIMS, torch.float32)
        self.control_blocks = nn.ModuleList(
            FusedBlock(DIMS, torch.float32, InnerAttention()) for _ in range(2)
        )

    def layers(self) -> dict[str, FusedBlock]:
        control = {f"control_blocks.{n}": block for n, block in enumerate(self.control_blocks)}
        return control | super().layers()  # type: ignore[return-value]


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_attention_slices_and_quantisation_go_by_all_layers() -> None:
    model = TwoLists()
    assert len(list(model.self_attentions)) == 5
    model.set_slice_tokens(7)
    assert {block.slice_tokens for block in model.layers().values()} == {7}
    quantize_blocks(model.layers().values(), "int8")
    is_quantized = [
        any(isinstance(module, QuantizedLinear) for module in block.modules())
        for block in model.layers().values()
    ]
    assert is_quantized == [False, True, True, True, False]


@pytest.mark.usefixtures("one_rank")
def test_no_list_of_blocks_stays_gathered() -> None:
    model = TwoLists()
    apply_fsdp(model, model.layers().values(), init_device_mesh("cpu", (1,)))
    units = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert set(model.layers()) < units
    assert not units & {"blocks", "control_blocks"}  # a list has no forward pass to gather it for
