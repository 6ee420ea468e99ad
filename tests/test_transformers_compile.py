"""attn_implementation="tfkern" under torch.compile without graph breaks: models as a whole, layer by layer, and steps of decoding."""

import importlib.util
import itertools
import sys
import warnings
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from packaging import version
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from tfkern.integrations import transformers as integration

sys.path.append(str(Path(__file__).resolve().parent))
import model_runs
from zoo import IGNORING, LAYERS, MODELS, NAMED

pytestmark = pytest.mark.needs("transformers", importlib.util.find_spec("transformers") is not None)
# What a model needs to be compiled without graph breaks with any attention, and why.
NEEDED = {
    "gpt-oss": (dict(_experts_implementation="batched_mm"), "the other loops over the experts that were chosen, which is data"),
}
# A new cache deep-copies the config, which Dynamo cannot trace before PyTorch 2.12.
CACHES = version.parse(torch.__version__) >= version.parse("2.12")
# Each with the padding that it knows, and a few without and through AOTAutograd.
PADS = [(m, {"decoder": "left", "image": None}.get(m.kind, "right")) for m in MODELS]
FEW = [NAMED[name] for name in ("BERT", "T5", "Swin")]
QUICK = [*FEW, NAMED["GPT-2"], NAMED["Mistral"]]  # of each kind one


def mostly_slow(values: list[tuple], quick: list) -> list:
    """Parameters of a test, of which `make test` runs those of a few models."""
    return [pytest.param(*value, marks=[pytest.mark.slow] * (value[0] not in quick)) for value in values]


@pytest.fixture(scope="module", autouse=True)
def registered():
    """transformers is imported here, not by whoever only collects."""
    model_runs.registered()


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(m, attn="tfkern", dtype=torch.float32, **options):
    """A model that can be compiled."""
    model = m.make(attn, dtype, **options)
    for name, value in NEEDED.get(m.name.split(" ")[0], ({},))[0].items():
        setattr(model.config, name, value)
    if m.kind == "seq2seq" and not CACHES:
        for part in model.modules():
            if hasattr(part, "config"):
                part.config.use_cache = False  # the decoder has a config of its own
    return model


def compiled(model, backend: str = "eager", **options) -> CompileCounterWithBackend:
    """Compiles it in place, so that its parameters keep their names."""
    counter = CompileCounterWithBackend(backend)
    model.compile(fullgraph=True, backend=counter, **options)
    return counter


def attentions(counter) -> list[int]:
    """How many of tfkern's are in each graph."""
    op = torch.ops.tfkern.attention.default
    return [sum(node.target in (op, op.overloadpacket) for node in graph.graph.nodes) for graph in counter.graphs]


def prepared(m, pad=None, backend="eager", autocast=None, change=None):
    """A function for model_runs.judge: tfkern compiled, the others not."""

    def run(attn, dtype):
        inputs, model = m.inputs(pad=pad), m.make(attn, dtype)
        if attn == "tfkern":
            model = made(m, attn, dtype)
            counter = compiled(model, backend)
        if change is not None:
            change(model, inputs)
        cast = None if dtype == torch.float64 else autocast
        found = model_runs.results(model, inputs, lambda out: m.seen(inputs, out), cast)
        if attn == "tfkern":
            assert attentions(counter) == [m.calls]
        return found

    return run


@pytest.mark.parametrize(("m", "side"), mostly_slow(PADS, QUICK), ids=str)
def test_forward_and_gradients(m, side):
    errors = model_runs.judge(prepared(m, side))
    assert len(errors) > 20
    model_runs.assert_within(errors)


@pytest.mark.slow
@pytest.mark.parametrize("m", FEW, ids=str)
def test_through_aot_autograd(m):
    model_runs.assert_within(model_runs.judge(prepared(m, backend="aot_eager")))


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDED)
@torch.no_grad()
def test_what_no_attention_compiles(name):
    """NEEDED is not longer than it must be; and with breaks in the graph, masks going from one to the next, all is right."""
    m = NAMED[name]
    model, inputs = m.make("eager"), m.inputs(pad="left")
    compiled(model)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        model(**inputs)
    torch._dynamo.reset()
    model = m.make("tfkern", num_hidden_layers=1)
    found, want = (f(**inputs)[0] for f in (torch.compile(model, backend="aot_eager"), model))
    seen = m.seen(inputs, want)
    torch.testing.assert_close(found[seen], want[seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "side"), [pytest.param("BERT", "right", marks=pytest.mark.slow), ("Llama", None)])
