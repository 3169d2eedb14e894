"""Fused operations and quantised linears: Triton kernels on a GPU, PyTorch elsewhere."""
