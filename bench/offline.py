"""Speed of one or more models in one process, in turns, never without quality and a dense baseline.

Every request goes through the real engine, greedy, with the end token ignored. TTFT is the first
token received minus the request sent; ITL is the gap between successive tokens, the first excluded;
decode speed counts the same gaps. Prefill speed is the prompt's tokens over the engine's own
prefill time. Knows models, not tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import HalfweaveError, UsageError
from ..files import sha256_file
from ..kernels.dispatch import choose
from ..kernels.formats import Dense
from ..runtime.checkpoint import Checkpoint
from ..runtime.eval import EvalResult, evaluate, flattered
from ..runtime.hardware import Hardware, peak_memory_bytes, this_machine, versions
from ..runtime.model import LoadSettings, Model, load_model
from ..runtime.threads import in_passing_thread
from .batches import BatchBench, BatchSample, batch_row, decode_length
from .document import about_model
from .footprint import Footprint, measure_footprint
from .offline_plan import BenchPlan
from .progress import Progress, silent
from .stats import Spread, percentiles
from .token_bytes import token_bytes
from .turns import STEP_TOKENS, ReadBandwidth, Sample, take_turns


@dataclass(frozen=True)
class ModelBench:
    """All that was measured of one model. `itl_ms` has p50, p90 and p99, pooled over raw gaps.

    `bytes_per_token` are the weights that a step reads; `mbu` is the share of the measured read
    bandwidth at which that happened while one request was decoded. `load_s` and `peak_rss_bytes`
    are of a process of its own, measured once, None where that failed.
    """

    name: str
    path: str
    digest: str
    is_baseline: bool
    kernels: Mapping[str, str]  # kernel by format, with the reason for it
    disk_bytes: int
    weight_bytes: int
    ppl: float
    kl: float | None
    agreement: float | None
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    ttft_ms: Spread
    itl_ms: Mapping[str, float | None]
    batches: tuple[BatchBench, ...]
    bytes_per_token: int | None
    mbu: float | None
    load_s: float | None
    peak_rss_bytes: int | None
    samples: tuple[Sample, ...]


_PROCESS = ("peak_memory_bytes", "read_gb_per_s", "read_samples_gb_per_s")


@dataclass(frozen=True)
class BenchResult:
    """One run of the benchmark; the baseline comes first.

    `peak_memory_bytes` is the process's, with all models loaded; `read_gb_per_s` is how fast its
    threads read memory, the best of a look in every round, None without the CPU kernels. `notes`
    say what a reader of the numbers has to know.
    """

    plan: BenchPlan
    hardware: Hardware
    versions: Mapping[str, str]
    text: Mapping[str, Any]
    models: tuple[ModelBench, ...]
    peak_memory_bytes: int
    read_gb_per_s: float | None
    read_samples_gb_per_s: tuple[float, ...]
    notes: tuple[str, ...]

    def body(self) -> dict[str, Any]:
        """What a document has of this kind alone, raw samples included."""
        found = asdict(self)
        return {name: found[name] for name in ("text", "models", *_PROCESS)}


def bench_offline(
    paths: Mapping[str, str | Path],
    text: str,
    *,
    text_origin: str = "the given text",
    plan: BenchPlan | None = None,
    progress: Progress | None = None,
    loading: LoadSettings | None = None,
) -> BenchResult:
    """Measure the models in `paths` (by the name to print), quality on `text` included.

    The first dense model among them is the baseline of the others.

    Raises:
        UsageError: there is no dense model, or text or context are too short for the plan.
        RefusedError: the models do not share a tokenizer; or as `load_model`.
    """
    plan, tell, settings = plan or BenchPlan(), progress or silent, loading or LoadSettings()
    machine = this_machine()  # before our own work adds to the load
    ordered = baseline_first(paths)
    models = load_all(ordered, settings, tell)
    prompt = first_tokens(models, text, plan)
    quality = in_passing_thread(lambda: _quality(models, text, plan, tell))
    read = ReadBandwidth(settings)
    samples, batches = take_turns(models, prompt, plan, tell, read)
    feet, failed = _footprints(ordered, settings, machine.threads, prompt, plan.new_tokens)
    first = next(iter(models))
    rows = tuple(
        _row(
            model,
            _Measured(name, quality[name], samples[name], batches[name], feet[name], read.best),
            plan,
            name == first,
        )
        for name, model in models.items()
    )
    evaluated = quality[first]
    return BenchResult(
        plan=plan,
        hardware=machine,
        versions=versions(),
        text={
            "origin": text_origin,
            "sha256": evaluated.text_sha256,
            "tokens": evaluated.tokens,
        },
        models=rows,
        peak_memory_bytes=peak_memory_bytes(),
        read_gb_per_s=None if read.best is None else read.best / 1e9,
        read_samples_gb_per_s=tuple(each / 1e9 for each in read.samples),
        notes=(*_notes(models, rows, evaluated, plan), *failed),
    )


def _footprints(
    paths: Mapping[str, str | Path],
    settings: LoadSettings,
    threads: int,
    prompt: tuple[int, ...],
    new_tokens: int,
) -> tuple[dict[str, Footprint | None], list[str]]:
    """Of each model, and what to say of those that there was no room for beside all the others."""
    found: dict[str, Footprint | None] = {}
    notes = []
    for name, path in paths.items():
        try:
            found[name] = measure_footprint(path, settings, threads, prompt, new_tokens)
        except HalfweaveError as error:  # all else is measured by now
            found[name] = None
            notes.append(f"{name}: its loading and memory by itself were not measured: {error}")
    return found, notes


def is_dense(checkpoint: Checkpoint) -> bool:
    """Whether this is a model that nothing was removed from, as far as its files tell."""
    recipe = (checkpoint.manifest or {}).get("recipe")
    return not checkpoint.linears and not recipe


def baseline_first(paths: Mapping[str, str | Path]) -> dict[str, str | Path]:
    """The models with the dense one that the others are compared with at the front.

    Raises:
        UsageError: there is none, or no model at all.
    """
    if not paths:
        raise UsageError("no model to measure")
    dense = [n for n, path in paths.items() if is_dense(Checkpoint.open(path, verify=False))]
    if not dense:
        raise UsageError(
            f"no dense baseline: {', '.join(paths)} is pruned, and a speed alone says nothing",
            "add --against DENSE, the directory of the model that was pruned",
        )
    return {dense[0]: paths[dense[0]], **paths}


def load_all(
    paths: Mapping[str, str | Path], settings: LoadSettings, tell: Progress = silent
) -> dict[str, Model]:
    """Load all models in `paths`, by their names. Raises as `load_model`."""
    models = {}
    for done, (name, path) in enumerate(paths.items(), start=1):
        models[name] = load_model(path, **vars(settings))
        tell(done, len(paths), f"load {name}")
    return models


def first_tokens(models: Mapping[str, Model], text: str, plan: BenchPlan) -> tuple[int, ...]:
    """The prompt: the first tokens of the text, the same for all models, and real language.

    Raises:
        UsageError: the text or a model's context is too short for the plan.
    """
    longest = max(_answer_lengths(plan))
    needed = plan.prompt_tokens + longest
    for model in models.values():
        if needed > model.max_model_len:
            raise UsageError(
                f"{needed} tokens of prompt and answer do not fit {model.name}, "
                f"which has {model.max_model_len}"
            )
    ids = next(iter(models.values())).tokenizer.encode(text, special=False)
    if len(ids) < plan.prompt_tokens:
        raise UsageError(f"the text has {len(ids)} tokens, the prompt needs {plan.prompt_tokens}")
    return tuple(ids[: plan.prompt_tokens])


def _answer_lengths(plan: BenchPlan) -> list[int]:
    batched = [
        decode_length(batch, plan.prompt_tokens, plan.new_tokens, STEP_TOKENS)
        for batch in plan.batches
    ]
    return [plan.new_tokens, *batched]


def _quality(
    models: Mapping[str, Model], text: str, plan: BenchPlan, tell: Progress
) -> dict[str, EvalResult]:
    """Quality of every model on one text; the others' distance from the first."""
    baseline = next(iter(models.values()))
    return {
        name: evaluate(
            model,
            text,
            window=plan.window,
            max_windows=plan.max_windows,
            against=None if model is baseline else baseline,
            progress=_labelled(tell, f"quality {name}"),
        )
        for name, model in models.items()
    }


