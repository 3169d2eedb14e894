"""Tokenizers with an end mark after each text, as umT5's."""

from pathlib import Path

from tokenizers import Tokenizer, processors

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def add_end_mark(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer, whose first tokens are ``SPECIAL_TOKENS``, with umT5's end mark after texts."""
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer into a folder, as checkpoints have it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
