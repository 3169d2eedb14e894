"""Fused operations and quantised linears, by Triton kernels on a GPU and PyTorch elsewhere."""
