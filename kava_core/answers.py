"""Finding the answer in a generated text, and deciding whether it is the right one.

Numbers are compared exactly, as fractions. What is not a number (LaTeX, expressions) goes to
math-verify, through its LaTeX grammar only: its other parser evaluates text as Python.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from fractions import Fraction
from typing import NamedTuple

_LONGEST_NUMBER = 200  # a model in a loop can write digits without end
_LONGEST_EXPRESSION = 300
# A gold number with more decimals is a float, printed: GSM-Hard's 13333.333333333334.
_MOST_DECIMALS = 6
_FLOAT_NOISE = Fraction(1, 10**6)

# Thousands apart by commas, blanks or underscores, or nothing: 12,500 and 12 500 and 12_500.
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?!\d)|\d{1,3}(?:_\d{3})+(?!\d)|\d+)"
_NUMBER = rf"(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?!\d))?"
_SIGNED = re.compile(
    rf"(?<![\w.)])(?P<sign>[-+]?)"
    rf"(?:(?P<whole>\d+)\s+(?:and\s+)?(?P<part>[1-9]\d*\s*/\s*\d+)"
    rf"|(?P<top>{_NUMBER})\s*/\s*(?P<bottom>{_NUMBER})"
    rf"|(?P<number>{_NUMBER}))"
)
# After these a number is only the beginning of an expression, a range, a time or a date. Words in
# brackets are not: "18 (dollars)".
_WORDS = r"\(\s*(?:[a-zA-Z]{2,}|a)(?:(?:, | |-)(?:[a-zA-Z]{2,}|a))*\s*\)"
_GOES_ON = re.compile(
    r"[\d,.:_]\d|\d|_|[eE][-+]?\d|\s*(?:[\^*+×÷·=\\{√]|[-/x]\s*[\d(\\.])|[a-bd-fi-kn-rt-zA-Z]\b"
    rf"|(?!\s+{_WORDS})\s*\("
)
# Before these too: a root, a power, an operand.
_STARTED = re.compile(r"[\\^√{]|[-+*/×÷·]\s*$|sqrt")
# Brackets with a comma, unless they begin with a word: "(in all, that is)".
_TUPLE = re.compile(r"[(\[](?!\s*[a-zA-Z]{2})[^)\]]*,(?!\d{3})")
# Several statements, each with its own "=": of them none is the answer. Not so a chain of
# calculations, whose last result is.
_SEVERAL = re.compile(r"=[^=]*(?:\bor\b|(?:[,;]|\band\b)\s*[a-zA-Z]\w*\s*=)", re.IGNORECASE)
_NEXT_SENTENCE = re.compile(r"[.!?]\s+(?!(?:And|Or)\b)[A-Z]")
_SCALE = re.compile(r"\s*(%|percent\b|thousand\b|million\b|billion\b|trillion\b)", re.IGNORECASE)
_SCALES = {
    "%": Fraction(1, 100),
    "percent": Fraction(1, 100),
    "thousand": Fraction(10**3),
    "million": Fraction(10**6),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
}

_LEAD_IN = re.compile(r"the (?:final )?answer is\s*:?", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed\s+(?P<bare>[^\s{}$]+)")
_MATH = re.compile(r"[\\^=+*/()\[\]{}<>|√π]|\d\s*[a-z]\b|-")
# Powers that would keep a computer algebra system busy for ever.
_EXPLODES = re.compile(r"\^[^\^]{0,40}\^|\^\s*\{?\s*\d{4,}|!")


class _Number(NamedTuple):
    value: Fraction  # as written
    scale: Fraction  # 1/100 for percent, 10⁶ for "million", 1 for any other unit
    decimals: int  # digits behind the point


def extract_answer(generated: str) -> str | None:
    """The answer that a generated text ends in, or None if there is none.

    The first of these that is there: the rest of the line after the last "The answer is:"; the
    same after the last "####"; the content of the last `\\boxed{…}`; the last number.
    """
    for parts in (_LEAD_IN.split(generated), generated.split("####")):
        if len(parts) > 1:
            lines = parts[-1].strip().splitlines()
            if lines:
                return last_box(lines[0]) or lines[0].strip()
    boxed = last_box(generated)
    if boxed:
        return boxed
    text = _plain(generated)
    numbers = list(_SIGNED.finditer(text))
    if not numbers:
        return None
    start, end = numbers[-1].span()
    scale = _SCALE.match(text, end)
    return text[start : scale.end() if scale else end]


def parse_number(text: str) -> Fraction | None:
    """The exact value of a text that states one number, or None.

    Currency signs, units and words around the number do not matter, nor commas, blanks (also
    U+00A0 and U+202F) and underscores between thousands; "3 million" counts in full and "50%" is
    50. Understood are integers, decimals, fractions, mixed numbers and scientific notation, in
    plain text or simple LaTeX. Of "10 - 9 = 1" it is the right side. A text in which the number is
    only a part of an expression, a tuple, a time or a range gives None, and so does one with other
    numbers in the same sentence ("18 or 19", "2 hours 30 minutes"): the first is not the answer.
    """
    number = _parse(text)
    if number is None:
        return None
    return number.value if number.scale < 1 else number.value * number.scale


def last_box(text: str) -> str | None:
    """What is in the last `\\boxed{…}`, `\\fbox{…}` or `\\boxed 3`; None if it is not closed."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    if boxes[-1]["bare"]:
        return boxes[-1]["bare"].rstrip(".,")
    start = boxes[-1].end() + 1
    depth = 1
    escaped = False
    for place in range(start, len(text)):
        sign = text[place]
        depth += 0 if escaped else {"{": 1, "}": -1}.get(sign, 0)
        escaped = sign == "\\" and not escaped
        if depth == 0:
            return " ".join(text[start:place].split())
    return None


