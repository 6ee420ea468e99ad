"""attn_implementation="tfkern": whole models of transformers beside eager attention; masks; what is refused, told and undone."""

import copy
import importlib.util
import itertools
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import tfkern
from tfkern.extras import MissingExtraError
from tfkern.integrations import transformers as integration
from tfkern.integrations.transformers_masks import Band, BandMask

sys.path.append(str(Path(__file__).resolve().parent))
import model_runs
from readme import recipe
from zoo import DECODERS, IGNORING, MODELS, TEXT, padding

pytestmark = pytest.mark.needs("transformers", importlib.util.find_spec("transformers") is not None)
ROOT = Path(__file__).resolve().parent.parent
BF16 = torch.bfloat16
NAMED = {m.name.split(" ")[0]: m for m in MODELS}
PADDED = [(m, side) for m in TEXT for side in ("right", "left")] + [(NAMED["CLIP"], "right")]


@pytest.fixture(scope="module", autouse=True)
def registered():
    """transformers is imported here, not by whoever only collects."""
    return model_runs.registered()


def prepared(m, pad=None, autocast=None, change=None):
    """A function for model_runs.judge."""

    def run(attn, dtype):
        inputs, model = m.inputs(pad=pad), m.make(attn, dtype)
        if change is not None:
            change(model, inputs)
        cast = None if dtype == torch.float64 else autocast
        found = model_runs.results(model, inputs, lambda out: m.seen(inputs, out), cast)
        assert integration.calls(model) == (m.calls if attn == "tfkern" else 0)
        return found

    return run


@pytest.mark.parametrize("m", MODELS, ids=str)
def test_forward_and_gradients(m):
    errors = model_runs.judge(prepared(m))
    assert len(errors) > 20
    model_runs.assert_within(errors)


@pytest.mark.parametrize(("m", "side"), PADDED, ids=str)
def test_padding(m, side):
    model_runs.assert_within(model_runs.judge(prepared(m, side)))


@pytest.mark.parametrize("m", MODELS, ids=str)
def test_autocast(m):
    model_runs.assert_within(model_runs.judge(prepared(m, "right" if m in TEXT else None, BF16), BF16))


@pytest.mark.parametrize("m", MODELS, ids=str)
def test_frozen_parameters(m):
    """Every second one, and so some of what attention would have a gradient for."""

    def freeze(model, inputs):
        for p in list(model.parameters())[::2]:
            p.requires_grad_(False)

    model_runs.assert_within(model_runs.judge(prepared(m, change=freeze)))


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
    model_runs.assert_within(model_runs.judge(prepared(m, change=change)))
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
    """The older one takes the mask for a tensor among tensors, and then it is one; it adds T5's gradients up in another order."""
    m, grads = NAMED[name], []
    for checkpointing in (False, True):
        model = m.make("tfkern", **{m.dropout: 0.4}).train()
        if checkpointing:
            model.activation_checkpointing_enable(dict(use_reentrant=reentrant))
            model.enable_input_require_grads()
        grads.append(model_runs.results(model, m.inputs(pad="left") | dict(use_cache=False)))
    for found, want in zip(grads[1].values(), grads[0].values(), strict=True):
        torch.testing.assert_close(found, want, **(dict(rtol=1e-4, atol=1e-3) if reentrant else dict(rtol=0, atol=0)))


# Masks


def forms():
    """Arguments of a mask function, (n_q, n_k, q_offset, kv_offset), as caches ask for them."""
    from transformers import masking_utils as theirs

    functions = [
        (theirs.causal_mask_function, None), (theirs.bidirectional_mask_function, None),
        (theirs.sliding_window_causal_mask_function(3), 3), (theirs.sliding_window_bidirectional_mask_function(2), 2),
    ]  # fmt: skip
    places = [(7, 7, 0, 0), (1, 7, 6, 0), (3, 7, 4, 0), (3, 9, 2, 0), (3, 5, 6, 4), (4, 4, 0, 0), (2, 9, torch.tensor(3), 0)]
    pads = [None, "none", "right", "left", "middle", "short"]
    return itertools.product(functions, places, pads)


