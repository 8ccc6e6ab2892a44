"""Lists of URLs: every way a server can answer, which addresses are refused, and a full run."""

from __future__ import annotations

import gzip
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import SourceError
from pipelines.run import run
from pipelines.sources import TransientFailure, build_source
from pipelines.sources.fetch import USER_AGENT, AddressCheck, Fetcher, is_public, opts_out
from pipelines.sources.urls import UrlList
from stages.base import Failed
from stages.record import Record
from tests.pipelines.helpers import DEMO, config, restore_sigint
from tests.pipelines.sources.server import Server, plain, serving

FAST = (
    "source.kind=urls",
    "source.backoff=0",
    "source.tries=3",
    "source.timeout=0.3",
    "source.downloads=8",
)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def source(file: Path, *overrides: str, private: bool = True) -> UrlList:
    settings = [
        *FAST,
        f"source.allow_private={str(private).lower()}",
        "resize.max_bytes=10000",
        *overrides,
    ]
    urls = build_source(config(file, file.parent / "out", *settings))
    assert isinstance(urls, UrlList)
    return urls


def fetched(folder: Path, url: str, *overrides: str, private: bool = True) -> Record:
    """Lists and reads one URL; returns its record."""
    (folder / "list.txt").write_text(url + "\n")
    urls = source(folder / "list.txt", *overrides, private=private)
    (item,) = urls.list()
    assert (item.size, item.version) == (-1, "")
    return urls.record(item)


def short(handler: BaseHTTPRequestHandler) -> None:
    plain(b"x" * 10, ("Content-Length", "5000"))(handler)
    handler.close_connection = True


def hang(server: Server) -> None:
    server.stopping.wait()


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 4096)


def silent(handler: BaseHTTPRequestHandler) -> None:
    plain(b"", ("Content-Length", "100"))(handler)
    handler.server.stopping.wait(20)  # type: ignore[attr-defined]


def dripping(handler: BaseHTTPRequestHandler) -> None:
    """Sends a byte before each timeout, without end."""
    plain(b"", ("Content-Length", "1000"))(handler)
    while not handler.server.stopping.wait(0.05):  # type: ignore[attr-defined]
        handler.wfile.write(b"x")


def dripping_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not handler.server.stopping.wait(0.05):  # type: ignore[attr-defined]
        handler.wfile.write(b"x")


