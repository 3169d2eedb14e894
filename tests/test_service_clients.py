"""What talks to the service: the Python client, OpenAI's, and ComfyUI's nodes, from prompt to frames."""

import importlib.util
import json
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import wan_dist
from tests.conftest import FIXTURES
from tests.service import HANG_SECONDS, Service
from tests.unit.service.test_front import open_front
from wan_dist.output.video_file import convert_to_uint8

ROOT = Path(__file__).parents[1]
PACK = ROOT / "integrations/comfyui"
TOKEN = "0123456789abcdef"
LONG = {"sample": {"steps": 400}}
"""A video that takes longer than any test looks at it."""
NODE_INPUTS: dict[str, Any] = {
    "service": "toy",
    "prompt": "a red ball",
    "seed": 7,
    "width": 0,
    "height": 0,
    "num_frames": 0,
    "steps": 0,
    "guidance_scale": 0.0,
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("clients")
    (folder / "token").write_text(TOKEN)
    settings = [f"serve.token_file={folder / 'token'}", "output.save_tensor=true"]
    one = Service(folder / "out", *settings, "output.preview=1")
    one.headers = {"Authorization": f"Bearer {TOKEN}"}
    yield one
    assert one.stop() == [75]
    assert "Traceback" not in one.log.read_text()


@pytest.fixture(scope="module")
def url(service: Service) -> str:
    return f"http://{service.address.netloc}"


def read_frames(service: Service, video_id: str) -> torch.Tensor:
    """Return the frames that were made, before any codec: (F, H, W, 3), 0 to 1 in 256 levels."""
    video = load_file(service.folder / f"{video_id}.safetensors")["video"]
    return convert_to_uint8(video).permute(1, 2, 3, 0).to(torch.float32) / 255


def save_sheet(video: wan_dist.RequestedVideo, path: Path) -> Path:
    """Save the contact sheet, which is made in the background, after the video is completed."""
    end = time.monotonic() + HANG_SECONDS
    while time.monotonic() < end:
        try:
            return video.save(path, variant="thumbnail")
        except wan_dist.ServiceError as error:
            if str(error) != f"{video.id} has no thumbnail":
                raise
        time.sleep(0.05)
    raise AssertionError(f"{video.id} has no contact sheet")


def test_three_lines_make_a_video(
    service: Service, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/service.md").read_text(encoding="utf-8")
    shown = re.search(r"(    client = .*VideoClient.*\n(?:    .*\n)+)", page)
    assert shown is not None
    lines = textwrap.dedent(shown[1]).replace(
        '"http://localhost:8000"', f'"{url}", token="{TOKEN}"'
    )
    # the page's length takes the toy too long
    lines, num_lengths = re.subn(r"num_frames=\d+", "num_frames=9", lines)
    assert (lines.count("\n"), num_lengths) == (3, 1)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"wan_dist": wan_dist}
    exec(lines, names)
    video = names["video"]
    assert (tmp_path / "cats.mp4").read_bytes() == (service.folder / f"{video.id}.mp4").read_bytes()
    assert len(read_frames(service, video.id)) == 9


def test_a_request_has_files_and_sections_and_can_be_deleted(
    service: Service, url: str, tmp_path: Path
) -> None:
    client = wan_dist.VideoClient(url, token=TOKEN)
    with Image.open(FIXTURES / "circle.png") as image:
        video = client.submit("a ball", image=image, seed=3, sample={"steps": 4, "shift": 2.0})
    seen: list[tuple[str, int]] = []
    assert video.wait(lambda one: seen.append((one.status, one.progress)), poll_seconds=0.02)
    assert seen == sorted(seen, key=lambda item: item[1])
    assert seen[-1] == ("completed", 100)
    assert len(seen) > 1
    record = json.loads((service.folder / f"{video.id}.json").read_text())
    assert (record["config"]["sample"]["shift"], video.state["num_steps"]) == (2.0, 4)
    assert record["config"]["image"]
    assert video.save(tmp_path) == tmp_path / f"{video.id}.mp4"
    assert save_sheet(video, tmp_path / "sheet.jpg").read_bytes()[:2] == b"\xff\xd8"
    again = client.get(video.id)
    assert (again.state, repr(again)) == (
        video.state,
        f"<RequestedVideo {video.id}: completed, 100 %>",
    )
    assert again.delete() is True
    running = client.submit("a ball", **LONG)
    while not running.state["preview"]:
        running.refresh()
    assert running.save(tmp_path / "now.jpg", variant="preview").stat().st_size > 100
    assert running.delete() is True
    assert not service.list_ids() or running.id not in service.list_ids()
    with pytest.raises(wan_dist.ServiceError, match=f"there is no video {running.id}"):
        running.wait(poll_seconds=0)


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")  # this is another service
def test_openais_client_submits_polls_downloads_and_deletes(
    service: Service, url: str, tmp_path: Path
) -> None:
    openai = pytest.importorskip(
        "openai", reason="the package openai is not installed (pip install '.[dev]')"
    )
    with openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client:
        video = client.videos.create(
            prompt="a blue square",
            model="toy",
            size="64x48",
            seconds="0.3",
            input_reference=FIXTURES / "circle.png",
            extra_body={"seed": 5, "num_inference_steps": 4},
        )
        assert (video.status, video.seconds, video.size) == ("queued", "0.3125", "64x48")
        done = client.videos.poll(video.id, poll_interval_ms=50)
        assert (done.status, done.progress, done.error) == ("completed", 100, None)
        record = json.loads((service.folder / f"{video.id}.json").read_text())
        assert (record["seed"], record["num_frames"]) == (5, 5)
        assert (
            Path(record["config"]["image"]).read_bytes() == (FIXTURES / "circle.png").read_bytes()
        )
        assert video.id in [one.id for one in client.videos.list(limit=2)]
        client.videos.download_content(video.id).write_to_file(tmp_path / "a.mp4")
        assert (tmp_path / "a.mp4").read_bytes() == (
            service.folder / f"{video.id}.mp4"
        ).read_bytes()
        assert client.videos.delete(video.id).deleted is True
        with pytest.raises(openai.NotFoundError, match=f"there is no video {video.id}"):
            client.videos.retrieve(video.id)
        with pytest.raises(openai.BadRequestError, match="model=sora-2: this service makes videos"):
            client.videos.create(prompt="a ball", model="sora-2")
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="a token is missing or wrong"),
    ):
        stranger.videos.list()


