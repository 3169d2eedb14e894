"""Kept prompt embeddings: found again, told apart, limited in size, safe beside other runs."""

import os
import threading
from pathlib import Path

import pytest
import torch

from wan_dist.pipeline.prompt_cache import PromptCache

CONTEXT = torch.randn(7, 16)


def test_stored_embeddings_are_found_again(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, "a", 10**9)
    assert cache.get("two cats") is None
    cache.put("two cats", CONTEXT)
    assert torch.equal(
        PromptCache(tmp_path, "a", 10**9).get(" two   cats "), CONTEXT
    )  # as it is cleaned
    assert cache.get("three cats") is None
    assert PromptCache(tmp_path, "b", 10**9).get("two cats") is None


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, "a", 3 * 600)  # a file has 448 bytes of values
    for number, prompt in enumerate("abc"):
        cache.put(prompt, CONTEXT)
        os.utime(cache.tensors.get_file(prompt), (number, number))
    assert cache.get("a") is not None  # used just now
    cache.put("d", CONTEXT)
    assert [cache.get(prompt) is not None for prompt in "abcd"] == [True, False, True, True]


def test_the_folder_is_looked_through_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: looks.append(folder) or scandir(folder))
    cache = PromptCache(tmp_path, "a", 640 * 600)
    for number in range(800):
        cache.put(f"prompt {number}", CONTEXT)
    assert len(looks) <= 80, "about once for each 64th of the limit, not for each prompt"
    before = [file.stat().st_size for file in tmp_path.iterdir()]
    assert 600 * 600 <= sum(before) <= 640 * 600


def test_what_this_process_has_used_stays(tmp_path: Path) -> None:
    PromptCache(tmp_path, "a", 10**9).put("old", CONTEXT)
    (old,) = tmp_path.iterdir()
    os.utime(old, (0, 0))
    cache = PromptCache(tmp_path, "a", 3 * 600)
    assert [cache.put(prompt, CONTEXT) for prompt in "abcd"] == [True, True, True, False]
    assert not old.exists()
    assert [cache.has(prompt) for prompt in "abcd"] == [True, True, True, False]


def test_damage_and_folders_that_cannot_be_written_are_no_errors(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, "a", 10**9)
    cache.put("x", CONTEXT)
    cache.tensors.get_file("x").write_bytes(b"not safetensors")
    assert cache.get("x") is None
    (tmp_path / "file").touch()
    PromptCache(tmp_path / "file", "a", 10**9).put("x", CONTEXT)


def test_several_at_once(tmp_path: Path) -> None:
    faults = []

    def work(seed: int) -> None:
        cache = PromptCache(tmp_path, "a", 4 * 600)
        try:
            for number in range(40):
                prompt = f"prompt {(number * seed) % 10}"
                found = cache.get(prompt)
                assert found is None or torch.equal(found, CONTEXT)
                cache.put(prompt, CONTEXT)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 3, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
