"""What the data generator itself takes per document, beside the language model: the prompt, the cleaning, the judging,
the search for duplicates, and the files.

In processor time: flushing takes as long as the disk takes, and the next answer is under way by then. The documents are
the bundled ones, into a folder that fills up as it goes.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Options
from mamba2_min.data.documents import read_documents
from mamba2_min.datagen.builtin import STORIES
from mamba2_min.datagen.cleaning import clean
from mamba2_min.datagen.duplicates import NearDuplicates, signature
from mamba2_min.datagen.judging import Rules, judge
from mamba2_min.datagen.kinds import compose
from mamba2_min.datagen.store import Store

DOCUMENTS = Path(__file__).parent.parent / "training_data" / "varied"
SETTINGS = {"bundled": 220}  # documents
QUICK = {"bundled": 20}


def measure(name: str, count: int, options: Options) -> harness.Measurement:
    """Seconds of processor time that each document took."""
    texts = [document.text for document in read_documents(DOCUMENTS)][:count]
    known = {"kind": "stories", "model": "m", "options": {}, "created": "", "eval_count": 1}
    near, seconds, refused = NearDuplicates(), [], 0
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder)) as store:
        for index, raw in enumerate(texts):
            begun = time.process_time()
            prompt = compose(STORIES, 0, index)
            text = clean(f"Sure! Here's a story:\n\n{raw}")
            minima = signature(text)
            if judge(text, Rules(language="en")) is None and near.like(minima) is None:
                record = {**known, "prompt": prompt.text, "seed": index, "index": index}
                near.add(store.add("stories-x", text, None, record)["file"], minima)
            else:
                refused += 1
            seconds.append(time.process_time() - begun)
    words = sum(len(text.split()) for text in texts)
    about = {"documents": len(texts), "words": words, "refused": refused}
    return harness.measurement("document_cost", name, about, options, {"own work": harness.timed(seconds)})


def summary(about: dict[str, Any]) -> str:
    words = about["words"] / about["documents"]
    return f"{about['documents']} documents of {words:.0f} words, {about['refused']} of them turned down"


if __name__ == "__main__":
    harness.main_of("document_cost", __doc__, (SETTINGS, QUICK), measure, summary)
