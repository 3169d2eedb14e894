"""Check of Python's version, which comes before other imports: Python 3.8 has to parse this file."""

import sys

MIN_PYTHON_VERSION = (3, 11)


def check_python_version() -> None:
    """Raise ImportError where Python is too old; a command ends with one line and exit code 2 instead."""
    found_version = tuple(sys.version_info[:2])
    if found_version >= MIN_PYTHON_VERSION:
        return
    needed, found = (".".join(map(str, version)) for version in (MIN_PYTHON_VERSION, found_version))
    message = (
        f"wan-dist needs Python {needed} or later, and {sys.executable} is {found}; "
        "use an environment of a newer one: python3.12 -m venv FOLDER"
    )
    program = sys.argv[0].rpartition("/")[2] if sys.argv else ""
    if program in ("-m", "wan-dist"):  # python -m MODULE imports the module's packages as "-m"
        sys.stderr.write(f"wan_dist: error: {message}\n")
        sys.exit(2)
    raise ImportError(message)
