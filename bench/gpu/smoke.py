"""Run one small problem by each kernel for Hopper, and compare the results with the oracle."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from tfkern import backends, call, testing, tiles
from tfkern.bench import fake_gpu, launches
from tfkern.testing import CAUSAL, Case

# {names of the kernels of a form, joined by +: its problem}. The backward in one launch needs enough heads to fill a chip.
FORMS = {
    "flash_fwd": Case("several-tiles", 3, 300, 64, options=CAUSAL),
    "flash_fwd_short": Case("few-keys", 3, 197, 64),
    "flash_bwd": Case("full-chip", 12, 197, 64, batch=8),
    "flash_bwd_dq+flash_bwd_dkdv": Case("several-tiles", 3, 300, 64, options=CAUSAL),
}


@contextmanager
def forced(form: str) -> Iterator[None]:
    """Make problems of head dim 64 take the kernels of a form within the block. A direction that the form does not name takes
    its usual kernels."""
    forward = dict(usual=(), heavy=()) if form == "flash_fwd_short" else dict(short=None)
    with (
        mock.patch.dict(tiles.HOPPER, {64: tiles.HOPPER[64]._replace(**forward)}),
        mock.patch.dict(tiles.HOPPER_ONE_PASS, clear=form != "flash_bwd"),
        mock.patch.dict(call._problems, clear=True),  # cached problems keep their launches
    ):
        yield


def rows(form: str, device: torch.device, dry: bool) -> Iterator[dict]:
    """Yield one row: the kernels that ran, the error and budget of each result, and what is wrong. dry: launches do nothing, so
    that there are no errors; no GPU is needed."""
    with forced(form), launches.watched() as seen:
        errors = _into_nothing(FORMS[form]) if dry else testing.check(FORMS[form], torch.bfloat16, "hopper", device)
    row = dict(kernels=[launches.name(one) for one in seen], errors={e.quantity: [e.error, e.budget] for e in errors})
    wrong = [str(e) for e in errors if not e.ok]
    if missing := set(form.split("+")) - {one.kernel.__name__ for one in seen}:
        wrong.append(f"{', '.join(sorted(missing))} did not run")
    yield {**row, "problem": "wrong results: " + "; ".join(wrong)} if wrong else row


def _into_nothing(case: Case) -> list[testing.Error]:
    fake_gpu.pretend()
    inputs = testing.make_inputs(case, torch.bfloat16)
    problem, tensors = call.build(**inputs.tensors, enable_gqa=True, **inputs.options)
    backend = backends.BACKENDS["hopper"]
    with torch.no_grad():
        out, stats = backend.forward(problem, tensors)
        backend.backward(problem, tensors, out, stats, inputs.do, None, (True,) * 3 + (False,) * 3)
    return []
