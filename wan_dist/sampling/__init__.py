"""Solvers, conditioning and the denoising loop."""
