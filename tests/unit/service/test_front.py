"""The front alone: what it refuses, who may ask, and what it stores. No rank makes what it accepts."""

import base64
import hashlib
import http.client
import io
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from PIL import Image

from tests.service import Client
from wan_dist.runtime.errors import InputError
from wan_dist.service.front_process import FrontProcess
from wan_dist.service.request_planner import make_request_planner
from wan_dist.tasks.run_config import read_config

TOKEN = "0123456789abcdef"


@contextmanager
def open_front(folder: Path, *arguments: str) -> Iterator[Client]:
    """Start a front, and yield a client of it."""
    words = ["serve.port=0", f"output.dir={folder}", "device=cpu", *arguments]
    config = read_config(words)
    assert config is not None
    planner = make_request_planner(config, words, ranks=(1, 1), gpu_bytes=None)
    front = FrontProcess(planner, "a run")
    try:
        yield Client(front.start().replace("0.0.0.0", "127.0.0.1"))
    finally:
        front.close()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("toy")
    with open_front(folder, "task=toy", "serve.max_upload_mib=0.05") as client:
        yield client
        assert client.list_ids() == []
        assert (folder / "service/requests.jsonl").read_text() == ""
        assert list((folder / "service/uploads").iterdir()) == []


@pytest.fixture(scope="module")
def image_to_video(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Path]]:
    folder = tmp_path_factory.mktemp("image")
    with open_front(folder, "task=i2v-A14B", "size=832x480") as client:
        yield client, folder


