"""The protocol of the study: what is the same for all methods, what each method is, and the tuned learning rates.

Everything here was fixed before LEAML's accuracy on a reported world was looked at; docs/study.md has the dates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from leaml_plugin.errors import LeamlError, unknown_name

REPORTED, TUNING = ("endoscopy", "sports"), "garden"


@dataclass(frozen=True)
class Protocol:
    """What every run of a study shares.

    Attributes:
        pool: pictures that labels and unlabelled pictures are drawn from.
        test_pictures, test_questions: test pictures, and the most questions asked of each.
        general_pictures: held-out pictures of the general world on which forgetting is measured.
        steps: optimizer steps of the VQA model of every trained method.
        generator_share: steps of the QA generator, where there is one, as a share of ``steps``, on top of them.
        batch: questions a step.
        caption_batch: captions a step, on top of the questions, where a method learns from captions.
        warmup, clip, weight_decay: of every training.
        bf16: train under bf16 autocast.
        density, criterion, relevance_loss: of the relevance stage.
        captions: weight of the caption loss, where there is one.
        generator_updates: what the QA loss of the generator may move.
        qa_task: what the generator learns from the labels: to write pairs ("generate"), or to answer too ("both").
        mode: what the VQA model of the methods with pseudo-QA trains: "full", "selected" or "lora".
        pseudo_pictures: unlabelled pictures that the generator writes about.
        samples, temperature, top_p: texts a picture, and how they are drawn.
        pseudo_share: the largest share of pseudo-labelled questions in a batch.
        rounds: of self-training, of the methods with pseudo-QA: every round takes their steps again. None ends early.
        mix: target mix over families of questions, as ``GenerateConfig.mix``; empty: none.
        agreement, known_questions, min_logprob, keep_share, round_trip, blind, caption, answer_share: of the filter,
            and of the verify stage where that has to ask for it.
        lora_rank: of the methods that train a LoRA; alpha is twice the rank.
    """

    pool: int = 2000
    test_pictures: int = 120
    test_questions: int = 6
    general_pictures: int = 100
    steps: int = 200
    batch: int = 32
    caption_batch: int = 8
    generator_share: float = 0.5
    warmup: float = 0.05
    clip: float = 1.0
    weight_decay: float = 0.0
    bf16: bool = True
    density: float = 0.1
    criterion: str = "taylor"
    relevance_loss: str = "generate"
    captions: float = 1.0
    generator_updates: str = "all"
    qa_task: str = "both"
    mode: str = "full"
    pseudo_pictures: int = 200
    samples: int = 4
    temperature: float = 1.0
    top_p: float = 0.95
    pseudo_share: float = 0.5
    rounds: int = 1
    mix: str = ""
    agreement: float = 0.5
    known_questions: bool = False
    min_logprob: float | None = None
    keep_share: float = 1.0
    round_trip: bool = True
    blind: bool = False
    caption: bool = False
    answer_share: float = 1.0
    lora_rank: int = 16

    def __post_init__(self):
        for name in ("pool", "test_pictures", "test_questions", "general_pictures", "batch", "samples", "rounds"):
            if getattr(self, name) < 1:
                raise LeamlError(f"study: {name} is {getattr(self, name)}; it must be at least 1.")
        if self.steps < 2 or not self.generator_share > 0:
            raise LeamlError("study: steps must be at least 2, and generator_share must be positive.")

    @property
    def generator_steps(self) -> int:
        return max(1, round(self.generator_share * self.steps))


@dataclass(frozen=True)
class Method:
    """One way to get a VQA model.

    Attributes:
        kind: "blind", "zero-shot", "labels" (fine-tuning on labels), "joint" (labels and captions in one training) or
            "pseudo" (generator, pseudo-QA, fine-tuning).
        mode: what fine-tuning trains, for "labels" and "joint"; "pseudo" takes the protocol's.
        targets: pattern of the Linears that mode "selected" trains whole; empty: the selected neurons.
        vision: the vision side is trained too; else its features stay those of the base checkpoint.
        longer: it takes the generator's steps as well, so that its total is LEAML's.
        every_label: the whole pool is labelled, whatever the budget.
        distil: the generator learns from captions.
        choice: which neurons the captions may move: "relevance", "random" or "all".
        learner: what the VQA model of a "pseudo" method trains; empty: the protocol's ``mode``.
        rounds: of self-training of a "pseudo" method; 0: the protocol's.
        truth: diagnosis of a "pseudo" method, with the truth at hand: "filter" keeps the right pairs alone, "answers"
            puts the right answer in place of the generator's, "questions" the truth about the same pictures in place
            of all pairs. Never a result.
        teacher: whose captions it learns from: "world", the noisy generator, or the name of a larger teacher of ours.
    """

    title: str
    kind: str
    mode: str = "full"
    targets: str = ""
    vision: bool = False
    longer: bool = False
    every_label: bool = False
    distil: bool = True
    choice: str = "relevance"
    learner: str = ""
    rounds: int = 0
    truth: str = ""
    teacher: str = "world"


ATTENTION = r"language_model\.layers\.\d+\.self_attn\.[qkvo]_proj$"

#: The larger teacher (``leaml_plugin.worlds.teacher``) whose captions lie in results/teacher: the first eight digits of
#: its weights' SHA-256.
LARGER_TEACHER = "95f5dd73"

METHODS: Mapping[str, Method] = {
    "blind": Method("Image-blind majority", "blind"),
    "zero-shot": Method("Zero-shot", "zero-shot"),
    "full": Method("Full fine-tuning (language model)", "labels"),
    "full-vision": Method("Full fine-tuning (vision side too)", "labels", vision=True),
    "full-longer": Method("Full fine-tuning (LEAML's total steps)", "labels", longer=True),
    "lora": Method("LoRA", "labels", mode="lora"),
    "attention": Method("Attention projections only", "labels", mode="selected", targets=ATTENTION),
    "joint": Method("Labels + captions, no pseudo-QA", "joint"),
    "joint-lora": Method("Labels + captions, no pseudo-QA (LoRA)", "joint", mode="lora"),
    "no-distillation": Method("Pseudo-QA, no distillation", "pseudo", distil=False),
    "all-neurons": Method("Pseudo-QA, all neurons distilled", "pseudo", choice="all"),
    "random-neurons": Method("Pseudo-QA, random neurons distilled", "pseudo", choice="random"),
    "leaml": Method("LEAML", "pseudo"),
    "leaml-lora": Method("LEAML, VQA model a LoRA", "pseudo", learner="lora"),
    "leaml-rounds": Method("LEAML, two rounds", "pseudo", rounds=2),
    "right-pairs": Method("LEAML, right pairs alone (diagnosis)", "pseudo", truth="filter"),
    "right-answers": Method("LEAML, right answers (diagnosis)", "pseudo", truth="answers"),
    "right-questions": Method("LEAML, all questions and answers right (diagnosis)", "pseudo", truth="questions"),
    "leaml-model-teacher": Method("LEAML, captions by the larger model", "pseudo", teacher=LARGER_TEACHER),
    "joint-model-teacher": Method("Labels + captions, captions by the larger model", "joint", teacher=LARGER_TEACHER),
    "all-labels": Method("All labels (upper bound)", "labels", every_label=True),
}
#: In the order in which a study runs them: what answers the main question first.
ORDER = (
    "blind", "zero-shot", "full", "lora", "joint", "leaml", "no-distillation", "all-labels", "attention",
    "all-neurons", "random-neurons", "joint-lora", "full-longer", "full-vision", "leaml-lora", "leaml-rounds",
    "right-pairs", "right-answers", "right-questions", "leaml-model-teacher", "joint-model-teacher",
)  # fmt: skip

#: Learning rates that every trained method was tuned over, on the garden world.
GRID = (3e-4, 1e-3, 3e-3, 1e-2)
#: The tuned rates; of a method with pseudo-QA that of its generator.
LEARNING_RATES: Mapping[str, float] = {
    "full": 3e-3,
    "full-vision": 3e-3,
    "lora": 3e-3,
    "attention": 3e-3,
    "joint": 1e-3,
    "joint-lora": 3e-3,
    "no-distillation": 3e-3,
    "all-neurons": 3e-3,
    "random-neurons": 3e-3,
    "leaml": 3e-3,
    "leaml-lora": 3e-3,
    "all-labels": 1e-3,
}
DEFAULT_RATE = 1e-3
#: The tuned rates of VQA models that are trained with pseudo-QA, by what they train.
VQA_RATES: Mapping[str, float] = {"full": 1e-3, "lora": 3e-3, "selected": 1e-3}
#: Methods that keep the rate of another one: training longer or again is a control of it, another teacher or the truth
#: changes its data only.
RATE_OF: Mapping[str, str] = {
    "full-longer": "full",
    "leaml-rounds": "leaml",
    "right-pairs": "leaml",
    "right-answers": "leaml",
    "right-questions": "leaml",
    "leaml-model-teacher": "leaml",
    "joint-model-teacher": "joint",
}


def learning_rate(method: str) -> float:
    """The tuned rate, or that of the method whose rate this one keeps."""
    return LEARNING_RATES.get(RATE_OF.get(method, method), DEFAULT_RATE)


def vqa_rate(protocol: Protocol, method: str = "leaml") -> float:
    """The tuned rate of a VQA model that is trained with pseudo-QA, by what it trains."""
    return VQA_RATES[vqa_mode(protocol, method)]


def vqa_mode(protocol: Protocol, method: str) -> str:
    """What the VQA model of a method with pseudo-QA trains: the protocol's word, or the method's own."""
    return METHODS[method].learner or protocol.mode


def budget_of(method: str, labels: float) -> float:
    """The label budget that a method's result is filed under: none for zero-shot, all for the upper bound."""
    if METHODS[method].kind == "zero-shot":
        return 0.0
    return 1.0 if METHODS[method].every_label else labels


def trained(method: str) -> bool:
    return METHODS[method].kind not in ("blind", "zero-shot")


def tuned(method: str) -> bool:
    """Whether a method has a learning rate of its own."""
    return trained(method) and method not in RATE_OF


def check_methods(names: list[str]) -> list[str]:
    """The names in the study's order; raises :class:`LeamlError` for an unknown one."""
    for name in names:
        if name not in METHODS:
            raise unknown_name("method", name, METHODS)
    return [name for name in ORDER if name in names]
