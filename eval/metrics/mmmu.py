"""MMMU: multiple choice and open questions by the official rules, without their random guess.

Fields: "answer", a letter where there are "options", else a text or number, or "answers"; "type" ("multiple-choice" or
"open") where it does not follow from the options; "subject" ("Accounting", ...) or "id" ("validation_Accounting_1").

The rules are those of eval/eval_utils.py of the MMMU repository, on the final answer. What lmms-eval does with open
questions, comparing the letters of the first reading only, is not copied.
"""

import re
from collections.abc import Mapping

from eval.metrics.choices import infer
from eval.metrics.metric import UNPARSED, Metric, Reference, Score, answers_of, is_choice, mean_by, options_of
from eval.parse_answer import final_answer
from glm4v_jax.errors import DataError

DOMAINS: Mapping[str, tuple[str, ...]] = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
"""Domain -> its subjects, as MMMU groups them."""

_DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}
_SUBJECT_IN_ID = re.compile(r"[^_]+_(.+)_[0-9]+")

_EDGES = (",", ".", "!", "?", ";", ":", "'")
_FEW_WORDS = 5
_CAPITALS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = {":", ",", ".", "!", "?", ";", "'"}
_LONGEST_OPEN = 10_000
"""Characters of an open answer that are read, the last ones."""

# The official ones, which begin at the first digit only, for linear time.
_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3}\b)++")
_SCIENTIFIC = re.compile(r"-?(?<!\d)\d++(?:\.\d++)?[eE][+-]?\d++")
_SIMPLE = re.compile(r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d)(?![,\d])")


def chosen(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the option that an answer names by the official rules; None where those would guess.

    "(A)", else "A ", else "A.", else, in an answer of more than five words, an option's text; of several options the
    one that stands last.
    """
    for mark in _EDGES:
        answer = answer.strip(mark)
    answer = f" {answer} "
    # What has to be present, and what is searched to find which of several stands last.
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", "{}.")):
        if found := [letter for letter in options if form.format(letter) in answer]:
            return _last(answer, {letter: place.format(letter) for letter in found})
    if len(answer.split()) <= _FEW_WORDS:
        return None
    plain = answer.lower()
    return _last(plain, {letter: option.lower() for letter, option in options.items() if option.lower() in plain})


def _last(text: str, places: Mapping[str, str]) -> str | None:
    positions = {letter: text.rfind(place) for letter, place in places.items()}
    return max(positions, key=positions.__getitem__, default=None)


def open_readings(answer: str) -> set[str | float]:
    """Return what an open answer may mean by the official rules: lower-case texts, and numbers rounded to two decimals.

    Of every line the shortest text after a word such as "is" or "answer", in the last line also after "=", or the
    whole answer where there is none; and all numbers in those, 234 in "1,234" among them.

    >>> sorted(open_readings("So the answer is 12"))
    [12.0]
    """
    answer = answer[-_LONGEST_OPEN:].strip().strip(".").lower()
    lines = answer.split("\n")
    keys: list[str] = []
    for index, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if index == len(lines) - 1 else _INDICATORS
        tails = [line.split(indicator)[-1].strip() for indicator in indicators if indicator in line]
        tail = _shortest(tails)
        if tail and tail not in _TRIVIAL:
            keys.append(tail)
    keys = keys or [answer]
    numbers = [
        number for key in keys for pattern in (_WITH_COMMAS, _SCIENTIFIC, _SIMPLE) for number in pattern.findall(key)
    ]
    return {reading for text in (*keys, *numbers) for reading in _normalized(text)}


def _shortest(tails: list[str]) -> str | None:
    """The first of the shortest ones; what follows an empty one replaces it, as in the original."""
    shortest: str | None = None
    for tail in tails:
        if not shortest or len(tail) < len(shortest):
            shortest = tail
    return shortest


def _normalized(text: str) -> list[str | float]:
    text = text.strip()
    try:
        # Rounding an infinite number is fine; of NaN, which equals nothing, as well.
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        # One letter alone stands in nearly every word.
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def is_open_right(readings: set[str | float], answers: list[str]) -> bool:
    """Return whether a right answer stands in one of the texts, or is one of the numbers."""
    expected = [reading for answer in answers for reading in _normalized(answer)]
    return any(
        any(isinstance(one, str) and one in reading for one in expected)
        if isinstance(reading, str)
        else reading in expected
        for reading in readings
    )


def _checked(reference: Reference) -> tuple[list[str], dict[str, str] | None]:
    """The right answers, letters where there are options, and these."""
    answers = answers_of(reference)
    options = options_of(reference) if is_choice(reference, "multiple-choice") else None
    if options is not None and (wrong := [answer for answer in answers if answer not in options]):
        raise DataError(f"answer: found {wrong[0]!r}; expected one of {', '.join(options)}")
    return answers, options


def mmmu(text: str, reference: Reference) -> Score:
    """Score 1 where the letter is right, or the open answer is. What cannot be parsed is counted, and not guessed."""
    answers, options = _checked(reference)
    answer = final_answer(text)
    if answer is None:
        return UNPARSED
    if options is not None:
        letter = chosen(answer, options)
        return UNPARSED if letter is None else Score(float(letter in answers), letter)
    readings = open_readings(answer)
    return Score(float(is_open_right(readings, answers)), sorted(map(str, readings)))


def mmmu_vlmevalkit(text: str, reference: Reference) -> Score:
    """Score as VLMEvalKit: by its rules for letters; an open question has the options "the answer" and "Other Answers".

    With several right answers the first option is the list of them, as its table has it.
    """
    answers, options = _checked(reference)
    answer = final_answer(text)
    if options is None:
        options = {"A": answers[0] if len(answers) == 1 else str(answers), "B": "Other Answers"}
        answers = [options["A"]] if options["A"] in _CAPITALS else ["A"]
    letter = None if answer is None else infer(answer, options)
    return UNPARSED if letter is None else Score(float(letter in answers), letter)


def subject_of(reference: Reference) -> str | None:
    """Return "subject", or "Accounting" of an "id" like "validation_Accounting_1"; None where there is neither."""
    if reference.get("subject") is not None:
        return str(reference["subject"]).replace(" ", "_")
    match = _SUBJECT_IN_ID.fullmatch(str(reference.get("id", "")))
    return match[1] if match else None


def domain_of(reference: Reference) -> str | None:
    """Return the domain of an item's subject; None for an unknown subject."""
    return _DOMAIN_OF.get(subject_of(reference) or "")


_SOURCE = "MMMU (arXiv 2311.16502)"
_FIGURES = mean_by(domain=domain_of, subject=subject_of)

METRICS = (
    Metric(
        "mmmu", mmmu, _FIGURES, f"{_SOURCE}, eval/eval_utils.py; where that guesses at random, the answer is unparsed"
    ),
    Metric(
        "mmmu-vlmevalkit",
        mmmu_vlmevalkit,
        _FIGURES,
        f"{_SOURCE}; VLMEvalKit vlmeval/dataset/utils/multiple_choice.py, MMMU_preproc and can_infer",
    ),
)
