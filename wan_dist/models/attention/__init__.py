"""Attention: backends, cross-attention, 8-bit attention, log-sum-exp and rotary embedding."""
