"""The texts of a batch: kept one by one, in chunks where weights are streamed, given to replicas
that do not see them.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import FIXTURES
from wan_dist.config.paths import find_packaged_folder
from wan_dist.models import text_encoder
from wan_dist.models.text_encoder import TextEncoder, split_prompts_into_chunks
from wan_dist.parallel.mesh import Axis
from wan_dist.pipeline import text_embeddings
from wan_dist.pipeline.prompt_cache import PromptCache
from wan_dist.run import main
from wan_dist.runtime.signals import PreemptionInterrupt
from wan_dist.tasks.registry import get_task
from wan_dist.weights.checkpoint import Checkpoint, open_checkpoint

CPU = torch.device("cpu")
TINY = ["task=toy", "device=cpu", "size=64*64", "frame_num=5", "sample.steps=1"]
PROMPTS = [
    "a red ball",
    "two cats, boxing on a stage",
    "x",
    "a blue cube moving left " * 9,
    "一只猫",
]


@pytest.fixture(scope="module", params=["toy", "wan2.1-t2v"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    if request.param == "toy":
        return open_checkpoint(
            find_packaged_folder("toy", "toy/checkpoint"), get_task("toy"), torch.float32
        )
    return open_checkpoint(FIXTURES / "wan2.1-t2v", get_task("t2v-1.3B"), torch.bfloat16)


def test_chunks_keep_order_and_are_not_too_long(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_encoder, "_MAX_CHUNK_TOKENS", 40)
    chunks = split_prompts_into_chunks(checkpoint.tokenizer, PROMPTS, 512, torch.device("cuda"))
    assert [prompt for chunk in chunks for prompt in chunk] == PROMPTS
    assert 1 < len(chunks) <= len(PROMPTS)
    assert all(chunks)
    monkeypatch.setattr(text_encoder, "_MAX_CHUNK_TOKENS", 10**6)
    assert [
        len(chunk)
        for chunk in split_prompts_into_chunks(checkpoint.tokenizer, ["a"] * 20, 512, CPU)
    ] == [8, 8, 4]
    assert [
        len(chunk)
        for chunk in split_prompts_into_chunks(
            checkpoint.tokenizer, ["a"] * 20, 512, torch.device("cuda")
        )
    ] == [20]


def streamed_embeddings(
    checkpoint: Checkpoint, run: Callable[..., None], t5: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return what is made of PROMPTS, and the names of the tensors of blocks that were read."""
    reads: list[str] = []
    files = checkpoint.text_encoder.files
    read_rows = files.read_rows
    made: dict[str, torch.Tensor] = {}

    def counted(key: str, *rows: int) -> torch.Tensor:
        reads.append(key)
        return read_rows(key, *rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "read_rows", counted)
        plan = SimpleNamespace(arrangement=SimpleNamespace(t5=t5, shard_t5=False))
        session = SimpleNamespace(checkpoint=checkpoint, groups=SimpleNamespace(replica_mesh=None))
        run(session, plan, PROMPTS, quiet_report(), made.__setitem__)
    return made, [
        key for key in reads if "norm" not in key and "embed" not in key and key != "shared.weight"
    ]


def quiet_report() -> Any:
    from wan_dist.output.stage_report import StageReport
    from wan_dist.tasks.run_config import read_config

    config = read_config(TINY)
    assert config is not None
    return StageReport(asdict(config), CPU, quiet=True)


