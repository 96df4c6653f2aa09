"""The sampler against the distributions that it promises, not against itself."""

import math
from collections import Counter, deque

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mamba2_min.ops.sampling import Sampler, draw, penalise, repeats

PROBABILITIES = torch.tensor([0.04, 0.40, 0.10, 0.25, 0.09, 0.12], dtype=torch.float64)
LOGITS = PROBABILITIES.log().float() + 3.7


def expected(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> list[float]:
    """The distribution by definition: a full sort, one token at a time."""
    p = [math.exp(math.log(x) / temperature) for x in PROBABILITIES.tolist()]
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: top_k or None]
    total, before, kept = sum(p[i] for i in order), 0.0, []
    for i in order:
        if kept and before >= top_p * total * (1 - 1e-12):
            break
        if p[i] >= min_p * p[order[0]] * (1 - 1e-12):
            kept.append(i)
        before += p[i]
    mass = sum(p[i] for i in kept)
    return [p[i] / mass if i in kept else 0.0 for i in range(len(p))]


def chi_square(counts: Counter, probabilities: list[float]) -> float:
    n = counts.total()
    return sum((counts[i] - n * p) ** 2 / (n * p) for i, p in enumerate(probabilities) if p)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 2},
        {"top_k": 4, "temperature": 2.0},
        {"top_k": 100},
        {"top_p": 0.6},
        {"top_p": 0.8},
        {"top_p": 0.93},
        {"top_k": 3, "top_p": 0.5},
        {"min_p": 0.2},
        {"min_p": 0.5},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.3, "temperature": 0.7},
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_promised_distribution(values):
    sampler = Sampler(**{"temperature": 1.0, **values}, seed=11)
    counts = Counter(sampler.pick(LOGITS) for _ in range(3000))
    probabilities = expected(**values)
    assert set(counts) == {i for i, p in enumerate(probabilities) if p}
    assert chi_square(counts, probabilities) < 22  # 5 degrees of freedom or fewer: beyond this, less than 1 in 1000


def test_rejection_draws_the_nucleus_of_a_large_vocabulary():
    """20,000 equal tokens, of which top-p keeps the first half exactly: ties belong to the lower ids."""
    weights = torch.ones(20_000, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(weights, 10_000.0, generator) for _ in range(2000)]
    assert max(drawn) < 10_000
    counts = Counter(i // 1000 for i in drawn)
    assert chi_square(counts, [0.1] * 10) < 28


@pytest.mark.parametrize(("uniform", "index"), [(0.0, 1), (0.5, 3), (1 - 2**-53, 3)])
def test_a_uniform_number_on_the_edge_draws_no_token_of_weight_0(monkeypatch, uniform, index):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(uniform, dtype=torch.float64))
    assert draw(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)) == index


@pytest.mark.parametrize("size", [1, 2, 13_148])
@pytest.mark.parametrize(
    "values", [{"top_p": 0.0}, {"top_p": 1e-300}, {"min_p": 1.0}, {"top_k": 1}, {"temperature": 0}], ids=str
)
def test_the_narrowest_values_leave_the_likeliest_token(values, size):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size))
    sampler = Sampler(**{"temperature": 5.0, **values})
    assert {sampler.pick(logits) for _ in range(20)} == {int(logits.argmax())}


def test_greedy_takes_the_lowest_id_of_equals_and_uses_no_random_number():
    sampler = Sampler(temperature=0, seed=1)
    assert [sampler.pick(torch.tensor([0.0, 2.0, 2.0, 1.0])) for _ in range(5)] == [1] * 5
    warm, fresh = sampler.adjusted(temperature=1.0), Sampler(1.0, seed=1)
    assert [warm.pick(LOGITS) for _ in range(20)] == [fresh.pick(LOGITS) for _ in range(20)]


@pytest.mark.parametrize("values", [{}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_token_that_is_impossible_is_never_picked(values, dtype):
    logits = torch.full((50,), -torch.inf, dtype=dtype)
    logits[17] = -300.0
    assert {Sampler(**values, seed=i).pick(logits) for i in range(30)} == {17}


@pytest.mark.parametrize("values", [{}, {"temperature": 0}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}], ids=str)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_broken_logits_are_said_to_be_broken(values, broken):
    with pytest.raises(FloatingPointError, match="weights are broken"):
        Sampler(**values).pick(torch.tensor([0.0, broken, 1.0]))
    with pytest.raises(FloatingPointError, match="weights are broken"):
        Sampler(**values).pick(torch.full((3,), -torch.inf))


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e30, 1.7e308])
def test_extreme_temperatures_stay_finite(temperature):
    picks = {Sampler(temperature, seed=i).pick(LOGITS) for i in range(60)}
    assert picks == {1} if temperature < 1 else picks == set(range(6))


def test_the_logits_are_left_as_they_are():
    for dtype in (torch.float32, torch.float64):
        logits = LOGITS.to(dtype).clone()
        before = logits.clone()
        Sampler(top_k=3, top_p=0.5, min_p=0.1, repeat_penalty=1.3).pick(logits, [0, 1])
        assert torch.equal(logits, before)


