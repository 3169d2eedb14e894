"""Two hosts as network namespaces on this machine: two ranks on each, and the link between them cut
in mid-run.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import FIXTURES
from tests.forked import HANG_SECONDS
from tests.test_command import reference_arguments

SCRIPTS = Path(__file__).parents[3] / "shared" / "slurm"
TIMEOUT = 10.0

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not SCRIPTS.is_dir(),
    reason="needs root and the scripts that build a test network, beside the checkout",
)


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    settings = {
        "NETNS_DIR": str(tmp_path / "net"),
        "NETNS_PREFIX": f"wd{os.getpid() % 10000}",
        "NETNS_SUBNET": f"10.231.{os.getpid() % 250}",
        "TORCHRUN": str(Path(sys.executable).with_name("torchrun")),
        "RDZV_PORT": "29411",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    done = subprocess.run(
        ["bash", SCRIPTS / "netns_up.sh"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no test network can be built here: {done.stderr[-300:]}")
    yield tmp_path
    subprocess.run(["bash", SCRIPTS / "netns_down.sh"], capture_output=True, check=False)


SECOND_NETWORK = """
for number in 1 2; do
  host=$NETNS_PREFIX-host$number
  ip -n "$host" link add eth1 type veth peer name other
  ip -n "$host" addr add 10.232.0.1/24 dev eth1
  ip -n "$host" link set eth1 up
  ip -n "$host" link set other up
  ip -n "$host" route add default dev eth0
done
"""
NAMED_AS_LOOPBACK = """#!/bin/bash
sed "s/^[0-9.]* $(hostname)$/127.0.1.1 $(hostname)/" /etc/hosts > "$HOSTS_OF_ITS_OWN.$(hostname)"
mount --bind "$HOSTS_OF_ITS_OWN.$(hostname)" /etc/hosts
unset GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME
exec "$RIGHT_TORCHRUN" "$@"
"""


def test_hosts_with_two_networks_and_misleading_names_find_each_other(
    network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second network leads nowhere, and a host's own name to its loopback, as Debian has it."""
    subprocess.run(["bash", "-euc", SECOND_NETWORK], check=True)
    launcher = network / "torchrun"
    launcher.write_text(NAMED_AS_LOOPBACK)
    launcher.chmod(0o755)
    monkeypatch.setenv("HOSTS_OF_ITS_OWN", str(network / "hosts"))
    monkeypatch.setenv("RIGHT_TORCHRUN", os.environ["TORCHRUN"])
    monkeypatch.setenv("TORCHRUN", str(launcher))
    toy = [
        "task=toy",
        "size=64*48",
        "frame_num=5",
        "sample.steps=2",
        "device=cpu",
        "parallel.timeout=30",
        f"output.dir={network / 'out'}",
    ]
    job = start(network, toy)
    job.communicate(timeout=HANG_SECONDS)
    told = logs(network)
    assert job.returncode == 0, told
    assert "network   eth0 of eth0, eth1;" in told["host1"]


def start(network: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [
        "bash",
        str(SCRIPTS / "netns_torchrun.sh"),
        str(network / "logs"),
        "-m",
        "wan_dist.run",
        *arguments,
    ]
    return subprocess.Popen(command, cwd=network, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def logs(network: Path) -> dict[str, str]:
    return {host: (network / f"logs/{host}.log").read_text() for host in ("host1", "host2")}


def test_two_hosts_make_the_reference_implementations_video(network: Path) -> None:
    arguments = reference_arguments(FIXTURES / "wan2.1-t2v", "unipc", "t2v-1.3B")
    job = start(
        network,
        [
            *arguments,
            "dtype=float32",
            "device=cpu",
            "parallel.cfg=1",
            f"output.dir={network / 'out'}",
        ],
    )
    job.communicate(timeout=HANG_SECONDS)
    told = logs(network)
    assert job.returncode == 0, told
    assert "dp 1 x cfg 1 x ring 2 x ulysses 2" in told["host1"]
    video = load_file(network / "out/out.safetensors")["video"]
    expected = load_file(FIXTURES / "wan2.1-t2v/expected/unipc.safetensors")["video"]
    assert (video - expected).abs().max() < 1e-3


def test_a_cut_link_ends_both_hosts_in_time(network: Path) -> None:
    toy = [
        "task=toy",
        "size=256*256",
        "frame_num=81",
        "sample.steps=1000",
        "device=cpu",
        f"parallel.timeout={TIMEOUT}",
    ]
    job = start(network, toy)
    for _ in range(120):
        time.sleep(0.5)
        if "] load  " in (network / "logs/host1.log").read_text():
            break
    time.sleep(2)
    subprocess.run(["bash", SCRIPTS / "netns_link.sh", "host2", "down"], check=True)
    cut = time.perf_counter()
    job.communicate(timeout=HANG_SECONDS)
    took = time.perf_counter() - cut
    assert job.returncode != 0
    for host, told in logs(network).items():
        assert "wan_dist: error:" in told, (host, told[-2000:])
        assert f"on {host})" in told
        assert "; in stage denoise" in told
        assert "(waiting for rank" in told
    print(f"both ended {took:.0f} s after the cut")
    assert (
        took < 180
    )  # the limit, 20 s of patience with torchrun, and the rest; torchrun alone takes 924 s
