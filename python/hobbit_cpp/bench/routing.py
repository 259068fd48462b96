"""How often an expert has to be loaded, before a model has run: from the statistics of real routing in locality.json."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

__all__ = ["Loads", "expected_loads"]


@dataclass(frozen=True)
class Loads:
    """Shares of all selections; `bytes` in those of a high-precision copy."""

    high: float
    low: float
    skip: float

    @property
    def hit_rate(self) -> float:
        """Selections that find a copy they can use."""
        return max(0.0, 1.0 - self.high - self.low - self.skip)

    def bytes(self, low_cost: float) -> float:
        """To be read for a selection, of a high-precision copy's."""
        return self.high + self.low * low_cost


@functools.cache
def _statistics() -> Dict[str, Any]:
    out: Dict[str, Any] = json.loads(Path(__file__).with_name("locality.json").read_text(encoding="utf-8"))
    return out


def _at(shares: List[float], values: List[float], share: float) -> float:
    """Linear between the shares that were measured; with nothing cached everything is loaded."""
    if share <= shares[0]:
        return values[0]
    for i in range(1, len(shares)):
        if share <= shares[i]:
            part = (share - shares[i - 1]) / (shares[i] - shares[i - 1])
            return values[i - 1] * (1 - part) + values[i] * part
    return values[-1]


def _beyond(ratios: List[float], values: List[float], at: float) -> float:
    """Between the traces as `_at`. Beyond the last, where experts are finer, the trend goes on at half its slope, up to twice the
    ratio. That is a guess; on the `bench` model of scripts/make_demo_model.py (64 experts, top-4) it is right to a few percent.
    """
    if at <= ratios[-1] or len(ratios) < 2:
        return _at(ratios, values, at)
    slope = (values[-1] - values[-2]) / (ratios[-1] - ratios[-2])
    return values[-1] + max(0.0, 0.5 * slope) * (min(at, ratios[-1] + math.log(2)) - ratios[-1])


def _of_trace(trace: Dict[str, Any], rule: str, share: float, n_tokens: Optional[int], after: int) -> Loads:
    statistics = _statistics()
    shares = statistics["shares"]
    none = [0.0] * len(shares)

    def at(when: str) -> List[float]:
        rows = trace["rules"][rule][when]
        return [_at(shares, rows.get(key, none), share) for key in ("load_high", "load_low", "skip")]

    early = 0.0 if n_tokens is None else min(1.0, max(0, statistics["early_tokens"] - after) / n_tokens)
    return Loads(*(e * early + x * (1 - early) for e, x in zip(at("early"), at("long"))))


def _uniform(rule: str, share: float) -> Loads:
    """Without locality the hit rate is the share of the experts that is cached; of the rest, the paper's quantiles."""
    miss = 1.0 - min(share, 1.0)
    return Loads(0.67 * miss, 0.30 * miss, 0.03 * miss) if rule == "hobbit" else Loads(miss, 0.0, 0.0)


def expected_loads(
    n_expert: int,
    n_expert_used: int,
    share: float,
    rule: str,
    n_tokens: Optional[int] = None,
    random: bool = False,
    after: int = 0,
) -> List[Loads]:
    """What is to be expected, then each trace's own: the spread.

    Args:
        n_expert: of a layer; n_expert_used: of a token. Models of the same ratio are taken as alike: between the ratios of the
            traces what is expected moves from the one to the other; beyond them see `_beyond`. With fewer experts it moves
            towards no locality at all, as where a token uses all of them.
        share: of all experts that fit into the cache.
        rule: "lru", "exact" or "hobbit".
        n_tokens: of a run from an empty cache, and with nothing learned yet; None: the long run.
        after: tokens of it that do not count.
        random: the router is noise.
    """
    if random:
        return [_uniform(rule, share)]
    traces = _statistics()["traces"]
    each = [_of_trace(trace, rule, share, n_tokens, after) for trace in traces]
    classes: Dict[float, List[Loads]] = {}
    for trace, loads in zip(traces, each):
        classes.setdefault(math.log(trace["n_expert"] / trace["n_expert_used"]), []).append(loads)
    at = math.log(max(n_expert, 1) / max(n_expert_used, 1))
    if at < min(classes):
        classes[0.0] = [_uniform(rule, share)]
        each.append(classes[0.0][0])
    ratios = sorted(classes)
    means = [_mean(classes[ratio]) for ratio in ratios]
    expected = Loads(*(_beyond(ratios, [getattr(m, key) for m in means], at) for key in ("high", "low", "skip")))
    misses = expected.high + expected.low + expected.skip
    last = means[-1].high + means[-1].low + means[-1].skip
    most = max(last, 1.0 - min(share, 1.0))  # without any locality
    if at > ratios[-1] and misses > most and misses > 0:
        expected = Loads(*(x * most / misses for x in (expected.high, expected.low, expected.skip)))
    if rule == "lru":
        # LRU finds nothing until a token's cycle fits, and that is another share in each trace: more memory never loads more.
        wider = next((x for x in _statistics()["shares"] if x > share), None)
        if share * n_expert < n_expert_used:
            expected = Loads(1.0, 0.0, 0.0)
        elif wider is not None:
            more = expected_loads(n_expert, n_expert_used, wider, rule, n_tokens, after=after)[0]
            expected = Loads(max(expected.high, more.high), 0.0, 0.0)
    return [expected, *each]


def _mean(loads: List[Loads]) -> Loads:
    n = len(loads)
    return Loads(sum(x.high for x in loads) / n, sum(x.low for x in loads) / n, sum(x.skip for x in loads) / n)
