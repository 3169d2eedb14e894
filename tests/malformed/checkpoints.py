"""Checkpoints that are damaged, malicious, of another model, or put together wrongly."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.malformed.case import RUN, WHOLE, Case
from wan_dist.tasks.registry import TASKS
from wan_dist.weights.checkpoint import open_checkpoint
from wan_dist.weights.layout import TEXT_ENCODER_FILE, TOKENIZER_FOLDER, WEIGHTS_STEM

TRANSFORMER, VAE, CONFIG = f"{WEIGHTS_STEM}.safetensors", "Wan2.1_VAE.pth", "config.json"
INDEX = f"{TRANSFORMER}.index.json"


def _copied(folder: Path) -> Path:
    copy = folder / "model"
    shutil.copytree(folder / WHOLE, copy)
    return copy


def _opened(_: Sequence[str]) -> object:
    """Open a checkpoint as a run does after its other checks, which take longer than this."""
    return open_checkpoint(Path("model"), TASKS["toy"], torch.float32)


def _case(
    name: str, change: Callable[[Path], object], *says: str, task: str = "toy", in_run: bool = False
) -> Case:
    """Return the case of a copy of the whole checkpoint that is changed."""

    def make(folder: Path) -> Sequence[str]:
        change(_copied(folder))
        return [*RUN, f"task={task}", "ckpt_dir=model"]

    return Case(name, make, says, read=None if in_run else _opened)


def _file(name: str, file: str, content: bytes | str, *says: str) -> Case:
    return _case(
        name,
        lambda folder: (folder / file).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        ),
        file,
        *says,
    )


def _config(name: str, *says: str, **entries: object) -> Case:
    """Return the case of a config.json with other entries; a run looks for the heads before it
    opens the rest.
    """

    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | entries
        (folder / CONFIG).write_text(json.dumps(config))

    return _case(name, change, TRANSFORMER, *says, in_run="num_heads" in entries)


def _header(name: str, change: Callable[[dict[str, Any]], object], *says: str) -> Case:
    """Return the case of a transformer whose safetensors header is changed."""

    def write(folder: Path) -> None:
        data = (folder / TRANSFORMER).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        changed = change(header)
        text = (
            changed
            if isinstance(changed, bytes)
            else json.dumps(header if changed is None else changed).encode()
        )
        (folder / TRANSFORMER).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return _case(name, write, TRANSFORMER, *says)


def _length(name: str, length: bytes, *says: str) -> Case:
    def change(folder: Path) -> None:
        data = (folder / TRANSFORMER).read_bytes()
        (folder / TRANSFORMER).write_bytes(length + data[8:])

    return _case(name, change, TRANSFORMER, *says)


def _tensors(
    name: str,
    change: Callable[[dict[str, torch.Tensor]], object],
    *says: str,
    file: str = TRANSFORMER,
    in_run: bool = False,
) -> Case:
    def write(folder: Path) -> None:
        if file == TRANSFORMER:
            tensors = load_file(folder / file)
            change(tensors)
            save_file(tensors, folder / file)
        else:
            tensors = torch.load(folder / file, weights_only=True)
            torch.save(change(tensors) or tensors, folder / file)

    return _case(name, write, file, *says, in_run=in_run)


def _value(name: str, key: str, value: torch.Tensor, *says: str, file: str = TRANSFORMER) -> Case:
    return _tensors(name, lambda tensors: tensors.update({key: value}), *says, file=file)


def _entry(number: int, key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        names = [name for name in header if name != "__metadata__"]
        header[names[number]][key] = value

    return change


def _twice(header: dict[str, Any]) -> bytes:
    """Return the header with a tensor twice, which a dictionary cannot have."""
    name, entry = next((name, entry) for name, entry in header.items() if name != "__metadata__")
    return (json.dumps(header)[:-1] + f', "{name}": {json.dumps(entry)}}}').encode()


class _Program:
    """What runs a command when it is read as a pickle."""

    def __init__(self, command: str = "touch ran") -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def _plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": _Program()}))


def _archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../evil.txt", "x")
        archive.writestr("readme.txt", "two cats")


def _shard(folder: Path, names: Sequence[str], index: object = None) -> None:
    """Cut the transformer into shards; the index is of what is given, by default what is right."""
    tensors = load_file(folder / TRANSFORMER)
    (folder / TRANSFORMER).unlink()
    where = {key: names[number % len(names)] for number, key in enumerate(sorted(tensors))}
    for name in names:
        save_file(
            {key: value for key, value in tensors.items() if where[key] == name}, folder / name
        )
    (folder / INDEX).write_text(json.dumps({"weight_map": where} if index is None else index))


def _index(name: str, index: object, *says: str) -> Case:
    return _case(
        name, lambda folder: _shard(folder, ["a.safetensors", "b.safetensors"], index), INDEX, *says
    )


def _outside(folder: Path) -> None:
    _shard(folder, ["a.safetensors"])
    (folder / "a.safetensors").rename(folder.parent / "a.safetensors")
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace("a.safetensors", "../a.safetensors"))


def _one_missing(folder: Path) -> None:
    _shard(folder, ["a.safetensors", "b.safetensors"])
    (folder / "b.safetensors").unlink()


def _one_twice(folder: Path) -> None:
    tensors = load_file(folder / TRANSFORMER)
    key = sorted(tensors)[0]
    save_file({key: tensors[key] + 1}, folder / f"{WEIGHTS_STEM}-00002-of-00002.safetensors")


def _replaced(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return change


def _swapped(one: str, other: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / one).rename(folder / "aside")
        (folder / other).rename(folder / one)
        (folder / "aside").rename(folder / other)

    return change


def _tokenizer(name: str, change: Callable[[Path], object], *says: str) -> Case:
    return _case(name, lambda folder: change(folder / TOKENIZER_FOLDER), TOKENIZER_FOLDER, *says)


def _longer_vocabulary(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"more{number}": 259 + number for number in range(50)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _code_of_its_own(folder: Path) -> None:
    """Name a class in a Python file beside it, as checkpoints may that run their own code."""
    (folder / "code.py").write_text("import os\nos.system('touch ran')\nclass T: pass\n")
    config = {"auto_map": {"AutoTokenizer": ["code.T", "code.T"]}, "tokenizer_class": "T"}
    _only_config(json.dumps(config))(folder)


def _only_config(text: str) -> Callable[[Path], None]:
    """Of a folder without tokenizer.json, which is read alone where it is there."""

    def change(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").write_text(text)

    return change


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _with_large_vocabulary(folder: Path) -> Sequence[str]:
    """Store a matrix of a terabyte in the bytes of a row."""
    file, name = _copied(folder) / TEXT_ENCODER_FILE, "token_embedding.weight"
    tensors = torch.load(file, weights_only=True)
    tensors[name] = tensors[name][:1].expand(2**33, -1)
    torch.save(tensors, file)
    return [*RUN, "ckpt_dir=model"]


def _has_video(_: object, outputs: Path) -> None:
    assert [path.name[:13] for path in outputs.glob("*.mp4")] == ["toy_a-cat_42_"]


def _given(name: str, content: bytes, *says: str) -> Case:
    """Return the case of a whole checkpoint and a file beside it that is to be its transformer."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "x.bin").write_bytes(content)
        return [*RUN, "dit_file=x.bin"]

    return Case(name, make, ("x.bin", *says))


