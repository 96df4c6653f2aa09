"""The pictures of notebook 2: the scan as a matrix, block by block, and what it costs."""

import torch

from mamba2_min import plots
from mamba2_min.plots import plt


def frame(ax, row, column, height, width):
    """A rectangle around a block of a matrix."""
    corner = (column - 0.5, row - 0.5)
    ax.add_patch(plt.Rectangle(corner, width, height, fill=False, edgecolor=plots.INK, linewidth=1.6))


def matrices(named, frames=(), limits=None, size=(9, 3.1)):
    """Matrices side by side, {title: matrix}; `frames` are (row, column, height, width), the same in each."""
    figure, axes = plt.subplots(1, len(named), figsize=size, squeeze=False)
    for k, (ax, (title, matrix)) in enumerate(zip(axes[0], named.items(), strict=True)):
        plots.draw_matrix(ax, matrix, title, limit=limits[k] if limits else matrix.abs().quantile(0.98))
        for one in frames:
            frame(ax, *one)
    axes[0][0].set(xlabel="j, the token that is heard", ylabel="i, the token that listens")
    return figure, axes[0]


def factors(M, border, block, read, write, n):
    """M with a block below the diagonal, the block as a product of two thin matrices, and its singular values."""
    rows, columns = block.shape
    _, axes = plt.subplots(1, 5, figsize=(10, 3), width_ratios=(3.4, 2.4, 1.2, 2.4, 2.6))
    plots.draw_matrix(axes[0], M, "M and a block below the diagonal", limit=M.abs().quantile(0.98))
    frame(axes[0], border, 0, rows, columns)
    plots.draw_matrix(axes[1], block, f"the block ({rows} × {columns})  =")
    plots.draw_matrix(axes[2], read, f"read ({rows} × {n})")
    plots.draw_matrix(axes[3], write.T, f"·  write ({n} × {columns})")
    axes[4].plot(range(1, min(block.shape) + 1), torch.linalg.svdvals(block.double()).clamp(min=1e-9), "o-")
    axes[4].axvline(n + 0.5, color=plots.ORANGE, linestyle="--", linewidth=1)
    axes[4].set(title="its singular values", yscale="log", xlabel=f"after n = {n}: only rounding", ylim=(1e-9, 10))


def stages(named, block, read, write, q):
    """The matrix as the chunked scan fills it, and on the right one block with its two factors at its edges."""
    limit = next(reversed(named.values())).abs().quantile(0.98)
    n = read.shape[1]
    _, axes = plt.subplots(1, 4, figsize=(10.5, 3), width_ratios=(1, 1, 1, 0.75))
    for ax, (name, stage) in zip(axes[:3], named.items(), strict=True):
        plots.draw_matrix(ax, stage, name, limit)
        plots.draw_chunks(ax, len(stage), q)
    axes[0].set(xlabel="token that is heard", ylabel="token that listens")
    sheet = torch.full((q + n + 1, n + q + 1), torch.nan)
    sheet[n + 1 :, :n] = read / read.abs().max()
    sheet[:n, n + 1 :] = write.T / write.abs().max()
    sheet[n + 1 :, n + 1 :] = block / block.abs().max()
    plots.draw_matrix(axes[3], sheet, "one block = read · write")
    axes[3].axis("off")


def gradients(good, bad):
    """Two gradients by token, of which the second is not a number."""
    _, ax = plt.subplots(figsize=(6, 1.9))
    ax.plot(good, "o-", markersize=3, label="masked before exp")
    ax.plot(torch.zeros(len(bad)), "x", color=plots.ORANGE, label="masked after exp: nan at every token")
    ax.set(title="gradient by a_t", xlabel="t")
    ax.legend(fontsize=8)


def heads_and_groups(L, names):
    """The decays of several heads beside each other, each with its title."""
    _, axes = plt.subplots(1, len(L), figsize=(9.5, 2.6))
    for ax, one, name in zip(axes, L, names, strict=True):
        plots.draw_matrix(ax, one, name, limit=1)


def chunk_sizes(sizes, count, took, best):
    """What a chunk size costs: counted on the left, measured on the right."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6))
    left.plot(sizes, count, "o-", color=plots.BLUE)
    left.axvline(best, color=plots.GREEN, linestyle="--", linewidth=1)
    left.set(title="counted: multiplications per token and head")
    right.plot(sizes, took, "o-", color=plots.ORANGE)
    right.set(title="measured: ms for 1,024 tokens")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log", xlabel="chunk size q")
        ax.set_xticks(sizes, sizes, fontsize=7)
        ax.minorticks_off()


def intensity(sizes, chunks, loop, machine):
    """Operations per byte of main memory, by chunk size, beside what a GPU needs to be busy."""
    _, ax = plt.subplots(figsize=(7, 2.6))
    ax.plot(sizes, chunks, "o-", label="chunked scan")
    ax.axhline(loop, color=plots.ORANGE, label="loop, state in main memory")
    ax.axhline(machine, color=plots.GREY, linestyle="--", label="an H100 is busy with all units from here on")
    ax.set(title="operations per byte", xscale="log", yscale="log", xlabel="chunk size q", ylim=(0.3, 1000))
    ax.set_xticks(sizes, sizes)
    ax.minorticks_off()
    ax.legend(fontsize=8, loc="center right")


def against_length(times, memory):
    """Time and memory by length, {way: {length: value}}."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2))
    for name in times:
        left.plot(times[name].keys(), times[name].values(), "o-", markersize=4, label=name)
        right.plot(memory[name].keys(), memory[name].values(), "o-", markersize=4, label=name)
    left.set(title="time of a forward pass, ms", xscale="log", yscale="log", xlabel="tokens")
    right.set(title="kept for the backward pass, MB", xscale="log", yscale="log", xlabel="tokens")
    left.legend(fontsize=8)


def rounding(shares, title):
    """What a head still holds of one word, in several precisions, {label: values by age}."""
    _, ax = plt.subplots(figsize=(7, 2.4))
    wide = {"linewidth": 5, "alpha": 0.35, "color": plots.GREY}
    styles = (wide, {"color": plots.ORANGE}, {"color": plots.BLUE, "linestyle": "--"})
    for (label, values), style in zip(shares.items(), styles, strict=True):
        ax.plot(values, label=label, **style)
    ax.set(title=title, xlabel="words later", ylim=(0, 1.05))
    ax.legend(fontsize=8)
