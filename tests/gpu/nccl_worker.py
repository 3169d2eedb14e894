"""One rank of the check that attention spread over GPUs is attention: Ulysses, ring, and both, on
token counts that do not divide.

Runs on CPUs too: torchrun --standalone --nproc_per_node=4 -m tests.gpu.nccl_worker sdpa
"""

import os
import sys

import torch

from wan_dist.models.attention.inner import InnerAttention, choose_attention
from wan_dist.parallel.mesh import ProcessGroups, open_process_groups, select_local_device
from wan_dist.parallel.ring import RingAttention
from wan_dist.parallel.sequence import SplitSequence
from wan_dist.parallel.ulysses import UlyssesAttention
from wan_dist.parallel.usp import open_usp_attention
from wan_dist.planning.degrees import Degrees

HEADS, WIDTH = 8, 128


def spread_attention(
    groups: ProcessGroups, attention: InnerAttention, whole: list[torch.Tensor], usp: str
) -> torch.Tensor:
    """Return attention of whole q, k, v (1, L, H, D) as (1, L, H D), computed from this rank's
    shares and the others'.
    """
    sequence = SplitSequence(groups.sp)
    num_tokens = whole[0].shape[1]
    table = torch.zeros(num_tokens, 1, 1)
    shares = [
        sequence.split(part.flatten(2), (table, table), (num_tokens,))[0].unflatten(
            2, (HEADS, WIDTH)
        )
        for part in whole
    ]
    if usp == "xfuser":
        return sequence.gather(open_usp_attention(attention, groups)(*shares).flatten(2))
    if groups.ring.size > 1:
        attention = RingAttention(attention, sequence, groups.ring, groups.ulysses.size)
    if groups.ulysses.size > 1:
        attention = UlyssesAttention(attention, sequence, groups.ulysses)
    begun = [attention.start_exchange(part) for part in shares]
    return sequence.gather(attention(*(arrived() for arrived in begun)).flatten(2))


def main(name: str, usp: str = "plain") -> None:
    device = select_local_device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attention = choose_attention(name, device=device, dtype=dtype, head_dim=WIDTH)
    num_ranks = int(os.environ["WORLD_SIZE"])
    spreads = [Degrees(ring=num_ranks), Degrees(ulysses=num_ranks)]
    if num_ranks == 4:
        spreads.append(Degrees(ring=2, ulysses=2))
    if usp == "xfuser":
        spreads = spreads[-1:]  # its groups are made once in a process
    for degrees in spreads:
        with open_process_groups(degrees, device, timeout_seconds=60) as groups:
            for num_tokens in (2048, 1003) if usp == "plain" else (2048, 1020):
                torch.manual_seed(num_tokens)
                whole = [
                    torch.randn(1, num_tokens, HEADS, WIDTH).to(device, dtype) for _ in range(3)
                ]
                first, again = (spread_attention(groups, attention, whole, usp) for _ in range(2))
                exact = InnerAttention()(*(part.double() for part in whole)).flatten(2)
                error = ((first.double() - exact).norm() / exact.norm()).item()
                if groups.rank == 0:
                    print(
                        f"{attention.name} {usp} {degrees} {num_tokens} tokens: {error:.2e}",
                        flush=True,
                    )
                if usp != "plain":
                    other = spread_attention(groups, attention, whole, "plain")
                    difference = ((first.double() - other.double()).norm() / exact.norm()).item()
                    if groups.rank == 0:
                        print(f"  from plain: {difference:.2e}", flush=True)
                    assert difference < 5e-3, (degrees, num_tokens, difference)
                assert error < 5e-3, (degrees, num_tokens, error)
                assert torch.equal(first, again), "the same again is not the same"


if __name__ == "__main__":
    main(*sys.argv[1:])
