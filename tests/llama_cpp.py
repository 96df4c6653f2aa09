"""llama.cpp in a process of its own, as `make test-llama` installs it, and a server that speaks as Ollama does."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(__file__).parent / "llama"


def missing() -> str:
    """Why llama.cpp cannot be asked here; "" where it can."""
    if shutil.which("node") is None:
        return "needs Node.js"
    return "" if (FOLDER / "node_modules").is_dir() else "needs llama.cpp from npm: make test-llama"


class LlamaCpp:
    """One model in llama.cpp. In a `with`: the process ends with it."""

    def __init__(self, path: str | Path, context: int = 4096, threads: int = 1):
        self._process = subprocess.Popen(
            ["node", "llama.mjs"],
            cwd=FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self.suppressed = self._ask("load", path=str(Path(path).resolve()), context=context, threads=threads)[
            "suppressed"
        ]

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def processor_seconds(self) -> float:
        """The processor time that the threads of llama.cpp's process have taken so far (Linux)."""
        threads = Path(f"/proc/{self._process.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, special words included, without the token that begins a document."""
        return self._ask("tokenize", texts=texts)

    def probabilities(self, ids: list[int]) -> list[list[float]]:
        """(l, vocab): for each place of `ids` (l,) what may follow it."""
        return self._ask("probabilities", ids=ids)

    def nats(self, ids: list[int]) -> float:
        """The sum of -log p over ids[1:]."""
        return self._ask("nats", ids=ids)

    def generate(
        self, ids: list[int], count: int, temperature: float = 0.0, seed: int = 0, through: bool = False
    ) -> list[int]:
        """At most `count` ids that follow `ids`, until the end of the document or `through` it.

        What the file suppresses is never written.
        """
        return self._ask("generate", ids=ids, count=count, temperature=temperature, seed=seed, through=through)

    def conversation(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of messages, {"role", "content"} each, by the file's own chat template."""
        return self._ask("conversation", messages=messages)

    def text(self, ids: list[int]) -> str:
        """What `ids` say, special words included."""
        return self._ask("detokenize", ids=ids)

    def _ask(self, operation: str, **values):
        self._process.stdin.write(json.dumps({"operation": operation, **values}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended in {operation!r} with status {self._process.wait()}")
        return json.loads(line)


class OllamaStandIn:
    """An HTTP server that answers as Ollama does for one exported model, with llama.cpp behind it. In a `with`.

    It serves what data_generator.py asks: the list of models, a model's details, and a chat in pieces. `folder` is
    what the export wrote; of the Modelfile it follows the template and the temperature.
    """

    NAME = "mine:latest"

    def __init__(self, folder: str | Path):
        import modelfile  # beside this file; benchmarks/llama_cpp.py, which has another path, needs LlamaCpp alone

        text = (Path(folder) / "Modelfile").read_text()
        self._render = modelfile.render
        self.template, self.parameters = modelfile.template(text), modelfile.parameters(text)
        self.llama = LlamaCpp(Path(folder) / "model.gguf")
        self.lock = threading.Lock()  # one text at a time
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.http.stand_in = self
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> OllamaStandIn:
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.llama.__exit__(*error)

    def write(self, messages: list[dict], options: dict) -> tuple[list[int], bool]:
        """The ids that follow the messages, and whether the model ended the text itself."""
        count = options.get("num_predict", 1000)
        temperature = options.get("temperature", float(self.parameters["temperature"][0]))
        with self.lock:
            text = self._render(self.template, messages, prompt=messages[-1]["content"])
            (ids,) = self.llama.tokenize([text])
            sampling = {"temperature": temperature, "seed": options.get("seed", 0)}
            written = self.llama.generate([0, *ids], count, **sampling)
        return written, len(written) < count


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._send([{"models": [{"model": OllamaStandIn.NAME, "name": OllamaStandIn.NAME}]}])

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/show":
            self._send([{"capabilities": ["completion"], "details": {"family": "mamba2", "format": "gguf"}}])
            return
        stand_in = self.server.stand_in
        ids, ended = stand_in.write(asked["messages"], asked.get("options", {}))
        pieces = [stand_in.llama.text([i]) for i in ids]
        parts = [{"message": {"role": "assistant", "content": piece}, "done": False} for piece in pieces]
        last = {"done": True, "done_reason": "stop" if ended else "length", "eval_count": len(ids)}
        self._send([*parts, {"message": {"role": "assistant", "content": ""}, **last}])

    def _send(self, values: list[dict]) -> None:
        body = "".join(json.dumps({"model": OllamaStandIn.NAME, **value}) + "\n" for value in values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
