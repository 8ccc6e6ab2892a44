from pathlib import Path

import pytest

from pipelines.run import run
from tests.pipelines.helpers import config, digests


@pytest.fixture(scope="module")
def undisturbed(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of a data set of the portraits, made inline in four shards."""
    output = tmp_path_factory.mktemp("undisturbed")
    run(config(portraits, output, "shard_size=2"))
    return digests(output)
