"""Generation: order, batching, seeded sampling, log-probabilities; and scoring of given answers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from leaml_plugin import inference, models
from leaml_plugin.data.collate import Collator
from leaml_plugin.data.prompts import Turn
from leaml_plugin.errors import LeamlError
from leaml_plugin.inference import Sampling, generate, score
from leaml_plugin.records import ImageRef

SAMPLING = Sampling(temperature=0.7, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    loaded = models.load(tiny_model_dir, device="cpu")
    # random weights are nearly uniform; sharper ones make argmax and nucleus mean something
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.mul_(30)
    return loaded


@pytest.fixture(scope="module")
def collator(loaded):
    return Collator(loaded.processor)


@pytest.fixture(scope="module")
def turns(pictures):
    refs = [ImageRef(str(p)) for p in pictures]
    prompts = ["Is there a polyp?", "Where?", "How many instruments can be seen in this picture, if any?", "Colour?"]
    turns = [Turn(f"t{i}", (refs[i % 6],), prompts[i % 4], "an answer"[: 3 + i]) for i in range(6)]
    return [*turns, Turn("two", (refs[0], refs[3]), "Which?", "left"), Turn("text", (), "Why?", "because")]


def texts(loaded, turns, collator, **options):
    options = {"batch_size": 3, "max_new_tokens": 8, "progress": False, **options}
    return list(generate(loaded, turns, collator=collator, **options))


def test_greedy_answers_come_in_order_and_equal_plain_generate(loaded, collator, turns):
    out = texts(loaded, turns, collator, batch_size=3)
    assert [o.id for o in out] == [t.id for t in turns]
    for turn, got in zip(turns, out):
        batch = collator.prompt_batch([turn])
        want = loaded.model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert got.text == collator.decode(want) and 0 < got.tokens <= 8


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_sampling_does_not_depend_on_batch_shard_or_global_seed(loaded, collator, turns, batch_size):
    want = {(o.id, o.sample): o.text for o in texts(loaded, turns, collator, sampling=SAMPLING, num_samples=3)}
    torch.manual_seed(batch_size)
    shard = turns[::-2]
    got = texts(loaded, shard, collator, sampling=SAMPLING, num_samples=3, batch_size=batch_size)
    assert [(o.id, o.sample) for o in got] == [(t.id, s) for t in shard for s in range(3)]
    assert all(want[o.id, o.sample] == o.text for o in got)


@pytest.mark.parametrize("batch_size", [6, 12])
def test_samples_share_one_reading_of_the_prompt(loaded, collator, turns, batch_size):
    read = []
    hook = loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    options = {"sampling": SAMPLING, "num_samples": 4, "return_logprobs": True}
    try:
        shared = texts(loaded, turns[:3], collator, batch_size=batch_size, **options)
    finally:
        hook.remove()
    assert sum(rows for rows, length in read if length > 1) == 3
    alone = texts(loaded, turns[:3], collator, batch_size=1, **options)
    assert [(o.id, o.sample, o.text) for o in shared] == [(o.id, o.sample, o.text) for o in alone]
    assert [o.logprob for o in shared] == pytest.approx([o.logprob for o in alone], abs=1e-3)
    [one] = {o.tokens for o in texts(loaded, turns[:3], collator, max_new_tokens=1, batch_size=12, **options)}
    assert one == 1


def test_a_model_with_an_adapter_generates_the_same_way(loaded, turns):
    from peft import LoraConfig, get_peft_model

    base = models.load(loaded.path, device="cpu")
    names = list(models.target_linears(base.model))
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=names, init_lora_weights=False)
    adapted = models.Loaded(get_peft_model(base.model, config).eval(), base.processor, base.path)
    options = {"sampling": SAMPLING, "num_samples": 3, "return_logprobs": True}
    shared, alone = (texts(adapted, turns[:3], None, batch_size=n, **options) for n in (9, 1))
    assert [o.text for o in shared] == [o.text for o in alone]
    plain = texts(models.load(loaded.path, device="cpu"), turns[:3], None, batch_size=9, **options)
    assert [o.text for o in shared] != [o.text for o in plain]


def test_samples_seeds_and_turns_differ(loaded, collator, turns):
    same = [dataclasses.replace(turns[0], id=str(i)) for i in range(4)]
    hot = dataclasses.replace(SAMPLING, temperature=2.0, top_p=1.0)
    out = texts(loaded, same, collator, sampling=hot, num_samples=4)
    assert len({o.text for o in out}) >= 14  # 16 draws of 8 bytes
    other = texts(loaded, same, collator, sampling=dataclasses.replace(hot, seed=6), num_samples=4)
    assert {o.text for o in out} != {o.text for o in other}


def test_a_cold_sample_is_the_greedy_answer(loaded, collator, turns):
    cold = texts(loaded, turns, collator, sampling=Sampling(temperature=1e-4))
    assert [o.text for o in cold] == [o.text for o in texts(loaded, turns, collator)]
    narrow = texts(loaded, turns, collator, sampling=Sampling(temperature=1.0, top_p=1e-6))
    assert [o.text for o in narrow] == [o.text for o in cold]


def test_gumbel_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    n = 20_000
    keys = torch.tensor([inference._key(0, f"turn {i}", i % 3) for i in range(n)])
    for step in (0, 7):
        noise = inference.gumbel(keys, step, 5)
        assert torch.isfinite(noise).all()
        counts = torch.bincount((logits + noise).argmax(-1), minlength=5).double()
        want = logits.double().softmax(-1) * n
        chi2 = float(((counts - want) ** 2 / want).sum())
        assert chi2 < 23.5  # 4 degrees of freedom, p = 1e-4
    first, second = inference.gumbel(keys, 0, 2).T
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([first, inference.gumbel(keys, 1, 2)[:, 0]]))[0, 1])) < 0.03


def test_gumbel_noise_is_pinned():
    """A changed hash would silently change every published sample."""
    noise = inference.gumbel(torch.tensor([(1, 2), (0xFFFFFFFF, 0)]), 3, 2)
    want = torch.tensor([[0.455896258, 1.48267579], [-0.486749411, 3.28932595]])
    torch.testing.assert_close(noise, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("first", [1, 2, 256])
def test_nucleus_keeps_the_smallest_set_that_reaches_top_p(monkeypatch, first):
    """Wherever it ends: among the tokens that are looked at first, or in the whole vocabulary."""
    monkeypatch.setattr(inference, "_LIKELY", first)
    random = torch.randn(50, 400, generator=torch.Generator().manual_seed(1)) * torch.linspace(0, 5, 50)[:, None]
    for row, got in zip(random.softmax(-1), torch.isfinite(inference._nucleus(random, 0.9))):
        order = row.argsort(descending=True)
        count = int((row[order].cumsum(0) < 0.9).sum()) + 1
        assert set(got.nonzero()[:, 0].tolist()) == set(order[:count].tolist())
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]).log()
    kept = torch.isfinite(inference._nucleus(logits, 0.7))
    assert kept.tolist() == [[False, True, False, True], [True, False, False, False]]


@pytest.mark.parametrize("sampling", [None, SAMPLING])
def test_logprobs_are_those_of_the_written_tokens(loaded, collator, turns, sampling):
    out = texts(loaded, turns, collator, sampling=sampling, return_logprobs=True)
    again = texts(loaded, turns, collator, sampling=sampling)
    assert [o.text for o in out] == [o.text for o in again] and all(o.logprob == 0.0 for o in again)
    for turn, got in zip(turns, out):
        # decode greedily or by the same noise, alone, and read the log-probabilities off the full forward pass
        batch = collator.prompt_batch([turn])
        n = batch["input_ids"].shape[1]
        processors = []
        if sampling is not None:
            keys = [inference._key(sampling.seed, turn.id, 0)]
            processors = [inference._Chooser(n, sampling, keys, [], False)]
        ids = loaded.model.generate(**batch, max_new_tokens=got.tokens, do_sample=False, logits_processor=processors)
        grown = collator.prompt_features(turn)
        sequence = {
            k: torch.cat([v, ids[0, n:] if k == "input_ids" else torch.full_like(ids[0, n:], k == "attention_mask")])
            for k, v in grown.sequence.items()
        }
        with torch.no_grad():
            full = collator.merge([dataclasses.replace(grown, sequence=sequence)], side="left")
            logits = loaded.model(**full).logits[0, n - 1 : -1].log_softmax(-1)
        want = float(logits.gather(1, ids[0, n:, None]).mean())
        assert got.logprob == pytest.approx(want, abs=2e-3)


def test_score_is_the_negative_loss(loaded, collator, turns):
    got = list(score(loaded, turns, collator=collator, batch_size=3, progress=False))
    assert len(got) == len(turns)
    with torch.no_grad():
        want = [-float(loaded.model(**collator.encode(turn)).loss) for turn in turns]
    assert got == pytest.approx(want, abs=2e-3)


def test_turns_may_be_a_stream_and_are_read_as_needed(loaded, collator, turns):
    read = []

    def stream():
        for turn in turns * 3:
            read.append(turn)
            yield turn

    out = generate(loaded, stream(), collator=collator, batch_size=2, max_new_tokens=2, progress=False)
    next(out)
    assert 8 <= len(read) <= 16  # a window, and perhaps the one in preparation
    assert len(list(out)) == len(turns) * 3 - 1


def test_a_checkpoints_penalties_do_not_reach_us(loaded, collator, turns):
    want = [o.text for o in texts(loaded, turns[:2], collator)]
    config = loaded.model.generation_config
    config.repetition_penalty, config.do_sample, config.temperature, config.top_k = 5.0, True, 0.1, 1
    try:
        assert [o.text for o in texts(loaded, turns[:2], collator)] == want
    finally:
        config.repetition_penalty, config.do_sample, config.temperature, config.top_k = 1.0, False, 1.0, 50


def test_the_models_mode_is_restored(loaded, collator, turns):
    loaded.model.train()
    texts(loaded, turns[:1], collator)
    assert loaded.model.training
    loaded.model.eval()


def test_what_a_model_keeps_of_generation_can_be_trained_with(loaded, collator, turns):
    """Generation runs in inference mode, whose tensors autograd refuses; none stays behind, in lists neither."""
    module = torch.nn.Linear(2, 2)
    hook = module.register_forward_hook(lambda m, args, out: m.__dict__.update(kept=out, table=[(out, 1)]))

    def also(*_):
        assert torch.is_inference_mode_enabled()
        module(torch.ones(1, 2))

    hook2 = loaded.model.register_forward_hook(also)
    loaded.model.add_module("extra", module)
    try:
        texts(loaded, turns[:2], collator)
        hook2.remove()
        assert not module.kept.is_inference() and not module.table[0][0].is_inference()
        weight = torch.ones(2, requires_grad=True)
        (weight * module.kept * module.table[0][0]).sum().backward()
        loaded.model(**collator.encode(dataclasses.replace(turns[0], target="yes"))).loss.backward()
    finally:
        hook.remove()
        hook2.remove()  # again, where generation failed
        del loaded.model.extra
        loaded.model.zero_grad(set_to_none=True)


def test_impossible_settings_are_one_sentence(loaded, collator, turns):
    with pytest.raises(LeamlError, match="batch_size is 0"):
        generate(loaded, turns, collator=collator, batch_size=0)
    with pytest.raises(LeamlError, match="greedy"):
        generate(loaded, turns, collator=collator, num_samples=2)
    with pytest.raises(LeamlError, match="temperature is 0"):
        Sampling(temperature=0)
    with pytest.raises(LeamlError, match=r"top_p is 1\.5"):
        Sampling(top_p=1.5)


def test_a_batch_that_does_not_fit_is_halved(loaded, collator, turns, monkeypatch):
    want = texts(loaded, turns, collator, batch_size=8)
    real, sizes = inference._run, []

    def small_memory(loaded, collator, config, rows, *rest):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no")
        return real(loaded, collator, config, rows, *rest)

    monkeypatch.setattr(inference, "_run", small_memory)
    assert texts(loaded, turns, collator, batch_size=8) == want
    assert sizes == [8, 4, 2, 2, 2, 2]
    monkeypatch.setattr(inference, "_run", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(LeamlError, match=r"sample '\w+': a turn of \d+ tokens does not fit the memory"):
        texts(loaded, turns, collator)


def test_an_error_in_preparation_reaches_the_caller(loaded, collator, turns, tmp_path):
    bad = dataclasses.replace(turns[0], images=(ImageRef(str(tmp_path / "none.png")),), source="x.jsonl line 3")
    with pytest.raises(LeamlError, match=r"x.jsonl line 3: .*no such picture"):
        texts(loaded, [*turns, bad], collator)


def test_a_turn_that_cannot_be_read_is_handed_over_and_left_out(loaded, collator, turns, tmp_path):
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    bad = [Turn(f"bad{i}", (ImageRef(str(tmp_path / name)),), "Why?") for i, name in enumerate(["half.png", "no.png"])]
    told = []
    mixed = [bad[0], *turns[:5], bad[1], *turns[5:]]
    out = texts(loaded, mixed, collator, on_error=lambda turn, error: told.append((turn.id, str(error))))
    assert out == texts(loaded, turns, collator)
    assert [name for name, _ in told] == ["bad0", "bad1"] and "no such picture" in told[1][1]
    assert texts(loaded, bad, collator, on_error=lambda *_: None) == []


@pytest.mark.parametrize("batch_size", [1, 8])
def test_an_answer_goes_on_from_its_forced_beginning(loaded, collator, turns, batch_size):
    """Equal to writing on from a prompt that ends with the beginning, and without a share in the log-probability."""
    beginnings = ("Question: Is there", "Question: How many", "")
    asked = [dataclasses.replace(turn, prefixes=beginnings) for turn in turns[:2]]
    options = {"sampling": SAMPLING, "num_samples": 3, "return_logprobs": True, "batch_size": batch_size}
    out = texts(loaded, asked, collator, max_new_tokens=30, **options)
    for o in out:
        assert o.text.startswith(beginnings[o.sample]), o
    free = texts(loaded, turns[:2], collator, max_new_tokens=30, **options)
    assert [o.text for o in out if o.sample == 2] == [o.text for o in free if o.sample == 2]
    greedy = texts(loaded, [dataclasses.replace(turns[0], prefixes=("Is",))], collator, return_logprobs=True)[0]
    ids = collator.prefix_ids("Is")
    batch = collator.prompt_batch([turns[0]])
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([ids])], 1)
    for name in batch.keys() & {"attention_mask", "mm_token_type_ids"}:
        batch[name] = torch.cat([batch[name], torch.full((1, len(ids)), int(name == "attention_mask"))], 1)
    length = batch["input_ids"].shape[1]
    want = loaded.model.generate(
        **batch, max_new_tokens=8 - len(ids), do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    written = want.sequences[0, length:]
    assert greedy.text == collator.decode(torch.cat([torch.tensor(ids), written]))
    means = [float(s.log_softmax(-1)[0, i]) for s, i in zip(want.logits, written)]
    assert greedy.logprob == pytest.approx(sum(means) / len(means), abs=1e-3)
