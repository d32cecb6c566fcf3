"""How much vLLM may write for one request on its event loop.

There it makes all answers of a request at once, turns each log-probability into text, and looks
for each stop string in each answer after each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_kvmarket.api.errors import ApiError, invalid

# Prompts times samples of one request.
MOST_ANSWERS = 128
# That come in one go: of a prompt, of a step, or of all answers of a request without a stream.
MOST_LOGPROBS = 2_000
# Once for each answer.
MOST_STOPS = 10_000
MOST_STOP_CHARACTERS = 1 << 18
# Tokens and characters of prompts that come back, once for each answer.
MOST_RETURNED = 100_000
# Where a completion says nothing; a chat may fill the context.
_DEFAULT_MAX_TOKENS = 16
# Fields that may hold several prompts, conversations, texts to score, or questions.
_PROMPT_LISTS = ("prompt", "messages", "items")
_LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


def samples_of(body: Mapping[str, Any]) -> int:
    """How many answers to each prompt a request asks for. Raises ApiError.

    Also if there are too many of them: vLLM makes them all requests in one go, on the event loop.
    """
    sampling = body.get("sampling_params")
    count = (sampling if isinstance(sampling, dict) else body).get("n")
    if count is None:
        count = 1
    if type(count) is not int or count < 1:
        raise invalid("n: expected a whole number above 0", "n")
    if count * _prompt_count(body) > MOST_ANSWERS:
        message = f"the request asks for more than {MOST_ANSWERS} answers; send several requests"
        raise ApiError(413, "too_many_answers", message, param="n")
    return count


def check_answers(body: Mapping[str, Any], context_tokens: int) -> None:
    """Raises ApiError if what a request wants with its answers takes vLLM long to write."""
    sampling = body.get("sampling_params")
    asked = {**body, **sampling} if isinstance(sampling, dict) else body
    answers = samples_of(body) * _prompt_count(body)
    # The last event of a response's stream has all of it.
    in_steps = asked.get("stream") and "input" not in asked
    length = 1 if in_steps else _answer_tokens(asked, context_tokens)
    prompt = _prompt_size(body, context_tokens)
    of_answers, of_prompts = _logprobs(asked)
    if of_answers * answers * length + of_prompts * prompt > MOST_LOGPROBS:
        raise _too_large(
            f"at most {MOST_LOGPROBS} log-probabilities are answered at once; ask for fewer, for "
            "fewer tokens (max_tokens), or for a stream",
            "logprobs",
        )
    stops = asked.get("stop") or asked.get("stop_sequences")
    texts = [each for each in (stops if isinstance(stops, list) else [stops]) if type(each) is str]
    if len(texts) * answers > MOST_STOPS or sum(map(len, texts)) * answers > MOST_STOP_CHARACTERS:
        raise _too_large("there are too many stop strings, or too long ones", "stop")
    returned = prompt if asked.get("echo") or asked.get("return_token_ids") else 0
    returned += length if asked.get("return_token_ids") else 0
    if returned * answers > MOST_RETURNED:
        raise _too_large(
            f"at most {MOST_RETURNED} tokens of prompts and answers are sent back", "echo"
        )


def _prompt_count(body: Mapping[str, Any]) -> int:
    questions = body.get("questions")
    count = len(questions) if isinstance(questions, dict) else 1
    for field in _PROMPT_LISTS:
        given = body.get(field)
        if isinstance(given, list) and given and not isinstance(given[0], int | dict):
            count = max(count, len(given))
    return count


def _prompt_size(body: Mapping[str, Any], context_tokens: int) -> int:
    """The tokens of the longest prompt, or its characters, which are more."""
    given = body.get("prompt", body.get("token_ids"))
    prompts = given if isinstance(given, list) and given else [given]
    if isinstance(prompts[0], int):
        prompts = [prompts]
    longest = max(len(each) if isinstance(each, list | str) else context_tokens for each in prompts)
    return min(longest, context_tokens)


def _answer_tokens(asked: Mapping[str, Any], context_tokens: int) -> int:
    """The most tokens that each answer may have."""
    given = [asked[name] for name in _LENGTHS if type(asked.get(name)) is int]
    if given:
        return min(max(given[0], 1), context_tokens)
    is_chat = "messages" in asked or "input" in asked
    return context_tokens if is_chat else _DEFAULT_MAX_TOKENS


def _logprobs(asked: Mapping[str, Any]) -> tuple[int, int]:
    """How many log-probabilities come with each token of an answer, and of a prompt."""
    top, given, listed = (
        asked.get(name) for name in ("top_logprobs", "logprobs", "logprob_token_ids")
    )
    if isinstance(asked.get("include"), list):
        given = "message.output_text.logprobs" in asked["include"]
    wanted = (top or 0) if given is True else given
    of_answers = max(_columns(wanted), len(listed) + 1 if isinstance(listed, list) else 0)
    of_prompts = asked.get("prompt_logprobs")
    if of_prompts is None and asked.get("echo"):
        of_prompts = top or 0 if "messages" in asked else given
    return of_answers, _columns(of_prompts)


def _columns(wanted: Any) -> int:
    """The token itself, and so many of the likeliest."""
    if type(wanted) is not int:
        return 2 if wanted is True else 0
    return wanted + 1 if wanted >= 0 else MOST_LOGPROBS + 1  # -1: the whole vocabulary


def _too_large(message: str, param: str) -> ApiError:
    return ApiError(413, "answer_too_large", message, param=param)
