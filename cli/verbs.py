"""The verbs: each loads what it needs, calls one public function, and prints what comes back."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Context, Exit, Typer, echo

from .. import __version__
from ..errors import UsageError
from . import tables
from .bench import bench
from .console import WIDTH, Console, Progress, duration, log_to_stderr, print_error, size
from .flags import (
    Asking,
    Flag,
    Loading,
    Measuring,
    ModelDir,
    ModelDirs,
    OutDir,
    Output,
    Protocol,
    Pruning,
    Recovering,
    Restart,
    Run,
    Sampling,
    Scaling,
    Scheduling,
    Serving,
    Working,
    verb,
)
from .kernels import kernels_app
from .loading import load, load_settings, set_threads

if TYPE_CHECKING:
    from ..pruner.oneshot import Progress as PruneProgress
    from ..pruner.recipe import Recipe
    from ..pruner.recover.settings import DistillProgress
    from ..pruner.steps import ProgressEvent as PruneEvent

app = Typer(
    name="halfweave",
    rich_markup_mode=None,  # rich costs 0.1 s at every --help
    pretty_exceptions_enable=False,
    context_settings={
        "auto_envvar_prefix": "HALFWEAVE",
        "help_option_names": ["-h", "--help"],
        "max_content_width": WIDTH,
    },
)
# What typer raises for a call that it cannot parse; no public name is the same in all versions.
_WrongCall: Any = BadParameter.__mro__[1]


def main() -> None:
    """Entry point of the `halfweave` command."""
    try:
        code = app(prog_name="halfweave", standalone_mode=False)
    except _WrongCall as error:
        context = error.ctx
        path = "halfweave" if context is None else context.command_path
        print_error(UsageError(error.format_message(), f"{path} --help"))
        code = UsageError.exit_code
    sys.exit(code or 0)


app.add_typer(kernels_app)


@app.callback(invoke_without_command=True)
def _root(
    context: Context,
    version: Annotated[bool, Flag("--version", help="Print the version and exit.")] = False,
) -> None:
    """Keep two weights of every four, and serve what is left.

    Every flag can also be set in the environment: --max-tokens of generate is
    HALFWEAVE_GENERATE_MAX_TOKENS.
    """
    if version:
        echo(f"halfweave {__version__}")
        raise Exit
    if context.invoked_subcommand is None:
        echo(context.get_help())
        raise Exit(UsageError.exit_code)


@verb(app)
def prune(
    model: ModelDir, out: OutDir, pruning: Pruning, run: Run, working: Working, output: Output
) -> None:
    """Prune a dense model directory into a new one."""
    from ..pruner.coverage import coverage
    from ..pruner.outdir import check_directory
    from ..pruner.pipeline import plan_prune, rehearse
    from ..pruner.pipeline import prune as prune_model

    console = Console(output.json)
    recipe = _recipe(pruning, run.recipe)
    if run.dry_run:
        check_directory(Path(model), Path(out), run.resume, run.overwrite)
        plan = rehearse(model, out, recipe, device=working.device, ray=run.ray)
    else:
        plan = plan_prune(model, recipe, working.device)
    for line in tables.plan(plan, recipe):
        (console.say if run.dry_run else console.tell)(line)
    if run.dry_run:
        console.document({"verb": "prune", "dry_run": True, "recipe": recipe, "plan": plan})
        return
    try:
        with console.progress("linear") as bar:
            result = prune_model(
                model,
                out,
                recipe,
                resume=run.resume,
                overwrite=run.overwrite,
                device=working.device,
                ray=run.ray,
                progress=lambda step: _tell_progress(console, bar, step),
            )
    except KeyboardInterrupt:
        console.tell("next: the same command with --resume goes on from the last finished block")
        raise
    console.table(tables.LINEARS_HEADER, tables.linears(result.linears))
    seen = coverage(result.linears.values())
    if seen is not None:
        console.say(f"experts: {seen}")
    console.say(f"{result.path} is complete, {result.seconds:.1f} s")
    if recipe.recover != "none" and result.recovery_seconds is not None:
        console.say(f"recovery took {duration(result.recovery_seconds)} of that")
    if result.recovery is not None:
        console.say(f"training: {tables.recovery(result.recovery)}")
    if result.budget is not None:
        console.say(tables.budget(result.budget))
    console.say(f"next: halfweave eval {out} --against {model}")
    console.document({"verb": "prune", "recipe": recipe, "result": result})


def _recipe(pruning: Pruning, file: Path | None) -> Recipe:
    """The recipe of the file, or the default one, changed by the flags that were given."""
    from ..pruner.recipe import Recipe

    base = Recipe() if file is None else Recipe.read(file)
    given = {name: value for name, value in vars(pruning).items() if value is not None}
    return base.changed(given)


def _tell_progress(console: Console, bar: Progress, step: PruneEvent) -> None:
    """One line for whatever a pruning run has to say."""
    from ..pruner.budget.choose import BudgetPlan, BudgetProgress
    from ..pruner.oneshot import Progress as PruneProgress

    if isinstance(step, PruneProgress):
        bar.phase("linear")
        bar.line(step.done, step.total, _pruned(step), step.seconds, step.eta_seconds)
    elif isinstance(step, BudgetProgress):
        console.tell(f"budget: {step.step} {step.done} {step.note}".rstrip())
    elif isinstance(step, BudgetPlan):
        for line in tables.formats(step):
            console.tell(line)
    else:
        bar.phase("token")
        _tell_training(bar, step)


def _tell_training(bar: Progress, step: DistillProgress) -> None:
    held_out = "" if step.held_out is None else f", {step.held_out:.3f} on held-out text"
    seconds = 60 * step.minutes
    left = max(seconds / step.tokens * (step.total_tokens - step.tokens), 0.0)
    what = f"recovered, KL {step.loss:.3f}{held_out}"
    bar.line(step.tokens, step.total_tokens, what, seconds, left)


def _pruned(step: PruneProgress) -> str:
    error = step.record.relative_error
    note = f" ({step.record.note})" if step.record.note else ""
    return f"{step.name} {'kept dense' if error is None else f'err {error:.3f}'}{note}"


@verb(app)
def recover(
    model: ModelDir,
    out: OutDir,
    parent: Annotated[str, Flag(metavar="DENSE", help="Its dense parent.")],
    recovering: Recovering,
    restart: Restart,
    working: Working,
    output: Output,
) -> None:
    """Train a pruned model directory towards its dense parent, into a new one."""
    from ..pruner.outdir import check_directory
    from ..pruner.recovery import Recovery, plan_recover
    from ..pruner.recovery import recover as recover_model

    console = Console(output.json)
    recovery = Recovery(**vars(recovering))
    if restart.dry_run:
        check_directory(Path(model), Path(out), restart.resume, restart.overwrite)
        plan = plan_recover(model, parent, out, recovery, working.device)
        amount = f"{recovery.tokens} tokens" if recovery.tokens else duration(60 * plan.minutes)
        console.say(f"plan: {amount} of training on {plan.windows} windows of {plan.length} tokens")
        console.say(
            f"  in {plan.precision}, at most {size(plan.peak_memory_bytes)} of memory and "
            f"{size(plan.disk_bytes)} of the disk here"
        )
        console.document({"verb": "recover", "dry_run": True, "recovery": recovery, "plan": plan})
        return
    try:
        with console.progress("token") as bar:
            result = recover_model(
                model,
                parent,
                out,
                recovery,
                resume=restart.resume,
                overwrite=restart.overwrite,
                device=working.device,
                progress=lambda step: _tell_progress(console, bar, step),
            )
    except KeyboardInterrupt:
        console.tell("next: the same command with --resume goes on from the last saved state")
        raise
    console.say(f"{result.path} is complete: {tables.recovery(result)}")
    console.say(f"next: halfweave eval {out} --against {parent}")
    console.document({"verb": "recover", "recovery": recovery, "result": result})


@verb(app)
def inspect(
    model: ModelDir,
    output: Output,
    verify: Annotated[bool, Flag(help="Check every file against its SHA-256.")] = True,
    layers: Annotated[bool, Flag("--layers", help="List every linear.")] = False,
    card: Annotated[str | None, Flag(help="A GPU, to tell the tiles it would get.")] = None,
) -> None:
    """Show what is in a model directory: formats, errors, sizes, hashes, provenance, kernels."""
    from ..runtime.gpu_choices import gpu_choices
    from ..runtime.inspection import inspect_checkpoint

    console = Console(output.json)
    found = inspect_checkpoint(model, verify)
    tiles = [] if card is None else gpu_choices(found.linears, card)
    for line in tables.inspection(found):
        console.say(line)
    by_name = {row.name: row for row in found.linears}
    if layers:
        console.table(tables.LAYERS_HEADER, tables.layers(found))
    else:
        console.table(tables.LINEARS_HEADER, tables.linears(by_name))
    for line in tables.kernels(found):
        console.say(line)
    if card is not None:
        console.table(tables.TILES_HEADER, tables.tiles(tiles))
        console.say(f"microseconds are what a {card} allows at least; nothing was measured")
    document = {"verb": "inspect", "result": found.to_json()}
    console.document(document if card is None else {**document, "card": card, "tiles": tiles})


@verb(app, "eval")
def evaluate(
    model: ModelDir,
    measuring: Measuring,
    asking: Asking,
    protocol: Protocol,
    loading: Loading,
    output: Output,
) -> None:
    """Measure perplexity, the distance from the dense model, and tasks of the lm-eval harness.

    The text is cut into windows that do not overlap; each predicts all of its tokens but the first.
    Figures are kept in MODEL/measured/eval.json, and in the model card of a pruned model.
    """
    from .quality import measure_quality

    measure_quality(model, measuring, asking, protocol, loading, Console(output.json))


@verb(app)
def report(
    model: ModelDir,
    output: Output,
    beside: Annotated[
        list[str] | None, Flag("--with", metavar="DIR", help="Compare with it; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, Flag("--dry-run", help="Say what would be drawn and stop.")] = False,
) -> None:
    """Draw what was measured of a model: MODEL/report.html, and the charts as PNGs.

    Draws what eval and bench left in MODEL/measured/, measures nothing, and asks no other host.
    Needs matplotlib: pip install 'halfweave[report]'.
    """
    from .quality import draw_report

    draw_report(model, beside or [], dry_run, Console(output.json))


verb(app)(bench)


@verb(app)
def generate(
    model: ModelDir,
    prompt: Annotated[str, Flag("--prompt", "-p", help="Text to continue; - reads stdin.")],
    sampling: Sampling,
    loading: Loading,
    output: Output,
    stop: Annotated[list[str] | None, Flag(help="End before this; may be repeated.")] = None,
) -> None:
    """Continue a text."""
    from .talk import Speaker

    console = Console(output.json)
    text = sys.stdin.read() if prompt == "-" else prompt
    with Speaker(load(model, loading), sampling, tuple(stop or ())) as speaker:
        try:
            ids = speaker.model.tokenizer.encode(text)
            answer = speaker.say(ids, console.write, goes_on=True)
        except KeyboardInterrupt:
            console.say("")  # the text stopped in the middle of a line
            raise
    console.say("")
    console.document({"verb": "generate", "result": answer})


@verb(app)
def chat(model: ModelDir, sampling: Sampling, loading: Loading, output: Output) -> None:
    """Talk to a model in the terminal; Ctrl-C ends an answer, Ctrl-D the talk."""
    from .talk import Speaker, talk

    console = Console(output.json)
    with Speaker(load(model, loading), sampling) as speaker:
        messages = talk(speaker, console)
    console.document({"verb": "chat", "messages": messages})


@verb(app)
def serve(
    models: ModelDirs,
    serving: Serving,
    scheduling: Scheduling,
    scaling: Scaling,
    loading: Loading,
    output: Output,
) -> None:
    """Answer the OpenAI API over HTTP; Ctrl-C lets answers finish, a second one does not."""
    from ..server.serve import serve as answer
    from ..server.settings import ServerSettings
    from .serving import api_keys, engine_settings, offers

    console, offered = Console(output.json), offers(models, serving.name)
    settings = ServerSettings(api_keys=api_keys(serving), drain_s=serving.drain)
    log_to_stderr()
    set_threads(loading.threads)

    def ready(url: str) -> None:
        names = [str(offer.name) for offer in offered]
        for line in tables.serving(url, names, bool(settings.api_keys)):
            console.say(line)
        console.document({"verb": "serve", "url": url, "models": names})

    if scaling.replicas is not None:
        from ..kernels.cpu.cores import granted_cores
        from ..server.ray_replica import Plan
        from ..server.ray_serve import Scale, serve_replicas

        scale = Scale(scaling.replicas, scaling.max_replicas, scaling.ray_address)
        threads = loading.threads or max(1, granted_cores() // scale.most)
        plan = Plan(offered, load_settings(loading), engine_settings(scheduling), settings, threads)
        serve_replicas(plan, scale, serving.host, serving.port, ready)
        return
    answer(
        offered,
        serving.host,
        serving.port,
        loading=load_settings(loading),
        running=engine_settings(scheduling),
        settings=settings,
        on_ready=ready,
    )


@verb(app, "import")
def import_model(
    file: Annotated[
        Path,
        Argument(
            metavar="SOURCE",
            help="GGUF file, or a directory that another tool made 2:4.",
            show_default=False,
        ),
    ],
    out: OutDir,
    output: Output,
    dtype: Annotated[
        str, Flag(help="Of a GGUF file's weights: bfloat16, float16 or float32.")
    ] = "bfloat16",
    dry_run: Annotated[bool, Flag("--dry-run", help="Say what would be written and stop.")] = False,
) -> None:
    """Turn a GGUF file into a dense model, or another tool's 2:4 directory into one of ours."""
    from ..pruner.importers import import_gguf, plan_import

    console = Console(output.json)
    if file.is_dir():
        _import_orphan(file, out, console, dry_run)
        return
    if dry_run:
        plan = plan_import(file, Path(out), dtype)
        console.say(f"plan: {plan.source.parameters} parameters of {file.name} to {dtype} in {out}")
        console.say(f"  {size(plan.output_bytes)} on the disk and of memory")
        console.document({"verb": "import", "dry_run": True, "plan": plan})
        return
    with console.progress("step") as bar:
        result = import_gguf(file, Path(out), dtype, progress=bar.step)
    console.say(f"{result.path}: {result.parameters} parameters, {result.dtype}")
    console.say(fill(result.notice, WIDTH))
    console.say(f"next: halfweave prune {out} OUT")
    console.document({"verb": "import", "result": result, "notice": result.notice})


