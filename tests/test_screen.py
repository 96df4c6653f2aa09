"""What a person sees of a training: the lines of its screen, its picture, and its figures in TensorBoard."""

import math
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from small_runs import make_trainer, write_documents

from mamba2_min import plots
from mamba2_min.config import Mamba2Config
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.evaluation.perplexity import Score
from mamba2_min.inference import terminal
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.training import screen, tensorboard
from mamba2_min.training.metrics import MetricsLog, clock, read_metrics
from mamba2_min.training.tensorboard import Board, writer_class


class TestLines:
    def test_they_fit_eighty_columns_and_stand_in_columns(self, tmp_path, capsys):
        view = screen.Screen(lambda step: "a sample")
        trainer = make_trainer(tmp_path / "run", write_documents(tmp_path / "data"))
        trainer.seconds, trainer.step = 100 * 3600.0, 5
        with view.watching(trainer):
            for step, loss in ((1, 9.87654), (99_999, 0.1)):
                view.printed = -1000.0
                trainer.step = step
                view.report("step", {"step": step, "loss": loss, "lr": 1e-3, "tokens": 10**6, "seconds": 1.0})
                score = Score(loss * 100, 100, 300)
                view.report("evaluation", {"step": step, "score": score, "best": step == 1, "stale": 0})
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 5 and all(len(line) <= 80 for line in lines)
        training, validation = ([line for line in lines if name in line] for name in ("  training  ", "  validation  "))
        assert len({line.index(".") for line in (*training, *validation)}) == 1  # the losses, one below the other
        assert sum("| a sample" in line for line in lines) == 1  # of the best alone
        assert lines[1].endswith("*") and not lines[-1].endswith("*")

    def test_a_sample_is_known_words_to_the_end_of_a_sentence(self):
        words = [f" {a}{b}{c}" for a in "bcdfglmnprst" for b in "aeiou" for c in "bdfgklmnprst"]
        tokenizer = WordTokenizer(words, pattern="llama3")
        model = Mamba2LM(Mamba2Config(len(tokenizer), d_model=16, n_layer=1, headdim=8, d_state=4), seed=0)
        with torch.no_grad():
            model.backbone.embedding.weight[[0, 1 + ord(".")]] *= 3
        model.train()
        sample = screen.sample_of(model, tokenizer)
        text = sample(7)
        assert text == sample(8) and model.training  # one seed: samples of two steps show what the model has learnt
        letters = [part for part in text.replace(".", " ").split() if part.isalpha()]
        assert letters and all(tokenizer.encode(f" {word}")[0] > 256 for word in letters)
        assert text.endswith(("…", ".")) and "\n" not in text

    def test_the_optimizer_is_named(self, tmp_path, capsys):
        for name in ("adamw", "muon"):
            trainer = make_trainer(tmp_path / name, write_documents(tmp_path / "data"), optimizer=name)
            screen.show_training(trainer, "1 MB", "")
            assert f"recipe      small-corpus: {name}, warm-up " in capsys.readouterr().out

    def test_a_command_is_never_broken(self, monkeypatch, capsys):
        command = f"python train.py --out 'a folder' {'--preset tiny ' * 6}--resume"
        for columns, shown in ((0, f"go on with: {command}"), (200, f"go on with: {command}"), (80, "go on with:")):
            monkeypatch.setattr(terminal, "_columns", lambda stream, columns=columns: columns)
            screen.show_command("saved", "go on with", command)
            first, *rest = capsys.readouterr().out.splitlines()
            assert first == f"saved       {shown}" and rest == ([command] if columns == 80 else [])

    def test_a_clock(self):
        assert [clock(s) for s in (0, 59.4, 187, 7387)] == ["0:00", "0:59", "3:07", "2:03:07"]


def shaded(path, colour, alpha):
    """How many pixels of a picture have a colour and that alpha."""
    image = matplotlib.image.imread(path)
    alike = (np.abs(image[..., :3] * 255 - colour) < 6).all(-1) & (np.abs(image[..., 3] - alpha) < 0.02)
    return int(alike.sum())


