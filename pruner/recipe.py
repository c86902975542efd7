"""What to do to a model: a typed recipe, saved beside the weights it made and accepted back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import read_json
from ..kernels.formats import GROUP_SIZES
from .recover.precision import PRECISIONS
from .recover.windows import MOST_SEED

METHODS = ("admm", "sparsegpt", "wanda", "magnitude")
BITS = (16, 8, 4)
_OF_DISTILLATION = (
    "recover_minutes",
    "recover_tokens",
    "recover_precision",
    "recover_rate",
    "recover_ce",
)
IMPORTED = {"method": "imported"}  # in a recipe's place, where another tool chose the weights
RECOVERIES = ("none", "blocks", "distill", "blocks+distill")
# What a linear may become under a quality budget, by the format it is then stored in.
CHOICES: Mapping[str, tuple[str, int]] = {
    "sparse24_int4": ("2:4", 4),
    "sparse24": ("2:4", 16),
    "int4": ("dense", 4),
    "int8": ("dense", 8),
    "dense": ("dense", 16),
}


@dataclass(frozen=True)
class Pattern:
    """Which weights may stay: `kept` of every `of` along K, or, with `of` 0, a share of them all.

    `fraction` is the share that is removed.
    """

    text: str
    kept: int
    of: int
    fraction: float

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "2:4", "4:8", any "N:M" with M dividing 128, "50%", or "dense".

        Raises:
            UsageError: the text is none of these.
        """
        if text == "dense":
            return cls(text, 0, 0, 0.0)
        try:
            if text.endswith("%"):
                share = float(text[:-1]) / 100
                if 0 < share < 1:
                    return cls(text, 0, 0, share)
            else:
                kept, of = (int(part) for part in text.split(":"))
                if 0 < kept < of and 128 % of == 0:
                    return cls(text, kept, of, 1 - kept / of)
        except ValueError:
            pass
        raise UsageError(f"pattern {text!r} is none of 2:4, 4:8, N:M (M divides 128), 50%, dense")

    @property
    def is_dense(self) -> bool:
        """Nothing is removed."""
        return self.fraction == 0

    @property
    def is_24(self) -> bool:
        """The pattern of the sparse tensor cores, which has a packed format."""
        return (self.kept, self.of) == (2, 4)


