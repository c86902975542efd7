"""A tokenizer whose decoding loses a first space, as those of Llama 2 and Mistral do."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save_words(directory: Path, count: int) -> None:
    """A tokenizer of the whole words w0, w1, ..., with an end token behind them."""
    words = {f"▁w{number}": number for number in range(count - 1)}
    backend = Tokenizer(models.WordLevel({**words, "</s>": count - 1}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    fast.save_pretrained(directory)
