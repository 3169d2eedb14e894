"""The gallery's page in a browser, from disk: what people do with it, and that what they write does
nothing.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chromium import launch_chromium, needs_chromium
from tests.gallery_folder import describe_source, write_record, write_run, write_video
from wan_dist.config.video_formats import VIDEO_FORMATS
from wan_dist.output.gallery.page import write_page
from wan_dist.output.video_encoding import VideoEncoding
from wan_dist.output.video_file import save_video

pytestmark = needs_chromium
HOSTILE = [
    "<script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "{{7*7}}",
    "</script><script>window.hacked=1</script>",
    "javascript:window.hacked=1",
    "'\"`quotes` & ${window.hacked=1}<!--",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launch_chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one prompt, a sweep of two settings, a failed one, one in 8 bits, and hostile ones."""
    place = tmp_path_factory.mktemp("out & puts #1")
    names = []
    for seed in (1, 2):
        names.append(write_record(place, f"seed-{seed}", prompt="two seeds of a kite", seed=seed))
    for steps in (4, 8):
        for guide in (1.0, 5.0):
            names.append(
                write_record(
                    place,
                    f"sweep-{steps}-{guide}",
                    prompt="a sweep",
                    sample__steps=steps,
                    sample__guide_scale=guide,
                )
            )
    names.append(
        write_record(
            place,
            "small",
            prompt="in 8 bits",
            quant="int8",
            seed=3,
            facts={"distance": ["quant=int8"]},
        )
    )
    names.append(write_record(place, "a \"quoted\" 'name' <b>#1?%", prompt="an odd name", seed=4))
    names += [
        write_record(place, f"hostile-{number}", prompt=text, seed=5)
        for number, text in enumerate(HOSTILE)
    ]
    error = 'out of memory <img src=x onerror="window.hacked=1">'
    write_record(
        place, "failed", prompt="too large", seed=6, facts={"status": "failed", "error": error}
    )
    first = write_video(names[0].with_suffix(".mp4"), num_frames=17)
    for record in names[1:]:
        os.link(first, record.with_name(f"{record.stem}.mp4"))
    write_run(place, command=HOSTILE)
    write_page(place)
    return place


