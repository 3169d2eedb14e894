"""On two GPUs or more: attention spread over them against float64."""

import pytest
import torch

from tests.torchrun import torchrun

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("attention", "usp"), [("auto", "plain"), ("cudnn", "plain"), ("cudnn", "xfuser")]
)
def test_spread_attention_is_attention(attention: str, usp: str) -> None:
    if usp == "xfuser":
        pytest.importorskip("xfuser")
    num_ranks = min(torch.cuda.device_count(), 4)
    if num_ranks < 2:
        pytest.skip("one GPU")
    print(torchrun(num_ranks, "tests.gpu.nccl_worker", attention, usp))
