"""Command `caption-servers`: model servers on a Ray cluster, beside the pipeline."""

from __future__ import annotations

from itertools import takewhile
from typing import Annotated, Literal

import typer

from pipelines.cli.common import app, errors, log


@app.command(name="caption-servers")
def caption_servers(
    model: Annotated[str, typer.Option(help="A hub id or a folder.")],
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of all servers together.")] = 0,
    servers: Annotated[
        int, typer.Option(min=0, help="Number of servers; 0: one for each GPU, or one.")
    ] = 0,
    cpus_each: Annotated[
        float, typer.Option(min=0.01, help="CPUs that Ray reserves for each server.")
    ] = 1.0,
    engine: Annotated[
        Literal["vllm", "transformers"],
        typer.Option(help="transformers needs neither vLLM nor a GPU, and is slow."),
    ] = "vllm",
    program: Annotated[
        str, typer.Option(help="Path of the engine's program on the nodes, such as VENV/bin/vllm.")
    ] = "",
    server_args: Annotated[
        str, typer.Option(help='More arguments of the servers: "--max-model-len 4096 …".')
    ] = "",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of the first server; 0: free ones.")
    ] = 0,
    logs: Annotated[str, typer.Option(help="A folder for the logs, on each node.")] = "",
    start_limit: Annotated[
        float, typer.Option(min=1, help="Seconds until a server must be ready.")
    ] = 1800.0,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ray.KEY=VALUE]... [-- COMMAND...]",
            help="A command that runs when the servers are ready; {base_url} and {model} in it are "
            "replaced. When it ends, the servers are stopped.",
        ),
    ] = None,
) -> None:
    """Start servers for caption.backend=openai as Ray actors, and start again those that fail.

    Prints the settings to give to `run`. Ends with Ctrl-C, SIGTERM or COMMAND, and stops the
    servers.

    Example: python -m pipelines.cli caption-servers --model llava-hf/llava-1.5-7b-hf --gpus 2
    """
    with errors():
        from configs.load import load
        from pipelines.caption_servers import CaptionServers, RaySettings, run_caption_servers

        log()
        overrides = list(takewhile(lambda argument: "=" in argument, arguments or []))
        command = (arguments or [])[len(overrides) :]
        settings = CaptionServers(
            model=model,
            gpus=gpus,
            servers=servers,
            cpus_each=cpus_each,
            engine=engine,
            program=program,
            server_args=server_args,
            port=port,
            logs=logs,
            start_limit=start_limit,
            ray=load(RaySettings, None, overrides).ray,
        )
        status = run_caption_servers(settings, command, typer.echo)
    raise typer.Exit(status)
