"""The tasks of recall are what they claim: a reader with a list or a dictionary, and no network, solves them."""

import pytest
import torch

from mamba2_min.config import Mamba2Config
from mamba2_min.evaluation import recall
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.models.transformer import TransformerConfig, TransformerLM


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def copying(generator, batch=16, length=40, n_data=7, vocab_size=10):
    return recall.selective_copying(batch, length, n_data, generator, vocab_size)


def induction(generator, batch=16, length=40, vocab_size=10):
    return recall.induction_heads(batch, length, generator, vocab_size)


def association(generator, batch=16, length=40, n_pairs=7, vocab_size=20):
    return recall.associative_recall(batch, length, n_pairs, generator, vocab_size)


GAMES = [copying, induction, association]


# Each reads a row from the left and answers from what it has read so far; it knows only the rules.


def play_copying(row, vocab_size=10):
    letters, answers = [], {}
    for place, token in enumerate(row):
        if token == vocab_size - 1:
            answers[place] = letters.pop(0)
        elif token != 0:
            letters.append(token)
    return answers


def play_induction(row, vocab_size=10):
    followed, answers = None, {}
    for place, token in enumerate(row):
        if place and row[place - 1] == vocab_size - 1:
            followed = token
        if token == vocab_size - 1 and followed is not None:
            answers[place] = followed
    return answers


def play_association(row, vocab_size=20):
    book, answers = {}, {}
    for place, token in enumerate(row):
        if token >= vocab_size // 2:
            book[row[place - 1]] = token
        elif token in book:
            answers[place] = book[token]
    return answers


@pytest.mark.parametrize(
    "game, play", [(copying, play_copying), (induction, play_induction), (association, play_association)]
)
@pytest.mark.parametrize("seed", range(20))
def test_every_question_and_no_other_is_answered_by_what_was_read(game, play, seed):
    input_ids, targets = game(seeded(seed))
    assert input_ids.shape == targets.shape == (16, 40)
    assert input_ids.dtype == targets.dtype == torch.int64
    for row, wanted in zip(input_ids.tolist(), targets.tolist(), strict=True):
        assert play(row) == {place: answer for place, answer in enumerate(wanted) if answer != -100}


