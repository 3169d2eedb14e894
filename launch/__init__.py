"""Commands before and around a run, for machines with or without a GPU: ``python -m launch --help``."""

import wan_dist  # noqa: F401  # it checks Python's version, before imports that an old one cannot read
