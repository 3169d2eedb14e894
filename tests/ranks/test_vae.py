"""The VAE over several ranks: strips with traded edges make the same video, and the same latents, as one rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_a_video_split_over_ranks_is_the_same_video(num_ranks: int, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    done = subprocess.run(
        [*command, "-m", "tests.ranks.vae_worker", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads((tmp_path / "errors.json").read_text())
    print(json.dumps(errors, indent=2))
    assert len(errors) >= 2 * 13 + 2 * (num_ranks < 4)
    assert all(error < (1e-4 if "golden" in case else 2e-5) for case, error in errors.items())
