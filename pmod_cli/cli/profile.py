"""``pmod profile``: what p-MoD saves, counted for any checkpoint or config, and measured if asked."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, stderr, stdout
from pmod_cli.output.errors import PmodError

if TYPE_CHECKING:
    from pmod_cli.profiling.profile import Settings
    from pmod_cli.profiling.subject import Subject


class _Choice(str, Enum):
    """An option's values, shown by ``--help``."""


class Counter(_Choice):
    """Who counts."""

    auto = "auto"
    fvcore = "fvcore"
    torch = "torch"
    formula = "formula"
    all = "all"


class Convention(_Choice):
    """What a count includes."""

    full = "full"
    paper = "paper"


class Dtype(_Choice):
    """Type of weights and KV cache."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Logits(_Choice):
    """Where prefill computes logits."""

    all = "all"
    last = "last"


class Knob(_Choice):
    """What to sweep."""

    ratio = "ratio"
    tokens = "tokens"
    batch = "batch"


@app.command(
    "profile",
    epilog=examples(
        "pmod profile llava-1.5-7b",
        "pmod profile --recipe llava-next-7b --convention paper",
        "pmod profile ./pmod-llava-1.5-7b --latency --device cuda --plot profile.png",
        "pmod profile llava-1.5-7b --max-flops-ratio 0.6 --max-kv-ratio 0.6 --json",
    ),
)
def profile_command(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, hub id, config.json, or a name: llava-1.5-7b, llava-next-34b ..."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="How a dense MODEL becomes p-MoD (default: the paper's).")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key.sub=value of the recipe, e.g. mod.floor=0.1.")
    ] = None,
    baseline: Annotated[
        str, typer.Option("--baseline", help="auto (the same model, all layers dense), a model, or none.")
    ] = "auto",
    image_size: Annotated[
        str | None, typer.Option("--image-size", help="WIDTHxHEIGHT; default: what gives most vision tokens.")
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Take the size from this picture.")] = None,
    no_image: Annotated[bool, typer.Option("--no-image", help="A prompt of text only.")] = False,
    text_tokens: Annotated[
        int | None, typer.Option("--text-tokens", min=1, help="Default 35 (30 in the paper's convention).")
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens generated.")] = 64,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples.")] = 1,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Default bfloat16; float32 to measure on a CPU.")
    ] = None,
    logits: Annotated[
        Logits,
        typer.Option("--logits", help="LM head at all prompt positions (forward) or the last (generate)."),
    ] = Logits.all,
    counter: Annotated[
        Counter,
        typer.Option("--counter", help="auto: fvcore if installed; all: fvcore, checked by the others."),
    ] = Counter.auto,
    convention: Annotated[
        Convention, typer.Option("--convention", help="paper: count as the paper's table did.")
    ] = Convention.full,
    latency: Annotated[bool, typer.Option("--latency", help="Measure time and memory too.")] = False,
    device: Annotated[
        str, typer.Option("--device", help="Where to measure: auto, cpu, cuda, cuda:1 ...")
    ] = "auto",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measured runs.")] = 5,
    layers: Annotated[bool, typer.Option("--layers", help="Add a table by layer.")] = False,
    sweep: Annotated[
        Knob | None, typer.Option("--sweep", help="A row for each ratio, length or batch.")
    ] = None,
    schedules: Annotated[bool, typer.Option("--schedules", help="Compare schedules at equal mean.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", help="What changed between two --json files.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw to this .png, .pdf or .svg.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the --plot file.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    max_flops_ratio: Annotated[
        float | None, typer.Option("--max-flops-ratio", help="Exit 1 if prefill FLOPs are above this share.")
    ] = None,
    max_kv_ratio: Annotated[
        float | None, typer.Option("--max-kv-ratio", help="Exit 1 if the KV cache is above this share.")
    ] = None,
    max_prefill_ratio: Annotated[
        float | None, typer.Option("--max-prefill-ratio", help="Exit 1 if prefill time is (with --latency).")
    ] = None,
) -> None:
    """Count what p-MoD saves against its dense baseline; measure it with --latency.

    Counting reads configs only: no weights, no GPU, and for the models known by name no network.
    """
    if compare is not None:
        _compare(*compare, as_json, markdown)
        return
    limits = {
        "max_flops_ratio": max_flops_ratio,
        "max_kv_ratio": max_kv_ratio,
        "max_prefill_ratio": max_prefill_ratio,
    }
    gated = any(limit is not None for limit in limits.values())
    if any(limit is not None and math.isnan(limit) for limit in limits.values()):
        raise PmodError("a --max-... limit is no number: nothing would ever be above it")
    if gated and (sweep is not None or schedules):
        raise PmodError("--max-... limits hold for a single profile", "leave --sweep and --schedules out")
    if max_prefill_ratio is not None and not latency:
        raise PmodError("--max-prefill-ratio needs --latency")
    if plot is not None and schedules:
        raise PmodError("--plot goes with a profile or with --sweep")
    if sweep is not None and schedules:
        raise PmodError("--sweep and --schedules are two tables", "one at a time")
    if plot is not None:
        from pmod_cli.output.plots import check_target

        check_target(plot, force)
    with starting("profile"):
        from pmod_cli.profiling.profile import Settings, profile_subject
        from pmod_cli.profiling.subject import find_subject

    default_dtype = "bfloat16"
    if latency:
        from pmod_cli.devices import find_device

        device = str(find_device(device))
        default_dtype = "float32" if device == "cpu" else default_dtype
    settings = Settings(
        image_size=_image_size(image_size, image),
        with_image=not no_image,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        batch=batch,
        dtype=dtype.value if dtype else default_dtype,
        all_logits=logits is Logits.all,
        convention=convention.value,
        counter=counter.value,
    )
    subject = find_subject(model, recipe=recipe, overrides=overrides or (), baseline=baseline)
    options = {"device": device, "repeats": repeats} if latency else None
    with stderr.status("profiling") as status:
        if sweep is not None or schedules:
            rows = _rows(subject, settings, sweep, options, status.update)
        else:
            result = profile_subject(subject, settings, options, status.update)
    if sweep is not None or schedules:
        _show_rows(rows, sweep, as_json, markdown, plot, model=subject.name)
        return
    from pmod_cli.profiling.explain import notes
    from pmod_cli.profiling.render import profile_grids, profile_markdown
    from pmod_cli.profiling.result import check_gates

    if as_json:
        emit_json("profile", result.to_dict())
    elif markdown:
        stdout.print(profile_markdown(result, layers), markup=False, soft_wrap=True, end="")
    else:
        for grid in profile_grids(result, layers):
            stdout.print(grid.to_rich())
        for note in notes(result):
            stdout.print(f"- {note}", markup=False)
    if plot is not None:
        from pmod_cli.profiling.plots import plot_profile

        plot_profile(result, plot)
    check_gates(result, limits)


def _image_size(size: str | None, image: Path | None) -> tuple[int, int] | None:
    """(height, width), or None for the default."""
    if size is not None:
        from pmod_cli.profiling.prompt import parse_size

        return parse_size(size)
    if image is None:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(image) as picture:
            return picture.height, picture.width
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise PmodError(f"cannot read the picture {image}: {error}") from error


def _rows(subject: Subject, settings: Settings, knob: Knob | None, options: Any, progress: Any) -> Any:
    from pmod_cli.profiling.sweep import compare_schedules, sweep

    if knob is None:
        return compare_schedules(subject, settings, options, progress)
    return sweep(subject, settings, knob.value, options, progress)


def _show_rows(
    rows: list[dict[str, Any]],
    knob: Knob | None,
    as_json: bool,
    markdown: bool,
    plot: Path | None,
    model: str,
) -> None:
    """Print a sweep, or the schedules if there is no knob."""
    from pmod_cli.profiling.render import rows_grid

    what = f"sweep of {knob.value}" if knob else "schedules at equal mean retention"
    if as_json:
        emit_json("profile", {"model": model, "sweep": knob.value if knob else "schedules", "rows": rows})
    else:
        grid = rows_grid(f"{model}: {what}, p-MoD / dense", rows)
        stdout.print(grid.to_markdown() if markdown else grid.to_rich(), markup=False, soft_wrap=markdown)
    if plot is not None and knob is not None:
        from pmod_cli.profiling.plots import plot_sweep

        plot_sweep(rows, knob.value, plot, title=model)


def _compare(before: Path, after: Path, as_json: bool, markdown: bool) -> None:
    from pmod_cli.profiling.compare import compare_files
    from pmod_cli.profiling.render import changes_grid

    found = compare_files(before, after)
    if as_json:
        emit_json("profile", found)
        return
    grid = changes_grid(found)
    stdout.print(grid.to_markdown() if markdown else grid.to_rich(), markup=False, soft_wrap=markdown)
