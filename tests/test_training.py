"""The training loop: schedule, sample order, and a killed run that ends with the same bytes."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from leaml_plugin import models, training
from leaml_plugin.artifacts import StageDirectory
from leaml_plugin.data import Collator, Prompts
from leaml_plugin.errors import LeamlError
from leaml_plugin.optim import SparseAdamW
from leaml_plugin.records import QA, ImageRef
from leaml_plugin.selection import NeuronScores, random_selection
from leaml_plugin.selective import attach
from leaml_plugin.training import Objective, Stream, TrainConfig, train


def test_learning_rate_rises_then_falls():
    config = TrainConfig(steps=100, warmup=0.1)
    factors = [config.lr_factor(s) for s in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert 0 < factors[-1] < 0.01
    assert [TrainConfig(steps=4, warmup=0, schedule="constant").lr_factor(s) for s in range(4)] == [1.0] * 4
    assert TrainConfig(steps=1, warmup=0).lr_factor(0) == 1.0
    linear = TrainConfig(steps=10, warmup=0, schedule="linear")
    assert linear.lr_factor(6) - linear.lr_factor(5) == pytest.approx(linear.lr_factor(3) - linear.lr_factor(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"lr": 0.0}, "lr is 0.0; it must be positive"),
        ({"autocast": "fp8"}, "unknown autocast mode"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(LeamlError, match=message):
        TrainConfig(**options)


def test_an_epoch_visits_every_sample_once_and_depends_on_the_seed():
    stream = Stream("labels", list(range(10)), 3)
    order = [x for step in range(20) for x in stream.take(step, seed=1)]
    for epoch in range(6):
        assert sorted(order[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order == [x for step in range(20) for x in stream.take(step, seed=1)]
    assert order != [x for step in range(20) for x in stream.take(step, seed=2)]


@pytest.fixture
def setting(tiny_models, pictures):
    prompts = Prompts.load()
    labels = [
        QA(f"q{i}", (ImageRef(str(p)),), f"Which colour, {i}?", "red", f"line {i}") for i, p in enumerate(pictures)
    ]
    load = functools.partial(models.load, str(tiny_models("qwen2_5_vl")), dtype="float32", device="cpu")
    return prompts, labels, load


def prepare(kind: str, load):
    """Model, parameters, optimizer and the hook after a restore, as the stages make them."""
    loaded = load()
    model = loaded.model
    if kind == "full":
        parameters = dict(model.named_parameters())
        return loaded, parameters, torch.optim.AdamW(parameters.values(), lr=1e-3, fused=True), lambda: None
    linears = models.target_linears(model)
    scores = NeuronScores({name: torch.zeros(m.out_features) for name, m in linears.items()})
    handle = attach(model, random_selection(scores, 0.2, seed=1))
    parameters = dict(handle.named_parameters())
    return loaded, parameters, SparseAdamW(handle.param_groups(), lr=1e-3), handle.sync


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["full", "selected"])
def test_a_killed_run_ends_with_the_same_bytes(kind, setting, tmp_path, monkeypatch):
    prompts, labels, load = setting
    config = TrainConfig(steps=7, batch_size=2, lr=1e-3, checkpoint_every=2)

    def run(name: str):
        loaded, parameters, optimizer, after_restore = prepare(kind, load)
        streams = [Stream("labels", [prompts.vqa(qa) for qa in labels], 2)]
        stage = StageDirectory(tmp_path / name, "key")
        train(
            loaded.model,
            Collator(loaded.processor, prompts),
            [Objective("vqa", streams)],
            parameters,
            optimizer,
            config,
            stage,
            label="test",
            after_restore=after_restore,
        )
        return loaded.model.state_dict(), stage.file("log.jsonl").read_bytes()

    whole, whole_log = run("whole")
    append = training.StepLog.append
    for last in (3, 6):  # one step after a checkpoint, and one step before the end

        def append_or_die(log, entry, last=last):
            append(log, entry)
            if entry["step"] == last:
                raise Killed

        with monkeypatch.context() as m, pytest.raises(Killed):
            m.setattr(training.StepLog, "append", append_or_die)
            run("killed")
    resumed, resumed_log = run("killed")
    assert resumed_log == whole_log
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_micro_batches_give_the_same_gradients(setting, tmp_path):
    prompts, labels, load = setting
    results = []
    for micro in (0, 1, 3):
        loaded, parameters, optimizer, _ = prepare("full", load)
        # answers of different lengths: the mean must be over tokens, not over micro-batches
        turns = [prompts.vqa(QA(f"{i}", qa.images, qa.question, "long " * i + "answer")) for i, qa in enumerate(labels)]
        config = TrainConfig(steps=1, batch_size=6, micro_batch=micro, lr=1e-3, clip=0.0)
        stage = StageDirectory(tmp_path / str(micro), "key")
        objective = Objective("vqa", [Stream("labels", turns, 6)])
        grads = {}
        optimizer.register_step_pre_hook(
            lambda *_, grads=grads, parameters=parameters: grads.update(
                {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
            )
        )
        train(
            loaded.model,
            Collator(loaded.processor, prompts),
            [objective],
            parameters,
            optimizer,
            config,
            stage,
            label="t",
        )
        results.append(grads)
    for name, g in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(g, other[name], rtol=1e-3, atol=1e-6)


def test_no_samples_and_infinite_loss_are_told(setting, tmp_path):
    prompts, labels, load = setting
    loaded, parameters, optimizer, _ = prepare("full", load)
    go = functools.partial(train, loaded.model, Collator(loaded.processor, prompts))
    config = TrainConfig(steps=1)
    with pytest.raises(LeamlError, match="stream 'pseudo' of the vqa loss has no samples"):
        go([Objective("vqa", [Stream("pseudo", [], 2)])], parameters, optimizer, config,
           StageDirectory(tmp_path / "a", "k"), label="finetune")  # fmt: skip
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(LeamlError, match="the vqa loss is nan at step 0"):
        go([Objective("vqa", [Stream("labels", [prompts.vqa(labels[0])], 1)])], parameters, optimizer, config,
           StageDirectory(tmp_path / "b", "k"), label="finetune")  # fmt: skip


def _numbers(turns):
    """A stand-in collator over numbers, of which the odd ones cannot be read."""
    for n in turns:
        if n.number % 2:
            raise LeamlError(f"{n.number} is odd")
    return {"read": [n.number for n in turns]}


class Number:
    def __init__(self, number):
        self.number, self.id = number, f"n{number}"


def test_a_sample_that_cannot_be_read_gives_way_to_the_next_of_its_epoch(capsys):
    numbers = [Number(n) for n in range(12)]
    config = TrainConfig(batch_size=4, micro_batch=3)
    labels, captions = Stream("labels", numbers[::2], 2), Stream("captions", numbers, 2, skips=True)
    seen = []
    for step in range(6):
        objective = Objective("qa", [labels, captions])
        turns, batches = training._batches(_numbers, objective, config, step, "test")
        assert [b["read"] for b in batches] == [[t.number for t in turns[:3]], [turns[3].number]]
        assert turns[:2] == labels.take(step, config.seed)
        # what could be read stays where it was
        wanted = captions.take(step, config.seed)
        assert all(got is want for got, want in zip(turns[2:], wanted) if want.number % 2 == 0)
        seen += [t.number for t in turns[2:]]
        again, _ = training._batches(_numbers, objective, config, step, "test")
        assert again == turns
    assert set(seen) == set(range(0, 12, 2))
    assert "test: left out: " in capsys.readouterr().err
    with pytest.raises(LeamlError, match="is odd"):  # a label may not be left out
        training._batches(_numbers, Objective("qa", [Stream("labels", numbers, 4)]), config, 0, "test")
    with pytest.raises(LeamlError, match=r"test: of the stream 'odd' 6 samples in a row cannot be read: \d+ is odd"):
        odd = Stream("odd", numbers[1::2], 4, skips=True)
        training._batches(_numbers, Objective("qa", [odd]), config, 0, "test")
