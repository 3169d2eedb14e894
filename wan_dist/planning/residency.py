"""What there is room for between the videos of one run. No torch."""

from dataclasses import replace

from wan_dist.planning.parameter_bytes import image_encoder_bytes, projection_bytes, vae_weight_bytes
from wan_dist.planning.plan import Plan


def staying(plan: Plan, *, experts: int = 1) -> Plan:
    """Return an arranged plan for a run in which all models but the text encoder stay from video to video: one expert, or both.

    That of a video that is made from its latents stays as it is.
    """
    load, arrangement = plan.load, plan.arrangement
    assert load is not None
    denoise = next((use for use in plan.uses if use.stage == "denoise"), None)
    if denoise is None:
        return plan
    on_gpu, on_host = denoise.gpu["weights"], denoise.host.get("weights", 0)
    if not arrangement.shard_dit:  # shards of both experts are there anyway
        on_gpu *= experts
    on_gpu += vae_weight_bytes(load.models.vae, load.vae_itemsize)
    if arrangement.dit == "resident":
        dims = load.models.transformer
        on_gpu += experts * projection_bytes(dims, load.itemsize, -(-dims.num_layers // load.num_ranks))
    if load.models.image_encoder is not None and load.num_images:
        clip = image_encoder_bytes(load.models.image_encoder)
        on_gpu, on_host = (on_gpu + clip, on_host) if arrangement.clip == "gpu" else (on_gpu, on_host + clip)
    return replace(
        plan,
        uses=tuple(
            use  # of all videos, before anything else is loaded
            if use.stage == "text"
            else replace(use, gpu=use.gpu | {"weights": on_gpu}, host=use.host | ({"weights": on_host} if on_host else {}))
            for use in plan.uses
        ),
    )


def models_stay(plan: Plan, *, experts: int = 1) -> bool:
    """Whether an arranged plan leaves room for that; weights that are read from disk each step do not stay."""
    load, budget, arrangement = plan.load, plan.budget, plan.arrangement
    assert load is not None
    assert budget is not None
    if arrangement.dit == "disk" or (experts > 1 and arrangement.dit != "resident"):
        return False
    uses = staying(plan, experts=experts).uses
    if budget.gpu is None:
        return all(use.host_bytes + load.ranks_per_node * use.gpu_bytes <= budget.host for use in uses)
    return all(use.gpu_bytes <= budget.gpu and use.host_bytes <= budget.host for use in uses)


def experts_stay(plan: Plan) -> bool:
    """Whether both experts of a task that has two may stay, so that a video begins with the first one there."""
    assert plan.load is not None
    return plan.load.num_experts > 1 and models_stay(plan, experts=2)


def frames_wait(plan: Plan, itemsize: int) -> bool:
    """Whether the host of an arranged plan has room for a decoded video, of so many bytes a value, beside what is at work."""
    load, budget = plan.load, plan.budget
    assert load is not None
    assert budget is not None
    most = max(use.host_bytes + (load.ranks_per_node * use.gpu_bytes if budget.gpu is None else 0) for use in plan.uses)
    replicas = max(1, load.ranks_per_node // load.num_ranks)
    return most + 2 * replicas * 3 * plan.frame_num * plan.height * plan.width * itemsize <= budget.host
