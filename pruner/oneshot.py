"""One pass: block by block observe, prune, save, advance.

Every finished block is on the disk and in the journal before the next begins, and the activations
that go on come from the weights as saved. A resumed run therefore walks the very same path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import read_json
from ..kernels.formats import FORMATS, Dense, from_tensors
from ..kernels.schema import JOURNAL_FILE, MANIFEST_FILE
from ..kernels.shards import read_shard
from .block import BlockPruner
from .calibrate import CalibrationText, sample_windows
from .guard import held_out_windows
from .journal import Journal, LinearRecord, ShardRecord
from .plan import Plan
from .recipe import Recipe
from .rows import unpacked
from .save import finish, shard_name, write_shard
from .source import Source, Trained, token_ids
from .stream import BlockStream
from .surroundings import surroundings


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
class Sample:
    """Calibration windows [n, length], and the text they were drawn from."""

    text: CalibrationText
    windows: Tensor


@dataclass(frozen=True)
class OneShotResult:
    """What happened to each linear, in the model's order.

    `resumed_blocks` were there before; this process trained the others for `tuning_seconds`.
    """

    linears: Mapping[str, LinearRecord]
    resumed_blocks: int
    tuning_seconds: float


class OneShot:
    """One pass over the blocks of one model, resumable, into one directory."""

    def __init__(
        self,
        source: Source,
        directory: Path,
        recipe: Recipe,
        plan: Plan,
        sample: Sample,
        progress: Callable[[Progress], None] | None,
        blocks: range | None = None,
    ) -> None:
        """Prune all blocks, or of a trained model some, while the others stay as they are."""
        self._source, self._directory, self._recipe, self._plan = source, directory, recipe, plan
        self._sample, self._progress = sample, progress
        self._blocks = BlockPruner(source, recipe, plan, self._report)
        self._count = source.block_count + 1
        self._wanted = range(source.block_count) if blocks is None else blocks
        self._done = self._resumed = self._solved = 0
        self._left = len(self._wanted) * len(source.family.linears)
        self._started = time.perf_counter()

    @cached_property
    def key(self) -> dict[str, Any]:
        """All that decides the output; a run is only ever resumed under the same key."""
        return {"recipe": self._recipe.to_json(), **self._provenance()}

    def result(self) -> OneShotResult:
        """What an earlier, complete pass into the directory did."""
        entries = read_json(self._directory / MANIFEST_FILE)["linears"]
        linears = {name: LinearRecord.from_json(entry) for name, entry in entries.items()}
        return OneShotResult(linears, self._source.block_count, 0.0)

    def ensure(self) -> OneShotResult:
        """`go`, unless an earlier process did it all; for a directory that only this run knows."""
        self._directory.mkdir(exist_ok=True)
        unfinished = (self._directory / JOURNAL_FILE).exists()
        if (self._directory / MANIFEST_FILE).exists() and not unfinished:
            return self.result()
        return self.go(resume=True)

    def go(self, resume: bool) -> OneShotResult:
        """Prune what is not yet pruned, and write the manifest.

        Raises:
            RefusedError: the journal in the directory belongs to another run.
            CheckpointError, CapacityError: as `prune`.
        """
        again = resume and (self._directory / JOURNAL_FILE).exists()
        journal = (Journal.resume if again else Journal.begin)(self._directory, self.key)
        if len(journal.shards) == self._count and (self._directory / MANIFEST_FILE).exists():
            journal.remove()  # a kill came between the manifest and this
            return self.result()
        if not journal.shards:
            self._save_others(journal)
        stream = BlockStream(
            self._source,
            self._sample.windows,
            self._blocks.held_out,
            self._blocks.needs_parent,
            self._directory,
        )
        for index in range(self._source.block_count):
            self._one_block(index, stream, journal)
        provenance = {name: value for name, value in self.key.items() if name != "recipe"}
        finish(self._source, self._directory, journal.shards, self._recipe.to_json(), provenance)
        journal.remove()
        linears = {n: record for shard in journal.shards for n, record in shard.linears.items()}
        return OneShotResult(linears, self._resumed, self._blocks.tuning_seconds)

    def _save_others(self, journal: Journal) -> None:
        """What is in no block: a shard of its own, which leaves memory when this returns."""
        others = self._source.other_tensors()
        self._blocks.check(others, frozenset())
        journal.add(write_shard(self._directory, shard_name(0, self._count), others, {}))

    def _one_block(self, index: int, stream: BlockStream, journal: Journal) -> None:
        resumed = index + 1 < len(journal.shards)
        if index in self._wanted and not resumed:
            stored, linears = self._blocks.prune(index, stream)
            self._save(index, self._source.turned(stored), linears, journal)
        else:
            if resumed:
                self._resumed += 1
                self._left -= len(self._source.family.linears) if index in self._wanted else 0
            else:
                self._save(index, *self._as_it_is(index), journal)
            self._pass(index, journal.shards[index + 1], stream)
        stream.drop_block(index)

    def _save(
        self,
        index: int,
        stored: Mapping[str, Tensor],
        linears: Mapping[str, LinearRecord],
        journal: Journal,
    ) -> None:
        name = shard_name(index + 1, self._count)
        journal.add(write_shard(self._directory, name, stored, linears))

    def _as_it_is(self, index: int) -> tuple[dict[str, Tensor], dict[str, LinearRecord]]:
        """A block of the trained model that is not pruned here, and what its linears are."""
        assert isinstance(self._source, Trained)
        known = (self._source.checkpoint.manifest or {})["linears"]
        names = self._source.linear_names(index)
        linears = {name: LinearRecord.from_json(known[name]) for name in names}
        return self._source.stored_block(index), linears

    def _pass(self, index: int, shard: ShardRecord, stream: BlockStream) -> None:
        """Lead the stream through a block that is on the disk already, if another one waits."""
        self._done += len(shard.linears)
        if index + 1 >= self._wanted.stop:
            return
        stored = read_shard(self._directory / shard.file, shard.sha256)
        parent = self._blocks.parent(index, stream)
        block = stream.load_block(index, self._unpacked(stored, shard.linears))
        stream.advance(block, parent)

    def _unpacked(
        self, stored: Mapping[str, Tensor], linears: Mapping[str, LinearRecord]
    ) -> dict[str, Tensor]:
        """A block's tensors with every packed linear as the weight that is computed with."""
        floats, weights = dict(stored), {}
        for name, record in linears.items():
            if record.format == Dense.kind:
                continue
            suffixes = FORMATS[record.format].suffixes
            parts = {suffix: floats.pop(f"{name}.{suffix}") for suffix in suffixes}
            packed = from_tensors(record.format, parts, record.shape, record.group, name)
            weights[f"{name}.weight"] = unpacked(packed)
        return {**self._source.turned(floats), **weights}

    def _provenance(self) -> dict[str, Any]:
        recipe = self._recipe
        return {
            **surroundings(self._source),
            "calibration": {
                "origin": self._sample.text.origin,
                "text_sha256": self._sample.text.sha256,
                "windows": recipe.calib_windows,
                "length": recipe.calib_length,
                "seed": recipe.seed,
            },
        }

    def _report(self, name: str, record: LinearRecord, seconds: float) -> None:
        self._done, self._solved, self._left = self._done + 1, self._solved + 1, self._left - 1
        if self._progress is None:
            return
        eta = max(self._seconds_left(), 0.0)
        self._progress(Progress(name, record, self._done, len(self._plan.linears), seconds, eta))

    def _seconds_left(self) -> float:
        """By the pace until now; the first block's is mostly what comes before it: ask the plan."""
        elapsed = time.perf_counter() - self._started
        if self._solved >= len(self._source.family.linears):
            return elapsed / self._solved * self._left
        return self._plan.seconds * len(self._wanted) / self._source.block_count - elapsed


def draw_sample(source: Source, text: CalibrationText, recipe: Recipe) -> Sample:
    """The recipe's windows, drawn from the text by its seed.

    Raises:
        CheckpointError: the model has no usable tokenizer.
        UsageError: the text is too short.
    """
    ids = token_ids(source, text.text)
    count, length, held_out = recipe.calib_windows, recipe.calib_length, held_out_windows(recipe)
    return Sample(text, sample_windows(ids, count, length, recipe.seed, held_out))
