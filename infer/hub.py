"""`python -m infer.hub`: a folder from which diffusers loads the modular pipeline.

Large libraries are imported inside functions, so that --help answers at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from configs.errors import ConfigError, PipelineError, user_message
from model.spec import SPECS

# The parts of an SDXL base; each is in a folder of its name.
_PARTS: Final = (
    *("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "unet", "scheduler"),
)
_CONFIG: Final = "modular_config.json"
_INDEX: Final = "modular_model_index.json"
_CODE: Final = "block.py"
_BLOCKS: Final = "ConsistentIDXLBlocks"

# Without importlib, diffusers would advise `pip install infer`, which isn't the package's name.
_BLOCK: Final = f'''"""ConsistentID's blocks, which are in the package consistentid-pipeline."""

import importlib

try:
    {_BLOCKS} = importlib.import_module("infer.modular").{_BLOCKS}
except ModuleNotFoundError as error:
    raise ImportError(
        f"{{error}}: this pipeline needs the package consistentid-pipeline in this environment. It "
        "is not on PyPI; install it from its repository: pip install PATH_OF_THE_CLONE"
    ) from error
'''
_README: Final = """---
library_name: diffusers
tags: [modular-diffusers, text-to-image]
base_model: {base}
---
# ConsistentID for SDXL, as a modular pipeline

Pictures of a person from one photograph. This folder holds no weights, and of the code only an
import: **the package consistentid-pipeline must be installed**. It is not on PyPI; install it from
a clone of its repository (`pip install PATH_OF_THE_CLONE`).

```python
import torch
from diffusers import ModularPipeline
from infer.modular import load_consistentid_adapter

pipe = ModularPipeline.from_pretrained("{folder}", trust_remote_code=True)
pipe.load_components(dtype=torch.float16)
pipe.to("cuda")
load_consistentid_adapter(pipe, "JackAILab/ConsistentID", weight_name="ConsistentID_SDXL-v1.bin")
image = pipe(prompt="a woman reading", input_id_images="ada.jpg", output="images")[0]
image.save("ada-reading.png")
```

- `pipe.consistentid.set_scale(0.8)` sets the weight of the person, `{{"eyes": 1.2}}` of a part.
- `pipe.update_components(guider=pipe.guider.new(guidance_scale=5.0))` sets the guidance.
- Further inputs: `identity`, `start_merge_step`, `face_caption`, `describe_moment`.
- `image`, `mask_image` and `control_image` have the effect that they have in diffusers' blocks.
"""


def write_folder(folder: Path, base: str = "") -> Path:
    """Writes a folder in the Hub's layout, and returns it.

    `diffusers.ModularPipeline.from_pretrained(folder, trust_remote_code=True)` loads it without a
    network, and `load_components` the base from its own place. base: an SDXL model, a hub id or a
    folder in diffusers' layout; "": the one that the published weights were trained with. Raises
    ConfigError if the folder holds something else, or if the base isn't an SDXL model.
    """
    from diffusers import __version__

    from infer.modular import ConsistentIDXLBlocks

    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder to write")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _CONFIG).is_file():
        raise ConfigError(f"{folder} is not empty and holds no modular pipeline; name another")
    name = base or SPECS["sdxl"].base
    blocks = ConsistentIDXLBlocks()
    index = _index(blocks, name)
    config = {
        "_class_name": _BLOCKS,
        "_diffusers_version": __version__,
        "auto_map": {"ModularPipelineBlocks": f"{Path(_CODE).stem}.{_BLOCKS}"},
        "requirements": blocks._requirements,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in ((_INDEX, index), (_CONFIG, config)):
        (folder / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    (folder / _CODE).write_text(_BLOCK)
    (folder / "README.md").write_text(_README.format(base=name, folder=folder))
    return folder


def _index(blocks: Any, base: str) -> dict[str, Any]:
    """Returns the content of modular_model_index.json: where each part of the base is."""
    local = Path(base).expanduser().resolve()
    if not local.is_dir() and (Path(base).is_absolute() or base.count("/") != 1):
        raise ConfigError(f"base {base}: no such folder; expected an SDXL model, or its hub id")
    if local.is_dir() and not all((local / part).is_dir() for part in _PARTS):
        lacking = [part for part in _PARTS if not (local / part).is_dir()]
        raise ConfigError(
            f"base {base} has no {', '.join(lacking)}; expected the folder of an SDXL model in "
            "diffusers' layout"
        )
    pipe = blocks.init_pipeline(str(local) if local.is_dir() else None)
    index: dict[str, Any] = json.loads(pipe.to_json_string())
    if not local.is_dir():  # not looked up, so that this needs no network
        for part in _PARTS:
            index[part][2] |= {"pretrained_model_name_or_path": base, "subfolder": part}
    return {name: value for name, value in index.items() if not _is_nowhere(value)}


def _is_nowhere(entry: Any) -> bool:
    """Returns whether an entry of the index is a part that isn't in the base."""
    return isinstance(entry, list) and not entry[2]["pretrained_model_name_or_path"]


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write.")],
    base: Annotated[
        str, typer.Option(help="An SDXL model: a hub id, or a folder in diffusers' layout.")
    ] = SPECS["sdxl"].base,
) -> None:
    """Write a folder from which `ModularPipeline.from_pretrained(FOLDER, trust_remote_code=True)`
    loads ConsistentID for SDXL. It holds no weights; its README.md shows how it is used.
    """
    try:
        write_folder(folder, base)
    except (PipelineError, OSError) as error:
        if (message := user_message(error)) is None:
            raise
        typer.secho(f"error: {message}", fg="red", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{folder}: the modular pipeline over {base}")


if __name__ == "__main__":
    app()
