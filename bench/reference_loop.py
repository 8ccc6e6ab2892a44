"""A loop like the reference's data scripts, for the comparison `--against reference`.

It was written from a description of the scripts, not copied. Like the three scripts it makes three
passes over the files, one image at a time:

1. Parsing, with all heads of the network, of the image squashed to 512²; the label map and a colour
   mask are saved as PNGs at Pillow's default level, and a JSON for each image.
2. Captions.
3. Identity embeddings of the squashed image and of the original: read by OpenCV, detected at 640²
   without a border, saved by torch. At the end all JSONs are joined.

Weights, networks, caption backend and threads are those of the pipeline. Only detection and
embedding run on each face; the reference's face library would by default also run landmark and age
models, so the comparison is in the reference's favour.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image as PILImage

from configs.schema import DatasetConfig
from stages.backends.arcface import ArcFace
from stages.backends.bisenet import CLASSES, bisenet
from stages.backends.scrfd import Scrfd
from stages.backends.weights import Weights
from stages.base import BackendStage
from stages.chain import build_stages
from stages.codec import encode_jpeg
from stages.record import Face, Record, key_of

SIDE = 512
_COLORS = np.random.default_rng(0).integers(0, 256, (CLASSES, 3), np.uint8)
_MEAN, _STD = (
    torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)


class ReferenceLoop:
    """Loads the models; `run` writes the files of all images."""

    def __init__(self, config: DatasetConfig) -> None:
        weights = Weights(config.weights)
        self._net: Any = bisenet(CLASSES)
        self._net.load_state_dict(
            torch.load(weights.fetch(config.parse.weights), map_location="cpu", weights_only=True)
        )
        self._net.eval()
        self._detector, self._embedder = (
            Scrfd(config.detect, weights),
            ArcFace(config.embed, weights),
        )
        captions = build_stages(config)[-1]
        assert isinstance(captions, BackendStage)
        captions.setup()
        self._captioner: Any = captions.backend

    def run(self, files: Sequence[Path], output: Path) -> dict[str, int]:
        """Writes all files below `output`; returns the numbers of images and of identities."""
        output.mkdir(parents=True, exist_ok=True)
        for file in files:
            self._masks(file, output / file.stem)
        for file in files:
            self._caption(output / file.stem)
        has_identity = [self._embed(file, output / file.stem) for file in files]
        joined = [json.loads(path.read_text()) for path in sorted(output.glob("*.json"))]
        (output / "JSON_all.json").write_text(json.dumps(joined))
        return {"images": len(files), "identities": sum(has_identity)}

    @torch.no_grad()
    def _masks(self, file: Path, stem: Path) -> None:
        image = (
            PILImage.open(file).convert("RGB").resize((SIDE, SIDE), PILImage.Resampling.BILINEAR)
        )
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).sub(_MEAN).div(_STD)
        labels = self._net(x[None])[0].squeeze(0).numpy().argmax(0).astype(np.uint8)
        color = np.full((SIDE, SIDE, 3), 255, np.uint8)
        for label in range(1, int(labels.max()) + 1):
            color[labels == label] = _COLORS[label]
        image.save(f"{stem}_resize.png")
        PILImage.fromarray(labels).save(f"{stem}_mask.png")
        PILImage.fromarray(color).save(f"{stem}_color.png")
        names = {
            "origin_IMG": str(file),
            "resize_IMG": f"{stem}_resize.png",
            "parsing_mask_IMG": f"{stem}_mask.png",
        }
        Path(f"{stem}.json").write_text(json.dumps(names))

    def _caption(self, stem: Path) -> None:
        """Captions by the pipeline's backend, which needs a JPEG, a label map and a face."""
        image = np.array(PILImage.open(f"{stem}_resize.png"))
        mask = Path(f"{stem}_mask.png").read_bytes()
        face = Face(box=(64, 64, 448, 448), landmarks=_TEMPLATE, score=1.0)
        record = Record(
            key=key_of(stem.name), source=stem.name, image=encode_jpeg(image, 95), parsing=mask
        )
        record = replace(record, width=SIDE, height=SIDE, faces=(face,), face=0)
        ((caption, face_caption),) = self._captioner.caption([record])
        self._add_entries(stem, vqa_llva=caption, vqa_llva_more_face_detail=face_caption)

    def _embed(self, file: Path, stem: Path) -> bool:
        """Embeds the squashed image and the original; returns whether the former has a face."""
        squashed = self._identity(Path(f"{stem}_resize.png"), stem, "resize")
        self._identity(file, stem, "origin")
        return squashed

    def _identity(self, path: Path, stem: Path, which: str) -> bool:
        # The backends expect RGB and convert it back to BGR.
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        faces = self._detector.detect(np.asarray(image, np.uint8), 640)
        if not faces:
            return False
        identity = self._embedder.embed([np.asarray(image, np.uint8)], faces[:1])[0]
        torch.save(torch.from_numpy(identity)[None], f"{stem}_{which}_faceid.bin")
        self._add_entries(stem, **{f"id_embed_file_{which}": f"{stem}_{which}_faceid.bin"})
        return True

    @staticmethod
    def _add_entries(stem: Path, **entries: str) -> None:
        """Adds entries to an image's JSON."""
        path = Path(f"{stem}.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


_TEMPLATE = (
    (192.98, 239.95),
    (318.90, 240.19),
    (256.63, 314.02),
    (201.26, 371.41),
    (313.09, 371.15),
)
