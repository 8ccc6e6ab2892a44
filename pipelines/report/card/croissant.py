"""Croissant: the data set described for machines, as JSON-LD (mlcommons.org/croissant/1.1, with its
RAI terms).

Files are named with their sha256, so whoever reads through it reads what was committed. `inputs`
and `identities` can be read with mlcroissant as they are. `samples` is a description only:
mlcroissant joins no more than two sources, and follows no JSON path inside a tar; WebDataset reads
those.
"""

from __future__ import annotations

import itertools
import json
from typing import Any, Final

import pyarrow as pa

from pipelines.dedup.global_pass import IDENTITIES_SCHEMA
from pipelines.report.card import fields
from pipelines.report.card.summary import Facts
from stages.record import IDENTITY_DIM, SCHEMA_VERSION
from stages.storage.commit import FOLDER
from stages.storage.exclusions import IDENTITIES
from stages.storage.sidecar import SIDECAR_SCHEMA

Node = dict[str, Any]

CROISSANT: Final = "croissant.json"
TARS: Final = "fgid-??????.tar"  # and no held ones: six digits, whatever they are
SIDECARS: Final = "fgid-??????.parquet"
NAME: Final = "fgid"
DESCRIPTION: Final = (
    "Photographs of people, made ready to train identity-preserving image generation "
    "(ConsistentID): for each sample "
    "a picture, a label map of the face's parts, an identity embedding and two captions, all "
    "made by models."
)
KEYWORDS: Final = (
    "faces",
    "identity-preserving generation",
    "face parsing",
    "ConsistentID",
    "FGID",
    "webdataset",
)
PERSONAL: Final = (
    "Pictures of people's faces, and identity embeddings made from them: biometric data in the "
    "sense of many laws. The "
    "sidecars and held tars keep names, small pictures and embeddings of what was dropped, too. "
    "Licences, authors and "
    "consent are as the source states them, and nothing checks what it states. A picture, or a "
    "person, can be taken "
    "down: takedown.jsonl says when that was done and names neither."
)
BIASES: Final = (
    "Nobody balanced the pictures: age, sex, skin, pose and light are as the source has them, "
    "and nothing here tells "
    "age, sex or origin. Detector, parser and embedder find some faces more easily than others, "
    "so what was dropped is "
    "no random sample of what was given."
)
LIMITS: Final = (
    "No person checked the annotations: boxes, label maps, embeddings and captions are models' "
    "answers, and wrong in "
    "places.",
    "An identity is a cluster of embeddings. Two people who look alike may share one, and one "
    "person may have several, "
    "so a person may stand on both sides of the split where an identity doesn't.",
    "Pictures are re-encoded and resized; small ones are enlarged, which adds no detail.",
    "Poses and other figures are estimates from landmarks and label maps, made to sort pictures "
    "and not to measure "
    "people.",
)
USES: Final = (
    "Training and validating generators that keep a person's face, by people who may use these "
    "pictures for that.",
    "Not for recognising, tracking or judging people.",
)

_CONTEXT: Final[Node] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{name: f"cr:{name}" for name in ("arrayShape", "citeAs", "column", "containedIn")},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{
        name: f"cr:{name}"
        for name in ("equivalentProperty", "extract", "field", "fileObject", "fileProperty")
    },
    **{
        name: f"cr:{name}"
        for name in ("fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key")
    },
    **{
        name: f"cr:{name}"
        for name in ("md5", "parentField", "path", "recordSet", "references", "regex", "repeated")
    },
    "name": {"@container": "@language"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    **{
        name: f"cr:{name}"
        for name in ("replace", "samplingRate", "separator", "source", "subField", "transform")
    },
}

_MEMBER_SETS: Final = {  # id → (extension, media type)
    "images": ("jpg", "image/jpeg"),
    "label-maps": ("parsing.png", "image/png"),
    "embeddings": ("identity.npy", "application/octet-stream"),
    "metadata": ("json", "application/json"),
}
_JSON_FIELDS: Final = (  # of a sample's .json, in the sidecar's names
    *(
        "source",
        "sha256",
        "license",
        "author",
        "consent",
        "width",
        "height",
        "source_width",
        "source_height",
    ),
    *("caption", "face_caption", "identity_norm"),
)


