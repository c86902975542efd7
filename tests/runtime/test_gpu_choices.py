"""The tiles that a GPU would give a model: those of the products that its decoder makes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")
from halfweave.bench.products import gpu_products
from halfweave.kernels.cuda.roofs import sparse_roof
from halfweave.kernels.cuda.targets import CARDS
from halfweave.kernels.cuda.variants import Product
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.gpu_choices import TOKENS, gpu_choices
from halfweave.runtime.inspection import inspect_checkpoint
from support.tiny import Tiny, pack_directory, save_tiny

STORED = [
    ("sparse24", {}),
    ("sparse24_int4", {}),
    ("int4", {}),
    ("sparse24_int4", {"k_proj": "int4", "up_proj": "sparse24"}),
    ("sparse24", {"q_proj": "dense"}),
]


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize(("kind", "others"), STORED)
def test_the_products_told_are_those_that_are_measured(
    kind: str, others: dict[str, str], family: str, tmp_path: Path
) -> None:
    options = {"sliding_window": None} if family == "phi3" else {}
    tiny = save_tiny(tmp_path / "tiny", Tiny(family=family, options=options))
    model = pack_directory(tiny, tmp_path / "packed", kind, others=others)
    told = gpu_choices(inspect_checkpoint(model).linears, "A10")
    assert len(told) % len(TOKENS) == 0
    measured = {
        ((p.product.format, p.product.group or 0, p.product.N, p.product.K), p.count)
        for p in gpu_products(Checkpoint.open(model))
    }
    assert {((t.format, t.group, *t.shape), t.count) for t in told} == measured


def test_dense_codes_take_4_bits_a_weight_and_a_scale() -> None:
    card = CARDS["A10"]
    one = sparse_roof(Product(1, 4096, 8192, "f16", 128, dense=True), card)
    read = 4096 * 4096 * 4.25 / 8 + 2 * (4096 + 4096)
    assert one.memory_us == pytest.approx(read / card.gb_per_s / 1e3)
    assert one.tensor_us == pytest.approx(2 * 4096 * 4096 / card.tflops / 1e6)
