"""Client of the video API for Python programs; the standard library alone, so that it starts at once."""

import base64
import http.client
import io
import json
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from wan_dist.runtime.atomic_write import atomic_write
from wan_dist.runtime.errors import InputError, format_message
from wan_dist.service.upload_fields import UPLOAD_FIELDS

_DELETE_TIMEOUT_SECONDS = 150.0
"""The service answers once the video's step is done, after two minutes at most."""
_OUTAGE_SECONDS = 600.0
"""Seconds without an answer that `RequestedVideo.wait` sits out: a service may be restarted meanwhile."""
_OUTAGE_STATUSES = (None, 502, 503, 504)
"""Of a service that is not there, and of a reverse proxy before it."""
_CHUNK_BYTES = 2**20


class ServiceError(Exception):
    """The service has refused a request, has failed to make a video, or does not answer.

    The message is one line: the service's own where there is one.
    """

    def __init__(
        self, message: object, *, status: int | None = None, code: str | None = None
    ) -> None:
        super().__init__(format_message(message))
        self.status = status
        """HTTP status; None without an answer."""
        self.code = code
        """What kind of error it is, for programs: ``invalid_value``, ``queue_full``, ``timeout``..."""


class VideoClient:
    """A service of `wan-dist serve` at a URL.

    ``timeout_seconds`` limits connecting, and each wait for a part of an answer.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        token: str | None = None,
        timeout_seconds: float = 60.0,
    ) -> None:
        """Remember where the service is, without asking it; raises InputError."""
        self.url = url.rstrip("/")
        try:
            parts = urlsplit(self.url)
            self._host = parts.hostname or ""
            self._port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        except (ValueError, KeyError):
            self._host = ""
        if not self._host or parts.query or parts.username:
            raise InputError(f"url={url} is no address of a service, as http://127.0.0.1:8000")
        self._is_encrypted, self._path_prefix = parts.scheme == "https", parts.path
        self._headers = {"Connection": "close"}  # each answer then owns its connection
        if token is not None:
            self._headers["Authorization"] = f"Bearer {_check_header('token', token.strip())}"
        self._timeout_seconds = timeout_seconds

    def submit(
        self, prompt: str, *, idempotency_key: str | None = None, **settings: Any
    ) -> "RequestedVideo":
        """Ask for a video, which the service begins with when those before it are done.

        ``settings`` are the fields of a request: ``seed=7``, ``num_frames=81``, ``size="832x480"``, and
        settings of one video as in Python's pipeline, ``sample={"steps": 4}``. Files are ``image=``,
        ``first_frame=``, ``last_frame=`` or ``input_reference=``: a path, bytes or a Pillow image. With an
        ``idempotency_key`` the same call may be repeated without a second video. Raises InputError for a
        file that cannot be read, and ServiceError for what the service refuses.
        """
        fields = {"prompt": prompt} | _flatten_fields(settings)
        headers = {"Content-Type": "application/json"}
        if idempotency_key is not None:
            headers["Idempotency-Key"] = _check_header("idempotency_key", idempotency_key)
        try:
            body = json.dumps(fields, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"a setting cannot be sent as JSON: {error}") from None
        return RequestedVideo(self, self._read_json("POST", "", body=body, headers=headers))

    def get(self, video_id: str) -> "RequestedVideo":
        """Return a video that was asked for earlier, by its id; raises ServiceError."""
        return RequestedVideo(self, self._read_state(video_id))

    def _read_state(self, video_id: str) -> dict[str, Any]:
        return self._read_json("GET", f"/{quote(video_id, safe='')}")

    def _read_json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        with closing(self._send(method, path, **options)) as response:
            content = _read_part(response, None)
        with suppress(ValueError):
            answer = json.loads(content)
            if isinstance(answer, dict) and "id" in answer:
                return answer
        raise ServiceError(f"{self.url} has answered what is no video", status=response.status)

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
    ) -> http.client.HTTPResponse:
        """Return the answer to a request, to be closed by the caller; raises ServiceError."""
        connection = self._open_connection(timeout_seconds or self._timeout_seconds)
        full_path = f"{self._path_prefix}/v1/videos{path}"
        try:
            connection.connect()
            # refused before all of it was sent: the answer says why
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, full_path, body, self._headers | dict(headers or {}))
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ServiceError(self._describe_outage(error, len(body or b""))) from error
        if response.status >= 300:
            with closing(response):
                raise _read_error(response, self.url)
        return response

    def _open_connection(self, timeout_seconds: float) -> http.client.HTTPConnection:
        address = (self._host, self._port)
        if not self._is_encrypted:
            return http.client.HTTPConnection(*address, timeout=timeout_seconds)
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(*address, timeout=timeout_seconds, context=context)

    def _describe_outage(self, error: Exception, num_bytes: int) -> str:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, TimeoutError):
            return f"{self.url} does not answer: {reason} (timeout_seconds)"
        if isinstance(error, ConnectionRefusedError):
            return f"{self.url} does not answer: {reason}; start it with wan-dist serve task=TASK"
        if isinstance(error, ConnectionError) and num_bytes > _CHUNK_BYTES:
            return (
                f"{self.url} does not answer: {reason}, with {num_bytes / 2**20:.3g} MiB to send; "
                "serve.max_upload_mib limits a request"
            )
        return f"{self.url} does not answer: {reason}"


class RequestedVideo:
    """A video that a service makes: its state as last heard, and what can be done with it."""

    def __init__(self, client: VideoClient, state: dict[str, Any]) -> None:
        self._client, self.state = client, state
        """The service's own words: ``seed``, ``size``, ``seconds``, ``step``, ``num_steps``..."""

    def __repr__(self) -> str:
        return f"<RequestedVideo {self.id}: {self.status}, {self.progress} %>"

    @property
    def id(self) -> str:
        """The id under which `VideoClient.get` finds it again."""
        return str(self.state["id"])

    @property
    def status(self) -> str:
        """``queued``, ``in_progress``, ``completed`` or ``failed``."""
        return str(self.state.get("status"))

    @property
    def progress(self) -> int:
        """Percentage of the steps."""
        return int(self.state.get("progress") or 0)

    def refresh(self) -> None:
        """Ask for the state; raises ServiceError."""
        self.state = self._client._read_state(self.id)

    def wait(
        self,
        on_change: Callable[["RequestedVideo"], object] | None = None,
        *,
        timeout_seconds: float | None = None,
        poll_seconds: float = 1.0,
    ) -> "RequestedVideo":
        """Return the video itself once it is completed; ``on_change`` is called with each new state.

        A restart of the service is waited for, ten minutes at most. Raises ServiceError for a video that has
        failed or was deleted, and after ``timeout_seconds``; the video is still made then.
        """
        started_at = answered_at = time.monotonic()
        seen_state: dict[str, Any] | None = None
        while True:
            if on_change is not None and self.state != seen_state:
                on_change(self)
            seen_state = self.state
            if self.status == "completed":
                return self
            if self.status == "failed":
                error = self.state.get("error") or {}
                raise ServiceError(
                    f"{self.id} has failed: {error.get('message')}", code=error.get("code")
                )
            waited_seconds = time.monotonic() - started_at
            if timeout_seconds is not None and waited_seconds >= timeout_seconds:
                raise ServiceError(
                    f"{self.id} is {self.status} after {waited_seconds:.0f} s (timeout_seconds); "
                    "wait for it again, or delete it",
                    code="timeout",
                )
            time.sleep(poll_seconds)
            try:
                self.refresh()
                answered_at = time.monotonic()
            except ServiceError as error:
                is_outage = error.code is None and error.status in _OUTAGE_STATUSES
                if not is_outage or time.monotonic() - answered_at > _OUTAGE_SECONDS:
                    raise

    def save(self, file: str | Path, *, variant: str = "video") -> Path:
        """Download the video, or the image of a text-to-image task, and return its path.

        ``file`` may be a folder: the file then has the service's name for it. ``variant`` may be
        ``thumbnail``, the contact sheet, or ``preview``, a picture of the unfinished video. The file is there
        only when it is complete. Raises InputError for a suffix that is not the video's, ServiceError, and
        OSError where the file cannot be written.
        """
        path = Path(file).expanduser()
        content_path = f"/{quote(self.id, safe='')}/content?variant={quote(variant, safe='')}"
        with closing(self._client._send("GET", content_path)) as response:
            name = Path(response.headers.get_filename() or f"{self.id}.jpg").name
            if path.is_dir():
                path /= name
            elif path.suffix.lower() != Path(name).suffix:
                raise InputError(f"{path}: the {variant} is a {Path(name).suffix} file")
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial_path, partial_path.open("wb") as target:
                while part := _read_part(response, _CHUNK_BYTES):
                    target.write(part)
                if response.length:  # bytes that are missing
                    raise ServiceError(f"{self.id}: the download has ended early; save it again")
        return path

    def delete(self) -> bool:
        """Cancel the video and remove its files, and return whether they are gone already.

        False: the service removes them after the step that it is at. Raises ServiceError.
        """
        answer = self._client._read_json(
            "DELETE", f"/{quote(self.id, safe='')}", timeout_seconds=_DELETE_TIMEOUT_SECONDS
        )
        return bool(answer.get("deleted"))


