"""run.py as its users meet it: a process with arguments and pipes, and a dialogue at a terminal."""

import importlib.util
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

from mamba2_min.config import Mamba2Config
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError, printable
from mamba2_min.inference import dialogue, terminal
from mamba2_min.inference.completer import Completer
from mamba2_min.inference.suggestions import suggested_prompts
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.ops.sampling import Sampler

SCRIPT = Path(__file__).resolve().parent.parent / "run.py"
TEXT = "Once upon a time a small owl lived in the old tower, and nobody in the town knew her name.\n"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "NO_COLOR": "1", "TERM": "dumb"}


def load_script():
    spec = importlib.util.spec_from_file_location("run_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load_script()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose model, greedy, writes for long without an end of document."""
    folder = tmp_path_factory.mktemp("runs") / "owl"
    tokenizer = WordTokenizer.train([TEXT])
    config = Mamba2Config(vocab_size=len(tokenizer), d_model=32, n_layer=1, d_state=16, headdim=16)
    for seed in range(20):
        model = Mamba2LM(config, seed=seed).eval()
        if tokenizer.eos_id not in model.generate(tokenizer.encode("The owl"), 400, temperature=0):
            break
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def call(monkeypatch, capsys, folder):
    """Runs `main` in this process: returns what it wrote to standard output and to standard error."""

    def call(*arguments, stdin=None, model=folder):
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # which main sets, and which must not outlive the test
        monkeypatch.setattr(sys, "argv", ["run.py", *(["--model", str(model)] if model else []), *arguments])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        assert run.main() == 0
        return capsys.readouterr()

    return call


def written(folder, prompt, tokens, sampler):
    return "".join(Completer.load(folder).complete(prompt, tokens, sampler))


def process(folder, *arguments, **options):
    command = [sys.executable, str(SCRIPT), "--model", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=120, **options)


def test_a_script_gets_the_completion_alone(folder):
    done = process(folder, "--max-tokens", "12", "--seed", "3", "--temperature", "1.5", input=b"The owl\n")
    text = written(folder, "The owl", 12, Sampler(1.5, seed=3))
    assert done.stdout.decode() == text.removesuffix("\n") + "\n"
    said = done.stderr.decode()
    assert done.returncode == 0
    assert said.splitlines()[0].startswith(f"model     {folder}, ")
    assert "temperature 1.5, top-k off, top-p off, min-p off, repeat-penalty off, seed 3" in said
    assert "at most 12 tokens" in said and "12 tokens at " in said.splitlines()[-1]


@pytest.fixture(scope="module")
def well_read(tmp_path_factory):
    """A run with a vocabulary of more than a few words, and with the documents that it was trained on."""
    folder = tmp_path_factory.mktemp("runs") / "read"
    words = [f" {a}{b}{c}" for a in "bcdfglmnprst" for b in "aeiou" for c in "bdfgklmnprst"]
    tokenizer = WordTokenizer([*words, "The", " owl", " flew"], pattern="llama3")
    model = Mamba2LM(Mamba2Config(len(tokenizer), d_model=32, n_layer=1, d_state=16, headdim=16), seed=0)
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    (folder / "documents").mkdir()
    (folder / "documents" / "a.md").write_text("# A title\n\nThe owl flew bab bad.")
    (folder / "documents" / "b.md").write_text("A request<start>The bab owl flew, bad.")
    (folder / "documents" / "c.md").write_text("Unknown words, that nobody knows")
    (folder / "settings.json").write_text(json.dumps({"data": {"data": str(folder / "documents")}}))
    return folder


@pytest.mark.parametrize(
    ("flags", "values", "known"),
    [
        ([], {"temperature": 0.8, "min_p": 0.1, "no_repeat": 6}, True),
        (["--temperature", "1.5"], {"temperature": 1.5, "min_p": 0.1, "no_repeat": 6}, True),
        (["--min-p", "0", "--top-p", "0.9"], {"top_p": 0.9, "no_repeat": 6}, True),
        (["--no-known-words", "--no-repeat", "0"], {"min_p": 0.1}, False),
        (["--raw"], {"temperature": 1.0}, False),
        (["--temperature", "1", "--raw"], {"temperature": 1.0}, False),
        (["--raw", "--top-k", "5", "--known-words"], {"temperature": 1.0, "top_k": 5}, True),
        (["--temperature", "0"], {"temperature": 0.0}, False),
    ],
    ids=str,
)
def test_how_a_text_is_written(call, well_read, flags, values, known):
    completer = Completer.load(well_read)
    completer.known_words = known
    text = "".join(completer.complete("The owl", 40, Sampler(**{"seed": 3, **values})))
    said = call("--prompt", "The owl", "--max-tokens", "40", "--seed", "3", *flags, model=well_read)
    assert said.out == text.removesuffix("\n") + "\n"
    told = said.err.splitlines()[1]
    assert told.endswith(f"known-words {'on' if known else 'off'}")
    assert f"no-repeat {values.get('no_repeat') or 'off'}" in told and f"min-p {values.get('min_p') or 'off'}" in told


def test_prompts_are_suggested_from_the_documents(well_read, folder):
    tokenizer = WordTokenizer.load(well_read / "tokenizer.json")
    assert {*suggested_prompts(well_read, tokenizer)} == {"The owl flew bab", "The bab owl"}
    assert suggested_prompts(folder, tokenizer) == []  # there are no settings
    other = well_read.parent / "other"
    other.mkdir(exist_ok=True)
    for settings in ('{"data": {"data": "not/there"}}', '{"data": 1}', "[]", "{"):
        (other / "settings.json").write_text(settings)
        assert suggested_prompts(other, tokenizer) == []


def test_a_reader_who_leaves_is_no_error(folder):
    command = [sys.executable, str(SCRIPT), "--model", str(folder), "--prompt", "The owl", "--temperature", "0"]
    with subprocess.Popen(
        [*command, "--max-tokens", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as writer:
        writer.stdout.read(5)
        writer.stdout.close()
        said = writer.stderr.read().decode()
        assert writer.wait(60) == 141
    assert "Error" not in said and len(said.splitlines()) == 3


@pytest.mark.skipif(os.name != "posix", reason="arguments are not bytes here")
def test_arguments_that_are_not_utf_8_are_answered_in_one_line(folder):
    done = process(folder, "--prompt", b"caf\xe9")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: argument --prompt: character 4 is not UTF-8 (--help lists the arguments)\n"


@pytest.mark.parametrize(
    "prompt", ["", "🦉🦉", "\x1b[31m\x00\x07\r", "<end>", "a" * 100, TEXT * 1200, "-dash"], ids=range(7)
)
def test_any_prompt_is_completed(call, prompt):
    assert call(f"--prompt={prompt}", "--max-tokens", "3", "--seed", "1").out
    assert call("--max-tokens", "3", "--seed", "1", stdin=prompt.encode()).out


def test_standard_input_loses_the_line_end_that_echo_adds_and_nothing_else(call):
    few = ("--max-tokens", "9", "--temperature", "0")

    def out(stdin):
        return call(*few, stdin=stdin).out

    plain = out(b"in the\n\nold tower")
    assert out(b"in the\n\nold tower\n") == out(b"\xef\xbb\xbfin the\r\n\r\nold tower\r\n") == plain
    assert out(b"in the\n\nold tower\n\n") == call(*few, "--prompt", "in the\n\nold tower\n").out
    assert call(*few, "--prompt", "in the\n\nold tower").out == plain


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--top-p", "1.5"], "--top-p must be a number from 0 to 1, not 1.5"),
        (["--temperature", "nan"], "--temperature must be a number of at least 0, not nan"),
        (["--repeat-penalty", "0"], "--repeat-penalty must be"),
        (["--seed", "-1"], "--seed must be an integer from 0 to 2^63 - 1, not -1"),
        (["--top-k", "some"], "argument --top-k: invalid int value: 'some'"),
        (["--max-tokens", "0"], "argument --max-tokens: must be an integer of at least 1, not '0'"),
        (["--max-tokens", "x"], "argument --max-tokens: must be an integer of at least 1, not 'x'"),
        (["--stop", ""], "argument --stop: a stop text cannot be empty"),
        (["--stop", "\udc80"], "argument --stop: character 1 is not UTF-8"),
        (["--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
        (["--temp", "1"], "unrecognized arguments: --temp 1"),
        (["--model", "no/such/run"], "no/such/run is not a folder"),
    ],
    ids=str,
)
def test_wrong_arguments_are_answered_in_one_line(call, arguments, line):
    with pytest.raises(UserError) as error:
        call("--prompt", "x", *arguments)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_input_that_is_not_utf_8_is_answered_in_one_line(call):
    with pytest.raises(UserError, match=r"^standard input is not UTF-8: byte 0xE9 at offset 3$"):
        call(stdin=b"caf\xe9")


def test_no_input_at_all_is_answered_in_one_line(call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="neither a prompt nor a terminal"):
        call()


def test_the_demo_is_the_default_then_the_newest_run(call, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no trained model in runs/"):
        call("--prompt", "x", model=None)
    for age, name in enumerate(["new", "old", "demo"]):
        run_folder = tmp_path / "runs" / name
        Mamba2LM.from_pretrained(folder).save_pretrained(run_folder)
        (run_folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        os.utime(run_folder / "model.pt", (0, 1e9 - age))
        said = call("--prompt", "x", "--max-tokens", "1", model=None).err.splitlines()[0]
        expected = "runs/demo, " if name == "demo" else "runs/new (the newest run), "
        assert said.startswith(f"model     {Path(expected)}")


def test_a_stop_text_and_the_end_of_the_document_stop(call, folder):
    text = written(folder, "The owl", 30, Sampler(0))
    stop = text[4:7]
    said = call("--prompt", "The owl", "--temperature", "0", "--stop", stop)
    assert said.out == text[: text.index(stop)].removesuffix("\n") + "\n"
    assert "a stop text follows" in said.err


class FakeTerminal(io.TextIOWrapper):
    def __init__(self, text=""):
        super().__init__(io.BytesIO(text.encode()), encoding="utf-8", newline="\n")

    def isatty(self):
        return True

    def shown(self):
        self.flush()
        return self.buffer.getvalue().decode()


HARMFUL = b"\x1b]0;title\x07\tok\n\x9b31m\xe2\x80\xae\r\x08\x7f\x00"
HARMLESS = "\\x1b]0;title\\x07\tok\n\ufffd31m\\u202e\\r\\x08\\x7f\\x00\n"


@pytest.mark.parametrize("at_terminal", [True, False])
def test_a_terminal_is_written_nothing_that_it_would_act_on_and_a_file_gets_the_text(call, monkeypatch, at_terminal):
    ids = iter([*(byte + 1 for byte in HARMFUL), 0])
    monkeypatch.setattr(Sampler, "pick", lambda self, logits, history: next(ids))
    monkeypatch.setenv("NO_COLOR", "1")
    if not at_terminal:
        assert call("--prompt", "\x1b\x02").out == HARMFUL.decode(errors="replace") + "\n"
        return
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", FakeTerminal())
        call("--prompt", "\x1b[2J")
        shown = sys.stdout.shown()
    assert shown.startswith("model ")  # at a terminal, the settings come first, then the prompt with its text
    assert shown.endswith("\n\\x1b[2J" + HARMLESS)


def test_a_long_prompt_shows_its_end(call, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", FakeTerminal())
        patch.setenv("NO_COLOR", "1")
        call("--prompt", "x" * 5000 + " the owl", "--max-tokens", "1")
        assert "\n…" + "x" * 992 + " the owl" in sys.stdout.shown()


@pytest.fixture
def answers(folder, capsys):
    """A dialogue without its terminal: what it answers to a line."""
    talk = dialogue.Dialogue(Completer.load(folder), Sampler(0), max_tokens=8, stop=())

    def answers(line):
        talk.answer(line)
        return capsys.readouterr().out

    answers.dialogue = talk
    return answers


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/temperature", "temperature is 0"),
        ("/temperature 0.5", "temperature is 0.5"),
        ("/temperature  1 ", "temperature is 1.0"),
        ("/temperature hot", "temperature must be a number of at least 0, not 'hot'; it stays 0"),
        ("/temperature \x1b[2J", "temperature must be a number of at least 0, not '\\x1b[2J'; it stays 0"),
        ("/temperature off", "temperature must be a number of at least 0, not 'off'; it stays 0"),
        ("/top-p 0.9", "top-p is 0.9"),
        ("/top-p 2", "top-p must be a number from 0 to 1, not 2.0; it stays off"),
        ("/top-k 5", "top-k is 5"),
        ("/top-k 5.5", "top-k must be an integer from 0 to 2^63 - 1, not '5.5'; it stays off"),
        ("/top-k off", "top-k is off"),
        ("/min-p nan", "min-p must be a number from 0 to 1, not nan; it stays off"),
        ("/repeat-penalty 1.2", "repeat-penalty is 1.2"),
        ("/seed 7", "seed is 7"),
        ("/seed -7", "seed must be an integer from 0 to 2^63 - 1, not -7; it stays off"),
        ("/length 50", "length is 50"),
        ("/length 0", "length must be an integer from 1 to 2^63 - 1, not 0; it stays 8"),
        ("/length off", "length must be an integer from 1 to 2^63 - 1, not 'off'; it stays 8"),
        ("/temprature 1", "there is no /temprature; did you mean /temperature?"),
        ("/topk 3", "there is no /topk; did you mean /top-k?"),
        ("/stat", "there is no /stat; did you mean /stats?"),
        ("/\x1b", "there is no /\\x1b; see /help (a space before the / makes it a text)"),
        ("/", "there is no /; see /help (a space before the / makes it a text)"),
    ],
    ids=str,
)
def test_a_command_is_answered_in_one_line(answers, line, answer):
    assert answers(line) == answer + "\n"


def test_values_are_listed_and_kept(answers):
    for line in ("/top-k 12", "/top-k x", "/seed 5", "/length 3"):
        answers(line)
    listed = {line.split()[0]: line for line in answers("/help").splitlines() if line.startswith("  ")}
    assert list(listed) == [*dialogue.SETTINGS, *dialogue.ACTIONS]
    assert all(len(line) <= 80 for line in listed.values())
    assert " 12 " in listed["/top-k"] and " 5 " in listed["/seed"] and " 3 " in listed["/length"]


def test_help_in_a_narrow_terminal_stays_in_its_columns(answers, monkeypatch):
    wide = answers("/help").split()
    monkeypatch.setattr(terminal, "_columns", lambda stream: 50)
    lines = answers("/help").splitlines()
    assert " ".join(lines).split() == wide and all(len(line) < 50 for line in lines)
    assert "  /top-k            off  only this many of the" in lines
    assert lines[lines.index("  /top-k            off  only this many of the") + 1] == " " * 25 + "likeliest words"


def test_a_text_and_its_continuation(answers, folder):
    whole = printable(written(folder, "The owl", 24, Sampler(0)), keep="\n\t")
    with pytest.raises(UserError, match="nothing to continue"):
        answers("/continue")
    first, note = answers("The owl").rsplit("\n", 2)[:2]
    assert note.startswith("[8 tokens at ") and note.endswith(" a second, cut at the length; /continue goes on]")
    answers("/length 16")
    assert first + answers("/continue").rsplit("\n", 2)[0] == "The owl" + whole
    stats = answers("/stats").splitlines()
    assert [line.split()[0] for line in stats] == ["prompt", "text", "state"]
    assert stats[1].startswith("text    24 tokens, ") and "KiB" in stats[2]


def test_a_seed_gives_a_prompt_its_text_again_and_a_value_set_between_does_not_start_it_anew(answers, folder):
    for line in ("/temperature 1.5", "/seed 9"):
        answers(line)
    text = answers("The owl").rsplit("\n", 2)[0]
    assert answers("The owl").rsplit("\n", 2)[0] == text
    answers("/top-p 1")
    text += answers("/continue").rsplit("\n", 2)[0]
    assert text == "The owl" + printable(written(folder, "The owl", 16, Sampler(1.5, seed=9)), keep="\n\t")


def test_a_prompt_that_fails_leaves_the_dialogue_as_it_was(answers):
    text = answers("The owl").rsplit("\n", 2)[0]
    with pytest.raises(UserError, match=r"^the prompt is no text"):
        answers("\udce9")
    more = answers("/continue").rsplit("\n", 2)[0]
    answers("/length 16")
    assert answers("The owl").rsplit("\n", 2)[0] == text + more


@pytest.mark.parametrize("line", ["exit", "/quit", "/exit", " exit "])
def test_a_dialogue_is_left_by_name(answers, monkeypatch, tmp_path, line):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "not" / "there"))
    monkeypatch.setattr("builtins.input", lambda prompt: line)
    answers.dialogue.run()


def test_a_dialogue_survives_what_a_line_may_raise(answers, monkeypatch, tmp_path, capsys):
    raised = iter([KeyboardInterrupt, UnicodeDecodeError("utf-8", b"\xff", 0, 1, ""), "/continue", EOFError])

    def line(prompt):
        thing = next(raised)
        if isinstance(thing, str):
            return thing
        raise thing

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))  # no history can be kept there
    monkeypatch.setattr("builtins.input", line)
    answers.dialogue.run()
    said = capsys.readouterr().out
    for words in ("Ctrl-D or /quit leaves", "not UTF-8", "error: there is nothing to continue yet"):
        assert words in said


