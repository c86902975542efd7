"""Measurements as rows of text, losing figures as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from textwrap import TextWrapper
from typing import TYPE_CHECKING, TypeVar

from ..report.theme import printable
from .console import WIDTH, size
from .tables import Row, distance

if TYPE_CHECKING:
    from ..bench.batches import BatchBench
    from ..bench.compare import Comparison
    from ..bench.kernel import KernelResult
    from ..bench.offline import BenchResult, ModelBench
    from ..bench.serve import ServePoint
    from ..bench.serve_plan import ServePlan
    from ..bench.stats import Spread
    from ..runtime.eval import EvalResult
    from ..runtime.hardware import Hardware

T = TypeVar("T")


def offline(result: BenchResult) -> tuple[Row, list[Row]]:
    """Header and rows: a quantity each, the models side by side, losing figures as they are."""
    models, baseline = result.models, result.models[0]
    titles = [f"{m.name}, baseline" if m.is_baseline else m.name for m in models]
    ratios = [m for m in models if not m.is_baseline]
    header = ("", *titles, *(f"{_short(m.name)} / dense" for m in ratios))

    def row(label: str, cells: Sequence[str], figures: Mapping[str, float] | None = None) -> Row:
        shown = [
            f"{figures[m.name] / figures[baseline.name]:.2f}x" if figures else "" for m in ratios
        ]
        return (label, *cells, *shown)

    def speed(label: str, spreads: Mapping[str, Spread]) -> Row:
        cells = [f"{s.median:.1f} ({s.low:.1f}-{s.high:.1f})" for s in spreads.values()]
        return row(label, cells, {name: s.median for name, s in spreads.items()})

    def together(batch: int) -> list[Row]:
        """Prefill and decode of so many requests, if every model has room for them."""
        found = {m.name: _batch(m, batch) for m in models}
        known = {name: each for name, each in found.items() if each is not None}
        if len(known) < len(found):
            return []
        return [
            speed(f"prefill x{batch}", {n: each.prefill_tokens_per_s for n, each in known.items()}),
            speed(f"decode x{batch}", {n: each.decode_tokens_per_s for n, each in known.items()}),
        ]

    return header, [
        row("perplexity", [f"{m.ppl:.2f}" for m in models], {m.name: m.ppl for m in models}),
        row("KL to dense, nats/token", [distance(m.kl, None)[0] for m in models]),
        row("same top token", [distance(None, m.agreement)[1] for m in models]),
        row("on disk", [size(m.disk_bytes) for m in models], _figures(models, "disk_bytes")),
        row("weights", [size(m.weight_bytes) for m in models], _figures(models, "weight_bytes")),
        speed("prefill, tokens/s", {m.name: m.prefill_tokens_per_s for m in models}),
        speed("decode, tokens/s", {m.name: m.decode_tokens_per_s for m in models}),
        speed("TTFT, ms", {m.name: m.ttft_ms for m in models}),
        row("ITL p50/p90/p99, ms", [_three(m.itl_ms) for m in models]),
        *(each for batch in result.plan.batches if batch > 1 for each in together(batch)),
        row("weights a token", [_or_dash(m.bytes_per_token, size) for m in models]),
        row("MBU, batch 1", [_or_dash(m.mbu, _percent) for m in models]),
        row("load, s", [_or_dash(m.load_s, lambda s: f"{s:.1f}") for m in models]),
        row("peak memory", [_or_dash(m.peak_rss_bytes, size) for m in models]),
        row("kernel", [_kernel_names(m) for m in models]),
    ]


def _or_dash(value: T | None, show: Callable[[T], str]) -> str:
    return "-" if value is None else show(value)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _batch(model: ModelBench, batch: int) -> BatchBench | None:
    return next((each for each in model.batches if each.batch == batch), None)


def offline_lines(result: BenchResult) -> list[str]:
    """What the numbers were taken with, and what has to be known to read them."""
    plan, read = result.plan, result.read_gb_per_s
    return [
        f"speed: {plan.prompt_tokens} prompt and {plan.new_tokens} new tokens, xN is N at once, "
        f"{plan.repetitions} rounds in turns, median (least-greatest)",
        f"quality: {result.text['origin']}, {result.text['tokens']} tokens, "
        f"windows of {plan.window}",
        f"machine: {result.hardware.line}, torch {result.versions['torch']}",
        f"peak memory of the process, all models loaded: {size(result.peak_memory_bytes)}"
        + ("" if read is None else f"; memory is read at {read:.1f} GB/s"),
    ]


def notes(found: Sequence[str]) -> list[str]:
    """One paragraph each."""
    return [_wrapped(printable(f"note: {note}")) for note in found]


KERNEL_HEADER = ("weight", "M", "us", "GB/s", "peak", "GFLOP/s", "to dense", "to int4", "kernel")


def kernel(result: KernelResult) -> list[Row]:
    """One row for each product and number of tokens, those that lose too."""
    return [
        (
            f"{row.format}{f' g{row.group}' if row.group else ''} {row.N}x{row.K}",
            str(row.M),
            f"{row.us.median:.1f}",
            f"{row.gb_per_s:.1f}",
            _percent(row.bandwidth_share),
            f"{row.gflop_per_s:.0f}",
            f"{row.to_dense:.2f}x",
            _or_dash(row.to_int4, "{:.2f}x".format),
            row.kernel,
        )
        for row in result.rows
    ]


def kernel_lines(result: KernelResult, machine: Hardware, device: str) -> list[str]:
    """How to read the rows."""
    how = _ON_CPU if device == "cpu" else _ON_GPU
    lost = [row for row in result.rows if not row.wins]
    text = how.format(
        level=result.level,
        error=f"{max(row.error for row in result.rows):.1%}",
        read=f"{result.read_gb_per_s:.1f} GB/s",
        lost=f"{len(lost)} of {len(result.rows)} rows",
    )
    return [_wrapped(text), f"machine: {machine.line}"]


_ON_CPU = (
    "sparse is our kernel ({level}) for the weight as it is stored, M tokens at once, medians in "
    "turns, weights that no cache holds. to dense is the time of the fastest of torch in fp32, "
    "torch in bf16 and our dense kernel, over ours. Outputs are off by up to {error}, from "
    "rounding. Memory is read at {read}. {lost} lose to a dense product, which dispatch takes "
    "instead. A model in one C++ decoder keeps to the choice for one token, so that its text does "
    "not depend on what is computed beside it."
)
_ON_GPU = (
    "Each row is of the fastest tile of our kernel ({level}) for the weight as it is stored, M "
    "tokens at once, medians in turns, weights that no cache holds, replayed from graphs. to dense "
    "is the time of torch's dense product over ours. Outputs are off by up to {error}, from "
    "rounding. Memory is read at {read}. {lost} lose to the dense product, whose weight nobody "
    "keeps beside the packed one: written out is to write it for that product alone."
)


TIMES_HEADER = ("load", "model", "TTFT, ms", "ITL, ms", "TPOT, ms", "E2E, ms")
RATES_HEADER = ("load", "model", "done", "tokens/s", "requests/s", "good/s", "late by, ms")


def times(points: Sequence[ServePoint]) -> list[Row]:
    """A load on a model in each row: p50/p90/p99."""
    return [
        (*_load(p), *(_three(each) for each in (p.ttft_ms, p.itl_ms, p.tpot_ms, p.e2e_ms)))
        for p in points
    ]


def rates(points: Sequence[ServePoint]) -> list[Row]:
    """All answers together a second, and how late the client was in one of a hundred looks."""
    return [
        (
            *_load(p),
            f"{p.completed} of {p.requests}",
            _or_dash(p.output_tokens_per_s, "{:.1f}".format),
            f"{p.requests_per_s:.2f}",
            _or_dash(p.goodput_per_s, "{:.2f}".format),
            _or_dash(p.client_lag_ms["p99"], "{:.1f}".format),
        )
        for p in points
    ]


def _load(point: ServePoint) -> tuple[str, str]:
    rate, clients = point.rate, point.concurrency
    return f"{rate:g} req/s" if rate is not None else f"{clients} clients", _short(point.model)


def _three(times: Mapping[str, float | None] | None) -> str:
    """Three percentiles, with as many digits as say something."""
    if times is None:
        return "-"
    shown = [times[f"p{rank}"] for rank in (50, 90, 99)]
    digits = 0 if max(value or 0 for value in shown) >= 100 else 1
    return "/".join(_or_dash(value, f"{{:.{digits}f}}".format) for value in shown)


def serve_lines(plan: ServePlan, quality: Mapping[str, EvalResult], machine: Hardware) -> list[str]:
    """What the numbers were taken with."""
    limits = ", ".join(f"{name} {value:g} ms" for name, value in plan.slos.items())
    return [
        f"times are p50/p90/p99; {plan.repetitions} rounds in turns of {plan.requests} requests, "
        f"{plan.prompt_tokens} to {plan.new_tokens} tokens",
        *([f"good are answers within {limits}"] if limits else []),
        *(
            f"perplexity of {name}: {found.ppl:.2f} on {found.tokens} tokens"
            for name, found in quality.items()
        ),
        f"machine: {machine.line}",
    ]


COMPARE_HEADER = ("quantity", "A", "B", "B / A", "95 %", "p", "")


def comparison(found: Comparison) -> list[Row]:
    """One row for each quantity: those that decide first, and of these the main ones."""
    return [
        (
            printable(f"{each.name}, {each.unit}"),
            f"{each.first:.4g}",
            f"{each.second:.4g}",
            f"{each.shift.ratio:.3f}",
            f"{each.shift.low:.2f}..{each.shift.high:.2f}",
            f"{each.p:.2g}",
            "" if each.verdict == "no significant change" else each.verdict,
        )
        for each in sorted(found.changes, key=lambda change: (not change.decides, not change.main))
    ]


_FORMS = {
    True: "judged by ratios to the dense baseline of the same turn; times and speeds alone do not "
    "decide",
    False: "judged by times and speeds alone, which differ between two runs by the machine's state "
    "too: a baseline in both, by --against, tells that apart",
}


def comparison_lines(found: Comparison) -> list[str]:
    """What has to be known, and the verdict."""
    deciding = [change for change in found.changes if change.decides]
    changed = [change for change in deciding if change.verdict == found.verdict]
    count = f" in {len(changed)} of {len(deciding)}" if changed else ""
    steady = found.verdict == "no significant change"
    return [
        _wrapped(_FORMS[found.relative]),
        f"p is corrected for the number of tests; changes below {100 * found.floor:g} % are none",
        *notes(found.notes),
        found.verdict if steady else f"{found.verdict}{count}",
    ]


def _wrapped(text: str) -> str:
    wrapper = TextWrapper(
        WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return wrapper.fill(text)  # whole paths and flags


def _figures(models: Sequence[ModelBench], name: str) -> dict[str, float]:
    return {model.name: float(getattr(model, name)) for model in models}


def _kernel_names(model: ModelBench) -> str:
    return ", ".join(sorted({kernel.partition(":")[0] for kernel in model.kernels.values()}))


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:9]}…{name[-10:]}"  # models differ at the end
