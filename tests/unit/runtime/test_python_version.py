"""An old Python is told so in one line, by files that it can read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
READ_FIRST = [
    "wan_dist/__init__.py",
    "wan_dist/runtime/__init__.py",
    "wan_dist/runtime/python_version.py",
    "launch/__init__.py",
]
PRETEND = (
    "import runpy, sys; sys.version_info = (3, 10, 12); sys.argv[0] = sys.argv.pop(1);"
    "module = sys.argv.pop(1); runpy.run_module(module, run_name='__main__')"
)
"""A program with the module, and argv[0] as it is while its package is imported."""


@pytest.mark.parametrize("name", READ_FIRST)
def test_what_is_read_before_the_check_parses(name: str) -> None:
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_nothing_else_is_imported_before_the_check() -> None:
    code = (
        "import sys; import wan_dist, launch;"
        "print(*sorted(name for name in sys.modules if name.split('.')[0] in ('wan_dist', 'launch')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    files = [name.removesuffix(".py").removesuffix("/__init__") for name in READ_FIRST]
    assert done.stdout.split() == sorted(file.replace("/", ".") for file in files)


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("-m", "wan_dist.run"),
        ("-m", "wan_dist"),
        ("-m", "launch"),
        ("/venv/bin/wan-dist", "wan_dist.__main__"),
    ],
)
def test_commands_say_it_in_one_line(program: str, module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRETEND, program, module],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("wan_dist: error: wan-dist needs Python 3.11 or later, and ")
    assert " is 3.10; " in done.stderr


def test_a_program_gets_an_import_error() -> None:
    code = "import sys; sys.version_info = (3, 10, 12); import wan_dist"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1
    assert "\nImportError: wan-dist needs Python 3.11 or later" in done.stderr