@pytest.mark.parametrize("game", GAMES)
def test_a_seed_gives_the_same_game_again_and_another_seed_another(game):
    first, again, other = game(seeded(3)), game(seeded(3)), game(seeded(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    generator = seeded(3)
    assert not torch.equal(game(generator)[0], game(generator)[0])  # fresh ones, drawn one after the other


def test_selective_copying_is_noise_letters_and_markers():
    input_ids, targets = copying(seeded(), batch=2000)
    assert ((input_ids[:, :33] != 0).sum(1) == 7).all() and (input_ids[:, :33] < 9).all()
    assert (input_ids[:, 33:] == 9).all() and (targets[:, :33] == -100).all()
    share = (input_ids[:, :33] != 0).double().mean(0)
    assert (share - 7 / 33).abs().max() < 0.06  # anywhere: no place is likelier than another
    counts = targets[targets >= 0].bincount(minlength=10)
    assert counts[0] == counts[9] == 0 and (counts[1:9] / 14000 - 1 / 8).abs().max() < 0.02


def test_the_sign_of_induction_comes_twice_and_its_answer_is_any_letter():
    input_ids, targets = induction(seeded(), batch=2000)
    sign = input_ids == 9
    assert (sign.sum(1) == 2).all() and sign[:, -1].all()
    places = sign[:, :-1].int().argmax(1)
    assert places.max() == 37 and places.min() == 0  # its answer stands before the sign comes again
    assert (places.bincount(minlength=38) / 2000 - 1 / 38).abs().max() < 0.03
    assert ((targets != -100).sum(1) == 1).all()
    assert (targets[:, -1].bincount(minlength=9) / 2000 - 1 / 9).abs().max() < 0.03


def test_every_key_of_associative_recall_is_asked_for_once_mostly_soon():
    input_ids, targets = association(seeded(), batch=2000)
    keys, values = input_ids[:, 0:14:2], input_ids[:, 1:14:2]
    assert keys.min() == 1 and keys.max() == 9 and values.min() == 10 and values.max() == 19
    assert all(len(set(row)) == 7 for part in (keys, values) for row in part.tolist())
    asked = targets != -100
    assert torch.equal(input_ids[asked].view(2000, 7).sort(1).values, keys.sort(1).values)
    assert (asked.sum(1) == 7).all() and not asked[:, :14].any() and not asked[:, 1::2].any()
    assert (input_ids[:, 14:][~asked[:, 14:]] == 0).all()
    often = asked[:, 14::2].double().mean(0)
    assert often[0] > 0.9 and often[0] > 2 * often[-1] > 0  # Zoology's power law: many at once, a few late


def test_with_power_one_a_question_may_stand_anywhere():
    _, targets = recall.associative_recall(4000, 40, 3, seeded(), 20, power=1.0)
    often = (targets[:, 6::2] != -100).double().mean(0)
    assert (often - 3 / 17).abs().max() < 0.04


def test_the_smallest_games_there_are():
    assert recall.selective_copying(1, 2, 1, seeded(), 4)[0][0, 1] == 3
    input_ids, targets = recall.induction_heads(1, 3, seeded(), 3)
    assert input_ids[0, 0] == input_ids[0, 2] == 2 and targets[0, 2] == input_ids[0, 1]
    input_ids, targets = recall.associative_recall(1, 4, 1, seeded(), 4)
    assert input_ids[0, 0] == input_ids[0, 2] == 1 and targets[0, 2] == input_ids[0, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda g: recall.selective_copying(2, 9, 5, g),
        lambda g: recall.selective_copying(2, 10, 0, g),
        lambda g: recall.selective_copying(2, 10, 3, g, vocab_size=3),
        lambda g: recall.selective_copying(0, 10, 3, g),
        lambda g: recall.selective_copying(2, 10.0, 3, g),
        lambda g: recall.induction_heads(2, 2, g),
        lambda g: recall.induction_heads(2, 10, g, vocab_size=2),
        lambda g: recall.induction_heads(True, 10, g),
        lambda g: recall.associative_recall(2, 11, 2, g),
        lambda g: recall.associative_recall(2, 10, 3, g),
        lambda g: recall.associative_recall(2, 40, 8, g, vocab_size=16),
        lambda g: recall.associative_recall(2, 40, 1, g, vocab_size=1),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call):
    with pytest.raises(ValueError) as refused:
        call(seeded())
    assert "\n" not in str(refused.value) and any(letter.isdigit() for letter in str(refused.value))


class Oracle(torch.nn.Module):
    """Answers like `play_induction`, except in rows whose first token is below `wrong`: there it is wrong."""

    def __init__(self, wrong=0):
        super().__init__()
        self.wrong, self.unused = wrong, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, 10)
        for b, row in enumerate(input_ids.tolist()):
            for place, answer in play_induction(row).items():
                logits[b, place, (answer + (row[0] < self.wrong)) % 10] = 1
        return logits, None


def test_parity_is_that_of_the_ones_so_far():
    ids, targets = recall.parity(20, 33, seeded())
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        assert wanted == [sum(row[: k + 1]) % 2 for k in range(33)]
    assert 0.4 < ids.double().mean() < 0.6
    assert torch.equal(recall.parity(20, 33, seeded())[0], ids)
    with pytest.raises(ValueError, match="length"):
        recall.parity(1, 0, seeded())


def test_accuracy_counts_the_questions_alone():
    batch = induction(seeded(), batch=100)
    assert recall.accuracy(Oracle(), batch) == 1
    assert recall.accuracy(Oracle(wrong=10), batch) == 0
    share = (batch[0][:, 0] >= 4).double().mean().item()
    assert recall.accuracy(Oracle(wrong=4), batch) == share and 0 < share < 1
    model = Oracle().train()
    recall.accuracy(model, batch)
    assert model.training


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mamba2LM(Mamba2Config(8, d_model=16, n_layer=1, d_state=8, headdim=8, tie_embeddings=False), seed=0),
        lambda: TransformerLM(TransformerConfig(8, d_model=16, n_layer=1, headdim=8, d_ff=16), seed=0),
    ],
)
def test_training_repeats_and_learns(make):
    def repeat_the_letter(generator):  # the easiest of all: a letter and at once a marker
        return recall.selective_copying(16, 2, 1, generator, vocab_size=8)

    short = [recall.train_on_task(make(), repeat_the_letter, steps=5, lr=1e-2, seed=1) for _ in range(2)]
    assert short[0] == short[1]
    model = make()
    losses = recall.train_on_task(model, repeat_the_letter, steps=80, lr=2e-2, seed=1)
    assert len(losses) == 80 and losses[-1] < 0.2 < losses[0]
    assert recall.accuracy(model, repeat_the_letter(seeded(9))) == 1
    assert not model.training
