"""The pictures of notebook 5: what a model says, how a word is drawn from it, and what a word costs."""

import math

import torch

from mamba2_min import plots
from mamba2_min.plots import plt


def answers(named, name_of, entropy):
    """The twelve likeliest next words after each text, {text: probabilities}."""
    _, axes = plt.subplots(1, len(named), figsize=(9, 3))
    for ax, (text, p) in zip(axes, named.items(), strict=True):
        top, ids = p.topk(12)
        ax.barh([name_of(i) for i in ids.tolist()], top, color=plots.BLUE)
        ax.invert_yaxis()
        ax.set(title=f"“{text} …”: as unsure as among {math.exp(entropy(p)):.0f} words", xlabel="probability")


def temperatures(named, at_temperature):
    """The share of the likeliest k words, at three temperatures, {text: probabilities}."""
    _, axes = plt.subplots(1, len(named), figsize=(9, 2.8))
    for ax, (text, p) in zip(axes, named.items(), strict=True):
        for T, colour in ((0.5, plots.BLUE), (1.0, plots.INK), (1.5, plots.ORANGE)):
            shares = at_temperature(p, T).sort(descending=True).values.cumsum(0)
            ax.plot(range(1, len(p) + 1), shares, color=colour, label=f"T = {T}")
        ax.set(title=f"“{text} …”: share of the likeliest k words", xscale="log", xlabel="k", ylim=(0, 1.03))
    axes[0].legend(fontsize=8)


def cuts(named, kept):
    """What each way of cutting keeps, {text: probabilities} and {(text, cut): how many}."""
    names = list(dict.fromkeys(cut for _, cut in kept))
    _, axes = plt.subplots(len(named), len(names), figsize=(9.5, 4), sharex=True, sharey="row")
    for row, (text, p) in zip(axes, named.items(), strict=True):
        likely, ranks = p.sort(descending=True).values, torch.arange(1, len(p) + 1)
        for ax, cut in zip(row, names, strict=True):
            n = kept[text, cut]
            ax.fill_between(ranks, likely, 1e-7, color=plots.GREY, alpha=0.35, linewidth=0)
            ax.fill_between(ranks[:n], likely[:n], 1e-7, color=plots.ORANGE, linewidth=0)
            ax.axvline(n, color=plots.ORANGE, linewidth=1)
            ax.set(title=f"{cut}: keeps {n}", xscale="log", yscale="log", ylim=(1e-6, 1))
        row[0].set_ylabel(f"“{text} …”", fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("words, the likeliest first")


def knobs(temperatures, new, surprise, real):
    """New phrases and surprise by temperature, {way of drawing: values}, beside documents by people."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
    for name, colour in zip(new, (plots.BLUE, plots.ORANGE), strict=True):
        left.plot(temperatures, new[name], "o-", color=colour, label=name)
        right.plot(temperatures, surprise[name], "o-", color=colour)
    left.set(title="share of phrases that are new", xlabel="temperature", ylim=(0, 1.05))
    right.axhline(real, color=plots.INK, linestyle="--", linewidth=1)
    right.text(0, real + 0.1, "documents by people", fontsize=8)
    right.set(title="surprise, nats per token", xlabel="temperature")
    left.legend(fontsize=8)


def let_in(temperatures, counts):
    """How many words each cut lets in, by temperature, {cut: counts}."""
    _, ax = plt.subplots(figsize=(6, 2.2))
    for cut, values in counts.items():
        ax.plot(temperatures, values, "o-", label=cut)
    ax.set(title="words that a cut lets in", xlabel="temperature", yscale="log")
    ax.legend(fontsize=8)


def costs(lengths, times, megabytes):
    """Milliseconds and megabytes per word, by words so far, {network: values}."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    for kind, colour in zip(times, (plots.ORANGE, plots.BLUE), strict=True):
        left.plot(lengths, times[kind], "o-", color=colour, label=kind)
        right.plot(lengths, megabytes[kind], "o-", color=colour, label=kind)
    left.set(title="milliseconds for one more word", xlabel="words so far", ylim=0)
    right.set(title="megabytes kept of the text", xlabel="words so far", ylim=0)
    for ax in (left, right):
        ax.set_xticks(lengths[2:], [f"{length:,}" for length in lengths[2:]])
    left.legend(fontsize=8)


def fading(difference):
    """What a changed word still changes, by words later."""
    _, ax = plt.subplots(figsize=(7, 2.4))
    ax.plot(range(1, len(difference) + 1), difference.clamp(min=1e-9), color=plots.ORANGE)
    ax.set(title="what a changed word still changes", xscale="log", yscale="log", xlabel="words later")
    ax.set_ylabel("nats (KL divergence)")
