"""Relevance scores and selections: the arithmetic, the memory-light mode, files, and what bad input says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from leaml_plugin import LeamlError, NeuronScores, RelevanceScorer, Selection, ops, select
from leaml_plugin.selection import all_neurons, fingerprint, linears, random_selection, split_layer


class GatedBlock(nn.Module):
    def __init__(self, d: int = 6, hidden: int = 10):
        super().__init__()
        self.gate, self.up = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.down = nn.Linear(hidden, d, bias=False)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Net(nn.Module):
    def __init__(self, layers: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(GatedBlock() for _ in range(layers))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


GROUPS = [tuple(f"layers.{i}.{part}" for part in ("gate", "up", "down")) for i in range(2)]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(n: int = 3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, generator=generator) for _ in range(n)]


def loss_of(net, x):
    return net(x).square().mean()


def expected(net, names, statistic):
    """sum over micro-batches of statistic(weight, gradient) in fp64, from separate backward passes."""
    out = {name: 0 for name in names}
    for x in batches():
        net.zero_grad()
        loss_of(net, x).backward()
        for name in names:
            weight = net.get_submodule(name).weight
            out[name] = out[name] + statistic(weight.detach().double(), weight.grad.double())
    net.zero_grad()
    return out


STATISTICS = {
    "taylor": lambda w, g: (w * g).sum(1).abs(),
    "taylor_abs": lambda w, g: (w * g).abs().sum(1),
    "fisher": lambda w, g: g.square().sum(1),
    "grad_norm": lambda w, g: g.square().sum(1).sqrt(),
}


@pytest.mark.parametrize("gradients", ["free", "keep", "stream"])
@pytest.mark.parametrize("granularity", ["row", "ffn"])
def test_the_squared_norm_is_that_of_the_last_micro_batch(net, gradients, granularity):
    """Of the scored weights only: neither of earlier micro-batches nor of the head's bias."""
    scorer = RelevanceScorer(linears(net), granularity=granularity, groups=GROUPS, gradients=gradients)
    assert scorer.squared_norm is None
    scored = [f"{name}.weight" for name in linears(net) if granularity == "row" or name != "head"]
    for x in batches():
        net.zero_grad()
        loss_of(net, x).backward()
        scorer.accumulate()
        wanted = sum(
            float(g.double().square().sum())
            for name, g in zip(
                dict(net.named_parameters()), torch.autograd.grad(loss_of(net, x), list(net.parameters()))
            )
            if name in scored
        )
        assert scorer.squared_norm.dtype == torch.float32 and scorer.squared_norm.shape == ()
        assert float(scorer.squared_norm) == pytest.approx(wanted, rel=1e-5)
    scorer.reset()
    assert scorer.squared_norm is None


def test_scores_are_fp32_under_any_default_dtype(net):
    torch.set_default_dtype(torch.float64)
    try:
        with RelevanceScorer(linears(net)) as scorer:
            loss_of(net, batches()[0].float()).backward()
            scorer.accumulate()
        assert {s.dtype for s in scorer.scores().scores.values()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("criterion", list(ops.CRITERIA))
@pytest.mark.parametrize("gradients", ["free", "keep", "stream"])
def test_scores_are_the_sum_of_each_micro_batch(net, criterion, gradients):
    modules = linears(net)
    want = expected(net, modules, STATISTICS[criterion])
    with RelevanceScorer(modules, criterion, gradients=gradients) as scorer:
        for x in batches():
            loss_of(net, x).backward()
            scorer.accumulate()
            if gradients == "keep":
                assert all(m.weight.grad is not None for m in modules.values())
                net.zero_grad()
            else:
                assert all(m.weight.grad is None for m in modules.values())
    scores = scorer.scores()
    assert scores.micro_batches == 3
    for name in modules:
        torch.testing.assert_close(scores.scores[name].double(), want[name], rtol=1e-5, atol=1e-8)


def test_streaming_holds_one_gradient_at_a_time(net):
    """When a gradient arrives, all that arrived before are gone."""
    modules = linears(net)
    alive = []
    with RelevanceScorer(modules, gradients="stream"):
        handles = [
            m.weight.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(m.weight.grad is not None for m in modules.values()))
            )
            for m in modules.values()
        ]
        loss_of(net, batches()[0]).backward()
        for handle in handles:
            handle.remove()
    assert len(alive) == len(modules) and max(alive) == 0


