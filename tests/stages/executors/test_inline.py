"""The inline executor: order, progress, times, and only the stages that a record needs."""

from __future__ import annotations

from stages.executors.inline import run_inline
from tests.stages.executors.toy import ToyJob, ToyTask, expected_texts


def test_results_progress_and_times_of_a_job() -> None:
    tasks = [ToyTask(3, 20), ToyTask(1, 1)]
    advanced: list[int] = []
    results = list(run_inline(ToyJob(), tasks, advanced.append))
    assert [(result.index, result.texts) for result in results] == [
        (task.index, expected_texts(task)) for task in tasks
    ]
    assert sum(advanced) == 21 and len(advanced) > 2, "progress is reported within a shard too"
    for result in results:
        assert set(result.run.seconds) == {"source", "coarse", "fine"}
        assert (result.run.executor, result.run.attempt) == ("inline", 1)


def test_a_result_is_yielded_before_the_next_task_begins() -> None:
    advanced: list[int] = []
    results = run_inline(ToyJob(), [ToyTask(0, 2), ToyTask(1, 2)], advanced.append)
    assert next(results).index == 0 and sum(advanced) == 2
