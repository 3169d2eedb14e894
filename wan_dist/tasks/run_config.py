"""Run configuration from a command's arguments, which must name a task."""

from collections.abc import Sequence

from wan_dist.config.arguments import prepare_arguments
from wan_dist.config.compose import compose_config
from wan_dist.config.recorded_settings import expand_recorded_settings
from wan_dist.config.schema import RunConfig
from wan_dist.config.sweep import is_sweep, parse_sweep
from wan_dist.config.task_file import expand_task_file
from wan_dist.tasks.registry import require_task


def read_config(arguments: Sequence[str]) -> RunConfig | None:
    """Return a run's configuration from arguments, None after a flag that only prints; raises InputError.

    Of a sweep (``--multirun``) it is that of the first run.
    """
    arguments = expand_recorded_settings(arguments)
    settings = parse_sweep(arguments).first_settings if is_sweep(arguments) else list(arguments)
    prepared_arguments = prepare_arguments(expand_task_file(settings))
    if "--hydra-help" not in prepared_arguments:
        require_task(prepared_arguments)
    return compose_config(prepared_arguments)