def torn_chunks(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\nabc")
    handler.close_connection = True


def no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\x01 what is this\r\n\r\n")
    handler.close_connection = True


GZIP = ("Content-Encoding", "gzip")
ANSWERS = {
    "/ok": (plain(b"image"), "", ""),
    "/gzip": (plain(gzip.compress(b"image"), GZIP), "", ""),
    "/gone": (plain(b"", status=410), "failed", "http_410"),
    "/none": (plain(b"", status=204), "failed", "http_204"),
    "/later": (plain(b"", status=429), "failed", "http_429"),
    "/broken": (plain(b"", status=500), "failed", "http_500"),
    "/declared too large": (plain(b"", ("Content-Length", "10001")), "failed", "too_many_bytes"),
    "/endless": (endless, "failed", "too_many_bytes"),
    "/bomb": (plain(gzip.compress(bytes(50_000_000)), GZIP), "failed", "too_many_bytes"),
    "/no gzip": (plain(b"image", GZIP), "failed", "bad_encoding"),
    "/short": (short, "failed", "cut_off"),
    "/torn": (torn_chunks, "failed", "cut_off"),
    "/silent": (silent, "failed", "timeout"),
    "/drip": (dripping, "failed", "timeout"),
    "/drip headers": (dripping_headers, "failed", "timeout"),
    "/no http": (no_http, "failed", "connection"),
    "/loop": (plain(b"", ("Location", "/loop"), status=302), "failed", "too_many_redirects"),
    "/to file": (plain(b"", ("Location", "file:///etc/passwd"), status=302), "failed", "bad_url"),
    "/to nothing": (plain(b"", ("Location", "http://[bad"), status=302), "failed", "bad_url"),
    "/to nowhere": (plain(b"", status=302), "failed", "http_302"),
    "/robots": (
        plain(b"x", ("X-Robots-Tag", "all"), ("X-Robots-Tag", "Bot: NoAI")),
        "dropped",
        "robots_opt_out",
    ),
}


@pytest.mark.parametrize("path", ANSWERS)
def test_every_answer_has_its_reason(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    answer, status, reason = ANSWERS[path]
    # of a response that drips; longer than the timeout between two parts
    monkeypatch.setattr("pipelines.sources.fetch._DEADLINE_FACTOR", 3)
    server.answers[path.replace(" ", "%20")] = answer
    settings = ("source.tries=1",) if "drip" in path or "silent" in path else ()
    record = fetched(tmp_path, f"{server.url}{path}", *settings)
    assert (record.reason, record.stage) == (reason, "source" if reason else "")
    assert record.status == (status or "ok") and record.image == (b"" if reason else b"image")
    assert server.user_agents == {USER_AGENT}
    retried = {"http_429", "http_500", "cut_off", "connection"}
    requests = {"too_many_redirects": 6}.get(reason, 3 if reason in retried else 1)
    assert len(server.requested_paths) == requests


def test_a_request_is_retried_until_the_server_recovers(server: Server, tmp_path: Path) -> None:
    answers = iter(
        [plain(b"", ("Retry-After", "0"), status=503), plain(b"", status=503), plain(b"image")]
    )
    server.answers["/a"] = lambda handler: next(answers)(handler)
    assert (
        fetched(tmp_path, f"{server.url}/a").image == b"image" and len(server.requested_paths) == 3
    )


def test_retry_after_is_honoured_up_to_half_a_minute(server: Server, tmp_path: Path) -> None:
    client = fetcher()
    for header, expected in (("7", 7.0), ("junk", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)):
        server.answers["/a"] = plain(b"", ("Retry-After", header), status=503)
        with pytest.raises(TransientFailure) as caught:
            client.fetch(f"{server.url}/a")
        assert caught.value.retry_after == expected
    urls = source(tmp_path / "list.txt")
    waits = []
    for seconds in (7.0, 3600.0):
        urls._retrying.sleep = waits.append
        urls._retrying.statistics.clear()
        with pytest.raises(TransientFailure):
            urls._retrying(raise_, TransientFailure("http_503", retry_after=seconds))
    assert waits == [7.0, 7.0, 30.0, 30.0]


def raise_(error: Exception) -> None:
    raise error


def fetcher(is_allowed: AddressCheck = lambda address: True) -> Fetcher:
    return Fetcher(is_allowed, 0.5, 10_000, ignore_robots=False, concurrency=2)


def test_a_redirect_is_followed_five_times(server: Server, tmp_path: Path) -> None:
    for step in range(5):
        server.answers[f"/{step}"] = plain(b"", ("Location", f"{step + 1}"), status=307)
    server.answers["/5"] = plain(b"image")
    assert fetched(tmp_path, f"{server.url}/0").image == b"image"


def test_ignore_robots_fetches_the_image(server: Server, tmp_path: Path) -> None:
    server.answers["/a"] = plain(b"image", ("X-Robots-Tag", "noai"))
    assert fetched(tmp_path, f"{server.url}/a", "source.ignore_robots=true").image == b"image"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["noai"], True),
        (["NOINDEX, nofollow"], True),
        (["nofollow", "otherbot: none, NoImageAI"], True),
        (["googlebot:noimageindex"], True),
        ([], False),
        (["all", "nosnippet"], False),
        (["unavailable_after: 25 Jun 2027 15:00:00 PST"], False),
        (["noaiding"], False),
    ],
)
def test_which_robots_headers_opt_out(values: list[str], expected: bool) -> None:
    assert opts_out(values) is expected


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_a_private_address_is_refused_before_anything_is_sent(
    server: Server, tmp_path: Path, host: str
) -> None:
    server.answers["/a"] = plain(b"image")
    record = fetched(tmp_path, f"http://{host}:{server.server_port}/a", private=False)
    assert (record.reason, server.requested_paths) == ("refused_address", [])


def test_a_redirect_to_a_private_address_is_refused(server: Server) -> None:
    server.answers["/a"] = plain(
        b"", ("Location", "http://169.254.169.254/latest/meta-data"), status=302
    )
    client = fetcher(lambda address: address == "127.0.0.1" or is_public(address))
    with pytest.raises(Failed) as caught:
        client.fetch(f"{server.url}/a")
    assert (caught.value.reason, server.requested_paths) == ("refused_address", ["/a"])


def test_tls_verifies_the_host_name_not_the_address(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers["/a"] = plain(b"image")
    certificate = server.secure(tmp_path)
    by_name, by_address = (
        f"https://{host}:{server.server_port}/a" for host in ("localhost", "127.0.0.1")
    )
    assert fetched(tmp_path, by_name).reason == "bad_certificate"  # self-signed
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert fetched(tmp_path, by_name).image == b"image"
    assert fetched(tmp_path, by_address).reason == "bad_certificate"


PUBLIC = "8.8.8.8 2606:4700:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808"
PRIVATE = """
    0.0.0.0 10.0.0.1 100.64.0.1 127.0.0.1 127.8.8.8 169.254.169.254 172.16.0.1 192.168.1.1 192.0.2.1
    198.18.0.1 224.0.0.1 240.0.0.1 255.255.255.255 :: ::1 fe80::1 fe80::1%eth0 fc00::1 fd12::1
    fec0::1 ff02::1 ff0e::1 2001:db8::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::127.0.0.1
    64:ff9b::a9fe:a9fe 2002:7f00:1::1 2001:0:4136:e378:8000:63bf:80ff:fffe
"""


@pytest.mark.parametrize(
    ("address", "expected"),
    [*((a, True) for a in PUBLIC.split()), *((a, False) for a in PRIVATE.split())],
)
def test_which_addresses_are_public(address: str, expected: bool) -> None:
    assert is_public(address) is expected


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/a.jpg",
        "file:///etc/passwd",
        "no url",
        "http://",
        "http://h:x/",
        "http://u:pw@h.example/",
    ],
)
def test_a_bad_url_fails_without_repeating_credentials(tmp_path: Path, url: str) -> None:
    record = fetched(tmp_path, url)
    assert record.reason == "bad_url" and "pw" not in record.detail + record.source