class Process:
    """run.py at a terminal of its own."""

    def __init__(self, *arguments, **environment):
        self.screen, terminal = pty.openpty()
        words = [str(SCRIPT), *arguments]
        self.child = forked.fork(_at_a_terminal, (os.ttyname(terminal), words, {**ENVIRONMENT, **environment}))
        self._terminal = terminal  # until the process has it

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.child.kill()
        self.child.join()
        os.close(self.screen)
        os.close(self._terminal)

    def type(self, text):
        os.write(self.screen, text.encode())

    def until(self, words, again="", seconds=60):
        """What the screen shows up to and with `words`; `again` is typed at each second in which it shows nothing."""
        shown, end = b"", time.monotonic() + seconds
        while not shown.endswith(words.replace("\n", "\r\n").encode()):
            if select.select([self.screen], [], [], 1)[0]:
                shown += os.read(self.screen, 1)
            else:
                assert time.monotonic() < end, f"waited for {words!r} and saw {shown.decode(errors='replace')!r}"
                self.type(again)
        return shown.decode().replace("\r\n", "\n")


def _at_a_terminal(name, words, environment):
    os.setsid()
    terminal = os.open(name, os.O_RDWR)  # a session's first terminal is its own: Ctrl-C reaches it
    for number in range(3):
        os.dup2(terminal, number)
    forked.run(words, environment)


@pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals here")
def test_a_session_at_a_terminal(folder, tmp_path):
    whole = printable(written(folder, "The owl", 3000, Sampler(0)), keep="\n\t")
    arguments = ("--model", str(folder), "--temperature", "0")
    with Process(*arguments, XDG_STATE_HOME=str(tmp_path)) as session:
        session.until("\n\n> ")
        session.type("/length 100000\n")
        session.until("length is 100000\n\n> ")

        session.type("The owl\n")
        session.until("The owl\n")  # as typed
        session.until("The owl")  # as the beginning of the text
        text = session.until(whole[20:40])
        session.type("\x03")
        text += session.until("\n[").removesuffix("\n[")
        assert "interrupted; /continue goes on]" in session.until("\n\n> ")

        session.type("/length 5\n")
        session.until("\n\n> ")
        session.type("/continue\n")
        session.until("/continue\n")
        text += session.until("\n[").removesuffix("\n[")
        assert "cut at the length" in session.until("\n\n> ")
        text = text.replace("^C", "")
        assert len(text) > 40 and whole.startswith(text)

        # Python misses a Ctrl-C in the moment between showing the prompt and waiting for a key.
        session.until("(Ctrl-D or /quit leaves)\n\n> ", again="\x03")
        session.type("\x10\x10\n")  # back twice in the history
        session.until("length is 5\n\n> ")
        session.type("top-p 0.25\x08\x01/\n")  # edited: the last character taken back, one put in at the beginning
        session.until("top-p is 0.2\n\n> ")
        session.type("\x04")
        assert forked.status_of(session.child, 60) == 0

    with Process(*arguments, XDG_STATE_HOME=str(tmp_path)) as session:
        session.until("\n\n> ")
        session.type("\x10\x10\n")
        session.until("length is 5\n\n> ")
        session.type("exit\n")
        assert forked.status_of(session.child, 60) == 0


@pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals here")
def test_tab_completes_commands_and_suggestions(well_read, tmp_path):
    """At a terminal with colours: remarks are grey, and only there."""
    environment = {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "NO_COLOR": ""}
    with Process("--model", str(well_read), "--max-tokens", "3", **environment) as session:
        shown = session.until("> ")
        assert "\x1b[2mFor example" in shown and "\x1b[2m  The bab owl\x1b[0m" in shown
        session.type("/temp\t 0.5\n")
        assert "\x1b[2mtemperature is 0.5\x1b[0m" in session.until("is 0.5\x1b[0m\n")
        session.until("> ")
        session.type("The b\t\n")
        assert "The bab owl" in session.until("goes on]\x1b[0m\n")
        session.until("> ")
        session.type("exit\n")
        assert forked.status_of(session.child, 60) == 0


@pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals here")
def test_how_a_text_ended_is_grey_like_every_remark(well_read):
    arguments = ("--model", str(well_read), "--prompt", "The owl", "--max-tokens", "3")
    with Process(*arguments, TERM="xterm", NO_COLOR="") as session:
        shown = session.until("cut at the length\x1b[0m\n")
    assert shown.splitlines()[-1].startswith("\x1b[2m3 tokens at ")


@pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals here")
@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_what_is_done_while_a_long_prompt_is_read(well_read, terminal):
    arguments = ("--model", str(well_read), "--prompt", "The owl flew " * 700, "--max-tokens", "1")
    with Process(*arguments, TERM=terminal) as session:
        set_width(session.screen, 80)
        shown = session.until("cut at the length\n")
    told = re.findall(r"\r\x1b\[Kreading the prompt: ([\d,]+) of [\d,]+ tokens", shown)
    assert told[:3] == ([] if terminal == "dumb" else ["0", "1,024", "2,048"])
    assert shown.count("\x1b") == len(told) + bool(told)  # NO_COLOR: the status alone, and it goes


