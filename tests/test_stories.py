"""The stories for a small model: what is promised about them holds, and the table of figures is theirs."""

import re
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from mamba2_min.data.documents import read_documents

ROOT = Path(__file__).parent.parent
STORIES = ROOT / "training_data" / "stories"
TABLE = ROOT / "training_data" / "README.md"

# Words that have a capital in the middle of a sentence and are no names.
NOT_NAMES = """I Mr
Mrs Miss Ms Dr Sir Madam Majesty Highness King Queen Prince Princess Captain Uncle Aunt Father Mother
Mum Mummy Mama Papa Dad Grandma Grandpa Grandfather Grandmother Granny Nana Opa Nurse Cook Sister Monday Tuesday
Wednesday Thursday Friday Saturday Sunday Mondays Tuesdays Wednesdays Thursdays Fridays Saturdays Sundays January
February March April June July August September October November December Christmas Easter Eve Day New Year
You Your The To Co Good Old Big Little Upper Lower Four"""


@cache
def stories():
    """[(where, text)] of every story, as training reads them."""
    return [(document.source, document.text) for document in read_documents(STORIES, suffixes=[".txt"])]


def words(text):
    return re.findall(r"[a-z']+", text.lower())


@cache
def word_lists():
    return [words(text) for _, text in stories()]


def grams(text_words, n=4):
    return {tuple(text_words[i : i + n]) for i in range(len(text_words) - n + 1)}


@cache
def gram_sets():
    return [grams(text_words) for text_words in word_lists()]


def names():
    """The words that have a capital in the middle of a sentence, without titles, days and months."""
    inside = (re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text) for _, text in stories())
    return {name for found in inside for name in found} - set(NOT_NAMES.split())


def figures():
    """{what is counted: how many}, as the table has it."""
    return {
        "stories": len(stories()),
        "words": sum(len(text.split()) for _, text in stories()),
        "distinct words": len({word for text_words in word_lists() for word in text_words}),
        "names": len(names()),
        "distinct runs of four words": len(set().union(*gram_sets())),
    }


def test_there_are_enough_of_them_and_the_table_has_the_figures():
    counted = figures()
    assert counted["stories"] >= 900 and counted["words"] >= 200_000
    table = dict(re.findall(r"^\| ([a-z ]+) \| ([\d,]+) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE))
    assert table == {what: f"{count:,}" for what, count in counted.items()}


def test_each_is_of_80_to_250_words():
    assert not {where: n for where, text in stories() if not 80 <= (n := len(text.split())) <= 250}


def test_plain_characters_whole_sentences_and_closed_quotes():
    for where, text in stories():
        assert not re.search(r"[^A-Za-z0-9 \n.,!?;:\"'()-]|  | \n|\n\n\n|\b(\w+) \1 \1\b", text), where
        assert re.search(r"[.!?]\"?$", text), where
        assert all(paragraph.count('"') % 2 == 0 for paragraph in text.split("\n\n")), where


@pytest.mark.parametrize("part, share", [(slice(4), 0.01), (slice(2), 0.08), (slice(-4, None), 0.005)])
def test_openings_and_endings_differ(part, share):
    """Four words begin at most 1% of the stories, two words ("There was") at most 8%; four words end at most 0.5%."""
    (most, count), *_ = Counter(" ".join(text_words[part]) for text_words in word_lists()).most_common(1)
    assert count <= share * len(stories()), most


def test_no_two_tell_the_same():
    """No two stories share more than a twentieth of their runs of four words; a copy would share nearly all."""
    holders = {}
    for i, found in enumerate(gram_sets()):
        for gram in found:
            holders.setdefault(gram, []).append(i)
    shared = Counter(pair for together in holders.values() for pair in combinations(together, 2))
    (i, j), most = shared.most_common(1)[0]
    assert most <= min(len(gram_sets()[i]), len(gram_sets()[j])) / 20, (stories()[i][0], stories()[j][0])


def test_few_words_say_almost_everything():
    """2,000 words make up 97 in 100; the rest are names and the things that a story is about."""
    counts = Counter(word for text_words in word_lists() for word in text_words)
    assert sum(count for _, count in counts.most_common(2000)) >= 0.97 * sum(counts.values())