@pytest.mark.parametrize("gradients", ["free", "stream"])
def test_ffn_scores_join_gate_up_and_down(net, gradients):
    net_grads = {}
    loss_of(net, batches()[0]).backward()
    for name in GROUPS[0]:
        w = net.get_submodule(name).weight
        net_grads[name] = (w * w.grad).detach()
    net.zero_grad()
    gate, up, down = (net_grads[n] for n in GROUPS[0])
    # both are the unit's activation times the gradient by it
    torch.testing.assert_close(up.sum(1), down.sum(0))
    groups = GROUPS if gradients == "free" else [list(g) for g in GROUPS]
    with RelevanceScorer(linears(net), granularity="ffn", groups=groups, gradients=gradients) as scorer:
        loss_of(net, batches()[0]).backward()
        scorer.accumulate()
    scores = scorer.scores()
    assert list(scores.scores) == ["layers.0", "layers.1"] and scores.groups["layers.1"] == GROUPS[1]
    torch.testing.assert_close(scores.scores["layers.0"], (gate.sum(1) + up.sum(1) + down.sum(0)).abs())
    chosen = select(scores, 0.3)
    assert set(chosen.rows) == {n for g in GROUPS for n in g[:2]} and set(chosen.columns) == {g[2] for g in GROUPS}
    assert torch.equal(chosen.rows["layers.0.gate"], chosen.columns["layers.0.down"])
    assert chosen.density == pytest.approx(0.3)
    assert chosen.validate(net).keys() == chosen.counts().keys()


def test_ffn_without_a_gate(net):
    """As GPT or CLIP have it: models.ffn_groups names no gate."""
    groups = [(None, up, down) for _, up, down in GROUPS]
    with RelevanceScorer(linears(net), "fisher", "ffn", groups=groups) as scorer:
        loss_of(net, batches()[0]).backward()
        up, down = (net.get_submodule(n).weight.grad.clone() for n in GROUPS[0][1:])
        scorer.accumulate()
    scores = scorer.scores()
    torch.testing.assert_close(scores.scores["layers.0"], up.square().sum(1) + down.square().sum(0))
    chosen = select(scores, 0.2)
    assert set(chosen.rows) == {"layers.0.up", "layers.1.up"} and set(chosen.columns) == {g[2] for g in GROUPS}


def test_conv1d_neurons_are_its_columns():
    torch.manual_seed(0)
    conv = Conv1D(5, 3)  # 3 inputs, 5 neurons
    linear = nn.Linear(3, 5)
    linear.load_state_dict({"weight": conv.weight.t(), "bias": conv.bias})
    got = []
    for module in (conv, linear):
        model = nn.Sequential(module)
        with RelevanceScorer({"0": module}, "taylor_abs") as scorer:
            model(torch.arange(6.0).reshape(2, 3)).square().sum().backward()
            scorer.accumulate()
        got.append(scorer.scores().scores["0"])
    torch.testing.assert_close(*got)


def test_closing_restores_what_required_gradients(net):
    net.head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in net.named_parameters()}
    with RelevanceScorer({"head": net.head}, freeze=net) as scorer:
        assert [n for n, p in net.named_parameters() if p.requires_grad] == ["head.weight"]
        loss_of(net, batches()[0]).backward()
        scorer.accumulate()
    assert {name: p.requires_grad for name, p in net.named_parameters()} == before
    assert all(p.grad is None for p in net.parameters())


