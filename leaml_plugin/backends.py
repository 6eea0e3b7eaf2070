"""Where the QA generator runs: transformers in this process, vLLM in this process, or an OpenAI-compatible server.

Covers: one :func:`generate` for all of them, with the arguments of :func:`leaml_plugin.inference.generate`; a seed for
each sample of each turn, so that neither the shard nor its order changes what is asked; log-probabilities; answers
whose beginning is given; the generator as a directory of weights, which vLLM and servers read; starting a server.
Does not cover: training with any of these, or beam search.

vLLM and servers promise less than our own ``generate``: the seeds are the same, but their logits may change with what
else is in a batch, unless they run batch-invariant (vLLM: ``VLLM_BATCH_INVARIANT=1``). ``transformers serve`` has one
random state for all requests and gives no log-probabilities: with it, ask one request at a time.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.util
import itertools
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaml_plugin.errors import LeamlError, unknown_name
from leaml_plugin.progress import Progress
from leaml_plugin.records import ImageRef
from leaml_plugin.teachers import Answer, Failure, seed_of
from leaml_plugin.teachers.client import ChatClient, ServerConfig, check_url

if TYPE_CHECKING:
    from leaml_plugin.data import Collator, Prompts
    from leaml_plugin.data.prompts import Turn
    from leaml_plugin.inference import Generated, Sampling
    from leaml_plugin.models import Loaded

NAMES = ("transformers", "vllm", "server")
# Requests given to vLLM at once, in batches: it schedules them itself and only wants enough of them.
_WINDOW = 16


@dataclass(frozen=True)
class EngineConfig:
    """What the back ends beside "transformers" are told.

    Attributes:
        options: of vLLM's ``LLM``, e.g. ``{"gpu_memory_utilization": 0.8, "max_model_len": 8192}``.
        url: address of the server, ``http://host:port/v1``.
        model: what the server calls the generator. Empty: the name that a run gives it, ``leaml-`` and the beginning
            of its hash, so that the server of another run or round is not taken for it. ``{model}`` is filled in with
            the directory, by which ``transformers serve`` knows it.
        launch: a command that starts the server, run without a shell, with ``{model}`` (the directory), ``{name}`` and
            ``{port}`` filled in; the server ends with the stage. Empty: somebody else starts it.
        encoding: how pictures go to a server: "png" (exact) or "jpeg".
        extra: further fields of a server's requests, e.g. ``{"top_k": -1, "repetition_penalty": 1.0}``.
        logprobs: ask for log-probabilities; without, all of them count as 0 and no filter may use them.
        server: how the server is spoken to; nothing there changes what is asked.
    """

    options: dict = field(default_factory=dict)
    url: str = ""
    model: str = ""
    launch: str = ""
    encoding: str = "png"
    extra: dict = field(default_factory=dict)
    logprobs: bool = True
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        if self.url:
            check_url(self.url)
        if self.launch and "{model}" not in self.launch:
            raise LeamlError("launch must contain {model}, the directory of the generator.")
        if self.launch and not self.url and "{port}" not in self.launch:
            raise LeamlError("launch must contain {port}, or the address must be given as url.")
        if self.encoding not in ("png", "jpeg"):
            raise LeamlError(f"encoding is {self.encoding!r}; known are png and jpeg.")

    def check(self, name: str) -> None:
        """Refuse a back end that cannot be used with these settings.

        Raises:
            LeamlError: no such back end, or a server of which nothing is known.
        """
        if name not in NAMES:
            raise unknown_name("back end", name, NAMES)
        if name == "server" and not (self.url or self.launch):
            raise LeamlError("the back end 'server' needs engine.url, or engine.launch, a command that starts one.")
        if name == "vllm" and not _is_installed("vllm"):
            raise LeamlError("the back end 'vllm' is not installed; pip install vllm, or use another back end.")

    def identity(self, name: str) -> dict[str, Any]:
        """What of the settings decides the texts: not where a server is, nor how it is started and spoken to."""
        if name == "server":
            return {key: getattr(self, key) for key in ("model", "encoding", "extra", "logprobs")}
        return {"options": self.options} if name == "vllm" else {}


@contextlib.contextmanager
def opened(
    name: str,
    config: EngineConfig,
    *,
    load: Callable[[], Loaded],
    collator: Callable[[Loaded], Collator],
    prompts: Prompts,
    weights: Mapping[str, Any] | None = None,
    work: Path | None = None,
    images: int = 1,
    trust_remote_code: bool = False,
    dtype: str = "auto",
) -> Iterator[Callable[..., Iterator[Generated]]]:
    """What writes the generator's texts: ``inference.generate`` without its model and collator arguments.

    Args:
        name: of the back end, one of :data:`NAMES`.
        load, collator: the generator in this process, for "transformers".
        weights: ``{"path": model, "adapter": adapter}`` of the generator, for the others.
        work: a folder to put the merged generator into.
        images: the most pictures of a turn.

    Raises:
        LeamlError: vLLM is not installed, the server does not come or serves something else.
    """
    if name == "transformers":
        from leaml_plugin.inference import generate

        loaded = load()
        yield functools.partial(generate, loaded, collator=collator(loaded))
        return
    assert weights is not None and work is not None
    if name == "vllm":
        module = _vllm()
        directory = model_directory(weights, work)
        chosen = _collator(directory, prompts, trust_remote_code)
        options = {"model": str(directory), "dtype": dtype, "trust_remote_code": trust_remote_code, "seed": 0}
        writer = VLLM(module, chosen, {**options, "limit_mm_per_prompt": {"image": max(1, images)}, **config.options})
        try:
            yield writer.generate
        finally:
            writer.close()
        return
    directory = model_directory(weights, work)
    model = config.model.replace("{model}", str(directory)) or name_of(directory)
    with _serving(config, directory, model) as url, ChatClient(url, model, config.server) as client:
        try:
            _check_served(client, config, model)
        except LeamlError as error:
            if config.launch:
                raise
            raise LeamlError(
                f"{error} The generator lies in {directory}; for example: vllm serve {directory} "
                f"--served-model-name {model} --generation-config vllm. Then repeat the command."
            ) from error
        yield Served(client, prompts, config).generate


def name_of(directory: str | os.PathLike[str]) -> str:
    """``leaml-<8 hex digits>``, from a hash of the weights."""
    from leaml_plugin import models

    return f"leaml-{hashlib.sha256(models.fingerprint(directory).encode()).hexdigest()[:8]}"


def model_directory(weights: Mapping[str, Any], work: Path) -> Path:
    """A directory of the generator's weights: what training wrote, or base and adapter merged into ``work``."""
    path, adapter = weights["path"], weights.get("adapter")
    if adapter is None:
        return Path(path)
    from leaml_plugin.tuner import merge

    merged = work / "generator"
    if not merged.exists():
        merge(path, adapter, merged, check=False)
    return merged


