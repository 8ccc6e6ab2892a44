"""The checks of `bench.gpu_check`, each a function that returns what it measured.

A check raises `MissingError` if it can't run here, and `ToleranceError` if a value is outside its
tolerance.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from bench.watcher import Watcher

Values = dict[str, Any]
DETAILS: Final = "details"  # of values, which are in the JSON file only
# ‖GPU − CPU‖ / ‖CPU‖, where the CPU computes in float32. TF32 is off.
TOLERANCES: Final = {"no": 1e-3, "fp16": 2e-2, "bf16": 6e-2}
_LABELS: Final = 0.999  # share of a label map's pixels that are equal
_COSINE: Final = 0.999  # of two embeddings of a face
_BOX: Final = 0.5  # pixels between two boxes of a face
_LOSS: Final = {"no": 1e-3, "fp16": 2e-2, "bf16": 2e-2}  # relative, of the mean loss of all steps
_SCALE: Final = 1024  # of the loss, since fp16 has no smaller gradients than 6e-8
_SAVED, _STEPS = 3, 6  # the step that training is resumed from, and the last one


class MissingError(Exception):
    """What this machine lacks for a check, and how to get it."""


class ToleranceError(Exception):
    """A value outside its tolerance. values: all that were measured."""

    def __init__(self, text: str, values: Values) -> None:
        super().__init__(text)
        self.values = values


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """device: cuda, or cpu to try the checks themselves. tiny: small sizes, which take seconds on a
    CPU. folder: for data, models and outputs.
    """

    device: str
    tiny: bool
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """packages: modules that it imports. seconds: after which it is stopped."""

    run: Callable[[Setting], Values]
    packages: tuple[str, ...]
    seconds: int = 120


def need(condition: bool, text: str, values: Values) -> None:
    if not condition:
        raise ToleranceError(text, values)


def device(setting: Setting) -> Values:
    """The rates that the other times can be compared with."""
    import torch

    from bench.timing import median_seconds

    on_gpu = setting.device == "cuda"
    side = 256 if setting.tiny else 8192
    dtype = torch.bfloat16 if on_gpu else torch.float32
    one, other = (torch.randn(side, side, device=setting.device, dtype=dtype) for _ in range(2))
    product = median_seconds(lambda: one @ other, setting.device)
    source = torch.randn(64 * side, side, device=setting.device, dtype=dtype)
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


def parse(setting: Setting) -> Values:
    """BiSeNet: label maps of the same pictures."""
    import numpy as np
    import torch

    from bench.pictures import pictures
    from bench.timing import median_seconds
    from configs.schema import ParseConfig
    from stages.backends.bisenet import CLASSES, BiSeNetParser, bisenet
    from stages.backends.weights import Weights
    from stages.codec import decode_jpeg

    class Drawn(Weights):
        """A file of random weights, where the real ones aren't in the cache."""

        def fetch(self, name: str) -> Path:
            path = setting.folder / f"{name}.pth"
            torch.manual_seed(0)
            torch.save(bisenet(CLASSES).state_dict(), path)
            return path

    name = ParseConfig().weights
    real = Weights().has(name)
    weights = Weights() if real else Drawn()
    images = [decode_jpeg(record.image) for record in pictures(2 if setting.tiny else 8)]
    config = ParseConfig(size=64 if setting.tiny else 512)
    on_cpu = BiSeNetParser(replace(config, device="cpu"), weights).parse(images)
    parser = BiSeNetParser(replace(config, device=setting.device), weights)
    equal = float(np.mean([a == b for a, b in zip(on_cpu, parser.parse(images), strict=True)]))
    seconds = median_seconds(lambda: parser.parse(images), setting.device)
    values: Values = {
        "weights": "real" if real else f"random, since {name} isn't in the cache",
        "equal_labels": round(equal, 6),
        "images_per_s": round(len(images) / seconds, 1),
    }
    need(equal >= _LABELS, f"equal labels {equal:.4f}: expected at least {_LABELS}", values)
    return values


