"""The command `caption-servers`, with `transformers serve` and with a program that only answers
health checks, on a real Ray cluster.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from skimage.data import astronaut
from typer.testing import CliRunner

from configs.captions import OpenAIConfig
from configs.errors import ConfigError, ServerError
from configs.schema import RayConfig
from pipelines.caption_servers import CaptionServers
from pipelines.cli import app
from pipelines.ledger import read_ledger
from stages.backends.openai import OpenAICaptioner
from stages.codec import encode_jpeg
from stages.executors.cluster import list_nodes, ray_cluster
from stages.executors.fleet import ServerFleet
from stages.executors.server_actor import ServerSpec
from stages.record import Record
from stages.storage.store import Store
from tests.chaos.cluster import Cluster
from tests.pipelines.fleet import TRANSFORMERS, Fleet, caption_servers, mentioning, wait_until
from tests.stages.records import texts_of
from tests.stages.tiny_llava import make_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.thorough]

PROGRAM = """\
import http.server, subprocess, sys, time

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(0.5 * (model == "slow"))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

model, host, port = (sys.argv[sys.argv.index(name) + 1] for name in ("serve", "--host", "--port"))
print("\\x1b[31mloading", model, flush=True)
if model == "broken":
    sys.exit("no such model")
subprocess.Popen(["sleep", "300.5" + port])  # as vLLM has a process for the GPU
http.server.HTTPServer((host, int(port)), Health).serve_forever()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of one node, whose address is a loopback one."""
    with Cluster(1) as nodes:
        yield nodes.address


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module", autouse=True)
def fleet(
    cluster: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """Two servers with the checkpoint. They start while the first tests run."""
    errors = tmp_path_factory.mktemp("fleet") / "errors.txt"
    with caption_servers(checkpoint, errors, *TRANSFORMERS, f"ray.address={cluster}") as started:
        yield started


@pytest.fixture(scope="module")
def connected(cluster: str) -> Iterator[None]:
    """This process is connected to the cluster."""
    with ray_cluster(RayConfig(address=cluster)):
        yield


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program"
    path.write_text(f"#!{sys.executable}\n{PROGRAM}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def spec_of(program: Path, model: str = "any", count: int = 1, **limits: float) -> ServerSpec:
    arguments = ["serve", model, "--host", "{host}", "--port", "{port}"]
    return ServerSpec(
        program=str(program),
        arguments=arguments,
        count=count,
        gpus=0,
        cpus=0.1,
        logs=str(program.parent),
        **limits,
    )


def ask(base_url: str, checkpoint: Path) -> tuple[str, str]:
    """Returns both captions of a photograph."""
    config = OpenAIConfig(base_url=base_url, model=str(checkpoint), max_new_tokens=8, tries=1)
    record = Record(key="0" * 20, source="astronaut", image=encode_jpeg(astronaut(), 95))
    (texts,) = texts_of(OpenAICaptioner(config).caption([record]))
    return texts


def test_a_server_keeps_its_url_when_it_hangs_and_when_its_actor_is_killed(
    connected: None, program: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with ServerFleet(spec_of(program, "slow", count=2, silent_limit=2.5)) as fleet:
        become_ready(fleet)
        urls = fleet.base_urls
        time.sleep(4)  # as if this process were stopped for a while: the servers aren't silent
        for _ in range(20):
            fleet.tick()
            time.sleep(0.1)
        assert fleet.ready and "not answered" not in caplog.text
        hangs, loses_its_actor = (server_at(url) for url in urls)
        hangs.suspend()
        actor = loses_its_actor.parent()
        assert actor is not None and "ServerActor" in " ".join(actor.cmdline())
        actor.kill()
        causes = ("its actor died", "not answered for 2.5 s")
        wait_until(lambda: tick(fleet) and all(cause in caplog.text for cause in causes), 30)
        become_ready(fleet)
        assert fleet.base_urls == urls
        assert {server_at(url) for url in urls}.isdisjoint({hangs, loses_its_actor})
        assert len(mentioning(program)) == 2
    # a helper is killed with its server, but the end of it isn't waited for
    wait_until(lambda: not mentioning(program) and not helpers_of(urls), 10)


def test_without_vllm_the_command_says_what_to_install(
    cluster: str, connected: None, tmp_path: Path
) -> None:
    options = ["--model", "some/model", "--logs", str(tmp_path)]
    command = ["caption-servers", *options, f"ray.address={cluster}"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "vllm is missing" in result.stderr and "pip install vllm" in result.stderr
    assert "--engine transformers" in result.stderr and "Traceback" not in result.output


def test_a_command_gets_the_urls_and_the_cluster_and_its_exit_status_is_passed_on(
    cluster: str, connected: None, program: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    script = f"echo {{base_url}} {{model}} $RAY_ADDRESS > {output}; exit 7"
    result = CliRunner().invoke(app, command_of(cluster, program, "sh", "-c", script))
    assert result.exit_code == 7, result.output
    urls, model, address = output.read_text().split()
    assert f"base_url={urls} " in result.stdout and len(urls.split(",")) == 2
    assert (model, address) == ("any", cluster)
    wait_until(lambda: not mentioning(program) and not helpers_of(urls.split(",")), 10)


def test_signals_are_forwarded_to_the_command(
    cluster: str, connected: None, program: Path, tmp_path: Path
) -> None:
    script = f"trap 'exit 5' INT; kill -INT {os.getpid()}; for i in $(seq 100); do sleep 0.1; done"
    result = CliRunner().invoke(app, command_of(cluster, program, "sh", "-c", script))
    assert result.exit_code == 5, result.output
    assert not mentioning(program)


def test_sigkill_to_the_command_leaves_no_server(program: Path, tmp_path: Path) -> None:
    arguments = ["--program", str(program), "ray.object_store_mb=80"]
    with caption_servers("any", tmp_path / "errors.txt", *arguments) as fleet:
        assert all(url.startswith("http://127.0.0.1:") for url in fleet.base_urls)
        assert len(helpers_of(fleet.base_urls)) == 2
        fleet.process.kill()
        wait_until(lambda: not mentioning(program) and not helpers_of(fleet.base_urls), 30)


def test_gpus_are_shared_equally_and_a_model_must_be_given(tmp_path: Path) -> None:
    settings = CaptionServers(model="some/model", gpus=8, servers=2, logs=str(tmp_path))
    spec = settings.spec()
    assert (spec.count, spec.gpus) == (2, 4)
    arguments = " ".join(spec.arguments)
    assert "--tensor-parallel-size 4" in arguments and "--generation-config vllm" in arguments
    more = CaptionServers(model="m", gpus=3, server_args="--a 'b c'", logs=str(tmp_path)).spec()
    assert (more.count, more.gpus, list(more.arguments[-2:])) == (3, 1, ["--a", "b c"])
    with pytest.raises(ConfigError, match="--gpus 3 --servers 2"):
        CaptionServers(model="m", gpus=3, servers=2)
    with pytest.raises(ConfigError, match="MODEL= of make"):
        CaptionServers(model="")


def test_both_servers_answer_and_their_urls_are_printed(fleet: Fleet, checkpoint: Path) -> None:
    assert fleet.settings["caption.backend"] == "openai"
    assert fleet.settings["caption.openai.model"] == str(checkpoint)
    first, second = fleet.base_urls
    assert first != second
    captions = ask(first, checkpoint)
    assert all(captions) and ask(second, checkpoint) == captions


def test_a_run_beside_the_servers_plans_with_what_they_leave(fleet: Fleet, connected: None) -> None:
    (node,) = list_nodes()
    assert node.cpus == pytest.approx(2 - 2 * 0.1)


def test_a_server_that_cannot_start_is_an_error_with_the_end_of_its_log(
    fleet: Fleet, connected: None, program: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fleet.base_urls
    with (
        pytest.raises(ServerError, match="exit status 1 3 times in a row") as raised,
        ServerFleet(spec_of(program, "broken")) as broken,
    ):
        become_ready(broken)
    log = program.with_name("server-1.log")
    assert str(raised.value).endswith(f"log, {log}:\nloading broken\nno such model")
    assert "again in 1 s" in caplog.text and "again in 2 s" in caplog.text
    assert [node.cpus for node in list_nodes()] == [pytest.approx(1.8)], "as before"


def test_a_killed_server_is_started_again_at_its_url(fleet: Fleet, checkpoint: Path) -> None:
    url, killed = next(iter(fleet.processes().items()))
    captions = ask(url, checkpoint)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: fleet.starts(url) == 2)
    assert "it ended with signal 9" in fleet.errors.read_text()
    assert fleet.processes()[url] != killed and not psutil.pid_exists(killed)
    assert ask(url, checkpoint) == captions


def test_a_run_goes_on_when_one_of_its_servers_is_killed(
    fleet: Fleet, data: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(data, tmp_path / "out"))
    url, killed = next(iter(fleet.processes().items()))
    starts, manifests = fleet.starts(url), sorted(output.glob("shards/*.json"))
    before = [contents(manifest) for manifest in manifests]
    # random weights write no sentences
    more = ("check_answers=false", "max_new_tokens=8", "concurrency=4", "tries=1")
    overrides = [*shlex.split(fleet.line), *(f"caption.openai.{setting}" for setting in more)]
    overrides += [f"output={output}", "executor=inline", "review.max_untrainable=1"]
    command = [sys.executable, "-m", "pipelines.cli", "run", "-c", str(output / "config.yaml")]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen([*command, *overrides], stdout=log, stderr=log)
    wait_until(lambda: contents(manifests[0]) not in (b"", before[0]))
    assert run.poll() is None
    os.kill(killed, signal.SIGKILL)  # of three shards, one is captioned
    assert run.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    ledger = read_ledger(Store(str(output)))
    assert ledger.written == 8 and not ledger.failed
    assert all(contents(m) != old for m, old in zip(manifests, before, strict=True))
    wait_until(lambda: fleet.starts(url) == starts + 1)


def test_sigterm_ends_all_servers(fleet: Fleet, checkpoint: Path) -> None:
    assert len(mentioning(checkpoint)) >= 3, "the command and two servers"
    fleet.process.terminate()
    assert fleet.process.wait(timeout=60) == 0
    assert not mentioning(checkpoint)


def contents(path: Path) -> bytes:
    """Returns a file's bytes; none while a run replaces it."""
    with suppress(FileNotFoundError):
        return path.read_bytes()
    return b""


def command_of(cluster: str, program: Path, *command: str) -> list[str]:
    options = ["--model", "any", "--servers", "2", "--cpus-each", "0.1", "--program", str(program)]
    logs = ["--logs", str(program.parent)]
    return ["caption-servers", *options, *logs, f"ray.address={cluster}", "--", *command]


def tick(fleet: ServerFleet) -> bool:
    fleet.tick()
    return True


def become_ready(fleet: ServerFleet) -> None:
    wait_until(lambda: tick(fleet) and fleet.ready, 60)


def server_at(url: str) -> psutil.Process:
    """Returns the process that serves a URL, by the port in its command line."""
    (process,) = mentioning(f"--port {port_of(url)}")
    return process


def helpers_of(urls: list[str]) -> list[psutil.Process]:
    """Returns the processes that the servers have started."""
    return [process for url in urls for process in mentioning(f"sleep 300.5{port_of(url)}")]


def port_of(url: str) -> str:
    return url.rpartition(":")[2].partition("/")[0]
