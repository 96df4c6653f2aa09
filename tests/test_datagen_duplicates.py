"""MinHash against the Jaccard index that it estimates."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ollama_server import NOUNS, story

from mamba2_min.datagen.duplicates import ORDERS, NearDuplicates, jaccard, runs_of, signature


def pair(changes: int, rng: random.Random, length: int = 300) -> tuple[str, str]:
    """Two texts of `length` words that differ in up to `changes` places."""
    one = [f"{rng.choice(NOUNS)}{rng.randrange(9)}" for _ in range(length)]
    other = list(one)
    for _ in range(changes):
        other[rng.randrange(length)] = f"other{rng.randrange(99)}"
    return " ".join(one), " ".join(other)


def estimate(one: str, other: str) -> float:
    return float(np.mean(signature(one) == signature(other)))


def test_the_estimate_is_as_exact_as_it_is_said_to_be():
    rng = random.Random(0)
    pairs = [pair(rng.randrange(150), rng) for _ in range(150)]
    errors = np.array([estimate(*texts) - jaccard(*texts) for texts in pairs])
    assert np.sqrt(np.mean(errors**2)) < 0.044  # sqrt(0.25 / 128), its bound at an index of one half
    assert abs(errors.mean()) < 0.01
    assert np.abs(errors).max() < 0.15


@pytest.mark.parametrize("length", [3, 20, 2000])
def test_short_and_long_texts_alike(length):
    rng = random.Random(length)
    for _ in range(10):
        texts = pair(length // 8, rng, length)
        assert abs(estimate(*texts) - jaccard(*texts)) < 0.2


def test_equal_and_unrelated_texts():
    assert estimate(story(1), story(1).upper().replace(",", " —")) == 1
    assert estimate(story(1), story(2)) < 0.1
    assert jaccard("", "") == 1
    assert runs_of("one two") == {"one two"}


@given(st.text(max_size=60))
def test_any_text_has_a_signature(text):
    assert signature(text).shape == (ORDERS,)
    assert np.array_equal(signature(text), signature(text))


def test_signatures_are_the_same_on_every_machine():
    digest = hashlib.sha256(signature(story(1)).astype("<u4").tobytes()).hexdigest()
    assert digest == "73cc53d2e67376590cc714237b39fe6d4ef5959090813c9fb8bc817aa194a143"


def test_the_most_alike_is_named_and_the_rest_let_pass():
    near = NearDuplicates(threshold=0.5)
    assert near.like(signature(story(0))) is None
    for seed in range(200):  # more than the matrix has room for at first
        near.add(f"text {seed}", signature(story(seed)))
    assert len(near) == 200
    assert near.like(signature(story(200))) is None
    changed = story(150).replace("the", "a", 1)
    name, share = near.like(signature(changed))
    assert name == "text 150" and 0.5 < share < 1
    assert NearDuplicates(1.0).like(signature("x")) is None
