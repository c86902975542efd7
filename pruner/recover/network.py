"""One causal LM in fp32, run window by window, with its blocks' outputs within reach.

The modules are transformers' own, on no memory at all until the weights that the caller reads are
put in. Knows modules and hidden states; nothing of formats, losses or steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ...errors import CheckpointError, UnsupportedModel
from ..family import Family
from ..source import Source
from ..stream import skeleton
from .precision import autocast

ReadTensor = Callable[[str], Tensor]


def check_family(family: Family) -> None:
    """Refuse a model that cannot be trained as a whole here.

    Raises:
        UnsupportedModel: its scores are more than a matrix times a state, its experts are stacked,
            or its weights are stored the other way round.
    """
    reasons = {
        "it caps its scores": family.capped,
        "it has experts": family.experts is not None,
        "its weights are stored transposed": family.transposed,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UnsupportedModel(
            f"distillation does not know this kind of model: {found[0]}",
            "--recover blocks trains one block at a time, whatever is in it",
        )


class Network:
    """A model of `source`'s architecture, holding whatever weights `read` gives it."""

    def __init__(self, source: Source, read: ReadTensor, taps: Iterable[int] = ()) -> None:
        """Fill the modules; `taps` are the blocks whose outputs `forward` also returns.

        Raises:
            CheckpointError: a tensor is missing or has another shape than config.json says.
        """
        model = skeleton(source)
        _fill(model, source, read)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        self._inner: Any = model.get_submodule(source.family.inner)
        self._tapped: dict[int, Tensor] = {}
        for tap in taps:
            block = model.get_submodule(source.family.block_prefix(tap).rstrip("."))
            block.register_forward_hook(self._tap(tap))
        self.head = self.parameters[f"{source.family.head}.weight"].detach()

    def forward(
        self, windows: Tensor, precision: str = "float32"
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Hidden states [n, length, hidden] after the final norm, and those after each tap, fp32.

        `precision` is that of the matrix products (precision.py).
        """
        with autocast(precision, windows.device):
            output = self._inner(input_ids=windows, use_cache=False)
        tapped, self._tapped = self._tapped, {}
        hidden: Tensor = output.last_hidden_state
        return hidden.float(), {tap: state.float() for tap, state in tapped.items()}

    def _tap(self, index: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._tapped[index] = output[0] if isinstance(output, tuple) else output

        return keep


def evenly_spaced(blocks: int, count: int) -> list[int]:
    """Indices of at most `count` blocks, evenly spaced, the last one among them."""
    count = min(count, blocks)
    return [(i + 1) * blocks // count - 1 for i in range(count)]


def _fill(model: nn.Module, source: Source, read: ReadTensor) -> None:
    """Put weights into the modules; a tied head shares the embedding's memory."""
    family = source.family
    head, embedding, tied = f"{family.head}.weight", f"{family.embedding}.weight", family.tied
    state = {name: read(name) for name in model.state_dict() if not (tied and name == head)}
    if tied and head in model.state_dict():
        state[head] = state[embedding]
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise CheckpointError(f"{source.path}: does not fit config.json: {detail[:400]}") from error
