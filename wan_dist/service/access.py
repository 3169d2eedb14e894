"""Access to the API: token or loopback alone, and a limit of a request's size, before any route is called."""

import hmac
import json
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wan_dist.config.sections import ServeConfig
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.text_files import UnreadableFileError, read_text_file

_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
_MIN_TOKEN_CHARACTERS = 16
_MAX_TOKEN_BYTES = 4096
_OPEN_PATHS = ("/", "/health")
"""Paths that need no token: they tell nothing of the videos."""


def read_token(config: ServeConfig) -> str | None:
    """Return the token that requests must have, None without one; raises InputError."""
    if config.token_file is None:
        return None
    path = Path(config.token_file).expanduser()
    try:
        token = read_text_file(path, max_bytes=_MAX_TOKEN_BYTES).strip()
    except UnreadableFileError as error:
        raise InputError(f"serve.token_file={path} cannot be read: {error}") from None
    if len(token) < _MIN_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable():
        raise InputError(
            f"serve.token_file={path} has no token of {_MIN_TOKEN_CHARACTERS} or more ASCII characters; "
            "make one with: openssl rand -hex 32"
        )
    return token


class AccessControl:
    """ASGI middleware that answers requests without access, or that are too large.

    Without a token the API is for programs of this machine. A page in a browser on it is none of them: its
    requests name their origin, or another host, and are refused.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, host: str, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes
        self._token = None if token is None else token.encode()
        self._host_names = {*_LOOPBACK_NAMES, host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        if (
            scope["path"] not in _OPEN_PATHS
            and (refusal := self._find_refusal(headers)) is not None
        ):
            await _send_error(send, *refusal)
            return
        content_length = headers.get("content-length", b"0")
        if not content_length.isdigit() or int(content_length) > self.max_bytes:
            await _send_error(send, 413, self._describe_limit())
            return
        await self.app(scope, self._limit_body(receive), send)

    def _find_refusal(self, headers: dict[str, bytes]) -> tuple[int, str] | None:
        """Return the status and message for a request without access, None for others."""
        if self._token is not None:
            scheme, _, credentials = headers.get("authorization", b"").partition(b" ")
            is_right = hmac.compare_digest(credentials.strip(), self._token)
            if scheme.lower() == b"bearer" and is_right:
                return None
            return 401, "a token is missing or wrong; send Authorization: Bearer TOKEN"
        if not _is_host_among(headers.get("host", b""), self._host_names):
            return 403, "without serve.token_file the service answers to loopback addresses only"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return 403, "without serve.token_file pages of other sites cannot use the service"
        return None

    def _limit_body(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def receive_within_limit() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise HTTPException(413, self._describe_limit())
            return message

        return receive_within_limit

    def _describe_limit(self) -> str:
        return f"the request is larger than {self.max_bytes / 2**20:.4g} MiB (serve.max_upload_mib)"


def _is_host_among(host: bytes, names: Collection[str]) -> bool:
    """Whether a Host header, with or without a port, names one of these hosts."""
    try:
        return urlsplit(f"//{host.decode('latin-1')}").hostname in names
    except ValueError:
        return False


def build_error(message: str, code: str, *, is_ours: bool = False) -> dict[str, object]:
    """Return an error as OpenAI's API has it; ``is_ours``: the request is not to blame."""
    error_type = "server_error" if is_ours else "invalid_request_error"
    return {"error": {"message": message, "type": error_type, "param": None, "code": code}}


async def _send_error(send: Send, status: int, message: str) -> None:
    codes = {401: "unauthorized", 403: "forbidden", 413: "too_large"}
    body = json.dumps(build_error(message, codes[status])).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
