"""Video-MME in the Parquet file of lmms-lab/Video-MME (videomme/test-00000-of-00001.parquet).

Fields: "videoID", "question_id", "duration" ("short", "medium", "long"), "domain", "sub_category", "task_type",
"question", "options" ("A. Apples.", ...), "answer". The videos come as zip archives; unpacked, VIDEOID.mp4 is looked
for in data/, video/ and videos/, beside the file or beside its folder. Without subtitles.
"""

import re
from collections.abc import Iterator

from eval.data import fields
from eval.data.adapters.nearby import nearby
from eval.data.fields import Row
from eval.data.questions import Origin, Question

_FOLDERS = [f"{above}{folder}" for above in ("", "../") for folder in ("data", "video", "videos", ".")]
_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm")
_LETTER = re.compile(r"\s*([A-Z])[.)]\s*")


def read(row: Row, origin: Origin) -> Iterator[Question]:
    """The question of a row.

    Raises:
      DataError: a field is missing or not what it should be, or there is no such video.
    """
    name = fields.text(row, "videoID")
    path = nearby(origin, "videoID", [f"{name}{suffix}" for suffix in _SUFFIXES], _FOLDERS)
    options = _without_letters(fields.options(row, "options"))
    reference = {
        "options": options,
        "answer": fields.answer_letter(row, "answer", options),
        "subtitles": False,
        **fields.plain(row, "duration", "domain", "sub_category", "task_type"),
    }
    question = {"question": fields.text(row, "question"), "options": options}
    video = {"type": "video", "path": path}
    yield Question(fields.identifier(row, "question_id"), question, reference, [video], reference.get("duration"))


def _without_letters(options: dict[str, str]) -> dict[str, str]:
    """Options without the letter that their text begins with, if each begins with its own."""
    matches = {letter: _LETTER.match(text) for letter, text in options.items()}
    if all(match is not None and match[1] == letter for letter, match in matches.items()):
        return {letter: _LETTER.sub("", text, count=1) for letter, text in options.items()}
    return options
