"""Pictures for MLflow: sample grids beside real images, confusion matrix, partition."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fedfactory_ray.classification.rules import ANNOUNCED

matplotlib.rcParams["text.parse_math"] = False
"""Names that people gave are no mathematics, whatever stands between two dollars."""
GRID_COLUMNS = 8
SHORT = 14
"""Characters of a class's name that a picture has room for."""


def sample_grid(
    synthetic: dict[int, np.ndarray], real: dict[int, np.ndarray], class_names: list[str], client: str
) -> Figure:
    """A row a class: images drawn from the client's modules on the left; on the right, where `real` has any, held-out
    real images.

    Images are uint8 (n, H, W, C) by class; up to GRID_COLUMNS of each are shown.
    """
    columns = 2 if real else 1
    figure = Figure(figsize=(columns * GRID_COLUMNS * 0.55 + 1, 0.65 * len(synthetic) + 0.7), layout="constrained")
    axes = figure.subplots(len(synthetic), columns, squeeze=False)
    for row, (label, images) in zip(axes, sorted(synthetic.items()), strict=True):
        for axis, shown in zip(row, (images, real.get(label, images[:0])), strict=False):
            strip = np.zeros((images.shape[1], GRID_COLUMNS * images.shape[2], images.shape[3]), np.uint8)
            tiles = np.concatenate(list(shown[:GRID_COLUMNS]), axis=1) if len(shown) else strip[:, :0]
            strip[:, : tiles.shape[1]] = tiles
            axis.imshow(strip.squeeze(), cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(class_names[label][:SHORT], rotation=0, ha="right", va="center", fontsize=7)
    axes[0, 0].set_title(f"drawn from {client}", fontsize=9)
    if real:
        axes[0, 1].set_title("real, held out", fontsize=9)
    return figure


def confusion_plot(confusion: list[list[int]], class_names: list[str], title: str) -> Figure:
    """Confusion matrix (rows: truth) with counts, coloured by share of the true class."""
    counts = np.array(confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.2 + 0.45 * len(counts)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (truth, predicted), n in np.ndenumerate(counts):
        if n:
            colour = "white" if shares[truth, predicted] > 0.5 else "black"
            axis.text(predicted, truth, str(n), ha="center", va="center", fontsize=7, color=colour)
    ticks = range(len(counts))
    names = [name[:SHORT] for name in class_names]
    axis.set_xticks(ticks, names, rotation=90, fontsize=7)
    axis.set_yticks(ticks, names, fontsize=7)
    axis.set(xlabel="predicted", ylabel="true", title=title)
    return figure


def partition_plot(matrix: np.ndarray, clients: list[str], class_names: list[str]) -> Figure:
    """Image counts, client × class: as areas of dots, of many clients as shades on a page of one size."""
    if len(clients) > MOST_ROWS:
        figure = Figure(figsize=(3.5 + 0.35 * len(class_names), 1.6 + 0.22 * MOST_ROWS), layout="constrained")
        axis = figure.subplots()
        shades = axis.imshow(matrix, aspect="auto", interpolation="nearest", norm="symlog", cmap="Blues")
        figure.colorbar(shades, ax=axis)
        axis.set_xticks(range(len(class_names)), [name[:SHORT] for name in class_names], rotation=90, fontsize=7)
        axis.set(title="images a client and class", ylabel=f"{len(clients):,} clients, {clients[0]} to {clients[-1]}")
        return figure
    figure = Figure(figsize=(2.5 + 0.35 * len(class_names), 1.6 + 0.22 * len(clients)), layout="constrained")
    axis = figure.subplots()
    client, label = np.nonzero(matrix)
    sizes = matrix[client, label]
    axis.scatter(label, client, s=160 * sizes / sizes.max())
    axis.set_xticks(range(len(class_names)), [name[:SHORT] for name in class_names], rotation=90, fontsize=7)
    axis.set_yticks(range(len(clients)), list(clients), fontsize=7)
    axis.set(title="images a client and class")
    axis.invert_yaxis()
    return figure


def comparison_plot(scores: dict[str, dict[str, float]], curves: dict[str, list[float]]) -> Figure:
    """Left: test accuracy by method, with its interval or its deviation over seeds; right: validation accuracy by
    round of the federated methods, where there are any."""
    figure = Figure(figsize=(11 if curves else 6, 1.4 + 0.35 * len(scores)), layout="constrained")
    name = f"{ANNOUNCED}/accuracy"
    axes = figure.subplots(1, 1 + bool(curves), squeeze=False)[0]
    for place, each in enumerate(scores.values()):
        value = each[name]
        low, high = each.get(f"{name}_low", value), each.get(f"{name}_high", value)
        axes[0].barh(place, value, color="tab:blue", alpha=0.6)
        axes[0].plot([low, high], [place, place], color="black", linewidth=1.5)
        axes[0].text(max(value, high) + 0.01, place, f"{value:.3f}", va="center", fontsize=7)
    axes[0].set_yticks(range(len(scores)), list(scores), fontsize=8)
    axes[0].set(xlim=(0, 1.12), xlabel="test accuracy, announced prior")
    axes[0].invert_yaxis()
    if curves:
        for method, values in curves.items():
            axes[1].plot(range(1, len(values) + 1), values, label=method)
        axes[1].set(xlabel="round", ylabel="validation accuracy", ylim=(0, 1.02))
        axes[1].legend(fontsize=8)
    return figure


def recall_plot(before: dict[int, float], after: dict[int, float], class_names: list[str]) -> Figure:
    """Recall by class before and after a client was forgotten."""
    figure = Figure(figsize=(2.5 + 0.5 * len(before), 3), layout="constrained")
    axis = figure.subplots()
    for offset, recall, label in ((-0.2, before, "before"), (0.2, after, "after")):
        axis.bar([y + offset for y in recall], list(recall.values()), width=0.38, label=label)
    axis.set_xticks(list(before), [class_names[y][:SHORT] for y in before], rotation=90, fontsize=7)
    axis.set(ylim=(0, 1.02), ylabel="recall on the test split")
    axis.legend(fontsize=8)
    return figure


MOST_ROWS = 100
"""Clients that a picture names, a row each."""
