"""Runs are judged by documents that they were not trained on, however their training part was chosen."""

import dataclasses
import json

import pytest
import torch
from corpora import prose, write

from mamba2_min.data.corpus import corpus_of
from mamba2_min.errors import UserError
from mamba2_min.evaluation.held_out import held_out, validation_documents
from mamba2_min.settings import DataSettings

LICENCE = "This text may be copied by everybody who asks."
STORIES = {f"{k}.md": f"{prose(k, 400)}\n\n{LICENCE}" for k in range(60)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "stories", STORIES)
    write(tmp_path / "books", {"a.txt": prose(90, 30_000), "b.txt": prose(91, 20_000), "c.md": prose(92, 300)})
    write(tmp_path / "other", {f"{k}.md": prose(k, 400) for k in range(100, 110)} | {"copy.md": STORIES["7.md"]})
    return tmp_path


def trained(folder, name, **settings):
    """A run's folder, as far as what it was trained on goes."""
    data = dataclasses.asdict(DataSettings(**{"data": "stories", **settings}))
    (folder / name).mkdir()
    (folder / name / "settings.json").write_text(json.dumps({"data": data, "model": {}, "training": {}}))
    return name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"val_fraction": 0.3},
        {"drop_repeats": True},
        {"max_documents_bytes": 12_000},
        {"data": "books"},
        {"data": "books", "val_fraction": 0.25, "drop_repeats": True},
        {"data": "books", "rules": 1},
        {"val_data": "other"},
        {"pattern": "whitespace"},
    ],
)
def test_they_are_those_that_training_validates_with(folder, settings):
    data = DataSettings(**{"data": "stories", "min_count": 1, **settings})
    corpus = corpus_of(data)
    words = corpus.tokenizer
    found = [id for d in validation_documents(data) for id in [*words.encode(d.text), words.eos_id]]
    assert torch.equal(torch.tensor(found, dtype=corpus.validation.dtype), corpus.validation)
    run = trained(folder, "run", **settings)
    asked = [d.text for d in held_out([run], data.data)]
    assert asked == [d.text for d in validation_documents(data)]


def test_of_several_runs_what_all_of_them_held_out(folder, capsys):
    runs = [trained(folder, "a", val_fraction=0.4), trained(folder, "b"), trained(folder, "c", val_fraction=0.2)]
    assert held_out(runs, "stories") == held_out(["b"], "stories") != held_out(["a"], "stories")
    assert held_out(runs, folder / "stories") == held_out(["b"], "stories") and not capsys.readouterr().out
    with pytest.raises(UserError, match="no document of stories was held out by all of these runs"):
        write(folder / "elsewhere", {"x.md": prose(200, 400)})
        held_out(["b", trained(folder, "d", val_data="elsewhere")], "stories")


def test_of_a_run_with_documents_to_validate_with(folder):
    run = trained(folder, "run", val_data="other")
    assert {d.source for d in held_out([run], "stories")} == {d.source for d in held_out([run], "other")}
    assert len(held_out([run], "other")) == 11


def test_a_folder_that_the_run_does_not_know_is_named(folder, capsys):
    run = trained(folder, "run", val_fraction=0.3)
    assert held_out([run], "books")
    assert capsys.readouterr().out == "note: run was trained on stories, and may have seen documents of books\n"
    (folder / "strange").mkdir()
    assert held_out(["strange"], "stories") == held_out([trained(folder, "usual")], "stories")
    assert capsys.readouterr().out == "note: strange does not say what it was trained on\n"


@pytest.mark.parametrize("data", [{"val_fraction": 7}, {"val_fraction": "x"}, {"nobody": 1}])
def test_settings_that_cannot_be_understood(folder, data):
    (folder / "run").mkdir()
    (folder / "run" / "settings.json").write_text(json.dumps({"data": data}))
    with pytest.raises(UserError, match="cannot be understood"):
        held_out(["run"], "stories")
