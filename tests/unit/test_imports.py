"""Imports go one way, and the code keeps to its sizes."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "wan_dist"
LAYERS = [
    {"errors", "dims", "aside", "quoting", "durations"},
    {"reading"},
    {"catalog", "log", "launcher", "preemption", "streaming", "gallery"},
    {"network"},
    {"config", "degrees"},
    {"ways", "hardware"},
    {"footprint"},
    {"arrangement"},
    {"images", "latents", "arguments", "models"},
    {"image_sizes", "overrides"},
    {"jobs", "work"},
    {"plan"},
    {"record", "replicas", "room", "chronicle"},
    {"weights", "sampling", "video"},
    {"prompts", "report"},
    {"parallel"},
    {"memory", "tiles", "kept", "events", "ledger"},
    {"shelf"},
    {"vae", "session"},
    {"encode"},
    {"experts"},
    {"generate"},
    {"batch"},
    {"run"},
]
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY_IN = {
    "hydra": {"run", "config", "overrides"},
    "omegaconf": {"run", "config", "overrides"},
    "torch.distributed": {"parallel", "weights/load"},
    "xfuser": {"parallel/usp"},
    "jinja2": {"gallery"},
}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def _unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]


def test_imports_go_one_way() -> None:
    backwards = [
        f"{path.name} imports {name}"
        for path in _files()
        for name in _imports(path)
        if name.startswith("wan_dist.") and name.split(".")[1] != _unit(path) and LAYER[name.split(".")[1]] >= LAYER[_unit(path)]
    ]
    assert not backwards


def test_libraries_stay_in_their_place() -> None:
    strays = [
        f"{path.name} imports {name}"
        for path in _files()
        for name in _imports(path)
        for library, places in ONLY_IN.items()
        if (name == library or name.startswith(library + "."))
        and not {_unit(path), str(path.relative_to(PACKAGE).with_suffix(""))} & places
    ]
    assert not strays


def test_models_know_one_device() -> None:
    forbidden = ("torch.distributed", "wan_dist.parallel", "wan_dist.config", "wan_dist.weights")
    strays = [
        f"{path.name} imports {name}" for path in (PACKAGE / "models").glob("*.py") for name in _imports(path) if name.startswith(forbidden)
    ]
    assert not strays


def test_bad_input_is_answered_without_torch() -> None:
    code = "import sys, wan_dist.run; sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_gallery_is_made_without_torch() -> None:
    modules = "launch.runs, wan_dist.gallery.page, wan_dist.gallery.table"
    code = f"import sys, {modules}; sys.exit(int('torch' in sys.modules or 'hydra' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sizes() -> None:
    for path in _files():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"
