"""Two hosts on this machine: two ranks on each, on misleading networks, and with the link cut in mid-run."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import FIXTURES
from tests.forked import HANG_SECONDS, ForkServer
from tests.hosts.network import HOSTS, Network, NetworkError, find_missing
from tests.test_command import reference_arguments

ROOT = Path(__file__).parents[2]
TIMEOUT = 10.0
MISSING = find_missing()

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@contextmanager
def network_in(folder: Path, *, is_misleading: bool = False) -> Iterator[Network]:
    network = Network(folder, is_misleading=is_misleading)
    try:
        try:
            network.build()
        except NetworkError as error:
            pytest.skip(f"no network can be built here: {error}")
        yield network
    finally:
        network.close()


def launch_arguments(arguments: list[str]) -> list[str]:
    """Return torchrun's arguments, the same on each host, for two ranks on each."""
    meeting = ["--rdzv_id=test", "--rdzv_backend=c10d", "--rdzv_endpoint=host1:29411"]
    return ["--nnodes=2", "--nproc_per_node=2", *meeting, "-m", "wan_dist.run", *arguments]


def read_logs(folder: Path) -> dict[str, str]:
    return {host: (folder / f"{host}.log").read_text() for host in HOSTS}


def test_hosts_with_two_networks_and_misleading_names_make_the_references_video(
    tmp_path: Path,
) -> None:
    arguments = [
        *reference_arguments(FIXTURES / "wan2.1-t2v", "unipc", "t2v-1.3B"),
        *("dtype=float32", "device=cpu", "parallel.cfg=1", "cache.dir=null"),
        f"output.dir={tmp_path / 'out'}",
    ]
    with network_in(tmp_path, is_misleading=True) as network:
        servers = {host: ForkServer({}, network.command(host)) for host in HOSTS}
        torchruns = [
            server.start(
                ["tests.forked_torchrun", *launch_arguments(arguments)],
                {},
                (tmp_path / f"{host}.log", tmp_path / f"{host}.log"),
            )
            for host, server in servers.items()
        ]
        codes = [torchrun.wait(HANG_SECONDS) for torchrun in torchruns]
        for server in servers.values():
            server.close()
    told = read_logs(tmp_path)
    assert codes == [0, 0], told
    assert "network   eth0 (found eth0, eth1);" in told["host1"]
    assert "dp 1 x cfg 1 x ring 2 x ulysses 2" in told["host1"]
    video = load_file(tmp_path / "out/out.safetensors")["video"]
    expected = load_file(FIXTURES / "wan2.1-t2v/expected/unipc.safetensors")["video"]
    assert (video - expected).abs().max() < 1e-3


def start_torchrun(
    network: Network, host: str, folder: Path, arguments: list[str]
) -> subprocess.Popen[bytes]:
    """Start a real torchrun on a host."""
    own: Mapping[str, str] = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    with (folder / f"{host}.log").open("wb") as log:
        return subprocess.Popen(
            [
                *network.command(host),
                sys.executable,
                "-m",
                "torch.distributed.run",
                *launch_arguments(arguments),
            ],
            cwd=folder,
            env=os.environ | own,
            stdout=log,
            stderr=log,
        )


def test_a_cut_link_ends_both_hosts_in_time(tmp_path: Path) -> None:
    toy = [
        *("task=toy", "size=64*64", "frame_num=33", "sample.steps=1000", "device=cpu"),
        f"parallel.timeout={TIMEOUT}",
    ]
    with network_in(tmp_path) as network:
        torchruns = [start_torchrun(network, host, tmp_path, toy) for host in HOSTS]
        end = time.monotonic() + HANG_SECONDS
        while "] attention" not in read_logs(tmp_path)["host1"]:
            assert all(torchrun.poll() is None for torchrun in torchruns), read_logs(tmp_path)
            assert time.monotonic() < end, read_logs(tmp_path)
            time.sleep(0.2)
        time.sleep(2)  # it is denoising now
        network.set_link("host2", "down")
        cut = time.perf_counter()
        codes = [torchrun.wait(HANG_SECONDS) for torchrun in torchruns]
        took = time.perf_counter() - cut
    assert 0 not in codes
    for host, told in read_logs(tmp_path).items():
        assert "wan_dist: error:" in told, (host, told[-2000:])
        assert f"on {host})" in told
        assert "; in stage denoise" in told
        assert "(waiting for rank" in told
    print(f"both ended {took:.0f} s after the cut")
    assert took < 180  # the limit, and 20 s of patience with torchrun, which alone takes 924 s
