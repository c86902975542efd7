"""`bench serve`: an endpoint that runs, or servers of our own, started and ended again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

from ..errors import HalfweaveError
from ..report.theme import printable
from . import bench_tables
from .bench_words import Asked, named
from .console import Console
from .flags import Loading
from .loading import load_settings, read_source

if TYPE_CHECKING:
    from ..bench.client import Target
    from ..bench.prompts import Prompts
    from ..bench.serve_plan import ServePlan
    from ..runtime.eval import EvalResult
    from ..runtime.hardware import Hardware

_LISTED_S = 30.0


def measure_endpoints(
    console: Console, asked: Asked, plan: ServePlan, machine: Hardware
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Load what was asked for, and print what came of it.

    Returns which model the document is about, the figures of this kind, and notes.
    """
    from ..bench.serve import bench_serve, points_body, serve_notes

    prompts, models = _prompts(asked), _models(asked)
    quality = {} if asked.traffic.url else _quality(console, asked)
    with _targets(console, asked, plan) as targets, console.progress("round") as bar:
        points = bench_serve(targets, prompts, plan, bar.step)
    console.table(bench_tables.TIMES_HEADER, bench_tables.times(points), words=(0, 1))
    console.table(bench_tables.RATES_HEADER, bench_tables.rates(points), words=(0, 1))
    for line in bench_tables.serve_lines(plan, quality, machine):
        console.say(line)
    name = next(iter(targets))
    about = models[0] if models else {"path": None, "name": name, "digest": None}
    figures = {"quality": quality, "endpoint": asked.traffic.url, "models": models}
    notes = [*_quality_notes(asked, models), *serve_notes(points)]
    return about, {**figures, **points_body(points)}, notes


def _prompts(asked: Asked) -> Prompts:
    from ..bench.prompts import Prompts
    from ..runtime.tokenizer import Tokenizer

    text, _ = read_source(asked.speed.text)
    tokenizer = None if asked.model is None else Tokenizer.open(asked.model)
    return Prompts.of(text, asked.speed.prompt_tokens, asked.traffic.seed, tokenizer)


@contextmanager
def _targets(console: Console, asked: Asked, plan: ServePlan) -> Iterator[dict[str, Target]]:
    """The running endpoint under its model's name, or a server of each model of ours."""
    from ..bench.client import Target
    from ..bench.server_process import server

    traffic = asked.traffic

    def target(url: str, model: str) -> Target:
        key = traffic.api_key if traffic.url is not None else None
        return Target(url, model, plan.chat, plan.ignore_eos, key, plan.timeout_s)

    if traffic.url is not None:
        name = traffic.model_name or _first_model(target(traffic.url, ""))
        yield {printable(name): target(traffic.url, name)}
        return
    with ExitStack() as stack:
        targets = {}
        for name, path in named(asked.needed_model, asked.speed.against).items():
            console.tell(f"starting a server of {name}")
            running = stack.enter_context(server(path, _server_flags(asked.loading)))
            targets[name] = target(running.url, running.model)
        yield targets


def _first_model(target: Target) -> str:
    """What the endpoint offers first."""
    request = Request(target.models_url)
    if target.api_key:
        request.add_header("Authorization", f"Bearer {target.api_key}")
    try:
        with urlopen(request, timeout=_LISTED_S) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, HTTPException, ValueError, LookupError, TypeError, RecursionError) as error:
        raise HalfweaveError(
            f"{target.url} lists no models: {error}", "--model-name, if it has them all the same"
        ) from error


def _server_flags(loading: Loading) -> list[str]:
    """What makes a server load its model as we were told to."""
    flags = [
        *("--dtype", loading.dtype, "--device", loading.device),
        *("--head-bits", str(loading.head_bits), "--kv-bits", str(loading.kv_bits)),
        "--verify" if loading.verify else "--no-verify",
    ]
    return flags if loading.threads is None else [*flags, "--threads", str(loading.threads)]


def _quality(console: Console, asked: Asked) -> dict[str, EvalResult]:
    """Perplexity of each model of ours, before its server starts."""
    from ..runtime.eval import evaluate
    from ..runtime.model import load_model
    from ..runtime.threads import in_passing_thread

    text, _ = read_source(asked.speed.text)
    found = {}
    for name, path in named(asked.needed_model, asked.speed.against).items():
        model = load_model(path, **vars(load_settings(asked.loading)))
        with console.progress("window") as bar:
            found[name] = in_passing_thread(
                lambda model=model, bar=bar: evaluate(  # type: ignore[misc]
                    model,
                    text,
                    window=asked.speed.window,
                    max_windows=asked.speed.max_windows,
                    progress=bar.step,
                )
            )
    return found


def _models(asked: Asked) -> list[dict[str, Any]]:
    """The models of ours, the first dense one as the baseline; none for an endpoint that runs."""
    from ..bench.document import about_model
    from ..bench.offline import is_dense
    from ..runtime.checkpoint import Checkpoint

    if asked.traffic.url is not None:
        return []
    found: list[dict[str, Any]] = []
    for name, path in named(asked.needed_model, asked.speed.against).items():
        dense = is_dense(Checkpoint.open(path, verify=False))
        first = dense and not any(each["is_baseline"] for each in found)
        found.append({**about_model(path), "name": name, "is_baseline": first})
    return found


def _quality_notes(asked: Asked, models: Sequence[Mapping[str, Any]]) -> list[str]:
    if asked.traffic.url is not None:
        return ["the quality of this endpoint's answers was not measured"]
    if not any(model["is_baseline"] for model in models):
        return ["no dense model was measured beside this one: --against DENSE does"]
    return []
