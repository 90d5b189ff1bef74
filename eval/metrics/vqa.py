"""VQA accuracy (VQAv2, TextVQA): agreement with ten people, after the historic normalisation.

Fields: "answers", ten as the people wrote them; "type" (of question or answer) for the figures by type.
"""

import re

from eval.metrics.metric import UNPARSED, Metric, Reference, Score, answers_of, mean_by
from eval.parse_answer import final_answer

ENOUGH = 4
"""The least number of answers with which the formula reaches 1; with fewer, equality with one of them counts."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The original's lookbehind is misspelt, (?!<=\d), so that a full stop after a digit goes too ("5." is "5").
_FULL_STOP = re.compile(r"\.(?!\d)")
_LONE_FULL_STOP = re.compile(r"(?<!\d)\.(?!\d)")
# The original passes re.UNICODE where the number of replacements belongs.
_MOST_FULL_STOPS = int(re.UNICODE)

_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = ("a", "an", "the")

# People type them without an apostrophe: without their only one, or without the one or the other of two.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll "
    "somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's "
    "there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll you'd you'd've you'll you're you've "
)


def _spellings() -> dict[str, str]:
    """Spelling -> contraction, those of the original table and no others."""
    spellings: dict[str, str] = {}
    for word in _CONTRACTIONS.split():
        marks = [index for index, character in enumerate(word) if character == "'"]
        if len(marks) == 1:
            spellings[word.replace("'", "")] = word
        else:
            spellings |= {word[:index] + word[index + 1 :]: word for index in marks}
    # Its odd ones.
    return spellings | {
        "somebody'd": "somebodyd",
        "ow's'at": "'ow's'at",
        "'ows'at": "'ow's'at",
        "'ow'sat": "'ow's'at",
        "yall'd've": "y'all'd've",
        "y'alld've": "y'all'd've",
        "y'all'dve": "y'all'd've",
    }


_SPELLINGS = _spellings()


def normalized(text: str, is_eval_ai: bool = False, is_repaired: bool = False) -> str:
    """Normalise a text as VQA accuracy does (visualqa.org, vqaEval.py).

    Lower case; punctuation goes, or becomes a space where it stands between letters; number words are digits; articles
    go; contractions get their apostrophes.

    `is_eval_ai`: commas and question marks go and "'s" is split off first, as the processor of EvalAI does it, which
    lmms-eval uses for TextVQA. `is_repaired`: a full stop stays after a digit, as in VLMEvalKit.
    """
    if is_eval_ai:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    bare = text
    for mark in _PUNCTUATION:
        is_at_edge = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if is_at_edge or has_number else " ")
    bare = (_LONE_FULL_STOP if is_repaired else _FULL_STOP).sub("", bare, count=_MOST_FULL_STOPS)
    words = (_NUMBERS.get(word, word) for word in bare.lower().split())
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(text: str, reference: Reference, is_eval_ai: bool = False, is_repaired: bool = False) -> Score:
    """Score the mean, over the answers left out one at a time, of min(1, equal ones among the others / 3).

    With fewer than four answers: 1 where it equals one of them.
    """
    expected = [normalized(answer, is_eval_ai, is_repaired) for answer in answers_of(reference)]
    answer = final_answer(text)
    if answer is None:
        return UNPARSED
    plain = normalized(answer, is_eval_ai, is_repaired)
    if len(expected) < ENOUGH:
        return Score(float(plain in expected), plain)
    count = expected.count(plain)
    others = [count - (one == plain) for one in expected]
    return Score(sum(min(1.0, equal / 3) for equal in others) / len(expected), plain)


_SOURCE = "VQA accuracy, visualqa.org/evaluation.html"

_VQA = Metric(
    "vqa_accuracy",
    vqa_accuracy,
    mean_by(type="type"),
    f"{_SOURCE}; vqaEval.py with its historic regular expressions",
    cluster="media",
)

METRICS = (
    _VQA,
    _VQA.variant(
        "vqa_accuracy-lmms",
        f"{_SOURCE}; the processor of EvalAI, lmms-eval tasks/_task_utils/vqa_eval_metric.py",
        is_eval_ai=True,
    ),
    _VQA.variant(
        "vqa_accuracy-vlmevalkit", f"{_SOURCE}; VLMEvalKit vlmeval/dataset/utils/vqa_eval.py", is_repaired=True
    ),
)
