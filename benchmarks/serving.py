"""The server under load: makes docs/results/serving.{json,md}.

    python benchmarks/serving.py --model OUT [--seconds 600] [--clients 64] [--results DIR]

Three things, each on a server of its own, started as a user starts it: a soak with clients that
come, go and hang up; tokens a second for 1 to 16 clients at once; and how quickly a full server
says so. Clients run on the same machine and take their share of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from halfweave.bench.server_process import server
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.hardware import this_machine, versions
from load.page import page
from load.soak import percentile, soak, to_json
from load.throughput import full_queue_ms, throughputs

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
BATCHES = (1, 2, 4, 8, 16)


def options() -> argparse.Namespace:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model directory to serve")
    add("--seconds", type=float, default=600.0, help="of the soak")
    add("--clients", type=int, default=64, help="of the soak")
    add("--tokens", type=int, default=128, help="of each answer, for throughput")
    add("--rounds", type=int, default=5, help="for throughput")
    add("--results", type=Path, default=RESULTS, help="where the pages go")
    return parser.parse_args()


def recipe_of(model: Path) -> str:
    """How the model came to be, in words; dense where nothing says that it was pruned."""
    recipe = (Checkpoint.open(model, verify=False).manifest or {}).get("recipe")
    if not recipe:
        return "dense"
    group = f" g{recipe['group']}" if recipe["bits"] == 4 else ""
    recovered = "" if recipe.get("recover", "none") == "none" else f", {recipe['recover']}"
    return f"{recipe['method']}, {recipe['pattern']}, {recipe['bits']} bits{group}{recovered}"


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """Everything, as the document that is kept."""
    machine = this_machine()
    with server(asked.model) as running:
        speeds = throughputs(running, BATCHES, asked.tokens, asked.rounds)
    with server(asked.model, ["--max-num-seqs", "8", "--max-waiting", "8"]) as running:
        full = asyncio.run(full_queue_ms(running, 16, 200))
    result, errors = soak(asked.model, asked.seconds, asked.clients, ["--max-waiting", "32"])
    return {
        "date": date.today().isoformat(),
        "hardware": machine.line,
        "versions": versions(),
        "model": asked.model.name,
        "recipe": recipe_of(asked.model),
        "command": f"python benchmarks/serving.py --model OUT --seconds {asked.seconds:g} "
        f"--clients {asked.clients} --tokens {asked.tokens} --rounds {asked.rounds}",
        "soak": to_json(result),
        "soak_errors": errors[:20],
        "throughput": [asdict(each) for each in speeds],
        "queue_full_ms_p50": percentile([each / 1000 for each in full], 0.5),
        "queue_full_ms_p99": percentile([each / 1000 for each in full], 0.99),
    }


def main() -> None:
    """Measure, and write both pages."""
    asked = options()
    document = measured(asked)
    asked.results.mkdir(parents=True, exist_ok=True)
    (asked.results / "serving.json").write_text(json.dumps(document, indent=1) + "\n")
    (asked.results / "serving.md").write_text(page(document))
    print(page(document))


if __name__ == "__main__":
    main()
