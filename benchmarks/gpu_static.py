"""What can be said of the GPU kernels without a GPU: makes docs/results/gpu.{json,md}.

    python benchmarks/gpu_static.py

Compiles every variant for every architecture, runs one of each tile, dtype and group in the
emulator of tests/ptx against the torch oracle, and plants the mutants of the tests. Minutes on
two cores. No time of a GPU is measured, and none is made up.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "kernels" / "cuda")]

import triton  # noqa: E402
from gpu_static_page import write_page  # noqa: E402
from halfweave.cli.kernels import to_json  # noqa: E402
from halfweave.kernels.cuda.build import build, every_variant  # noqa: E402
from halfweave.kernels.cuda.roofs import decode_roof, dense_roof, sparse_roof  # noqa: E402
from halfweave.kernels.cuda.targets import ARCHITECTURES, CARDS  # noqa: E402
from halfweave.kernels.cuda.variants import Product, Variant, choose  # noqa: E402

Figures = dict[str, Any]
# Linears of a block (N, K), q, k and v as one and gate and up as one; blocks; head.
MODELS = {
    "Llama-3-8B": (
        ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
        32,
        (128256, 4096),
    ),
    "SmolLM2-135M": (((960, 576), (576, 576), (3072, 576), (576, 1536)), 30, (49152, 576)),
}
GROUPS = (0, 64)
TOKENS = (1, 8, 16, 32, 64, 128, 512)


def build_one(item: tuple[Variant, int]) -> Figures:
    """The figures of one variant on one architecture; on sm_80 it is emulated too."""
    from support.emulated import Case, error_of

    variant, arch = item
    figures = {**to_json(build(variant, arch)), "triton": triton.__version__, "emulated": False}
    if arch == 80:
        tile = variant.tile
        case = Case(
            tile,
            M=tile.BM - 3,
            N=tile.BN,
            K=max(384, 320 * tile.WK) - (0 if variant.whole_k else 48),
            kind=variant.kind,
            group=variant.scaled_columns,
            dense=variant.dense,
            splits=2 if variant.splits else 1,
            bias=variant.bias,
            residual=variant.residual,
            gated=variant.gated,
        )
        figures |= {"emulated": True, "max_rel_err": error_of(case)}
    return figures


def plant(name: str) -> bool:
    """Whether the tests see a mutant."""
    import test_sparse_gemm as tests

    return tests.caught(tests.case_of(name), tests.MUTANTS[name])


def mutants(pool: ProcessPoolExecutor) -> Figures:
    """How many were planted, and how many were seen."""
    import test_sparse_gemm as tests

    seen = dict(zip(tests.MUTANTS, pool.map(plant, tests.MUTANTS), strict=True))
    return {"planted": len(seen), "caught": sum(seen.values()), "by_name": seen}


def products() -> Iterator[Figures]:
    """The tile and the roofs of every linear of the models, on every card."""
    for model, (linears, _, _) in MODELS.items():
        for card_name, card in CARDS.items():
            for rows, columns in linears:
                for group in GROUPS:
                    for tokens in TOKENS:
                        product = Product(tokens, rows, columns, "f16", group)
                        chosen = choose(product, ARCHITECTURES[card.arch], card.multiprocessors)
                        tile = chosen.tile
                        yield {
                            "model": model,
                            "card": card_name,
                            "M": tokens,
                            "N": rows,
                            "K": columns,
                            "group": group,
                            "tile": tile and [tile.BN, tile.BM, 64 * tile.WK],
                            "splits": chosen.splits,
                            "roof_us": sparse_roof(product, card).us,
                            "dense_roof_us": dense_roof(product, card).us,
                        }


def decoding() -> Iterator[Figures]:
    """Roofs of whole models, one sequence at a time."""
    for model, (linears, blocks, head) in MODELS.items():
        for name, card in CARDS.items():
            for group in GROUPS:
                roof = decode_roof(list(linears) * blocks, head, 1, group, card)
                yield {
                    "model": model,
                    "card": name,
                    "group": group,
                    "roof_tokens_per_s": roof.sparse,
                    "dense_roof_tokens_per_s": roof.dense,
                }


def to_text(document: Figures) -> str:
    """JSON with a line for each row of its tables."""
    parts = []
    for name, value in document.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Measure nothing, compile and emulate everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    planned = every_variant(ARCHITECTURES)
    variants = []
    with ProcessPoolExecutor(options.processes) as pool:
        for figures in pool.map(build_one, planned):
            variants.append(figures)
            print(f"{len(variants)}/{len(planned)}", file=sys.stderr, flush=True)
        document = {
            "date": str(date.today()),
            "triton": triton.__version__,
            "mutants": mutants(pool),
            "variants": variants,
            "products": list(products()),
            "decoding": list(decoding()),
        }
    (options.results / "gpu.json").write_text(to_text(document))
    write_page(options.results)


if __name__ == "__main__":
    main()
