"""`python -m infer.evaluation`: measures an adapter on people whom it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infer.cli import quieten_libraries, user_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

_HELP = """Measure an adapter on people of the validation split, and write the results as JSON.

[bold]key=value[/] overrides the YAML; configs/evaluation.py (EvaluationConfig) lists every setting.
docs/evaluation.md says what each measure is. The same command continues where it was stopped.

[bold]Example[/]

  python -m infer.evaluation run -c configs/evaluation/small.yaml data=OUT output=results.json \\
      portraits.adapter=runs/mine/final
"""


@app.callback()
def main() -> None:
    """Measures of an adapter."""


@app.command(help=_HELP)
def run(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", metavar="FILE", help="A YAML preset.")
    ] = None,
) -> None:
    with user_errors():
        from configs.evaluation import EvaluationConfig
        from configs.load import load

        settings = load(EvaluationConfig, config, overrides or ())
        quieten_libraries()
        from infer.evaluation.evaluate import evaluate

        evaluate(settings, lambda line: typer.echo(line, err=True))
        typer.echo(f"measures in {settings.output}")


@app.command()
def prove(
    folder: Annotated[Path, typer.Argument(help="With results/NAME.json of several adapters.")],
) -> None:
    """Decide the claims that docs/evaluation.md lists, by the results of several adapters.

    Writes FOLDER/proof.json and FOLDER/index.html. Exit status: 0 if all claims hold, else 1.
    """
    with user_errors():
        from infer.evaluation.page import write_proof

        wrong = write_proof(folder)
        for name in wrong:
            typer.echo(f"does not hold: {name}", err=True)
        typer.echo(f"claims in {folder / 'index.html'}")
        if wrong:
            raise typer.Exit(1)


if __name__ == "__main__":
    app()
