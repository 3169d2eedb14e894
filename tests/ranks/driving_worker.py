"""One rank of the check that Animate-2's attention is the same on any ranks: ``DEGREES`` in JSON."""

import json
import sys
from dataclasses import replace

import torch

from tests.conftest import relative_error
from tests.unit.models.test_animate_2 import make_layout, open_golden, read_case
from wan_dist.models.animate_2 import SKIPPED_LAYER, record_driving
from wan_dist.parallel.apply import parallelize_transformer
from wan_dist.parallel.mesh import ProcessGroups, open_process_groups
from wan_dist.planning.degrees import Degrees

CPU = torch.device("cpu")
CASES = ("guided", "release", "distilled_padded")


def find_error(case: str, groups: ProcessGroups, *, is_sharded: bool) -> float:
    """Return the largest relative error of the first clip's predictions on this rank."""
    golden, facts = read_case(case)
    checkpoint = open_golden(facts["weights"])
    model = checkpoint.transformers[0].load(
        CPU,
        prepare_model=lambda model: parallelize_transformer(
            model, groups, is_sharded=is_sharded, is_driven=True
        ),
    )
    y, driving = golden["clip0.y"], golden["clip0.driving_latents"]
    assert model.driving is not None
    model.driving.layout = make_layout(facts, y, driving)
    projection = checkpoint.context_projections[0].load(CPU)
    branches = {"cond": "input.context", "uncond": "input.context_null"}
    if groups.cfg.size == 2:
        branches = dict([list(branches.items())[groups.cfg.rank]])
    if facts["guide_scale"] == 1:
        branches = {"cond": "input.context"}
    contexts = [
        replace(context, skipped_layer=SKIPPED_LAYER if branch == "uncond" else None)
        for branch, context in zip(
            branches,
            projection([golden[key] for key in branches.values()], golden["input.clip_fea"]),
            strict=True,
        )
    ]
    [driving_context] = projection([golden["input.context_ref"]], golden["clip0.clip_fea_ref"])
    record_driving(model, driving[None], driving_context, first_column=y.shape[3] // 2)
    rotary = model.compute_rotary(y[None])
    errors = []
    for step, timestep in enumerate(golden["timesteps"].tolist()):
        latents = torch.cat([golden[f"clip0.step{step}.latent"], y])[None]
        found = model(latents, torch.tensor([[timestep]]), contexts, rotary)
        for branch, velocity in zip(branches, found, strict=True):
            errors.append(relative_error(velocity[0], golden[f"clip0.step{step}.{branch}"]))
    return max(errors)


def main(degrees: Degrees, *, is_sharded: bool) -> None:
    torch.set_num_threads(1)
    with open_process_groups(degrees, CPU, timeout_seconds=60) as groups, torch.no_grad():
        for case in CASES:
            error = find_error(case, groups, is_sharded=is_sharded)
            assert error < 1e-4, (case, error)
            if groups.rank == 0:
                print(case, error)


if __name__ == "__main__":
    table = json.loads(sys.argv[1])
    main(Degrees(**table["degrees"]), is_sharded=table["is_sharded"])
