"""Tokenizers with an end mark after each text, as umT5's."""

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def with_end_mark(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer, whose first tokens are ``SPECIAL_TOKENS``, with umT5's end mark after texts."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
