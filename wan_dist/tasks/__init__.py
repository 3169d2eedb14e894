"""Inputs and outputs of each task, and decoding of input images; no torch."""