def _collator(directory: Path, prompts: Prompts, trust_remote_code: bool) -> Collator:
    from leaml_plugin import models
    from leaml_plugin.data import Collator

    return Collator(models.load_processor(directory, trust_remote_code=trust_remote_code), prompts)


# -- vLLM in this process --------------------------------------------------------------------------------------------


def _is_installed(module: str) -> bool:
    """Whether a module is there; importing vLLM to find that out would take seconds."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # in sys.modules without a spec
        return sys.modules[module] is not None


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise LeamlError(f"the back end 'vllm' cannot be used ({error}); pip install vllm, or use another.") from error
    return vllm


class VLLM:
    """vLLM's offline ``LLM``. The engine starts with the first text.

    Args:
        module: ``vllm``, with ``LLM`` and ``SamplingParams``.
        collator: renders prompts by the model's chat template, as training did.
        options: of ``LLM``.
    """

    def __init__(self, module: Any, collator: Collator, options: Mapping[str, Any]):
        self._module, self._collator, self._options = module, collator, dict(options)
        self._engine: Any = None

    def close(self) -> None:
        """End the engine and free its memory."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        if hasattr(engine, "shutdown"):
            engine.shutdown()
        else:  # releases before LLM.shutdown: the engine is a process of its own, which ends with its core
            core = getattr(getattr(engine, "llm_engine", None), "engine_core", None)
            if hasattr(core, "shutdown"):
                core.shutdown()
        del engine
        gc.collect()
        import torch

        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def generate(
        self,
        turns: Iterable[Turn],
        *,
        batch_size: int = 8,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        num_samples: int = 1,
        return_logprobs: bool = False,
        progress: bool = True,
        label: str = "generating",
        on_error: Callable[[Turn, LeamlError], None] | None = None,
    ) -> Iterator[Generated]:
        """As :func:`leaml_plugin.inference.generate`."""
        _check(batch_size, max_new_tokens, num_samples, sampling)
        bar = _bar(turns, num_samples, label) if progress else None
        if self._engine is None:
            self._engine = self._module.LLM(**self._options)
        for window in _windows(turns, max(1, _WINDOW * batch_size // num_samples)):
            prompts, parameters, rows = [], [], []
            for turn in window:
                try:
                    pictures = _pictures(turn)
                except LeamlError as error:
                    _fail(turn, error, on_error)
                    continue
                for sample in range(num_samples):
                    prefix = turn.prefix(sample)
                    forced = len(self._collator.prefix_ids(prefix))
                    prompt: dict[str, Any] = {"prompt": self._collator.prompt_text(turn, prefix)}
                    if pictures:
                        prompt["multi_modal_data"] = {"image": pictures}
                    prompts.append(prompt)
                    parameters.append(self._parameters(turn, sample, forced, max_new_tokens, sampling, return_logprobs))
                    rows.append((turn, sample, prefix, forced))
            refused: set[str] = set()
            for (turn, sample, prefix, forced), output in zip(rows, self._write(prompts, parameters)):
                if isinstance(output, LeamlError):
                    if turn.id not in refused:
                        refused.add(turn.id)
                        _fail(turn, output, on_error)
                    continue
                yield _generated(turn, sample, prefix, forced, output, return_logprobs)
                if bar:
                    bar.update()
        if bar:
            bar.close()

    def _parameters(
        self, turn: Turn, sample: int, forced: int, most: int, sampling: Sampling | None, logprobs: bool
    ) -> Any:
        options: dict[str, Any] = {"n": 1, "max_tokens": max(1, most - forced), "temperature": 0.0}
        options["stop_token_ids"] = [self._collator.end_of_turn]
        if sampling is not None:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
            options["seed"] = seed_of(sampling.seed, turn.id, sample)
        if logprobs:
            options["logprobs"] = 0  # of the chosen tokens alone
        return self._module.SamplingParams(**options)

    def _write(self, prompts: list[Any], parameters: list[Any]) -> list[Any]:
        """The first output of each request, or why vLLM refuses it."""
        if not prompts:
            return []
        try:
            return [result.outputs[0] for result in self._engine.generate(prompts, parameters, use_tqdm=False)]
        except ValueError as error:  # one prompt that is too long refuses all of them
            if len(prompts) == 1:
                return [LeamlError(f"vLLM refuses it ({str(error).splitlines()[0]}).")]
        return [out for pair in zip(prompts, parameters) for out in self._write([pair[0]], [pair[1]])]


def _generated(turn: Turn, sample: int, prefix: str, forced: int, output: Any, logprobs: bool) -> Generated:
    from leaml_plugin.inference import Generated

    ids = list(output.token_ids)
    mean = 0.0
    if logprobs and ids:
        total = output.cumulative_logprob
        if total is None:  # not every release adds them up
            total = sum(step[token].logprob for step, token in zip(output.logprobs, ids))
        mean = float(total) / len(ids)
    text = _whole(prefix, output.text)
    return Generated(turn.id, sample, text, mean, forced + len(ids), output.finish_reason == "stop")


# -- a server --------------------------------------------------------------------------------------------------------


class Served:
    """The generator on an OpenAI-compatible server; requests run at the client's concurrency.

    Args:
        client: connected to the server.
        prompts: where the system message comes from.
    """

    def __init__(self, client: ChatClient, prompts: Prompts, config: EngineConfig):
        self._client, self._prompts, self._config = client, prompts, config
        self._proven = False

    def generate(
        self,
        turns: Iterable[Turn],
        *,
        batch_size: int = 8,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        num_samples: int = 1,
        return_logprobs: bool = False,
        progress: bool = True,
        label: str = "generating",
        on_error: Callable[[Turn, LeamlError], None] | None = None,
    ) -> Iterator[Generated]:
        """As :func:`leaml_plugin.inference.generate`; ``batch_size`` is the server's own affair.

        An answer must begin with ``Turn.prefixes`` by ``continue_final_message``, which vLLM and SGLang know.
        """
        from leaml_plugin.inference import Generated

        _check(batch_size, max_new_tokens, num_samples, sampling)
        bar = _bar(turns, num_samples, label) if progress else None
        logprobs = return_logprobs and self._config.logprobs

        def request(item: tuple[int, Turn, int]) -> dict[str, Any]:
            _, turn, sample = item
            body: dict[str, Any] = {"messages": self._messages(turn, sample), "max_tokens": max_new_tokens}
            body["temperature"] = 0.0
            if turn.prefix(sample):
                body |= {"continue_final_message": True, "add_generation_prompt": False}
            if sampling is not None:
                body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
                body["seed"] = seed_of(sampling.seed, turn.id, sample)
            if logprobs:
                body["logprobs"] = True
            return {**body, **self._config.extra}

        at_once = self._config.server.concurrency
        for window in _windows(turns, max(1, _WINDOW * at_once // num_samples)):
            items = [(n, turn, sample) for n, turn in enumerate(window) for sample in range(num_samples)]
            done: dict[tuple[int, int], Generated] = {}
            failed: dict[int, Failure] = {}
            for (n, turn, sample), answer in self._client.each(items, request, proven=self._proven):
                if isinstance(answer, Failure):
                    failed.setdefault(n, answer)
                    continue
                self._proven = True
                text = _whole(turn.prefix(sample), answer.text)
                mean = _mean(answer) if logprobs else 0.0
                finished = answer.finish == "stop"
                done[n, sample] = Generated(turn.id, sample, text, mean, answer.completion_tokens or 0, finished)
                if bar:
                    bar.update()
            for n in sorted(failed):
                _fail(window[n], LeamlError(f"{failed[n].kind}: {failed[n].detail}"), on_error)
            yield from (done[key] for key in sorted(done) if key[0] not in failed)
        if bar:
            bar.close()

    def _messages(self, turn: Turn, sample: int) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}} for url in _urls(turn.images, self._config.encoding)
        ]
        content.append({"type": "text", "text": turn.prompt})
        system = [{"role": "system", "content": self._prompts.system}] if self._prompts.system else []
        begun = [{"role": "assistant", "content": turn.prefix(sample)}] if turn.prefix(sample) else []
        return [*system, {"role": "user", "content": content}, *begun]


@functools.lru_cache(maxsize=64)
def _urls(images: tuple[ImageRef, ...], encoding: str) -> tuple[str, ...]:
    """The pictures of a turn, encoded once for its samples, which are asked for one after the other."""
    from leaml_plugin.data import open_image
    from leaml_plugin.teachers.pictures import data_url

    return tuple(data_url(open_image(ref), form=encoding) for ref in images)


def _mean(answer: Answer) -> float:
    if not answer.logprobs:
        raise LeamlError(
            "the server gives no log-probabilities; set generate.engine.logprobs=false (no filter may use them then)."
        )
    return sum(answer.logprobs) / len(answer.logprobs)


def _check_served(client: ChatClient, config: EngineConfig, name: str) -> None:
    """Wait for the server; unless the user named the model, it must be listed by the run's own name."""
    client.connect()
    if not config.model and name not in client.listed:
        known = f" (it has {', '.join(client.listed[:4])})" if client.listed else ""
        raise LeamlError(f"{client.url}: serves no model {name}{known}.")


@contextlib.contextmanager
def _serving(config: EngineConfig, directory: Path, name: str) -> Iterator[str]:
    """The server's address; starts and ends the server where there is a command for it."""
    if not config.launch:
        yield config.url
        return
    url = config.url
    port = 0
    if not url:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}/v1"
    words = [w.format(model=directory, name=name, port=port) for w in shlex.split(config.launch)]
    if shutil.which(words[0]) is None:
        raise LeamlError(f"launch: {words[0]!r} is no program here; correct generate.engine.launch.")
    print(f"leaml: starting {' '.join(words)}", file=sys.stderr)
    log = directory.parent / "server.log" if os.access(directory.parent, os.W_OK) else Path(os.devnull)
    with open(log, "wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _await(process, url, config.server.wait, log)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _await(process: subprocess.Popen, url: str, wait: float, log: Path) -> None:
    """Wait until the port is open; large models take minutes to load."""
    host, _, port = url.split("/")[2].rpartition(":")
    deadline = time.monotonic() + max(wait, 1800.0)
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LeamlError(f"the server ended with code {process.returncode} before it answered; see {log}.")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise LeamlError(f"{url}: the server did not open its port; see {log}.")


# -- common ----------------------------------------------------------------------------------------------------------


def _check(batch_size: int, max_new_tokens: int, num_samples: int, sampling: Sampling | None) -> None:
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
        if value < 1:
            raise LeamlError(f"generation: {name} is {value}; it must be at least 1.")
    if num_samples > 1 and sampling is None:
        raise LeamlError("generation: several samples of greedy decoding are all the same; set a temperature above 0.")


def _bar(turns: Iterable[Turn], num_samples: int, label: str) -> Progress:
    total = len(turns) * num_samples if isinstance(turns, Sequence) else None
    return Progress(label, total, unit="text")


def _windows(turns: Iterable[Turn], size: int) -> Iterator[list[Turn]]:
    stream = iter(turns)
    while window := list(itertools.islice(stream, size)):
        yield window


def _pictures(turn: Turn) -> list[Any]:
    from leaml_plugin.data import open_image

    return [open_image(ref) for ref in turn.images]


def _fail(turn: Turn, error: LeamlError, on_error: Callable[[Turn, LeamlError], None] | None) -> None:
    if on_error is None:
        raise LeamlError(f"{turn.where}: {error}")
    on_error(turn, error)


def _whole(prefix: str, written: str) -> str:
    """The text with its given beginning, without reasoning, as :meth:`Collator.decode` has it."""
    return (prefix + written).rpartition("</think>")[2].strip()
