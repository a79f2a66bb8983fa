"""Public data sets, each one small file: which files it has as published, and how they become events and items."""

from __future__ import annotations

from jobs.datasets.completejourney import COMPLETEJOURNEY
from jobs.datasets.dataset import DataSet
from jobs.datasets.gitlog import GITLOG
from jobs.datasets.kuairand import KUAIRAND_1K, KUAIRAND_PURE
from jobs.datasets.kuairec import KUAIREC_BIG, KUAIREC_SMALL
from jobs.datasets.movielens import MOVIELENS
from jobs.datasets.tmall import TMALL

DATASETS: dict[str, DataSet] = {
    data.name: data
    for data in (
        COMPLETEJOURNEY,
        GITLOG,
        KUAIRAND_1K,
        KUAIRAND_PURE,
        KUAIREC_BIG,
        KUAIREC_SMALL,
        TMALL,
        MOVIELENS,
    )
}
