"""Keys, values and modulation of a clip's sound, projected once before the first step."""

import torch

from wan_dist.models.audio_projection import AudioContext, AudioProjection
from wan_dist.output.stage_report import StageReport
from wan_dist.parallel.collectives import all_gather
from wan_dist.pipeline.model_cache import ModelCache
from wan_dist.pipeline.out_of_memory import free_memory
from wan_dist.pipeline.session import Session
from wan_dist.sampling.conditioning import Conditioning
from wan_dist.weights.streaming import StreamingOptions

_SLOT = "audio projection"


def project_audio(
    session: Session, conditioning: Conditioning, report: StageReport, *, is_streamed: bool
) -> list[list[AudioContext]]:
    """Return what each injection takes with the prompt, and with the negative one, which hears zeros.

    On every rank; empty without sound. Each rank of the replica computes its share of the injections, and the
    shares are all-gathered.
    """
    features, component = conditioning.audio, session.checkpoint.audio_projection
    if features is None or component is None:
        return []
    axis, num_injections = session.groups.replica, len(component.dims.audio_layers)
    num_own = -(-num_injections // axis.size)
    # Shares are of one size, as the all-gather needs.
    own_indices = [
        min(index, num_injections - 1)
        for index in range(axis.rank * num_own, (axis.rank + 1) * num_own)
    ]
    with report.measure_stage("audio", "keys and values of the sound"):
        streaming = None
        if is_streamed:
            streaming = StreamingOptions(AudioProjection.layers, from_disk=True, num_rounds=2)
        model_cache = session.model_cache if streaming is None else ModelCache()
        projection = model_cache.get_or_load(
            _SLOT,
            0,
            lambda: component.load(
                report.device,
                prepare_model=lambda model: model.select_injectors(own_indices),
                streaming=streaming,
            ),
        )
        heard = [features]
        if conditioning.negative_context is not None:
            heard.append(torch.zeros_like(features))
        contexts = []
        for part in heard:
            own = projection(part)
            keys_values, modulation = (
                all_gather(torch.stack(tensors), axis).flatten(0, 1)[:num_injections]
                for tensors in zip(*own, strict=True)
            )
            contexts.append(
                [AudioContext(*parts) for parts in zip(keys_values, modulation, strict=True)]
            )
        del projection
        if not session.model_cache.is_persistent:
            free_memory()
    return contexts