def _check_header(name: str, text: str) -> str:
    if not text or not text.isascii() or not text.isprintable():
        raise InputError(f"{name} must be printable ASCII characters")
    return text


def _flatten_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields by dotted key, with files as ``data:`` URLs; raises InputError."""
    fields: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            fields |= {f"{key}.{name}": item for name, item in value.items()}
        elif key in UPLOAD_FIELDS and value is not None:
            fields[key] = _encode_file(key, value)
        else:
            fields[key] = value
    return fields


def _encode_file(key: str, value: Any) -> str:
    """Return a path's contents, bytes or a Pillow image as a ``data:`` URL; raises InputError."""
    if isinstance(value, str) and value.startswith("data:"):
        return value
    if isinstance(value, str | Path):
        try:
            content = Path(value).expanduser().read_bytes()
        except OSError as error:
            raise InputError(f"{key}={value} cannot be read: {error.strerror}") from None
    elif isinstance(value, bytes):
        content = value
    elif hasattr(value, "save"):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        content = buffer.getvalue()
    else:
        raise InputError(f"{key} is of type {type(value).__name__}; give a path, bytes or an image")
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"


def _read_part(response: http.client.HTTPResponse, num_bytes: int | None) -> bytes:
    """Return the next bytes of an answer, or all of them; raises ServiceError."""
    try:
        return response.read(num_bytes)
    except (OSError, http.client.HTTPException) as error:
        raise ServiceError(
            f"the answer has ended early: {error or type(error).__name__}"
        ) from error


def _read_error(response: http.client.HTTPResponse, url: str) -> ServiceError:
    """Return the error of an answer: the service's message, or that of another server."""
    try:
        error = json.loads(_read_part(response, None))["error"]
        return ServiceError(error["message"], status=response.status, code=error.get("code"))
    except (ServiceError, ValueError, TypeError, KeyError):
        message = f"{url} answers {response.status} {response.reason}"
        return ServiceError(message, status=response.status)
