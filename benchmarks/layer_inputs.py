"""Linears and what they read: of tiny made-up models of six families, or of a real one.

A pruning method sees a weight and its inputs' Hessian, so a table of layer errors needs no trained
model of every family. Plain random ones would be too easy to tell from real ones: independent
weights and tokens give Hessians near the identity. Here weights are of falling spectrum with
heavy-tailed noise, norms have uneven gains with a few outliers, and tokens repeat; how much of each
was set so that SparseGPT and Wanda lose about as much on the Llama as on a real one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from halfweave.pruner.methods import InputStatistics
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCABULARY = 4096
LAYERS = 2  # so that the last block's inputs have been through one
_COPIED = 0.3  # share of tokens that repeat one of the last _REACH
_REACH = 16
_FALL = 0.5  # singular values fall as i^-_FALL
_NOISE = 2.0
_POSITION = 0.1  # size of position embeddings, beside token embeddings of 1
_BIAS = 0.02
_HEAVY_TAIL = 4  # degrees of freedom of Student's t
_OUTLIERS = 4  # channels whose norm has a gain far above the rest


@dataclass(frozen=True)
class Size:
    """Widths of a tiny model, and the windows it reads: so many of so many tokens, twice."""

    hidden: int = 256
    ffn: int = 1024
    heads: int = 4
    windows: int = 32
    length: int = 256


@dataclass(frozen=True)
class Layer:
    """One linear: its weight fp32 [N, K], the inputs to prune it on, and others to judge by."""

    name: str
    weight: Tensor
    fit: InputStatistics
    held_out: InputStatistics


def tiny_layers(family: str, size: Size, seed: int = 0) -> list[Layer]:
    """The linears of the last block of a made-up model of one of FAMILIES."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = FAMILIES[family](size).eval()
    with torch.no_grad():
        _make_less_trivial(model, generator)
    return _layers(
        model,
        fit=_tokens(size, generator),
        held_out=_tokens(size, generator),
        blocks=[LAYERS - 1],
    )


def real_layers(
    directory: Path, text: str, blocks: Sequence[int], windows: int, length: int
) -> list[Layer]:
    """The linears of some blocks of a model on the disk, fitted on the text's first four fifths
    and judged by the last one; `windows` of `length` tokens each, spread evenly.
    """
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **local)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    border = len(ids) * 4 // 5
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, **local
    )
    return _layers(
        model.eval(),
        fit=_spread(ids[:border], windows, length),
        held_out=_spread(ids[border:], windows, length),
        blocks=blocks,
    )


def _spread(ids: Tensor, windows: int, length: int) -> Tensor:
    """Windows [n, length] at even distances; they overlap where the text is short."""
    if len(ids) < length:
        raise ValueError(f"{len(ids)} tokens of text, a window needs {length}")
    starts = torch.linspace(0, len(ids) - length, windows).long()
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def _layers(model: nn.Module, fit: Tensor, held_out: Tensor, blocks: Sequence[int]) -> list[Layer]:
    linears = {
        name: module
        for name, module in model.named_modules()
        if _is_linear_of(name, module, blocks)
    }
    seen, judged = (_statistics(model, linears, tokens) for tokens in (fit, held_out))
    return [
        Layer(name, weight_of(linear), seen[name], judged[name]) for name, linear in linears.items()
    ]


def _is_linear_of(name: str, module: nn.Module, blocks: Sequence[int]) -> bool:
    number = re.search(r"\.(\d+)\.", name)
    inside = number is not None and int(number[1]) in blocks
    return inside and isinstance(module, nn.Linear | Conv1D)


def weight_of(linear: nn.Module) -> Tensor:
    """A linear's weight as [N, K]; GPT-2's Conv1D stores it as [K, N]."""
    weight = linear.get_parameter("weight").detach().float()
    return (weight.T if isinstance(linear, Conv1D) else weight).contiguous()