class Interrupted(BaseException):
    """As ComfyUI's, which nodes must not catch for good."""


class Comfy:
    """What the nodes use of ComfyUI: the progress bar, and the interruption, after ``num_updates``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.updates: list[tuple[int, int, Any]] = []
        self.num_updates: int | None = None
        outer = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total = total

            def update_absolute(
                self, value: int, total: int | None = None, preview: Any = None
            ) -> None:
                outer.updates.append((value, self.total, preview))

        def throw_exception_if_processing_interrupted() -> None:
            if outer.num_updates is not None and len(outer.updates) >= outer.num_updates:
                raise Interrupted

        for name, content in (
            ("comfy", {}),
            ("comfy.utils", {"ProgressBar": ProgressBar}),
            (
                "comfy.model_management",
                {
                    "throw_exception_if_processing_interrupted": (
                        throw_exception_if_processing_interrupted
                    )
                },
            ),
        ):
            module = ModuleType(name)
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, module)


def load_pack(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load a folder as ComfyUI does: by its file, under a name made of its path."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Comfy:
    return Comfy(monkeypatch)


@pytest.fixture
def pack(comfy: Comfy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The nodes, installed as the README says, with a service that needs a token."""
    folder = tmp_path / "custom_nodes/wan-dist"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_bytes((PACK / "__init__.py").read_bytes())
    (folder / "services.json").write_text(json.dumps({"toy": {"url": url, "token": TOKEN}}))
    module = load_pack(folder, monkeypatch)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.05)
    return module


def run_node(pack: ModuleType, name: str, **inputs: Any) -> tuple[Any, ...]:
    """Run a node as ComfyUI does: checked inputs, an own object, outputs by the declared types."""
    node_class = pack.NODE_CLASS_MAPPINGS[name]
    declared = node_class.INPUT_TYPES()
    values = NODE_INPUTS | inputs
    assert declared["required"].keys() <= values.keys()
    known = declared["required"] | declared["optional"]
    for key, value in values.items():
        kind, options = known[key][0], {**known[key][1]} if len(known[key]) > 1 else {}
        if isinstance(kind, list):
            assert value in kind
        elif kind in ("INT", "FLOAT"):
            assert options["min"] <= value <= options["max"]
    outputs = getattr(node_class(), node_class.FUNCTION)(**values)
    assert len(outputs) == len(node_class.RETURN_TYPES) == len(node_class.RETURN_NAMES)
    return tuple(outputs)


def test_nodes_are_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ComfyUI and services.json too, which is how other programs list a pack's nodes."""
    pack = load_pack(PACK, monkeypatch)
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    kinds = {"STRING", "INT", "FLOAT", "IMAGE"}
    for node_class in pack.NODE_CLASS_MAPPINGS.values():
        inputs = node_class.INPUT_TYPES()
        assert inputs.keys() == {"required", "optional"}
        declared = [kind for group in inputs.values() for kind, *_ in group.values()]
        assert [kind for kind in declared if isinstance(kind, list)] == [["local"]]
        assert {kind for kind in declared if isinstance(kind, str)} <= kinds
        assert node_class.RETURN_TYPES == ("IMAGE", "FLOAT")
        assert callable(getattr(node_class, node_class.FUNCTION))
        assert node_class.CATEGORY == "Wan-dist"


