"""Attention-only transformers: scores and circuits on models whose heads are known, and induction heads that form."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

from tfkern import cli, reference
from tfkern.commands import circuits as command
from tfkern.models.attention_only import AttentionOnly, AttentionOnlyConfig
from tfkern.training.circuits import heads, report, runs
from tfkern.training.circuits.repeats import LearnRepeats, predictable, token_losses

pytestmark = pytest.mark.cpu

DOCS = Path(__file__).resolve().parent.parent / "docs"
V, N = 12, 24
SMALL = LearnRepeats(steps=4, rows=6, vocab_size=V, context=N, heads=2, width=16, shortest=4, longest=10)
PREVIOUS, INDUCTION = (0, 0), (1, 0)


def by_hand(sharp: float = 40.0) -> AttentionOnly:
    """A perfect induction head. The stream has a place for the token, one for the token before, and positions beside it."""
    model = AttentionOnly(AttentionOnlyConfig(V, N, 2, 1, 2 * V + N), reference.attention)
    token, before, at = slice(0, V), slice(V, 2 * V), slice(2 * V, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.W_E[:, token] = torch.eye(V)
        model.W_P[:, at] = torch.eye(N)
        model.W_U[token] = torch.eye(V)
        first, second = model.layers
        scale = sharp * math.sqrt(2 * V + N)
        first.W_Q[0, at, at] = scale * torch.eye(N).roll(-1, 1)  # position p asks for p - 1
        first.W_K[0, at, at] = torch.eye(N)
        first.W_V[0, token, token] = torch.eye(V)
        first.W_O[0, token, before] = torch.eye(V)
        second.W_Q[0, token, token] = scale * torch.eye(V)  # a token asks for keys that come after it
        second.W_K[0, before, token] = torch.eye(V)
        second.W_K[0, 2 * V, token] = -2.0  # position 0 comes after nothing
        second.W_V[0, token, token] = torch.eye(V)
        second.W_O[0, token, token] = sharp * torch.eye(V)
    return model


def distinct(period: int = 9, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences in which no token comes twice in a period, so that there is one right answer."""
    generator = torch.Generator().manual_seed(0)
    block = torch.stack([torch.randperm(V, generator=generator)[:period] for _ in range(rows)])
    return block[:, torch.arange(N) % period], torch.full((rows,), period)


