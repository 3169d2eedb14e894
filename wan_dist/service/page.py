"""The service's page: the newest videos, with a picture of each while it is made."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

_PAGE_FILE = Path(__file__).with_name("page.html")


@cache
def read_page() -> str:
    """Return the page, which tells nothing of the videos: its script asks for them, with the token."""
    return _PAGE_FILE.read_text(encoding="utf-8")


@cache
def build_security_policy() -> str:
    """Return the page's Content-Security-Policy: its own style and script, and answers of the service."""
    hashes = []
    for tag in ("style", "script"):
        match = re.search(f"<{tag}>(.*?)</{tag}>", read_page(), re.DOTALL)
        assert match is not None
        digest = hashlib.sha256(match[1].encode()).digest()
        hashes.append(f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'")
    sources = ["connect-src 'self'", "img-src blob:", "base-uri 'none'", "form-action 'none'"]
    return "; ".join(["default-src 'none'", *hashes, *sources, "frame-ancestors 'none'"])
