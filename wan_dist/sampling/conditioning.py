"""Conditioning of the transformer: its inputs beside the noisy latents."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Inputs that are the same at all steps."""

    context: Tensor
    """Text embedding (tokens, text_dim) of the prompt."""
    negative_context: Tensor | None
    """Text embedding (tokens, text_dim) of the negative prompt; None without guidance."""
    image_features: Tensor | None = None
    """CLIP features (n, 257, image_dim) of n images."""
    extra_channels: Tensor | None = None
    """(1, C', T, h, w), appended to the noisy latents.

    A mask of which frames are given, and the latents of a video that holds these frames.
    """
    face: Tensor | None = None
    """(T, n, D): vectors of the driving face in each latent frame of the video."""
    negative_face: Tensor | None = None
    """The same without a face, for the negative prompt."""
    audio: Tensor | None = None
    """(1, layers, D, 4 T): audio features of a clip's frames."""
    picture: Tensor | None = None
    """(1, C, 1, h, w): latents of a picture that speaks."""
    history: Tensor | None = None
    """(1, C, n, h, w): latents of the frames before a clip."""
    pose: Tensor | None = None
    """(1, C, T, h, w): latents of a video of poses."""
    driving_latents: Tensor | None = None
    """(1, C, T, h', w') of a driving video that passes through the transformer itself."""
    driving_context: Tensor | None = None
    """Text embedding (tokens, text_dim) of that video."""
    driving_features: Tensor | None = None
    """CLIP features (1, 257, image_dim) of its first frame."""
    known_latents: Tensor | None = None
    """(1, C, 1, h, w): the first latent frame, if it is given and never noisy."""
    reference_latents: Tensor | None = None
    """(1, C, 1, h, w) of a reference image; zeros where a model that takes one gets none."""
    cameras: Tensor | None = None
    """(F, 16) of each frame, see `compute_rays`."""
