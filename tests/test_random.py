"""Random problems, drawn by hypothesis: any shapes with any features. `pytest tests/test_random.py --problems 2000` draws more."""

import pytest
import torch

from tfkern import configs, testing

pytest.importorskip("hypothesis", reason="hypothesis draws the problems: pip install -e '.[test]'")
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SIZES = st.integers(0, 40)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])
PARTS = 4  # for as many processes


@st.composite
def cases(draw) -> testing.Case:
    kv_heads = draw(st.integers(1, 2))
    fields = dict(heads=kv_heads * draw(st.sampled_from([1, 1, 2, 3])), kv_heads=kv_heads, head_dim=draw(st.integers(1, 33)))
    if draw(st.booleans()):
        fields["v_head_dim"] = draw(st.integers(1, 33))
    options = {}
    if draw(st.integers(0, 3)) == 0:
        pairs = draw(st.lists(st.tuples(SIZES, SIZES), max_size=4))
        fields.update(n_q=0, lengths=(tuple(q for q, _ in pairs), tuple(k for _, k in pairs)))
    else:
        fields.update(batch=draw(st.integers(1, 3)), n_q=draw(SIZES), n_k=draw(SIZES))
        fields["layout"] = draw(st.sampled_from(["bhnd", "bnhd", "packed", "strided", "expanded"]))
        if draw(st.booleans()):
            lengths = st.lists(st.integers(0, fields["n_k"]), min_size=fields["batch"], max_size=fields["batch"])
            options["key_lengths"] = tuple(draw(lengths))
    options["is_causal"] = draw(st.booleans())
    options["causal_alignment"] = draw(st.sampled_from(["upper_left", "lower_right"]))
    side = st.none() | st.integers(0, 45)
    options["window"] = draw(st.none() | st.tuples(side, side))
    options["scale"] = draw(st.none() | st.floats(-2, 2, width=32) | st.floats(-2, 2, width=32).map(lambda x: (x,)))
    options["dropout_p"] = draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0]))
    options["precise_delta"] = draw(st.booleans())
    options["softcap"] = draw(st.none() | st.floats(0.25, 50, width=32))
    dims = st.tuples(*(st.sampled_from([d, "1"]) for d in "bhqk")).map("".join)
    kind = draw(st.sampled_from([None, None, "bool", "float", "query"]))
    return testing.Case(
        "random", **fields, options=options, mask=kind and f"{kind} {draw(dims)}", slopes=draw(st.sampled_from([None, "h", "bh"])),
        sinks=draw(st.booleans()), score_mod=draw(st.sampled_from([None, None, "signed_log", "cooling"])),
    )  # fmt: skip


@pytest.mark.parametrize("part", range(PARTS))
def test_random(part, request, device):
    count = -(-request.config.getoption("--problems") // PARTS)
    drawn = set()

    @seed(part)
    @settings(
        max_examples=count, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # a Case is short: no minutes of shrinking
    )  # fmt: skip
    @given(case=cases(), dtype=DTYPES, number=st.integers(0, 1000))
    def run(case, dtype, number):
        tiles = {} if number % 2 else {"flash_bwd_one_pass": None}  # the backward in one pass where it can, or in two
        for backend in ("portable", "eager", *(["cpu"] if device == "cpu" else [])):
            with configs.override(**tiles):
                errors = testing.check(case, dtype, backend, device, number)
            assert all(e.ok for e in errors), f"{case!r} {backend} {dtype} seed {number}\n" + "\n".join(map(str, errors))
        drawn.add((repr(case), dtype, number))

    run()
    print(f"{len(drawn)} different problems, no mismatch")
    assert len(drawn) >= count // 2
