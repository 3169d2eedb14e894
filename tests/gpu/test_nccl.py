"""On two GPUs or more: attention spread over them against float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("attention", "usp"), [("auto", "plain"), ("cudnn", "plain"), ("cudnn", "xfuser")])
def test_spread_attention_is_attention(attention: str, usp: str) -> None:
    if usp == "xfuser":
        pytest.importorskip("xfuser")
    num_ranks = min(torch.cuda.device_count(), 4)
    if num_ranks < 2:
        pytest.skip("one GPU")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    done = subprocess.run(
        [*command, "-m", "tests.gpu.nccl_worker", attention, usp], cwd=root, capture_output=True, text=True, check=False, timeout=180
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