def same_answer(predicted: str | None, gold: str) -> bool:
    """Whether a predicted answer means the same as the gold answer.

    Two numbers are compared exactly. Where only one of them has a percent sign or a word such as
    "million", either reading of it counts ("50%" is both 50 and 0.5). A gold number with more than
    six decimals is a printed float: the prediction may be rounded, to two decimals or more.
    Anything else is equal as text without case and spacing, or by math-verify where it looks like
    mathematics.
    """
    if predicted is None:
        return False
    left, right = _parse(predicted), _parse(gold)
    if left is not None and right is not None:
        scaled = left.value * left.scale == right.value * right.scale
        if left.scale == 1 or right.scale == 1:
            return scaled or left.value == right.value or _rounded(left, right)
        return scaled
    texts = [" ".join(_plain(text).casefold().strip(" .").split()) for text in (predicted, gold)]
    if texts[0] == texts[1]:
        return True
    if not all(texts) or not any(_MATH.search(text) for text in texts):
        return False
    return _same_expression(predicted, gold)


def has_value(text: str) -> bool:
    """Whether an answer is a number or a mathematical expression, and not mere text."""
    if parse_number(text) is not None:
        return True
    return _MATH.search(text) is not None and _same_expression(text, text)


def _rounded(predicted: _Number, gold: _Number) -> bool:
    """Whether gold is a printed float, and predicted the same number without its last digits."""
    if gold.decimals <= _MOST_DECIMALS or predicted.scale != gold.scale:
        return False
    tolerance = _FLOAT_NOISE
    if predicted.decimals >= 2:
        tolerance = max(tolerance, Fraction(1, 2 * 10**predicted.decimals))
    return abs(predicted.value - gold.value) <= tolerance