class TestPicture:
    ORANGE = np.array([0xE0, 0x7B, 0x39])

    def records(self, losses):
        steps = [{"step": s, "split": "train", "loss": 6.0 - s / 100, "lr": 1e-3} for s in range(10, 110, 10)]
        return steps + [
            {"step": 20 * k, "split": "validation", "loss": loss, "bits_per_byte": loss / 3}
            for k, loss in enumerate(losses, start=1)
        ]

    def test_a_running_mean_does_not_lag(self):
        line = [100 - 0.5 * k for k in range(300)]
        assert plots._running_mean(line) == pytest.approx(line)
        noise = [1.0, -1.0] * 150
        assert max(abs(plots._running_mean(noise)[5:-5])) < 0.1 and len(plots._running_mean([])) == 0
        assert list(plots._running_mean([3.0, 1.0, 2.0])) == [3.0, 1.0, 2.0]

    def test_what_follows_the_best_is_shaded(self, tmp_path):
        for name, losses in (("after", [5.5, 5.0, 5.1, 5.3, 5.5]), ("never", [5.5, 5.4, 5.3, 5.2, 5.1])):
            plots.plot_loss(self.records(losses), tmp_path / f"{name}.png", "a run")
        assert shaded(tmp_path / "after.png", self.ORANGE, alpha=0.12) > 20_000
        assert shaded(tmp_path / "never.png", self.ORANGE, alpha=0.12) < 2000

    def test_the_right_axis_is_in_bits_per_byte(self, tmp_path, monkeypatch):
        figures = []
        monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
        plots.plot_loss(self.records([6.0, 4.5]), tmp_path / "x.png")
        plots.plot_loss([{**r, "bits_per_byte": 0} for r in self.records([6.0])], tmp_path / "x.png")
        (right,), none = figures[0].axes[0].child_axes, figures[1].axes[0].child_axes
        assert right.get_ylabel() == "validation, bits per byte" and none == []
        figures[0].canvas.draw()
        left = figures[0].axes[0].get_ylim()
        assert right.get_ylim() == pytest.approx([limit / 3 for limit in left])
        for figure in figures:
            plots.plt.close(figure)

    def test_a_run_that_has_hardly_begun(self, tmp_path):
        for records in ([], self.records([])[:1], self.records([5.0])[-1:]):
            plots.plot_loss(records, tmp_path / "x.png")
            assert matplotlib.image.imread(tmp_path / "x.png").size


class TestTensorBoard:
    def test_without_the_package_it_is_one_line(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(
            UserError, match=r"--tensorboard needs the package tensorboard: pip install .*\[tensorboard\]"
        ):
            writer_class()

    def scalars(self, folder):
        events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        found = events.EventAccumulator(str(folder))
        found.Reload()
        return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}

    def test_the_figures_are_those_of_metrics_jsonl_also_of_a_run_that_goes_on(self, tmp_path):
        pytest.importorskip("tensorboard")
        out, data = tmp_path / "run", write_documents(tmp_path / "data")
        for resume, most in ((False, 6), (True, 12)):
            trainer = make_trainer(out, data, resume=resume, max_steps=12)
            trainer.settings = trainer.settings.__class__(**{**vars(trainer.settings), "max_steps": most})
            with Board(out, trainer.step) as board:
                if resume:
                    board.write({"step": 2, "split": "train", "loss": math.nan})
                trainer.log.mirror = board.write
                trainer.train()
        expected = {}
        for record in read_metrics(out / "metrics.jsonl"):
            for name, value in record.items():
                if name not in ("step", "split", "best") and value is not None:
                    expected.setdefault(f"{name}/{record['split']}", {})[record["step"]] = value
        found = self.scalars(out / "tensorboard")
        assert found.keys() == expected.keys() and {"loss/train", "bits_per_byte/validation"} <= found.keys()
        for tag, values in expected.items():
            assert found[tag] == pytest.approx(values, rel=1e-6), tag

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        pytest.importorskip("tensorboard")
        (tmp_path / "tensorboard").write_text("in the way")
        with pytest.raises(UserError, match="is a file, where a folder is wanted"):
            Board(tmp_path)

    def test_its_folder_is_no_link(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tensorboard, "writer_class", lambda: pytest.fail("something is written"))
        (tmp_path / "outside").mkdir()
        (tmp_path / "tensorboard").symlink_to(tmp_path / "outside")
        with pytest.raises(UserError, match="tensorboard is a link, and links are not written through"):
            Board(tmp_path)


def test_what_is_appended_is_mirrored(tmp_path):
    log, got = MetricsLog(tmp_path / "metrics.jsonl"), []
    log.mirror = got.append
    log.append(step=1, split="train", loss=math.inf, lr=0.123456789)
    assert got == read_metrics(log.path) == [{"step": 1, "split": "train", "loss": None, "lr": 0.1234568}]