def set_width(screen, columns):
    import fcntl
    import struct
    import termios

    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


@pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals here")
@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
@pytest.mark.parametrize("marked", [True, False], ids=["marked", "bare"])
def test_lines_that_are_pasted_are_one_prompt(folder, tmp_path, terminal, marked):
    """Also where a line of them is `exit`, or a command. A terminal that was asked for marks always gives them."""
    if terminal == "xterm" and not marked:
        pytest.skip("this one gives marks")
    pasted = "The owl\nexit\n/stats\nthe tower"
    arguments = ("--model", str(folder), "--temperature", "0", "--max-tokens", "5")
    with Process(*arguments, XDG_STATE_HOME=str(tmp_path), TERM=terminal) as session:
        session.until("> ")
        session.type(f"\x1b[200~{pasted}\x1b[201~\r" if marked else pasted + "\n")
        shown = session.until("cut at the length; /continue goes on]\n\n" if terminal == "dumb" else "goes on]\n\n")
        assert pasted in shown.replace("\r", "") and "there is no" not in shown and "prompt  " not in shown
        session.until("> ")
        session.type("/stats\n")
        told = session.until("KiB, after the first token as after the last\n")
        tokens = len(WordTokenizer.load(folder / "tokenizer.json").encode(pasted)) + 1
        assert f"prompt  {tokens} tokens" in told
        session.until("> ")
        session.type("exit\n")
        assert forked.status_of(session.child, 60) == 0


@pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals here")
def test_no_word_is_broken_at_the_edge_of_a_terminal(folder):
    prompt = "the quick brown fox jumped over the lazy dog and into a\vverylongword again"
    with Process("--model", str(folder), "--prompt", prompt, "--max-tokens", "1", "--temperature", "0") as session:
        set_width(session.screen, 24)
        lines = session.until("second, cut at the length\n").split("\n\n", 1)[0].split("\n")
    at = lines.index("the quick brown fox")
    head, text = lines[:at], lines[at:]
    assert head[-4:] == [
        "length    at most 1",
        "          tokens, to",
        "          the end of",
        "          the document",
    ]
    assert all(len(line) < 24 for line in head)
    assert text[:4] == ["the quick brown fox", "jumped over the lazy dog", "and into", "a\\x0bverylongword again"]


@pytest.mark.parametrize("columns", [0, 1, 5, 12, 80])
def test_wrapping_adds_line_ends_in_the_place_of_spaces_and_changes_nothing_else(monkeypatch, columns):
    text = "Once upon  a time\n\n東京へ行く 🦉🦉 e\u0301te\u0301 supercalifragilistic\tend  \n x"
    monkeypatch.setattr(sys, "stdout", FakeTerminal())
    monkeypatch.setattr(terminal, "_columns", lambda: columns)
    writer = terminal.WrappedText()
    for k in range(0, len(text), 3):
        writer.write(text[k : k + 3])
    writer.finish()
    shown = sys.stdout.shown()
    assert "".join(shown.split()) == "".join(text.split())
    if columns in (0, 80):
        assert shown == text
    elif columns >= 5:
        words = [word for line in shown.split("\n") for word in line.split()]
        assert {"Once", "upon", "time", "x"} <= set(words)
        assert all(terminal._width(line) <= columns for line in shown.split("\n") if "super" not in line)


