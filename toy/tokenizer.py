"""Tokenizers that end a text as umT5's does."""

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def with_end_mark(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer that begins with ``SPECIAL_TOKENS`` as umT5's is: an end mark after each text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
