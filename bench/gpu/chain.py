"""The chain's models on the GPU against the CPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

from bench.gpu.common import Setting, ToleranceError, Values, need, need_onnx, need_weights

_LABELS: Final = 0.999  # share of a label map's pixels that are equal
_COSINE: Final = 0.999  # of two embeddings of a face
_BOX: Final = 0.5  # pixels between two boxes of a face


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
    from configs.schema import DatasetConfig
    from stages.backends.arcface import ArcFace
    from stages.backends.scrfd import Scrfd
    from stages.backends.weights import Weights
    from stages.codec import decode_jpeg

    config, weights = DatasetConfig(), Weights()
    need_onnx(setting.device)
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
    faces_of_cpu = [(image, face) for image in images for face in cpu_detector.detect(image, 640)]
    faces_of_device = [face for image in images for face in detector.detect(image, 640)]
    if len(faces_of_cpu) != len(faces_of_device):
        raise ToleranceError(f"{len(faces_of_device)} faces, {len(faces_of_cpu)} on the CPU", {})
    crops = ([image for image, _ in faces_of_cpu], [face for _, face in faces_of_cpu])
    pairs = zip(cpu_embedder.embed(*crops), embedder.embed(*crops), strict=True)
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs]
    boxes = [np.subtract(a.box, b.box) for a, b in zip(crops[1], faces_of_device, strict=True)]
    values: Values = {
        "faces": len(faces_of_cpu),
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
    from configs.schema import DatasetConfig
    from stages.codec import decode_labels
    from stages.storage.reader import DatasetReader

    need_onnx(setting.device)
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
