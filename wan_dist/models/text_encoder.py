"""umT5 text encoder with its tokenizer, and prompt cleaning."""

import html
import re
from collections.abc import Callable, Sequence

import ftfy
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from wan_dist.models.dims import TextEncoderDims
from wan_dist.models.umt5 import Umt5Encoder

_MAX_CHUNK_TOKENS = 2**15
"""Tokens whose states are on the host at once: 256 MiB of umT5-XXL in bfloat16."""
_MAX_CHUNK_PROMPTS_ON_CPU = 8
"""Maximum prompts of a chunk on a CPU, which takes seconds for each.

An unfinished chunk is lost when the run ends, and reading the weights is a small part of its time.
"""


def clean_prompt(text: str) -> str:
    """Repair encoding errors, undo HTML escapes (twice) and collapse white space, as in training."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def build_text_encoder(dims: TextEncoderDims, dtype: torch.dtype) -> nn.Module:
    """Return umT5's encoder in ``dtype``, without values where the default device is meta."""
    return Umt5Encoder(dims).to(dtype)


def list_encoder_layers(encoder: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of umT5's encoder stack by name, in the order in which they are called."""
    blocks = encoder.get_submodule("block")
    return {f"block.{name}": block for name, block in blocks.named_children()}


def tokenize_prompt(tokenizer: Tokenizer, prompt: str, text_len: int) -> list[int]:
    """Return the token ids of the cleaned prompt with its end-of-text token, at most ``text_len``."""
    ids: list[int] = tokenizer.encode(clean_prompt(prompt)).ids
    return ids if len(ids) <= text_len else [*ids[: text_len - 1], ids[-1]]


def split_prompts_into_chunks(
    tokenizer: Tokenizer, prompts: Sequence[str], text_len: int, device: torch.device
) -> list[list[str]]:
    """Return the prompts in order, in chunks that are each encoded by `TextEncoder.encode_by_block`.

    ``device`` is the one that encodes; chunks are limited by the memory of their states and, on a CPU, in
    prompts.
    """
    max_prompts = _MAX_CHUNK_PROMPTS_ON_CPU if device.type == "cpu" else len(prompts)
    chunks: list[list[str]] = [[]]
    num_chunk_tokens = 0
    for prompt in prompts:
        num_prompt_tokens = len(tokenize_prompt(tokenizer, prompt, text_len))
        if chunks[-1] and (
            num_chunk_tokens + num_prompt_tokens > _MAX_CHUNK_TOKENS
            or len(chunks[-1]) == max_prompts
        ):
            chunks.append([])
            num_chunk_tokens = 0
        chunks[-1].append(prompt)
        num_chunk_tokens += num_prompt_tokens
    return chunks


class TextEncoder:
    """Text encoder with its tokenizer: prompts to embeddings.

    Only the prompt's own tokens are computed: the published pipeline masks attention to padding, so
    omitting the padding gives the same rows.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: Tokenizer,
        *,
        text_len: int,
        device: torch.device,
        read_embedding_rows: Callable[[list[int]], Tensor] | None = None,
    ) -> None:
        self.encoder = encoder
        self.read_embedding_rows = read_embedding_rows
        """Reads rows of the token embedding for an encoder without it: two fifths of its memory."""
        self.device = device
        self.tokenizer = tokenizer
        self.text_len = text_len

    def __call__(self, prompt: str) -> Tensor:
        """Return the prompt's embedding (n, text_dim), n at most ``text_len``, on the device."""
        ids = torch.tensor(
            [tokenize_prompt(self.tokenizer, prompt, self.text_len)], device=self.device
        )
        embedding: Tensor = self.encoder(ids)[0]
        return embedding

    def encode_by_block(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return the prompts' embeddings (n, text_dim) on the host; same values as `__call__`.

        Each block encodes all prompts, one after the other, before the next block does, so a block whose
        weights are streamed is read once for all of them. Between blocks, the states are on the host.
        """
        assert self.read_embedding_rows is not None
        dtype = next(self.encoder.parameters()).dtype
        ids_by_prompt = [
            tokenize_prompt(self.tokenizer, prompt, self.text_len) for prompt in prompts
        ]
        states = [
            self.read_embedding_rows(prompt_ids).to(dtype).unsqueeze(0)
            for prompt_ids in ids_by_prompt
        ]
        for block in self.encoder.get_submodule("block").children():
            states = _run_block(block, states, self.device)
        norm = self.encoder.get_submodule("final_layer_norm")
        return [norm(state.to(self.device))[0].cpu() for state in states]


def _run_block(block: nn.Module, states: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return a block's output for each state (1, n, dim).

    The block is called once, since its weights may be freed after that.
    """

    def compute_others(*_: object) -> None:
        other_states.extend(block.forward(state.to(device)).cpu() for state in states[1:])

    other_states: list[Tensor] = []
    # Before the hooks that free the weights.
    hook = block.register_forward_hook(compute_others, prepend=True)
    try:
        first_state = block(states[0].to(device)).cpu()
    finally:
        hook.remove()
    return [first_state, *other_states]