def test_bands_tell_what_masks_tell():
    """By attention with the band against attention with the mask that it stands for."""
    from transformers import masking_utils as theirs

    torch.manual_seed(0)
    count, kinds = 0, set()
    for (function, local_size), (n_q, n_k, q_offset, kv_offset), pad in forms():
        length = int(q_offset) + n_q
        attention_mask = None if pad is None else torch.ones(2, length, dtype=torch.bool)
        if pad in ("right", "left", "middle"):
            attention_mask[1, {"right": slice(-1, None), "left": slice(0, 1), "middle": slice(1, 2)}[pad]] = False
        if pad == "short":
            attention_mask = attention_mask[:, :-1]
        arguments = dict(
            batch_size=2, q_length=n_q, kv_length=n_k, q_offset=q_offset, kv_offset=kv_offset, mask_function=function,
            attention_mask=attention_mask, local_size=local_size,
        )  # fmt: skip
        mask = integration.transformers_masks.mask(**arguments, dtype=torch.float32, config=None)
        want = theirs.sdpa_mask(**arguments, allow_is_causal_skip=False)
        assert torch.equal(mask + 0, theirs.eager_mask(**arguments))
        assert torch.equal(mask.seen(), want)
        if mask.band is None:
            assert local_size == 2
            assert n_k == 9
            continue
        kinds.add((mask.band.alignment, mask.band.keys is None, mask.band.key_lengths is None, mask.band.padding is None))
        q, k, v = (torch.randn(2, 2, n, 4) for n in (n_q, n_k, n_k))
        module = nn.Identity()
        for more in ({}, dict(position_bias=torch.randn(1, 2, n_q, n_k))):
            found, dense = (integration.attention_forward(module, q, k, v, m, **more)[0] for m in (mask, want))
            torch.testing.assert_close(found, dense)
        count += 1
    assert count == 168 - 12
    assert len(kinds) > 6


def test_masks_that_no_band_tells():
    from transformers import masking_utils as theirs

    make = integration.transformers_masks.mask
    chunked = theirs.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long))
    either = theirs.or_masks(theirs.causal_mask_function, lambda b, h, q, k: k < 2)
    for function in (chunked, either, theirs.sliding_window_causal_mask_function(4)):
        arguments = dict(batch_size=2, q_length=7, kv_length=7, mask_function=function, local_size=3)
        mask = make(**arguments)
        assert mask.band is None
        assert torch.equal(mask.seen(), theirs.sdpa_mask(**arguments, allow_is_causal_skip=False))
        assert torch.equal(mask + 0, theirs.eager_mask(**arguments))


def test_a_band_mask_is_an_ordinary_mask_to_others():
    make = integration.transformers_masks.mask
    mask = make(batch_size=1, q_length=3, kv_length=4, q_offset=1)
    assert mask._written is None
    assert (mask.shape, mask.dtype, mask.ndim) == ((1, 1, 3, 4), torch.float32, 4)
    assert "BandMask" in repr(mask)
    seen = torch.ones(3, 4).tril(1).bool()[None, None]
    want = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    assert torch.equal(mask[:, :, :2], want[:, :, :2])
    assert type(mask[0]) is torch.Tensor
    assert torch.equal(mask + torch.ones(3, 1), want + 1.0)
    assert torch.equal(mask.clone(), want)
    assert mask.band is not None
    mask.fill_(0.0)
    assert mask.band is None  # it would tell what was
    q = torch.randn(1, 1, 4, 4)
    found = integration.attention_forward(nn.Identity(), q[:, :, :3], q, q, mask)[0]
    torch.testing.assert_close(found, integration.attention_forward(nn.Identity(), q[:, :, :3], q, q, ~seen | seen)[0])
    assert make(batch_size=1, q_length=3, kv_length=4, dtype=BF16).clone().dtype == BF16


