"""Fields: what each member of a sample, each column of a sidecar and of identities.parquet holds,
in a line for people.

The data card and its Croissant description both tell it from here.
"""

from __future__ import annotations

from typing import Final

MEMBERS: Final = {
    "identity.npy": "ArcFace's embedding of the face: 512 numbers, float32, unit norm",
    "jpg": "the picture: upright, RGB, resized",
    "json": "everything else that is known of it: provenance, faces, measured figures, texts, "
    "review",
    "parsing.png": "label map: 8-bit grey, the picture's size, 19 CelebAMask-HQ classes",
    "txt": "caption of the whole picture",
}

SIDECAR: Final = {
    "key": "first 20 hex digits of sha256 of the picture's name relative to its source",
    "source": "the picture's name relative to its source",
    "status": "ok (a sample), dropped (by a rule) or failed",
    "reason": "why it was dropped or failed",
    "detail": "what was measured or raised, for people",
    "stage": "where it was dropped or failed",
    "sha256": "of the source's bytes",
    "tar_offset": "where the sample begins in the shard's tar; -1: not there",
    "tar_size": "bytes of the sample in the tar",
    "held_offset": "the same in the held tar, which keeps what a rule dropped; -1: not there",
    "held_size": "bytes of it in the held tar",
    "members": "name, offset and size of each of the sample's files, in the tar that holds it",
    "license": "as the source states it",
    "author": "as the source states it",
    "consent": "of the people shown, as the source states it",
    "width": "pixels of the resized picture",
    "height": "pixels of the resized picture",
    "source_width": "upright pixels of the source's picture",
    "source_height": "upright pixels of the source's picture",
    "faces": "every face found: box, five landmarks, detection score; pixels of the resized "
    "picture",
    "face": "which of them was chosen; -1: none",
    "face_count": "how many faces were found",
    "score": "detection score of the chosen face, 0 to 1",
    "face_side": "short side of its box, pixels",
    "label_areas": "share of the picture for each of the 19 labels",
    "sharpness": "of the chosen face, normalised for its size; higher is sharper",
    "brightness": "mean luma of its skin, 0 to 1",
    "clipped": "share of it that is black or white, 0 to 1",
    "yaw": "degrees; over 0: turned to the viewer's right",
    "pitch": "degrees; 0 is frontal",
    "roll": "degrees; 0 is upright",
    "occlusion": "share of the face that something else covers, 0 to 1",
    "hash": "256-bit perceptual hash of the picture, hex",
    "identity": "ArcFace's embedding, 512 numbers, unit norm",
    "identity_norm": "its norm before it was made 1; low where a face is hard to recognise",
    "caption": "of the whole picture",
    "face_caption": "of the face: face, ears, eyes, nose, mouth",
    "caption_tokens": "CLIP tokens of the caption, uncut",
    "face_caption_tokens": "CLIP tokens of the face caption, uncut",
    "text_tokens": "CLIP tokens of the training text that the trainer makes of both",
    "cut": "share of the two captions' tokens that the training text leaves out, 0 to 1",
    "trainable": "true if at least one region is fused into its word in training",
    "fused": "regions that the trainer will fuse",
    "unfused": "regions that it won't, and why",
    "absent": "regions that a caption names and the label map doesn't hold",
    "region_words": "words of the clause about face, ears, eyes, nose and mouth; 0: none",
    "thumbnail": "WebP, 96 pixels on the long side",
    "thumbnail_labels": "its label map, 8-bit grey PNG",
}

IDENTITIES: Final = {
    "key": "of the sample",
    "shard": "number of the shard that holds it",
    "identity_id": "who it shows: samples with equal ids are taken for one person",
    "identity_size": "samples of that identity",
    "split_group": "identities that may be one person, and stay on one side together",
    "split": "train or val; an identity is on one side only",
    "nearest": "keys of the samples whose faces are most alike, the closest first",
    "similarity": "their cosines",
}
