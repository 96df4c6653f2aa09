"""The referee, with the real client over real HTTP: a fair judge, one that goes by the place, and one that fails."""

import json
import math
import re
import sys
import threading

import numpy as np
import pytest
from ollama_server import OllamaServer

from mamba2_min import Mamba2Config, Mamba2LM, UserError, WordTokenizer
from mamba2_min.datagen.client import OllamaClient, RequestOptions
from mamba2_min.errors import run_script
from mamba2_min.evaluation import referee, tally
from mamba2_min.evaluation.journal import Journal

QUICK = RequestOptions(timeout=0.3, first_timeout=2.0, max_seconds=5.0, retries=1, backoff=0.01)
PROMPTS = [f"Beginning {k} of a text" for k in range(8)]


class Scripted:
    """A player that always writes its name."""

    def __init__(self, name):
        self.name, self.asked = name, 0

    def identity(self):
        return self.name

    def write(self, prompt, seed):
        self.asked += 1
        return f"a text by {self.name}"


def texts_of(payload):
    """The two texts that a judge was shown, in order; None for any other request."""
    asked = payload["messages"][-1]["content"]
    return re.findall(r"=== (?:FIRST|SECOND) \w+ ===\n(.*?)(?=\n===)", asked, re.DOTALL) or None


@pytest.fixture
def server():
    """A stand-in whose model judges by `server.judge(first, second, prompt)` -> its reply."""
    with OllamaServer() as server:
        server.judge = lambda first, second, prompt: "EQUAL"

        def reply(path, payload):
            if path != "/api/chat" or not (texts := texts_of(payload)):
                return None
            said = server.judge(*texts, payload["messages"][-1]["content"])
            piece = {"model": "x", "created_at": "2025-01-01T00:00:00Z", "done": True, "done_reason": "stop"}
            piece["message"] = {"role": "assistant", "content": said}
            return 200, {"content_type": "application/x-ndjson"}, json.dumps(piece).encode() + b"\n"

        server.replies = reply
        yield server


def make(server, folder, retries=2, prompts=PROMPTS):
    judge = OllamaClient("llama3.1", server.url, QUICK, threading.Event())
    journals = Journal(folder / "a.jsonl", referee.ANSWER), Journal(folder / "j.jsonl", referee.JUDGEMENT)
    return referee.Referee(prompts, judge, *journals, retries)


def play(server, folder, **options):
    one = make(server, folder, **options)
    for name in "AB":
        one.write(Scripted(name))
    return one.compare("A", "B")


def prefers(name):
    return lambda first, second, _: "Because.\n" + ("FIRST" if first.endswith(name) else "**Second.**")


def test_a_judge_that_knows_better_decides(server, tmp_path):
    server.judge = prefers("B")
    outcomes = play(server, tmp_path)
    assert [o.score for o in outcomes] == [0.0] * 8 and not any(o.disagreed for o in outcomes)
    found = referee.summary(outcomes)
    assert (found["wins"], found["ties"], found["losses"], found["first_place"]) == (0, 0, 8, 0.5)
    assert len(server.asked_for("/api/chat")) == 16  # both orders, each once


def test_a_judge_that_goes_by_the_place_decides_nothing(server, tmp_path):
    server.judge = lambda *_: "FIRST"
    outcomes = play(server, tmp_path)
    assert all(o.score == 0.5 and o.disagreed for o in outcomes)
    found = referee.summary(outcomes)
    assert found["first_place"] == 1.0 and found["win_rate"] == (0.5, 0.5, 0.5)
    assert "chose the text that stood first in 100%" in referee.described(found)


def test_what_is_not_a_verdict_is_asked_again_then_counted_and_never_scored(server, tmp_path):
    def judge(first, second, asked):
        if "Beginning 3" in asked:
            return "I like FIRST and SECOND alike."
        if "Beginning 4" in asked and "It is important" not in asked:
            return "Let me think."
        return prefers("A")(first, second, asked)

    server.judge = judge
    outcomes = play(server, tmp_path)
    assert [o.score for o in outcomes] == [1.0, 1.0, 1.0, None, 1.0, 1.0, 1.0, 1.0]
    found = referee.summary(outcomes)
    assert found["failed"] == {"no verdict in the last line": 1} and found["with_failed"] == [7 / 8, 1.0]
    assert "NOT JUDGED: 1 of 8" in referee.described(found)
    lines = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    assert [sum(r["prompt"] == k for r in lines) for k in range(8)] == [2, 2, 2, 6, 4, 2, 2, 2]
    assert all(r["reply"] for r in lines)  # every reply is kept, the useless ones too


