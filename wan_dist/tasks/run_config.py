"""The arguments of a command -> the configuration of a run of a task."""

from collections.abc import Sequence

from wan_dist.config.arguments import prepare_arguments
from wan_dist.config.compose import compose_config
from wan_dist.config.schema import RunConfig
from wan_dist.tasks.registry import require_task


def read_config(arguments: Sequence[str]) -> RunConfig | None:
    """Return the configuration of a run's arguments, None after a flag that only prints; raises InputError."""
    prepared_arguments = prepare_arguments(list(arguments))
    if "--hydra-help" not in prepared_arguments:
        require_task(prepared_arguments)
    return compose_config(prepared_arguments)
