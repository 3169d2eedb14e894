"""Sampling: solvers, guidance, step caches, conditioning and the denoising loop."""
