"""Conversations: records become turns, turns become tokens with a mask, tokens become packed rows."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instruments import relative_error

from mamba2_min.config import Mamba2Config
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.finetune.conversations import (
    REQUEST,
    TURNS,
    Example,
    Message,
    conversation,
    prompt_ids,
    template_for,
    tokenize,
)
from mamba2_min.finetune.packing import PackedWindows, batches_of, lay_out, pack
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.ops.loss import IGNORE

TEXT = "User: What floats?\nAssistant: Ice floats on water. User: Why?\nAssistant: It is lighter than water."
TOKENIZER = WordTokenizer.train([TEXT], min_count=1)
WITH_START = WordTokenizer.train(["What floats?<start>Ice floats."], min_count=1, special_words=["<start>"])

U, A = Message("user", "What floats?"), Message("assistant", "Ice floats on water.")
RECORDS = {
    "messages": {"messages": [{"role": "user", "content": U.content}, {"role": "assistant", "content": A.content}]},
    "prompt": {"prompt": " What floats?\n", "completion": A.content},
    "response": {"prompt": U.content, "response": A.content},
    "text": {"text": "What floats? <start> Ice floats on water."},
    "question": {"question": U.content, "answer": A.content},
    "ShareGPT": {"conversations": [{"from": "human", "value": U.content}, {"from": "gpt", "value": A.content}]},
    "instruction": {"instruction": U.content, "input": "", "output": A.content},
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_records_are_told_apart_by_their_keys(record):
    assert conversation(record, "x").messages == (U, A)


def test_an_input_stands_below_its_instruction():
    record = {"instruction": "Count.", "input": "a b", "output": "2"}
    assert conversation(record, "x").messages[0].content == "Count.\n\na b"


def says(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


BAD = {
    "a list": ([1], "a message is not an object"),
    "no known key": ({"question": "?"}, "it has question"),
    "nothing": ({}, "it has no field"),
    "no answer": ({"prompt": "a"}, "it needs .* it has prompt"),
    "an empty answer": ({"prompt": "a", "completion": " "}, "completion is empty"),
    "not a text": ({"prompt": ["b"], "completion": "a"}, "is not a text"),
    "no output": ({"instruction": "a", "output": None}, "output is empty"),
    "a text without a border": ({"text": "a"}, "no <start>"),
    "an answer without a request": (says(("assistant", "a")), "without a request"),
    "a request without an answer": (says(("user", "a"), ("assistant", "b"), ("user", "c")), "without an answer"),
    "no answer at all": (says(("user", "a")), "no answer"),
    "an empty message": (says(("user", "a"), ("assistant", "")), "what the assistant says is empty"),
    "a role that nobody knows": (says(("robot", "a"), ("assistant", "b")), "the role robot is unknown"),
    "an unknown role": (says(("tool", "a"), ("assistant", "b")), "role 'tool' cannot be learnt"),
    "one side twice": (says(("user", "a"), ("user", "b"), ("assistant", "c")), "follow each other"),
    "a late system message": (says(("user", "a"), ("system", "b"), ("assistant", "c")), "must come first"),
    "a surrogate": ({"prompt": "\ud800", "completion": "a"}, "lone surrogate"),
    "messages of another kind": ({"messages": ["a"]}, "a message is not an object"),
}


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=BAD)
def test_a_bad_record_is_one_line_that_names_its_place(record, message):
    with pytest.raises(UserError, match=message) as caught:
        conversation(record, "chat.jsonl, line 7")
    assert str(caught.value).startswith("chat.jsonl, line 7: ") and "\n" not in str(caught.value)


def test_the_loss_counts_answers_and_their_end_tokens_alone():
    turns = says(
        ("system", "Be brief."), ("user", "What floats?"), ("assistant", "Ice."), ("user", "Why?"), ("assistant", "It.")
    )
    example = tokenize(conversation(turns, "x"), TURNS, TOKENIZER)
    learnt = [TOKENIZER.decode([i]) for i, keep in zip(example.ids[1:].tolist(), example.learnt, strict=True) if keep]
    end = TOKENIZER.decode([TOKENIZER.eos_id])
    assert "".join(learnt) == f" Ice.{end} It.{end}"
    everything = TOKENIZER.decode(example.ids.tolist())
    wanted = f"{end}Be brief.\n\nUser: What floats?\nAssistant: Ice.{end}User: Why?\nAssistant: It.{end}"
    assert everything == wanted
    assert example.n_bytes == len(" Ice.") + len(" It.") + 2
    assert (example.targets == IGNORE).sum() == (~example.learnt).sum()


def test_what_a_chat_reads_is_what_training_read():
    for template, tokenizer in ((TURNS, TOKENIZER), (REQUEST, WITH_START)):
        example = tokenize(conversation(RECORDS["prompt"], "x"), template, tokenizer)
        asked = prompt_ids(tokenizer, template, "What floats?")
        assert example.ids[1 : 1 + len(asked)].tolist() == asked and not example.learnt[: len(asked)].any()
        assert example.learnt[len(asked) :].all()


def test_a_border_that_is_typed_is_text():
    (border,) = WITH_START.encode("<start>", allow_special=True)
    asked = prompt_ids(WITH_START, REQUEST, "say <start> twice <start>")
    assert asked.count(border) == 1 and asked[-1] == border


def test_the_template_follows_the_vocabulary():
    assert (template_for(TOKENIZER), template_for(WITH_START)) == ("turns", "request")


def example(length, first=1):
    ids = torch.arange(first, first + length + 1) % 30
    return Example(ids, torch.arange(length) % 3 > 0, length)


@given(st.lists(st.integers(1, 40), max_size=60))
def test_packing_cuts_nothing_and_wastes_little(lengths):
    rows = pack(lengths, 40)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    if lengths:
        assert len(rows) <= 1 + 2 * sum(lengths) / 40  # two rows that are both less than half full do not occur


@given(st.lists(st.integers(1, 200), min_size=1, max_size=30), st.integers(0, 3))
def test_an_epoch_has_every_example_once(lengths, seed):
    windows = PackedWindows([example(n, k) for k, n in enumerate(lengths)], context=32, batch_size=4, seed=seed)
    for _ in range(2):
        counted = 0
        for _ in range(windows.length):
            input_ids, targets, seq_idx = next(windows)
            assert input_ids.shape == targets.shape == seq_idx.shape
            assert len(input_ids) == 1 or input_ids.numel() <= 4 * 32
            counted += int((targets != IGNORE).sum())
        assert counted == windows.targets_per_epoch
    assert windows.epochs == 2


def test_batches_go_on_where_they_stopped():
    def made(seed=5):
        return PackedWindows([example(n % 37 + 3, n) for n in range(50)], 64, 2, seed)

    windows, again = made(), made(0)
    for _ in range(windows.length + 3):
        next(windows)
    again.load_state_dict(windows.state_dict())
    for _ in range(40):
        assert all(torch.equal(a, b) for a, b in zip(next(windows), next(again), strict=True))
    with pytest.raises(UserError, match="examples 50 then, 2 now"):
        PackedWindows([example(3)] * 2, 64, 2).load_state_dict(windows.state_dict())
    with pytest.raises(UserError, match="damaged"):
        again.load_state_dict({**windows.state_dict(), "position": 10**6})


def test_alone_is_one_example_per_row():
    for _, rows in batches_of([example(5)] * 9, range(9), context=64, batch_size=4, alone=True):
        assert all(len(row) == 1 for row in rows)


def test_nothing_to_learn_from():
    with pytest.raises(UserError, match="no record"):
        PackedWindows([], 64, 2)


def test_conversations_of_a_row_see_nothing_of_each_other():
    """Changing one moves the losses and gradients of the others by exactly zero, convolution included."""
    model = Mamba2LM(Mamba2Config(31, d_model=16, n_layer=2, d_state=6, headdim=8, chunk_size=8), seed=0).double()
    examples = [example(n, n) for n in (11, 9, 14)]
    input_ids, _, seq_idx = lay_out(examples, [[0, 1, 2]], 40)
    embedded = model.backbone.embedding.weight.detach()[input_ids].requires_grad_()
    model.backbone.embedding.forward = lambda ids: embedded
    logits, _ = model(input_ids, seq_idx=seq_idx)
    (gradient,) = torch.autograd.grad(logits[0, 11:20].square().sum(), embedded)
    assert gradient[0, 11:20].abs().min() > 0
    assert torch.equal(gradient[0, :11], torch.zeros(11, 16).double()) and not gradient[0, 20:].any()


def test_a_packed_row_has_the_losses_of_its_conversations():
    model = Mamba2LM(Mamba2Config(31, d_model=16, n_layer=2, d_state=6, headdim=8, chunk_size=8), seed=0).double()
    examples = [example(n, n) for n in (11, 1, 14, 30)]
    input_ids, targets, seq_idx = lay_out(examples, [[0, 1, 2], [3]], 40)
    packed = model.loss(input_ids, targets, seq_idx=seq_idx)
    alone = [model.loss(e.ids[None, :-1], e.targets[None]) * e.learnt.sum() for e in examples if e.learnt.any()]
    assert relative_error(packed, sum(alone) / sum(e.learnt.sum() for e in examples)) < 1e-12