def _gguf(*fields: bytes | str | int, num_tensors: int = 0, num_values: int = 0) -> bytes:
    """Return a GGUF file: fields are bytes, texts, or numbers of 32 bits."""
    content = struct.pack("<4sIQQ", b"GGUF", 3, num_tensors, num_values)
    for field in fields:
        if isinstance(field, str):
            content += struct.pack("<Q", len(field)) + field.encode()
        else:
            content += struct.pack("<I", field) if isinstance(field, int) else field
    return content


_DOWNLOAD = "download it again"
_OTHERS = (
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + bytes(99), "ONNX"),
    (b"\n<!DOCTYPE html><html>404 Not Found</html>", "a page of HTML"),
    (b'{"weight_map": {"a": "b.safetensors"}}', "JSON"),
    (b"\x1f\x8b\x08\0" + bytes(99), "packed"),
    (bytes(257).replace(b"\0", b"x") + b"ustar" + bytes(999), "packed; unpack it"),
    (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
)
_NO_HEADER = "no readable safetensors header"
_ENDLESS = struct.pack("<Q", 2**60)
_GGUF_FILES = (
    ("GGUF that ends after its magic number", b"GGUF", "no readable GGUF header"),
    ("GGUF of another version", b"GGUF\0\0\0\3" + bytes(99), "version 50331648, not 2 or 3"),
    ("GGUF of 2^60 tensors", _gguf(num_tensors=2**60), "cut off in its header"),
    ("GGUF of 2^60 metadata values", _gguf("a", 4, 7, num_values=2**60), "cut off in its header"),
    ("GGUF with an endless name", _gguf(_ENDLESS, num_values=1), "cut off in its header"),
    ("GGUF with an endless array", _gguf("a", 9, 0, _ENDLESS, num_values=1), "cut off"),
    ("GGUF with an endless array of texts", _gguf("a", 9, 8, _ENDLESS, num_values=1), "cut off"),
    ("GGUF with arrays in an array", _gguf("a", 9, 9, _ENDLESS, num_values=1), "GGUF header"),
    ("GGUF with a value of no type", _gguf("a", 99, 0, num_values=1), "GGUF header"),
    ("GGUF of an alignment of 0", _gguf("general.alignment", 4, 0, num_values=1), "alignment of 0"),
    ("GGUF of 99 dims", _gguf("a", 99, bytes(999), num_tensors=1), "99 dims"),
    (
        "GGUF of an unread type",
        _gguf("a", 1, struct.pack("<QIQ", 256, 16, 0), bytes(99), num_tensors=1),
        "IQ2_XXS, which is not supported",
    ),
    (
        "GGUF of an unknown type",
        _gguf("a", 1, struct.pack("<QIQ", 4, 77, 0), bytes(99), num_tensors=1),
        "type 77, which is not supported",
    ),
    (
        "GGUF whose tensor is not there",
        _gguf("a", 1, struct.pack("<QIQ", 4, 0, 2**50), bytes(99), num_tensors=1),
        "is truncated",
    ),
    (
        "GGUF of half a block",
        _gguf("a", 2, struct.pack("<QQIQ", 16, 2, 2, 0), bytes(99), num_tensors=1),
        "not a multiple of the block size of Q4_0",
    ),
    (
        "GGUF that begins within a number",
        _gguf("a", 1, struct.pack("<QIQ", 4, 0, 2), bytes(99), num_tensors=1),
        "begins within a number",
    ),
    (
        "GGUF of another model",
        _gguf("general.architecture", 8, "flux", num_values=1),
        "general.architecture is flux",
    ),
)
_CODE = ("holds code", "not run")
_NO_WEIGHTS = "cannot be read as PyTorch weights"
_NO_TOKENIZER = "has no readable tokenizer"

