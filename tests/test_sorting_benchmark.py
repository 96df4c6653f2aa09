"""The sorting benchmark's rows, their order and their table, on made numbers."""

from __future__ import annotations

import json

from benchmarks import classification, seed_table, sorting_table

ROWS = list(classification.rows([0, 1, 2]))


def test_every_row_is_named_once_and_has_a_name_for_readers():
    assert len(ROWS) == len(set(ROWS))
    for row in ROWS:
        task, model, method, _ = row.split("/")
        assert task in sorting_table.TASKS and model in sorting_table.NAMES and method in sorting_table.METHODS
    assert {row.split("/")[2] for row in ROWS if row.split("/")[1] == "gpt-neo"} == {"scratch", "full", "lora"}


def test_the_first_seed_of_everything_comes_before_the_second_of_anything():
    only = ["sms/mamba2/lora/", "banking77/mamba2/full/"]
    rows = classification.rows([2, 0])
    assert classification.in_turn(rows, only, [2, 0]) == [f"{name}{seed}" for seed in (2, 0) for name in only]
    assert classification.in_turn(ROWS, [""], [0, 1, 2])[-1].endswith("/2")


def test_a_models_name_says_its_family_and_its_pooling():
    assert classification.split_name("mamba2-last") == ("mamba2", "last")
    assert classification.split_name("mamba2-words") == ("mamba2", classification.POOL)
    assert classification.split_name("gpt-neo-words") == ("gpt-neo", classification.POOL)


def test_the_table_has_means_over_seeds_and_only_the_rows_asked_for(tmp_path):
    rows = [
        {"row": "pretraining/mamba2", "loss": 4.0},
        {"row": "sms/mamba2/lora/0", "accuracy": 0.98, "spam_f1": 0.94, "trained_parameters": 1234, "seconds": 60},
        {"row": "sms/mamba2/lora/1", "accuracy": 0.96, "spam_f1": 0.92, "trained_parameters": 1234, "seconds": 120},
        {"row": "sms/tfidf-best/-/0", "accuracy": 0.97, "spam_f1": 0.96, "seconds": 6},
        {"row": "banking77/gpt-neo/full/0", "accuracy": 0.9, "trained_parameters": 99, "seconds": 60},
    ]
    result = {
        "benchmark": "classification",
        "machine": {"cpu": "a CPU", "threads": 1},
        "versions": {"torch": "2", "transformers": "5"},
        "rows": rows,
    }
    (tmp_path / "classification-cpu.json").write_text(json.dumps(result))
    marks = "<!-- benchmark:classification-cpu/sms/ -->\n{}<!-- /benchmark:classification-cpu/sms/ -->\n"
    new, missing = seed_table.rewrite(marks.format(""), tmp_path)
    assert missing == []
    assert new.splitlines()[4:6] == [
        "| SMS spam | TF-IDF, words and letters | 97.0 | 0.960 |  | 0.1 | 1 |",
        "|  | Mamba-2, LoRA | 97.0 (96.0 to 98.0) | 0.930 (0.920 to 0.940) | 1,234 | 1.5 | 2 |",
    ]
    assert "GPT-Neo" not in new and "a CPU" in new
    assert seed_table.rewrite(new, tmp_path)[0] == new


def test_rows_of_chosen_weights_are_marked():
    row = {
        "row": "sms/mamba2/full/0",
        "accuracy": 0.9,
        "spam_f1": 0.9,
        "trained_parameters": 1,
        "seconds": 60,
        "epochs": 12,
    }
    assert "all weights*" in sorting_table.table([row]) and "lowest validation loss" in sorting_table.table([row])
    assert "*" not in sorting_table.table([row | {"weights": "last"}])
