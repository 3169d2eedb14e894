"""The tokenizer: in a folder, in the text encoder's file, or in the Hugging Face cache."""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from wan_dist.runtime.errors import InputError, get_first_line
from wan_dist.runtime.file_hash import hash_file
from wan_dist.runtime.log import logger
from wan_dist.runtime.text_files import UnreadableFileError, check_regular_file
from wan_dist.weights.files import TensorFiles

TOKENIZER_REPOSITORY = "google/umt5-xxl"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SENTENCEPIECE_FILE = "spiece.model"
SENTENCEPIECE_KEY = "spiece_model"
"""Key under which ComfyUI's text encoders hold their tokenizer, as bytes."""
_UNIGRAM = 1


@dataclass(frozen=True)
class OpenTokenizer:
    """A tokenizer, where it is from, and digests of all that it depends on."""

    tokenizer: Tokenizer
    source: str
    digests: tuple[str, ...]


def open_tokenizer(folder: Path | None, text_encoder_files: TensorFiles) -> OpenTokenizer:
    """Return the tokenizer of the checkpoint's folder, of the text encoder's file or of the cache.

    Raises InputError if the folder's cannot be read, and if there is none.
    """
    if folder is not None and folder.is_dir():
        return _open_folder(folder)
    if (tokenizer := _read_tokenizer(text_encoder_files)) is not None:
        content = tokenizer.to_str()
        return OpenTokenizer(
            tokenizer, str(text_encoder_files), (hashlib.sha256(content.encode()).hexdigest(),)
        )
    if (cache_folder := _find_cached_folder()) is not None:
        return _open_folder(cache_folder)
    places = f"{folder}, {text_encoder_files}" if folder is not None else str(text_encoder_files)
    raise InputError(
        f"no tokenizer is in {places} or in the Hugging Face cache; where there is internet run "
        f"`hf download {TOKENIZER_REPOSITORY} {' '.join(_TOKENIZER_FILES)}`"
        + (f", or put these files into {folder}" if folder is not None else "")
    )


def _open_folder(folder: Path) -> OpenTokenizer:
    try:
        for file in folder.iterdir():
            if not file.is_dir():
                check_regular_file(file)
        tokenizer = load_tokenizer(folder)
    except UnreadableFileError as error:
        raise InputError(f"{file} cannot be read: {error}; download it again") from None
    except Exception as error:  # the libraries raise many types, tokenizers even Exception itself
        raise InputError(
            f"{folder} has no readable tokenizer; download it again ({get_first_line(error)})"
        ) from None
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return OpenTokenizer(tokenizer, str(folder), tuple(hash_file(file) for file in files))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of tokenizer.json, of spiece.model or of other files; raises what libraries do.

    Code that the folder may contain is never run.
    """
    if (file := folder / _TOKENIZER_FILES[0]).exists():
        tokenizer = Tokenizer.from_file(str(file))
    elif (file := folder / _SENTENCEPIECE_FILE).exists():
        tokenizer = _build_tokenizer(**_parse_sentencepiece_model(file.read_bytes()))
    else:
        from transformers import AutoTokenizer  # which takes seconds

        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _find_cached_folder() -> Path | None:
    """Return the folder of the published tokenizer in the Hugging Face cache."""
    import huggingface_hub  # environment variables can make even its import fail

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                TOKENIZER_REPOSITORY, allow_patterns=list(_TOKENIZER_FILES), local_files_only=True
            )
        )
    except Exception:  # not cached; its errors have no common type
        return None
    return folder if (folder / _TOKENIZER_FILES[0]).exists() else None


def _read_tokenizer(files: TensorFiles) -> Tokenizer | None:
    """Return the tokenizer that a file of a text encoder holds, None if it holds none that can be read."""
    try:
        if SENTENCEPIECE_KEY in files.stored_names:
            model = files.read(SENTENCEPIECE_KEY).numpy().tobytes()
            return _build_tokenizer(**_parse_sentencepiece_model(model))
        if files.metadata.get("tokenizer.ggml.model") == "t5":
            return _build_tokenizer(**_read_gguf_vocabulary(files.metadata))
    except Exception as error:  # tokenizers raises Exception itself
        logger.warning(
            "the tokenizer in %s cannot be read, looking for another one (%s)",
            files,
            get_first_line(error),
        )
    return None


def _build_tokenizer(
    pieces: Sequence[tuple[str, float]], unknown_id: int, end_id: int, pad_id: int, charsmap: bytes
) -> Tokenizer:
    """Return a tokenizer as google/umt5-xxl's tokenizer.json has it: Unigram without byte fallback."""
    tokenizer = Tokenizer(models.Unigram(list(pieces), unk_id=unknown_id, byte_fallback=False))
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    end = pieces[end_id][0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", end], special_tokens=[(end, end_id)]
    )
    tokenizer.add_special_tokens([end, pieces[unknown_id][0], pieces[pad_id][0]])
    return tokenizer


def _read_gguf_vocabulary(metadata: dict[str, Any]) -> dict[str, Any]:
    prefix = "tokenizer.ggml."
    scores = [float(score) for score in metadata[f"{prefix}scores"]]
    charsmap = metadata.get(f"{prefix}precompiled_charsmap")
    return {
        "pieces": list(zip(metadata[f"{prefix}tokens"], scores, strict=True)),
        "unknown_id": int(metadata.get(f"{prefix}unknown_token_id", 2)),
        "end_id": int(metadata.get(f"{prefix}eos_token_id", 1)),
        "pad_id": int(metadata.get(f"{prefix}padding_token_id", 0)),
        "charsmap": b"" if charsmap is None else charsmap.tobytes(),
    }


def _parse_sentencepiece_model(data: bytes) -> dict[str, Any]:
    """Return the vocabulary of a sentencepiece model; raises ValueError for another file.

    Its fields are those of sentencepiece_model.proto of google/sentencepiece.
    """
    pieces: list[tuple[str, float]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _iterate_fields(data):
        if number == 1:
            piece = dict(_iterate_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append((piece[1].decode(), score))
        elif number == 2:
            trainer = dict(_iterate_fields(value))
        elif number == 3:
            normalizer = dict(_iterate_fields(value))
    if not pieces:
        raise ValueError("no sentencepiece model")
    if trainer.get(3, _UNIGRAM) != _UNIGRAM:
        raise ValueError("a sentencepiece model that is not of Unigram")
    return {
        "pieces": pieces,
        "unknown_id": trainer.get(40, 0),
        "end_id": trainer.get(42, 2),
        "pad_id": _find_piece(pieces, "<pad>", 0),
        "charsmap": normalizer.get(2, b""),
    }


def _find_piece(pieces: Sequence[tuple[str, float]], text: str, default: int) -> int:
    return next((index for index, (piece, _) in enumerate(pieces) if piece == text), default)


def _iterate_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of the fields of a message of Protocol Buffers, in the order of their bytes.

    Values are whole numbers, or bytes for all other types. Raises ValueError where it is none.
    """
    position = 0

    def read_varint() -> int:
        nonlocal position
        value = shift = 0
        while position < len(data) and shift < 70:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise ValueError("no message of Protocol Buffers")

    while position < len(data):
        key = read_varint()
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            yield number, read_varint()
            continue
        if wire_type not in (1, 2, 5):
            raise ValueError("no message of Protocol Buffers")
        num_bytes = read_varint() if wire_type == 2 else {1: 8, 5: 4}[wire_type]
        position += num_bytes
        if position > len(data):
            raise ValueError("no message of Protocol Buffers")
        yield number, data[position - num_bytes : position]
