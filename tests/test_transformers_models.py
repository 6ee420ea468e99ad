"""Models of transformers that are not what attn_implementation="tfkern" takes them for: a few of those in models_sweep.py, which
has every one; models made of others; attention that says more to its function than most."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tfkern
from tfkern.integrations import transformers as integration

sys.path.append(str(Path(__file__).resolve().parent))
import model_runs
import models_sweep
from zoo import _COMMON, _IMAGE, IGNORING, MODELS

pytestmark = pytest.mark.needs("transformers", importlib.util.find_spec("transformers") is not None)
NAMED = {m.name.split(" ")[0]: m for m in [*MODELS, *IGNORING]}
# Attention of their own that adds the mask to the scores; two of the last three take its class from a table.
ADDING = [
    "BloomModel", "MptModel", "XGLMModel", "RemBertModel", "MegatronBertModel", "MPNetModel", "ConvBertModel", "VisualBertModel",
    "TapasModel", "NystromformerModel", "IBertModel", "BigBirdModel", "GPTJModel", "GitModel",
]  # fmt: skip
# A sink of each query's own, keys chosen by an indexer, and is_causal where eager attention knows better.
SAYING_MORE = ["Inkling2TextModel", "DeepseekV32Model", "BridgeTowerModel"]


@pytest.fixture(scope="module", autouse=True)
def transformers():
    return model_runs.registered()


@pytest.mark.parametrize("name", ADDING)
def test_masks_that_are_added(name, transformers, monkeypatch):
    """Even where nobody sees beforehand that a model won't ask: with ours taken for asked, the masks alone must be right."""
    monkeypatch.setattr(integration, "asks", lambda cls: True)
    found = models_sweep.tried(getattr(transformers, name))
    assert found["status"] == "right", found
    assert found["told"]
    assert not found["agreed"]
    assert {"plain", "right", "left", "right, gradients"} <= found["cases"].keys()


@pytest.mark.parametrize("name", SAYING_MORE)
def test_what_attention_is_told(name, transformers):
    found = models_sweep.tried(getattr(transformers, name))
    assert found["status"] == "right", found
    assert found["calls"] > 0
    assert not found["told"]
    assert not found["agreed"]


def test_the_sweep_sees_wrong_masks(transformers, monkeypatch):
    """A bool mask that is added, as it was."""
    monkeypatch.setattr(integration, "asks", lambda cls: True)
    monkeypatch.setattr(integration.transformers_masks.BandMask, "written", lambda mask: mask.seen())
    assert models_sweep.tried(transformers.MPNetModel)["status"] == "wrong"


def test_what_is_not_ours_is_made_without_us(transformers):
    """GPT-J's classes of attention are in a table that doesn't have us; SAM's, too, beside attention that asks."""
    for name in ("GPTJModel", "MPNetModel"):
        found = models_sweep.tried(getattr(transformers, name))
        assert (found["status"], found["calls"], found["told"]) == ("right", 0, True)
    with pytest.warns(UserWarning, match=r"takes part of its attention from SAM_VISION_ATTENTION_CLASSES.* means 'sdpa'"):
        found = transformers.SamVisionModel(
            transformers.SamVisionConfig(
                hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
                attn_implementation="tfkern",
            )
        )  # fmt: skip
    assert type(found.vision_encoder.layers[0].attn).__name__ == "SamVisionSdpaAttention"


def llava(transformers, text):
    vision = transformers.CLIPVisionConfig(**{k: v for k, v in _IMAGE.items() if "dropout" not in k and k != "num_labels"})
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5, image_seq_length=16)


def test_a_model_made_of_others(transformers):
    """Each of its parts has the attention that it can have, by name, by a dict, and later."""
    bloom = transformers.BloomConfig(**NAMED["BLOOM"].options)
    with pytest.warns(UserWarning, match="BloomModel doesn't ask"):
        model = transformers.LlavaModel._from_config(llava(transformers, bloom), attn_implementation="tfkern")
    assert parts(model) == ("tfkern", "tfkern", "eager")
    llama = transformers.LlamaConfig(**_COMMON)
    make = transformers.LlavaModel._from_config
    model = make(
        llava(transformers, llama), attn_implementation={"": "eager", "text_config": "tfkern", "vision_config": "sdpa"}
    )
    assert parts(model) == ("eager", "sdpa", "tfkern")
    inputs = image_and_text()
    with torch.no_grad():
        found = model(**inputs)[0]
        assert integration.calls(model) == 2
        model.set_attn_implementation("tfkern")
        assert parts(model) == ("tfkern", "tfkern", "tfkern")
        torch.testing.assert_close(model(**inputs)[0], found, rtol=1e-4, atol=1e-4)
        assert integration.calls(model) > 4
        model.set_attn_implementation({"": "sdpa", "text_config": "eager"})
        assert parts(model) == ("sdpa", "tfkern", "eager")
        torch.testing.assert_close(model(**inputs)[0], found, rtol=1e-4, atol=1e-4)


