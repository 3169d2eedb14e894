"""The C compiler that Triton needs: it compiles a launcher for each kernel the first time that it is used."""

import os
import shutil


def explain_missing_compiler() -> str | None:
    """Return what is wrong and what to do if there is no C compiler for Triton, else None."""
    command = os.environ.get("CC", "").split()
    if command:
        is_found = shutil.which(command[0]) is not None
        return (
            None if is_found else f"no C compiler found at CC={command[0]}: install it, or unset CC"
        )
    if shutil.which("gcc") or shutil.which("clang"):
        return None
    return "no C compiler found: install gcc, or set CC=..."
