"""The pictures of notebook 6: games of memory, and what came of them."""

import torch

from mamba2_min import plots
from mamba2_min.plots import plt

SMALL = "abcdefghijklmnop"
KINDS = {"·01": plots.CARD, "?!ABCDEFGHIJKLMNO": plots.ORANGE, SMALL: plots.BLUE}


def _row(ax, y, ids, names, colours):
    for place, token in enumerate(ids):
        if token >= 0:
            colour = next(c for signs, c in colours.items() if names[token] in signs)
            ax.add_patch(plt.Rectangle((place, y), 0.92, 0.86, facecolor=colour, alpha=0.3))
            ax.text(place + 0.46, y + 0.43, names[token], ha="center", va="center", fontsize=9)


def games(drawn):
    """One row of each game: what is read, and in green what is to be answered; {name: ((ids, targets), signs)}."""
    _, axes = plt.subplots(len(drawn), 1, figsize=(8.5, 1.15 * len(drawn)))
    for ax, (name, ((ids, targets), names)) in zip(axes, drawn.items(), strict=True):
        _row(ax, 1, ids[0].tolist(), names, KINDS)
        _row(ax, 0, targets[0].tolist(), names, {SMALL + "01": plots.GREEN})
        ax.set(xlim=(0, 24), ylim=(0, 2), title=name)
        ax.axis("off")


def dictionary(row, size):
    """How a list of pairs fills a dictionary: entries by token read, beside a state of fixed size."""
    _, ax = plt.subplots(figsize=(6, 1.9))
    ax.step(range(1, len(row) + 1), row, where="mid", label="entries in the dictionary")
    ax.axhline(size, color=plots.ORANGE, label="a state: as many rows as ever")
    ax.set(title="what has to be kept", xlabel="tokens read")
    ax.legend(fontsize=8)


