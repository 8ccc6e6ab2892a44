"""The command line of the data set pipeline: `python -m pipelines.cli`.

Commands import large libraries only when they run, so that --help is fast.
"""

from pipelines.cli import create, datasets, removal, servers
from pipelines.cli.common import app

__all__ = ["app", "create", "datasets", "removal", "servers"]
