"""Prompts: what stands around a question, before an answer and behind it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from kava_core.artefacts import read_json, write_json
from kava_core.errors import KavaError
from kava_core.problems.folder import open_problems, write_problems
from kava_core.problems.judge import read_answer
from kava_core.problems.prompt import PLAIN, Prompt, check_prompt, read_prompt
from kava_core.problems.splits import ProblemSplits
from kava_core.problems.traces import TraceEncoder, chat_fingerprint
from tests.problems.chats import CHATML, PROBLEMS, TOKENIZER, chat_tokenizer

SHOWN = {"question": "1 and 1 ?", "steps": ["<<1+1=2>>", "<<2+2=4>>"], "answer": "4"}
SHOT = "<<1+1=2>><<2+2=4>>The answer is: 4"


def prompt(**settings: Any) -> Prompt:
    return Prompt.model_validate(settings)


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def test_the_default_is_the_question_and_a_line_end_and_is_not_kept() -> None:
    plain = TraceEncoder(TOKENIZER).encode(PROBLEMS[0])
    same = prompt(question="{question}\n", answer="The answer is:")
    assert TraceEncoder(TOKENIZER, prompt=same).encode(PROBLEMS[0]) == plain
    assert TOKENIZER.decode(plain.question_ids) == PROBLEMS[0].question + "\n"
    assert (PLAIN.kept(), prompt().kept()) == ({}, {})


def test_a_template_and_an_answer_prompt_of_ones_own() -> None:
    own = prompt(question="Q ({1}): {question}\nA:", answer="####")
    trace = TraceEncoder(TOKENIZER, prompt=own).encode(PROBLEMS[0])
    assert TOKENIZER.decode(trace.question_ids) == f"Q ({{1}}): {PROBLEMS[0].question}\nA:"
    assert TOKENIZER.decode(trace.answer_prompt_ids) == "####"


def test_examples_are_written_as_problems_are() -> None:
    trace = TraceEncoder(TOKENIZER, prompt=prompt(examples=[SHOWN])).encode(PROBLEMS[0])
    shot = ids("1 and 1 ?\n") + ids("<<1+1=2>><<2+2=4>>") + ids("The answer is:") + ids(" 4")
    question = TraceEncoder(TOKENIZER).encode(PROBLEMS[0]).question_ids
    assert trace.question_ids == [*shot, *ids("\n\n"), *question]
    stopped = TraceEncoder(TOKENIZER, prompt=prompt(examples=[SHOWN], stop=";"))
    assert stopped.encode(PROBLEMS[0]).question_ids == [*shot, *ids(";"), *question]
    assert stopped.encode(PROBLEMS[0]).answer_ids[-1:] == ids(";") == [stopped.eos]
    (measured,) = stopped.measure(PROBLEMS[:1])
    assert measured == (len(shot) + 1 + len(question), len(trace.cot_ids), None)
    assert stopped.encode_questions([PROBLEMS[0].question]) == [[*shot, *ids(";"), *question]]


def test_a_chat_is_what_the_tokenizer_makes_of_it() -> None:
    tokenizer = chat_tokenizer()
    encoder = TraceEncoder(tokenizer, prompt=prompt(chat=True, question="{question} Think."))
    trace = encoder.encode(PROBLEMS[0])
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{PROBLEMS[0].question} Think."}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert trace.question_ids == expected
    assert tokenizer.decode(expected).endswith("Think.<|im_end|>\n<|im_start|>assistant\n")
    assert trace.cot_ids == TraceEncoder(TOKENIZER).encode(PROBLEMS[0]).cot_ids
    assert tokenizer.convert_ids_to_tokens(trace.answer_ids[-1]) == "<|im_end|>"
    assert encoder.encode_questions([PROBLEMS[0].question]) == [expected]
    assert encoder.measure(PROBLEMS[:1]) == [(len(expected), len(trace.cot_ids), None)]
    assert encoder.encode_all([]) == encoder.encode_questions([]) == []


def test_examples_of_a_chat_are_turns() -> None:
    tokenizer = chat_tokenizer()
    encoder = TraceEncoder(tokenizer, prompt=prompt(chat=True, examples=[SHOWN]))
    assert tokenizer.decode(encoder.encode_questions(["How ?"])[0]) == (
        "<|im_start|>user\n1 and 1 ?<|im_end|>\n<|im_start|>assistant\n" + SHOT + "<|im_end|>\n"
        "<|im_start|>user\nHow ?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_writes_the_date_writes_the_same_one_every_day() -> None:
    dated = "{{ strftime_now('%d %b %Y') }}: " + CHATML
    encoder = TraceEncoder(chat_tokenizer(dated), prompt=prompt(chat=True))
    assert encoder.question_texts(["How ?"])[0].startswith("26 Jul 2024: ")


def test_a_stop_ends_answers_in_the_place_of_the_end_of_sequence() -> None:
    tokenizer = chat_tokenizer(eos="<|eos|>")
    encoder = TraceEncoder(tokenizer, prompt=prompt(chat=True, stop="<|im_end|>"))
    trace = encoder.encode(PROBLEMS[0])
    assert trace.answer_ids[-1] == encoder.eos == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "expected a tokenizer with a chat template, found none"),
        ("{{ messages[0]['role'] }}", "expected a chat template that writes the user's turn"),
        ("{{ raise_exception('System first') }}", r"cannot be used \(System first\)"),
        ("{{ messages", r"cannot be used \("),
    ],
)
def test_a_tokenizer_that_cannot_chat_is_refused(template: str | None, said: str) -> None:
    with pytest.raises(KavaError, match=rf"^prepare\.prompt\.chat: .*{said}"):
        TraceEncoder(chat_tokenizer(template), prompt=prompt(chat=True))


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|pad|>"])
def test_a_question_cannot_end_its_turn(token: str) -> None:
    encoder = TraceEncoder(chat_tokenizer(), prompt=prompt(chat=True))
    with pytest.raises(KavaError, match=rf"{PROBLEMS[0].id}.*special tokens.*{re.escape(token)}"):
        encoder.encode(replace(PROBLEMS[0], question=f"How many {token} ?"))


def test_a_stop_must_be_one_token_that_nothing_written_holds() -> None:
    with pytest.raises(
        KavaError, match=r"prompt\.stop: expected one token.*found ';;', which is 2"
    ):
        TraceEncoder(TOKENIZER, prompt=prompt(stop=";;"))
    with pytest.raises(KavaError, match=rf"{PROBLEMS[0].id}.* holds '=' before its answer ends"):
        TraceEncoder(TOKENIZER, prompt=prompt(stop="=")).encode(PROBLEMS[0])
    with pytest.raises(KavaError, match=r"cannot write 'a;' in ordinary tokens"):
        TraceEncoder(TOKENIZER, prompt=prompt(stop=";", answer="a;"))
    with pytest.raises(KavaError, match=r"prepare\.prompt\.examples\.0.* holds '>' before"):
        TraceEncoder(TOKENIZER, prompt=prompt(stop=">", examples=[{**SHOWN, "steps": ["a>b"]}]))


@pytest.mark.parametrize(
    ("text", "prompted", "found"),
    [
        (" 18", True, "18"),
        (" 18 of 20", True, "18 of 20"),
        ("<<9+9=18>>Answer: x^2", False, "x^2"),
        ("Answer: 3\n\n4 and 5. Answer: 9", False, "9"),
        ("9 and 9 are 18.", False, "18"),
        ("The answer is: 7", False, "7"),
    ],
)
def test_an_answer_is_read_behind_the_prompt_of_ones_own(
    text: str, prompted: bool, found: str
) -> None:
    assert read_answer(text, prompted=prompted, answer_prompt="Answer:") == found


def test_problems_keep_the_prompt_and_go_by_it(tmp_path: Path) -> None:
    splits = ProblemSplits(PROBLEMS[:4], PROBLEMS[4:6], [])
    own = prompt(chat=True, examples=[SHOWN])
    for name, each in (("plain", PLAIN), ("own", own)):
        (tmp_path / name).mkdir()
        write_problems(tmp_path / name, splits, "equations", {}, None, each)
    plain, opened = open_problems(tmp_path / "plain"), open_problems(tmp_path / "own")
    assert (plain.prompt, opened.prompt) == (PLAIN, own)
    assert "prompt" not in read_json(tmp_path / "plain/problems.json")
    assert plain.fingerprint("train") != opened.fingerprint("train")
    about = read_json(tmp_path / "own/problems.json")
    write_json(tmp_path / "own/problems.json", {**about, "prompt": {"question": "none"}})
    with pytest.raises(KavaError, match=r"problems\.json does not say how questions are put"):
        open_problems(tmp_path / "own")


def test_a_model_that_learnt_other_prompts_is_named_with_both(tmp_path: Path) -> None:
    check_prompt(PLAIN, tmp_path, "teacher.json", "kava teacher")  # nobody says anything
    write_json(tmp_path / "teacher.json", prompt(stop="x", answer="####").kept())
    check_prompt(prompt(stop="x", answer="####"), tmp_path, "teacher.json", "kava teacher")
    said = (
        r'expected {"answer": "The answer is:"}, found {"answer": "####"}. Run `kava teacher` again'
    )
    with pytest.raises(KavaError, match=re.escape(said)):
        check_prompt(prompt(stop="x"), tmp_path, "teacher.json", "kava teacher")
    assert read_prompt({}, tmp_path) == PLAIN


def test_a_chat_goes_by_its_template() -> None:
    chat = prompt(chat=True)
    one = chat_fingerprint(chat, chat_tokenizer())
    assert one != chat_fingerprint(chat, chat_tokenizer("x" + CHATML))
    assert list(one) == ["chat_template"]
    assert chat_fingerprint(PLAIN, chat_tokenizer()) == {}


def test_the_prompts_of_the_documentation_are_prompts() -> None:
    page = (Path(__file__).parents[2] / "docs/prompts.md").read_text(encoding="utf-8")
    shown = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    prompts = [prompt(**each.get("prepare", each)["prompt"]) for each in shown]
    assert [each.chat for each in prompts] == [True, False, False, True]
    assert [len(each.examples) for each in prompts] == [0, 0, 2, 1]
    assert prompts[2].asked("How ?") == "Q: How ?\nA:\n"
