"""What clients may ask for, in OpenAI's words, and how a request is refused.

What cannot be had is refused with a sentence, as `generate` refuses it: no argument is dropped silently but what
changes no response (`user`, `metadata` and the like).
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

MAX_STOP_STRINGS = 16


class RequestError(Exception):
    r"""
    A request that is not answered, and why.

    Args:
        status (`int`): The HTTP status.
        message (`str`): A sentence for the client.
        param (`str`, *optional*): The argument at fault.
        code (`str`, *optional*): The fault, as OpenAI names it.
        retry_after (`int`, *optional*): Seconds after which the same request may be answered.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# ----------------------------------------------------------------------------------------------------------- arguments
def _as_prompts(value: Any) -> Any:
    """One text, several, one list of token ids, or several: as a list of prompts."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        value = [value]
    ids = isinstance(value, list) and all(
        isinstance(item, str) or (isinstance(item, list) and all(type(token) is int for token in item))
        for item in value
    )
    if not ids or not value:
        raise ValueError("must be a text, a list of texts, a list of token ids of the LLM, or a list of such lists")
    return value


def _as_stop(value: Any) -> Any:
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list) or not all(isinstance(text, str) and text for text in strings):
        raise ValueError("must be a text or a list of texts, none of them empty")
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"may have {MAX_STOP_STRINGS} texts at most")
    return strings


def _as_text(content: Any) -> Any:
    """A message's content: a text, or parts that are texts."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ValueError("must be a text, or parts of the type 'text': the model reads nothing else")
    return content


def _is_off(value: Any) -> Any:
    if value not in (None, False, 0, "", [], {}, "none", {"type": "text"}):
        raise ValueError("is not served: leave it out")
    return value


def _is_false(value: Any) -> Any:
    if value is not None and value is not False:  # 0 asks for the chosen tokens' own
        raise ValueError("is not served: leave it out")
    return value


Off = Annotated[Any, AfterValidator(_is_off)]
Prompts = Annotated[list[Any], BeforeValidator(_as_prompts)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    # These say who asks, and change no response.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None


class StreamOptions(BaseModel):
    """Of a stream, whether its last chunk counts the tokens."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class GenerationRequest(_Request):
    """What both kinds of completions take."""

    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1)
    stop: Annotated[list[str], BeforeValidator(_as_stop)] = []
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    presence_penalty: Off = None
    frequency_penalty: Off = None
    logit_bias: Off = None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Prompts
    best_of: Literal[1] | None = None
    echo: Off = None
    logprobs: Annotated[Any, AfterValidator(_is_false)] = None
    suffix: Off = None


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]
    name: str | None = None
    # What a client's own message has when it was an answer.
    annotations: Off = None
    audio: Off = None
    function_call: Off = None
    refusal: Off = None
    tool_calls: Off = None


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Off = None
    top_logprobs: Off = None
    response_format: Off = None
    tools: Off = None
    tool_choice: Off = None
    parallel_tool_calls: Any = None  # of tools, which there are none of


class EncodingRequest(_Request):
    """`POST /v1/prompt_embeddings`."""

    prompt: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dtype: Literal["float32", "float16"] = "float32"


Request = TypeVar("Request", bound=_Request)


def parse(kind: type[Request], body: bytes) -> Request:
    """
    A request out of its JSON.

    Raises:
        RequestError: with status 400, if it is not JSON, or an argument is missing, unknown, wrong or not served.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "is no argument that is known here"
    if not where:
        raise RequestError(400, f"The request is not the JSON of an object: {message}.")
    raise RequestError(400, f"`{where}`: {message}.", param=where)
