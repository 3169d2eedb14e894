"""ComfyUI nodes that make videos with a Wan-dist service; README.md beside this file has the installation.

One file, which needs nothing but ComfyUI: its torch, numpy and Pillow, and its PyAV to decode the video.
"""

import base64
import http.client
import io
import json
import logging
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch
from PIL import Image

try:
    from comfy.model_management import throw_exception_if_processing_interrupted
    from comfy.utils import ProgressBar
except ImportError:  # outside ComfyUI

    def throw_exception_if_processing_interrupted():
        """Nothing interrupts."""

    ProgressBar = None

_SERVICES_FILE = Path(__file__).with_name("services.json")
_LOCAL_SERVICES = {"local": {"url": "http://127.0.0.1:8000"}}
_TIMEOUT_SECONDS = 60
_CANCEL_TIMEOUT_SECONDS = 10
"""The service answers once the step is done; it stops then whether or not somebody waits for the answer."""
_POLL_SECONDS = 0.5
_OUTAGE_SECONDS = 600
"""Seconds without an answer that are sat out: a service may be restarted meanwhile."""
_PREVIEW_PIXELS = 512


class ServiceError(Exception):
    """What the service has answered, or why it does not answer; ``status`` is None without an answer."""

    def __init__(self, message, status=None):
        super().__init__(message)
        self.status = status


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would be followed with the token, wherever it leads."""

    def redirect_request(self, *_):
        return None


class _Service:
    """The video API at a URL."""

    def __init__(self, url, token=None):
        self.url, self.token = url.rstrip("/"), token
        # no proxy of the environment: a service is on this machine or network
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)

    def ask(self, method, path="", fields=None, timeout=_TIMEOUT_SECONDS):
        """Return the bytes of an answer; raises ServiceError."""
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        body = None if fields is None else json.dumps(fields).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/videos{path}", body, headers, method=method
        )
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            with error:
                message = _read_message(error) or f"{self.url} answers {error.code} {error.reason}"
            raise ServiceError(message, error.code) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ServiceError(f"the service {self.url} does not answer: {reason}") from None

    def ask_state(self, method, path="", **options):
        """Return the state of a video; raises ServiceError."""
        try:
            return dict(json.loads(self.ask(method, path, **options)))
        except (ValueError, TypeError):
            raise ServiceError(f"{self.url} has answered what is no video", 200) from None


def _read_message(error):
    try:
        return json.loads(error.read())["error"]["message"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _read_services():
    """Return url and token of each service by name: those of services.json, else that of this machine."""
    try:
        return json.loads(_SERVICES_FILE.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _LOCAL_SERVICES


def _read_settings(text):
    """Return the settings of lines ``key=value``, with numbers, lists and true or false as in JSON."""
    settings = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        key, equals, value = line.partition("=")
        if not equals:
            raise ValueError(f"settings: {line!r} is not key=value")
        try:
            settings[key.strip()] = json.loads(value)
        except ValueError:
            settings[key.strip()] = value.strip()
    return settings


def _encode_image(images):
    """Return the first of ComfyUI's images (N, H, W, 3 or 4), 0 to 1, as a data: URL."""
    pixels = (images[0, :, :, :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _decode_frames(content):
    """Return the frames of a video or image file as ComfyUI's IMAGE (N, H, W, 3), 0 to 1, and its rate."""
    import av  # ComfyUI requires it

    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        fps = float(stream.average_rate or 1)
    return torch.from_numpy(np.stack(frames)).to(torch.float32).div_(255), fps


def _make_video(service, fields):
    """Return the file that the service makes; an interruption of ComfyUI cancels the video."""
    state = service.ask_state("POST", fields=fields)
    path = f"/{state['id']}"
    try:
        _wait(service, path, state)
        return service.ask("GET", f"{path}/content")
    except BaseException as error:
        if not isinstance(error, ServiceError):
            _cancel(service, path)
        raise


def _wait(service, path, state):
    """Return when the video is completed, and show its progress; raises ServiceError if it failed."""
    bar = ProgressBar(max(1, state["num_steps"])) if ProgressBar else None
    answered_at, shown = time.monotonic(), None
    while state["status"] != "completed":
        if state["status"] == "failed":
            raise ServiceError(f"{state['id']} has failed: {(state['error'] or {}).get('message')}")
        if bar and shown != (shown := (state["step"], state["preview"])):
            bar.update_absolute(state["step"], preview=_read_preview(service, path, state))
        end = time.monotonic() + _POLL_SECONDS
        while time.monotonic() < end:
            throw_exception_if_processing_interrupted()
            time.sleep(0.05)
        try:
            state = service.ask_state("GET", path)
            answered_at = time.monotonic()
        except ServiceError as error:
            is_outage = error.status in (None, 502, 503, 504)
            if not is_outage or time.monotonic() - answered_at > _OUTAGE_SECONDS:
                raise
    if bar:
        bar.update_absolute(state["num_steps"])


def _read_preview(service, path, state):
    """Return the picture of an unfinished video as ComfyUI's progress bar takes it, None without one."""
    if not state["preview"]:
        return None
    try:
        picture = Image.open(io.BytesIO(service.ask("GET", f"{path}/content?variant=preview")))
        return ("JPEG", picture.convert("RGB"), _PREVIEW_PIXELS)
    except (ServiceError, OSError):
        return None  # the video is done by now


def _cancel(service, path):
    try:
        service.ask("DELETE", path, timeout=_CANCEL_TIMEOUT_SECONDS)
    except ServiceError as error:
        logging.warning("Wan-dist has not said yet that the video is cancelled: %s", error)


class TextToVideo:
    """A video from a text."""

    CATEGORY = "Wan-dist"
    FUNCTION = "make"
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("frames", "fps")
    DESCRIPTION = "Makes a video with a Wan-dist service. 0 stands for the service's own setting."

    @classmethod
    def INPUT_TYPES(cls):
        """Return the inputs, as ComfyUI asks for them."""
        whole = {"default": 0, "min": 0}
        return {
            "required": {
                "service": (list(_read_services()),),
                "prompt": ("STRING", {"multiline": True}),
                "seed": ("INT", {**whole, "max": 2**64 - 1, "control_after_generate": True}),
                "width": ("INT", {**whole, "max": 8192, "step": 16}),
                "height": ("INT", {**whole, "max": 8192, "step": 16}),
                "num_frames": ("INT", {**whole, "max": 100_001}),
                "steps": ("INT", {**whole, "max": 1000}),
                "guidance_scale": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1},
                ),
            },
            "optional": {
                "negative_prompt": ("STRING", {"multiline": True}),
                "settings": (
                    "STRING",
                    {"multiline": True, "tooltip": "other settings, key=value in a line each"},
                ),
            },
        }

    def make(
        self,
        service,
        prompt,
        seed,
        width,
        height,
        num_frames,
        steps,
        guidance_scale,
        negative_prompt="",
        settings="",
        **images,
    ):
        """Return the frames, (N, H, W, 3) in float32 from 0 to 1, and their number a second."""
        if bool(width) != bool(height):
            raise ValueError("give width and height, or 0 for both")
        optional_fields = {
            "size": f"{width}x{height}" if width else None,
            "num_frames": num_frames or None,
            "num_inference_steps": steps or None,
            "guidance_scale": guidance_scale or None,
            "negative_prompt": negative_prompt or None,
        }
        # PNG pictures in a film: the frames arrive as the service has made them
        fields = {"prompt": prompt, "seed": seed, "output.video": "png"}
        fields |= {name: value for name, value in optional_fields.items() if value is not None}
        fields |= {name: _encode_image(image) for name, image in images.items()}
        fields |= _read_settings(settings)
        return _decode_frames(_make_video(_Service(**_read_services()[service]), fields))


class ImageToVideo(TextToVideo):
    """A video that begins with an image, and may end with another one."""

    @classmethod
    def INPUT_TYPES(cls):
        """Return the inputs, as ComfyUI asks for them."""
        inputs = super().INPUT_TYPES()
        inputs["required"]["image"] = ("IMAGE",)
        inputs["optional"]["last_image"] = ("IMAGE",)
        return inputs

    def make(self, image, last_image=None, **inputs):
        """Return the frames and their number a second, as `TextToVideo.make`."""
        if last_image is None:
            return super().make(**inputs, input_reference=image)
        return super().make(**inputs, first_frame=image, last_frame=last_image)


NODE_CLASS_MAPPINGS = {"WanDistTextToVideo": TextToVideo, "WanDistImageToVideo": ImageToVideo}
NODE_DISPLAY_NAME_MAPPINGS = {
    "WanDistTextToVideo": "Wan-dist Text to Video",
    "WanDistImageToVideo": "Wan-dist Image to Video",
}