def croissant(facts: Facts) -> str:
    """croissant.json's text."""
    told: Node = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": NAME,
        "description": DESCRIPTION,
        "version": f"{SCHEMA_VERSION}.0.0",
        "keywords": list(KEYWORDS),
        "license": [name or "not stated" for name in sorted(facts.stated["license"])]
        or ["not stated"],
        **_responsible(facts),
        "distribution": _distribution(facts),
        "recordSet": _record_sets(facts),
    }
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


def _responsible(facts: Facts) -> Node:
    backends: dict[str, str] = facts.dataset.get("backends", {})
    stages = zip(facts.dataset.get("stages", []), facts.dataset.get("signatures", []), strict=False)
    return {
        "rai:personalSensitiveInformation": [PERSONAL],
        "rai:dataBiases": [BIASES],
        "rai:dataLimitations": list(LIMITS),
        "rai:dataUseCases": list(USES),
        "rai:dataCollection": "Taken from a source of photographs as it lists them; see `inputs` "
        "for each of them.",
        "rai:dataPreprocessingProtocol": [f"{stage}: {signature}" for stage, signature in stages]
        or ["not recorded"],
        "rai:dataAnnotationProtocol": ["Annotated by models alone; no person took part."],
        "rai:machineAnnotationTools": [
            *(f"{stage}: {backend}" for stage, backend in backends.items()),
            *(
                f"{weight['file']} sha256 {weight['sha256']}"
                for weight in facts.dataset.get("weights", [])
            ),
        ]
        or ["not recorded"],
        "rai:annotationsPerItem": "one of each kind",
        "rai:dataReleaseMaintenancePlan": "Pictures and people are taken down on request "
        "(pipelines.cli takedown); the "
        "shards that held them are written again, and this file with them.",
    }


# --------------------------------------------------------------------------------------------------


def _distribution(facts: Facts) -> list[Node]:
    files = [manifest["files"] for manifest in facts.manifests]
    tars = [_file(found["tar"], "application/x-tar") for found in files]
    nodes = [
        *tars,
        *(_file(found["parquet"], "application/x-parquet") for found in files),
        _file_set(
            "sidecars",
            "application/x-parquet",
            f"{FOLDER}/{SIDECARS}",
            "every shard's rows, one for each input",
        ),
    ]
    if tars:
        inside = {"containedIn": [{"@id": tar["@id"]} for tar in tars]}
        nodes += [
            _file_set(name, kind, f"*.{extension}", fields.MEMBERS[extension]) | inside
            for name, (extension, kind) in _MEMBER_SETS.items()
        ]
    if facts.identities:
        nodes.append(
            {
                **{
                    "@type": "cr:FileObject",
                    "@id": IDENTITIES,
                    "name": IDENTITIES,
                    "contentUrl": IDENTITIES,
                },
                **{"encodingFormat": "application/x-parquet", "sha256": facts.identities},
            }
        )
    return nodes


def _file(told: Node, kind: str) -> Node:
    return {
        "@type": "cr:FileObject",
        "@id": told["name"],
        "name": told["name"],
        "contentUrl": f"{FOLDER}/{told['name']}",
        "contentSize": f"{told['bytes']} B",
        "encodingFormat": kind,
        "sha256": told["sha256"],
    }


def _file_set(name: str, kind: str, includes: str, description: str) -> Node:
    return {
        **{"@type": "cr:FileSet", "@id": name, "name": name, "description": description},
        **{"encodingFormat": kind, "includes": includes},
    }


# --------------------------------------------------------------------------------------------------


def _record_sets(facts: Facts) -> list[Node]:
    found = [
        _record_set(
            "inputs",
            "A row for every input.",
            _columns("inputs", "fileSet", "sidecars"),
            "inputs/key",
        )
    ]
    if facts.manifests:
        found.insert(
            0, _record_set("samples", "What is trained on.", _sample_fields(), "samples/key")
        )
    if facts.identities:
        columns = _columns("identities", "fileObject", IDENTITIES)
        split = next(field for field in columns if field["@id"] == "identities/split")
        split["references"] = {"field": {"@id": "splits/name"}}
        found += [
            _record_set(
                "identities", "Who is who, a row for each sample.", columns, "identities/key"
            ),
            _splits(),
        ]
    return found


def _record_set(name: str, description: str, columns: list[Node], key: str) -> Node:
    return {
        **{"@type": "cr:RecordSet", "@id": name, "name": name, "description": description},
        **{"key": {"@id": key}, "field": columns},
    }