def test_a_static_cache_counts_on():
    """A mask remembers where it stood."""
    offset = torch.tensor(2)
    mask = integration.transformers_masks.mask(batch_size=1, q_length=1, kv_length=5, q_offset=offset)
    offset += 1
    assert torch.equal(mask.seen(), torch.tensor([True, True, True, False, False])[None, None, None])
    assert mask.band.key_lengths.tolist() == [3]


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma-2", "gpt-oss", "BERT", "T5", "BART"])
@pytest.mark.parametrize("side", [None, "right", "left"])
def test_no_mask_is_written_out(name, side, monkeypatch):
    """Windows, causality and padding are features of the kernels, not a tensor of N x N."""
    seen = []
    real = integration.attention
    monkeypatch.setattr(integration, "attention", lambda *a, **k: (seen.append((a, k)), real(*a, **k))[1])
    monkeypatch.setattr(BandMask, "written", lambda self: pytest.fail("written out"))
    m = NAMED[name]
    model = m.make("tfkern")
    with torch.no_grad():
        model(**m.inputs(pad=side))
    assert len(seen) == m.calls
    for (*_, mask), options in seen:
        assert mask is None or mask.shape[2] == 1 or name == "T5"
        assert (options["key_lengths"] is not None) == (side == "right")
        if name in ("Llama", "Mistral", "Gemma-2", "gpt-oss"):
            assert options["window"] in ((None, 0), (3, 0))
    windows = {options["window"] for _, options in seen}
    assert ((3, 0) in windows) == (name in ("Mistral", "Gemma-2", "gpt-oss"))
    assert all((options["softcap"] == 2.0) == (name == "Gemma-2") for _, options in seen)
    assert all((options["sinks"] is not None) == (name == "gpt-oss") for _, options in seen)


@pytest.mark.parametrize("kind", ["bool", "float", "bf16"])
@pytest.mark.parametrize("name", ["Llama", "BERT", "GPT-2"])
def test_masks_of_users(name, kind):
    """4-D, as they come, and one mask hides a key in the middle."""
    m = NAMED[name]
    mask = torch.ones(11, 11).tril().bool().expand(3, 1, 11, 11).clone()
    mask[1, :, 5:, 3] = False

    def change(model, inputs):
        dtype = next(model.parameters()).dtype
        additive = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        if model.config._attn_implementation == "tfkern" and kind != "float":
            additive = mask if kind == "bool" else torch.zeros(mask.shape, dtype=BF16).masked_fill(~mask, -torch.inf)
        if model.config._attn_implementation == model_runs.NAIVE:
            additive = mask
        inputs["attention_mask"] = additive

    model_runs.assert_within(model_runs.judge(prepared(m, change=change)))


# The function itself


def attend(mask=None, n_q=4, n_k=4, module=None, **options):
    q, k = torch.ones(2, 2, n_q, 4), torch.ones(2, 2, n_k, 4)
    return integration.attention_forward(nn.Identity() if module is None else module, q, k, k, mask, **options)[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(block_indices=torch.zeros(1)), NotImplementedError, "block_indices must be None: tfkern's attention doesn't know"),
        (dict(cache=object()), NotImplementedError, "cache must be None"),
        (dict(head_mask=torch.ones(2)), NotImplementedError, "head_mask must be None"),
        (dict(output_attentions=True), NotImplementedError, "output_attentions=True needs the weights"),
        (dict(cu_seq_lens_q=torch.tensor([0, 4])), ValueError, "cu_seq_lens_q and cu_seq_lens_k must be given together"),
        (dict(cu_seq_lens_q=torch.tensor([0, 4]), cu_seq_lens_k=torch.tensor([0, 4])), ValueError, "query must have a batch of 1"),
        (dict(sliding_window=2, n_q=2), ValueError, "attention_mask must be given where a sliding_window"),
        (dict(mask=torch.ones(2, 1, 4, 4, dtype=torch.int)), TypeError, "attn_mask must be bool"),
    ],
)  # fmt: skip
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        attend(**options)


def test_a_keyword_through_a_model():
    model = NAMED["Llama"].make("tfkern")
    with pytest.raises(NotImplementedError, match="some_keyword must be None"):
        model(**NAMED["Llama"].inputs(), some_keyword=3)
    attend(output_attentions=False, indices=None, use_cache=True, position_ids=torch.arange(4))


