"""Whether models may stay between videos. No torch."""

from enum import Enum

from wan_dist.footprint import image_encoder_bytes, projection_bytes, vae_weight_bytes
from wan_dist.plan import Plan


class Room(Enum):
    """How much there is for models that are not at work."""

    NONE = "each stage has the memory to itself"
    STAY = "models stay"
    BESIDE = "models stay, and a video is decoded while the next one is denoised"


def experts_stay(plan: Plan) -> bool:
    """Whether an arranged plan leaves room for both experts of a task that has two, so that a video begins with the first one there."""
    assert plan.load is not None
    return plan.load.num_experts > 1 and room_of(plan, both_experts=True) is not Room.NONE


def room_of(plan: Plan, *, both_experts: bool = False) -> Room:
    """Return how much room an arranged plan leaves, to keep one expert or both."""
    load, budget, arrangement = plan.load, plan.budget, plan.arrangement
    assert load is not None
    assert budget is not None
    if arrangement.dit == "disk" or (both_experts and arrangement.dit == "stream"):
        return Room.NONE
    dims = load.models.transformer
    staying = vae_weight_bytes(load.models.vae, load.vae_itemsize)
    if arrangement.dit == "resident":
        staying += projection_bytes(dims, load.itemsize, -(-dims.num_layers // load.num_ranks)) * (1 + both_experts)
    if load.models.image_encoder is not None and arrangement.clip == "gpu":
        staying += image_encoder_bytes(load.models.image_encoder)
    uses = {use.stage: use for use in plan.uses}
    denoise, decode = uses["denoise"], uses["decode"]
    if both_experts and not arrangement.shard_dit:  # shards of both are in the plan
        staying += denoise.gpu["weights"]
    if budget.gpu is not None:
        taken, room = (denoise.gpu_bytes, decode.gpu_bytes), budget.gpu
    else:
        ranks = load.ranks_per_node
        taken, room = (denoise.host_bytes + ranks * denoise.gpu_bytes, decode.host_bytes + ranks * decode.gpu_bytes), budget.host
        staying *= ranks
    if taken[0] + staying > room:
        return Room.NONE
    return Room.BESIDE if taken[0] + staying + taken[1] <= room else Room.STAY
