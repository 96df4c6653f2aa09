"""What a server says is what the user reads: any status and body, through the real client, over real HTTP."""

from __future__ import annotations

import gzip
import json
import threading
import time

import pytest
from ollama_server import OllamaServer, story

from mamba2_min.datagen.builtin import STORIES
from mamba2_min.datagen.client import NoAnswer, OllamaClient, RequestOptions
from mamba2_min.datagen.generator import Job, generate
from mamba2_min.datagen.store import Store
from mamba2_min.errors import UserError

MEMORY = "model requires more system memory (9.4 GiB) than is available (3.1 GiB)"


@pytest.fixture
def server():
    with OllamaServer() as server:
        yield server


def client(server: OllamaServer, **options: float) -> OllamaClient:
    request = RequestOptions(timeout=0.5, first_timeout=2.0, **{"retries": 3, "backoff": 0.01, **options})
    return OllamaClient("llama3.1", server.url, request, threading.Event())


def error(words: str) -> bytes:
    return json.dumps({"error": words}).encode()


def chats(status: int, body: bytes = b"", times: int = 1000, **headers: str):
    """Sends that to the first `times` chats."""
    left = [times]

    def reply(path: str, payload: dict):
        if path != "/api/chat" or not left[0]:
            return None
        left[0] -= 1
        return status, headers, body

    return reply


@pytest.mark.parametrize("status", [408, 425, 429, 500, 501, 502, 503, 504, 507, 520, 522, 524, 529, 599])
def test_what_may_pass_is_asked_again_within_bounds(server, status):
    server.replies = chats(status, error("for now"), times=3)
    assert client(server).ask("Write.", 3).text == story(3)
    server.replies = chats(status, error("come back later"))
    before = len(server.asked_for("/api/chat"))
    with pytest.raises(NoAnswer, match=f"^server error {status}: come back later$"):
        client(server).ask("Write.", 3)
    assert len(server.asked_for("/api/chat")) - before == 4


@pytest.mark.parametrize(
    "words",
    [
        MEMORY,
        "unable to load model: /models/sha256-abc",
        "llama runner process has terminated: cudaMalloc failed: out of memory",
        "you have reached your weekly usage limit, please upgrade to continue",
    ],
)
@pytest.mark.parametrize("status", [429, 500])
def test_what_cannot_get_better_is_asked_once_more_and_then_said(server, words, status):
    server.replies = chats(status, error(words))
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        client(server, retries=50).ask("Write.", 1)
    assert words in str(caught.value) and str(status) in str(caught.value)
    assert len(server.asked_for("/api/chat")) == 2 and time.monotonic() - begun < 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 418, 451, 204, 206, 300, 304])
def test_any_other_status_ends_the_run_with_its_words(server, status):
    silent = status in (204, 304)
    server.replies = chats(status, b"" if silent else error("no, \x1b[31mnever\u202e"))
    with pytest.raises(UserError, match=rf"refuses the request \({status}\): {'N' if silent else 'no, .*never'}"):
        client(server).ask("Write.", 1)
    assert len(server.asked_for("/api/chat")) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "said so", "code": 7}}', "said so"),
        (b'{"message": "said so"}', "said so"),
        (b'{"detail": "said so"}', "said so"),
        (b'"said so"', "said so"),
        (b'["said so"]', r'\["said so"\]'),
        (b"said\r\n  so\x00", "said so"),
        (b"<html><head><title>said &amp; so</title></head><body>no</body></html>", "said & so"),
        (b"<html><body><h1>said</h1> so</body></html>", "said so"),
        (b"", "Bad Gateway"),
        (b"caf\xe9", "caf\ufffd"),
        (b"[" * 5000, r"\[\[\["),
        (error("long " * 100_000), "(long ?){40}"),
    ],
)
def test_words_are_found_in_any_form_and_cut(server, body, words):
    server.replies = chats(502, body)
    with pytest.raises(NoAnswer, match=f"^server error 502: {words}") as caught:
        client(server, retries=0).ask("Write.", 1)
    assert len(str(caught.value)) < 250


def test_an_error_in_the_stream_is_quoted(server):
    line = b'{"error": "an error was encountered: ' + MEMORY.encode() + b'"}\n'
    server.replies = chats(200, line)
    with pytest.raises(UserError, match="error in the stream: an error was encountered: model requires more"):
        client(server).ask("Write.", 1)


