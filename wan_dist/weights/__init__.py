"""Checkpoint files -> parameters."""
