"""What is done before and around a run, on a machine that need not have a GPU: ``python -m launch --help``."""