@torch.no_grad()
def _statistics(
    model: nn.Module, linears: Mapping[str, nn.Module], tokens: Tensor
) -> dict[str, InputStatistics]:
    """X^T X / tokens of every linear's inputs; linears with equal ones share the object."""
    sums: dict[str, Tensor] = {}

    def collector(name: str) -> Callable[..., None]:
        def collect(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.T @ x

        return collect

    hooks = [m.register_forward_pre_hook(collector(name)) for name, m in linears.items()]
    for batch in tokens.split(8):
        model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    shared: list[InputStatistics] = []
    found: dict[str, InputStatistics] = {}
    for name, total in sums.items():
        hessian = total / tokens.numel()
        same = (each for each in shared if torch.equal(each.hessian, hessian))
        found[name] = next(same, None) or InputStatistics(hessian, tokens.numel())
        shared.append(found[name])
    return found


def _make_less_trivial(model: nn.Module, generator: torch.Generator) -> None:
    """Fill every parameter in place: matrices, embeddings, norms' gains, and biases."""
    for path, module in model.named_modules():
        norm = "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):  # not scaled: the first block would drown it
                position = "wpe" in path or "position" in path
                parameter.copy_(_falling_spectrum(parameter.shape, generator))
                parameter.mul_(_POSITION if position else 1)
            elif parameter.dim() == 2:
                inputs = parameter.shape[0 if isinstance(module, Conv1D) else 1]
                parameter.copy_(_falling_spectrum(parameter.shape, generator))
                parameter.mul_(inputs**-0.5)  # so that a product keeps its factor's size
            elif norm and name == "weight":
                gain = torch.exp(0.5 * torch.randn(parameter.shape, generator=generator))
                gain[torch.randperm(len(gain), generator=generator)[:_OUTLIERS]] *= 5
                parameter.add_(gain - 1)  # Gemma's gains are stored less one, and begin at zero
            else:
                parameter.copy_(_BIAS * torch.randn(parameter.shape, generator=generator))


def _falling_spectrum(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A matrix of falling singular values under heavy-tailed noise of _NOISE times their power.

    Its elements have the variance 1.
    """
    rows, columns = shape
    rank = min(shape)
    left = torch.randn(rows, rank, generator=generator) * torch.arange(1, rank + 1) ** -_FALL
    smooth = left @ torch.randn(rank, columns, generator=generator)
    power = torch.randn(_HEAVY_TAIL, rows, columns, generator=generator).square().mean(0)
    noise = torch.randn(rows, columns, generator=generator) / power.sqrt()  # Student's t
    matrix = smooth / smooth.std() + noise / noise.std() * _NOISE**0.5
    return matrix / matrix.std()


def _tokens(size: Size, generator: torch.Generator) -> Tensor:
    """Windows [n, length] of Zipf-distributed tokens that often repeat a recent one."""
    frequency = 1 / torch.arange(1.0, VOCABULARY + 1)
    shape = (size.windows, size.length)
    drawn = torch.multinomial(
        frequency, size.windows * size.length, replacement=True, generator=generator
    ).view(shape)
    copied = torch.rand(shape, generator=generator) < _COPIED
    distance = torch.randint(1, _REACH + 1, shape, generator=generator)
    everyone = torch.arange(size.windows)
    for at in range(_REACH, size.length):
        earlier = drawn[everyone, at - distance[:, at]]
        drawn[:, at] = torch.where(copied[:, at], earlier, drawn[:, at])
    return drawn


def _llama_like(name: str, **options: Any) -> Callable[[Size], nn.Module]:
    """A family whose config has the field names of Llama's."""

    def make(size: Size) -> nn.Module:
        config = getattr(transformers, f"{name}Config")(
            vocab_size=VOCABULARY,
            hidden_size=size.hidden,
            intermediate_size=size.ffn,
            num_hidden_layers=LAYERS,
            num_attention_heads=size.heads,
            num_key_value_heads=max(1, size.heads // 2),
            head_dim=size.hidden // size.heads,
            max_position_embeddings=size.length,
            **options,
        )
        model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
        return model

    return make


def _opt(size: Size) -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        ffn_dim=size.ffn,
        num_hidden_layers=LAYERS,
        num_attention_heads=size.heads,
        word_embed_proj_dim=size.hidden,
        max_position_embeddings=size.length,
    )
    return transformers.OPTForCausalLM(config)


def _gpt2(size: Size) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=size.hidden,
        n_inner=size.ffn,
        n_layer=LAYERS,
        n_head=size.heads,
        n_positions=size.length,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def _bloom(size: Size) -> nn.Module:
    """Its inner width is always four times the hidden one."""
    config = transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=size.hidden, n_layer=LAYERS, n_head=size.heads
    )
    return transformers.BloomForCausalLM(config)


FAMILIES: Mapping[str, Callable[[Size], nn.Module]] = {
    "llama": _llama_like("Llama"),
    "qwen2": _llama_like("Qwen2"),
    "gemma": _llama_like("Gemma"),
    "opt": _opt,
    "gpt2": _gpt2,
    "bloom": _bloom,
}
