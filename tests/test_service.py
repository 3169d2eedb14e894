"""A service: what it makes is what runs make, and nothing that it has accepted is lost or made twice."""

import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file

from tests.conftest import FIXTURES
from tests.service import TINY, Service
from wan_dist.run import main

ROOT = Path(__file__).parents[1]
LONG = {"prompt": "a blue cube", "steps": 400}
"""A request that takes longer than any test looks at it."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    one = Service(tmp_path_factory.mktemp("service") / "out", "serve.max_queue=4")
    yield one
    assert one.stop() == [75]
    assert "Traceback" not in one.log.read_text()


def list_files(folder: Path, video_id: str) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if video_id in path.name)


def test_a_video_is_that_of_a_run(service: Service, tmp_path: Path) -> None:
    fields = {
        "prompt": "a red ball, moving",
        "seed": 7,
        "num_frames": 9,
        "output.save_tensor": True,
    }
    answer = service.post(fields | {"model": "toy", "size": "48x64", "flow_shift": 2})
    assert answer.status == 200
    video = answer.json
    expected = {"object": "video", "model": "toy", "status": "queued", "progress": 0, "seed": 7}
    assert video | expected == video
    assert (video["size"], video["seconds"], video["error"]) == ("48x64", "0.5625", None)
    events = list(service.follow(video["id"]))
    names = [name for name, _ in events]
    assert names == sorted(names, key=["queued", "in_progress", "completed"].index)
    assert {"in_progress", "completed"} <= set(names)
    progress = [event["progress"] for _, event in events]
    assert progress == sorted(progress)
    assert progress[-1] == 100
    assert all(event["progress"] < 100 for name, event in events if name != "completed")
    final = service.get(f"/v1/videos/{video['id']}")
    assert final == events[-1][1]
    assert video["created_at"] <= final["started_at"] <= final["completed_at"] <= time.time()

    single = [*TINY, "prompt=a red ball, moving", "seed=7", "frame_num=9", "size=48x64"]
    single += ["sample.shift=2", "output.name=single", "output.save_tensor=true"]
    assert main([*single, f"output.dir={tmp_path}"]) == 0
    ours, theirs = (
        load_file(folder / f"{name}.safetensors")["video"]
        for folder, name in ((service.folder, video["id"]), (tmp_path, "single"))
    )
    assert torch.equal(ours, theirs)
    content = service.ask("GET", f"/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert content.body == (service.folder / f"{video['id']}.mp4").read_bytes()
    sheet = service.ask("GET", f"/v1/videos/{video['id']}/content?variant=thumbnail")
    assert (sheet.status, sheet.body[:2]) == (200, b"\xff\xd8")


def test_a_form_is_as_good_and_the_list_has_pages(service: Service) -> None:
    before = service.list_ids()
    fields = {"prompt": "@a ball", "seconds": "0.3", "fps": "16", "sample.solver": "euler"}
    ids = [service.post_form(fields | {"seed": str(seed)}).json["id"] for seed in (1, 2, 3)]
    assert service.list_ids() == [*before, *ids]
    page = service.get("/v1/videos?limit=2")
    assert [video["id"] for video in page["data"]] == [ids[2], ids[1]]
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (ids[2], ids[1])
    assert service.list_ids(f"limit=1&after={ids[1]}") == [ids[0]]
    assert service.list_ids(f"order=asc&after={ids[0]}") == ids[1:]
    assert service.list_ids(f"order=asc&after={ids[2]}") == []
    circle = ("circle.png", (FIXTURES / "circle.png").read_bytes())
    with_image = service.post_form(fields, {"input_reference": circle}).json["id"]
    for video_id in ids:
        assert service.wait(video_id)["prompt"] == "@a ball"
        record = json.loads((service.folder / f"{video_id}.json").read_text())
        assert (record["prompt"], record["num_frames"]) == ("@a ball", 5)
    service.wait(with_image)
    record = json.loads((service.folder / f"{with_image}.json").read_text())
    assert Path(record["config"]["image"]).read_bytes() == circle[1]
    assert record["stages"].keys() - {"text", "context", "load", "denoise", "decode", "save"}
    metrics = read_metrics(service)
    assert metrics["wan_dist_videos", "completed"] == len(before) + 4
    assert metrics["wan_dist_steps_total", ""] >= 9
    assert metrics["wan_dist_step_seconds_count", ""] == metrics["wan_dist_steps_total", ""]
    assert metrics["wan_dist_stage_seconds_count", "denoise"] >= 3

    assert list_files(service.folder, ids[1])
    assert service.ask("DELETE", f"/v1/videos/{ids[1]}").json == {
        "id": ids[1],
        "object": "video.deleted",
        "deleted": True,
    }
    assert list_files(service.folder, ids[1]) == []
    assert list_files(service.folder, with_image)
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("GET", "/events")):
        assert service.ask(method, f"/v1/videos/{ids[1]}{path}").status == 404
    assert service.list_ids() == [*before, ids[0], ids[2], with_image]
    assert service.list_ids(f"order=asc&after={ids[1]}") == [ids[2], with_image]
    assert service.list_ids(f"limit=1&after={ids[1]}") == [ids[0]]


def read_metrics(service: Service) -> dict[tuple[str, str], float]:
    text = service.ask("GET", "/metrics").body.decode()
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_videos_are_cancelled_and_too_many_refused(service: Service) -> None:
    running = service.post(LONG).json["id"]
    service.wait(running, "in_progress", step=2)
    waiting = [service.post(LONG).json["id"] for _ in range(4)]
    refused = service.post(LONG)
    assert (refused.status, refused.json["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) > 0
    assert service.ask("GET", f"/v1/videos/{waiting[0]}/content").status == 409
    started = time.monotonic()
    assert service.ask("DELETE", f"/v1/videos/{waiting[0]}").json["deleted"] is True
    assert service.get(f"/v1/videos/{running}")["status"] == "in_progress"
    assert service.post(LONG).status == 200  # in its place
    assert service.ask("DELETE", f"/v1/videos/{running}").json["deleted"] is True
    assert time.monotonic() - started < 30
    assert list_files(service.folder, running) == []
    for video_id in service.list_ids():
        if service.get(f"/v1/videos/{video_id}")["status"] != "completed":
            assert service.ask("DELETE", f"/v1/videos/{video_id}").json["deleted"] is True
    service.wait(service.post({"prompt": "a ball"}).json["id"])
    for video_id in (running, *waiting):
        assert list_files(service.folder, video_id) == []


def test_the_texts_of_what_waits_are_encoded_together(service: Service) -> None:
    running = service.post(LONG).json["id"]
    service.wait(running, "in_progress", step=1)
    prompts = ["a green star", "a white square", "a black triangle"]
    ids = [service.post({"prompt": prompt}).json["id"] for prompt in prompts]
    assert service.ask("DELETE", f"/v1/videos/{running}").status == 200
    for video_id in ids:
        service.wait(video_id)
    records = [json.loads((service.folder / f"{video_id}.json").read_text()) for video_id in ids]
    assert ["text" in record["stages"] for record in records] == [True, False, False]


def test_the_commands_of_the_docs(service: Service, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes((FIXTURES / "circle.png").read_bytes())
    page = (ROOT / "docs/service.md").read_text(encoding="utf-8")
    commands = [line.strip() for line in page.splitlines() if line.startswith("    curl ")]
    assert len(commands) >= 7
    video_id, answers = "", []
    for command in commands:
        if video_id:
            service.wait(video_id)
        # the page's size and length take the toy too long
        for shown, run in (
            ("localhost:8000", service.address.netloc),
            ("/ID", f"/{video_id}"),
            ("832x480 -F seconds=5", "64x48 -F seconds=0.3"),
            ("curl ", "curl --silent --show-error --fail-with-body "),
        ):
            command = command.replace(shown, run)
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        answers.append(done.stdout)
        video_id = video_id if len(answers) > 2 else json.loads(done.stdout)["id"]
    objects = [json.loads(answer)["object"] for answer in answers[:4]]
    assert objects == ["video", "video", "list", "video"]
    assert "event: completed" in answers[4]
    assert (tmp_path / "cats.mp4").stat().st_size > 1000
    assert json.loads(answers[6])["deleted"] is True


def test_a_front_that_is_killed_comes_back_with_the_same_list(service: Service) -> None:
    running, ids = service.post(LONG | {"steps": 30}).json["id"], service.list_ids()
    service.wait(running, "in_progress", step=1)
    os.kill(service.find_front(), signal.SIGKILL)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            assert service.list_ids() == ids
            break
        except OSError:
            time.sleep(0.05)
    assert service.wait(running)["step"] == 30


def test_what_is_killed_goes_on(tmp_path: Path) -> None:
    """Finished videos stay as they are, and those that wait or were begun are made, under their ids."""
    out = tmp_path / "out"
    first = Service(out)
    requests = [{"prompt": "a ball", "seed": seed, "output.save_tensor": True} for seed in range(3)]
    ids = [first.post(request).json["id"] for request in requests[:2]]
    for video_id in ids:
        first.wait(video_id)
    begun = first.post(LONG | {"steps": 100}, Idempotency_Key="once").json["id"]
    first.wait(begun, "in_progress", step=1)
    ids += [begun, first.post(requests[2]).json["id"], first.post(requests[0]).json["id"]]
    first.ask("DELETE", f"/v1/videos/{ids.pop()}")
    written = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert len(written) == 2
    first.kill()
    with (out / "service/requests.jsonl").open("ab") as file:
        file.write(b'{"id": "video_cut')  # what the front was writing, and had not answered

    second = Service(out)
    assert second.list_ids() == ids
    assert second.post(LONG, Idempotency_Key="once").json["id"] == begun
    assert second.list_ids() == ids
    states = [second.get(f"/v1/videos/{video_id}")["status"] for video_id in ids]
    assert states[:2] == ["completed", "completed"]
    second.wait(begun, "in_progress", step=1)
    second.send_signal(signal.SIGUSR1)  # as Slurm does before a job's time is up
    assert second.wait_for_end() == [75]
    assert len(list(out.glob(f"{begun}.*.state.safetensors"))) == 1

    third = Service(out)
    assert third.list_ids() == ids
    assert [third.wait(video_id)["progress"] for video_id in ids] == [100] * 4
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert len(list(out.glob("*.mp4"))) == 4
    assert "continues from step" in third.log.read_text()
    assert third.stop() == [75]


def test_a_video_that_ends_every_run_fails(tmp_path: Path) -> None:
    """The others are made."""
    out = tmp_path / "out"
    service = Service(out)
    ids = [service.post(LONG).json["id"], service.post({"prompt": "a ball"}).json["id"]]
    for _ in range(3):
        service.wait(ids[0], "in_progress", step=1)
        service.kill()
        service = Service(out)
    service.wait(ids[1])
    failed = service.get(f"/v1/videos/{ids[0]}")
    message = "3 runs of the service have ended while they made this video"
    assert (failed["status"], failed["error"]["message"]) == ("failed", message)
    assert service.ask("DELETE", f"/v1/videos/{ids[0]}").json["deleted"] is True
    assert list_files(out, ids[0]) == []
    assert service.stop() == [75]


@pytest.mark.parametrize("degrees", ["parallel.dp=1 parallel.cfg=2", "parallel.dp=2"])
def test_two_ranks_go_on_after_one_was_killed(degrees: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = Service(out, *degrees.split(), num_ranks=2)
    cancelled = first.post(LONG).json["id"]
    first.wait(cancelled, "in_progress", step=1)
    assert first.ask("DELETE", f"/v1/videos/{cancelled}").json["deleted"] is True
    ids = [first.post(LONG | {"steps": 40, "seed": 1}).json["id"]]
    ids += [first.post({"prompt": "a ball", "seed": seed}).json["id"] for seed in range(4)]
    first.wait(ids[0], "in_progress", step=1)
    first.send_signal(signal.SIGKILL, 1)
    if "dp=2" in degrees:  # the other replica goes on, as no launcher ends it
        first.kill()
    assert first.wait_for_end()[0] != 0

    second = Service(out, *degrees.split(), num_ranks=2)
    assert second.list_ids() == ids
    for video_id in ids:
        second.wait(video_id)
    assert list_files(out, cancelled) == []
    assert len(list(out.glob("*.mp4"))) == len(ids)
    records: list[dict[str, Any]] = [
        json.loads((out / f"{video_id}.json").read_text()) for video_id in ids
    ]
    assert all(record["status"] == "done" for record in records)
    events = [
        line for line in second.log.read_text().splitlines() if ": " in line and "done" in line
    ]
    assert all(sum(video_id in line for line in events) <= 1 for video_id in ids), "made once"
    assert second.stop() == [75, 75]


def test_a_video_is_seen_while_it_is_made(tmp_path: Path) -> None:
    events_file = tmp_path / "events.jsonl"
    settings = ["output.preview=2", f"output.events={events_file}"]
    service = Service(tmp_path / "out", *settings)
    try:
        video = service.post(LONG).json
        assert video["preview"] is None
        content = f"/v1/videos/{video['id']}/content"
        assert service.ask("GET", f"{content}?variant=preview").status == 404
        service.wait(video["id"], "in_progress", step=4)
        seen = service.get(f"/v1/videos/{video['id']}")
        assert seen["preview"] == f"{content}?variant=preview"
        answer = service.ask("GET", seen["preview"])
        assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
        with Image.open(io.BytesIO(answer.body)) as picture:
            assert picture.size == (32, 24)  # half of 64x48
        assert service.ask("DELETE", f"/v1/videos/{video['id']}").json["deleted"]
        assert list_files(service.folder, video["id"]) == []
        page = service.ask("GET", "/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        short = service.post({"prompt": "a red ball"}).json
        done = service.wait(short["id"])
        assert done["preview"] is None
        assert not (service.folder / f"{short['id']}.preview.jpg").exists()
    finally:
        service.stop()
    events = [json.loads(line) for line in events_file.read_text().splitlines()]
    previews = [event for event in events if event["event"] == "preview"]
    assert {event["job"] for event in previews} == {video["id"], short["id"]}
    assert all(event["step"] % 2 == 0 for event in previews)
    assert previews[0]["file"] == str(service.folder / f"{video['id']}.preview.jpg")
    assert not list_files(service.folder, video["id"])
