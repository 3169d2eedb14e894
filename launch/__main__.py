"""The command ``wan-dist``, or ``python -m launch``. Exit codes: 0 done, 1 something is wrong, 2 bad input."""

import sys

from launch import fetch, gallery, local, plan, runs, submit
from launch.doctor import checks as doctor
from wan_dist import run
from wan_dist.runtime.cache_folders import settle_caches
from wan_dist.runtime.environment import settle_environment
from wan_dist.runtime.errors import InputError, told
from wan_dist.runtime.log import find_lost_output, protect_streams

COMMANDS = {"plan": plan, "doctor": doctor, "fetch": fetch, "local": local, "submit": submit, "runs": runs, "gallery": gallery}


def main(arguments: list[str]) -> int:
    """Run a subcommand and return its exit code."""
    if arguments[:1] == ["run"]:
        return run.main(arguments[1:])
    protect_streams()
    try:
        settle_environment()
        settle_caches()
        code = _run(*arguments)
    except InputError as fault:
        return _fail(str(fault))
    except KeyboardInterrupt:
        return max(130, _fail("interrupted"))
    if why := find_lost_output():
        return max(code, _fail(f"standard output is not whole: {why}"))
    return code


def _run(name: str = "--help", *arguments: str) -> int:
    if name in ("--help", "-h"):
        lines = [f"  {key:8} {(command.__doc__ or '').splitlines()[0]}" for key, command in COMMANDS.items()]
        usage = ["wan-dist COMMAND [key=value ...], or python -m launch COMMAND; COMMAND --help says more", ""]
        sys.stdout.write("\n".join([*usage, f"  {'run':8} Make a video, as python -m wan_dist.run.", *lines]) + "\n")
        return 0
    if name not in COMMANDS:
        raise InputError(f"there is no command {name!r}; there is run, {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(f"{command.__doc__}\n")
        return 0
    return command.main(list(arguments)) or 0


def _fail(message: str) -> int:
    sys.stderr.write(f"launch: error: {told(message)}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