def parts(model) -> tuple[str, str, str]:
    return tuple(x.config._attn_implementation for x in (model, model.vision_tower, model.language_model))


def image_and_text() -> dict:
    ids = torch.full((1, 20), 7)
    ids[0, 1:17] = 5
    ids[0, 18] = 9
    return dict(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def test_encoder_and_decoder_of_different_kinds(transformers):
    """A ViT and a GPT-2 that looks at it."""
    vit = transformers.ViTConfig(**_IMAGE)
    gpt = transformers.GPT2Config(**NAMED["GPT-2"].options, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt)
    inputs = dict(pixel_values=torch.randn(2, 3, 16, 16), decoder_input_ids=torch.arange(3, 13).reshape(2, 5))
    inputs["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    found = []
    for attn in ("eager", "tfkern"):
        torch.manual_seed(0)
        model = transformers.VisionEncoderDecoderModel._from_config(config, attn_implementation=attn).eval()
        found.append(model(**inputs)[0][inputs["decoder_attention_mask"].bool()])
    assert integration.calls(model) == 6
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_switching_a_model_that_ignores_it(transformers):
    """transformers leaves it as it is."""
    model = NAMED["MPNet"].make("eager")
    model.set_attn_implementation("tfkern")
    assert model.config._attn_implementation == "eager"


def test_who_asks(transformers):
    """By what a class's module has: its own, or for a class of a user's the one that it is derived from."""
    for cls, want in (
        (transformers.BertModel, True), (transformers.LlavaModel, True), (transformers.MPNetModel, False),
        (type("Mine", (transformers.MPNetModel,), {}), False), (type("Mine", (transformers.BertModel,), {}), True),
    ):  # fmt: skip
        assert integration.asks(cls) == want


def attend(q, mask=None, **options):
    return integration.attention_forward(nn.Identity(), q, q, q, mask, **options)[0].transpose(1, 2)


def test_chosen_keys():
    q = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    indices = torch.tensor([[0, 0], [0, 1], [1, 2], [0, 3], [4, 2]]).expand(2, -1, -1)
    chosen = torch.zeros(2, 1, 5, 5, dtype=torch.bool).scatter(3, indices[:, None], True)
    causal = integration.transformers_masks.mask(batch_size=2, q_length=5, kv_length=5)
    seen = torch.ones(5, 5).tril().bool()
    want = tfkern.attention(q, q, q, chosen & seen)
    for mask in (causal, causal.seen(), causal.written()):
        torch.testing.assert_close(attend(q, mask, indices=indices), want)
    torch.testing.assert_close(attend(q, indices=indices), tfkern.attention(q, q, q, chosen))


def test_sinks_of_queries():
    q, sinks = (torch.randn(2, 3, 5, n, generator=torch.Generator().manual_seed(0), requires_grad=True) for n in (4, 1))
    scores = torch.cat([q @ q.transpose(2, 3) / 2 + torch.full((5, 5), -torch.inf).triu(1), sinks], 3)
    want = scores.softmax(3)[..., :-1] @ q
    found = attend(q, integration.transformers_masks.mask(batch_size=2, q_length=5, kv_length=5), sinks=sinks)
    torch.testing.assert_close(found, want)
    for x, y in zip(*(torch.autograd.grad(o.square().sum(), (q, sinks)) for o in (found, want)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.slow
def test_the_sweep_is_current(transformers):
    """Of every class that is there, nothing wrong in it, and every fortieth once more."""
    results = models_sweep.kept()
    classes = {cls.__name__: cls for found in models_sweep.families().values() for cls in found}
    assert results.keys() == classes.keys(), "run: python tests/models_sweep.py"
    assert {r["status"] for r in results.values()} <= {"right", "refused", "not built"}
    for name in sorted(classes)[::40]:
        if results[name]["status"] == "right":
            found = json.loads(json.dumps(models_sweep.tried(classes[name])))
            assert {k: found[k] for k in ("status", "calls", "told")} == {
                k: results[name][k] for k in ("status", "calls", "told")
            }
