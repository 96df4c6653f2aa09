"""The pictures of notebooks 3 and 3b: the block, and what runs on its wires."""

from itertools import pairwise

from mamba2_min import plots
from mamba2_min.plots import plt


def draw_block(c):
    """One block of a model with config `c`: its parts, its wires, and how many channels each has."""
    _, ax = plt.subplots(figsize=(9.5, 3.6))
    ax.set(xlim=(0, 100), ylim=(4, 47))
    ax.axis("off")

    def box(x, y, width, text, colour):
        ax.add_patch(plt.Rectangle((x, y - 3), width, 6, facecolor=colour, alpha=0.25, edgecolor=colour))
        ax.text(x + width / 2, y, text, ha="center", va="center", fontsize=8.5)

    def wire(*points, text="", at=0):
        style = {"color": plots.INK, "shrinkA": 0, "shrinkB": 0, "linewidth": 1}
        for (x0, y0), (x1, y1) in pairwise(points):
            last = (x1, y1) == points[-1]
            ax.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->" if last else "-", **style})
        (x0, y0), (x1, y1) = points[at], points[at + 1]
        ax.text((x0 + x1) / 2, (y0 + y1) / 2 + 0.6, text, ha="center", va="bottom", fontsize=8)

    box(4, 20, 9, "norm", plots.GREY)
    box(17, 20, 9, "in_proj", plots.BLUE)
    box(43, 26, 11, f"conv, {c.d_conv} taps\nSiLU", plots.BLUE)
    box(43, 10, 11, "+ dt_bias\nsoftplus", plots.ORANGE)
    box(61.5, 20, 13.5, "SSD\nA = −exp(A_log)", plots.GREEN)
    box(78, 28, 9, "× SiLU(z)\nnorm", plots.BLUE)
    box(90, 28, 8, "out_proj", plots.BLUE)
    wire((0, 42), (99, 42), text="the residual stream (b, l, d_model)")
    wire((2, 42), (2, 20), (4, 20))
    wire((13, 20), (17, 20))
    wire((26, 20), (30, 20), (30, 34), (82.5, 34), (82.5, 31), text=f"z ({c.d_inner}): the gate", at=2)
    wire((26, 20), (30, 20), (30, 26), (43, 26), text=f"x | B | C\n({c.d_inner} + 2 · {c.ngroups * c.d_state})", at=2)
    wire((26, 20), (30, 20), (30, 10), (43, 10), text=f"dt ({c.nheads})", at=2)
    wire((54, 27.5), (60, 27.5), (60, 21.5), (61.5, 21.5))
    ax.text(60.6, 24.6, "x, B, C", fontsize=8, va="center")
    wire((54, 10), (60, 10), (60, 18.5), (61.5, 18.5), text="dt > 0")
    wire((57, 27.5), (57, 30.5), (76.5, 30.5), (76.5, 28.6), (78, 28.6), text="D · x, the skip", at=1)
    wire((75, 20), (76.5, 20), (76.5, 27.4), (78, 27.4))
    ax.text(77.2, 21.5, "y", fontsize=8)
    wire((87, 28), (90, 28))
    wire((94, 31), (94, 42))
    ax.text(95, 36, "add", fontsize=8)


def loss(curve):
    """The training loss, step by step."""
    _, ax = plt.subplots(figsize=(6, 1.8))
    ax.plot(curve, color=plots.BLUE, linewidth=0.8)
    ax.set(title="training loss, nats per token", xlabel="step")


def strips(named, tokens):
    """Wires as strips, {label: (channels, l)}: a column is a word."""
    _, axes = plt.subplots(len(named), 1, figsize=(8.5, 7.2), sharex=True)
    for ax, (label, strip) in zip(axes, named.items(), strict=True):
        plots.draw_matrix(ax, strip, limit=2.5)
        ax.set_aspect("auto")
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
    plots.label_tokens(axes[-1], tokens)


