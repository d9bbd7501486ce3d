"""The command: settings, keys, rates, the servers around the app, and the page.

    python -m pytest tests/serving/test_serve.py

The page is tested in headless Chromium where there is one (Debian: chromium, chromium-driver).
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import requests
import serving_helpers as serving
from conftest import ROOT, environment, run
from serving_helpers import LONG, START, WAIT, Server, in_background, run_server

import serve
from gptlib.common import UserError
from gptlib.config import shown_default
from gptlib.serving.http_server import listen
from serve import Settings, read_settings

model, home, server = serving.model, serving.home, serving.server


def test_the_manuals_commands_work_as_they_stand(home):
    """Guards against a manual whose first commands fail when they are typed in."""
    for port in (5000, 8080):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"something else has port {port} here")
    (home / "serve.py").unlink(missing_ok=True)
    (home / "serve.py").symlink_to(ROOT / "serve.py")
    lines = ["PORT=8080 MODEL_CHECKPOINT=log/model_40000.pt python serve.py", "python serve.py"]
    curl = (
        """curl -X POST http://localhost:5000/generate -H "Content-Type: application/json" """
        """-d '{"prompt": "The future of AI is", "max_length": 100, """
        """"temperature": 0.8, "top_k": 50}'"""
    )
    env = {**environment(), "PATH": os.path.dirname(sys.executable) + ":" + os.environ["PATH"]}
    processes = [
        subprocess.Popen(
            ["bash", "-c", "exec env " + line], cwd=home, env=env, stderr=subprocess.DEVNULL
        )
        for line in lines
    ]
    try:
        for port in (5000, 8080):

            def healthy(port=port):
                with contextlib.suppress(requests.ConnectionError):
                    return (
                        requests.get(f"http://127.0.0.1:{port}/health", timeout=START).json()[
                            "status"
                        ]
                        == "healthy"
                    )

            Server.until(healthy, START)
        found = subprocess.run(["bash", "-c", curl], capture_output=True, timeout=WAIT)
        answer = json.loads(found.stdout)
        assert answer["prompt"] == "The future of AI is"
        assert answer["generated_text"].startswith(answer["prompt"])
        assert answer["tokens_generated"] == 100
        assert answer["finish_reason"] == "length"
        assert requests.post(
            "http://127.0.0.1:8080/generate", json=dict(prompt="x"), timeout=WAIT
        ).ok
    finally:
        for p in processes:
            p.send_signal(signal.SIGINT)
        assert [p.wait(WAIT) for p in processes] == [0, 0]


def test_slow_bodies_block_no_thread(server):
    """Guards against clients that block the server by sending a byte a second.

    Thrice as many clients as there are threads send a byte a second; the others do not notice.
    """
    body = b'{"prompt": "slow", "max_length": 3}'
    head = (
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    )
    with contextlib.ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), WAIT))
            for _ in range(48)
        ]
        for s in slow:
            s.sendall(head)
        for i in range(3):
            for s in slow:
                s.sendall(body[i : i + 1])
            assert server.post(prompt="fast", max_length=3).ok
            time.sleep(1)
        slow[0].sendall(body[3:])
        assert b"200 OK" in slow[0].recv(1000)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_ten_megabytes_is_413(server, chunked):
    """Guards against a body that fills the memory."""
    body = b'{"prompt": "' + b"a" * 10**7 + b'"}'
    for _ in range(3):
        response = requests.post(
            f"{server.url}/generate",
            data=iter([body]) if chunked else body,
            timeout=WAIT,
            headers={"Content-Type": "application/json"},
        )
        assert response.status_code == 413
        assert "1048577" in response.json()["error"]["message"]
    assert server.post(prompt="abc", max_length=2).ok


@pytest.fixture(scope="module")
def guarded(home):
    env = dict(API_KEY="s3crét", RATE_LIMIT="6 per minute", MODEL_NAME="mine")
    with run_server(home, **env) as server:
        server.headers = {"X-API-Key": "s3crét".encode()}
        yield server.ready()


def test_the_key_is_needed_outside_health_and_page(guarded):
    """Guards against a route that forgets the API key."""
    for path in ("/health", "/"):
        assert requests.get(guarded.url + path, timeout=WAIT).status_code == 200
    wrong = [
        {},
        {"X-API-Key": "wrong"},
        {"Authorization": "Bearer s3cr"},
        {"Authorization": "Basic czNjcmV0"},
        {"X-API-Key": b"\xff\xfe"},
    ]
    for headers in wrong:
        for path in ("/metrics", "/v1/models", "/openapi.json", "/nowhere"):
            response = requests.get(guarded.url + path, headers=headers, timeout=WAIT)
            assert response.status_code == 401
            assert "API key" in response.json()["error"]["message"]
        assert guarded.post(prompt="a", headers={"X-API-Key": "", **headers}).status_code == 401
    assert guarded.get("/v1/models").json()["data"][0]["id"] == "mine"
    bearer = {"Authorization": "Bearer s3crét".encode()}
    assert requests.get(f"{guarded.url}/metrics", headers=bearer, timeout=WAIT).ok
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_the_rate_limit_is_met_with_429(guarded):
    """Guards against a rate limit that does not limit, or limits /health."""
    answers = [guarded.post(prompt="a", max_length=1) for _ in range(7)]
    assert [a.status_code for a in answers] == [200] * 6 + [429]
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 60
    assert "6 per 1 minute" in answers[-1].json()["error"]["message"]
    assert guarded.get("/health").ok


