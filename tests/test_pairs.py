"""All pairs of features together: a set of problems in which every two choices of two features meet at least once."""

import itertools
import random

import pytest
import torch

from tfkern import testing

# Feature: choice -> fields of testing.Case. The first choice of each is its absence.
FEATURES = {
    "mask": {"": {}, "bool": dict(mask="bool bhqk"), "bias": dict(mask="float 1hqk"), "keybias": dict(mask="query b11k")},
    "dropout": {"": {}, "dropout": dict(dropout_p=0.3)},
    "softcap": {"": {}, "softcap": dict(softcap=3.0)},
    "slopes": {"": {}, "alibi": dict(slopes="h"), "alibi2d": dict(slopes="bh")},
    "sinks": {"": {}, "sinks": dict(sinks=True)},
    "score_mod": {"": {}, "log": dict(score_mod="signed_log"), "cooling": dict(score_mod="cooling")},
    "band": {
        "": {}, "causal": dict(is_causal=True), "right": dict(is_causal=True, causal_alignment="lower_right"),
        "window": dict(window=(19, 6)),
    },
    "sequences": {
        "": dict(batch=2, n_q=45, n_k=70), "padded": dict(batch=3, n_q=45, n_k=70, key_lengths=(70, 0, 33)),
        "packed": dict(lengths=((37, 0, 1, 45), (37, 20, 9, 70))),
    },
    "heads": {"": dict(heads=2), "gqa": dict(heads=4, kv_heads=2)},
    "layout": {"": {}, "bnhd": dict(layout="bnhd"), "strided": dict(layout="strided")},
    "scale": {"": {}, "negative": dict(scale=-0.2), "tensor": dict(scale=(0.3,))},
    "delta": {"": {}, "precise": dict(precise_delta=True)},
    "dims": {"": dict(head_dim=32), "odd": dict(head_dim=24, v_head_dim=40)},
}  # fmt: skip
OPTIONS = {"dropout_p", "softcap", "is_causal", "causal_alignment", "window", "key_lengths", "scale", "precise_delta"}


def pairs(choice: dict) -> set:
    return {frozenset(pair) for pair in itertools.combinations(choice.items(), 2)}


def covering() -> list[dict]:
    """Greedy: of a hundred random choices the one that brings the most pairs that have not met, until all have."""
    dice = random.Random(0)
    names = list(FEATURES)
    missing = set()
    for a, b in itertools.combinations(names, 2):
        missing |= {frozenset(((a, x), (b, y))) for x in FEATURES[a] for y in FEATURES[b]}
    chosen = []
    while missing:
        first = dict(min(missing, key=sorted))
        candidates = [{n: first.get(n) or dice.choice(list(FEATURES[n])) for n in names} | first for _ in range(100)]
        best = max(candidates, key=lambda c: len(pairs(c) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def case(choice: dict) -> testing.Case:
    fields, options = dict(n_q=0), {}
    for name, which in choice.items():
        for key, value in FEATURES[name][which].items():
            (options if key in OPTIONS else fields)[key] = value
    return testing.Case("-".join(filter(None, choice.values())) or "nothing", **fields, options=options)


CHOICES = covering()


def test_every_pair_meets():
    met = set().union(*map(pairs, CHOICES))
    wanted = sum(len(FEATURES[a]) * len(FEATURES[b]) for a, b in itertools.combinations(FEATURES, 2))
    assert len(met) == wanted
    assert len({str(case(c)) for c in CHOICES}) == len(CHOICES)


@pytest.mark.parametrize("backend", ["portable", "eager", "cpu"])
@pytest.mark.parametrize("case", [case(c) for c in CHOICES], ids=str)
def test_pair(case, backend, device):
    errors = testing.check(case, torch.float32, backend, device)
    assert all(e.ok for e in errors), "\n" + "\n".join(map(str, errors))
