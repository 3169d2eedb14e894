"""Speech to video: a picture speaks or sings as in a sound file, and moves as in a pose video if given.

The video is made clip by clip; each clip is shown the frames before it, its own part of the sound, and the
picture.
"""

from wan_dist.tasks.published_dims import DIMS_WAV2VEC_XLSR

FRAME_RATE = 16
"""Frames in a second that the model makes."""
_STEP_RATE = 50
"""Steps in a second of the audio encoder."""
_VECTOR_RATE = 30
"""Vectors in a second that its steps are interpolated to."""
_VECTORS_PER_FRAME = _VECTOR_RATE / FRAME_RATE


def count_audio_vectors(num_samples: int) -> int:
    """Return how many vectors the audio encoder's steps over samples at 16 kHz are interpolated to."""
    return int(DIMS_WAV2VEC_XLSR.count_steps(num_samples) / _STEP_RATE * _VECTOR_RATE)


def count_clips(num_vectors: int, infer_frames: int) -> int:
    """Return the clips of ``infer_frames`` that the sound takes; the last one may be without any of it."""
    return int(num_vectors / (infer_frames * _VECTORS_PER_FRAME)) + 1


def list_audio_columns(num_frames: int) -> list[int]:
    """Return which of the vectors each frame hears; halves are rounded to the even one."""
    return [round(frame * _VECTORS_PER_FRAME) for frame in range(num_frames)]
