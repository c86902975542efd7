"""Gradient steps on the weights that a pruned model kept, towards its dense parent's outputs.

Per position the loss is KL(dense || student) over the vocabulary, plus, at some blocks, the squared
distance of the block's output from the parent's in units of its squared length: SquareHead (Kurtic
et al., 2310.06927) with the mean taken over positions, since a few positions of huge norm would
otherwise be all that it sees. Knows one step; not how many, nor files.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import HalfweaveError
from .fused_kl import fused_kl
from .latents import Latent
from .network import Network
from .precision import Dither
from .settings import Distillation
from .targets import Target, Targets
from .windows import Windows, next_tokens

# Far below the gradient of any weight that matters, also where a small layer's are tiny.
_EPSILON = 1e-10
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Trainer:
    """The student, its latents and Adam's moments.

    `gains` are the norm gains and biases by full name, `latents` the linears by full name; `taken`
    are the steps of earlier trainings that this one goes on from.
    """

    def __init__(
        self,
        student: Network,
        latents: dict[str, Latent],
        parent_head: Tensor,
        windows: Windows,
        targets: tuple[Targets, Targets],
        settings: Distillation,
    ) -> None:
        """`targets` are those of the training and of the held-out windows."""
        self._student, self.latents, self._settings = student, latents, settings
        self._heads = (student.head, parent_head)
        dtype = getattr(torch, settings.precision)
        self._training_heads = (student.head.to(dtype), parent_head.to(dtype))
        self._windows = windows
        self._targets, self._held_out_targets = targets
        self.gains = {
            name: parameter
            for name, parameter in student.parameters.items()
            if parameter.dim() == 1
        }
        self._weights = {name: student.parameters[f"{name}.weight"] for name in latents}
        self._dithers = {
            name: Dither(weight, seed)
            for seed, (name, weight) in enumerate(self._weights.items())
            if settings.precision == "bfloat16"
        }
        for parameter in (*self.gains.values(), *self._weights.values()):
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.Adam(
            self._groups(), betas=settings.betas, eps=_EPSILON, fused=True
        )
        self.taken = 0
        self.write_weights()

    def step(self, index: int, total: int) -> float:
        """Do step `index` of `total`; the mean training KL of its positions, before the step.

        The rates of the first `warmup_steps` do not depend on `total`.

        Raises:
            HalfweaveError: the loss is not finite; the weights are then as before.
        """
        settings, at = self._settings, self.taken + index
        chosen = self._windows.of_step(at, settings.windows_per_step, settings.seed)
        self._dither()
        total_kl = 0.0
        for start in range(0, len(chosen), settings.windows_per_pass):
            total_kl += self._accumulate(chosen[start : start + settings.windows_per_pass])
        loss = total_kl / settings.batch_tokens
        if not math.isfinite(loss):
            raise HalfweaveError(
                f"the loss of step {index + 1} is not finite",
                f"train with a learning rate below {settings.learning_rate:g}",
            )
        self._update(schedule(index, total, settings))
        self.write_weights()
        return loss

    @torch.no_grad()
    def held_out_kl(self) -> float:
        """Mean KL on the held-out windows, nats per token, with the weights in the model now."""
        total, positions = 0.0, 0
        for index, window in enumerate(self._windows.held_out):
            hidden, _ = self._student.forward(window[None])
            target = self._held_out_targets.of([index])
            kl, _ = fused_kl(hidden[0], target.final, self._heads, next_tokens(window[None])[0])
            total += float(kl)
            positions += len(window)
        return total / positions

    @torch.no_grad()
    def write_weights(self) -> None:
        """Put the weights that the latents stand for into the model."""
        for name, latent in self.latents.items():
            latent.write_weight(self._weights[name])

    @torch.no_grad()
    def put(self, weights: dict[str, Tensor]) -> None:
        """Put other weights and gains into the model, by full tensor name, to measure them."""
        for name, tensor in weights.items():
            self._student.parameters[name].copy_(tensor)

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, and Adam's moments, by name; of slots what is in them."""
        values = {
            name: tensor.detach() if slots is None else tensor.detach()[slots]
            for name, tensor, slots in self._trained()
        }
        return {**values, **self.moments()}

    def moments(self) -> dict[str, Tensor]:
        """Adam's, by name; of slots those of what is in them."""
        found: dict[str, Tensor] = {}
        for name, tensor, slots in self._trained():
            state = self._optimizer.state.get(tensor, {})
            for moment in _MOMENTS:
                whole = state.get(moment, torch.zeros_like(tensor))
                found[f"{name}.{moment}"] = whole if slots is None else whole[slots]
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], done: int) -> None:
        """Go on from what `tensors` gave after `done` steps, and after the same `adopt`, if any."""
        for name, tensor, slots in self._trained():
            _fill(tensor, tensors[name], slots)
            adopted = int(self._optimizer.state.get(tensor, {}).get("step", 0))
            self._set_moments(name, tensor, slots, tensors, adopted + done)
        self.write_weights()

    @torch.no_grad()
    def adopt(self, moments: dict[str, Tensor], done: int) -> None:
        """Go on with the moments of a training that ended, after `done` steps in all, where this
        one begins, and with the windows behind its own.

        Those of codes begin anew, since codes were something else then; their scales' go on.
        """
        self.taken = done
        coded = {f"{n}.latent" for n, latent in self.latents.items() if latent.grid is not None}
        for name, tensor, slots in self._trained():
            if name not in coded and f"{name}.{_MOMENTS[0]}" in moments:
                self._set_moments(name, tensor, slots, moments, done)

    def _set_moments(
        self, name: str, tensor: Tensor, slots: Tensor | None, saved: dict[str, Tensor], done: int
    ) -> None:
        state = {"step": torch.tensor(float(done), device=tensor.device)}
        for moment in _MOMENTS:
            state[moment] = torch.zeros_like(tensor)
            _fill(state[moment], saved[f"{name}.{moment}"], slots)
        self._optimizer.state[tensor] = state

    def _accumulate(self, chosen: list[int]) -> float:
        """Add the gradients of a few windows; the sum of their positions' KL."""
        settings = self._settings
        windows = self._windows.train[chosen]
        target = self._targets.of(chosen)
        hidden, tapped = self._student.forward(windows, settings.precision)
        flat = hidden.flatten(0, 1)
        targets = next_tokens(windows).flatten()
        loss, nll = fused_kl(flat, target.final, self._training_heads, targets, settings.ce)
        kl = float(loss.detach()) - settings.ce * float(nll)
        if settings.hidden_weight:
            distance = _hidden_distance(tapped, target)
            loss = loss + settings.hidden_weight * distance
        (loss / settings.batch_tokens).backward()
        return kl

    @torch.no_grad()
    def _update(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = group["base"] * rate
        for name, weight in self._weights.items():
            assert weight.grad is not None
            self.latents[name].take_gradient(weight.grad, weight)
            weight.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _dither(self) -> None:
        """Round the weights for one step's passes; behind the step they are exact again."""
        for name, dither in self._dithers.items():
            dither.round_(self._weights[name])

    def _groups(self) -> list[dict[str, object]]:
        settings = self._settings
        groups: list[dict[str, object]] = [
            {"params": list(self.gains.values()), "base": settings.gain_rate}
        ]
        for latent in self.latents.values():
            share = 1.0 if latent.grid is None else settings.code_share
            rate = settings.learning_rate * share * _kept_rms(latent)
            groups.append({"params": [latent.value], "base": rate})
            if latent.grid is not None:
                groups.append({"params": [latent.grid.log_factor], "base": settings.scale_rate})
        return groups

    def _trained(self) -> list[tuple[str, Tensor, Tensor | None]]:
        """Name and tensor of everything that Adam changes, and its slots, if the format has any."""
        found: list[tuple[str, Tensor, Tensor | None]] = [
            (name, gain, None) for name, gain in self.gains.items()
        ]
        for name, latent in self.latents.items():
            found.append((f"{name}.latent", latent.value, latent.slots))
            if latent.grid is not None:
                found.append((f"{name}.log_factor", latent.grid.log_factor, None))
        return found


def schedule(index: int, total: int, settings: Distillation) -> float:
    """Share of the rates in step `index` of `total`: a linear rise, then a cosine's fall."""
    warmup = settings.warmup_steps
    if index < warmup:
        return (index + 1) / (warmup + 1)
    passed = (index - warmup) / max(1, total - warmup)
    return settings.final_rate + (1 - settings.final_rate) * (1 + math.cos(math.pi * passed)) / 2


def _hidden_distance(tapped: dict[int, Tensor], target: Target) -> Tensor:
    """Sum over positions of the mean over taps of |student - dense|^2 / |dense|^2."""
    distances = []
    for tap, hidden in tapped.items():
        dense = target.tapped[tap]
        squared = (hidden.flatten(0, 1) - dense).square().sum(dim=-1)
        distances.append((squared / dense.square().sum(dim=-1).clamp_min(1e-12)).sum())
    return torch.stack(distances).mean()


def _kept_rms(latent: Latent) -> float:
    """Root mean square of the weights that are kept; 1 where all are zero."""
    kept = latent.value.numel() if latent.keep is None else int(latent.keep.sum())
    return math.sqrt(float(latent.value.square().sum(dtype=torch.float64)) / max(1, kept)) or 1.0


def _fill(tensor: Tensor, saved: Tensor, slots: Tensor | None) -> None:
    if slots is None:
        tensor.copy_(saved)
    else:
        tensor[slots] = saved.to(tensor.device)
