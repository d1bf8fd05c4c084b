"""``pmod serve``: a checkpoint behind an OpenAI-style address."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson, CacheKind, Device, Dtype, Kernels
from pmod_cli.extras import require, starting
from pmod_cli.output.console import emit_json, show_lines


@app.command(
    "serve",
    epilog=examples(
        "pmod serve ./pmod-llava-1.5-7b",
        "pmod serve ./pmod-llava-1.5-7b --port 9000 --images /data/pictures --cache static",
    ),
)
def serve_command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, dense or p-MoD.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8000,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 lets all in, without a password.")
    ] = "127.0.0.1",
    images: Annotated[
        str | None,
        typer.Option("--images", help="Folder from which requests may name files (default: none)."),
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Fetch pictures from URLs that requests name.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    kernels: Kernels = "auto",
    cache: CacheKind = "dynamic",
    as_json: AsJson = False,
) -> None:
    """Answer OpenAI-style chat requests, with transformers' server, until Ctrl-C."""
    for package in ("fastapi", "uvicorn", "openai"):
        require(package)
    with starting("serve"):
        from pmod_cli.checkpoints.load import check_source
        from pmod_cli.generation import VisionLanguageModel
        from pmod_cli.output.errors import PmodError
        from pmod_cli.serving.pictures import PictureSources
        from pmod_cli.serving.server import bind, make_app, make_server

    check_source(model)
    folder = Path(images) if images else None  # "" is no folder, though Path("") is the working one
    if images is not None and (folder is None or not folder.is_dir()):
        raise PmodError(f"no folder {images!r}", "--images takes a folder")
    with bind(host, port) as address:
        loaded = VisionLanguageModel.load(model, dtype=dtype, device=device, kernels=kernels, cache=cache)
        name = Path(model).resolve().name if Path(model).is_dir() else model
        server = make_server(make_app(loaded, name, PictureSources(folder, fetch), host))
        address.listen()
        where = f"[{host}]" if ":" in host else host
        url = f"http://{where}:{address.getsockname()[1]}/v1"
        if as_json:
            emit_json("serve", {"url": url, "model": name, "device": str(loaded.device)})
        else:
            show_lines(url)
        server.run(sockets=[address])
