"""Which network is taken where there are several."""

import pytest

from wan_dist.runtime import network
from wan_dist.runtime.network import choose_network_interface

ADDRESSES = {"lo": "127.0.0.1", "eth0": "10.0.0.5", "ib0": "10.9.0.5"}
ROUTES = {"head": "10.9.0.5", "gpu2": "10.9.0.5", "elsewhere": "10.0.0.5", "itself": "127.0.0.1"}

TWO_HOSTS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_PORT": "29500",
}


class Socket:
    """A socket whose packets go the ways of ROUTES."""

    def __init__(self, *kind: int) -> None: ...

    def __enter__(self) -> "Socket":
        return self

    def __exit__(self, *fault: object) -> None: ...

    def connect(self, place: tuple[str, int]) -> None:
        if place[0] not in ROUTES:
            raise OSError("not known")
        self.address = ROUTES[place[0]]

    def getsockname(self) -> tuple[str, int]:
        return self.address, 1


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "list_network_interfaces", lambda: ["eth0", "ib0"])
    monkeypatch.setattr(network, "_is_interface_up", ADDRESSES.__contains__)
    monkeypatch.setattr(network, "get_ipv4_address", ADDRESSES.__getitem__)
    monkeypatch.setattr(network.socket, "socket", Socket)


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({"MASTER_ADDR": "head"}, "ib0"),
        ({"MASTER_ADDR": "elsewhere"}, "eth0"),
        ({"MASTER_ADDR": "itself", "SLURM_STEP_NODELIST": "itself,gpu[2-3]"}, "ib0"),
        ({"MASTER_ADDR": "head", "GLOO_SOCKET_IFNAME": "eth0"}, "eth0"),
    ],
)
def test_the_network_that_leads_to_the_others(given: dict[str, str], chosen: str) -> None:
    environment = TWO_HOSTS | given
    choose_network_interface(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == chosen
    assert "NCCL_SOCKET_IFNAME" in environment


@pytest.mark.parametrize("ranks", [{}, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}])
def test_one_host_needs_no_network(ranks: dict[str, str]) -> None:
    environment = {"MASTER_ADDR": "head", **(TWO_HOSTS | ranks if ranks else {})}
    choose_network_interface(environment)
    assert environment.get("GLOO_SOCKET_IFNAME") == ("lo" if ranks else None)
    assert "NCCL_SOCKET_IFNAME" not in environment
    assert environment["MASTER_ADDR"] == "head"


@pytest.mark.parametrize("name", ["nobody-knows-this", "nobody-knows-this.domain"])
def test_one_host_does_without_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.socket, "gethostname", lambda: "nobody-knows-this")
    environment = TWO_HOSTS | {"LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": name}
    choose_network_interface(environment)
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_nccl_takes_infiniband_by_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("infiniband")
    (folder / "mlx5_0").touch()
    monkeypatch.setattr(network, "_INFINIBAND_FOLDER", folder)
    environment = TWO_HOSTS | {"MASTER_ADDR": "head"}
    choose_network_interface(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "ib0"
    assert "NCCL_SOCKET_IFNAME" not in environment
