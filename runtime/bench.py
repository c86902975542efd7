"""Speed of one or more models in one process, in turns, never without quality and a dense baseline.

Every request goes through the real engine, greedy, with the end token ignored. TTFT is the first
token received minus the request sent; ITL is the gap between successive tokens, the first excluded;
decode speed counts the same gaps. Prefill speed is the prompt's tokens over the engine's own
prefill time. Knows models, not tables.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import HalfweaveError, UsageError
from ..files import sha256_file
from ..kernels.dispatch import choose
from ..kernels.formats import Dense
from .checkpoint import Checkpoint
from .engine import Engine
from .engine_settings import EngineSettings
from .eval import EvalResult, evaluate
from .hardware import Hardware, peak_memory_bytes, this_machine, versions
from .model import LoadSettings, Model, load_model
from .params import SamplingParams
from .request import Failed, Finished, GenerationRequest, TextDelta
from .threads import in_passing_thread

SCHEMA_VERSION = 1
_LEAST_REPETITIONS = 5

# Told after each step: steps done, steps in all of this phase, and what was done.
BenchProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BenchPlan:
    """What to measure. Medians of fewer than five repetitions are not offered.

    Raises:
        UsageError: a number is too small.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    repetitions: int = 5
    warmups: int = 1
    window: int = 512
    max_windows: int = 8

    def __post_init__(self) -> None:
        least = {"prompt_tokens": 1, "new_tokens": 2, "repetitions": _LEAST_REPETITIONS}
        for name, low in (*least.items(), ("warmups", 1), ("window", 2), ("max_windows", 1)):
            if getattr(self, name) < low:
                raise UsageError(f"{name} must be at least {low}")


