"""Placement of workers: they leave room for read and write tasks; too small clusters are errors."""

from __future__ import annotations

import pytest

from bench.chains import Caption, Detect, Parse, Resize, SleepConfig
from configs.common import PlacementConfig
from configs.errors import ConfigError
from configs.load import load
from configs.schema import DatasetConfig
from stages.base import Stage
from stages.chain import build_stages
from stages.executors.placement import Resources, plan_groups


def chain(*needs: tuple[float, float]) -> list[Stage]:
    """Stages with these CPUs and GPUs, in order."""
    kinds = (Resize, Detect, Parse, Caption)
    return [
        kind(SleepConfig(0.0, PlacementConfig(cpus=cpus, gpus=gpus)))
        for kind, (cpus, gpus) in zip(kinds, needs, strict=False)
    ]


def test_workers_leave_room_for_tasks_and_missing_gpus_are_an_error() -> None:
    stages = build_stages(DatasetConfig())
    for cpus in (1, 2, 4, 64):
        groups = plan_groups(stages, [Resources(cpus, 0)])
        assert [group.names for group in groups] == [tuple(stage.name for stage in stages)]
        assert sum(group.cpus * group.workers for group in groups) <= cpus - 0.5
    assert plan_groups(stages, [Resources(2, 0)])[0].workers == 2
    assert plan_groups(stages, [Resources(2, 0)] * 40)[0].workers == 80, "none across two nodes"
    assert plan_groups(stages, [Resources(2, 0)] * 40, shards=3)[0].workers == 3
    gpu = build_stages(load(DatasetConfig, "configs/dataset/fgid.yaml", []))
    with pytest.raises(ConfigError, match="GPUs"):
        plan_groups(gpu, [Resources(8, 0)])
    groups = plan_groups(gpu, [Resources(16, 2)] * 2)
    assert [group.names for group in groups] == [
        ("resize",),
        ("detect", "parse", "embed"),
        ("caption",),
    ]
    assert sum(group.gpus * group.workers for group in groups) <= 4


def test_groups_are_consecutive_stages_with_equal_resources() -> None:
    groups = plan_groups(chain((1, 0), (1, 0), (1, 0.5), (1, 0)), [Resources(3.5, 1)])
    assert [(group.first, group.last, group.names) for group in groups] == [
        (0, 2, ("resize", "detect")),
        (2, 3, ("parse",)),
        (3, 4, ("caption",)),
    ]
    assert [(group.cpus, group.gpus, group.workers) for group in groups] == [
        (1, 0, 1),
        (1, 0.5, 1),
        (1, 0, 1),
    ]


def test_the_scarcer_of_cpus_and_gpus_limits_the_workers() -> None:
    stages = chain((0.5, 0), (0.5, 0.25))
    assert plan_groups(stages, [Resources(8.5, 1)])[0].workers == 4
    assert plan_groups(stages, [Resources(2.5, 1)])[0].workers == 2
    assert plan_groups(stages, [Resources(8.5, 1), Resources(8.5, 0)])[0].workers == 4


def test_a_setting_lowers_the_number_of_workers_and_never_raises_it() -> None:
    stages = chain((1, 0))
    nodes = [Resources(4.5, 0)]
    assert [plan_groups(stages, nodes, workers)[0].workers for workers in (0, 3, 9)] == [4, 3, 4]


def test_workers_get_fewer_cpus_if_no_node_has_room_for_a_whole_chain() -> None:
    groups = plan_groups(chain((2, 0), (2, 0.5)), [Resources(1, 1), Resources(1, 0)])
    assert [(group.cpus, group.gpus, group.workers) for group in groups] == [
        (0.75, 0, 1),
        (0.75, 0.5, 1),
    ]


def test_a_cluster_without_room_for_workers_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"has 0\.5 CPUs, expected more than 0\.5"):
        plan_groups(chain((1, 0)), [Resources(0.5, 0)])
    with pytest.raises(ConfigError, match=r"0\.75 GPUs \(detect: 0\.25, parse: 0\.5\).* has 0\.5"):
        plan_groups(chain((1, 0), (1, 0.25), (1, 0.5)), [Resources(9, 0.5)])