def _parse(text: str) -> _Number | None:
    plain = _plain(text)
    if _SEVERAL.search(plain):
        return None
    plain = plain.rpartition("=")[2].strip()
    if plain.startswith("-"):
        plain = "-" + plain[1:].lstrip()
    first = _SIGNED.search(plain)
    if first is None or _TUPLE.search(plain) or _GOES_ON.match(plain, first.end()):
        return None
    if _STARTED.search(plain[: first.start()]):
        return None
    end = _NEXT_SENTENCE.search(plain, first.end())
    stated = {
        _number(match, plain)
        for match in _SIGNED.finditer(plain, first.start(), end.start() if end else len(plain))
    }
    values = {(number.value, number.scale) for number in stated if number}
    return _number(first, plain) if None not in stated and len(values) == 1 else None


def _number(match: re.Match[str], text: str) -> _Number | None:
    """The number that was matched in a text; None if it is too long, or divided by 0."""
    if len(match[0]) > _LONGEST_NUMBER:
        return None
    if match["whole"]:
        top, _, bottom = match["part"].partition("/")
        below = _fraction(bottom)
        if not below:
            return None
        value = _fraction(match["whole"]) + _fraction(top) / below
    elif match["top"]:
        below = _fraction(match["bottom"])
        if not below:
            return None
        value = _fraction(match["top"]) / below
    else:
        value = _fraction(match["number"])
    scale = _SCALE.match(text, match.end())
    return _Number(
        -value if match["sign"] == "-" else value,
        _SCALES[scale[1].lower()] if scale else Fraction(1),
        len((match["number"] or "").lower().partition("e")[0].partition(".")[2]),
    )


def _fraction(digits: str) -> Fraction:
    return Fraction(re.sub("[,_ ]", "", digits))


_FRACTION = re.compile(
    r"(\d?)\s*\\[dt]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}|(\d)\s*(\d))"
)
_REPLACEMENTS = (
    (re.compile(r"[\u2212\u2012\u2013\ufe63\uff0d]"), "-"),
    (re.compile(r"\\[,;:! ]|\{,\}|\\left|\\right|\\[()\[\]]|\*\*"), ""),
    (re.compile(r"\\?%"), "%"),
    (re.compile(r"(?:US|A|C)?\\?[$€£¥₹]"), ""),
    (re.compile(r"\\(?:text|textbf|mathrm|mbox|mathbf)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|°"), " degrees"),
    (re.compile(r"[~\s]+"), " "),
)


def _plain(text: str) -> str:
    """The text with one kind of minus and space, and without currency and LaTeX's dressing."""
    boxed = last_box(text)
    if boxed is not None:
        text = boxed
    text = "".join(_vulgar(sign) if ord(sign) > 127 else sign for sign in text)
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return _FRACTION.sub(_write_fraction, text).strip()


def _vulgar(sign: str) -> str:
    """ "½" as " 1/2"; any other sign as it is."""
    if not unicodedata.decomposition(sign).startswith("<fraction>"):
        return sign
    return " " + unicodedata.normalize("NFKC", sign).replace("\u2044", "/")


def _write_fraction(match: re.Match[str]) -> str:
    before, top, bottom, short_top, short_bottom = match.groups()
    return f"{before}{' ' if before else ''}{top or short_top}/{bottom or short_bottom}"


def _same_expression(predicted: str, gold: str) -> bool:
    texts = [last_box(text) or text.strip().strip("$").rstrip(".") for text in (predicted, gold)]
    if any(len(text) > _LONGEST_EXPRESSION or _EXPLODES.search(text) for text in texts):
        return False
    from math_verify import LatexExtractionConfig, parse, verify

    # math-verify's time limit is an alarm signal, which only the main thread may set.
    seconds = 5 if threading.current_thread() is threading.main_thread() else 0
    grammar = [LatexExtractionConfig()]
    left, right = (
        parse(f"${text}$", grammar, fallback_mode="no_fallback", parsing_timeout=seconds)
        for text in texts
    )
    return bool(left) and bool(right) and bool(verify(right, left, timeout_seconds=seconds))
