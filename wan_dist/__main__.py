"""Command-line entry point ``wan-dist COMMAND``, also ``python -m wan_dist COMMAND``.

Commands are run and those of ``python -m launch``. The package ``launch`` is loaded from beside this one,
also if another comes first on the path: a launch.py in the working folder, as web UIs have it, or a package
of that name on PYTHONPATH, as ROS 2 puts it there.
"""

import importlib.util
import sys
from pathlib import Path

from wan_dist.runtime.signals import exit_on_signal


def main() -> int:
    """Run the command that this process was started with and return its exit code."""
    if sys.argv[1:2] == ["run"]:
        exit_on_signal()  # before the imports, which take a second
    _import_launch_package()
    from launch.__main__ import main as launch

    return launch(sys.argv[1:])


def _import_launch_package() -> None:
    package_folder = Path(__file__).parents[1] / "launch"
    spec = importlib.util.spec_from_file_location(
        "launch", package_folder / "__init__.py", submodule_search_locations=[str(package_folder)]
    )
    if spec is None or spec.loader is None or not package_folder.is_dir():
        raise ImportError(
            f"the package launch is not beside {Path(__file__).parent}; install wan-dist again"
        )
    module = importlib.util.module_from_spec(spec)
    for name in [name for name in sys.modules if name == "launch" or name.startswith("launch.")]:
        del sys.modules[name]
    sys.modules["launch"] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    sys.exit(main())
