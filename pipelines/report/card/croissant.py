"""Croissant: the data set described for machines, as JSON-LD (mlcommons.org/croissant/1.1, with its
RAI terms).

Files are named with their sha256, so whoever reads through it reads what was committed. `inputs` and
`identities` can be read with mlcroissant as they are. `samples` is a description only: mlcroissant
joins no more than two sources, and follows no JSON path inside a tar; WebDataset reads those.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa

from pipelines.report.card.summary import Summary
from pipelines.report.card.texts import (
    BIASES,
    DESCRIPTION,
    KEYWORDS,
    LIMITS,
    NAME,
    PERSONAL,
    USES,
)
from stages.fields import Column, stored_fields
from stages.record import IDENTITY_DIM, Record
from stages.storage.layout import FORMAT_VERSION, IDENTITIES, SHARDS, SIDECARS
from stages.storage.manifest import FileEntry
from stages.storage.reader import IDENTITIES_SCHEMA
from stages.storage.samples import MEMBERS

Node = dict[str, Any]

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


def croissant_json(summary: Summary) -> str:
    """croissant.json's text."""
    licenses = [name or "not stated" for name in sorted(summary.provenance["license"])]
    description: Node = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": NAME,
        "description": DESCRIPTION,
        "version": f"{FORMAT_VERSION}.0.0",
        "keywords": list(KEYWORDS),
        "license": licenses or ["not stated"],
        **_responsible(summary),
        "distribution": _distribution(summary),
        "recordSet": _record_sets(summary),
    }
    return json.dumps(description, indent=1, ensure_ascii=False) + "\n"


def _responsible(summary: Summary) -> Node:
    dataset = summary.dataset
    backends: dict[str, str] = dataset.get("backends", {})
    stages = zip(dataset.get("stages", []), dataset.get("signatures", []), strict=False)
    weights = dataset.get("weights", [])
    tools = [
        *(f"{stage}: {backend}" for stage, backend in backends.items()),
        *(f"{weight['file']} sha256 {weight['sha256']}" for weight in weights),
    ]
    protocol = [f"{stage}: {signature}" for stage, signature in stages]
    return {
        "rai:personalSensitiveInformation": [PERSONAL],
        "rai:dataBiases": [BIASES],
        "rai:dataLimitations": list(LIMITS),
        "rai:dataUseCases": list(USES),
        "rai:dataCollection": "Taken from a source of photographs as it lists them; see `inputs` "
        "for each of them.",
        "rai:dataPreprocessingProtocol": protocol or ["not recorded"],
        "rai:dataAnnotationProtocol": ["Annotated by models alone; no person took part."],
        "rai:machineAnnotationTools": tools or ["not recorded"],
        "rai:annotationsPerItem": "one of each kind",
        "rai:dataReleaseMaintenancePlan": "Pictures and people are removed on request "
        "(pipelines.cli takedown); the shards that held them are written again, and this file with "
        "them.",
    }


def _distribution(summary: Summary) -> list[Node]:
    tars = [_file(manifest.tar, "application/x-tar") for manifest in summary.manifests]
    sidecars = [_file(manifest.sidecar, "application/x-parquet") for manifest in summary.manifests]
    rows = "every shard's rows, one for each input"
    nodes = [
        *tars,
        *sidecars,
        _file_set("sidecars", "application/x-parquet", f"{SHARDS}/{SIDECARS}", rows),
    ]
    if tars:
        inside = {"containedIn": [{"@id": tar["@id"]} for tar in tars]}
        nodes += [
            _file_set(name, kind, f"*.{extension}", MEMBERS[extension]) | inside
            for name, (extension, kind) in _MEMBER_SETS.items()
        ]
    if summary.identities:
        nodes.append(
            {
                "@type": "cr:FileObject",
                "@id": IDENTITIES,
                "name": IDENTITIES,
                "contentUrl": IDENTITIES,
                "encodingFormat": "application/x-parquet",
                "sha256": summary.identities,
            }
        )
    return nodes


def _file(file: FileEntry, media_type: str) -> Node:
    return {
        "@type": "cr:FileObject",
        "@id": file.name,
        "name": file.name,
        "contentUrl": f"{SHARDS}/{file.name}",
        "contentSize": f"{file.bytes} B",
        "encodingFormat": media_type,
        "sha256": file.sha256,
    }


def _file_set(name: str, media_type: str, includes: str, description: str) -> Node:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "description": description,
        "encodingFormat": media_type,
        "includes": includes,
    }


