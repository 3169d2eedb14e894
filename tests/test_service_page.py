"""The service's page in a browser: the videos that are made, their pictures, and the token."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chromium import launch_chromium, needs_chromium
from tests.service import Service

pytestmark = needs_chromium
HOSTILE = '"><img src=x onerror="window.hacked=1"></script><script>window.hacked=1</script>'


@pytest.fixture
def page() -> Iterator[Any]:
    with launch_chromium() as chromium:
        yield chromium.new_page()


def url_of(service: Service) -> str:
    return f"http://{service.address.netloc}/"


def test_a_video_is_seen_from_its_first_steps_to_the_file(page: Any, tmp_path: Path) -> None:
    service = Service(tmp_path / "out", "output.preview=true")
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda line: failures.append(line.text) if "Refused" in line.text else None)
    try:
        page.goto(url_of(service))
        page.wait_for_selector("text=There are no videos yet.")
        service.post({"prompt": HOSTILE, "steps": 60, "seed": 5})
        page.wait_for_selector("article img[src^=blob]")
        assert page.locator("article p").first.inner_text() == HOSTILE
        first = page.locator("article img").get_attribute("src")
        assert page.evaluate("document.querySelector('article img').naturalWidth") == 32
        page.wait_for_selector("article button:has-text('Save'):visible")
        page.wait_for_selector(f"article img:not([src='{first}'])")
        with page.expect_download() as download:
            page.locator("article button:has-text('Save')").click()
        assert download.value.suggested_filename.endswith(".mp4")
        assert Path(download.value.path()).read_bytes() in [
            file.read_bytes() for file in service.folder.glob("*.mp4")
        ]
        assert page.evaluate("window.hacked") is None
        assert not failures
    finally:
        service.stop()


def test_a_video_is_asked_for_and_cancelled(page: Any, tmp_path: Path) -> None:
    service = Service(tmp_path / "out")
    try:
        page.set_viewport_size({"width": 360, "height": 740})
        page.goto(url_of(service))
        page.wait_for_selector("#prompt", state="visible")
        assert page.locator("#images input").get_attribute("name") == "image"
        page.click("summary")
        assert "sample.steps" in page.locator("#known").inner_text()
        page.fill("#prompt", HOSTILE)
        page.fill("#settings", "sample.steps=0")
        page.click("#new button")
        page.wait_for_selector("#answer:has-text('sample.steps=0')")
        page.fill("#settings", "sample.steps=400\nseed=3")
        page.click("#new button")
        page.wait_for_selector("article:has-text('seed 3')")
        assert page.locator("article p").first.inner_text() == HOSTILE
        page.reload()
        page.locator("article button:has-text('Cancel')").click()
        page.wait_for_selector("text=There are no videos yet.")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("window.hacked") is None
    finally:
        service.stop()


def test_a_token_is_asked_for(page: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef0123")
    service = Service(tmp_path / "out", f"serve.token_file={tmp_path / 'token'}")
    try:
        page.goto(url_of(service))
        page.wait_for_selector("#token", state="visible")
        page.fill("#token", "0123456789abcdef0123")
        page.locator("#access button").click()
        page.wait_for_selector("text=There are no videos yet.")
        assert not page.locator("#token").is_visible()
    finally:
        service.stop()