REFUSED: list[tuple[dict[str, object], str]] = [
    ({}, "prompt is missing"),
    ({"prompt": " "}, "prompt is empty"),
    ({"prompt": ["a"]}, "prompt is missing"),
    ({"model": "sora-2"}, "model=sora-2: this service makes videos of toy"),
    ({"n": 2}, "n=2: a request is for one video"),
    ({"size": "65x48"}, "the width must be a multiple of 16"),
    ({"size": "large"}, "size=large is not WIDTHxHEIGHT"),
    ({"num_frames": 6}, "frame_num=6 is not 4n + 1"),
    ({"seconds": "soon"}, "seconds=soon is not a number"),
    ({"seconds": -1}, "seconds=-1 must be above 0"),
    ({"seconds": 2, "frames": 9}, "frame_num is given by two fields"),
    ({"num_inference_steps": 0}, "sample.steps=0 must be at least 1"),
    ({"guidance_scale": 3, "guidance_scale_2": 4}, "toy has one transformer"),
    ({"guidance_scale": "${oc.env:HOME}"}, "contains ${"),
    ({"seed": "seven"}, "seed"),
    ({"seed": True}, "seed"),
    ({"stepz": 3}, "unknown key 'stepz'"),
    ({"fps": {"a": 1}}, "is an object"),
    ({"quant": "int8"}, "quant applies to the whole service"),
    ({"memory.dit": "stream"}, "memory.dit applies to the whole service"),
    ({"memory": "../../secret"}, "memory applies to the whole service"),
    ({"preset": "toy-4step"}, "preset applies to the whole service"),
    ({"parallel.dp": 2}, "parallel.dp applies to the whole service"),
    ({"serve.port": 1}, "serve.port applies to the whole service"),
    ({"image": "/etc/passwd"}, "image must be an uploaded file"),
    ({"input_reference": "https://example.org/a.png"}, "input_reference must be an uploaded file"),
    ({"input_reference": {"file_id": "a"}}, "input_reference must be an uploaded file"),
    ({"input_reference": "data:image/png;base64,AAAA"}, "cannot be read as an image"),
    ({"input_reference": "data:image/png;base64,?"}, "is not base64"),
    *(
        ({key: "/etc/passwd"}, f"{key} cannot be set by a request: it names a file")
        for key in ("latents", "lora", "ckpt_dir", "dit_file", "cache.dir", "output.dir", "jobs")
    ),
    ({"output.audio": "/etc/passwd"}, "output.audio cannot be set by a request: it names a file"),
    ({"output.video": "mpeg2"}, "output.video=mpeg2 is not one of h264, h265"),
    ({"output.video": "ffv1", "output.crf": 5}, "output.crf=5: ffv1 has no rate factor"),
    ({"output.preview": True}, "output.preview applies to the whole service"),
    ({"from": "/etc/passwd"}, "unknown key 'from'"),
    ({"name": "../a"}, "output.name cannot be set by a request"),
    ({"serve.token_file": "/etc/passwd"}, "serve.token_file cannot be set by a request"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_no_job_could_have_is_refused(
    fields: dict[str, object], message: str, toy: Client
) -> None:
    answer = toy.post(({"prompt": "a ball"} if fields else {}) | fields)
    assert answer.status == 400, answer.body
    assert message in answer.message
    assert "\n" not in answer.message
    assert answer.json["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "content_type", "status", "message"),
    [
        (b"{", "application/json", 400, "not JSON"),
        (b'{"prompt": "a", "fps": NaN}', "application/json", 400, "NaN is not a number"),
        (b"[" * 10**4, "application/json", 400, "not JSON"),
        (b"[]", "application/json", 400, "not a JSON object"),
        (b"prompt", "text/plain", 400, "Content-Type is text/plain"),
        (b"prompt=a&prompt=b", "application/x-www-form-urlencoded", 400, "prompt is given twice"),
        (b"no parts", "multipart/form-data; boundary=x", 400, ""),
        (b" " * 60_000, "application/json", 413, "larger than 0.05 MiB (serve.max_upload_mib)"),
    ],
)
def test_a_body_that_is_none(
    body: bytes, content_type: str, status: int, message: str, toy: Client
) -> None:
    answer = toy.ask("POST", "/v1/videos", body, Content_Type=content_type)
    assert answer.status == status, answer.body
    assert message in answer.message


def test_a_body_without_a_length_has_the_same_limit(toy: Client) -> None:
    host, port = toy.address.hostname or "", toy.address.port
    with closing(http.client.HTTPConnection(host, port, timeout=60)) as connection:
        parts = iter([b" " * 1000] * 100)
        headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        connection.request("POST", "/v1/videos", parts, headers, encode_chunked=True)
        assert connection.getresponse().status == 413


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up", "after=video_0"])
def test_a_list_that_is_none(query: str, toy: Client) -> None:
    assert toy.ask("GET", f"/v1/videos?{query}").status == 400


@pytest.mark.parametrize(
    "path", ["/v1/videos/video_0", "/v1/videos/..%2f..%2fetc%2fpasswd", "/docs", "/v1/videos/%00"]
)
def test_what_is_not_there(path: str, toy: Client) -> None:
    answer = toy.ask("GET", path)
    assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")


def test_a_format_that_ffmpeg_lacks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text("#!/bin/sh\necho ' V....D libx264              libx264 H.264 (codec h264)'\n")
    ffmpeg.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    with open_front(tmp_path / "out", "task=toy") as client:
        assert client.post({"prompt": "a ball"}).status == 200
        answer = client.post({"prompt": "a ball", "output.video": "av1"})
        assert answer.status == 400
        assert "output.video=av1 needs the encoder libsvtav1" in answer.message


def test_a_page_in_a_browser_is_refused(toy: Client) -> None:
    assert toy.ask("GET", "/v1/videos", Host="attacker.example").status == 403
    assert toy.ask("GET", "/v1/videos", Origin="https://attacker.example").status == 403
    assert toy.ask("GET", "/v1/videos", Origin="null").status == 403
    assert toy.ask("GET", "/v1/videos", Host="localhost:1").status == 200


def test_a_token_is_needed_beyond_this_machine(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(f"{TOKEN}\n")
    words = ["task=toy", "serve.host=0.0.0.0", f"serve.token_file={token_file}"]
    with open_front(tmp_path / "out", *words) as client:
        assert client.ask("GET", "/health").json == {"status": "ok"}
        for path in ("/v1/videos", "/metrics"):
            for header in ("", TOKEN, f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN[:-1]}"):
                answer = client.ask("GET", path, Authorization=header)
                assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert client.ask("GET", path, Authorization=f"Bearer {TOKEN}").status == 200
        assert client.post({"prompt": "a ball"}).status == 401
        assert client.post({"prompt": "a ball"}, Authorization=f"Bearer {TOKEN}").status == 200
    with (
        pytest.raises(InputError, match=r"serve.host=0.0.0.0 .* needs serve.token_file=FILE"),
        open_front(tmp_path / "out", *words[:2]),
    ):
        pass
    token_file.write_text("short")
    with (
        pytest.raises(InputError, match="has no token of 16 or more ASCII characters"),
        open_front(tmp_path / "out", *words),
    ):
        pass


def test_a_port_that_is_taken_is_named(toy: Client, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"serve.port=\d+ cannot be listened on: Address already"),
        open_front(tmp_path / "out", "task=toy", f"serve.port={toy.address.port}"),
    ):
        pass


def draw_picture(size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, "PNG")
    return stream.getvalue()


def test_images_are_kept_under_names_of_our_own(image_to_video: tuple[Client, Path]) -> None:
    client, folder = image_to_video
    uploads = folder / "service/uploads"
    content = draw_picture((640, 640))
    before = {path for path in folder.rglob("*") if path.is_file()}
    file = ("../../escaped.png", content)
    first = client.post_form({"prompt": "a cat"}, {"input_reference": file})
    assert first.status == 200, first.body
    assert (first.json["size"], first.json["status"]) == ("624x624", "queued")
    (upload,) = {path for path in folder.rglob("*") if path.is_file()} - before
    assert upload == uploads / hashlib.sha256(content).hexdigest()
    assert upload.read_bytes() == content
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    for reference in (url, {"image_url": url}):
        second = client.post({"prompt": "a cat", "input_reference": reference})
        assert second.status == 200, second.body
        assert client.ask("DELETE", f"/v1/videos/{second.json['id']}").status == 200
        assert upload.exists(), "the first request needs it"
    both = {"first_frame": file, "last_frame": ("b", draw_picture((64, 64)))}
    third = client.post_form({"prompt": "a cat"}, both)
    assert third.status == 200, third.body
    assert len(list(uploads.iterdir())) == 2
    for answer in (first, third):
        assert client.ask("DELETE", f"/v1/videos/{answer.json['id']}").status == 200
    assert list(uploads.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "files", "message"),
    [
        ({}, {}, "image is missing"),
        ({}, {"input_reference": b"text"}, "image=982d9e3e"),
        ({}, {"input_reference": b"<html>"}, "a page of HTML"),
        ({}, {"input_reference": draw_picture((9, 9))[:-30]}, "cannot be read as an image"),
        ({}, {"input_reference": b"", "image": b""}, "are the same image"),
        ({}, {"last_frame": draw_picture((9, 9))}, "first_frame is missing"),
        ({}, {"lora": b""}, "lora is a file; files are input_reference, image"),
        ({"image": "a.png"}, {}, "image must be an uploaded file"),
        ({"guidance_scale_2": "3"}, {}, "beside guidance_scale; i2v-A14B has two"),
    ],
)
def test_what_is_no_image_leaves_nothing(
    fields: dict[str, str],
    files: dict[str, bytes],
    message: str,
    image_to_video: tuple[Client, Path],
) -> None:
    client, folder = image_to_video
    named = {key: ("a.png", content) for key, content in files.items()}
    answer = client.post_form({"prompt": "a cat"} | fields, named)
    assert (answer.status, message in answer.message) == (400, True), answer.body
    assert str(folder) not in answer.message
    assert list((folder / "service/uploads").iterdir()) == []


def test_two_experts_have_two_scales(image_to_video: tuple[Client, Path]) -> None:
    client, folder = image_to_video
    file = {"image": ("a.png", draw_picture((64, 64)))}
    scales = {"guidance_scale": "4", "guidance_scale_2": "3.5"}
    answer = client.post_form({"prompt": "a cat", "seed": "5"} | scales, file)
    assert answer.status == 200, answer.body
    log = (folder / "service/requests.jsonl").read_text()
    assert '"sample.guide_scale": [3.5, 4.0]' in log, "low noise first, as in our setting"
    assert client.ask("DELETE", f"/v1/videos/{answer.json['id']}").status == 200
