"""Narrow weights: the products against the matrices written out, the model against its float self, run.py with them."""

from pathlib import Path

import forked
import pytest
import torch
from instruments import Allocated, relative_error

from mamba2_min.config import Mamba2Config
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.inference.completer import Completer
from mamba2_min.inference.quantize import KINDS, Bf16Matrix, Int8Matrix, load_quantized, quantize
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.ops.sampling import Sampler

SCRIPT = Path(__file__).resolve().parent.parent / "run.py"
TEXT = "Once upon a time a small owl lived in the old tower, and nobody in the town knew her name.\n"
V = 61
SHAPES = {
    "plain": {},
    "odd sizes": {"d_model": 15, "headdim": 5, "d_state": 7, "vocab_size": V, "pad_vocab_size_multiple": 7},
    "two groups": {"ngroups": 2, "norm_before_gate": True},
    "untied, with biases": {"tie_embeddings": False, "proj_bias": True, "conv_bias": False},
}
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_kind = pytest.mark.parametrize("kind", KINDS)


def build(**changes):
    sizes = {"d_model": 32, "n_layer": 2, "d_state": 16, "headdim": 16, "chunk_size": 8, "vocab_size": V}
    model = Mamba2LM(Mamba2Config(**{**sizes, **changes}), seed=0)
    r = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "embedding" in name or "lm_head" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=r))
    return model.eval()


def narrowed(weight, kind):
    """The float64 matrix that is meant, written out."""
    if kind == "bf16":
        return weight.bfloat16().double()
    step = (weight.abs().amax(1, keepdim=True) / 127).bfloat16().double()
    return torch.where(step > 0, step * (weight.double() / step).round(), 0.0)


def matrix(weight, kind):
    return (Int8Matrix if kind == "int8" else Bf16Matrix)(weight)


def with_narrow_matrices(model, kind):
    """A float model whose matrices are what the narrow ones stand for."""
    other = Mamba2LM(model.config, seed=0).eval()
    weights = model.state_dict()
    for name, weight in weights.items():
        if weight.dim() == 2:
            weights[name] = narrowed(weight, kind).float()
    other.load_state_dict(weights)
    return other


def ids(b, l):
    return torch.randint(V, (b, l), generator=torch.Generator().manual_seed(b * l))


@each_kind
@pytest.mark.parametrize("columns", [1, 7, 16, 33, 256])
@pytest.mark.parametrize("rows", [1, 3, 17, 1030])
def test_a_product_is_that_of_the_matrix_written_out(rows, columns, kind):
    r = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=r) * torch.logspace(-3, 3, rows)[:, None]
    weight[0] = 0
    meant = narrowed(weight, kind)
    narrow = matrix(weight, kind)
    assert torch.equal(narrow.widened().double(), meant)
    assert torch.equal(narrow.rows(torch.tensor([[rows - 1, 0]])).double(), meant[[rows - 1, 0]][None])
    for b in (1, 2, 8, 9, 40):
        x = torch.randn(b, columns, generator=r)
        exact = x.double() @ meant.T
        rounding = 2**-8 * (x.double().abs() @ meant.abs().T + exact.abs())
        got = narrow.product(x)
        assert got.dtype == torch.float32 and got.shape == (b, rows)
        assert ((got - exact).abs() <= rounding).all()


def test_a_narrow_weight_is_near_the_float_one():
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) ** 3
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((Int8Matrix(weight).widened() - weight).abs() <= 0.502 * step).all()
    assert ((Bf16Matrix(weight).widened() - weight).abs() <= weight.abs() / 256).all()


@each_kind
@each_shape
def test_a_model_computes_what_its_narrow_matrices_mean(shape, kind):
    model = build(**SHAPES[shape])
    reference, tokens = with_narrow_matrices(model, kind), ids(2, 30)
    with torch.no_grad():
        exact, _ = model(tokens)
        meant, _ = reference(tokens)
        quantize(model, kind)
        got, state = model(tokens)
    assert relative_error(got, meant) < 2e-2  # activations in bf16
    assert relative_error(got, exact) < 4e-2  # and the weights' own rounding
    assert all(t.dtype == torch.float32 for t in (got, *state.ssm, *state.conv, *model.initial_state().ssm))
    state, stepped = model.initial_state(2), []
    for t in range(30):
        logits, state = model.step(tokens[:, t], state)
        stepped.append(logits)
    assert relative_error(torch.stack(stepped, 1), meant) < 2e-2
    losses = [m.loss(tokens[:, :-1], tokens[:, 1:]) for m in (model, reference)]
    assert relative_error(*losses) < 1e-2


@each_kind
def test_a_tied_matrix_exists_once_and_the_model_is_small(kind):
    model = build(d_model=128, vocab_size=2000)
    before = sum(p.nbytes for p in model.parameters())
    quantize(model, kind)
    assert model.lm_head.matrix is model.backbone.embedding.matrix
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert sum(held.values()) < before * (0.3 if kind == "int8" else 0.55)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


@each_kind
def test_text_is_generated(kind):
    model = quantize(build(), kind)
    text = list(model.generate([1, 2, 3], 20, seed=0))
    assert len(text) == 20 and text == list(model.generate([1, 2, 3], 20, seed=0)) and all(type(i) is int for i in text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "owl"
    tokenizer = WordTokenizer.train([TEXT])
    build(vocab_size=len(tokenizer), d_model=64, n_layer=3).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@each_kind
def test_loading_gives_the_same_and_keeps_no_float_copy(folder, kind, tmp_path):
    expected = quantize(Mamba2LM.from_pretrained(folder), kind)
    size = (folder / "model.pt").stat().st_size
    with Allocated(tmp_path) as seen:
        model = load_quantized(folder, kind)
    assert seen.peak < 1.8 * size
    assert seen.kept < 0.7 * size
    vocabulary = model.config.vocab_size
    tokens = ids(1, 12) % vocabulary
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], expected(tokens)[0])


def test_what_cannot_be_is_said_in_one_line(folder, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="must be one of int8, bf16, not 'int4'"):
        quantize(build(), "int4")
    with pytest.raises(UserError, match="int8 weights are for a CPU, not for meta; take the device cpu"):
        quantize(build().to("meta"), "int8")
    with pytest.raises(UserError, match="bf16 weights are for a CPU, not for cuda; take the device cpu"):
        Completer.load(folder, "cuda", "bf16")
    with pytest.raises(UserError, match="a quantised model is not saved"):
        quantize(build(), "int8").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    with pytest.raises(UserError, match=r"^this PyTorch \(.*\) has no int8 product here; take bf16$"):
        quantize(build(), "int8")


@each_kind
def test_run_writes_with_narrow_weights(folder, kind):
    flags = ("--device", "cpu", "--quantize", kind, "--prompt", "The owl", "--max-tokens", 8, "--seed", 1)
    done = forked.command(SCRIPT, "--model", folder, *flags)
    assert (done.returncode, done.stderr.splitlines()[0].split(", ")[1][-len(f" in {kind}") :]) == (0, f" in {kind}")
    text = "".join(Completer.load(folder, weights=kind).complete("The owl", 8, Sampler(seed=1)))
    assert done.stdout.strip() == text.strip()


def test_run_refuses_another_width_in_one_line(folder):
    done = forked.command(SCRIPT, "--model", folder, "--quantize", "int4", "--prompt", "a")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "--quantize" in done.stderr and "int8" in done.stderr
