"""The arguments of a command -> the configuration of a run of a task."""

from collections.abc import Sequence

from wan_dist.config.arguments import prepare
from wan_dist.config.compose import compose
from wan_dist.config.schema import RunConfig
from wan_dist.tasks.registry import require_task


def configured(arguments: Sequence[str]) -> RunConfig | None:
    """Return the configuration of a run's arguments, None after a flag that only prints; raises InputError."""
    prepared = prepare(list(arguments))
    if "--hydra-help" not in prepared:
        require_task(prepared)
    return compose(prepared)
