"""What the sports tasks' YAML files name; the work is done in ``leaml_plugin.lmms.sports`` and ``scoring``.

lmms-eval runs this file anew for every name a YAML file takes from it, so it holds no state.
"""

from leaml_plugin.lmms import scoring, sportr, sports
from leaml_plugin.metrics import normalise_question

_SOURCES = {
    "PATH": lambda kind: sports.source(kind, sports.data_root())[0],
    "KWARGS": lambda kind: sports.source(kind, sports.data_root())[1],
    "SYNTHETIC_PATH": lambda kind: sports.source(kind, sports.synthetic_root())[0],
    "SYNTHETIC_KWARGS": lambda kind: sports.source(kind, sports.synthetic_root())[1],
}


def __getattr__(name):
    # MC_PATH, OPEN_KWARGS, MC_SYNTHETIC_PATH, ...: resolved when a task is selected, not when it is indexed
    if name in ("SPORTR_PATH", "SPORTR_KWARGS"):
        return sportr.source(sportr.data_root())[name == "SPORTR_KWARGS"]
    kind, _, what = name.partition("_")
    if what in _SOURCES and kind.lower() in sports.FILES:
        return _SOURCES[what](kind.lower())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def rows(dataset):
    return sports.evaluation_rows(dataset)


def rows_as_given(dataset):
    return sports.evaluation_rows(dataset, shuffle=False)


def rows_other_clip(dataset):
    return sports.evaluation_rows(dataset, other_clip=True)


def text_rows(dataset):
    return sports.text_rows(dataset)


def sportr_rows(dataset):
    return sportr.evaluation_rows(dataset)


def sportr_rows_other_picture(dataset):
    return sportr.evaluation_rows(dataset, other_picture=True)


doc_to_visual = sports.clip_frames
sportr_doc_to_visual = sportr.pictures
sportr_doc_to_text = sportr.question_text
doc_to_no_visual = sports.no_pictures
doc_to_text = sports.question_text


def plain_text(doc):
    return doc["question"]


def process_choice(doc, results):
    return scoring.choice(
        results[0],
        doc,
        options=sports.choices(doc),
        cluster=doc["scene"],
        levels=sports.LEVELS,
        sports=sports.SPORTS,
    )


def process_open(doc, results):
    return scoring.free_text(results[0], doc["answer"], cluster=doc["scene"])


def process_letters(doc, results):
    return scoring.letters(results[0], doc["answer"], cluster=doc["id"])


def process_sportr(doc, results):
    values = scoring.short_answer(
        sportr.answer_text(results[0], doc),
        doc,
        cluster=doc["id"],
        template=normalise_question(doc["question"]),
        blind=doc["blind"],
    )
    values = {name: value for name, value in values.items() if not name.startswith("family_")}
    return values | {f"sport_{name}": values["exact_match"] if name == doc["sport"] else None for name in sportr.SPORTS}


mean = scoring.mean
interval = scoring.interval
macro = scoring.macro
macro_interval = scoring.macro_interval
top_share = scoring.top_share
bleu = scoring.bleu
rouge1 = scoring.rouge1
rouge2 = scoring.rouge2
rouge_l = scoring.rouge_l
meteor = scoring.meteor
meteor_stem = scoring.meteor_stem
