"""Complete runs: resuming, checkpoints, the output folder, and errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError, LockedError, WeightsError
from configs.load import load
from configs.schema import DatasetConfig
from configs.training import ModelConfig, OptimConfig, TrainConfig
from stages.backends.weights import WEIGHTS
from stages.storage.lock import RunLock
from stages.storage.store import Store
from tests.train.conftest import Mixed
from tests.train.helpers import Listener, run, same, small, weights
from train.batches import plan_batches
from train.checkpoints import checkpoints, own_digest
from train.history import read_lines
from train.mixture import open_mixture


@pytest.fixture(scope="module")
def straight(data: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of ten uninterrupted steps."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    assert run(small(data, tiny_base, output)).step == 10
    return output


def test_ten_steps_equal_five_resume_and_five(
    straight: Path, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = small(data, tiny_base, tmp_path / "halves", checkpointing_steps=5)

    def stop(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = run(config, Listener(stop))
    assert (stopped.step, stopped.signal, stopped.adapter) == (6, signal.SIGTERM, None)
    # as if the process was killed after step 6 and step 5 was the last checkpoint
    shutil.rmtree(tmp_path / "halves/checkpoint-000006")
    listener = Listener()
    # the number of workers and the cache make no difference
    resumed = run(replace(config, num_workers=1, keep_samples=0), listener)
    assert "at step 5" in " ".join(listener.messages)
    assert resumed.adapter is not None and same(
        weights(straight / "final"), weights(resumed.adapter)
    )
    histories = [read_lines(each / "losses.jsonl") for each in (straight, tmp_path / "halves")]
    assert [*histories[0]] == [*histories[1]]


def test_only_deterministic_algorithms_are_used_unless_others_are_allowed(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    def use_another(_step: int) -> None:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))

    config = small(data, tiny_base, tmp_path / "run", max_train_steps=1)
    with pytest.raises(ConfigError, match=r"put_ does not have .* Set deterministic=false"):
        run(config, Listener(use_another))
    assert not torch.are_deterministic_algorithms_enabled()
    resumed = run(replace(config, deterministic=False, max_train_steps=2), Listener(use_another))
    assert resumed.step == 2


def test_several_data_sets_with_pairs_resume_to_the_same_weights(
    mixed: Mixed, tiny_base: Path, tmp_path: Path
) -> None:
    config = small(
        mixed.sources,
        tiny_base,
        tmp_path / "straight",
        pair_prob=0.5,
        global_batch_size=4,
        max_train_steps=6,
        checkpointing_steps=3,
    )
    straight, listener = run(config), Listener()
    # as if the process was killed after step 3
    shutil.copytree(tmp_path / "straight/checkpoint-000003", tmp_path / "out/checkpoint-000003")
    config = replace(config, output=str(tmp_path / "out"), num_workers=2, keep_samples=0)
    resumed = run(config, listener)
    assert "at step 3" in " ".join(listener.messages) and straight.adapter and resumed.adapter
    assert same(weights(straight.adapter), weights(resumed.adapter))
    metadata = json.loads((resumed.adapter / "adapter.json").read_text())
    assert metadata["data"] == open_mixture(config).digest
    weights_file = WEIGHTS["w600k_mbf"]  # of the data sets' embed stage
    assert metadata["embedder"] == {"name": "w600k_mbf", "sha256": weights_file.sha256}
    assert [source["weight"] for source in metadata["train"]["data"]] == [3, 1, 2]


def test_ten_steps_change_nearly_all_weights(
    straight: Path, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    first = run(small(data, tiny_base, tmp_path / "one", max_train_steps=1))
    assert first.adapter is not None
    before, after = weights(first.adapter), weights(straight / "final")
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) > 0.95 * len(before)


def test_accumulating_two_batches_is_one_batch_of_two(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    # AdamW amplifies rounding differences of the weights, so the losses of five steps are compared.
    whole = run(
        small(
            data,
            tiny_base,
            tmp_path / "whole",
            max_train_steps=5,
            global_batch_size=4,
            micro_batch_size=4,
        )
    )
    parts = run(small(data, tiny_base, tmp_path / "parts", max_train_steps=5, global_batch_size=4))
    assert parts.summary["samples"] == whole.summary["samples"] == 20
    for one, other in zip(
        *([*read_lines(tmp_path / n / "losses.jsonl")] for n in ("whole", "parts")), strict=True
    ):
        assert one["noise_loss"] == pytest.approx(other["noise_loss"], rel=1e-3)
        assert one["lr"] == other["lr"]


def test_the_output_of_a_run(straight: Path, data: Path, tiny_base: Path) -> None:
    assert (straight / "final/dataset.yaml").read_text() == (data / "config.yaml").read_text()
    assert load(DatasetConfig, straight / "final/dataset.yaml").output == str(data)
    assert load(TrainConfig, straight / "config.yaml") == small(data, tiny_base, straight)
    metadata = json.loads((straight / "final/adapter.json").read_text())
    assert (metadata["step"], metadata["position"], metadata["mode"]) == (10, 20, "corrected")
    assert metadata["train"]["optim"]["learning_rate"] == 1e-3
    assert metadata["base"] == str(tiny_base)
    lines = [*read_lines(straight / "losses.jsonl")]
    assert [line["step"] for line in lines] == list(range(1, 11))
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["finished"] and (summary["steps"], summary["samples"]) == (10, 20)
    assert summary["noise_loss"] == {
        "start": round(lines[0]["noise_loss"], 6),
        "end": round(lines[-1]["noise_loss"], 6),
    }
    state = torch.load(straight / "checkpoint-000010/state.pt", weights_only=True)
    assert (state["step"], state["position"]) == (10, 20)
    assert not [path for path in straight.iterdir() if path.name.startswith(".")]


def test_a_finished_run_does_nothing_and_a_longer_one_continues(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = small(
        data, tiny_base, tmp_path / "out", max_train_steps=2, optim=OptimConfig(lr_warmup_steps=1)
    )
    first, listener = run(config), Listener()
    again = run(config, listener)
    assert "finished: 2 steps" in " ".join(listener.messages)
    assert again.step == 2 and not listener.losses
    assert first.adapter is not None and again.adapter is not None
    assert run(replace(config, max_train_steps=3)).summary["steps"] == 3


def test_old_checkpoints_and_partial_folders_are_removed(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    (output / ".checkpoint-000004.77.partial").mkdir(parents=True)
    (output / "checkpoint-000099").mkdir()  # without a state.pt, so not a checkpoint
    run(
        small(
            data,
            tiny_base,
            output,
            max_train_steps=4,
            checkpointing_steps=1,
            checkpoints_total_limit=2,
        )
    )
    assert [path.name for path in checkpoints(output)] == ["checkpoint-000003", "checkpoint-000004"]
    assert not list(output.glob(".*"))


def test_an_output_with_checkpoints_is_refused_on_request(
    straight: Path, data: Path, tiny_base: Path
) -> None:
    config = small(data, tiny_base, straight, resume_from_checkpoint="")
    with pytest.raises(ConfigError, match="resume_from_checkpoint=latest"):
        run(config)
    with pytest.raises(ConfigError, match=r"no checkpoint there\. .*checkpoint-000010"):
        run(replace(config, resume_from_checkpoint="checkpoint-000007"))


def test_resuming_with_other_settings_is_refused(
    straight: Path, data: Path, tiny_base: Path
) -> None:
    config = small(data, tiny_base, straight, optim=OptimConfig(learning_rate=5e-5))
    with pytest.raises(ConfigError, match=r"optim\.learning_rate=0\.001, now 5e-05"):
        run(config)


def test_the_error_names_a_damaged_state(
    straight: Path, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(straight, tmp_path / "out"))
    (output / "checkpoint-000010/state.pt").write_bytes(b"nonsense")
    config = small(data, tiny_base, output)
    with pytest.raises(WeightsError, match=r"all 1 checkpoints in .* are damaged"):
        run(config)
    with pytest.raises(WeightsError, match=r"damaged: state\.pt is not as it was written"):
        run(replace(config, resume_from_checkpoint="checkpoint-000010"))
    content: dict[str, object] = {"format": 3, "files": {}}
    text = json.dumps({**content, "sha256": own_digest(content)})
    (output / "checkpoint-000010/files.json").write_text(text)
    with pytest.raises(WeightsError, match="has format 3, but this version reads and writes"):
        run(config)


def test_an_older_checkpoint_is_used_where_the_newest_is_damaged(
    straight: Path, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = small(data, tiny_base, tmp_path / "out", checkpointing_steps=5)
    run(config)
    data_file = tmp_path / "out/checkpoint-000010/adapter.safetensors"
    content = bytearray(data_file.read_bytes())
    content[-1] ^= 1
    data_file.write_bytes(content)
    listener = Listener()
    resumed = run(config, listener)
    assert "adapter.safetensors is not as it was written" in listener.messages[0]
    assert "checkpoint-000010 in" in listener.messages[1]  # it will be removed
    assert "at step 5" in listener.messages[2]
    assert resumed.adapter and same(weights(straight / "final"), weights(resumed.adapter))


def test_a_checkpoint_in_another_folder_is_resumed(
    straight: Path, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    elsewhere = str(shutil.copytree(straight / "checkpoint-000010", tmp_path / "saved"))
    config = small(data, tiny_base, tmp_path / "out", resume_from_checkpoint=elsewhere)
    listener = Listener()
    assert run(replace(config, max_train_steps=12), listener).step == 12
    assert "at step 10" in " ".join(listener.messages)


def test_two_runs_do_not_share_an_output(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with RunLock(Store(str(output))), pytest.raises(LockedError, match="Wait until it ends"):
        run(small(data, tiny_base, output))
    assert run(small(data, tiny_base, output, max_train_steps=1)).step == 1
    assert not (output / "run.lock").exists()


def test_no_mixed_precision_is_a_word_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text("mixed_precision: no\n")
    assert load(TrainConfig, tmp_path / "preset.yaml").mixed_precision == "no"
    assert load(TrainConfig, None, ["mixed_precision=no"]).mixed_precision == "no"


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (9, "has 8 samples, fewer than global_batch_size=9"),
        (3, ""),
    ],
)
def test_a_data_set_smaller_than_a_step_is_refused(
    data: Path, tiny_base: Path, tmp_path: Path, size: int, message: str
) -> None:
    config = small(data, tiny_base, tmp_path / "out", global_batch_size=size, max_train_steps=1)
    if message:
        with pytest.raises(ConfigError, match=message):
            run(config)
    else:
        assert run(config).summary["samples"] == size


def test_the_global_batch_is_divided_among_processes() -> None:
    plan = plan_batches(16, 3, 2)
    assert (plan.micro, plan.accumulation) == (2, 4)
    assert str(plan) == "16 samples a step = 2 processes × 4 micro-batches × 2"
    assert str(plan_batches(8, 8, 1)) == "8 samples a step = 1 process × 8"
    with pytest.raises(ConfigError, match=r"among 3 processes\. Start 1, 2, 4, 8 or 16 processes"):
        plan_batches(16, 2, 3)


def test_legacy_mode_trains(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    model = ModelConfig(spec="tiny", base=str(tiny_base), mode="legacy", device="cpu")
    outcome = run(small(data, tiny_base, tmp_path / "out", model=model, max_train_steps=2))
    assert outcome.adapter is not None
    assert json.loads((outcome.adapter / "adapter.json").read_text())["mode"] == "legacy"


def test_tensorboard_gets_the_losses(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(small(data, tiny_base, tmp_path / "out", max_train_steps=4, report_to="tensorboard"))
    events = EventAccumulator(str(tmp_path / "out/logs/train"))
    events.Reload()
    assert [event.step for event in events.Scalars("noise_loss")] == [2, 4]
    assert {"loss", "facial_loss", "lr"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "data=OUT"),
        ({"output": ""}, "output=FOLDER"),
        ({"output": "nowhere://bucket/run"}, "can't be opened"),
        ({"work_folder": "work"}, "for an output at a URL"),
        ({"accept_changes": ("data", "optim.learning_rat")}, "accept_changes=optim.learning_rat:"),
        ({"optim": OptimConfig(lr_scheduler="linaer")}, "expected one of"),
        ({"model": ModelConfig(spec="tiny", device="tpu")}, "auto, cpu, cuda or mps"),
    ],
)
def test_impossible_settings_are_refused(
    data: Path, tiny_base: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(replace(small(data, tiny_base, tmp_path / "out"), **changes))  # type: ignore[arg-type]
