"""Which of several networks the ranks of several hosts use: the one that leads to the first host, unless it was chosen already."""

import os
import re
import socket
import struct
from collections.abc import MutableMapping
from pathlib import Path

from wan_dist.runtime.environment import read_ranks, text_of
from wan_dist.runtime.launcher import hosts_of
from wan_dist.runtime.log import logger

_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_LOOPBACK = "lo"
_VIRTUAL = re.compile(r"lo$|docker|veth|virbr|br-|cni|flannel|cali|tailscale|wg|tun|tap|podman|kube")
_INFINIBAND = Path("/sys/class/infiniband")
_ROUTES = Path("/proc/net/route")
_SIOCGIFFLAGS, _SIOCGIFADDR, _IFF_UP = 0x8913, 0x8915, 1  # linux/sockios.h, linux/if.h


def interfaces() -> list[str]:
    """Return the network interfaces that are up, have an IPv4 address and may lead to other machines, by name."""
    names = [name for _, name in socket.if_nameindex() if not _VIRTUAL.match(name)]
    return [name for name in names if _is_up(name) and address_of(name)]


def address_of(interface: str) -> str:
    """Return the interface's IPv4 address, or nothing."""
    answer = _ask(interface, _SIOCGIFADDR)
    return socket.inet_ntoa(answer[20:24]) if answer else ""


def infiniband() -> list[str]:
    """Return the InfiniBand and RoCE devices, by name."""
    return sorted(file.name for file in _INFINIBAND.glob("*"))


def _is_up(interface: str) -> bool:
    answer = _ask(interface, _SIOCGIFFLAGS)
    return bool(answer) and bool(struct.unpack("16xH", answer[:18])[0] & _IFF_UP)


def _ask(interface: str, what: int) -> bytes:
    from fcntl import ioctl  # not on Windows

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            return ioctl(one, what, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return b""


def choose_network(environment: MutableMapping[str, str] = os.environ) -> None:
    """Name the interface that gloo and NCCL use, for several ranks; what is set already stays.

    Gloo else takes the one that the host's own name leads to, on many systems the loopback, which no other host reaches. NCCL takes
    InfiniBand first where it is, and else any, also those of containers. Ranks on one host do without its name, which nobody may know.
    """
    ranks = read_ranks(environment)
    if ranks.num_ranks == 1:
        return
    if ranks.ranks_per_node == ranks.num_ranks:
        _stay_on_host(environment)
        return
    if _GLOO in environment and _NCCL in environment:
        return
    found = interfaces()
    others = [text_of("MASTER_ADDR", environment), *hosts_of(text_of("SLURM_STEP_NODELIST", environment))]
    name = next((name for host in others if (name := _towards(host, found))), None) or _way_out(found)
    if name is None:
        return
    environment.setdefault(_GLOO, name)
    if not infiniband():
        environment.setdefault(_NCCL, name)
    if len(found) > 1:
        logger.info("network   %s of %s; %s and %s choose another", environment[_GLOO], ", ".join(found), _GLOO, _NCCL)


def _stay_on_host(environment: MutableMapping[str, str]) -> None:
    """Have the ranks of one host meet at its loopback, where they would look for its own name, and send there with gloo."""
    if not _is_up(_LOOPBACK) or not address_of(_LOOPBACK):
        return
    environment.setdefault(_GLOO, _LOOPBACK)
    if text_of("MASTER_ADDR", environment).partition(".")[0] == socket.gethostname().partition(".")[0]:
        environment["MASTER_ADDR"] = address_of(_LOOPBACK)


def _towards(host: str, found: list[str]) -> str | None:
    """Return the interface by which packets go to the host; None if that is this one, or not known."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.connect((host, 1))  # sends nothing
            address = one.getsockname()[0]
    except OSError:
        return None
    return next((name for name in found if address_of(name) == address), None)


def _way_out(found: list[str]) -> str | None:
    """Return the only interface, or that of the route to anywhere."""
    try:
        rows = [line.split() for line in _ROUTES.read_text().splitlines()[1:]]
    except OSError:
        rows = []
    ways = [row[0] for row in rows if row[1] == "00000000" and row[0] in found]
    return found[0] if len(found) == 1 else next(iter(ways), None)