def faces(setting: Setting) -> Values:
    """SCRFD and ArcFace: boxes and embeddings of the same pictures, CUDA against CPU."""
    import numpy as np

    from bench.pictures import pictures
    from bench.timing import median_seconds
    from configs.errors import ConfigError
    from configs.schema import DatasetConfig
    from stages.backends.arcface import ArcFace
    from stages.backends.runtime import onnx_device
    from stages.backends.scrfd import Scrfd
    from stages.backends.weights import Weights
    from stages.codec import decode_jpeg

    config, weights = DatasetConfig(), Weights()
    try:
        onnx_device(setting.device)
    except ConfigError as error:
        raise MissingError(str(error)) from error
    need_weights(config.detect.weights, config.embed.weights)
    images = [decode_jpeg(record.image) for record in pictures(1 if setting.tiny else 8)]

    def models(device: str) -> tuple[Scrfd, ArcFace]:
        detect, embed = (
            replace(config.detect, device=device),
            replace(config.embed, device=device),
        )
        return Scrfd(detect, weights), ArcFace(embed, weights)

    cpu_detector, cpu_embedder = models("cpu")
    detector, embedder = models(setting.device)
    found = [(image, face) for image in images for face in cpu_detector.detect(image, 640)]
    again = [face for image in images for face in detector.detect(image, 640)]
    if len(found) != len(again):
        raise ToleranceError(f"{len(again)} faces, {len(found)} on the CPU", {})
    crops = ([image for image, _ in found], [face for _, face in found])
    pairs = zip(cpu_embedder.embed(*crops), embedder.embed(*crops), strict=True)
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs]
    boxes = [np.subtract(a.box, b.box) for a, b in zip(crops[1], again, strict=True)]
    values: Values = {
        "faces": len(found),
        "box_pixels": round(float(np.abs(boxes).max()), 4),
        "least_cosine": round(min(cosines), 6),
        "detect_images_per_s": round(
            1 / median_seconds(lambda: detector.detect(images[0], 640), setting.device), 1
        ),
    }
    need(values["box_pixels"] <= _BOX, f"boxes differ by more than {_BOX} pixels", values)
    need(min(cosines) >= _COSINE, f"embeddings have cosines under {_COSINE}", values)
    return values


def captions(setting: Setting) -> Values:
    """LLaVA with random weights: texts of the same pictures, in float32."""
    from bench.pictures import pictures
    from configs.captions import LlavaConfig
    from stages.backends.llava import Llava
    from tests.stages.tiny_llava import TINY, Size, make_checkpoint

    published = Size(image=336, patch=14, positions=4096)  # 576 image tokens

    folder = setting.folder / "llava"
    shutil.rmtree(folder, ignore_errors=True)
    make_checkpoint(folder, "llava", size=TINY if setting.tiny else published)
    records = pictures(2 if setting.tiny else 4)
    config = LlavaConfig(
        model=str(folder),
        dtype="float32",
        max_new_tokens=16,
        face_max_new_tokens=16,
        memory_share=0,
    )
    texts = [
        Llava(replace(config, device=name)).caption(records) for name in ("cpu", setting.device)
    ]
    equal = sum(a == b for a, b in zip(*texts, strict=True))
    values = {"pictures": len(records), "equal_texts": equal}
    need(equal == len(records), "texts differ from the CPU's", values)
    return values


