"""The completer: what it writes, how it goes on, and what may interrupt it."""

import gc
import os
import re
import signal
import threading
import time
import tracemalloc

import pytest
import torch

from mamba2_min.config import Mamba2Config
from mamba2_min.data.tokenizer import StreamDecoder, WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.inference import decoding
from mamba2_min.inference.completer import Completer
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.ops.sampling import Sampler

TEXT = """Once upon a time a small owl lived in the old tower, and nobody in the town knew her name.
"Who are you?" asked the boy. "I am the owl of the tower," she said, "and I count the stars, one by one."
"""


@pytest.fixture(scope="module")
def tokenizer():
    return WordTokenizer.train([TEXT], special_words=["<start>"])


@pytest.fixture(scope="module")
def model(tokenizer):
    config = Mamba2Config(vocab_size=len(tokenizer), d_model=32, n_layer=2, d_state=16, headdim=16, chunk_size=16)
    model = Mamba2LM(config, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # an untrained model that has preferences
    return model


@pytest.fixture
def completer(model, tokenizer):
    return Completer(model, tokenizer)


class Script(Sampler):
    """A sampler that picks given ids, so that a test can say what the model writes."""

    def __init__(self, ids):
        super().__init__()
        object.__setattr__(self, "ids", iter(ids))

    def pick(self, logits, history=()):
        return next(self.ids)


def settings(name):
    return {
        "greedy": Sampler(temperature=0),
        "seeded": Sampler(temperature=1.5, seed=4),
        "cut": Sampler(temperature=2.0, top_k=40, top_p=0.9, min_p=0.01, repeat_penalty=1.3, seed=4),
    }[name]


SETTINGS = pytest.mark.parametrize("name", ["greedy", "seeded", "cut"])


@SETTINGS
@pytest.mark.parametrize("prompt", ["Once upon a time, 東京 and 🦉", ""])
def test_it_writes_what_the_model_generates_at_the_beginning_of_a_document(completer, model, tokenizer, name, prompt):
    sampler = settings(name).adjusted(repeat_penalty=1.0)  # which counts the token before the document, there
    values = {k: getattr(sampler, k) for k in ("temperature", "top_k", "top_p", "min_p", "seed")}
    ids = list(model.generate([tokenizer.eos_id, *tokenizer.encode(prompt)], 16, **values, stop_ids=[tokenizer.eos_id]))
    text = "".join(completer.complete(prompt, 16, sampler))
    assert text == StreamDecoder(tokenizer).feed(ids)  # a character without its last bytes is not shown yet


@SETTINGS
@pytest.mark.parametrize("parts", [[20, 30], [1] * 10 + [40], [0, 49, 0, 1]], ids=str)
def test_a_text_in_parts_is_the_text_in_one(completer, name, parts):
    whole = "".join(completer.complete("The owl", 50, settings(name), stop=["zzzz"]))
    text = "".join(completer.complete("The owl", parts[0], settings(name), stop=["zzzz"]))
    for part in parts[1:]:
        text += "".join(completer.continue_(part))
    assert text == whole


def test_going_on_reads_nothing_again(completer, model, monkeypatch):
    read = []
    prefill, step = model.prefill, model.step
    monkeypatch.setattr(model, "prefill", lambda ids, *rest: (read.append(ids.shape[1]), prefill(ids, *rest))[1])
    monkeypatch.setattr(model, "step", lambda ids, state: (read.append(len(ids)), step(ids, state))[1])
    sampler = Script([260] * 25)
    "".join(completer.complete(" the old tower", 10, sampler))
    for _ in range(3):
        "".join(completer.continue_(5))
    assert read == [4] + [1] * 24  # the prompt once, and each token once, when the next is wanted
    assert (completer.stats.prompt_tokens, completer.stats.tokens) == (4, 25)


def test_a_repetition_is_counted_in_the_last_tokens_of_the_document(completer, tokenizer):
    seen = []

    class Spy(Script):
        def pick(self, logits, history=()):
            seen.append(list(history))
            return super().pick(logits, history)

    prompt, ids = tokenizer.encode("the old tower"), tokenizer.encode(" a small owl")
    spy = Spy([*ids, tokenizer.eos_id, *ids])
    "".join(completer.complete("the old tower", 9, spy))
    "".join(completer.continue_(3))
    written = [*prompt, *ids, *ids]  # the end of a document is no repetition
    assert seen == [written[: len(prompt) + k] for k in (0, 1, 2, 3, 3, 4, 5)]


def test_a_repetition_is_counted_within_the_window_only(completer):
    "".join(completer.complete(TEXT, 5, Sampler(repeat_window=6)))
    assert len(completer._session.recent) == 6
    "".join(completer.continue_(5, Sampler(repeat_window=3)))
    assert len(completer._session.recent) == 3


def test_a_document_ends_at_its_token_and_the_next_one_can_follow(completer, tokenizer):
    ids = tokenizer.encode(" lived in the old")
    sampler = Script([*ids, tokenizer.eos_id, *tokenizer.encode("Once upon a time")])
    assert "".join(completer.complete("An owl", 50, sampler)) == " lived in the old"
    assert completer.stopped_by == "end"
    assert "".join(completer.continue_(4)) == "Once upon a time"
    assert completer.stopped_by == "length"


def test_a_character_is_shown_when_all_its_bytes_are_there(completer, tokenizer):
    owl = tokenizer.encode("🦉")
    assert len(owl) == 4
    sampler = Script([*owl, *owl, owl[0], tokenizer.eos_id])
    assert list(completer.complete("", 2, sampler)) == []
    assert list(completer.continue_(5)) == ["🦉"]
    assert "".join(completer.continue_(10)) == "🦉\ufffd"  # the document ended within a character
    assert completer.stopped_by == "end"


@pytest.mark.parametrize(
    ("stop", "shown", "rest"),
    [
        (["upon a"], "Once ", "upon a time a small owl"),
        (["pon a t", "upon"], "Once ", "upon a time a small owl"),
        (["n a ti"], "Once upo", "n a time a small owl"),
        (["time", "time a s"], "Once upon a ", "time a small owl"),
        (["upon the", "owl"], "Once upon a time a small ", "owl"),
        (["Once"], "", "Once upon a time a small owl"),
        (["owls"], "Once upon a time a small owl", ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [50, 2, 0])
def test_a_stop_text_is_found_over_several_tokens_and_nothing_is_lost(completer, tokenizer, stop, shown, rest, first):
    ids = [*tokenizer.encode("Once upon a time a small owl"), tokenizer.eos_id]
    text = "".join(completer.complete("", first, Script(ids), stop))
    if completer.stopped_by == "length":  # cut by the length: what looked like the beginning of a stop text is shown
        assert len(ids) > first
        text += "".join(completer.continue_(50))
        assert shown.startswith(text) or text.startswith(shown)
    else:
        assert text == shown
    assert completer.stopped_by == ("stop" if rest else "end")
    assert text + "".join(completer.continue_(50, stop=())) == shown + rest if rest else True


def test_a_stop_text_that_is_new_does_not_stop_at_what_is_written_already(completer, tokenizer):
    ids = [*tokenizer.encode("Once upon a time"), tokenizer.eos_id]
    text = "".join(completer.complete("", 2, Script(ids), stop="a long text that never comes"))
    assert text == "Once upon"
    assert "".join(completer.continue_(9, stop="pon")) == " a time"
    assert completer.stopped_by == "end"


def test_stop_texts_follow_each_other_without_overlap(completer, tokenizer):
    ids = tokenizer.encode("owl.owl..owl...owl")
    found = ["".join(completer.complete("", 99, Script([*ids, tokenizer.eos_id]), ".."))]
    while completer.stopped_by == "stop":
        found.append("".join(completer.continue_(99)))
    assert found == ["owl.owl", "..owl", "...owl"]


@SETTINGS
def test_a_closed_text_goes_on_where_it_was_left(completer, name):
    whole = "".join(completer.complete("The owl", 40, settings(name)))
    pieces = completer.complete("The owl", 40, settings(name))
    text = next(pieces) + next(pieces)
    pieces.close()
    assert completer.stopped_by == "interrupted"
    for piece in completer.continue_(40):
        text += piece
        break
    for piece in completer.continue_(40):  # the one before was never closed
        text += piece
        if len(text) >= len(whole):
            break
    assert text.startswith(whole)


@pytest.fixture
def ctrl_c_is_heard():
    """Also where these tests were started in the background, and so are to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_in_the_middle_of_a_step_loses_no_token_and_doubles_none(completer, model, monkeypatch):
    whole = "".join(completer.complete("The owl", 30, Sampler(seed=1)))
    calls, step = [], decoding._BlockStep.__call__

    def interrupted(layer, x):
        step(layer, x)
        calls.append(0)
        if len(calls) % 8 == 7:  # in every fourth token, when the first of two layers has changed its state in place
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(decoding._BlockStep, "__call__", interrupted)
    before = signal.getsignal(signal.SIGINT)
    text, interruptions = "", 0
    pieces = completer.complete("The owl", 30, Sampler(seed=1))
    while completer.stats.tokens < 30:
        try:
            for piece in pieces:
                text += piece
        except KeyboardInterrupt:
            interruptions += 1
            assert signal.getsignal(signal.SIGINT) is before
            pieces = completer.continue_(30 - completer.stats.tokens)
    assert interruptions == 7
    assert text == whole


@pytest.mark.usefixtures("ctrl_c_is_heard")
@pytest.mark.skipif(os.name != "posix", reason="a process cannot send itself Ctrl-C here")
def test_ctrl_c_at_any_moment_loses_no_token_and_doubles_none(completer, tokenizer):
    ids = torch.randint(1, len(tokenizer), (1500,), generator=torch.Generator().manual_seed(0)).tolist()
    stop = ["owl in", "tower"]
    expected = tokenizer.decode([*ids, tokenizer.eos_id])
    # A plain flag: an Event's lock could be held by the very code that the handler interrupts.
    armed, done, interruptions = [False], threading.Event(), 0

    def once(signum, frame):
        if armed[0]:
            armed[0] = False
            raise KeyboardInterrupt

    def press():
        while not done.wait(0.003):
            os.kill(os.getpid(), signal.SIGINT)

    presses, before = threading.Thread(target=press), signal.signal(signal.SIGINT, once)
    presses.start()
    try:
        text = []
        pieces = completer.complete("The owl", 2000, Script([*ids, tokenizer.eos_id]), stop)
        while completer.stopped_by != "end":
            try:
                armed[0] = True
                text.extend(pieces)  # takes them in one go: what is lost would be lost within the completer
                armed[0] = False
            except KeyboardInterrupt:
                interruptions += 1
            if completer.stopped_by != "end":
                pieces = completer.continue_(2000)
        text.extend(completer.continue_(0))  # a Ctrl-C may have come before the last piece was taken
    finally:
        done.set()
        presses.join()
        signal.signal(signal.SIGINT, before)
    assert interruptions > 10
    assert "".join(text) == expected


def test_a_prompt_that_is_interrupted_leaves_the_text_before_it(completer, model, monkeypatch):
    whole = "".join(completer.complete("The owl", 20, Sampler(0)))
    text = "".join(completer.complete("The owl", 10, Sampler(0)))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "prefill", interrupted)
        completer.complete("Something else", 10, Sampler(0))
    assert text + "".join(completer.continue_(10)) == whole


def test_it_works_outside_of_the_main_thread(completer):
    whole = "".join(completer.complete("The owl", 10, Sampler(0)))
    texts = []
    thread = threading.Thread(target=lambda: texts.append("".join(completer.complete("The owl", 10, Sampler(0)))))
    thread.start()
    thread.join()
    assert texts == [whole]


def test_the_last_token_holds_as_much_memory_as_the_hundredth(completer, tokenizer):
    ids = [i for i in range(1, len(tokenizer)) if i < 129 or i > 256]  # none of which waits for more bytes
    pieces = completer.complete("The owl", 500, Script((ids * 4)[:500]), stop=["never to be found"])
    size, held = completer.stats.state_bytes, []
    tracemalloc.start()
    for k, _ in enumerate(pieces):
        if k % 100 == 99:
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    logits = 4 * len(tokenizer)  # bytes, the smallest thing that might be kept for each token
    assert len(held) >= 4 and held[-1] - held[0] < 0.5 * 300 * logits  # some is other threads'
    assert completer._session.state.nbytes == size
    assert len(completer._session.text._tail) < len("never to be found")
    assert len(completer._session.recent) == Sampler().repeat_window
    assert completer.stats.tokens == 500 and completer.stats.tokens_per_second > 0


@pytest.mark.parametrize(
    "prompt", ["<end>", "<eos>", "<|endoftext|>", "\0", "\x1b[2J\r\b", "é🦉👩‍👩‍👧", "\n\n\t", "   "]
)
def test_any_prompt_is_text(completer, tokenizer, model, monkeypatch, prompt):
    seen, prefill = [], model.prefill
    monkeypatch.setattr(model, "prefill", lambda ids: (seen.extend(ids[0].tolist()), prefill(ids))[1])
    "".join(completer.complete(prompt, 3, Sampler(0)))
    assert seen[0] == tokenizer.eos_id not in seen[1:]
    assert tokenizer.decode(seen) == prompt.removesuffix(" ")


def test_a_special_word_is_the_token_that_it_was_in_training(completer, tokenizer, model, monkeypatch):
    seen, prefill = [], model.prefill
    monkeypatch.setattr(model, "prefill", lambda ids: (seen.extend(ids[0].tolist()), prefill(ids))[1])
    completer.complete("<start>Once", 0, Sampler(0))
    assert seen == [tokenizer.eos_id, *tokenizer.encode("<start>Once", allow_special=True)] and len(seen) == 3


def test_a_prompt_of_100_000_characters(completer):
    prompt = (TEXT * 500)[:100_000]
    started = time.perf_counter()
    assert "".join(completer.complete(prompt, 5, Sampler(0)))
    assert completer.stats.prompt_tokens > 20_000
    assert completer.stats.prompt_seconds <= time.perf_counter() - started


def test_a_lone_surrogate_is_answered_in_one_line(completer):
    before = "".join(completer.complete("The owl", 5, Sampler(0)))
    with pytest.raises(UserError, match=r"^the prompt is no text: [^\n]*surrogate[^\n]*$"):
        completer.complete("a\udce9", 5, Sampler(0))
    again = "".join(completer.continue_(5))
    assert before + again == "".join(completer.complete("The owl", 10, Sampler(0)))


def test_a_space_at_the_end_is_that_of_the_next_word(completer, tokenizer):
    allowed = []

    class Spy(Script):
        def pick(self, logits, history=()):
            allowed.append(logits > -torch.inf)
            return super().pick(logits, history)

    ids = tokenizer.encode(" tower, and")
    assert "".join(completer.complete("the old ", 9, Spy([*ids, tokenizer.eos_id]))) == "tower, and"
    words = [tokenizer.token_bytes(i).startswith(b" ") for i in range(len(tokenizer))]
    assert allowed[0].tolist() == words
    assert all(mask.all() for mask in allowed[1:])


def test_a_whitespace_tokenizer_completes_a_line():
    tokenizer = WordTokenizer.train([TEXT], pattern="whitespace")
    model = Mamba2LM(Mamba2Config(vocab_size=len(tokenizer), d_model=32, n_layer=1, headdim=16, d_state=16), seed=0)
    completer = Completer(model, tokenizer)
    ids = [*tokenizer.encode("old owl"), tokenizer.eos_id]
    assert "".join(completer.complete("in the ", 10, Script(ids))) == " old owl \n"
    assert completer.stopped_by == "end"
    assert "".join(completer.complete("", 3, Sampler(seed=0)))


def test_a_new_prompt_ends_the_text_before_it(completer):
    first = completer.complete("The owl", 20, Sampler(0))
    next(first)
    second = completer.complete("The boy", 20, Sampler(0))
    assert next(first, None) is None
    assert "".join(second) == "".join(completer.complete("The boy", 20, Sampler(0)))


def test_a_model_is_asked_without_dropout(tokenizer):
    config = Mamba2Config(vocab_size=len(tokenizer), d_model=32, n_layer=1, headdim=16, d_state=16, dropout=0.9)
    model = Mamba2LM(config, seed=0).train()
    completer = Completer(model, tokenizer)
    texts = {"".join(completer.complete("The owl", 20, Sampler(0))) for _ in range(3)}
    assert len(texts) == 1


def test_broken_weights_are_said_to_be_broken(tokenizer, model):
    broken = Mamba2LM(model.config, seed=0)
    broken.backbone.norm_f.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="weights are broken"):
        "".join(Completer(broken, tokenizer).complete("The owl", 5, Sampler(0)))


def test_what_cannot_be_is_answered(completer, model, tmp_path):
    with pytest.raises(UserError, match="nothing to continue"):
        completer.continue_(5)
    for bad in (-1, 1.5, True, None):
        with pytest.raises(ValueError, match="max_tokens must be"):
            completer.complete("", bad, Sampler())
    for bad in ("", [""], ["a", ""], [1]):
        with pytest.raises(ValueError, match="stop text"):
            completer.complete("", 1, Sampler(), stop=bad)
    with pytest.raises(UserError, match="not of one run"):
        Completer(model, WordTokenizer([" other"]))
    with pytest.raises(UserError):
        Completer.load(tmp_path / "nothing")


def test_a_folder_is_enough(model, tokenizer, completer, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Completer.load(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Completer.load(tmp_path, device="cpu")
    texts = ["".join(c.complete("The owl", 20, Sampler(seed=1))) for c in (loaded, completer)]
    assert texts[0] == texts[1] != ""


def test_known_words_are_written_and_none_is_spelled(model, tokenizer):
    completer = Completer(model, tokenizer, known_words=True)
    letters = {bytes([b]) for b in (*b" bcdefghijklmnopqrstuvwxyzBCDEFGHJKLMNOPQRSTUVWXYZ", *range(128, 256))}
    written = []
    pick = Sampler.pick

    def watched(self, logits, history=()):
        written.append(pick(self, logits, history))
        return written[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "pick", watched)
        "".join(completer.complete("", 200, Sampler(temperature=3.0, seed=0)))
    assert len(written) > 20
    assert not {tokenizer.token_bytes(token) for token in written} & letters


def test_a_typed_prompt_is_read_in_the_spelling_of_the_documents():
    """A book has curly quotes, a keyboard has not: both prompts are the same to the model."""
    for pattern in ("words", "llama3"):
        tokenizer = WordTokenizer.train(["“I don’t know,” said the café’s owner. “I don’t.”"], pattern=pattern)
        model = Mamba2LM(Mamba2Config(len(tokenizer), d_model=32, n_layer=1, headdim=16, d_state=16), seed=0)
        completer = Completer(model, tokenizer)
        typed, known = "\"I don't know,\" said the cafe\u0301's ", "“I don’t know,” said the café’s "
        texts = ["".join(completer.complete(prompt, 30, Sampler(seed=1))) for prompt in (typed, known)]
        assert texts[0] == texts[1] != ""
        assert completer.stats.prompt_tokens == 1 + len(tokenizer.encode(known[:-1]))


def test_known_words_hold_whole_characters():
    """In the pattern "llama3" the beginnings of characters are tokens too; none is written alone."""
    tokenizer = WordTokenizer.train(["我爱你。 我爱他。", "ครับผม ครับ", "a word"], pattern="llama3")
    assert len(tokenizer) > 257 + len(tokenizer.words)
    model = Mamba2LM(Mamba2Config(len(tokenizer), d_model=32, n_layer=1, headdim=16, d_state=16), seed=0)
    completer = Completer(model, tokenizer, known_words=True)
    text = "".join(completer.complete("", 300, Sampler(temperature=2.0, seed=0)))
    assert len(text) > 20 and "\ufffd" not in text


def test_unknown_words_of_the_prompt_are_written_as_a_whole():
    """And no known words are glued together, which in a text are cut as one word."""
    tokenizer = WordTokenizer.train(["The cat and the dog said so. st resting"], pattern="llama3")
    model = Mamba2LM(Mamba2Config(len(tokenizer), d_model=32, n_layer=1, headdim=16, d_state=16), seed=0)
    completer = Completer(model, tokenizer, known_words=True)

    def written(prompt):
        return "\n".join("".join(completer.complete(prompt, 60, Sampler(3.0, seed=seed))) for seed in range(20))

    text = written("The Quillo and Zyx7 said")
    words = {*re.findall("[A-Za-z]+", "The Quillo and Zyx7 said" + text)}
    known = {word.strip() for word in tokenizer.words if word.strip().isalpha()} | {"A", "I", "t", "s"}
    assert {"Quillo", "Zyx"} <= words and words <= known | {"Quillo", "Zyx"}
    assert text.count("Quillo") > 1
    assert "Quillo" not in written("The cat said")


def test_a_long_prompt_tells_how_much_of_it_is_read(model, tokenizer):
    """It is read in parts, which changes nothing but rounding."""
    completer = Completer(model, tokenizer)
    told = []
    completer.on_read = lambda done, count: told.append((done, count))
    prompt = TEXT * 60
    "".join(completer.complete(prompt, 0, Sampler(0)))
    count = completer.stats.prompt_tokens
    assert told == [(done, count) for done in range(0, count, 1024)] and len(told) > 1
    ids = [tokenizer.eos_id, *tokenizer.encode_prompt(prompt)]
    with torch.inference_mode():
        logits, state = model.prefill(torch.tensor([ids]))
    parts = completer._session
    for one, other in zip([*state.ssm, *state.conv], [*parts.state.ssm, *parts.state.conv], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert int(logits[0].argmax()) == int(parts.logits.argmax()) and len(ids) == count
    told.clear()
    "".join(completer.complete("the owl", 2, Sampler(0)))
    assert not told
