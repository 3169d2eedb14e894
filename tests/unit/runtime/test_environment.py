"""The variables of a launcher: all of a set or none, and none that contradict each other."""

import subprocess
import sys

import pytest

from wan_dist.run import main
from wan_dist.runtime.environment import (
    RankLayout,
    detect_launcher,
    read_number_variable,
    read_rank_layout,
    silence_library_warnings,
)
from wan_dist.runtime.errors import InputError

WHOLE = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


CONNECT_TO_NOBODY = """
import os, sys
from datetime import timedelta
from wan_dist.runtime.environment import silence_library_warnings
if sys.argv[1:]:
    silence_library_warnings(os.environ)
from torch.distributed import TCPStore
try:
    TCPStore("127.0.0.1", 1, is_master=False, timeout=timedelta(seconds=1))
except Exception as error:
    print(type(error).__name__)
"""
"""A program whose C++ code logs warnings: nothing listens at port 1."""


def test_warnings_of_pytorchs_cpp_code_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)  # set by a run in this process
    command = [sys.executable, "-c", CONNECT_TO_NOBODY]
    loud, quiet = (
        subprocess.run([*command, *words], capture_output=True, text=True, check=True)
        for words in ([], ["quiet"])
    )
    assert "[W" in loud.stderr
    assert "[W" not in quiet.stderr
    assert loud.stdout == quiet.stdout != ""
    for environ in ({"TORCH_CPP_LOG_LEVEL": "INFO"}, {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}):
        asked = dict(environ)
        silence_library_warnings(environ)
        assert environ == asked


def test_a_whole_set() -> None:
    assert read_rank_layout(WHOLE) == RankLayout(5, 8, 1, 4)


def test_without_counts_of_nodes_there_is_one_node() -> None:
    assert read_rank_layout(
        {key: value for key, value in WHOLE.items() if key != "LOCAL_WORLD_SIZE"}
    ) == RankLayout(5, 8, 1, 8)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": ""},
        {"RANK": "", "WORLD_SIZE": "  ", "LOCAL_RANK": ""},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "none"},
    ],
)
def test_one_rank(environment: dict[str, str]) -> None:
    assert read_rank_layout(environment) == RankLayout()


@pytest.mark.parametrize("gone", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("empty", [False, True])
def test_half_a_set_is_refused(gone: str, empty: bool) -> None:
    rest = {key: value for key, value in WHOLE.items() if key != gone} | (
        {gone: ""} if empty else {}
    )
    with pytest.raises(InputError, match=f"without {gone}: .*unset RANK WORLD_SIZE"):
        read_rank_layout(rest)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "8"}, "RANK=8 with WORLD_SIZE=8"),
        ({"RANK": "-1"}, "RANK=-1 in the environment is not a whole number"),
        ({"WORLD_SIZE": "eight"}, "WORLD_SIZE=eight in the environment is not a whole number"),
        ({"WORLD_SIZE": "8.0"}, "WORLD_SIZE=8.0"),
        ({"WORLD_SIZE": "٨"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ({"RANK": "9" * 30}, "RANK=9"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, str], message: str) -> None:
    with pytest.raises(InputError) as refused:
        read_rank_layout(WHOLE | changed)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "3"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "0"}, {"LOCAL_WORLD_SIZE": "2"}],
)
def test_the_command_says_it_in_a_line(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert main(["task=toy"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"wan_dist: error: {'='.join(*environment.items())} in the environment without "
    )


@pytest.mark.parametrize(
    ("text", "number"), [("", None), ("  ", None), ("0", 0), (" 7 ", 7), ("007", 7)]
)
def test_numbers(text: str, number: int | None) -> None:
    assert read_number_variable("KEY", {"KEY": text}) == number


def test_who_started_it() -> None:
    assert detect_launcher({}) is None
    assert detect_launcher(WHOLE) is None
    task = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}
    assert detect_launcher(WHOLE | task) == "srun"
    assert detect_launcher(task) is None  # a shell, or a script of sbatch
    assert detect_launcher(WHOLE | task | {"TORCHELASTIC_RUN_ID": "x"}) == "torchrun"
