"""Batches: each epoch holds every target exactly once, and validation goes through its stream in order."""

import time
from collections import Counter
from itertools import islice

import pytest
import torch
from corpora import write
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba2_min.data.corpus import load_corpus
from mamba2_min.data.streams import Streams
from mamba2_min.data.windows import Windows, validation_windows
from mamba2_min.errors import UserError
from mamba2_min.finetune.conversations import Example
from mamba2_min.finetune.labels import Sample
from mamba2_min.finetune.packing import PackedWindows
from mamba2_min.finetune.sorting import TextBatches
from mamba2_min.ops.loss import IGNORE


def epoch_of(windows):
    """The batches of one whole epoch, with a batch size of one window."""
    batches = [next(windows)]  # only now a finished epoch gives way to the next
    epoch = windows.epoch
    while windows.epochs < epoch + 1:
        batches.append(next(windows))
    return batches


def pairs(batches):
    """How often each (input, target) pair occurs, padding left out. With tokens 0, 1, 2, ... these are positions."""
    count = Counter()
    for inputs, targets in batches:
        keep = targets != IGNORE
        count.update(zip(inputs[keep].tolist(), targets[keep].tolist(), strict=True))
    return count


TEXTS = [torch.arange(n + 1) for n in (3, 5, 9, 40, 2, 70, 6)]
ITERATORS = {
    "windows": lambda: Windows(torch.arange(50), 7, 3, seed=1),
    "streams": lambda: Streams(torch.arange(50), torch.tensor([0, 9, 30]), 7, 3, start_id=0, seed=1),
    "conversations": lambda: PackedWindows([Example(t, t[1:] % 3 > 0, 1) for t in TEXTS], 16, 2, seed=1),
    "texts to sort": lambda: TextBatches([Sample(t, 0) for t in TEXTS], 2, seed=1),
}


@pytest.mark.parametrize("made", ITERATORS.values(), ids=ITERATORS)
def test_a_batch_that_is_drawn_ahead_is_the_next_one_and_has_not_been_taken(made):
    plain, ahead, resumed = made(), made(), made()
    for _ in range(20):  # over the ends of epochs
        random = torch.get_rng_state()
        ahead.draw_ahead()
        ahead.draw_ahead()
        assert torch.equal(torch.get_rng_state(), random)  # else dropout would depend on what is drawn ahead
        assert (ahead.state_dict(), ahead.epochs) == (plain.state_dict(), plain.epochs)
        resumed.load_state_dict(ahead.state_dict())
        for expected, *others in zip(next(plain), next(ahead), next(resumed), strict=True):
            assert all(torch.equal(expected, other) for other in others)
    assert plain.epochs > 2
    ahead.draw_ahead()
    ahead.load_state_dict(made().state_dict())
    assert all(torch.equal(a, b) for a, b in zip(next(ahead), next(made()), strict=True))