def test_masks_beside_starts():
    """What is seen can't be told twice."""
    starts = torch.tensor([0, 1, 4])
    q = torch.randn(1, 2, 4, 4)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    call = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts)
    with pytest.raises(ValueError, match="attention_mask and position_bias must be None with cu_seq_lens_q"):
        integration.attention_forward(nn.Identity(), q, q, q, mask, **call)
    found = integration.attention_forward(nn.Identity(), q, q, q, None, sliding_window=2, **call)[0]
    q1, q2 = q[:, :, :1], q[:, :, 1:]
    want = [tfkern.attention(x, x, x, is_causal=True, window=(1, None)) for x in (q1, q2)]
    torch.testing.assert_close(found, torch.cat(want, 2).transpose(1, 2))


def test_without_a_mask():
    """The keyword is_causal, then the module's attribute, then True; for one query nothing is hidden, but by a window."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 6, 4)
    module = nn.Identity()

    def found(q, k, **options):
        return integration.attention_forward(module, q, k, k, None, **options)[0].transpose(1, 2)

    causal, full = (tfkern.attention(q, k, k, is_causal=c) for c in (True, False))
    torch.testing.assert_close(found(q, k), causal)  # a static cache's empty keys are behind
    torch.testing.assert_close(found(q, k, is_causal=False), full)
    module.is_causal = False
    torch.testing.assert_close(found(q, k), full)
    torch.testing.assert_close(found(q, k, is_causal=True), causal)
    torch.testing.assert_close(found(q[:, :, :1], k, is_causal=True), full[:, :, :1])
    torch.testing.assert_close(found(q, q, is_causal=True, sliding_window=2), tfkern.attention(q, q, q, window=(1, 0)))
    last = tfkern.attention(q[:, :, :1], k[:, :, -3:], k[:, :, -3:])
    torch.testing.assert_close(found(q[:, :, :1], k, is_causal=True, sliding_window=3), last)
    both = found(q, k.expand(2, -1, -1, -1), is_causal=False)
    torch.testing.assert_close(both, full.expand(2, -1, -1, -1))  # learned queries, one for the batch
    with pytest.raises(ValueError, match="attention_mask must be given where"):
        found(q, k, sliding_window=3)


def test_dropout_is_trainings():
    module = nn.Identity()
    assert not torch.equal(attend(module=module, dropout=0.5), attend(module=module))
    module.eval()
    assert torch.equal(attend(module=module, dropout=0.5), attend(module=module))


def test_autocast_keeps_the_bias():
    """T5's bias stays float32 beside queries in bfloat16."""
    torch.manual_seed(0)
    q, bias = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    with torch.autocast("cpu", dtype=BF16):
        found = integration.attention_forward(nn.Identity(), q, q, q.to(BF16), None, position_bias=bias, is_causal=False)[0]
    wide, narrow = (tfkern.attention(*[q.to(BF16)] * 3, x).transpose(1, 2) for x in (bias, bias.to(BF16)))
    assert torch.equal(found, wide)
    assert not torch.equal(found, narrow)


# Registering, and being told


def test_register_again_and_by_another_name():
    from transformers.modeling_utils import PreTrainedModel

    hooked = PreTrainedModel.get_correct_attn_implementation
    assert integration.register() == "tfkern"
    assert integration.register("tfkern_too") == "tfkern_too"
    assert PreTrainedModel.get_correct_attn_implementation is hooked
    model = NAMED["BERT"].make("tfkern_too")
    model(**NAMED["BERT"].inputs())
    assert integration.calls(model) == 2
    for name, message in (
        ("flash_ours", "without 'flash'"),
        ("us/ours", "without 'flash'"),
        ("sdpa", "must be free"),
        (3, "string"),
    ):
        with pytest.raises(ValueError, match=message):
            integration.register(name)


@pytest.mark.parametrize("m", IGNORING, ids=str)
def test_a_model_that_ignores_it_is_told(m):
    """It is made as it would be without tfkern, and patch leaves it alone."""
    with pytest.warns(UserWarning, match=r"doesn't ask transformers' AttentionInterface.*='tfkern' means 'eager'") as told:
        model = m.make("tfkern")
    assert len(told) == 1
    assert {x.config._attn_implementation for x in model.modules() if hasattr(x, "config")} == {"eager"}
    for side in (None, "right", "left"):
        inputs = m.inputs(pad=side)
        assert torch.equal(model(**inputs)[0], m.make("eager")(**inputs)[0])
    assert not any(x._forward_hooks for x in model.modules())
    report = tfkern.patch(model)
    assert not report.changed
    assert "doesn't ask transformers' AttentionInterface" in report.unchanged[""]