def test_frames_of_a_text_are_those_of_the_service(
    pack: ModuleType, service: Service, comfy: Comfy
) -> None:
    pytest.importorskip("av", reason="the package av is not installed (pip install '.[dev]')")
    settings = "fps=8\nsample.solver=euler\n\nsample.steps=6"
    inputs = {"width": 48, "height": 64, "num_frames": 9, "guidance_scale": 2.5}
    images, fps = run_node(pack, "WanDistTextToVideo", **inputs, settings=settings)
    newest = service.list_ids("limit=1")[0]
    assert (images.shape, images.dtype, fps) == ((9, 64, 48, 3), torch.float32, 8.0)
    assert torch.equal(images, read_frames(service, newest))
    record = json.loads((service.folder / f"{newest}.json").read_text())
    sample = record["config"]["sample"]
    assert (sample["solver"], sample["steps"], sample["guide_scale"]) == ("euler", 6, 2.5)
    assert (record["seed"], record["prompt"]) == (7, "a red ball")
    values = [value for value, *_ in comfy.updates]
    assert values == sorted(values)
    assert values[-1] == 6
    assert {total for _, total, _ in comfy.updates} == {6}


def test_an_image_is_the_first_frame_and_another_the_last(
    pack: ModuleType, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av", reason="the package av is not installed (pip install '.[dev]')")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)
    images = torch.from_numpy(pixels).to(torch.float32) / 255
    with_alpha = torch.cat([images, torch.zeros(2, 48, 64, 1)], dim=-1)
    frames, _ = run_node(pack, "WanDistImageToVideo", image=with_alpha, steps=2)
    newest = service.list_ids("limit=1")[0]
    assert torch.equal(frames, read_frames(service, newest))
    record = json.loads((service.folder / f"{newest}.json").read_text())
    with Image.open(record["config"]["image"]) as sent:
        assert np.array_equal(np.asarray(sent), pixels[0])
    with pytest.raises(pack.ServiceError, match="first_frame"):  # the toy has no such task
        run_node(pack, "WanDistImageToVideo", image=images, last_image=images[1:])


def test_a_last_image_is_sent_to_tasks_that_have_one(
    pack: ModuleType, comfy: Comfy, tmp_path: Path
) -> None:
    comfy.num_updates = 0  # there is no rank, so the request is cancelled once it is accepted
    images = torch.rand(2, 48, 64, 3)
    services = tmp_path / "custom_nodes/wan-dist/services.json"
    with open_front(tmp_path / "out", "task=i2v-A14B", "size=832x480") as front:
        services.write_text(json.dumps({"toy": {"url": f"http://{front.address.netloc}/"}}))
        with pytest.raises(Interrupted):
            run_node(pack, "WanDistImageToVideo", image=images, last_image=images[1:])
        assert front.list_ids() == []
    request, deletion = (tmp_path / "out/service/requests.jsonl").read_text().splitlines()
    assert json.loads(request)["images"].keys() == {"first_frame", "last_frame"}
    assert len(set(json.loads(request)["images"].values())) == 2
    assert json.loads(request)["id"] in deletion


def test_an_interruption_cancels_the_video(
    pack: ModuleType, service: Service, comfy: Comfy
) -> None:
    comfy.num_updates = 4
    with pytest.raises(Interrupted):
        run_node(pack, "WanDistTextToVideo", steps=400)
    previews = [preview for *_, preview in comfy.updates if preview]
    assert previews, "the service shows the unfinished video"
    kind, picture, max_size = previews[0]
    assert (kind, picture.size, picture.mode, max_size) == ("JPEG", (32, 24), "RGB", 512)
    states = service.get("/v1/videos?limit=100")["data"]
    assert {state["status"] for state in states} <= {"completed"}


def test_what_the_service_says_is_the_nodes_error(
    pack: ModuleType, service: Service, tmp_path: Path
) -> None:
    before = service.list_ids()
    for inputs, message in (
        ({"num_frames": 6}, "frame_num=6 is not 4n . 1"),
        ({"settings": "stepz=3"}, "unknown key 'stepz'"),
        ({"settings": "output.dir=/tmp"}, "output.dir"),
    ):
        with pytest.raises(pack.ServiceError, match=message):
            run_node(pack, "WanDistTextToVideo", **inputs)
    for inputs, message in (
        ({"settings": "steps 3"}, "'steps 3' is not key=value"),
        ({"width": 64}, "give width and height"),
    ):
        with pytest.raises(ValueError, match=message):
            run_node(pack, "WanDistTextToVideo", **inputs)
    services = tmp_path / "custom_nodes/wan-dist/services.json"
    services.write_text(json.dumps({"toy": {"url": "http://127.0.0.1:9"}}))
    with pytest.raises(pack.ServiceError, match=r"127\.0\.0\.1:9 does not answer: .*refused"):
        run_node(pack, "WanDistTextToVideo")
    assert service.list_ids() == before
