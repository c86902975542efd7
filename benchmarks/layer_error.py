"""Layer errors of every pruning method, family by family: docs/results/layer_error.{json,md}.

    python benchmarks/layer_error.py
    python benchmarks/layer_error.py --model MODEL --text work/text/calib.wiki.txt --blocks 0 14 29

Each linear is pruned on some tokens' Hessian and judged by other tokens': ||(W - W')X||^2 over
||WX||^2. The table gives the geometric mean, over a family's linears, of that error divided by
SparseGPT's, and the worst linear. A method that is added to halfweave's table appears by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from halfweave.pruner.methods import METHODS, Method, Target
from halfweave.pruner.methods.base import relative_error
from halfweave.pruner.recipe import Pattern
from halfweave.runtime.eval import read_text
from halfweave.runtime.hardware import this_machine, versions
from layer_inputs import FAMILIES, Layer, Size, real_layers, tiny_layers

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
BASELINE = "sparsegpt"
GROUP, DAMPING = 64, 0.01


@dataclass(frozen=True)
class Goal:
    """A pattern and the bits of a kept weight."""

    pattern: str
    bits: int

    @property
    def title(self) -> str:
        return f"{self.pattern}, " + (f"int4 g{GROUP}" if self.bits == 4 else "16 bits")

    @property
    def target(self) -> Target:
        """The same for a method."""
        parsed = Pattern.parse(self.pattern)
        return Target(pattern=parsed, bits=self.bits, group=GROUP, damping=DAMPING)


GOALS = (Goal("50%", 16), Goal("4:8", 16), Goal("2:4", 16), Goal("2:4", 4), Goal("dense", 4))
# Held-out errors: by goal's title, then linear, then method.
Errors = dict[str, dict[str, dict[str, float]]]


def measure(
    layers: Sequence[Layer], goals: Sequence[Goal], methods: Mapping[str, Method]
) -> tuple[Errors, dict[str, float]]:
    """Held-out errors of all methods on some linears, and the seconds each method took."""
    errors: Errors = {}
    seconds = dict.fromkeys(methods, 0.0)
    for goal in goals:
        of_goal = errors.setdefault(goal.title, {})
        for layer in layers:
            of_layer = of_goal.setdefault(layer.name, {})
            for name, prune in methods.items():
                started = time.perf_counter()
                pruned = prune(layer.weight.clone(), layer.fit, goal.target)
                seconds[name] += time.perf_counter() - started
                error = relative_error(layer.weight, pruned.weight, layer.held_out.hessian)
                of_layer[name] = float(f"{error:.5g}")
    return errors, seconds


def summary(family: str, errors: Errors) -> list[dict[str, Any]]:
    """One row per goal and method: mean and worst ratio of its errors to the baseline's."""
    rows = []
    for goal, linears in errors.items():
        for method in next(iter(linears.values())):
            ratios = {name: of[method] / of[BASELINE] for name, of in linears.items()}
            worst = max(ratios, key=lambda name: ratios[name])
            logs = [math.log(max(ratio, 1e-12)) for ratio in ratios.values()]
            rows.append(
                {
                    "family": family,
                    "target": goal,
                    "method": method,
                    "linears": len(ratios),
                    "to_sparsegpt": math.exp(sum(logs) / len(logs)),
                    "worst_to_sparsegpt": ratios[worst],
                    "worst_linear": worst,
                }
            )
    return rows


PAGE = """# Layer errors beyond one model

How much of a linear's output each pruning method loses, on tokens that it was not fitted on, as a
multiple of what SparseGPT loses on the same linear: below 1 is better than SparseGPT. Geometric
mean over the linears, and the worst linear in brackets.

- Command: `{command}`; {date}; {hardware}; {versions}.
- {made_up}: the last block of seeded models of two blocks,
  {hidden} wide ({ffn} inside), **with made-up weights** (falling spectrum, heavy tails, outlier
  channels) and tokens that repeat: {tokens} to fit, as many others to judge by. They show that a
  method does not hang on one family's shapes, not what a trained model loses. The inputs of OPT,
  GPT-2 and BLOOM fill fewer dimensions here than SmolLM2's do; the fewer, the larger were all
  methods' distances from SparseGPT, so take those three rows as flattering.{real}
- The bare methods on dense inputs: a pruned model's later blocks read what the earlier ones left,
  and `halfweave prune` may choose between methods. Damping {damping}; groups of {group}.
- Magnitude without a pattern is rounding to nearest, and so is Wanda; SparseGPT is then GPTQ.
- Every linear's error is in `layer_error.json`.
"""
REAL = """
- {model}: blocks {blocks}, {tokens} tokens of calibration text to fit, as many of its last fifth to
  judge by."""


