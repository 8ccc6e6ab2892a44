"""Every reason a record can be dropped or failed with: where it arises, what it means, what to do.

`python -m tests.docs` writes docs/reasons.md from this table, and tests/docs compares it with the
reasons that the code raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from stages.record import Status

ANY_STAGE: Final = "any stage"
_HTTP: Final = re.compile(r"http_\d{3}")


@dataclass(frozen=True, slots=True)
class Reason:
    """stages: where it arises. meaning, action: one or two sentences for people, in Markdown."""

    status: Status
    stages: tuple[str, ...]
    meaning: str
    action: str


def explain(reason: str) -> Reason | None:
    """The row of a record's `reason`, such as "no_face" or "http_404"; None if unknown."""
    return REASONS.get("http_*" if _HTTP.fullmatch(reason) else reason)


def _dropped(stages: str, meaning: str, action: str) -> Reason:
    return Reason(Status.DROPPED, tuple(stages.split(", ")), meaning, action)


def _failed(stages: str, meaning: str, action: str) -> Reason:
    return Reason(Status.FAILED, tuple(stages.split(", ")), meaning, action)


_SOURCE: Final = {
    "duplicate": _dropped(
        "source, global_pass",
        "The file has the same bytes as an earlier input, which is kept.",
        "Nothing. The detail names the input that is kept.",
    ),
    "robots_opt_out": _dropped(
        "source",
        "The server sent `X-Robots-Tag` with noai, noimageai, noindex or noimageindex.",
        "Ask the owner for permission; `source.ignore_robots=true` accepts such images.",
    ),
    "not_a_file": _failed(
        "source",
        "The name leads to no regular file: it is gone, or it is a folder, a broken link, a pipe, "
        "a socket, a device, or a link inside a tar.",
        "Restore the file, or remove the name from the source.",
    ),
    "unreadable": _failed(
        "source",
        "The file system or the object store refused to read the file, or a tar or table has "
        "changed since the inputs were listed.",
        "Check permissions and the disk, then run the same command again or `retry` this reason.",
    ),
    "unreachable": _failed(
        "source",
        "The object store gave no answer, or a temporary error, in all `source.tries` attempts.",
        "Check the store, then `retry` this reason.",
    ),
    "too_many_bytes": _failed(
        "source, resize",
        "The encoded image is larger than `resize.max_bytes`.",
        "Raise `resize.max_bytes` if the file is genuine.",
    ),
    "outside_source": _failed(
        "source",
        "A path is absolute, contains `..`, or is a link that leads out of the folder of its "
        "table, tar or JSON file.",
        "Move the file below that folder and correct the path.",
    ),
    "no_image": _failed(
        "source",
        "The image cell of the table is null, or the row names no file.",
        "Correct the row, or remove it.",
    ),
    "truncated_tar": _failed(
        "source",
        "The tar ends in the middle of a member or without its end mark. Its complete samples are "
        "used; this row represents the rest.",
        "Copy the tar again and run the same command again.",
    ),
    "damaged_tar": _failed(
        "source",
        "The tar holds bytes that are no valid header. The samples before them are used; this row "
        "represents the rest.",
        "Copy the tar again, or rebuild it, and run the same command again.",
    ),
    "duplicate_name": _failed(
        "source",
        "A second member of the tar has the name of an earlier one. The first is used.",
        "Rename the member if both images are wanted.",
    ),
    "bad_url": _failed(
        "source",
        "Not a URL to fetch: no http:// or https://, no host, a user name or password in it, or a "
        "redirect to something that is no URL.",
        "Correct the URL.",
    ),
    "refused_address": _failed(
        "source",
        "The host has no public address: it is private, loopback, link-local or reserved.",
        "Correct the URL; for a server of your own, `source.allow_private=true`.",
    ),
    "bad_certificate": _failed(
        "source",
        "The server's TLS certificate could not be verified.",
        "Correct the URL, or have the server repaired.",
    ),
    "too_many_redirects": _failed(
        "source",
        "More than five redirects.",
        "List the final URL.",
    ),
    "bad_encoding": _failed(
        "source",
        "The body does not decode as its `Content-Encoding` states.",
        "Download the image by other means.",
    ),
    "connection": _failed(
        "source",
        "No connection to the server: unknown host, refused or reset, in all `source.tries` "
        "attempts.",
        "`retry` this reason later.",
    ),
    "timeout": _failed(
        "source",
        "No byte for `source.timeout` seconds, or the whole image took over ten times that, in "
        "all attempts.",
        "`retry` this reason later, or raise `source.timeout`.",
    ),
    "cut_off": _failed(
        "source",
        "The server closed the connection before the end of the body, in all attempts.",
        "`retry` this reason later.",
    ),
    "http_*": _failed(
        "source",
        "The server answered with this HTTP status, such as `http_404`. 408, 425, 429 and 5xx "
        "were tried `source.tries` times.",
        "404 and 410: remove the URL. 429: lower `source.downloads`. 5xx: `retry` it later.",
    ),
    "bad_entry": _failed(
        "source",
        "The entry of the FGID JSON names no image.",
        "Add one of the image fields to the entry (docs/sources.md).",
    ),
    "bad_faces": _failed(
        "source",
        "The faces of the FGID entry are incomplete, not finite, or belong to an image of another "
        "size.",
        "Correct the entry, or remove `faces` and `face` from it so that they are detected.",
    ),
    "bad_parsing": _failed(
        "source",
        "The label map of the FGID entry is not a single-channel 8-bit PNG of the image's size "
        "with labels 0 to 18.",
        "Correct the file, or remove the field so that the image is parsed.",
    ),
    "bad_embedding": _failed(
        "source",
        "The identity embedding of the FGID entry is not a tensor of 512 finite numbers, or needs "
        "code to be loaded.",
        "Save it again as a plain tensor, or remove the field so that it is computed.",
    ),
}


