"""Every model class of the installed transformers beside eager attention: python tests/models_sweep.py [FAMILY…] writes what it
finds to tests/models_sweep.json, from which tests/models_table.py writes its table. A class is made small from its config."""

import copy
import inspect
import itertools
import json
import logging
import os
import resource
import signal
import sys
import warnings
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten_with_path

sys.path.append(str(Path(__file__).resolve().parent))
import small_models
from small_inputs import inputs_of

RESULTS = Path(__file__).resolve().parent / "models_sweep.json"
SECONDS, GIGABYTES = 40, 6  # of one class
TOLERANCE = 2e-3  # of the largest entry; float32 on both sides
SKIPPED = ("past_key_values", "attentions", "hidden_states", "cross_attentions")


def families() -> dict[str, list[type]]:
    """{folder of transformers.models: its public model classes}."""
    import transformers

    found = {}
    for name in sorted(dir(transformers)):
        cls = getattr(transformers, name)
        if not (inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)):
            continue
        if ".models." in cls.__module__ and "pretrained" not in name.lower():
            found.setdefault(cls.__module__.split(".")[2], []).append(cls)
    return found


class SlowError(BaseException):
    """A class took too long; nobody's `except Exception` may take it."""


def made(cls, sizes, attn: str):
    """A model, and the same weights for every attention."""
    model = cls._from_config(_plain(cls, sizes), attn_implementation=attn)
    small_models.set_weights(model)
    return model.eval()


def _plain(cls, sizes):
    config = small_models.config_of(cls, sizes)
    config._experts_implementation = "eager"
    return config