@pytest.mark.parametrize("m", IGNORING, ids=str)
def test_a_model_that_is_found_out_late(m, monkeypatch):
    """One that doesn't look like it ignores tfkern: it is told at the first forward pass, and its masks are eager attention's."""
    monkeypatch.setattr(integration, "asks", lambda cls: True)
    model = m.make("tfkern")
    inputs = m.inputs(pad="left")
    with pytest.warns(UserWarning, match=r"ignores attn_implementation='tfkern'.*no call reached tfkern") as told:
        found = model(**inputs)[0]
    assert len(told) == 1
    assert torch.equal(found[m.seen(inputs, found)], m.make("eager")(**inputs)[0][m.seen(inputs, found)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)  # once
    assert not any(x._forward_hooks for x in model.modules())


def test_the_watch_is_over_after_the_first_call():
    model = NAMED["BERT"].make("tfkern")
    assert model._forward_hooks
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for x in (model, copied):
        x(**NAMED["BERT"].inputs())
        assert integration.calls(x) == 2
        assert not any(module._forward_hooks for module in x.modules())
    assert not NAMED["BERT"].make("eager")._forward_hooks


def test_patch_for_a_block_and_for_part_of_a_model():
    m = NAMED["BERT"]
    model = m.make("sdpa")
    with tfkern.patched(model) as report:
        assert set(report.changed) == {"", "bert"}
        assert model.config._attn_implementation == "tfkern"
    assert model.config._attn_implementation == "sdpa"
    clip = NAMED["CLIP"].make("eager")
    tfkern.patch(clip.vision_model)
    assert clip.vision_model.config._attn_implementation == "tfkern"
    assert clip.text_model.config._attn_implementation == "eager"
    tfkern.patch(clip)
    assert clip.text_model.config._attn_implementation == "tfkern"
    tfkern.unpatch(copy.deepcopy(clip))
    assert clip.text_model.config._attn_implementation == "tfkern"
    tfkern.unpatch(clip)
    assert {x.config._attn_implementation for x in (clip, clip.text_model, clip.vision_model)} == {"eager"}
    assert not any(x._forward_hooks for x in clip.modules())  # never called, and watched no more
    chosen = m.make("tfkern")  # by its user
    tfkern.patch(chosen)
    tfkern.unpatch(chosen)
    assert chosen.config._attn_implementation == "tfkern"


def test_saved_models_know_nothing_of_it(tmp_path):
    model = NAMED["BERT"].make("eager")
    tfkern.patch(model)
    assert "tfkern" not in model.config.to_json_string()


def test_the_recipe_in_the_readme(capsys):
    exec(recipe("transformers"), run := {})
    assert run["model"].config._attn_implementation == "tfkern"
    assert "(the model): transformers.PreTrainedModel -> attn_implementation" in capsys.readouterr().out


def test_our_kernels_are_not_the_package_kernels(registered):
    """transformers probes for a package of that name; ours is tfkern.kernels, and a folder of the checkout."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not str(spec.origin or spec.submodule_search_locations).startswith(str(ROOT))
    code = (
        "import tfkern, tfkern.kernels, importlib.util; spec = importlib.util.find_spec('kernels'); "
        "import transformers.utils as u; print(spec is None or 'site-packages' in str(spec.origin), u.is_kernels_available())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() in (["True", "False"], ["True", str(spec is not None)])


def test_without_transformers(python_without):
    code = (
        "import torch, tfkern\\nfrom tfkern.integrations import transformers\\ntfkern.patch(torch.nn.Linear(2, 2))\\n"
        "try: transformers.register()\\nexcept ImportError as e: print(type(e).__name__, e)"
    ).replace("\\n", "\n")
    command = python_without("", "transformers")
    command[-1] += "\n" + code
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(MissingExtraError.__name__)
    assert "pip install '.[transformers]'" in done.stdout


def test_padding_of_the_zoo():
    """It is what the tests say."""
    assert padding("left", 7)[1].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert Band() == Band(None, None, "upper_left")
