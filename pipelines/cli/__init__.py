"""`python -m pipelines.cli`: photographs → FGID shards and a report.

Heavy imports wait until a command needs them: --help answers at once.
"""

from pipelines.cli import create, datasets
from pipelines.cli.common import app

__all__ = ["app", "create", "datasets"]
