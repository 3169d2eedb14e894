"""Files appear when they are whole and on the disk, under no name that somebody else has or has put there."""

import errno
import os
import secrets
import threading
from pathlib import Path

import pytest

from wan_dist.runtime.atomic_write import atomic_write, parse_final_name, quarantine_file


def write(path: Path, content: str) -> None:
    with atomic_write(path) as aside:
        aside.write_text(content)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_to_sync(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    replace = Path.replace

    def record_sync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        order.append(
            "sync folder"
            if path == tmp_path
            else f"sync {parse_final_name(path.name)} of {path.stat().st_size} bytes"
        )

    def record_rename(self: Path, target: Path) -> Path:
        order.append(f"rename to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_rename)
    write(tmp_path / "a.mp4", "frames")
    assert order == ["sync a.mp4 of 6 bytes", "rename to a.mp4", "sync folder"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_data_that_does_not_reach_the_disk_leave_the_old_file(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    fail_to_sync(code, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(code)):
        write(path, "new")
    assert (path.read_text(), names_in(tmp_path)) == ("old", ["a.json"])


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_is_written_to(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_sync(code, monkeypatch)
    write(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert names_in(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError("damaged"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as aside:
            aside.write_text("new")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert (path.read_text(), names_in(tmp_path)) == ("old", ["a.json"])


@pytest.mark.parametrize("exists", [True, False])
def test_a_planted_link_is_not_followed(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, others = tmp_path / "out", tmp_path / "others"
    folder.mkdir()
    if exists:
        others.write_text("of others")
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0123456789abcdef"[: 2 * count])
    (folder / ".a.01234567.partial.json").symlink_to(others)
    with pytest.raises(FileExistsError):
        write(folder / "a.json", "new")
    assert others.exists() == exists
    assert not exists or others.read_text() == "of others"
    assert names_in(folder) == [".a.01234567.partial.json"]  # not ours to remove


def test_a_link_under_the_final_name_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "others").write_text("of others")
    (tmp_path / "a.json").symlink_to(tmp_path / "others")
    write(tmp_path / "a.json", "new")
    assert not (tmp_path / "a.json").is_symlink()
    assert [(tmp_path / name).read_text() for name in ("a.json", "others")] == ["new", "of others"]


def test_two_may_write_one_path_at_once(tmp_path: Path) -> None:
    path, together = tmp_path / "a.json", threading.Barrier(2, timeout=120)
    faults: list[BaseException] = []

    def work(content: str) -> None:
        try:
            with atomic_write(path) as aside:
                together.wait()
                aside.write_text(content)
                together.wait()
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(letter * 1000,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert path.read_text() in ("a" * 1000, "b" * 1000)
    assert names_in(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "name",
    [
        "a.mp4",
        "g5.5.json",
        "x.latents.safetensors",
        "x.0123456789ab.state.safetensors",
        "ab.cd",
        "x.ab.partial.mp4",
        "plain",
        ".env",
    ],
)
def test_the_final_name_is_known_from_the_name_aside(name: str, tmp_path: Path) -> None:
    with atomic_write(tmp_path / name) as aside:
        assert aside.name != name
        assert aside.name.startswith(".")
        assert aside.suffix == Path(name).suffix or not Path(name).suffix
        assert parse_final_name(aside.name) == name
    assert parse_final_name(name) is None
    assert parse_final_name(f"{name}.damaged") is None


def test_a_damaged_file_is_kept_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    file.write_text("{")
    assert quarantine_file(file) == "it is kept as a.json.damaged"
    assert names_in(tmp_path) == ["a.json.damaged"]
    assert (tmp_path / "a.json.damaged").read_text() == "{"
    assert quarantine_file(file) == "it is left as it is (No such file or directory)"
