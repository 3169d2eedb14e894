"""Plan of a video: its inputs, size, clips and sampling, before memory is planned; no torch."""

from dataclasses import dataclass

from PIL import Image

from wan_dist.config.model_settings import ModelSettings
from wan_dist.planning.degrees import (
    Degrees,
)
from wan_dist.planning.sampling_plan import SamplingPlan
from wan_dist.planning.size_advice import advise_on_size
from wan_dist.planning.workload import Arrangement
from wan_dist.tasks.animate import DrivingVideo
from wan_dist.tasks.animate_2 import FollowedVideo
from wan_dist.tasks.base import Task, TeaCacheFit
from wan_dist.tasks.camera import CameraPath
from wan_dist.tasks.source_video import SourceVideo
from wan_dist.tasks.speech import Speech


@dataclass(frozen=True, kw_only=True)
class VideoPlan:
    """What a run will do, in numbers, as far as it does not depend on memory."""

    task: Task
    prompt: str
    negative_prompt: str | None
    """None where guidance is off."""
    images: tuple[Image.Image, ...]
    """The images to start from: none, the first frame, or first and last, in 8-bit RGB.

    Those of a job that is only checked are not read.
    """
    num_images: int
    source: SourceVideo | None
    """Frames of a source video, and of its mask, that the video is made from."""
    image_keys: tuple[str, ...]
    """Settings that name the images, where these have roles of their own."""
    camera: CameraPath | None
    input_notes: tuple[str, ...]
    """What is done with the inputs, a line each."""
    driving: DrivingVideo | FollowedVideo | None
    """Video of a person whom the character follows, frame by frame."""
    driving_prompt: str | None
    """Description of a driving video that passes through the transformer."""
    speech: Speech | None
    """Sound that a picture speaks to, and its poses."""
    width: int
    height: int
    size_note: str
    """How the size came about, where that is not plain."""
    frame_num: int
    """Frames of a clip."""
    num_clips: int
    clip_index: int = 0
    """The clip that this plan is of, from 0."""
    fps: int
    seed: int
    """Seed of the first clip's noise."""
    sampling: SamplingPlan
    steps_advice: str | None
    """A warning about the number of steps, or guidance, for the model at hand."""
    tea_fit: TeaCacheFit | None
    """TeaCache's, if it is requested."""
    latent_shape: tuple[int, int, int, int]
    """(C, T, h, w), with the reference images."""
    num_tokens: int
    degrees: Degrees
    ranks_per_node: int
    base_arrangement: Arrangement
    """What does not depend on memory: sharding, and the VAE's first strategy."""
    model_settings: ModelSettings
    has_saved_latents: bool
    """Latents of an earlier run are decoded, so that nothing but the VAE is needed."""
    name: str
    """File name of the results, without suffix."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts that are embedded: the prompt first, then the negative one, the driving video's."""
        other_texts = (self.negative_prompt, self.driving_prompt)
        return self.prompt, *(text for text in other_texts if text is not None)

    @property
    def num_frames(self) -> int:
        """Frames of the video: those that a clip repeats of the one before it are left out."""
        if self._clips is not None:
            return self._clips.num_frames
        return self.num_clips * (self.frame_num - 1) + 1

    @property
    def num_repeated_frames(self) -> int:
        """Frames that a clip after the first starts from, the last ones of the clip before it."""
        return 1 if self._clips is None else self._clips.num_repeated

    @property
    def num_kept_frames(self) -> int:
        """Last frames of this clip that the next one starts from."""
        if self.speech is None:
            return self.num_repeated_frames
        return min(self.num_repeated_frames, self.speech.count_new_frames(self.clip_index))

    @property
    def _clips(self) -> DrivingVideo | FollowedVideo | Speech | None:
        """What decides on the clips, where the settings do not."""
        return self.driving or self.speech

    @property
    def num_shown_frames(self) -> int:
        """Frames of the video file; with sound it ends with this."""
        return self.num_frames if self.speech is None else self.speech.num_shown_frames

    @property
    def num_context_latents(self) -> int:
        """Latent frames that are decoded before those of the clip, as these depend on them."""
        return 0 if self.speech is None else self.speech.count_context_latents(self.clip_index)

    @property
    def num_reference_frames(self) -> int:
        """Latent frames of reference images, which precede those of the video and are not decoded."""
        return self.num_images if self.task.inputs.has_reference_frames else 0

    @property
    def num_clip_latents(self) -> int:
        """Latent frames of the clip itself: without reference images, and without what it depends on."""
        return self.latent_shape[1] - self.num_reference_frames

    @property
    def num_video_latents(self) -> int:
        """Latent frames that are decoded: without reference images, with those that a clip depends on."""
        return self.num_clip_latents + self.num_context_latents

    @property
    def has_encoded_input(self) -> bool:
        """Whether the VAE encodes an input of the transformer."""
        return self.num_images > 0 or self.task.inputs.is_always_encoded

    @property
    def first_frame_index(self) -> int:
        """Index in the video of the clip's first decoded frame, which the clip before has too.

        Below 0 where frames are decoded that are no part of the video.
        """
        if self._clips is not None:
            return self._clips.find_first_frame(self.clip_index)
        return self.clip_index * (self.frame_num - self.num_repeated_frames)

    @property
    def new_frames(self) -> slice:
        """Frames of the clip that the video has from it: not those of the clip before, or beyond the end."""
        num_known = self.num_repeated_frames if self.clip_index else -self.first_frame_index
        return slice(num_known, self.num_frames - self.first_frame_index)

    @property
    def crop(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the result in the frames that are made."""
        whole = (0, 0, self.width, self.height)
        return self.driving.crop if isinstance(self.driving, FollowedVideo) else whole

    @property
    def is_last_clip(self) -> bool:
        """Whether the video ends with this clip."""
        return self.clip_index == self.num_clips - 1

    @property
    def size_advice(self) -> str | None:
        """A warning for a size that the task was not published for, else None."""
        has_own_aspect = (self.source or self._clips) is not None or (
            bool(self.images) and not self.num_reference_frames
        )
        return advise_on_size(self.task, (self.width, self.height), has_own_aspect=has_own_aspect)

    @property
    def notes(self) -> list[str]:
        """Warnings about the settings, a line each."""
        return [*self.input_notes, *filter(None, (self.size_advice, self.steps_advice))]

    @property
    def summary(self) -> str:
        """The video or image that is made, in one line."""
        size_text = f"{self.width}x{self.height}{self.size_note}"
        if self.task.is_still:
            return f"{self.task.name}: an image of {size_text}, seed {self.seed}"
        clips_text = f" in {self.num_clips} clips" if self.num_clips > 1 else ""
        return (
            f"{self.task.name}: {self.num_frames} frames of {size_text} at {self.fps} fps = "
            f"{self.num_frames / self.fps:.1f} s of video{clips_text}, seed {self.seed}, "
            f"{self.num_tokens} tokens"
        )
