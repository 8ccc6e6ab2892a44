"""Texts of the data card and of its Croissant description."""

from __future__ import annotations

from typing import Final

NAME: Final = "fgid"
DESCRIPTION: Final = (
    "Photographs of people, prepared for training identity-preserving image generation "
    "(ConsistentID): each sample is a picture, a label map of the face's parts, an identity "
    "embedding and two captions, all made by models."
)
KEYWORDS: Final = (
    *("faces", "identity-preserving generation", "face parsing", "ConsistentID", "FGID"),
    "webdataset",
)
PERSONAL: Final = (
    "Pictures of people's faces, and identity embeddings made from them: biometric data in the "
    "sense of many laws. The sidecars and quarantine tars keep names, thumbnails and embeddings of "
    "what was dropped, too. Licences, authors and consent are as the source states them, and "
    "nothing checks what it states. Pictures, or all pictures of a person, can be removed: "
    "takedown.jsonl says when that was done and names neither."
)
BIASES: Final = (
    "Nobody balanced the pictures: age, sex, skin, pose and light are as the source has them, and "
    "nothing here states age, sex or origin. Detector, parser and embedder work better on some "
    "faces than on others, so what was dropped is no random sample of the inputs."
)
LIMITS: Final = (
    "No person checked the annotations: boxes, label maps, embeddings and captions are models' "
    "answers, and some are wrong.",
    "An identity is a cluster of embeddings. Two people who look alike may share one, and one "
    "person may have several, so a person may be on both sides of the split where an identity is "
    "not.",
    "Pictures are re-encoded and resized; small ones are enlarged, which adds no detail.",
    "Poses and other metrics are estimates from landmarks and label maps, made to sort pictures "
    "and not to measure people.",
)
USES: Final = (
    "Training and validating generators that preserve a person's face, by people who may use these "
    "pictures for that.",
    "Not for recognising, tracking or judging people.",
)

READING: Final = """\
With `webdataset`, training samples only:

```python
from glob import glob
import pyarrow.parquet as pq
import webdataset as wds

people = pq.read_table("identities.parquet", columns=["key", "split"]).to_pydict()
side = dict(zip(people["key"], people["split"]))
shards = sorted(glob("shards/fgid-??????.tar"))
samples = wds.WebDataset(shards, shardshuffle=False)
samples = samples.select(lambda sample: side[sample["__key__"]] == "train")
```

With Hugging Face's `datasets`, both sides of the split; `identities.parquet` has the side of each
`__key__`:

```python
from datasets import load_dataset

samples = load_dataset("webdataset", data_files="shards/fgid-??????.tar", split="train")
```

With `mlcroissant`, the row of every input, dropped and failed ones too:

```python
import mlcroissant

inputs = mlcroissant.Dataset("croissant.json").records("inputs")
```

Read the label map as it is: `wds.decode("pil")` turns it into RGB. Leave the `.quarantine.tar`
files out: they hold samples that were dropped."""

REBUILDING: Final = """\
The same pictures, settings and weights give the same bytes on any machine:

    python -m pipelines.cli run --config config.yaml source.path=PICTURES output=OUT

`python -m pipelines.cli lint OUT` checks every file against its digest."""

REMOVAL: Final = """\
Whoever is shown, or made the picture, can ask for its removal. Whoever keeps this data set runs one
of

    python -m pipelines.cli takedown OUT --photo PHOTOGRAPH   # everybody who looks like this person
    python -m pipelines.cli takedown OUT --hash SHA256        # a picture, by its digest, and copies
    python -m pipelines.cli takedown OUT --source NAME        # a picture, by its name at the source

which writes the shards that hold it again without it, and refuses it under any name from then on.
Copies that were passed on are not affected: pass the request on too."""
