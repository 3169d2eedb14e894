"""Front of a service: the process that answers HTTP requests, started by the first rank; imports no torch.

    python -m wan_dist.service.front < START

START is a pickled `FrontStart`; the front ends when its standard input does, with the rank that started it.
It prints one line of JSON, with the URL that it listens on or what is wrong.
"""

import ipaddress
import json
import os
import pickle
import socket
import sys
import threading

import uvicorn

from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import configure_logging
from wan_dist.service.api import build_app
from wan_dist.service.front_process import FrontStart
from wan_dist.service.video_service import VideoService

_CLOSE_TIMEOUT_SECONDS = 2
"""Seconds that open connections get when the front ends."""
_MAX_CONNECTIONS = 1000
_BACKLOG = 512


def main() -> int:
    """Serve until standard input ends, or a signal comes; returns the exit code."""
    start: FrontStart = pickle.load(sys.stdin.buffer)
    configure_logging()
    try:
        service = VideoService(start.planner, start.run)
        service.open()  # first: this waits for an earlier front, which may have the port
        app = build_app(service)
        listener = _listen(start.planner.config.serve.host, start.port)
    except InputError as error:
        _print_line({"error": str(error)})
        return 2
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=_CLOSE_TIMEOUT_SECONDS,
    )
    server = uvicorn.Server(config)
    threading.Thread(target=_end_with_parent, args=(server,), daemon=True).start()
    _print_line({"url": _format_url(listener)})
    server.run(sockets=[listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise InputError(
            f"serve.host={host} serve.port={port} cannot be listened on: "
            f"{error.strerror or error}; use another serve.port"
        ) from None


def _format_url(listener: socket.socket) -> str:
    address, port = listener.getsockname()[:2]
    name = f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
    return f"http://{name}:{port}"


def _print_line(content: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def _end_with_parent(server: uvicorn.Server) -> None:
    while sys.stdin.buffer.read(4096):
        pass
    server.should_exit = True
    threading.Timer(2 * _CLOSE_TIMEOUT_SECONDS, os._exit, [0]).start()


if __name__ == "__main__":
    sys.exit(main())
