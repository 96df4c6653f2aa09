"""Stories and first stories: what is promised about them holds, and the table of figures is theirs."""

import re
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from mamba2_min.data.documents import read_documents

ROOT = Path(__file__).parent.parent
FOLDERS = ("first_stories", "stories")
TABLE = ROOT / "training_data" / "README.md"

# Words that have a capital in the middle of a sentence and are no names.
NOT_NAMES = """I Mr
Mrs Miss Ms Dr Sir Madam Majesty Highness King Queen Prince Princess Captain Uncle Aunt Father Mother
Mum Mummy Mama Papa Dad Grandma Grandpa Grandfather Grandmother Granny Nana Opa Nurse Cook Sister Monday Tuesday
Wednesday Thursday Friday Saturday Sunday Mondays Tuesdays Wednesdays Thursdays Fridays Saturdays Sundays January
February March April June July August September October November December Christmas Easter Eve Day New Year
You Your The To Co Good Old Big Little Upper Lower Four"""


@cache
def stories(folder):
    """[(where, text)] of every story, as training reads them."""
    found = read_documents(ROOT / "training_data" / folder, suffixes=[".txt"])
    return [(document.source, document.text) for document in found]


def words(text):
    return re.findall(r"[a-z']+", text.lower())


@cache
def word_lists(folder):
    return [words(text) for _, text in stories(folder)]


def grams(text_words, n=4):
    return {tuple(text_words[i : i + n]) for i in range(len(text_words) - n + 1)}


@cache
def gram_sets(folder):
    return [grams(text_words) for text_words in word_lists(folder)]


def names(folder):
    """The words that have a capital in the middle of a sentence, without titles, days and months."""
    inside = (re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text) for _, text in stories(folder))
    return {name for found in inside for name in found} - set(NOT_NAMES.split())


def figures(folder):
    """{what is counted: how many}, as the table has it."""
    return {
        "stories": len(stories(folder)),
        "words": sum(len(text.split()) for _, text in stories(folder)),
        "distinct words": len({word for text_words in word_lists(folder) for word in text_words}),
        "names": len(names(folder)),
        "distinct runs of four words": len(set().union(*gram_sets(folder))),
    }


def test_there_are_enough_of_them_and_the_table_has_the_figures():
    counted = [figures(folder) for folder in FOLDERS]
    assert all(one["stories"] >= 900 and one["words"] >= 200_000 for one in counted)
    rows = re.findall(r"^\| ([a-z ]+) \| ([\d,]+) \| ([\d,]+) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(what, *(f"{one[what]:,}" for one in counted)) for what in counted[0]]


@pytest.mark.parametrize("folder, least, most", [("first_stories", 70, 135), ("stories", 80, 250)])
def test_each_has_its_length(folder, least, most):
    assert not {where: n for where, text in stories(folder) if not least <= (n := len(text.split())) <= most}


@pytest.mark.parametrize("folder", FOLDERS)
def test_plain_characters_whole_sentences_and_closed_quotes(folder):
    for where, text in stories(folder):
        assert not re.search(r"[^A-Za-z0-9 \n.,!?;:\"'()-]|  | \n|\n\n\n|\b(\w+) \1 \1\b", text), where
        assert re.search(r"[.!?]\"?$", text), where
        assert all(paragraph.count('"') % 2 == 0 for paragraph in text.split("\n\n")), where


@pytest.mark.parametrize("part, share", [(slice(4), 0.01), (slice(2), 0.08), (slice(-4, None), 0.005)])
@pytest.mark.parametrize("folder", FOLDERS)
def test_openings_and_endings_differ(folder, part, share):
    """Four words begin at most 1% of the stories, two words ("There was") at most 8%; four words end at most 0.5%."""
    (most, count), *_ = Counter(" ".join(text_words[part]) for text_words in word_lists(folder)).most_common(1)
    assert count <= share * len(stories(folder)), most


@pytest.mark.parametrize("folder, share", [("first_stories", 1 / 7), ("stories", 1 / 20)])
def test_no_two_tell_the_same(folder, share):
    """No two stories share more than a part of their runs of four words; a copy would share nearly all."""
    holders, sets = {}, gram_sets(folder)
    for i, found in enumerate(sets):
        for gram in found:
            holders.setdefault(gram, []).append(i)
    shared = Counter(pair for together in holders.values() for pair in combinations(together, 2))
    worst = [(i, j) for (i, j), most in shared.items() if most > share * min(len(sets[i]), len(sets[j]))]
    assert not worst, [(stories(folder)[i][0], stories(folder)[j][0]) for i, j in worst[:5]]


@pytest.mark.parametrize("folder, few, share", [("first_stories", 1000, 0.96), ("stories", 2000, 0.97)])
def test_few_words_say_almost_everything(folder, few, share):
    """The rest are names and the things that a story is about."""
    counts = Counter(word for text_words in word_lists(folder) for word in text_words)
    assert sum(count for _, count in counts.most_common(few)) >= share * sum(counts.values())


WOMEN, MEN = {"Anna", "Mum", "Grandma", "Mrs", "Miss"}, {"Tom", "Dad", "Grandpa", "Mr"}


def test_first_stories_have_two_people_at_most_and_he_and_she_are_clear():
    for where, text in stories("first_stories"):
        people = (WOMEN | MEN) & set(re.findall(r"[A-Z][a-z]+", text))
        assert people & {"Anna", "Tom"} and len(people) <= 2, where
        said = set(words(text))
        assert people & WOMEN or not said & {"she", "her", "hers", "herself"}, where
        assert people & MEN or not said & {"he", "him", "his", "himself"}, where