def test_a_seed_gives_the_same_tokens_and_no_seed_gives_others():
    def tokens(sampler):
        return [sampler.pick(LOGITS) for _ in range(60)]

    assert tokens(Sampler(seed=5)) == tokens(Sampler(seed=5)) != tokens(Sampler(seed=6))
    assert tokens(Sampler()) != tokens(Sampler())
    torch.manual_seed(0)
    drawn = torch.rand(())
    torch.manual_seed(0)
    tokens(Sampler(seed=5))
    assert torch.rand(()) == drawn  # the global random numbers, a trainer's for instance, are not touched


def test_an_adjusted_sampler_goes_on_with_the_same_random_numbers():
    whole = Sampler(seed=3)
    first = Sampler(seed=3)
    picks = [first.pick(LOGITS) for _ in range(10)]
    second = first.adjusted(min_p=0.0, top_k=0)
    assert picks + [second.pick(LOGITS) for _ in range(10)] == [whole.pick(LOGITS) for _ in range(20)]
    again = second.adjusted(seed=3)
    assert [again.pick(LOGITS) for _ in range(10)] == picks


def test_a_penalty_divides_positive_logits_and_multiplies_negative_ones_once():
    scores = torch.tensor([2.0, -1.0, 0.0, 4.0, -torch.inf])
    assert penalise(scores, [0, 1, 0, 0, 2, 4], 2.0).tolist() == [1.0, -2.0, 0.0, 4.0, -math.inf]


def test_a_penalty_counts_the_last_tokens_only():
    logits = torch.tensor([1.0, 0.9, 0.0])
    sampler = Sampler(temperature=0, repeat_penalty=2.0, repeat_window=3)
    assert sampler.pick(logits) == 0
    assert sampler.pick(logits, [0, 2, 2]) == 1
    assert sampler.pick(logits, [0, 2, 2, 2]) == 0
    assert sampler.pick(logits, deque([0, 2, 2])) == 1
    assert sampler.adjusted(repeat_window=0).pick(logits, [0]) == 0


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_what_would_repeat_is_found(ids, size):
    """Token by token: the run that each would complete is compared with every run that there is."""
    runs = [ids[i : i + size] for i in range(len(ids) - size + 1)]
    expected = {token for token in range(4) if [*ids[len(ids) - size + 1 :], token] in runs} if size > 1 else {*ids}
    assert {*repeats(ids, size)} == expected


def test_no_run_of_tokens_is_written_twice():
    """A model that knows one loop leaves it; where everything would repeat, it goes on as it would."""
    sampler, ids = Sampler(temperature=0, no_repeat=3), []
    for _ in range(60):
        logits = torch.zeros(6)
        logits[(ids[-1] + 1) % 3 if ids else 0] = 5.0
        ids.append(sampler.pick(logits, ids))
    runs = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
    assert ids[:5] == [0, 1, 2, 0, 1] and len(runs) == len({*runs})
    assert sampler.pick(torch.tensor([1.0]), [0] * 10) == 0
    assert (sampler.window, Sampler().window, Sampler(repeat_window=500, no_repeat=2).window) == (256, 64, 500)
    far = [0, 1, 2, *[3] * 260, 0, 1]
    assert sampler.pick(torch.tensor([0.0, 0.0, 1.0, 0.0]), far) == 2


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"temperature": None},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 2.0},
        {"top_k": 2**63},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"top_p": math.nan},
        {"min_p": 2},
        {"min_p": -1},
        {"repeat_penalty": 0},
        {"repeat_penalty": math.inf},
        {"repeat_penalty": -1},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 1.5},
        {"seed": "x"},
        {"repeat_window": -1},
        {"no_repeat": -1},
        {"no_repeat": 2.5},
    ],
    ids=str,
)
def test_impossible_values_are_answered_in_one_line_that_names_them(values):
    with pytest.raises(ValueError, match=f"^{next(iter(values))} must be [^\n]+, not [^\n]+$"):
        Sampler(**values)
    with pytest.raises(ValueError):
        Sampler().adjusted(**values)


@example([-2.4e-37, 0.0, 0.0, 0.0], 1.0, 3, 1.0, 0.0, 1.0)  # equal once they are exponentials
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    st.floats(0, 100),
    st.integers(0, 50),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0.1, 10),
)
def test_any_logits_and_any_values_give_a_token_that_the_cuts_allow(logits, temperature, top_k, top_p, min_p, penalty):
    logits = torch.tensor(logits)
    sampler = Sampler(temperature, top_k, top_p, min_p, penalty, seed=0)
    token = sampler.pick(logits, [0])
    scores = penalise(logits.double(), [0], penalty)
    ahead = int((scores > scores[token]).sum())
    assert 0 <= token < len(logits)
    assert ahead == 0 or (temperature > 0 and (top_k == 0 or ahead < top_k))
