"""Make the page that shows a folder's videos: contact sheets that are missing, then index.html; prints where it is.

    python -m launch gallery outputs

The page opens from disk, in any browser, and needs no network: videos with their prompts and settings, search and filters, sweeps side by
side, and what each rank of a run did when. Copy the whole folder to show it elsewhere.
"""

import sys

from launch.runs import read_results_folder
from wan_dist.runtime.errors import InputError


def main(arguments: list[str]) -> None:
    """Write the page and print its path; raises InputError for a folder that is none or has no records."""
    folder, _, _ = read_results_folder(arguments, "gallery")
    from wan_dist.output.gallery.page import (
        write_page,
    )  # it brings Jinja2 and Pillow, which other commands need not wait for

    try:
        page_path = write_page(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}") from None
    sys.stdout.write(f"{page_path}\n")
