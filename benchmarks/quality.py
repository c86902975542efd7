"""Perplexities of the baselines on one model: makes docs/results/quality.{json,md}.

    python benchmarks/quality.py --model MODEL --text TEXT_DIR --work WORK_DIR

Every row is one `halfweave prune` and one `halfweave eval --against MODEL` in processes of their
own, so that time and peak memory belong to the row. A second run goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from halfweave.pruner.gguf_file import locate_smollm2

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
GROUP = 64  # divides both widths of SmolLM2-135M; its own weights were 4-bit in groups of 32


@dataclass(frozen=True)
class Row:
    """One method at one pattern and width."""

    method: str
    pattern: str
    bits: int

    @property
    def name(self) -> str:
        """Directory name of the row's checkpoint."""
        return f"{self.method}-{self.pattern.replace(':', '-').replace('%', 'pct')}-w{self.bits}"


ROWS = [
    Row(method, pattern, bits)
    for pattern, bits in (("50%", 16), ("4:8", 16), ("2:4", 16), ("2:4", 4))
    for method in ("magnitude", "wanda", "sparsegpt")
]


def main() -> None:
    """Fill in the rows that are missing, then write both pages."""
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.model.exists():
        run(["import", locate_smollm2(), options.model])
    reports = []
    for row in ROWS[: options.limit]:
        pruned = cached(
            options.work / f"{row.name}.prune.json", lambda row=row: prune(row, options)
        )
        if not options.prune_only:
            path = options.work / f"{row.name}.eval.json"
            scores = cached(path, lambda row=row: evaluate(row, options))
            reports.append((row, pruned, scores))
    if reports:
        document = to_document(options, reports)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "quality.json").write_text(json.dumps(document, indent=1) + "\n")
        (RESULTS / "quality.md").write_text(to_markdown(document, options))


def parse_options() -> argparse.Namespace:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="dense model; imported if missing"
    )
    parser.add_argument("--text", type=Path, required=True, help="directory of make_text.py")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and raw figures")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens per calibration window")
    parser.add_argument("--eval-windows", type=int, default=16, help="at most so many of 1024")
    parser.add_argument("--limit", type=int, help="only the first so many rows")
    parser.add_argument(
        "--prune-only", action="store_true", help="make checkpoints, evaluate later"
    )
    return parser.parse_args()


