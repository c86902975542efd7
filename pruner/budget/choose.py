"""The quality budget: how good, or how small, the user wants the model; what each linear becomes.

Sensitivities, then candidates, then the path of best trades, then the point on it that the budget
allows: by counting for bytes, by measuring whole models for perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...errors import UsageError
from ...kernels.formats import Dense
from ..recipe import Recipe
from ..source import Source
from . import knapsack
from .candidates import assembled, make_candidates, possible_formats
from .knapsack import Option, find_path
from .perplexity import Ratio, to_ratio, window_losses
from .scratch import Scratch, run_key
from .search import smallest_within
from .sensitivity import output_sensitivity
from .sizes import bytes_before, bytes_that_stay, stored_bytes
from .windows import SENSED_TOKENS, BudgetWindows


@dataclass(frozen=True)
class BudgetProgress:
    """Told along the way: the step's name, how much of it is done, and what was found."""

    step: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class LinearChoice:
    """What was chosen for a linear, and from what."""

    name: str
    chosen: Option
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Measurement:
    """One whole model that was measured. `bytes` are those of its weight files."""

    bytes: int
    predicted_ratio: float
    measured: Ratio


@dataclass(frozen=True)
class BudgetPlan:
    """The outcome, measured with candidates; `linears` is in the model's order.

    Bytes are of weight files, `bytes_after` at most a few hundred too many. Ratios are measured on
    the windows to search; `dense_losses` are the parent's on those to judge, where nothing else
    has been measured. The predicted ratio is an estimate of the ranking only.
    """

    choices: dict[str, str]
    bytes_before: int
    bytes_after: int
    predicted_ratio: float
    measured: Ratio
    linears: tuple[LinearChoice, ...]
    measurements: tuple[Measurement, ...]
    dense_losses: tuple[float, ...]

    @property
    def share_of_bytes(self) -> float:
        """Of the dense model's weight files."""
        return self.bytes_after / self.bytes_before


ProgressCallback = Callable[[BudgetProgress], None]


def check_reachable(source: Source, recipe: Recipe) -> None:
    """Refuse a share of bytes that no choice of formats reaches, from headers alone.

    Raises:
        UsageError: naming the smallest share.
    """
    if not recipe.target_bytes:
        return
    before, stay = bytes_before(source), bytes_that_stay(source)
    smallest = stay + sum(
        min(
            stored_bytes(source, name, kind, recipe.group)
            for kind in possible_formats(source, recipe, name)
        )
        for index in range(source.block_count)
        for name in source.linear_names(index)
    )
    if smallest > recipe.target_bytes * before:
        least = math.ceil(smallest / before * 1000) / 1000
        raise UsageError(
            f"target_bytes {recipe.target_bytes:g} cannot be reached: embeddings, norms and head "
            f"stay as they are ({stay / before:.3f} of the dense model), and with every linear at "
            f"its smallest the share is {least:.3f}",
            f"--target-bytes {least:.3f} is the least",
        )


def choose_formats(
    source: Source,
    recipe: Recipe,
    windows: BudgetWindows,
    scratch: Path,
    progress: ProgressCallback | None = None,
) -> BudgetPlan:
    """Choose a format for every linear. Killed at any instant, the same call goes on.

    `scratch` is a directory for the candidates, about half the dense model's size; another budget
    for the same model may use it again.

    Raises:
        UsageError: the recipe has no budget, or one of bytes that cannot be reached.
        RefusedError: `scratch` belongs to another run.
        CheckpointError, CapacityError: as for pruning.
    """
    if not (recipe.max_ppl_ratio or recipe.target_bytes):
        raise UsageError("the recipe has neither max_ppl_ratio nor target_bytes")
    check_reachable(source, recipe)
    place = Scratch.open(scratch, run_key(source, recipe, windows), recipe.group)
    return _Chooser(source, recipe, windows, place, progress or (lambda _: None)).choose()


