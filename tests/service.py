"""A service of the video API in processes of its own, and its client."""

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch.distributed import TCPStore

from tests.forked import ForkedProcess, list_rank_variables, start_server

TINY = ["task=toy", "dtype=float32", "size=64x48", "frame_num=5", "sample.steps=3", "device=cpu"]
HANG_SECONDS = 120.0
"""Longer than anything takes that is waited for here."""
BOUNDARY = "limit-of-a-part"


class Answer:
    """What the service answers."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return str(self.json["error"]["message"])


class Client:
    """A client of the service at a URL."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.address = urlsplit(url)
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        host, port = self.address.hostname or "", self.address.port
        with closing(http.client.HTTPConnection(host, port, timeout=HANG_SECONDS)) as connection:
            connection.request(method, path, body, self.headers | named)
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())

    def post(self, fields: object, **headers: str) -> Answer:
        body = json.dumps(fields).encode()
        return self.ask("POST", "/v1/videos", body, Content_Type="application/json", **headers)

    def post_form(
        self, fields: dict[str, str], files: dict[str, tuple[str, bytes]] | None = None
    ) -> Answer:
        """Send a form, with files by field: the name that the client gives them, and what is in them."""
        body = b""
        for name, value in fields.items():
            body += (
                f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()
            )
            body += f"{value}\r\n".encode()
        for name, (file_name, content) in (files or {}).items():
            body += f"--{BOUNDARY}\r\nContent-Disposition: form-data; ".encode()
            body += f'name="{name}"; filename="{file_name}"\r\n\r\n'.encode()
            body += content + b"\r\n"
        body += f"--{BOUNDARY}--\r\n".encode()
        content_type = f"multipart/form-data; boundary={BOUNDARY}"
        return self.ask("POST", "/v1/videos", body, Content_Type=content_type)

    def get(self, path: str) -> Any:
        answer = self.ask("GET", path)
        assert answer.status == 200, answer.body
        return answer.json

    def list_ids(self, query: str = "order=asc&limit=100") -> list[str]:
        return [video["id"] for video in self.get(f"/v1/videos?{query}")["data"]]

    def wait(self, video_id: str, status: str = "completed", *, step: int = 0) -> Any:
        """Wait until a video has this state, and as many steps."""
        end = time.monotonic() + HANG_SECONDS
        while time.monotonic() < end:
            video = self.get(f"/v1/videos/{video_id}")
            if video["status"] == status and video["step"] >= step:
                return video
            assert video["status"] not in ("completed", "failed"), video
            time.sleep(0.02)
        raise AssertionError(f"{video_id} is never {status}")

    def follow(self, video_id: str) -> Iterator[tuple[str, Any]]:
        """Yield the events of a video until the service ends them."""
        answer = self.ask("GET", f"/v1/videos/{video_id}/events")
        assert answer.headers["content-type"].startswith("text/event-stream")
        for part in answer.body.decode().strip().split("\n\n"):
            if part.startswith("event: "):
                name, _, data = part.removeprefix("event: ").partition("\ndata: ")
                yield name, json.loads(data)


class Service(Client):
    """Ranks that serve a folder, and a client of theirs."""

    def __init__(self, folder: Path, *arguments: str, num_ranks: int = 1) -> None:
        self.folder, self.log = folder, folder.with_name(f"{folder.name}.log")
        address_file = folder / "service" / "front.json"
        address_file.unlink(missing_ok=True)
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        command = ["wan_dist.run", *TINY, "serve.port=0", f"output.dir={folder}", *arguments]
        variables: list[dict[str, str]] = [{}]
        if num_ranks > 1:
            port = self.store.port
            variables = [list_rank_variables(rank, num_ranks, port) for rank in range(num_ranks)]
        self.ranks: list[ForkedProcess] = [
            start_server().start(command, own_variables, (self.log, self.log))
            for own_variables in variables
        ]
        end = time.monotonic() + HANG_SECONDS
        while not address_file.exists():
            assert all(rank.poll() is None for rank in self.ranks), self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)
        super().__init__(json.loads(address_file.read_text())["url"])

    def find_front(self) -> int:
        """Return the process id of the front, a child of the first rank."""
        parent = self.ranks[0].pid
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = file.read_bytes().split(b"\0")
                status = (file.parent / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if b"wan_dist.service.front" in words and int(status[1]) == parent:
                return int(file.parent.name)
        raise AssertionError("there is no front")

    def send_signal(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(len(self.ranks)):
            if self.ranks[rank].poll() is None:
                os.kill(self.ranks[rank].pid, number)

    def wait_for_end(self) -> list[int]:
        return [rank.wait(HANG_SECONDS) for rank in self.ranks]

    def kill(self) -> None:
        """Kill all ranks, so that nothing can be saved."""
        self.send_signal(signal.SIGKILL)
        self.wait_for_end()

    def stop(self) -> list[int]:
        """Ask the ranks to end, and return their exit codes."""
        self.send_signal(signal.SIGTERM)
        return self.wait_for_end()
