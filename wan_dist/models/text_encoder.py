"""The umT5 text encoder (transformers' modules), prompt cleaning and tokenizer."""

import html
import re
from collections.abc import Callable
from pathlib import Path

import ftfy
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from wan_dist.dims import TextEncoderDims


def clean_prompt(text: str) -> str:
    """Repair encoding damage, undo HTML escapes (twice) and fold white space, as the models' training captions were."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def build_text_encoder(dims: TextEncoderDims, dtype: torch.dtype) -> nn.Module:
    """Return umT5's encoder stack in ``dtype``; parameters are uninitialised where the default device is meta."""
    config = UMT5Config(
        vocab_size=dims.vocab_size,
        d_model=dims.dim,
        d_kv=dims.head_dim,
        d_ff=dims.ffn_dim,
        num_layers=dims.num_layers,
        num_heads=dims.num_heads,
        relative_attention_num_buckets=dims.num_buckets,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
    )
    return UMT5EncoderModel(config).encoder.to(dtype)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a local folder; code that the folder may hold is not run, nor is it asked whether it should be."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, text_len: int) -> list[int]:
    """Return the token ids of the cleaned prompt with its end mark, ``text_len`` at most."""
    ids: list[int] = tokenizer(clean_prompt(prompt), truncation=True, max_length=text_len).input_ids
    return ids


class TextEncoder:
    """Prompts to embeddings.

    Only the prompt's own tokens are computed: attention to padding is masked in the published pipeline, so leaving the padding out
    gives the same rows.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        text_len: int,
        device: torch.device,
        rows: Callable[[list[int]], Tensor] | None = None,
    ) -> None:
        self.encoder = encoder
        self.rows = rows
        """Rows of the token embedding, for an encoder that does not hold it, which is two fifths of its memory."""
        self.device = device
        self.tokenizer = tokenizer
        self.text_len = text_len

    def __call__(self, prompt: str) -> Tensor:
        """Return the prompt's embedding (n, text_dim), n at most ``text_len``, on the device."""
        ids = torch.tensor([token_ids(self.tokenizer, prompt, self.text_len)], device=self.device)
        mask = torch.ones_like(ids)
        if self.rows is None:
            return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        dtype = next(self.encoder.parameters()).dtype
        embedded = self.rows(ids[0].tolist()).to(self.device, dtype).unsqueeze(0)
        return self.encoder(inputs_embeds=embedded, attention_mask=mask).last_hidden_state[0]
