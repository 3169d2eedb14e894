"""Audio of speech to video against the reference: samples, and features of each frame."""

import json
import subprocess
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import golden_folder, relative_error
from wan_dist.models.audio_encoder import build_audio_encoder, encode_audio
from wan_dist.models.dims import AudioEncoderDims
from wan_dist.runtime.errors import InputError
from wan_dist.runtime.ffmpeg import find_ffmpeg
from wan_dist.tasks.published_dims import DIMS_WAV2VEC_XLSR
from wan_dist.tasks.sound import read_sound, read_speech_samples
from wan_dist.tasks.speech import count_audio_vectors, count_clips, list_audio_columns
from wan_dist.weights.audio_keys import map_audio_encoder
from wan_dist.weights.checkpoint import Component, open_component
from wan_dist.weights.checkpoint_dims import infer_audio_encoder_dims
from wan_dist.weights.layout import ComponentFiles

FOLDER = "wan2.2-s2v"
WAV2VEC = "wav2vec2-large-xlsr-53-english"


def open_encoder(folder: Path) -> Component[torch.nn.Module, AudioEncoderDims]:
    files = ComponentFiles(folder, "model.safetensors", map_audio_encoder, "config.json")
    return open_component(files, infer_audio_encoder_dims, build_audio_encoder)


def read_case(case: str) -> tuple[dict, dict[str, torch.Tensor]]:
    folder = golden_folder(FOLDER) / "expected"
    run = json.loads((folder / f"{case}.json").read_text(encoding="utf-8"))
    return run, load_file(folder / f"{case}.safetensors")


