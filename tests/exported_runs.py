"""Runs to export: a model with random weights that are not small and a vocabulary, in a folder as train.py does."""

from pathlib import Path

import torch

from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import Mamba2Config
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.training.runs import plan_run

DOCUMENTS = Path(__file__).resolve().parent.parent / "training_data" / "varied"
SHAPE = {"d_model": 32, "n_layer": 2, "d_state": 16, "headdim": 16}
TEXTS = [
    "The cat didn't see the cat. “It's 1984,” said the old cat…\r\n\r\n\tThe dog<start>naïve café",
    "我爱你。我爱他。他不爱我。你们好吗？ สวัสดีครับ ครับผม ภาษาไทย Привет, мир! 👍🏽 😀😁 e\u0301te\u0301",
]


def make_tokenizer(texts=TEXTS, pattern="llama3", special_words=("<start>",), **options):
    return WordTokenizer.train(texts, pattern=pattern, special_words=special_words, **options)


def make_model(vocab_size, seed=0, **shape):
    """A model whose logits are far from even: every parameter is drawn, none is left at its neutral start."""
    model = Mamba2LM(Mamba2Config(vocab_size, **{**SHAPE, **shape}), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name or "lm_head" in name:
                parameter.mul_(20)
            elif parameter.dim() == 1 and "A_log" not in name and "dt_bias" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def save_run(folder, model, tokenizer, data=DOCUMENTS):
    """A run's folder with what export reads: the model, the tokenizer, and where its documents are."""
    plan_run(folder, {"data": str(data), "pattern": tokenizer.pattern}).save(folder)
    model.save_pretrained(folder)
    tokenizer.save(Path(folder) / checkpoint.TOKENIZER)
    return Path(folder)
