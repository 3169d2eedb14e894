"""The video API over HTTP: OpenAI's routes, events, metrics and health."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from wan_dist.output.gallery.sheet import get_sheet_path
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.log import logger
from wan_dist.service.access import AccessControl, build_error, read_token
from wan_dist.service.metrics import ServiceCollector
from wan_dist.service.page import build_security_policy, read_page
from wan_dist.service.request_body import read_request_body
from wan_dist.service.request_fields import describe_fields
from wan_dist.service.video_service import QueueFullError, VideoService
from wan_dist.service.video_states import COMPLETED, VideoState, select_page

_CANCEL_TIMEOUT_SECONDS = 120.0
"""Seconds for which an answer to DELETE waits for the end of a step, or of decoding."""
_POLL_SECONDS = 0.1
_KEEP_ALIVE_SECONDS = 15.0
_MAX_PAGE_LENGTH = 100
_MEDIA_TYPES = {".mkv": "video/x-matroska", ".mov": "video/quicktime", ".webm": "video/webm"}
"""Those that Python, or a system without a list of them, does not know."""
_NO_STORE = {"Cache-Control": "no-store"}
_RETRY_SECONDS = 30
"""Seconds after which a client may try again, where the queue is full."""


def build_app(service: VideoService) -> FastAPI:
    """Return the application of a service; raises InputError for a token file that is of no use."""
    config = service.planner.config.serve
    app = FastAPI(title="Wan-dist", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(
        AccessControl,
        token=read_token(config),
        host=config.host,
        max_bytes=int(config.max_upload_mib * 2**20),
    )
    _add_error_handlers(app)
    _add_video_routes(app, service)
    _add_content_routes(app, service)
    _add_monitoring_routes(app, service)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    async def answer_http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        name = HTTPStatus(error.status_code).name.lower()
        body = build_error(str(error.detail), name, is_ours=error.status_code >= 500)
        return JSONResponse(body, error.status_code, error.headers)

    async def answer_input_error(_: Request, error: Exception) -> Response:
        return JSONResponse(build_error(str(error), "invalid_value"), 400)

    async def answer_full_queue(_: Request, error: Exception) -> Response:
        headers = {"Retry-After": str(_RETRY_SECONDS)}
        return JSONResponse(build_error(str(error), "queue_full"), 429, headers)

    async def answer_os_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, OSError)
        logger.error("a request could not be saved: %s", error)
        message = f"the request could not be saved: {error.strerror}"
        return JSONResponse(build_error(message, "not_saved", is_ours=True), 503)

    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(InputError, answer_input_error)
    app.add_exception_handler(QueueFullError, answer_full_queue)
    app.add_exception_handler(OSError, answer_os_error)


def _add_video_routes(app: FastAPI, service: VideoService) -> None:
    states = service.states

    @app.post("/v1/videos")
    async def create_video(request: Request) -> Response:
        fields, uploads = await read_request_body(request)
        key = request.headers.get("idempotency-key")
        state = await run_in_threadpool(service.submit, fields, uploads, key)
        return JSONResponse(state.to_json())

    @app.get("/v1/videos")
    def list_videos(request: Request) -> Response:
        after, limit, order = _read_page_query(request)
        if after is not None and after not in service.log.lines:
            raise InputError(f"after={after[:80]} is no video of the list")
        after_line = None if after is None else service.log.lines[after]
        page, has_more = select_page(
            states.list_all(), after_line=after_line, limit=limit, order=order
        )
        data = [state.to_json() for state in page]
        ids = [entry["id"] for entry in data]
        return JSONResponse(
            {
                "object": "list",
                "data": data,
                "first_id": ids[0] if ids else None,
                "last_id": ids[-1] if ids else None,
                "has_more": has_more,
            }
        )

    @app.get("/v1/videos/{video_id}")
    def retrieve_video(video_id: str) -> Response:
        return JSONResponse(_find_state(service, video_id).to_json())

    @app.delete("/v1/videos/{video_id}")
    async def delete_video(video_id: str) -> Response:
        deletion = await run_in_threadpool(service.delete, video_id)
        if deletion is None:
            raise _build_not_found(video_id)
        deadline = time.monotonic() + _CANCEL_TIMEOUT_SECONDS
        while not (is_done := await run_in_threadpool(service.remove_files, deletion)):
            if time.monotonic() > deadline:
                break  # the rank removes them itself
            await asyncio.sleep(_POLL_SECONDS)
        body = {"id": video_id, "object": "video.deleted", "deleted": is_done}
        return JSONResponse(body, 200 if is_done else 202)


def _add_content_routes(app: FastAPI, service: VideoService) -> None:
    @app.get("/v1/videos/{video_id}/content")
    def download_video(video_id: str, variant: str = "video") -> Response:
        file = _find_content(_find_state(service, video_id), video_id, variant)
        if file is None or not file.is_file():
            raise _build_no_variant(video_id, variant)
        if variant == "preview":
            try:
                return Response(file.read_bytes(), media_type="image/jpeg", headers=_NO_STORE)
            except FileNotFoundError:  # the video is done by now
                raise _build_no_variant(video_id, variant) from None
        media_type = _MEDIA_TYPES.get(file.suffix)
        return FileResponse(file, filename=file.name, media_type=media_type)

    @app.get("/v1/videos/{video_id}/events")
    def follow_video(video_id: str) -> Response:
        _find_state(service, video_id)
        headers = _NO_STORE | {"X-Accel-Buffering": "no"}
        return StreamingResponse(
            _stream_events(service, video_id), media_type="text/event-stream", headers=headers
        )


def _add_monitoring_routes(app: FastAPI, service: VideoService) -> None:
    registry = CollectorRegistry()
    registry.register(ServiceCollector(service.states))

    @app.get("/metrics")
    def read_metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    def show_page() -> Response:
        headers = {
            "Content-Security-Policy": build_security_policy(),
            "Referrer-Policy": "no-referrer",
        }
        return HTMLResponse(read_page(), headers=headers)

    @app.get("/v1/fields")
    def list_fields() -> Response:
        planner = service.planner
        return JSONResponse(describe_fields(planner.config, planner.task))

    @app.get("/health")
    def read_health() -> Response:
        return JSONResponse({"status": "ok"})


def _find_content(state: VideoState, video_id: str, variant: str) -> Path | None:
    """Return the file of a variant, None if there is none; raises InputError, and HTTPException 409."""
    if variant not in ("video", "thumbnail", "preview"):
        raise InputError(f"variant={variant} is not one of video, thumbnail, preview")
    if variant == "preview":
        return state.preview
    if state.status != COMPLETED or state.file is None:
        raise HTTPException(409, f"{video_id} is {state.status}; there is no file")
    return state.file if variant == "video" else get_sheet_path(state.file)


def _read_page_query(request: Request) -> tuple[str | None, int, str]:
    """Return after, limit and order; raises InputError."""
    query = request.query_params
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit) <= _MAX_PAGE_LENGTH:
        raise InputError(f"limit={limit} must be 1 to {_MAX_PAGE_LENGTH}")
    if order not in ("asc", "desc"):
        raise InputError(f"order={order} is not one of asc, desc")
    return query.get("after"), int(limit), order


def _find_state(service: VideoService, video_id: str) -> VideoState:
    if (state := service.states.get(video_id)) is None:
        raise _build_not_found(video_id)
    return state


def _build_not_found(video_id: str) -> HTTPException:
    return HTTPException(404, f"there is no video {video_id[:80]}")


def _build_no_variant(video_id: str, variant: str) -> HTTPException:
    return HTTPException(404, f"{video_id} has no {variant}")


async def _stream_events(service: VideoService, video_id: str) -> AsyncIterator[str]:
    """Yield the state as a server-sent event whenever it changes, until it is final."""
    last_state: VideoState | None = None
    sent_at = time.monotonic()
    while True:
        state = await run_in_threadpool(service.states.get, video_id)
        if state is None:
            yield _format_event("deleted", {"id": video_id, "object": "video.deleted"})
            return
        if state != last_state:
            last_state, sent_at = state, time.monotonic()
            yield _format_event(state.status, state.to_json())
        elif time.monotonic() - sent_at > _KEEP_ALIVE_SECONDS:
            sent_at = time.monotonic()
            yield ": waiting\n\n"
        if state.is_final:
            return
        await asyncio.sleep(_POLL_SECONDS)


def _format_event(name: str, content: object) -> str:
    return f"event: {name}\ndata: {json.dumps(content, ensure_ascii=False)}\n\n"
