"""Commands before and around a run, for machines with or without a GPU: ``python -m launch --help``."""
