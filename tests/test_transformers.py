"""attn_implementation="tfkern": whole models of transformers beside eager attention."""

import importlib.util
import itertools
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tfkern
from tfkern.integrations import transformers as integration

sys.path.append(str(Path(__file__).resolve().parent))
import model_runs
from zoo import DECODERS, MODELS, NAMED, TEXT

pytestmark = pytest.mark.needs("transformers", importlib.util.find_spec("transformers") is not None)
BF16 = torch.bfloat16
PADDED = [(m, side) for m in TEXT for side in ("right", "left")] + [(NAMED["CLIP"], "right")]


@pytest.fixture(scope="module", autouse=True)
def registered():
    """transformers is imported here, not by whoever only collects."""
    return model_runs.registered()


@pytest.mark.parametrize("m", MODELS, ids=str)
def test_forward_and_gradients(m):
    errors = model_runs.judge(model_runs.prepared(m))
    assert len(errors) > 20
    model_runs.assert_within(errors)


@pytest.mark.parametrize(("m", "side"), PADDED, ids=str)
def test_padding(m, side):
    model_runs.assert_within(model_runs.judge(model_runs.prepared(m, side)))


@pytest.mark.parametrize("m", MODELS, ids=str)
def test_autocast(m):
    model_runs.assert_within(model_runs.judge(model_runs.prepared(m, "right" if m in TEXT else None, BF16), BF16))


@pytest.mark.parametrize("m", MODELS, ids=str)
def test_frozen_parameters(m):
    """Every second one, and so some of what attention would have a gradient for."""

    def freeze(model, inputs):
        for p in list(model.parameters())[::2]:
            p.requires_grad_(False)

    model_runs.assert_within(model_runs.judge(model_runs.prepared(m, change=freeze)))


def packed(inputs, cu_seq_lens, lengths=(4, 1, 6)):
    """One row in which sequences lie behind each other."""
    rows = inputs["input_ids"]
    inputs["input_ids"] = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])[None]
    inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    if cu_seq_lens:
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        inputs |= dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=max(lengths), max_length_k=max(lengths))
    inputs["use_cache"] = False


def batched(inputs, lengths=(4, 1, 6)):
    """The same sequences as rows with padding behind."""
    inputs["input_ids"] = inputs["input_ids"][:, : max(lengths)]
    inputs["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


# These two don't look at positions when they make masks, with any attention: sequences have to be told by their starts.
BLIND = (NAMED["OPT"], NAMED["gpt-oss"])
PACKED = [(m, starts) for m in DECODERS for starts in (False, True) if starts or m not in BLIND]


@pytest.mark.parametrize(("m", "cu_seq_lens"), PACKED, ids=str)
def test_packed_sequences(m, cu_seq_lens, monkeypatch):
    def change(model, inputs):
        if model.config._attn_implementation == "tfkern":
            packed(inputs, cu_seq_lens)
        else:
            batched(inputs)

    varlen = []
    real = integration.attention_varlen
    monkeypatch.setattr(integration, "attention_varlen", lambda *a, **k: (varlen.append(1), real(*a, **k))[1])
    model_runs.assert_within(model_runs.judge(model_runs.prepared(m, change=change)))
    assert len(varlen) == (m.calls if cu_seq_lens else 0)


CACHED = [*DECODERS, *(m for m in MODELS if m.kind == "seq2seq")]


def stepwise(m, attn, dtype, side, static, steps=(5, 2, 1, 1)):
    """Logits of a text that comes in steps, through a cache."""
    import transformers

    model, text = m.make(attn, dtype), "decoder_" if m.kind == "seq2seq" else ""
    inputs = m.inputs(pad=side)
    ids, mask = inputs[text + "input_ids"], inputs.get(text + "attention_mask")
    config = model.config.get_text_config(decoder=True)
    cache = transformers.StaticCache(config, 16) if static else transformers.DynamicCache(config=config)
    more = {}
    if text:
        cache = transformers.EncoderDecoderCache(cache, transformers.DynamicCache())
        encoder_mask = inputs.get("attention_mask")
        more = dict(encoder_outputs=model.get_encoder()(inputs["input_ids"], attention_mask=encoder_mask),
                    attention_mask=encoder_mask)  # fmt: skip
    outs, start = [], 0
    for step in steps:
        stop = start + step
        now = {text + "input_ids": ids[:, start:stop]}
        if mask is not None:
            now[text + "attention_mask"] = mask[:, :stop]
            if not text and m.name != "OPT":
                now["position_ids"] = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:stop]
        with torch.no_grad():
            outs.append(model(**more, **now, past_key_values=cache, use_cache=True).logits)
        start = stop
    out = torch.cat(outs, 1)
    return {"out": out if mask is None else out[mask[:, :start].bool()]}


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("m", CACHED, ids=str)
def test_caches(m, side, static):
    """A prompt, a chunk, and word by word; past the sliding window."""
    model_runs.assert_within(model_runs.judge(lambda attn, dtype: stepwise(m, attn, dtype, side, static)))