def test_faults_of_the_connection_are_retried_and_lasting_ones_counted(tmp_path):
    with OllamaServer() as server:
        server.writes = lambda seed: "Well.\nEQUAL"
        server.misbehave = lambda seed: "cut"  # once per request; asking again helps
        assert [o.score for o in play(server, tmp_path / "one", prompts=PROMPTS[:2])] == [0.5, 0.5]
        server.misbehave = lambda seed: "length"  # an endless story, never a verdict
        outcomes = play(server, tmp_path / "two", prompts=PROMPTS[:2], retries=0)
        assert [o.score for o in outcomes] == [None, None]
        server.replies = lambda path, payload: (503, {}, b"overloaded") if path == "/api/chat" else None
        outcomes = play(server, tmp_path / "three", prompts=PROMPTS[:1], retries=1)
        assert outcomes[0].score is None and "overloaded" in outcomes[0].failure


@pytest.fixture(autouse=True)
def folders(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()


def test_it_goes_on_where_it_stopped(server, tmp_path):
    server.judge = prefers("A")
    first = play(server, tmp_path)
    asked = len(server.asked_for("/api/chat"))
    path = tmp_path / "j.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # killed in the middle of a line
    one, writer = make(server, tmp_path), Scripted("A")
    one.write(writer)
    assert one.compare("A", "B") == first and writer.asked == 0
    assert len(server.asked_for("/api/chat")) == asked + 11
    assert len(path.read_bytes().splitlines()) == 16


def test_more_retries_give_a_failed_one_another_chance(server, tmp_path):
    server.judge = lambda *_: "Hm."
    assert play(server, tmp_path, retries=0)[0].score is None
    server.judge = prefers("A")
    assert play(server, tmp_path, retries=0)[0].score is None
    assert play(server, tmp_path, retries=1)[0].score == 1.0


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("FIRST", "first"),
        ("Some words about the second.\n\n**SECOND**\n", "second"),
        ("Final verdict: Equal.", "equal"),
        ("My verdict is _FIRST_", "first"),
        ("The first is better than the second", None),
        ("Neither the first", None),
        ("FIRST\nI hope this helps!", None),
        ("", None),
        ("8/10", None),
    ],
)
def test_only_a_plain_verdict_counts(reply, wanted):
    assert referee.verdict(reply) == wanted


def test_the_question_holds_no_verdict_to_copy():
    asked = referee.question("P", "x", "y").splitlines()
    assert not any(referee.verdict(line) for line in asked)


# --- statistics ---


def test_the_interval_is_that_of_drawing_scores_one_by_one():
    scores = [1.0] * 20 + [0.5] * 9 + [0.0] * 11
    rate, low, high = tally.win_rate(scores)
    assert rate == pytest.approx(24.5 / 40)
    drawn = np.random.default_rng(1).choice(scores, (20_000, 40)).mean(1)
    assert (low, high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.013)
    error = np.std(scores) / math.sqrt(40)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.06)
    with pytest.raises(ValueError, match="at least one"):
        tally.win_rate([])


def test_two_ratings_are_the_log_odds():
    found = tally.ratings(np.array([[0.0, 29.5], [9.5, 0.0]]))  # with the added tie 30 : 10
    assert found[0] - found[1] == pytest.approx(400 * math.log10(3)) and found.mean() == pytest.approx(1000)


def test_ratings_that_made_the_games_are_found_again():
    true = np.array([900.0, 1000.0, 1050.0, 1250.0]) - 50
    points = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            points[i, j] = 1e6 * (i != j) / (1 + 10 ** ((true[j] - true[i]) / 400))
    assert tally.ratings(points) == pytest.approx(true, abs=0.01)
    games = [(k, 0, 1, 1.0) for k in range(5)]
    (best, low, high), (other, *_) = tally.rating_table(2, games)
    assert best == pytest.approx(1000 + 200 * math.log10(11)) and low <= best <= high and other < 1000  # never infinite