class _Chooser:
    """One choice in progress."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        windows: BudgetWindows,
        scratch: Scratch,
        progress: ProgressCallback,
    ) -> None:
        self._source, self._recipe, self._windows = source, recipe, windows
        self._scratch, self._progress = scratch, progress
        self._measurements: list[Measurement] = []
        self._stay = bytes_that_stay(source)
        self._dense: list[float] = []

    def choose(self) -> BudgetPlan:
        options = self._options()
        path = find_path(options)
        dense = dict.fromkeys(options, Dense.kind)
        self._dense = self._losses(dense, self._windows.search)
        chosen = self._by_bytes(path) if self._recipe.target_bytes else self._by_ratio(path)
        measured = self._measure(chosen)
        choices = {name: chosen[name].format for name in options}
        linears = [LinearChoice(name, chosen[name], tuple(options[name])) for name in options]
        return BudgetPlan(
            choices=choices,
            bytes_before=bytes_before(self._source),
            bytes_after=self._bytes(chosen),
            predicted_ratio=_predicted(chosen),
            measured=measured,
            linears=tuple(linears),
            measurements=tuple(self._measurements),
            dense_losses=tuple(self._losses(dense, self._windows.judge)),
        )

    def _options(self) -> Mapping[str, list[Option]]:
        source, blocks = self._source, self._source.block_count
        if self._scratch.sensitivity() is None:
            count = max(1, SENSED_TOKENS // self._windows.fit.shape[1])
            found = output_sensitivity(
                source,
                self._windows.fit[:count],
                self._recipe.seed,
                lambda done: self._tell("sensitivities", done, blocks),
            )
            self._scratch.save_sensitivity(found)
        return make_candidates(
            source,
            self._recipe,
            self._windows,
            self._scratch,
            lambda done: self._tell("candidates", done, blocks),
        )

    def _by_bytes(self, path: knapsack.Path) -> Mapping[str, Option]:
        limit = math.floor(self._recipe.target_bytes * bytes_before(self._source)) - self._stay
        chosen = knapsack.within(path, limit)
        if chosen is None:
            raise UsageError(
                f"target_bytes {self._recipe.target_bytes:g} cannot be reached: some linears "
                "cannot be packed"
            )
        return chosen

    def _by_ratio(self, path: knapsack.Path) -> Mapping[str, Option]:
        # The model is judged on as much other text. Right at the limit here, it would be above it
        # there every other time; one standard error of the difference below, one time in six.
        def measure(point: int) -> float:
            ratio = self._measure(path.chosen(point))
            return math.log(ratio.value) + math.sqrt(2) * ratio.error

        limit = math.log(self._recipe.max_ppl_ratio)
        return path.chosen(smallest_within(path, limit, measure))

    def _measure(self, chosen: Mapping[str, Option]) -> Ratio:
        """The ratio of the model put together from candidates; known ones are not run again."""
        windows = self._windows.search
        losses = self._losses({name: option.format for name, option in chosen.items()}, windows)
        ratio = Ratio.of(losses, self._dense, windows.shape[1])
        measurement = Measurement(self._bytes(chosen), _predicted(chosen), ratio)
        if measurement not in self._measurements:
            self._measurements.append(measurement)
            share = measurement.bytes / bytes_before(self._source)
            note = f"{share:.3f} of the bytes: {ratio.value:.3f}x the perplexity"
            self._tell("measurements", len(self._measurements), 0, note)
        return ratio

    def _losses(self, choices: Mapping[str, str], windows: Tensor) -> list[float]:
        losses = self._scratch.measured(choices, windows)
        if losses is None:
            read = assembled(self._source, self._scratch, choices)
            losses = window_losses(self._source, windows, read)
            self._scratch.save_measured(choices, windows, losses)
        return losses

    def _bytes(self, chosen: Mapping[str, Option]) -> int:
        return self._stay + sum(option.bytes for option in chosen.values())

    def _tell(self, step: str, done: int, total: int, note: str = "") -> None:
        self._progress(BudgetProgress(step, done, total, note))


def _predicted(chosen: Mapping[str, Option]) -> float:
    return to_ratio(sum(option.loss for option in chosen.values()))
