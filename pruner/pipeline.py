"""The whole job: plan, then block by block observe, prune, save, advance.

Every finished block is on the disk and in the journal before the next begins, and the activations
that go on come from the weights as saved. A resumed run therefore walks the very same path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import CheckpointError, RefusedError
from ..kernels.formats import FORMATS, Dense, PackedLinear, from_tensors
from ..kernels.schema import JOURNAL_FILE, MANIFEST_FILE
from ..kernels.shards import read_shard
from .calibrate import CalibrationText, load_text, sample_windows
from .journal import Journal, LinearRecord, locked
from .masks import is_n_of_m
from .methods import METHODS, InputStatistics
from .methods.base import Pruned, relative_error
from .pack import pack
from .plan import Plan, check_capacity, make_plan, target_of
from .recipe import Recipe
from .save import finish, is_leftover, is_ours, shard_name, write_shard
from .source import Source, first_nonfinite
from .stream import BlockStream


@dataclass(frozen=True)
class Progress:
    """Told after each linear: what came of it, how far the run is, and the time still to go."""

    name: str
    record: LinearRecord
    done: int
    total: int
    seconds: float
    eta_seconds: float


@dataclass(frozen=True)
class PruneResult:
    """A complete output directory and what it took. `linears` is in the model's order."""

    path: Path
    plan: Plan
    linears: Mapping[str, LinearRecord]
    seconds: float
    resumed_blocks: int


ProgressCallback = Callable[[Progress], None]


def plan_prune(model: str | Path, recipe: Recipe) -> Plan:
    """What `prune` would do, without doing it (`--dry-run`). Raises as `prune` does."""
    return make_plan(Source.open(model), recipe)


def prune(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> PruneResult:
    """Prune the dense model in `model` into the directory `out`.

    `out` is complete when its manifest is there. Killed at any instant, the same call with
    `resume=True` yields the same bytes (same recipe, library versions and thread count).

    Raises:
        UsageError: bad paths, recipe, or calibration text.
        RefusedError: `out` is taken, locked, or belongs to another run; or the model is unsafe.
        CheckpointError: the model is damaged; NaN and infinity count unless allowed.
        CapacityError: the run does not fit in memory or on the disk.
    """
    recipe = recipe or Recipe()
    source = Source.open(model)
    plan = make_plan(source, recipe)
    text = load_text(recipe.calib)
    directory = _prepare_directory(source, Path(out), resume, overwrite)
    with locked(directory):
        _settle(directory, overwrite)
        check_capacity(plan, directory)
        run = _Run(source, directory, recipe, plan, text, progress)
        return run.go(resume)


class _Run:
    """One pass over the blocks of one model."""

    def __init__(
        self,
        source: Source,
        directory: Path,
        recipe: Recipe,
        plan: Plan,
        text: CalibrationText,
        progress: ProgressCallback | None,
    ) -> None:
        self._source, self._directory, self._recipe, self._plan = source, directory, recipe, plan
        self._text, self._progress = text, progress
        self._target = target_of(recipe)
        self._formats = {linear.name: linear for linear in plan.linears}
        self._count = source.block_count + 1
        self._done = self._resumed = 0
        self._started = time.perf_counter()

    def go(self, resume: bool) -> PruneResult:
        windows = self._windows()
        provenance = self._provenance(windows)
        key = {"recipe": self._recipe.to_json(), **provenance}
        again = resume and (self._directory / JOURNAL_FILE).exists()
        journal = (Journal.resume if again else Journal.begin)(self._directory, key)
        if not journal.shards:
            name = shard_name(0, self._count)
            others = self._checked(self._source.other_tensors(), frozenset())[0]
            journal.add(write_shard(self._directory, name, others, {}))
        stream = BlockStream(self._source, windows)
        for index in range(self._source.block_count):
            self._one_block(index, stream, journal)
        finish(self._source, self._directory, journal.shards, self._recipe.to_json(), provenance)
        journal.remove()
        linears = {n: record for shard in journal.shards for n, record in shard.linears.items()}
        seconds = time.perf_counter() - self._started
        return PruneResult(self._directory, self._plan, linears, seconds, self._resumed)

    def _one_block(self, index: int, stream: BlockStream, journal: Journal) -> None:
        if index + 1 < len(journal.shards):
            shard = journal.shards[index + 1]
            stored = read_shard(self._directory / shard.file, shard.sha256)
            self._resumed += 1
            self._done += len(shard.linears)
        else:
            stored, linears = self._prune_block(index, stream)
            name = shard_name(index + 1, self._count)
            shard = write_shard(self._directory, name, stored, linears)
            journal.add(shard)
        if index + 1 < self._source.block_count:
            stream.advance(stream.load_block(index, _unpacked(stored, shard.linears)))
        stream.drop_block(index)

    def _prune_block(
        self, index: int, stream: BlockStream
    ) -> tuple[dict[str, Tensor], dict[str, LinearRecord]]:
        names = self._source.linear_names(index)
        tensors, broken = self._checked(self._source.block_tensors(index), frozenset(names))
        statistics = stream.observe(stream.load_block(index, tensors))
        prefix = self._source.family.block_prefix(index)
        linears: dict[str, LinearRecord] = {}
        for name in names:
            started = time.perf_counter()
            weight = tensors.pop(f"{name}.weight")
            reason = "not finite" if name in broken else self._formats[name].reason
            packed, record = self._prune_linear(
                name, weight, statistics[name.removeprefix(prefix)], reason
            )
            linears[name] = record
            tensors.update({f"{name}.{suffix}": t for suffix, t in packed.tensors().items()})
            self._report(name, record, time.perf_counter() - started)
        return tensors, linears

    def _prune_linear(
        self, name: str, weight: Tensor, statistics: InputStatistics, reason: str | None
    ) -> tuple[PackedLinear, LinearRecord]:
        shape = (weight.shape[0], weight.shape[1])
        if reason is not None:
            return Dense(weight), LinearRecord("dense", shape, None, "none", None, reason)
        original = weight.float()
        pruned, method = self._solve(original, statistics)
        packed = pack(pruned, self._target, weight.dtype, name)
        error = relative_error(original, packed.unpack(), statistics.hessian)
        group = self._formats[name].group
        return packed, LinearRecord(packed.kind, shape, group, method, error, pruned.note)

    def _solve(self, weight: Tensor, statistics: InputStatistics) -> tuple[Pruned, str]:
        pattern = self._target.pattern
        if pattern.of and self._recipe.bits == 16 and is_n_of_m(weight, pattern.kept, pattern.of):
            note = f"is {pattern.text} already: nothing to do, repacked"
            return Pruned(weight, weight != 0, note=note), "repack"
        return METHODS[self._recipe.method](weight, statistics, self._target), self._recipe.method

    def _checked(
        self, tensors: dict[str, Tensor], prunable: frozenset[str]
    ) -> tuple[dict[str, Tensor], set[str]]:
        """The tensors, and the names of prunable linears that hold NaN or infinity."""
        broken: set[str] = set()
        for name, tensor in tensors.items():
            where = first_nonfinite(tensor)
            if where is None:
                continue
            linear = name.removesuffix(".weight")
            if not (self._recipe.allow_nonfinite and linear in prunable):
                raise CheckpointError(
                    f"tensor {name} is not finite at {where}",
                    "--allow-nonfinite keeps such a linear as it is, unpruned",
                )
            broken.add(linear)
        return tensors, broken

    def _windows(self) -> Tensor:
        from transformers import AutoTokenizer

        recipe = self._recipe
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self._source.path, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self._source.path}: no usable tokenizer: {error}") from error
        ids = tokenizer(self._text.text, add_special_tokens=False, verbose=False)["input_ids"]
        windows: Tensor = sample_windows(
            ids, recipe.calib_windows, recipe.calib_length, recipe.seed
        )
        return windows

    def _provenance(self, windows: Tensor) -> dict[str, Any]:
        import transformers

        recipe = self._recipe
        return {
            "halfweave": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "base": {"name": self._source.path.resolve().name, "sha256": self._source.hashes},
            "calibration": {
                "origin": self._text.origin,
                "text_sha256": self._text.sha256,
                "windows": recipe.calib_windows,
                "length": recipe.calib_length,
                "seed": recipe.seed,
            },
        }

    def _report(self, name: str, record: LinearRecord, seconds: float) -> None:
        self._done += 1
        if self._progress is None:
            return
        elapsed = time.perf_counter() - self._started
        left = len(self._plan.linears) - self._done
        per_block = len(self._source.family.linears)
        fresh = self._done - self._resumed * per_block
        # The first block's time is mostly what comes before its first linear: ask the plan.
        eta = elapsed / fresh * left if fresh >= per_block else self._plan.seconds - elapsed
        eta = max(eta, 0.0)
        self._progress(Progress(name, record, self._done, len(self._plan.linears), seconds, eta))


