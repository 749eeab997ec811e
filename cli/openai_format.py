"""OpenAI's formats: what a client may send, what of it this server refuses and why, and how answers
look.

Everything here is about formats; `fair_turns.py` decides when a text is written, `serve.py` is the
web application.
"""

import re
import secrets
import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Literal

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationInfo, field_validator
from transformers import PreTrainedTokenizerBase

from tokcom.cli.fair_turns import Job, RequestError, Sampling
from tokcom.cli.loading import num_fillings
from tokcom.cli.logprobs import chat_logprobs, completion_logprobs
from tokcom.cli.server_settings import ServerSettings
from tokcom.pipeline_tokcom import GAP, TokComPipeline
from tokcom.processing_tokcom import text_ids

GREEDY = 0.01  # what a temperature of 0 means: probabilities of all but the likeliest token vanish
MAX_STOPS = 4  # as many as OpenAI takes
MAX_STOP_LENGTH = 256  # characters: so many are held back while a text is streamed
MAX_LOGPROBS = 20  # of each token, as at OpenAI
CHAT_TOKENS = 256  # of a reply, unless the client says how many
Count = Annotated[int, Field(ge=1)]


# ---- requests ----


class TextRequest(BaseModel):
    """What both interfaces share; `num_inference_steps` and `guidance_scale` are TokCom's own."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    max_tokens: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Count | None = 1
    stream: bool | None = False
    stream_options: dict | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    user: str | None = None
    presence_penalty: Literal[0] | None = None  # fields that clients send without meaning them
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None
    num_inference_steps: Count | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=20)] | None = None

    @field_validator("n", "stream", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: object, info: ValidationInfo) -> object:
        return cls.model_fields[info.field_name].default if value is None else value

    @property
    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    @property
    def includes_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class CompletionRequest(TextRequest):
    """A request to `/v1/completions`."""

    prompt: str | list[StrictInt] | list[str] | list[list[StrictInt]]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    suffix: str | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Literal[1] | None = None

    @field_validator("max_tokens", "echo", mode="before")
    @classmethod
    def _null_is_its_default(cls, value: object, info: ValidationInfo) -> object:
        return cls.model_fields[info.field_name].default if value is None else value

    @property
    def tokens(self) -> int:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    """A part of a message; only texts are understood."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TextFormat(BaseModel):
    type: Literal["text"]


class ChatRequest(TextRequest):
    """A request to `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: TextFormat | None = None

    @property
    def tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


FORMS = {
    "prompt": "must be a text, a list of texts, a list of token ids, or a list of such lists.",
    "messages": "must be a list of at least one {'role': 'system', 'user' or 'assistant', 'content': a text}.",
    "stop": "must be a text or a list of texts.",
    "response_format": "can only be {'type': 'text'}.",
}
BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}


def explain_invalid(errors: list[dict]) -> RequestError:
    """The first error of pydantic's list as a sentence."""
    first = errors[0]
    error_type = first["type"]
    if error_type == "json_invalid":
        return RequestError(
            400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}."
        )
    # pydantic names the way to a field, of which clients know all but "body"
    place = [str(part) for part in first["loc"] if part != "body"]
    if not place:
        return RequestError(
            400, "the body must be a JSON object, sent with Content-Type: application/json."
        )
    name = place[0]
    value = repr(first.get("input"))
    # a message is for people, and the value may be a whole text
    value = value if len(value) <= 40 else value[:40] + "..."
    if error_type == "missing" and len(place) == 1:
        message = f"`{name}` is missing."
    elif error_type == "extra_forbidden":
        message = f"`{'.'.join(place)}` is not supported by this server; leave it out."
    elif name in FORMS:
        message = f"`{name}` {FORMS[name]}"
    elif error_type in BOUNDS:
        key, words = BOUNDS[error_type]
        message = f"`{name}` ({value}) must be {words} {first['ctx'][key]}."
    elif error_type in ("literal_error", "too_long"):
        message = f"`{name}` ({value}) is not supported by this server; leave it out."
    else:
        message = f"`{name}` ({value}) is not valid: {first['msg'].lower()}."
    return RequestError(400, message, param=name)


