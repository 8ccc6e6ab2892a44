"""The reference's data scripts, as a loop: what the pipeline is compared with by `--against
reference`.

Written from a description of those scripts, not copied. Three passes over the files, as three
scripts make them, one picture at a time: parsing (all heads of the network) with the picture
squashed to 512², label map and colour mask saved as PNGs at Pillow's default level and a JSON each;
captions; identity embeddings of the squashed picture and of the original, read by OpenCV, detected
at 640² without a border, saved by torch; at last all JSONs joined into one.

Weights, networks, caption backend and threads are those of the pipeline it stands beside. In favour
of the reference, only detection and embedding run on each face: its face library would by default
also run landmark and age models.
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
    """Models loaded once; `run` makes the files of all pictures."""

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
        """Writes everything below `output`; how many pictures, and how many of them have an
        identity.
        """
        output.mkdir(parents=True, exist_ok=True)
        for file in files:
            self._masks(file, output / file.stem)
        for file in files:
            self._caption(output / file.stem)
        found = [self._embed(file, output / file.stem) for file in files]
        joined = [json.loads(path.read_text()) for path in sorted(output.glob("*.json"))]
        (output / "JSON_all.json").write_text(json.dumps(joined))
        return {"pictures": len(files), "identities": sum(found)}

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
        """By the pipeline's own caption backend, which wants a JPEG, a label map and a face."""
        image = np.array(PILImage.open(f"{stem}_resize.png"))
        mask = Path(f"{stem}_mask.png").read_bytes()
        whole = Face(box=(64, 64, 448, 448), landmarks=_TEMPLATE, score=1.0)
        record = Record(
            key=key_of(stem.name), source=stem.name, image=encode_jpeg(image, 95), parsing=mask
        )
        record = replace(record, width=SIDE, height=SIDE, faces=(whole,), face=0)
        ((caption, face_caption),) = self._captioner.caption([record])
        self._note(stem, vqa_llva=caption, vqa_llva_more_face_detail=face_caption)

    def _embed(self, file: Path, stem: Path) -> bool:
        """True if the squashed picture has a face as the reference looks for one."""
        found = [
            self._identity(Path(f"{stem}_resize.png"), stem, "resize"),
            self._identity(file, stem, "origin"),
        ]
        return found[0]

    def _identity(self, picture: Path, stem: Path, which: str) -> bool:
        # the backends swap it back: BGR arrives
        image = cv2.cvtColor(cv2.imread(str(picture)), cv2.COLOR_BGR2RGB)
        faces = self._detector.detect(np.asarray(image, np.uint8), 640)
        if not faces:
            return False
        identity = self._embedder.embed([np.asarray(image, np.uint8)], faces[:1])[0]
        torch.save(torch.from_numpy(identity)[None], f"{stem}_{which}_faceid.bin")
        self._note(stem, **{f"id_embed_file_{which}": f"{stem}_{which}_faceid.bin"})
        return True

    @staticmethod
    def _note(stem: Path, **more: str) -> None:
        path = Path(f"{stem}.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


_TEMPLATE = (
    (192.98, 239.95),
    (318.90, 240.19),
    (256.63, 314.02),
    (201.26, 371.41),
    (313.09, 371.15),
)
