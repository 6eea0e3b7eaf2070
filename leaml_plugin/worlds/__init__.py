"""The embedded synthetic domains, their exports, their tokenizer and the tiny checkpoint pre-trained on one of them.

Covers four worlds, each a pure function of ``(seed, index)`` in integer arithmetic, so that a picture is the same
bytes on every machine:

``general``     coloured shapes on a 3x3 grid; what the shipped checkpoint was pre-trained on
``endoscopy``   the question templates of Kvasir-VQA over mucosa-like pictures          (out of distribution)
``sports``      SPORTU's multiple choice with difficulty levels over three-frame clips  (out of distribution)
``garden``      a plain third out-of-distribution world: learning rates are tuned here, no result is reported on it

The worlds share visual primitives (shapes, colours, textures, sizes, positions, counts, motions), never their terms.

Public functions (all lazy: importing this module imports neither numpy nor torch)::

    render(world, index, seed=0) -> Scene
        Scene.frames: uint8 arrays [96, 96, 3] (one, or three for a clip); Scene.images(): PIL pictures;
        Scene.qas: WorldQA(template, question, answer, kind, level, options); Scene.caption: the noisy generic teacher;
        Scene.true_caption; Scene.things; Scene.facts; Scene.id
    export(world, out_dir, pictures=..., seed=0, start=0, schema="plain", teacher=None) -> ExportedWorld
        captions.jsonl is by the noisy generic teacher, or by the model in the directory ``teacher``
        ExportedWorld: directory, labels (file), captions (file), pictures, questions
        "plain"   images/*.png; qa.jsonl: id, image or images, question, answer, options where there are any, template;
                  captions.jsonl: id, image or images, caption
        "kvasir"  data/raw-00000-of-00001.parquet: image, source, question, answer, img_id, a row per picture and
                  question; captions.jsonl: image (the img_id), caption
        "sportu"  SportU_Video_mc.json: id (the clip), question, options, answer, difficulty level;
                  videos/<clip>/frame_000.png ...; captions.jsonl: image (the clip), caption
    checkpoint_path() -> Path
        the shipped tiny Qwen2.5-VL: AutoProcessor and AutoModelForImageTextToText load the directory offline
    prompts_path() -> Path
        a prompt directory (vqa.txt, generate.txt, pair.txt, caption.txt) in the words the checkpoint knows
    blind_majority(world, pictures=1000, seed=0, start=0) -> dict
        the oracle image-blind majority: overall, templates {template: accuracy}, questions
    general_object_qa(model, processor=None, pictures=300) -> dict
        held-out accuracy on the general world: object, overall, templates, questions
    forgetting(model, processor=None, pictures=300) -> dict
        qa (accuracy) and caption_loss (nats a token) on the general world, to take before and after

Prompts that the checkpoint knows (paraphrases were trained too)::

    question answering   the question alone; multiple choice: question + "\\nA. red\\nB. blue\\n..." +
                         "\\nAnswer with the option's letter from the given choices directly."   -> "B"
    caption              "Describe the image."
    question writing     "Write a question about the image and its answer."  -> "Question: ...\\nAnswer: ..."

Does not cover: how the pipeline reads the exports (``leaml_plugin.data``) and how methods are compared
(``leaml_plugin.study``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leaml_plugin.lazy import attributes

WORLDS = ("general", "endoscopy", "sports", "garden")

_EXPORTS = {
    "render": "leaml_plugin.worlds.scenes",
    "Scene": "leaml_plugin.worlds.scenes",
    "WorldQA": "leaml_plugin.worlds.scenes",
    "export": "leaml_plugin.worlds.files",
    "ExportedWorld": "leaml_plugin.worlds.files",
    "checkpoint_path": "leaml_plugin.worlds.files",
    "prompts_path": "leaml_plugin.worlds.files",
    "blind_majority": "leaml_plugin.worlds.blind",
    "general_object_qa": "leaml_plugin.worlds.evaluate",
    "forgetting": "leaml_plugin.worlds.evaluate",
}

__all__ = ["WORLDS", *_EXPORTS]

if TYPE_CHECKING:
    from leaml_plugin.worlds.blind import blind_majority
    from leaml_plugin.worlds.evaluate import forgetting, general_object_qa
    from leaml_plugin.worlds.files import ExportedWorld, checkpoint_path, export, prompts_path
    from leaml_plugin.worlds.scenes import Scene, WorldQA, render

__getattr__ = attributes(__name__, _EXPORTS)
