"""Network interface selection for ranks on several hosts.

The interface is the one that routes to the first host, unless one was chosen already.
"""

import os
import re
import socket
import struct
from collections.abc import MutableMapping
from pathlib import Path

from wan_dist.runtime.environment import read_rank_layout, read_text_variable
from wan_dist.runtime.launcher import expand_host_list
from wan_dist.runtime.log import logger

_GLOO_INTERFACE_VARIABLE, _NCCL_INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_LOOPBACK_INTERFACE = "lo"
_VIRTUAL_INTERFACE_PATTERN = re.compile(
    r"lo$|docker|veth|virbr|br-|cni|flannel|cali|tailscale|wg|tun|tap|podman|kube"
)
_INFINIBAND_FOLDER = Path("/sys/class/infiniband")
_ROUTING_TABLE_FILE = Path("/proc/net/route")
_SIOCGIFFLAGS, _SIOCGIFADDR, _IFF_UP = 0x8913, 0x8915, 1  # linux/sockios.h, linux/if.h


def list_network_interfaces() -> list[str]:
    """Return the names of the interfaces that are up, have an IPv4 address and may reach other machines."""
    names = [
        name for _, name in socket.if_nameindex() if not _VIRTUAL_INTERFACE_PATTERN.match(name)
    ]
    return [name for name in names if _is_interface_up(name) and get_ipv4_address(name)]


def get_ipv4_address(interface: str) -> str:
    """Return the interface's IPv4 address, or an empty string."""
    reply = _query_interface(interface, _SIOCGIFADDR)
    return socket.inet_ntoa(reply[20:24]) if reply else ""


def list_infiniband_devices() -> list[str]:
    """Return the names of the InfiniBand and RoCE devices."""
    return sorted(file.name for file in _INFINIBAND_FOLDER.glob("*"))


def _is_interface_up(interface: str) -> bool:
    reply = _query_interface(interface, _SIOCGIFFLAGS)
    return bool(reply) and bool(struct.unpack("16xH", reply[:18])[0] & _IFF_UP)


def _query_interface(interface: str, request: int) -> bytes:
    from fcntl import ioctl  # not on Windows

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp_socket:
        try:
            return ioctl(udp_socket, request, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return b""


def choose_network_interface(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the interface that gloo and NCCL use, for several ranks; variables that are set already stay.

    By default, gloo takes the interface of the host's own name, on many systems the loopback, which no other
    host reaches. NCCL takes InfiniBand first if there is any, and otherwise any interface, also those of
    containers. Ranks on one host do without its name, which may not resolve.
    """
    ranks = read_rank_layout(environ)
    if ranks.num_ranks == 1:
        return
    if ranks.ranks_per_node == ranks.num_ranks:
        _use_loopback_interface(environ)
        return
    if _GLOO_INTERFACE_VARIABLE in environ and _NCCL_INTERFACE_VARIABLE in environ:
        return
    interface_names = list_network_interfaces()
    other_hosts = [
        read_text_variable("MASTER_ADDR", environ),
        *expand_host_list(read_text_variable("SLURM_STEP_NODELIST", environ)),
    ]
    name = next(
        (name for host in other_hosts if (name := _find_interface_to_host(host, interface_names))),
        None,
    ) or _find_default_interface(interface_names)
    if name is None:
        return
    environ.setdefault(_GLOO_INTERFACE_VARIABLE, name)
    if not list_infiniband_devices():
        environ.setdefault(_NCCL_INTERFACE_VARIABLE, name)
    if len(interface_names) > 1:
        logger.info(
            "network   %s (found %s); set %s and %s to use another",
            environ[_GLOO_INTERFACE_VARIABLE],
            ", ".join(interface_names),
            _GLOO_INTERFACE_VARIABLE,
            _NCCL_INTERFACE_VARIABLE,
        )


def _use_loopback_interface(environ: MutableMapping[str, str]) -> None:
    """Set gloo's interface to the loopback, and MASTER_ADDR to its address if it is this host's name."""
    if not _is_interface_up(_LOOPBACK_INTERFACE) or not get_ipv4_address(_LOOPBACK_INTERFACE):
        return
    environ.setdefault(_GLOO_INTERFACE_VARIABLE, _LOOPBACK_INTERFACE)
    if (
        read_text_variable("MASTER_ADDR", environ).partition(".")[0]
        == socket.gethostname().partition(".")[0]
    ):
        environ["MASTER_ADDR"] = get_ipv4_address(_LOOPBACK_INTERFACE)


def _find_interface_to_host(host: str, interface_names: list[str]) -> str | None:
    """Return the interface that routes to the host; None if that is this host, or not known."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp_socket:
            udp_socket.connect((host, 1))  # sends nothing
            address = udp_socket.getsockname()[0]
    except OSError:
        return None
    return next((name for name in interface_names if get_ipv4_address(name) == address), None)


def _find_default_interface(interface_names: list[str]) -> str | None:
    """Return the only interface, or that of the default route; None if there is neither."""
    try:
        routes = [line.split() for line in _ROUTING_TABLE_FILE.read_text().splitlines()[1:]]
    except OSError:
        routes = []
    default_interfaces = [
        route[0] for route in routes if route[1] == "00000000" and route[0] in interface_names
    ]
    return interface_names[0] if len(interface_names) == 1 else next(iter(default_interfaces), None)
