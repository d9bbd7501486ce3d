"""A small stand-in for the Hugging Face Hub on this machine, which can be slow, or fail."""

import contextlib
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
REPOSITORY = "somebody/text"


class HubServer(ThreadingHTTPServer):
    """files: {path in the repository: bytes}.

    answers: {"HEAD" or "GET": what happens to the next such requests for a data file, one each:
    a status code, "drop" (the connection ends after a third of the bytes) or "slow"}; later ones
    are answered as they should be. downloads: (path, first byte, last byte + 1) of each that was
    answered.
    """
    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.answers, self.downloads = files, {"HEAD": [], "GET": []}, []
        self.log, self.lock = [], threading.Lock()
        self.commit, self.old_files = COMMIT, {}  # a later commit can have other files
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def next_answer(self, command):
        with self.lock:
            answers = self.answers[command]
            return answers.pop(0) if answers else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.log.append(f"POST {self.path}")
        paths = re.findall(r'paths=([^&]+)', body.decode()) or json.loads(body).get("paths", [])
        revision = self.path.split("/")[-1]
        paths = [unquote(path) for path in paths]
        found = [entry for entry in self.entries(revision) if entry["path"] in paths]
        self.send_json(found)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.log.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        if match := re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/([^/]+)/(.*)", path):
            self.send_file(match[1], match[2])
        elif match := re.fullmatch(rf"/api/datasets/{REPOSITORY}(?:/revision/([^/]+))?", path):
            commit = COMMIT if match[1] == COMMIT else self.server.commit
            siblings = [{"rfilename": name} for name in self.files_of(commit)]
            self.send_json({"id": REPOSITORY, "sha": commit, "siblings": siblings,
                            "private": False, "tags": [], "downloads": 0, "likes": 0})
        elif match := re.fullmatch(rf"/api/datasets/{REPOSITORY}/tree/([^/]+)/?(.*)", path):
            found = [entry for entry in self.entries(match[1])
                     if entry["path"].startswith(match[2])]
            self.send_json(found)
        else:
            self.send_error_json(404)

    def files_of(self, revision):
        is_old = revision == COMMIT != self.server.commit
        return self.server.old_files if is_old else self.server.files

    def entries(self, revision):
        files = self.files_of(revision)
        folders = {name.rpartition("/")[0] for name in files} - {""}
        found = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
                 for name in sorted(folders)]
        return found + [{"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                        for name, data in sorted(files.items())]

    def send_json(self, value, status=200, headers=()):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for key, header in headers:
            self.send_header(key, header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error_json(self, status, headers=()):
        code = [("X-Error-Code", "EntryNotFound")] if status == 404 else []
        self.send_json({"error": f"error {status}"}, status, [*headers, *code])

    def send_file(self, revision, name):
        data = self.files_of(revision).get(name)
        if data is None or revision not in (self.server.commit, COMMIT, "main"):
            return self.send_error_json(404)
        is_data = name.endswith((".parquet", ".bin"))
        answer = self.server.next_answer(self.command) if is_data else None
        if isinstance(answer, int):
            return self.send_error_json(answer, [("Retry-After", "0")])
        first, last = 0, len(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or last - 1) + 1
        part = data[first:last]
        self.send_response(206 if len(part) < len(data) else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{etag(data)}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        if len(part) < len(data):
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        with self.server.lock:
            self.server.downloads.append((name, first, last))
        if answer == "drop":
            self.wfile.write(part[:len(part) // 3])
            self.wfile.flush()
            self.close_connection = True
            return None
        step = len(part) // 10 + 1
        for i in range(0, len(part), step):
            self.wfile.write(part[i:i + step])
            if answer == "slow":
                time.sleep(0.05)
        return None


def etag(data):
    return hashlib.sha1(data).hexdigest()


@contextlib.contextmanager
def hub_server(files):
    """Serve files of a dataset repository, until the end of the block."""
    with HubServer(files) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