def dataset(setting: Setting) -> Values:
    """The whole chain, with all models on the GPU, against a run on the CPU."""
    import numpy as np

    from bench.pictures import pictures
    from configs.errors import ConfigError
    from configs.schema import DatasetConfig
    from stages.backends.runtime import onnx_device
    from stages.codec import decode_labels
    from stages.storage.reader import DatasetReader

    try:
        onnx_device(setting.device)
    except ConfigError as error:
        raise MissingError(str(error)) from error
    config = DatasetConfig()
    need_weights(config.detect.weights, config.embed.weights, config.parse.weights)
    photos = setting.folder / "photos"
    photos.mkdir(exist_ok=True)
    for record in pictures(4 if setting.tiny else 32):
        (photos / f"{record.source}.jpg").write_bytes(record.image)
    samples = []
    for name in ("cpu", setting.device):
        output = setting.folder / f"dataset-{name}"
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-m", "pipelines.cli", "run", "--config"]
        command += ["configs/dataset/demo.yaml", f"source.path={photos}", f"output={output}"]
        command += ["executor=inline"]
        command += [f"{stage}.device={name}" for stage in ("detect", "parse", "embed")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        reader = DatasetReader(str(output))
        samples.append([each for index in reader.manifests() for each in reader.samples(index)])
    keys = [[record.key for record in each] for each in samples]
    need(keys[0] == keys[1], "other samples than on the CPU", {"samples": list(map(len, keys))})
    pairs = list(zip(*samples, strict=True))
    cosines = [float(a.identity @ b.identity) for a, b in pairs]
    labels = [np.mean(decode_labels(a.parsing) == decode_labels(b.parsing)) for a, b in pairs]
    values = {
        "samples": len(pairs),
        "least_cosine": round(min(cosines), 6),
        "equal_labels": round(float(np.mean(labels)), 6),
    }
    need(bool(pairs), "no sample, though the pictures show faces", values)
    need(min(cosines) >= _COSINE, f"embeddings have cosines under {_COSINE}", values)
    need(values["equal_labels"] >= _LABELS, f"equal labels are under {_LABELS}", values)
    return values


def step(setting: Setting) -> Values:
    """A training step of the small model: its losses and gradients, in each precision."""
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
    return values


def _step(setting: Setting, device: str, precision: str) -> dict[str, Any]:
    """Returns the losses and the gradients of a micro-batch, float32 on the CPU."""
    import torch
    from accelerate.state import AcceleratorState

    from train.data import unpacked
    from train.step import step_losses
    from train.trainer import Trainer

    AcceleratorState._reset_state(reset_partial_state=True)  # it allows one precision
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
    from accelerate.state import AcceleratorState

    from train.trainer import train

    AcceleratorState._reset_state(reset_partial_state=True)
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
        return _speeds(compare(_small(setting, setting.folder / "speed", setting.device), 2))
    command = [sys.executable, "-m", "bench.train", "--steps", "5", "split=all"]
    command += ["--random-base", str(setting.folder / "sd15/base")]
    command += [f"data={_people(setting)}", "micro_batch_size=32", "global_batch_size=32"]
    command += ["gradient_checkpointing=false", "channels_last=true", "num_workers=2"]
    command += ["model.device=cuda"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return _speeds(json.loads(done.stdout))


def _speeds(measured: Values) -> Values:
    from bench.train import KINDS

    shown = ("samples_per_s", "speed_of_bare", "wait_ms", "gpu_gb")
    values: Values = {
        kind: {name: measured[kind][name] for name in shown if name in measured[kind]}
        for kind in KINDS
    }
    utilisation = measured.get("model_flops_utilisation")
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
        "data": (DataSource(path=str(_people(setting))),),
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


def _people(setting: Setting) -> Path:
    from bench.synthetic_person import write_people

    return write_people(setting.folder / "people", 16 if setting.tiny else 64)


def need_weights(*names: str) -> None:
    """Raises MissingError if files of the table of weights aren't in the cache."""
    from stages.backends.weights import Weights

    if lacking := [name for name in names if not Weights().has(name)]:
        raise MissingError(f"weights {', '.join(lacking)}: `make weights` fetches them")


def lacking(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


_MODELS: Final = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
_DATA: Final = ("cv2", "PIL", "pyarrow", "simplejpeg", "skimage", "yaml")
CHECKS: Final = {
    "device": Check(run=device, packages=("torch",)),
    "parse": Check(run=parse, packages=("torch", "facexlib", *_DATA)),
    "faces": Check(run=faces, packages=("insightface", "onnxruntime", *_DATA)),
    "captions": Check(run=captions, packages=("torch", "transformers", *_DATA)),
    "dataset": Check(
        run=dataset, packages=("torch", "facexlib", "insightface", "onnxruntime", *_DATA)
    ),
    "step": Check(run=step, packages=(*_MODELS, *_DATA, "webdataset")),
    "training": Check(run=training, packages=(*_MODELS, *_DATA, "webdataset")),
    "train_speed": Check(run=train_speed, packages=(*_MODELS, *_DATA, "webdataset"), seconds=240),
    "inference_speed": Check(run=inference_speed, packages=(*_MODELS, *_DATA), seconds=240),
}


def measured(name: str, setting: Setting) -> Values:
    """Runs a check in this process; returns a row: status, detail and values."""
    import torch

    check = CHECKS[name]
    if packages := lacking(check.packages):
        return {"status": "missing", "detail": f"packages {', '.join(packages)}", "values": {}}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        values = check.run(setting)
    except MissingError as error:
        return {"status": "missing", "detail": str(error), "values": {}}
    except ImportError as error:
        return {"status": "missing", "detail": f"package {error.name}", "values": {}}
    except ToleranceError as error:
        return {"status": "failed", "detail": str(error), "values": error.values}
    finite = all(math.isfinite(value) for value in _numbers(values))
    return {
        "status": "passed" if finite else "failed",
        "detail": "" if finite else "a value isn't finite",
        "values": values,
    }


def _numbers(values: Any) -> list[float]:
    if isinstance(values, dict):
        return [number for value in values.values() for number in _numbers(value)]
    return [values] if isinstance(values, float) else []
