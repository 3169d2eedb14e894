"""Two hosts on this machine: network namespaces joined by a cable (veth), with a name and an /etc/hosts of
their own; needs root and iproute2.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

HOSTS = ("host1", "host2")
PACKAGES = "iproute2"
SYSTEM_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
ON_HOST = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


class NetworkError(Exception):
    """The network cannot be built here."""


def find_missing() -> str | None:
    """Return why no network can be built here, None if it can be tried."""
    if os.geteuid() != 0:
        return "hosts on this machine need root, for their namespaces"
    return None if shutil.which("ip", path=SYSTEM_PATH) else f"no ip; Debian's package: {PACKAGES}"


class Network:
    """Two hosts, host1 and host2, whose eth0 have the addresses 10.231.0.1 and 10.231.0.2.

    A misleading one has a second network on each host, which leads nowhere, and a host's own name leads to
    its loopback there, as Debian has it.
    """

    def __init__(self, folder: Path, *, is_misleading: bool = False) -> None:
        kind = "misleading" if is_misleading else "plain"
        self.namespaces = {host: f"wan-{os.getpid()}-{kind}-{host}" for host in HOSTS}
        self.is_misleading = is_misleading
        self.folder = folder

    def build(self) -> None:
        """Build the network; raises NetworkError."""
        addresses = {host: f"10.231.0.{number}" for number, host in enumerate(HOSTS, start=1)}
        for own in HOSTS:
            known = addresses | ({own: "127.0.1.1"} if self.is_misleading else {})
            lines = [f"{address} {host}\n" for host, address in known.items()]
            (self.folder / f"hosts-of-{own}").write_text("".join(["127.0.0.1 localhost\n", *lines]))
        for namespace in self.namespaces.values():
            self.ip("netns", "add", namespace)
        first, second = self.namespaces.values()
        cable = ["type", "veth", "peer", "name", "eth0", "netns", second]
        self.ip("link", "add", "eth0", "netns", first, *cable)
        for host, address in addresses.items():
            self.ip("-n", self.namespaces[host], "addr", "add", f"{address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                self.set_link(host, "up", interface)
            if self.is_misleading:
                self._add_second_network(host)

    def _add_second_network(self, host: str) -> None:
        inside = ["-n", self.namespaces[host]]
        self.ip(*inside, *["link", "add", "eth1", "type", "veth", "peer", "name", "other"])
        self.ip(*inside, *["addr", "add", "10.232.0.1/24", "dev", "eth1"])
        for interface in ("eth1", "other"):
            self.set_link(host, "up", interface)
        self.ip(*inside, *["route", "add", "default", "dev", "eth0"])

    def ip(self, *words: str) -> str:
        done = subprocess.run(
            ["ip", *words],
            env=os.environ | {"PATH": SYSTEM_PATH},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise NetworkError(f"ip {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def set_link(self, host: str, state: str, interface: str = "eth0") -> None:
        """Take a host's interface up or down."""
        self.ip("-n", self.namespaces[host], "link", "set", interface, state)

    def command(self, host: str) -> list[str]:
        """Return the words that run the command after them on a host, as the same process."""
        network = f"--net=/run/netns/{self.namespaces[host]}"
        own = ["unshare", "--mount", "--uts", "--propagation", "private"]
        be_host = ["bash", "-euc", ON_HOST, "bash", host, str(self.folder / f"hosts-of-{host}")]
        return ["nsenter", network, *own, "--", *be_host]

    def close(self) -> None:
        """Kill what still runs on the hosts, which would keep them alive, and remove them."""
        for namespace in self.namespaces.values():
            if not Path("/run/netns", namespace).exists():
                continue
            for _ in range(100):
                processes = [int(word) for word in self.ip("netns", "pids", namespace).split()]
                if not processes:
                    break
                for process in processes:
                    os.kill(process, signal.SIGKILL)
                time.sleep(0.1)
            self.ip("netns", "delete", namespace)
