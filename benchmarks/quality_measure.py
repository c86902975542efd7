"""Runs the commands of one row of the quality table, and keeps its figures.

Every command is a process of its own, so that time and peak memory belong to the row.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from halfweave.files import sha256_file
from halfweave.kernels.schema import JOURNAL_FILE, MANIFEST_FILE
from halfweave.runtime.hardware import this_machine
from quality_cache import Entry, digest, entry
from quality_rows import GROUP, HOUR_FLAGS, Row, start_of

LAST_WORD = Path(__file__).with_name("last_word.py")


class RowFailedError(Exception):
    """A command of a row ended with an error."""


@dataclass(frozen=True)
class Settings:
    """What all rows have in common; see the flags of quality.py for the units.

    `model_sha`, `calib_sha` and `eval_sha` stand for the files' contents.
    """

    model: Path
    text: Path
    work: Path
    windows: int
    length: int
    eval_windows: int
    last_word: int
    recover_minutes: float
    keep: bool
    model_sha: str
    calib_sha: str
    eval_sha: str

    @classmethod
    def of(cls, options: argparse.Namespace) -> Settings:
        """Hash the inputs."""
        files = [options.model / "config.json", *sorted(options.model.glob("*.safetensors"))]
        return cls(
            model=options.model,
            text=options.text,
            work=options.work,
            windows=options.windows,
            length=options.length,
            eval_windows=options.eval_windows,
            last_word=options.last_word,
            recover_minutes=options.recover_minutes,
            keep=options.keep,
            model_sha=digest({file.name: sha256_file(file) for file in files}),
            calib_sha=sha256_file(options.text / "calib.wiki.txt"),
            eval_sha=sha256_file(options.text / "eval.wiki.txt"),
        )

    @property
    def command(self) -> str:
        """What to type for the same figures, without the paths."""
        flags = ("windows", "length", "eval_windows", "last_word", "recover_minutes")
        shown = [f"--{name.replace('_', '-')} {getattr(self, name):g}" for name in flags]
        return " ".join(["python benchmarks/quality.py", *shown])


@dataclass(frozen=True)
class Files:
    """Where a row's checkpoint and figures are."""

    checkpoint: Path
    pruned: Entry
    scores: Entry
    words: Entry | None

    @property
    def complete(self) -> bool:
        """The checkpoint has its manifest, which is written last."""
        return (self.checkpoint / MANIFEST_FILE).exists()

    @property
    def measured(self) -> bool:
        """Nothing is left to do for the row."""
        wanted = [self.pruned, self.scores, *([self.words] if self.words else [])]
        return all(each.read() is not None for each in wanted)


def prune_flags(row: Row, settings: Settings) -> dict[str, Any]:
    """The recipe of a row, as flags of `halfweave prune`."""
    flags: dict[str, Any] = {
        "method": row.method,
        "pattern": row.column.pattern,
        "bits": row.column.bits,
        "group": GROUP,
        "seed": row.seed,
        # Magnitude looks at no inputs; one window is enough to report its layer errors.
        "calib-windows": 1 if row.method == "magnitude" else settings.windows,
        "calib-length": settings.length,
        "recover": row.recover,
    }
    if row.minutes:
        flags["recover-minutes"] = row.minutes
    if row.recover == "blocks+distill":
        flags |= HOUR_FLAGS
    if row.max_ppl_ratio is not None:
        del flags["pattern"], flags["bits"]
        flags["max-ppl-ratio"] = row.max_ppl_ratio
    return flags


def files_of(row: Row, settings: Settings) -> Files:
    """Names of all that belongs to a row under these settings."""
    made = {
        "flags": prune_flags(row, settings),
        "model": settings.model_sha,
        "calib": settings.calib_sha,
    }
    scored = {"made": made, "text": settings.eval_sha, "max_windows": settings.eval_windows}
    return Files(
        settings.work / f"{row.file_name}-{digest(made)}",
        entry(settings.work, row.file_name, "prune", made),
        entry(settings.work, row.file_name, "eval", scored),
        words_entry(row.file_name, made, settings) if row.asks_words else None,
    )


def words_entry(name: str, made: dict[str, Any], settings: Settings) -> Entry | None:
    """Where the last-word figures of a model are; None if they are not wanted."""
    if not settings.last_word:
        return None
    key = {"made": made, "text": settings.eval_sha, "items": settings.last_word}
    return entry(settings.work, name, "words", key)


def measure(row: Row, settings: Settings, prune_only: bool) -> None:
    """Fill in the figures of a row that are missing, and drop its checkpoint unless it is kept.

    Raises:
        RowFailedError: one of its commands failed.
    """
    files = files_of(row, settings)
    if files.measured:
        return
    if files.pruned.read() is None or not files.complete:
        files.pruned.write(prune(row, files, settings))
    if prune_only:
        return
    if files.scores.read() is None:
        files.scores.write(evaluate(files.checkpoint, settings))
    if files.words is not None and files.words.read() is None:
        files.words.write(last_words(files.checkpoint, settings))
    if not settings.keep:
        shutil.rmtree(files.checkpoint)


