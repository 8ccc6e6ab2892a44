"""Rates of the device; training on the GPU against the CPU; speed of training and portraits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Final

from bench.gpu.common import DETAILS, MissingError, Setting, Values, need, need_weights, people
from bench.watcher import Watcher

# ‖GPU − CPU‖ / ‖CPU‖, where the CPU computes in float32. TF32 is off.
TOLERANCES: Final = {"no": 1e-3, "fp16": 2e-2, "bf16": 6e-2}
_LOSS: Final = {"no": 1e-3, "fp16": 2e-2, "bf16": 2e-2}  # relative, of the mean loss of all steps
_NEEDED_GB: Final = {32: 60, 16: 36, 8: 22, 4: 15}  # of samples in a step, at 512 pixels
_SCALE: Final = 1024  # of the loss, since fp16 has no smaller gradients than 6e-8
_SAVED, _STEPS = 3, 6  # the step that training is resumed from, and the last one


def device(setting: Setting) -> Values:
    """The rates that the other times can be compared with."""
    import torch

    from bench.timing import median_seconds

    on_gpu = setting.device == "cuda"
    side = 256 if setting.tiny else 8192
    dtype = torch.bfloat16 if on_gpu else torch.float32
    one, other = (torch.randn(side, side, device=setting.device, dtype=dtype) for _ in range(2))
    product = median_seconds(lambda: one @ other, setting.device)
    source = torch.randn(8 * side, side, device=setting.device, dtype=dtype)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), setting.device)
    values: Values = {
        "torch": torch.__version__,
        "product_tflops": round(2 * side**3 / product / 1e12, 1),
        "copy_gb_per_s": round(2 * source.nbytes / copy / 1e9),
    }
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        values |= {
            "name": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return values


def step(setting: Setting) -> Values:
    """A training step of the small model: its losses and gradients, in each precision; and the
    average of the weights.
    """
    import torch

    expected = _step(setting, "cpu", "no")
    values: Values = {}
    for precision, most in TOLERANCES.items():
        if setting.device == "cpu" and precision == "fp16":
            continue  # operations on CPUs lack it
        measured = _step(setting, setting.device, precision)
        errors = {
            name: float(torch.dist(measured[name], value) / value.norm())
            for name, value in expected.items()
        }
        values[precision] = {name: float(f"{error:.2g}") for name, error in errors.items()}
        wrong = [name for name, error in errors.items() if not error <= most]
        text = f"{precision}: {', '.join(wrong)} differ by more than {most} from the CPU's"
        need(not wrong, text, values)
    values["average_on_cpu_equal"] = _average_on_cpu_equal(setting.device)
    need(values["average_on_cpu_equal"], "ema.on_cpu gives other averages", values)
    return values


def _average_on_cpu_equal(device: str) -> bool:
    """Whether an average that is on the CPU between the steps equals one on the device."""
    import torch

    from configs.training import EmaConfig
    from train.average import Average

    weight = torch.nn.Parameter(torch.arange(1024.0, device=device))
    on_cpu, on_device = (
        Average(EmaConfig(decay=0.9, on_cpu=each), {"weight": weight}) for each in (True, False)
    )
    equal = True
    for _ in range(_STEPS):
        weight.data.mul_(1.1)
        for average in (on_cpu, on_device):
            average.step()
        stored, expected = on_cpu.weights()["weight"], on_device.weights()["weight"]
        equal &= stored.device.type == "cpu" and torch.equal(stored, expected.cpu())
    with on_cpu.applied():
        return equal and torch.equal(weight, expected)


@cache
def _step(setting: Setting, device: str, precision: str) -> dict[str, Any]:
    """Returns the losses and the gradients of a micro-batch, float32 on the CPU."""
    import torch

    from train.data import unpacked
    from train.step import step_losses
    from train.trainer import Trainer

    forget_precision()
    output = setting.folder / "step"
    shutil.rmtree(output, ignore_errors=True)
    config = _small(setting, output, device, mixed_precision=precision)
    with ExitStack() as stack:
        trainer = Trainer(config, Watcher(), stack)
        batches = trainer._batches()
        batch = unpacked(next(batches), trainer.preparation, trainer.device)
        batches.close()
        losses = step_losses(trainer.model, trainer.frozen, batch, config.loss, mask=True)
        (losses.total * _SCALE).backward()
        gradients = [
            parameter.grad.flatten().float().cpu() / _SCALE
            for parameter in trainer.trained.adapter.parameters()
            if parameter.grad is not None
        ]
    return {"losses": losses.values.float().cpu(), "gradients": torch.cat(gradients)}


def forget_precision() -> None:
    """Lets accelerate take another precision: it allows one in a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def training(setting: Setting) -> Values:
    """Training in each precision: the same bytes after a resume, and the CPU's losses."""
    values: Values = {}
    expected = _train(setting, "cpu", "no", "cpu")[1]
    for precision in TOLERANCES:
        if setting.device == "cpu" and precision == "fp16":
            continue
        whole, loss = _train(setting, setting.device, precision, precision)
        resumed, _ = _train(
            setting,
            setting.device,
            precision,
            f"{precision}-resumed",
            str(whole.parent / f"checkpoint-{_SAVED:06d}"),
        )
        files = [folder.joinpath("adapter.safetensors").read_bytes() for folder in (whole, resumed)]
        error = abs(loss - expected) / expected
        values[precision] = {
            "loss": round(loss, 6),
            "of_cpu": float(f"{error:.2g}"),
            "resumed_equal": files[0] == files[1],
        }
        need(files[0] == files[1], f"{precision}: a resumed run has other weights", values)
        text = f"{precision}: the loss differs by more than {_LOSS[precision]} from the CPU's"
        need(error <= _LOSS[precision], text, values)
    return values