def test_a_closed_port_and_an_unknown_host_fail_without_repeating_the_query(tmp_path: Path) -> None:
    secret = "?token=s3cr3t"
    with serving() as other:
        closed = other.server_port
    for host in (f"127.0.0.1:{closed}", "no-such-host.invalid"):
        record = fetched(tmp_path, f"http://{host}/a.jpg{secret}")
        assert record.reason == "connection" and "s3cr3t" not in record.detail


def test_lists_of_every_format_give_the_same_inputs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    urls = ["http://a.example/1.jpg?x=ü", "http://u:pw@b.example/2.jpg", "http://b.example/2.jpg"]
    rows = [[url, f"n{i}", "CC0", "Ada"] for i, url in enumerate(urls)]
    names = ["url", "id", "license", "person"]
    pq.write_table(
        pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows]),
        tmp_path / "a.parquet",
    )
    (tmp_path / "a.csv").write_text("\ufeff" + "\n".join(",".join(row) for row in [names, *rows]))
    (tmp_path / "a.tsv").write_text("\r\n".join("\t".join(row) for row in [names, *rows]))
    (tmp_path / "a.txt").write_text("\n\n".join(urls))
    expected = ["http://a.example/1.jpg?x=ü", "http://b.example/2.jpg"]
    for extension in ("parquet", "csv", "tsv", "txt"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            items = list(source(tmp_path / f"a.{extension}").list())
        assert [item.source for item in items] == expected
        assert [item.locator.decode() for item in items] == urls[:2]
        assert "1 URLs" in caplog.text and "example" not in caplog.text
        provenance = "" if extension == "txt" else '{"license": "CC0", "person": "Ada"}'
        assert [item.provenance for item in items] == [provenance] * 2
    named = source(tmp_path / "a.csv", "source.name_column=id").list()
    assert [item.source for item in named] == ["n0", "n1"]


def test_a_list_without_the_url_column_raises_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("link,id\nhttp://a.example,1\n")
    with pytest.raises(SourceError, match=r"url_column='url'.*link, id"):
        list(source(tmp_path / "a.csv").list())
    with pytest.raises(SourceError, match="isn't there"):
        list(source(tmp_path / "missing.csv").list())


def test_the_ledger_of_a_list_balances(server: Server, portraits: Path, tmp_path: Path) -> None:
    one, two = sorted(portraits.glob("*.jpg"))[:2]
    server.answers |= {"/1": plain(one.read_bytes()), "/2": plain(two.read_bytes())}
    server.answers["/3"] = plain(one.read_bytes(), ("X-Robots-Tag", "noai"))
    (tmp_path / "list.txt").write_text("\n".join(f"{server.url}/{n}" for n in (1, 2, 3, 4, 1)))
    settings = [*FAST, "source.allow_private=true", "source.timeout=5"]
    ledger = run(config(tmp_path / "list.txt", tmp_path / "out", *settings))
    assert (ledger.inputs, ledger.written) == (4, 2)
    assert (dict(ledger.dropped), dict(ledger.failed)) == ({"robots_opt_out": 1}, {"http_404": 1})


def test_ctrl_c_does_not_wait_for_a_server_that_hangs(server: Server, tmp_path: Path) -> None:
    server.answers["/hangs.jpg"] = lambda handler: hang(server)
    (tmp_path / "list.txt").write_text(f"{server.url}/hangs.jpg\n{server.url}/hangs.jpg?again\n")
    command = [sys.executable, "-m", "pipelines.cli", "run", "--config", DEMO]
    settings = [
        f"source.path={tmp_path}/list.txt",
        f"output={tmp_path}/out",
        "source.kind=urls",
        "source.timeout=600",
        "source.allow_private=true",
        "executor=inline",
    ]
    process = subprocess.Popen(
        [*command, *settings], stderr=subprocess.PIPE, text=True, preexec_fn=restore_sigint
    )
    while process.poll() is None and "/hangs.jpg" not in server.requested_paths:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)  # if it waited, it would take ten minutes
    assert process.returncode == 130
    assert "The same command continues" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "out" / "run.lock").exists()