HEADERS = [
    _file("a transformer of nothing", TRANSFORMER, b"", "(0 bytes)", _NO_HEADER),
    _file("a transformer of seven bytes", TRANSFORMER, b"seven b", _NO_HEADER),
    _file("a page of HTML", TRANSFORMER, "<!DOCTYPE html><html>404 Not Found</html>", _NO_HEADER),
    *(
        _file(f"{what} as a transformer", TRANSFORMER, content, _NO_HEADER, what)
        for content, what in _OTHERS
    ),
    *(_file(f"{what} as a VAE", VAE, content, _NO_WEIGHTS, what) for content, what in _OTHERS),
    *(_given(f"{what} as dit_file", content, what) for content, what in _OTHERS),
    *(_given(name, content, what) for name, content, what in _GGUF_FILES),
    _file(
        "a transformer of zeros", TRANSFORMER, bytes(5000), _NO_HEADER, "not finished", _DOWNLOAD
    ),
    _length("a header of 2^60 bytes", struct.pack("<Q", 2**60), _NO_HEADER),
    _length("a header of -1 bytes", struct.pack("<q", -1), _NO_HEADER),
    _length("a header of no bytes", bytes(8), _NO_HEADER),
    _length("a header that is the whole file", struct.pack("<Q", 60_000), _NO_HEADER),
    _header("a header that is not JSON", lambda _: b"two cats, boxing", _NO_HEADER),
    _header("a header in Latin-1", lambda _: b'{"caf\xe9": 1}', _NO_HEADER),
    _header("a header of deep arrays", lambda _: b"[" * 50_000, _NO_HEADER),
    _header("a header that is an array", lambda _: [1, 2], _NO_HEADER),
    _header("a header without tensors", lambda _: {"__metadata__": {}}, _NO_HEADER),
    _header("a tensor that is a number", lambda header: header.update({"more": 5}), _NO_HEADER),
    _header(
        "a tensor of no type",
        lambda header: header.update({"more": {"shape": [1], "data_offsets": [0, 4]}}),
        _NO_HEADER,
    ),
    _header("a tensor of an unknown type", _entry(0, "dtype", "F7"), _NO_HEADER),
    _header("a shape that is a text", _entry(0, "shape", "48"), _NO_HEADER),
    _header("a negative shape", _entry(0, "shape", [-48, 48]), _NO_HEADER),
    _header("a shape of 2^62", _entry(0, "shape", [2**62, 2**62]), _NO_HEADER),
    _header("a shape that its bytes are not of", _entry(0, "shape", [2**20, 2**10]), _NO_HEADER),
    _header("offsets that overlap", _entry(1, "data_offsets", [0, 4]), _NO_HEADER),
    _header("offsets backwards", _entry(0, "data_offsets", [400, 0]), _NO_HEADER),
    _header(
        "offsets beyond the file", _entry(0, "data_offsets", [0, 2**50]), "is truncated", _DOWNLOAD
    ),
    _header("negative offsets", _entry(0, "data_offsets", [-8, 0]), _NO_HEADER),
    _header("one offset", _entry(0, "data_offsets", [0]), _NO_HEADER),
    _header("a tensor twice", _twice, _NO_HEADER, "twice"),
    _case(
        "a truncated transformer",
        lambda folder: os.truncate(folder / TRANSFORMER, 50_000),
        TRANSFORMER,
        "is truncated: 50000 of",
    ),
    _case(
        "bytes after the end",
        lambda folder: os.truncate(folder / TRANSFORMER, 500_000),
        TRANSFORMER,
        _NO_HEADER,
    ),
]

