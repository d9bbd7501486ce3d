"""The campaign: 64 clients of two servers behind nginx, configured as docs/serving.md says, while
one of them is killed, both are restarted in turn and one is told to stop.

    python -m pytest tests/campaign/test_campaign_nginx.py -m campaign

As root, with nginx and openssl; skipped elsewhere. Two minutes of load.
"""

import collections
import http.client
import json
import os
import random
import re
import shutil
import signal
import ssl
import subprocess
import threading
import time

import campaign
import pytest
import serving_helpers as serving
from conftest import ROOT, free_ports
from serving_helpers import Server

pytestmark = campaign.marks
progress = campaign.progress
home = serving.home

CLIENTS = 64
SECONDS = 20 * min(1, campaign.SCALE)  # of load before, between and after what happens
TLS = ssl._create_unverified_context()


def nginx_config(folder, port, upstreams):
    """docs/serving.md's configuration with ports and a certificate of this test."""
    text = (ROOT / "docs" / "serving.md").read_text()
    block = re.search(r"^```nginx\n(.*?)^```", text, re.M | re.S)[1]
    files = {"443": f"127.0.0.1:{port}", "127.0.0.1:5000": f"127.0.0.1:{upstreams[0]}",
             "127.0.0.1:5001": f"127.0.0.1:{upstreams[1]}",
             "/etc/ssl/gpt2.pem": f"{folder}/gpt2.pem", "/etc/ssl/gpt2.key": f"{folder}/gpt2.key"}
    for documented, ours in files.items():
        assert block.count(documented) == 1, documented
        block = block.replace(documented, ours)
    return (f"user root; daemon off; worker_processes 2; pid {folder}/pid; error_log stderr crit;\n"
            f"events {{ worker_connections 1024; }}\nhttp {{ access_log off;\n{block}}}\n")


@pytest.fixture
def nginx(tmp_path):
    """(port of nginx, ports of the two servers behind it)."""
    missing = [program for program in ("nginx", "openssl") if not shutil.which(program)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root, nginx and openssl; not here: {', '.join(missing) or 'root'}")
    port, *upstreams = free_ports(3)
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                    "-subj", "/CN=localhost", "-keyout", tmp_path / "gpt2.key",
                    "-out", tmp_path / "gpt2.pem"], check=True, capture_output=True)
    (tmp_path / "nginx.conf").write_text(nginx_config(tmp_path, port, upstreams))
    process = subprocess.Popen(["nginx", "-c", tmp_path / "nginx.conf", "-e", "stderr"])
    yield port, upstreams
    process.terminate()
    process.wait()


class Load:
    """Clients that ask one after the other, half of them for streams, each from its own address."""

    def __init__(self, port):
        self.port, self.phase, self.stopped = port, "two servers", threading.Event()
        self.outcomes, self.tokens = collections.Counter(), collections.Counter()
        self.threads = [threading.Thread(target=self.client, args=(n,)) for n in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def client(self, n):
        rng = random.Random(n)
        while not self.stopped.is_set():
            begin, length, stream = time.monotonic(), rng.randint(20, 200), n % 2 == 0
            outcome = self.ask(n, dict(prompt="the cat", max_tokens=length, stream=stream))
            self.outcomes[self.phase, outcome] += 1
            self.tokens[self.phase] += length if outcome == "whole" else 0
            # nginx lets one address ask once a second
            self.stopped.wait(max(0, begin + 1.1 - time.monotonic()))

    def ask(self, n, body):
        """whole; cut: it had begun, and its end is missing; or why there was no answer."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=400, context=TLS,
                                                 source_address=(f"127.0.1.{n + 1}", 0))
        try:
            connection.request("POST", "/v1/completions", json.dumps(body),
                               {"Content-Type": "application/json"})
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            return repr(error)
        if answer.status != 200:
            return f"{answer.status} {answer.read()[:200]}"
        try:
            text = answer.read()
        except (OSError, http.client.HTTPException):
            return "cut"
        finally:
            connection.close()
        is_whole = text.endswith(b"data: [DONE]\n\n") if body["stream"] else json.loads(text)
        return "whole" if is_whole else "cut"

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join()


def test_nothing_is_lost_that_had_not_begun(home, nginx, progress):
    """Guards against requests that are lost although another process could have answered them: when
    a server is killed, restarted or told to stop."""
    port, ports = nginx
    env = dict(TRUSTED_PROXIES="1", SLOTS="8", QUEUE_SIZE="64", OMP_NUM_THREADS="1")
    servers = []

    def start(i):
        servers[i:i + 1] = [Server(home, PORT=str(ports[i]), **env)]
        servers[i].ready()

    load = None
    try:
        start(0)
        start(1)
        load = Load(port)
        time.sleep(SECONDS)
        load.phase = "kill -9"
        servers[0].process.kill()
        time.sleep(SECONDS / 4)
        start(0)
        load.phase = "restarts"
        for i in (0, 1):
            assert servers[i].stop() == 0
            start(i)
        time.sleep(SECONDS)
        load.phase = "SIGTERM"
        assert servers[1].stop() == 0
        load.phase = "one server"
        time.sleep(SECONDS)
    finally:
        if load:
            load.stop()
        for server in servers:
            if server.process.poll() is None:
                os.killpg(server.process.pid, signal.SIGKILL)
    rates = ", ".join(f"{phase}: {load.tokens[phase] / SECONDS:.0f} tok/s"
                      for phase in ("two servers", "one server"))
    progress.tell(f"{CLIENTS} clients behind nginx, {rates}; {dict(load.outcomes)}")
    assert {outcome for _, outcome in load.outcomes} <= {"whole", "cut"}
    assert {phase for phase, outcome in load.outcomes if outcome == "cut"} <= {"kill -9"}
