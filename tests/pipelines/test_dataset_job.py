"""DatasetJob: executors run its chain, which processes rebuild from a reference."""

from __future__ import annotations

import pickle
from pathlib import Path

from bench.chains import resizing
from pipelines.chain import build_chain
from pipelines.dataset_job import DatasetJob, chain_reference
from pipelines.run import execute, plan_job
from pipelines.sources import build_source
from stages.executors.isolate import Child
from stages.storage.commit import ChainInfo
from tests.pipelines.helpers import config


def test_a_run_with_another_chain_records_that_chains_signatures(
    portraits: Path, tmp_path: Path
) -> None:
    job = plan_job(config(portraits, tmp_path), chain=resizing)
    manifests = list(execute(job, lambda count: None))
    assert [manifest.written for manifest in manifests] == [4, 4]
    assert all(
        set(manifest.run.stage_seconds) == {"source", "resize", "fill"} for manifest in manifests
    )
    assert all(
        manifest.signatures == tuple(stage.signature() for stage in resizing(job.config))
        for manifest in manifests
    )
    assert plan_job(job.config, chain=resizing).tasks == []
    assert len(plan_job(job.config).tasks) == 2, "no shard is made with the default chain"


def test_a_rebuilt_chain_has_the_signatures_of_the_configuration(tmp_path: Path) -> None:
    settings = config("photos", tmp_path, "resize.size=256", "rules.min_sharpness=0.25")
    info = ChainInfo.of(build_chain(settings))
    job = DatasetJob(config=settings, chain=chain_reference(settings, build_chain), info=info)
    unpickled: DatasetJob = pickle.loads(pickle.dumps(job))
    assert unpickled == job
    rebuilt = [stage.signature() for stage in unpickled.chain.build()]
    assert rebuilt == [stage.signature() for stage in build_chain(settings)]


def test_a_child_process_builds_the_chain_of_its_reference(portraits: Path, tmp_path: Path) -> None:
    job = plan_job(config(portraits, tmp_path), chain=resizing)
    record = build_source(job.config).record(job.plan.inputs_of(0)[0])
    names = ["resize", "fill"]
    with Child(chain_reference(job.config, resizing), names, 1, stuck_after=600.0) as child:
        finished = child.run(record, frozenset(names))
    assert finished.identity is not None and (finished.width, finished.height) == (512, 512)
