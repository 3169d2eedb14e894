"""Attention: backends, cross-attention, 8 bits."""
