"""What OpenAI's own client gets from `kava serve`: the answers of `kava ask`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from kava_core.evaluation.questions import Question, Respondents
from kava_core.models.latent import LatentReasoner
from tests.serving.conftest import NAME, QUESTIONS, Running, Start

CHAT: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": QUESTIONS[0]}]}


@pytest.fixture(scope="module")
def asked(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """What `kava ask` says to each question."""
    respondents = Respondents.of(folders["student"], steps=False, teacher=None)
    found = [
        respondents.answer([Question(text)], batch_size=1, max_new_tokens=40)[0]
        for text in QUESTIONS
    ]
    assert len({row["text"] for row in found}) > 3
    return found


def said(server: Running, question: str, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": question}]
    return server.client.chat.completions.create(model=NAME, messages=messages, **options)


def streamed(server: Running, question: str, **options: Any) -> list[Any]:
    return list(said(server, question, stream=True, **options))


def test_a_chat_is_answered_as_kava_ask_does(student: Running, asked: list[dict[str, Any]]) -> None:
    for question, expected in zip(QUESTIONS, asked, strict=True):
        found = said(student, question)
        assert found.choices[0].message.content == expected["text"]
        assert found.choices[0].message.role == "assistant"
        assert found.choices[0].finish_reason in ("stop", "length")
        assert found.usage.forward_passes == expected["passes"]
        assert found.usage.latents == 3
        assert found.usage.completion_tokens == expected["passes"] - 2  # question, T = 2
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_many_clients_get_what_one_gets(student: Running, asked: list[dict[str, Any]]) -> None:
    calls = student.meter("kava_decoder_calls_total"), student.meter("kava_forward_passes_total")

    def text(i: int) -> str:
        if i % 2:
            pieces = streamed(student, QUESTIONS[i % 6])
            return "".join(piece.choices[0].delta.content or "" for piece in pieces)
        return str(said(student, QUESTIONS[i % 6]).choices[0].message.content)

    with ThreadPoolExecutor(24) as clients:
        found = list(clients.map(text, range(48)))
    assert found == [asked[i % 6]["text"] for i in range(48)]
    after = student.meter("kava_decoder_calls_total"), student.meter("kava_forward_passes_total")
    assert after[1] - calls[1] > 1.5 * (after[0] - calls[0])  # they did share batches


def test_a_stream_is_the_answer_in_pieces(student: Running, asked: list[dict[str, Any]]) -> None:
    question, expected = max(
        zip(QUESTIONS, asked, strict=True), key=lambda pair: len(pair[1]["text"])
    )
    first, *pieces, end = streamed(student, question, stream_options={"include_usage": True})
    assert first.choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected["text"]
    assert len(pieces) > 3
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    assert end.choices == [] and end.usage.forward_passes == expected["passes"]
    assert {piece.id for piece in (first, *pieces, end)} == {first.id}


def test_completions_answer_a_list_of_prompts(
    student: Running, asked: list[dict[str, Any]], folders: dict[str, Path]
) -> None:
    encoder = Respondents.of(folders["student"], steps=False, teacher=None).encoder
    ids = encoder.encode_questions(QUESTIONS[:2])
    create: Any = student.client.completions.create
    for prompt, expected in (
        (QUESTIONS[1], asked[1:2]),
        (QUESTIONS, asked),
        (ids, asked[:2]),
        (ids[1], asked[1:2]),
    ):
        found = create(model=NAME, prompt=prompt)
        assert [choice.text for choice in found.choices] == [row["text"] for row in expected]
        assert [choice.index for choice in found.choices] == list(range(len(expected)))
        assert found.usage.forward_passes == sum(row["passes"] for row in expected)
    pieces = list(create(model=NAME, prompt=QUESTIONS[:2], stream=True))
    for index in (0, 1):
        text = "".join(x.choices[0].text for x in pieces if x.choices[0].index == index)
        assert text == asked[index]["text"]


def test_length_and_stops_end_an_answer(student: Running, asked: list[dict[str, Any]]) -> None:
    question, expected = max(
        zip(QUESTIONS, asked, strict=True), key=lambda pair: len(pair[1]["text"])
    )
    text = expected["text"]
    for name in ("max_tokens", "max_completion_tokens"):
        found = said(student, question, **{name: 3})
        assert found.choices[0].finish_reason == "length"
        assert text.startswith(found.choices[0].message.content)
        assert found.usage.completion_tokens == 3
    stop = text[4:6]
    for pieces in (False, True):
        if pieces:
            chunks = streamed(student, question, stop=[stop, "never"])
            content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            finish = chunks[-1].choices[0].finish_reason
        else:
            choice = said(student, question, stop=stop).choices[0]
            content, finish = choice.message.content, choice.finish_reason
        assert (content, finish) == (text[: text.index(stop)], "stop")


def test_drawn_answers_follow_their_seed(student: Running, asked: list[dict[str, Any]]) -> None:
    def texts(**options: Any) -> list[str]:
        found = said(student, QUESTIONS[0], n=6, **options)
        return [choice.message.content for choice in found.choices]

    drawn = texts(temperature=1.5, seed=7)
    assert drawn == texts(temperature=1.5, seed=7)
    assert drawn[1:] == texts(temperature=1.5, seed=8)[:5]  # the next answer has the next seed
    assert len(set(drawn)) > 1
    assert texts(temperature=1.5) != texts(temperature=1.5)
    assert texts(temperature=1.5, top_p=1e-6, seed=7) == [asked[0]["text"]] * 6
    assert texts(temperature=1e-300, seed=7) == [asked[0]["text"]] * 6
    assert texts() == [asked[0]["text"]] * 6


def test_the_models_are_the_one_that_is_served(student: Running) -> None:
    (found,) = student.client.models.list().data
    assert (found.id, found.owned_by) == (NAME, "kava")
    assert student.client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        student.client.models.retrieve("another")


def test_a_teacher_writes_its_chain(start: Start, folders: dict[str, Path]) -> None:
    server = start(folders["teacher"], "--max-tokens", "30")
    own = Respondents.of(folders["student"], steps=False, teacher=None)
    writer = LatentReasoner.plain(
        own.system.decoder, answer_prompt_ids=[], eos_token_id=own.encoder.eos
    )
    plain = Respondents(writer, True, None, own.encoder)
    for question in QUESTIONS[:3]:
        found: Any = said(server, question)
        (expected,) = plain.answer([Question(question)], batch_size=1, max_new_tokens=30)
        assert found.choices[0].message.content == expected["text"]
        assert found.usage.forward_passes == expected["passes"] == found.usage.completion_tokens
        assert found.usage.latents == 0
    assert any("a teacher, which writes its chain of thought" in line for line in server.lines)


BAD: list[tuple[str, dict[str, Any], str | None]] = [
    ("chat/completions", {"model": NAME}, "messages"),
    ("chat/completions", {**CHAT, "temperature": 3}, "temperature"),
    ("chat/completions", {**CHAT, "temperature": "0"}, "temperature"),
    ("chat/completions", {**CHAT, "top_p": 0}, "top_p"),
    ("chat/completions", {**CHAT, "n": 17}, "n"),
    ("chat/completions", {**CHAT, "max_tokens": 0}, "max_tokens"),
    ("chat/completions", {**CHAT, "max_tokens": 41}, "max_tokens"),
    ("chat/completions", {**CHAT, "max_completion_tokens": 41}, "max_completion_tokens"),
    ("chat/completions", {**CHAT, "stop": [""]}, "stop"),
    ("chat/completions", {**CHAT, "stop": ["a"] * 5}, "stop"),
    ("chat/completions", {**CHAT, "presence_penalty": 1}, "presence_penalty"),
    ("chat/completions", {**CHAT, "logit_bias": {"5": 1}}, "logit_bias"),
    ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, "tools"),
    ("chat/completions", {**CHAT, "response_format": {"type": "json"}}, "response_format.type"),
    ("chat/completions", {**CHAT, "stream_options": {"x": 1}}, "stream_options.x"),
    ("chat/completions", {**CHAT, "nonsense": 1}, "nonsense"),
    ("chat/completions", {**CHAT, "messages": CHAT["messages"] * 2}, "messages"),
    (
        "chat/completions",
        {**CHAT, "messages": [{"role": "system", "content": "?"}]},
        "messages[0].role",
    ),
    (
        "chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": " "}]},
        "messages[0].content",
    ),
    (
        "chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
    ),
    (
        "chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": "7 " * 1000}]},
        "messages",
    ),
    ("completions", {"model": NAME, "prompt": []}, "prompt"),
    ("completions", {"model": NAME, "prompt": [1, 99999]}, "prompt"),
    ("completions", {"model": NAME, "prompt": "7 " * 1000}, "prompt"),
    ("completions", {"model": NAME, "prompt": ["a"] * 161}, "prompt"),
    ("completions", {"model": NAME, "prompt": "a", "echo": True}, "echo"),
    ("completions", {"model": NAME, "prompt": "a", "logprobs": 0}, "logprobs"),
    ("completions", {"model": NAME, "prompt": None}, "prompt"),
    ("chat/completions", {**CHAT, "store": True}, "store"),
    ("chat/completions", {**CHAT, "tool_choice": "auto"}, "tool_choice"),
    ("chat/completions", {**CHAT, "metadata": {"a": "b"}}, "metadata"),
]


def test_fields_that_ask_for_nothing_are_accepted(student: Running) -> None:
    nothing: dict[str, Any] = {
        **{"metadata": None, "top_logprobs": None, "reasoning_effort": None, "stop": None},
        **{"store": False, "logprobs": False, "tool_choice": "none", "tools": []},
    }
    (turn,) = CHAT["messages"]
    body = {**CHAT, **nothing, "messages": [{**turn, "tool_calls": None}]}
    found = student.post("/v1/chat/completions", body)
    assert found.status_code == 200, found.text
    assert found.json()["choices"] == student.post("/v1/chat/completions", CHAT).json()["choices"]
    body = {"model": NAME, "prompt": "a", "logprobs": None, "suffix": None}
    assert student.post("/v1/completions", body).status_code == 200


@pytest.mark.parametrize(("path", "body", "field"), BAD, ids=lambda x: str(x)[:40])
def test_a_bad_request_names_the_field(
    student: Running, path: str, body: dict[str, Any], field: str | None
) -> None:
    found = student.post(f"/v1/{path}", body)
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: ") and error["message"].endswith(".")


def test_other_refusals_are_errors_of_openai_too(student: Running) -> None:
    url = f"{student.url}/v1/chat/completions"
    with pytest.raises(openai.NotFoundError) as other:
        student.client.chat.completions.create(model="another", messages=CHAT["messages"])
    assert other.value.code == "model_not_found" and other.value.param == "model"
    json = {"content-type": "application/json"}
    for sent, status in (
        (httpx2.post(url, content=b"{", headers=json), 400),
        (httpx2.post(url, content=b'{"model": "\xff"}', headers=json), 400),
        (httpx2.post(url, content=b"[" * 100_000, headers=json), 400),
        (httpx2.post(url, content=b"{}", headers={"content-type": "text/plain"}), 415),
        (httpx2.post(url, content=b" " * 300_000, headers=json), 413),
        (httpx2.post(url, content=iter([b" " * 200_000] * 2), headers=json), 413),
        (httpx2.get(url), 405),
        (httpx2.get(f"{student.url}/v1/nothing"), 404),
    ):
        assert sent.status_code == status
        assert sent.json()["error"]["message"]
    assert student.get("/health").json()["status"] == "ok"


def test_a_page_with_a_name_of_its_own_reaches_nothing(student: Running) -> None:
    for name in ("page.example", "localhost.page.example", "localhost:1:2", "127x0.0.1", ""):
        found = httpx2.get(f"{student.url}/health", headers={"host": name})
        assert found.status_code == 400
        error = found.json()["error"]
        assert error["type"] == "invalid_request_error" and error["code"] == "unknown_host"
        assert error["message"] == f"expected localhost, 127.0.0.1, [::1] as Host, found {name!r}."
    port = student.url.rsplit(":", 1)[1]
    for name in ("localhost", "127.0.0.1", "[::1]", "LocalHost"):
        assert httpx2.get(f"{student.url}/health", headers={"host": f"{name}:{port}"}).is_success


def test_a_token_is_asked_for_where_there_is_one(start: Start, folders: dict[str, Path]) -> None:
    server = start(folders["student"], token="sesame-7")
    assert server.get("/health").status_code == 200
    assert server.get("/metrics").status_code == 401
    for key in ("nobody's", "sesame", "sesame-77"):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="Bearer TOKEN"):
            client.chat.completions.create(**CHAT)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame-7", max_retries=0)
    assert client.chat.completions.create(**CHAT).choices
    assert client.models.list().data
    assert not any("sesame" in line for line in server.lines)
