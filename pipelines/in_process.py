"""What Beam's in-process runner needs to follow a log for months. Both are set in Beam itself: it has no options.

Workers of other processes, and other runners, are not touched.
"""

from __future__ import annotations

from collections.abc import Iterable

from apache_beam.metrics.monitoring_infos import consolidate
from apache_beam.portability.api.org.apache.beam.model.pipeline.v1.metrics_pb2 import MonitoringInfo
from apache_beam.runners.portability.fn_api_runner import fn_runner
from apache_beam.runners.worker.statesampler import StateSampler

IN_PROCESS = ("--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner", "--streaming")
# How often Beam looks which step is at work. It waits for its next look at the end of each bundle: 200 ms by default.
SAMPLING_MS = 5


def prepare_runner() -> None:
    """Once per process, or more often.

    The runner adds each bundle's counters to those before by a generator over a generator, which it unfolds at the
    end: memory grows with every bundle, and after about a thousand the end is a RecursionError. Here they are added
    at once.
    """
    fn_runner.consolidate_monitoring_infos = _consolidated
    StateSampler.__init__.__defaults__ = (SAMPLING_MS,)


def _consolidated(infos: Iterable[MonitoringInfo]) -> list[MonitoringInfo]:
    return list(consolidate(infos))