def write_wav(path: Path, samples: np.ndarray, rate: int) -> Path:
    """Write samples (n, channels) in [-1, 1] as 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).round().astype("<i2").tobytes())
    return path


def test_samples_are_the_references_bit_for_bit() -> None:
    _, golden = read_case("pose")
    sound = read_sound(str(golden_folder(FOLDER) / "stereo.wav"), "audio")
    assert (sound.track.rate, sound.track.num_channels, sound.seconds) == (44100, 2, 0.6)
    assert np.array_equal(read_speech_samples(sound), golden["input.audio_samples"].numpy())


@pytest.mark.parametrize("case", ["unipc", "pose", "first", "long"])
def test_features_of_each_frame(case: str) -> None:
    run, golden = read_case(case)
    component = open_encoder(golden_folder(FOLDER) / WAV2VEC)
    encoder = component.load(torch.device("cpu"))
    samples = read_speech_samples(read_sound(str(golden_folder(FOLDER) / run["audio"]), "audio"))
    num_vectors = count_audio_vectors(len(samples))
    assert count_clips(num_vectors, run["infer_frames"]) == run["clips_by_audio"]
    if "input.audio_embed" in golden:
        columns = list_audio_columns(run["clips_by_audio"] * run["infer_frames"])
        features = encode_audio(encoder, component.dims, samples, num_vectors, columns)
        expected = golden["input.audio_embed"]
        assert features.shape == expected.shape
        assert relative_error(features, expected) < 1e-5
    if "input.audio_features" in golden:
        columns = list(range(num_vectors))
        features = encode_audio(encoder, component.dims, samples, num_vectors, columns)[0]
        expected = golden["input.audio_features"]
        assert relative_error(features.transpose(1, 2), expected) < 1e-5


def test_convolutions_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    component = open_encoder(golden_folder(FOLDER) / WAV2VEC)
    encoder = component.load(torch.device("cpu"))
    samples = np.random.default_rng(0).standard_normal(16123).astype(np.float32)
    whole = encode_audio(encoder, component.dims, samples, 30, range(30))
    monkeypatch.setattr("wan_dist.models.audio_encoder._STEPS_AT_ONCE", 7)
    pieces = encode_audio(encoder, component.dims, samples, 30, range(30))
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("num_samples", "steps"), [(399, 0), (400, 1), (16000, 49), (80000, 249), (80080, 250)]
)
def test_steps_of_samples(num_samples: int, steps: int) -> None:
    assert DIMS_WAV2VEC_XLSR.count_steps(num_samples) == steps


def test_columns_of_frames_and_clips() -> None:
    assert list_audio_columns(13)[4] == 8
    assert list_audio_columns(13)[12] == 22
    # Two steps fewer than 80,080 samples have are within 5 s: one clip.
    assert [count_clips(count_audio_vectors(samples), 80) for samples in (80079, 80080)] == [1, 2]
    assert count_audio_vectors(205 * 320 + 80) == 122  # not 123


@pytest.mark.parametrize("suffix", [".mp3", ".m4a", ".flac", ".ogg", ".mp4"])
def test_what_ffmpeg_reads_is_read(suffix: str, tmp_path: Path) -> None:
    """The right length, but for the padding of lossy ones, and the sound itself."""
    times = np.arange(22050 * 2) / 22050
    tone = 0.4 * np.sin(2 * np.pi * 440 * times)
    wav = write_wav(tmp_path / "in.wav", np.stack([tone, tone], axis=1), 22050)
    picture = (
        ["-f", "lavfi", "-i", "color=size=32x32:rate=16:duration=2"] if suffix == ".mp4" else []
    )
    command = [find_ffmpeg(), "-v", "error", "-i", str(wav), *picture]
    subprocess.run([*command, str(tmp_path / f"out{suffix}")], check=True)
    sound = read_sound(str(tmp_path / f"out{suffix}"), "audio")
    samples = read_speech_samples(sound)
    assert len(samples) == sound.num_speech_samples
    assert abs(sound.seconds - 2) < 0.15
    spectrum = np.abs(np.fft.rfft(samples[2000:18000]))
    assert abs(spectrum.argmax() - 440) <= 1
    assert np.abs(samples[8000:16000]).max() == pytest.approx(0.4, abs=0.02)


def test_channels_are_averaged_whatever_their_number(tmp_path: Path) -> None:
    channels = np.random.default_rng(1).uniform(-0.9, 0.9, (3200, 3))
    sound = read_sound(str(write_wav(tmp_path / "in.wav", channels, 16000)), "audio")
    expected = (channels * 32767).round().mean(axis=1) / 32768
    np.testing.assert_allclose(read_speech_samples(sound), expected, atol=1e-6)


def test_one_sample_fewer_than_its_length_is_padded(tmp_path: Path) -> None:
    """As the reference does, where soxr rounds down."""
    noise = np.random.default_rng(2).uniform(-0.5, 0.5, (221184, 1))
    sound = read_sound(str(write_wav(tmp_path / "in.wav", noise, 44100)), "audio")
    samples = read_speech_samples(sound)
    assert len(samples) == 80249
    assert samples[-1] == 0 != samples[-2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "audio=FILE: there is no such file"),
        (b"", "audio=FILE cannot be read as sound"),
        (b"no sound at all", "audio=FILE cannot be read as sound"),
    ],
)
def test_what_is_no_sound_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "in.wav"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_sound(str(file), "audio")
    assert str(error.value).replace(str(file), "FILE").startswith(message)


def test_a_video_without_sound_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be read as sound"):
        read_sound(str(golden_folder(FOLDER) / "pose.mp4"), "audio")


def test_samples_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    samples = np.zeros(3200, "<f4")
    samples[100] = np.nan
    (tmp_path / "in.raw").write_bytes(samples.tobytes())
    command = [find_ffmpeg(), "-v", "error", "-f", "f32le", "-ar", "16000", "-ac", "1"]
    command += ["-i", str(tmp_path / "in.raw"), "-c:a", "pcm_f32le", str(tmp_path / "in.wav")]
    subprocess.run(command, check=True)
    with pytest.raises(InputError, match="not finite"):
        read_speech_samples(read_sound(str(tmp_path / "in.wav"), "audio"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"feat_extract_norm": "group"}, "feat_extract_norm='group'"),
        ({"do_stable_layer_norm": False}, "do_stable_layer_norm=False"),
        ({"conv_stride": [5, 2]}, "are not 7 numbers above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ],
)
def test_another_wav2vec_is_refused(entry: dict, message: str, tmp_path: Path) -> None:
    folder = golden_folder(FOLDER) / WAV2VEC
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | entry), encoding="utf-8")
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(InputError, match=message):
        open_encoder(tmp_path)