def _answer(problem: str) -> Reason:
    return _failed(
        "caption",
        f"The captioner's second answer, to the prompt of the second try, still {problem}. The "
        "detail shows it.",
        "Change the prompts of the backend or its model, and `retry` this reason; "
        "`check_answers=false` takes every answer as a caption.",
    )


_STAGES: Final = {
    "license_not_allowed": _dropped(
        "rights",
        "The licence matches no pattern of `rights.license_allow`. Nothing of the image is kept.",
        "State the licence in the source, or extend `rights.license_allow`.",
    ),
    "consent_missing": _dropped(
        "rights",
        "The consent matches no pattern of `rights.consent_allow`. Nothing of the image is kept.",
        "State the consent in the source, or extend `rights.consent_allow`.",
    ),
    "too_small": _dropped(
        "resize",
        "The short side of the source is under `resize.min_side` pixels.",
        "Find a larger version, or lower `resize.min_side`.",
    ),
    "extreme_aspect": _dropped(
        "resize",
        "The long side is more than `resize.max_aspect` times the short side.",
        "Crop the image, or raise `resize.max_aspect`.",
    ),
    "empty_file": _failed("resize, source", "The file has no bytes.", "Copy it again."),
    "not_an_image": _failed(
        "resize, source",
        "The file doesn't begin like an image of any known format. The detail shows its first "
        "bytes.",
        "Convert it, or remove it from the source.",
    ),
    "unsupported_format": _failed(
        "resize, source",
        "The file begins like an image of a format that is not read, such as JPEG XL, Photoshop "
        "or camera raw, or like an AVIF or HEIF image whose decoder is not installed. The detail "
        "names the format.",
        "Convert it to JPEG or PNG. For AVIF and HEIF, install what the detail names on every "
        "node, then `retry` this reason.",
    ),
    "too_many_pixels": _failed(
        "resize, source",
        "The header declares more than `resize.max_pixels` pixels. Nothing was decoded.",
        "Raise `resize.max_pixels` if the file is genuine.",
    ),
    "too_many_scans": _failed(
        "resize, source",
        "A JPEG with over 500 scans, each of which costs a pass over the whole image.",
        "Encode it again if the file is genuine.",
    ),
    "truncated": _failed("resize, source", "The image file is cut short.", "Copy it again."),
    "undecodable": _failed(
        "resize, source",
        "The image file is damaged, or uses a variant of its format that can't be decoded.",
        "Open and save it with an image editor, or copy it again.",
    ),
    "no_face": _dropped(
        "detect",
        "No face scores at least `detect.min_score` at any of `detect.scales`.",
        "Nothing if there is no face; else lower `detect.min_score` or add a scale.",
    ),
    "no_face_parsed": _dropped(
        "parse",
        "A face was detected, but the parser labels no pixel as facial skin.",
        "Nothing: such a detection is rarely a face.",
    ),
    "no_identity": _failed(
        "embed",
        "The embedder gave no usable vector: a wrong size, or a norm of zero or infinity.",
        "Check that `embed.weights` is an ArcFace model with 512 outputs.",
    ),
    "bad_input": _failed(
        "caption",
        "Image, label map and face do not belong together: one is missing, or sizes differ.",
        "Make the image and its label map again; with `source.kind=fgid`, correct the entry.",
    ),
    "empty_caption": _failed(
        "caption",
        "The captioner answered with an empty text.",
        "Change the prompt or the model; only captions run again.",
    ),
    "caption_loop": _answer("repeats itself without an end"),
    "caption_refusal": _answer("is a refusal, and describes nothing"),
    "caption_not_english": _answer("is in another language than English"),
    "caption_names_a_person": _answer(
        "states who is in the picture, which the model can't know, or has capitals that look so"
    ),
    "caption_cut": _answer(
        "was cut off by `max_new_tokens`, or the face caption by `face_max_new_tokens`, before the "
        "end of its first sentence"
    ),
    "contradicted_caption": _dropped(
        "claims",
        "Label map or measures contradict too many claims of the captions "
        "(`claims.min_agreement`).",
        "Look at them: captions of another model or prompt may be better. 0 is off.",
    ),
    "caption_failed": _failed(
        "caption",
        "The caption server gave no answer for this image, but answered for a plain test image.",
        "Read the detail, then `retry` this reason.",
    ),
}