def _labelled(tell: Progress, label: str) -> Progress:
    return lambda done, total, figure: tell(done, total, f"{label} {figure}")


@dataclass(frozen=True)
class _Measured:
    """What there is of one model, before it is summed up; `read` is in bytes a second."""

    name: str
    quality: EvalResult
    samples: Sequence[Sample]
    batches: Mapping[int, Sequence[BatchSample]]
    footprint: Footprint | None
    read: float | None


def _row(model: Model, found: _Measured, plan: BenchPlan, is_baseline: bool) -> ModelBench:
    checkpoint, samples, quality = model.checkpoint, found.samples, found.quality
    decode = Spread.of([s.decode_tokens_per_s for s in samples])
    bytes_per_token = token_bytes(model)
    known = bytes_per_token is not None and found.read is not None
    seconds = bytes_per_token / found.read if known else None  # type: ignore[operator]
    return ModelBench(
        name=found.name,
        path=str(checkpoint.path),
        digest=about_model(checkpoint.path)["digest"],
        is_baseline=is_baseline,
        kernels=_kernels(model),
        disk_bytes=sum(f.stat().st_size for f in checkpoint.path.iterdir() if f.is_file()),
        weight_bytes=checkpoint.weight_bytes,
        ppl=quality.ppl,
        kl=quality.kl,
        agreement=quality.agreement,
        prefill_tokens_per_s=Spread.of([1000 * plan.prompt_tokens / s.prefill_ms for s in samples]),
        decode_tokens_per_s=decode,
        ttft_ms=Spread.of([s.ttft_ms for s in samples]),
        itl_ms=percentiles([gap for s in samples for gap in s.gaps_ms]),
        batches=tuple(
            batch_row(each, batch, plan.prompt_tokens, seconds)
            for batch, each in found.batches.items()
        ),
        bytes_per_token=bytes_per_token,
        mbu=None if seconds is None else decode.median * seconds,
        load_s=None if found.footprint is None else found.footprint.load_s,
        peak_rss_bytes=None if found.footprint is None else found.footprint.peak_rss_bytes,
        samples=tuple(samples),
    )