def outputs(model, inputs: dict, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Every tensor of floats of a model's output; rows of padding as zeros. With gradients, those of its parameters, too."""
    torch.manual_seed(0)
    model.zero_grad()
    with torch.set_grad_enabled(gradients):
        out = model(**copy.deepcopy(inputs))
    leaves, _ = tree_flatten_with_path(_tree(out))
    found = {
        "".join(map(str, path)): _rows(x, inputs) for path, x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    if gradients:
        generator = torch.Generator().manual_seed(1)
        sums = [(x * torch.randn(x.shape, generator=generator))[x.isfinite()].sum() for x in found.values() if x.requires_grad]
        if sums:
            sum(sums).backward()
            found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: x.detach() for n, x in found.items()}


def _tree(out):
    if isinstance(out, dict):  # a ModelOutput
        return {k: _tree(v) for k, v in out.items() if k not in SKIPPED}
    if isinstance(out, list | tuple):
        return [_tree(x) for x in out]
    return out


def _rows(x: torch.Tensor, inputs: dict) -> torch.Tensor:
    for mask in (inputs.get("decoder_attention_mask"), inputs.get("attention_mask")):
        if mask is not None and x.dim() > 1 and x.shape[:2] == mask.shape:
            return torch.where(mask.bool().reshape(*mask.shape, *[1] * (x.dim() - 2)), x, torch.zeros((), dtype=x.dtype))
    return x


def differ(found: dict, want: dict) -> float:
    """The largest difference, relative to the largest entry of the outputs, or of the gradients."""
    assert found.keys() == want.keys(), f"{sorted(found.keys() ^ want.keys())[:3]}"
    worst = 0.0
    for kind in (False, True):
        names = [n for n in want if n.startswith("gradient of ") == kind]
        scale = max((_largest(want[n]) for n in names), default=0.0)
        for n in names:
            size = scale if kind else max(_largest(want[n]), 1e-3)
            same = torch.isclose(found[n], want[n], rtol=0, atol=0, equal_nan=True)
            difference = torch.where(same, 0.0, (found[n] - want[n]).abs()).double()
            worst = max(
                worst, difference.nan_to_num(nan=1e9, posinf=1e9).max().item() / max(size, 1e-30) if difference.numel() else 0.0
            )
    return worst


def _largest(x: torch.Tensor) -> float:
    x = x[x.isfinite()]
    return x.abs().max().item() if x.numel() else 0.0


def runs_eager(cls) -> tuple:
    """(sizes, inputs without padding, outputs) of the first sizes and inputs with which a class works at all."""
    reasons = []
    for sizes in small_models.SIZES:
        try:
            model = made(cls, sizes, "eager")
        except Exception as e:
            reasons.append(_said(e))
            continue
        for i, inputs in enumerate(inputs_of(model, None)):
            try:
                found = outputs(model, inputs)
                if not found:
                    raise ValueError("no tensor of floats in the output")
                if all(_largest(x) == 0 or not x.isfinite().any() for x in found.values()):
                    raise ValueError("nothing finite in the output")
                return sizes, i, model
            except Exception as e:
                reasons.append(_said(e))
    raise NotBuiltError("; ".join(dict.fromkeys(reasons)) or "inputs that nobody here makes up")


class NotBuiltError(Exception):
    pass


def _said(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {' '.join(lines)[:200]}"


def tried(cls) -> dict:
    """What one class does."""
    from tfkern.integrations import transformers as integration

    try:
        sizes, which, eager = runs_eager(cls)
    except Exception as e:
        return dict(status="not built", reason=(str(e) if isinstance(e, NotBuiltError) else _said(e))[:300])
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            ours = made(cls, sizes, "tfkern")
            ours.load_state_dict(eager.state_dict())
            runs = dict(runs_of(eager, which))
            cases = {name: compared(eager, ours, *run) for name, run in runs.items()}
            calls = integration.calls(ours)
            if cls.can_generate() and "input_ids" in next(iter(runs.values()))[0]:
                cases["generate"] = generated(eager, ours, nth_inputs(eager, "left", which))
            agreed = as_default(cls, sizes, eager, ours, {n: run for n, run in runs.items() if not _right(cases[n])})
    except NotImplementedError as e:
        return dict(status="refused", reason=_said(e))
    except Exception as e:
        return dict(status="error", reason=_said(e))
    wrong = [name for name, x in cases.items() if not _right(x) and name not in agreed]
    ignoring = any("attn_implementation" in str(w.message) for w in told)
    return dict(
        status="wrong" if wrong else "right", cases=cases, calls=calls, told=ignoring, agreed=agreed,
    )  # fmt: skip


def _right(x) -> bool:
    return isinstance(x, str) or x < TOLERANCE


def runs_of(model, which: int):
    """(name, (inputs, whether with gradients)) of what is compared."""
    for side in (None, "right", "left"):
        inputs = nth_inputs(model, side, which)
        if side and all(x.bool().all() for name, x in inputs.items() if name.endswith("mask")):
            continue
        yield side or "plain", (inputs, False)
        if side != "left":
            yield f"{side or 'plain'}, gradients", (inputs, True)


def nth_inputs(model, side: str | None, which: int) -> dict:
    return next(itertools.islice(inputs_of(model, side), which, None))


def compared(theirs, ours, inputs: dict, gradients: bool) -> float | str:
    """The largest difference, or why the other one has nothing to compare with."""
    try:
        want = outputs(theirs, inputs, gradients)
    except Exception as e:
        return "eager: " + _said(e)
    return float(f"{differ(outputs(ours, inputs, gradients), want):.1e}")


def as_default(cls, sizes, eager, ours, runs: dict) -> dict[str, str]:
    """{run: the other attention that agrees}, of runs in which eager attention doesn't: it attends evenly to hidden keys where all
    are hidden, and adds masks that are bool. "added": with masks taken so, tfkern gives what eager attention does."""
    found = {}
    for attn in (None, "sdpa", _added(), "float64") if runs else ():
        theirs, one = eager, ours
        try:
            if attn == "float64":
                theirs, one = (copy.deepcopy(x).double() for x in (eager, ours))
            elif attn == "added":
                one = made(cls, sizes, attn)
            else:
                theirs = made(cls, sizes, attn)
        except ValueError:  # it has no such attention
            continue
        if attn != "float64":
            (one if attn == "added" else theirs).load_state_dict(ours.state_dict())
        for name, (inputs, gradients) in runs.items():
            wide = {n: x.double() if attn == "float64" and x.is_floating_point() else x for n, x in inputs.items()}
            if name not in found and isinstance(x := compared(theirs, one, wide, gradients), float) and _right(x):
                found[name] = attn or "the default"
    return found


def _added() -> str:
    """tfkern's attention with masks that are added to scores whatever they are, as attn_implementation."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from tfkern.integrations import transformers as integration

    def forward(module, query, key, value, mask, **options):
        if isinstance(mask, integration.BandMask):
            mask = mask.written()
        mask = mask.to(query.dtype) if mask is not None and mask.dtype == torch.bool else mask
        return integration.attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("added", forward)
    AttentionMaskInterface.register("added", integration.transformers_masks.mask)
    return "added"


def generated(eager, ours, inputs):
    """Whether the same words come, from a prompt padded on the left."""
    inputs = {k: x for k, x in inputs.items() if not k.startswith("decoder")}
    found = []
    for model in (eager, ours):
        torch.manual_seed(0)
        try:
            found.append(model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False))
        except Exception as e:
            if model is eager:
                return "eager: " + _said(e)
            raise
    sequences = [getattr(x, "sequences", x) for x in found]
    if isinstance(sequences[0], torch.Tensor):
        return (
            float(not torch.equal(*sequences))
            if sequences[0].dtype == torch.long
            else differ({"": sequences[1]}, {"": sequences[0]})
        )
    return "no words"


def _family(name: str, classes: list[type], send) -> None:
    """In a process of its own: one line of JSON for each class."""
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30,) * 2)

    def stop(*_):
        raise SlowError

    signal.signal(signal.SIGALRM, stop)
    logging.disable(logging.CRITICAL)
    for cls in classes:
        try:
            signal.alarm(SECONDS)
            found = tried(cls)
            signal.alarm(0)
        except SlowError:
            found = dict(status="not built", reason=f"no result within {SECONDS} s")
        send(json.dumps({cls.__name__: dict(family=name, **found)}))


def kept() -> dict[str, dict]:
    """{class: what was found}."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(results: dict[str, dict]) -> None:
    """A line for each class."""
    lines = [f"{json.dumps(cls)}: {json.dumps(results[cls], sort_keys=True)}" for cls in sorted(results)]
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def sweep(names: list[str]) -> None:
    """Families by name, or all that aren't finished yet: others may be at work on the same file."""
    import transformers

    from tfkern.integrations import transformers as integration

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    integration.register()
    everything = families()
    for name in names or everything:
        classes = everything[name]
        if not names and all(cls.__name__ in kept() for cls in classes):
            continue
        found = _in_processes(name, classes)
        keep(kept() | found)
        for cls, r in found.items():
            print(cls, r["status"], r.get("cases", r.get("reason")), r.get("agreed", ""), flush=True)


def _in_processes(name: str, classes: list[type]) -> dict[str, dict]:
    """A family's results. What kills its process is the result of the class that it was at, and another does the rest."""
    found = {}
    while left := [cls for cls in classes if cls.__name__ not in found]:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            with open(write, "w") as pipe:
                _family(name, left, lambda line, pipe=pipe: print(line, file=pipe, flush=True))
            os._exit(0)
        os.close(write)
        with open(read) as pipe:
            for line in pipe:
                found |= json.loads(line)
        os.waitpid(child, 0)
        died = next((cls.__name__ for cls in left if cls.__name__ not in found), None)
        if died:
            found[died] = dict(family=name, status="not built", reason="the process died")
    return found


if __name__ == "__main__":
    sweep(sys.argv[1:])
