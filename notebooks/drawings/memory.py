"""The pictures of notebook 1: what a state of a few numbers remembers of a signal."""

import math

import torch

from mamba2_min import plots
from mamba2_min.plots import plt


def noisy_switch(u, states, weights):
    """An input and what one number makes of it, {share kept: states}; on the right an input's weight, by its age."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), width_ratios=(3, 2))
    left.plot(u, color=plots.GREY, linewidth=0.7, alpha=0.6, label="input")
    for alpha in states:
        left.plot(states[alpha], label=f"state, α = {alpha}")
        right.plot(weights[alpha])
    left.set(title="one number listens to a noisy switch", xlabel="step")
    right.set(title="how much an input still weighs, by its age", xlabel="age in steps", yscale="log", ylim=(1e-5, 1))
    left.legend(fontsize=8)


def fading(dts, curves, explodes):
    """For each dt a panel: {name: (times, states)} and the exact curve; tall where a method explodes."""
    _, axes = plt.subplots(1, len(dts), figsize=(9, 2.6))
    exact = torch.linspace(0, 10, 200)
    for ax, dt in zip(axes, dts, strict=True):
        ax.plot(exact, torch.exp(-exact), color=plots.GREY, linewidth=4, alpha=0.4, label="exact")
        for name, (times, states) in curves[dt].items():
            ax.plot(times, states, "o-", markersize=3, linewidth=1, label=name)
        ax.set(title=f"dt = {dt}", xlabel="time", ylim=(-2.2, 2.2) if explodes(dt) else (-0.3, 1.1))
    axes[0].legend(fontsize=8)


def written(products, exact, taken):
    """How much a step writes for |A| dt: exactly, and with dt B."""
    _, ax = plt.subplots(figsize=(6, 2.2))
    ax.plot(products, exact, label="exact: (1 − e^(−|A|dt)) / |A|")
    ax.plot(products, taken, "--", label="Mamba-2: dt B")
    ax.set(title="what one step writes, in units of 1/|A|", xlabel="|A| dt", xscale="log", yscale="log")
    ax.legend(fontsize=8)


def shapes(places, P):
    """The first Legendre polynomials, (places, n)."""
    _, axes = plt.subplots(1, P.shape[1], figsize=(9, 1.5), sharey=True)
    for n, ax in enumerate(axes):
        ax.plot(places, P[:, n])
        ax.set(title=f"$p_{n}$", xticks=[0, 1], ylim=(-3.8, 3.8))


def drawn_again(places, signal, drawn, errors):
    """A signal and what it looks like drawn from N numbers, {N: values}."""
    _, axes = plt.subplots(1, len(drawn), figsize=(9, 2.2), sharey=True)
    for ax, N in zip(axes, drawn, strict=True):
        ax.plot(places, signal, color=plots.GREY, linewidth=3, alpha=0.4, label="heard")
        ax.plot(places, drawn[N], color=plots.ORANGE, label="drawn again")
        ax.set(title=f"{N} numbers, error {errors[N]:.1g}", xticks=[0, 1])
    axes[0].legend(fontsize=8, loc="lower left")


def listening(A, signal, drawn):
    """LegS's matrix, and the past as it is drawn from the state at several moments, {moment: values}."""
    times = torch.arange(len(signal)) + 0.5
    figure, axes = plt.subplots(1, 1 + len(drawn), figsize=(9.5, 2.5), width_ratios=(1, *[1.2] * len(drawn)))
    plots.draw_matrix(axes[0], A, f"A of LegS, N = {len(A)}")
    for ax, k in zip(axes[1:], drawn, strict=True):
        ax.plot(times, signal, color=plots.GREY, linewidth=0.8, alpha=0.5)
        ax.plot(times[:k], signal[:k], color=plots.GREY, linewidth=4, alpha=0.4, label="heard so far")
        ax.plot(times[:k], drawn[k], color=plots.ORANGE, label="drawn from the state")
        ax.axvline(k, color=plots.BLUE, linewidth=1)
        ax.set(title=f"now = {k}", xlabel="time", ylim=(-1.3, 1.7), yticks=[])
    axes[1].legend(fontsize=7, loc="lower left")
    figure.align_xlabels()


def two_numbers(times, mean, slope, u):
    """The first two of LegS's numbers, beside the signal."""
    _, ax = plt.subplots(figsize=(7, 2.2))
    ax.plot(times, u, color=plots.GREY, linewidth=0.8, alpha=0.6, label="heard")
    ax.plot(times, mean, label="$c_0$: the mean so far")
    ax.plot(times, slope, label="$c_1$: late or early?")
    ax.set(title="LegS with two numbers", xlabel="samples", ylim=(-1.3, 1.2))
    ax.legend(fontsize=8, loc="lower left", ncol=3)


