"""The PyTorch program that this project descends from, as first written, and its fault.

    python benchmarks/seed_program.py        (needs PyTorch: pip install torch==2.13.0)

`adapt_model` builds a new module and loads `state_dict()`: values are copied, the graph is cut, and the outer step finds
no gradient on the meta-parameters. It is kept for the test that shows this, and as a rival in the speed tables.
"""

from __future__ import annotations

import torch
from torch import nn


class MetaRecommender(nn.Module):
    """User embedding and item embedding, concatenated, one linear layer."""

    def __init__(self, num_users: int, num_items: int, embedding_dim: int) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding(num_users, embedding_dim)
        self.item_embedding = nn.Embedding(num_items, embedding_dim)
        self.fc = nn.Linear(2 * embedding_dim, 1)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.cat([self.user_embedding(user), self.item_embedding(item)], dim=-1)).squeeze(-1)


def adapt_model(model: MetaRecommender, support: tuple, inner_lr: float, inner_steps: int) -> MetaRecommender:
    """As first written: a copy that no gradient connects to ``model``."""
    adapted = MetaRecommender(
        model.user_embedding.num_embeddings, model.item_embedding.num_embeddings, model.user_embedding.embedding_dim
    )
    adapted.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(adapted.parameters(), lr=inner_lr)
    user, item, rating = support
    for _ in range(inner_steps):
        loss = nn.functional.mse_loss(adapted(user, item), rating)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return adapted


def meta_step(
    model: MetaRecommender, optimizer: torch.optim.Optimizer, tasks: list, inner_lr: float, inner_steps: int
) -> float:
    """One outer step of the program as first written; it moves nothing."""
    optimizer.zero_grad()
    total = torch.zeros(())
    for support, (user, item, rating) in tasks:
        adapted = adapt_model(model, support, inner_lr, inner_steps)
        total = total + nn.functional.mse_loss(adapted(user, item), rating)
    (total / len(tasks)).backward()
    optimizer.step()
    return float((total / len(tasks)).detach())


def demonstrate() -> list[float | None]:
    """Run one outer step; the largest gradient on each meta-parameter (None: there is none at all)."""
    torch.manual_seed(0)
    model = MetaRecommender(5, 7, 4)
    draw = lambda: (torch.randint(5, (6,)), torch.randint(7, (6,)), torch.rand(6))  # noqa: E731
    meta_step(model, torch.optim.Adam(model.parameters()), [(draw(), draw()) for _ in range(3)], 0.1, 2)
    return [None if p.grad is None else float(p.grad.abs().max()) for p in model.parameters()]


if __name__ == "__main__":
    print("gradient on each meta-parameter after one outer step:", demonstrate())
