"""Cross-attention's keys and values of a video's contexts, projected once before the steps."""

from wan_dist.models.transformer import ContextKV
from wan_dist.output.stage_report import Report
from wan_dist.parallel.collectives import all_gather
from wan_dist.pipeline.model_cache import Shelf
from wan_dist.pipeline.out_of_memory import free_memory
from wan_dist.pipeline.session import Session
from wan_dist.sampling.conditioning import Conditioning
from wan_dist.weights.streaming import Streaming


def project_contexts(
    session: Session,
    which: int,
    conditioning: Conditioning,
    report: Report,
    name: str,
    *,
    streamed: bool = False,
) -> list[ContextKV]:
    """Return a transformer's cross-attention k and v of the prompt, and of the negative one if there is one, on every rank.

    Every rank of the replica reads and computes its share of the blocks. Where weights are streamed, or the shelf does not keep them,
    they are gone from the device then.
    """
    component, axis = session.checkpoint.projections[which], session.groups.replica
    num_blocks = component.dims.num_layers
    each = -(-num_blocks // axis.size)
    own = [min(index, num_blocks - 1) for index in range(axis.rank * each, (axis.rank + 1) * each)]  # shares are of one size
    with report.stage(name, f"keys and values of the text{'' if conditioning.image_features is None else ' and image'}"):
        streaming = Streaming("blocks", from_disk=True, num_rounds=1) if streamed else None
        shelf = session.shelf if streaming is None else Shelf()
        place = session.place("projection", which)
        shelf.make_way(place, which)
        projection = shelf.take(
            place, which, lambda: component.load(report.device, spread=lambda model: model.keep(own), streaming=streaming)
        )
        prompts = [text for text in (conditioning.context, conditioning.negative_context) if text is not None]
        shares = projection(prompts, conditioning.image_features)
        texts = [all_gather(share.text, axis).flatten(0, 1)[:num_blocks] for share in shares]
        image = None if shares[0].image is None else all_gather(shares[0].image, axis).flatten(0, 1)[:num_blocks]
        del projection, shares
        if not session.shelf.keeps:
            free_memory()
    return [ContextKV(text, image) for text in texts]
