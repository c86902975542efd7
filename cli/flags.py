"""The flags of the verbs: typed, with their help, in groups that verbs share.

A verb takes such groups as parameters; `verb` spreads their fields out for typer and gathers the
given values again, so that no function has twenty parameters.
"""

from __future__ import annotations

import functools
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Argument, Exit, Option, Typer

from ..errors import HalfweaveError
from .console import print_error

INTERRUPTED = 130

# Each flag can be given as HALFWEAVE_VERB_FLAG too; saying so at every one would drown the help.
Flag = functools.partial(Option, show_envvar=False)

ModelDirs = Annotated[
    list[str],
    Argument(metavar="MODEL...", help="Model directories.", show_default=False),
]
ModelDir = Annotated[str, Argument(metavar="MODEL", help="Model directory.", show_default=False)]
OutDir = Annotated[
    str, Argument(metavar="OUT", help="Output directory; it is made.", show_default=False)
]


@dataclass(frozen=True)
class Output:
    """How a verb reports."""

    json: Annotated[bool, Flag("--json", help="One JSON document on stdout.")] = False
    debug: Annotated[bool, Flag("--debug", help="Show tracebacks of errors.")] = False


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    dtype: Annotated[str, Flag(help="auto, float32 or bfloat16: what is computed in.")] = "auto"
    head_bits: Annotated[int, Flag(help="8, or 4: of the head, in models of 4 bits.")] = 8
    kv_bits: Annotated[int, Flag(help="16, or 8: of keys and values.")] = 16
    device: Annotated[str, Flag(help="cpu, cuda or cuda:N.")] = "cpu"
    verify: Annotated[bool, Flag(help="Check every file against its SHA-256.")] = True
    threads: Annotated[int | None, Flag(min=1, help="CPU threads; all cores if unset.")] = None


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_tokens: Annotated[int, Flag(help="Most new tokens.")] = 256
    temperature: Annotated[float, Flag(help="0 takes the most likely token.")] = 0.7
    top_p: Annotated[float, Flag(help="Share of probability that is kept.")] = 1.0
    top_k: Annotated[int, Flag(help="Number of tokens that are kept; 0 is all.")] = 0
    min_p: Annotated[float, Flag(help="Least share of the likeliest one's probability.")] = 0.0
    seed: Annotated[int | None, Flag(help="Makes the random draws repeatable.")] = None


@dataclass(frozen=True)
class Pruning:
    """What to do to the weights; the fields of `Recipe`, each None where it was not given."""

    pattern: Annotated[str | None, Flag(help="2:4, 4:8, N:M, 50% or dense. [2:4]")] = None
    method: Annotated[str | None, Flag(help="admm, sparsegpt, wanda, magnitude. [admm]")] = None
    bits: Annotated[int | None, Flag(help="Of a kept weight: 16, 4; 8 with dense. [16]")] = None
    group: Annotated[
        int | None, Flag(help="With 4 bits, weights that share a scale: 128, 64 or 32. [128]")
    ] = None
    calib: Annotated[str | None, Flag(help="UTF-8 text file to calibrate on. [builtin]")] = None
    calib_windows: Annotated[int | None, Flag(help="Calibration windows. [64]")] = None
    calib_length: Annotated[int | None, Flag(help="Tokens of a window. [512]")] = None
    seed: Annotated[int | None, Flag(help="Draws the windows. [0]")] = None
    damping: Annotated[float | None, Flag(help="Of the Hessian's mean diagonal. [0.01]")] = None
    mix: Annotated[float | None, Flag(help="Share of dense outputs to aim at. [0.5]")] = None
    fast: Annotated[
        bool | None, Flag("--fast", help="Observe a block once, not stage by stage.")
    ] = None
    reorder: Annotated[
        bool | None,
        Flag("--reorder/--no-reorder", help="Let admm reorder an MLP's channels. [True]"),
    ] = None
    recover: Annotated[str | None, Flag(help="none, blocks, distill or blocks+distill. [none]")] = (
        None
    )
    recover_minutes: Annotated[float | None, Flag(help="Time to distill for. [30.0]")] = None
    recover_tokens: Annotated[int | None, Flag(help="Instead of a time: so many tokens. [0]")] = (
        None
    )
    recover_precision: Annotated[
        str | None, Flag(help="float32, bfloat16, or auto: the faster one here. [auto]")
    ] = None
    recover_rate: Annotated[
        float | None, Flag(help="Learning rate, relative to the weights' size. [0.001]")
    ] = None
    recover_ce: Annotated[
        float | None, Flag(help="Weight of the text's own next token in the loss. [0.0]")
    ] = None
    block_epochs: Annotated[int | None, Flag(help="Epochs of each block's tuning. [4]")] = None
    max_ppl_ratio: Annotated[
        float | None, Flag(help="Budget: perplexity over the dense model's, such as 1.15. [0.0]")
    ] = None
    target_bytes: Annotated[
        float | None, Flag(help="Budget: share of the dense weight files, such as 0.4. [0.0]")
    ] = None
    strict: Annotated[
        bool | None, Flag("--strict", help="Fail if a layer cannot take the pattern.")
    ] = None
    allow_nonfinite: Annotated[
        bool | None, Flag("--allow-nonfinite", help="Keep layers with NaN as they are.")
    ] = None