TENSORS = [
    _tensors(
        "a tensor too few",
        lambda tensors: tensors.pop("head.head.bias"),
        "1 missing: head.head.bias",
    ),
    _value("a tensor too many", "evil", torch.zeros(1), "1 unexpected: evil"),
    _value("a tensor called in red", "\x1b[31m", torch.zeros(1), "unexpected: \\x1b[31m"),
    _value(
        "a matrix lying down", "head.head.weight", torch.zeros(48, 64), "head.head.weight (48, 64)"
    ),
    _value(
        "patches of three dims",
        "patch_embedding.weight",
        torch.zeros(48, 16, 4),
        "(48, 16, 4)",
        "5 dims",
    ),
    _value(
        "patches of nothing",
        "patch_embedding.weight",
        torch.zeros(48, 16, 0, 2, 2),
        "(48, 16, 0, 2, 2)",
    ),
    _value(
        "whole numbers",
        "head.head.weight",
        torch.zeros(64, 48).long(),
        "no floats: head.head.weight (I64)",
    ),
    _value("truths", "head.head.bias", torch.zeros(64).bool(), "no floats: head.head.bias (BOOL)"),
    _value(
        "a VAE of whole numbers",
        "conv2.bias",
        torch.zeros(16).long(),
        "no floats: conv2.bias (int64)",
        file=VAE,
    ),
    _tensors(
        "a VAE of nothing",
        lambda tensors: tensors.clear(),
        "has no encoder.conv1.weight",
        file=VAE,
    ),
    _tensors(
        "a VAE that is a list",
        lambda tensors: list(tensors.values()),
        "not a plain dictionary of tensors",
        file=VAE,
    ),
    _tensors(
        "a VAE of numbers",
        lambda tensors: tensors.update(steps=7),
        "not a plain dictionary of tensors",
        file=VAE,
    ),
    _tensors(
        "numbered tensors",
        lambda tensors: {0: torch.zeros(1)},
        "not a plain dictionary of tensors",
        file=VAE,
    ),
    _value(
        "a sparse tensor",
        "conv2.bias",
        torch.zeros(16).to_sparse(),
        "conv2.bias is sparse, or without values",
        file=VAE,
    ),
    _value(
        "a tensor without bytes",
        "conv2.bias",
        torch.zeros(16, device="meta"),
        "conv2.bias is sparse, or without values",
        file=VAE,
    ),
    _value(
        "a text encoder without heads",
        "blocks.0.pos_embedding.embedding.weight",
        torch.zeros(32, 0),
        "(32, 0)",
        file=TEXT_ENCODER_FILE,
    ),
    Case(
        "a vocabulary of a terabyte in the bytes of a row, read by the row",
        _with_large_vocabulary,
        check=_has_video,
    ),
]