def cached(path: Path, make: Any) -> dict[str, Any]:
    """The figures in `path`, measured first if they are not there."""
    if not path.exists():
        figures = make()
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(figures, indent=1))
        temporary.replace(path)
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def prune(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Make the row's checkpoint; minutes and peak memory of its process."""
    out = options.work / row.name
    command = ["prune", options.model, out, "--method", row.method, "--pattern", row.pattern]
    command += ["--bits", row.bits, "--group", GROUP, "--seed", 0]
    command += ["--calib", options.text / "calib.wiki.txt"]
    # Magnitude looks at no inputs; one window is enough to report its layer errors.
    windows = 1 if row.method == "magnitude" else options.windows
    command += ["--calib-windows", windows, "--calib-length", options.length]
    resuming = (out / ".halfweave-journal.jsonl").exists()
    fresh = "--resume" if resuming else "--overwrite"
    seconds, peak, _ = run([*command, fresh])
    return {
        "minutes": None if resuming else round(seconds / 60, 2),
        "peak_rss_gib": round(peak / 2**30, 2),
    }


def evaluate(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity, KL and agreement of the row's checkpoint against the dense model."""
    command = ["eval", options.work / row.name, "--against", options.model]
    command += ["--text", options.text / "eval.wiki.txt"]
    command += ["--max-windows", options.eval_windows, "--json"]
    _, _, output = run(command)
    document: dict[str, Any] = json.loads(output.splitlines()[-1])
    return document


def run(arguments: list[Any]) -> tuple[float, int, str]:
    """Run the `halfweave` command beside this Python: seconds, peak bytes, stdout."""
    command = [str(Path(sys.executable).with_name("halfweave")), *map(str, arguments)]
    print("$", " ".join(["halfweave", *command[1:]]), file=sys.stderr, flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"failed: {' '.join(command)}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024, output


def to_document(
    options: argparse.Namespace, reports: list[tuple[Row, dict[str, Any], dict[str, Any]]]
) -> dict[str, Any]:
    """The page's JSON twin."""
    from halfweave.runtime.hardware import this_machine, versions

    first = reports[0][2]["result"]
    common = {"group": None, "recover": "none", "seed": 0}
    calib_tokens = options.windows * options.length
    dense = {
        **{"model": options.model.name, "method": "dense", "pattern": "dense", "bits": 16},
        **{**common, "seed": None, "calib_tokens": 0},
        **{"ppl": first["against_ppl"], "kl": 0.0, "agreement": 1.0},
        **{"minutes": 0.0, "peak_rss_gib": None},
    }
    rows = [dense]
    for row, pruned, scores in reports:
        figures = {key: scores["result"][key] for key in ("ppl", "kl", "agreement")}
        identity = {"model": options.model.name, "method": row.method, "pattern": row.pattern}
        settings = {**common, "group": GROUP if row.bits == 4 else None}
        settings["calib_tokens"] = 0 if row.method == "magnitude" else calib_tokens
        rows.append({**identity, "bits": row.bits, **settings, **figures, **pruned})
    return {
        "eval": {key: first[key] for key in ("text_sha256", "tokens", "window")},
        "hardware": this_machine().line,
        "versions": versions(),
        "date": date.today().isoformat(),
        "command": "make quality",
        "rows": rows,
    }


PAGE = """# Quality of the baselines

One-shot pruning of {model}, without training, by the methods as published. Later work is
measured against these figures.

- Command: `{command}`; {date}; {hardware}; {versions}.
- Evaluation: {tokens} predicted tokens, windows of {window} that do not overlap, every k-th window
  of the text; text SHA-256 `{text_sha256}`. fp32, halfweave's own runtime.
- Calibration: {calib} tokens ({windows} x {length}), seed 0, from other articles than the
  evaluation text, block after block on the already pruned model. Both texts come from
  `benchmarks/make_text.py`.
- int4: symmetric, groups of {group}. The dense model is the dequantized Q4_1 GGUF (4-bit, groups
  of 32), so 4-bit rows may flatter; groups of 32 would flatter more.
- One seed and one run per row: differences of a few percent mean nothing. Minutes are wall time
  with other work on the machine: upper bounds, not a benchmark.

| method | pattern | bits | perplexity | to dense | KL, nats | agreement | minutes | RSS, GiB |
|---|---|---|---|---|---|---|---|---|
{table}
"""


def to_markdown(document: dict[str, Any], options: argparse.Namespace) -> str:
    """The page itself, from the same figures."""
    dense = document["rows"][0]["ppl"]
    lines = []
    for row in document["rows"]:
        bits = f"4, g{row['group']}" if row["bits"] == 4 else "16"
        minutes = "" if row["minutes"] is None else f"{row['minutes']:.1f}"
        peak = "" if row["peak_rss_gib"] is None else f"{row['peak_rss_gib']:.2f}"
        cells = [row["method"], row["pattern"], bits, f"{row['ppl']:.2f}"]
        cells += [f"{row['ppl'] / dense:.2f}x", f"{row['kl']:.3f}", f"{row['agreement']:.3f}"]
        lines.append("| " + " | ".join([*cells, minutes, peak]) + " |")
    return PAGE.format(
        **document["eval"],
        model=options.model.name,
        command=document["command"],
        date=document["date"],
        hardware=document["hardware"],
        versions=", ".join(f"{name} {value}" for name, value in document["versions"].items()),
        calib=options.windows * options.length,
        windows=options.windows,
        length=options.length,
        group=GROUP,
        table="\n".join(lines),
    )


if __name__ == "__main__":
    main()
