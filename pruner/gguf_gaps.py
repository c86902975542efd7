"""What transformers' reader leaves out of a GGUF file: put in after it, or the file is refused.

It passes over whatever it does not know without a word, and the model would be another one. The
names and defaults of metadata are those of llama.cpp's specification of the format (docs/gguf.md in
ggml) and of its loader (src/llama-model.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import Any

import torch

from ..errors import UnsupportedModel
from .gguf_file import GgufFile

# Ways to split a text before bytes are merged that the reader knows, or that are GPT-2's, which it
# takes for all others. With the first ones llama.cpp begins a text with a token, and takes whole
# words that are tokens before it merges.
_WHOLE_WORDS = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "tekken")
)
_KNOWN_SPLITS = _WHOLE_WORDS | frozenset(
    ("default", "gpt-2", "smollm", "smaug-bpe", "qwen2", "deepseek-r1-qwen", "megrez", "kormo")
)
# The 27B models of Gemma 2 and 3, known by their blocks, divide scores by another number.
_GEMMA_27B_BLOCKS = {"gemma2": 46, "gemma3": 62}
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def check_gaps(source: GgufFile) -> None:
    """Refuse what cannot be put in.

    Raises:
        UnsupportedModel: positions are stretched in a way, or a text is split in one, that is not
            known here.
    """
    rope_of(source)
    byte_level = source.facts.get("tokenizer.ggml.model") == "gpt2"
    if byte_level and source.pre_tokenizer not in {None, *_KNOWN_SPLITS}:
        raise _refused(source, f"its tokenizer splits texts by {source.pre_tokenizer!r}")


def fill_gaps(source: GgufFile, tokenizer: Any, model: Any) -> None:
    """Put in what the reader left out of a model and tokenizer that are to be saved.

    Raises:
        UnsupportedModel: numbers of the file have no place in the model.
    """
    _check_all_taken(source, model)
    _fill_config(source, model.config)
    if source.architecture == "llama" and source.fact("attention.head_count_kv") is None:
        _reorder_rows(model)
    end = source.facts.get("tokenizer.ggml.eot_token_id")
    ends = [source.facts.get("tokenizer.ggml.eos_token_id"), end]
    if end is not None and end != ends[0]:
        model.generation_config.eos_token_id = [each for each in ends if each is not None]
    if source.pre_tokenizer in _WHOLE_WORDS:
        tokenizer.backend_tokenizer.model.ignore_merges = True
        if "tokenizer.ggml.add_bos_token" not in source.facts:
            tokenizer.add_bos_token = True
            tokenizer.update_post_processor()


def rope_of(source: GgufFile) -> dict[str, Any] | None:
    """How positions are stretched, as a Hugging Face config has it; None where they are not.

    Raises:
        UnsupportedModel: in a way that is not known here.
    """
    kind, factor = source.fact("rope.scaling.type"), source.fact("rope.scaling.factor")
    older = source.fact("rope.scale_linear")
    if any(name.startswith("rope_factors_") for name in source.tensor_names):
        raise _refused(source, "its positions are stretched by two lists of factors (longrope)")
    if source.rope_factors:
        return _llama3(source)
    if kind not in (None, "none", "linear"):
        raise _refused(source, f"its positions are stretched by {str(kind)!r}")
    factor = older if factor is None else factor
    if kind == "none" or factor in (None, 0, 1):
        return None
    return {"rope_type": "linear", "factor": float(factor)}


def _llama3(source: GgufFile) -> dict[str, Any]:
    """Llama 3's curve, if the file's factors, by which frequencies are divided, are of it."""
    given = torch.tensor(source.rope_factors, dtype=torch.float64)
    found = {"rope_type": "llama3", "factor": round(float(given.max()), 4), **_LLAMA3_ROPE}
    theta = float(source.fact("rope.freq_base") or 10000.0)
    frequencies = theta ** -(torch.arange(len(given), dtype=torch.float64) / len(given))
    if not torch.allclose(_llama3_factors(frequencies, found), given, rtol=1e-3):
        raise _refused(source, "its frequencies of positions are changed, and not as Llama 3's")
    return found


def _llama3_factors(frequencies: torch.Tensor, rope: Mapping[str, Any]) -> torch.Tensor:
    """What Llama 3.1 divides each frequency by (transformers, modeling_rope_utils)."""
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: torch.Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors


def _check_all_taken(source: GgufFile, model: Any) -> None:
    left = source.parameters - len(source.rope_factors) - int(model.num_parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    if tied and left == embedding.numel() and "output.weight" in source.tensor_names:
        return  # the head is written out, and is the embedding
    if left > 0:
        raise _refused(
            source, f"{left} of its numbers have no place in {type(model).__name__}, such as biases"
        )


def _fill_config(source: GgufFile, config: Any) -> None:
    """Only what the file tells; a family without it has no such fields."""
    rope = rope_of(source)
    if rope is not None:
        # Gemma 3 stretches the positions of the blocks that see everything, and no others.
        values = config.rope_parameters
        values.get("full_attention", values).update(rope)
    if source.architecture in _GEMMA_27B_BLOCKS:
        largest = config.num_hidden_layers == _GEMMA_27B_BLOCKS[source.architecture]
        wide = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = wide if largest else config.head_dim
    if source.architecture == "phi3":
        turned = source.fact("rope.dimension_count")
        dims = config.hidden_size // config.num_attention_heads
        if turned is not None and turned != dims:
            config.rope_parameters["partial_rotary_factor"] = turned / dims
        config.sliding_window = source.fact("attention.sliding_window") or None


def _reorder_rows(model: Any) -> None:
    """Of queries and keys: llama.cpp has the two parts of each rotation side by side.

    The reader undoes it only where the file tells the heads of the keys, which it need not if they
    are as many as the queries'.
    """
    heads = model.config.num_attention_heads
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            rows, columns = linear.weight.shape
            pairs = linear.weight.data.reshape(heads, rows // heads // 2, 2, columns)
            linear.weight.data = pairs.transpose(1, 2).reshape(rows, columns).contiguous()


def _refused(source: GgufFile, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{source.path}: {why}, which importing it would lose",
        "prune the model's Hugging Face directory instead",
    )