@dataclass(frozen=True)
class Run:
    """How a pruning run treats what is there."""

    recipe: Annotated[
        Path | None, Flag(help="Recipe file, or halfweave.json; flags change it.")
    ] = None
    resume: Annotated[bool, Flag("--resume", help="Go on with a killed run.")] = False
    overwrite: Annotated[bool, Flag("--overwrite", help="Replace a model in OUT.")] = False
    dry_run: Annotated[bool, Flag("--dry-run", help="Print the plan and stop.")] = False
    ray: Annotated[
        str | None, Flag(help="Share the work out: local, auto, or a Ray's HOST:PORT.")
    ] = None


@dataclass(frozen=True)
class Working:
    """Where a model is worked on."""

    device: Annotated[str, Flag(help="cpu, cuda or cuda:N.")] = "cpu"


@dataclass(frozen=True)
class Recovering:
    """How a pruned checkpoint is trained; the fields of `Recovery`."""

    calib: Annotated[str, Flag(help="UTF-8 text file to train on.")] = "builtin"
    minutes: Annotated[float, Flag(help="Time to train for.")] = 30.0
    tokens: Annotated[int, Flag(help="Instead of a time: so many tokens.")] = 0
    bits: Annotated[int, Flag(help="4 rounds a 2:4 model of 16 bits in the end.")] = 16
    group: Annotated[int, Flag(help="128, 64 or 32 weights a scale of those codes.")] = 128
    precision: Annotated[str, Flag(help="float32, bfloat16, or auto: the faster one here.")] = (
        "auto"
    )
    rate: Annotated[float, Flag(help="Learning rate, relative to the weights' size.")] = 1e-3
    ce: Annotated[float, Flag(help="Weight of the text's own next token in the loss.")] = 0.0
    seed: Annotated[int, Flag(help="Draws the order of the windows.")] = 0


@dataclass(frozen=True)
class Restart:
    """How a run treats what is there."""

    resume: Annotated[bool, Flag("--resume", help="Go on with a killed run.")] = False
    overwrite: Annotated[bool, Flag("--overwrite", help="Replace a model in OUT.")] = False
    dry_run: Annotated[bool, Flag("--dry-run", help="Print the plan and stop.")] = False


@dataclass(frozen=True)
class Asking:
    """Which tasks of the evaluation harness are asked; the fields of `TaskPlan`."""

    tasks: Annotated[
        str | None, Flag(help="Tasks of lm-eval (extra [eval]), with commas between them.")
    ] = None
    limit: Annotated[int | None, Flag(min=1, help="Ask the first so many of each.")] = None
    num_fewshot: Annotated[
        int | None, Flag(min=0, help="Solved examples before each question; the task's if unset.")
    ] = None
    include_path: Annotated[
        Path | None, Flag(help="Directory of more tasks; code beside them is run.")
    ] = None
    chat: Annotated[bool, Flag("--chat", help="Put questions into the model's chat template.")] = (
        False
    )


