"""The nginx configuration of docs/serving.md, read by a real nginx.

    python -m pytest tests/serving/test_nginx.py
"""

import re
import shutil
import subprocess

import pytest
from conftest import ROOT

# Made for this test alone, for a host that does not exist.
OPENSSL = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
           "-subj", "/CN=gpt2.example.com", "-keyout", "key", "-out", "pem"]


@pytest.mark.skipif(not shutil.which("nginx") or not shutil.which("openssl"),
                    reason="needs nginx and openssl")
def test_nginx_takes_the_documented_configuration(tmp_path):
    """Guards against a directive that nginx does not know, or not in that place."""
    document = (ROOT / "docs" / "serving.md").read_text()
    text = re.search(r"^```nginx\n(.*?)^```", document, re.MULTILINE | re.DOTALL)[1]
    subprocess.run(OPENSSL, cwd=tmp_path, check=True, capture_output=True)
    text = text.replace("/etc/ssl/gpt2.", f"{tmp_path}/")
    text = text.replace("listen 443", f"listen unix:{tmp_path}/socket")  # 443 is for root
    config = tmp_path / "nginx.conf"
    config.write_text(f"pid {tmp_path}/pid; events {{}} http {{ access_log off; {text} }}")
    done = subprocess.run(["nginx", "-t", "-e", "stderr", "-p", tmp_path, "-c", config],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
