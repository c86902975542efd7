"""The quality of pruned models: makes docs/results/quality.{json,md} and recovery_curve.json.

    python benchmarks/quality.py --model MODEL --text TEXT_DIR --work WORK_DIR
    python benchmarks/quality.py ... --rows 'admm:2:4:*' 'sparsegpt:2:4:*' --seeds 0
    python benchmarks/quality.py ... --curve 0 5 15 30 60

Every row (quality_rows.py) is one `halfweave prune`, one `halfweave eval --against MODEL` and one
run of last_word.py, in processes of their own, so that time and peak memory belong to the row. The
figures are kept in WORK_DIR, so a run that was killed goes on where it stopped; a row that fails
is reported and passed over. What the page in --results holds under the same settings is known
already, on whichever machine it was measured. The pages are written after every row, from all rows
that are known under the same settings, and name those that are not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from halfweave.pruner.gguf_file import locate_smollm2
from quality_document import to_curve, to_document
from quality_measure import (
    RowFailedError,
    Settings,
    forget,
    halfweave,
    measure,
    measure_dense,
    run,
)
from quality_page import write_page
from quality_rows import SEEDS, all_rows, chosen, curve_rows
from quality_twin import adopt

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def write_pages(options: argparse.Namespace, settings: Settings) -> None:
    """Write what is known by now; nothing while not one row is."""
    document = to_document(settings)
    if document is None:
        return
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "quality.json").write_text(json.dumps(document, indent=1) + "\n")
    write_page(options.results)
    if options.curve:
        curve = to_curve(options.curve_row, options.curve, settings)
        (options.results / "recovery_curve.json").write_text(json.dumps(curve, indent=1) + "\n")


def parse_options() -> argparse.Namespace:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="dense model; imported if missing")
    add("--text", type=Path, required=True, help="directory of make_text.py")
    add("--work", type=Path, required=True, help="checkpoints and raw figures")
    add("--results", type=Path, default=RESULTS, help="where the pages go")
    add("--windows", type=int, default=64, help="calibration windows")
    add("--length", type=int, default=512, help="tokens per calibration window")
    add("--eval-windows", type=int, default=32, help="at most so many of 1024")
    add("--last-word", type=int, default=1000, help="words to guess; 0 leaves the task out")
    add("--recover-minutes", type=float, default=15.0, help="of the rows that distill")
    add("--rows", nargs="+", default=[], help="labels as method:pattern:bits[:recover], with *")
    add("--seeds", type=int, nargs="+", default=list(SEEDS), help="only these")
    add("--curve", type=float, nargs="+", default=[], help="only the curve's row, at these minutes")
    add("--curve-row", default="admm:2:4:4:distill", help="label of the curve's row")
    add("--prune-only", action="store_true", help="make checkpoints, evaluate later")
    add("--keep", action="store_true", help="keep checkpoints after their evaluation")
    add("--again", action="store_true", help="forget what is known of these rows first")
    return parser.parse_args()


def main() -> None:
    """Fill in the chosen rows that are missing, then write the pages."""
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.model.exists():
        run([halfweave(), "import", locate_smollm2(), options.model])
    settings = Settings.of(options)
    published = options.results / "quality.json"
    if published.exists():
        known = adopt(json.loads(published.read_text()), settings)
        print(f"{known} runs are known from {published}", file=sys.stderr, flush=True)
    rows = chosen(all_rows(options.recover_minutes), options.rows, options.seeds)
    if options.curve:
        rows = curve_rows(options.curve_row, options.curve)
    if not rows:
        sys.exit("no row has such a label and seed")
    if not options.prune_only:
        measure_dense(settings)
    failed = []
    for row in rows:
        try:
            if options.again:
                forget(row, settings)
            measure(row, settings, options.prune_only)
        except RowFailedError as error:
            print(f"{row.label}, seed {row.seed}: {error}", file=sys.stderr, flush=True)
            failed.append(row.label)
        write_pages(options, settings)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