def test_blocks_are_read_once_a_chunk_and_the_result_is_the_same(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = streamed_embeddings(checkpoint, text_embeddings._encode_prompts, "cpu")
    once, reads = streamed_embeddings(checkpoint, text_embeddings._encode_prompts, "stream")
    assert reads
    assert len(reads) == len(set(reads)), "five prompts in one chunk"
    monkeypatch.setattr(text_encoder, "_MAX_CHUNK_TOKENS", 60)
    chunked, _ = streamed_embeddings(checkpoint, text_embeddings._encode_prompts, "stream")
    for prompt in PROMPTS:
        assert torch.equal(once[prompt], whole[prompt]), prompt
        assert torch.equal(chunked[prompt], whole[prompt]), prompt


@pytest.mark.parametrize("place", ["cpu", "stream"])
def test_a_run_stopped_among_its_texts_resumes_there(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each attempt three more texts, or two chunks of two, until all are there."""
    (tmp_path / "prompts.txt").write_text(
        "".join(f"a red circle, number {number}\n" for number in range(9))
    )
    made: list[str] = []
    one, together = TextEncoder.__call__, TextEncoder.encode_by_block
    left = 0

    def count(prompts: list[str]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise PreemptionInterrupt("asked to end")
        made.extend(prompts)

    def embed_one(self: TextEncoder, prompt: str) -> torch.Tensor:
        count([prompt])
        return one(self, prompt)

    def embed_chunk(self: TextEncoder, prompts: list[str]) -> list[torch.Tensor]:
        count(prompts)
        return together(self, prompts)

    def stop(*_: object) -> None:
        raise PreemptionInterrupt("all texts are there")

    monkeypatch.setattr(TextEncoder, "__call__", embed_one)
    monkeypatch.setattr(TextEncoder, "encode_by_block", embed_chunk)
    monkeypatch.setattr("wan_dist.jobs.worker.share_prompt_embeddings", stop)
    monkeypatch.setattr(text_encoder, "_MAX_CHUNK_TOKENS", 40)
    command = [
        *TINY,
        f"jobs={tmp_path / 'prompts.txt'}",
        f"output.dir={tmp_path}",
        f"cache.dir={tmp_path / 'cache'}",
        f"memory.t5={place}",
    ]
    for attempt in range(1, 5):
        left = 3
        assert main(command) == 75
        assert len(made) == len(set(made)), "none is made twice"
        assert (
            len(list((tmp_path / "cache").glob("*.safetensors")))
            == len(made)
            >= min(3 * attempt, 10)
        )
    assert len(made) == 10


class Meeting:
    """What threads, as ranks, gather."""

    def __init__(self, size: int) -> None:
        self.barrier, self.values = threading.Barrier(size), [None] * size

    def gather(self, value: Any, axis: Axis) -> list[Any]:
        self.values[axis.rank] = value
        self.barrier.wait(10)
        found = list(self.values)
        self.barrier.wait(10)
        return found


@pytest.mark.parametrize("caches", ["shared", "own", "none"])
def test_replicas_get_the_texts_that_they_do_not_see(caches: str, tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(50)]
    values = {text: torch.full((2, 4), float(number)) for number, text in enumerate(texts)}
    meeting = Meeting(3)
    sessions = []
    for rank in range(3):
        folder = tmp_path / ("all" if caches == "shared" else str(rank))
        cache = None if caches == "none" else PromptCache(folder, "", 10**6)
        axis = Axis(rank, 3)
        coordinator = SimpleNamespace(
            gather=lambda value, what, axis=axis: meeting.gather(value, axis)
        )
        groups = SimpleNamespace(dp=axis, replica=Axis(), coordinator=coordinator)
        session: Any = SimpleNamespace(
            prompt_embeddings={},
            prompt_cache=cache,
            shared_prompt_cache=None,
            groups=groups,
            text_encoder_digest="",
        )
        for text in texts[rank::3]:
            if cache is None:
                session.prompt_embeddings[text] = values[text]
            else:
                cache.put(text, values[text])
        sessions.append(session)
    threads = [
        threading.Thread(
            target=text_embeddings.share_prompt_embeddings, args=(session, texts, tmp_path / "sent")
        )
        for session in sessions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for session in sessions:
        for text in texts:
            found = text_embeddings._find_embedding(session, None, text)
            assert found is not None
            assert torch.equal(found, values[text])
    assert len(list((tmp_path / "sent").glob("*"))) == (0 if caches == "shared" else 50)


def test_a_job_with_a_cache_of_its_own_uses_the_batch_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    one = TextEncoder.__call__
    monkeypatch.setattr(
        TextEncoder, "__call__", lambda self, prompt: calls.append(prompt) or one(self, prompt)
    )
    jobs = [
        {"prompt": "a ball", "name": "a", "frames": 9},
        {"prompt": "a cube", "name": "b", "cache.dir": None},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    command = [
        *TINY,
        f"jobs={tmp_path / 'jobs.jsonl'}",
        f"output.dir={tmp_path}",
        f"cache.dir={tmp_path / 'cache'}",
    ]
    assert main(command) == 0
    assert sorted(calls) == ["", "a ball", "a cube"]
