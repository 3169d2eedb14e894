"""Single-device models, independent of ranks, configuration and files."""
