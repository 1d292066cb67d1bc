"""The two rating models in PyTorch, and the prepared batches as tensors.

A model is split in two: ``features(x)`` never adapts, ``head`` is what the inner loop adapts (of the seed's model that is
everything, the embedding tables included).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.cells import EXAMPLES, HIDDEN, SIZE, USERS, VOCAB, Batches, batches

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Support ids ``[T, 10, columns]``, support ratings ``[T, 10]``, and the same of the query."""


class SeedHead(nn.Module):
    """User embedding and item embedding, concatenated, one linear layer."""

    def __init__(self, users: int, items: int, size: int) -> None:
        super().__init__()
        self.user = nn.Embedding(users, size)
        self.item = nn.Embedding(items, size)
        self.out = nn.Linear(2 * size, 1)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.user(x[..., 0]), self.item(x[..., 1])], -1)).squeeze(-1)


class Seed(nn.Module):
    """The seed's model."""

    def __init__(self, users: int, items: int, size: int) -> None:
        super().__init__()
        self.head = SeedHead(users, items, size)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x


class MeLULike(nn.Module):
    """Eight categorical columns (four of the user, four of the item) x 32 -> 64 -> 64 -> 1."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.emb = nn.ModuleList(nn.Embedding(rows, size) for rows in VOCAB)
        for table in self.emb:
            nn.init.normal_(table.weight, std=0.1)
        widths = (len(VOCAB) * size, *HIDDEN)
        layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        self.head = nn.Sequential(*layers, nn.Linear(widths[-1], 1), nn.Flatten(-2))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([table(x[..., c]) for c, table in enumerate(self.emb)], -1)


def device() -> torch.device:
    """The accelerator where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_model(cell: Mapping[str, Any]) -> nn.Module:
    """The model of a cell, on the device."""
    torch.manual_seed(0)
    with device():
        return MeLULike(SIZE) if cell["model"] == "melu" else Seed(USERS, cell["items"], SIZE)


def make_batches(cell: Mapping[str, Any]) -> list[Batch]:
    """The prepared batches of a cell, on the device."""
    return as_tensors(batches(cell))


def as_tensors(made: Batches) -> list[Batch]:
    """Batches as tensors; ids int64, as PyTorch's embeddings want them."""
    dtype = torch.get_default_dtype()
    return [_split(ids, rating, dtype) for ids, rating in zip(made.ids, made.rating, strict=True)]


def _split(ids: np.ndarray, rating: np.ndarray, dtype: torch.dtype) -> Batch:
    x = torch.as_tensor(ids, dtype=torch.int64, device=device())
    y = torch.as_tensor(rating, dtype=dtype, device=device())
    k = EXAMPLES
    return x[:, :k].contiguous(), y[:, :k].contiguous(), x[:, k:].contiguous(), y[:, k:].contiguous()