def beginnings(first_loss, nothing, size):
    """The first loss by the embedding's spread, and how the stream grows with depth, {label: values by block}."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 2.4))
    left.barh(list(first_loss), list(first_loss.values()), color=plots.BLUE)
    left.axvline(nothing, color=plots.GREY, linestyle="--", linewidth=1)
    left.set(title="first loss (dashed: knowing nothing)", xlabel="nats per token")
    left.invert_yaxis()
    for label, values in size.items():
        right.plot(range(1, len(values) + 1), values, "o-", markersize=3, label=label)
    right.set(title="size of the stream, 16 blocks", xlabel="after block", ylim=0)
    right.legend(fontsize=8, title="out_proj", title_fontsize=8)


def steps(relative, tokens, heads):
    """dt of every head (rows) at every word, as a power of two of what is usual for the head."""
    figure, ax = plt.subplots(figsize=(9, 3.8))
    image = plots.draw_matrix(ax, relative, "dt of every head at every word, against the head's own median", limit=5)
    ax.set_aspect("auto")
    plots.label_tokens(ax, tokens)
    names = [f"layer {k}, head {h}" for k in range(len(relative) // heads) for h in range(heads)]
    ax.set_yticks(range(len(relative)), names, fontsize=7)
    ax.axhline(heads - 0.5, color=plots.INK, linewidth=0.8)
    bar = figure.colorbar(image, ax=ax, ticks=[-5, 0, 5])
    bar.ax.set_yticklabels(["÷ 32: skip", "usual", "× 32: write"], fontsize=8)


def full_stop(share, L, tokens, title):
    """The share of its state that a head keeps at each word, and what is left of each word later."""
    _, (top, bottom) = plt.subplots(2, 1, figsize=(9, 4.6), sharex=True, height_ratios=(1, 2.2))
    top.bar(range(len(tokens)), share, color=[plots.ORANGE if t == "." else plots.BLUE for t in tokens])
    top.set(title=title, ylim=(0, 1))
    plots.draw_matrix(bottom, L, "L: what is left of word j (column) when word i (row) is read", limit=1)
    bottom.set_aspect("auto")
    plots.label_tokens(bottom, tokens)


def maps(named, tokens):
    """The matrices of several heads, with words at both sides."""
    _, axes = plt.subplots(1, len(named), figsize=(10.5, 5))
    for ax, (title, M) in zip(axes, named.items(), strict=True):
        plots.draw_matrix(ax, M, title, limit=M.abs().quantile(0.99))
        plots.label_tokens(ax, tokens)
        plots.label_tokens(ax, tokens, rows=True)
        ax.tick_params(labelsize=6.5)


def by_seed(scores, title, guess=None, best="right"):
    """One row per variant, one dot per seed, and a bar up to their mean: {variant: values}."""
    _, ax = plt.subplots(figsize=(8, 0.36 * len(scores) + 0.8))
    for row, values in enumerate(scores.values()):
        mean = sum(values) / len(values)
        ax.barh(row, mean, color=plots.BLUE if row == 0 else plots.ORANGE, alpha=0.45, height=0.7)
        ax.plot(values, [row] * len(values), "o", color=plots.INK, markersize=4)
    ax.set_yticks(range(len(scores)), list(scores))
    low, high = min(map(min, scores.values())), max(map(max, scores.values()))
    ax.set(title=title, xlim=(0, 1.02) if guess is not None else (low - 0.15 * (high - low), high + 0.1 * (high - low)))
    if guess is not None:
        ax.axvline(guess, color=plots.GREY, linestyle="--", linewidth=1)
    ax.invert_yaxis()


def clocks(at_small, at_capital):
    """The median dt of each head at small letters and at capitals."""
    _, ax = plt.subplots(figsize=(6, 2.2))
    heads = range(len(at_small))
    ax.bar([h - 0.2 for h in heads], at_small, 0.4, color=plots.GREY, label="at a small letter")
    ax.bar([h + 0.2 for h in heads], at_capital, 0.4, color=plots.ORANGE, label="at a capital")
    ax.set(title="median dt of each head", xlabel="head", yscale="log")
    ax.legend(fontsize=8)


def work(lengths, mamba, transformer):
    """Multiplications per token by length, in millions."""
    _, ax = plt.subplots(figsize=(6.5, 2.6))
    ax.plot(lengths, mamba, "o-", label="Mamba-2, 24 layers, 130M")
    ax.plot(lengths, transformer, "o-", label="Transformer, 12 layers, the same width")
    ax.set(title="million multiplications per token", xscale="log", yscale="log", xlabel="tokens of context")
    ax.legend(fontsize=8)


def masks(of_channel, of_head):
    """What is left of each token, in each entry of one channel of Mamba-1 and in a head of Mamba-2."""
    _, axes = plt.subplots(1, len(of_channel) + 1, figsize=(10, 2.3))
    for n, (ax, mask) in enumerate(zip(axes, of_channel, strict=False)):
        plots.draw_matrix(ax, mask, f"Mamba-1, entry {n}", limit=1)
    plots.draw_matrix(axes[-1], of_head, "Mamba-2, the whole head", limit=1)
