"""Speed on the CPU beside other engines: makes docs/results/cpu.{json,md}.

    python benchmarks/bench_peers.py --model DENSE --work WORK_DIR

Figures of other numbers of threads stay, where the page has some of this machine.

Every engine has an environment of its own under WORK_DIR and stays loaded while all are measured
in turns, so that a busy moment of the machine falls on all of them. What does not install is named
with its reason. The first run builds llama.cpp from source.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results"
sys.path.insert(0, str(HERE / "peers"))

from engines import measure_engines  # noqa: E402
from halfweave.kernels.cpu.library import library  # noqa: E402
from halfweave.pruner.gguf_file import locate_smollm2  # noqa: E402
from halfweave.runtime.hardware import this_machine, versions  # noqa: E402
from page import write_page  # noqa: E402
from prepare import Contender, Missing, prepare  # noqa: E402
from products import measure_products  # noqa: E402


def parse_options() -> argparse.Namespace:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="dense SmolLM2-135M, imported")
    add("--work", type=Path, required=True, help="environments and converted models")
    add("--results", type=Path, default=RESULTS, help="where the pages go")
    add("--threads", type=int, nargs="+", default=[1, 2])
    add("--rounds", type=int, default=5)
    add("--without-kernels", action="store_true", help="leave the table of single products out")
    return parser.parse_args()


def main() -> None:
    """Prepare, measure, write."""
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    contenders, missing = prepare(options.work, options.model.resolve(), Path(locate_smollm2()))
    rows, kernels = known(options.results / "cpu.json", options.threads)
    for threads in options.threads:
        more, ended = measure_engines(contenders, threads, options.rounds)
        rows, missing = rows + more, missing + ended
        if not options.without_kernels:
            kernels += measure_products(
                (Path(sys.executable), HERE / "peers" / "halfweave_kernels.py"),
                ggml_of(contenders),
                threads,
                options.rounds,
            )
        write(options, rows, kernels, missing)


def known(page: Path, threads: list[int]) -> tuple[list[Any], list[Any]]:
    """Rows and kernels of other numbers of threads, if they are of this machine and versions."""
    document = json.loads(page.read_text()) if page.exists() else {}
    if (document.get("hardware"), document.get("versions")) != (this_machine().line, versions()):
        return [], []
    rows, kernels = (
        [row for row in document[part] if row["threads"] not in threads]
        for part in ("rows", "kernels")
    )
    return rows, kernels


def write(
    options: argparse.Namespace, rows: list[Any], kernels: list[Any], missing: list[Missing]
) -> None:
    """The page and its twin, from what is measured by now."""
    native = library()
    document = {
        "hardware": this_machine().line,
        "level": native.level if native else "none",
        "date": date.today().isoformat(),
        "versions": versions(),
        "rounds": options.rounds,
        "rows": rows,
        "kernels": kernels,
        "missing": [asdict(each) for each in missing],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "cpu.json").write_text(json.dumps(document, indent=1) + "\n")
    write_page(options.results)


def ggml_of(contenders: list[Contender]) -> tuple[Path, Path] | None:
    """Python and script of ggml's kernels, where llama.cpp is there."""
    for one in contenders:
        if one.engine == "llama.cpp":
            return one.python, one.script.with_name("ggml_kernels.py")
    return None


if __name__ == "__main__":
    main()
