"""What the endoscopy tasks' YAML files name; the work is done in ``leaml_plugin.lmms.endoscopy`` and ``scoring``.

lmms-eval runs this file anew for every name a YAML file takes from it, so it holds no state.
"""

from leaml_plugin.lmms import endoscopy, endoscopy_x1, scoring
from leaml_plugin.metrics import normalise_question

_SOURCES = {
    "DATASET_PATH": lambda: endoscopy.source()[0],
    "DATASET_KWARGS": lambda: endoscopy.source()[1],
    "X1_PATH": lambda: endoscopy_x1.source()[0],
    "X1_KWARGS": lambda: endoscopy_x1.source()[1],
    "SYNTHETIC_PATH": lambda: endoscopy.synthetic_source()[0],
    "SYNTHETIC_KWARGS": lambda: endoscopy.synthetic_source()[1],
}


def __getattr__(name):
    # resolved when a task is selected, not when lmms-eval indexes the directory
    if name in _SOURCES:
        return _SOURCES[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def rows(dataset):
    return endoscopy.evaluation_rows(dataset)


def rows_other_picture(dataset):
    return endoscopy.evaluation_rows(dataset, shuffle_pictures=True)


def yesno(dataset):
    return endoscopy.evaluation_rows(dataset, "yesno")


def count(dataset):
    return endoscopy.evaluation_rows(dataset, "count")


def choice(dataset):
    return endoscopy.evaluation_rows(dataset, "choice")


def color(dataset):
    return endoscopy.evaluation_rows(dataset, "color")


def location(dataset):
    return endoscopy.evaluation_rows(dataset, "location")


def multilabel(dataset):
    return endoscopy.evaluation_rows(dataset, "multilabel")


def x1_rows(dataset):
    return endoscopy_x1.evaluation_rows(dataset)


doc_to_visual = endoscopy.pictures
x1_doc_to_visual = endoscopy_x1.pictures
doc_to_no_visual = endoscopy.no_pictures
doc_to_text = endoscopy.question_text


def process_family(doc, results):
    values = process_results(doc, results)
    return {name: value for name, value in values.items() if not name.startswith("family_")}


def process_results(doc, results):
    return scoring.short_answer(
        results[0],
        doc,
        cluster=str(doc["img_id"]),
        template=normalise_question(doc["question"]),
        blind=doc["blind"],
    )


def process_x1(doc, results):
    return scoring.free_text(
        results[0],
        doc["answer"],
        cluster=str(doc["img_id"]),
        complexity=int(doc["complexity"]),
        blind=doc["blind"],
    )


mean = scoring.mean
interval = scoring.interval
macro = scoring.macro
macro_interval = scoring.macro_interval
bleu = scoring.bleu
rouge1 = scoring.rouge1
rouge2 = scoring.rouge2
rouge_l = scoring.rouge_l
meteor = scoring.meteor
meteor_stem = scoring.meteor_stem
