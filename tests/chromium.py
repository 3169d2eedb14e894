"""Headless Chromium for tests of pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here (on Debian: apt-get install chromium)"
)


@contextmanager
def launch_chromium() -> Iterator[Any]:
    """Yield a browser; skips the test where playwright is not installed."""
    api = pytest.importorskip(
        "playwright.sync_api",
        reason="the package playwright is not installed (pip install '.[dev]')",
    )
    with api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()
