"""Prompt embeddings kept on disk, so that a prompt seen before does not need the text encoder."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wan_dist.models.text_encoder import clean_prompt
from wan_dist.video import SaveError, save_tensors

_SAMPLES = 16
_SAMPLE_BYTES = 65536


class PromptCache:
    """Embeddings by prompt, for one text encoder; several ranks and runs may use one folder at once.

    ``identity`` tells the encoder apart from others: whatever changes embeddings must be in it. The longest unused are deleted where
    files take more than ``limit`` bytes.
    """

    def __init__(self, folder: Path, identity: str, limit: int) -> None:
        self.folder, self.identity, self.limit = folder, identity, limit

    def _file(self, prompt: str) -> Path:
        key = hashlib.sha256(json.dumps([self.identity, clean_prompt(prompt)]).encode()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def get(self, prompt: str) -> Tensor | None:
        """Return the embedding (n, text_dim) of a prompt, None if it is not here."""
        file = self._file(prompt)
        try:
            context = load_file(file)["context"]
        except (OSError, SafetensorError, KeyError):  # not there, or being deleted, or damaged: it is made again
            return None
        with contextlib.suppress(OSError):  # of a cache that others keep and this user reads
            os.utime(file)  # used just now
        return context

    def put(self, prompt: str, context: Tensor) -> None:
        """Keep the embedding of a prompt; a folder that cannot be written keeps nothing."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self._file(prompt), {"context": context.cpu().contiguous()})
        except (OSError, SaveError):
            return
        self._prune()

    def _prune(self) -> None:
        files = []
        for file in self.folder.glob("*.safetensors"):
            try:
                status = file.stat()
            except OSError:
                continue  # another run has deleted it
            files.append((status.st_mtime_ns, status.st_size, file))
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if total <= self.limit:
                break
            file.unlink(missing_ok=True)
            total -= size


def digest_of_files(paths: Iterable[Path]) -> str:
    """Return a digest of files' sizes and of samples of their contents, which is quick however large they are."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{size};".encode())
        with path.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
