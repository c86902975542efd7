"""MLPs in torch: one that every token goes through, or experts of which each takes a few."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.dispatch import LinearFunction
from .loading import Loader
from .spec import MLP_ROLES

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(frozen=True)
class Mlp:
    """One MLP, its linears bound to their kernels by role; gated where there is a gate."""

    linears: Mapping[str, LinearFunction]
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def load(cls, loader: Loader, layer: int, exact: bool, expert: int | None = None) -> Mlp:
        """Read a layer's, or one of its experts; raises as the loader."""
        roles = [role for role in MLP_ROLES if role != "gate" or loader.spec.gated]
        bound = {role: loader.bound(layer, role, exact, expert) for role in roles}
        return cls(bound, _ACTIVATIONS[loader.spec.activation])

    def __call__(self, x: Tensor) -> Tensor:
        """Of x [tokens, hidden]."""
        up = self.linears["up"](x)
        gate = self.linears.get("gate")
        inner = self.activation(up) if gate is None else self.activation(gate(x)) * up
        return self.linears["down"](inner)


@dataclass(frozen=True)
class Experts:
    """Some MLPs, each of which is run on those tokens only that chose it: see ExpertsSpec."""

    router: LinearFunction
    experts: Sequence[Mlp]
    chosen: int
    renormalised: bool

    @classmethod
    def load(cls, loader: Loader, layer: int, exact: bool) -> Experts:
        """Read a layer's; raises as the loader."""
        spec, experts = loader.spec, loader.spec.experts
        assert experts is not None
        return cls(
            loader.never_packed(spec.router_name(layer), exact),
            [Mlp.load(loader, layer, exact, expert) for expert in range(experts.count)],
            experts.chosen,
            experts.renormalised,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Of x [tokens, hidden]."""
        probabilities = self.router(x).softmax(-1, dtype=torch.float32)
        weights, numbers = probabilities.topk(self.chosen, dim=-1)
        if self.renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        weights, mixed = weights.to(x.dtype), torch.zeros_like(x)
        # Expert by expert in their order, so that a token's sum does not depend on its neighbours.
        for number in numbers.unique().tolist():
            tokens, place = torch.where(numbers == number)
            out = self.experts[number](x[tokens]) * weights[tokens, place, None]
            mixed.index_add_(0, tokens, out)
        return mixed


def load_mlp(loader: Loader, layer: int, exact: bool) -> Mlp | Experts:
    """What a layer has; raises as the loader."""
    if loader.spec.has_experts(layer):
        return Experts.load(loader, layer, exact)
    return Mlp.load(loader, layer, exact)
