"""What the docs show works: commands and settings are composed, named files are there, links lead
somewhere.
"""

import ast
import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import pytest
import yaml

from bench.table import PAGES
from launch import __main__ as launch
from launch import fetch, gallery, local, plan, runs, serve, submit
from launch.arguments import split_arguments
from launch.doctor import checks as doctor
from launch.slurm.cluster import load_cluster
from tests.conftest import FIXTURES
from wan_dist.config.arguments import REFERENCE_FLAG_KEYS, is_text_key
from wan_dist.config.compose import CONFIG_FOLDER
from wan_dist.config.schema import list_settings
from wan_dist.tasks.registry import TASKS, get_task
from wan_dist.tasks.run_config import read_config
from wan_dist.usage import USAGE_EXAMPLES
from wan_dist.weights.published_files import PUBLISHED_FILES

ROOT = Path(__file__).parents[2]
CHINESE = ROOT / "README.zh-CN.md"
TEXTS = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in (*PAGES, CHINESE)
}
README = TEXTS["README.md"]
DOCS = [
    *TEXTS.values(),
    USAGE_EXAMPLES,
    *(
        command.__doc__ or ""
        for command in (plan, doctor, fetch, local, serve, submit, runs, gallery)
    ),
]
DOCS += [
    re.sub(r"^# ?", "", file.read_text(), flags=re.MULTILINE)
    for file in sorted((ROOT / "slurm").glob("*.sbatch"))
]
OWN = {
    "local": ("ranks",),
    "serve": ("ranks",),
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


RUNS = [rest for rest in _found(RUN) if re.search(r"task=[\w]", rest) and "--cfg" not in rest]
LAUNCHED = _found(r"(?:torchrun [-\w= ]*-m|srun python -m|python -m) launch")


def test_commands_were_found() -> None:
    assert len(RUNS) > 20
    assert {command.split()[0] for command in LAUNCHED if command.split()[0] in OWN} == set(OWN)


@pytest.mark.parametrize("command", RUNS)
def test_runs_that_are_shown_are_composed(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if file := re.search(r"task=(\S+\.yaml)", command):
        shown = re.search(r"^    base: .*\n(?:    .*\n)+", TEXTS["docs/tasks.md"], re.MULTILINE)
        assert shown is not None
        (tmp_path / file[1]).write_text(textwrap.dedent(shown[0]), encoding="utf-8")
        monkeypatch.chdir(tmp_path)
    assert read_config(shlex.split(command)) is not None


@pytest.mark.parametrize("command", LAUNCHED)
def test_commands_of_launch_that_are_shown_are_composed(command: str) -> None:
    name, *words = shlex.split(command)
    if "task=..." in words:
        return
    assert name in launch.COMMANDS
    if name == "fetch":
        fetched = [word for word in words if "=" not in word]
        if fetched and fetched[0] not in PUBLISHED_FILES:
            assert get_task(fetched[0].replace("TASK", "toy"))
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
    sorted(
        {
            setting
            for text in TEXTS.values()
            for code in re.findall(r"`([^`\n]+)`", text)
            if re.match(r"(?:[a-z_0-9]+\.)*[a-z_0-9]+=[^\s]", code)
            for setting in code.split()
            if "=" in setting
        }
        - {"key=value", "setting=value", "from=VIDEO"}
    ),
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


def test_keys_that_are_shown_without_a_value_exist() -> None:
    sections = {key.partition(".")[0] for key in list_settings() if "." in key}
    shown = {
        code
        for text in TEXTS.values()
        for code in re.findall(r"`([a-z_]+\.[a-z_0-9]+)`", text)
        if code.partition(".")[0] in sections
    }
    assert shown <= set(list_settings())
    assert len(shown) >= 25


def test_files_that_are_shown_are_there() -> None:
    folders = "slurm|conf|bench|tests|wan_dist|launch|toy|docs"
    missing = [
        (page, name)
        for page, text in TEXTS.items()
        for name in re.findall(rf"`((?:{folders})/[\w./*-]*)`", text)
        if "NAME" not in name and not any(ROOT.glob(name.rstrip("/")))
    ]
    assert missing == []


def _anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    without_code = re.sub(r"^(?: {4}.*|```.*?```)$", "", text, flags=re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", without_code, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*TEXTS, "toy/README.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / name) if name else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in _anchors(file.read_text(encoding="utf-8")), target


def test_the_first_page_is_short_and_leads_to_all_others() -> None:
    assert len(README.splitlines()) < 150
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", README))
    assert linked == {page for page in TEXTS if page.startswith("docs/")}


def test_pictures_are_small() -> None:
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert len(pictures) >= 3
    assert sum(picture.stat().st_size for picture in pictures) < 200_000


def _skeleton(text: str) -> dict[str, list[str]]:
    """Return what a translation must not change: commands, links, code, numbers of tables, headings."""
    blocks = re.findall(r"^ {4}(.*)$", text, flags=re.MULTILINE)
    rows = re.findall(r"^\|.*\|$", text, flags=re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    return {
        "commands": [re.split(r"\s{2,}#", block)[0].strip() for block in blocks],
        "links": sorted(
            link.partition("#")[0] + "#" * ("docs/" in link and "#" in link) for link in links
        ),
        "rows": [" ".join(re.findall(r"\d+(?:\.\d+)?", row)) for row in rows],
        "headings": re.findall(r"^(#+) ", text, flags=re.MULTILINE),
        "code": sorted(re.findall(r"`([^`\n]+)`", text)),
    }


def test_the_chinese_page_shows_the_same() -> None:
    english, chinese = _skeleton(README), _skeleton(TEXTS["README.zh-CN.md"])
    english["links"].remove("README.zh-CN.md")
    chinese["links"].remove("README.md")
    for part, shown in english.items():
        assert chinese[part] == shown, part
    words = re.findall(r"[\u4e00-\u9fff]", TEXTS["README.zh-CN.md"])
    assert len(words) > 800


def test_every_task_and_flag_has_its_place() -> None:
    tasks, settings = TEXTS["docs/tasks.md"], TEXTS["docs/settings.md"]
    assert [task for task in TASKS if task != "toy" and f"\n### {task}\n" not in tasks] == []
    assert all(task.repository in tasks for task in TASKS.values())
    assert all((task.repository_480p or "") in tasks for task in TASKS.values())
    assert [flag for flag in REFERENCE_FLAG_KEYS if f"`{flag}" not in settings] == []


def test_named_choices_are_listed() -> None:
    table = TEXTS["docs/settings.md"].partition("## Named choices")[2].partition("\n## ")[0]
    for group in ("memory", "parallel", "fsdp", "cluster"):
        row = next(line for line in table.splitlines() if line.startswith(f"| `{group}`"))
        names = {file.stem for file in (CONFIG_FOLDER / group).glob("*.yaml")}
        assert names == set(re.findall(r"`([\w-]+)`", row)) - {group}


OTHERS = {"Killed", "exitcode: -9", "bus error", "sm_120 is not compatible", "ffmpeg"}
"""Messages of other programs."""


def _messages(file: Path) -> list[str]:
    """Return the texts in a file of code, with \\0 in place of what is filled in."""
    return [
        "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else re.sub(r"%(?:\.\d)?[sdfe]", "\0", str(node.value))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]


def test_messages_that_are_explained_are_those_of_the_program() -> None:
    messages = "\n".join(
        message
        for folder in ("wan_dist", "launch")
        for file in (ROOT / folder).rglob("*.py")
        for message in _messages(file)
    )
    page = TEXTS["docs/troubleshooting.md"]
    shown = set(re.findall(r"\*`([^`]+)`\*?", page)) - OTHERS
    patterns = {text: ".*".join(map(re.escape, text.split("..."))) for text in shown}
    assert [text for text, pattern in patterns.items() if not re.search(pattern, messages)] == []
    assert len(shown) >= 10


def test_the_tour_names_short_files() -> None:
    tour = README.partition("## A tour of the code")[2].partition("\n## ")[0]
    files = re.findall(r"`(wan_dist/[\w/]+\.py)`", tour)
    assert len(files) >= 6
    assert all(len((ROOT / file).read_text().splitlines()) < 400 for file in files)


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