def _rule(setting: str, meaning: str) -> Reason:
    return _dropped(
        "quality_filter", f"{meaning} (`rules.{setting}`).", f"Change `rules.{setting}`; 0 is off."
    )


_RULES: Final = {
    "low_resolution": _rule("min_side", "The short side of the source is too small"),
    "too_many_faces": _rule("max_faces", "Too many faces of at least a third of the main one"),
    "too_few_faces": _rule("min_faces", "Too few faces"),
    "face_too_small": _rule("min_face", "The main face is too small"),
    "low_score": _rule("min_score", "The detection score of the main face is too low"),
    "blurred": _rule("min_sharpness", "The main face is blurred"),
    "too_dark": _rule("min_brightness", "The skin of the main face is too dark, badly lit"),
    "too_bright": _rule("max_brightness", "The skin of the main face is too bright"),
    "clipped": _rule("max_clipped", "Too much of the main face is pure black or white"),
    "turned_away": _rule("max_yaw", "The head is turned too far to a side"),
    "nodding": _rule("max_pitch", "The head is raised or lowered too far"),
    "tilted": _rule("max_roll", "The head is tilted too far"),
    "occluded": _rule("max_occlusion", "Too much of the main face is covered"),
    "weak_identity": _rule("min_identity_norm", "The embedding's norm is too low to trust"),
}

_OTHERS: Final = {
    "near_duplicate": _dropped(
        "global_pass",
        "The perceptual hash differs in at most `global_pass.max_hash_distance` of 256 bits from "
        "that of an earlier sample, which is kept.",
        "Nothing, or lower `global_pass.max_hash_distance`; -1 is off.",
    ),
    "face_duplicate": _dropped(
        "global_pass",
        "The identity embedding has a cosine of at least `global_pass.max_similarity` with that of "
        "an earlier sample, which is kept.",
        "Nothing, or raise `global_pass.max_similarity`; 0 is off.",
    ),
    "blocked_person": _dropped(
        "global_pass",
        "A face has at least the cosine of a removal request with `--block-person` to the person "
        "in it. The detail says which.",
        "Look at it. `takedown OUT --source NAME` removes it; `takedown OUT --release KEY` makes "
        "it a sample again if it shows somebody else.",
    ),
    "taken_down": _dropped(
        "takedown",
        "Removed on request. Only the key is left.",
        "Nothing. `takedown.jsonl` says when it was removed.",
    ),
    "killed_worker": _failed(
        ANY_STAGE,
        "The process that worked on this image died, such as by a segmentation fault or for lack "
        "of memory, even when it worked on this image alone.",
        "Remove or re-encode the image; give workers more memory if there are many.",
    ),
    "not_a_number": _failed(
        ANY_STAGE,
        "A stage measured NaN or infinity, which a sample can't hold.",
        "Report it with the image; the detail names the field.",
    ),
    "timed_out": _failed(
        ANY_STAGE,
        "A stage gave no answer for this image within `stuck_after` seconds.",
        "Remove or re-encode the image; raise `stuck_after` for slow models.",
    ),
}

REASONS: Final[dict[str, Reason]] = {**_SOURCE, **_STAGES, **_RULES, **_OTHERS}