def test_new_lengths_compile_nothing(name, side):
    m = NAMED[name]
    model, eager = m.make("tfkern"), m.make("tfkern")
    counter, counts = compiled(model, "aot_eager" if side else "eager", dynamic=True), []
    for length in (11, 17, 8):
        inputs = m.inputs(pad=side, length=length)
        found, want = (model_runs.results(x, inputs, lambda out, i=inputs: m.seen(i, out)) for x in (model, eager))
        close(found, want)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1
    assert attentions(counter)[-1] == m.calls


def close(found: dict, want: dict) -> None:
    """Masks that are written out make for another order of sums."""
    assert found.keys() == want.keys()
    largest = max(x.abs().max() for x in want.values()).item()
    for name, x in want.items():
        torch.testing.assert_close(
            found[name], x, rtol=1e-4, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
def test_autocast():
    m = NAMED["T5"]
    model_runs.assert_within(model_runs.judge(prepared(m, "right", autocast=torch.bfloat16), torch.bfloat16))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout(checkpointing):
    """The same random bits as uncompiled; the replayed forward drops the same weights."""
    m, found = NAMED["Llama"], []
    for compile_it in (False, True):
        model = m.make("tfkern", **{m.dropout: 0.4}).train()
        if compile_it and checkpointing:
            model.activation_checkpointing_enable()
        if compile_it:
            compiled(model, "aot_eager")
        found.append(model_runs.results(model, m.inputs() | dict(use_cache=False)))
    close(*reversed(found))
    eager = model_runs.results(m.make("tfkern").train(), m.inputs() | dict(use_cache=False))
    assert not torch.allclose(eager["out"], found[0]["out"], rtol=1e-2, atol=1e-2)  # something was dropped


@pytest.mark.slow
def test_packed_sequences():
    """Told by positions. Told by their starts they need a band for a mask, which a graph doesn't have: an error."""
    m = NAMED["Llama"]
    position_ids = torch.cat([torch.arange(n) for n in (4, 1, 6)])[None]
    inputs = dict(input_ids=m.inputs()["input_ids"][:1], position_ids=position_ids, use_cache=False)
    model = m.make("tfkern")
    counter = compiled(model, "aot_eager")
    close(*(model_runs.results(x, inputs) for x in (model, m.make("tfkern"))))
    assert attentions(counter) == [m.calls]
    starts = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="attention_mask and position_bias must be None with cu_seq_lens_q"):
        model(**inputs, cu_seq_lens_q=starts, cu_seq_lens_k=starts)


@pytest.mark.parametrize("side", [None, "left"])
def test_padding_takes_no_room_for_each_query(side):
    m, sizes = NAMED["BERT"], []

    def look(graph, inputs):
        values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "call_function"]
        sizes.extend((x.untyped_storage().nbytes(), *x.shape) for x in values if isinstance(x, torch.Tensor))
        return make_boxed_func(graph.forward)

    length = 60  # more than other tensors have for each token
    model = m.make("tfkern")
    model.compile(fullgraph=True, backend=aot_autograd(fw_compiler=look))
    with torch.no_grad():
        model(**m.inputs(pad=side, length=length))
    masks = [size for size, *shape in sizes if shape[-2:] == [length, length]]
    assert masks
    assert max(masks) < length * length


@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.slow
def test_masks_while_compiling():
    """Element by element those of transformers."""
    from transformers import masking_utils as theirs

    make = torch.compile(integration.transformers_masks.mask, fullgraph=True, backend="eager", dynamic=True)
    pads = [None, torch.arange(7) < torch.tensor([[7], [4]]), torch.arange(5) > torch.tensor([[-1], [2]])]
    functions = [(theirs.bidirectional_mask_function, None), (theirs.causal_mask_function, None),
                 (theirs.sliding_window_bidirectional_mask_function(2), 2)]  # fmt: skip
    places = [(7, 7, 0, 0), (3, 7, 4, 0), (3, 5, 4, 2)]
    for (function, local_size), (n_q, n_k, q_offset, kv_offset), padding in itertools.product(functions, places, pads):
        arguments = dict(
            batch_size=2, q_length=n_q, kv_length=n_k, q_offset=q_offset, kv_offset=kv_offset, mask_function=function,
            attention_mask=padding, local_size=local_size,
        )  # fmt: skip
        mask = make(**arguments)
        assert type(mask) is torch.Tensor
        assert torch.equal(mask, theirs.eager_mask(**arguments))


