"""Imports go one way, and the code keeps to its sizes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "wan_dist"
LEVELS = [
    "runtime",
    "models",
    "config",
    "tasks",
    "planning",
    "weights",
    "sampling",
    "parallel",
    "output",
    "pipeline",
    "jobs",
    "service",
    "usage",
    "run",
    "__main__",
]
"""Packages, and files beside them, each of which imports only those before it."""
ONLY_IN = {
    "hydra": {"config"},
    "omegaconf": {"config"},
    "torch.distributed": {"parallel", "weights/load"},
    "xfuser": {"parallel/usp"},
    "jinja2": {"output/gallery"},
    **{name: {"service"} for name in ("fastapi", "starlette", "uvicorn", "prometheus_client")},
}
TAKES_THE_WHOLE_CONFIG = {"planning/plan.py make_plan"}
"""Functions below the pipeline that take a run's whole configuration; all others take what they use of it."""
BELOW_THE_PIPELINE = (
    *("runtime", "models", "tasks", "planning"),
    *("weights", "sampling", "parallel", "output"),
)
NO_TORCH = ("runtime", "config", "tasks", "planning", "output/gallery")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def _package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]


def test_imports_go_one_way() -> None:
    backwards = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in _files()
        for name in _imports(path)
        if name.startswith("wan_dist.")
        and LEVELS.index(name.split(".")[1]) > LEVELS.index(_package_of(path))
    ]
    assert not backwards


def test_the_toy_does_not_import_what_measures_it() -> None:
    folder = PACKAGE.parent / "toy"
    imports = {name for path in folder.glob("*.py") for name in _imports(path)}
    assert not [name for name in imports if name.split(".")[0] == "bench"]


def test_libraries_stay_in_their_place() -> None:
    strays = []
    for path in _files():
        place = str(path.relative_to(PACKAGE).with_suffix(""))
        for library, places in ONLY_IN.items():
            if not place.startswith(tuple(places)):
                strays += [
                    f"{place} imports {name}"
                    for name in _imports(path)
                    if f"{name}.".startswith(f"{library}.")
                ]
    assert not strays


def _list_config_takers(source: str) -> list[str]:
    """Return the functions with a parameter, and the classes with a field, whose type has RunConfig in it."""
    takers = []
    for node in ast.walk(ast.parse(source)):
        types: list[ast.expr | None] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            types = [
                argument.annotation
                for argument in ast.walk(node.args)
                if isinstance(argument, ast.arg)
            ]
        elif isinstance(node, ast.ClassDef):
            types = [item.annotation for item in node.body if isinstance(item, ast.AnnAssign)]
        else:
            continue
        if any(annotation and "RunConfig" in ast.unparse(annotation) for annotation in types):
            takers.append(node.name)
    return takers


def test_below_the_pipeline_functions_take_what_they_use() -> None:
    found = {
        f"{path.relative_to(PACKAGE)} {name}"
        for path in _files()
        if _package_of(path) in BELOW_THE_PIPELINE
        for name in _list_config_takers(path.read_text(encoding="utf-8"))
    }
    assert found == TAKES_THE_WHOLE_CONFIG


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(config: RunConfig) -> int: ...", ["f"]),
        ("def f(*, configs: 'list[schema.RunConfig]' = ()): ...", ["f"]),
        (
            "class A:\n    config: RunConfig | None\n    def g(self, *all: RunConfig): ...",
            ["A", "g"],
        ),
        ("def f(memory: MemoryConfig) -> RunConfig: ...", []),
    ],
)
def test_config_takers_are_found(source: str, expected: list[str]) -> None:
    assert _list_config_takers(source) == expected


@pytest.mark.parametrize("package", NO_TORCH)
def test_what_answers_at_once_imports_no_torch(package: str) -> None:
    modules = [
        ".".join(("wan_dist", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in (PACKAGE / package).rglob("*.py")
    ]
    code = (
        f"import sys, {', '.join(modules)}; "
        "sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_models_know_one_device() -> None:
    forbidden = ("torch.distributed", "wan_dist.parallel", "wan_dist.config", "wan_dist.weights")
    strays = [
        f"{path.name} imports {name}"
        for path in (PACKAGE / "models").rglob("*.py")
        for name in _imports(path)
        if name.startswith(forbidden)
    ]
    assert not strays


def test_bad_input_is_answered_without_torch() -> None:
    code = "import sys, wan_dist.run; sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_imports_nothing_that_takes_seconds() -> None:
    """transformers, DTensor and the compiler take 1 to 3 s each: whoever needs them imports them then."""
    slow = ("transformers", "torch.distributed.tensor", "torch._dynamo", "scipy", "soxr")
    code = (
        "import sys, wan_dist.pipeline.generate, wan_dist.jobs.worker; "
        f"sys.exit(' '.join(name for name in {slow} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_requests_are_answered_without_torch() -> None:
    code = "import sys, wan_dist.service.front; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_gallery_is_made_without_torch() -> None:
    modules = "launch.runs, wan_dist.output.gallery.page, wan_dist.output.gallery.table"
    code = f"import sys, {modules}; sys.exit(int('torch' in sys.modules or 'hydra' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sizes() -> None:
    for path in _files():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        if path.stem.endswith("_kernels"):  # a kernel is one function
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 70, f"{path}: {node.name}"


PURE_CALLS = {"isinstance", "len", "all", "any", "set"}


def _effects(test: ast.expr) -> list[str]:
    """Return what an assert does besides looking: calls that may have an effect, and names that it binds."""
    calls = [node for node in ast.walk(test) if isinstance(node, ast.Call)]
    unknown = [
        ast.unparse(call)
        for call in calls
        if not (isinstance(call.func, ast.Name) and call.func.id in PURE_CALLS)
    ]
    kinds = (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
    return unknown + [ast.unparse(node) for node in ast.walk(test) if isinstance(node, kinds)]


def test_asserts_do_nothing() -> None:
    """python -O leaves them out."""
    working = [
        f"{path.name}:{node.lineno}: {effect}"
        for folder in (PACKAGE, PACKAGE.parent / "launch")
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
        for effect in _effects(node.test)
    ]
    assert not working


@pytest.mark.parametrize(
    ("code", "num_effects"),
    [
        ("x is not None", 0),
        ("isinstance(x, int) and len(x) == 2", 0),
        ("next(x) is None", 1),
        ("x.pop()", 1),
        ("(y := x) is not None", 1),
        ("all(f(each) for each in x)", 1),
    ],
)
def test_effects_are_found(code: str, num_effects: int) -> None:
    assert len(_effects(ast.parse(code, mode="eval").body)) == num_effects