def training(curves, shares, guess, title, unit):
    """Smoothed losses in training on the left, shares of right answers on the right."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 2.4), width_ratios=(1.3, 1))
    for name, losses in curves.items():
        left.plot(torch.tensor(losses).unfold(0, 20, 5).mean(1).repeat_interleave(5), label=name)
    left.set(title=f"{title}: loss in training, nats per {unit}", xlabel="step")
    right.barh(list(shares), list(shares.values()), color=[plots.BLUE, plots.ORANGE, plots.GREEN][: len(shares)])
    right.axvline(guess, color=plots.GREY, linestyle="--", linewidth=1)
    right.set(title=f"{unit}s right (dashed: guessing)", xlim=(0, 1.15))
    right.invert_yaxis()
    for row, value in enumerate(shares.values()):
        right.text(value, row, f" {value:.0%}", va="center", fontsize=8)
    left.legend(fontsize=8)


def given_up(shares, names, signs):
    """The share of its state that each head (row) gives up at each token."""
    figure, ax = plt.subplots(figsize=(7.5, 2.5))
    image = plots.draw_matrix(ax, shares, "the share of its state that each head gives up at each token", limit=1)
    ax.set_aspect("auto")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xticks(range(len(signs)), signs, fontsize=9)
    figure.colorbar(image, ax=ax, ticks=[0, 0.5, 1], boundaries=torch.linspace(0, 1, 50).tolist(), shrink=0.9)


def by_length(lengths, reached, trained_at, guess, title):
    """Shares of right answers by length, {model: values}."""
    _, ax = plt.subplots(figsize=(6.5, 2.8))
    for name, values in reached.items():
        ax.plot(lengths, values, "o-", label=name)
    ax.axvline(trained_at, color=plots.INK, linestyle=":", linewidth=1)
    ax.axhline(guess, color=plots.GREY, linestyle="--", linewidth=1)
    ax.set(title=title, xscale="log", xlabel="tokens", ylim=(0, 1.05))
    ax.set_xticks(lengths, lengths)
    ax.minorticks_off()
    ax.legend(fontsize=8)


def depends_on(moved, signs, marked):
    """How far the answer moves when each token of a row is changed; the marked ones are orange."""
    _, ax = plt.subplots(figsize=(8, 1.8))
    places = range(len(moved))
    ax.bar(places, moved, color=[plots.ORANGE if k in marked else plots.GREY for k in places])
    ax.set(title="how much the answer at the end depends on each token", yticks=[])
    ax.set_xticks(range(len(signs)), signs)


def shelves(pairs, shares):
    """The share of pairs that come back, {rows of the state: values}."""
    _, ax = plt.subplots(figsize=(6.5, 2.8))
    colours = plt.get_cmap("viridis")(torch.linspace(0.85, 0.1, len(shares)).tolist())
    for colour, (n, values) in zip(colours, shares.items(), strict=True):
        ax.plot(pairs, values, "o-", markersize=4, color=colour, label=f"n = {n}")
    ax.set(title="pairs that come back from a state of n rows, random addresses", xscale="log", xlabel="pairs written")
    ax.set_xticks(pairs, pairs)
    ax.minorticks_off()
    ax.legend(fontsize=8)


def recalled(asked, shares):
    """The share of right answers by number of pairs, {model: values}; the last model is drawn wide."""
    figure, ax = plt.subplots(figsize=(7.5, 3))
    colours = [*plt.get_cmap("viridis")(torch.linspace(0.85, 0.1, len(shares) - 1).tolist()), plots.GREEN]
    for k, (colour, (name, values)) in enumerate(zip(colours, shares.items(), strict=True)):
        last = k == len(shares) - 1
        wide = {"linewidth": 6, "alpha": 0.4, "zorder": 1} if last else {"marker": "o", "markersize": 4}
        ax.plot(asked, values, color=colour, label=name, **wide)
    ax.plot(asked, [1 / pairs for pairs in asked], ":", color=plots.GREY, label="a value at random")
    ax.set(title="associative recall: share right, by the number of pairs", xlabel="pairs", ylim=(0, 1.05))
    figure.legend(fontsize=8, loc="outside right center")


def bill(tokens, state, cache):
    """Bytes carried from token to token."""
    _, ax = plt.subplots(figsize=(6, 2.6))
    ax.plot(tokens, [size / 1024 for size in state], "o-", color=plots.BLUE, label="Mamba-2, n = 16: its state")
    ax.plot(tokens, [size / 1024 for size in cache], "o-", color=plots.GREEN, label="Transformer: its keys and values")
    ax.set(title="kilobytes carried from token to token", xscale="log", yscale="log", xlabel="tokens read")
    ax.set_xticks(tokens, tokens)
    ax.minorticks_off()
    ax.legend(fontsize=8)


def parity(by_place, trained_at):
    """The share of right answers by place, {model: (places,)}."""
    _, ax = plt.subplots(figsize=(7, 2.4))
    for name, values in by_place.items():
        ax.plot(range(1, len(values) + 1), values, label=name)
    ax.axvline(trained_at, color=plots.INK, linestyle=":", linewidth=1)
    ax.axhline(0.5, color=plots.GREY, linestyle="--", linewidth=1)
    ax.set(title="parity: share right (trained left of the dotted line; dashed: guessing)", xlabel="bits read")
    ax.set(ylim=(0.4, 1.05))
    ax.legend(fontsize=8)


def read_back(answers, contents):
    """What each rule reads at each key, {rule: (keys, contents)}, as bars."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.5), sharey=True)
    colours = (plots.GREY, plots.GREEN, plots.ORANGE)
    for key, (ax, title) in enumerate(zip(axes, ("read at key 1", "read at key 2"), strict=True)):
        for c, (content, colour) in enumerate(zip(contents, colours, strict=True)):
            values = [answers[rule][key, c] for rule in answers]
            ax.barh([row + 0.27 * (c - 1) for row in range(len(answers))], values, 0.25, color=colour, label=content)
        ax.set_yticks(range(len(answers)), list(answers), fontsize=8)
        ax.set(title=title)
    axes[0].invert_yaxis()
    figure.legend(*axes[1].get_legend_handles_labels(), fontsize=8, ncol=3, loc="outside lower center")
