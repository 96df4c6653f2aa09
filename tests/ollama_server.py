"""A stand-in for an Ollama server: the same wire protocol over real HTTP, with invented texts, and faults on order.

In a test:

    with OllamaServer() as server:
        server.misbehave = lambda seed: "cut" if seed == 3 else "ok"
        ...  # http://127.0.0.1:{port} is server.url; what it was asked is in server.requests

By hand, to see the generator at work without a model:

    python tests/ollama_server.py --port 11500 --pace 0.02 --faults 0.3
    python data_generator.py --host localhost:11500 --documents 30 --out /tmp/documents

Faults of the connection (`PASSING`) befall a request once (`busy`: twice) and not when it is asked again; those of the
text (`LASTING`) come back each time, since a model under the same seed writes the same.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PASSING = ("busy", "stall", "cut", "cut cleanly", "reset", "broken JSON", "odd JSON", "error in stream", "server error")
LASTING = ("length", "repeat", "refusal", "empty", "huge", "markers", "short", "near repeat", "endless thought")
HARMLESS = ("think aloud", "think apart", "talk", "slashes", "control characters", "markers at the end")

_NOUNS = """anchor apple barn basket bell boat bridge candle cart cat chair clock cloud coat crow door drum feather
fence field fire fish flute forest fox garden gate goat hammer harbour hat hill horse house island jar kettle key king
ladder lake lamp letter market mill mirror moon mountain mouse nest oven owl path pear pebble pond queen rain ring
river road roof rope salt ship shoe song spoon stone storm street table tower train tree wall well wheel whale wind
window wolf"""
_VERBS = """asked barked begged borrowed broke built buried called carried caught chased climbed counted crossed drew
dropped fed filled fixed followed forgot found gathered gave guarded heard held hid kept kicked knew lifted lost loved
made mended met missed moved named needed opened painted passed planted praised pulled pushed reached saved saw sold
stole swept taught thanked threw took touched turned visited warned washed watched whistled woke wrapped"""
_ADJECTIVES = """ancient bitter blue bold brave bright broken calm careful clever cold crooked curious dark distant
dry early empty faint famous fierce foreign gentle golden green grey happy heavy hidden hollow honest hungry kind last
lazy light lonely long loud modest muddy narrow new odd old pale patient plain polite proud quick quiet rare red rough
round rusty sad secret sharp shy silent silver slow small soft square strange stubborn sweet tall tiny tired warm
wild"""
NOUNS, VERBS, ADJECTIVES = _NOUNS.split(), _VERBS.split(), _ADJECTIVES.split()


def story(seed: object, sentences: int = 12) -> str:
    """An English text of about ten words a sentence, the same for the same seed, and unlike that of any other."""
    draw = random.Random(f"story {seed}").choice
    forms = (
        "The {a} {n} {v} the {b} {m}, and the {o} {w} it.",
        "She {v} a {a} {n} that was as {b} as the {m}.",
        '"Who {v} my {a} {n}?" said the {b} {m} to the {o}.',
        "In the {n} they {v} {a} things, but nobody {w} the {m}.",
        "He had {v} the {n} of the {a} {m} for {b} years.",
    )
    lines = []
    for _ in range(sentences):
        words = dict(zip("nmo", (draw(NOUNS) for _ in range(3)), strict=True))
        words |= dict(zip("vw", (draw(VERBS) for _ in range(2)), strict=True))
        words |= dict(zip("ab", (draw(ADJECTIVES) for _ in range(2)), strict=True))
        lines.append(draw(forms).format(**words))
    return " ".join(lines[: sentences // 2]) + "\n\n" + " ".join(lines[sentences // 2 :])


def request_for(seed: object) -> str:
    """A request of one sentence, as with --with-prompts."""
    draw = random.Random(f"request {seed}").choice
    return f"Write about a {draw(ADJECTIVES)} {draw(NOUNS)} that {draw(VERBS)} a {draw(ADJECTIVES)} {draw(NOUNS)}."


def faults(share: float, kinds: tuple[str, ...] = PASSING + LASTING, salt: int = 0) -> Callable[[int], str]:
    """Misbehaviour for that share of all seeds; which seeds, and how, depends on `salt` alone."""

    def behaviour(seed: int) -> str:
        chance = random.Random(f"fault {salt} {seed}")
        return chance.choice(kinds) if chance.random() < share else "ok"

    return behaviour


class OllamaServer:
    """The server, in threads of this process, on a free port of the loopback interface (or on `port`).

    Attributes to set: `models`, name to capabilities; `misbehave`, from a request's seed to "ok" or a fault; `replies`,
    from (path, payload) to what is sent instead, as (status, headers, body), or None; `writes`, from a seed to the text
    of its answer; `pace`, seconds between pieces; `words_a_piece`; `stall_seconds`. To read: `url`; `requests`, (path,
    payload) in order; `asked`, how often each (seed, prompt) was.
    """

    def __init__(self, port: int = 0, models: dict[str, list[str]] | None = None):
        self.models = models or {"llama3.1:latest": ["completion"], "qwen3:4b": ["completion", "thinking"]}
        self.misbehave: Callable[[int], str] = lambda seed: "ok"
        self.replies: Callable[[str, dict], tuple[int, dict[str, str], bytes] | None] = lambda path, payload: None
        self.writes: Callable[[int], str] | None = None
        self.pace, self.words_a_piece, self.stall_seconds = 0.0, 8, 60.0
        self.requests: list[tuple[str, dict]] = []
        self.asked: Counter = Counter()
        self.closing = threading.Event()
        self._http = _Http(("127.0.0.1", port), _Handler)
        self._http.stand_in = self
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> OllamaServer:
        threading.Thread(target=self._http.serve_forever, args=(0.005,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def asked_for(self, path: str) -> list[dict]:
        """The payloads of all requests to `path`."""
        return [payload for where, payload in self.requests if where == path]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request, client_address) -> None:
        """A client that was killed in mid-stream is no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def stand_in(self) -> OllamaServer:
        return self.server.stand_in

    def parse_request(self) -> bool:
        """A server that has been closed answers nobody, not even over a connection that is still open."""
        if self.stand_in.closing.is_set():
            self.close_connection = True
            return False
        return super().parse_request()

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._send(200, b"", "text/plain")

    def do_GET(self) -> None:
        self.stand_in.requests.append((self.path, {}))
        if self._replied({}):
            return
        if self.path == "/":
            self._send(200, b"Ollama is running", "text/plain")
        elif self.path == "/api/version":
            self._json(200, {"version": "0.12.3"})
        elif self.path == "/api/tags":
            self._json(200, {"models": [self._model(name) for name in self.stand_in.models]})
        else:
            self._json(404, {"error": "not found"})

    def do_POST(self) -> None:
        try:
            payload = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        except ValueError as error:
            return self._json(400, {"error": str(error)})
        self.stand_in.requests.append((self.path, payload))
        if self._replied(payload):
            return None
        name = self._found(payload.get("model", ""))
        if self.path not in ("/api/show", "/api/chat", "/api/generate"):
            self._json(404, {"error": "not found"})
        elif name is None:
            self._json(404, {"error": f"model '{payload.get('model', '')}' not found"})
        elif self.path == "/api/show":
            capabilities = self.stand_in.models[name]
            self._json(200, {"details": self._model(name)["details"], "model_info": {}, "capabilities": capabilities})
        elif "think" in payload and payload["think"] and "thinking" not in self.stand_in.models[name]:
            self._json(400, {"error": f'"{name}" does not support thinking'})
        else:
            self._answer(payload)

    def _replied(self, payload: dict) -> bool:
        reply = self.stand_in.replies(self.path, payload)
        if reply:
            status, headers, body = reply
            self._send(status, body, **headers)
        return bool(reply)

    # --- answers ---

    def _answer(self, payload: dict) -> None:
        prompt = payload["messages"][-1]["content"] if payload.get("messages") else payload.get("prompt", "")
        seed = payload.get("options", {}).get("seed", 0)
        if not prompt:
            return self._json(200, self._piece(payload, "", done="load"))
        fault, server = self.stand_in.misbehave(seed), self.stand_in
        server.asked[seed, prompt] += 1
        if fault in PASSING and server.asked[seed, prompt] > (2 if fault == "busy" else 1):
            fault = "ok"
        if fault == "busy":
            return self._json(503, {"error": "server busy, please try again.  maximum pending requests exceeded"})
        if fault == "server error":
            return self._json(500, {"error": "llama runner process has terminated"})
        if fault == "gone":
            return self._json(404, {"error": f"model '{payload['model']}' not found"})
        if fault == "stall before":
            return self._stall()
        text, thought = _text_of(fault, seed, prompt)
        if self.stand_in.writes and fault == "ok":
            text = self.stand_in.writes(seed)
        if not payload.get("stream", True):
            return self._json(200, self._piece(payload, text, thought, "length" if fault == "length" else "stop"))
        self._stream(payload, text, thought, fault)

    def _stream(self, payload: dict, text: str, thought: str, fault: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        chunked = fault != "cut cleanly"  # without chunks, the end of the connection is the end of the body
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Connection", "close")))
        self.end_headers()
        pieces = _pieces(text, self.stand_in.words_a_piece)
        for number, piece in enumerate(pieces):
            if number == len(pieces) // 2 and fault in PASSING and not self._fail(fault):
                return
            self._line(self._piece(payload, piece, thought if not number else ""), chunked)
            if self.stand_in.pace and self.stand_in.closing.wait(self.stand_in.pace):
                return
        last = self._piece(payload, "", done="length" if fault == "length" else "stop", count=len(pieces))
        self._line(last, chunked)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _fail(self, fault: str) -> bool:
        """Does in mid-stream what was ordered; True where the stream goes on all the same."""
        self.close_connection = True
        if fault == "stall":
            self._stall()
        elif fault == "reset":  # an RST instead of an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "broken JSON":
            self._chunk(b'{"model": "llama3.1", "message": {"role": "assi\n')
            return True
        elif fault == "odd JSON":
            self._chunk(b'["not", "an", "object"]\n')
            return True
        elif fault == "error in stream":
            self._line({"error": "an error was encountered while running the model"}, True)
            self.wfile.write(b"0\r\n\r\n")
        return False

    def _stall(self) -> None:
        self.stand_in.closing.wait(self.stand_in.stall_seconds)
        self.close_connection = True

    def _piece(self, payload: dict, text: str, thought: str = "", done: str | None = None, count: int = 0) -> dict:
        """One line of an answer, in the form of /api/chat or of /api/generate."""
        piece = {"model": payload["model"], "created_at": datetime.now(timezone.utc).isoformat()}
        extra = {"thinking": thought} if thought else {}
        if self.path == "/api/chat":
            piece["message"] = {"role": "assistant", "content": text, **extra}
        else:
            piece |= {"response": text, **extra}
        piece["done"] = bool(done)
        if done:
            piece |= {"done_reason": done, "total_duration": 10**9, "load_duration": 10**6, "prompt_eval_count": 50}
            piece |= {"prompt_eval_duration": 10**7, "eval_count": count or len(text.split()), "eval_duration": 10**9}
        return piece

    # --- the wire ---

    def _line(self, value: dict, chunked: bool) -> None:
        line = json.dumps(value).encode() + b"\n"
        self._chunk(line) if chunked else self.wfile.write(line)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _json(self, status: int, value: dict) -> None:
        self._send(status, json.dumps(value).encode(), "application/json; charset=utf-8")

    def _send(self, status: int, body: bytes, content_type: str = "text/plain", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": content_type, "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _found(self, name: str) -> str | None:
        full = name if ":" in name else f"{name}:latest"
        return full if full in self.stand_in.models else None

    def _model(self, name: str) -> dict:
        details = {"format": "gguf", "family": "llama", "parameter_size": "8B", "quantization_level": "Q4_K_M"}
        return {
            "name": name,
            "model": name,
            "modified_at": "2025-01-01T00:00:00Z",
            "size": 4920753328,
            "digest": "0" * 64,
            "details": details,
        }


def _text_of(fault: str, seed: int, prompt: str) -> tuple[str, str]:
    """The text, and the thought that is sent in a field of its own."""
    if (
        prompt.startswith("Below, between the lines,")
        or "Write only the request" in prompt
        or "request alone" in prompt
    ):
        return request_for(seed), ""
    text = story(seed)
    altered = {
        "repeat": story("the same again"),
        "near repeat": story("much the same", 40) + f" So {VERBS[seed % len(VERBS)]} the {NOUNS[seed % len(NOUNS)]}.",
        "refusal": "I'm sorry, but I can't assist with that request.",
        "empty": "   \n",
        "huge": " ".join(story(f"{seed} {part}") for part in range(2)) + " lorem" * 350_000,
        "markers": text.replace("\n\n", "\n<end>\n"),
        "short": "The fox slept.",
        "endless thought": "<think>I wonder what I could write. " + text,
        "think aloud": f"<think>\nI need a fox. {story('thought')}\n</think>\n\n{text}",
        "talk": f"Sure! Here's a short story:\n\n**The Fox**\n\n{text}\n\nLet me know if you'd like me to go on!",
        "slashes": f"../../../etc/passwd\n\n{text}",
        "control characters": f"\x1b[31m{text[:50]}\x1b[0m\x00\x07\u202e{text[50:]}\r\n\x9b",
        "markers at the end": f"{text}\n<end><|im_end|>",
    }
    return altered.get(fault, text), f"A thought about {seed}." if fault == "think apart" else ""


def _pieces(text: str, words_a_piece: int) -> list[str]:
    """The text in pieces of some words, as a model would send it word by word."""
    words = text.split(" ")
    starts = range(0, len(words), words_a_piece if len(words) < 10_000 else len(words))
    pieces = [" ".join(words[start : start + words_a_piece if len(words) < 10_000 else None]) for start in starts]
    return [piece + " " * (number < len(pieces) - 1) for number, piece in enumerate(pieces)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=11500)
    parser.add_argument("--pace", type=float, default=0.02, help="seconds between two words")
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests that meet one")
    args = parser.parse_args()
    server = OllamaServer(args.port)
    server.pace, server.words_a_piece = args.pace, 1
    server.misbehave = faults(args.faults)
    with server:
        print(f"listening at {server.url} with {', '.join(server.models)}; Ctrl-C ends it", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
