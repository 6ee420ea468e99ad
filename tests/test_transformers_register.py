"""Registering with transformers, patching parts of models, and what users are told."""

import copy
import importlib.util
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import tfkern
from tfkern.extras import MissingExtraError
from tfkern.integrations import transformers as integration

sys.path.append(str(Path(__file__).resolve().parent))
import model_runs
from readme import recipe
from zoo import IGNORING, NAMED

pytestmark = pytest.mark.needs("transformers", importlib.util.find_spec("transformers") is not None)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def registered():
    """transformers is imported here, not by whoever only collects."""
    return model_runs.registered()


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