@pytest.mark.parametrize(
    ("status", "headers", "body", "reason"),
    [
        (
            200,
            {"Content-Type": "text/html"},
            b"<title>Log in</title>",
            "does not answer as an Ollama server does: Log in",
        ),
        (200, {"Content-Encoding": "gzip"}, gzip.compress(b"a" * 9999, mtime=0), r"compressed \(gzip\)"),
        (200, {}, b"hello", "broken JSON"),
        (200, {}, b"[" * 100_000, "not in the form of an Ollama server"),
        (200, {}, b"[1]", "not in the form of an Ollama server"),
        (
            200,
            {},
            b'{"message": {"role": "assistant", "content": "Once"}, "done": false}\n',
            "cut off by the connection",
        ),
    ],
)
def test_what_is_no_answer_is_told_as_what_it_is(server, status, headers, body, reason):
    server.replies = chats(status, body, **headers)
    with pytest.raises((NoAnswer, UserError), match=reason):
        client(server, retries=0).ask("Write.", 1)


def test_a_list_of_models_is_waited_for_and_its_words_quoted(server):
    times = [2]

    def reply(path: str, payload: dict):
        times[0] -= path == "/api/tags"
        return (524, {}, b"error code: 524") if path == "/api/tags" and times[0] >= 0 else None

    server.replies = reply
    client(server).check_model()
    server.replies = lambda path, payload: (503, {}, error("under maintenance"))
    with pytest.raises(UserError, match="server error 503: under maintenance"):
        client(server).check_model()
    server.replies = lambda path, payload: (401, {}, error("who are you?"))
    with pytest.raises(UserError, match=r"refuses the request \(401\): who are you\?"):
        client(server).check_model()
    server.replies = lambda path, payload: (404, {}, b"404 page not found")
    with pytest.raises(UserError, match=r"refuses the request \(404\): 404 page not found"):
        client(server).check_model()


def test_a_strange_list_of_models_is_one_short_line(server):
    names = [f"model-{i}-\x1b[31m{'x' * 400}" for i in range(20)] + ["a" * 10_000] + [f"m{i}" for i in range(20_000)]
    body = json.dumps({"models": [{"model": name} for name in names]}).encode()
    server.replies = lambda path, payload: (
        (200, {}, body) if path == "/api/tags" else (404, {}, error("model not found"))
    )
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"has no model 'llama3\.1'") as caught:
        client(server).check_model()
    assert len(str(caught.value)) < 2000 and time.monotonic() - begun < 10


def test_reasons_are_on_record_in_the_words_of_the_server(server, tmp_path):
    server.replies = chats(429, error("slow down, friend"))
    with Store(tmp_path) as store:
        with pytest.raises(
            UserError, match=r"5 requests in a row \(5 no answer: server error 429: slow down, friend\)"
        ):
            generate(Job(STORIES, 50), [client(server, retries=1)], store, threading.Event())
        assert store.rejected == {"no answer: server error 429: slow down, friend": 5}


# --- odd leaves ---

ODD = [
    None,
    True,
    0,
    -1,
    10**30,
    0.5,
    float("nan"),
    "",
    "\ud800",
    "\x1b[2J",
    "x" * 10_000,
    [],
    [[]],
    {},
    {"a": {}},
    [None],
]
PIECE = {
    "model": "llama3.1",
    "created_at": "2025-01-01T00:00:00Z",
    "message": {"role": "assistant", "content": "Once", "thinking": "Hm.", "tool_calls": []},
    "done": True,
    "done_reason": "stop",
    "total_duration": 1,
    "eval_count": 1,
    "error": "",
}
TAGS = {"models": [{"name": "llama3.1:latest", "model": "llama3.1:latest", "size": 1, "details": {"family": "llama"}}]}
SHOW = {"details": {"family": "llama"}, "model_info": {}, "capabilities": ["completion"], "modified_at": "2025-01-01"}


def leaves(value: object, path: tuple = ()):
    """The path to every value inside, the containers too."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from leaves(value[key], (*path, key))


def changed(value: object, path: tuple, leaf: object) -> object:
    copy = json.loads(json.dumps(value))
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = leaf
    return copy


@pytest.mark.parametrize(
    ("place", "whole"), [("/api/chat", PIECE), ("/api/tags", TAGS), ("/api/show", SHOW)], ids=["chat", "tags", "show"]
)
def test_any_leaf_of_an_answer_may_be_odd(server, place, whole):
    asker = client(server, retries=0)
    for path in leaves(whole):
        for odd in ODD:
            body = json.dumps(changed(whole, path, odd)).encode() + b"\n"
            server.replies = lambda asked, payload, body=body: (200, {}, body) if asked == place else None
            try:
                if place == "/api/chat":
                    text = asker.ask("Write.", 1).text
                    assert text == "" or path in (("message", "content"),) or text == "Once"
                else:
                    asker.check_model()
            except (NoAnswer, UserError) as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