PICKLES = [
    _tensors("code in a VAE", lambda _: {"weight": _Program()}, *_CODE, file=VAE, in_run=True),
    _tensors(
        "code beside the tensors",
        lambda tensors: tensors.update(x=_Program()),
        *_CODE,
        file=TEXT_ENCODER_FILE,
    ),
    _case("code in an old pickle", lambda folder: _plain_pickle(folder / VAE), VAE, _NO_WEIGHTS),
    _tensors("a model instead of its tensors", lambda _: torch.nn.Linear(1, 1), *_CODE, file=VAE),
    _case("an archive of other things", lambda folder: _archive(folder / VAE), VAE, _NO_WEIGHTS),
    _file("a text encoder of nothing", TEXT_ENCODER_FILE, b"", "(0 bytes)", _NO_WEIGHTS),
    _file("a text encoder of text", TEXT_ENCODER_FILE, "two cats", _NO_WEIGHTS),
    _case(
        "a truncated VAE",
        lambda folder: os.truncate(folder / VAE, 5000),
        VAE,
        "(5000 bytes)",
        _NO_WEIGHTS,
    ),
    _case("a VAE that is a folder", _replaced(VAE, Path.mkdir), VAE, "it is not a file"),
    _case(
        "safetensors of another model called .pth",
        lambda folder: shutil.copy(folder / TRANSFORMER, folder / VAE),
        VAE,
        "conv1.weight",
    ),
]

CONFIGS = [
    _file("a truncated config", CONFIG, '{"dim": 48, "num_h', "is not valid JSON"),
    _file("an empty config", CONFIG, "", "is not valid JSON"),
    _file("a config in UTF-16", CONFIG, '{"num_heads": 4}'.encode("utf-16"), "not UTF-8"),
    _file("a config that is an array", CONFIG, "[1]", "is not a JSON object"),
    _file("a deep config", CONFIG, "[" * 100_000, "is not valid JSON"),
    _file("a config of megabytes", CONFIG, " " * 20_000_000, "20000000 bytes"),
    _config("heads that are a text", "num_heads", "'4'", num_heads="4"),
    _config("heads that are true", "num_heads", "True", num_heads=True),
    _config("heads that are a list", "num_heads", num_heads=[4]),
    _config("heads of 0", "num_heads=0", num_heads=0),
    _config("negative heads", "num_heads", "-4", num_heads=-4),
    _config("heads that do not divide", "no number of heads that divides 48", num_heads=5),
    _config("heads of odd width", "no number of heads that divides 48 evenly", num_heads=16),
    _config("layers of 2^60", f"num_layers={2**60}", "256", num_layers=2**60),
    _config("negative layers", "num_layers", "-2", num_layers=-2),
    _config("layers that are a text", "num_layers", "'two'", num_layers="two"),
    _config("a layer too few", "unexpected: blocks.1.", num_layers=1),
    _config("a layer too many", "missing: blocks.2.", num_layers=3),
    _config("a text of 2^60 tokens", "text_len", str(2**60), text_len=2**60),
    _config("a text of -1 tokens", "text_len", "-1", text_len=-1),
    _config("a text of no tokens", "text_len", "0", text_len=0),
    _config("a text of half a token", "text_len", "0.5", text_len=0.5),
    _config("an eps that is a text", "eps", "'small'", eps="small"),
    _config("an eps of NaN", "eps", "nan", eps=float("nan")),
    _config("a negative eps", "eps", "-1", eps=-1),
    _case(
        "a config that is a folder",
        _replaced(CONFIG, Path.mkdir),
        CONFIG,
        "it is not a file",
        in_run=True,
    ),
    _case(
        "a config that is a pipe",
        _replaced(CONFIG, os.mkfifo),
        CONFIG,
        "it is not a file",
        in_run=True,
    ),
]