@pytest.mark.parametrize(("name", "side"), [("Llama", "left"), ("Mistral", None), ("GPT-2", None), ("T5", "left")])
def test_decoding_with_a_static_cache(name, side):
    """A prompt uncompiled, and then word by word in one graph; past the sliding window."""
    import transformers

    m, logits = NAMED[name], []
    for compile_it in (False, True):
        torch._dynamo.reset()
        model, inputs, outs = m.make("tfkern"), m.inputs(pad=side), []
        text = "decoder_" if m.kind == "seq2seq" else ""
        ids, mask = inputs[text + "input_ids"], inputs.get(text + "attention_mask")
        cache = transformers.StaticCache(model.config.get_text_config(decoder=True), 16)
        more = {}
        if text:
            cache = transformers.EncoderDecoderCache(cache, transformers.DynamicCache())
            with torch.no_grad():
                encoded = model.get_encoder()(inputs["input_ids"], attention_mask=inputs.get("attention_mask"))
            more = dict(encoder_outputs=encoded, attention_mask=inputs.get("attention_mask"))
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
            if start == 5 and compile_it:
                counter = compiled(model, "aot_eager")
            now = {text + "input_ids": ids[:, start:stop]}
            if mask is not None:
                now[text + "attention_mask"] = torch.nn.functional.pad(mask[:, :stop], (0, 16 - stop))
            with torch.no_grad():
                outs.append(model(**more, **now, past_key_values=cache, use_cache=True).logits)
        out = torch.cat(outs, 1)
        logits.append(out if mask is None else out[mask[:, : out.shape[1]].bool()])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    graphs = 2 if name == "Mistral" else 1  # its cache has other code once the window is full
    assert attentions(counter) == [2 * LAYERS if text else LAYERS] * graphs


def layers_compiled(model, backend="aot_eager"):
    """Each by itself, as accelerate does it, with masks made outside."""
    counter = CompileCounterWithBackend(backend)
    for x in model.modules():
        if type(x).__name__ in ("BertLayer", "LlamaDecoderLayer", "T5Block"):
            x.compile(fullgraph=True, backend=counter)
    return counter


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BERT", "Llama"])
@torch._dynamo.config.patch(recompile_limit=32)
def test_layer_by_layer(name):
    """Masks come in as bands, and another band is another graph or another number in it."""
    m = NAMED[name]
    model, eager = m.make("tfkern"), m.make("tfkern")
    counter = layers_compiled(model)
    for side, length in ((None, 11), ("left", 11), ("right", 11), ("right", 14), (None, 11)):
        inputs = m.inputs(pad=side, length=length)
        with torch.no_grad():
            found, want = (x(**inputs)[0] for x in (model, eager))
        seen = m.seen(inputs, want)
        torch.testing.assert_close(found[seen], want[seen])
    assert sum(attentions(counter)) > 0
    assert integration.calls(model) == 0  # nothing is counted in graphs, and yet no warning


@pytest.mark.parametrize("m", mostly_slow([(m,) for m in (*IGNORING, NAMED["BERT"])], [IGNORING[0], NAMED["BERT"]]), ids=str)
def test_a_model_that_ignores_it_is_told(m, monkeypatch):
    """While tracing, and once, where it doesn't show before."""
    monkeypatch.setattr(integration, "asks", lambda cls: True)
    integration._told.clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            torch._dynamo.reset()
            model = m.make("tfkern")
            compiled(model)
            model(**m.inputs())
    told = [x for x in told if "ignores attn_implementation='tfkern'" in str(x.message)]
    assert len(told) == (m in IGNORING)


def test_nothing_is_guarded_that_changes():
    """A call after a first one that was not compiled, one compiled, and so on: one graph."""
    m = NAMED["BERT"]
    model, inputs = m.make("tfkern"), m.inputs(pad="right")
    with torch.no_grad():
        model(**inputs)
        assert integration.calls(model) == m.calls
        counter = CompileCounterWithBackend("eager")
        run = torch.compile(model, fullgraph=True, backend=counter)
        for _ in range(3):
            run(**inputs)
            model(**inputs)
            m.make("tfkern")(**inputs)
    assert counter.frame_count == 1
    assert integration.calls(model) == 4 * m.calls


@pytest.mark.slow
def test_what_is_refused():
    """By Dynamo's error with fullgraph, and without it by ours."""
    m = NAMED["Llama"]
    model, inputs = m.make("tfkern", num_hidden_layers=1), m.inputs()
    with torch.no_grad():
        with pytest.raises(torch._dynamo.exc.Unsupported, match="some_keyword must be None"):
            torch.compile(model, fullgraph=True, backend="eager")(**inputs, some_keyword=3)
        for options, message in (
            (dict(some_keyword=3), "some_keyword must be None"),
            (dict(output_attentions=True), "needs the weights"),
        ):
            torch._dynamo.reset()
            with pytest.raises(NotImplementedError, match=message):
                torch.compile(model, backend="eager")(**inputs, **options)
