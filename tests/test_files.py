"""Results in each format: made, found again, damaged and made again, and made again from the file alone."""

import json
import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import pytest

from tests.test_batch import write_jobs
from tests.unit.output.test_video_formats import SAID, SOUND_SAID, ask, make_sound
from wan_dist.config.video_formats import VIDEO_FORMATS
from wan_dist.output.gallery.page import write_page
from wan_dist.output.gallery.records import read_records
from wan_dist.run import main
from wan_dist.runtime.ffmpeg import read_comment, read_packets

TOY = [
    *("task=toy", "dtype=float32", "device=cpu", "size=64x48", "frame_num=5", "sample.steps=2"),
    *("prompt=a red ball", "seed=7", "cache.dir=null"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a result in each format, of one batch."""
    folder = tmp_path_factory.mktemp("formats")
    jobs: list[dict[str, object]] = [{"name": name, "output.video": name} for name in VIDEO_FORMATS]
    jobs_file = write_jobs(folder / "jobs.jsonl", jobs)
    assert main([*TOY, jobs_file, f"output.dir={folder / 'out'}"]) == 0
    return folder


def find(folder: Path, name: str) -> Path:
    return folder / "out" / f"{name}{VIDEO_FORMATS[name].suffix}"


def test_a_batch_has_each_format(folder: Path) -> None:
    for name in VIDEO_FORMATS:
        file = find(folder, name)
        assert re.search(SAID[name][1], ask(file))
        assert len(read_packets(file).intervals) == 5
        assert file.with_suffix(".jpg").exists()
        record = json.loads(file.with_suffix(".json").read_text())
        assert record["file"] == str(file)
        assert json.loads(read_comment(file) or "")["digest"] == record["digest"]


def test_only_what_is_damaged_is_made_again(folder: Path) -> None:
    for name in ("ffv1", "vp9"):
        file = find(folder, name)
        file.write_bytes(file.read_bytes()[:-1])
    before = {name: find(folder, name).stat().st_mtime_ns for name in VIDEO_FORMATS}
    assert main([*TOY, f"jobs={folder / 'jobs.jsonl'}", f"output.dir={folder / 'out'}"]) == 0
    after = {name: find(folder, name).stat().st_mtime_ns for name in VIDEO_FORMATS}
    assert {name for name in before if before[name] != after[name]} == {"ffv1", "vp9"}


def test_another_format_needs_no_denoising(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result's digest has the format, that of its latents has not."""
    monkeypatch.setattr(
        "wan_dist.pipeline.denoise.encode_conditioning",
        lambda *_: pytest.fail("the latents are there"),
    )
    jobs_file = write_jobs(folder / "others.jsonl", [{"name": "png", "output.video": "prores"}])
    digest = json.loads((folder / "out/png.json").read_text())
    assert main([*TOY, jobs_file, f"output.dir={folder / 'out'}"]) == 0
    assert re.search(SAID["prores"][1], ask(folder / "out/png.mov"))
    changed = json.loads((folder / "out/png.json").read_text())
    assert changed["latents_digest"] == digest["latents_digest"]
    assert changed["digest"] != digest["digest"]


def test_the_page_tells_what_browsers_do_not_play(folder: Path) -> None:
    videos = {video.name: video for video in read_records(folder / "out")}
    assert all(videos[name].video == find(folder, name) for name in VIDEO_FORMATS)
    page = write_page(folder / "out").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    shown = {video["name"]: video for video in json.loads(data[1])["videos"]}
    assert {name for name, video in shown.items() if not video["plays"]} == {
        *("prores", "ffv1", "png")
    }
    assert shown["ffv1"]["note"] == "browsers do not play FFV1"
    assert shown["h264"]["note"] == shown["vp9"]["note"] == shown["av1"]["note"] == ""
    assert "only where the device decodes it" in shown["h265"]["note"]


@pytest.mark.parametrize("name", ["h264", "ffv1"])
def test_a_video_is_made_again_from_itself(name: str, tmp_path: Path) -> None:
    """Also after it went through a program that copies its streams into another container."""
    first = [*TOY, "seed=-1", f"output.dir={tmp_path / 'first'}", f"output.video={name}"]
    assert main([*first, 'prompt=a "red" ball; = \\ # 球, bouncing']) == 0
    (file,) = (tmp_path / "first").glob(f"*{VIDEO_FORMATS[name].suffix}")
    copy = tmp_path / "copy.mkv"
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([ffmpeg, "-v", "error", "-i", file, "-c", "copy", copy], check=True)
    again = [f"from={copy}", f"output.dir={tmp_path / 'again'}", "device=cpu", "cache.dir=null"]
    assert main(again) == 0
    (made,) = (tmp_path / "again").glob(f"*{VIDEO_FORMATS[name].suffix}")
    record, first_record = (
        json.loads(path.with_suffix(".json").read_text()) for path in (made, file)
    )
    assert record["seed"] == first_record["seed"]
    assert record["prompt"] == 'a "red" ball; = \\ # 球, bouncing'
    frames = [read_frames_of(path) for path in (file, made)]
    assert frames[0] == frames[1]


def read_frames_of(path: Path) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-f", "rawvideo", "-"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def test_settings_are_left_out_on_request(tmp_path: Path) -> None:
    assert main([*TOY, f"output.dir={tmp_path}", "output.name=a", "output.metadata=false"]) == 0
    assert read_comment(tmp_path / "a.mp4") is None
    assert b"red ball" not in (tmp_path / "a.mp4").read_bytes()


def test_sound_lies_under_a_video(tmp_path: Path) -> None:
    sound = make_sound(tmp_path / "sound.wav", 1.0)
    settings = [*TOY, f"output.dir={tmp_path}", "output.name=a", f"output.audio={sound}"]
    assert main(settings) == 0
    assert SOUND_SAID["h264"] in ask(tmp_path / "a.mp4")
    made = (tmp_path / "a.mp4").stat().st_mtime_ns
    assert main(settings) == 0
    assert (tmp_path / "a.mp4").stat().st_mtime_ns == made
    make_sound(sound, 0.2)
    assert main(settings) == 0
    assert (tmp_path / "a.mp4").stat().st_mtime_ns > made


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["output.video=mpeg2"], "output.video=mpeg2 is not one of h264, h265, av1, vp9"),
        (["output.video=prores", "output.crf=5"], "output.crf=5: prores has no rate factor"),
        (["output.audio=none.wav"], "output.audio=none.wav cannot be read"),
        (["task=t2i-14B", "output.video=av1"], "output.video=av1 is for videos, and t2i-14B makes"),
        (["from=none.mp4"], "from=none.mp4 cannot be read: No such file or directory"),
    ],
)
def test_bad_input_is_a_line(
    settings: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["prompt=a ball", f"output.dir={tmp_path}"]
    task = [] if settings[0].startswith("task=") else ["task=toy"]
    assert main([*task, *given, *settings]) == 2
    assert said in capsys.readouterr().err