def _unpacked(
    stored: Mapping[str, Tensor], linears: Mapping[str, LinearRecord]
) -> dict[str, Tensor]:
    """A block's tensors with every packed linear as a dense fp32 weight."""
    dense = dict(stored)
    for name, record in linears.items():
        suffixes = FORMATS[record.format].suffixes
        parts = {suffix: dense.pop(f"{name}.{suffix}") for suffix in suffixes}
        packed = from_tensors(record.format, parts, record.shape, record.group, name)
        dense[f"{name}.weight"] = packed.unpack()
    return dense


def _prepare_directory(source: Source, out: Path, resume: bool, overwrite: bool) -> Path:
    """Make `out`, or check that it may be written to.

    Raises:
        RefusedError: it is the input, a file, or holds something that is not ours to replace.
    """
    if out.resolve() == source.path.resolve():
        raise RefusedError(f"{out} is the input; the input is never modified")
    if out.exists() and not out.is_dir():
        raise RefusedError(f"{out} is a file")
    out.mkdir(parents=True, exist_ok=True)
    entries = {entry.name for entry in out.iterdir()}
    unfinished = JOURNAL_FILE in entries
    if entries and not unfinished and MANIFEST_FILE not in entries:
        raise RefusedError(
            f"{out} holds other files, which are never overwritten", "choose an empty directory"
        )
    if entries and not overwrite and not (resume and unfinished):
        raise RefusedError(
            f"{out} holds {'an unfinished run' if unfinished else 'a finished model'}",
            "add --resume to go on" if unfinished else "add --overwrite to replace it",
        )
    return out


def _settle(directory: Path, overwrite: bool) -> None:
    """Under the lock: clear what a killed run left over, or, as asked, the whole old model."""
    if overwrite:
        # A journal marks the directory as unfinished from here on, whenever this is interrupted.
        (directory / JOURNAL_FILE).touch()
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
    for entry in sorted(directory.iterdir()):
        stale = is_leftover(entry.name) or (overwrite and is_ours(entry.name))
        if stale and entry.name != JOURNAL_FILE:
            entry.unlink()
