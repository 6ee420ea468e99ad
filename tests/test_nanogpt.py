"""nanoGPT and minGPT: their layer by ours, loaded, built and patched. The references here are written for these tests."""

import copy
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import tfkern
from tfkern.integrations import nanogpt
from tfkern.testing import budget

sys.path.append(str(Path(__file__).resolve().parent))
from readme import recipe

NANO = SimpleNamespace(n_embd=24, n_head=3, dropout=0.0, bias=True, block_size=16)
NANO_WITHOUT_BIAS = SimpleNamespace(n_embd=24, n_head=3, dropout=0.0, bias=False, block_size=16)
MINI = SimpleNamespace(n_embd=24, n_head=3, attn_pdrop=0.0, resid_pdrop=0.0, block_size=16)
CONFIGS = {"nanoGPT": NANO, "nanoGPT without biases": NANO_WITHOUT_BIAS, "minGPT": MINI}


class CausalSelfAttention(nn.Module):
    """Attributes, parameters and buffers named as in nanoGPT and minGPT; the formula as in a textbook."""

    def __init__(self, config, buffer: bool):
        super().__init__()
        bias = getattr(config, "bias", True)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=bias)
        self.attn_dropout = nn.Dropout(getattr(config, "attn_pdrop", getattr(config, "dropout", 0.0)))
        self.resid_dropout = nn.Dropout(getattr(config, "resid_pdrop", getattr(config, "dropout", 0.0)))
        self.n_head, self.n_embd = config.n_head, config.n_embd
        if buffer:
            self.register_buffer("bias", torch.ones(1, 1, config.block_size, config.block_size).tril())

    def forward(self, x):
        heads = [z.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for z in self.c_attn(x).chunk(3, -1)]
        scores = heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = self.attn_dropout(F.softmax(scores.masked_fill(hidden, -torch.inf), -1))
        return self.resid_dropout(self.c_proj((weights @ heads[2]).transpose(1, 2).flatten(2)))


class Variant(CausalSelfAttention):
    pass


Variant.__name__ = "CausalSelfAttention"


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), layer(config)


