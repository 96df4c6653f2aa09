"""How a training begins: from another model (`--init-from`), and with a recipe (`--recipe`)."""

import json
import sys

import pytest
import torch
from small_runs import SHAPE, assert_same_run, load_script, write_documents

from mamba2_min import Mamba2Config, Mamba2LM, WordTokenizer
from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import DROPOUTS
from mamba2_min.errors import UserError
from mamba2_min.recipes import PEAKS, RECIPES, peak_rate, recipe
from mamba2_min.settings import Settings
from mamba2_min.training.runs import plan_run, read_plan
from mamba2_min.training.trainer import Trainer

SHORT = ["--context", "16", "--batch-size", "3", "--threads", "1", "--device", "cpu", "--max-steps", "6"]
SHORT += ["--eval-every", "3", "--save-every", "2", "--warmup-steps", "2"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("new"), seed=5)


@pytest.fixture(scope="module")
def base(tmp_path_factory, documents):
    """The folder of a model, untrained, whose vocabulary has the words of the documents but not their numbers."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = WordTokenizer.train(["The owl saw the fox. The hen saw the cat. That was story."], min_count=1)
    model = Mamba2LM(Mamba2Config(len(tokenizer), **{**SHAPE, "dropout": 0.1, "tie_embeddings": False}), seed=3)
    model.save_pretrained(folder)
    tokenizer.save(folder / checkpoint.TOKENIZER)
    return folder


@pytest.fixture
def train(monkeypatch, capsys, tmp_path, documents):
    """train.py in this process: what it printed, or the line of its UserError."""
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def call(*arguments, out="run"):
        monkeypatch.setattr(
            sys, "argv", ["train.py", "--data", str(documents), "--out", str(out), *SHORT, *map(str, arguments)]
        )
        try:
            assert load_script().main() == 0
        except UserError as error:
            assert "\n" not in str(error)
            return str(error)
        finally:
            printed = capsys.readouterr()
        return printed.out + printed.err

    yield call
    torch.set_num_threads(threads)


class TestInitFrom:
    def test_it_begins_with_weights_tokenizer_and_shape_of_the_base(self, train, base, tmp_path, monkeypatch):
        begun = {}
        step = Trainer._step

        def watched(trainer):
            begun.setdefault("model", {name: t.clone() for name, t in trainer.model.state_dict().items()})
            step(trainer)

        monkeypatch.setattr(Trainer, "_step", watched)
        said = train("--init-from", base, "--dropout", "0.3")
        before = Mamba2LM.from_pretrained(base)
        assert begun["model"].keys() == before.state_dict().keys()
        assert all(torch.equal(begun["model"][name], t) for name, t in before.state_dict().items())
        after = Mamba2LM.from_pretrained(tmp_path / "run")
        assert {**after.config.to_dict(), "dropout": 0.1} == before.config.to_dict()
        assert after.config.dropout == 0.3
        assert not torch.equal(after.backbone.embedding.weight, before.backbone.embedding.weight)
        assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        assert "begins as" in said and "outside the vocabulary" in said

    def test_the_first_loss_is_that_of_the_base_and_it_falls(self, train, base, tmp_path):
        train("--init-from", base, "--max-steps", "30", "--lr", "0.01")
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if line["split"] == "validation"]
        assert losses[-1] < losses[0]

    def test_it_resumes_to_the_bit_without_the_base(self, train, base, tmp_path, monkeypatch):
        import shutil

        moved = tmp_path / "moved"
        shutil.copytree(base, moved)
        train("--init-from", moved, out="whole")
        step, steps = Trainer._step, []

        def killed(trainer):
            if len(steps) == 5:
                raise RuntimeError("killed")
            steps.append(0)
            step(trainer)

        monkeypatch.setattr(Trainer, "_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train("--init-from", moved, out="parts")
        monkeypatch.setattr(Trainer, "_step", step)
        shutil.rmtree(moved)
        train("--init-from", moved, "--resume", out="parts")
        assert_same_run(tmp_path / "whole", tmp_path / "parts")

    def test_the_layout_of_hugging_face_is_read_too(self, train, base, tmp_path):
        pytest.importorskip("safetensors")
        Mamba2LM.from_pretrained(base).save_pretrained(tmp_path / "hf", format="hf")
        assert "tokenizer.json" in train("--init-from", tmp_path / "hf")
        WordTokenizer.load(base / "tokenizer.json").save(tmp_path / "hf" / "tokenizer.json")
        assert "begins as" in train("--init-from", tmp_path / "hf")

    def test_many_bytes_are_told_with_what_to_do(self, train, tmp_path):
        tokenizer = WordTokenizer.train(["nothing of that"], min_count=1)
        Mamba2LM(Mamba2Config(len(tokenizer), **SHAPE), seed=0).save_pretrained(tmp_path / "far")
        tokenizer.save(tmp_path / "far" / "tokenizer.json")
        said = train("--init-from", tmp_path / "far")
        assert "which spells them letter by letter; a new model with a vocabulary of its own" in said

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--init-from", "nowhere"], "nowhere is not a folder"),
            (["--init-from", ""], "init_from must name a folder"),
            (["--init-from", "BASE", "--d-model", "32"], "--d-model 32 cannot be: it is 16 in"),
            (["--init-from", "BASE", "--preset", "tiny"], "--preset cannot be given with --init-from"),
            (["--init-from", "BASE", "--vocab-size", "500"], "--vocab-size cannot be given with --init-from"),
            (["--init-from", "BASE", "--out", "BASE", "--overwrite"], "--out and --init-from are one folder"),
        ],
        ids=lambda value: None if isinstance(value, str) else " ".join(value),
    )
    def test_what_cannot_be_is_one_line(self, train, base, tmp_path, arguments, message):
        before = {path.name: path.read_bytes() for path in base.iterdir() if path.suffix != ".lock"}
        assert message in train(*(str(base) if word == "BASE" else word for word in arguments))
        after = {path.name: path.read_bytes() for path in base.iterdir() if path.suffix != ".lock"}
        assert after.items() >= before.items()

    def test_another_models_tokenizer_and_an_adapter_are_refused(self, train, base, tmp_path):
        Mamba2LM(Mamba2Config(999, **SHAPE), seed=0).save_pretrained(tmp_path / "odd")
        WordTokenizer.load(base / "tokenizer.json").save(tmp_path / "odd" / "tokenizer.json")
        assert "tokens and the model 999" in train("--init-from", tmp_path / "odd")
        (tmp_path / "adapter").mkdir()
        assert "holds no config.json" in train("--init-from", tmp_path / "adapter")

    def test_a_run_does_not_change_what_it_began_from(self, train, base, tmp_path):
        train("--init-from", base)
        assert "--init-from was" in train("--resume", "--init-from", tmp_path / "other")


class TestRecipes:
    def test_the_peaks_are_those_of_the_table(self):
        """arXiv:2005.14165, table 2.1, and arXiv:2312.00752, table 12."""
        assert [peak_rate(int(n)) for n in (125e6, 350e6, 760e6, 1.3e9)] == [6e-4, 3e-4, 2.5e-4, 2e-4]
        assert [peak_rate(int(n)) for n in (1e6, 135e6, 370e6, 2.7e9)] == [6e-4, 6e-4, 3e-4, 1.6e-4]
        assert list(PEAKS.values()) == sorted(PEAKS.values(), reverse=True)

    def test_the_papers_recipes(self):
        training, model = recipe("improved", 4_000_000)
        s = Settings(**training)
        assert (s.lr, s.min_lr, s.beta1, s.beta2, s.weight_decay, s.clip) == (3e-3, 1e-5, 0.9, 0.95, 0.1, 1.0)
        assert model == dict.fromkeys(DROPOUTS, 0.0)
        s = Settings(**recipe("gpt3", 4_000_000)[0])
        assert (s.lr, s.beta2, s.weight_decay) == (6e-4, 0.999, 0.1) and s.min_lr == 6e-5
        assert recipe("small-corpus", 1) == ({}, {})
        with pytest.raises(ValueError, match="recipe must be one of"):
            recipe("gpt4", 1)
        assert RECIPES[0] == Settings.recipe

    def test_against_learning_by_heart(self, train):
        training, model = recipe("many-epochs", 4_000_000)
        assert model["dropout"] == 0 < model["variational_dropout"]  # dropout of blocks did harm: docs/quality.md
        s = Settings(**training)
        assert (s.epochs, s.lr, s.ema_decay, s.patience * s.eval_every) == (60, 3e-3, 0.999, 4000)
        said = train("--recipe", "many-epochs", "--d-model", "16", "--n-layer", "1", "--headdim", "8")
        assert "dropout 0, 0.5 of channels, 0.1 of words, average of weights 0.999" in said

    def test_flags_beside_it_win(self, tmp_path):
        spec = plan_run(tmp_path, {"recipe": "improved", "lr": 1e-2, "dropout": 0.2}, preset="tiny")
        assert (spec.training.lr, spec.training.beta2, spec.model["dropout"]) == (1e-2, 0.95, 0.2)
        spec = plan_run(tmp_path, {"recipe": "gpt3", "vocab_size": 50_257}, preset="base")
        assert (spec.training.lr, spec.model["dropout"]) == (6e-4, 0.0)  # 160 million
        assert plan_run(tmp_path, {}).training == Settings()

    @pytest.mark.parametrize("name", RECIPES)
    def test_a_run_from_a_preset_and_a_recipe_resumes_as_it_was_begun(self, tmp_path, name):
        """The recipe sets another dropout than the preset."""
        begun = {"recipe": name, "data": "documents"}
        plan_run(tmp_path, begun, preset="tiny").save(tmp_path)
        (tmp_path / "last.pt").touch()
        assert plan_run(tmp_path, begun, preset="tiny", resume=True).training.recipe == name
        with pytest.raises(UserError, match="did not begin with --preset small"):
            plan_run(tmp_path, begun, preset="small", resume=True)

    def test_a_run_keeps_its_recipe(self, train, tmp_path):
        said = train("--recipe", "improved", "--d-model", "16", "--n-layer", "1", "--headdim", "8")
        assert "learning rate 0.003 to 1e-05" in said
        assert "improved: adamw, warm-up 1 steps, decay 0.1, betas (0.9, 0.95), clip 1, dropout 0" in said
        saved = read_plan(tmp_path / "run").training
        assert (saved.recipe, saved.lr, saved.beta2) == ("improved", 3e-3, 0.95)
        assert "--recipe was improved when" in train("--resume", "--recipe", "gpt3")
        train("--resume", "--recipe", "improved")