def test_scoring_changes_no_weight(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with RelevanceScorer(linears(net)) as scorer:
        loss_of(net, batches()[0]).backward()
        scorer.accumulate()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_scores_of_two_halves_add_up(net):
    parts = []
    for some in (batches()[:1], batches()[1:], batches()):
        with RelevanceScorer(linears(net), "fisher") as scorer:
            for x in some:
                loss_of(net, x).backward()
                scorer.accumulate()
        parts.append(scorer.scores())
    total = parts[0] + parts[1]
    assert total.micro_batches == 3
    for name, value in parts[2].scores.items():
        torch.testing.assert_close(total.scores[name], value)
    with pytest.raises(LeamlError, match="cannot add"):
        parts[0] + NeuronScores({"a": torch.ones(2)})


def scores_of(**values) -> NeuronScores:
    return NeuronScores({name: torch.tensor(v, dtype=torch.float32) for name, v in values.items()})


def test_select_scopes_and_ties():
    scores = NeuronScores(
        {
            "l.0.q": torch.tensor([1.0, 9.0, 9.0, 9.0]),
            "l.0.k": torch.tensor([5.0, 0.0]),
            "l.1.q": torch.tensor([8.0, 7.0, 6.0, 0.0]),
            "l.1.k": torch.tensor([2.0, 3.0]),
        }
    )
    rows = {s: {n: i.tolist() for n, i in select(scores, 0.5, s).rows.items()} for s in ("layer", "group", "model")}
    assert rows["layer"] == {"l.0.q": [1, 2], "l.0.k": [0], "l.1.q": [0, 1], "l.1.k": [1]}
    assert rows["group"] == {"l.0.q": [1, 2, 3], "l.0.k": [0], "l.1.q": [0], "l.1.k": [1]}
    assert rows["model"] == {"l.0.q": [1, 2, 3], "l.0.k": [], "l.1.q": [0, 1, 2], "l.1.k": []}
    assert [len(i) for i in select(scores, 0.01).rows.values()] == [1, 1, 1, 1]
    assert select(scores, 1.0).density == 1.0
    assert select(scores, 0.5, "model").density == 0.5
    assert select(scores, 0.5, "group", group=lambda name: "all").rows["l.0.q"].tolist() == [1, 2, 3]


def test_selection_survives_a_file(tmp_path, net):
    with RelevanceScorer(linears(net), "fisher") as scorer:
        loss_of(net, batches()[0]).backward()
        scorer.accumulate()
    scores = scorer.scores()
    scores.save(tmp_path / "scores.safetensors")
    again = NeuronScores.load(tmp_path / "scores.safetensors", linears(net))
    assert list(again.scores) == list(scores.scores) and again.criterion == "fisher" and again.base == scores.base
    assert all(torch.equal(again.scores[n], s) for n, s in scores.scores.items())
    chosen = select(scores, 0.25, "model")
    chosen.save(tmp_path / "a.safetensors")
    loaded = Selection.load(tmp_path / "a.safetensors")
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert loaded.jaccard(chosen) == 1 and loaded.scope == "model" and loaded.sizes == chosen.sizes
    assert loaded.density == chosen.density


def test_fingerprint_tells_bases_apart_but_not_dtypes(net):
    rounded = Net()
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in net.state_dict().items()})
    before = fingerprint(linears(rounded))
    assert fingerprint(linears(rounded.bfloat16())) == before
    rounded.head.weight.data[1, 2] += 0.5
    assert [n for n, d in fingerprint(linears(rounded)).items() if d != before[n]] == ["head"]
    with torch.device("meta"):
        assert fingerprint(linears(Net())) == {}


def test_overlap_and_heatmap():
    a = Selection({"m.0.q": torch.tensor([0, 1]), "m.1.q": torch.tensor([2])}, sizes={"m.0.q": 4, "m.1.q": 4})
    b = Selection({"m.0.q": torch.tensor([1, 2]), "m.1.q": torch.tensor([2])}, sizes={"m.0.q": 4, "m.1.q": 4})
    assert a.overlap(b) == {"m.0.q": pytest.approx(1 / 3), "m.1.q": 1.0}
    assert a.jaccard(b) == pytest.approx(2 / 4) and a.jaccard(a) == 1
    assert a.heatmap() == {"layers": ["m.0", "m.1"], "kinds": ["q"], "share": [[0.5], [0.25]]}
    assert split_layer("head") == ("", "head")


def test_heatmap_of_scores(net):
    scores = NeuronScores({"m.0.q": torch.tensor([1.0, 3.0]), "m.1.q": torch.tensor([2.0, 2.0])})
    chosen = select(scores, 0.5)
    assert scores.heatmap(chosen) == {
        "layers": ["m.0", "m.1"],
        "kinds": ["q"],
        "relevance": [[0.5], [0.5]],
        "captured": [[0.75], [0.5]],
    }
    with RelevanceScorer(linears(net), granularity="ffn", groups=GROUPS) as scorer:
        loss_of(net, batches()[0]).backward()
        scorer.accumulate()
    ffn = scorer.scores()
    assert ffn.heatmap()["kinds"] == select(ffn, 0.1).heatmap()["kinds"] == ["gate", "up", "down"]


def test_several_criteria_in_one_pass(net):
    modules = linears(net)
    with RelevanceScorer(modules, ["fisher", "taylor"]) as scorer:
        for x in batches():
            loss_of(net, x).backward()
            scorer.accumulate()
    assert scorer.scores().criterion == "fisher" and scorer.scores("taylor").criterion == "taylor"
    for criterion in scorer.criteria:
        want = expected(net, modules, STATISTICS[criterion])
        for name, value in scorer.scores(criterion).scores.items():
            torch.testing.assert_close(value.double(), want[name], rtol=1e-5, atol=1e-8)
    with pytest.raises(LeamlError, match="accumulated criterion"):
        scorer.scores("grad_norm")