@dataclass(frozen=True)
class Protocol:
    """How quality is measured, and what becomes of it."""

    window: Annotated[int, Flag(help="Tokens of a window.")] = 1024
    max_windows: Annotated[int | None, Flag(help="Take every k-th window, this many.")] = None
    dry_run: Annotated[
        bool, Flag("--dry-run", help="Measure one window, say how long all take, and stop.")
    ] = False
    save: Annotated[bool, Flag(help="Keep it in MODEL/measured/, in place of the last.")] = True
    out: Annotated[Path | None, Flag(help="File to keep it in instead.")] = None


@dataclass(frozen=True)
class Measuring:
    """What quality is measured on."""

    against: Annotated[str | None, Flag(metavar="DENSE", help="Its dense parent.")] = None
    text: Annotated[str, Flag(help="UTF-8 file, or the built-in one.")] = "builtin-eval"


@dataclass(frozen=True)
class Speed:
    """What speed is measured on, in every mode."""

    against: Annotated[
        list[str], Flag(metavar="DENSE", help="Its dense parent, or others; may be repeated.")
    ] = field(default_factory=list)
    text: Annotated[str, Flag(help="UTF-8 file, or the built-in one.")] = "builtin-eval"
    prompt_tokens: Annotated[int, Flag(help="Tokens of a prompt.")] = 128
    new_tokens: Annotated[int, Flag(help="Tokens of an answer.")] = 64
    repetitions: Annotated[int | None, Flag(help="Rounds, 5 or more. [offline 7, else 11]")] = None
    batch: Annotated[
        list[int], Flag(min=1, help="offline: requests at once, repeated. [1 2 4 8 16]")
    ] = field(default_factory=list)
    tokens: Annotated[
        list[int], Flag(min=1, help="kernel: tokens of a product, repeated. [1 to 64, 128, 512]")
    ] = field(default_factory=list)
    window: Annotated[int, Flag(help="Tokens of a perplexity window.")] = 512
    max_windows: Annotated[int, Flag(help="Most perplexity windows.")] = 8


@dataclass(frozen=True)
class Traffic:
    """How `bench serve` loads an endpoint."""

    url: Annotated[str | None, Flag(help="serve: a running endpoint, not one of our own.")] = None
    model_name: Annotated[str | None, Flag(help="serve: its model; its first if unset.")] = None
    api_key: Annotated[
        str | None, Flag(help="serve: its key; better in HALFWEAVE_BENCH_API_KEY. Never shown.")
    ] = None
    rate: Annotated[
        list[float], Flag(help="serve: requests a second at random times; may be repeated.")
    ] = field(default_factory=list)
    concurrency: Annotated[
        list[int], Flag(help="serve: clients, each one request at a time; may be repeated. [8]")
    ] = field(default_factory=list)
    requests: Annotated[int, Flag(min=1, help="serve: requests of a round.")] = 24
    goodput: Annotated[
        list[str], Flag(help="serve: most ms of good requests, such as ttft:200 tpot:50.")
    ] = field(default_factory=list)
    seed: Annotated[int, Flag(help="serve: of times and prompts.")] = 0
    chat: Annotated[bool, Flag("--chat", help="serve: chats, not completions.")] = False
    ignore_eos: Annotated[bool, Flag(help="serve: ask for answers of full length.")] = True
    request_timeout: Annotated[float, Flag(min=0.001, help="serve: seconds.")] = 600.0


@dataclass(frozen=True)
class Keeping:
    """What becomes of a measurement."""

    save: Annotated[bool, Flag(help="Keep it in MODEL/measured/, in place of the last.")] = True
    out: Annotated[Path | None, Flag(help="File to keep it in instead.")] = None
    even_if_busy: Annotated[
        bool, Flag("--even-if-busy", help="Measure although others are at work.")
    ] = False
    dry_run: Annotated[bool, Flag("--dry-run", help="Say what would be measured, and stop.")] = (
        False
    )


@dataclass(frozen=True)
class Comparing:
    """Two measurements that were kept."""

    compare: Annotated[
        tuple[Path, Path] | None, Flag(metavar="A.json B.json", help="Say what changed, and stop.")
    ] = None
    floor: Annotated[float, Flag(min=0, help="compare: smaller changes are none.")] = 0.03
    even_if_different: Annotated[
        bool, Flag("--even-if-different", help="compare: of other models, plans or machines too.")
    ] = False


