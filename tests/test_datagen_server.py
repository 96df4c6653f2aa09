"""The real client against the stand-in server: every fault on its own."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from ollama_server import HARMLESS, LASTING, PASSING, OllamaServer, request_for, story

from mamba2_min.datagen.builtin import INSTRUCTIONS, STORIES
from mamba2_min.datagen.client import NoAnswer, OllamaClient, RequestOptions, Stopped
from mamba2_min.datagen.generator import Job, Rejection, generate, write_draft
from mamba2_min.datagen.judging import Rules
from mamba2_min.datagen.kinds import compose
from mamba2_min.datagen.store import Store
from mamba2_min.errors import UserError

QUICK = RequestOptions(
    {"temperature": 0.9, "num_ctx": 4096}, timeout=0.3, first_timeout=2.0, max_seconds=5.0, retries=3, backoff=0.01
)


@pytest.fixture
def server():
    with OllamaServer() as server:
        yield server


def client(server: OllamaServer, request: RequestOptions = QUICK, model: str = "llama3.1") -> OllamaClient:
    return OllamaClient(model, server.url, request, threading.Event())


def always(fault: str):
    return lambda seed: fault


# --- what is sent ---


def test_what_is_sent_is_the_same_but_for_the_seed(server, tmp_path):
    with Store(tmp_path) as store:
        ask = client(server)
        assert generate(Job(STORIES, 5, seed=100), [ask], store, threading.Event())
    sent = server.asked_for("/api/chat")
    assert [payload["options"].pop("seed") for payload in sent] == [100, 101, 102, 103, 104]
    assert [payload["messages"][-1]["content"] for payload in sent] == [compose(STORIES, 100, i).text for i in range(5)]
    for payload in sent:
        del payload["messages"]
        assert payload == sent[0]
    assert sent[0]["options"] == {"temperature": 0.9, "num_ctx": 4096}
    assert sent[0]["keep_alive"] == "30m" and sent[0]["stream"] is True
    assert [entry["options"]["seed"] for entry in store.entries] == [entry["seed"] for entry in store.entries]


def test_a_model_that_thinks_is_asked_not_to(server):
    for model, think in (("qwen3:4b", False), ("llama3.1", None)):
        ask = client(server, model=model)
        ask.check_model()
        ask.ask("Write.", 1)
        assert server.asked_for("/api/chat")[-1].get("think") is think


def test_text_done_reason_and_tokens_come_back(server):
    answer = client(server).ask("Write.", 7)
    assert (answer.text, answer.done_reason) == (story(7), "stop")
    assert answer.eval_count > 0


# --- faults of the connection ---


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_is_asked_again(server, fault):
    server.misbehave = always(fault)
    assert client(server).ask("Write.", 3).text == story(3)
    assert server.asked[3, "Write."] == (3 if fault == "busy" else 2)


def test_a_server_that_stalls_before_its_first_word(server):
    server.misbehave = always("stall before")
    begun = time.monotonic()
    with pytest.raises(NoAnswer, match="stalled"):
        client(server, RequestOptions(first_timeout=0.2, timeout=5, retries=1, backoff=0.01)).ask("Write.", 1)
    assert time.monotonic() - begun < 2


def test_a_silence_in_the_middle_is_bounded_by_its_own_timeout(server):
    server.misbehave = lambda seed: "stall"
    begun = time.monotonic()
    with pytest.raises(NoAnswer, match="stalled"):
        client(server, RequestOptions(first_timeout=30, timeout=0.2, retries=0)).ask("Write.", 1)
    assert time.monotonic() - begun < 2


def test_an_answer_that_trickles_in_is_bounded_as_a_whole(server):
    server.pace, server.words_a_piece = 0.05, 1
    begun = time.monotonic()
    with pytest.raises(NoAnswer, match="took too long"):
        client(server, RequestOptions(max_seconds=0.5, retries=5, backoff=5)).ask("Write.", 1)
    assert time.monotonic() - begun < 2  # and it is not asked again


def test_pauses_double_and_are_bounded(server, monkeypatch):
    ask, pauses = client(server, RequestOptions(retries=8, backoff=1.0)), []
    monkeypatch.setattr(ask._stop, "wait", lambda seconds: pauses.append(seconds))
    server.misbehave = always("busy")
    monkeypatch.setattr(server, "asked", dict.fromkeys([(1, "Write.")], -100))
    with pytest.raises(NoAnswer, match="server busy"):
        ask.ask("Write.", 1)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_a_wish_to_stop_drops_the_answer(server):
    server.pace = 0.05
    ask = client(server)
    threading.Timer(0.2, ask._stop.set).start()
    begun = time.monotonic()
    with pytest.raises(Stopped):
        ask.ask("Write.", 1)
    assert time.monotonic() - begun < 1


# --- faults that asking again cannot mend ---


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_no_server():
    ask = OllamaClient("llama3.1", f"localhost:{closed_port()}", QUICK, threading.Event())
    for call in (ask.check_model, lambda: ask.ask("Write.", 1)):
        with pytest.raises(UserError, match=r"no Ollama server answers at localhost:\d+.*`ollama serve`"):
            call()


def test_a_server_that_goes_away_is_said_after_the_retries(server):
    ask = client(server)
    ask.check_model()
    server.__exit__()
    with pytest.raises(UserError, match="ollama serve"):
        ask.ask("Write.", 1)


@pytest.mark.parametrize(
    ("model", "nearest"),
    [
        ("lama3.1", "llama3.1:latest"),
        ("llama3.1:70b", "llama3.1:latest"),
        ("qwen3", "qwen3:4b"),
        ("gwen3:4b", "qwen3:4b"),
    ],
)
def test_a_model_that_the_server_does_not_have(server, model, nearest):
    with pytest.raises(UserError, match=f"nearest there: {nearest}.*ollama pull {model}"):
        client(server, model=model).check_model()


def test_a_server_without_any_model(server):
    server.models = {}
    with pytest.raises(UserError, match=r"none at all.*ollama pull llama3\.1"):
        client(server).check_model()


def test_a_model_that_is_removed_while_it_is_asked(server):
    server.misbehave = always("gone")
    with pytest.raises(UserError, match=r"ollama pull llama3\.1"):
        client(server).ask("Write.", 1)


@pytest.mark.parametrize("model", ["llama3.1", "llama3.1:latest", "LLAMA3.1", "qwen3:4b"])
def test_names_as_the_server_takes_them(server, model):
    server.models = {"llama3.1:latest": [], "LLAMA3.1:latest": [], "qwen3:4b": []}
    client(server, model=model).check_model()


def test_options_that_the_server_refuses(server):
    ask = client(server)
    ask._think = {"think": True}
    with pytest.raises(UserError, match=r"refuses the request \(400\).*does not support thinking"):
        ask.ask("Write.", 1)


@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "localhost:{port}", "http://127.0.0.1:{port}/", "0.0.0.0:{port}"])
def test_addresses_as_the_client_takes_them(server, monkeypatch, form):
    address = form.format(port=server.port)
    OllamaClient("llama3.1", address, QUICK, threading.Event()).check_model()
    monkeypatch.setenv("OLLAMA_HOST", address)
    OllamaClient("llama3.1", None, QUICK, threading.Event()).check_model()


@pytest.mark.parametrize("host", ["localhost:99999", "http://[::1", "localhost:port"])
def test_an_address_that_is_none(host):
    with pytest.raises(UserError, match="is not the address of a server"):
        OllamaClient("llama3.1", host, QUICK, threading.Event())


def test_a_server_that_is_no_ollama_server():
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            connection, _ = other.accept()
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

        threading.Thread(target=answer, daemon=True).start()
        ask = OllamaClient("llama3.1", f"127.0.0.1:{other.getsockname()[1]}", QUICK, threading.Event())
        with pytest.raises(UserError, match="does not answer as an Ollama server does"):
            ask.check_model()


# --- faults of the text ---

REASONS = {
    "length": "not ended by the model (length)",
    "refusal": "refusal",
    "empty": "empty",
    "huge": "too long",
    "markers": "markers in the text",
    "short": "too short",
    "endless thought": "empty",
}


@pytest.mark.parametrize("fault", REASONS)
def test_a_text_that_is_not_worth_keeping(server, fault):
    server.misbehave = always(fault)
    with pytest.raises(Rejection) as rejection:
        write_draft(Job(STORIES, 1), client(server), 0)
    assert rejection.value.reason == REASONS[fault]


@pytest.mark.parametrize("fault", HARMLESS)
def test_what_can_be_cleaned_is_kept(server, fault):
    server.misbehave = always(fault)
    text = write_draft(Job(STORIES, 1), client(server), 0).text
    assert text == ("../../../etc/passwd\n\n" if fault == "slashes" else "") + story(0)


def test_huge_answers_are_not_read_to_their_end(server):
    server.misbehave = always("huge")
    ask = client(server, RequestOptions(max_characters=10_000))
    assert ask.ask("Write.", 1).done_reason == "too long"


def test_a_text_that_was_there_already(server, tmp_path):
    server.misbehave = lambda seed: {1: "repeat", 2: "repeat", 4: "near repeat", 5: "near repeat"}.get(seed, "ok")
    (tmp_path / "mine.txt").write_text(story(3).upper())
    with Store(tmp_path) as store:
        assert generate(Job(STORIES, 6), [client(server)], store, threading.Event())
        assert [entry["seed"] for entry in store.entries] == [0, 1, 4, 6, 7, 8]
        assert store.rejected == {"duplicate": 2, "near duplicate": 1}
    assert '"detail": "of mine.txt"' in (tmp_path / "rejected.jsonl").read_text()


def test_every_fault_is_tried():
    assert set(LASTING) == {*REASONS, "repeat", "near repeat"}


# --- pairs ---


def test_requests_and_answers(server, tmp_path):
    with Store(tmp_path) as store:
        assert generate(Job(INSTRUCTIONS, 2), [client(server)], store, threading.Event())
        content = (tmp_path / store.entries[1]["file"]).read_text()
    assert content == f"{request_for(1)}<start>{story(1)}\n"
    second = server.asked_for("/api/chat")[3]["messages"][-1]["content"]
    assert second.startswith(request_for(1)) and "{" not in second


def test_the_request_that_a_text_answers(server, tmp_path):
    with Store(tmp_path) as store:
        assert generate(Job(STORIES, 2, with_prompts=True), [client(server)], store, threading.Event())
        content = (tmp_path / store.entries[1]["file"]).read_text()
    assert content == f"{request_for(1)}<start>{story(1)}\n"
    assert story(1) in server.asked_for("/api/chat")[3]["messages"][-1]["content"]


# --- giving up ---


def test_a_model_that_never_writes_anything_acceptable(server, tmp_path):
    server.misbehave = lambda seed: "ok" if seed < 3 else ("short" if seed % 2 else "refusal")
    with Store(tmp_path) as store:
        with pytest.raises(UserError, match=r"10 texts in a row were rejected \(5 too short, 5 refusal\)"):
            generate(Job(STORIES, 50, max_rejections=10), [client(server)], store, threading.Event())
        assert len(store) == 3 and store.rejected.total() == 10


def test_a_server_that_never_gives_a_whole_answer(server, tmp_path):
    server.misbehave = always("cut")
    with Store(tmp_path) as store:
        with pytest.raises(UserError, match="5 requests in a row"):
            generate(Job(STORIES, 50), [client(server, RequestOptions(retries=0))], store, threading.Event())
        assert store.rejected == {"no answer: cut off by the connection": 5}


def test_a_text_in_another_language(server):
    job = Job(STORIES.in_language("German"), 1, rules=Rules(language="de"))
    with pytest.raises(Rejection, match="wrong language"):
        write_draft(job, client(server), 0)
    assert "Write it in German." in server.asked_for("/api/chat")[0]["messages"][-1]["content"]


def test_what_is_written_does_not_depend_on_the_number_of_workers(server, tmp_path):
    server.misbehave = lambda seed: "short" if seed % 3 == 0 else "ok"
    sets = []
    for workers in (1, 5):
        with Store(tmp_path / str(workers)) as store:
            assert generate(Job(STORIES, 20, workers=workers), [client(server)], store, threading.Event())
            sets.append({(entry["seed"], entry["prompt"], entry["sha256"]) for entry in store.entries})
    # The last few attempts may differ: with five at once it is not known yet which of them will be good.
    assert len(sets[0] & sets[1]) >= 16
