"""Texts of the data card and of its Croissant description."""

from __future__ import annotations

from typing import Final

NAME: Final = "fgid"
DESCRIPTION: Final = (
    "Photographs of people, prepared for training identity-preserving image generation "
    "(ConsistentID). A sample is an image, a label map of the parts of the face, an identity "
    "embedding and two captions; models made all but the image."
)
KEYWORDS: Final = (
    *("faces", "identity-preserving generation", "face parsing", "ConsistentID", "FGID"),
    "webdataset",
)
PERSONAL: Final = (
    "The data set holds images of people's faces and identity embeddings computed from them, which "
    "many laws treat as biometric data. Sidecars and quarantine tars also hold names, thumbnails "
    "and embeddings of inputs that were dropped, and sidecars those of people beside the main "
    "face. Licences, authors, consent and persons are what the source "
    "states; they were not verified. An image, or all images of a person, can be removed; "
    "takedown.jsonl records when that was done, without naming the image or the person. Of people "
    "who asked that later images are recognised, it holds embeddings."
)
BIASES: Final = (
    "The images were not balanced: age, sex, skin colour, pose and light are distributed as in the "
    "source, and no field states age, sex or origin. Detector, parser and embedder work better on "
    "some faces than on others, so the dropped inputs are not a random sample of the inputs."
)
LIMITS: Final = (
    "No person checked the annotations. Boxes, label maps, embeddings and captions are the output "
    "of models, and some are wrong.",
    "An identity is a cluster of embeddings, unless the source states the person. Two people who "
    "look alike may share one, and one person may have several. So a person may be on both sides "
    "of the split although no identity is.",
    "Images are resized and encoded again. Small ones are enlarged, which adds no detail.",
    "Pose and other metrics are estimates from landmarks and label maps. They are made for "
    "filtering images, not for measuring people.",
)
USES: Final = (
    "Training and validating generators that preserve the identity of a face, where these images "
    "may be used for that.",
    "Not for recognising, tracking or assessing people.",
)

READING: Final = """\
Run these in the folder of this file.

`webdataset`, only the training side of the split:

```python
from glob import glob
import pyarrow.parquet as pq
import webdataset as wds

identities = pq.read_table("identities.parquet", columns=["key", "split"]).to_pydict()
split = dict(zip(identities["key"], identities["split"]))
shards = sorted(glob("shards/fgid-??????.tar"))
samples = wds.WebDataset(shards, shardshuffle=False)
samples = samples.select(lambda sample: split[sample["__key__"]] == "train")
```

Hugging Face's `datasets`, both sides of the split (`identities.parquet` has the side of each
`__key__`). Both calls read the same samples; in place of `os.getcwd()`, the second takes any folder
or name on the hub:

```python
import os
from datasets import load_dataset

by_files = load_dataset("webdataset", data_files="shards/fgid-??????.tar", split="train")
by_card = load_dataset(os.getcwd(), split="mixed")
```

`mlcroissant`, both sides of the split. `inputs` has a row for every input, also dropped and failed
ones. mlcroissant unpacks all tars and keeps `samples` in memory. It finds unpacked tars by their
names, so data sets must not share its cache:

```python
import os
import tempfile

os.environ["CROISSANT_CACHE"] = tempfile.mkdtemp()  # before the import
import mlcroissant

samples = mlcroissant.Dataset("croissant.json").records("samples")
inputs = mlcroissant.Dataset("croissant.json").records("inputs")
```

A label map is an 8-bit grey image of label numbers; `wds.decode("pil")` would convert it to RGB.
Don't read the `.quarantine.tar` files for training: they hold samples that were dropped."""

REBUILDING: Final = """\
The same images, settings and weights give the same bytes on any machine:

    python -m pipelines.cli run --config config.yaml source.path=IMAGES output=OUT

`python -m pipelines.cli lint OUT` checks every file against its digest."""

REMOVAL: Final = """\
A person who is shown in an image, or who made it, can ask for its removal. The maintainer of this
data set then runs one of

    python -m pipelines.cli takedown OUT --photo PHOTOGRAPH   # all images of the person in it
    python -m pipelines.cli takedown OUT --hash SHA256        # an image by its digest, and copies
    python -m pipelines.cli takedown OUT --source NAME        # an image by its name at the source

The shards that hold the images are written again without them, and the images are refused under any
name from then on. Copies of the data set that were passed on don't change: pass the request on."""