@dataclass(frozen=True)
class Sample:
    """One request as its caller saw it. A gap may end with several tokens when they coalesce."""

    ttft_ms: float
    prefill_ms: float
    gaps_ms: tuple[float, ...]
    gap_tokens: tuple[int, ...]

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first over the time they took."""
        return 1000 * sum(self.gap_tokens) / sum(self.gaps_ms)


@dataclass(frozen=True)
class Spread:
    """Median over the repetitions, with the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class ModelBench:
    """All that was measured of one model. `itl_ms` has p50, p90 and p99, pooled over raw gaps."""

    name: str
    path: str
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
    itl_ms: Mapping[str, float]
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class BenchResult:
    """One run of the benchmark; the baseline comes first.

    `peak_memory_bytes` is the process's, with all models loaded. `notes` say what a reader of the
    numbers has to know.
    """

    schema_version: int
    plan: BenchPlan
    hardware: Hardware
    versions: Mapping[str, str]
    text: Mapping[str, Any]
    models: tuple[ModelBench, ...]
    peak_memory_bytes: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, raw samples included."""
        return asdict(self)


def bench_offline(
    paths: Mapping[str, str | Path],
    text: str,
    *,
    text_origin: str = "the given text",
    plan: BenchPlan | None = None,
    progress: BenchProgress | None = None,
    loading: LoadSettings | None = None,
) -> BenchResult:
    """Measure the models in `paths` (by the name to print), quality on `text` included.

    The first dense model among them is the baseline of the others.

    Raises:
        UsageError: there is no dense model, or text or context are too short for the plan.
        RefusedError: the models do not share a tokenizer; or as `load_model`.
    """
    plan, tell = plan or BenchPlan(), progress or _silent
    machine = this_machine()  # before our own work adds to the load
    models = {}
    for done, (name, path) in enumerate(_baseline_first(paths).items(), start=1):
        models[name] = load_model(path, **vars(loading or LoadSettings()))
        tell(done, len(paths), f"load {name}")
    prompt = _prompt(models, text, plan)
    quality = in_passing_thread(lambda: _quality(models, text, plan, tell))
    samples = _samples(models, prompt, plan, tell)
    first = next(iter(models))
    rows = tuple(
        _row(name, model, quality[name], samples[name], plan, name == first)
        for name, model in models.items()
    )
    evaluated = quality[first]
    return BenchResult(
        schema_version=SCHEMA_VERSION,
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
        notes=(*_machine_notes(machine), *_model_notes(models, rows, evaluated)),
    )


def _silent(done: int, total: int, what: str) -> None:
    """Progress that nobody asked for."""


def is_dense(checkpoint: Checkpoint) -> bool:
    """Whether this is a model that nothing was removed from, as far as its files tell."""
    recipe = (checkpoint.manifest or {}).get("recipe")
    return not checkpoint.linears and not recipe


def _baseline_first(paths: Mapping[str, str | Path]) -> dict[str, str | Path]:
    if not paths:
        raise UsageError("no model to measure")
    dense = [n for n, path in paths.items() if is_dense(Checkpoint.open(path, verify=False))]
    if not dense:
        raise UsageError(
            f"no dense baseline: {', '.join(paths)} is pruned, and a speed alone says nothing",
            "add --against DENSE, the directory of the model that was pruned",
        )
    return {dense[0]: paths[dense[0]], **paths}


def _prompt(models: Mapping[str, Model], text: str, plan: BenchPlan) -> tuple[int, ...]:
    """The first tokens of the text: the same for all models, and real language."""
    needed = plan.prompt_tokens + plan.new_tokens
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


def _quality(
    models: Mapping[str, Model], text: str, plan: BenchPlan, tell: BenchProgress
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


def _labelled(tell: BenchProgress, label: str) -> BenchProgress:
    return lambda done, total, figure: tell(done, total, f"{label} {figure}")


def _samples(
    models: Mapping[str, Model], prompt: tuple[int, ...], plan: BenchPlan, tell: BenchProgress
) -> dict[str, list[Sample]]:
    """In turns, A B A B, so that whatever else the machine does falls on all alike.

    Each turn has an engine of its own: two that live side by side slow each other (see threads).
    """
    samples: dict[str, list[Sample]] = {name: [] for name in models}
    rounds = plan.warmups + plan.repetitions
    for turn in range(rounds):
        for place, (name, model) in enumerate(models.items(), start=1):
            with Engine(model, EngineSettings(share_prefixes=False)) as engine:
                sample = _one_request(engine, f"{name}-{turn}", prompt, plan.new_tokens)
            if turn >= plan.warmups:
                samples[name].append(sample)
            what = "measure" if turn >= plan.warmups else "warm up"
            tell(turn * len(models) + place, rounds * len(models), f"{what} {name}")
    return samples


def _one_request(engine: Engine, key: str, prompt: tuple[int, ...], new_tokens: int) -> Sample:
    """Send one request and time what comes back.

    Raises:
        HalfweaveError: the engine did not carry it out to the end.
    """
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    request = GenerationRequest(key, prompt, params)
    sent = time.perf_counter()
    arrivals: list[tuple[float, int]] = []
    for event in engine.stream(request):
        now = time.perf_counter()
        if isinstance(event, TextDelta) and event.token_ids:
            arrivals.append((now, len(event.token_ids)))
        elif isinstance(event, Failed):
            raise event.error
        elif isinstance(event, Finished):
            if event.usage.completion_tokens != new_tokens or len(arrivals) < 2:
                raise HalfweaveError(
                    f"{engine.model.name} wrote {event.usage.completion_tokens} tokens "
                    f"of {new_tokens}: nothing to measure"
                )
            finished = event
    times = [at for at, _ in arrivals]
    return Sample(
        ttft_ms=1000 * (times[0] - sent),
        prefill_ms=finished.timings.prefill_ms,
        gaps_ms=tuple(1000 * (b - a) for a, b in pairwise(times)),
        gap_tokens=tuple(count for _, count in arrivals[1:]),
    )


def _row(
    name: str,
    model: Model,
    quality: EvalResult,
    samples: Sequence[Sample],
    plan: BenchPlan,
    is_baseline: bool,
) -> ModelBench:
    checkpoint = model.checkpoint
    return ModelBench(
        name=name,
        path=str(checkpoint.path),
        is_baseline=is_baseline,
        kernels=_kernels(model),
        disk_bytes=sum(f.stat().st_size for f in checkpoint.path.iterdir() if f.is_file()),
        weight_bytes=checkpoint.weight_bytes,
        ppl=quality.ppl,
        kl=quality.kl,
        agreement=quality.agreement,
        prefill_tokens_per_s=Spread.of([1000 * plan.prompt_tokens / s.prefill_ms for s in samples]),
        decode_tokens_per_s=Spread.of([s.decode_tokens_per_s for s in samples]),
        ttft_ms=Spread.of([s.ttft_ms for s in samples]),
        itl_ms=_percentiles([gap for s in samples for gap in s.gaps_ms]),
        samples=tuple(samples),
    )


def _kernels(model: Model) -> dict[str, str]:
    kinds = sorted({e.format for e in model.checkpoint.linears.values()}) or [Dense.kind]
    chosen = {kind: choose(kind, "cpu", model.exact) for kind in kinds}
    return {kind: f"{kernel.name}: {kernel.why}" for kind, kernel in chosen.items()}


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99, linearly interpolated between the raw values."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{rank}": cuts[rank - 1] for rank in (50, 90, 99)}


def _machine_notes(machine: Hardware) -> list[str]:
    if not machine.busy:
        return []
    busy = f"load {machine.load:.1f} on {machine.cores} cores"
    return [f"the machine was busy before the run: {busy}"]


def _model_notes(
    models: Mapping[str, Model], rows: Sequence[ModelBench], quality: EvalResult
) -> list[str]:
    notes = []
    baseline, *others = rows
    for row in others:
        manifest = models[row.name].checkpoint.manifest or {}
        provenance = manifest.get("provenance", {})
        if provenance.get("calibration", {}).get("text_sha256") == quality.text_sha256:
            notes.append(f"{row.name} was calibrated on this very text: its perplexity flatters it")
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
