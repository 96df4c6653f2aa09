"""Where a server is: what users write for an address, and the `ollama` client that goes there and nowhere else.

The client reads the environment when it is imported, and a value that it cannot parse (OLLAMA_HOST in quotes, a proxy
without its package) would end the program with a traceback. So `ollama` is imported here, without those variables, and
other modules import it from here.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import httpx

from mamba2_min.errors import UserError
from mamba2_min.printable import one_line

DEFAULT_PORT = 11434
_VARIABLES = ("OLLAMA_HOST", "OLLAMA_API_KEY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@contextlib.contextmanager
def _without_proxies(*others: str) -> Iterator[None]:
    """A context in which the environment has no proxies and none of the variables `others`."""
    hidden = {name: value for name, value in os.environ.items() if name in others or name.lower().endswith("_proxy")}
    for name in hidden:
        del os.environ[name]
    os.environ["NO_PROXY"] = "*"  # or else the settings of macOS or Windows count
    try:
        yield
    finally:
        del os.environ["NO_PROXY"]
        os.environ.update(hidden)


with _without_proxies(*_VARIABLES):
    import ollama


@dataclass(frozen=True)
class Address:
    """Where a server is.

    shown      as the user wrote it, for messages; without a password
    url        scheme, host and port, and a path where there is one
    loopback   whether it is this machine, to which no proxy can lead
    """

    shown: str
    url: str
    loopback: bool
    user: tuple[str, str] | None = None


def default_address() -> str:
    """OLLAMA_HOST, or the address at which a server listens by default."""
    return _trimmed(os.environ.get("OLLAMA_HOST", "")) or f"http://127.0.0.1:{DEFAULT_PORT}"


def parse_address(text: str) -> Address:
    """The address that `text` stands for: `host`, `host:port`, `http://…` or `https://…`, as Ollama itself takes them.

    Quotes around it do not count. 0.0.0.0 and ::, which a server uses to listen everywhere, mean this machine. Raises
    UserError where `text` is no address.
    """
    text = _trimmed(text)
    scheme, found, rest = text.partition("://")
    scheme, rest = (scheme.lower(), rest) if found else ("http", text)
    try:
        if scheme not in ("http", "https") or not text.isprintable() or " " in text:
            raise ValueError("host, host:port, http://… or https://… is wanted")
        split = _split(scheme, rest)
        host = split.hostname or "127.0.0.1"
        port = split.port or ((443 if scheme == "https" else 80) if found else DEFAULT_PORT)
        number = _ip(host)
        if number is None and not re.fullmatch(r"[\w.-]+", host):
            raise ValueError(f"{host!r} is not the name of a host")
        if number and number.is_unspecified:
            number = ipaddress.ip_address("127.0.0.1" if number.version == 4 else "::1")
        host = host if number is None else f"[{number}]" if number.version == 6 else str(number)
        url = "/".join(filter(None, (f"{scheme}://{host}:{port}", split.path.strip("/"))))
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL) as error:
        raise UserError(f"{one_line(text)!r} is not the address of a server ({one_line(error)})") from error
    loopback = number.is_loopback if number else ("." + host.lower().rstrip(".")).endswith(".localhost")
    changed = split.username is not None or (number is not None and str(number) not in text)
    user = (unquote(split.username), unquote(split.password or "")) if split.username else None
    return Address(url if changed else text, url, loopback, user)


def _trimmed(text: str) -> str:
    return text.strip(" \t\r\n\"'")


def _split(scheme: str, rest: str) -> SplitResult:
    bare = rest.strip("/")
    return urlsplit(f"{scheme}://[{bare}]" if ":" in bare and _ip(bare) else f"{scheme}://{rest}")


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The number that a host is. `127.1` and `0`, as resolvers take them, and IPv4 within IPv6 are what they mean."""
    with contextlib.suppress(ValueError, OSError):
        if re.fullmatch("[0-9.]+", host):
            return ipaddress.ip_address(socket.inet_aton(host))
        number = ipaddress.ip_address(host)
        return getattr(number, "ipv4_mapped", None) or number
    return None


def connect(address: Address, timeout: httpx.Timeout, hooks: Mapping[str, list[Callable[..., Any]]]) -> ollama.Client:
    """A client for `address`. On this machine it bypasses every proxy. Raises UserError for a bad environment.

    hooks: of httpx, `request` and `response`. A request to anywhere but `address` is refused before it is sent.
    """
    here = httpx.URL(address.url)

    def stay(request: httpx.Request) -> None:
        there = request.url
        if (there.scheme, there.host, _port(there)) != (here.scheme, here.host, _port(here)):
            raise UserError(
                f"{address.shown} redirects to {one_line(there)}, which is another server: nothing was sent there; if "
                "it is yours, name it with --host"
            )

    options: dict[str, Any] = {"auth": address.user} if address.user else {}
    if here.scheme == "http":  # certificates take longest to load, and are not needed where nothing is encrypted
        options["verify"] = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        with _without_proxies() if address.loopback else contextlib.nullcontext():
            return ollama.Client(
                address.url,
                timeout=timeout,
                headers={"Accept-Encoding": "identity"},
                event_hooks={"request": [stay, *hooks["request"]], "response": hooks["response"]},
                **options,
            )
    except (ValueError, OSError, ImportError, httpx.InvalidURL) as error:
        raise UserError(
            f"no client for {address.shown}: {one_line(error)}; look at HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, "
            "SSL_CERT_FILE and OLLAMA_API_KEY"
        ) from error


def _port(url: httpx.URL) -> int | None:
    return url.port or {"http": 80, "https": 443}.get(url.scheme)
