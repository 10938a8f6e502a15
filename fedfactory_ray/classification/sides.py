"""Sides: which rows train and which validate."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def validates(places: np.ndarray, fraction: float) -> np.ndarray:
    """Which of the images at these places of their class, int (n,), validate: every (1/fraction)-th; bool (n,)."""
    period = round(1 / fraction)
    return np.asarray(places % period == period - 1)


def keep_side(table: pa.Table, unit_size: int, fraction: float, *, validation: bool) -> pa.Table:
    """The training or the validation rows: of each client's images of a class, every (1/fraction)-th validates.

    A row's side depends on its own place alone, so it stays when other rows come or go.
    """
    place = table["unit"].to_numpy() * unit_size + table["index"].to_numpy()
    return table.filter(pa.array(validates(place, fraction) == validation))
