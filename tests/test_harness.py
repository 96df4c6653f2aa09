"""The lm-evaluation-harness on our models: its figures are sums that one can do by hand, and those of `--model hf`."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch

from mamba2_min.config import Mamba2Config
from mamba2_min.data.documents import Document
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.evaluation import task_files
from mamba2_min.models.mamba2 import Mamba2LM

ROOT = Path(__file__).parent.parent
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")

TEXT = "The cat sat on the mat . The dog sat on the cat . A bird sang in the tree , and the cat heard it ."


@pytest.fixture(scope="module")
def mamba():
    tokenizer = WordTokenizer.train([TEXT], min_count=1)
    config = Mamba2Config(len(tokenizer), d_model=32, n_layer=2, d_state=8, headdim=16, chunk_size=16)
    model = Mamba2LM(config, seed=0).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(40)  # a random model is nearly sure of nothing; this one is of something
    return model, tokenizer


def requests(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def by_hand(model, tokenizer, context, continuation):
    """One forward pass over everything, and the sum of the continuation's log-probabilities."""
    whole = [tokenizer.eos_id, *tokenizer.encode(context + continuation)]
    start = 1 + len(tokenizer.encode(context))
    with torch.no_grad():
        logs = model(torch.tensor([whole[:-1]]))[0][0].log_softmax(-1)
    picked = [(float(logs[i - 1, whole[i]]), int(logs[i - 1].argmax()) == whole[i]) for i in range(start, len(whole))]
    return sum(p for p, _ in picked), all(same for _, same in picked)


PAIRS = [
    ("The cat", " sat on the mat ."),
    ("The cat", " sang"),
    ("The cat", " sat on the mat . The dog sat on the cat . A bird"),
    ("", "The dog sat"),
    ("A bird sang in", " the tree"),
    ("A word unseen: xyzzy", " plugh"),
    (TEXT * 3, " The"),
]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_log_likelihoods_are_the_sum_by_hand_whatever_the_batch(mamba, batch_size):
    from mamba2_min.evaluation.lm_eval_model import Mamba2Eval

    found = Mamba2Eval(*mamba, batch_size).loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (value, greedy), pair in zip(found, PAIRS, strict=True):
        wanted, same = by_hand(*mamba, *pair)
        assert value == pytest.approx(wanted, abs=1e-4) and greedy == same


def test_a_space_before_the_border_belongs_to_the_continuation(mamba):
    from mamba2_min.evaluation.lm_eval_model import Mamba2Eval

    evaluated = Mamba2Eval(*mamba)
    pairs = requests(("The cat ", "sat"), ("The cat", " sat"))
    (first, _), (second, _) = evaluated.loglikelihood(pairs, disable_tqdm=True)
    assert first == pytest.approx(second, abs=1e-6)


def test_what_greedy_writing_gives_is_called_greedy(mamba):
    from mamba2_min.evaluation.lm_eval_model import Mamba2Eval

    evaluated = Mamba2Eval(*mamba)
    (text,) = evaluated.generate_until(requests(("The cat", {"until": [], "max_gen_toks": 6})), disable_tqdm=True)
    if text and mamba[1].encode("The cat" + text)[: len(mamba[1].encode("The cat"))] == mamba[1].encode("The cat"):
        ((_, greedy),) = evaluated.loglikelihood(requests(("The cat", text)), disable_tqdm=True)
        assert greedy


def test_writing_stops_before_a_stop_text(mamba):
    from mamba2_min.evaluation.lm_eval_model import Mamba2Eval

    evaluated = Mamba2Eval(*mamba)
    (text,) = evaluated.generate_until(requests(("The", {"until": [], "max_gen_toks": 20})), disable_tqdm=True)
    assert len(text) > 8
    stop = text[5:8]
    (cut,) = evaluated.generate_until(requests(("The", {"until": [stop], "max_gen_toks": 20})), disable_tqdm=True)
    assert cut == text[: text.index(stop)]


