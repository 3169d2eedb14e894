"""Checkpoint loading: from files to the parameters of models."""
