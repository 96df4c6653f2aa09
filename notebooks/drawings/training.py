"""The pictures of notebooks 4 and 5: documents, words, loss curves, and how a model writes."""

import torch

from mamba2_min import plots
from mamba2_min.plots import plt


def kinds(train, validation):
    """How many documents of each kind are in either part, two counters."""
    names = sorted(train, key=lambda kind: -train[kind])
    _, ax = plt.subplots(figsize=(7, 2))
    below = [train[kind] for kind in names]
    ax.bar(names, below, color=plots.BLUE, label="training")
    ax.bar(names, [validation[kind] for kind in names], bottom=below, color=plots.ORANGE, label="validation")
    ax.set_title("documents of each kind")
    ax.tick_params(axis="x", labelrotation=30)
    ax.legend(fontsize=8)


def vocabulary(counts, sizes, lengths):
    """How often the words occur, by rank, and how many tokens a word of new text takes, by size of the vocabulary."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 2.4))
    left.plot(range(1, len(counts) + 1), counts, color=plots.BLUE)
    left.set(title="how often the words of the vocabulary occur", xscale="log", yscale="log", xlabel="rank of the word")
    right.plot(sizes, lengths, "o-", color=plots.ORANGE)
    right.set(title="tokens for one word of new text", xscale="log", xlabel="size of the vocabulary", ylim=(1, 5.5))
    right.set_xticks(sizes, sizes)
    right.minorticks_off()


def passes(windows):
    """The windows of several passes over one stream, each a list of (first place, tokens) in the order of reading."""
    _, ax = plt.subplots(figsize=(9, 1.9))
    colours = plt.get_cmap("viridis")
    for epoch, bars in enumerate(windows):
        for order, (first, length) in enumerate(bars, start=1):
            colour = colours(order / (len(bars) + 2))
            ax.barh(epoch, length, left=first - 0.5, height=0.8, color=colour, edgecolor=plots.CARD)
            ax.text(first + length // 2, epoch, order, ha="center", va="center", color="white", fontsize=9)
    ax.set(title="three passes over one stream: each bar a window, its number the turn at which it is read")
    ax.set(xlabel="place in the stream", yticks=range(3), yticklabels=["1st pass", "2nd pass", "3rd pass"])
    ax.invert_yaxis()
    ax.grid(False)


def two_measures(sizes, perplexities, bits):
    """Perplexity and bits per byte of one model with vocabularies of several sizes."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 2.2))
    for ax, values, title, colour in (
        (left, perplexities, "perplexity: the fewer tokens, the better?", plots.BLUE),
        (right, bits, "bits per byte: the more words, the better", plots.ORANGE),
    ):
        ax.bar([f"{size:,}" for size in sizes], values, color=colour)
        ax.set(title=title, xlabel="tokens in the vocabulary")


def run(train, validation, rates, levels):
    """A training: losses (steps, values), the learning rate below, and the losses of models without a network."""
    _, (top, bottom) = plt.subplots(2, 1, figsize=(8, 3.6), height_ratios=(4, 1), sharex=True)
    for name, loss in levels.items():
        top.axhline(loss, color=plots.GREY, linestyle="--", linewidth=0.8)
        top.text(train[0][-1], loss + 0.05, name, ha="right", fontsize=8)
    top.plot(*train, color=plots.BLUE, label="training, as it came")
    top.plot(*validation, "o-", color=plots.ORANGE, markersize=3, label="validation, exact")
    top.set(title="a training, in nats per token", ylim=(3, 8))
    top.legend(fontsize=8, loc=(0.6, 0.4))
    bottom.plot(*rates, color=plots.GREY)
    bottom.set(xlabel="step", ylabel="learning\nrate")


def insides(models):
    """Histograms by layer, {model: (what each block adds, gradients of each in_proj)}: one row per model."""
    _, axes = plt.subplots(len(models), 2, figsize=(9, 1.75 * len(models)), squeeze=False)
    for row, (name, (added, gradients)) in zip(axes, models.items(), strict=True):
        for ax, tensors, what in zip(row, (added, gradients), ("a block adds", "gradient of in_proj"), strict=True):
            for k, values in enumerate(tensors):
                size = values.abs().clamp(min=1e-12).log10()
                counts = torch.histc(size, 60, -8, 2)
                shade = plt.get_cmap("viridis")(k / len(tensors))
                ax.plot(torch.linspace(-8, 2, 60), counts / counts.sum(), color=shade, label=f"layer {k}")
            ax.set(title=f"{name}: size of what {what}" if ax is row[0] else f"{name}: {what}", yticks=[])
    for ax in axes[-1]:
        ax.set_xlabel("powers of ten")
    axes[0][0].legend(fontsize=7, loc="upper left")


def overfitting(train, validation, best, other):
    """Losses on few documents on the left, with the best marked; validation beside that of all documents."""
    steps, losses = validation
    _, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3), sharey=True)
    left.plot(*train, color=plots.BLUE, label="training")
    left.plot(steps, losses, "o-", color=plots.ORANGE, markersize=3, label="validation")
    left.plot(*best, "*", color=plots.GREEN, markersize=13, label="the best, which is kept")
    left.axvspan(best[0], steps[-1], color=plots.ORANGE, alpha=0.1)
    left.text((best[0] + steps[-1]) / 2, 5.6, "learning it by heart", ha="center", fontsize=9)
    left.set(title="a fifth of the documents", xlabel="step", ylabel="nats per token", ylim=(1.8, 6.5))
    left.legend(fontsize=8, loc="lower left")
    right.plot(steps, losses, "o-", color=plots.ORANGE, markersize=3, label="a fifth of the documents")
    right.plot(*other, "o-", color=plots.GREEN, markersize=3, label="all of them")
    right.set(title="validation, the same steps", xlabel="step")
    right.legend(fontsize=8)


def rates(curves, lost, other, default):
    """Training losses at several peak rates, and what each rate loses against the best, here and elsewhere."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2))
    for k, (lr, curve) in enumerate(curves.items()):
        shade = plt.get_cmap("viridis")(k / len(curves))
        left.plot(*curve, color=shade, linewidth=3 if lr == default else 1.2, label=f"{lr:g}")
    left.set(title=f"training loss at {len(curves)} peak rates", xlabel="step", ylim=(3.2, 8))
    left.legend(fontsize=7, ncol=4, loc="lower left")
    right.plot(lost.keys(), lost.values(), "o-", label="here: 0.3M parameters, one pass")
    right.plot(other.keys(), other.values(), "o-", markersize=3, label="4M parameters, five passes (docs/LOG.md)")
    right.axvline(default, color=plots.GREEN, linestyle="--", linewidth=1)
    right.text(default, 0.7, " the default, 5e-3", color=plots.GREEN, fontsize=9)
    right.set(title="bits per byte lost against the best rate", xscale="log", xlabel="peak learning rate")
    right.legend(fontsize=8)


def by_place(missing):
    """A bar per place of a window."""
    plt.figure(figsize=(6, 2))
    plt.bar(range(len(missing)), missing)
    plt.title("nats lost, by place in the window")