def prune(row: Row, files: Files, settings: Settings) -> dict[str, Any]:
    """Make the row's checkpoint; minutes and peak memory of its process, bytes of its weights.

    Minutes, of all and of the recovery alone, and memory are None if the work of an earlier process
    went into it.
    """
    if row.recover == "distill":
        return recover(row, files, settings)
    command = ["prune", settings.model, files.checkpoint]
    command += ["--calib", settings.text / "calib.wiki.txt"]
    for name, value in prune_flags(row, settings).items():
        if (name, value) != ("recover", "none"):
            command += [f"--{name}", value]
    return make(files, command)


def recover(row: Row, files: Files, settings: Settings) -> dict[str, Any]:
    """Make a distilled row's checkpoint from that of the row that it starts from.

    `halfweave prune --recover distill` gives the same bytes; this way a model is pruned once for
    all that is measured of it. Minutes are those of both together.
    """
    first = start_of(row)
    before = files_of(first, settings)
    if before.pruned.read() is None or not before.complete:
        before.pruned.write(prune(first, before, settings))
    command = ["recover", before.checkpoint, files.checkpoint, "--parent", settings.model]
    command += ["--calib", settings.text / "calib.wiki.txt"]
    command += ["--minutes", row.minutes, "--seed", row.seed]
    if first.column != row.column:
        command += ["--bits", row.column.bits, "--group", GROUP]
    figures, pruned = make(files, command), before.pruned.read() or {}
    for name, both in (("minutes", sum), ("peak_rss_gib", max)):
        known = [figures[name], pruned[name]]
        figures[name] = None if None in known else round(both(known), 2)
    return figures


def make(files: Files, command: list[Any]) -> dict[str, Any]:
    """Run the command that makes the checkpoint, unless it is there; see `prune`."""
    resuming = (files.checkpoint / JOURNAL_FILE).exists()
    took: dict[str, Any] = dict.fromkeys(("minutes", "recovery_minutes", "peak_rss_gib"))
    if not files.complete:
        last = "--resume" if resuming else "--overwrite"
        seconds, peak, output = run([halfweave(), *command, "--json", last])
        if not resuming:
            result = last_json(output)["result"]
            took = {
                "minutes": round(seconds / 60, 2),
                # All that `recover` does is recovery; `prune` says what was.
                "recovery_minutes": round(result.get("recovery_seconds", seconds) / 60, 2),
                "peak_rss_gib": round(peak / 2**30, 2),
            }
    return {
        **took,
        "bytes": weight_bytes(files.checkpoint),
        "date": date.today().isoformat(),
        "hardware": this_machine().line,
    }


def weight_bytes(directory: Path) -> int:
    """Size of all weight files of a model."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def evaluate(checkpoint: Path, settings: Settings) -> dict[str, Any]:
    """Perplexity, KL and agreement against the dense model."""
    command = ["eval", checkpoint, "--against", settings.model, "--json", "--no-save"]
    command += ["--text", settings.text / "eval.wiki.txt", "--max-windows", settings.eval_windows]
    command += ["--dtype", "float32"]  # what a method is worth, not what the fastest kernels round
    result: dict[str, Any] = last_json(run([halfweave(), *command])[2])["result"]
    return result


def last_words(model: Path, settings: Settings) -> dict[str, Any]:
    """Accuracy on the last words of sentences of the evaluation text."""
    command = [LAST_WORD, model, "--text", settings.text / "eval.wiki.txt"]
    command += ["--items", settings.last_word, "--json"]
    result: dict[str, Any] = last_json(run([sys.executable, *command])[2])["models"][0]
    return result


def halfweave() -> Path:
    """The command beside this Python."""
    return Path(sys.executable).with_name("halfweave")


def last_json(output: str) -> dict[str, Any]:
    """The document that a command printed as its last line."""
    document: dict[str, Any] = json.loads(output.splitlines()[-1])
    return document


def run(arguments: list[Any]) -> tuple[float, int, str]:
    """Run a command: seconds of wall time, peak bytes of memory, stdout.

    Raises:
        RowFailedError: it ended with an error.
    """
    command = [str(argument) for argument in arguments]
    print("$", " ".join(command), file=sys.stderr, flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RowFailedError(f"exit code {process.returncode}: {' '.join(command)}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024, output


def dense_words(settings: Settings) -> Entry | None:
    """Where the dense model's last-word figures are."""
    return words_entry("dense", {"model": settings.model_sha}, settings)


def measure_dense(settings: Settings) -> None:
    """Fill in the dense model's last-word figures; its perplexity comes with every row's.

    Raises:
        RowFailedError: the command failed.
    """
    words = dense_words(settings)
    if words is not None and words.read() is None:
        words.write(last_words(settings.model, settings))


def forget(row: Row, settings: Settings) -> None:
    """Remove a row's figures and its checkpoint."""
    files = files_of(row, settings)
    for each in (files.words, files.scores, files.pruned):  # what rests on others first
        if each is not None:
            each.path.unlink(missing_ok=True)
    shutil.rmtree(files.checkpoint, ignore_errors=True)