def _train(
    setting: Setting, device: str, precision: str, name: str, checkpoint: str = "latest"
) -> tuple[Path, float]:
    """Returns the folder of the trained adapter, and the mean loss of the steps taken."""
    from train.trainer import train

    forget_precision()
    output = setting.folder / "training" / name
    shutil.rmtree(output, ignore_errors=True)
    watcher = Watcher()
    config = _small(
        setting,
        output,
        device,
        mixed_precision=precision,
        max_train_steps=_STEPS,
        checkpointing_steps=_SAVED,
        log_every=1,
        resume_from_checkpoint=checkpoint,
    )
    train(config, watcher)
    return output / "final", sum(watcher.losses) / len(watcher.losses)


def train_speed(setting: Setting) -> Values:
    """bench.train: Stable Diffusion 1.5 at full size, 512 × 512, bf16."""
    from bench.train import compare

    if setting.tiny:
        forget_precision()
        return _speeds(compare(_small(setting, setting.folder / "speed", setting.device), 2))
    samples = _samples_that_fit()
    command = [sys.executable, "-m", "bench.train", "--steps", "5", "split=all"]
    command += ["--random-base", str(setting.folder / "sd15/base")]
    command += [f"data={people(setting)}", f"micro_batch_size={samples}"]
    command += [f"global_batch_size={samples}"]
    command += ["gradient_checkpointing=false", "channels_last=true", "num_workers=2"]
    command += ["model.device=cuda"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return _speeds(json.loads(done.stdout))


def _samples_that_fit() -> int:
    """Returns how many samples a step can have, with the models of four kinds of steps beside each
    other. Raises MissingError for a GPU with too little memory.
    """
    import torch

    free = torch.cuda.mem_get_info()[0] / 1e9
    for samples, needed in _NEEDED_GB.items():
        if free >= needed:
            return samples
    raise MissingError(f"{min(_NEEDED_GB.values())} GB of GPU memory; {free:.1f} GB are free")


def _speeds(measured: Values) -> Values:
    from bench.train import KINDS

    shown = ("samples_per_s", "speed_of_bare", "wait_ms", "gpu_gb")
    values: Values = {
        kind: {name: measured[kind][name] for name in shown if name in measured[kind]}
        for kind in KINDS
    }
    utilisation = measured.get("model_flops_utilisation")
    values["samples_a_step"] = measured["samples_a_step"]
    return {**values, **({"utilisation": utilisation} if utilisation else {}), DETAILS: measured}


def inference_speed(setting: Setting) -> Values:
    """bench.inference: Stable Diffusion 1.5 at full size, 50 steps, fp16."""
    command = [sys.executable, "-m", "bench.inference", "--device", setting.device, "--no-photo"]
    sizes = ["--model", "tiny", "--steps", "2"] if setting.tiny else []
    folder = setting.folder / ("tiny" if setting.tiny else "sd15")
    command += [*sizes, "--turns", "1", "--images", "1", "--base", str(folder)]
    if setting.tiny:
        need_weights("clip_bpe")
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    values: Values = {
        order: {"warm_s": each["warm"]["total"], "batch_s": each["batch"], **each["peaks"]}
        for order, each in measured["orders"].items()
    }
    values |= {"difference": measured["difference"], DETAILS: measured}
    most = 0.05
    need(values["difference"] <= most, f"the orders' images differ by more than {most}", values)
    return values


def _small(setting: Setting, output: Path, device: str, **changes: Any) -> Any:
    """Returns settings of a short training of the small model."""
    from configs.training import DataSource, ModelConfig, TrainConfig

    values: Values = {
        "data": (DataSource(path=str(people(setting))),),
        "split": "all",
        "output": str(output),
        "model": ModelConfig(spec="small", device=device),
        "resolution": 64,
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "num_workers": 0,
        "report_to": "none",
    }
    return TrainConfig(**{**values, **changes})