@dataclass(frozen=True)
class Recipe:
    """All that decides the output, given the base weights: same recipe, same bytes.

    `calib` is "builtin" or the path of a text file; `damping` is relative to the mean of the
    Hessian's diagonal; `mix` is the share of the dense model's outputs in what a layer should
    repeat; `fast` observes a block once, dense, instead of stage by stage; `reorder` lets admm put
    channels inside a block into the order that suits an N:M pattern; `strict` makes a linear that
    cannot take the pattern an error instead of keeping it dense; `allow_nonfinite` keeps linears
    with NaN or infinity as they are.

    `recover` trains what is left: "none"; "blocks", each block against the dense one for
    `block_epochs`; "distill", the whole model against the dense one on `recover_tokens` tokens,
    0 meaning as many as `recover_minutes` allow; or "blocks+distill", one behind the other.
    `recover_precision` is that of the distillation's matrix products: "float32", "bfloat16", or
    "auto", the faster one on this machine; `recover_rate` its weights' learning rate, relative to
    their size, and `recover_ce` the weight of the text's own next token beside the dense model's
    prediction of it.

    With a budget, `max_ppl_ratio` (perplexity over the dense model's) or `target_bytes` (a share of
    its weight files), every linear gets a format of its own, which `choices` records by name; 0 is
    no budget. A recipe of both repeats the run that chose: nothing is searched, the choices are
    taken as they are. `changed` with a budget starts a new search. Choices may stand without a
    budget too; a linear without one stays dense. With a budget or choices `pattern` and `bits` say
    nothing, and must be left at their defaults.
    """

    method: str = "admm"
    pattern: str = "2:4"
    bits: int = 16
    group: int = 128
    calib: str = "builtin"
    calib_windows: int = 64
    calib_length: int = 512
    seed: int = 0
    damping: float = 0.01
    mix: float = 0.5
    fast: bool = False
    reorder: bool = True
    recover: str = "none"
    recover_minutes: float = 30.0
    recover_tokens: int = 0
    recover_precision: str = "auto"
    recover_rate: float = 1e-3
    recover_ce: float = 0.0
    block_epochs: int = 4
    max_ppl_ratio: float = 0.0
    target_bytes: float = 0.0
    choices: dict[str, str] = field(default_factory=dict)
    strict: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        parsed = Pattern.parse(self.pattern)
        _require(self.method in METHODS, f"method {self.method!r} is none of {', '.join(METHODS)}")
        _require(self.bits in BITS, f"bits {self.bits} is none of {BITS}")
        _require(self.group in GROUP_SIZES, f"group {self.group} is none of {GROUP_SIZES}")
        _require(self.calib_windows > 0, "calib_windows must be at least 1")
        _require(self.calib_length > 1, "calib_length must be at least 2 tokens")
        _require(0 <= self.seed <= MOST_SEED, f"seed must lie between 0 and {MOST_SEED}")
        _require(0 < self.damping < 1, "damping must lie between 0 and 1")
        _require(0 <= self.mix <= 1, "mix must lie between 0 and 1")
        _require(
            not (parsed.is_dense and self.bits == 16),
            "pattern dense with 16 bits leaves nothing to do",
        )
        _require(parsed.is_dense or self.bits != 8, "8 bits go with the pattern dense only")
        _require(
            self.recover in RECOVERIES,
            f"recover {self.recover!r} is none of {', '.join(RECOVERIES)}",
        )
        _require(self.recover_minutes > 0, "recover_minutes must be above 0")
        _require(
            self.recover_precision in PRECISIONS,
            f"recover_precision {self.recover_precision!r} is none of {', '.join(PRECISIONS)}",
        )
        _require(self.recover_tokens >= 0, "recover_tokens must not be negative")
        _require(0 < self.recover_rate < 1, "recover_rate must lie between 0 and 1")
        _require(0 <= self.recover_ce < math.inf, "recover_ce must be a number not below 0")
        _require(self.block_epochs > 0, "block_epochs must be at least 1")
        _require(
            not self.tunes_blocks or self.calib_windows > 1,
            "recover blocks takes 2 calibration windows at least: one of them judges",
        )
        _require(self.max_ppl_ratio == 0 or self.max_ppl_ratio > 1, "max_ppl_ratio must be above 1")
        _require(0 <= self.target_bytes < 1, "target_bytes is a share of the dense model, below 1")
        self._check_formats()

    def _check_formats(self) -> None:
        _require(
            not (self.max_ppl_ratio and self.target_bytes),
            "max_ppl_ratio and target_bytes are two budgets; give one",
        )
        _require(
            not (self.has_budget and self.distills),
            "a budget is judged on text that distillation would train on; give one of the two",
        )
        named = all(isinstance(choice, str) for choice in self.choices.values())
        _require(named, "choices: each is the name of a format")
        unknown = sorted(set(self.choices.values()) - CHOICES.keys())
        _require(not unknown, f"choices: {unknown} are none of {', '.join(CHOICES)}")
        if (self.pattern, self.bits) != (Recipe.pattern, Recipe.bits):
            self._require_one_format()

    def _require_one_format(self) -> None:
        """Refuse that a pattern or bits are asked for."""
        if self.is_for_budget:
            raise UsageError(
                "a budget chooses pattern and bits for each linear itself",
                "leave out --pattern and --bits, here and in the recipe, or --max-ppl-ratio and "
                "--target-bytes",
            )
        _require(not self.choices, "the recipe's choices give each linear its pattern and bits")

    @property
    def tunes_blocks(self) -> bool:
        """Each block is trained right after it was pruned."""
        return self.recover.startswith("blocks")

    @property
    def distills(self) -> bool:
        """The whole model is trained after all blocks were pruned."""
        return self.recover.endswith("distill")

    @property
    def is_rounded_on_the_way(self) -> bool:
        """Trained as a whole as floats, and rounded to codes between trainings (staged.py)."""
        return self.distills and self.bits == 4 and not Pattern.parse(self.pattern).is_dense

    @property
    def by_blocks(self) -> Recipe:
        """What of it is done block by block, before any training of the whole model."""
        return replace(self, recover="blocks" if self.tunes_blocks else "none")

    @property
    def is_for_budget(self) -> bool:
        """Made for a budget, whether the formats are still to be chosen or were chosen before."""
        return bool(self.max_ppl_ratio or self.target_bytes)

    @property
    def has_budget(self) -> bool:
        """Formats are still to be chosen."""
        return self.is_for_budget and not self.choices

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with other values of some fields, by name.

        A budget among them, or its 0, replaces the other budget and what was chosen for it.

        Raises:
            UsageError: an impossible value; a pattern or bits, be they the defaults, beside a
                budget or choices; or a setting of distillation where there is none.
        """
        usual = {field.name: field.default for field in fields(self)}
        budgets = {"max_ppl_ratio": 0.0, "target_bytes": 0.0}
        before = {**budgets, "choices": {}} if changes.keys() & budgets.keys() else {}
        found = replace(self, **{**before, **changes})
        idle = [
            name
            for name in _OF_DISTILLATION
            if not found.distills and changes.get(name, usual[name]) != usual[name]
        ]
        if idle:
            flag, recovery = f"--{idle[0].replace('_', '-')}", "distill"
            recovery = "blocks+distill" if found.tunes_blocks else recovery
            raise UsageError(
                f"{flag} has no effect: this recipe does not train the whole model",
                f"add --recover {recovery}, or leave {flag} out",
            )
        if changes.keys() & {"pattern", "bits"}:
            found._require_one_format()
        return found

    def to_json(self) -> dict[str, Any]:
        """The recipe as written into the manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """Read a recipe strictly.

        Raises:
            UsageError: an unknown key, a wrong type, or an impossible value.
        """
        _require(isinstance(value, Mapping), "recipe: it is no object")
        known = {field.name: field.type for field in fields(cls)}
        unknown = sorted(value.keys() - known.keys())
        _require(not unknown, f"recipe: unknown keys {unknown}")
        for name, entry in value.items():
            wanted = str(known[name]).partition("[")[0]
            legal = type(entry).__name__ == wanted or (wanted == "float" and type(entry) is int)
            _require(legal, f"recipe: {name} must be {wanted}, not {type(entry).__name__}")
        return cls(**value)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a recipe file, or the recipe inside a manifest (`halfweave.json`)."""
        value = read_json(path)
        return cls.from_json(value.get("recipe", value))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
