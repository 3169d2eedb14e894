"""Match of a transformer with a task: a checkpoint of another task is refused by what it lacks or has."""

from wan_dist.models.dims import TransformerDims
from wan_dist.runtime.errors import InputError
from wan_dist.tasks.base import Task
from wan_dist.weights.files import TensorFiles


def check_transformer_task(dims: TransformerDims, files: TensorFiles, task: Task) -> None:
    """Raise InputError if a transformer is of another task; its size is not compared."""
    expected_dims = task.transformer_dims
    traits = {
        "input channels": (dims.in_dim, expected_dims.in_dim),
        "output channels": (dims.out_dim, expected_dims.out_dim),
        "image branches": (int(dims.image_dim > 0), int(expected_dims.image_dim > 0)),
        "position embeddings for two images": (
            int(dims.image_positions > 0),
            int(expected_dims.image_positions > 0),
        ),
        "audio branches": (int(dims.audio_dim > 0), int(expected_dims.audio_dim > 0)),
        "VACE channels": (dims.vace_in_dim, expected_dims.vace_in_dim),
        "camera channels": (dims.camera_in_dim, expected_dims.camera_in_dim),
        "pose channels": (dims.pose_dim, expected_dims.pose_dim),
    }
    if dims.ref_conv_in_dim:  # the first Fun Control models have none
        traits["reference channels"] = (dims.ref_conv_in_dim, expected_dims.ref_conv_in_dim)
    mismatches = [
        f"{actual} {trait}, not {expected}"
        for trait, (actual, expected) in traits.items()
        if actual != expected
    ]
    if mismatches:
        raise InputError(
            f"{files} is not a {task.name} checkpoint: its transformer has {', '.join(mismatches)}"
        )
