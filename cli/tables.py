"""Results as rows of text. Knows what the results mean, not where they are printed."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Protocol

from ..runtime.linear_kinds import kinds_of
from .console import duration, size

if TYPE_CHECKING:
    from ..evaluation.tasks import Figures
    from ..pruner.budget.check import BudgetCheck
    from ..pruner.budget.choose import BudgetPlan
    from ..pruner.plan import Plan
    from ..pruner.recipe import Recipe
    from ..pruner.recover.settings import DistillResult
    from ..runtime.eval import EvalResult
    from ..runtime.gpu_choices import GpuChoice
    from ..runtime.inspection import Inspection

Row = tuple[str, ...]


class Stored(Protocol):
    """What the manifest and an inspection both say of a linear."""

    @property
    def format(self) -> str: ...
    @property
    def relative_error(self) -> float | None: ...
    @property
    def note(self) -> str: ...


LINEARS_HEADER = ("linear", "count", "err median", "err worst", "format")


def linears(records: Mapping[str, Stored]) -> list[Row]:
    """One row for each kind of linear and format: how many, and their relative errors."""
    kinds, groups = kinds_of(records), dict[tuple[str, str], list[Stored]]()
    for name, record in records.items():
        groups.setdefault((kinds[name], record.format), []).append(record)
    return [
        (kind, str(len(group)), *_errors(r.relative_error for r in group), stored)
        for (kind, stored), group in groups.items()
    ]


def _errors(values: Iterable[float | None]) -> tuple[str, str]:
    known = [value for value in values if value is not None]
    return (f"{median(known):.4f}", f"{max(known):.4f}") if known else ("-", "-")


LAYERS_HEADER = ("linear", "shape", "bytes", "error", "kernel", "format")


def layers(found: Inspection) -> list[Row]:
    """One row for each linear."""
    return [
        (
            row.name,
            f"{row.shape[0]} x {row.shape[1]}",
            str(row.bytes),
            _errors([row.relative_error])[0],
            f"{row.kernel}, {row.why.partition(':')[0]}",
            f"{row.format} {row.note}".strip(),
        )
        for row in found.linears
    ]


def plan(plan: Plan, recipe: Recipe) -> list[str]:
    """What a pruning run will do and cost."""
    formats = ", ".join(sorted({linear.format for linear in plan.linears}))
    becoming = "formats of a budget's choice" if recipe.has_budget else formats
    bound = "at most " if recipe.has_budget else ""
    lines = [
        f"plan: {len(plan.linears)} linears in {plan.blocks} blocks to {becoming}",
        f"  weights {size(plan.input_bytes)} -> {bound}{size(plan.output_bytes)}"
        f", {plan.calibration_tokens} calibration tokens",
        f"  about {duration(plan.seconds)} and {size(plan.peak_memory_bytes)} of memory here",
    ]
    if plan.unserved is not None:
        lines.append(f"  note: only other tools will run it: {plan.unserved}")
    lines += [f"  kept dense: {linear.name}: {linear.reason}" for linear in plan.kept_dense]
    return lines


EVAL_HEADER = ("model", "perplexity", "KL nats/token", "same top token", "tokens")


def formats(plan: BudgetPlan) -> list[str]:
    """What a budget chose, by kind of linear."""
    kinds = kinds_of(choice.name for choice in plan.linears)
    counts = Counter((kinds[choice.name], choice.chosen.format) for choice in plan.linears)
    chosen = [f"  {kind}: {count} x {form}" for (kind, form), count in sorted(counts.items())]
    first = (
        f"budget: {plan.share_of_bytes:.3f} of the bytes, "
        f"{plan.measured.value:.3f}x the dense perplexity with these candidates"
    )
    return [first, *chosen]


def budget(check: BudgetCheck) -> str:
    """Whether the finished model keeps to its budget."""
    return (
        f"budget {'met' if check.met else 'NOT met'}: {check.ratio:.3f}x the dense perplexity on "
        f"text that nothing was fitted to, {check.share_of_bytes:.3f} of the bytes"
    )


def recovery(result: DistillResult) -> str:
    """What training did, with a line more for each thing to know of roundings in between."""
    # Only another process can have taken a time that nobody knows.
    took = "in an unknown time" if result.minutes is None else f"in {result.minutes:.1f} min"
    outcome = (
        "it did not help, the weights are those from before it"
        if result.rolled_back and not result.roundings
        else f"KL from the dense model on held-out text {result.before:.3f} -> {result.after:.3f}"
    )
    first = f"{result.tokens} tokens {took}, {outcome}"
    lines = [
        f"rounding blocks to codes took it from {each.before:.3f} to {each.after:.3f}"
        for each in result.roundings
    ]
    if result.roundings and result.undone:
        lines.append(f"{result.undone} of {result.trainings} trainings did not help: undone")
    return "\n  ".join((first, *lines))


def evaluation(name: str, against: str | None, result: EvalResult) -> list[Row]:
    """The dense model first, where there is one."""
    rows: list[Row] = []
    tokens = str(result.tokens)
    if against is not None and result.against_ppl is not None:
        rows.append((against, f"{result.against_ppl:.3f}", "0", "100 %", tokens))
    rows.append((name, f"{result.ppl:.3f}", *distance(result.kl, result.agreement), tokens))
    return rows


TASKS_HEADER = ("task", "metric", "model", "value", "std error", "n")


def tasks(name: str, against: str | None, own: Figures, dense: Figures) -> list[Row]:
    """A row for every figure of every task, the dense model's above the model's own."""
    rows: list[Row] = []
    for task, figures in own.items():
        beside = [(against, dense.get(task, {}))] if against is not None else []
        for metric in (key for key in figures if key != "n"):
            for who, found in [*beside, (name, figures)]:
                if metric in found:
                    value, error = found[metric]["value"], found[metric]["stderr"]
                    shown = "-" if error is None else f"{error:.4f}"
                    rows.append((task, metric, who, f"{value:.4f}", shown, str(found["n"])))
    return rows


def distance(kl: float | None, agreement: float | None) -> tuple[str, str]:
    """KL and agreement, a dash for what is not known."""
    return (
        "-" if kl is None else f"{kl:.4f}",
        "-" if agreement is None else f"{100 * agreement:.1f} %",
    )


def inspection(found: Inspection) -> list[str]:
    """The lines above the table of linears."""
    saved = found.weight_bytes / found.dense_bytes if found.dense_bytes else 1.0
    lines = [
        f"{found.path}: {found.family}, {len(found.linears)} linears",
        f"weights {size(found.weight_bytes)}, {saved:.3f} of {size(found.dense_bytes)} dense",
    ]
    if found.recipe:
        lines.append("recipe " + ", ".join(f"{k} {v}" for k, v in list(found.recipe.items())[:4]))
    if found.provenance:
        base = found.provenance.get("base", {})
        made = "imported" if (found.recipe or {}).get("method") == "imported" else "pruned"
        version = found.provenance.get("halfweave", "an unknown version")
        lines.append(f"{made} from {base.get('name')} by halfweave {version}")
    if found.verified_files is None:
        lines.append("no file was compared with a hash")
    else:
        lines.append(f"{found.verified_files} files have the SHA-256 of the manifest")
    return lines


def kernels(found: Inspection) -> list[str]:
    """Which kernel will multiply by each format on this machine, and how fast memory lets them."""
    chosen: dict[tuple[str, str], set[str]] = {}
    for row in found.linears:
        chosen.setdefault((row.format, row.kernel), set()).add(row.why)
    lines = [
        f"kernel for {stored}: {kernel} ({_reason(reasons)})"
        for (stored, kernel), reasons in sorted(chosen.items())
    ]
    roof = found.roof
    if roof is not None:
        some = f", {roof.experts[0]} of {roof.experts[1]} experts" if roof.experts else ""
        lines.append(
            f"a token reads {size(roof.token_bytes)}{some}; {roof.threads} threads read "
            f"{roof.read_bytes_per_second / 1e9:.1f} GB/s here: "
            f"at most {roof.tokens_per_second:.0f} tokens/s alone"
        )
    return lines


def _reason(reasons: Collection[str]) -> str:
    """The one reason, or of which kind several are."""
    if len(reasons) == 1:
        return next(iter(reasons))
    return " and ".join(sorted({reason.partition(":")[0] for reason in reasons}))


TILES_HEADER = ("products", "format", "tokens", "tile", "warps", "splits", "roof us")


def tiles(choices: Sequence[GpuChoice]) -> list[Row]:
    """One row for each kind of product and number of tokens: how a GPU would cut it."""
    return [
        (
            f"{each.count} x {each.shape[0]}x{each.shape[1]}",
            each.format + (f" g{each.group}" if each.group else ""),
            str(each.tokens),
            "x".join(map(str, each.tile)) if each.tile else "dense",
            str(each.warps or "-"),
            str(each.splits),
            f"{each.roof_us:.2f}",
        )
        for each in choices
    ]


def serving(url: str, names: Sequence[str], keys: bool) -> list[str]:
    """How to talk to a server that has just come up: the address, a curl line, and Python.

    With `keys` the caller is reminded to bring theirs.
    """
    messages = [{"role": "user", "content": "Hello"}]
    body = json.dumps({"model": names[0], "messages": messages, "max_tokens": 100})
    headers = "-H 'content-type: application/json'"
    key = '"none"'
    if keys:
        headers += ' -H "authorization: Bearer $HALFWEAVE_API_KEY"'
        key = 'os.environ["HALFWEAVE_API_KEY"]'
    return [
        f"serving {', '.join(names)} at {url}",
        f"curl {url}/v1/chat/completions {headers} \\",
        f"  -d {shlex.quote(body)}",
        *(["import os"] if keys else []),
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{url}/v1", api_key={key})',
        f"messages = {json.dumps(messages)}",
        "answer = client.chat.completions.create("
        f"model={json.dumps(names[0])}, messages=messages, max_tokens=100)",
        "print(answer.choices[0].message.content)",
    ]