class Visit:
    """A page that is open, with what it said and asked for."""

    def __init__(self, browser: Any, folder: Path, **options: Any) -> None:
        self.context = browser.new_context(
            **({"viewport": {"width": 1280, "height": 900}} | options)
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda fault: self.said.append(str(fault)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page.goto((folder / "index.html").as_uri())

    def shown(self) -> list[str]:
        """The prompts of the cards, also of those out of sight, which have no inner text yet."""
        return self.page.locator(".card .prompt").all_text_contents()

    def end(self) -> None:
        """Nothing was said, asked of others, or done by a prompt."""
        assert self.page.evaluate("window.hacked") is None
        self.context.close()
        assert self.said == []
        assert {url.partition("://")[0] for url in self.asked} == {"file"}


@pytest.fixture
def visit(browser: Any, folder: Path) -> Iterator[Visit]:
    opened = Visit(browser, folder)
    yield opened
    opened.end()


def test_a_video_plays_under_the_mouse(visit: Visit) -> None:
    card = visit.page.locator(".card", has_text="an odd name")
    card.locator(".media").hover()
    video = card.locator("video")
    handle = video.element_handle()
    visit.page.wait_for_function("video => video.currentTime > 0.3", arg=handle)
    assert video.evaluate(
        "video => [video.muted, video.loop, video.controls, video.videoWidth]"
    ) == [True, True, False, 64]
    box = video.bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 0.9 * box["height"])
    visit.page.wait_for_function("video => video.controls", arg=handle)
    assert "touched" in card.locator(".media").get_attribute("class")
    visit.page.locator("h1").hover()
    visit.page.wait_for_function("video => video.paused && !video.controls", arg=handle)


def test_a_source_plays_beside_its_result(browser: Any, tmp_path: Path) -> None:
    source = write_video(tmp_path / "a & #1.mov", num_frames=33, seed=1)
    entry = describe_source(source)
    gone = entry | {"file": "/far/b.mp4", "sha256": "0" * 64}
    for name, facts in (("made", entry), ("lost", gone)):
        write_record(tmp_path, name, prompt=f"{name} from a video", facts={"source": facts})
        write_video(tmp_path / f"{name}.mp4", num_frames=17)
    write_page(tmp_path)
    visit = Visit(browser, tmp_path)
    card = visit.page.locator(".card", has_text="made from a video")
    assert card.locator("figcaption").all_text_contents() == ["src_video=a & #1.mov", "result"]
    videos = "[...document.querySelectorAll('[aria-label=\"made from a video\"] video')]"
    for hovered in (1, 0):  # the result, and the source
        card.locator(".media").nth(hovered).hover()
        visit.page.wait_for_function(
            f"() => {videos}.every(video => !video.paused && video.currentTime > 0.3)"
        )
        times = visit.page.evaluate(f"{videos}.map(video => video.currentTime)")
        assert len(times) == 2
        assert max(times) - min(times) < 0.3
        visit.page.locator("h1").hover()
        visit.page.wait_for_function(f"() => {videos}.every(video => video.paused)")
    lost = visit.page.locator(".card", has_text="lost from a video")
    assert "The source is not here" in (lost.text_content() or "")
    assert lost.locator("video").count() == 1
    visit.end()


def test_a_video_plays_from_the_keyboard(visit: Visit) -> None:
    video = visit.page.locator(".card video").first
    video.focus()
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_function("video => video.currentTime > 0.2", arg=video.element_handle())
    visit.page.keyboard.press("Enter")
    assert video.evaluate("video => video.paused")
    visit.page.locator("#tab-videos").focus()
    visit.page.keyboard.press("ArrowLeft")
    assert visit.page.locator("#runs").is_visible()


def test_what_a_browser_does_not_play_is_said(browser: Any, tmp_path: Path) -> None:
    frames = torch.arange(9 * 64 * 64 * 3).view(9, 64, 64, 3).remainder(251).byte()
    for name, video_format in VIDEO_FORMATS.items():
        file = tmp_path / f"{name}{video_format.suffix}"
        save_video(file, [frames], fps=8, num_frames=9, encoding=VideoEncoding(name))
        facts = {"file": f"/far/{file.name}"}
        write_record(tmp_path, name, prompt=f"format {name}", output__video=name, facts=facts)
    write_page(tmp_path)
    visit = Visit(browser, tmp_path)
    for name, video_format in VIDEO_FORMATS.items():
        card = visit.page.locator(".card", has_text=f"format {name}")
        card.scroll_into_view_if_needed()
        assert card.locator("video").count() == video_format.is_playable
        if video_format.playback_note:
            assert video_format.playback_note in card.inner_text()
        if not video_format.is_playable:
            assert card.locator("a.media").get_attribute("href") == f"./{name}{video_format.suffix}"
        elif not video_format.playback_note:
            card.locator(".media").hover()
            video = card.locator("video").element_handle()
            visit.page.wait_for_function("video => video.currentTime > 0.2", arg=video)
    visit.end()


def test_search_filters_and_order(visit: Visit) -> None:
    page = visit.page
    assert len(visit.shown()) == 15
    page.locator("#search").fill("KITE seed=2")
    page.wait_for_function("() => document.querySelectorAll('.card').length === 1")
    assert page.locator("#count").inner_text() == "1 of 15"
    page.locator("#search").fill("no such thing")
    page.wait_for_function("() => document.querySelectorAll('.card').length === 0")
    page.get_by_role("button", name="Show all").click()
    assert len(visit.shown()) == 15
    options = {
        key: page.locator(f"select[data-key={key}]")
        for key in ("task", "run", "status", "lossy", "seed", "sort")
    }
    assert [options[key].count() for key in options] == [0, 0, 1, 1, 1, 1]
    options["status"].select_option(label="failed")
    assert visit.shown() == ["too large"]
    assert (
        'out of memory <img src=x onerror="window.hacked=1">'
        in page.locator(".card").text_content()
    )
    options["status"].select_option(index=0)
    options["lossy"].select_option(label="quant=int8")
    assert visit.shown() == ["in 8 bits"]
    options["lossy"].select_option(index=0)
    options["seed"].select_option(label="seed 42")
    assert visit.shown() == ["a sweep"] * 4
    options["seed"].select_option(index=0)
    options["sort"].select_option(label="By prompt")
    assert visit.shown().index("a sweep") < visit.shown().index("two seeds of a kite")


def test_a_sweep_is_a_grid_that_plays_in_step(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("button", name="Compare sweep-4-1.0").click()
    assert page.locator("#compare-title").inner_text() in (
        "steps × guide scale",
        "guide scale × steps",
    )
    assert page.locator("#compare tbody tr").count() == 2
    videos = "[...document.querySelectorAll('#compare video')]"
    page.wait_for_function(
        f"() => {videos}.length === 4 && {videos}.every(video => !video.paused && video.currentTime > 0.3)"
    )
    times = page.evaluate(f"{videos}.map(video => video.currentTime)")
    assert max(times) - min(times) < 0.3
    page.locator("#compare-at").fill("500")
    page.wait_for_function(
        f"() => {videos}.every(video => video.paused && Math.abs(video.currentTime - 17 / 16) < 0.1)"
    )
    page.keyboard.press("Escape")
    assert not page.locator("#compare").is_visible()
    page.get_by_role("button", name="Compare seed-1").click()
    assert page.locator("#compare h3").all_inner_texts() == ["seed 1", "seed 2"]
    page.get_by_role("button", name="Close").click()
    page.locator("#tab-comparisons").click()
    assert page.locator(".sweep").count() == 2


def test_the_command_is_copied(visit: Visit) -> None:
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.page.get_by_role("button", name="Copy the command for sweep-8-5.0").click()
    visit.page.get_by_text("Command copied").wait_for()
    copied = visit.page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("python -m wan_dist.run task=toy 'prompt=a sweep'")
    assert "sample.steps=8" in copied


def test_hostile_texts_are_shown_as_they_are(visit: Visit) -> None:
    assert set(HOSTILE) <= set(visit.shown())
    assert visit.page.locator("img[src=x], a[href^=javascript]").count() == 0
    for number in range(len(HOSTILE)):
        visit.page.locator(f".card[aria-label] >> nth={number}").locator(".prompt").click()
    visit.page.locator("#tab-runs").click()
    assert HOSTILE[0] in visit.page.locator(".command").text_content()


def test_a_timeline_tells_what_a_bar_is(visit: Visit) -> None:
    visit.page.locator("#tab-runs").click()
    visit.page.locator(".lanes .s-denoise").first.hover()
    assert (
        visit.page.locator("#tip").inner_text()
        == "denoise, 7.5 s · 3.4 GiB GPU · 1.0 GiB host · job-0"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_phones(scheme: str, browser: Any, folder: Path) -> None:
    visit = Visit(
        browser,
        folder,
        color_scheme=scheme,
        viewport={"width": 360, "height": 740},
        has_touch=True,
        is_mobile=True,
    )
    for tab in ("videos", "comparisons", "runs"):
        visit.page.locator(f"#tab-{tab}").tap()
        assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
    visit.page.locator("#tab-videos").tap()
    video = visit.page.locator(".card", has_text="an odd name").locator("video")
    video.tap()
    visit.page.wait_for_function("video => video.currentTime > 0.2", arg=video.element_handle())
    for selector in (".prompt", ".facts li", ".acts button", "#count", "h1"):
        assert visit.page.locator(selector).first.evaluate(CONTRAST) >= 4.5, selector
    visit.end()


CONTRAST = """element => {
  const linear = (part) => (part <= 10 ? part / 3294 : ((part / 255 + 0.055) / 1.055) ** 2.4);
  const bright = (colour) => {
    const [red, green, blue] = colour.match(/\\d+/g).map(linear);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05;
  };
  const [one, other] = [
    getComputedStyle(element).color, getComputedStyle(document.body).backgroundColor
  ].map(bright);
  return Math.max(one, other) / Math.min(one, other);
}"""


def test_many_cards_come_as_they_are_needed(browser: Any, tmp_path: Path) -> None:
    write_video(tmp_path / "job-0.mp4")
    for number in range(1000):
        write_record(tmp_path, f"job-{number}", prompt=f"ball {number}")
        for suffix in ("mp4", "jpg") if number else ():
            os.link(tmp_path / f"job-0.{suffix}", tmp_path / f"job-{number}.{suffix}")
        if not number:
            write_page(tmp_path)
    write_page(tmp_path)
    visit = Visit(browser, tmp_path)
    assert len(visit.shown()) < 120
    before = visit.page.evaluate(
        "performance.timing.domContentLoadedEventEnd - performance.timing.responseEnd"
    )
    assert before < 2000
    visit.page.mouse.move(600, 500)
    visit.page.evaluate("scrollTo(0, document.body.scrollHeight)")
    visit.page.wait_for_function("() => document.querySelectorAll('.card').length > 60")
    visit.page.locator("#search").fill("ball 777")
    visit.page.wait_for_function("() => document.querySelectorAll('.card').length === 1")
    visit.end()