def test_random_selection_is_seeded_and_matches_counts(net):
    scores = scores_of(**{"a": [3.0, 1, 2, 0, 5, 4], "b": [1.0, 2, 3, 4]})
    chosen = select(scores, 0.5, "model")
    drawn = [random_selection(chosen, seed=s) for s in (0, 0, 1, 2, 3)]
    assert drawn[0].jaccard(drawn[1]) == 1 and drawn[0].counts() == chosen.counts()
    assert any(drawn[0].jaccard(d) < 1 for d in drawn[2:])
    assert random_selection(scores, 0.5).counts() == {"a": 3, "b": 2}
    with RelevanceScorer(linears(net), granularity="ffn", groups=GROUPS) as scorer:
        loss_of(net, batches()[0]).backward()
        scorer.accumulate()
    ffn = random_selection(select(scorer.scores(), 0.3), seed=5)
    for gate, up, down in GROUPS:
        assert torch.equal(ffn.rows[gate], ffn.rows[up]) and torch.equal(ffn.rows[gate], ffn.columns[down])
    everything = all_neurons(linears(net))
    assert everything.density == 1 and everything.counts()["head"] == 3


@pytest.mark.parametrize(
    "bad, sentence",
    [
        (lambda n: linears(n, r"layers\.7\..*"), "matches no Linear layer"),
        (lambda n: linears(n, ["q_proj"]), "matches no Linear layer"),
        (lambda n: linears(n, "("), "no regular expression"),
        (lambda n: RelevanceScorer(linears(n), "tailor"), "did you mean 'taylor'"),
        (lambda n: RelevanceScorer(linears(n), granularity="rows"), "did you mean 'row'"),
        (lambda n: RelevanceScorer(linears(n), granularity="ffn"), "needs groups"),
        (lambda n: RelevanceScorer(linears(n), granularity="ffn", groups=[GROUPS[0][::-1]]), "hidden widths"),
        (lambda n: RelevanceScorer(linears(n), granularity="ffn", groups=[("layers.0.gat", "x")]), "did you mean"),
        (lambda n: RelevanceScorer(linears(n)).accumulate(), "no gradient has reached"),
        (lambda n: RelevanceScorer({}), "matched nothing"),
        (lambda n: select(scores_of(a=[1.0, float("nan")]), 0.5), "NaN or infinite"),
        (lambda n: select(scores_of(a=[1.0]), 0.0), "density must be above 0"),
        (lambda n: select(scores_of(a=[1.0]), 0.5, "layers"), "did you mean 'layer'"),
        (lambda n: Selection({"head": torch.tensor([0, 3])}, sizes={"head": 3}), "3 is out of range"),
        (lambda n: Selection({"head": torch.tensor([-1])}), "-1 is out of range"),
        (lambda n: Selection({"head": torch.tensor([1, 1])}), "twice"),
        (lambda n: Selection({"head": torch.tensor([1.0])}), "1-D integer"),
        (lambda n: Selection({"a": torch.tensor([1])}, {"a": torch.tensor([1])}), "not both"),
        (lambda n: Selection({"head": torch.tensor([4])}).validate(n), "made for another model"),
        (lambda n: Selection({"haed": torch.tensor([0])}).validate(n), "did you mean 'head'"),
        (lambda n: Selection({"layers.0": torch.tensor([0])}).validate(n), "no Linear"),
        (lambda n: Selection({"head": torch.tensor([], dtype=torch.long)}).validate(n), "empty"),
        (lambda n: Selection({"head": torch.tensor([0])}, base={"head": "0" * 16}).validate(n, same_base=True), "base"),
        (lambda n: Selection.load("/no/such/file"), "no such file"),
    ],
)
def test_bad_input_is_one_sentence(net, bad, sentence):
    with pytest.raises(LeamlError, match=sentence) as caught:
        bad(net)
    assert "\n" not in str(caught.value)


def test_wrong_files_are_named(tmp_path):
    (tmp_path / "junk").write_bytes(b"not safetensors at all")
    with pytest.raises(LeamlError, match=r"junk: cannot be read"):
        Selection.load(tmp_path / "junk")
    scores_of(a=[1.0]).save(tmp_path / "scores")
    with pytest.raises(LeamlError, match=r"holds leaml\.scores, wanted a neuron selection"):
        Selection.load(tmp_path / "scores")


def test_tied_weights_are_left_out_or_refused():
    model = nn.Sequential()
    model.embed, model.body, model.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
    model.head.weight = model.embed.weight
    assert list(linears(model)) == ["body"]
    with pytest.raises(LeamlError, match=r"head.weight is tied to embed.weight"):
        linears(model, "head")


def test_quantised_weights_are_refused():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(LeamlError, match=r"stored as torch.uint8"):
        RelevanceScorer({"a": linear})


def test_low_precision_scores_stay_in_fp32():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        linear = nn.Linear(64, 8).to(dtype)
        with RelevanceScorer({"a": linear}, "fisher") as scorer:
            for _ in itertools.repeat(None, 2):
                linear(torch.randn(4, 64).to(dtype)).float().square().mean().backward()
                scorer.accumulate()
        assert scorer.scores().scores["a"].dtype == torch.float32