@pytest.mark.parametrize(
    "options", [{}, dict(cache_implementation="static"), dict(num_beams=2), dict(use_cache=False)], ids=str
)
@pytest.mark.parametrize("m", CACHED, ids=str)
def test_generate(m, options):
    """The same words from prompts padded on the left."""
    inputs = {k: x for k, x in m.inputs(pad="left").items() if not k.startswith("decoder")}
    found = []
    for attn in ("eager", "tfkern"):
        model = m.make(attn)
        with torch.no_grad():
            found.append(model.generate(**inputs, **options, max_new_tokens=6, do_sample=False))
        assert (integration.calls(model) > 0) == (attn == "tfkern")
    assert torch.equal(*found)


def dropping(m) -> dict:
    if m.name == "CLIP":
        return {part: {**m.options[part], "attention_dropout": 0.4} for part in ("text_config", "vision_config")}
    return {m.dropout: 0.4}


@pytest.mark.parametrize("m", MODELS, ids=str)
def test_checkpointing_with_dropout(m):
    """The replayed forward drops the same weights: the same gradients to the last bit, and those of the written-out formula with
    the same random bits."""
    grads = {}
    for attn, checkpointing in (("tfkern", False), ("tfkern", True), (model_runs.NAIVE, False), ("eager", False)):
        model = m.make(attn, **dropping(m)).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        inputs = m.inputs() | (dict(use_cache=False) if m.kind in ("decoder", "seq2seq") else {})
        grads[attn, checkpointing] = model_runs.results(model, inputs)
        if attn == "tfkern":
            assert (integration.calls(model) >= 2 * m.calls) if checkpointing else (integration.calls(model) == m.calls)
    once, replayed, naive, eager = grads.values()
    for name, want in once.items():
        assert torch.equal(replayed[name], want), name
    torch.testing.assert_close(once["out"], naive["out"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(once["out"], eager["out"], rtol=1e-2, atol=1e-2)  # other bits: something was dropped
    largest = max(x.abs().max() for x in naive.values()).item()
    for name, want in naive.items():
        torch.testing.assert_close(
            once[name], want, rtol=1e-3, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("m", MODELS, ids=str)
def test_patch(m):
    """tfkern.patch switches a live model, unpatch restores it, and both leave nothing behind."""
    model = m.make("eager")
    before = pickle.dumps({n: vars(x) for n, x in model.named_modules() if not isinstance(x, nn.ModuleList)})
    inputs = m.inputs()
    with torch.no_grad():
        want = model(**inputs)[0]
        report = tfkern.patch(model)
        assert "" in report.changed
        assert not report.unchanged, str(report)
        assert "(the model): transformers" in str(report)
        torch.testing.assert_close(model(**inputs)[0], want, rtol=1e-3, atol=1e-4)
        assert integration.calls(model) == m.calls
        assert set(tfkern.patch(model).already) == set(report.changed)
        assert set(tfkern.unpatch(model).changed) == set(report.changed)
        assert torch.equal(model(**inputs)[0], want)
    assert integration.calls(model) == m.calls
    assert pickle.dumps({n: vars(x) for n, x in model.named_modules() if not isinstance(x, nn.ModuleList)}) == before


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Mistral", "T5"])
def test_both_ways_of_checkpointing(name, reentrant):
    """The older one takes the mask for a tensor among tensors, and then it is one, in which rows of padding see something; it
    adds T5's gradients up in another order."""
    m, grads = NAMED[name], []
    for checkpointing in (False, True):
        model = m.make("tfkern", **{m.dropout: 0.4}).train()
        if checkpointing:
            model.activation_checkpointing_enable(dict(use_reentrant=reentrant))
            model.enable_input_require_grads()
        inputs = m.inputs(pad="left") | dict(use_cache=False)
        grads.append(model_runs.results(model, inputs, lambda out, inputs=inputs: m.seen(inputs, out)))
    for found, want in zip(grads[1].values(), grads[0].values(), strict=True):
        torch.testing.assert_close(found, want, **(dict(rtol=1e-4, atol=1e-3) if reentrant else dict(rtol=0, atol=0)))
