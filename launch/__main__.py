"""The command ``python -m launch``. Exit codes: 0 done, 1 something is wrong, 2 bad input."""

import sys

from launch import doctor, fetch, gallery, local, plan, runs, submit
from wan_dist.caches import settle_caches
from wan_dist.environment import settle_environment
from wan_dist.errors import InputError, told
from wan_dist.log import find_lost_output, protect_streams

COMMANDS = {"plan": plan, "doctor": doctor, "fetch": fetch, "local": local, "submit": submit, "runs": runs, "gallery": gallery}


def main(arguments: list[str]) -> int:
    """Run a subcommand and return its exit code."""
    protect_streams()
    if not arguments or arguments[0] in ("--help", "-h"):
        lines = [f"  {name:8} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
        sys.stdout.write("\n".join(["python -m launch COMMAND [key=value ...]; COMMAND --help says more", "", *lines]) + "\n")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}; there is {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    if {"--help", "-h"} & set(rest):
        sys.stdout.write(f"{command.__doc__}\n")
        return 0
    try:
        settle_environment()
        settle_caches()
        code = command.main(rest) or 0
    except InputError as fault:
        return _fail(str(fault))
    except KeyboardInterrupt:
        return max(130, _fail("interrupted"))
    if why := find_lost_output():
        return max(code, _fail(f"standard output is not whole: {why}"))
    return code


def _fail(message: str) -> int:
    sys.stderr.write(f"launch: error: {told(message)}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
