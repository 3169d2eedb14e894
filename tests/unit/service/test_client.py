"""The Python client against a front, and against servers that refuse, fail, pause and break off."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.unit.service.test_front import TOKEN, open_front
from wan_dist import InputError, RequestedVideo, ServiceError, VideoClient

VIDEO: dict[str, Any] = {"id": "video_1", "status": "queued", "progress": 0, "error": None}
Part = tuple[int, dict[str, str], bytes]


@contextmanager
def answer_with(parts: Callable[[str, str], Part]) -> Iterator[str]:
    """Serve what a function of method and path returns, and yield the URL."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = parts(self.command, self.path)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            with suppress(BrokenPipeError):  # of a client that does not wait
                self.end_headers()
                self.wfile.write(body)

        def __getattr__(self, name: str) -> Any:  # do_GET and others
            return self.answer if name.startswith("do_") else super().__getattribute__(name)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def answer_json(content: object, status: int = 200) -> Part:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


@contextmanager
def play(*parts: Part) -> Iterator[RequestedVideo]:
    """Yield a video whose service gives these answers, the last one again and again."""
    rest = list(parts)

    def take(_: str, __: str) -> Part:
        return rest.pop(0) if len(rest) > 1 else rest[0]

    with answer_with(take) as url:
        yield RequestedVideo(VideoClient(url, timeout_seconds=5), dict(VIDEO))


def test_the_import_is_light() -> None:
    """It needs no package beside Python's own: -S hides those that are installed."""
    code = "import wan_dist; wan_dist.VideoClient()"
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=root)


def test_what_the_service_refuses_is_its_own_line(tmp_path: Path) -> None:
    settings = ["task=toy", "serve.max_upload_mib=0.05", f"serve.token_file={tmp_path / 'token'}"]
    (tmp_path / "token").write_text(TOKEN)
    with open_front(tmp_path / "out", *settings) as front:
        url = f"http://{front.address.netloc}"
        client = VideoClient(url, token=f"{TOKEN}\n")
        for keywords, status, code, message in (
            ({"size": "65x48"}, 400, "invalid_value", "the width must be a multiple of 16"),
            ({"sample": {"stepz": 3}}, 400, "invalid_value", "unknown key 'sample.stepz'"),
            ({"image": b"no image"}, 400, "invalid_value", "image"),
            ({"image": bytes(90_000)}, 413, "too_large", "larger than 0.05 MiB"),
        ):
            with pytest.raises(ServiceError, match=message) as caught:
                client.submit("a ball", **keywords)
            assert (caught.value.status, caught.value.code) == (status, code)
            assert "\n" not in str(caught.value)
        with pytest.raises(ServiceError, match="there is no video a ä") as caught:
            client.get("a ä")
        assert caught.value.status == 404
        for token in (None, "another token"):
            with pytest.raises(ServiceError, match="token is missing or wrong") as caught:
                VideoClient(url, token=token).submit("a ball")
            assert caught.value.status == 401
        video = client.submit("a ball", idempotency_key="once", seed=3)
        assert client.submit("a ball", idempotency_key="once", seed=3).id == video.id
        assert (video.status, video.progress, video.state["seed"]) == ("queued", 0, 3)
        with pytest.raises(ServiceError, match=f"{video.id} is queued; there is no file"):
            video.save(tmp_path)
        with pytest.raises(ServiceError, match="is queued after 0 s") as caught:
            video.wait(timeout_seconds=0.05, poll_seconds=0.1)
        assert caught.value.code == "timeout"
        assert video.delete() is True
        with pytest.raises(ServiceError, match="there is no video") as caught:
            video.wait(poll_seconds=0)


def test_what_is_wrong_here_is_not_sent(tmp_path: Path) -> None:
    for url in ("localhost:8000", "http://", "ftp://a", "http://a:99999", "http://me:secret@a"):
        with pytest.raises(InputError, match="no address of a service"):
            VideoClient(url)
    with pytest.raises(InputError, match="token must be"):
        VideoClient(token="tëst")
    client = VideoClient("http://127.0.0.1:9")
    for keywords, message in (
        ({"image": tmp_path / "none.png"}, "none.png cannot be read: No such file"),
        ({"first_frame": 3}, "first_frame is of type int; give a path, bytes or an image"),
        ({"seed": float("nan")}, "cannot be sent as JSON"),
        ({"seed": tmp_path}, "cannot be sent as JSON"),
    ):
        with pytest.raises(InputError, match=message):
            client.submit("a ball", **keywords)


