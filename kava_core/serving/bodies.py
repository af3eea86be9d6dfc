"""What a request may ask for, and the error that names the field where it asks for something else.

The fields are OpenAI's. Those that a student cannot heed are accepted at the value that means
nothing, and refused at any other: nothing that is asked for is passed over.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

CHOICES = 16  # answers to one request


class Refusal(Exception):
    """An answer that is an error: OpenAI's error object and its status."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.object = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def too_late(seconds: float) -> Refusal:
    """That of a request which took longer than this."""
    return Refusal(
        f"expected an answer within {seconds:g} seconds, and there is none. Ask for fewer tokens, "
        "or try again when less is waiting.",
        status=504,
        code="timeout",
        kind="timeout_error",
    )


STOPPED = Refusal(
    "the server was stopped before there was an answer.",
    status=503,
    code="stopped",
    kind="server_error",
)


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _said(cls, value: Any) -> Any:
        """Without fields that are not known here and null."""
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None or k in cls.model_fields}


class StreamOptions(_Fields):
    """include_usage: whether a last chunk tells the usage."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Asked(_Fields):
    """What both endpoints take. temperature: 0, the likeliest tokens, as `kava ask` takes them, as
    is any below 1e-6; user: whoever asks, which changes nothing."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field(default_factory=list)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @field_validator("stop", mode="plain")
    @classmethod
    def _stops(cls, value: Any) -> list[str]:
        stops = [value] if isinstance(value, str) else [] if value is None else value
        if not (isinstance(stops, list) and all(isinstance(s, str) and s for s in stops)):
            raise ValueError("expected a text, or a list of them, none of them empty")
        if len(stops) > 4:
            raise ValueError(f"expected at most 4 texts, found {len(stops)}")
        return stops

    @property
    def usage_asked(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def longest(self) -> tuple[str, int | None]:
        """The field that limits the answer's tokens, and what it says."""
        return "max_tokens", self.max_tokens


class Part(_Fields):
    type: Literal["text"]
    text: str


class Message(_Fields):
    role: Literal["user"]
    content: list[Part]
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        if not isinstance(value, str | list):
            raise ValueError("expected a text, or a list of parts of type text")
        return [{"type": "text", "text": value}] if isinstance(value, str) else value

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class Chat(Asked):
    """The body of /v1/chat/completions. messages: the question, in one message of the user."""

    messages: list[Message]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none"] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, Any] | None = Field(None, max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError("expected a list with one message of the user")
        if len(value) != 1:
            raise ValueError(
                f"expected one message of the user, found {len(value)} messages: the model learnt "
                "to answer single questions, without a conversation or instructions before them"
            )
        return value

    @property
    def questions(self) -> list[str | list[int]]:
        return [self.messages[0].text]

    @property
    def longest(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().longest


class Completion(Asked):
    """The body of /v1/completions. prompt: questions, to which each its own answers are given; as
    token ids they are read as they are, without what the model's prompt puts around a question."""

    prompt: list[str | list[int]]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, value: Any) -> list[str | list[int]]:
        prompts = [value] if isinstance(value, str) or _are_ids(value) else value
        if not (
            isinstance(prompts, list)
            and prompts
            and all(isinstance(prompt, str) or _are_ids(prompt) for prompt in prompts)
        ):
            raise ValueError("expected a text, a list of token ids, or a list of one or the other")
        return prompts

    @property
    def questions(self) -> list[str | list[int]]:
        return self.prompt


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


Body = TypeVar("Body", bound=Asked)


def read_body(kind: type[Body], raw: bytes) -> Body:
    """The body of a request; Refusal, naming its first wrong field, if it is none."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    param = ""
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        else:
            param += f".{part}" if param else part
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("extra_forbidden", "too_long"):
        message = "expected nothing, since it is not known here or cannot be heeded; leave it out"
    elif first["type"] == "json_invalid":
        param, message = "", f"the body is not JSON ({message})"
    elif not isinstance(first["input"], dict | list):
        message += f", found {str(first['input'])[:60]!r}"
    raise Refusal(f"{param}: {message}." if param else f"{message}.", param=param or None)
