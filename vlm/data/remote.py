"""Fetches images that rows name by address, without letting a row reach into the network that the pipeline runs in.

http(s) goes through the standard library, because every connection, also one after a redirect, must be made to the very
address that was checked: a check before handing the name on would leave room for a second, different look-up. Proxies are
not used for the same reason. Object stores go through fsspec.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.error
import urllib.request
from typing import Any

from vlm.data.rows import RowError

TIMEOUT_SECONDS = 30
# A server that sends a byte now and then keeps within the time-out of every single one.
MAX_SECONDS = 300
_CHUNK_BYTES = 1 << 20
# Where gateways translate to the IPv4 address that is the last 32 bits.
_TRANSLATED = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
# Of protocols rather than hosts, though some clouds have their metadata there.
_PROTOCOLS = ipaddress.IPv4Network("192.0.0.0/24")
_IPV6_INTERNET = ipaddress.IPv6Network("2000::/3")
_OBJECT_STORES = frozenset(["s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"])


def fetch_remote(url: str, max_bytes: int) -> bytes:
    """Reads one image from an http(s) address or an object store.

    Args:
        url: The address.
        max_bytes: Largest size to accept.

    Raises:
        RowError: If the address is not allowed, not public, cannot be reached, or its content is too large.
    """
    scheme = url.split("://", 1)[0].lower()
    is_web = scheme in ("http", "https")
    # fsspec would follow a chain such as s3://…::file://…
    if not is_web and (scheme not in _OBJECT_STORES or "::" in url):
        raise RowError(
            "image_url", f"image address {url[:200]!r}: only http, https and object stores are fetched", url=url[:200]
        )
    try:
        if is_web:
            with _opener().open(
                urllib.request.Request(url, headers={"User-Agent": "vision-finetune"}), timeout=TIMEOUT_SECONDS
            ) as response:
                data = _read(response, url, max_bytes)
        else:
            import fsspec

            with fsspec.open(url, "rb") as handle:
                data = handle.read(max_bytes + 1)
    except RowError:
        raise
    except (OSError, ValueError, ImportError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise RowError(
            "image_unreachable", f"image address {url[:200]!r} cannot be fetched: {error}", url=url[:200]
        ) from error
    if len(data) > max_bytes:
        raise RowError(
            "image_file_too_large", f"image address {url[:200]!r} gives over {max_bytes >> 20} MiB", url=url[:200]
        )
    return bytes(data)


def _read(response: Any, url: str, max_bytes: int) -> bytes:
    """The body, up to one byte more than may be.

    Raises:
        RowError: If it takes too long.
    """
    deadline = time.monotonic() + MAX_SECONDS
    pieces: list[bytes] = []
    left = max_bytes + 1
    while left > 0 and (piece := response.read1(min(left, _CHUNK_BYTES))):
        pieces.append(piece)
        left -= len(piece)
        if time.monotonic() > deadline:
            raise RowError(
                "image_unreachable", f"image address {url[:200]!r} takes over {MAX_SECONDS} seconds", url=url[:200]
            )
    return b"".join(pieces)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, and so does an IPv4 address inside an IPv6 one."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv4Address):
        return _is_public_v4(ip)
    inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if any(ip in network for network in _TRANSLATED):
        inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF))
    found = [each for each in inner if each is not None]
    if not all(_is_public_v4(each) for each in found):
        return False
    return bool(found) or (ip.is_global and ip in _IPV6_INTERNET)


def _is_public_v4(ip: ipaddress.IPv4Address) -> bool:
    return ip.is_global and not ip.is_multicast and ip not in _PROTOCOLS


def _connect(host: str, port: int, timeout: float) -> socket.socket:
    """Connects to the first address of a host, refusing if any of its addresses is not public."""
    found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    private = [address for address in found if not is_public(str(address).split("%")[0])]
    if private:
        raise RowError("image_url_private", f"image host {host!r} is {private[0]}, not a public address", host=host)
    return socket.create_connection((str(found[0]), port), timeout)


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = _connect(self.host, self.port, TIMEOUT_SECONDS)


class _SecureConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        self.sock = ssl.create_default_context().wrap_socket(
            _connect(self.host, self.port, TIMEOUT_SECONDS), server_hostname=self.host
        )


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Connection, req)

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, req)


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    for handler in (
        _Handler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    return opener
