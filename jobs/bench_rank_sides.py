"""The sides of `vql bench rank`: users' candidates scored from what a store holds of the users, fetch included.

All sides but `vql_shipped` share the frame (item encoder, head) and the checkpoint, but that the heads of sdim, topk
and din_50 are not told of the history's mass. All have what depends on items alone in memory, and read from the same
Redis. VQL's is `jobs.scoring.Scorer`, the product's own; beside the rivals it has neither a window nor counts, as they
have none. A rival's is `Rival`: one string for each user by MGET, then a user at a time. Raw events are the 24-byte
records of a row's recent part. Parameters are random: what scoring costs depends on sizes, not on what was learned.

Shapes: as in models.ranker; L events of a history.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow.parquet as pq
import redis
import torch
from msgspec import structs
from torch import nn
from torch.nn import functional

from jobs.bench_load import ACTIONS, DAY_MS, ITEMS
from jobs.cli_options import COUNT_HALF_LIVES
from jobs.encode_items import encode_table
from jobs.examples import Vocabulary
from jobs.scoring import Asked, Scored, Scores
from jobs.train import NEWEST, item_cells, parse_counts
from models.attention import centred, log_weights
from models.checkpoint import Checkpoint, Manifest, Sizes, write_checkpoint
from models.counts import Counter
from models.item_table import ItemTable, append_segments
from models.ranker import Ranker, Shape, VqlHistory
from models.request import Impression, Request, collate, counted
from models.wire import RECENT, recent_actions, recent_times


class Side(Protocol):
    """One way to score users' candidates."""

    def score(self, asked: Sequence[Asked]) -> Scores: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """Scores from one string of each user: `fetch` gets them, `logits` (C) reads one."""

    fetch: Callable[[Sequence[str]], list[bytes]]
    logits: Callable[[Asked, bytes], torch.Tensor]

    def score(self, asked: Sequence[Asked]) -> Scores:
        start_s = time.perf_counter()
        fetched = self.fetch([one.user_id for one in asked])
        fetched_s = time.perf_counter()
        with torch.inference_mode():
            scores = [self.logits(one, data).tolist() for one, data in zip(asked, fetched, strict=True)]
        return Scores(
            checkpoint_id="",
            users=[Scored(scores=each, history="", unknown=[]) for each in scores],
            read_s=fetched_s - start_s,
            score_s=time.perf_counter() - fetched_s,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Strings:
    """One string for each user in Redis, of one kind."""

    client: redis.Redis
    kind: str

    def put(self, user_id: str, data: bytes) -> None:
        self.client.set(self._key(user_id), data)

    def whole(self, user_ids: Sequence[str]) -> list[bytes]:
        return self.client.mget([self._key(user_id) for user_id in user_ids])

    def ends(self, user_ids: Sequence[str], size_bytes: int) -> list[bytes]:
        """The last bytes of each."""
        pipeline = self.client.pipeline(transaction=False)
        for user_id in user_ids:
            pipeline.getrange(self._key(user_id), -size_bytes, -1)
        return pipeline.execute()

    def _key(self, user_id: str) -> str:
        return f"{self.kind}:{user_id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RawEvents:
    """The logits of a ranker that reads raw events, as they were fetched."""

    ranker: Ranker
    table: ItemTable
    device: torch.device

    def logits(self, asked: Asked, data: bytes) -> torch.Tensor:
        request = as_request(asked, np.frombuffer(data, RECENT), self.table, self.ranker.counter)
        return self.ranker(request.to(self.device))[0][0]


def as_request(asked: Asked, events: np.ndarray, table: ItemTable, counter: Counter | None = None) -> Request:
    """What a ranker is asked, with these raw events (dtype RECENT) as the history; counter: as `Ranker.counter`."""
    candidate_C = table.lookup(asked.item_ids)
    impression = Impression(
        user_id=asked.user_id,
        now_ms=asked.now_ms,
        candidate_C=candidate_C,
        label_C=np.zeros(len(candidate_C), np.float32),
        item_L=events["item"],
        action_L=recent_actions(events),
        time_ms_L=recent_times(events),
        weight_L=events["weight"],
    )
    return collate([impression], counts=counted([impression], counter))


class ExactHistory(nn.Module):
    """Softmax attention over every event with exact keys and VQL's kernel: what VQL approximates.

    As fast as we know how to: keys and values are taken from tables by item, the kernel's bias is one more dimension of
    keys and queries, and torch's fused attention never holds C x L numbers.
    """

    def __init__(self, vql: VqlHistory, x_Md: torch.Tensor) -> None:
        super().__init__()
        self.vql, self.told = vql, vql.told
        self.key_MV, self.value_MV = vql.keys(x_Md).flatten(1), vql.values(x_Md).flatten(1)
        self.action_value_AV = vql.action_value_AHD.flatten(1)

    def forward(self, candidate_BCd, encoder, request):
        history, heads = request.history, (self.vql.sizes.heads, -1)
        key_BLHE = functional.embedding(history.item_BL, self.key_MV).unflatten(-1, heads)
        value_BLV = functional.embedding(history.item_BL, self.value_MV)
        value_BLHD = (value_BLV + functional.embedding(history.action_BL, self.action_value_AV)).unflatten(-1, heads)
        log_BHL = log_weights(self.vql.kernel(), history.time_ms_BL, history.weight_BL, request.now_ms_B)
        bias_BHL = centred(log_BHL)
        query_BCHE = self.vql.queries(candidate_BCd)
        width = max(query_BCHE.shape[-1] + 1, value_BLHD.shape[-1])
        out_BHCX = functional.scaled_dot_product_attention(
            _wide(torch.cat([query_BCHE, torch.ones_like(query_BCHE[..., :1])], -1).transpose(1, 2), width),
            _wide(torch.cat([key_BLHE.transpose(1, 2), bias_BHL[..., None]], -1), width),
            _wide(value_BLHD.transpose(1, 2), width),
            scale=1.0,
        )
        seen_BCV = out_BHCX[..., : self.vql.sizes.value_width].transpose(1, 2).flatten(2)
        return self.vql.with_mass(seen_BCV, log_BHL.logsumexp(dim=-1)), candidate_BCd.new_zeros(())


def _wide(x: torch.Tensor, width: int) -> torch.Tensor:
    return functional.pad(x, (0, width - x.shape[-1])).contiguous()


def rival(ranker: Ranker, history: nn.Module, shape: Shape) -> Ranker:
    """The ranker with another way to read a history, and all else the same, where its head is given as much."""
    other = Ranker(shape, ranker.encoder.feature_MF, history)
    other.encoder, other.candidate = ranker.encoder, ranker.candidate
    if getattr(history, "told", 0):
        other.head = ranker.head
    return other.eval().to(ranker.encoder.feature_MF.device)


def bench_shape(sizes: Sizes) -> Shape:
    half_lives: list[list[float | None]] = [[DAY_MS], [7 * DAY_MS], [28 * DAY_MS], [None]]
    return Shape(
        sizes=sizes,
        half_life_ms=[half_lives[head % len(half_lives)] for head in range(sizes.heads)],
        actions=len(ACTIONS),
        field_rows=[ITEMS + 1],
    )


def shipped_shape(sizes: Sizes) -> Shape:
    """The same as `vql train` makes it unless told otherwise: with a window over the newest events, and counts."""
    return replace(
        bench_shape(structs.replace(sizes, newest=NEWEST)),
        counting=parse_counts(["item_id"], COUNT_HALF_LIVES),
    )


def scoring_checkpoint(path: Path, shape: Shape, seed: int = 0) -> Checkpoint:
    """A checkpoint with random parameters, a codebook placed among its keys, and an item table of ITEMS items."""
    torch.manual_seed(seed)
    item_ids = [f"item-{n}" for n in range(1, ITEMS + 1)]
    feature_MF = np.arange(ITEMS + 1)[:, None]
    cell_MQ = None
    if shape.counting is not None:
        vocabulary = Vocabulary(fields={"item_id": item_ids}, feature_MF=feature_MF)
        cell_MQ = item_cells("vql", shape.counting, vocabulary)
    history = VqlHistory(shape)
    ranker = Ranker(shape, torch.from_numpy(feature_MF), history, cell_MQ).eval()
    with torch.inference_mode():
        keys, _ = history.grouped_keys(ranker.encoder, torch.arange(ITEMS + 1))
        history.codebook.start(keys, torch.Generator().manual_seed(seed))
    manifest = Manifest(
        model="vql",
        sizes=shape.sizes,
        half_life_ms=shape.half_life_ms,
        counts=shape.counting,
        actions=list(ACTIONS),
        fields=["item_id"],
        training={"seed": seed},
        metrics={},
        files={},
    )
    tensors = {name: tensor.numpy() for name, tensor in ranker.state_dict().items()}
    checkpoint = write_checkpoint(path, manifest, tensors, {"item_id": item_ids})
    checkpoint.items_path.mkdir()
    segment = checkpoint.items_path / "items-00000.parquet"
    pq.write_table(encode_table(ranker, ["", *item_ids], feature_MF, cell_MQ), segment)
    append_segments(checkpoint.items_path, checkpoint.checkpoint_id, [segment])
    return checkpoint
