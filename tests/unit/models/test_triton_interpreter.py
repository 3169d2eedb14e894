"""Triton's interpreter runs kernels on a CPU: each equals PyTorch, in all ways it is used.

Cross-attention's kernel is left out: the interpreter's matrix product of bfloat16 is wrong (Triton 3.9). On a
GPU all of them are compared in tests/gpu.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

CODE = """
import sys, torch
from wan_dist.models.attention import block_sparse
from wan_dist.models.kernels import quantized_linear, transformer_ops
from wan_dist.models.vae import ops

cpu = torch.device("cpu")
found = {
    "transformer": transformer_ops._load_kernels(cpu, 256),
    "quantised linears": quantized_linear._load_kernels(cpu),
    "VAE": ops._load_kernels(cpu),
    "block-sparse attention": block_sparse._load_kernels(cpu, torch.float32, 64),
}
sys.exit(", ".join(name for name, kernels in found.items() if kernels is None) or 0)
"""


def test_kernels_are_the_arithmetic() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