def read(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What models read of held-out sequences, and the periods."""
    ids, periods = SMALL.held_out(rows)
    return ids[:, :-1], periods


def random_model(layers: int = 2, **sizes) -> AttentionOnly:
    torch.manual_seed(0)
    return AttentionOnly(
        AttentionOnlyConfig(**{**dict(vocab_size=V, context=N, layers=layers, heads=2, width=16), **sizes})
    ).double()


def test_a_perfect_induction_head():
    model, (ids, periods) = by_hand(), distinct()
    weights = heads.patterns(model, ids)
    assert heads.previous_token(weights)[PREVIOUS] == pytest.approx(1, abs=1e-4)
    assert heads.prefix_matching(weights, ids, periods)[INDUCTION] == pytest.approx(1, abs=1e-4)
    assert heads.prefix_matching(weights, ids, periods)[PREVIOUS] < 0.1
    assert heads.copying(model)[INDUCTION] == pytest.approx(1, abs=1e-6)
    assert heads.copying(model)[PREVIOUS] == 0  # it writes where W_U does not read
    assert token_losses(model, ids)[predictable(ids, periods)].max() < 1e-4


def test_circuits_of_a_perfect_induction_head():
    model, eye = by_hand(40.0), torch.eye(V)
    assert torch.allclose(heads.composed_qk(model, INDUCTION, PREVIOUS), 40 * eye)
    assert not heads.token_qk(model, INDUCTION).any()  # without the first layer there is nothing to match
    assert torch.allclose(heads.token_ov(model, INDUCTION), 40 * eye)
    assert torch.allclose(heads.position_qk(model, PREVIOUS), 40 * torch.eye(N).roll(-1, 1))
    found = {kind: x.item() for kind, x in heads.composition(model).items()}
    assert found["Q"] == found["V"] < found["K"] - 0.1  # by queries and values it reads nothing of the first layer


@pytest.mark.parametrize("head", [PREVIOUS, INDUCTION])
def test_without_either_head_there_is_no_induction(head):
    model, (ids, periods) = by_hand(), distinct()
    lamed, inside = heads.without(model, head), predictable(ids, periods)
    assert token_losses(lamed, ids)[inside].mean() > 2
    assert token_losses(model, ids)[inside].mean() < 1e-4  # itself it is as before


def test_copying_has_a_sign_and_is_near_zero_by_chance():
    model = by_hand()
    with torch.no_grad():
        model.layers[1].W_O.neg_()
    assert heads.copying(model)[INDUCTION] == pytest.approx(-1, abs=1e-6)
    assert heads.copying(random_model(vocab_size=500, heads=4, width=256)).abs().max() < 0.3


def test_copying_is_that_of_the_whole_circuit():
    """The sum over all V eigenvalues, of which only D are not 0."""
    model = random_model()
    for layer in range(2):
        for number in range(2):
            whole = torch.linalg.eigvals(heads.token_ov(model, (layer, number)))
            assert heads.copying(model)[layer, number] == pytest.approx((whole.sum().real / whole.abs().sum()).item(), abs=1e-5)


def test_prefix_matching_counts_what_comes_after_the_same_token():
    """Against its definition, one query and key at a time, on sequences with tokens that come twice in a period."""
    ids, periods = read(3)
    weights = heads.patterns(random_model().float(), ids)
    found, alike = torch.zeros(2, 2), 0.0
    queries = [(b, i) for b in range(3) for i in range(periods[b], N)]
    for b, i in queries:
        keys = [j for j in range(1, i + 1) if ids[b, j - 1] == ids[b, i]]
        assert i - periods[b] + 1 in keys
        found += weights[:, b, :, i, keys].sum(-1) / len(queries)
        alike += len(keys) / (i + 1) / len(queries)
    assert torch.allclose(heads.prefix_matching(weights, ids, periods), found, atol=1e-6)
    assert heads.chance(ids, periods) == pytest.approx(alike, abs=1e-6)


def test_attention_drawn_by_each_token():
    ids, _ = read(3)
    weights, expected, places = heads.patterns(random_model().float(), ids), torch.zeros(2, 2, V), torch.zeros(V)
    for b in range(3):
        for j in range(N):
            places[ids[b, j]] += 1
            expected[:, :, ids[b, j]] += weights[:, b, :, :, j].sum(-1)
    assert torch.allclose(heads.drawn(weights, ids, V), expected / places.clamp_min(1), atol=1e-5)


def test_a_random_model_matches_by_chance():
    ids, periods = read(256)
    model = random_model().float()
    with torch.no_grad():
        model.layers[0].W_Q.zero_()  # looks everywhere alike
    found = heads.prefix_matching(heads.patterns(model, ids), ids, periods)
    chance = heads.chance(ids, periods)
    assert torch.allclose(found[0], torch.tensor(chance), atol=1e-5)
    assert found[1].max() < 0.5 < 1 - chance


def test_logits_are_a_sum_of_paths():
    """Those of one layer: from the embedding straight on, and through the OV circuit of each head."""
    model, (ids, _) = random_model(1), read(3)
    paths = (model.W_E @ model.W_U)[ids]
    for number, weights in enumerate(heads.patterns(model, ids)[0].transpose(0, 1)):
        paths = paths + weights @ heads.token_ov(model, (0, number))[ids]  # (B, N, N) @ (B, N, V)
    assert torch.allclose(model(ids), paths)


def test_scores_of_the_second_layer_are_a_sum_of_circuits():
    """What comes from a query's own token: from keys as they are, and from what each head of the first layer brought to them."""
    model, (ids, _) = random_model(), read(2)
    with torch.no_grad():
        model.W_P.zero_()
        x = model.W_E[ids]
        keys = x + model.layers[0](x, model.W_P)
        found = x @ heads.qk(model, (1, 1)) @ keys.mT
        weights = heads.patterns(model, ids)[0]
    expected = heads.token_qk(model, (1, 1))[ids[:, :, None], ids[:, None, :]]  # (B, N, N)
    for number in range(2):
        circuit = heads.composed_qk(model, (1, 1), (0, number))
        expected = expected + circuit[ids[:, :, None], ids[:, None, :]] @ weights[:, number].mT
    assert torch.allclose(found, expected)


def test_positions_only_reach_queries_and_keys():
    model, (ids, _) = random_model(1), read(2)
    with torch.no_grad():
        before = model(ids)
        model.layers[0].W_Q.zero_()
        even = model(ids)
        model.W_P.mul_(3)
        assert torch.equal(model(ids), even)
        assert not torch.allclose(before, even)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_fused_is_naive(layers):
    fused, (ids, _) = random_model(layers), SMALL.held_out(2)
    naive = AttentionOnly(fused.config, reference.attention).double()
    naive.load_state_dict(fused.state_dict())
    for model in (fused, naive):
        token_losses(model, ids).mean().backward()
    for (name, a), b in zip(fused.named_parameters(), naive.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad) if a.grad is not None else name == "W_P", name
    assert runs.apart(runs.Run(dataclasses.replace(SMALL, layers=layers), fused.float())) < 1e-5


def test_ideals():
    """Against their rules, one token at a time."""
    ids, periods = SMALL.held_out()
    any_seen, looked_up = [], []
    for row, period in zip(ids.tolist(), periods.tolist(), strict=True):
        for t in range(period, N):
            after = [row[j] for j in range(1, t + 1) if row[j - 1] == row[t]]
            any_seen.append(-math.log(row[: t + 1].count(row[t + 1]) / (t + 1)))
            looked_up.append(-math.log(after.count(row[t + 1]) / len(after)))
    expected = sum(any_seen) / len(any_seen), sum(looked_up) / len(looked_up)
    assert runs.ideals(SMALL) == pytest.approx(expected, abs=1e-5)


def test_sequences():
    ids, periods = SMALL.batch(torch.Generator().manual_seed(0), 300)
    assert ids.shape == (300, N + 1)
    assert set(periods.tolist()) == set(range(SMALL.shortest, SMALL.longest + 1))
    assert set(ids.flatten().tolist()) == set(range(V))
    for row, period in zip(ids, periods.tolist(), strict=True):
        assert torch.equal(row[period:], row[:-period])
    inside = predictable(ids, periods)
    assert inside.shape == (300, N)
    assert inside[0].nonzero()[0] == periods[0]  # whose target is the second token of the second time
    assert torch.equal(SMALL.held_out()[0], SMALL.held_out()[0])


def test_refused():
    with pytest.raises(ValueError, match="width must be a multiple of heads, but they are 10 and 4"):
        AttentionOnlyConfig(width=10)
    with pytest.raises(ValueError, match="layers must be 0 or more, but is -1"):
        AttentionOnlyConfig(layers=-1)
    with pytest.raises(ValueError, match=r"ids must be .* 1 to 24 positions, the context, but has shape \(1, 25\); cut"):
        random_model()(torch.zeros(1, 25, dtype=torch.int64))
    with pytest.raises(
        ValueError, match="shortest and longest must go up from 1 and stay below context, 48, but they are 9 and 64"
    ):
        LearnRepeats(shortest=9, longest=64)
    with pytest.raises(ValueError, match=r"head must be .* of a model of 2 layers of 2 heads, but is \(2, 0\)"):
        heads.without(random_model(), (2, 0))
    with pytest.raises(ValueError, match=r"layer must be from 1 to 1, .* but is 0"):
        heads.composition(random_model(), 0)


def test_a_run_is_measured_before_on_the_way_and_after():
    run = runs.trained(dataclasses.replace(SMALL, steps=5), points=2)
    assert [p.step for p in run.points] == [0, 2, 4, 5]
    assert run.points[-1].inside == pytest.approx(run.task.score(run.model, torch.device("cpu")).value)
    assert run.formed is None
    nothing = runs.trained(dataclasses.replace(SMALL, layers=0))
    assert nothing.points[-1].prefix.shape == (0, 2)
    assert nothing.formed is None
    assert math.isnan(nothing.points[-1].induction)


def test_which_run_falls_short():
    point = runs.measured(by_hand(), SMALL, 7, 0.5)
    two = runs.Run(SMALL, by_hand(), [point])
    assert two.formed is point
    assert (two.inducing, two.looking_back) == (INDUCTION, PREVIOUS)
    assert not report.shortcomings([two])
    control = runs.Run(dataclasses.replace(SMALL, layers=1), two.model, [point])
    assert "1 layers: an induction head" in report.shortcomings([control])[0]
    none = runs.Run(SMALL, two.model, [dataclasses.replace(point, prefix=torch.zeros(2, 1))])
    assert "2 layers: no induction head" in report.shortcomings([none])[0]
    assert (runs.ablated(two) > 0.5).all()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "LearnRepeats", lambda: SMALL)
    assert cli.main(["circuits", "--steps", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"attention by backend cpu, .* torch 2\.\d", out)
    assert "looking everywhere alike has" in out
    told = json.loads((tmp_path / "results.json").read_text())
    assert [len(told[f"{n} layers"]["points"]) for n in (0, 1, 2)] == [3, 3, 3]
    assert len(told["heads"]) == 6
    assert out.startswith((tmp_path / "report.txt").read_text())
    for name in re.findall(r"wrote (\S+)", out):
        assert Path(name).stat().st_size > 0
    kept = {path.name for path in (DOCS / "circuits").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"results.json"}  # the figures, for whoever runs the command
    assert cli.main(["circuits", "--steps", "0", "--out", str(tmp_path)]) == 2


def test_the_page_has_what_the_command_printed():
    page = (DOCS / "circuits.md").read_text()
    for block in (DOCS / "circuits" / "report.txt").read_text().strip().split("\n\n"):
        assert block in page
    pictures = set(re.findall(r"\(circuits/(\w+\.png)\)", page))
    assert pictures == {path.name for path in (DOCS / "circuits").glob("*.png")}


@pytest.mark.slow
def test_induction_heads_form_in_two_layers_and_not_in_one():
    done = [runs.trained(LearnRepeats(layers=n)) for n in (1, 2)]
    assert not report.shortcomings(done)
    one, two = (run.points[-1].inside for run in done)
    assert two < one / 2