def to_markdown(document: dict[str, Any]) -> str:
    """The page, from its JSON twin."""
    settings, real = document["settings"], document["real_model"]
    made_up = [f for f in dict.fromkeys(r["family"] for r in document["rows"]) if f in FAMILIES]
    said = {**real, "blocks": ", ".join(map(str, real["blocks"]))} if real else {}
    head = PAGE.format(
        command=document["command"],
        date=document["date"],
        hardware=document["hardware"],
        versions=", ".join(f"{name} {value}" for name, value in document["versions"].items()),
        made_up=", ".join(made_up),
        real=REAL.format(**said) if real else "",
        damping=DAMPING,
        group=GROUP,
        **settings,
    )
    goals = dict.fromkeys(row["target"] for row in document["rows"])
    return "\n".join([head, *(table(goal, document["rows"]) for goal in goals)])


def table(goal: str, rows: Sequence[dict[str, Any]]) -> str:
    """One goal's section: a line per family, a column per method, the baseline left out."""
    chosen = [row for row in rows if row["target"] == goal]
    methods = [m for m in dict.fromkeys(row["method"] for row in chosen) if m != BASELINE]
    lines = [["family", "linears", *methods], ["---"] * (2 + len(methods))]
    for family in dict.fromkeys(row["family"] for row in chosen):
        of_family = {row["method"]: row for row in chosen if row["family"] == family}
        count = str(of_family[BASELINE]["linears"])
        lines.append([family, count, *(cell(of_family[method]) for method in methods)])
    return f"## {goal}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cell(row: dict[str, Any]) -> str:
    return f"{row['to_sparsegpt']:.3f} ({row['worst_to_sparsegpt']:.3f})"


def parse_options() -> argparse.Namespace:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    add("--hidden", type=int, default=Size.hidden, help="width of the made-up models")
    add("--ffn", type=int, default=Size.ffn, help="their inner width")
    add("--windows", type=int, default=Size.windows, help="windows to fit, and to judge by")
    add("--length", type=int, default=Size.length, help="tokens per window")
    add("--model", type=Path, help="also a real model")
    add("--text", type=Path, help="what it reads")
    add("--blocks", type=int, nargs="+", default=[0, 14, 29], help="its blocks")
    add("--out", type=Path, default=RESULTS, help="where the two files go")
    options = parser.parse_args()
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text go together")
    return options


def sources(options: argparse.Namespace, size: Size) -> dict[str, Callable[[], list[Layer]]]:
    """Where the linears come from, by the name in the table; each is made when it is called."""
    found: dict[str, Callable[[], list[Layer]]] = {
        family: partial(tiny_layers, family, size) for family in options.families
    }
    if options.model is not None:
        text, windows = read_text(options.text), (2 * size.windows, 2 * size.length)
        found[options.model.name] = partial(
            real_layers, options.model, text, options.blocks, *windows
        )
    return found


def to_document(
    options: argparse.Namespace, size: Size, errors: Mapping[str, Errors]
) -> dict[str, Any]:
    """The page's JSON twin."""
    tokens = size.windows * size.length
    real = None
    if options.model is not None:
        real = {"model": options.model.name, "blocks": options.blocks, "tokens": 4 * tokens}
    return {
        "command": " ".join(["python benchmarks/layer_error.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "hardware": this_machine().line,
        "versions": versions(),
        "settings": {"hidden": size.hidden, "ffn": size.ffn, "tokens": tokens},
        "real_model": real,
        "rows": [row for family, found in errors.items() for row in summary(family, found)],
        "errors": errors,
    }


def main() -> None:
    """Measure family by family, then write both files."""
    options = parse_options()
    methods = {BASELINE: METHODS[BASELINE], **{name: METHODS[name] for name in options.methods}}
    size = Size(options.hidden, options.ffn, windows=options.windows, length=options.length)
    errors: dict[str, Errors] = {}
    for family, layers in sources(options, size).items():
        errors[family], seconds = measure(layers(), GOALS, methods)
        taken = ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items())
        print(f"{family}: {taken}", file=sys.stderr, flush=True)
    document = to_document(options, size, errors)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "layer_error.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.out / "layer_error.md").write_text(to_markdown(document))


if __name__ == "__main__":
    main()