def test_a_long_text_goes_through_the_state(mamba):
    """Longer than any slice: equal to one pass over all of it."""
    from mamba2_min.evaluation.lm_eval_model import Mamba2Eval

    text = (TEXT + " ") * 40
    (found,) = Mamba2Eval(*mamba).loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    wanted, _ = by_hand(*mamba, "", text)
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def words():
    """One vocabulary as ours, and as a tokenizer of `transformers`: tokenizer, theirs(begin with the end token?)."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = WordTokenizer.train([TEXT], min_count=1, pattern="whitespace")
    vocabulary = {tokenizer.decode([i]).strip() or f"<{i}>": i for i in range(len(tokenizer))}
    end = next(word for word, i in vocabulary.items() if i == tokenizer.eos_id)

    def theirs(begin):
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if begin:
            special = [(end, tokenizer.eos_id)]
            made.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=special)
        return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=end, eos_token=end)

    return tokenizer, theirs


@pytest.mark.parametrize("made_by", ["mamba2_min", "transformers"])
def test_the_same_figures_as_hf_on_whole_tasks(made_by, words, tmp_path, monkeypatch):
    """`lm_eval --model hf` beside ours on the same random weights, made by either: equal to 1e-4."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    from mamba2_min.evaluation import harness
    from mamba2_min.evaluation.lm_eval_model import Mamba2Eval

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # runs `pip list` each time
    tokenizer, theirs_words = words
    sizes = {"vocab_size": len(tokenizer), "chunk_size": 16}
    if made_by == "mamba2_min":
        ours = Mamba2LM(Mamba2Config(**sizes, d_model=32, n_layer=2, d_state=8, headdim=16), seed=1).eval()
        ours.save_pretrained(tmp_path / "run", format="hf")
        theirs = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "run")
    else:
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16}
        shape |= {"n_groups": 1, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        theirs = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **shape))
        theirs.save_pretrained(tmp_path / "run")
        ours = Mamba2LM.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        for model in (ours, theirs.eval()):
            model.get_parameter("backbone.norm_f.weight").mul_(8)  # so that it is sure of something

    items = {
        "cloze": [{"text": "The cat sat on the", "word": " mat"}, {"text": "A bird sang in the", "word": " tree"}],
        "choice": [{"context": "The dog sat on", "choices": [" the cat .", " the mat .", " A bird"], "label": 1}],
        "perplexity": [{"text": TEXT}, {"text": "A bird sang"}],
    }
    for kind, made in items.items():
        task_files.write_items(tmp_path / f"{kind}.jsonl", made)
        task = harness.task_config(kind, "made", tmp_path / f"{kind}.jsonl")
        # A rolling task begins with the end token by itself; it would be counted twice.
        hf = HFLM(theirs, tokenizer=theirs_words(kind != "perplexity"), device="cpu", batch_size=1, max_length=512)
        found, wanted = (harness.evaluate_tasks(m, [task]) for m in (Mamba2Eval(ours, tokenizer), hf))
        for metric, value in wanted[f"made_{kind}"].items():
            if isinstance(value, float) and not math.isnan(value):
                assert found[f"made_{kind}"][metric] == pytest.approx(value, rel=1e-4), (kind, metric)
    hf = HFLM(theirs, tokenizer=theirs_words(True), device="cpu", batch_size=1, max_length=512)
    pairs = requests(*((i["text"], i["word"]) for i in items["cloze"]))
    ours_sums, their_sums = (m.loglikelihood(pairs, disable_tqdm=True) for m in (Mamba2Eval(ours, tokenizer), hf))
    for (a, same_a), (b, same_b) in zip(ours_sums, their_sums, strict=True):
        assert a == pytest.approx(b, abs=1e-4) and same_a == same_b


@pytest.fixture
def run_folder(mamba, tmp_path):
    model, tokenizer = mamba
    model.save_pretrained(tmp_path / "run")
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    return tmp_path / "run"


def command(*arguments, cwd):
    return forked.command("-m", "mamba2_min.evaluation.harness", *arguments, cwd=cwd)


def test_the_bundled_tasks_run_offline_and_agree_with_evaluate(run_folder, mamba, tmp_path):
    done = command("--model", run_folder, "--limit", 10, "--out", tmp_path / "results.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"stories_cloze", "stories_choice", "stories_perplexity"}
    assert 0 <= results["stories_choice"]["acc,none"] <= 1
    lines = (ROOT / "mamba2_min/evaluation/tasks/perplexity.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    texts = [json.loads(line)["text"] for line in lines]
    nats = -sum(by_hand(*mamba, "", text)[0] for text in texts)
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert results["stories_perplexity"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert "stories_choice" in done.stdout and "acc_norm" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1"),
        (["--include", "nowhere", "--tasks", "x"], "nowhere is not a folder"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(run_folder, tmp_path, arguments, message):
    done = command("--model", run_folder, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def test_tasks_of_a_folder_by_name_and_those_whose_data_is_missing(mamba, tmp_path):
    from mamba2_min.errors import UserError
    from mamba2_min.evaluation import harness
    from mamba2_min.evaluation.lm_eval_model import Mamba2Eval

    (tmp_path / "items.jsonl").write_text('{"text": "The cat sat on the", "word": " mat"}\n')
    task = (harness.TASKS / "cloze.yaml").read_text() + f"task: mine\ndataset_kwargs: {{data_files: {{test: {tmp_path}/"
    (tmp_path / "mine.yaml").write_text(task + "items.jsonl}}\n")
    (tmp_path / "away.yaml").write_text(task.replace("task: mine", "task: away") + "nothing.jsonl}}\n")
    model = Mamba2Eval(*mamba)
    found = harness.evaluate_tasks(model, ["mine"], str(tmp_path))
    wanted, greedy = by_hand(*mamba, "The cat sat on the", " mat")
    assert found["mine"]["perplexity,none"] == pytest.approx(math.exp(-wanted), rel=1e-3)
    assert found["mine"]["acc,none"] == greedy
    with pytest.raises(UserError, match="the data of away is not on this machine"):
        harness.evaluate_tasks(model, ["away"], str(tmp_path))


DOCUMENTS = [
    Document(
        f"The cat number {k} sat down. It looked at the river again. A bird flew over the river. "
        "It was a long day for the cat. Then it went home to the river. Everybody was glad about the bird.",
        f"x#{k}",
    )
    for k in range(6)
]


def test_items_are_what_they_say():
    for item in task_files.cloze(DOCUMENTS, 50):
        assert any(item["text"] + item["word"] in " ".join(task_files.sentences(d.text)) for d in DOCUMENTS)
        assert item["word"].strip() in item["text"]
    items = task_files.multiple_choice(DOCUMENTS, 50)
    assert items and items == task_files.multiple_choice(DOCUMENTS, 50)
    for item in items:
        whole = item["context"] + item["choices"][item["label"]]
        assert any(whole in " ".join(task_files.sentences(d.text)) for d in DOCUMENTS)
        assert len(item["choices"]) == 4