def _record_sets(summary: Summary) -> list[Node]:
    inputs = _table_fields("inputs", {"fileSet": {"@id": "sidecars"}}, summary.columns.values())
    sets = [_record_set("inputs", "A row for every input.", inputs, "inputs/key")]
    if summary.manifests:
        samples = _sample_fields(summary.columns)
        sets.insert(0, _record_set("samples", "The training samples.", samples, "samples/key"))
    if summary.identities:
        columns = [Column.from_arrow(field) for field in IDENTITIES_SCHEMA]
        fields = _table_fields("identities", {"fileObject": {"@id": IDENTITIES}}, columns)
        split = next(field for field in fields if field["@id"] == "identities/split")
        split["references"] = {"field": {"@id": "splits/name"}}
        description = "The identity of each sample, and its side of the split."
        sets += [_record_set("identities", description, fields, "identities/key"), _splits()]
    return sets


def _record_set(name: str, description: str, fields: Sequence[Node], key: str) -> Node:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": description,
        "key": {"@id": key},
        "field": list(fields),
    }


def _splits() -> Node:
    fields: list[Node] = [
        {"@type": "cr:Field", "@id": "splits/name", "name": "name", "dataType": "sc:Text"},
        {
            "@type": "cr:Field",
            "@id": "splits/url",
            "name": "url",
            "dataType": ["sc:URL", "cr:Split"],
        },
    ]
    return {
        **_record_set("splits", "Sides of the split.", fields, "splits/name"),
        "dataType": "cr:Split",
        "data": [
            {"splits/name": "train", "splits/url": "cr:TrainingSplit"},
            {"splits/name": "val", "splits/url": "cr:ValidationSplit"},
        ],
    }


def _sample_fields(columns: Mapping[str, Column]) -> list[Node]:
    def content(name: str, member: str, **more: Any) -> Node:
        return {
            "@type": "cr:Field",
            "@id": f"samples/{name}",
            "name": name,
            "description": MEMBERS[_MEMBER_SETS[member][0]],
            **more,
            "source": {"fileSet": {"@id": member}, "extract": {"fileProperty": "content"}},
        }

    def joined(number: int, left: str, right: str) -> Node:
        """A sample's files are those whose names have the same beginning: every two of them are
        joined by it."""
        name = "key" if number == 0 else f"key_of_{left}_and_{right}".replace("-", "_")
        return {
            "@type": "cr:Field",
            "@id": f"samples/{name}",
            "name": name,
            "dataType": "sc:Text",
            "description": f"file name up to its first dot; joins {left} and {right}",
            "source": _key_of(left),
            "references": _key_of(right),
        }

    scalars = [
        columns[name]
        for name, entry in stored_fields(Record)
        if entry.json and name in columns and name != "key" and not pa.types.is_list(entry.type)
    ]
    return [
        *(joined(number, *p) for number, p in enumerate(itertools.combinations(_MEMBER_SETS, 2))),
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
                "@type": "cr:Field",
                "@id": f"samples/{column.name}",
                "name": column.name,
                "description": column.description,
                **_type_of(column.type, column.name),
                "source": {
                    "fileSet": {"@id": "metadata"},
                    "extract": {"jsonPath": f"$.{column.name}"},
                },
            }
            for column in scalars
        ),
    ]


def _key_of(file_set: str) -> Node:
    return {
        "fileSet": {"@id": file_set},
        "extract": {"fileProperty": "filename"},
        "transform": {"regex": r"^([0-9a-f]+)\."},
    }


def _table_fields(name: str, file: Node, columns: Iterable[Column]) -> list[Node]:
    """A field for each column of a parquet file, with fields of its own where it holds structs."""

    def source(column: Column, **more: Any) -> Node:
        return {"source": {**file, "extract": {"column": column.name}, **more}}

    def node(column: Column) -> Node:
        field: Node = {
            "@type": "cr:Field",
            "@id": f"{name}/{column.name}",
            "name": column.name,
            "description": column.description,
        }
        kind = column.type
        if not (pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)):
            return field | _type_of(kind, column.name) | source(column)
        parts = [kind.value_type.field(place) for place in range(kind.value_type.num_fields)]
        inner = [
            {
                "@type": "cr:Field",
                "@id": f"{field['@id']}/{part.name}",
                "name": f"{column.name}/{part.name}",
                **_type_of(part.type, part.name),
                **source(column, transform={"jsonPath": f"$.{part.name}"}),
            }
            for part in parts
        ]
        return field | {"repeated": True, "subField": inner}

    return [node(column) for column in columns]


def _type_of(kind: pa.DataType, name: str) -> Node:
    if pa.types.is_list(kind):
        shape = _SHAPES.get(name, "-1")
        return {**_type_of(kind.value_type, name), "isArray": True, "arrayShape": shape}
    if pa.types.is_boolean(kind):
        return {"dataType": "sc:Boolean"}
    if pa.types.is_integer(kind):
        return {"dataType": "sc:Integer"}
    if pa.types.is_floating(kind):
        return {"dataType": "sc:Float"}
    # thumbnails too: some are empty, and no reader opens an empty picture
    return {"dataType": "sc:Text"}


_SHAPES: Final = {"identity": str(IDENTITY_DIM), "box": "4", "landmarks": "10"}
