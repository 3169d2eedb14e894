"""Plain single-device models; they know nothing of ranks, configuration or files."""
