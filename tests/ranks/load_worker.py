"""One rank that loads its shard of a transformer and notes the most host memory of its own (mapped
files do not count) it held.
"""

import json
import sys
import threading
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from wan_dist.parallel.apply import parallelize_transformer
from wan_dist.parallel.mesh import open_process_groups
from wan_dist.planning.degrees import Degrees
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import open_checkpoint

CPU = torch.device("cpu")


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])
        * 1024
    )


def main(folder: Path, num_ranks: int) -> None:
    with open_process_groups(Degrees(ulysses=num_ranks), CPU, timeout_seconds=120) as groups:
        component = open_checkpoint(folder, TASKS["t2v-14B"], torch.bfloat16).transformers[0]
        before, done = anonymous_bytes(), threading.Event()
        peak = before

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, anonymous_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        model = component.load(
            CPU, prepare_model=lambda model: parallelize_transformer(model, groups, is_sharded=True)
        )
        done.set()
        watcher.join()
        shard = 0
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            shard += local.nbytes
            if isinstance(parameter, DTensor) and name.endswith(
                "ffn.0.weight"
            ):  # rows hold their number, see the test
                first = -(-parameter.shape[0] // num_ranks) * groups.rank
                assert torch.equal(
                    local[:, 0].float(), (first + torch.arange(len(local))).remainder(200).float()
                ), name
        facts = {"shard": shard, "held": peak - before, "read": component.files.bytes_read}
        (folder / f"rank-{groups.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
