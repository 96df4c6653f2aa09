"""Four synthetic tasks of recall: what a model can find in the tokens it has read. Knowledge of text does not help.

    selective copying   repeat the letters that stood between blanks               (Mamba, arXiv:2312.00752, 4.1.1)
    induction heads     which token followed the marker the last time?             (Mamba, 4.1.2)
    associative recall  a list of pairs, then its keys: which value has each?      (Zoology, arXiv:2312.04927;
                                                                                    Mamba-2, arXiv:2405.21060, 9.1)
    parity              are the ones so far odd in number? a bit that flips        (arXiv:2411.12537)

A task is a function that draws a batch: input_ids (b, l), and targets (b, l), which hold the answer at each question
and -100 elsewhere. As in `LanguageModel.loss`, a target stands at the token after which it must be known, and it always
follows from the tokens up to there. A generator in the same state draws the same batch, on the generator's device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mamba2_min import validate
from mamba2_min.models.base import LanguageModel, decay_groups
from mamba2_min.models.evaluating import evaluating
from mamba2_min.ops.loss import IGNORE

Batch = tuple[Tensor, Tensor]  # input_ids, targets

BLANK = 0  # between the letters to be copied, and between the questions of associative recall
_LARGEST = 2**31 - 1


def selective_copying(batch: int, length: int, n_data: int, generator: torch.Generator, vocab_size: int = 16) -> Batch:
    """Letters at random places among blanks; at the end one marker per letter, to be answered by the letters in order.

    Returns input_ids and targets (batch, length). `n_data` letters, ids 1 to vocab_size - 2, stand among the first
    length - n_data tokens, the rest of which are 0; then come n_data markers, vocab_size - 1, and the k-th marker's
    target is the k-th letter. A guess is right once in vocab_size - 2 times. The distances between letters are random,
    so no fixed filter can solve it (Mamba, figure 2). The paper: length 4096, n_data 16, vocab_size 16.
    Raises ValueError where the letters do not fit or the vocabulary leaves fewer than two.
    """
    _check(batch=batch, length=length, n_data=n_data, vocab_size=vocab_size)
    room = length - n_data
    if n_data > room:
        raise ValueError(f"{n_data} letters and as many markers need a length of {2 * n_data}, not {length}")
    if vocab_size < 4:
        raise ValueError(f"a blank, a marker and two letters need a vocab_size of 4, not {vocab_size}")
    device = generator.device
    letters = torch.randint(1, vocab_size - 1, (batch, n_data), generator=generator, device=device)
    places = _distinct(batch, room, n_data, generator).sort(1).values
    input_ids = torch.full((batch, length), BLANK, device=device)
    input_ids[:, room:] = vocab_size - 1
    targets = torch.full((batch, length), IGNORE, device=device)
    targets[:, room:] = letters
    return input_ids.scatter_(1, places, letters), targets


def induction_heads(batch: int, length: int, generator: torch.Generator, vocab_size: int = 16) -> Batch:
    """A marker stands once among random letters, and again at the end: which letter followed it the first time?

    Returns input_ids and targets (batch, length). The marker is vocab_size - 1, the other tokens are drawn from 0 to
    vocab_size - 2; the only target is the last. A guess is right once in vocab_size - 1 times.
    The paper: length 256, vocab_size 16, tested up to 2^20.
    Raises ValueError for a length under 3 or fewer than two letters.
    """
    _check(batch=batch, length=length, vocab_size=vocab_size)
    if length < 3:
        raise ValueError(f"a marker, a letter and the marker again need a length of 3, not {length}")
    if vocab_size < 3:
        raise ValueError(f"a marker and two letters need a vocab_size of 3, not {vocab_size}")
    device = generator.device
    input_ids = torch.randint(0, vocab_size - 1, (batch, length), generator=generator, device=device)
    place = torch.randint(0, length - 2, (batch, 1), generator=generator, device=device)
    targets = torch.full((batch, length), IGNORE, device=device)
    targets[:, -1:] = input_ids.gather(1, place + 1)
    input_ids.scatter_(1, place, vocab_size - 1)[:, -1] = vocab_size - 1
    return input_ids, targets


def associative_recall(
    batch: int,
    length: int,
    n_pairs: int,
    generator: torch.Generator,
    vocab_size: int = 64,
    power: float = 0.01,
    random_fill: bool = False,
) -> Batch:
    """Multi-query associative recall (MQAR): pairs of key and value, then each key again, to be answered by its value.

    Returns input_ids and targets (batch, length). Keys are drawn from 1 to vocab_size // 2 - 1, values from
    vocab_size // 2 to vocab_size - 1, both without repetition in a row. The first 2 n_pairs tokens are key, value, key,
    value ...; the questions stand at even places after them. The other tokens are 0, or with `random_fill` any. The gap
    g between the pairs and a question has a probability of about (g + 1)^(power - 1), as in Zoology: mostly short,
    sometimes long.
    A model that knows the values but not their keys is right once in n_pairs times.
    The papers: vocab_size 8192, up to 64 pairs in a length of 512 (Zoology); as many pairs as fit, a quarter of the
    length, and `random_fill` (Mamba-2).
    Raises ValueError for an odd length, or where the pairs do not fit into a quarter of it or into the vocabulary.
    """
    _check(batch=batch, length=length, n_pairs=n_pairs, vocab_size=vocab_size)
    if length % 2:
        raise ValueError(f"the length must be even, not {length}")
    if 4 * n_pairs > length:
        raise ValueError(f"{n_pairs} pairs and as many questions need a length of {4 * n_pairs}, not {length}")
    half, device = vocab_size // 2, generator.device
    if n_pairs > half - 1:
        raise ValueError(f"a vocab_size of {vocab_size} has {max(half - 1, 0)} keys, and {n_pairs} are asked for")
    keys = _distinct(batch, half - 1, n_pairs, generator) + 1
    values = _distinct(batch, vocab_size - half, n_pairs, generator) + half
    start = 2 * n_pairs
    gaps = torch.arange(1.0, (length - start) // 2 + 1, device=device) ** (power - 1)
    places = start + 2 * torch.multinomial(gaps.expand(batch, -1), n_pairs, generator=generator)
    input_ids = torch.full((batch, length), BLANK, device=device)
    if random_fill:
        input_ids = torch.randint(vocab_size, (batch, length), generator=generator, device=device)
    input_ids[:, 0:start:2], input_ids[:, 1:start:2] = keys, values
    targets = torch.full((batch, length), IGNORE, device=device)
    return input_ids.scatter_(1, places, keys), targets.scatter_(1, places, values)


def parity(batch: int, length: int, generator: torch.Generator) -> Batch:
    """Random zeros and ones; the target is 1 where the ones so far are odd in number. A guess is right half the time.

    Returns input_ids and targets (batch, length); the vocabulary has two tokens. A diagonal state whose factors lie
    between 0 and 1, as Mamba-2's, cannot solve it at all lengths; one that may multiply by -1 can (arXiv:2411.12537).
    """
    _check(batch=batch, length=length)
    input_ids = torch.randint(0, 2, (batch, length), generator=generator, device=generator.device)
    return input_ids, input_ids.cumsum(1) % 2


def train_on_task(
    model: LanguageModel,
    make_batch: Callable[[torch.Generator], Batch],
    steps: int,
    lr: float = 5e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> list[float]:
    """Trains a model on a fresh batch per step, and returns the loss of each step in nats per answer.

    `make_batch(generator)` draws a batch. AdamW with betas (0.9, 0.95), gradients clipped at 1; the learning rate rises
    to `lr` in the first tenth of the steps, at most 50, and falls linearly to a tenth of it.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        decay_groups(model, weight_decay), lr=lr, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda")
    )
    warmup, losses = max(1, min(50, steps // 10)), []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * (1 - 0.9 * step / steps)
        input_ids, targets = make_batch(generator)
        loss = model.loss(input_ids.to(device), targets.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> float:
    """The share of a batch's targets that the model finds likeliest. The model's training mode is restored."""
    device = next(model.parameters()).device
    input_ids, targets = (t.to(device) for t in batch)
    with evaluating(model):
        answers = model(input_ids)[0].argmax(-1)
    asked = targets != IGNORE
    return (answers == targets)[asked].double().mean().item()


def _distinct(batch: int, n: int, k: int, generator: torch.Generator) -> Tensor:
    """k different integers below n for each row, in random order: (batch, k)."""
    return torch.rand(batch, n, generator=generator, device=generator.device).argsort(1)[:, :k]


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        validate.integer(name, size, 1, _LARGEST)