@dataclass(frozen=True)
class Serving:
    """Where and how a server listens."""

    host: Annotated[str, Flag(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Flag(help="Port to listen on; 0 takes a free one.")] = 8000
    name: Annotated[
        list[str], Flag(help="A model's name, in their order; its directory's if unset.")
    ] = field(default_factory=list)
    api_key: Annotated[
        list[str], Flag(help="A key that requests must bring; may be given several times.")
    ] = field(default_factory=list)
    api_key_file: Annotated[Path | None, Flag(help="File of such keys, one a line.")] = None
    drain: Annotated[float, Flag(min=0, help="Seconds for running answers at the end.")] = 30.0


@dataclass(frozen=True)
class Scheduling:
    """How much a server does at once; the fields of `EngineSettings`, with MiB for bytes."""

    max_num_seqs: Annotated[int, Flag(min=1, help="Requests that run side by side.")] = 32
    max_waiting: Annotated[int, Flag(min=0, help="Requests that may wait behind them.")] = 64
    queue_timeout: Annotated[
        float | None, Flag(min=0, help="Seconds that a request waits at most; no limit if unset.")
    ] = None
    max_model_len: Annotated[
        int | None, Flag(min=2, help="Tokens of prompt and answer; the model's own if unset.")
    ] = None
    step_tokens: Annotated[int, Flag(min=1, help="Tokens that are computed in one step.")] = 256
    kv_mib: Annotated[
        int | None, Flag(min=1, help="Memory for keys and values; 1024, or what suffices.")
    ] = None
    prefix_cache: Annotated[bool, Flag(help="Reuse what was computed of equal beginnings.")] = True


@dataclass(frozen=True)
class Scaling:
    """How many processes serve, and where; one without Ray if nothing is given."""

    replicas: Annotated[int | None, Flag(min=1, help="Serve with so many processes on Ray.")] = None
    max_replicas: Annotated[
        int | None, Flag(min=1, help="Grow up to so many under load; --replicas if unset.")
    ] = None
    ray_address: Annotated[
        str | None, Flag(help="A running Ray cluster; one on this machine is started if unset.")
    ] = None


def verb(app: Typer, name: str | None = None) -> Callable[[Callable[..., None]], None]:
    """Register a function as a verb of the command line, its groups of flags spread out.

    Errors end the process with their exit code and two lines at most, a traceback with --debug.
    """

    def register(function: Callable[..., None]) -> None:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            with _Errors(bool(given.get("debug"))):
                function(**_gathered(function, given))

        run.__signature__ = inspect.Signature(_spread(function))  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in _spread(function)}
        del run.__wrapped__
        app.command(name)(run)

    return register


def _spread(function: Callable[..., None]) -> list[inspect.Parameter]:
    """The parameters of a function, each group replaced by its fields."""
    spread: list[inspect.Parameter] = []
    defaults = {p.name: p.default for p in inspect.signature(function).parameters.values()}
    for name, hint in get_type_hints(function, include_extras=True).items():
        if is_dataclass(hint):
            types = get_type_hints(hint, include_extras=True)
            spread += [_parameter(f.name, types[f.name], _default(f)) for f in fields(hint)]
        elif name != "return":
            spread.append(_parameter(name, hint, defaults[name]))
    return spread


def _parameter(name: str, hint: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default


def _gathered(function: Callable[..., None], given: dict[str, Any]) -> dict[str, Any]:
    """The values for a function's own parameters, its groups made again."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(function).items():
        if isinstance(hint, type) and is_dataclass(hint):
            values[name] = hint(**{field.name: given[field.name] for field in fields(hint)})
        elif name != "return":
            values[name] = given[name]
    return values


class _Errors:
    """Turns every way to fail into an exit code and at most two lines."""

    def __init__(self, debug: bool) -> None:
        self._debug = debug

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            raise Exit(INTERRUPTED)
        if not isinstance(error, Exception) or isinstance(error, Exit):
            return
        if self._debug:
            traceback.print_exception(error)
        known = error if isinstance(error, HalfweaveError) else _unexpected(error)
        print_error(known)
        raise Exit(known.exit_code) from error


def _unexpected(error: Exception) -> HalfweaveError:
    if isinstance(error, BrokenPipeError):
        return HalfweaveError("nobody reads the output any more")
    return HalfweaveError(
        f"unexpected {type(error).__name__}: {error}",
        "this is a bug in halfweave: run the same command with --debug and report what it prints",
    )