class TestWindows:
    @pytest.mark.parametrize("context", [1, 2, 7, 16, 99, 100, 101, 5000])
    @pytest.mark.parametrize("length", [2, 3, 16, 17, 100, 101])
    def test_every_epoch_has_every_target_exactly_once(self, length, context):
        windows = Windows(torch.arange(length, dtype=torch.int32), context, batch_size=1, seed=3)
        for _ in range(4):
            assert pairs(epoch_of(windows)) == {(i, i + 1): 1 for i in range(length - 1)}

    @settings(max_examples=60, deadline=None)
    @given(st.integers(2, 80), st.integers(1, 100), st.integers(1, 9), st.integers(0, 2**63))
    def test_in_batches_too_what_an_epoch_leaves_over_begins_the_next(self, length, context, batch, seed):
        tokens = torch.arange(length)
        single = Windows(tokens, context, 1, seed)
        windows = Windows(tokens, context, batch, seed)
        for _ in range(5):
            inputs, targets = next(windows)
            assert inputs.shape == targets.shape == (batch, min(context, length - 1))
            assert inputs.dtype == targets.dtype == torch.int64
            expected = [next(single) for _ in range(batch)]
            assert inputs.equal(torch.cat([pair[0] for pair in expected]))
            assert targets.equal(torch.cat([pair[1] for pair in expected]))
        assert windows.epochs == single.epochs

    def test_rows_are_consecutive_tokens_and_padding_is_on_the_right(self):
        windows = Windows(torch.arange(10, 113), context=8, batch_size=1)
        for inputs, targets in islice(windows, 100):
            kept = int((targets != IGNORE).sum())
            assert kept > 0
            assert targets[0, :kept].equal(inputs[0, :kept] + 1)
            assert inputs[0, :kept].equal(torch.arange(kept) + inputs[0, 0])
            assert (targets[0, kept:] == IGNORE).all() and (inputs[0, kept:] == 0).all()

    def test_phase_and_order_are_new_in_each_epoch(self):
        windows = Windows(torch.arange(1001), context=10, batch_size=1)
        epochs = [[int(inputs[0, 0]) for inputs, _ in epoch_of(windows)] for _ in range(8)]
        assert len({tuple(epoch) for epoch in epochs}) == 8
        assert len({frozenset(epoch) for epoch in epochs}) > 3  # the phase, apart from the order
        assert all(epoch != sorted(epoch) for epoch in epochs)

    def test_seed_decides_all(self):
        def first(seed):
            return [b[0].tolist() for b in islice(Windows(torch.arange(500), 16, 4, seed), 20)]

        assert first(1) == first(1) != first(2)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 7), st.integers(0, 30), st.integers(0, 99))
    def test_resume_is_exact(self, length, context, batch, steps, seed):
        tokens = torch.arange(length)
        one = Windows(tokens, context, batch, seed)
        for _ in range(steps):
            next(one)
        state = one.state_dict()
        two = Windows(tokens, context, batch, seed=12345)
        two.load_state_dict(state)
        assert two.state_dict() == state and two.epochs == one.epochs
        for _ in range(5):
            for a, b in zip(next(one), next(two), strict=True):
                assert a.equal(b)
        assert one.state_dict() == two.state_dict() != state

    def test_state_is_plain_numbers(self):
        state = Windows(torch.arange(100), 8, 2, seed=7).state_dict()
        assert state == {"seed": 7, "epoch": 0, "position": 0, "context": 8, "tokens": 100}

    def test_a_place_in_other_data_is_refused(self):
        state = Windows(torch.arange(100), 8, 2).state_dict()
        with pytest.raises(UserError, match="tokens 100 then, 90 now"):
            Windows(torch.arange(90), 8, 2).load_state_dict(state)
        with pytest.raises(UserError, match="context 8 then, 9 now"):
            Windows(torch.arange(100), 9, 2).load_state_dict(state)
        for damaged in ({}, {**state, "epoch": "1"}, {**state, "position": 99}, {**state, "more": 1}):
            with pytest.raises(UserError, match="damaged"):
                Windows(torch.arange(100), 8, 2).load_state_dict(damaged)

    def test_shorter_than_the_context_says_so(self):
        windows = Windows(torch.arange(20), context=256, batch_size=3)
        assert windows.context == 19
        assert windows.note == "context 256 shortened to 19: the training part has 20 tokens"
        assert Windows(torch.arange(257), 256, 3).note is None

    @pytest.mark.parametrize("length", [0, 1])
    def test_nothing_to_learn_from(self, length):
        with pytest.raises(UserError, match=f"{length} token"):
            Windows(torch.arange(length), 8, 2)

    @pytest.mark.parametrize(("context", "batch"), [(0, 1), (1, 0), (-5, 1)])
    def test_bad_sizes(self, context, batch):
        with pytest.raises(ValueError):
            Windows(torch.arange(9), context, batch)

    def test_is_fast(self):
        windows = Windows(torch.zeros(1_000_000, dtype=torch.int32), context=256, batch_size=64)
        start = time.perf_counter()
        for _ in range(100):
            next(windows)
        assert time.perf_counter() - start < 3  # 0.1 s on an idle machine


class TestValidationWindows:
    @pytest.mark.parametrize("context", [1, 2, 5, 9, 10, 11, 100])
    @pytest.mark.parametrize("length", [2, 3, 10, 11])
    def test_in_order_each_target_once(self, length, context):
        batches = list(validation_windows(torch.arange(length, dtype=torch.int32), context))
        assert torch.cat([inputs for inputs, _ in batches], dim=1).tolist() == [list(range(length - 1))]
        assert torch.cat([targets for _, targets in batches], dim=1).tolist() == [list(range(1, length))]
        assert all(inputs.dtype == targets.dtype == torch.int64 for inputs, targets in batches)
        assert all(inputs.shape == targets.shape == (1, context) for inputs, targets in batches[:-1])

    def test_with_a_start_the_first_token_is_a_target(self):
        batches = list(validation_windows(torch.tensor([5, 6, 7], dtype=torch.int32), 2, start_id=0))
        assert [(inputs.tolist(), targets.tolist()) for inputs, targets in batches] == [
            ([[0, 5]], [[5, 6]]),
            ([[6]], [[7]]),
        ]

    def test_the_targets_are_the_bytes_that_are_counted(self, tmp_path):
        write(tmp_path, {f"{i}.md": f"Text {i}, é." for i in range(30)})
        corpus = load_corpus(tmp_path)
        tok = corpus.tokenizer
        targets = [i for _, t in validation_windows(corpus.validation, 7, tok.eos_id) for i in t[0].tolist()]
        assert corpus.validation_bytes == sum(len(tok.token_bytes(i)) or 1 for i in targets)

    def test_bad_input(self):
        with pytest.raises(ValueError):
            validation_windows(torch.arange(9), 0)
        for tokens in (torch.arange(0), torch.arange(1)):
            with pytest.raises(UserError, match="nothing to validate"):
                validation_windows(tokens, 8)
        assert len(list(validation_windows(torch.tensor([3]), 8, start_id=0))) == 1
