"""What requesting samples in advance gains on a slow store: `python -m bench.read_ahead`.

The store is a local folder that answers late: ranges that are requested together come after one
such time, as from an object store. The settings take turns; quote the ratios.
"""

from __future__ import annotations

import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final

import fsspec
import typer
from fsspec.implementations.local import LocalFileSystem

from bench.loader import write_data
from configs.training import DataSource
from train.loader import micro_batches
from train.mixture import Mixture

_PROTOCOL: Final = "late"


class LateStore(LocalFileSystem):
    """A local folder behind `late://`. latency: seconds before ranges of bytes are answered."""

    protocol = _PROTOCOL
    latency = 0.0

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix(f"{_PROTOCOL}://"))

    def cat_ranges(self, *arguments: Any, **options: Any) -> Any:
        time.sleep(self.latency)
        return super().cat_ranges(*arguments, **options)


def main(
    latency: Annotated[float, typer.Option(help="Of a request, milliseconds.")] = 100,
    size: Annotated[int, typer.Option(help="Samples of a micro-batch.")] = 2,
    batches: Annotated[int, typer.Option(help="Micro-batches of a turn.")] = 60,
    rounds: Annotated[int, typer.Option(help="Turns of each setting.")] = 3,
    folder: Annotated[Path, typer.Option(help="For the data, which stay.")] = Path(
        "runs/bench-loader"
    ),
) -> None:
    """Print samples/s for several values of `read_ahead`."""
    data = write_data(folder.resolve(), 512)
    fsspec.register_implementation(_PROTOCOL, LateStore)
    mixture = Mixture([DataSource(path=f"{_PROTOCOL}://{data}")], index_folder=folder / "index")
    order = mixture.order(0)
    LateStore.latency = latency / 1000
    rates: dict[int, list[float]] = {0: [], 2: [], 8: [], 16: []}
    for _ in range(rounds):
        for ahead, measured in rates.items():
            began = time.perf_counter()
            stream = micro_batches(
                lambda positions: mixture.records([order.sample(each) for each in positions]),
                start=0,
                size=size,
                workers=1,
                ahead=ahead,
            )
            with closing(stream):
                for _batch in islice(stream, batches):
                    pass
            measured.append(size * batches / (time.perf_counter() - began))
    print("read_ahead  samples/s   ÷ none")
    for ahead, measured in rates.items():
        rate, none = median(measured), median(rates[0])
        print(f"{ahead:10}  {rate:9.0f}  {rate / none:7.1f}")


if __name__ == "__main__":
    typer.run(main)
