"""Addresses in rows are off by default, and never lead into the machine's own network."""

from __future__ import annotations

import contextlib
import threading
import time
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
            if self.path in ("/file", "/ftp"):
                self.send_response(302)
                self.send_header("Location", f"{self.path[1:]}:///etc/passwd")
                self.end_headers()
                return
            if self.path == "/drip":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                with contextlib.suppress(OSError):
                    for _ in range(40):
                        self.wfile.write(b"x")
                        time.sleep(0.02)
                return
            if self.path.startswith("/gone"):
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
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
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


@pytest.mark.parametrize(
    "address",
    [
        "::127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::10.0.0.1",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
        "fe80::1",
        "fec0::1",
        "fd00:ec2::254",
        "ff02::1",
        "4000::1",
        "100.64.0.1",
        "192.0.0.192",
        "198.18.0.1",
        "224.0.0.1",
        "255.255.255.255",
    ],
)
def test_addresses_that_are_not_of_the_public_internet(address):
    assert not remote.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8"])
def test_addresses_of_the_public_internet(address):
    assert remote.is_public(address)


def test_a_name_of_which_one_address_is_private_is_refused(server, monkeypatch):
    """Whoever owns a name may have it lead anywhere, and elsewhere at the next look-up."""

    def answer(host, port, **options):
        return [(2, 1, 6, "", (address, server.server_port)) for address in ("8.8.8.8", "127.0.0.1")]

    monkeypatch.setattr(remote.socket, "getaddrinfo", answer)
    assert reason_of("http://rebinding.example/a.png") == "image_url_private"
    assert server.requested == []


@pytest.mark.usefixtures("loopback_counts_as_public")
def test_a_redirect_to_another_kind_of_address_is_refused(server):
    for kind in ("file", "ftp"):
        assert reason_of(f"http://127.0.0.1:{server.server_port}/{kind}") == "image_unreachable"


@pytest.mark.usefixtures("loopback_counts_as_public")
def test_a_server_that_drips_is_given_up(server, monkeypatch):
    monkeypatch.setattr(remote, "MAX_SECONDS", 0.2)
    assert reason_of(f"http://127.0.0.1:{server.server_port}/drip") == "image_unreachable"


@pytest.mark.usefixtures("loopback_counts_as_public")
def test_a_row_error_shows_no_password(server):
    with pytest.raises(RowError) as caught:
        remote.fetch_remote(f"http://127.0.0.1:{server.server_port}/gone?sig=hunter2&x=1", 100)
    assert "hunter2" not in f"{caught.value} {caught.value.details}"
    assert "?sig=***&x=1" in caught.value.message


def test_an_unreachable_host_is_a_row_error():
    assert reason_of("http://no-such-host.invalid/a.png") == "image_unreachable"
