"""Where requests go: to the addresses that the user named, past proxies on this machine, and nowhere else."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from datagen_script import call
from ollama_server import OllamaServer

from mamba2_min.datagen.address import default_address, parse_address
from mamba2_min.datagen.client import OllamaClient, RequestOptions
from mamba2_min.errors import UserError

SCRIPT = Path(__file__).parents[1] / "data_generator.py"
QUICK = ("--backoff", "0.01", "--timeout", "0.3", "--first-timeout", "2", "--retries", "2")


@pytest.fixture
def server():
    with OllamaServer() as server:
        yield server


@pytest.fixture
def servers():
    with OllamaServer() as one, OllamaServer() as two:
        yield one, two


def run(*args: object, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **env}, check=False, encoding="utf-8"
    )


def client(host: str | None, **options: float) -> OllamaClient:
    request = RequestOptions(timeout=0.5, first_timeout=2.0, **{"retries": 1, "backoff": 0.01, **options})
    return OllamaClient("llama3.1", host, request, threading.Event())


# --- addresses ---


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("box", "http://box:11434"),
        ("box:80", "http://box:80"),
        (":8080", "http://127.0.0.1:8080"),
        ("http://box", "http://box:80"),
        ("HTTPS://Box", "https://box:443"),
        ("https://box:8443/ollama/", "https://box:8443/ollama"),
        ('"box:1234"', "http://box:1234"),
        (" 'box:1234' ", "http://box:1234"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0", "http://127.0.0.1:11434"),
        ("127.1:80", "http://127.0.0.1:80"),
        ("::ffff:0.0.0.0", "http://127.0.0.1:11434"),
        ("[::ffff:10.0.0.1]:80", "http://10.0.0.1:80"),
        ("http://0.0.0.0:99", "http://127.0.0.1:99"),
        ("::", "http://[::1]:11434"),
        ("[::]:99", "http://[::1]:99"),
        ("::1", "http://[::1]:11434"),
        ("[fe80::1]:80", "http://[fe80::1]:80"),
        ("my_box.lan", "http://my_box.lan:11434"),
        ("http://me:secret@box:1", "http://box:1"),
    ],
)
def test_an_address_as_users_write_it(monkeypatch, text, url):
    address = parse_address(text)
    assert address.url == url
    assert "secret" not in address.shown
    monkeypatch.setenv("OLLAMA_HOST", text)
    assert parse_address(default_address()).url == url


@pytest.mark.parametrize(
    "text",
    [
        "ftp://box",
        "box:99999",
        "box:port",
        "http://[::1",
        "bo\nx",
        "bo x",
        "box,other",
        "http://b\x00x",
        "a\\b",
        "caf\udce9",
    ],
)
def test_what_is_no_address_is_one_line(text):
    with pytest.raises(UserError, match="is not the address of a server") as error:
        parse_address(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "  ", '""'])
def test_an_empty_ollama_host_counts_for_nothing(monkeypatch, name):
    monkeypatch.setenv("OLLAMA_HOST", name)
    assert parse_address(default_address()).url == "http://127.0.0.1:11434"


def test_only_this_machine_is_past_proxies():
    for text in (
        "localhost",
        "127.0.0.1:1",
        "127.3.2.1",
        "[::1]",
        "0.0.0.0",
        "127.1",
        "::ffff:127.0.0.1",
        "http://a.localhost:80",
    ):
        assert parse_address(text).loopback, text
    for text in ("box", "10.0.0.1", "notlocalhost", "localhost.example.com", "128.0.0.1"):
        assert not parse_address(text).loopback, text


# --- the environment ---

BAD_ENVIRONMENTS = [
    {"OLLAMA_HOST": '"127.0.0.1:port"'},
    {"OLLAMA_HOST": "http://[::1"},
    {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
    {"ALL_PROXY": "socks5://127.0.0.1:9"},
    {"HTTP_PROXY": "http://[bad", "NO_PROXY": "[::1],*.a b"},
    {"SSL_CERT_FILE": "/nowhere.pem"},
    {"OLLAMA_API_KEY": "café"},
]


@pytest.mark.parametrize("bad", BAD_ENVIRONMENTS[:3], ids=str)
def test_a_bad_environment_does_no_harm_where_the_host_is_good(server, tmp_path, bad):
    done = run("--host", server.url, "--documents", 2, "--out", tmp_path, **bad)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bad", BAD_ENVIRONMENTS, ids=str)
def test_a_bad_environment_is_one_line(tmp_path, bad):
    done = call("--out", tmp_path, *QUICK, **{"OLLAMA_HOST": "box.invalid", **bad})
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*\n", done.stderr), done.stderr


def test_ollama_host_in_quotes_works(server, tmp_path):
    done = call("--documents", 1, "--out", tmp_path, OLLAMA_HOST=f'"0.0.0.0:{server.port}"')
    assert done.returncode == 0, done.stderr
    assert f"http://127.0.0.1:{server.port}" in done.stdout


def test_a_password_is_sent_and_not_shown(server):
    seen = []
    server.replies = lambda path, payload: seen.append(path)
    ask = client(f"http://me:se%40cret@127.0.0.1:{server.port}")
    ask.check_model()
    assert seen and "cret" not in ask.address


# --- redirects ---


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", ["/api/tags", "/api/show", "/api/chat"])
def test_a_redirect_to_another_server_is_refused_and_named(servers, status, path):
    named, other = servers
    named.replies = lambda asked, payload: (status, {"Location": other.url + path}, b"") if asked == path else None
    ask = client(named.url)
    with pytest.raises(UserError, match=f"redirects to {re.escape(other.url + path)}.*--host"):
        ask.check_model()
        ask.ask("A secret.", 1)
    assert not other.requests


@pytest.mark.parametrize(
    "location",
    [
        "//127.0.0.1:{port}/api/chat",
        "http://localhost:{here}/api/chat",  # another name may be another machine
        "http://127.0.0.1:{here}@127.0.0.1:{port}/",
        "HTTP://127.0.0.1:{port}",
        "https://127.0.0.1:{here}/api/chat",
        "ftp://127.0.0.1/",
        "file:///etc/passwd",
        "http://[::1]:{port}/",
        "http://127.0.0.1/",
        "http:\\\\127.0.0.1:{port}\\",
        "javascript:alert(1)",
        "http://[bad",
        "\\\\127.0.0.1:{port}/x",
        "",
    ],
)
def test_no_location_leads_elsewhere(servers, location):
    named, other = servers
    place = location.format(port=other.port, here=named.port)
    named.replies = lambda path, payload: (307, {"Location": place}, b"") if path != "/api/tags" else None
    with pytest.raises(Exception) as error:
        client(named.url).ask("A secret.", 1)
    assert "\n" not in str(error.value)
    assert not other.requests


def test_a_redirect_within_the_server_is_followed(server):
    server.replies = lambda path, payload: (
        (307, {"Location": path.replace("/old", "")}, b"") if path.startswith("/old") else None
    )
    ask = client(f"{server.url}/old")
    ask.check_model()
    assert ask.ask("Write.", 1).done_reason == "stop"


@pytest.mark.parametrize("path", ["/api/tags", "/api/chat"])
def test_redirects_in_a_circle_end_at_once(server, path):
    server.replies = lambda asked, payload: (307, {"Location": path}, b"") if asked == path else None
    ask = client(server.url)
    with pytest.raises(UserError, match="redirects in a circle"):
        ask.check_model()
        ask.ask("Write.", 1)
    assert [asked for asked, _ in server.requests].count(path) <= 21  # httpx follows twenty, and nothing asks again


def test_a_redirect_is_one_line_of_the_script(servers, tmp_path):
    named, other = servers
    named.replies = lambda path, payload: (308, {"Location": other.url + path}, b"") if path == "/api/chat" else None
    done = call("--host", named.url, "--out", tmp_path, *QUICK)
    assert done.returncode == 2 and not other.requests
    assert re.search(rf"^error: .*{re.escape(other.url)}/api/chat.*$", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr


# --- several hosts ---


def documents(out: Path) -> int:
    return len(list(out.glob("*.md")))


def hosts(*servers: OllamaServer) -> list[str]:
    return [word for server in servers for word in ("--host", server.url)]


def test_several_hosts_work_in_parallel(servers, tmp_path):
    for server in servers:
        server.pace = 0.005
    begun = time.monotonic()
    done = call(*hosts(*servers), "--documents", 16, "--out", tmp_path, *QUICK)
    took = time.monotonic() - begun
    assert done.returncode == 0, done.stderr
    assert documents(tmp_path) == 16
    asked = [set(seed for seed, _ in server.asked) for server in servers]
    assert min(map(len, asked)) >= 5 and not asked[0] & asked[1]
    assert all(server.url in done.stdout for server in servers) and "1 at once each" in done.stdout
    again = call("--host", servers[0].url, "--documents", 18, "--out", tmp_path, *QUICK)
    assert again.returncode == 0 and documents(tmp_path) == 18
    assert took < 30


@pytest.mark.parametrize("death", ["closed", "stall", "error", "no model", "redirect", "out of memory"])
def test_a_host_that_dies_is_one_line_and_the_others_go_on(servers, tmp_path, death):
    good, bad = servers
    if death == "closed":
        seen = threading.Event()
        bad.misbehave = lambda seed: seen.set() or "stall"
        bad.stall_seconds = 0.0
        threading.Thread(target=lambda: (seen.wait(20), bad.__exit__()), daemon=True).start()
    elif death == "stall":
        bad.misbehave = lambda seed: "stall before"
    elif death == "no model":
        bad.models = {"other:latest": []}
    else:
        status, body = {"error": (500, b"oops"), "redirect": (307, b""), "out of memory": (500, b"out of memory")}[
            death
        ]
        headers = {"Location": "http://127.0.0.1:9/"} if death == "redirect" else {}
        bad.replies = lambda path, payload: (status, headers, body) if path == "/api/chat" else None
    good.pace = 0.004
    done = call(*hosts(bad, good), "--documents", 12, "--out", tmp_path, *QUICK, "--first-timeout", 0.3)
    assert done.returncode == 0, done.stderr
    assert documents(tmp_path) == 12
    if death != "stall":  # which may still be waited for when the others are done
        notes = [line for line in re.split(r"[\r\n]", done.stderr) if line.startswith("note: ")]
        assert len(notes) == 1 and bad.url in notes[0] and "the other servers go on" in notes[0], done.stderr


def test_when_all_hosts_are_gone_the_last_is_the_error(tmp_path):
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in (one, two)]
    done = call(*(word for port in ports for word in ("--host", f"localhost:{port}")), "--out", tmp_path, *QUICK)
    assert done.returncode == 2
    first, last = done.stderr.splitlines()
    assert first.startswith(f"note: no Ollama server answers at localhost:{ports[0]}")
    assert last.startswith(f"error: no Ollama server answers at localhost:{ports[1]}")


def test_the_same_host_twice_is_one(server, tmp_path):
    done = call(
        "--host", server.url, "--host", f"127.0.0.1:{server.port}/", "--documents", 2, "--out", tmp_path, *QUICK
    )
    assert done.returncode == 0 and len(server.asked_for("/api/tags")) == 1
