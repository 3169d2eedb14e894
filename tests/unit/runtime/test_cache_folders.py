"""Users without a home, without a name, or with folders that they cannot write to."""

import getpass
import os
import pwd
import stat
import tempfile
from pathlib import Path

import pytest
import torch

from launch.__main__ import main as launch
from wan_dist.config.paths import find_user_cache
from wan_dist.config.sections import CacheConfig
from wan_dist.pipeline.prompt_cache import PromptCache
from wan_dist.planning.plan import make_plan
from wan_dist.runtime import cache_folders as caches
from wan_dist.runtime.cache_folders import configure_library_caches, find_home_folder, is_writable
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.run_config import read_config

KEYS = (
    "HOME",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "TRITON_CACHE_DIR",
    "USER",
    "LOGNAME",
    "LNAME",
    "USERNAME",
)


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom the system does not know, with a folder for temporary files."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(
        "os.environ", {key: value for key, value in os.environ.items() if key not in KEYS}
    )
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.usefixtures("nobody")
def test_nobody_has_caches_for_libraries_and_keeps_no_prompts(tmp_path: Path) -> None:
    assert find_home_folder() is None
    note = configure_library_caches()
    assert note is not None
    assert "HOME is not set" in note
    assert getpass.getuser() == f"uid-{os.getuid()}"
    own = tmp_path / f"wan-dist-{os.getuid()}"
    assert (os.environ["HF_HOME"], os.environ["TRITON_CACHE_DIR"]) == (
        f"{own}/huggingface",
        f"{own}/triton",
    )
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert find_user_cache() is None
    assert CacheConfig().resolve_folder() is None


@pytest.mark.usefixtures("nobody")
def test_others_folders_are_not_used(tmp_path: Path) -> None:
    (tmp_path / "planted").mkdir()
    (tmp_path / f"wan-dist-{os.getuid()}").symlink_to(tmp_path / "planted")
    configure_library_caches()
    own = Path(os.environ["TRITON_CACHE_DIR"]).parent
    assert own.is_dir()
    assert own.resolve() != tmp_path / "planted"


@pytest.mark.usefixtures("nobody")
def test_what_is_set_stays(tmp_path: Path) -> None:
    given = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "TRITON_CACHE_DIR": "/triton", "USER": "me"}
    os.environ.update(given)
    assert configure_library_caches() is None
    assert {key: os.environ.get(key) for key in KEYS if key in os.environ} == given
    assert find_user_cache() == tmp_path / "xdg/wan-dist"


def test_a_home_that_can_be_written_to_needs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", os.environ | {"HOME": str(tmp_path), "USER": "me"})
    before = dict(os.environ)
    assert configure_library_caches() is None
    assert os.environ == before


@pytest.mark.usefixtures("nobody")
def test_a_path_in_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"output\.dir=~/videos: the home folder of this user is unknown"
    ):
        read_config(["task=toy", "output.dir=~/videos"])
    config = read_config(["task=toy"])
    assert config is not None
    config.prompt = "@~/prompt.txt"
    with pytest.raises(InputError, match=r"prompt=@~/prompt\.txt"):
        make_plan(config)


def test_what_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert is_writable(tmp_path / "none/none")
    assert not is_writable(tmp_path / "file/none")
    monkeypatch.setattr(
        os, "access", lambda folder, mode: folder != tmp_path
    )  # root may write anywhere
    assert not is_writable(tmp_path / "none/none")


def test_a_cache_that_others_keep_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PromptCache(tmp_path, "a", 10**9)
    cache.put("two cats", torch.ones(2, 3))

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.get("two cats") is not None


def test_a_folder_for_temporary_files_may_be_missing(
    nobody: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(caches.tempfile, "gettempdir", none)
    assert configure_library_caches() is not None


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    "arguments",
    [
        ["runs", "~/videos"],
        ["gallery", "~/videos"],
        ["fetch", "t2v-14B", "~/weights"],
        ["submit", "cluster=~/mine.yaml", "task=toy"],
        ["submit", "cluster=h100", "array=~/jobs.txt", "task=toy"],
    ],
)
def test_commands_say_so_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(arguments) == 2
    assert "the home folder of this user is unknown" in capsys.readouterr().err
