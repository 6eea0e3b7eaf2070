"""What the two-rank tests run on each rank: a plain PyTorch loop under DDP, and the Trainer. Also run with one rank.

:func:`main` sees what ``torchrun`` gives a process (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from tiny_llama import TARGETS, load
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from leaml_plugin import LeamlConfig, LeamlError, RelevanceScorer, Selection, SparseAdamW, attach, select
from leaml_plugin.selection import linears
from leaml_plugin.tuner.trainer import SelectiveTrainer

STEPS, GLOBAL_BATCH = 6, 4


def samples(n: int) -> torch.Tensor:
    return torch.randint(1, 64, (n, 10), generator=torch.Generator().manual_seed(7))


def plain_loop(base: str, out: str, rank: int = 0, world: int = 1, die_at: int | None = None) -> None:
    """Score, select, attach, six steps of a global batch of 4; a checkpoint after step 3; resumes where one lies."""
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    model = load(base)
    data = samples(STEPS * GLOBAL_BATCH)
    with RelevanceScorer(linears(model, TARGETS), "taylor", freeze=model) as scorer:
        for micro in data[:16].split(2)[rank::world]:
            model(input_ids=micro, labels=micro).loss.backward()
            scorer.accumulate()
    scores = scorer.scores()
    assert scores.micro_batches == 8
    selection = select(scores, 0.1)
    handle = attach(model, selection)
    optimizer = SparseAdamW(handle.param_groups(), lr=0.01, eps=1e-4, max_grad_norm=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    run = DistributedDataParallel(model) if world > 1 else model
    start, checkpoint = 0, directory / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        start = state["step"]
    for step in range(start, STEPS):
        if step == die_at:
            if world > 1:
                dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        mine = data[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH].chunk(world)[rank]
        run(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == 2 and rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state | {"scheduler": scheduler.state_dict()}, directory / "part")
            os.replace(directory / "part", checkpoint)
    handle.detach()
    if rank == 0:
        selection.save(directory / "selection.safetensors")
        torch.save(model.state_dict(), directory / "final.pt")


def trainer(base: str, out: str, rank: int = 0, world: int = 1, resume: str | None = None) -> None:
    """The same through transformers' Trainer: scores over the ranks, DDP, checkpoints."""
    args = TrainingArguments(
        out,
        max_steps=STEPS,
        save_steps=3,
        per_device_train_batch_size=GLOBAL_BATCH // world,
        per_device_eval_batch_size=2,
        learning_rate=0.01,
        adam_epsilon=1e-4,
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in samples(STEPS * GLOBAL_BATCH)]
    job = SelectiveTrainer(load(base), args, train_dataset=data, targets=TARGETS, density=0.1)
    job.train(resume_from_checkpoint=resume)
    job.handle.detach()
    if job.is_world_process_zero():
        torch.save(job.model.state_dict(), Path(out) / "final.pt")


def fsdp(base: str, out: str, rank: int = 0, world: int = 1) -> None:
    """The adapter under FSDP2: base and deltas sharded, torch's AdamW on the (compact) deltas, saved whole."""
    model = load(base)
    config = LeamlConfig(target_modules=["q_proj", "down_proj"], density=0.2, seed=1)
    adapted = get_peft_model(model, config)
    if world > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(adapted)
        with pytest.raises(LeamlError, match="cannot step sharded parameters"):
            SparseAdamW(adapted.parameters())
        sharded = fully_shard(load(base))
        with pytest.raises(LeamlError, match="weight is sharded"):
            attach(sharded, Selection({"model.layers.0.mlp.up_proj": torch.tensor([0])}))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01, eps=1e-4)
    data = samples(STEPS * GLOBAL_BATCH)
    for step in range(STEPS):
        mine = data[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH].chunk(world)[rank]
        adapted(input_ids=mine, labels=mine).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in adapted.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    whole = get_model_state_dict(adapted, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        adapted.save_pretrained(out, state_dict=whole)


def launched(config: str) -> dict[str, str]:
    """The environment that ``accelerate launch --config_file config`` gives its processes, but in full precision."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    words = ["--config_file", config, "--mixed_precision", "no", "script.py"]
    # all that it does up to starting the processes
    with mock.patch.object(launch, "deepspeed_launcher") as start:
        launch.launch_command(launch.launch_command_parser().parse_args(words))
    environment = prepare_deepspeed_cmd_env(*start.call_args.args)[1]
    return {k: v for k, v in environment.items() if k.startswith("ACCELERATE_")}


def zero(
    base: str,
    out: str,
    stage: int = 0,
    rank: int = 0,
    world: int = 1,
    resume: str | None = None,
    config: str | None = None,
) -> None:
    """The adapter through the Trainer under DeepSpeed ZeRO; without it where ``stage`` is 0. Saved whole.

    With ``config``, an accelerate configuration file, ``stage`` and all settings are those of the file.
    """
    environment = launched(config) if config else {}
    os.environ.update(environment)
    settings = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if stage or config:
        import deepspeed

        # the shared-memory collectives would be compiled first; gloo does
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    args = TrainingArguments(
        out,
        max_steps=STEPS,
        save_steps=3,
        per_device_train_batch_size=GLOBAL_BATCH // world,
        learning_rate=0.01,
        adam_epsilon=1e-4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=settings if stage else None,
    )
    adapted = get_peft_model(load(base), LeamlConfig(target_modules=["q_proj", "down_proj"], density=0.2, seed=1))
    data = [{"input_ids": row, "labels": row} for row in samples(STEPS * GLOBAL_BATCH)]
    job = Trainer(adapted, args, train_dataset=data)
    job.train(resume_from_checkpoint=resume)
    job.save_model(str(Path(out) / "final"))
    if config:
        used = job.accelerator.deepspeed_engine_wrapped.engine
        wanted = int(environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"])
        assert used.zero_optimization_stage() == wanted and used.gradient_clipping() == args.max_grad_norm
    for name in environment:
        del os.environ[name]
    unset_hf_deepspeed_config()  # or the next job's model would be sharded as it is loaded


def main(environment: dict[str, str], jobs: list[dict]) -> None:
    """Run ``jobs`` one after the other on this rank: ``{"kind": name of a function above, **arguments}``."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for job in jobs:
        function = {"plain_loop": plain_loop, "trainer": trainer, "fsdp": fsdp, "zero": zero}[job["kind"]]
        arguments = {key: value for key, value in job.items() if key != "kind"}
        function(**arguments, rank=dist.get_rank(), world=dist.get_world_size())
        dist.barrier()
    dist.destroy_process_group()
