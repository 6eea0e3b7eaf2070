"""Inside transformers' Trainer, TRL's SFTTrainer and accelerate: in place and as an adapter, with exact resume."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_llama import TARGETS, load, logits
from transformers import Trainer, TrainingArguments

from leaml_plugin import LeamlConfig, LeamlError, Selection, SparseAdamW, attach
from leaml_plugin.tuner.trainer import SelectiveTrainer, SelectiveTrainerMixin


def arguments(out, **options) -> TrainingArguments:
    return TrainingArguments(
        str(out),
        **{
            "max_steps": 6,
            "save_steps": 3,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
            **options,
        },
    )


@pytest.fixture(scope="module")
def data() -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(1, 64, (16, 10), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


MODES = {
    "fp32": {},
    "bf16": {"bf16": True, "activation_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_selective_trainer_resumes_exactly(base_bf16, data, tmp_path, options):
    def run(out, resume=None):
        args = arguments(out, **options)
        trainer = SelectiveTrainer(load(base_bf16), args, train_dataset=data, targets=TARGETS, density=0.1)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "a")
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 6 and whole.selection.counts()["model.layers.0.mlp.up_proj"] == 5
    resumed = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-3"))
    assert same(whole.model, resumed.model)
    state = torch.load(tmp_path / "a" / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    assert sum(entry["exp_avg"].numel() for entry in state.values()) == sum(
        p.numel() for p in whole.handle.parameters()
    )

    whole.save_model(tmp_path / "plain")
    whole.save_adapter(tmp_path / "adapter")
    whole.handle.detach()
    assert not any("selected_" in k for k in load_file(tmp_path / "plain" / "model.safetensors"))
    assert same(load(str(tmp_path / "plain")), whole.model)
    assert Selection.load(tmp_path / "plain" / "selection.safetensors").jaccard(whole.selection) == 1
    adapted = PeftModel.from_pretrained(load(base_bf16), tmp_path / "adapter")
    assert same(adapted.merge_and_unload(), whole.model)


def test_scoring_data_may_differ_from_training_data(base, data, tmp_path):
    """Selective distillation: neurons by the labelled questions, learning from the captions."""
    trainer = SelectiveTrainer(
        load(base), arguments(tmp_path), train_dataset=data, relevance_dataset=data[:4], targets=TARGETS
    )
    chosen = trainer.score()
    assert chosen.criterion == "taylor" and all(p.grad is None for p in trainer.model.parameters())
    other = SelectiveTrainer(load(base), arguments(tmp_path), train_dataset=data, targets=TARGETS).score()
    assert 0 < chosen.jaccard(other) < 1


def test_what_the_selective_trainer_refuses(base, data, tmp_path):
    model = load(base)
    with pytest.raises(LeamlError, match="drop optimizers="):
        optimizer = torch.optim.SGD(model.parameters())
        SelectiveTrainer(model, arguments(tmp_path), train_dataset=data, optimizers=(optimizer, None))
    with pytest.raises(LeamlError, match="matches no Linear"):
        SelectiveTrainer(model, arguments(tmp_path), train_dataset=data, targets=["nothing"])
    trainer = SelectiveTrainer(model, arguments(tmp_path), train_dataset=data)
    with pytest.raises(LeamlError, match="nothing has been trained"):
        trainer.save_adapter(tmp_path)
    with pytest.raises(LeamlError, match="no checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)


def test_drop_in_optimizer_of_the_plain_trainer(base, data, selection, tmp_path):
    """``optimizers=(SparseAdamW(...), None)`` on a model with attached neurons, no class of ours."""
    results = []
    for make in (SparseAdamW, torch.optim.AdamW):
        model = load(base)
        handle = attach(model, selection)
        optimizer = make(handle.parameters(), lr=1e-2, eps=1e-4)
        Trainer(model, arguments(tmp_path / make.__name__), train_dataset=data, optimizers=(optimizer, None)).train()
        handle.detach()
        results.append(model)
    for name, value in results[0].state_dict().items():
        torch.testing.assert_close(value, results[1].state_dict()[name], rtol=1e-5, atol=1e-6)
    assert not same(results[0], load(base))


def test_rows_of_plain_parameters_in_the_plain_trainer(base, data, selection, tmp_path):
    """Whole parameters with row indices and a scheduler, nothing attached: resumed to the bit, other rows untouched."""
    modules = [name for name, axis, _ in selection if axis == 0]

    def run(out, resume=None, **options):
        model = load(base)
        weights = [model.get_submodule(name).weight for name in modules]
        optimizer = SparseAdamW([{"params": weights, "rows": [selection.rows[n] for n in modules]}], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
        trainer = Trainer(
            model, arguments(out, **options), train_dataset=data, optimizers=(optimizer, scheduler)
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model, [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]

    whole, rates = run(tmp_path / "a")
    assert len(rates) == 6 and rates[-1] < 0.5 * rates[0]
    resumed, _ = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-3"))
    assert same(whole, resumed)
    before = load(base).state_dict()
    for name, value in whole.state_dict().items():
        changed = (value != before[name]).reshape(value.shape[0], -1).any(1).nonzero().flatten()
        module = name.removesuffix(".weight")
        assert torch.equal(changed, selection.rows[module] if module in modules else changed[:0]), name


def test_adapter_in_the_plain_trainer_resumes_exactly(base, data, selection, batch, tmp_path):
    def run(out, resume=None):
        model = get_peft_model(load(base), LeamlConfig(selection=selection, task_type="CAUSAL_LM"))
        optimizer = SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        Trainer(model, arguments(out), train_dataset=data, optimizers=(optimizer, None)).train(
            resume_from_checkpoint=resume
        )
        return model

    whole = run(tmp_path / "a")
    assert same(whole, run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-3")))
    again = PeftModel.from_pretrained(load(base), tmp_path / "a" / "checkpoint-6")
    assert torch.equal(logits(again, batch), logits(whole, batch))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A Llama whose vocabulary is bytes, its tokenizer, and a text data set: what TRL wants."""
    from datasets import Dataset
    from tiny_llama import build
    from tiny_models import byte_tokenizer

    tokenizer = byte_tokenizer([], eos="</s>", pad="<pad>")
    base = build(tmp_path_factory.mktemp("chat") / "base", vocab_size=len(tokenizer))
    texts = [f"question {i}: what is seen? answer: {'polyp' if i % 2 else 'nothing'}" for i in range(16)]
    return base, tokenizer, Dataset.from_dict({"text": texts})


