"""Examples that fit in memory: one array a field, rows are examples."""

import numpy as np

from sslx.data import Example


class Arrays:
    """Example i is row i of every array."""

    def __init__(self, **fields: np.ndarray):
        self.fields = fields

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: int) -> Example:
        return {name: x[index] for name, x in self.fields.items()}

    def rows(self, indices_B: np.ndarray) -> Example:
        return {name: x[indices_B] for name, x in self.fields.items()}