def test_gunicorn_serves_and_drains(home):
    """Guards against what waitress does and another WSGI server does not."""
    argv = [
        sys.executable,
        "-m",
        "gunicorn",
        "serve:app",
        "--worker-class",
        "gthread",
        "--workers",
        "1",
        "--threads",
        "16",
        "--timeout",
        "0",
        "--graceful-timeout",
        "20",
        "--bind",
        "127.0.0.1:0",
    ]
    with run_server(home, argv=argv) as server:
        server.ready()
        assert server.post(prompt="abc", max_length=5).json()["tokens_generated"] == 5
        long = server.post(stream=True, prompt="abc", max_length=LONG)
        lines = long.iter_lines()
        assert next(lines)
        server.until(lambda: server.metric("gpt2_slots_in_use") == 1)
        long.close()
        server.idle()
        prompt_tokens = server.metric("gpt2_prompt_tokens_total")
        with pytest.raises(
            requests.Timeout
        ):  # not a stream: it hangs up before there is anything to read
            requests.post(
                f"{server.url}/generate", json=dict(prompt="abc", max_length=LONG), timeout=0.5
            )
        server.until(lambda: server.metric("gpt2_prompt_tokens_total") == prompt_tokens + 3)
        server.idle()
        assert server.post(data="x" * 2 * 10**6).status_code == 413
        running = in_background(server.post, prompt="abc", max_length=2000)
        server.until(lambda: server.metric("gpt2_prompt_tokens_total") == prompt_tokens + 6)
        assert server.stop() == 0
        assert running.result(WAIT).json()["tokens_generated"] == 2000


