"""Write the gallery page of a results folder: missing contact sheets, then index.html; prints its path.

    python -m launch gallery outputs

The page opens from disk, in any browser, and needs no network: videos with their prompts and settings,
search and filters, sweeps side by side, and a timeline of each rank of a run. Copy the whole folder to show
it elsewhere.
"""

import sys

from launch.runs import read_results_folder
from wan_dist.runtime.errors import InputError


def main(arguments: list[str]) -> None:
    """Write the page and print its path; raises InputError for a missing folder, or one without records."""
    folder, _, _ = read_results_folder(arguments, "gallery")
    from wan_dist.output.gallery.page import (
        write_page,
    )  # imports Jinja2 and Pillow, which other commands need not wait for

    try:
        page_path = write_page(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}") from None
    sys.stdout.write(f"{page_path}\n")
