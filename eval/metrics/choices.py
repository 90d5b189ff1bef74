"""Multiple choice: which letter an answer means; MMBench's circular accuracy and Video-MME's buckets.

Fields: "options" {letter: text}, or a list of texts for A, B, C, ...; "answer", the right letter; MMBench: "group", the
same for the rotations of one question; Video-MME: "duration", "domain", "sub_category", "task_type", "subtitles".
"""

import re
import statistics
from collections.abc import Callable, Mapping

from eval.metrics.metric import (
    UNPARSED,
    Item,
    Metric,
    Score,
    Scores,
    by_group,
    letter_of,
    mean,
    options_of,
    question_terms,
)
from eval.parse_answer import choice, final_answer

FIELDS = ("options", "answer")
BUCKETS = ("duration", "domain", "sub_category", "task_type", "subtitles")

_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_VERBOSE = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
# The missing commas of VLMEvalKit's list join two pairs of these.
_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
    "Answer:",
    "Option:",
)
_A_TO_D = re.compile("[ABCD]")
_MOST_WORDS = 10


def infer(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that VLMEvalKit's rules see in an answer (`can_infer`, utils/matching_util.py); None where none.

    One option's letter alone among the words, the first time within the last five of them; else the letter after
    "answer is"; else the one option whose text is part of the answer, if that is at most twice as long as all options.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return None
    words = answer.translate(_SEPARATORS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:
        return None
    match = _VERBOSE.search(answer)
    if match and match[1].upper() in options:
        return match[1].upper()
    if len(answer) > 2 * sum(len(option) for option in options.values()):
        return None
    named = [letter for letter, option in options.items() if option.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


def mcq(text: str, item: Item) -> Score:
    """1 where `eval.parse_answer.choice` finds the right letter.

    Raises:
        DataError: the item has no options, or its answer is none of them.
    """
    return _scored(text, item, choice)


def mcq_vlmevalkit(text: str, item: Item) -> Score:
    """1 where `infer` finds the right letter in the final answer.

    Raises:
        DataError: as `mcq` does.
    """
    return _scored(text, item, _inferred)


def videomme_vlmevalkit(text: str, item: Item) -> Score:
    """1 where the first capital A, B, C or D of the final answer is right, phrases such as "The answer is" left out.

    More than that any word with such a letter counts, "Dog" is D: VLMEvalKit's dataset/utils/videomme.py, which calls a
    language model where this finds none.

    Raises:
        DataError: as `mcq` does.
    """
    return _scored(text, item, _first_letter)


def _scored(text: str, item: Item, read: Callable[[str, Mapping[str, str]], str | None]) -> Score:
    options = options_of(item)
    gold = letter_of(item, options)
    letter = read(text, options)
    return UNPARSED if letter is None else Score(float(letter == gold), letter)


def _inferred(text: str, options: Mapping[str, str]) -> str | None:
    answer = final_answer(text)
    return None if answer is None else infer(answer, options)


def _first_letter(text: str, options: Mapping[str, str]) -> str | None:
    answer = final_answer(text) or ""
    for prefix in _PREFIXES:
        answer = answer.replace(prefix, "")
    match = _A_TO_D.search(answer)
    return match[0] if match else None


def aggregate_circular(scores: Scores) -> dict[str, float]:
    """Share of questions of which every rotation is right as "score" (MMBench, arXiv 2307.06281); "rotations", of rows.

    Rows with the same "group" are rotations of one question; a row without it is a question of its own. "incomplete" is
    the share of questions with fewer rows than options, which are easier than they should be.
    """
    questions: dict[object, list[tuple[Item, Score]]] = {}
    for index, (item, score) in enumerate(scores):
        group = item.get("group")
        questions.setdefault(("row", index) if group is None else ("group", group), []).append((item, score))
    figures = mean(scores)
    return {
        "score": statistics.fmean(min(score.value for _, score in rows) for rows in questions.values()),
        "rotations": figures["score"],
        "incomplete": statistics.fmean(float(len(rows) < len(options_of(rows[0][0]))) for rows in questions.values()),
    }


def aggregate_buckets(scores: Scores) -> dict[str, float]:
    """Over all questions as "score"; then by every field of `BUCKETS`, and by duration and subtitles if these vary."""
    figures = mean(scores)
    for field in BUCKETS:
        figures |= by_group(scores, field, field)
    both = len({bool(item.get("subtitles")) for item, _ in scores}) > 1
    return {**figures, **(by_group(scores, _duration_and_subtitles, "duration, subtitles") if both else {})}


def _duration_and_subtitles(item: Item) -> str | None:
    duration, subtitles = item.get("duration"), item.get("subtitles")
    return None if duration is None or subtitles is None else f"{duration}, {'with' if subtitles else 'without'}"


_VLMEVALKIT = "VLMEvalKit vlmeval/utils/matching_util.py, can_infer"

METRICS = (
    Metric("mcq", mcq, mean, "ours: the box first, then stricter forms of can_infer; nothing is guessed", FIELDS),
    Metric("mcq-vlmevalkit", mcq_vlmevalkit, mean, _VLMEVALKIT, FIELDS),
    Metric(
        "mmbench",
        mcq,
        aggregate_circular,
        "MMBench (arXiv 2307.06281), circular evaluation; letters as mcq",
        FIELDS,
        "group",
        question_terms,
    ),
    Metric(
        "mmbench-vlmevalkit",
        mcq_vlmevalkit,
        aggregate_circular,
        f"MMBench (arXiv 2307.06281), circular evaluation; letters: {_VLMEVALKIT}",
        FIELDS,
        "group",
        question_terms,
    ),
    Metric("videomme", mcq, aggregate_buckets, "Video-MME (arXiv 2405.21075); letters as mcq", FIELDS, "media"),
    Metric(
        "videomme-vlmevalkit",
        videomme_vlmevalkit,
        aggregate_buckets,
        "Video-MME (arXiv 2405.21075); VLMEvalKit vlmeval/dataset/utils/videomme.py",
        FIELDS,
        "media",
    ),
)
