"""Multiple choice: which letter an answer means; MMBench's circular accuracy and Video-MME's buckets.

Fields: "options" {letter: text}, or a list of texts for A, B, C, ...; "answer", the right letter; MMBench: "group", the
same for the rotations of one question; Video-MME: "duration", "domain", "sub_category", "task_type", "subtitles".
"""

import re
import statistics
from collections.abc import Callable, Mapping

from eval.metrics.metric import (
    UNPARSED,
    Metric,
    Reference,
    Score,
    Scores,
    by_group,
    letter_of,
    mean,
    mean_by,
    options_of,
    question_terms,
)
from eval.parse_answer import choice, final_answer
from eval.statistics import clustered

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

_LMMS_EDGES = (",", ".", "!", "?", ";", ":", "'", '"')
# Where a letter stands, the surest place first; of several in one the last counts.
_LMMS_FORMS = ("({})", "{}.", "{}:", "{})", "{} ", "{}")
_LMMS_PHRASES = (
    "the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is", "best answer is",
    "the correct option is", "correct option is", "the best option is", "best option is", "the choice is", "choice is",
    "the correct choice is", "correct choice is", "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


def infer(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that VLMEvalKit's rules read in an answer (`can_infer`, utils/matching_util.py), if any.

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
    lower = answer.lower()
    if len(lower) > 2 * sum(len(option) for option in options.values()):
        return None
    named = [letter for letter, option in options.items() if option.lower() in lower]
    return named[0] if len(named) == 1 else None


def extract(answer: str, letters: str = "ABCD") -> str | None:
    """Return the letter that lmms-eval's rules read in an answer (`extract_mcq_answer`), if any.

    Of all places where a letter stands the surest counts: alone at the start; alone at the end; anywhere after a phrase
    such as "answer is", in a word too; "(A)"; "A."; "A:"; "A)"; "A "; in any word. Of several the last.
    """
    text = answer.strip()
    for mark in _LMMS_EDGES:
        text = text.strip(mark)
    text = f" {text} "
    alone = text.strip()
    for at_edge, beside in ((alone[:1], alone[1:2]), (alone[-1:], alone[-2:-1])):
        if at_edge and at_edge in letters and not beside.isalpha():
            return at_edge
    lower = text.lower()
    starts = [start + len(phrase) for phrase in _LMMS_PHRASES if (start := lower.find(phrase)) >= 0]
    stated = [(text.find(letter, start), letter) for start in starts for letter in letters]
    forms = ([(text.rfind(form.format(letter)), letter) for letter in letters] for form in _LMMS_FORMS)
    for places in (stated, *forms):
        place, letter = max(places, default=(-1, ""))
        if place >= 0:
            return letter
    return None


def mcq(text: str, reference: Reference, read: Callable[[str, Mapping[str, str]], str | None] = choice) -> Score:
    """Score 1 where the right letter is read; `read`: (text, options) -> letter, None where it finds none."""
    options = options_of(reference)
    expected = letter_of(reference, options)
    letter = read(text, options)
    return UNPARSED if letter is None else Score(float(letter == expected), letter)


def _inferred(text: str, options: Mapping[str, str]) -> str | None:
    answer = final_answer(text)
    return None if answer is None else infer(answer, options)


def _extracted(text: str, _: Mapping[str, str]) -> str | None:
    return extract(final_answer(text) or "")


def _first_letter(text: str, _: Mapping[str, str]) -> str | None:
    """The first capital A to D of the final answer, without phrases such as "The answer is"; the D of "Dog" too.

    So VLMEvalKit's dataset/utils/videomme.py, which calls a language model where this finds none.
    """
    answer = final_answer(text) or ""
    for prefix in _PREFIXES:
        answer = answer.replace(prefix, "")
    match = _A_TO_D.search(answer)
    return match[0] if match else None


def aggregate_circular(scores: Scores) -> dict[str, float]:
    """Return the fraction of questions with all rotations right as "score" (MMBench, arXiv 2307.06281).

    Rows with the same "group" are rotations of one question; a row without it is a question of its own. "rotations" is
    the fraction of rows that are right, "incomplete" that of questions with fewer rows than options, which are easier
    than they should be.
    """
    figures = mean(scores)
    questions = clustered(scores, [reference.get("group") for reference, _ in scores]).values()
    return {
        "score": statistics.fmean(min(score.value for _, score in rows) for rows in questions),
        "rotations": figures["score"],
        "incomplete": statistics.fmean(len(rows) < len(options_of(rows[0][0])) for rows in questions),
    }


def aggregate_buckets(scores: Scores) -> dict[str, float]:
    """Return the mean as "score"; by every field of `BUCKETS`, and by duration and subtitles if the latter vary."""
    figures = mean_by(**{field: field for field in BUCKETS})(scores)
    both = len({bool(reference.get("subtitles")) for reference, _ in scores}) > 1
    return {**figures, **(by_group(scores, _duration_and_subtitles, "duration, subtitles") if both else {})}


def _duration_and_subtitles(reference: Reference) -> str | None:
    duration, subtitles = reference.get("duration"), reference.get("subtitles")
    return None if duration is None or subtitles is None else f"{duration}, {'with' if subtitles else 'without'}"


_VLMEVALKIT = "VLMEvalKit vlmeval/utils/matching_util.py, can_infer"

_MCQ = Metric("mcq", mcq, mean, "ours: the box first, then stricter forms of can_infer; nothing is guessed", FIELDS)
_MMBENCH = Metric(
    "mmbench",
    mcq,
    aggregate_circular,
    "MMBench (arXiv 2307.06281), circular evaluation; letters as mcq",
    FIELDS,
    "group",
    question_terms,
)
_VIDEOMME = Metric("videomme", mcq, aggregate_buckets, "Video-MME (arXiv 2405.21075); letters as mcq", FIELDS, "media")

METRICS = (
    _MCQ,
    _MCQ.variant("mcq-vlmevalkit", _VLMEVALKIT, read=_inferred),
    _MMBENCH,
    _MMBENCH.variant(
        "mmbench-vlmevalkit",
        f"MMBench (arXiv 2307.06281), circular evaluation; letters: {_VLMEVALKIT}",
        read=_inferred,
    ),
    _VIDEOMME,
    _VIDEOMME.variant(
        "videomme-lmms",
        "Video-MME (arXiv 2405.21075); lmms-eval tasks/_task_utils/mcq_extract.py, extract_mcq_answer",
        read=_extracted,
    ),
    _VIDEOMME.variant(
        "videomme-vlmevalkit",
        "Video-MME (arXiv 2405.21075); VLMEvalKit vlmeval/dataset/utils/videomme.py",
        read=_first_letter,
    ),
)
