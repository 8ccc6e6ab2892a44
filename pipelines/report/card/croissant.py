"""Croissant: the data set described for machines, as JSON-LD (mlcommons.org/croissant/1.1, with its
RAI terms).

Files are listed with their sha256. mlcroissant reads every record set. It joins only two sources at
a time, so samples are joined in steps: `sample_files` is the images joined with `label_maps`, and
`samples` is `sample_files` joined with `inputs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
from stages.fields import Column
from stages.record import IDENTITY_DIM
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

# File set → (extension, media type). `images` must be the last one: mlcroissant joins the result of
# the last operation on the tars.
_FILE_SETS: Final = {
    "label-maps": ("parsing.png", "image/png"),
    "images": ("jpg", "image/jpeg"),
}
_SHAPES: Final = {"identity": str(IDENTITY_DIM), "box": "4", "landmarks": "10"}
_TEXT: Final[Node] = {"dataType": "sc:Text"}
_IMAGE: Final[Node] = {"dataType": "sc:ImageObject"}


def croissant_json(summary: Summary) -> str:
    """The content of croissant.json."""
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
    """The properties of the RAI vocabulary."""
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
        "rai:dataCollection": "All images that the source lists. `inputs` has a row for each of "
        "them, including those that were dropped.",
        "rai:dataPreprocessingProtocol": protocol or ["not recorded"],
        "rai:dataAnnotationProtocol": ["Annotated by models only, without human annotators."],
        "rai:machineAnnotationTools": tools or ["not recorded"],
        "rai:annotationsPerItem": "one of each kind",
        "rai:dataReleaseMaintenancePlan": "Images and people are removed on request (`python -m "
        "pipelines.cli takedown`). The shards that held them and this file are then written again.",
    }


# ------------------------------------------------------------------------------------------- files


def _distribution(summary: Summary) -> list[Node]:
    tars = [_file(manifest.tar, "application/x-tar") for manifest in summary.manifests]
    sidecars = [_file(manifest.sidecar, "application/x-parquet") for manifest in summary.manifests]
    rows = "the sidecars of all shards, with a row for every input"
    contained = {"containedIn": [{"@id": tar["@id"]} for tar in tars]}
    nodes = [
        *tars,
        *sidecars,
        _file_set("sidecars", "application/x-parquet", f"{SHARDS}/{SIDECARS}", rows),
        *(
            _file_set(name, media_type, f"*.{extension}", MEMBERS[extension]) | contained
            for name, (extension, media_type) in _FILE_SETS.items()
        ),
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


# ------------------------------------------------------------------------------------- record sets


def _record_sets(summary: Summary) -> list[Node]:
    # mlcroissant reads no column that a sidecar lacks, as where an older program wrote some shards
    columns = [c for c in summary.columns.values() if c.name not in summary.lacking]
    inputs = _table_fields("inputs", {"fileSet": {"@id": "sidecars"}}, columns)
    sets = [
        _record_set("samples", "The training samples.", _sample_fields(inputs)),
        _record_set("inputs", "A row for every input, also dropped and failed ones.", inputs),
        *_file_record_sets(),
    ]
    if summary.identities:
        identity_columns = [Column.from_arrow(field) for field in IDENTITIES_SCHEMA]
        file = {"fileObject": {"@id": IDENTITIES}}
        fields = _table_fields("identities", file, identity_columns)
        split = next(field for field in fields if field["@id"] == "identities/split")
        split["references"] = _from_field("splits/name")
        description = "The identity of each sample, and its side of the train/val split."
        sets += [_record_set("identities", description, fields), _splits()]
    return sets


def _record_set(name: str, description: str, fields: Sequence[Node]) -> Node:
    """A record set whose first field is its key."""
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": description,
        "key": {"@id": fields[0]["@id"]},
        "field": list(fields),
    }


def _field(path: str, description: str, **properties: Any) -> Node:
    """path: RECORD_SET/NAME."""
    return {
        "@type": "cr:Field",
        "@id": path,
        "name": path.partition("/")[2],
        "description": description,
        **properties,
    }


def _from_field(path: str) -> Node:
    """A source, or a reference: a field of another record set."""
    return {"field": {"@id": path}}


def _splits() -> Node:
    fields = [
        _field("splits/name", "name of the side", **_TEXT),
        _field("splits/url", "what the side is for", dataType=["sc:URL", "cr:Split"]),
    ]
    return {
        **_record_set("splits", "The sides of the train/val split.", fields),
        "dataType": "cr:Split",
        "data": [
            {"splits/name": "train", "splits/url": "cr:TrainingSplit"},
            {"splits/name": "val", "splits/url": "cr:ValidationSplit"},
        ],
    }


def _file_record_sets() -> list[Node]:
    """The label map of each sample; and its image and label map, joined by key."""

    def key(file_set: str) -> Node:
        return {
            "fileSet": {"@id": file_set},
            "extract": {"fileProperty": "filename"},
            # mlcroissant applies it to the file name, and after a join again to the key
            "transform": {"regex": "^([0-9a-f]+)"},
        }

    def content(file_set: str) -> Node:
        return {"fileSet": {"@id": file_set}, "extract": {"fileProperty": "content"}}

    key_text, label_text = "the file name up to its first dot", MEMBERS["parsing.png"]
    label_maps = [
        _field("label_maps/key", key_text, **_TEXT, source=key("label-maps")),
        _field("label_maps/label_map", label_text, **_IMAGE, source=content("label-maps")),
    ]
    joined = _from_field("label_maps/key")
    files = [
        _field("sample_files/key", key_text, **_TEXT, source=key("images"), references=joined),
        _field("sample_files/image", MEMBERS["jpg"], **_IMAGE, source=content("images")),
        _field(
            "sample_files/label_map",
            label_text,
            **_IMAGE,
            source=_from_field("label_maps/label_map"),
        ),
    ]
    return [
        _record_set("label_maps", "The label map of each sample.", label_maps),
        _record_set("sample_files", "The image and the label map of each sample.", files),
    ]


def _sample_fields(inputs: Sequence[Node]) -> list[Node]:
    """Fields of `sample_files` joined with those of `inputs`, which has all else of a sample."""
    key, *others = inputs
    joined = _from_field(key["@id"])
    return [
        _field(
            "samples/key",
            key["description"],
            **_TEXT,
            source=_from_field("sample_files/key"),
            references=joined,
        ),
        *(
            _field(f"samples/{name}", MEMBERS[extension], **_IMAGE, source=_from_field(path))
            for name, extension, path in (
                ("image", "jpg", "sample_files/image"),
                ("label_map", "parsing.png", "sample_files/label_map"),
            )
        ),
        *(_sample_field(field) for field in others),
    ]


def _sample_field(field: Node) -> Node:
    """The field of `samples` that has the values of a field of `inputs`."""

    def moved(node: Node, source: Node) -> Node:
        path = node["@id"].replace("inputs/", "samples/", 1)
        return {**node, "@id": path, "source": source}

    source = _from_field(field["@id"])
    if "subField" not in field:
        return moved(field, source)
    # mlcroissant gives a struct as a mapping from the ids of its fields to their values
    parts = [
        moved(part, {**source, "transform": {"jsonPath": f"$.'{part['@id']}'"}})
        for part in field["subField"]
    ]
    return {**field, "@id": field["@id"].replace("inputs/", "samples/", 1), "subField": parts}


def _table_fields(name: str, file: Node, columns: Iterable[Column]) -> list[Node]:
    """A field for each column of a parquet file. A column of structs has fields of its own."""

    def source(column: Column, **more: Any) -> Node:
        return {"source": {**file, "extract": {"column": column.name}, **more}}

    def node(column: Column) -> Node:
        field = _field(f"{name}/{column.name}", column.description)
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
    # Also thumbnails: some are empty, and mlcroissant can't open an empty image.
    return _TEXT