# ---- from a request to jobs ----


@dataclass
class Prompt:
    """What one text begins with, as `text` and as `ids`; `drops_space`: its text ends with the
    space of the next word."""

    text: str
    ids: list[int]
    drops_space: bool = False


def _bad(param: str, message: str, code: str | None = None) -> RequestError:
    return RequestError(400, message, code=code, param=param)


def dialogue_text(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[str, bool]:
    """A dialogue as one text, and whether special tokens are meant by what spells them: of a chat
    template they are.

    Without a template the turns are lines.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "\n".join(message.text for message in messages), False
    turns = [{"role": message.role, "content": message.text} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # a template may refuse roles, or their order
        raise _bad("messages", f"`messages` do not fit the model's template: {error}.") from error
    return text, True


def _check_texts(texts: dict[str, list[str]], settings: ServerSettings) -> None:
    """Refuse texts that are too long to be worth tokenising, or that are no Unicode."""
    for param, values in texts.items():
        # characters are counted first: tokenizing a very long text takes longer than refusing it
        count = sum(map(len, values))
        if count > settings.max_characters:
            limit = settings.max_characters
            raise _bad(
                param,
                f"`{param}` has {count} characters, more than this server's {limit}; shorten it.",
            )
        for text in values:
            try:
                # JSON may hold half a surrogate pair, on which a tokenizer fails
                text.encode()
            except UnicodeEncodeError as error:
                raise _bad(param, f"`{param}`: a text is not valid Unicode ({error}).") from error


def _read_prompts(
    request: CompletionRequest, tokenizer: PreTrainedTokenizerBase, real_ids: int
) -> list[Prompt]:
    """The prompts of a completion; `real_ids` is the number of ids that stand for text."""
    given = request.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise _bad("prompt", "`prompt` must hold at least one text.")
    prompts = []
    for item in given:
        if isinstance(item, str):
            if not item.strip() and not request.suffix:
                raise _bad("prompt", "`prompt` must hold at least one text, and none may be empty.")
            # a space at the end would be a token of its own; `drops_space` takes it from the answer
            ids = text_ids(tokenizer, item.rstrip(" "))
            prompts.append(Prompt(item, ids, drops_space=item.endswith(" ")))
            continue
        if not item:
            raise _bad("prompt", "`prompt` must hold at least one token id in each list.")
        wrong = [i for i in item if not 0 <= i < real_ids]
        if wrong:
            raise _bad(
                "prompt",
                f"`prompt`: {wrong[0]} is no token id of this model; they are 0 to {real_ids - 1}.",
            )
        prompts.append(Prompt(tokenizer.decode(item, skip_special_tokens=False), item))
    return prompts


def _read_dialogue(request: ChatRequest, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    text, special = dialogue_text(tokenizer, request.messages)
    if not text.strip():
        raise _bad("messages", "`messages` hold no text; at least one `content` must not be empty.")
    return [
        Prompt(text, text_ids(tokenizer, text.rstrip(" "), special), drops_space=text.endswith(" "))
    ]


def _check_limits(
    request: TextRequest,
    texts: int,
    fillings: int,
    tokens: int,
    default_steps: int,
    settings: ServerSettings,
) -> None:
    """Refuse more than the server's limits; each of the texts is the best of some `fillings`."""
    steps = request.num_inference_steps or default_steps
    limits = [
        ("max_tokens", f"`max_tokens` ({tokens}) is", tokens, settings.max_tokens),
        ("num_inference_steps", f"`num_inference_steps` ({steps}) is", steps, settings.max_steps),
        ("n", f"{texts} texts of one request are", texts, settings.max_choices),
    ]
    for param, what, value, limit in limits:
        if value > limit:
            raise _bad(param, f"{what} more than this server's limit of {limit}; ask for less.")
    # each within its own limit may still be too much together
    drawn = texts * fillings
    work = tokens * steps * drawn
    if work > settings.max_work:
        raise _bad(
            "max_tokens",
            f"{tokens} tokens x {steps} steps x {drawn} texts are {work}, more than this server's "
            f"limit of {settings.max_work}; ask for fewer of one of them.",
        )


def _check_options(request: TextRequest, pipe: TokComPipeline, settings: ServerSettings) -> None:
    """Refuse what this server or this model cannot do, whatever the prompt."""
    if request.model not in (None, settings.model_name):
        message = (
            f"the model {request.model!r} does not exist; this server has {settings.model_name!r}."
        )
        raise RequestError(404, message, code="model_not_found", param="model")
    if len(request.stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in request.stops):
        raise _bad(
            "stop", f"`stop` takes {MAX_STOPS} sequences of at most {MAX_STOP_LENGTH} characters."
        )
    has_probabilities = pipe.model.config.prediction_type == "tokens"
    for name in ("temperature", "top_p"):
        # 1 changes nothing, and clients send it by default
        if getattr(request, name) not in (None, 1) and not has_probabilities:
            raise _bad(
                name, f"`{name}`: this model has no token probabilities; leave it out or give 1."
            )
    if request.num_logprobs is not None:
        if request.stream:
            raise _bad(
                "logprobs",
                "`logprobs` come when a text is complete; leave out `stream` or `logprobs`.",
            )
        if not pipe.model.config.is_causal_lm:
            raise _bad(
                "logprobs",
                "`logprobs`: this model does not decide its tokens one after the other, so it has "
                "no exact probabilities of them; leave `logprobs` out, or serve a model with "
                "`token_stagger=1`, `block_size=1` and `start_latents=True`.",
            )
    elif getattr(request, "top_logprobs", None) is not None:
        raise _bad("top_logprobs", "`top_logprobs` needs `logprobs`: true.")


def _check_infill(request: CompletionRequest) -> None:
    """Refuse what does not go together with `suffix`."""
    if isinstance(request.prompt, list):
        raise _bad("suffix", "`suffix` fills the gap behind one `prompt`, which must be a text.")
    # exactly the one gap: an underscore beside it would make it longer
    if re.findall("_{3,}", request.prompt + GAP + request.suffix) != [GAP]:
        raise _bad(
            "suffix",
            "with `suffix`, no text may hold three underscores, which stand for a gap, or one "
            "beside the gap.",
        )
    if not request.prompt.strip() and not request.suffix.strip():
        raise _bad(
            "suffix", "`prompt` and `suffix` are both empty; give text on one side of the gap."
        )
    if request.num_logprobs is not None or request.echo or request.max_tokens < 1:
        raise _bad(
            "suffix",
            "`suffix` does not go with `logprobs`, `echo` or `max_tokens` 0; leave them out.",
        )


def _check_window(pipe: TokComPipeline, param: str, size: int, more: int) -> None:
    """Refuse a prompt of `size` tokens that, with `more` new ones, is longer than the model can see
    at once."""
    multiple = pipe.model.config.codec_config.length_multiple
    # rounded up to whole chunks, as the model sees it
    if -(-(size + more) // multiple) * multiple <= pipe.max_length:
        return
    beside = f" and asks for {more} more" if more else ""
    message = (
        f"`{param}` has {size} tokens{beside}, more than the model's {pipe.max_length}; shorten it."
    )
    raise _bad(param, message, code="context_length_exceeded")


def _texts_of(request: CompletionRequest | ChatRequest) -> dict[str, list[str]]:
    """The texts of a request by the field that holds them."""
    if isinstance(request, ChatRequest):
        return {"messages": [message.text for message in request.messages]}
    given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    prompts = [text for text in given if isinstance(text, str)]
    return {"prompt": prompts, "suffix": [request.suffix or ""]}


def _tokens_of(request: CompletionRequest | ChatRequest, settings: ServerSettings) -> int:
    """How many tokens to write at most; raises `RequestError` for none, unless they are scored."""
    tokens = request.tokens
    if tokens is None:
        # OpenAI lets a chat write without a limit, which a small server cannot
        return min(CHAT_TOKENS, settings.max_tokens)
    if tokens == 0 and (request.num_logprobs is None or not request.echo):
        raise _bad(
            "max_tokens",
            "`max_tokens` (0) must be at least 1; only `echo` with `logprobs` takes 0.",
        )
    return tokens


def read_request(
    request: CompletionRequest | ChatRequest,
    pipe: TokComPipeline,
    tokenizer: PreTrainedTokenizerBase,
    settings: ServerSettings,
    client: str,
    loop,
) -> tuple[list[Prompt], list[Job]]:
    """The prompts of a request, and a job for each text to write: `n` for every prompt. Raises
    `RequestError`."""
    _check_options(request, pipe, settings)
    infills = isinstance(request, CompletionRequest) and bool(request.suffix)
    _check_texts({**_texts_of(request), "stop": request.stops}, settings)
    if infills:
        _check_infill(request)

    if isinstance(request, ChatRequest):
        prompts = _read_dialogue(request, tokenizer)
        param = "messages"
    else:
        prompts = _read_prompts(request, tokenizer, pipe.model.config.text_vocab_size - 1)
        param = "prompt"
    tokens = _tokens_of(request, settings)
    texts = len(prompts) * request.n
    fillings = num_fillings(pipe) if infills else 1
    default_steps = pipe.model.config.num_inference_steps
    _check_limits(request, texts, fillings, tokens, default_steps, settings)
    # both sides of the gap count as the prompt
    if infills:
        prompts[0].ids = prompts[0].ids + text_ids(tokenizer, request.suffix)
    bidirectional = pipe.model.config.transformer_config.block_size is None
    # a window slides over other texts
    is_whole = request.num_logprobs is not None or infills or bidirectional
    must_fit = tokens if is_whole else 0
    for prompt in prompts:
        _check_window(pipe, param, len(prompt.ids), must_fit)

    # 0 would divide by 0; a very small one always draws the likeliest token
    temperature = None if request.temperature is None else max(request.temperature, GREEDY)
    sampling = Sampling(
        request.num_inference_steps, request.guidance_scale, temperature, request.top_p
    )
    seed = secrets.randbits(32) if request.seed is None else request.seed
    deadline = time.monotonic() + settings.timeout
    jobs = []
    for i in range(len(prompts) * request.n):
        prompt = prompts[i // request.n]
        # seeds in a row for the texts of a request; a signed 64-bit number for torch
        job = Job(prompt.ids, tokens, sampling, (seed + i) % 2**63, loop, client, deadline)
        job.num_logprobs = request.num_logprobs
        if bidirectional:  # it would see the padding of others
            job.company = len(prompt.ids), tokens
        if infills:
            job.infill = prompt.text, request.suffix
        jobs.append(job)
    return prompts, jobs


# ---- answers ----


class CompletionFormat:
    """How `/v1/completions` answers."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"
    logprobs = staticmethod(completion_logprobs)

    @staticmethod
    def whole(text: str) -> dict:
        return {"text": text}

    # a completion's stream has the same form as its whole answer
    piece = whole

    @staticmethod
    def first(echoed: str) -> dict | None:
        """What a stream begins with, before anything is written."""
        return {"text": echoed} if echoed else None


class ChatFormat:
    """How `/v1/chat/completions` answers."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"
    logprobs = staticmethod(chat_logprobs)

    @staticmethod
    def whole(text: str) -> dict:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    @staticmethod
    def piece(text: str) -> dict:
        # the last event only says why the text has ended
        return {"delta": {"content": text} if text else {}}

    @staticmethod
    def first(echoed: str) -> dict:
        return {"delta": {"role": "assistant", "content": ""}}


def answer_head(form: type[CompletionFormat] | type[ChatFormat], stream: bool, model: str) -> dict:
    """The fields that all parts of one answer share."""
    kind = form.chunk_kind if stream else form.kind
    return {
        "id": f"{form.prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


__all__ = [
    "ChatFormat",
    "ChatRequest",
    "CompletionFormat",
    "CompletionRequest",
    "Prompt",
    "ServerSettings",
    "answer_head",
    "explain_invalid",
    "read_request",
]