@pytest.mark.parametrize(
    ("typed", "stop"), [(r"\n", "\n"), (r"a\tb\\n", "a\tb\\n"), (r"\d \x", r"\d \x"), ("é", "é"), (r"\f\r", "\f\r")]
)
def test_a_stop_text_may_have_escapes(typed, stop):
    assert run._parse(["--stop", typed]).stop == [stop]


def test_a_form_feed_goes_to_a_file_as_it_is(call, monkeypatch):
    ids = iter([1 + ord("\f"), 1 + ord("a"), 0])
    monkeypatch.setattr(Sampler, "pick", lambda self, logits, history: next(ids))
    assert call("--prompt", "x").out == "\fa\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_answered_in_one_line(folder):
    command = [sys.executable, str(SCRIPT), "--model", str(folder), "--prompt", "The owl", "--temperature", "0"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1] == "error: cannot write the text: No space left on device"
    assert "Traceback" not in done.stderr.decode()


class NotebookStream(io.StringIO):
    """What a notebook has in the place of standard output: it can be written to, and not much else."""

    reconfigure = property()

    def fileno(self):
        raise io.UnsupportedOperation


def test_run_in_a_notebook(folder, monkeypatch):
    """`%run run.py`: IPython runs a script in its own process, whose streams are a notebook's."""
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell.instance()
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    out, errors = NotebookStream(), NotebookStream()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", errors)
        shell.run_line_magic("run", f"{SCRIPT} --model {folder} --prompt 'The owl' --max-tokens 5 --temperature 0")
    assert out.getvalue() == written(folder, "The owl", 5, Sampler(0)).removesuffix("\n") + "\n"
    assert "5 tokens at" in errors.getvalue()


def test_a_notebook_without_a_person_is_told_to_give_a_prompt(answers, monkeypatch):
    def nobody(prompt=""):
        raise NotImplementedError

    monkeypatch.setattr("builtins.input", nobody)
    with pytest.raises(UserError, match="nobody can type here; give --prompt TEXT"):
        answers.dialogue.run()