# --- the command ---


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command, in this process: run(*arguments) -> (status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["referee", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run_script(referee.main)
        return stopped.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def runs(tmp_path):
    text = "The cat sat on the mat. The dog sat on the cat. "
    tokenizer = WordTokenizer.train([text], min_count=1)
    config = Mamba2Config(len(tokenizer), d_model=16, n_layer=1, d_state=4, headdim=8)
    for seed, name in enumerate(("one", "two")):
        Mamba2LM(config, seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save(tmp_path / name / "tokenizer.json")


def test_the_command_compares_runs_and_a_model_of_the_server(server, runs, tmp_path, run):
    server.judge = lambda first, second, _: "FIRST" if len(first) < len(second) else "SECOND"
    asked = ["--host", server.url, "--limit", 3, "--max-tokens", 8, "--out", "out", "--elo", "one", "two"]
    status, out, err = run(*asked)
    assert status == 0 and "one against two" in out, err
    judged = len(server.asked_for("/api/chat"))
    status, out, err = run(*asked, "ollama:qwen3:4b")  # a third one joins
    assert status == 0 and "ollama:qwen3:4b" in out, err
    assert len(server.asked_for("/api/chat")) == judged + 3 + 12
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["pairs"]) == 3 and len(results["outcomes"]) == 9
    assert set(results["elo"]) == {"one", "two", "ollama:qwen3:4b"}
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 9 and len({a["text"] for a in answers}) > 3
    status, _, err = run("--seed", 1, *asked)
    assert status == 2 and "begun with another seed" in err
    Mamba2LM(Mamba2LM.from_pretrained(tmp_path / "one").config, seed=9).save_pretrained(tmp_path / "one")
    status, _, err = run(*asked)
    assert status == 2 and "begun with another one" in err  # the run was trained on meanwhile


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--a", "one"], "give two models"),
        (["--a", "one", "--b", "one"], "each named once"),
        (["--a", "one", "--b", "two", "--limit", "0"], "--limit must be at least 1"),
        (["--a", "one", "--b", "two", "--host", "127.0.0.1:9"], "no Ollama server answers"),
        (["--a", "one", "--b", "two", "--prompts", "none.txt"], "none.txt"),
    ],
)
def test_bad_input_is_one_line(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == 2 and message in err and err.count("\n") == 1


def test_prompts_are_lines_or_records(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one\\ntwo"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n')
    assert referee.read_prompts(tmp_path / "p.txt") == ["one", "two"]
    assert referee.read_prompts(tmp_path / "p.jsonl") == ["one\ntwo"]
    assert len(referee.read_prompts(referee.PROMPTS)) == 20
    with pytest.raises(UserError, match="prompt 1: an object"):
        referee.read_prompts(tmp_path / "bad.jsonl")
    (tmp_path / "j.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        Journal(tmp_path / "j.jsonl", referee.JUDGEMENT)


ANSWER = {"prompt": 0, "player": "a", "text": "x", "failure": None}
JUDGEMENT = {"prompt": 0, "first": "a", "second": "b", "verdict": "first", "failure": None, "reply": "FIRST"}


@pytest.mark.parametrize("odd", [[], {}, True, 0.5, 7, None, "third"], ids=repr)
@pytest.mark.parametrize(("line", "fields"), [(ANSWER, referee.ANSWER), (JUDGEMENT, referee.JUDGEMENT)])
def test_a_journal_with_odd_values_is_refused(tmp_path, line, fields, odd):
    for name in line:
        (tmp_path / "a.jsonl").write_text(json.dumps({**line, name: odd}) + "\n")
        may = {
            int: name == "prompt",
            str: name not in ("prompt", "verdict"),
            type(None): name in ("text", "failure", "reply", "verdict"),
        }
        if may.get(type(odd)):
            assert Journal(tmp_path / "a.jsonl", fields).records == [{**line, name: odd}]
        else:
            with pytest.raises(UserError, match=f"line 1: {name} is not what was written there"):
                Journal(tmp_path / "a.jsonl", fields)
