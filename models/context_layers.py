"""The item encoder's layers for tags and for precomputed vectors.

Shapes: as in `models.ranker`; T tags of an item at most, P numbers of all vectors together.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import nn
from torch.nn import functional

from models.item_context import Tags

# No number of a vector is further from its mean, in deviations: one mad number must not decide all of an item.
DEVIATIONS_MAX = 8.0


class TagMean(nn.Module):
    """The mean of the embeddings of an item's tags; of an item without a known tag, row 0."""

    def __init__(self, tags: Tags, width: int) -> None:
        super().__init__()
        self.tag = nn.Embedding(tags.known + 1, width)
        nn.init.normal_(self.tag.weight, std=width**-0.5)

    def forward(self, row_NT: Int64[torch.Tensor, "*N T"]) -> Float[torch.Tensor, "*N d"]:
        weight = self.tag.weight
        listed_NT = (row_NT > 0).to(weight.dtype)
        count_N1 = listed_NT.sum(dim=-1, keepdim=True)
        share_NT = listed_NT / count_N1.clamp(min=1)
        share_NT[..., :1] += count_N1 == 0
        flat = functional.embedding_bag(
            row_NT.reshape(-1, row_NT.shape[-1]),
            weight,
            per_sample_weights=share_NT.reshape(-1, row_NT.shape[-1]),
            mode="sum",
        )
        return flat.view(*row_NT.shape[:-1], weight.shape[1])


class ItemVectors(nn.Module):
    """Precomputed vectors of items, standardised, by a projection without bias: what an item lacks adds nothing.

    The vectors are facts of the items, not parameters. Either they are held, or what the projection made of them, as an
    item table has it.
    """

    table_MP: torch.Tensor
    projected_Md: torch.Tensor | None
    centre_P: torch.Tensor
    scale_P: torch.Tensor

    def __init__(self, vector_width: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(vector_width, width, bias=False)
        # So that a vector adds as much as a field does.
        nn.init.normal_(self.projection.weight, std=(vector_width * width) ** -0.5)
        self.register_buffer("centre_P", torch.zeros(vector_width))
        self.register_buffer("scale_P", torch.ones(vector_width))
        self.register_buffer("table_MP", torch.empty(0, vector_width), persistent=False)
        self.register_buffer("projected_Md", None, persistent=False)

    def hold(self, vector_MP: Float[torch.Tensor, "M P"]) -> None:
        """The vectors of all items, NaN where one has none, as for the unknown item in row 0."""
        self.table_MP, self.projected_Md = vector_MP, None

    def hold_projected(self, projected_Md: Float[torch.Tensor, "M d"]) -> None:
        """What `project` has made of them."""
        self.projected_Md = projected_Md

    def forward(self, item_N: Int64[torch.Tensor, "*N"]) -> Float[torch.Tensor, "*N d"]:
        """What the vectors of these items add. Raises ValueError when none are held."""
        if self.projected_Md is not None:
            return functional.embedding(item_N, self.projected_Md)
        if not len(self.table_MP):
            raise ValueError("the model reads vectors of items, and holds none: load it with them, or with a table")
        return self.project(functional.embedding(item_N, self.table_MP))

    def project(self, vector_NP: Float[torch.Tensor, "*N P"]) -> Float[torch.Tensor, "*N d"]:
        """The same from vectors: also of items the model has never seen."""
        standard_NP = ((vector_NP - self.centre_P) * self.scale_P).clamp(-DEVIATIONS_MAX, DEVIATIONS_MAX)
        return self.projection(torch.where(vector_NP.isnan(), 0.0, standard_NP))

    @torch.no_grad()
    def standardise(self) -> None:
        """Take centre and scale from what is held. A number that all of them share tells nothing: it is 0."""
        there_MP = ~self.table_MP.isnan()
        count_P = there_MP.sum(dim=0).clamp(min=1)

        def mean(value_MP: torch.Tensor) -> torch.Tensor:
            return torch.where(there_MP, value_MP, 0.0).sum(dim=0, dtype=torch.float64) / count_P

        self.centre_P.copy_(mean(self.table_MP))
        deviation_P = mean((self.table_MP - self.centre_P) ** 2).sqrt()
        least_P = torch.where(there_MP, self.table_MP, torch.inf).amin(dim=0)
        most_P = torch.where(there_MP, self.table_MP, -torch.inf).amax(dim=0)
        self.scale_P.copy_(torch.where((most_P > least_P) & (deviation_P > 0), 1 / deviation_P, 0.0))