def _splits() -> Node:
    return {
        **_record_set("splits", "Sides of the split.", [], "splits/name"),
        "dataType": "cr:Split",
        "field": [
            {"@type": "cr:Field", "@id": "splits/name", "name": "name", "dataType": "sc:Text"},
            {
                "@type": "cr:Field",
                "@id": "splits/url",
                "name": "url",
                "dataType": ["sc:URL", "cr:Split"],
            },
        ],
        "data": [
            {"splits/name": "train", "splits/url": "cr:TrainingSplit"},
            {"splits/name": "val", "splits/url": "cr:ValidationSplit"},
        ],
    }


def _sample_fields() -> list[Node]:
    def content(name: str, member: str, **more: Any) -> Node:
        return {
            **{"@type": "cr:Field", "@id": f"samples/{name}", "name": name},
            "description": fields.MEMBERS[_MEMBER_SETS[member][0]],
            **more,
            "source": {"fileSet": {"@id": member}, "extract": {"fileProperty": "content"}},
        }

    def joined(number: int, left: str, right: str) -> Node:
        """A sample's files are those whose names have the same beginning: every two of them are
        joined by it.
        """
        name = "key" if number == 0 else f"key_of_{left}_and_{right}".replace("-", "_")
        return {
            **{"@type": "cr:Field", "@id": f"samples/{name}", "name": name, "dataType": "sc:Text"},
            "description": f"file name up to its first dot; joins {left} and {right}",
            "source": _key_of(left),
            "references": _key_of(right),
        }

    return [
        *(
            joined(number, *pair)
            for number, pair in enumerate(itertools.combinations(_MEMBER_SETS, 2))
        ),
        content("image", "images", dataType="sc:ImageObject"),
        content("label_map", "label-maps", dataType="sc:ImageObject"),
        content(
            "identity",
            "embeddings",
            dataType="sc:Float",
            isArray=True,
            arrayShape=str(IDENTITY_DIM),
        ),
        *(
            {
                **{
                    "@type": "cr:Field",
                    "@id": f"samples/{name}",
                    "name": name,
                    "description": fields.SIDECAR[name],
                },
                **_type_of(SIDECAR_SCHEMA.field(name).type, name),
                "source": {"fileSet": {"@id": "metadata"}, "extract": {"jsonPath": f"$.{name}"}},
            }
            for name in _JSON_FIELDS
        ),
    ]


def _key_of(file_set: str) -> Node:
    return {
        "fileSet": {"@id": file_set},
        "extract": {"fileProperty": "filename"},
        "transform": {"regex": r"^([0-9a-f]+)\."},
    }


def _columns(name: str, kind: str, file: str) -> list[Node]:
    """A field for each column of a table, with fields of its own where the column holds structs."""
    schema, told = (
        (SIDECAR_SCHEMA, fields.SIDECAR)
        if name == "inputs"
        else (IDENTITIES_SCHEMA, fields.IDENTITIES)
    )

    def source(column: str, *transform: Node) -> Node:
        found: Node = {kind: {"@id": file}, "extract": {"column": column}}
        return {"source": found | ({"transform": transform[0]} if transform else {})}

    def field(column: pa.Field) -> Node:
        node: Node = {"@type": "cr:Field", "@id": f"{name}/{column.name}", "name": column.name}
        node["description"] = told[column.name]
        if not (pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type)):
            return node | _type_of(column.type, column.name) | source(column.name)
        parts = [
            column.type.value_type.field(index)
            for index in range(column.type.value_type.num_fields)
        ]
        inner = [
            {
                **{
                    "@type": "cr:Field",
                    "@id": f"{node['@id']}/{part.name}",
                    "name": f"{column.name}/{part.name}",
                },
                **_type_of(part.type, part.name),
                **source(column.name, {"jsonPath": f"$.{part.name}"}),
            }
            for part in parts
        ]
        return node | {"repeated": True, "subField": inner}

    return [field(column) for column in schema]


def _type_of(kind: pa.DataType, name: str) -> Node:
    if pa.types.is_list(kind):
        return {
            **_type_of(kind.value_type, name),
            "isArray": True,
            "arrayShape": _SHAPES.get(name, "-1"),
        }
    if pa.types.is_boolean(kind):
        return {"dataType": "sc:Boolean"}
    if pa.types.is_integer(kind):
        return {"dataType": "sc:Integer"}
    if pa.types.is_floating(kind):
        return {"dataType": "sc:Float"}
    # thumbnails too: some are empty, and no reader opens an empty picture
    return {"dataType": "sc:Text"}


_SHAPES: Final = {"identity": str(IDENTITY_DIM), "box": "4", "landmarks": "10"}
