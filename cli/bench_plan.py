"""What a call of `bench` would measure: its plan, which `--dry-run` tells and measures no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import HalfweaveError, UsageError
from .bench_words import Asked, named
from .console import Console, duration, size
from .loading import load_settings, read_source, set_threads

if TYPE_CHECKING:
    from ..bench.kernel import KernelPlan
    from ..bench.kernel_gpu import Gpu
    from ..bench.offline_plan import BenchPlan
    from ..bench.serve_plan import ServePlan


def offline_plan(asked: Asked) -> BenchPlan:
    """Raises UsageError where a number is out of range."""
    from ..bench.offline_plan import BenchPlan

    speed = asked.speed
    return BenchPlan(
        prompt_tokens=speed.prompt_tokens,
        new_tokens=speed.new_tokens,
        window=speed.window,
        max_windows=speed.max_windows,
        repetitions=asked.repetitions(BenchPlan.repetitions),
        batches=tuple(speed.batch) or BenchPlan.batches,
    )


def kernel_plan(asked: Asked) -> KernelPlan:
    """Raises UsageError where a number is out of range, or the device is not there."""
    from ..bench.kernel import KernelPlan
    from ..kernels.device import parse_device

    return KernelPlan(
        tuple(asked.speed.tokens) or KernelPlan.tokens,
        asked.repetitions(KernelPlan.repetitions),
        asked.loading.head_bits,
        parse_device(asked.loading.device).type,
    )


def gpu(asked: Asked) -> Gpu:
    """The GPU to measure.

    Raises:
        HalfweaveError: Triton is not installed.
        RefusedError: the GPU has no sparse tensor cores.
    """
    from ..kernels.device import parse_device

    try:
        from ..bench.kernel_gpu import Gpu
    except ImportError as error:
        raise HalfweaveError(
            "the GPU kernels are compiled by Triton, which is not installed",
            "pip install 'halfweave[cuda]'",
        ) from error
    return Gpu.of(parse_device(asked.loading.device))


def serve_plan(asked: Asked) -> ServePlan:
    """How the endpoints are to be loaded.

    Raises:
        UsageError: a number is out of range, a limit of goodput is none, or what was asked for
            contradicts itself.
    """
    from ..bench.serve_plan import ServePlan, loads, parse_slos

    speed, traffic = asked.speed, asked.traffic
    if traffic.url is not None and speed.against:
        raise UsageError("--against starts a server of ours, --url says that one runs")
    return ServePlan(
        loads(traffic.rate, traffic.concurrency),
        requests=traffic.requests,
        repetitions=asked.repetitions(ServePlan.repetitions),
        prompt_tokens=speed.prompt_tokens,
        new_tokens=speed.new_tokens,
        slos=parse_slos(asked.limits),
        seed=traffic.seed,
        ignore_eos=traffic.ignore_eos,
        chat=traffic.chat,
        timeout_s=traffic.request_timeout,
    )


def tell_plan(console: Console, asked: Asked) -> None:
    """Say what would be measured, and how long it takes where a little of it tells."""
    set_threads(asked.loading.threads)
    lines, plan = _TOLD[asked.mode](asked)
    console.say(f"plan: {lines[0]}")
    for line in lines[1:]:
        console.say(f"  {line}")
    console.last_line({"verb": "bench", "dry_run": True, "kind": asked.mode, "plan": plan})


_Told = tuple[list[str], dict[str, Any]]


def _offline(asked: Asked) -> _Told:
    from ..bench.forecast import forecast

    plan = offline_plan(asked)
    text, _ = read_source(asked.speed.text)
    paths = named(asked.needed_model, asked.speed.against)
    found = forecast(paths, text, plan, load_settings(asked.loading))
    sizes = ", ".join(map(str, found.batches))
    lines = [
        f"{', '.join(found.models)} in {found.turns} turns, {plan.warmups} of them to warm up",
        f"a turn: one request, then batches of {sizes}, of {plan.prompt_tokens} + "
        f"{plan.new_tokens} tokens",
        f"quality: {found.windows} windows of {plan.window} tokens",
        f"about {duration(found.seconds)} and {size(found.peak_memory_bytes)} of memory here, "
        "judged by one turn",
    ]
    return lines, vars(found)


def _kernel(asked: Asked) -> _Told:
    from ..bench.kernel import needed_library
    from ..bench.products import gpu_products, model_products
    from ..runtime.checkpoint import Checkpoint

    plan = kernel_plan(asked)
    checkpoint = Checkpoint.open(asked.needed_model, verify=False)
    if plan.device == "cpu":
        needed_library()
        found = model_products(checkpoint, plan.head_bits)
    else:
        gpu(asked)
        found = gpu_products(checkpoint)
    products = [each.product for each in found]
    tokens = ", ".join(map(str, plan.tokens))
    lines = [
        f"{len(products)} products of {tokens} tokens, {plan.repetitions} times each",
        *(f"{each.format} {each.N}x{each.K}" for each in products),
        "beside dense ones of the same shape; progress will tell how long it takes",
    ]
    told = [{"format": each.format, "N": each.N, "K": each.K} for each in products]
    return lines, {"products": told, "tokens": plan.tokens, "repetitions": plan.repetitions}


def _serve(asked: Asked) -> _Told:
    plan, url = serve_plan(asked), asked.traffic.url
    where = [url] if url else list(named(asked.needed_model, asked.speed.against))
    loads = [
        f"{each.rate:g} req/s" if each.rate else f"{each.concurrency} clients"
        for each in plan.loads
    ]
    requests = plan.repetitions * plan.requests
    least_s = len(where) * sum(requests / each.rate for each in plan.loads if each.rate)
    lines = [
        f"{', '.join(where)} under {', '.join(loads)}",
        f"each {plan.repetitions} times {plan.requests} requests of {plan.prompt_tokens} + "
        f"{plan.new_tokens} tokens",
    ]
    if least_s:
        lines.append(f"the given rates take {duration(least_s)} at least")
    told = {"endpoints": where, "loads": loads, "requests": len(where) * len(loads) * requests}
    return lines, {**told, "least_seconds": least_s}


_TOLD = {"offline": _offline, "kernel": _kernel, "serve": _serve}