class GPT(nn.Module):
    """Two blocks around a layer, laid out as in nanoGPT and minGPT."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        h = nn.ModuleList(Block(config, layer) for _ in range(2))
        self.transformer = nn.ModuleDict(dict(wte=nn.Embedding(32, config.n_embd), h=h))
        self.lm_head = nn.Linear(config.n_embd, 32, bias=False)

    def forward(self, ids, checkpointing: bool = False):
        x = self.transformer.wte(ids)
        for block in self.transformer.h:
            y = block.ln_1(x)
            x = x + (checkpoint(block.attn, y, use_reentrant=False) if checkpointing else block.attn(y))
        return self.lm_head(x)


def theirs(config, seed: int = 0, buffer: bool = True) -> GPT:
    torch.manual_seed(seed)
    return GPT(config, lambda config: CausalSelfAttention(config, buffer))


def results(model, dtype=torch.float32, seed: int = 0, autocast=None, **options) -> dict:
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(32, (2, 11), generator=generator)
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        out = model(ids, **options)
    (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum().backward()
    return {"out": out.detach().clone()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def judge(found, config, autocast=None) -> None:
    """Against the reference in float64, beside the reference."""

    def wide():
        return results(theirs(config), torch.float64)

    plain = results(theirs(config), torch.float32, autocast=autocast)
    errors = budget.judge(found, wide(), [plain], wide, products=autocast or torch.float32)
    assert not [str(e) for e in errors if not e.ok]
    assert len(errors) > 6


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("way", ["load", "patch"])
@pytest.mark.parametrize("name", CONFIGS)
def test_models(name, way, autocast, monkeypatch):
    """Forward and every gradient, of a model built with ours that loads theirs, masks and all, and of one that is patched."""
    config, made = CONFIGS[name], []
    real = nanogpt.attention_packed
    monkeypatch.setattr(nanogpt, "attention_packed", lambda *a, **k: (made.append(1), real(*a, **k))[1])
    model = theirs(config)
    if way == "load":
        state = model.state_dict()
        assert "transformer.h.0.attn.bias" in state
        model = GPT(config, nanogpt.CausalSelfAttention)
        model.load_state_dict(state)
        assert "transformer.h.0.attn.bias" in state  # the caller's own stays whole
    else:
        report = tfkern.patch(model)
        assert set(report.changed) == {"transformer.h.0.attn", "transformer.h.1.attn"}
        assert "nanoGPT's CausalSelfAttention -> tfkern.integrations.nanogpt.CausalSelfAttention" in str(report)
        made.clear()
    found = results(model, autocast=autocast)
    assert len(made) == 2
    judge(found, config, autocast)


@pytest.mark.parametrize("buffer", [False, True])
def test_patch_and_back(buffer):
    model = theirs(NANO, buffer=buffer)
    seen = []
    model.transformer.h[0].attn.c_attn.register_forward_hook(lambda *a: seen.append(1))
    before = {n: set(vars(m)) for n, m in model.named_modules()}, [type(m) for m in model.modules()]
    state = {n: x.data_ptr() for n, x in model.state_dict().items()}
    tfkern.patch(model)
    assert not seen  # what is tried is tried on a copy
    assert model.training
    assert {n: x.data_ptr() for n, x in model.state_dict().items()} == state
    assert type(model.transformer.h[0].attn) is nanogpt.CausalSelfAttention
    model.load_state_dict(model.state_dict())
    assert set(tfkern.patch(model).already) == {"transformer.h.0.attn", "transformer.h.1.attn"}
    tfkern.unpatch(model)
    assert ({n: set(vars(m)) for n, m in model.named_modules()}, [type(m) for m in model.modules()]) == before
    model(torch.zeros(1, 4, dtype=torch.long))
    assert seen


def test_copies():
    model = GPT(NANO, nanogpt.CausalSelfAttention).eval()
    ids = torch.arange(8)[None]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids), model(ids))


def test_checkpointing_with_dropout():
    config = SimpleNamespace(n_embd=24, n_head=3, dropout=0.5)
    torch.manual_seed(0)
    model = GPT(config, nanogpt.CausalSelfAttention)
    runs = []
    for checkpointing in (False, True):
        model.zero_grad()
        runs.append(results(model, checkpointing=checkpointing))
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])
    model.eval()
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids), model(ids))
    attn = model.transformer.h[0].attn
    assert (attn.attn_dropout.p, attn.resid_dropout.p) == (0.5, 0.5)


@pytest.mark.parametrize("name", ["attn_pdrop", "resid_pdrop"])
def test_minigpts_two_probabilities(name):
    config = SimpleNamespace(n_embd=24, n_head=3, **{name: 0.5})
    torch.manual_seed(0)
    layer, x = nanogpt.CausalSelfAttention(config), torch.randn(1, 6, 24)
    assert ((layer(x) == 0).float().mean() > 0.2) == (name == "resid_pdrop")
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def changed(config=NANO, cls=Variant, **attributes):
    layer = cls(config, True)
    for name, x in attributes.items():
        setattr(layer, name, x)
    return layer


def watched(layer):
    layer.attn_dropout.register_forward_hook(lambda *a: None)
    return layer


class TakesMore(CausalSelfAttention):
    def forward(self, x, cache=None):
        return super().forward(x)


class Wider(CausalSelfAttention):
    def forward(self, x):
        return super().forward(2 * x)


class Fails(CausalSelfAttention):
    def forward(self, x):
        raise RuntimeError("no cache yet")


for cls in (TakesMore, Wider, Fails):
    cls.__name__ = "CausalSelfAttention"


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (changed(q_norm=nn.LayerNorm(8)), "differs from nanoGPT's in q_norm"),
        (changed(gate=nn.Parameter(torch.ones(1))), "differs from nanoGPT's in gate"),
        (changed(attn_dropout=nn.Identity()), "has other layers of dropout"),
        (changed(cls=TakesMore), "forward takes other arguments than x"),
        (changed(cls=Wider), "computes something else"),
        (changed(cls=Fails), "can't be tried: no cache yet"),
        (changed().to("meta"), "has no weights yet"),
        (changed(flash=False), "its flash is False, or attn_dropout has hooks"),
        (watched(changed()), "its flash is False, or attn_dropout has hooks"),
    ],
)  # fmt: skip
def test_what_only_looks_like_it(layer, reason):
    report = tfkern.patch(layer)
    assert not report.changed
    assert reason in report.unchanged[""]
    assert set(tfkern.patch(changed()).changed) == {""}
    assert set(tfkern.patch(watched(changed(flash=True))).changed) == {""}  # nanoGPT, which doesn't call it then


def test_the_recipe_in_the_readme(monkeypatch, capsys):
    """In the place of nanoGPT's model.py this file's, with its names and its layout."""
    module = ModuleType("model")
    module.GPTConfig = lambda **sizes: SimpleNamespace(dropout=0.0, bias=True, block_size=16, **sizes)
    module.GPT = theirs
    monkeypatch.setitem(sys.modules, "model", module)
    exec(recipe("nanogpt"), {})
    assert "changed (2)" in capsys.readouterr().out


def test_errors():
    with pytest.raises(ValueError, match="n_embd must be a multiple of n_head, but they are 10 and 4"):
        nanogpt.CausalSelfAttention(SimpleNamespace(n_embd=10, n_head=4))