def sft_arguments(out, **options):
    from trl import SFTConfig

    defaults = arguments(out).to_dict()
    keep = ("max_steps", "save_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate")
    return SFTConfig(
        str(out), **{k: defaults[k] for k in keep}, report_to="none", use_cpu=True, bf16=False, max_length=64, **options
    )


@pytest.mark.slow
def test_sft_trainer_takes_the_peft_config(chat, tmp_path):
    from trl import SFTTrainer

    base, tokenizer, texts = chat
    config = LeamlConfig(target_modules=["q_proj", "up_proj"], density=0.1, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        load(base), sft_arguments(tmp_path), train_dataset=texts, processing_class=tokenizer, peft_config=config
    )
    trainer.train()
    trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trainable) == 4 and all("leaml_delta" in n for n in trainable)
    inputs = dict(tokenizer("question", return_tensors="pt"))
    again = PeftModel.from_pretrained(load(base), tmp_path / "checkpoint-6")
    torch.testing.assert_close(logits(again, inputs), logits(trainer.model, inputs))


@pytest.mark.slow
def test_selective_sft_trainer(chat, tmp_path):
    from trl import SFTTrainer

    class SelectiveSFTTrainer(SelectiveTrainerMixin, SFTTrainer):
        pass

    base, tokenizer, texts = chat
    trainer = SelectiveSFTTrainer(
        load(base),
        sft_arguments(tmp_path),
        train_dataset=texts,
        processing_class=tokenizer,
        targets=TARGETS,
        density=0.1,
    )
    trainer.train()
    trainer.save_adapter(tmp_path / "adapter")
    inputs = dict(tokenizer("question", return_tensors="pt"))
    again = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, inputs), logits(trainer.model, inputs), rtol=1e-4, atol=1e-5)
    assert not same(load(base), again)


@pytest.mark.slow
def test_an_experiment_tracker_gets_losses_and_learning_rates(base, data, tmp_path, monkeypatch):
    """Weights & Biases (which lmms-eval brings along) without a network: what its own run file holds afterwards."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    for name, value in {"MODE": "offline", "DIR": tmp_path, "SILENT": "true", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    args = arguments(tmp_path / "run", report_to="wandb", save_strategy="no")
    trainer = SelectiveTrainer(load(base), args, train_dataset=data, targets=TARGETS, density=0.1)
    try:
        trainer.train()
    finally:
        wandb.finish()
        wandb.teardown()  # its service process ends with the test
    (file,) = tmp_path.rglob("*.wandb")
    store = DataStore()
    store.open_for_scan(str(file))
    rows = []
    while (raw := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(raw)
        if record.WhichOneof("record_type") == "history":
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    steps = [row for row in rows if "train/loss" in row]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [row["train/global_step"] for row in steps] == [1, 2, 3, 4, 5, 6] and len(logged) == 6
    for row, entry in zip(steps, logged):
        assert row["train/loss"] == entry["loss"] and row["train/grad_norm"] == entry["grad_norm"] > 0
        assert row["train/learning_rate"] == entry["learning_rate"]
    assert steps[0]["train/learning_rate"] == pytest.approx(1e-2)
    assert steps[5]["train/learning_rate"] == pytest.approx(1e-2 / 6), "linear decay over six steps"


def test_accelerate_loop(base, batch, selection):
    """accelerate's prepare() wraps the optimizer; its accumulation and clipping work on the compact gradients."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = load(base)
    handle = attach(model, selection)
    model, optimizer = accelerator.prepare(model, SparseAdamW(handle.parameters(), lr=1e-2))
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    for step in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                assert float(accelerator.clip_grad_norm_(handle.parameters(), 1e-3)) > 1e-3
            optimizer.step()
            optimizer.zero_grad()
        changed = not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
        assert changed == (step >= 1)