def _import_orphan(directory: Path, out: str, console: Console, dry_run: bool) -> None:
    from ..pruner.orphans import import_orphan, plan_orphan

    if dry_run:
        plan = plan_orphan(directory, out)
        console.say(
            f"plan: {directory.name}, stored as {plan.layout}, {size(plan.nbytes)}, to {out}"
        )
        console.document({"verb": "import", "dry_run": True, "plan": plan})
        return
    with console.progress("file") as bar:
        result = import_orphan(directory, out, bar.step)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(result.linears.items()))
    console.say(f"{result.path}: {counts} linears, from {result.layout}; {size(result.nbytes)}")
    console.say(f"next: halfweave inspect {out}")
    console.document({"verb": "import", "result": result})


@verb(app, "export")
def export_model(
    model: ModelDir,
    out: OutDir,
    output: Output,
    form: Annotated[str, Flag(help="dense, or compressed-tensors: int4 or int8.")] = "dense",
    dtype: Annotated[str, Flag(help="Of floats: auto, bfloat16, float16 or float32.")] = "auto",
) -> None:
    """Write a pruned model for other tools: dense with zeros, or compressed-tensors int4."""
    from ..pruner.export import export

    console = Console(output.json)
    with console.progress("file") as bar:
        result = export(model, out, form, dtype, bar.step)
    console.say(
        f"{result.path}: {result.packed} linears as codes, {result.dense} dense in {result.dtype}, "
        f"{result.nbytes} bytes"
    )
    console.say(f"next: transformers' AutoModelForCausalLM loads {result.path}")
    console.document({"verb": "export", "result": result})
