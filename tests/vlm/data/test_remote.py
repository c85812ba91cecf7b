"""Addresses in rows are off by default, and never lead into the machine's own network."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import fsspec
import pytest

from vlm.data import remote
from vlm.data.images import load_image_bytes
from vlm.data.rows import RowError


@pytest.fixture
def server():
    requested = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "http://169.254.169.254/latest")
                self.end_headers()
                return
            if self.path == "/gone":
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 100)

        def log_message(self, *args):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    httpd.requested = requested
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def loopback_counts_as_public(monkeypatch):
    check = remote.is_public
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1" or check(address))


def reason_of(url, max_bytes=1000):
    with pytest.raises(RowError) as caught:
        remote.fetch_remote(url, max_bytes)
    return caught.value.reason


def test_addresses_are_off_by_default(server):
    for url in (f"http://127.0.0.1:{server.server_port}/a.png", "s3://bucket/a.png", "memory://a.png"):
        with pytest.raises(RowError, match="allow_urls is off"):
            load_image_bytes(url, None, allow_urls=False)
    assert server.requested == []


def test_private_addresses_are_refused_before_a_request(server):
    for host in (
        "127.0.0.1",
        "localhost",
        "0.0.0.0",
        "[::1]",
        "10.0.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "[::ffff:127.0.0.1]",
    ):
        assert reason_of(f"http://{host}:{server.server_port}/a.png") == "image_url_private", host
    assert server.requested == []


def test_only_known_schemes_are_fetched():
    fsspec.filesystem("memory").pipe_file("/a.png", b"x")
    for url in ("memory://a.png", "file:///etc/passwd", "simplecache::http://a/b.png", "ftp://a/b.png", "local://a"):
        assert reason_of(url) == "image_url"


@pytest.mark.usefixtures("loopback_counts_as_public")
def test_a_public_address_is_fetched_and_bounded(server):
    base = f"http://127.0.0.1:{server.server_port}"
    assert remote.fetch_remote(f"{base}/a.png", 100) == b"x" * 100
    assert reason_of(f"{base}/a.png", 99) == "image_file_too_large"
    assert reason_of(f"{base}/gone") == "image_unreachable"


@pytest.mark.usefixtures("loopback_counts_as_public")
def test_a_redirect_into_the_private_network_is_refused(server):
    assert reason_of(f"http://127.0.0.1:{server.server_port}/away") == "image_url_private"


def test_an_unreachable_host_is_a_row_error():
    assert reason_of("http://no-such-host.invalid/a.png") == "image_unreachable"
