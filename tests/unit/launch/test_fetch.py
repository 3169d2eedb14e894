"""``python -m launch fetch``: what is asked for of the Hugging Face hub, and that what came is whole."""

import errno
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from launch.__main__ import main
from tests.conftest import FIXTURES, golden_folder
from tests.test_animate_2 import make_release_folder
from wan_dist.config.loras import list_loras
from wan_dist.planning.few_steps import find_few_step_model
from wan_dist.runtime import signals as preemption
from wan_dist.runtime.environment import sanitize_environment
from wan_dist.runtime.log import logger
from wan_dist.tasks.registry import TASKS
from wan_dist.tasks.run_config import read_config
from wan_dist.weights import hub
from wan_dist.weights.published_files import PUBLISHED_FILES


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Repositories that were asked for; a tiny checkpoint comes instead."""
    found: list[str] = []

    def snapshot(repository: str, *, allow_patterns: list[str], local_dir: Path | None) -> str:
        assert local_dir is not None
        found.append(repository)
        shutil.copytree(
            FIXTURES / "wan2.1-t2v",
            local_dir,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("expected"),
        )
        return str(local_dir)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    return found


def test_it_says_how_to_use_what_came(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "weights"
    assert main(["fetch", "t2v-1.3B", str(folder)]) == 0
    assert asked == ["Wan-AI/Wan2.1-T2V-1.3B"]
    said = capsys.readouterr().out
    assert f"{folder} is complete" in said
    assert (
        f'python -m wan_dist.run task=t2v-1.3B ckpt_dir={folder} size=832x480 prompt="..."' in said
    )


@pytest.mark.parametrize(
    ("size", "repository"),
    [("832*480", "Wan-AI/Wan2.1-I2V-14B-480P"), ("1280*720", "Wan-AI/Wan2.1-I2V-14B-720P")],
)
def test_it_fetches_the_checkpoint_for_the_size(
    size: str, repository: str, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", "i2v-14B", str(tmp_path), f"size={size}"]) == 2
    assert asked == [repository]
    assert (
        "is not a complete i2v-14B checkpoint" in capsys.readouterr().err
    )  # the tiny one has no image encoder


def test_animates_checkpoint_comes_with_its_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def snapshot(repository: str, *, allow_patterns: list[str], local_dir: Path) -> str:
        golden = golden_folder("wan2.2-animate")
        for pattern in allow_patterns:
            for file in golden.glob(pattern):
                target = local_dir / file.relative_to(golden)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(file)
        return str(local_dir)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    folder = tmp_path / "animate"
    assert main(["fetch", "animate-14B", str(folder)]) == 0
    command = f"python -m wan_dist.run task=animate-14B ckpt_dir={folder} src_root_path=FOLDER"
    assert command in capsys.readouterr().out.splitlines()
    config = read_config(["task=animate-14B", f"ckpt_dir={folder}", "use_relighting_lora=true"])
    assert config is not None
    assert [lora.path for lora in list_loras(config)] == [folder / "relighting_lora.ckpt"]


def test_the_release_of_animate_2_is_fetched_as_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    release = make_release_folder(tmp_path / "release")

    def snapshot(repository: str, *, allow_patterns: list[str], local_dir: Path) -> str:
        assert repository == "Wan-AI/Wan2.2-Animate-2-14B"
        for pattern in [*allow_patterns, "config.json"]:  # of the tiny model, which has other heads
            for file in release.glob(pattern):
                target = local_dir / file.relative_to(release)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    target.symlink_to(file)
        return str(local_dir)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    folder = tmp_path / "animate-2"
    assert main(["fetch", "animate-2-14B", str(folder)]) == 0
    assert f"{folder} is complete" in capsys.readouterr().out
    assert not (folder / "wan_animate_2/wan_animate_2_bf16_distillation.safetensors").exists()
    (folder / "videomodel/Wan-AI/vae.pth").unlink()
    assert main(["fetch", "animate-2-14B", str(folder)]) == 0  # it comes again


def test_a_truncated_file_is_found(
    asked: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    come = hub.snapshot_download

    def cut(*arguments: str, **options: object) -> str:
        folder = Path(come(*arguments, **options))
        file = folder / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", cut)
    assert main(["fetch", "t2v-1.3B", str(tmp_path)]) == 2
    assert "diffusion_pytorch_model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["size=832*480"], "fetch needs a task and a folder"),
        (["t2v-14B", "a", "b"], "fetch needs a task and a folder"),
        (["t2v-14", "a"], "there is no task 't2v-14'"),
        (["lightx", "a"], "few-step models: lightx2v-4step-t2v-14B, "),
        (
            ["lightx2v-4step", "a"],
            "is published for several tasks: say lightx2v-4step-t2v-14B or lightx2v-4step-i2v-14B or ",
        ),
        (["lightx2v-4step-t2v-14B", "a", "size=832*480"], "leave size=832*480 out"),
        (["toy", "a"], "needs no download"),
        (["t2v-14B", "a", "size=big"], "size=big"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not asked


@pytest.mark.parametrize("arguments", [[], ["lightning2"]])
def test_what_there_is_is_listed(
    arguments: list[str], asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", *arguments]) == (2 if arguments else 0)
    captured = capsys.readouterr()
    text = captured.err if arguments else captured.out
    for name in (*PUBLISHED_FILES, *TASKS):
        assert name == "toy" or name in text
    assert not asked


LORA_TENSORS = {
    "diffusion_model.blocks.0.ffn.0.lora_down.weight": torch.zeros(2, 64),
    "diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.zeros(128, 2),
}


@pytest.fixture
def patterns_asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Patterns that were asked for by repository; tiny files of these names come."""
    found: dict[str, list[str]] = {}

    def snapshot(repository: str, *, allow_patterns: list[str], local_dir: Path) -> str:
        found[repository] = allow_patterns
        if repository.startswith("FastVideo/"):
            shutil.copytree(golden_folder("diffusers") / "wan2.2-ti2v-5b", local_dir)
            return str(local_dir)
        for name in allow_patterns:
            file = local_dir / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if "lora" in name.lower():
                save_file(LORA_TENSORS, file)
            else:
                shutil.copy(FIXTURES / "wan2.1-t2v/diffusion_pytorch_model.safetensors", file)
        return str(local_dir)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    return found


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_files_of_few_step_models_come_with_the_command_that_uses_them(
    name: str,
    patterns_asked: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "files"
    files = PUBLISHED_FILES[name]
    assert main(["fetch", name, str(folder)]) == 0
    assert patterns_asked == {files.repository: files.patterns}
    *_, command = capsys.readouterr().out.splitlines()
    _, arguments = command.split("python -m wan_dist.run ")
    config = read_config(shlex.split(arguments))
    assert config is not None
    assert (config.task, config.preset) == (files.task, files.preset)
    for path in re.findall(rf"{re.escape(str(folder))}[^, ]*", command):
        assert Path(path).exists()
    is_pair = TASKS[files.task].expert_boundary is not None
    assert sum(map(len, files.files.values())) == (2 if is_pair else 1) or "ckpt_dir" in files.files
    if config.dit_file or config.lora or config.lora_high:
        name_of_file = Path(files.patterns[0])
        assert find_few_step_model([folder / name_of_file]) == (name_of_file.name, files.preset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "no longer publishes it under this name"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "truncated"),
        (
            lambda file: shutil.copy(
                FIXTURES / "wan2.1-t2v/diffusion_pytorch_model.safetensors", file
            ),
            "is a transformer, not for lora=",
        ),
    ],
)
def test_files_that_are_not_whole_or_not_those_are_found(
    change: Callable[[Path], object],
    message: str,
    patterns_asked: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    come = hub.snapshot_download

    def spoil(repository: str, **options: Any) -> str:
        folder = come(repository, **options)
        change(Path(folder) / options["allow_patterns"][0])
        return folder

    monkeypatch.setattr(hub, "snapshot_download", spoil)
    assert main(["fetch", "lightx2v-4step-t2v-14B", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_failed_download_of_files_says_what_to_run_where_there_is_internet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> str:
        raise RuntimeError("404")

    monkeypatch.setattr(hub, "snapshot_download", fails)
    assert main(["fetch", "fusionx-8step-t2v-14B", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "404" in told
    assert (
        "`hf download vrgamedevgirl84/Wan14BT2VFusioniX "
        "FusionX_LoRa/Wan2.1_T2V_14B_FusionX_LoRA.safetensors --local-dir FOLDER`" in told
    )


class RefusedError(Exception):
    """What the hub's client raises when it was answered: with the answer, of any library."""

    def __init__(self, status: int) -> None:
        super().__init__(
            f"{status} Client Error: Unauthorized for url\n\nInvalid username or password."
        )
        self.response = SimpleNamespace(status_code=status)


def full_disk() -> Exception:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("fault", "environment", "messages"),
    [
        (
            LocalEntryNotFoundError("offline"),
            {},
            ["LocalEntryNotFoundError: offline; is there internet"],
        ),
        (
            OSError(errno.ECONNREFUSED, "refused"),
            {"HTTPS_PROXY": "http://me:secret@proxy:1"},
            ["refused; HTTPS_PROXY=http://...@proxy:1 may"],
        ),
        (
            ValueError("Unknown scheme"),
            {"all_proxy": "socks4://x:1"},
            ["Unknown scheme; all_proxy=socks4://x:1 may be wrong"],
        ),
        (
            ImportError("no socksio"),
            {"ALL_PROXY": "socks5://x:1"},
            ["ALL_PROXY=socks5://x:1 needs a package", "pip install socksio"],
        ),
        (
            RuntimeError("404"),
            {"HF_ENDPOINT": "https://mirror"},
            ["404; HF_ENDPOINT=https://mirror may be wrong"],
        ),
        (RuntimeError("x"), {"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE=1 forbids it"]),
        (
            RefusedError(401),
            {"HF_TOKEN": "hf_secret"},
            ["401 Client Error", "a token is refused", "HF_TOKEN"],
        ),
        (full_disk(), {}, ["No space left on device; free some space", "HF_HOME=FOLDER"]),
        (
            RuntimeError("IO Error: No space left on device (os error 28)"),
            {},
            ["(os error 28); free some space"],
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/cache"),
            {},
            ["Permission denied", "HF_HOME=FOLDER name a folder that you may"],
        ),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            {},
            ["Permission denied; is there internet"],
        ),  # of a connection
        (
            RuntimeError("SSL: CERTIFICATE_VERIFY_FAILED"),
            {"SSL_CERT_FILE": "/own.pem"},
            ["SSL_CERT_FILE=/own.pem may be wrong"],
        ),
        (KeyError("whatever"), {}, ["KeyError: 'whatever'"]),
    ],
)
def test_what_fails_is_told_in_a_line_with_its_variable(
    fault: Exception,
    environment: dict[str, str],
    messages: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object, **__: object) -> str:
        try:
            raise fault
        except Exception as origin:
            if isinstance(origin, OSError) and origin.errno == errno.ENOSPC:
                raise RuntimeError("data processing error") from origin
            raise

    for key in (
        "ALL_PROXY",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "SSL_CERT_FILE",
    ):
        monkeypatch.delenv(key, raising=False)
        monkeypatch.delenv(key.lower(), raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(hub, "snapshot_download", fails)
    monkeypatch.setattr(logger, "handlers", [])
    assert main(["fetch", "t2v-14B", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not be downloaded: " in line
    assert all(message in line for message in messages), line
    assert "secret" not in line


def test_a_client_that_cannot_be_imported_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["fetch", "t2v-14B", str(tmp_path)]) == 2
    assert "could not be downloaded: ModuleNotFoundError" in capsys.readouterr().err


@pytest.mark.usefixtures("restored_signals")
def test_a_signal_does_not_wait_for_the_file_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def downloading(*_: object, **__: object) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it waits")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(hub, "snapshot_download", downloading)
    monkeypatch.setattr(preemption.os, "_exit", leave)
    with pytest.raises(SystemExit, match="75"):
        main(["fetch", "t2v-14B", str(tmp_path)])


@pytest.mark.parametrize(
    "key",
    ["HF_ENDPOINT", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "HF_HOME", "XDG_CACHE_HOME"],
)
def test_what_is_set_to_nothing_does_not_reach_libraries(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(key, "")
    sanitize_environment()
    assert key not in os.environ


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("HF_ENDPOINT", "hf-mirror.com"),
        ("HF_ENDPOINT", "http://["),
        ("HF_ENDPOINT", "https://"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "a minute"),
    ],
)
def test_what_libraries_could_not_be_imported_with(
    key: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(key, value)
    assert main(["fetch", "t2v-14B"]) == 2
    assert f"{key}={value} in the environment is not" in capsys.readouterr().err