FOLDERS = [
    _index(
        "an index that names a missing shard",
        {"weight_map": {"x": "c.safetensors"}},
        "1 of the 1 shards",
        "missing: c.safetensors",
    ),
    _index("an index without a map", {"metadata": {}}, "weight_map"),
    _index("an index that is an array", [], "not a JSON object"),
    _index("a map that is an array", {"weight_map": ["a.safetensors"]}, "weight_map"),
    _index("a map to numbers", {"weight_map": {"x": 5}}, "weight_map"),
    _index("an empty map", {"weight_map": {}}, "weight_map"),
    _index("a shard of a device", {"weight_map": {"x": "/dev/zero"}}, "/dev/zero", "outside"),
    _index("a shard that is no safetensors", {"weight_map": {"x": "x.pth"}}, "x.pth"),
    _index("a shard of no name", {"weight_map": {"x": ""}}, "weight_map"),
    _case("a shard outside the folder", _outside, INDEX, "../a.safetensors", "outside"),
    _case("a shard too few", _one_missing, INDEX, "1 of the 2 shards", "missing: b.safetensors"),
    _case(
        "a broken index",
        lambda folder: (folder / INDEX).write_text("{"),
        INDEX,
        "is not valid JSON",
    ),
    _case("a tensor in two files", _one_twice, "00002-of-00002.safetensors", TRANSFORMER, "both"),
    _case(
        "a transformer that is a folder",
        _replaced(TRANSFORMER, Path.mkdir),
        TRANSFORMER,
        "it is not a file",
    ),
    _case(
        "a transformer that is a pipe",
        _replaced(TRANSFORMER, os.mkfifo),
        TRANSFORMER,
        "it is not a file",
    ),
    _case(
        "a transformer that is a link to itself",
        _replaced(TRANSFORMER, _loop),
        TRANSFORMER,
        "symbolic links",
    ),
    _case(
        "a transformer that is a link to nothing",
        _replaced(TRANSFORMER, lambda path: path.symlink_to("gone")),
        TRANSFORMER,
        "No such file",
    ),
    _case("a VAE that is a link to itself", _replaced(VAE, _loop), VAE, "symbolic links"),
    _case("a VAE that is a pipe", _replaced(VAE, os.mkfifo), VAE, "it is not a file"),
    _case(
        "a tokenizer that is a link to itself",
        _replaced(TOKENIZER_FOLDER, _loop),
        f"it has no {TOKENIZER_FOLDER}",
    ),
    _case("no VAE", lambda folder: (folder / VAE).unlink(), f"it has no {VAE}"),
    _case(
        "VAE and text encoder swapped",
        _swapped(VAE, TEXT_ENCODER_FILE),
        TEXT_ENCODER_FILE,
        "has no token_embedding.weight",
    ),
    _case(
        "the text encoder twice",
        lambda folder: shutil.copy(folder / TEXT_ENCODER_FILE, folder / VAE),
        VAE,
        "has no encoder.conv1.weight",
    ),
    _case(
        "an empty folder",
        lambda folder: (shutil.rmtree(folder), folder.mkdir()),
        "it has no config.json",
        "found: nothing",
    ),
    _case(
        "a folder of another task",
        lambda _: None,
        "is not a complete t2v-A14B checkpoint",
        task="t2v-A14B",
        in_run=True,
    ),
    _case(
        "a VAE of another task",
        lambda folder: (folder / VAE).rename(folder / "Wan2.2_VAE.pth"),
        f"it has no {VAE}",
    ),
    _case(
        "a folder that claims the other layout",
        lambda folder: (folder / "model_index.json").write_text("{"),
        "it has no transformer/config.json",
    ),
    _case(
        "a name of a file in red",
        lambda folder: (_archive(folder / "\x1b[31m"), (folder / VAE).unlink()),
        f"it has no {VAE}",
        "\\x1b[31m",
    ),
]

TOKENIZERS = [
    _tokenizer(
        "a truncated tokenizer",
        lambda folder: os.truncate(folder / "tokenizer.json", 300),
        _NO_TOKENIZER,
    ),
    _tokenizer(
        "a tokenizer of noise",
        lambda folder: (folder / "tokenizer.json").write_bytes(bytes(range(256))),
        _NO_TOKENIZER,
    ),
    _tokenizer(
        "a tokenizer of nothing",
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        _NO_TOKENIZER,
    ),
    _tokenizer("no tokenizer", lambda folder: (folder / "tokenizer.json").unlink(), _NO_TOKENIZER),
    _tokenizer(
        "a broken tokenizer_config",
        _only_config('{"a'),
        _NO_TOKENIZER,
    ),
    _tokenizer(
        "a tokenizer_config that is an array",
        _only_config("[]"),
        _NO_TOKENIZER,
    ),
    _tokenizer("a tokenizer with code of its own", _code_of_its_own, _NO_TOKENIZER),
    _tokenizer("more words than the text encoder has", _longer_vocabulary, "309", "259"),
    _tokenizer(
        "a tokenizer that is a pipe",
        lambda folder: _replaced("tokenizer.json", os.mkfifo)(folder),
        "it is not a file",
    ),
]

CASES = [*HEADERS, *TENSORS, *PICKLES, *CONFIGS, *FOLDERS, *TOKENIZERS]
