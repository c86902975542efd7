"""The verb `kernels compile`: GPU kernels without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Typer

from ..errors import HalfweaveError, UnsupportedModel, UsageError
from .console import Console
from .flags import Flag, Output, verb

if TYPE_CHECKING:
    from ..kernels.cuda.build import Row
    from ..kernels.cuda.variants import Variant

kernels_app = Typer(name="kernels", help="Work on the kernels themselves.")

_HEADER = ("tile", "warps", "format", "sm", "regs", "spill", "shared", "mma.sp", "instr", "fit")
_BATCHES = (1, 8, 32)


@verb(kernels_app, "compile")
def compile_all(
    output: Output,
    arch: Annotated[str, Flag(help="Architectures, with commas.")] = "80,86,89,90",
    tile: Annotated[str | None, Flag(help="Only this one, such as 64x8.")] = None,
    out: Annotated[Path | None, Flag(help="Directory for cubins and PTX.")] = None,
    model: Annotated[str | None, Flag(help="Model directory to tell roofs of.")] = None,
    card: Annotated[str, Flag(help="Card to tell roofs of.")] = "A100-80GB",
    group: Annotated[int, Flag(help="Weights a scale, in roofs; 0 is 16 bits.")] = 64,
    dry_run: Annotated[bool, Flag("--dry-run", help="Say what would be compiled.")] = False,
) -> None:
    """Compile every variant of the sparse GPU product, without a GPU; minutes.

    mma.sp and instr are instructions of a warp in one step of K; fit is how many programs share a
    multiprocessor. Roofs are what a card allows at most, not what anybody measured.
    """
    console = Console(output.json)
    architectures = _architectures(arch)
    builder = _builder()
    planned = [
        (variant, each)
        for variant, each in builder.every_variant(architectures)
        if tile in (None, f"{variant.BN}x{variant.BM}")
    ]
    if not planned:
        raise UsageError(f"there is no tile {tile}", "halfweave kernels compile lists them")
    if dry_run:
        what = f"plan: {len(planned)} kernels for sm {', '.join(map(str, architectures))}"
        console.say(f"{what}, one after the other in this process; nothing is run")
        plan = {"kernels": len(planned), "architectures": architectures}
        console.document({"verb": "kernels compile", "dry_run": True, "plan": plan})
        return
    rows: list[Row] = []
    with console.progress("kernel") as bar:
        for variant, each in planned:
            rows.append(builder.build(variant, each))
            if out is not None:
                _save(rows[-1], out)
            bar.step(len(rows), len(planned), rows[-1].compiled.name)
    console.table(_HEADER, [_cells(row) for row in rows])
    roofs = [] if model is None else _roofs(model, card, group)
    for batch, roof in roofs:
        console.say(
            f"roof on {card}, batch {batch}: {roof.sparse:.0f} tokens/s "
            f"(dense 16 bits: {roof.dense:.0f}); nothing measured"
        )
    document = {"verb": "kernels compile", "variants": [to_json(row) for row in rows]}
    told = [{"batch": batch, "sparse": r.sparse, "dense": r.dense} for batch, r in roofs]
    console.document({**document, "card": card, "roofs_tokens_per_s": told})


def to_json(row: Row) -> dict[str, Any]:
    """A variant, as results pages and `--json` have it."""
    variant, made = row.variant, row.compiled
    return {
        "kernel": made.name,
        "format": _format(variant),
        "dtype": variant.kind,
        "group": variant.scaled_columns,
        "tile": [variant.BN, variant.BM, 64 * variant.WK],
        "split": variant.splits,
        "whole_k": variant.whole_k,
        "bias_and_residual": variant.bias and variant.residual,
        "gated": variant.gated,
        "warps": made.warps,
        "arch": made.arch,
        "registers": made.registers,
        "spills": made.stack_bytes,
        "smem_bytes": made.shared_bytes,
        "hmma_sp_per_tile": row.products_per_step,
        "instructions_per_tile": row.instructions_per_step,
        "resident_programs": row.resident,
    }


def _format(variant: Variant) -> str:
    if variant.dense:
        return "int4"
    return "sparse24_int4" if variant.group else "sparse24"


def _architectures(text: str) -> list[int]:
    from ..kernels.cuda.targets import ARCHITECTURES

    known = ", ".join(map(str, ARCHITECTURES))
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"architectures {text!r} are no numbers; known are {known}") from error
    for each in found:
        if each not in ARCHITECTURES:
            raise UsageError(f"architecture {each} is none of {known}")
    return found


def _builder() -> Any:
    try:
        from ..kernels.cuda import build
    except ImportError as error:
        raise HalfweaveError(
            "GPU kernels are compiled by Triton, which is not installed",
            "pip install 'halfweave[cuda]'",
        ) from error
    return build


def _save(row: Row, directory: Path) -> None:
    variant, made = row.variant, row.compiled
    directory.mkdir(parents=True, exist_ok=True)
    tile = f"{variant.BN}x{variant.BM}x{64 * variant.WK}"
    stored = f"{_format(variant)}-g{variant.scaled_columns}"
    stem = "-".join([made.name, variant.kind, stored, tile, *variant.extras]) + f".sm_{made.arch}"
    (directory / f"{stem}.cubin").write_bytes(made.cubin)
    (directory / f"{stem}.ptx").write_text(made.ptx)


def _cells(row: Row) -> tuple[str, ...]:
    variant, made = row.variant, row.compiled
    stored = f"{variant.kind} {_format(variant)}"
    stored += f" g{variant.scaled_columns}" if variant.group else ""
    return (
        " ".join([f"{variant.BN}x{variant.BM}x{64 * variant.WK}", *variant.extras]),
        str(made.warps),
        stored,
        str(made.arch),
        str(made.registers),
        str(made.stack_bytes),
        str(made.shared_bytes),
        f"{row.products_per_step:g}",
        f"{row.instructions_per_step:.0f}",
        str(row.resident),
    )


def _roofs(model: str, card: str, group: int) -> list[tuple[int, Any]]:
    from ..kernels.cuda.roofs import decode_roof
    from ..kernels.cuda.targets import CARDS
    from ..runtime.checkpoint import Checkpoint
    from ..runtime.families import decoder_spec

    if card not in CARDS:
        raise UsageError(f"card {card!r} is none of {', '.join(CARDS)}")
    spec = decoder_spec(Checkpoint.open(model, verify=False).config)
    if spec.experts is not None:
        raise UnsupportedModel("the GPU kernels lack experts, so there is no roof for them")
    linears = [spec.shape(role) for role in spec.roles] * spec.layers
    head = spec.vocab, spec.hidden
    return [(n, decode_roof(linears, head, n, group, CARDS[card])) for n in _BATCHES]
