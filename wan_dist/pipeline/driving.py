"""The pass of a clip's driving video through a loaded transformer, for Animate-2."""

from wan_dist.models.animate_2 import record_driving
from wan_dist.models.attention.driving import DrivingLayout
from wan_dist.models.fused_transformer import FusedTransformer
from wan_dist.output.stage_report import StageReport
from wan_dist.pipeline.contexts import ProjectedContexts
from wan_dist.planning.plan import RunPlan
from wan_dist.sampling.conditioning import Conditioning
from wan_dist.tasks.animate_2 import FollowedVideo


def pass_driving_video(
    model: FusedTransformer,
    plan: RunPlan,
    conditioning: Conditioning,
    contexts: ProjectedContexts,
    report: StageReport,
    first_frame_bias: float,
) -> None:
    """Keep the driving video's keys and values in ``model.driving``, for a task that has one.

    They take gigabytes: clear ``model.driving.kept`` after the last step.
    """
    followed, stream = plan.driving, model.driving
    if not isinstance(followed, FollowedVideo) or stream is None:
        return
    assert conditioning.driving_latents is not None
    assert contexts.driving is not None
    _, patch_rows, patch_columns = model.dims.patch
    num_frames, rows, columns = plan.latent_shape[1:]
    stream.layout = DrivingLayout(
        num_frames,
        rows // patch_rows * (columns // patch_columns),
        followed.frame_tokens,
        first_frame_bias=first_frame_bias,
        slot_tokens=followed.slot_tokens,
        num_slots=(followed.clip_frames - 1) // plan.task.vae_stride[0] + 2,
    )
    with report.measure_stage("drive", f"{num_frames - 1} latent frames of the driving video"):
        record_driving(
            model,
            conditioning.driving_latents,
            contexts.driving,
            first_column=columns // patch_columns,
        )
