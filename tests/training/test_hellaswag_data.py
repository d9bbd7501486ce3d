"""HellaSwag's examples: a file is read as it is, named if it is broken, and downloaded once.

    python -m pytest tests/training/test_hellaswag_data.py
"""

import http.server
import json
import threading

import pytest

from gptlib.common import UserError
from gptlib.training import scoring

GOOD = {"ctx": "A man sits on a roof. he", "endings": ["a", "b", "c", "d"], "label": 3}


@pytest.mark.parametrize("line, complaint", [
    ('{"ctx": "A man', "broken JSON"),
    ("[" * 10**5, "broken JSON"),
    ("[1, 2]", "expected an object"),
    (json.dumps({**GOOD, "label": 4}), "label is 4"),
    (json.dumps({**GOOD, "label": "3"}), "label is '3'"),
    (json.dumps({**GOOD, "label": True}), "label is True"),
    (json.dumps({k: GOOD[k] for k in ("ctx", "endings")}), "label is None"),
    (json.dumps({**GOOD, "endings": ["a", "b", "c"]}), "expected a list of 4 texts"),
    (json.dumps({**GOOD, "endings": ["a", "b", "c", 4]}), "expected a list of 4 texts"),
    (json.dumps({**GOOD, "ctx": ""}), "ctx is ''"),
])
def test_a_broken_line_is_named(tmp_path, line, complaint):
    """Guards against a traceback, or a wrong accuracy, from a damaged file."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(UserError) as e:
        scoring.load_examples(str(path))
    assert f"{path}, line 3: " in str(e.value)
    assert complaint in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_is_loaded_as_it_is(tmp_path, encoding):
    """Guards against lost fields, empty lines that count, and text read in another encoding."""
    path = tmp_path / "data.jsonl"
    examples = [{**GOOD, "ind": 7}, {**GOOD, "ctx": "Ein Mann säße"}]
    lines = [json.dumps(example, ensure_ascii=False) for example in examples]
    path.write_text("\n\n".join(lines) + "\n", encoding=encoding)
    assert scoring.load_examples(path) == examples


@pytest.mark.parametrize("content", [None, b"\n", b"\xff\xfe\x00"])
def test_a_file_without_examples_is_named(tmp_path, content):
    """Guards against an evaluation of nothing when the file is missing, empty or binary."""
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="data.jsonl"):
        scoring.load_examples(path)


def test_without_a_path_it_downloads_once(tmp_path, monkeypatch):
    """Guards against a download at each evaluation."""
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps(GOOD) + "\n")
    monkeypatch.setattr(scoring, "URL", source.as_uri())
    monkeypatch.setattr(scoring, "GIT_HASH", scoring.git_hash(source.read_bytes()))
    monkeypatch.setattr(scoring, "CACHE", tmp_path / "hellaswag" / "hellaswag_val.jsonl")
    assert scoring.load_examples() == [GOOD]
    source.unlink()
    assert scoring.load_examples("") == [GOOD]


def test_the_hash_is_gits():
    """Guards against a hash of another kind: the empty file's, as every repository knows it."""
    assert scoring.git_hash(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


@pytest.mark.parametrize("limit, complaint", [
    (2**20, "not the file that it should be"), (20, "has more than")])
def test_another_file_is_refused(tmp_path, monkeypatch, limit, complaint):
    """Guards against examples of whoever answers in the source's name, and against a download that
    fills the memory."""
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps(GOOD) + "\n")
    monkeypatch.setattr(scoring, "URL", source.as_uri())
    monkeypatch.setattr(scoring, "MAX_BYTES", limit)
    monkeypatch.setattr(scoring, "CACHE", tmp_path / "hellaswag" / "hellaswag_val.jsonl")
    with pytest.raises(UserError, match=complaint):
        scoring.load_examples()
    assert not (tmp_path / "hellaswag").exists()


class BrokenServer(http.server.BaseHTTPRequestHandler):
    """Answers with `status` and fewer bytes than it announces."""
    status = 200

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write((json.dumps(GOOD) + "\n").encode())

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("status", [200, 404], ids=["cut-short", "refused"])
def test_a_failed_download_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch, status):
    """Guards against half a file that the next evaluation takes for the whole."""
    monkeypatch.setattr(BrokenServer, "status", status)
    server = http.server.HTTPServer(("127.0.0.1", 0), BrokenServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{server.server_port}/hellaswag_val.jsonl"
    monkeypatch.setattr(scoring, "URL", url)
    monkeypatch.setattr(scoring, "CACHE", tmp_path / "hellaswag" / "hellaswag_val.jsonl")
    try:
        with pytest.raises(UserError, match="--data") as e:
            scoring.load_examples()
    finally:
        server.shutdown()
        server.server_close()
    assert "\n" not in str(e.value)
    assert not list(tmp_path.rglob("*.jsonl*"))