def test_files_are_sent_whatever_they_are(tmp_path: Path) -> None:
    """A path, a text, bytes and a Pillow image of one picture are one upload to the service."""
    image = Image.new("RGB", (64, 48), "red")
    image.save(tmp_path / "red.png")
    content = (tmp_path / "red.png").read_bytes()
    with open_front(tmp_path / "out", "task=toy") as front:
        client = VideoClient(f"http://{front.address.netloc}")
        for value in (tmp_path / "red.png", str(tmp_path / "red.png"), content, image):
            client.submit("a ball", image=value)
        uploads = list((tmp_path / "out/service/uploads").iterdir())
        assert [upload.read_bytes() for upload in uploads] == [content]
        assert len(front.list_ids()) == 4


def test_a_service_that_is_not_there() -> None:
    with pytest.raises(ServiceError, match="start it with wan-dist serve") as caught:
        VideoClient("http://127.0.0.1:9").submit("a ball")
    assert (caught.value.status, caught.value.code) == (None, None)


def test_a_service_that_says_nothing_is_given_up() -> None:
    is_over = threading.Event()

    def wait_first(_: str, __: str) -> Part:
        is_over.wait(30)
        return answer_json(VIDEO)

    with answer_with(wait_first) as url:
        started = time.monotonic()
        with pytest.raises(ServiceError, match=r"does not answer: timed out \(timeout_seconds\)"):
            VideoClient(url, timeout_seconds=0.2).get("video_1")
        assert time.monotonic() - started < 10
        is_over.set()


def test_waiting_tells_changes_and_sits_out_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = VIDEO | {"status": "in_progress", "progress": 40}
    gone = answer_json({"error": {"message": "x", "code": None}}, 503)
    truncated = (200, {"Content-Length": "999"}, b"{")
    done = begun | {"status": "completed", "progress": 100}
    html = (502, {"Content-Type": "text/html"}, b"<html>\nBad gateway</html>")
    parts = [answer_json(begun), answer_json(begun), html, gone, truncated, answer_json(done)]
    seen = []
    with play(*parts) as video:
        assert video.wait(lambda one: seen.append(one.progress), poll_seconds=0) is video
    assert seen == [0, 40, 100]
    monkeypatch.setattr("wan_dist.service.client._OUTAGE_SECONDS", 0.1)
    with (
        play(html) as video,
        pytest.raises(ServiceError, match="answers 502 Bad Gateway") as caught,
    ):
        video.wait(poll_seconds=0.02)
    assert caught.value.status == 502


def test_a_video_that_fails_says_why() -> None:
    error = {"code": "generation_failed", "message": "out of\nmemory"}
    failed = answer_json(VIDEO | {"status": "failed", "error": error})
    with play(failed) as video, pytest.raises(ServiceError) as caught:
        video.wait(poll_seconds=0)
    assert str(caught.value) == r"video_1 has failed: out of\nmemory"
    assert caught.value.code == "generation_failed"


@pytest.mark.parametrize(
    "part", [(200, {}, b"<html>"), answer_json([1]), answer_json({}), (200, {}, b"\xff")]
)
def test_another_kind_of_server_is_told(part: Part) -> None:
    with play(part) as video, pytest.raises(ServiceError, match="has answered what is no video"):
        video.refresh()


def test_a_redirect_is_not_followed() -> None:
    """The token would go with it."""
    part = (302, {"Location": "http://127.0.0.1:9/"}, b"")
    with play(part) as video, pytest.raises(ServiceError, match="answers 302 Found"):
        video.refresh()


def test_a_download_is_whole_or_not_there(tmp_path: Path) -> None:
    name = {"Content-Disposition": 'attachment; filename="../video_1.mkv"'}
    with play((200, name | {"Content-Length": "9"}, b"abc")) as video:
        with pytest.raises(ServiceError, match="ended early"):
            video.save(tmp_path / "a.mkv")
        with pytest.raises(InputError, match=r"a.mp4: the video is a .mkv file"):
            video.save(tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []
    with play((200, name, b"abc")) as video:
        assert video.save(tmp_path / "new/a.mkv").read_bytes() == b"abc"
        assert video.save(tmp_path) == tmp_path / "video_1.mkv"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "video_1.mkv"]
