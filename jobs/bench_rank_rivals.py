"""SDIM and top-k as a server would score with them: the same scores as models/rivals gives from raw events, faster.

What depends on an item alone (hashes, buckets' places, keys, values) is made once, as VQL's item table is. SDIM's
buckets are made when events are written, and read as float16. Top-k (ETA) reads all raw events, and finds the nearest
by a compiled search over 64-bit hashes on a CPU, and by a matrix product elsewhere.

Shapes: as in models.rivals; M items, A actions, X = H * E all key widths.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from jobs.scoring import Asked
from models.item_table import ItemTable
from models.ranker import Ranker
from models.rivals.eta import NEAREST, EtaHistory
from models.rivals.sdim import BUCKETS, SdimHistory
from models.rivals.simhash import nearest, nearest_words, sides, words
from models.wire import RECENT, recent_actions


class SdimServed:
    """SDIM from a user's buckets. `ranker` is the raw form, and has the same scores but for float16's rounding."""

    @torch.inference_mode()
    def __init__(self, ranker: Ranker, table: ItemTable, device: torch.device) -> None:
        assert isinstance(ranker.history, SdimHistory)
        self.ranker, self.history, self.table, self.device = ranker, ranker.history, table, device
        self.x_Md = ranker.encoder(torch.arange(len(table), device=device))
        self.place_MG, self.candidate_MV = self.history.places(self.x_Md), ranker.candidate(self.x_Md)

    @torch.inference_mode()
    def buckets(self, events: np.ndarray) -> bytes:
        """What is written for a user with these raw events (dtype RECENT)."""
        item_L = torch.from_numpy(events["item"].astype(np.int64)).to(self.device)
        action_L = torch.from_numpy(recent_actions(events).astype(np.int64)).to(self.device)
        weight_L = torch.from_numpy(events["weight"].copy()).to(self.device)
        bucket_BSd = self.history.buckets(self.x_Md[item_L][None], action_L[None], weight_L[None])
        return bucket_BSd.half().cpu().numpy().tobytes()

    def logits(self, asked: Asked, data: bytes) -> torch.Tensor:
        item_C = torch.from_numpy(self.table.lookup(asked.item_ids)).to(self.device)
        bucket_Sd = torch.frombuffer(bytearray(data), dtype=torch.float16).view(BUCKETS, -1)
        place_CG, candidate_CV = self.place_MG.index_select(0, item_C), self.candidate_MV.index_select(0, item_C)
        seen_BCV = self.history.read(place_CG[None], bucket_Sd[None].to(self.device).float())
        return self.ranker.head_logits(candidate_CV[None], seen_BCV)[0]


class NearestServed:
    """ETA from a user's raw events. `ranker` is the raw form, and has the same scores."""

    @torch.inference_mode()
    def __init__(self, ranker: Ranker, table: ItemTable, device: torch.device) -> None:
        assert isinstance(ranker.history, EtaHistory)
        self.ranker, self.history, self.table, self.device = ranker, ranker.history, table, device
        attention, action_Ad = self.history.attention, self.history.action.weight
        x_Md = ranker.encoder(torch.arange(len(table), device=device))
        self.key_MX, self.value_MV = attention.key(x_Md), attention.value(x_Md)
        self.key_AX, self.value_AV = attention.key(action_Ad), attention.value(action_Ad)
        self.side_Mm = sides(x_Md, self.history.plane_dm)
        self.word_M = words(self.side_Mm.cpu().numpy())

    def logits(self, asked: Asked, data: bytes) -> torch.Tensor:
        """From raw events that all have a positive weight."""
        candidate_C, events = self.table.lookup(asked.item_ids), np.frombuffer(data, RECENT)
        at_Ck = self._nearest(candidate_C, events["item"])
        item_BCk, action_BCk = (
            torch.from_numpy(of_L[at_Ck].astype(np.int64))[None].to(self.device)
            for of_L in (events["item"], recent_actions(events))
        )
        x_BCd = self.ranker.encoder(torch.from_numpy(candidate_C)[None].to(self.device))
        seen_BCV = self.history.attention.attend(
            x_BCd,
            functional.embedding(item_BCk, self.key_MX) + functional.embedding(action_BCk, self.key_AX),
            functional.embedding(item_BCk, self.value_MV) + functional.embedding(action_BCk, self.value_AV),
            torch.from_numpy(events["weight"][at_Ck])[None].to(self.device),
        )
        return self.ranker.logits(x_BCd, seen_BCV)[0]

    def _nearest(self, candidate_C: np.ndarray, item_L: np.ndarray) -> np.ndarray:
        if self.device.type == "cpu":
            return nearest_words(self.word_M[candidate_C], self.word_M[item_L], NEAREST)
        candidate_BC, item_BL = (
            torch.from_numpy(item.astype(np.int64))[None].to(self.device) for item in (candidate_C, item_L)
        )
        weight_BL = torch.ones(item_BL.shape, device=self.device)
        return nearest(self.side_Mm[candidate_BC], self.side_Mm[item_BL], weight_BL, NEAREST)[0].cpu().numpy()
