"""The VAE over several ranks: strips with traded edges make the same video, and the same latents,
as one rank.
"""

import json
from pathlib import Path

import pytest

from tests.forked import run_ranks


@pytest.mark.parametrize("num_ranks", [3, 4])
def test_a_video_split_over_ranks_is_the_same_video(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(num_ranks, "tests.ranks.vae_worker", str(tmp_path))
    errors = json.loads((tmp_path / "errors.json").read_text())
    print(json.dumps(errors, indent=2))
    assert len(errors) >= 2 * 13 + 2 * (num_ranks < 4)
    assert all(error < (1e-4 if "golden" in case else 2e-5) for case, error in errors.items())
