"""A tiny real GGUF file, written by the `gguf` package itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("accelerate", reason="transformers reads GGUF only with accelerate")

BLOCKS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 96, 4, 2, 16
GPT2_POSITIONS, GPT2_FFN = 1024, 4 * HIDDEN  # the reader of GPT-2 knows no others
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"


def vocabulary() -> list[str]:
    """Three special tokens, GPT-2's printable stand-in for every byte, and two merged tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    return ["<|endoftext|>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "ĠĠ", "he"]


def rotary_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """How llama.cpp stores query and key rows: pairs of one rotation side by side."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def tiny_llama(kv_heads: int = KV_HEADS) -> dict[str, tuple[str, torch.Tensor, int]]:
    """Hugging Face name -> (GGUF name, weight, heads whose rows GGUF reorders, or 0)."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "model.embed_tokens.weight": ("token_embd", rand(len(vocabulary()), HIDDEN), 0),
        "model.norm.weight": ("output_norm", rand(HIDDEN), 0),
    }
    for i in range(BLOCKS):
        kv = kv_heads * HEAD_DIM
        names = {
            "self_attn.q_proj": ("attn_q", rand(HIDDEN, HIDDEN), HEADS),
            "self_attn.k_proj": ("attn_k", rand(kv, HIDDEN), kv_heads),
            "self_attn.v_proj": ("attn_v", rand(kv, HIDDEN), 0),
            "self_attn.o_proj": ("attn_output", rand(HIDDEN, HIDDEN), 0),
            "mlp.gate_proj": ("ffn_gate", rand(FFN, HIDDEN), 0),
            "mlp.up_proj": ("ffn_up", rand(FFN, HIDDEN), 0),
            "mlp.down_proj": ("ffn_down", rand(HIDDEN, FFN), 0),
            "input_layernorm": ("attn_norm", rand(HIDDEN), 0),
            "post_attention_layernorm": ("ffn_norm", rand(HIDDEN), 0),
        }
        for name, (short, weight, heads) in names.items():
            tensors[f"model.layers.{i}.{name}.weight"] = (f"blk.{i}.{short}", weight, heads)
    return tensors


def _add_tokenizer(writer: Any, pre: str) -> None:
    tokens = vocabulary()
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 258)
    writer.add_token_merges(["Ġ Ġ", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_gguf(
    path: Path,
    quantization: str = "Q4_1",
    *,
    kv_heads: int = KV_HEADS,
    tells_kv_heads: bool = True,
    pre: str = "smollm",
    more: Callable[[Any], None] | None = None,
) -> Path:
    """A whole tiny llama with a byte-level tokenizer, written by the `gguf` package itself.

    `more` adds to what is written.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    if tells_kv_heads:
        writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    _add_tokenizer(writer, pre)
    if more is not None:
        more(writer)
    for name, weight, heads in tiny_llama(kv_heads).values():
        stored = rotary_order(weight, heads) if heads else weight
        kind = gguf.GGMLQuantizationType[quantization if stored.ndim == 2 else "F32"]
        data = gguf.quants.quantize(stored.numpy(), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_gpt2() -> dict[str, tuple[str, torch.Tensor]]:
    """Hugging Face name -> (GGUF name, tensor as Hugging Face has it)."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "wte.weight": ("token_embd.weight", rand(len(vocabulary()), HIDDEN)),
        "wpe.weight": ("position_embd.weight", rand(GPT2_POSITIONS, HIDDEN)),
        "ln_f.weight": ("output_norm.weight", rand(HIDDEN)),
        "ln_f.bias": ("output_norm.bias", rand(HIDDEN)),
    }
    linears = {
        "attn.c_attn": ("attn_qkv", 3 * HIDDEN, HIDDEN),
        "attn.c_proj": ("attn_output", HIDDEN, HIDDEN),
        "mlp.c_fc": ("ffn_up", GPT2_FFN, HIDDEN),
        "mlp.c_proj": ("ffn_down", HIDDEN, GPT2_FFN),
    }
    for i in range(BLOCKS):
        for name, (short, rows, columns) in linears.items():
            tensors[f"h.{i}.{name}.weight"] = (f"blk.{i}.{short}.weight", rand(columns, rows))
            tensors[f"h.{i}.{name}.bias"] = (f"blk.{i}.{short}.bias", rand(rows))
        for name, short in (("ln_1", "attn_norm"), ("ln_2", "ffn_norm")):
            for part in ("weight", "bias"):
                tensors[f"h.{i}.{name}.{part}"] = (f"blk.{i}.{short}.{part}", rand(HIDDEN))
    return tensors


def write_gpt2(path: Path) -> Path:
    """A whole tiny GPT-2, whose linears a GGUF file has the other way round."""
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(GPT2_POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(GPT2_FFN)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-5)
    _add_tokenizer(writer, "gpt-2")
    for name, (short, weight) in tiny_gpt2().items():
        turned = weight.ndim == 2 and ".c_" in name
        writer.add_tensor(short, (weight.T if turned else weight).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
