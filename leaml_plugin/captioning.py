"""Captions for a directory of pictures, on their own: the stage of the pipeline, and a file that ``--captions`` reads.

    from leaml_plugin.captioning import CaptionJob, write_captions
    from leaml_plugin.stages.caption import CaptionConfig

    job = CaptionJob("images", "captions.jsonl", CaptionConfig(teacher="http://127.0.0.1:8000/v1"))
    print(write_captions(job))

Covers: the configuration of such a job, its checks, the captions file.
Does not cover: asking (``leaml_plugin.stages.caption``), or a whole adaptation (``leaml_plugin.pipeline``).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from leaml_plugin.artifacts import RunDirectory, atomic_path, fingerprint_rows, read_records
from leaml_plugin.errors import LeamlError
from leaml_plugin.records import to_json
from leaml_plugin.stages import caption
from leaml_plugin.teachers import Caption
from leaml_plugin.teachers.prompt import TeacherPrompt

if TYPE_CHECKING:
    from leaml_plugin.models import Loaded


@dataclass(frozen=True)
class CaptionJob:
    """Captions of some pictures, in a file.

    Attributes:
        images: a directory of pictures, a file that lists pictures, or a dataset.
        output: the captions file (``.jsonl``). What is under way lies beside it in ``<output>.run``, which an
            interrupted job goes on from.
        caption: teacher, prompt and parameters.
        captions: a file with captions that are there already; the teacher is asked for the others alone.
        dtype, device, trust_remote_code: for a local teacher, as for every model.
    """

    images: str
    output: str
    caption: caption.CaptionConfig = field(default_factory=caption.CaptionConfig)
    captions: str = ""
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.caption.teacher:
            raise LeamlError("give --teacher http://host:port/v1 or --teacher model:PATH.")
        if not self.output.endswith(".jsonl"):
            raise LeamlError(f"{self.output}: the captions file must end in .jsonl.")
        if Path(self.output).is_dir():
            raise LeamlError(f"{self.output} is a directory; name a file.")


def write_captions(job: CaptionJob) -> caption.Usage:
    """Run the stage and write the file; a job that was interrupted goes on.

    Raises:
        LeamlError: bad input, another job at the same output, a server that cannot be used.
    """
    from leaml_plugin import models
    from leaml_plugin.data import load_unlabeled

    prompt = TeacherPrompt.load(job.caption.prompts or None)
    pictures = load_unlabeled(job.images, captions=job.captions or None)

    def load(path: str) -> Loaded:
        return models.load(path, dtype=job.dtype, device=job.device, trust_remote_code=job.trust_remote_code)

    inputs = {
        "images": fingerprint_rows(map(to_json, pictures)),
        "prompt": prompt.version,
    }
    if job.caption.is_local:
        path = job.caption.path
        models.check(path, dtype=job.dtype, device=job.device, trust_remote_code=job.trust_remote_code)
        inputs["teacher"] = models.fingerprint(path)
    directory = RunDirectory.open(job.output + ".run", {"caption": job.caption.identity()}, inputs)
    stage = directory.stage("caption")
    _, usage = caption.run(job.caption, stage, pictures=pictures, prompt=prompt, load=load)
    with atomic_path(Path(os.path.abspath(job.output))) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for shard in stage.shards():
            for record in read_records(shard, Caption):
                file.write(json.dumps(caption.public(record), ensure_ascii=False, sort_keys=True) + "\n")
    return usage