def test_flags_override_the_environment():
    """Guards against a setting that is ignored, or accepted when it is wrong."""
    found = read_settings(
        ["--port", "7", "--slots=2"],
        dict(PORT="8080", HOST="::1", COMPILE="1", REQUEST_TIMEOUT="2.5"),
    )
    assert found == Settings(port=7, slots=2, host="::1", compile=True, request_timeout=2.5)
    assert read_settings([], {"PORT": ""}) == Settings()
    for env, message in (
        (dict(PORT="x"), "PORT is 'x': expected a whole number"),
        (dict(PORT="-1"), "PORT is -1: expected 0 to 65535"),
        (dict(SLOTS="0"), "SLOTS is 0"),
        (dict(REQUEST_TIMEOUT="nan"), "REQUEST_TIMEOUT is nan"),
        (dict(COMPILE="perhaps"), "true or false"),
        (dict(DTYPE="int4"), "choose one of auto"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            read_settings([], env)
    for argv, env in (([], {"API_KEY": ""}), ([], {"API_KEY": " "}), (["--api_key="], {})):
        with pytest.raises(UserError, match="API_KEY is set, but empty"):
            read_settings(argv, env)  # a secret that was forgotten would open the server
    with pytest.raises(UserError, match="RATE_LIMIT is 'often'"):
        serve.create_app(Settings(rate_limit="often"))


def test_errors_of_the_command_are_one_line(home, server):
    """Guards against a traceback where the user made a mistake."""
    for args, message in (
        ([f"--port={server.port}"], f"error: cannot listen on 127.0.0.1 port {server.port} (Addr"),
        (["--model_checkpoint=log/none.pt", "--port=0"], "error: no checkpoint 'log/none.pt'"),
        (["--prot=1"], "(did you mean --port?)"),
    ):
        found = run("serve.py", *args, cwd=home)
        assert found.returncode == 1
        assert message in found.stderr
        assert "Traceback" not in found.stderr


def test_a_mac_that_has_taken_the_port_is_named(monkeypatch):
    """Guards against a port that macOS itself has taken, which nobody who starts there knows."""

    def is_taken(*args, **how):
        raise OSError(48, "Address already in use")

    monkeypatch.setattr(socket, "create_server", is_taken)
    with pytest.raises(UserError, match="with HOST and PORT .macOS has AirPlay Receiver on port"):
        listen("127.0.0.1", 5000)
    with pytest.raises(UserError, match="with HOST and PORT$"):
        listen("127.0.0.1", 5001)


def test_importing_it_starts_nothing():
    """Guards against an import that starts threads or loads a web server."""
    code = (
        "import sys, threading, serve; print(threading.active_count(), "
        "*set(sys.modules) & {'flask', 'pydantic', 'waitress', 'prometheus_client', "
        "'limits'})"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), text=True, capture_output=True
    )
    assert (found.stdout, found.stderr) == ("1\n", "")


def test_the_documents_have_every_setting():
    """Guards against a table of settings that the program has outgrown."""
    paths = ROOT / "README.md", ROOT / "docs" / "serving.md"
    text = "\n".join(path.read_text() for path in paths)
    for f in dataclasses.fields(Settings):
        row = f"| `{f.name.upper()}` | {shown_default(f)} | {f.metadata['help']} |"
        assert row in text, f"neither README.md nor docs/serving.md has the row: {row}"


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
@pytest.mark.parametrize("body, status, expected", [
    ('{"error": {"message": "too long"}}', 400, "too long"),
    ("<html>Bad Gateway</html>", 502, "status 502 of a test: a proxy answered, not the server")])
def test_the_page_can_read_any_error(body, status, expected):
    """Guards against "Unexpected token '<'" as all that the page says of a proxy's error."""
    script = (ROOT / "gptlib" / "serving" / "page" / "page.js").read_text()
    function = re.search(r"async function errorMessage.*?\n}\n", script, re.DOTALL)[0]
    answer = f"new Response({json.dumps(body)}, {{status: {status}, statusText: 'of a test'}})"
    done = subprocess.run(["node", "-e", f"{function}errorMessage({answer}).then(console.log)"],
                          capture_output=True, text=True, timeout=WAIT)
    assert done.stdout == expected + "\n", done.stderr


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip(
            "no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "no-first-run",
        "disable-sync",
        "disable-background-networking",
        "disable-component-update",
        "disable-quic",
    ):
        options.add_argument(f"--{argument}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.implicitly_wait(5)
    yield browser
    browser.quit()


def test_the_page_writes_stops_and_fits_a_phone(browser, server):
    """Guards against a page that a browser cannot use, under its Content-Security-Policy."""

    def find(id):
        return browser.find_element("id", id)

    for width, scheme in ((390, "dark"), (1000, "light")):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 500),
        )
        features = [dict(name="prefers-color-scheme", value=scheme)]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=features))
        browser.get(server.url)
        server.until(lambda: "model_40000 at step 40,000" in find("about").text)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        dark = (
            browser.execute_script("return getComputedStyle(document.body).backgroundColor").count(
                "251"
            )
            == 0
        )
        assert dark == (scheme == "dark")
    assert not find("key").is_displayed()
    find("prompt").clear()
    find("prompt").send_keys("Hello <b>you</b>")
    find("seed").send_keys("3")
    find("go").click()
    server.until(lambda: "100 tokens in" in find("status").text)
    expected = server.post(prompt="Hello <b>you</b>", seed=3).json()["generated_text"]
    assert browser.execute_script("return document.getElementById('text').textContent") == expected
    browser.execute_script(
        "const e = document.getElementById('max_length'); e.value = e.max; e.oninput()"
    )
    find("go").click()
    server.until(lambda: server.metric("gpt2_slots_in_use") == 1 and len(find("text").text) > 30)
    find("stop").click()
    server.until(lambda: find("status").text == "stopped")
    server.idle()
    browser.execute_script(
        "const e = document.getElementById('temperature'); e.max = 9; e.value = 9"
    )
    find("go").click()
    server.until(lambda: "temperature is 9: expected a number from 0" in find("status").text)
    severe = [entry for entry in browser.get_log("browser") if "400" not in entry["message"]]
    assert not severe  # nothing blocked, nothing missing


def test_the_page_asks_for_the_key_where_one_is_needed(browser, guarded):
    """Guards against a page that cannot be used on a server with a key."""
    browser.get(guarded.url)
    guarded.until(lambda: browser.find_element("id", "key").is_displayed())
    browser.find_element("id", "go").click()
    guarded.until(
        lambda: "the API key is missing or wrong" in browser.find_element("id", "status").text
    )


@pytest.mark.parametrize(
    "path, content_type",
    [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")],
)
def test_the_pages_files_need_no_key(guarded, path, content_type):
    """Guards against a page that loads without its style or script where a key is set."""
    response = requests.get(guarded.url + path, timeout=WAIT)
    assert response.status_code == 200
    assert response.headers["Content-Type"].split(";")[0] == content_type


def test_the_page_needs_nothing_inline(guarded):
    """Guards against a policy, or a page, that lets injected scripts and styles run."""
    response = requests.get(guarded.url + "/", timeout=WAIT)
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert re.findall(r"\s(?:style|on\w+)=", response.text) == []
    assert re.findall(r"<style|<script(?! src=)", response.text) == []
