"""Prompt embeddings cached on disk, so that a repeated prompt does not need the text encoder."""

from pathlib import Path

from torch import Tensor

from wan_dist.models.text_encoder import clean_prompt
from wan_dist.pipeline.tensor_cache import TensorCache

_NAME = "context"


class PromptCache:
    """Embeddings by prompt, of one text encoder; see `TensorCache`.

    ``identity`` identifies the encoder: whatever changes embeddings must be in it.
    """

    def __init__(self, folder: Path, identity: str, limit_bytes: int) -> None:
        self.tensors = TensorCache(folder, identity, limit_bytes)

    @property
    def folder(self) -> Path:
        """Where the embeddings are."""
        return self.tensors.folder

    def has(self, prompt: str) -> bool:
        """Whether the embedding of a prompt is cached, which then counts as used just now."""
        return self.tensors.has(clean_prompt(prompt))

    def get(self, prompt: str) -> Tensor | None:
        """Return the embedding (n, text_dim) of a prompt, None if it is not cached."""
        return (self.tensors.get(clean_prompt(prompt)) or {}).get(_NAME)

    def put(self, prompt: str, context: Tensor) -> bool:
        """Store the embedding of a prompt; returns whether it fits and the folder can be written."""
        return self.tensors.put(clean_prompt(prompt), {_NAME: context})
