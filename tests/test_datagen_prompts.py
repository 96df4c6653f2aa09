"""Prompts: reproducible, varied, and templates whose faults are said in one line."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba2_min.datagen import builtin, kinds
from mamba2_min.datagen.builtin import KINDS
from mamba2_min.datagen.kinds import Kind, compose, compose_request, slug
from mamba2_min.datagen.lists import read_list
from mamba2_min.datagen.templates import find_kind, load_template, load_topics
from mamba2_min.errors import UserError


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_a_prompt_is_complete_and_reads_as_text(kind):
    for index in range(200):
        prompt = compose(kind, 0, index)
        text = prompt.text + (prompt.answer or "").replace("{request}", "")
        assert not re.search(r"[{}]|  |\.\.|,,| ,|\bNone\b", text), text
        assert all(card in text for card in prompt.draw.values())


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_of_a_thousand_prompts_hardly_two_are_the_same(kind):
    assert len({compose(kind, 0, index).text for index in range(1000)}) >= 995
    assert not {compose(kind, 0, index).text for index in range(200)} & {compose(kind, 1, i).text for i in range(200)}


def test_prompts_depend_on_seed_and_index_alone():
    forwards = [compose(builtin.STORIES, 5, index) for index in range(50)]
    kinds._shuffled.cache_clear()
    assert [compose(builtin.STORIES, 5, index) for index in reversed(range(50))] == forwards[::-1]
    code = (
        "from mamba2_min.datagen.builtin import *; from mamba2_min.datagen.kinds import *; import json;"
        "print(json.dumps([compose(STORIES, 5, i).text for i in (3, 49)]))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={})
    assert json.loads(other.stdout) == [forwards[3].text, forwards[49].text]


def test_the_prompts_of_a_release_stay_the_same():
    """A set can be made again only as long as this holds: change it knowingly."""
    assert compose(builtin.STORIES, 0, 0).draw["word"] == "rehearsal"
    assert compose(builtin.LETTERS, 7, 12345).draw == compose(builtin.LETTERS, 7, 12345).draw


RECORDED = json.loads((Path(__file__).parent / "fixtures" / "prompts.json").read_text("utf-8"))


@pytest.mark.parametrize("case", RECORDED)
def test_prompts_are_those_of_the_first_version(case):
    """Recorded with the lists still in Python: prompts, answers, what was drawn, and what --with-prompts asks."""
    name, variant, seed = re.fullmatch(r"(\w+), (\w+), seed (\d+)", case).groups()
    kind = KINDS[name]
    kind = {
        "plain": kind,
        "topics": kind.with_topics(("the tides", "our cat Momo")),
        "German": kind.in_language("German"),
    }[variant]
    digest = hashlib.sha256()
    for index in range(300):
        prompt = compose(kind, int(seed), index)
        draw = json.dumps(dict(prompt.draw), ensure_ascii=False)
        request = compose_request(kind, int(seed), index, "TEXT")
        digest.update("\0".join([prompt.text, prompt.answer or "", draw, request]).encode())
    assert compose(kind, int(seed), 3).text == RECORDED[case]["third"]
    assert digest.hexdigest() == RECORDED[case]["sha256_of_300"]


def test_every_list_is_used_evenly():
    openings = Counter(
        compose(builtin.STORIES, 0, index).draw["opening"] for index in range(4 * len(read_list("openings")))
    )
    assert len(openings) == len(read_list("openings"))
    assert set(openings.values()) == {4}


def test_no_list_repeats_itself_or_asks_for_once_upon_a_time():
    files = sorted(Path(builtin.__file__).with_name("words").rglob("*.txt"))
    assert len(files) == 44
    for file in files:
        cards = file.read_text("utf-8").splitlines()
        assert cards and len(set(cards)) == len(cards), file
        assert not any("once upon" in card.lower() or card != card.strip() or not card for card in cards), file


def test_cards_of_one_prompt_are_different():
    kind = Kind("k", ("{w} {w_2} {w_3}",), {"w": ("a", "b", "c", "d")})
    for index in range(100):
        assert len(set(compose(kind, 0, index).draw.values())) == 3


def test_topics_are_what_every_document_is_about(tmp_path):
    path = tmp_path / "topics.txt"
    path.write_text("\ufeffour cat Momo\n\n# a comment\nphotosynthesis\nour cat Momo\n", encoding="utf-8")
    topics = load_topics(path)
    assert topics == ("our cat Momo", "photosynthesis")
    for kind in KINDS.values():
        prompts = [compose(kind.with_topics(topics), 0, index) for index in range(4)]
        assert Counter(prompt.draw["subject"] for prompt in prompts) == {"our cat Momo": 2, "photosynthesis": 2}
        assert all(prompt.draw["subject"] in prompt.text for prompt in prompts)


def test_topics_that_name_nothing(tmp_path):
    (tmp_path / "none.txt").write_text("# nothing\n\n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n")
    for name in ("none.txt", "latin1.txt", "missing.txt"):
        with pytest.raises(UserError, match=name):
            load_topics(tmp_path / name)


TEMPLATE = {
    "prompt": ["Write a {style} about {thing} and {thing_2}.", "{opening} It is about {thing}, {{so}}. {style}"],
    "lists": {"thing": ["rain", "snow", "sun"], "style": "styles.txt"},
    "min_words": 5,
}


def test_a_template_as_json_and_as_toml_is_the_same_kind(tmp_path):
    (tmp_path / "styles.txt").write_text("poem\nsong\n")
    (tmp_path / "haiku.json").write_text(json.dumps(TEMPLATE))
    kind = find_kind(str(tmp_path / "haiku.json"))
    assert (kind.name, kind.min_words, kind.max_words) == ("haiku", 5, None)
    texts = [compose(kind, 0, index).text for index in range(6)]
    assert any("{so}" in text for text in texts)
    assert any(opening in text for text in texts for opening in read_list("openings"))  # a shared list
    if sys.version_info < (3, 11):
        return
    (tmp_path / "haiku.toml").write_text(
        'prompt = ["Write a {style} about {thing} and {thing_2}.", "{opening} It is about {thing}, {{so}}. {style}"]\n'
        'min_words = 5\n[lists]\nthing = ["rain", "snow", "sun"]\nstyle = "styles.txt"\n'
    )
    assert load_template(tmp_path / "haiku.toml") == kind


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")
def test_the_template_in_the_documentation_works(tmp_path):
    documentation = (Path(__file__).parents[1] / "docs" / "data_generator.md").read_text("utf-8")
    (tmp_path / "recipes.toml").write_text(re.search(r"```toml\n(.*?)```", documentation, re.DOTALL)[1], "utf-8")
    (tmp_path / "guests.txt").write_text("two\ntwelve\n")
    kind = load_template(tmp_path / "recipes.toml")
    assert (kind.name, kind.min_words) == ("recipes", 40)
    assert any("{Braces}" in compose(kind, 0, index).text for index in range(2))
    for name in builtin.SHARED_LISTS:
        assert re.search(rf"`[a-z ]*\b{name}\b[a-z ]*`", documentation)
    assert all(f"`{name}`" in documentation for name in KINDS)


def test_toml_on_an_older_python_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)  # what an import of a missing module looks like
    (tmp_path / "own.toml").write_text('prompt = "Write."')
    with pytest.raises(UserError, match=r"needs Python 3\.11.*json"):
        load_template(tmp_path / "own.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"promt": "x"}, "unknown entry 'promt'; did you mean prompt"),
        ({"prompt": "about {thign}"}, "unknown field {thign}.*did you mean thing"),
        ({"prompt": "about {thing!r}"}, "unknown field"),
        ({"prompt": "about {}"}, "unknown field"),
        ({"prompt": "about {request}"}, "unknown field"),
        ({"prompt": "about {thing"}, "brace"),
        ({"prompt": "{thing} {thing_2} {thing_3} {thing_4}"}, "list thing has 3 items, but a prompt uses 4"),
        ({"prompt": ""}, "prompt has to be"),
        ({"prompt": None}, "prompt has to be"),
        ({"lists": {"thing": []}}, "list thing has to be"),
        ({"lists": {"thing": [1]}}, "list thing has to be"),
        ({"lists": {"Thing!": ["x"]}}, "cannot be called"),
        ({"lists": {"thing": "missing.txt"}}, "missing.txt"),
        ({"lists": []}, "lists has to be"),
        ({"answer": "no field"}, "answer has to be"),
        ({"min_words": 0}, "min_words"),
        ({"max_words": True}, "max_words"),
    ],
)
def test_faults_of_a_template_are_one_line(tmp_path, change, message):
    (tmp_path / "styles.txt").write_text("poem\n")
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(TEMPLATE | change))
    with pytest.raises(UserError, match=message) as error:
        load_template(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["prompt = [", "{", "[]", '{"prompt": 3}', "\x00"])
@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_template_that_cannot_be_parsed(tmp_path, content, suffix):
    path = tmp_path / f"bad.{suffix}"
    path.write_text(content)
    with pytest.raises(UserError, match=f"bad.{suffix}") as error:
        load_template(path)
    assert "\n" not in str(error.value)


def test_a_kind_that_is_none():
    with pytest.raises(UserError, match="did you mean stories"):
        find_kind("storys")
    with pytest.raises(UserError, match=r"nowhere\.toml"):
        find_kind("nowhere.toml")


@given(st.text())
def test_a_slug_is_safe_as_a_file_name(text):
    assert re.fullmatch(r"(?:[a-z0-9]+(?:-[a-z0-9]+)*)?", slug(text))
    assert len(slug(text)) <= 40


def test_slugs():
    assert slug("Crème brûlée, ../../etc") == "creme-brulee-etc"
    assert slug("日本") == ""
