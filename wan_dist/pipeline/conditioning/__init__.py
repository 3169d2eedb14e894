"""Conditioning of the transformer from a task's inputs: a module for each kind, as in `tasks`."""