def zoom(signal, drawn):
    """The past by age, drawn from states of several dt, {dt: values}; one unit of time is shaded."""
    back = torch.arange(len(signal))
    _, axes = plt.subplots(1, len(drawn), figsize=(9, 2.4), sharey=True)
    for ax, dt in zip(axes, drawn, strict=True):
        ax.plot(-back, signal.flip(0), color=plots.GREY, linewidth=4, alpha=0.4, label="heard")
        ax.plot(-back, drawn[dt], color=plots.ORANGE, label="drawn from the state")
        ax.axvspan(-1 / dt, 0, color=plots.BLUE, alpha=0.08)
        ax.set(title=f"dt = {dt}: one unit of time is {1 / dt:.0f} steps", xlabel="steps before now")
        ax.set(xlim=(-600, 10), ylim=(-1.6, 1.8))
    axes[0].legend(fontsize=8)


def spiral(real, imaginary):
    """Two numbers that turn and shrink."""
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 2.5), width_ratios=(1, 2))
    left.plot(real, imaginary)
    left.set(title="the two numbers, as a point", aspect="equal")
    right.plot(real, label="first number")
    right.plot(imaginary, label="second number")
    right.set(title="and by time: a wave that fades", xlabel="step")
    right.legend(fontsize=8)


def to_the_diagonal(sizes, own, normal, laws, signal, full, diagonal):
    """How lopsided LegS's eigenvectors are, the frequencies that are left, and the past drawn from both states."""
    _, (left, middle, right) = plt.subplots(1, 3, figsize=(9.5, 2.7), width_ratios=(1, 1, 1.5))
    left.plot(sizes, own, "o-", label="LegS itself")
    left.plot(sizes, normal, "o-", label="its normal part")
    left.set(title="how lopsided are the eigenvectors?", xlabel="N", ylabel="condition number", yscale="log")
    left.legend(fontsize=8)
    for (name, values), mark in zip(laws.items(), "ox.", strict=True):
        frequencies = values.imag.sort().values.clamp(min=0.3)
        middle.plot(frequencies, mark + "-", markersize=3, linewidth=0.7, label=name)
    middle.set(title="frequencies; all fade at 1/2", xlabel="n", ylabel="imaginary part", yscale="log")
    middle.legend(fontsize=8)
    back = torch.arange(len(signal))
    right.plot(-back, signal.flip(0), color=plots.GREY, linewidth=4, alpha=0.4, label="heard")
    right.plot(-back, full, color=plots.BLUE, label="full matrix")
    right.plot(-back, diagonal, color=plots.ORANGE, linewidth=1, label="diagonal")
    right.set(title="the past, from both", xlabel="steps before now", xlim=(-400, 5), ylim=(-1.6, 1.8))
    right.legend(fontsize=8)


def mixture(places, powers, mixed):
    """Fading curves (places, N) and a Legendre polynomial that they add up to."""
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 2.2))
    left.plot(places, powers)
    left.set(title="the weights of the heads, over r: 1, r, r², …", xticks=[0, 1])
    right.plot(places, mixed, color=plots.ORANGE)
    right.set(title="a mixture of them: $p_5$", xticks=[0, 1])


def heads(A, dt, held, memory_length):
    """What each head (h,) holds of one word, held (tokens, h), and how its memory depends on dt."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3))
    colours = plt.get_cmap("viridis")(torch.linspace(0.1, 0.9, len(A)).tolist())
    for colour, h in zip(colours, memory_length(A, dt).argsort().tolist(), strict=True):
        label = f"A = {A[h]:.0f}, dt = {dt[h]:.4f}"
        left.plot(range(1, len(held)), held[1:, h], color=colour, label=label)
    left.axhline(1 / math.e, color=plots.GREY, linestyle="--", linewidth=0.8)
    left.set(title="what a new model's heads hold of one word", xscale="log", xlabel="words later", ylabel="share left")
    left.legend(fontsize=7)
    grid = torch.logspace(-3, -1, 60)
    for a in (1.0, 2.0, 4.0, 8.0):
        right.plot(grid, memory_length(-a, grid), label=f"A = {-a:.0f}")
    right.plot(dt, memory_length(A, dt), "o", color=plots.INK, markersize=4, label="this model's heads")
    right.set(title="memory in words, 1/(|A| dt)", xscale="log", yscale="log", xlabel="dt", ylim=(1, 1500))
    right.legend(fontsize=8)


def by_age(weight, title):
    """A weight by age."""
    plt.figure(figsize=(5, 2))
    plt.plot(weight)
    plt.title(title)
