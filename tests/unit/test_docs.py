"""What the docs show works: commands and settings are composed, named files are there."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from launch import __main__ as launch
from launch import fetch, gallery, local, plan, runs, submit
from launch.arguments import split_arguments
from launch.doctor import checks as doctor
from launch.slurm.cluster import load_cluster
from tests.conftest import FIXTURES
from wan_dist.config.arguments import is_text_key
from wan_dist.config.compose import CONFIG_FOLDER
from wan_dist.config.schema import list_settings
from wan_dist.run import USAGE_EXAMPLES
from wan_dist.tasks.registry import TASKS, get_task
from wan_dist.tasks.run_config import read_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCS = [
    README,
    USAGE_EXAMPLES,
    *(command.__doc__ or "" for command in (plan, doctor, fetch, local, submit, runs, gallery)),
]
DOCS += [
    re.sub(r"^# ?", "", file.read_text(), flags=re.MULTILINE)
    for file in sorted((ROOT / "slurm").glob("*.sbatch"))
]
OWN = {
    "local": ("ranks",),
    "plan": ("gpus", "host", "nodes"),
    "submit": submit._SUBMIT_KEYS,
    "doctor": (),
    "fetch": ("size",),
}
OWN |= {"runs": (), "gallery": ()}
RUN = (
    r"(?:torchrun [-\w= ]*-m wan_dist\.run|python -m wan_dist\.run|sbatch .*?slurm/[\w-]+\.sbatch)"
)


def _found(pattern: str) -> list[str]:
    """Return the rest of each line, or of the text between backticks, after what the pattern finds,
    without a comment.
    """
    lines = [line for text in DOCS for line in text.splitlines()]
    rests = [
        match[1]
        for line in lines
        for match in re.finditer(rf"(?:^ *\$? *|`|=\S* ){pattern}( [^`\n]*)?", line)
        if match[1]
    ]
    return sorted({re.split(r"\s{2,}#", rest)[0].strip() for rest in rests} - {""})


TABLED = re.findall(r"\| `(task=[^`]*)` \|", README)
RUNS = [
    rest for rest in _found(RUN) if re.search(r"task=[\w]", rest) and "--cfg" not in rest
] + TABLED
LAUNCHED = _found(r"(?:torchrun [-\w= ]*-m|srun python -m|python -m) launch")


def test_commands_were_found() -> None:
    assert len(RUNS) > 20
    assert {command.split()[0] for command in LAUNCHED if command.split()[0] in OWN} == set(OWN)


@pytest.mark.parametrize("command", RUNS)
def test_runs_that_are_shown_are_composed(command: str) -> None:
    assert read_config(shlex.split(command)) is not None


@pytest.mark.parametrize("command", LAUNCHED)
def test_commands_of_launch_that_are_shown_are_composed(command: str) -> None:
    name, *words = shlex.split(command)
    if "task=..." in words:
        return
    assert name in launch.COMMANDS
    if name == "fetch":
        assert get_task(next(word for word in words if "=" not in word).replace("TASK", "toy"))
        return
    if name in ("runs", "gallery"):
        assert len(words) == 1
        return
    given, settings = split_arguments([word for word in words if word != "--dry-run"], OWN[name])
    changes = [
        setting.removeprefix("cluster.") for setting in settings if setting.startswith("cluster.")
    ]
    if name == "submit":
        cluster = given["cluster"]
        assert load_cluster(
            str(FIXTURES / "submit/site.yaml") if cluster == "mine.yaml" else cluster, changes
        )
    if settings := [setting for setting in settings if not setting.startswith("cluster.")]:
        assert read_config(settings) is not None


@pytest.mark.parametrize(
    "file",
    sorted(CONFIG_FOLDER.rglob("*.yaml")),
    ids=lambda file: str(file.relative_to(CONFIG_FOLDER)),
)
def test_every_file_of_conf_is_composed(file: Path) -> None:
    group, name = file.parent.name, file.stem
    if group == "cluster":
        assert load_cluster(name, [])
    elif group == "task" and not name.startswith("_"):
        config = read_config([f"task={name}"])
        assert config is not None
        assert config.task == name
        assert name in TASKS
    elif group in ("parallel", "fsdp", "memory"):
        assert all(
            read_config([f"task={task}", f"{group}={name}"]) is not None
            for task in ("toy", "i2v-14B")
        )
        first, *settings = file.read_text(encoding="utf-8").splitlines()
        assert first.startswith("# ")
        assert len(settings) <= 5


def test_the_configuration_lists_every_setting_as_the_schema_has_it() -> None:
    """Key, default and help, each section under its own heading."""
    text = (CONFIG_FOLDER / "config.yaml").read_text(encoding="utf-8")
    listed: dict[str, tuple[str, object]] = {}
    section, comment = "", ""
    for line in text.partition("chdir: false\n")[2].splitlines():
        key, _, value = line.strip().partition(":")
        if key.startswith("#"):
            comment += line.strip().removeprefix("#")
        elif line.endswith(":"):
            section = f"{key}."
        elif key:
            name = key if line == line.strip() else section + key
            listed[name] = (comment.strip(), yaml.safe_load(value))
        comment = comment if key.startswith("#") else ""
    defaults = {key: item.default for key, item in list_settings().items()}
    assert listed == {
        key: (item.metadata["help"], defaults[key]) for key, item in list_settings().items()
    }


@pytest.mark.parametrize(
    "setting",
    sorted(set(re.findall(r"`((?:[a-z_0-9]+\.)*[a-z_0-9]+=[^`\s]+)`", README)) - {"key=value"}),
)
def test_settings_that_are_shown_exist(setting: str) -> None:
    key, _, value = setting.partition("=")
    own = {name for names in OWN.values() for name in names}
    if key in own or key.split(".")[0] == "cluster" or "..." in value:
        assert key in own | set(list_settings()) | {"task"}
        return
    value = "FILE" if value.isupper() and is_text_key(key) else value
    task = [] if key == "task" else ["task=t2v-A14B"]
    assert read_config([*task, f"{key}={value}"]) is not None


def test_files_that_are_shown_are_there() -> None:
    named = re.findall(r"`((?:slurm|conf|bench|tests|wan_dist|launch|toy)/[\w./*-]*)`", README)
    missing = [name for name in named if not any(ROOT.glob(name.rstrip("/")))]
    assert [name for name in missing if "NAME" not in name] == []


def test_an_installation_has_all_packages_and_all_of_conf() -> None:
    packages = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for name in ("launch", "wan_dist")
        for file in (ROOT / name).rglob("__init__.py")
    }
    folders = {
        "wan_dist.conf",
        *(f"wan_dist.conf.{folder.name}" for folder in CONFIG_FOLDER.iterdir() if folder.is_dir()),
    }
    installed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    assert (packages | folders) - {"wan_dist.conf.__pycache__"} <= installed
