"""Whole runs on several ranks (gloo, CPU) against the reference implementation's videos, at one
rank's tolerance.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from tests.conftest import FIXTURES, golden_folder, has_golden
from tests.test_command import reference_arguments


@dataclass(frozen=True)
class Case:
    """One run: which golden, and how it is spread."""

    task: str
    golden: str
    case: str
    spread: str

    @property
    def name(self) -> str:
        return f"{self.task}-{self.case}-{self.spread.replace(' ', '-').replace('parallel.', '')}"


T2V, ODD = ("t2v-1.3B", "wan2.1-t2v", "unipc"), ("t2v-1.3B", "wan2.1-t2v", "odd")
I2V, A14B, TI2V = (
    ("i2v-14B", "wan2.1-i2v", "unipc"),
    ("t2v-A14B", "wan2.2-t2v-a14b", "unipc"),
    ("ti2v-5B", "wan2.2-ti2v-5b", "i2v"),
)
FLF2V, I2V_A14B = ("flf2v-14B", "wan2.1-flf2v", "unipc"), ("i2v-A14B", "wan2.2-i2v-a14b", "unipc")

# The models have 4 heads; token counts are 45 (t2v), 84 (odd), 72 (i2v), 84 (flf2v), 54 (i2v-A14B) and
# 36 (ti2v).
CASES = {
    2: [
        Case(*T2V, "parallel.ulysses=2"),
        Case(*T2V, "parallel.ring=2"),
        Case(*T2V, "parallel.cfg=2"),
        Case(*T2V, "parallel.ulysses=2 fsdp.dit=true fsdp.t5=true"),
        Case(*T2V, ""),
        Case(*ODD, "parallel.cfg=2 fsdp.dit=true"),
        Case(*I2V, "parallel.ulysses=2"),
        Case(*I2V, "parallel.cfg=2 fsdp.dit=true"),
        Case(*A14B, "parallel.cfg=2 fsdp.dit=true"),
        Case(*A14B, "parallel.ring=2"),
        Case(*TI2V, "parallel.ulysses=2"),
        Case(*TI2V, "parallel.ring=2 fsdp.dit=true"),
        Case(*I2V, "parallel.ulysses=2 memory.dit=disk memory.t5=stream memory.slice_tokens=7"),
        Case(*A14B, "parallel.cfg=2 memory.dit=stream"),
    ],
    3: [
        Case(*T2V, ""),
        Case(*I2V, "parallel.ring=3 fsdp.dit=true fsdp.t5=true"),
        Case(*TI2V, "parallel.ring=3"),
    ],
    4: [
        Case(*T2V, ""),
        Case(*T2V, "parallel.ulysses=4"),
        Case(*T2V, "parallel.ring=4"),
        Case(*T2V, "parallel.ring=2 parallel.ulysses=2 fsdp.dit=true"),
        Case(*ODD, "parallel.cfg=2 parallel.ring=2"),
        Case(*I2V, "parallel.cfg=2 parallel.ulysses=2 fsdp.dit=true"),
        Case(*I2V_A14B, "parallel.ring=2 parallel.ulysses=2 fsdp.dit=true fsdp.t5=true"),
        Case(*A14B, "parallel.cfg=2 parallel.ulysses=2 fsdp.dit=true"),
        Case(*TI2V, "parallel.ring=2 parallel.ulysses=2"),
        Case(*TI2V, "parallel.cfg=2 parallel.ulysses=2 fsdp.dit=true"),
        Case(*FLF2V, "parallel.ulysses=4"),
    ],
}


def run_table(table: list[list[str]], num_ranks: int, folder: Path) -> tuple[list[list[int]], str]:
    """Run every row's arguments on this many ranks; returns each rank's exit codes and what they printed."""
    told = run_workers(
        "tests.ranks.worker", [[arguments] for arguments in table], num_ranks, folder
    )
    return [
        json.loads((folder / f"codes-{rank}.json").read_text()) for rank in range(num_ranks)
    ], told


def run_workers(module: str, table: list[list[object]], num_ranks: int, folder: Path) -> str:
    """Run a module on this many ranks, which do the rows of a table one after the other; returns
    what they printed.

    Each row has a store of its own, held open here as torchrun's agent does, so that no row can
    find its port taken.
    """
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in table]
    file = folder / "table.json"
    file.write_text(
        json.dumps([[store.port, *row] for store, row in zip(stores, table, strict=True)]),
        encoding="utf-8",
    )
    store_of_the_agent = {
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    environment = (
        os.environ
        | store_of_the_agent
        | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    )
    logs = [(folder / f"log-{rank}").open("w+") for rank in range(num_ranks)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, file, str(rank), str(num_ranks)],
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(num_ranks)
    ]
    try:
        assert [worker.wait(timeout=60 + 30 * len(table)) for worker in workers] == [0] * num_ranks
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        told = []
        for log in logs:
            log.seek(0)
            told.append(log.read())
            log.close()
    return "\n".join(told)


@pytest.mark.parametrize("num_ranks", CASES)
def test_any_spread_gives_the_reference_implementations_video(
    num_ranks: int, tmp_path: Path
) -> None:
    cases = [case for case in CASES[num_ranks] if has_golden(case.golden)]
    table = []
    for case in cases:
        arguments = reference_arguments(golden_folder(case.golden), case.case, case.task)
        table.append(
            [
                *arguments,
                *case.spread.split(),
                "dtype=float32",
                "device=cpu",
                f"output.dir={tmp_path / case.name}",
            ]
        )
    codes, told = run_table(table, num_ranks, tmp_path)
    assert codes == [[0] * len(cases)] * num_ranks, told
    errors = {}
    for case in cases:
        video = load_file(tmp_path / case.name / "out.safetensors")["video"]
        expected = load_file(golden_folder(case.golden) / f"expected/{case.case}.safetensors")[
            "video"
        ]
        errors[case.name] = (video - expected).abs().max().item()
        assert (tmp_path / case.name / "out.mp4").exists()
    print(json.dumps(errors, indent=2))
    assert max(errors.values()) < 1e-3
    assert not torch.tensor(list(errors.values())).isnan().any()


def test_quantised_weights_are_the_same_on_any_ranks(tmp_path: Path) -> None:
    arguments = [
        *reference_arguments(FIXTURES / "wan2.1-t2v", "unipc", "t2v-1.3B"),
        "dtype=float32",
        "device=cpu",
    ]
    kinds = ("fp8", "int8", "int4")
    table = [
        [
            *arguments,
            f"quant={kind}",
            "fsdp.dit=true",
            "parallel.ulysses=2",
            f"output.dir={tmp_path / kind}",
        ]
        for kind in kinds
    ]
    table.append(
        [
            *arguments,
            "quant=int4",
            "memory.dit=stream",
            "parallel.ring=2",
            f"output.dir={tmp_path / 'streamed'}",
        ]
    )
    codes, told = run_table(table, 2, tmp_path)
    assert codes == [[0] * 4] * 2, told
    codes, told = run_table(
        [[*arguments, f"quant={kind}", f"output.dir={tmp_path / kind}-alone"] for kind in kinds],
        1,
        tmp_path,
    )
    assert codes == [[0] * 3], told

    def video(folder: str) -> torch.Tensor:
        return load_file(tmp_path / folder / "out.safetensors")["video"]

    for kind, folder in (*zip(kinds, kinds, strict=True), ("int4", "streamed")):
        torch.testing.assert_close(video(folder), video(f"{kind}-alone"), rtol=0, atol=1e-3)
