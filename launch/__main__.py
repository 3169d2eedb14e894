"""Command-line entry point ``wan-dist``, or ``python -m launch``.

Exit codes: 0 done, 1 something is wrong, 2 bad input.
"""

import sys

from launch import fetch, gallery, local, mask, plan, runs, serve, submit
from launch.doctor import checks as doctor
from wan_dist import run
from wan_dist.runtime.cache_folders import configure_library_caches
from wan_dist.runtime.environment import sanitize_environment
from wan_dist.runtime.errors import InputError, format_message
from wan_dist.runtime.log import find_output_error, protect_streams

COMMANDS = {
    "plan": plan,
    "doctor": doctor,
    "fetch": fetch,
    "local": local,
    "mask": mask,
    "serve": serve,
    "submit": submit,
    "runs": runs,
    "gallery": gallery,
}


def main(arguments: list[str]) -> int:
    """Run a subcommand and return its exit code."""
    if arguments[:1] == ["run"]:
        return run.main(arguments[1:])
    protect_streams()
    try:
        sanitize_environment()
        configure_library_caches()
        exit_code = _run_command(*arguments)
    except InputError as error:
        return _report_failure(str(error))
    except KeyboardInterrupt:
        return max(130, _report_failure("interrupted"))
    if lost_output_reason := find_output_error():
        return max(
            exit_code, _report_failure(f"standard output is incomplete: {lost_output_reason}")
        )
    return exit_code


def _run_command(name: str = "--help", *arguments: str) -> int:
    if name in ("--help", "-h"):
        lines = [
            f"  {key:8} {(command.__doc__ or '').splitlines()[0]}"
            for key, command in COMMANDS.items()
        ]
        usage = [
            "wan-dist COMMAND [key=value ...], or python -m launch COMMAND; COMMAND --help says more",
            "",
        ]
        sys.stdout.write(
            "\n".join([*usage, f"  {'run':8} Make a video, as python -m wan_dist.run.", *lines])
            + "\n"
        )
        return 0
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}; commands are run, {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(f"{command.__doc__}\n")
        return 0
    return command.main(list(arguments)) or 0


def _report_failure(message: str) -> int:
    sys.stderr.write(f"launch: error: {format_message(message)}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