def _kernels(model: Model) -> dict[str, str]:
    kinds = sorted({e.format for e in model.checkpoint.linears.values()}) or [Dense.kind]
    chosen = {kind: choose(kind, model.decoder.device.type, model.exact) for kind in kinds}
    grown = model.decoder.expanded_bytes
    more = f"; {grown / 2**20:.1f} MiB more for weights that are held dense, as measured here"
    return {
        kind: f"{kernel.name}: {kernel.why}{more if grown and kind != Dense.kind else ''}"
        for kind, kernel in chosen.items()
    }


def _notes(
    models: Mapping[str, Model],
    rows: Sequence[ModelBench],
    quality: EvalResult,
    plan: BenchPlan,
) -> tuple[str, ...]:
    crowded = [
        f"{row.name}: there is no room for {batch} requests side by side"
        for row in rows
        for batch in plan.batches
        if batch not in {each.batch for each in row.batches}
    ]
    return (*_model_notes(models, rows, quality), *crowded)


def _model_notes(
    models: Mapping[str, Model], rows: Sequence[ModelBench], quality: EvalResult
) -> list[str]:
    notes = []
    baseline, *others = rows
    for row in others:
        model = models[row.name]
        if note := flattered(model, quality):
            notes.append(note)
        provenance = (model.checkpoint.manifest or {}).get("provenance", {})
        hashes = provenance.get("base", {}).get("sha256")
        if hashes is not None and not _is_parent(Path(baseline.path), hashes):
            notes.append(f"{baseline.name} is not the model that {row.name} was pruned from")
    for row in rows:
        if any(count > 1 for sample in row.samples for count in sample.gap_tokens):
            notes.append(f"{row.name}: some gaps end with several tokens; ITL is of gaps")
        if any("expanded to dense" in why for why in row.kernels.values()) and row in others:
            notes.append(
                f"{row.name}: weights are expanded to dense when loaded, so it is smaller on the "
                "disk but can be no faster than dense"
            )
    return notes


def _is_parent(baseline: Path, hashes: Mapping[str, str]) -> bool:
    return all(
        (baseline / name).is_file() and sha256_file(baseline / name) == digest
        for name, digest in hashes.items()
    )
