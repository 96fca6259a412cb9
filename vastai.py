#!/usr/bin/env python3
"""Vast.ai in one file: the complete command line and the complete SDK, standard library only.

    python -m vastai search offers 'gpu_name=RTX_4090 num_gpus=1' -o dph     # the command line
    from vastai import VastAI; VastAI().search_offers("gpu_name=RTX_4090")   # the SDK

Both faces come from one table, COMMANDS.  A row holds a command's names, its request, whether it
may be repeated, what it does to the world and what becomes of the answer.  The parser, the method
of `VastAI`, the help, the completion, the types and the display are all read from it, so a plain
command is one row.

Data goes down this file once:

    words of a line, or arguments of a method
    -> parameters     parse_line() or bind_params(), then check_params()
    -> Request        build_request(): pure, from the row and the parameters alone
    -> Answer         send_with_retries(): retry_pause() decides what may be sent again
    -> result         extract_result(): the part of the answer that the row promises
    -> returned by the method, or printed by present() in the shape that was asked for

If one request is not enough, the row names a function, which calls its own row (call.send) and
others (call.do).  A command's function returns what the SDK returns; it does not format it.

The sections, in order: errors | text and redaction | kinds | queries, environments, dates | screen
| rows | columns | shared options | THE TABLE | from arguments to a request | transport | this
computer | commands of several steps | waiting and cleaning up | renting | remote commands | costs |
watching | diagnostics and benchmarks | serverless | VastAI | the official SDK's names | results and
shapes | invoices as PDF | command line | shells | main.
"""

from __future__ import annotations

# Only what the interpreter has loaded anyway is imported here, all else by the functions that need
# it.  That saves the others, in ms on a machine where Python starts in 9: importlib.metadata 35,
# urllib.request 34, http.client 27, ssl 15, inspect 13, subprocess 11, tempfile 10, tarfile 10,
# statistics 9, urllib.parse 8, argparse 7, json 7, socket 7, glob 6, difflib 6, shlex 5, re 5,
# threading 3, getpass 3, hashlib 3, datetime 2, random 1.
import gc
import io
import os
import sys
import time
from _thread import allocate_lock

# As typing's own, without importing typing, which would double the start-up.
TYPE_CHECKING: bool = False
# fmt: off
if TYPE_CHECKING:
    import ssl
    from dataclasses import dataclass as record
    from typing import Any, Callable, Dict, Iterable, Iterator, List, Literal, NoReturn, Optional
    from typing import Sequence, TextIO, TypedDict

    Row = Dict[str, Any]  # one JSON object of the service
    Convert = Callable[[Any], Any]
    Tell = Callable[[str], None]
    Pair = tuple[str, str]
    Pairs = List[Pair]  # words, and what they mean
    Keyed = Dict[Any, Row]  # rows by what makes them the same
    Changes = List[tuple[Any, str, Row]]  # the key, the event and the row of each
    Tables = Iterator[tuple[str, List[Row], Any]]  # heading, rows and columns of each
    Spec = tuple[str, int]  # a GPU, and how many of it
    Spans = Iterator[tuple[int, int]]  # (start, end) of parts of a text
# fmt: on
else:

    def record(cls):
        """A class of attributes with defaults; to import dataclasses for that would take 13 ms."""
        names = tuple(cls.__annotations__)
        known = set(cls.__annotations__)
        defaults = {name: getattr(cls, name) for name in names if hasattr(cls, name)}
        wrap_up = getattr(cls, "__post_init__", None)

        def __init__(self, *args, **given):
            members = {**defaults, **dict(zip(names, args)), **given}
            if len(args) > len(names) or members.keys() != known:
                raise TypeError(f"expected {cls.__name__}({', '.join(names)})")
            self.__dict__ = members
            if wrap_up:
                wrap_up(self)

        def __repr__(self):
            members = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
            return f"{cls.__name__}({members})"

        def __eq__(self, other):
            return vars(self) == vars(other) if type(other) is cls else NotImplemented

        cls.__init__ = __init__
        cls.__repr__ = __repr__
        cls.__eq__ = __eq__
        cls.__hash__ = None
        cls.__dataclass_fields__ = DataclassFields()
        return cls

    class DataclassFields:
        """What asdict() and fields() of dataclasses look for in a class, made when they do."""

        def __get__(self, instance, cls):
            from dataclasses import dataclass

            copy = type(cls.__name__, (), dict(vars(cls)))
            return dataclass(copy).__dataclass_fields__

# Looking for garbage among what this file makes, which stays, would take a tenth of its start.
collecting = gc.isenabled()
gc.disable()

__version__ = "1.0.0"
# fmt: off
__all__ = [
    "AuthError", "CoroutineServerless", "Endpoint", "NetworkError", "NotFoundError",
    "OutcomeUnknownError", "PartialError", "RateLimitError", "RequestStatus", "Serverless",
    "Session", "UsageError", "VastAI", "VastAIError", "WaitTimeoutError", "main", "program"]
# fmt: on

SERVER = "https://console.vast.ai"
# Logs and workers of endpoints; with another --url they are on that one.
SERVERLESS = "https://run.vast.ai"
LONGEST_PAUSE = 60.0  # seconds: a service that asks for more is not waited for
FOREVER = float("inf")  # seconds
LONGEST_TIMEOUT = 1e6  # seconds that a socket can wait, on every system
LARGEST_ANSWER = 1 << 26  # bytes, unpacked: more than any answer, and a small machine can hold it
LAST_MOMENT = 64_000_000_000  # unix seconds, about the year 4000: a later date is a mistake
LONGEST_TEXT = 100_000  # characters in one argument
LONGEST_API_KEY = 8_000  # characters; no header holds more
LONGEST_FILE = 10_000_000  # characters in a file that is sent
BULK = 64  # ids that the service takes in one request
URL_SAFE = "%/:=&?~#+!$,;'@()*[]"  # what stays as it is in an address that the service gives
CLEAR = "\r\033[K"  # erases the line of progress on a terminal


# ------------------------------------------------------------------------------------------- errors


class VastAIError(Exception):
    """Any failure of a command.

    `status` is the HTTP status or 0, `msg` the service's own words, `body` its parsed answer or
    text, `command` the command's name, `response` the answer (status_code, reason, text, headers,
    json(), ok) or None.  `found` is the id of an instance that was made although the rental failed,
    or that has appeared with its label since; a list if there are several.
    """

    exit_status = 1  # EXIT_STATUSES explains it, exit_statuses() says which rows can end with it
    found: Any = None

    def __init__(
        self,
        msg: str,
        *,
        command: str = "",
        response: Answer | None = None,
        hint: str = "",
        **details: Any,
    ) -> None:
        self.msg = msg
        self.command = command
        self.hint = hint
        self.details = details
        self.status = response.status_code if response else 0
        vars(self).update(details)
        super().__init__(msg)
        # requests' own exceptions have just put None there
        self.response = response.redacted() if response else None

    @property
    def body(self) -> Any:
        """The service's answer, parsed if it is JSON, else its text; None if there was none."""
        try:
            return self.response and self.response.json()
        except ValueError:
            return self.response and self.response.text

    def __str__(self) -> str:
        text = self.msg
        if self.status >= 300 and f"HTTP {self.status} " not in text:
            text = f"HTTP {self.status}: {text}"
        if self.command:
            text = f"{self.command}: {text}"
        if self.hint.startswith("see "):  # where such things are listed: the same sentence
            return f"{text.rstrip('.')}; {self.hint}"
        return f"{text}\n  {self.hint}" if self.hint else text

    @property
    def family(self) -> type[VastAIError]:
        """Its class in this file, from which make_error() may have derived the actual one."""
        return next(c for c in type(self).__mro__ if c.__module__ == __name__)

    def redact(self, secrets: Sequence[str]) -> None:
        """Masks `secrets` in what it says, should it quote words of the service that hold one."""
        self.msg = redact_sentence(self.msg, secrets)
        self.hint = redact_sentence(self.hint, secrets)
        self.args = (self.msg,)
        if "results" in self.details:
            self.results = self.details["results"] = redact_value(self.details["results"], secrets)

    def __reduce__(self) -> Any:
        import functools

        own: Row = {"command": self.command, "response": self.response, "hint": self.hint}
        return functools.partial(make_error, self.family, self.msg, **own, **self.details), ()


class UsageError(VastAIError, ValueError):
    """Wrong use: a bad argument, value or file, or a question not answered with yes.  Nothing was
    sent.
    """

    exit_status = 2


class AuthError(VastAIError):
    """Not allowed: HTTP 401 or 403, no key, or two-factor authentication needed."""

    exit_status = 3


class NotFoundError(VastAIError, LookupError):
    """No such thing: HTTP 404 or 410."""

    exit_status = 4


class RateLimitError(VastAIError):
    """HTTP 429 after the last attempt, or a spent daily quota; `retry_after` is seconds or None."""

    exit_status = 5
    retry_after: float | None = None


class NetworkError(VastAIError, OSError):
    """The service was not reached, or a request that is safe to repeat got no answer."""

    exit_status = 6


class OutcomeUnknownError(VastAIError):
    """A request that must not be repeated was sent and no answer came: it may or may not have been
    carried out.  See `found`.
    """

    exit_status = 7


class PartialError(VastAIError):
    """Some of several items failed; `results` has an entry for each."""

    exit_status = 8
    results: list[Row] = []


class WaitTimeoutError(VastAIError, TimeoutError):
    """A wait ran out of time."""

    exit_status = 9


class ProgramError(VastAIError):
    """Another program that a command runs failed or is missing; `exit_status` is its own."""


def make_error(
    family: type[VastAIError],
    msg: str,
    *,
    kind: type[BaseException] | None = None,
    timed_out: bool | None = None,
    **details: Any,
) -> VastAIError:
    """An error of `family`, also one of `requests` if the calling program has imported that
    library.  With a `kind` it is also one of that, and has its name.
    """
    kinds = [kind, requests_class(details.get("response"), timed_out)]
    if kind is TimeoutError and "asyncio" in sys.modules:
        kinds.insert(1, sys.modules["asyncio"].TimeoutError)  # another class before 3.11
    if not any(kinds):
        return family(msg, **details)
    bases = dict.fromkeys(other for other in kinds if other and not issubclass(family, other))
    members = {"__module__": "vastai.serverless" if kind else "vastai.requests", "request": None}
    combined: Any = type((kind or family).__name__, (family, *bases), members)
    error: VastAIError = combined(msg, **details, kind=kind, timed_out=timed_out)
    return error


def requests_class(response: Any, timed_out: bool | None) -> Any:
    """The error of the library `requests` for a bad answer, or for none; None if the calling
    program has not imported it.

    Code written for the official SDK catches requests.HTTPError, ConnectionError and Timeout; we
    never import it.
    """
    name = ""
    if response:
        name = "HTTPError"
    elif timed_out is not None:
        name = "Timeout" if timed_out else "ConnectionError"
    other = getattr(sys.modules.get("requests"), name, None)
    return other if isinstance(other, type) and issubclass(other, Exception) else None


def what_failed(problem: NoAnswer) -> str:
    """Which server could not be reached, or sent no answer, and why."""
    what = "cannot reach" if isinstance(problem, Unsent) else "no answer from"
    scheme, _, rest = problem.url.partition("://")
    return f"{what} {scheme}://{rest.partition('/')[0].rpartition('@')[2]}: {problem}"


def no_answer_error(row: Command, request: Request, problem: NoAnswer) -> VastAIError:
    """The error of a request that brought no answer, in whatever way."""
    timed_out = _timed_out(problem.__cause__)
    if isinstance(problem, Unanswered) and not request.safe:
        error = outcome_unknown_error(row, str(problem), timed_out=timed_out)
    else:
        hint = "Check the network, and the address in --url or VAST_URL if you gave one."
        if getattr(problem.__cause__, "verify_message", ""):
            hint = "If your network inspects TLS, set SSL_CERT_FILE to the file of its certificate."
        error = make_error(NetworkError, what_failed(problem), timed_out=timed_out, hint=hint)
    error.__cause__ = problem
    return error


def outcome_unknown_error(
    row: Command, reason: str, answer: Answer | None = None, **details: Any
) -> VastAIError:
    because = f" ({reason})" if reason else ""
    return make_error(
        OutcomeUnknownError,
        f"the request was sent, but its outcome is unknown{because}",
        response=answer,
        hint=f"It may have succeeded. {look_first(row)}",
        **details,
    )


def look_first(row: Command) -> str:
    """What to do before a command of unclear outcome is run again."""
    return f"Check with `vastai {row.look or 'show audit-logs'}` before you try again."


def not_found_error(what: str, id: Any, look: str) -> NotFoundError:
    """The one form of "not found"; `look` is the command that lists such things."""
    see = f"; see `vastai {look}`" if look else ""
    return NotFoundError(f"no {what} {printable(str(id), 100)}{see}")


def missing_argument_error(row: Command, arg: Arg, cli: bool) -> UsageError:
    hint = f"{usage_of(row)}\n  `vastai {row.name} --help` explains it." if cli else ""
    name = arg.label(cli) if arg.option or not cli else placeholder(arg)
    says_more = not arg.help.startswith("the ") or "," in arg.help
    meaning = f" ({arg.help})" if says_more else ""
    return UsageError(f"{name} is required{meaning}", hint=hint)


def unusable_answer_error(row: Command, answer: Answer, what: str) -> VastAIError:
    """The error of an answer that cannot be what the service meant."""
    text = redact_text(answer.text[:4000], answer.secrets).strip()
    return make_error(
        VastAIError,
        f"the service sent {what}" + (f": {truncate(text, 100)!r}" if text not in what else ""),
        response=answer,
        hint="" if row.safe else look_first(row),
    )


def unusable_because(answer: Answer, problem: ValueError) -> str:
    """What is wrong with an answer that Answer.json() refuses."""
    if answer.fault:
        return answer.fault
    if type(problem) is ValueError:  # JSON, but with something in it that nothing can use
        return f"an unusable answer ({problem})"
    return "an answer that is not JSON" if answer.content.strip() else "an empty answer"


def refusal_error(body: Row, answer: Answer) -> VastAIError:
    """The error of an answer that says `"success": false`."""
    words = one_line(redact_text(reason_of(body), answer.secrets))
    words = words or "the service refused without giving a reason"
    return make_error(VastAIError, words, response=answer, hint=loss_hint(answer))


def one_line(text: str) -> str:
    """Words of the service, safe to show in one line."""
    return " ".join(printable(text, 500).split())


def loss_hint(answer: Answer) -> str:
    """What a refusal may mean after an attempt whose answer was lost; "" if none was."""
    if not answer.after_loss:
        return ""
    return "An earlier attempt got no answer; it may have succeeded."


def no_key_error(profile: str) -> AuthError:
    """The error of a command that needs an API key if none is found: says where it was looked for,
    and why what is there is no key.
    """
    option = f" --profile {profile}" if profile else ""
    for path in key_files(profile=profile):
        problem = read_key_file(path)[1]
        if problem and problem != EMPTY_KEY_FILE:
            hint = f"Make it readable, or replace it with `vastai set api-key{option}`."
            return AuthError(f"the API key file {path} {problem}", hint=hint)
    if profile:
        path = profile_file("vast_api_key", profile)
        problem = read_key_file(path)[1] or "is not there"
        hint = f"Save one with `vastai set api-key{option}`."
        return AuthError(
            f"Profile {profile} has no API key: {path or 'its file'} {problem}", hint=hint
        )
    places = ["--api-key (api_key=)", "VAST_API_KEY"]
    for path in key_files():
        problem = read_key_file(path)[1]
        place = "~/.vast_api_key" if path == old_key_file() else path
        places.append(f"{place} ({problem})" if problem else place)
    if not own_file("config", ""):
        places.append(f"the configuration folder ({folder_problem()})")
    hint = "Create one at https://cloud.vast.ai/manage-keys/ and save it with `vastai set api-key`."
    if os.getenv("VASTAI_API_KEY", "").strip():
        hint = "VASTAI_API_KEY is set, but the variable is called VAST_API_KEY: rename it."
    return AuthError(
        f"No API key found. Looked at {', '.join(places[:-1])} and {places[-1]}", hint=hint
    )


def relabel_error(error: VastAIError, what: str) -> VastAIError:
    """Relabels the error of a follow-up step, so that it is not mistaken for the answer to the
    command's own request.
    """
    refused = error.status == 200  # `"success": false` of another request
    details = {"response": None if refused else error.response, "hint": error.hint}
    return make_error(error.family, f"{what}: {error.msg}", **{**error.details, **details})


def partial(results: list[Row]) -> PartialError:
    """The error of several items of which some failed, or may have failed (`success` is None)."""
    failed = {str(item.get("id")): item for item in results if not item.get("success")}
    unknown = [id for id, item in failed.items() if item.get("success", False) is None]
    known = [id for id in failed if id not in unknown]
    words = []
    if known:
        words.append(f"{len(known)} of {len(results)} failed: {', '.join(known)}")
    if unknown:
        words.append(f"the outcome of {len(unknown)} is unknown: {', '.join(unknown)}")
    reasons = dict.fromkeys(item["msg"] for item in failed.values() if item.get("msg"))
    return PartialError("; ".join([*words, *list(reasons)[:3]]), results=results)


# ------------------------------------------------------------------------------- text and redaction
# Text of the service is never shown raw, and secrets never at all.


def printable(text: str, limit: int = 80) -> str:
    """`text` safe to show: control and format characters escaped, cut at `limit` characters (0: not
    at all).
    """
    if limit and len(text) > limit:
        text = text[: limit - 1] + "…"
    return text if text.isprintable() else text.translate(ESCAPES)


def without_value(word: str) -> str:
    """A word that nobody understood, safe to show: what follows =, : or a blank may be secret, and
    a long word with digits a key.
    """
    import re

    word = re.sub(r"[=:\s].*", "…", word, flags=re.S)
    plain = re.sub("[-_…]", "", word)
    is_key = word[:1] != "-" and len(word) > 15 and not plain.isalpha()
    return "…" if is_key else printable(word)


def printable_lines(text: str) -> str:
    """Text of several lines, each safe to show."""
    return "\n".join(printable(line, 0) for line in text.split("\n"))


class Escapes(dict):  # type: ignore[type-arg]
    """Escape table for str.translate, filled on demand."""

    def __missing__(self, code: int) -> str:
        from unicodedata import category

        char = chr(code)
        unsafe = not char.isprintable() and category(char) in ("Cc", "Cf", "Zl", "Zp", "Cs")
        self[code] = text = char.encode("unicode_escape").decode() if unsafe else char
        return text


ESCAPES = Escapes()


def short_repr(value: Any) -> str:
    """A value that cannot be used, in a few words; of what looks like an option the name alone."""
    import re

    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - its own repr() fails, or it is nested too deeply for one
        return f"this {type(value).__name__}"
    return printable(re.sub(r"""(['"]--[\w-]*)[=:\s].*""", r"\1…'", text))


def format_value(value: Any) -> str:
    """Any value as one line; null as `-`."""
    if value is None:
        return "-"
    if isinstance(value, (dict, list)):
        import json

        value = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return printable(str(value), 0)


def count_of(number: Any, noun: str) -> str:
    """A number of things: 1 offer, 2 offers."""
    return f"{number} {noun}" if str(number) == "1" else f"{number} {noun}s"


def truncate(text: str, width: int) -> str:
    """A text cut to `width` columns, with … at the end if it was longer."""
    if display_width(text) <= width:
        return text
    mark = encodable("…", sys.stdout)
    end = 0
    room = width - len(mark)
    for c in text:
        room -= display_width(c)
        if room < 0:
            break
        end += 1
    return text[:end] + mark


def display_width(text: str) -> int:
    """Columns that a text takes on a terminal: wide letters two, marks on other letters none."""
    if text.isascii() or len(text) > 10_000:  # wider than any terminal
        return len(text)
    from unicodedata import category, east_asian_width

    return sum(
        0 if category(c) in ("Mn", "Me") else 2 if east_asian_width(c) in "WF" else 1 for c in text
    )


def is_digits(text: str) -> bool:
    """Is it a text of ASCII digits alone?  Those of other scripts are digits for str.isdigit()."""
    return text.isascii() and text.isdigit()


def is_id(text: str) -> bool:
    """Can a text be the number of something?"""
    return is_digits(text) and len(text) < 20


def suggest(word: str, words: Iterable[str], least: float = 0.7) -> str:
    """'; did you mean X?' for a slightly misspelled word, or nothing; `least`: how much of it is
    right.
    """
    bare = {name.lstrip("-").lower(): name for name in words}
    if len(word) > 60:
        return ""
    import difflib

    close = difflib.get_close_matches(word.lstrip("-").lower(), bare, 1, least)
    return f"; did you mean {bare[close[0]]!r}?" if close else ""


def mentions(text: str, signs: str) -> bool:
    """Does a text hold one of some signs, small and with commas between them?"""
    low = text.lower()
    return any(sign in low for sign in signs.split(", "))


def failure_of(text: str, table: dict[str, str], otherwise: str = "") -> str:
    """The name of the first entry of a table one of whose signs is in a message."""
    return next((name for name, signs in table.items() if mentions(text, signs)), otherwise)


def parse_table(text: str) -> dict[str, str]:
    """A dict from a text with a line `name: what it stands for` for each."""
    return dict(line.split(": ", 1) for line in text.split("\n"))


def redact_text(text: str, secrets: Iterable[str]) -> str:
    """`text` without the caller's secrets, should the service echo one; nor as JSON writes them."""
    import json

    for secret in sorted(secrets, key=len, reverse=True):  # one may be a part of another
        forms = {json.dumps(secret, ensure_ascii=ascii)[1:-1] for ascii in (True, False)}
        for form in (*forms, secret):
            text = text.replace(form, "***")
    return text


def redact_sentence(text: str, secrets: Iterable[str]) -> str:
    """As redact_text(), for our own sentences with words of the service in them: secrets of less
    than eight characters stay, as they may be words of ours ("true", "main").
    """
    return redact_text(text, [secret for secret in secrets if len(secret) >= 8])


def redact_value(value: Any, secrets: Sequence[str]) -> Any:
    """A JSON value with the secrets masked in its texts and numbers."""
    if isinstance(value, dict):
        return {
            redact_sentence(name, secrets): redact_value(item, secrets)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [redact_value(item, secrets) for item in value]
    if not isinstance(value, (str, bool)) and str(value) in secrets:
        return "***"
    return redact_text(value, secrets) if isinstance(value, str) else value


def redact_body(request: Request) -> Any:
    """The body with *** for what is secret.  In docker options (`-p 80:80` in `env`) nothing is."""

    def hide(value: Any) -> Any:
        if not isinstance(value, dict):
            return "***"
        return {name: item if str(name)[:1] == "-" else "***" for name, item in value.items()}

    return request.body and {
        name: hide(value) if name in request.hidden and value is not None else value
        for name, value in request.body.items()
    }


def _texts(value: Any) -> list[str]:
    """The texts of a secret, one by one: shorter ones are found in any sentence and are not worth
    masking.
    """
    if isinstance(value, (dict, list)):
        items = value.values() if isinstance(value, dict) else value
        return [text for item in items for text in _texts(item)]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return []
    import re

    text = str(value)
    parts = re.findall(  # -u me -p PW; -e A=PW
        r"(?:(?<!\S)(?:-p|--password) ?|=)['\"]?(?![\d.:/-]+\b)([^\s'\"]+)", text
    )
    return [part for part in (text, *parts) if len(part) > 3]


# What a diagnostic text must not hold: hints that str.find() sees fast in a log of megabytes, each
# with a pattern that is tried there; what follows its first group is replaced.
_QUOTED = r""""[^"\\\n]*(?:\\.[^"\\\n]*)*"?|\\+"[^"\n]*"?|'[^'\n]*'?"""
_QUOTE = r"\\{0,2}[\"']"
_PAIRED = rf"{_QUOTE},[ \t]{{0,8}}(?:{_QUOTE}value{_QUOTE}:[ \t]{{0,8}})?(?={_QUOTE})"
_ASSIGNED = rf"(?:(?:{_QUOTE})?[ \t]{{0,8}}(?:[=:]|%3d)[ \t]{{0,8}}|{_PAIRED})"
_AS_KEYS_LOOK = r"(?=\S{0,60}\d)(?=\S{0,60}[a-z])\S{8,}"  # after a blank it may be any word
_VALUE = rf"(?:(?:bearer|basic)[ \t]{{1,8}})?(?:{_QUOTED}|(?<==)\S+|[^\s,;]+)"
_NO_PORT = r"(?![\"']?(?:[\d.:-]+(?:/\w+)?|/\S*)[\"']?(?:\s|$))"
SECRET_NAME = (
    r"(?:api[ _-]?key|token|secret|passw(?:or)?d|passphrase|credential|authorization|cookie"
    r"|host_port_range|(?<![a-z])aws_|(?<=[a-z_-])key(?<!monkey)(?![a-z])|(?<=api )key|signature"
    r"|(?:pass|pwd|(?<![a-z])(?:auth|sig))(?![a-z]))"
)
_NAME = rf"{SECRET_NAME}(?=([\w-]{{0,40}}))\2"
# A log may have lost the end of a private key.
_PRIVATE_KEY = r"(?s:.{0,38}?PRIVATE KEY(?:.{0,16000}?-----END (?:.{0,66}?-----)?|.{0,16000}))"
SECRET_RULES = parse_table(
    rf"""authorization cookie: (\w+{_ASSIGNED})(?:{_QUOTED}|[^\"'\r\n]+)
key token secret pass pwd auth credential host_port_range aws_ sig: ({_NAME}{_ASSIGNED}){_VALUE}
key token secret pass login: ((?:{SECRET_NAME}|login)[ \t]{{1,8}}){_AS_KEYS_LOOK}
--: ((?<![\w-])--[\w-]{{0,30}}?{SECRET_NAME}[ \t]{{1,8}})(?:{_QUOTED}|[^\s-]\S*)
-p: ((?<!\S)-p[ \t]{{1,8}}){_NO_PORT}(?:{_QUOTED}|[^\s-]\S*)
-u --user: ((?<!\S)-[a-z-]+[ \t]{{1,8}}[\"']?[^\s:\"']{{1,60}}:)(?!\d+\b)[^\s\"']+
login mysql sshpass: (\w+[^\n]{{0,60}}?[ \t]-p)[^\s-]\S*
bearer: (bearer[ \t]{{1,8}})[\w.~+/=-]{{8,}}
-----begin: ()-----BEGIN {_PRIVATE_KEY}
eyj: (\b)eyJ[\w-]{{8,}}\.[\w-]{{4,}}(?:\.[\w-]*)*
gho_ ghp_ ghr_ ghs_ ghu_ github_pat_ glpat- hf_ sk-: (\b)[a-z0-9_]+[-_][\w-]{{12,}}
npm_ pypi- dckr_pat_ nvapi- r8_: (\b)[a-z0-9_]+[-_][\w-]{{12,}}
sk_live_ sk_test_ rk_live_ tskey-: (\b)[a-z]+[-_][\w-]{{12,}}
xoxa- xoxb- xoxp- xoxr- xoxs-: (\b)xox.-[\w-]{{12,}}
akia asia: (\b)[A-Z]{{4}}[0-9A-Z]{{12,}}
aiza: (\b)AIza[\w-]{{30,}}
.slack.com/services/ /api/webhooks/: ([\w.]*/(?:services|api/webhooks)/)\S+"""
)

_WORD = r"[^\s\"'<>(,;@"  # a character of the words around an @, but none of:
PASSWORD = (  # in `user:PASSWORD@host` and in `https://TOKEN@host`, after the first group
    rf"(://(?:{_WORD}:]{{0,400}}:(?!\d+/)|(?={_WORD}:/]{{12,400}}@))"
    rf"|(?<!{_WORD}]){_WORD}:]{{1,400}}:(?={_WORD}/]+@))"
    # \2 gives no character back: there is an @ behind all of them, or behind none.
    rf"(?=({_WORD}]{{1,400}}))\2(?:@{_WORD}/]{{1,400}}){{0,9}}(?=@(?!sha256:))"
)


def redact_diagnostics(value: Any, secrets: Sequence[str]) -> Any:
    """A text or JSON value with REDACTED for `secrets` and for whatever looks like a secret."""
    import re

    if isinstance(value, dict):
        secret_name = re.compile(SECRET_NAME, re.I)
        # {"name": "TOKEN", "value": "…"}
        names = {**dict(zip(value, value)), "value": value.get("name", value.get("key", ""))}
        return {
            name: "REDACTED"
            if secret_name.search(str(names[name]))
            else redact_diagnostics(item, secrets)
            for name, item in value.items()
        }
    if isinstance(value, list):  # ["--token", "…"]
        option = re.compile(rf"[\w-]{{0,60}}?{SECRET_NAME}\0|-p\0{_NO_PORT}", re.I)
        return [
            "REDACTED" if option.match(f"{name}\0{item}") else redact_diagnostics(item, secrets)
            for name, item in zip(["", *value], value)
        ]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, "REDACTED")
    parts = []
    done = 0
    for start, end in sorted(_secrets(value)):
        if start >= done:
            parts += [value[done:start], "REDACTED"]
        done = max(done, end)
    return "".join([*parts, value[done:]])


def _secrets(text: str) -> Spans:
    """(start, end) of passwords, values of names such as token, and tokens known by their looks."""
    import re

    for found in re.finditer(PASSWORD, text):
        yield found.end(1), found.end()
    low = text.replace("\u0130", "I").lower()  # that letter is two when it is small
    for hints, pattern in SECRET_RULES.items():
        match = re.compile(pattern, re.I).match
        for hint in hints.split():
            at = low.find(hint)
            while at >= 0:
                named = match(text, at)
                end = named.end() if named else at + len(hint)
                if named:
                    yield named.end(1), end
                at = low.find(hint, end)


def format_json(value: Any) -> str:
    """json.dumps(value, indent=1, sort_keys=True), but faster for many rows."""
    if not isinstance(value, list) or not value:
        return indented([value], "\n")[0]
    texts = []
    for start in range(0, len(value), 100):  # more would take memory and no less time
        texts += indented(value[start : start + 100], "\n ")
    return "[\n " + ",\n ".join(texts) + "\n]"


def indented(values: Sequence[Any], pad: str) -> list[str]:
    """Each of `values`, which stand at one depth, as JSON with an indent.

    With an indent Python's json does without its C part.  So the objects and the lists of a depth
    are each written in one go, with line breaks for blanks; numbers hold the places of what stands
    a depth further down.
    """
    import json

    inner = pad + " "
    mark = int.from_bytes(os.urandom(16), "big")  # too long to be met by chance
    ends: dict[type, Pair] = {dict: ("{", "}"), list: ("[", "]")}
    made: dict[type, Iterator[str]] = {}
    for kind, (left, right) in ends.items():
        flat: list[Any] = []
        deeper: list[Any] = []
        value: Any
        for value in (value for value in values if value and type(value) is kind):
            pairs = value.items() if kind is dict else enumerate(value)
            names = [name for name, item in pairs if type(item) in ends]
            if names:
                names.sort()
                deeper += map(value.__getitem__, names)
                value = value.copy()
                for name in names:
                    value[name] = mark
            flat.append(value)
        text = json.dumps(flat, sort_keys=True, separators=("," + inner, ": "))[2:-2]
        # no text in JSON has a line break or a NUL in it
        text = text.replace(f"{right},{inner}{left}", "\0")
        if deeper:
            parts = zip(text.split(str(mark)), [*indented(deeper, inner), ""])
            text = "".join(part for pair in parts for part in pair)
        made[kind] = iter([f"{left}{inner}{body}{pad}{right}" for body in text.split("\0")])
    return [
        next(made[type(value)]) if value and type(value) in ends else json.dumps(value)
        for value in values
    ]


def reason_of(body: Row) -> str:
    """Why the service refuses, from `msg`, `error_msg` or `detail`, and from `error` and `message`.

    An `error` that is a sentence and no code such as no_such_ask is told beside a `msg`.
    """
    error = reason_text(body.get("error"))
    message = reason_text(body.get("message"))
    for name in ("msg", "error_msg", "detail"):
        words = reason_text(body.get(name))
        if words:
            return f"{error}: {words}" if " " in error and error not in words else words
    return ": ".join(filter(None, (error, message)))


def reason_text(value: Any) -> str:
    """A reason that the service gives as a text or, at times, as an object that holds one."""
    if isinstance(value, dict):
        return reason_of(value) or " ".join(format_json(value).split())
    if isinstance(value, list):
        return "; ".join(filter(None, map(reason_text, value)))
    return "" if value in (None, True, False) else str(value)


def format_utc(seconds: Any, form: str = "%Y-%m-%d %H:%M") -> str:
    """Unix seconds as text in UTC; anything that is no time as it is."""
    from datetime import datetime, timezone

    try:
        return datetime.fromtimestamp(float(seconds), timezone.utc).strftime(form)
    except (TypeError, ValueError, OverflowError, OSError):
        return str(seconds)


def format_duration(seconds: float) -> str:
    """A length of time as people say it: 2d 3h, 4h 15m, 7m."""
    minutes = int(max(0, seconds)) // 60
    days = minutes // 1440
    hours = minutes // 60 % 24
    return f"{days}d {hours}h" if days else f"{hours}h {minutes % 60}m" if hours else f"{minutes}m"


# What a member of an answer may be relied on to be.  The service sends null, text for numbers and
# other types; these read a member as what it should be, and never fail.


def as_number(value: Any) -> float | int | None:
    """A finite number, or the one that a text holds; None for anything else, true and false too."""
    if isinstance(value, str):
        try:
            value = int(value) if value.isdigit() and len(value) < 20 else float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) <= 1e300 else None  # NaN is not, either


def as_whole(value: Any) -> int | None:
    """A whole number such as an id or a count, also from a text or from 7.0; None for the rest."""
    number = as_number(value)
    return None if number is None or number % 1 or abs(number) >= 1e19 else int(number)


def as_price(value: Any) -> float | int | None:
    """Dollars, also from a text; None for what can be no price, such as one below zero."""
    number = as_number(value)
    return number if number is not None and 0 <= number < 1e9 else None


def as_text(value: Any) -> str:
    """A text as it is, a number as text; "" for the rest."""
    if isinstance(value, str):
        return value
    return "" if as_number(value) is None else str(value)


def number_of(row: Any, name: str) -> float | int | None:
    """A member of a row, as as_number() reads it."""
    return as_number(row.get(name))


def price_of(row: Any, name: str) -> float | int | None:
    """A member of a row, as as_price() reads it."""
    return as_price(row.get(name))


def whole_of(row: Any, name: str) -> int | None:
    """A member of a row, as as_whole() reads it."""
    return as_whole(row.get(name))


def text_of(row: Any, name: str) -> str:
    """A member of a row, as as_text() reads it."""
    return as_text(row.get(name))


def as_list(value: Any) -> list[Any]:
    """A list as it is; an empty one for the rest."""
    return value if isinstance(value, list) else []


def listed(value: Any) -> list[Any]:
    """A list as it is; anything else as the one item of a list."""
    return value if isinstance(value, list) else [value]


def as_rows(value: Any) -> list[Row]:
    """The objects of a list; none if there is no list."""
    return [row for row in as_list(value) if isinstance(row, dict)]


def as_dict(value: Any) -> Row:
    """An object as it is; an empty one for the rest."""
    return value if isinstance(value, dict) else {}


def get_path(row: Any, path: str) -> Any:
    """`row["a"]["b"]` for "a.b"; None if something on the way is missing."""
    for name in path.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def has_path(row: Row, path: str) -> bool:
    """Is there something, if only null, under "a.b" or in the "b" of "a"?"""
    name, _, rest = path.partition(".")
    return path in row or (isinstance(row.get(name), dict) and has_path(row[name], rest))


# -------------------------------------------------------------------------------------------- kinds
# The types of arguments, and their converters.


@record
class Kind:
    """A type of argument.

    annotation  the type that a caller of the SDK sees
    convert     turns a word or a Python value into what is sent; raises ValueError to refuse it
    expects     completes the sentence "expected ..."
    metavar     stands for the value in the help
    completes   what a shell offers for it: "files", "instances", or "" for nothing
    many        takes several words of the command line
    """

    annotation: str
    convert: Convert
    expects: str
    metavar: str = "TEXT"
    completes: str = ""
    many: bool = False

    def called(self, metavar: str, completes: str = "") -> Kind:
        """The same type with another name in the help, and perhaps another completion."""
        return Kind(self.annotation, self.convert, self.expects, metavar, completes, self.many)


def _whole(value: Any) -> int:
    """A whole number from an int or from ASCII digits; a bool, 2.5 and other scripts' digits are
    refused.
    """
    if isinstance(value, str):
        whole = value.isascii() and value.strip().lstrip("+-").isdigit()
    elif isinstance(value, float):
        whole = value.is_integer()
    else:
        whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not whole or abs(int(value)) >= 10**19:
        raise ValueError(value)
    return int(value)


def _number(value: Any) -> float:
    """A finite number; an int stays one."""
    if isinstance(value, str):
        if not value.isascii() or "_" in value or len(value) > 40:
            raise ValueError(value)
        value = float(value)
    number = as_number(value)
    if number is None:
        raise ValueError(value)
    return number


def _checked(convert: Convert, accepts: Callable[[Any], Any]) -> Convert:
    """A converter whose results must pass a test."""

    def checked(value: Any) -> Any:
        value = convert(value)
        if not accepts(value):
            raise ValueError(value)
        return value

    return checked


def _within(low: float, convert: Convert, high: float = FOREVER) -> Convert:
    return _checked(convert, lambda number: low <= number <= high)


_count = _within(0, _whole)
_amount = _within(0, _number)
_above_zero = _checked(_number, lambda number: number > 0)


def _cents(value: Any) -> float:
    """An amount of money that is shown as it is sent."""
    amount: float = _amount(value)
    if abs(round(amount, 2) - amount) > 1e-9:  # floats are a little off
        raise ValueError(value)
    return round(amount, 2)


def _text(value: Any) -> str:
    if not isinstance(value, str) and as_number(value) is not None:
        value = str(value)
    if not isinstance(value, str) or len(value) > LONGEST_TEXT or "\0" in value:
        raise ValueError(value)
    value.encode()  # a lone surrogate (an argument in another encoding) cannot be sent as JSON
    return value


def _stripped(value: Any) -> str:
    return _text(value).strip()


def _is_email(text: str) -> bool:
    """Is it an email address: one @ with text on both sides and no spaces?"""
    return all(text.partition("@")) and text.count("@") == len(text.split()) == 1


_name = _checked(_text, str.strip)
_word = _checked(_stripped, lambda text: len(text.split()) == 1)
_variable = _checked(_word, lambda text: "=" not in text)
_email = _checked(_stripped, _is_email)
_account = _checked(_stripped, lambda text: is_digits(text) or _is_email(text))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def _truth(value: Any) -> bool:
    if isinstance(value, str):
        return {"true": True, "t": True, "false": False, "f": False}[value.strip().lower()]
    return _flag(value)


def _items(convert: Convert) -> Convert:
    """A list of what `convert` takes, from a list or from one item; ids also with commas or spaces
    between them.
    """

    def checked(value: Any) -> list[Any]:
        if isinstance(value, (bytes, bytearray, dict)):
            raise ValueError(value)  # items of these are no items of the caller's
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            value = [value]
        items = list(value)
        if convert is not _text:
            items = [word for item in items for word in id_words(item)]
            if not items:
                raise ValueError(value)
            return list(dict.fromkeys(map(convert, items)))
        return [convert(item) for item in items]

    return checked


def id_words(item: Any) -> list[Any]:
    """The ids of a text such as "7,8 9"; anything else is one item."""
    if not isinstance(item, str):
        return [item]
    return item.replace(",", " ").split() or [item]


BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")  # UTF-16, UTF-8


def decode_file(data: bytes) -> str:
    """The text of a file, UTF-8 or UTF-16, without a byte-order mark and with LF at the ends of
    lines.  Raises UnicodeError.
    """
    wide = data[:2] in BYTE_ORDER_MARKS or data[1:2] == b"\0"
    text = data.decode("utf-16" if wide else "utf-8-sig")
    return text.replace("\r\n", "\n")


def _read_file(path: str) -> str:
    """The text of the file that a user named.  Raises UsageError."""
    reason = f"expected a text file of at most {LONGEST_FILE:,} characters"
    try:
        with open(os.path.expanduser(path), "rb") as file:
            text = decode_file(file.read(4 * LONGEST_FILE + 1))
        if "\0" not in text and len(text) <= LONGEST_FILE:
            return text
    except UnicodeError:
        reason = "it is not UTF-8 or UTF-16 text"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", "") or str(error)
    raise UsageError(f"cannot read the file {printable(path, 200)}: {reason}")


def _gpu_conditions(value: Any) -> str:
    """The conditions on offers that NAME or NAME:NUMBER stands for."""
    import re

    match = re.fullmatch(r"([\w -]+)(?::([1-9][0-9]{0,8}))?", _text(value))
    if not match:
        raise ValueError(value)
    return f"gpu_name={match[1].replace(' ', '_')} num_gpus={match[2] or 1}"


def _command_line(value: Any) -> list[str]:
    """The words of a command, split as a shell would."""
    import shlex

    words = shlex.split(_text(value))
    if not words:
        raise ValueError(value)
    return words


def _script_or_text(value: Any) -> str:
    """The text of the file of that name if there is one, else the text itself."""
    text = _text(value)
    is_file = len(text) < 4096 and os.path.isfile(os.path.expanduser(text))
    return _read_file(text) if is_file else text


def _out_file(value: Any) -> str:
    """The path of a file that can be made: its folder is there."""
    path = os.path.abspath(os.path.expanduser(_name(value)))
    reason = "" if os.path.isdir(os.path.dirname(path)) else "there is no such folder"
    if os.path.isdir(path):
        reason = "it is a folder"
    if reason:
        raise UsageError(f"cannot write {printable(str(value), 200)}: {reason}")
    return str(value)


def _json_object(value: Any) -> Row:
    """A dict as it is, or the JSON text of an object.  Raises ValueError for what JSON cannot hold:
    NaN, half a character, an object of the program.
    """
    import json

    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, dict):
        raise ValueError(value)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def _json_file(value: Any) -> Row:
    """A dict as it is, or the path of a file that holds a JSON object."""
    if not isinstance(value, str):
        return _json_object(value)
    if value.lstrip()[:1] == "{":  # may hold a password
        raise UsageError("expected the path of a JSON file, not JSON itself")
    text = _read_file(_name(value))
    try:
        return _json_object(text)
    except (ValueError, RecursionError):
        raise UsageError(f"the file {printable(value, 200)} does not hold a JSON object") from None


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _texts_or_object(value: Any) -> Any:
    """A text or several, or a dict that JSON can hold."""
    if isinstance(value, dict):
        return _json_object(value)
    if isinstance(value, (list, tuple)):
        return [_text(text) for text in value]
    return _text(value)


def _order(value: Any) -> Any:
    """Text, or a list of pairs, {"col", "dir"} or texts."""
    if not isinstance(value, (list, tuple)):
        return _text(value)
    for part in value:
        if not isinstance(part, (str, dict)) and [type(word) for word in part] != [str, str]:
            raise ValueError(value)
    return value


def _text_or(convert: Convert) -> Convert:
    """A converter that takes a text as it is, and leaves everything else to `convert`."""
    return lambda value: _text(value) if isinstance(value, str) else convert(value)


def _slot(last: int) -> Convert:
    """A converter for a day or an hour of a schedule; None for each."""
    number = _within(0, _whole, last)
    return lambda value: None if value == "*" else number(value)


def _is_coming(when: float) -> bool:
    ends = when + (86400 if when % 86400 == 0 else 60)  # a day is in the future until it is over
    return ends >= time.time()


def _as_given(value: Any) -> Any:
    """A value that goes out in the form it came in: text stays text, a number stays a number."""
    return _whole(value) if isinstance(value, int) else _name(value)


ID = Kind("int", _count, "an id (a whole number)", "ID")
INSTANCE_ID = ID.called("INSTANCE", "instances")
COUNT = Kind("int", _count, "a whole number, 0 or more", "N")
WHOLE = Kind("int", _whole, "a whole number", "N")
NUMBER = Kind("float", _amount, "a number, 0 or more", "N")
PRICE = Kind("float", _amount, "a price in dollars, 0 or more", "USD")
DOLLARS = Kind("float", _cents, "an amount in dollars and whole cents, 0 or more", "USD")
BID = Kind("float", _above_zero, "a bid in dollars, greater than 0", "USD")
GB = Kind("float", _amount, "a size in GB, 0 or more", "GB")
WHOLE_GB = Kind("float", lambda value: int(_amount(value)), GB.expects, "GB")
GIVEN_GB = Kind("float", lambda value: (_amount(value), value)[1], GB.expects, "GB")
HOURS = Kind(
    "float",
    _within(0, _above_zero, 876_000),
    "a number of hours greater than 0, at most 100 years",
    "HOURS",
)
SHARE = Kind("float", _within(0, _number, 1), "a share from 0 to 1, such as 0.4 for 40%", "N")
PERCENT = Kind("float", _amount, "a percentage, 0 or more", "PERCENT")
SECONDS = Kind("float", _amount, "a number of seconds, 0 or more", "SECONDS")
INTERVAL = Kind(
    "float", _within(6, _amount), "6 seconds or more, as the service limits requests", "SECONDS"
)
TIMEOUT = Kind("float", _above_zero, "a number of seconds greater than 0", "SECONDS")
ATTEMPTS = Kind("int", _within(1, _whole), "a whole number, 1 or more", "N")
TEXT = Kind("str", _text, f"text of at most {LONGEST_TEXT:,} characters")
NAME = Kind("str", _name, f"text that is not empty, of at most {LONGEST_TEXT:,} characters", "NAME")
CODE = NAME.called("CODE")
GIVEN_ID = Kind("int | str", _as_given, "an id", "ID")
TEXT_ID = Kind("str", _name, "an id", "ID")
FLAG = Kind("bool", _flag, "True or False")
TRUTH = Kind("bool", _truth, "true or false", "true|false")
IDS = Kind("Sequence[int]", _items(_count), "ids (whole numbers)", "ID", many=True)
ANY_IDS = Kind(
    "Sequence[int]",
    lambda value: [] if value == [] else IDS.convert(value),
    "ids, or an empty list",
    "ID",
)
TEXTS = Kind("Sequence[str]", _items(_text), "a list of texts", many=True)
WORDS = Kind("Sequence[str]", _text_or(_items(_text)), "a list of texts, or one text")
OBJECT = Kind("dict[str, Any]", _json_object, "a JSON object", "JSON")
FILE_OBJECT = Kind("dict[str, Any] | str", _json_file, "a file with a JSON object", "FILE", "files")
SCRIPT = Kind("str", lambda value: _read_file(_name(value)), "a text file", "FILE", "files")
SCRIPT_OR_TEXT = Kind(
    "str", _script_or_text, "commands, or the name of a text file", "FILE", "files"
)
OUT_FILE = Kind("str", _out_file, "the path of a file to write", "FILE", "files")
ENV = Kind(
    "str | dict[str, str]",
    _texts_or_object,
    "text such as '-e KEY=VALUE -p 8080:8080', or a dict",
    "ENV",
)
ENV_TEXT = Kind("str", lambda value: format_env(_texts_or_object(value)), ENV.expects, "ENV")
TEXT_OR_OBJECT = Kind(
    "str | dict[str, Any]", _text_or(_json_object), "text, or a JSON object", "JSON"
)
QUERY = Kind(
    "str | dict[str, Any]", _texts_or_object, "conditions such as 'num_gpus>=2'", "QUERY", many=True
)
ORDER = Kind(
    "str | Sequence[Any]",
    _order,
    "fields such as 'dph,num_gpus-', or a list of [field, direction]",
    "FIELDS",
)
FIELDS = Kind(
    "str",
    _checked(_text, lambda text: not text or text.strip(", ")),
    "field names separated by commas, such as id,gpu_name",
    "FIELDS",
)
DAY_SLOT = Kind("str", _slot(6), "0 to 6, or *", "DAY")
HOUR_SLOT = Kind("str", _slot(23), "0 to 23, or *", "HOUR")
DATE = Kind("str | float", lambda value: parse_when(value), "a date such as 2026-01-31", "DATE")
ACCOUNT_TYPE = Kind(
    "str",
    _checked(lambda value: _text(value).lower(), ("host", "client", "").__contains__),
    "host or client",
    "KIND",
)
COMING = Kind(
    "str | float",
    _checked(DATE.convert, _is_coming),
    "a date in the future, such as 2036-01-31",
    "DATE",
)
INSTANCE_IDS = IDS.called("INSTANCE", "instances")
GIVEN_INSTANCE_ID = GIVEN_ID.called("INSTANCE", "instances")
IMAGE = Kind("str", _word, "an image such as vastai/pytorch:latest", "IMAGE")
VARIABLE = Kind("str", _variable, "the name of a variable, without = and spaces", "NAME")
COMMAND_LINE = Kind("str", _command_line, "a command as a shell takes it", "COMMAND")
LINES = Kind(
    "int | str", lambda value: str(_count(value)) if value != "" else "", "a number of lines", "N"
)
EMAIL = Kind("str", _email, "an email address such as ada@example.com", "EMAIL")
ACCOUNT = Kind("str", _account, "an email address or the id of an account", "ACCOUNT")
KEY_FILE = TEXT.called("FILE", "files")
PUBLIC_KEY = TEXT.called("KEY", "files")
PLACE = NAME.called("PLACE", "files")
GPU = Kind("str", _gpu_conditions, "NAME or NAME:NUMBER, such as RTX_4090:2", "GPU")


# --------------------------------------------------------------------- queries, environments, dates

# The countries of a region.  A query takes the short names (`geolocation=EU georegion=true`); each
# ISO 3166 country is in one of them, as in UN M49 but for BM, CY, GE, GL, PM and XK.  `launch
# instance --region` takes the long names, which the service's own client divides otherwise.
GEOREGIONS = parse_table("""\
AF: AO BF BI BJ BW CD CF CG CI CM CV DJ DZ EG EH ER ET GA GH GM GN GQ GW IO KE KM LR LS LY MA MG \
ML MR MU MW MZ NA NE NG RE RW SC SD SH SL SN SO SS ST SZ TD TF TG TN TZ UG YT ZA ZM ZW
AS: AE AF AM AZ BD BH BN BT CN HK ID IL IN IQ IR JO JP KG KH KP KR KW KZ LA LB LK MM MN MO MV MY \
NP OM PH PK PS QA SA SG SY TH TJ TL TM TR TW UZ VN YE
EU: AD AL AT AX BA BE BG BY CH CY CZ DE DK EE ES FI FO FR GB GE GG GI GL GR HR HU IE IM IS IT JE \
LI LT LU LV MC MD ME MK MT NL NO PL PT RO RS RU SE SI SJ SK SM UA VA XK
LC: AG AI AR AW BB BL BM BO BQ BR BS BV BZ CL CO CR CU CW DM DO EC FK GD GF GP GS GT GY HN HT JM \
KN KY LC MF MQ MS MX NI PA PE PM PR PY SR SV SX TC TT UY VC VE VG VI
NA: CA US
OC: AQ AS AU CC CK CX FJ FM GU HM KI MH MP NC NF NR NU NZ PF PG PN PW SB TK TO TV UM VU WF WS""")
REGIONS = parse_table("""\
North_America: AG BS BB BZ CA CR CU DM DO SV GD GT HT HN JM MX NI PA KN LC VC TT US
South_America: AR BO BR CL CO EC FK GF GY PY PE SR UY VE
Europe: AL AD AT BY BE BA BG HR CY CZ DK EE FI FR DE GR HU IS IE IT LV LI LT LU MT MD MC ME NL MK \
NO PL PT RO RU SM RS SK SI ES SE CH UA GB VA XK
Asia: AF AM AZ BH BD BT BN KH CN GE IN ID IR IQ IL JP JO KZ KW KG LA LB MY MV MN MM NP KP OM PK PH \
QA SA SG KR LK SY TW TJ TH TL TR TM AE UZ VN YE HK MO
Oceania: AS AU CK FJ PF GU KI MH FM NR NC NZ NU MP PW PG PN WS SB TK TO TV VU WF
Africa: DZ AO BJ BW BF BI CV CM CF TD KM CG CD CI DJ EG GQ ER SZ ET GA GM GH GN GW KE LS LR LY MG \
MW ML MR MU MA MZ NA NE NG RW ST SN SC SL SO ZA SS SD TZ TG TN UG ZM ZW""")

# The query language: `num_gpus>=2 gpu_name in ["RTX 4090",RTX_3090] geolocation notin [CN,VN]
# dph<0.5`
OPERATORS = parse_table("""\
>=: gte
gte: gte
>: gt
gt: gt
<=: lte
lte: lte
<: lt
lt: lt
=: eq
==: eq
eq: eq
!=: neq
neq: neq
noteq: neq
not eq: neq
in: in
notin: notin
not in: notin
nin: notin""")
ALIASES = parse_table("""\
cuda_vers: cuda_max_good
display_active: gpu_display_active
dlperf_usd: dlperf_per_dphtotal
dph: dph_total
flops_usd: flops_per_dphtotal""")
MULTIPLIERS = {"cpu_ram": 1000.0, "gpu_ram": 1000.0, "gpu_total_ram": 1000.0, "duration": 86400.0}

# Every field of a search with what its help says: "field: type, meaning".  The type decides
# what values a query may give it: text, name (`_` is a blank unless in quotes), model (`_` is
# always a blank), country, true/false, date and version; anything else is a number, in that unit,
# which MULTIPLIERS turns into the service's.  OFFER_COLUMNS shows fields, Offer types them.
OFFER_FIELDS = """\
bw_nvlink: GB/s, NVLink bandwidth
compute_cap: number x100, CUDA compute capability (890 is 8.9)
cpu_arch: text, amd64 or arm64
cpu_cores: number, CPU threads of the machine
cpu_cores_effective: number, CPU threads that the offer gets
cpu_ghz: GHz, CPU clock
cpu_ram: GB, system memory
cuda_max_good: number, newest CUDA that the driver runs (alias cuda_vers)
datacenter: true/false, hosted in a data center
direct_port_count: number, open ports
disk_bw: MB/s, disk read speed
disk_space: GB, space that can be rented
dlperf: number, deep-learning benchmark
dlperf_per_dphtotal: number, dlperf per $/hr (alias dlperf_usd)
dph_total: $/hr, price with storage (alias dph)
driver_version: version x.y.z, NVIDIA driver, such as 570.124.4
duration: days, longest rental
external: true/false, offers of other providers
flops_per_dphtotal: number, TFLOPS per $/hr (alias flops_usd)
geolocation: country, two letters such as SE
gpu_arch: text, nvidia or amd
gpu_display_active: true/false, a display is attached (alias display_active)
gpu_frac: number, share of the machine's GPUs, 0 to 1
gpu_max_power: W, power limit
gpu_max_temp: C, temperature limit
gpu_mem_bw: GB/s, memory bandwidth
gpu_name: model, such as RTX_4090
gpu_ram: GB, memory of one GPU
gpu_total_ram: GB, memory of all its GPUs
has_avx: true/false, CPU with AVX
host_id: number, the host
id: number, the offer
inet_down: Mb/s, download speed
inet_down_cost: $/GB, download price
inet_up: Mb/s, upload speed
inet_up_cost: $/GB, upload price
machine_id: number, the machine
min_bid: $/hr, lowest bid
mobo_name: name, motherboard
num_gpus: number, GPUs in the offer
pci_gen: number, PCIe generation
pcie_bw: GB/s, PCIe bandwidth
reliability: 0 to 1, uptime of the machine
rentable: true/false, free now
rented: true/false, rented by you
static_ip: true/false, address does not change
storage_cost: $/GB/month, storage price
total_flops: TFLOPS, of all GPUs
ubuntu_version: version, the host's system
verification: text, verified, unverified or deverified
verified: true/false, checked by Vast.ai
vms_enabled: true/false, runs virtual machines
cluster_id: number, the cluster"""
VOLUME_FIELDS = """\
cpu_arch: text, amd64 or arm64
cuda_vers: number, newest CUDA that the driver runs
cluster_id: number, the cluster
nw_disk_min_bw: MiB/s, lowest network disk bandwidth
nw_disk_avg_bw: MiB/s, average network disk bandwidth
nw_disk_max_bw: MiB/s, highest network disk bandwidth
datacenter: true/false, hosted in a data center
disk_bw: MB/s, disk speed
disk_space: GB, space that can be rented
driver_version: version x.y.z, NVIDIA driver
duration: days, longest rental
geolocation: country, two letters such as SE
gpu_arch: text, nvidia or amd
has_avx: true/false, CPU with AVX
host_id: number, the host
id: number, the offer
inet_down: Mb/s, download
inet_up: Mb/s, upload
machine_id: number, the machine
pci_gen: number, PCIe generation
pcie_bw: GB/s, PCIe bandwidth
reliability: 0 to 1, uptime of the machine
storage_cost: $/GB/month, price
static_ip: true/false, address does not change
total_flops: TFLOPS, all GPUs
ubuntu_version: version, the host's system
verified: true/false, checked by Vast.ai"""
BENCHMARK_FIELDS = """\
contract_id: number, the instance that was measured
dph_base: $/hr, price
gpu_name: model, GPU model
id: number, the benchmark
image: text, Docker image
last_update: date, when measured
launch_args: text, options of the instance
machine_id: number, the machine
num_gpus: number, GPUs
template_hash: text, hash of the template
template_id: number, the template
type: text, what was measured
value: number, the result"""
TEMPLATE_FIELDS = """\
creator_id: number, account of the creator
created_at: date, when created
count_created: number, instances created from it
default_tag: text, image tag
docker_login_repo: text, registry
id: number, the template
image: text, Docker image
jup_direct: true/false, direct connection for Jupyter
hash_id: text, hash of the template
private: true/false, not public
name: name, name of the template
recent_create_date: date, when last used
recommended_disk_space: GB, recommended disk size
recommended: true/false, recommended by Vast.ai
ssh_direct: true/false, direct connection for SSH
tag: text, image tag
use_ssh: true/false, SSH"""
INVOICE_FIELDS = """\
id: number, the invoice
user_id: number, the account
when: date, when made
paid_on: date, when paid
payment_expected: date, when due
amount_cents: cents, amount
is_credit: true/false, a credit
is_delayed: true/false, payment was delayed
balance_before: $, balance before
balance_after: $, balance after
original_amount: $, amount before a cut
event_id: text, payment event
cut_amount: $, amount of the cut
cut_percent: %, percentage of the cut
extra: text, notes
service: text, payment service
stripe_charge: text, charge id at Stripe
stripe_refund: text, refund id at Stripe
stripe_payout: text, payout id at Stripe
error: text, what failed
paypal_email: text, address at PayPal
transfer_group: text, group of transfers
failed: true/false, the payment failed
refunded: true/false, the payment was refunded
is_check: true/false, paid by check"""


def field_help(fields: str) -> Pairs:
    """(name, meaning) of each field of one of the descriptions above."""
    pairs = (line.partition(": ") for line in fields.splitlines())
    return [(name, meaning) for name, _, meaning in pairs]


def field_types(fields: str) -> dict[str, str]:
    """The type of each field of one of the descriptions above."""
    return {name: meaning.partition(",")[0] for name, meaning in field_help(fields)}


WORDS_ONLY = ("text", "name", "model", "country", "region")
NO_NUMBER = (*WORDS_ONLY, "true/false", "date", "version")
DIRECTIVES = {"georegion": "true/false", "chunked": "true/false"}  # in searches of offers
ANYWHERE = {"driver_version": "version x.y.z"}  # also if `fields` does not describe it


EXPECTED = parse_table(f"""\
: a number
number: a number
text: text
name: text
model: text
true/false: true or false
country: a two-letter country code such as NO
region: a region ({", ".join(GEOREGIONS)}) or a two-letter country code
version: a version such as 22.04
version x.y.z: three numbers such as 570.124.4
0 to 1: a number from 0 to 1
number x100: 100 times the number, such as 890 for 8.9""")


@record
class Condition:
    """One condition of a query text, such as `gpu_ram>=24`.

    name      the field as written
    field     the field that it means
    operator  as the service calls it
    raw       the value as written
    text      the whole condition
    type      the field's type; "" if the field is not known
    scale     what a number is multiplied with for the service; None if it goes as text
    """

    name: str
    field: str
    operator: str
    raw: str
    text: str
    type: str = ""
    scale: float | None = None

    @property
    def takes_list(self) -> bool:
        return self.operator in ("in", "notin")

    def error(self, given: str, form: str = "", expects: str = "") -> UsageError:
        """The error of a value; `form` is what was probably meant."""
        expects = expects or EXPECTED.get(self.type, f"a number ({self.type})")
        hint = f"; write {form}" if form else ""
        return UsageError(f"{self.name}: expected {expects}, not {printable(given)!r}{hint}")

    def form(self, value: str) -> str:
        """The condition with another value; "" for none."""
        if not value or self.takes_list:
            return value
        sign = next(sign for sign, name in OPERATORS.items() if name == self.operator)
        return f"{self.name}{sign}{value}"


def parse_query(
    query: str | Sequence[str] | None,
    start: Row | None = None,
    fields: str = OFFER_FIELDS,
    aliases: dict[str, str] | None = None,
    multipliers: dict[str, float] | None = None,
    tell: Tell | None = None,
) -> Row:
    """The conditions of a query text on top of `start`: {field: {operator: value}}.  Raises
    UsageError for what cannot be read and for values that the type of their field cannot have.

    Several != on a field become one notin, as do several notin.  `tell` is called with fields that
    `fields` does not describe, which are sent all the same, and of conditions that a later one
    replaces; without it that is a warning on stderr.
    """
    tell = tell or warn
    aliases = aliases or {}
    result = {field: dict(conditions) for field, conditions in (start or {}).items()}
    types = field_types(fields) if isinstance(fields, str) else dict.fromkeys(fields, "")
    if fields is OFFER_FIELDS:
        types.update(DIRECTIVES)
    conditions = split_query(query, aliases)
    if any(c.field == "georegion" and c.raw.lower() == "true" for c in conditions):
        types["geolocation"] = "region"
    given: dict[str, dict[str, Condition]] = {}
    for condition in conditions:
        field = condition.field
        name = condition.name
        if field not in types:
            hint = suggest(field, [*types, *aliases])
            tell(f"unknown field {printable(name)!r} in the query{hint}")
            types[field] = ""
        condition.type = types[field] or ANYWHERE.get(field, "")
        condition.scale = (multipliers or {}).get(field)
        if condition.raw.strip(",[]") in ("any", "?", "*"):
            if condition.operator != "eq":
                raise UsageError(f"{condition.raw!r} works only with =; write {name}=any")
            for dropped in given.pop(field, {}).values():
                tell(f"{printable(condition.text)} drops {printable(dropped.text)}")
            result.pop(field, None)
            continue
        value = query_value(condition)
        operator = condition.operator
        present = result.setdefault(field, {})
        earlier = given.setdefault(field, {})
        before = present.get(operator, value)
        if operator in earlier and before != value:
            if operator in ("neq", "notin"):
                value = unite(before, value)
            else:
                replaced = printable(earlier[operator].text)
                tell(f"{printable(condition.text)} replaces {replaced} in the query")
        present[operator] = value
        earlier[operator] = condition
    for present in result.values():
        if isinstance(present.get("neq"), list):
            present["notin"] = unite(present.pop("neq"), present.get("notin", []))
    return result


def unite(*values: Any) -> list[Any]:
    """The items of some values, which are lists or one item each, without repetition."""
    lists = map(listed, values)
    return list(dict.fromkeys(item for items in lists for item in items))


def split_query(query: str | Sequence[str] | None, aliases: dict[str, str]) -> list[Condition]:
    """The conditions of a query text, their values still text.  Raises UsageError."""
    import re

    text = query if isinstance(query, str) else " ".join(query or ())
    text = re.sub(r"\\[ \t]*\r?\n", " ", text).strip()  # a shell's way to go on in the next line
    condition = re.compile(
        r"(\w+)(?:\s*([=!<>]+)(?![=!<>])\s*|\s+(not\s+in|not\s+eq|[a-z]+)\s+)"
        r'(\[[^][]*\]|"[^"]*"|\'[^\']*\'|(?:(?![,;&|]+\w+[=!<>])\S)+)\s*',
        re.ASCII,
    )
    found: list[Condition] = []
    at = 0
    while at < len(text):
        match = condition.match(text, at)
        if not match:
            rest = printable(text[at:], 60)
            form = "conditions such as num_gpus>=2 geolocation in [US,CA], separated by spaces"
            if found and found[-1].name == "gpu_name" and re.match("[A-Z0-9]", rest):
                form = f"{found[-1].text}_{rest.split()[0]}"
            raise UsageError(
                f"cannot parse the query at {rest!r}; write {form}, and quote a value that "
                "contains spaces"
            )
        name, sign, word, value = match.groups()
        operator = OPERATORS.get(sign or " ".join(word.split()))
        if operator is None:
            raise UsageError(
                f"unknown operator {printable(sign or word)!r} after {printable(name)}; "
                "write one of >= > <= < = != in notin"
            )
        whole = " ".join(match.group().split())
        found.append(Condition(name, aliases.get(name, name), operator, value, whole))
        at = match.end()
    return found


def query_value(condition: Condition) -> Any:
    """The value of a condition as it is sent: numbers as text unless they are scaled, true and
    false as such, lists for in and notin.  Raises UsageError for what the type cannot be.
    """
    name = condition.name
    operator = condition.operator
    takes_list = condition.takes_list
    items = query_items(condition)
    if not items or not all(text.strip() for text, _ in items):
        raise UsageError(f"{name}: the value is empty")
    if len(items) > 1 and not takes_list:
        given = condition.raw.strip("[]")
        if condition.type in WORDS_ONLY or not meant_number(given, condition.type):
            word = "notin" if operator == "neq" else "in"
            raise condition.error(given, f"{name} {word} [{given}]", "one value")
        items = [(given, False)]  # such as 1,000
    ordered = operator in ("gt", "gte", "lt", "lte")
    if ordered and condition.type in (*WORDS_ONLY, "true/false"):
        raise UsageError(
            f"{name}: > and < need a number, not {condition.text!r}; use =, !=, in or notin"
        )
    region = condition.type == "region"  # stands for a list of countries
    values = []
    for text, quoted in items:
        if text in ("null", "None") and not quoted and not ordered:
            values.append(text if takes_list else None)  # items of a list stay text
        elif region and text.upper() in GEOREGIONS:
            values += GEOREGIONS[text.upper()].split()
        else:
            values.append(query_item(condition, text, quoted))
    if len(values) > len(items):
        condition.operator = {"eq": "in", "neq": "notin"}.get(operator, operator)
    return values if condition.takes_list else values[0]


def query_items(condition: Condition) -> list[tuple[str, bool]]:
    """The items of a value, one or several with commas between: (text, was it in quotes?)."""
    import re

    items = []
    if (condition.raw[0] == "[") != (condition.raw[-1] == "]"):
        raise UsageError(f"{condition.name}: a bracket is missing in {printable(condition.raw)!r}")
    raw = condition.raw.strip("[]")
    if condition.takes_list and condition.raw[0] in "\"'":  # in "RTX 4090,RTX 3090"
        return [(text.strip(), True) for text in raw.strip("\"'[] ").split(",") if text.strip()]
    for double, single, plain in re.findall(r'\s*(?:"([^"]*)"|\'([^\']*)\'|([^,]+))', raw):
        text = plain.strip(" \t\r\n[]")
        if not plain:
            items.append((double or single, True))
        elif condition.type in ("country", "region"):
            items += [(word, False) for word in text.split()]
        elif text:
            items.append((text.strip('"'), False))
    return items


def query_item(condition: Condition, text: str, quoted: bool) -> Any:
    """One item of a value, which is no null, as it is sent.  Raises UsageError."""
    import re

    type = condition.type
    plain = text.replace("_", " ")
    known = type or condition.scale is not None
    if type == "true/false" or (not known and text.lower() in ("true", "false")):
        return query_flag(condition, text)
    if not known:  # as the service's own client does
        return plain
    if type in ("country", "region"):
        return query_country(condition, text)
    if type == "date":
        return parse_when(plain)
    if type == "version x.y.z" and re.fullmatch(r"\d{1,3}(\.\d{1,3}){2}", text, re.ASCII):
        return int("".join(part.zfill(3) for part in text.split(".")))  # 570.124.4 is 570124004
    if type == "version":
        if not is_digits(text.replace(".", "")):
            raise condition.error(text)
        return text
    if type not in NO_NUMBER:
        return query_number(condition, plain.strip())
    if not quoted:
        check_words(condition, text)
    return text if type == "text" or (type == "name" and quoted) else plain


def check_words(condition: Condition, text: str) -> None:
    """Refuses text without quotes that is probably no text, or more than one."""
    if text.lower() in ("true", "false"):
        raise condition.error(text, condition.form(f'"{text}"'))
    words = text.split()
    if len(words) > 1 and sum(any(c.isdigit() for c in word) for word in words) != 1:
        form = f"[{','.join(words)}], or quote a text that contains spaces"
        raise condition.error(text, form, "items separated by commas")


def query_flag(condition: Condition, text: str) -> Any:
    """True or False; an item of a list stays text."""
    given = text.strip().lower()
    if given in ("true", "false"):
        return text if condition.takes_list else given == "true"
    form = f"{condition.form('true')} or {condition.form('false')}"
    if condition.field == "georegion":
        form = "geolocation=EU georegion=true"
    raise condition.error(text, form)


def query_country(condition: Condition, text: str) -> str:
    """A country's code."""
    code = text.upper()
    if any(code in codes.split() for codes in GEOREGIONS.values()):
        return code
    form = f"geolocation={code} georegion=true" if code in GEOREGIONS else ""
    raise condition.error(text, condition.form("GB") if code == "UK" else form)


def query_number(condition: Condition, text: str) -> Any:
    """A number, as text unless it is scaled; one that is in another unit is refused."""
    type = condition.type
    scale = condition.scale
    try:
        number = _number(text)
    except ValueError:
        raise condition.error(text, condition.form(meant_number(text, type))) from None
    meant = ""
    if type == "0 to 1" and number > 1:
        meant = f"{number / 100:g}" if number <= 100 else ""
    elif type == "number x100" and 1 < number < 20:
        meant = f"{number * 100:g}"
    elif type == "version x.y.z" and number < 1_000_000:
        meant = f"{text}.0.0" if text.isdigit() else ""
    elif scale == 1000 and number >= (2000 if condition.field == "gpu_ram" else 16_000):
        meant = f"{number / 1000:g}"
    else:
        return text if scale is None else number * scale
    raise condition.error(text, condition.form(meant))


def meant_number(text: str, unit: str) -> str:
    """The number in a text such as $0.5, 1,000, 24GB or 99%, if it is in `unit`; else ""."""
    import re

    match = re.fullmatch(
        r"\$?\s*((?:\d{1,3}(?:[, _]\d{3}){1,9}|\d{1,99})(?:\.\d+)?|\.\d+)\s*([a-z$/][\w/$]*|%)?",
        text,
        re.I | re.ASCII,
    )
    if not match:
        return ""
    digits, given = match.groups()
    number = float(re.sub("[, _]", "", digits))
    if unit == "0 to 1" and given == "%":
        number /= 100
    elif given and given[0].lower() != unit.lstrip("$")[:1].lower():
        return ""
    return f"{number:.15g}"


def number_hint(kind: Kind, value: Any) -> str:
    """'; write 24' for an argument such as 24GB of a kind that takes a number."""
    if not isinstance(value, str) or kind.annotation not in ("int", "float"):
        return ""
    if kind.expects == ID.expects:
        return ""  # half an id may be that of something else
    meant = meant_number(value.strip(), kind.metavar)
    try:
        kind.convert(meant)
    except (ValueError, TypeError):
        return ""
    return f"; write {meant}"


def parse_order(order: Any, aliases: dict[str, str], fields: str, tell: Tell) -> list[Any]:
    """`dph,num_gpus-` as [["dph_total", "asc"], ["num_gpus", "desc"]]; the pairs and objects of a
    list as they are.  Raises UsageError.

    A field is followed by `-` or `desc`, or has the `-` before it, for descending.  `tell` hears of
    those that `fields` does not describe.
    """
    import re

    if order is None:
        order = "score-"
    known = [*field_types(fields), *aliases, "score", "dph_total"]
    result = []
    for part in filter(str.strip, order.split(",")) if isinstance(order, str) else order:
        if not isinstance(part, str):
            result.append(part)
            continue
        match = re.fullmatch(
            r"([-+]?)\s*([\w.]+)\s*([-+]?|\s(?i:asc|desc))", part.strip(), re.ASCII
        )
        if not match:
            given = printable(part)
            raise UsageError(
                f"cannot parse the order {given!r}; write FIELD, or FIELD- for descending"
            )
        before, name, after = match.groups()
        field = aliases.get(name, name)
        if field not in known:
            tell(f"unknown field {name!r} in --order{suggest(name, known)}")
        down = "-" in (before, after) or after.strip().lower() == "desc"
        result.append([field, "desc" if down else "asc"])
    return result


# What an environment text may hold: docker's spellings of what the service stores, and the other
# options of `docker run`, with and without a value, which it has no place for.
ENV_OPTIONS = parse_table("""\
-e: -e
--env: -e
-p: -p
--publish: -p
-v: -v
--volume: -v
-n: -n
--network: -n
--net: -n
-h: -h
--hostname: -h""")
_HOST = r"(?:(?:[\d.]{7,15}|\[[\da-fA-F:]+\]):)?"
_PORTS = r"\d{1,5}(?:-\d{1,5})?"
ENV_PATTERNS = parse_table(  # what a value looks like
    rf"""-e: [^=\s'\"-][^=\s'\"]*=.*
-p: {_HOST}(?:(?:{_PORTS})?:)?{_PORTS}(?:/(?:tcp|udp|sctp))?
-v: [\w./:~@+,=-]+
-n: [\w.-]+
-h: [\w.-]+"""
)
ENV_EXAMPLES = parse_table("""\
-e: NAME=VALUE
-p: 8080:8080, 8000-8010:8000-8010 or 53:53/udp
-v: /data:/data
-n: NAME
-h: NAME""")
DOCKER_VALUES = """\
--shm-size --ipc --gpus --ulimit --cpus --memory -m --memory-swap --name --user -u --workdir
-w --entrypoint --restart --cap-add --cap-drop --device --security-opt --label -l --log-driver
--log-opt --mount --tmpfs --pid --uts --add-host --dns --runtime --cpuset-cpus --pull
--platform --link --expose --group-add --sysctl --stop-signal --stop-timeout --network-alias
--mac-address --ip --cidfile --userns --storage-opt --volumes-from --cgroupns --domainname"""
DOCKER_FLAGS = """\
--rm --init --privileged --detach -d --interactive -i --tty -t -it -ti -dit -itd -id -td
--read-only --no-healthcheck --publish-all -P --oom-kill-disable --quiet -q"""


def parse_env(
    env: str | Sequence[str] | dict[str, str] | None, tell: Tell | None = None
) -> dict[str, str]:
    """Docker-style options as the service stores them: {"KEY": "VALUE", "-p 80:80": "1", "-h":
    "host"}.  Raises UsageError.

    Takes texts with `-e K=V`, `-p PORTS`, `-v MOUNT`, `-n NAME`, `-h HOST`, their long forms and a
    bare `K=V`, or a JSON object; a dict is returned as it is.  `tell` hears of docker's other
    options, which are left out, and of what is given twice; without it that is a warning on stderr.
    """
    if isinstance(env, dict):
        return dict(env)
    tell = tell or warn
    result: dict[str, str] = {}
    for text in [env] if isinstance(env, str) else env or ():
        for key, value in _env_pairs(text):
            if key[0] == "-" and key[:2] not in ENV_PATTERNS:
                tell(f"the service does not support docker's {key}; ignoring it")
                continue
            if result.get(key, value) != value:
                tell(f"{printable(key)} is given twice; using the last value")
            result[key] = value
    return result


def format_env(env: str | Sequence[str] | dict[str, str]) -> str:
    """An environment as one text of docker options, as templates have it.  Raises UsageError.

    A text in docker's form stays as it is, with all its options.
    """
    parts = []
    for part in [env] if isinstance(env, (str, dict)) else env:
        pairs = list(_env_pairs(part))
        if isinstance(part, str) and part.strip()[:1] != "{":
            words = _docker_words(part)
            parts.append(part if words == _split_words(part) else " ".join(words))
        else:
            parts += [_env_text(key, value) for key, value in pairs]
    return " ".join(parts)


def _env_text(key: str, value: str) -> str:
    """The options for a stored name and value, in quotes if need be.  Raises UsageError if none
    will do.
    """
    import shlex

    if key[:3] in ("-p ", "-v ", "-n ", "-h"):
        return f"{key} {value}" if key == "-h" else key
    escaped = value.replace('"', '\\"')
    whole = f'-e {key}="{escaped}"' if "'" in value else f"-e {key}={shlex.quote(value)}"
    if list(_env_pairs(whole)) != [(key, value)]:
        raise UsageError(f"cannot write {printable(key)} as one word; leave out quotes or spaces")
    return whole


def _env_pairs(env: str | Row) -> Iterator[Pair]:
    """The names and values of an environment as the service stores them, and docker's other options
    with their values.
    """
    import json

    if isinstance(env, str) and env.strip()[:1] != "{":
        yield from _env_options(env)
        return
    try:
        env = _json_object(env)
    except (ValueError, RecursionError):
        raise UsageError('cannot read the JSON object; write \'{"KEY": "VALUE"}\'') from None
    for key, value in env.items():
        if not isinstance(value, (str, int, float)) or not key:
            raise UsageError(f"cannot read the value of {printable(key)!r}; write text")
        yield key, value if isinstance(value, str) else json.dumps(value)


def _env_options(env: str) -> Iterator[Pair]:
    """As _env_pairs(), of a text of options, which are checked."""
    import re

    words = _docker_words(env)[::-1]
    before = ""  # the name or the value that has just been read
    while words:
        word = words.pop()
        name: str
        name, sign, value = re.findall(r"(?s)(-[epvh](?=.)|[^=]*)(=?)(.*)", word)[0]
        option = ENV_OPTIONS.get(name, name)
        if name in DOCKER_FLAGS.split():
            yield name, ""
            continue
        if option not in ENV_PATTERNS and name not in DOCKER_VALUES.split():
            raise _unreadable_env(word, before)
        if not sign and not value:
            if not words:
                example = ENV_EXAMPLES.get(option, "VALUE")
                raise UsageError(f"{name} needs a value; write {name} {example}")
            value = words.pop()
        value = _unquote(value)
        if not re.fullmatch(ENV_PATTERNS.get(option, ".*"), value, re.S):
            given = without_value(value) if option == "-e" else printable(value)
            raise UsageError(
                f"cannot read {option} {given!r}; write {option} {ENV_EXAMPLES[option]}"
            )
        before, _, text = value.partition("=")
        if option == "-e":
            yield before, _unquote(text)
        elif option in ("-p", "-v", "-n"):
            yield f"{option} {value}", "1"
        else:
            yield option, value


def _unreadable_env(word: str, before: str) -> UsageError:
    """The error of a word that is no option; it may be a part of the value `before` it."""
    name = without_value(word)
    if word[0] == "-":
        return UsageError(f"cannot read {name!r}; write -e, -p, -v, -n or -h")
    if before:
        before = printable(before)
        return UsageError(f"a word after {before} is no option; quote a value that contains spaces")
    return UsageError(f"cannot read {name!r}; write -e {name.rstrip('…') or 'NAME'}=VALUE")


def _unquote(text: str) -> str:
    """A text without the pair of quotes around it, if it is one quoted piece."""
    import re

    if not re.fullmatch(r"""'[^']*'|"(?:\\"|[^"])*\"""", text):
        return text
    return text[1:-1].replace('\\"', '"') if text[0] == '"' else text[1:-1]


def _docker_words(text: str) -> list[str]:
    """The words of an environment text, with -e before each K=V that has no option."""
    words = []
    takes_value = False
    for word in _split_words(text):
        if "=" in word and word[0] != "-" and not takes_value:
            words.append("-e")
        words.append(word)
        is_option = word in ENV_OPTIONS or word in DOCKER_VALUES.split()
        takes_value = is_option and not takes_value
    return words


# A quote opens at the start of a word or after a sign such as =, not in the middle of don't.
# A backslash alone at the end of a line is no word: a shell's way to go on in the next one.
_ENV_WORD = r"""(?xs)
((?:
    (?<![^\W_]) (?: "(?:[^"]|(?<=\\)")*(?<!\\)" | '[^']*' )
    | (?!(?<!\S)\\[ \t]*\r?\n) [^\s'"]
    | (?<=[^\W_]) ['"]
)+)
| (['"].*)  # is not closed"""


def _split_words(text: str) -> list[str]:
    """Words between spaces outside quotes; the quotes stay in place.  Raises UsageError."""
    import re

    words = []
    for word, unclosed in re.findall(_ENV_WORD, text):
        if unclosed:
            raise UsageError(f"the quote {unclosed[0]} is not closed; write -e NAME='VALUE'")
        words.append(word)
    return words


DATE_FORMS = (
    "%Y-%m-%d|%m/%d/%Y|%Y%m%d|%d %B %Y|%d %b %Y|%B %d %Y|%b %d %Y|%Y/%m/%d|%m/%d/%y|%d-%b-%Y"
    "|%Y.%m.%d"
)
CLOCK_FORMS = (
    "| %H:%M| %H:%M:%S| %H:%M:%S.%f|T%H|T%H:%M|T%H:%M:%S|T%H:%M:%S.%f|T%H%M|T%H%M%S"
    "| %I%p| %I:%M%p| %I:%M %p| %I:%M:%S%p| %I:%M:%S %p| %I %p"
)


# What strptime does not know: weekdays, 1st and 2nd, SEPT, GMT; and a space before an offset.
DATE_REPAIRS = (
    (",", " "),
    (r"^\s*(?:MON|TUE|WED|THU|FRI|SAT|SUN)\S*", ""),
    (r"(?<=\d)(?:ST|ND|RD|TH)\b", ""),
    (r"\bSEPT\b", "SEP"),
    (r"\b(?:UTC|GMT)$|(?<=[\dM ])Z$", "+0000"),
    (r"(?<=[\dM])\s*([+-]\d\d:?\d\d)$", r" \1"),
)


def parse_when(value: str | float) -> float:
    """Unix seconds of a date as people write it, in UTC unless it has an offset; whole if they are.

    2026-01-05, 2026-01-05 13:00[:00], ISO with T, Z or an offset, 01/05/2026 10:46 (month first),
    20260315, 1 March 2026, Jan 8th 2026 7pm, Mon, 05 Jan 2026 13:00:00 GMT, 1767225600 (unix
    seconds).  Raises UsageError, also for days that do not exist.
    """
    import re

    seconds: float
    if not isinstance(value, str):
        seconds = _number(value)
    elif re.fullmatch(r"(?!\d{8}$)\d{1,19}(?:\.\d{1,9})?", value.strip(), re.ASCII):
        seconds = float(value)
    else:
        seconds = _date_seconds(value)
    if not 0 <= seconds <= LAST_MOMENT:
        raise UsageError(
            f"expected a date from 1970 to 3997, unix times in seconds, not {short_repr(value)}"
        )
    return int(seconds) if seconds == int(seconds) and isinstance(value, str) else seconds


def _date_seconds(value: str) -> float:
    """Unix seconds of a date in one of the forms above."""
    import re
    from datetime import datetime

    text = value.strip().upper() if len(value) < 80 and value.isascii() else ""
    for pattern, replacement in DATE_REPAIRS:
        text = re.sub(pattern, replacement, text)
    text = " ".join(text.split())
    if not re.search(r" [+-]\d\d:?\d\d$", text):
        text += " +0000"
    forms = (
        f"{day}{clock} %z" for day in DATE_FORMS.split("|") for clock in CLOCK_FORMS.split("|")
    )
    for form in forms:
        try:
            return datetime.strptime(text, form).timestamp()  # noqa: DTZ007 - all end in %z
        except ValueError:
            continue
    raise UsageError(
        f"cannot read the date {printable(value)!r}; "
        "write 2026-01-31, '2026-01-31 13:00' or unix seconds"
    )


# ------------------------------------------------------------------------------------------- screen
# stdout carries answers, stderr everything else; nothing here fails because a stream is missing or
# closed.


def is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (ValueError, AttributeError):  # closed, or no more than a write()
        return False


def erasable(stream: TextIO | None) -> bool:
    """Is it a terminal that can take a line away again?"""
    return is_terminal(stream) and os.getenv("TERM") != "dumb"


def colored() -> bool:
    """Should stdout have color?"""
    return erasable(sys.stdout) and not os.getenv("NO_COLOR")


def terminal_width() -> int:
    """Columns of the terminal, at least 20: COLUMNS if set, 80 if unknown."""
    given = os.getenv("COLUMNS", "")
    width = int(given) if is_digits(given) and len(given) < 6 else 0
    for stream in (sys.stdout, sys.stderr):
        try:
            width = width or os.get_terminal_size(stream.fileno()).columns
        except (OSError, ValueError, AttributeError):
            continue
    return max(20, width or 80)


def terminal_height() -> int:
    """Lines of the terminal that stdout is, 24 if unknown."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).lines or 24
    except (OSError, ValueError, AttributeError):
        return 24


def is_gone(stream: TextIO | None) -> bool:
    """Is a stream missing or closed?"""
    return stream is None or getattr(stream, "closed", False)


def flush(stream: TextIO | None) -> None:
    """Flushes a stream.  Raises OSError if that fails; one that is missing or closed
    has nothing to write.
    """
    if not is_gone(stream) and hasattr(stream, "flush"):
        stream.flush()  # type: ignore[union-attr]


def discard(stream: TextIO | None) -> None:
    """Sends a stream that cannot be written to nowhere, or the interpreter would complain as it
    flushes at the end.
    """
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        pass


def write_out(text: str, plain: bool = False) -> None:
    """Writes to stdout, with escapes for what its encoding lacks; `plain` text of the service keeps
    its control characters only if no terminal would obey them.
    """
    out = sys.stdout
    if is_gone(sys.stdout):
        return
    if is_terminal(out):
        if plain:
            text = printable_lines(text.replace("\r\n", "\n").expandtabs())
        text = encodable(text, out)
    try:
        out.write(text)
    except UnicodeEncodeError:
        out.write(text.encode(out.encoding, "backslashreplace").decode(out.encoding))


def write_err(text: str) -> None:
    """Writes to stderr; lost if that is missing, closed or full."""
    try:
        sys.stderr.write(encodable(text, sys.stderr))
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass


PLAIN = parse_table("""\
…: ...
↑: ^
↓: v
→: ->
×: x
▁: .
▂: :
▃: -
▄: =
▅: +
▆: *
▇: %
█: #""")


def encodable(text: str, stream: TextIO) -> str:
    """`text` with plain signs for the few of ours that the encoding of a stream lacks."""
    if text.isascii():
        return text
    for sign, plain in PLAIN.items():
        try:
            sign.encode(getattr(stream, "encoding", None) or "utf-8")
        except (UnicodeEncodeError, LookupError):
            text = text.replace(sign, plain)
    return text


def say(text: str, end: str = "\n") -> None:
    """Sentences for a person, on stderr: after what stdout has, in the place of a line of progress,
    safe to show, and wrapped at words if stderr is a terminal.
    """
    try:
        flush(sys.stdout)
    except OSError:
        pass  # said when the command ends
    lines = printable_lines(text).split("\n")
    if is_terminal(sys.stderr):
        lines = [wrap_line(line, terminal_width()) for line in lines]
    show_progress("")
    write_err("\n".join(lines) + end)


def wrap_line(line: str, width: int) -> str:
    """A line wrapped at `width` columns, its indent repeated."""
    if display_width(line) <= width:
        return line
    margin = " " * (len(line) - len(line.lstrip()))
    return margin + wrap_text(line, width - len(margin)).replace("\n", "\n" + margin)


progress_shown = [""]  # the text that show_progress was last given


def show_progress(text: str, changing: str = "", in_pipe: bool = False) -> None:
    """A line about work under way, and "" at its end.  At a terminal it is redrawn; a terminal that
    cannot do that, and with `in_pipe` a pipe, get a line for each new `text`.  `changing` is only
    for what is redrawn, such as seconds.
    """
    if erasable(sys.stderr):
        line = printable(f"{text} {changing}" if changing else text, 0)
        if text or progress_shown[0]:
            write_err(CLEAR + truncate(line, terminal_width() - 3))
    elif text not in ("", progress_shown[0]) and (in_pipe or is_terminal(sys.stderr)):
        write_err(printable(text, 0) + "\n")
    progress_shown[0] = text


def warn(text: str) -> None:
    """Warns the user, on stderr."""
    say(f"vastai: {text}")


def confirm(call: Call, question: str) -> None:
    """Asks on stderr and reads one line from stdin; anything but y or yes raises UsageError."""
    if not call.view.confirmed and not agreed(question):
        raise UsageError("not confirmed, nothing was sent; --yes skips the question")


def agreed(question: str) -> bool:
    """Is the answer of a person, or of what stands in for one on stdin, y or yes?"""
    return (ask_line(f"{question} [y/N]") or "").lower() in ("y", "yes")


def ask_line(question: str) -> str | None:
    """Asks on stderr and reads one line from stdin, stripped; None at its end."""
    say(question, " " if is_terminal(sys.stdin) else "\n")  # what a pipe answers ends no line
    line = read_line()
    if line is None and is_terminal(sys.stdin):  # nor does Ctrl-D
        write_err("\n")
    return line


def ask_secret(question: str) -> str:
    """Asks for a secret at a terminal, which does not show what is typed; elsewhere takes a line of
    stdin.  Raises UsageError for an empty one.
    """
    secret = None
    lack = "was typed"
    if is_terminal(sys.stdin):
        import getpass

        try:
            secret = getpass.getpass(f"{question}: ", sys.stderr).strip()
        except (EOFError, OSError, ValueError):
            write_err("\n")  # Ctrl-D ends no line
    else:
        secret = read_line()
        lack = "on stdin; pipe it in, or run this at a terminal"
    if not secret:
        raise UsageError(f"no {question} {lack}")
    return secret


def read_line(most: int = LONGEST_TEXT) -> str | None:
    """One line from stdin, or `most` characters of it (-1: all), stripped and decoded as a file is;
    None at its end, and if it cannot be read.
    """
    try:
        line = sys.stdin.readline(most) if sys.stdin else ""
        data = line.encode(getattr(sys.stdin, "encoding", None) or "utf-8", "surrogateescape")
        # of a script in UTF-16 no line is run: only its first one has the mark
        if data.startswith(BYTE_ORDER_MARKS if most > 0 else BYTE_ORDER_MARKS[-1]):
            line = decode_file(data + b"\0" * (len(data) % 2)).strip("\0")  # of half a line feed
    except (OSError, ValueError):
        return None
    return line.strip() if line else None


def page_out(text: str, full: bool) -> None:
    """Text to stdout; through $PAGER if it has more lines than a terminal shows."""
    pager = "" if full else os.getenv("PAGER", "").strip()
    paged = pager and is_terminal(sys.stdout)
    if not paged or text.count("\n") < terminal_height():
        write_out(text)
        return
    import shlex
    import subprocess

    env = {"LESS": "FRX", **os.environ}
    try:
        sys.stdout.flush()
        reader = subprocess.Popen(shlex.split(pager), stdin=subprocess.PIPE, env=env)
    except (OSError, ValueError):
        write_out(text)
        return
    data: bytes | None = text.encode("utf-8", "replace")
    while reader.returncode is None:
        try:
            reader.communicate(data)
        except KeyboardInterrupt:  # of a search in it, say: the pager decides when it ends
            data = None


COLORS = parse_table("""\
+ running verified active: 32
$ * loading created unverified: 33
exited stopped: 2
! offline deverified error: 31""")


def paint(text: str, form: str) -> str:
    """A state in its color: running green, loading yellow, exited dim, offline red."""
    state = text.strip()
    for states, code in COLORS.items():
        if form == "state" and state in states.split():
            return text.replace(state, f"\033[{code}m{state}\033[0m")
    return text


def wrap_text(text: str, width: int, indent: int = 0) -> str:
    """A text in lines of at most `width` columns, all but the first indented; textwrap would load
    re.
    """
    lines: list[str] = []
    for word in encodable(text, sys.stdout).split():
        if lines and display_width(lines[-1]) + 1 + display_width(word) <= width:
            lines[-1] += " " + word
        else:
            lines.append((" " * indent if lines else "") + word)
    return "\n".join(lines)


def two_columns(left: str, right: str, wide: int, width: int) -> str:
    """A name and what it means, the meaning wrapped in its own column."""
    left = encodable(left, sys.stdout)
    narrow = width - wide < 24  # no room for two columns
    indent = 6 if narrow else wide
    lines = [" " * indent + line for line in wrap_text(right, width - indent).split("\n")]
    if narrow or len(left) > wide - 4:
        lines.insert(0, "  " + wrap_text(left, width - 2, 6))
    else:
        lines[0] = f"  {left:<{wide - 2}}" + lines[0].lstrip()
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- rows
# The vocabulary of the table.  What a command does differently from the others is a column here.

REQUIRED: Any = type("REQUIRED", (), {"__repr__": lambda self: "REQUIRED"})()
KEY: Any = type("KEY", (), {"__repr__": lambda self: "KEY"})()  # the API key in a row's fixed body
SAFE, ONCE = True, False  # may a request be repeated when its answer is lost?
READS, SETS, SPENDS, DELETES = "reads", "sets", "spends", "deletes"  # what a command does


class Arg:
    """One argument of a command.

    A column that is not given keeps the default below.

    flags      its spelling: "id" is positional, "-l --limit" an option; "--gpu GPU" also has what
               stands for the value in the help, instead of its kind's metavar
    kind       what it takes: converter, type, metavar, completion
    help       a noun phrase for the help and the docstring; "Image | Docker image" stands under the
               heading "Image"
    default    REQUIRED, or the value used if none is given; without this column REQUIRED for a
               positional argument, False for a FLAG and None for other options
    name       the keyword in Python, if that is not the last flag
    key        its name on the wire, if that is not `name`; "*": its members are sent, not itself
    to         where it goes: "path", "query", "body", "path body", "" (a function takes it), or
               "auto": into the path that names it, else into the query of a GET, else into the body
    old        other keywords that programs use
    face       "cli" or "sdk" for an argument of one face only
    cli        the command line's default, if that differs
    choices    the values that are allowed; a tuple, or a text with blanks between them
    many       takes several words of the line
    rest       takes the rest of the line as it is
    needs      other arguments of which one must be given with this one
    again      can be repeated
    shortcuts  flags that set a value: {"-b": "bid"}
    secret     its value is never shown
    hidden     not in the help
    sent       function that turns the value into what is sent; None is left out
    """

    name = key = face = needs = ""
    to = "auto"
    choices: Any = ()
    old: Any = ""
    shortcuts: dict[str, str] = {}
    rest = again = secret = hidden = False
    sent: Convert | None = None

    def __init__(
        self,
        flags: str,
        kind: Kind = TEXT,
        help: str = "",
        default: Any = ...,
        **columns: Any,
    ) -> None:
        self.flags = flags.split()
        if self.flags[-1][0].isupper():
            kind = kind.called(self.flags.pop())
        self.group, _, self.help = help.rpartition(" | ")
        self.kind = kind
        self.many = kind.many
        self.option = flags[0] == "-"
        word = self.flags[-1].lstrip("-").replace("-", "_")
        self.name = self.key = columns.get("name", word)
        if default is ...:
            default = REQUIRED if not self.option else False if kind is FLAG else None
        self.default = self.cli = default
        set_columns(self, flags, columns)
        self.old = self.old.split()
        if isinstance(self.choices, str):
            self.choices = tuple(self.choices.split())

    @property
    def annotation(self) -> str:
        """The type that a caller of the SDK sees."""
        text = self.kind.annotation
        if self.choices:
            text = f"Literal[{', '.join(map(repr, self.choices))}]"
            text = f"Sequence[{text}]" if self.kind.many else text
        return f"{text} | None" if self.default is None else text

    @property
    def several(self) -> bool:
        """Is its value on the command line a list?"""
        return bool(self.many or self.again or self.rest)

    def label(self, cli: bool) -> str:
        """How an error names it: by its flag, by its place in the usage line, or by its keyword."""
        if not cli:
            return self.name
        return self.flags[-1] if self.option else word_of(self)


class Local(Arg):
    """An argument that is not sent as it is: a function takes it."""

    to = ""


class CliArg(Local):
    """An argument of the command line alone."""

    face = "cli"


class SdkArg(Arg):
    """An argument of the SDK alone."""

    face = "sdk"


class Secret(Arg):
    """An argument whose value is never shown."""

    secret = True


def set_columns(row: Arg | Command, name: str, columns: Row) -> None:
    """Gives a row or an argument its columns.  Raises TypeError for an unknown one."""
    for column, value in columns.items():
        if not hasattr(row, column):
            raise TypeError(f"{name!r}: there is no column {column!r}")
        setattr(row, column, value)


YES = CliArg("-y --yes", FLAG, "do not ask for confirmation")
# fmt: off
SCHEDULE = (
    Local("--schedule", TEXT, "Schedule | create a scheduled job instead of acting now", choices="HOURLY DAILY WEEKLY"),
    Local("--start_date", DATE, "Schedule | first day of the job, UTC (default: today)", needs="schedule"),
    Local("--end_date", DATE, "Schedule | last day of the job, UTC (default: a week from now; of cloud copy, the "
          "end of the rental)", needs="schedule"),
    Local("--day", DAY_SLOT, "Schedule | day of the week, 0 (Sunday) to 6, or * for every day", "0", needs="schedule"),
    Local("--hour", HOUR_SLOT, "Schedule | hour of the day in UTC, 0 to 23, or * for every hour", "0", needs="schedule"),
    YES)  # to replace a job that does the same
# fmt: on


NO_FUNCTION: Any = ""


class Command:
    """One command: its names, its request, and what becomes of the answer.

    A column that names a function holds the name until resolve_table() puts the function there.

    name         "show instances" on the command line, show_instances() in Python
    call         "METHOD /path/{id}/ -> returns", with the path under /api/v0 unless it begins
                 with /api/, or run:/path/ on the serverless host; "-> returns" or "" if `run` does
                 everything
    safe         SAFE: may be sent again when its answer is lost; ONCE: must not
    effect       READS, SETS, SPENDS (can start or raise a charge) or DELETES
    summary      what it does, in at most eight words
    args         its arguments

    The request:
    query, body  members that are always sent
    build        function (call, query of a GET or else body): fills it in; may return another path
    run          function (call) -> result, if one request is not enough
    schedule     function (call) -> result that makes a scheduled job; adds the options for that
    one_of       exactly one of these arguments must be given; several sets with a comma between
    either       at most one of these arguments may be given; sets as in one_of
    needs        at least one of these arguments must be given; "*": at least one option
    auth         False: works without a key
    strict       an "error" member or a bare text is a failure, whatever the status says
    sentence     a bare text confirms it; in other rows that change something it is a refusal
    only_copy    the answer holds what is shown only once, such as a new key
    rents        an answer without the member `made` leaves the outcome unknown

    The question before:
    ask          its text, with parameters in braces; `ask` and `asks` add --yes
    asks         function (call) -> its text, or "" for none
    ask_when     "always"; "terminal": only at one, for what the official client never asks, so that
                 scripts made for that go on; "within": `run` calls call.confirm(), with what it has
                 found for the braces

    The result:
    returns      the part of the answer that is the result, as `call` says: "" all of it (a dict),
                 "offers[]" the list of that name, "[]" a list, "user" the dict of that name, "text"
                 a str, "any" whatever comes, "none" nothing
    of           the TypedDict of a row
    each         function (row): changes each object of the result in place
    drops        members that are taken out of each object, such as its key

    What the command line shows of it:
    columns      the columns of the table, or of the card of a single thing
    columns_for  function (call, rows) -> columns, if they depend on the call
    member       the member of the result that holds the rows
    rows         function (call, result) -> rows
    tables       function (call, result) -> (heading, rows, columns) of each of several tables
    document     function (call, result) -> what --raw prints, if that is not the result
    text         function (call, result) -> text for people, if that is not the result
    done         sentence after success; of several with | between, the first that can be filled
    says         function (call, result) -> that sentence
    footer       function (call, result) that yields remarks below a table, on stderr
    empty        what is said if there are no rows
    piped        what a pipe gets instead of the sentence, which then goes to stderr
    made         member with the id of what the command made, for --quiet
    gaps         member that names what could not be read: if there is any, the status is 8
    status       member that is the exit status
    show         function (call, result), for what must talk with the user while it prints

    The rest:
    look         the command that shows what happened; that of its section for a row that changes
                 something and names none
    aliases      other names on the command line, with commas between
    methods      other names in Python, with blanks between
    face         "cli" or "sdk" for a command of one face only
    note         a paragraph of the help
    examples     arguments of example lines, one a line
    fields       the fields of its query language
    """

    query: Row = {}
    body: Row = {}
    columns: Iterable[Any] = ()
    auth = True
    strict = only_copy = sentence = rents = hosts = False  # `hosts` and `group` are register()'s
    ask_when = "always"
    one_of = either = needs = ask = of = drops = member = done = empty = piped = made = gaps = ""
    status = look = face = note = examples = fields = group = ""
    asks = build = columns_for = document = each = footer = rows = run = says = NO_FUNCTION
    schedule = show = tables = text = NO_FUNCTION

    FUNCTIONS = (
        "asks build columns_for document each footer rows run says schedule show tables text"
    )

    def __init__(
        self,
        name: str,
        call: str,
        safe: bool,
        effect: str,
        summary: str,
        *args: Arg,
        aliases: str = "",
        methods: str = "",
        **columns: Any,
    ) -> None:
        self.name = name
        self.safe = safe
        self.effect = effect
        self.summary = summary
        request, _, self.returns = call.partition("-> ")
        try:
            self.method, self.path = request.split() or ("", "")
        except ValueError:
            raise ValueError(f"{name!r}: {call!r} is not METHOD /path/ -> returns") from None
        self.aliases = aliases.split(", ") if aliases else []
        self.methods = [name.replace(" ", "_").replace("-", "_"), *methods.split()]
        set_columns(self, name, columns)
        self.args = args + SCHEDULE if self.schedule else args
        if self.ask or self.asks:
            self.args += (YES,)

    def __enter__(self) -> None:
        """`with row:` tells every error that leaves the block whose it is."""

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, VastAIError):
            error.command = error.command or self.name

    def args_of(self, face: str) -> list[Arg]:
        """The arguments of one face, "cli" or "sdk"."""
        return [arg for arg in self.args if arg.face in ("", face)]

    def places(self, arg: Arg) -> list[str]:
        """Where an argument goes: as it says, else into the path that names it, else query or
        body.
        """
        if arg.to != "auto":
            return arg.to.split()
        if f"{{{arg.name}}}" in self.path:
            return ["path"]
        return ["query" if self.method == "GET" else "body"] if self.path else []

    @property
    def is_list(self) -> bool:
        return self.returns.endswith("[]")

    @property
    def annotation(self) -> str:
        """The type that the method returns."""
        row = self.of or "dict[str, Any]"
        plain = {"text": "str", "any": self.of or "Any", "none": "None"}.get(self.returns)
        if plain:
            return plain
        if self.is_list:
            return f"list[{row}]"
        # None if it is gone; `Any`, as in typeshed, spares callers the check
        return f"{row} | Any" if self.returns else row


COMMANDS: dict[str, Command] = {}  # name -> row, in the order of the help
NAMES: dict[str, Command] = {}  # every spelling on the command line -> row
METHODS: dict[str, Command] = {}  # every spelling in the SDK -> row


def register(group: str, *rows: Command, look: str = "", hosts: bool = False) -> None:
    """Adds rows to the table under a heading of the help; `look` shows what they have changed, and
    `hosts` says that only owners of machines need them.

    Raises ValueError for a name that is there already.
    """
    for row in rows:
        row.group = group
        row.hosts = hosts
        if row.effect != READS:
            row.look = row.look or look
        spellings = [(COMMANDS, row.name)]
        if row.face != "sdk":
            spellings += [(NAMES, name) for name in (row.name, *row.aliases)]
        if row.face != "cli":
            spellings += [(METHODS, name) for name in row.methods]
        for index, name in spellings:
            if name in index:
                raise ValueError(f"two commands are called {name!r}")
            index[name] = row


def resolve_table() -> None:
    """Replaces the names of functions by the functions.  Raises ValueError for a name that is none,
    and for a row with neither a path nor a function.
    """
    functions = globals()
    columns = Command.FUNCTIONS.split()
    for row in COMMANDS.values():
        for column in columns:
            name = getattr(row, column)
            if not name:
                continue
            if not callable(functions.get(name)):
                raise ValueError(f"{row.name!r}: {column}={name!r} is no function of this file")
            setattr(row, column, functions[name])
        if not row.path and not row.run:
            raise ValueError(f"{row.name!r} has neither a path nor a function")


# ------------------------------------------------------------------------------------------ columns


class Columns:
    """The columns of a table or the lines of a card: (header, field, format, rank), read when they
    are needed from a text with a line for each: `Header: field format rank`.

    The field "a.b" is a member of a member, "a|b" the first that is there.  A format is %'s own
    without the % (".1f") or a text around {} ("{}x"), with *100 or /1000 after it to scale a
    number, or a word that FORMATS or ROW_FORMATS knows.  If a terminal is too narrow, the highest
    rank goes first; 1 if not given, and of no meaning in a card.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __iter__(self) -> Iterator[tuple[str, str, str, int]]:
        for line in self.text.split("\n"):
            header, _, rest = line.partition(": ")
            field, *more = rest.split()
            rank = int(more.pop()) if more and more[-1].isdigit() else 1
            yield header, field, "".join(more), rank


OFFER_COLUMNS = Columns("""\
ID: id 0
CUDA: cuda_max_good .1f 4
N: num_gpus {}x 0
Model: gpu_name _ 0
PCIe GB/s: pcie_bw .1f 5
CPU GHz: cpu_ghz .1f 6
vCPUs: cpu_cores_effective .1f 3
RAM GB: cpu_ram .1f/1000 2
VRAM GB: gpu_ram .1f/1000
Disk GB: disk_space .0f 2
$/hr: dph_total .4f 0
DLPerf: dlperf .1f 3
DLP/$: dlperf_per_dphtotal .2f 5
Score: score .1f 5
Driver: driver_version 6
Up Mb/s: inet_up .1f 4
Down Mb/s: inet_down .1f 3
Rel. %: reliability .1f*100 2
Max days: duration .1f/86400 4
Machine: machine_id 5
Status: verification state 5
Host: host_id 7
Ports: direct_port_count 6
Location: geolocation""")
RESERVED_COLUMNS = tuple(
    ("$/hr", "discounted_dph_total", ".4f", 0) if column[1] == "dph_total" else column
    for column in OFFER_COLUMNS
    if column[1] not in ("gpu_ram", "score")
)
INSTANCE_CARD = Columns("""\
ID: id
Machine: machine_id
Status: actual_status state
GPUs: num_gpus {}x
Model: gpu_name _
GPU use %: gpu_util .1f
vCPUs: cpu_cores_effective .1f
RAM GB: cpu_ram .1f/1000
Disk GB: disk_space .0f
SSH host: ssh_host
SSH port: ssh_port
Address: public_ipaddr
Ports: ports ports
Jupyter: jupyter_token jupyter
$/hr: dph_total .4f
Image: image_uuid
Up Mb/s: inet_up .1f
Down Mb/s: inet_down .1f
Reliability %: reliability2 .1f*100
Label: label
Age hours: duration .2f/3600
Uptime minutes: uptime_mins .2f
Message: status_msg""")
INSTANCE_COLUMNS = Columns("""\
ID: id 0
Status: actual_status state 0
Label: label
GPU: gpu gpu 0
Disk GB: disk disk 3
Volumes: volumes volumes 4
$/hr: dph_total .4f 0
Image: image_uuid 2
Age: start_date age
Verified: verification state 5""")
INSTANCE_MORE = Columns("""\
Machine: machine_id 5
Net Mb/s: net net 6
Location: geolocation 5
Template: template template 6
SSH: ssh ssh 4
Msg: status_msg 6""")
TEMPLATE_COLUMNS = Columns("""\
ID: id 0
Name: name 0
Image: image
Tag: tag 3
Hash: hash_id 0
Used: count_created 2
Disk GB: recommended_disk_space .0f 4
Creator: creator_id 4
Created: created_at day 5""")
TEMPLATE_CARD = Columns("""\
ID: id
Name: name
Description: desc
Image: image
Tag: tag
Hash: hash_id
Disk GB: recommended_disk_space .0f
Starts as: runtype
SSH: use_ssh
SSH direct: ssh_direct
Jupyter direct: jup_direct
JupyterLab: use_jupyter_lab
Environment: env
On start: onstart
Conditions: extra_filters
Registry: docker_login_repo
Private: private
Creator: creator_id
Instances made: count_created
Created: created_at day
Link: href""")
VOLUME_OFFER_COLUMNS = Columns("""\
ID: id 0
CUDA: cuda_max_good .1f 5
CPU GHz: cpu_ghz .1f 6
Disk MB/s: disk_bw .1f 3
Disk GB: disk_space .0f 0
Disk name: disk_name 4
$/GB/month: storage_cost .2f 0
Driver: driver_version 6
Up Mb/s: inet_up .1f 3
Down Mb/s: inet_down .1f 3
Rel. %: reliability .1f*100 2
Max days: duration .1f/86400 4
Machine: machine_id
Status: verification state 5
Host: host_id 7
Location: geolocation""")
NETWORK_VOLUME_OFFER_COLUMNS = Columns("""\
ID: id 0
Disk GB: disk_space .0f 0
$/GB/month: storage_cost .2f 0
Up Mb/s: inet_up .1f 3
Down Mb/s: inet_down .1f 3
Rel. %: reliability .1f*100 2
Max days: duration .1f/86400 4
Status: verification state 5
Host: host_id 7
Cluster: cluster_id 2
Location: geolocation
Min BW MiB/s: nw_disk_min_bw 5
Max BW MiB/s: nw_disk_max_bw 5
Avg BW MiB/s: nw_disk_avg_bw 3""")
VOLUME_COLUMNS = Columns("""\
ID: id 0
Cluster: cluster_id 4
Name: label 0
Disk GB: disk_space .0f 0
Status: status state 0
Disk name: disk_name 4
Driver: driver_version 6
Up Mb/s: inet_up .1f 5
Down Mb/s: inet_down .1f 5
Rel. %: reliability2 .1f*100 5
Age hours: duration .2f/3600 2
Machine: machine_id
Verified: verification state 6
Host: host_id 6
Location: geolocation 3
Instances: instances join""")
NETWORK_DISK_COLUMNS = Columns("""\
Network disk: network_disk_id
Free GB: free_space {}
Total GB: total_space {}""")
PIPED_DISK_COLUMNS = Columns(f"""\
Cluster: cluster_id
{NETWORK_DISK_COLUMNS.text}
Machines: at join""")
MOUNT_COLUMNS = Columns("""\
Machine: id
Mounted at: mount""")
CONNECTION_COLUMNS = Columns("""\
ID: id
Name: name
Type: cloud_type""")
BACKUP_COLUMNS = Columns("""\
ID: id
Contract: contract_id
Type: type unknown
Machine: machine_id
Status: status state
Age hours: created_at hours
Info: info""")
BACKUP_FILE_COLUMNS = Columns("""\
Name: name
Size MB: size .2f/1000000
URL: url""")
DEPLOYMENT_COLUMNS = Columns("""\
ID: id 0
Name: name 0
Tag: tag 0
Image: image
Endpoint: endpoint_id
Hash: file_hash 4
Version: current_version_id 2
TTL: ttl 5
Created: created_at minute 3
Updated: updated_at minute 4""")
DEPLOYMENT_CARD = Columns("""\
ID: id
Name: name
Tag: tag
Image: image
Endpoint: endpoint_id
State: endpoint_state state
Workers: worker_count
Hash: file_hash
S3 key: s3_key
Version: current_version_id
Last healthy: last_healthy_version_id
Storage: storage
TTL: ttl
Created: created_at minute
Updated: updated_at minute""")
VERSION_COLUMNS = Columns("""\
ID: id
Hash: file_hash
Healthy: healthy
Created: created_at minute""")
PRICE_INCREASE_COLUMNS = Columns("""\
Pending ID: pending_price_increase_id 0
Instance: contract_id 0
Host: host_id 3
End (UTC): contract_end_date minute 2
New end (UTC): ask_end_date minute 2
GPU $/GPU/hr: gpu_costpersec gpu_price 0
Storage $/GB/month: disk_ram_costpersec disk_price
Up $/GB: bwu_cost up_price
Down $/GB: bwd_cost down_price
Platform fee %: platform_fee fee""")
BENCHMARK_COLUMNS = Columns("""\
ID: id 0
Machine: machine_id 2
Model: gpu_name _ 0
N: num_gpus {}x 0
Value: value .2f 0
$/hr: dph_base .4f 0
Type: type
Template: template_hash 3
Template ID: template_id 3
Instance: contract_id 5
Image: image 4
Date (UTC): last_update minute 2""")
MEASUREMENT_COLUMNS = Columns("""\
GPU: gpu_name _
N: num_gpus {}x
Perf: measured_perf .1f
$/hr: rental_dph .4f
Perf/$: perf_per_dollar .1f
Status: status""")
GPU_METRICS_COLUMNS = Columns("""\
GPU: gpu_name _ 0
Total: total 0
Avail: available 0
Unavail: unavailable 3
Usage %: usage .1f
Rnt/Ver: rented_verified 4
Avl/Ver: avail_verified 4
Rnt/Unv: rented_unverified 5
Avl/Unv: avail_unverified 5
DLPerf: dlperf .1f 3
TFLOPS: tflops .1f 3
TFLOPS/$: tflops_per_dollar .1f 4
P10 $/hr: price_p10 .4f 2
Med $/hr: price_median .4f 0
P90 $/hr: price_p90 .4f 2""")

GPU_TRENDS_COLUMNS = Columns("""\
Date: timestamp minute 0
Rnt/Ver: rented_verified 2
Avl/Ver: avail_verified 2
Rnt/Unv: rented_unverified 2
Avl/Unv: avail_unverified 2
Unr/Ver: unavail_verified 2
Unr/Unv: unavail_unverified 2
Total: total 2
R.p10 $/hr: rented_p10 .4f
R.med $/hr: rented_median .4f
R.p90 $/hr: rented_p90 .4f
A.p10 $/hr: avail_p10 .4f
A.med $/hr: avail_median .4f
A.p90 $/hr: avail_p90 .4f""")
PIPED_TRENDS_COLUMNS = Columns(f"GPU: gpu _\n{GPU_TRENDS_COLUMNS.text}")
GPU_LOCATION_COLUMNS = Columns("""\
GPU: gpu_name _
City: city
CC: country_code
GPUs: num_gpus {}
State: state state
Verified: verified
Lat: latitude .4f
Lon: longitude .4f""")
SSH_KEY_COLUMNS = Columns("""\
ID: id
Key: key|public_key
Created: created_at minute""")
API_KEY_COLUMNS = Columns("""\
ID: id 0
Name: name 0
Rights: rights
Team: team_name 2
Permissions: permissions 3""")
ENV_COLUMNS = Columns("""\
Name: name 0
Value: value 0""")
TFA_COLUMNS = Columns("""\
ID: id 0
User: user_id 4
Primary: is_primary
Method: method 0
Label: label
Phone: phone_number 3
Created (UTC): created_at minute 3
Last used (UTC): last_used minute 2
Failures: fail_count 3
Locked until (UTC): locked_until minute 2""")
TOTP_CARD = Columns("""\
Secret: secret
URI: provisioning_uri""")
MEMBER_COLUMNS = Columns("""\
ID: id 0
User: username 0
Email: email 0
Name: fullname 2
Roles: roles join""")
ROLE_COLUMNS = Columns("""\
ID: id 0
Name: name 0
Identifier: identifier 2
Permissions: permissions""")
MACHINE_COLUMNS = Columns("""\
ID: id 0
GPUs: num_gpus 0
Model: gpu_name _ 0
Disk GB: disk_space 3
Host name: hostname 2
Driver: driver_version 5
Reliab.: reliability2 .4f 3
Status: verification state 2
IP address: public_ipaddr 4
Location: geolocation 5
Reports: num_reports 6
GPU $/hr: listed_gpu_cost .2f
Bid $/hr: min_bid_price .2f
Discount: credit_discount_max .2f 6
Up $/TB: listed_inet_up_cost .2f*1024 6
Down $/TB: listed_inet_down_cost .2f*1024 6
Occupancy: gpu_occupancy""")
MAINT_COLUMNS = Columns("""\
Machine: machine_id 0
Start (UTC): start_time minute 0
End (UTC): end_time minute 0
Hours: duration_hours
Category: maintenance_category 2""")
REPORT_COLUMNS = Columns("""\
Time: created_at minute 0
Problem: problem 0
Message: message""")
CLUSTER_COLUMNS = Columns("""\
ID: id 0
Subnet: subnet 0
Nodes: nodes count
Manager: manager 0
Manager's IP: manager_ip 2
Machines: machine_ids join 0""")
OVERLAY_COLUMNS = Columns("""\
ID: overlay_id 0
Name: name 0
Subnet: internal_subnet N/A
Cluster: cluster_id 0
Size: instances count 2
Instances: instances join""")
USER_CARD = Columns("""\
ID: id
Username: username
Email: email
Full name: fullname
Credit $: credit .2f
Balance $: balance .2f
Alert below $: balance_threshold .2f
Low-credit alert: balance_threshold_enabled
Can pay: can_pay
Card: last4
Address: billaddress_line1
: billaddress_line2
City: billaddress_city
Zip: billaddress_zip
Country: billaddress_country
Billed $: billed_verified .2f
Billing expected $: billed_expected .2f
Paid $: paid_verified .2f
Payment expected $: paid_expected .2f
Credit only: billing_creditonly
Billing set up: has_billing
Payout set up: has_payout
PayPal: paypal_email
Email verified: email_verified
Password reset: password_resettable
Signup credit: got_signup_credit
User: user
SSH key: ssh_key""")
COST_COLUMNS = Columns("""\
Kind: kind 0
ID: id 0
Label: label
State: state state 0
$/hr: hour .4f 0
Later $/hr: later .4f 2
Why: why""")
AUDIT_COLUMNS = Columns("""\
IP address: ip_address
API key: api_key_id
Time: created_at minute 0
Request: api_route 0
Arguments: args 2""")
ADDRESS_COLUMNS = Columns("""\
IP: ip
First seen: first_seen minute
From: first_location""")
DEPOSIT_CARD = Columns("""\
Refundable $: refundable_deposit .2f
Discount $: total_discount .2f
Months: discount_months""")
SUBACCOUNT_COLUMNS = Columns("""\
ID: id
Username: username
Email: email
Credit $: credit .2f""")
ITEM_COLUMNS = Columns("""\
Description: description 0
Quantity: quantity 2
Rate $: rate 3
Amount $: amount .3f 0
Time (UTC): timestamp minute
Type: type""")
EARNING_COLUMNS = Columns("""\
Day (UTC): date day 0
GPU $: gpu_earn .2f
Storage $: sto_earn .2f
Upload $: bwu_earn .2f 2
Download $: bwd_earn .2f 2
Total $: total .2f 0""")
SELF_TEST_COLUMNS = Columns("""\
Requirement: title
Has: actual .6g
: operator
Required: required .6g
Unit: unit
Status: status""")
BILL_COLUMNS = Columns("""\
ID: metadata.invoice_id 0
Created: start day
Paid: end day 2
Type: type
Amount $: amount .2f 0
Source: source 2
Description: description 3""")
CHARGE_COLUMNS = Columns("""\
Type: type 0
ID: source 0
Amount $: amount .3f 0
Start: start day
End: end day
Endpoint: metadata.endpoint_id 2
Workergroup: metadata.workergroup_id 2""")
INVOICE_COLUMNS = Columns("""\
ID: id 0
When: when minute 0
Cents: amount_cents 0
Credit: is_credit 2
Paid on: paid_on minute 2
Service: service
Before $: balance_before .2f 3
After $: balance_after .2f 3
Event: event_id 4""")
JOB_COLUMNS = Columns("""\
ID: id 0
Instance: instance_id 0
Request: api_endpoint
Start: start_time minute 2
End: end_time minute 2
Day: day_of_the_week weekday 0
Hour UTC: hour_of_the_day hour 0
Minute: min_of_the_hour min
Frequency: frequency""")
ENDPOINT_COLUMNS = Columns("""\
ID: id 0
Name: endpoint_name 0
State: endpoint_state state 0
Load: min_load 2
Target: target_util 3
Cold mult: cold_mult 3
Cold workers: cold_workers 2
Max workers: max_workers
Created: created_at minute 4""")
WORKERGROUP_COLUMNS = Columns("""\
ID: id 0
Endpoint: endpoint_id 0
Name: endpoint_name
Template: template_hash|template_id
VRAM GB: gpu_ram 2
Search: search_query|search_params 4
Launch: launch_args 5""")
WORKER_COLUMNS = Columns("""\
ID: id 0
Status: status state 0
Model: gpu_name _
Perf: measured_perf 0
URL: url 3""")
ROUTE_CARD = Columns("""\
Worker: url
Status: status
Cost: cost
Request: reqnum
Signature: signature""")
NOTIFICATION_COLUMNS = Columns("""\
Key: key 0
Meaning: display_name
Category: category 2
Email: default_preferences.email 0
Webhooks: default_preferences.webhooks 0
Email always: mandatory_email 2""")
WEBHOOK_COLUMNS = Columns("""\
ID: id 0
Name: name 0
URL: webhook_url 0
Events: event_types join
Changed: updated_at minute 2""")


# ----------------------------------------------------------------------------------- shared options
# What several commands take, and sentences that several say.

# fmt: off
CONDITIONS = Local("query", QUERY, "conditions on the fields listed below", None, cli="")
INSTANCE = Arg("id", INSTANCE_ID, "the instance", old="ID")
INSTANCES = Arg("ids", INSTANCE_IDS, "the instances")
DESTINATION = Arg("dst", GIVEN_INSTANCE_ID, "destination instance of the copies", name="dst_id", old="dst")
MACHINE = Arg("id MACHINE", ID, "the machine", old="machine_id")
LISTED_MACHINE = Arg("id MACHINE", ID, "the machine", key="machine", old="machine_id")
OFFER = Arg("id OFFER", ID, "the offer")
DEPLOYMENT = Arg("id DEPLOYMENT", ID, "the deployment")
CLUSTER = Arg("cluster_id CLUSTER", ID, "the cluster", old="id")
ENDPOINT = Arg("id ENDPOINT", ID, "the endpoint", key="endptjob_id", to="path body")
WORKERGROUP = Arg("id WORKERGROUP", ID, "the workergroup", key="autojob_id", to="path body")
SCHEDULED_JOB = Arg("id JOB", ID, "the job")
WEBHOOK = Arg("id WEBHOOK", ID, "the webhook")
ROLE = Arg("name", NAME, "the role", old="NAME")
VARIABLE_NAME = Arg("name", VARIABLE, "name of the variable", key="key")
USER_ID = Arg("--user_id", ID, "account id (default: yours)")
CLIENT = {"client_id": "me"}  # in a body
OWNER = {"owner": "me"}  # in a query
IDENTITY = Local("-i --identity", KEY_FILE, "private SSH key file")
NO_IDS = CliArg("-q --quiet", FLAG, "accepted for compatibility; no effect", hidden=True)
MAX_WAIT = Local("--max-wait", SECONDS, "Waiting | maximum wait, seconds", 600)
RESULT_WAIT = Local("--max-wait", SECONDS, "Waiting | maximum wait for the result, seconds", 60)
WAIT, WAIT_STOPPED, WAIT_GONE = (
    (Local("--wait", FLAG, f"Waiting | wait until the instance {state}"), MAX_WAIT) for state in ("runs", "has stopped", "is gone"))
CHANGED = "Instance {id} is {instance[actual_status]}.|"  # after --wait
CONFIRM = Local("--confirm", FLAG, "Waiting | if no label is given, add one, so that the instance can be found if the answer is lost")
DEMAND = "on-demand bid reserved interruptible"
RENTAL_TYPE = Local("-t --type KIND", TEXT, "rental type; interruptible is the same as bid", "on-demand", choices=DEMAND,
    shortcuts={"-i": "bid", "--interruptible": "bid", "-b": "bid", "--bid": "bid", "-r": "reserved",
    "--reserved": "reserved", "-d": "on-demand", "--on-demand": "on-demand"})
SEARCH_OPTIONS = (
    Local("-o --order", ORDER, "sort by these fields; append `-` for descending", "score-"),
    Local("--limit", COUNT, "maximum number of rows; 0 for all that the service returns"),
    Local("--storage", GB, "disk size to include in the price, GB", 1.0),
    Local("-n --no-default", FLAG, "drop the default conditions"))
OFFER_SEARCH_OPTIONS = (
    Local("-o --order", ORDER, "sort by these fields; append `-` for descending (default: score-, or the price of the job)"),
    SEARCH_OPTIONS[1],
    Local("--storage", GB, "disk size to include in the price, GB (default 5)"),
    SEARCH_OPTIONS[3])


def watch_options(interval: float) -> tuple[Arg, ...]:
    """What `watch` takes; `interval` is the default in seconds."""
    return (
        Arg("--interval", INTERVAL, "polling interval, seconds, at least 6", interval),
        Arg("--below", PRICE, "only prices below this, disk included, $/hr"),
        Arg("--exec", COMMAND_LINE, "command to run for each match, without a shell; it gets the row as JSON on stdin "
            "and VAST_ID and VAST_PRICE in its environment"),
        Arg("--once", FLAG, "end after the first match, with the status of --exec"),
        Arg("--max-wait", SECONDS, "time limit, seconds; on timeout, the exit status is 9"))


WATCH_NOTE = ("On a terminal, it redraws a table and marks what has changed. In a pipe or with --raw, it prints one JSON line per "
              "change: {\"event\", \"id\", \"row\"}. Events and their marks: new +, gone, price $")
JOB_OPTIONS = (
    Local("--hours", HOURS, "Price of the job | duration of the job, hours"),
    Local("--down", GB, "Price of the job | data to download, GB"),
    Local("--up", GB, "Price of the job | data to upload, GB"))
JUPYTER_DIR = Arg("--jupyter-dir PATH", TEXT, "Access | folder that Jupyter opens")
LAUNCH_OPTIONS = (
    Local("--env", ENV, "Image | environment, ports and mounts: '-e KEY=VALUE -p 8080:8080 -v /data:/data -h NAME'; can be "
        "repeated", secret=True, again=True),
    Arg("--label NAME", TEXT, "label for the instance"),
    Arg("--extra", TEXT_OR_OBJECT, "extra options for docker run", hidden=True),
    Local("--onstart-cmd COMMAND", TEXT, "Image | commands to run when the container starts", old="onstart entrypoint"),
    Secret("--login", TEXT, "Image | docker login options for a private image: '-u USER -p TOKEN REGISTRY'", key="image_login"),
    Arg("--python-utf8", FLAG, "Image | use UTF-8 as Python's encoding"),
    Arg("--lang-utf8", FLAG, "Image | use a UTF-8 system locale"),
    Arg("--jupyter-lab", FLAG, "Access | start JupyterLab instead of the notebook", key="use_jupyter_lab"),
    JUPYTER_DIR)
RUNTYPE_OPTIONS = (
    Local("--ssh", FLAG, "Access | enable SSH"),
    Local("--jupyter", FLAG, "Access | enable Jupyter"),
    Local("--direct", FLAG, "Access | connect directly to the machine instead of through a proxy; faster"))
ONSTART_OPTIONS = (
    CliArg("--onstart", SCRIPT, "Image | file with commands to run when the container starts; takes precedence over --onstart-cmd"),
    CliArg("--entrypoint COMMAND", TEXT, "Image | same as --onstart-cmd"))
CANCEL = Arg("--cancel-unavail", FLAG, "Price and time | fail instead of waiting if the offer cannot start now")
TEMPLATE_HASH = Arg("--template_hash HASH", NAME, "Image | hash of the template to use", key="template_hash_id",
    old="template_hash_id")
RUNTYPE = Local("--runtype", TEXT, "access type as the service names it, such as 'ssh_direc ssh_proxy'", face="sdk")
ARGS = Local("--args", WORDS, "Image | arguments for the image's entrypoint: the rest of the line", rest=True)
CREATE_OPTIONS = (
    Arg("--image", IMAGE, "Image | Docker image; optional with --template_hash"),
    Arg("--disk", GB, "Disk and volumes | disk size, GB", 10),
    LAUNCH_OPTIONS[0],
    Arg("--bid_price", PRICE, "Price and time | bid, $/hr, for an interruptible instance", name="price"),
    *LAUNCH_OPTIONS[1:],
    Arg("--force", FLAG, "skip the service's sanity checks"),
    CANCEL, TEMPLATE_HASH,
    Arg("--user USER", TEXT, "Image | container user that runs the commands"),
    RUNTYPE, ARGS,
    SdkArg("--volume-info", OBJECT, "volume as the service describes it"),
    Local("--bid-price", PRICE, "same as price, $/hr", face="sdk"),
    *RUNTYPE_OPTIONS,
    Local("--create-volume OFFER", ID, "Disk and volumes | volume offer to rent a new volume from"),
    Local("--link-volume VOLUME", ID, "Disk and volumes | one of your volumes, to mount"),
    Local("--volume-size", GB, "Disk and volumes | size of the new volume, GB (default 15)", needs="create_volume"),
    Local("--mount-path PATH", TEXT, "Disk and volumes | mount point of the volume", needs="create_volume link_volume"),
    Local("--volume-label NAME", TEXT, "Disk and volumes | label for the new volume", needs="create_volume link_volume"),
    *ONSTART_OPTIONS,
    Arg("--target_state", TEXT, "Price and time | state to start in", choices="running stopped"),
    Local("--vm", FLAG, "Image | rent a virtual machine; the image is a VM image"),
    Arg("--args_str", TEXT, "Image | arguments for the image's entrypoint as one string, instead of --args"))
MAX_HOURS = Local("--max-hours", HOURS, "Price and time | lifetime, hours: the instance destroys itself this long after its first start")
SPOT_ON_CREATE = CliArg("--spot", FLAG, "see launch instance", hidden=True)
MACHINE_OPTIONS = (  # of what rents one machine after the other until one works
    Local("--max-price", PRICE, "Price and time | highest price for GPUs and disk together, $/hr"),
    MAX_HOURS,
    Local("--spot", FLAG, "Price and time | rent an interruptible instance with a bid", None),
    Local("--bid", BID, "Price and time | bid for the whole offer, $/hr; the disk is billed on top", needs="spot"),
    Local("--bid-over", PERCENT, "Price and time | margin over the lowest bid, percent (default 10)", needs="spot"),
    Local("--tries", ATTEMPTS, "Offer | maximum number of machines to try, one after the other (default 3)"),
    Local("--start-timeout", SECONDS, "Offer | maximum wait for each machine to start, seconds (default 900)"),
    Local("--exclude-machine MACHINE", IDS, "Offer | machine to skip; can be repeated", again=True))
LEASE_NOTE = ("--max-hours adds a small script that runs before your startup commands. The time counts from the container's "
              "first start and continues through restarts. When time is up, the instance destroys itself with the key that "
              "the service gives to each container. To extend or shorten the time, write another Unix time to "
              "/var/lib/vastai-lease. The script cannot work if the image has none of curl, GNU wget and python3, if the instance is "
              "stopped or still loading, or if the host's clock jumps.")
TEMPLATE_OPTIONS = (
    Arg("--name", TEXT, "Description | name of the template"),
    Arg("--image", IMAGE, "Image | Docker image"),
    Arg("--image_tag NAME", TEXT, "Image | image tag", key="tag"),
    Arg("--href URL", TEXT, "Description | URL of the image's web page"),
    Arg("--repo REPO", TEXT, "Image | image repository"),
    Local("--login", TEXT, "Image | docker login options for a private image; only the registry is saved",
        secret=True),
    Secret("--env", ENV_TEXT, "Image | environment, ports and mounts, as for create instance; can be repeated", again=True),
    *RUNTYPE_OPTIONS,
    JUPYTER_DIR,
    Local("--jupyter-lab", FLAG, "Access | start JupyterLab instead of the notebook"),
    Arg("--onstart-cmd COMMAND", TEXT, "Image | commands to run when the container starts", key="onstart"),
    Local("--search_params QUERY", TEXT, "Offer | conditions on offers, as for search offers"),
    Local("-n --no-default", FLAG, "Offer | drop the default conditions"),
    Arg("--disk_space", GIVEN_GB, "Offer | recommended disk size, GB", key="recommended_disk_space"),
    Arg("--readme", TEXT, "Description | readme text for its users"),
    Local("--hide-readme", FLAG, "Description | hide the readme"),
    Arg("--desc", TEXT, "Description | one-line description"),
    Local("--public", FLAG, "Description | make the template public"),
    SdkArg("--runtype", TEXT, "access type as the service names it: jupyter, ssh or args"),
    *(SdkArg(f"--{name}", FLAG, f"the service's member {name}, instead of the flags", None)
      for name in ("use_ssh", "jup_direct", "ssh_direct", "use_jupyter_lab")),
    SdkArg("--docker_login_repo", TEXT, "registry, instead of login"),
    SdkArg("--extra_filters", OBJECT, "conditions as the service stores them, instead of search_params"),
    *(SdkArg(f"--{name}", FLAG, f"the service's member {name}, instead of the flags", None)
      for name in ("readme_visible", "private")),
    SdkArg("--docker_login_user USER", TEXT, "registry user"),
    SdkArg("--docker_login_pass", TEXT, "registry password or token", secret=True),
    SdkArg("--args_str", TEXT, "arguments for the image's entrypoint, for runtype args"),
    SdkArg("--volume_info", OBJECT, "volume that the console suggests, as the service stores it"))
VOLUME_SIZE = Arg("-s --size", WHOLE_GB, "size, whole GB", 15)
VOLUME_NAME = Arg("-n --name", NAME, "name for the volume")
PRICE_DISK = Arg("-p --price_disk", PRICE, "price, $/GB/month", 0.10)
OFFER_END = Arg("-e --end_date", COMING,
    "end of the offer, UTC (default: chosen by the service)")
EITHER = "true false all"
MARKET_OPTIONS = (
    Local("--verified", TEXT, "only verified machines (true) or only others (false)", "all", choices=EITHER),
    Local("--datacenter", TEXT, "only machines in data centers (true) or only others (false)", "all", choices=EITHER))
MARKET_SIZE = Arg("--num-gpus N", TEXT, "only machines with this many GPUs", "all",
    choices="all 1 2 4 8 other")
FOR_HOSTS = "Nothing to show. These numbers are only for hosts with a machine."
TFA_METHODS = "email sms totp"
TFA_PROOF = (
    Secret("-c --code", CODE, "code from the app, SMS or email"),
    Secret("-bc --backup-code", CODE, "one of your backup codes, instead of a code"),
    Arg("-t --method-type", TEXT, "method that the code came from", key="tfa_method", choices=TFA_METHODS),
    Secret("-s --secret", CODE, "secret that tfa send-sms or tfa send-email printed"),
    Arg("-id --method-id", GIVEN_ID, "id of the method, if you have several of one kind", key="tfa_method_id"))
PHONE = Arg("-p --phone-number NUMBER", TEXT, "phone number, such as +12025550123 (default: the account's)",
    sent=lambda number: number or None)
AUTH_NEW_END = Command("tfa auth-new", "PUT /tfa/authorize-new-method/", ONCE, SETS, "Complete the second step of tfa auth-new",
    Secret("secret", NAME), Secret("code", NAME), look="tfa status")
LISTING = (
    Arg("-g --price_gpu", PRICE, "price per GPU, $/hr"),
    Arg("-s --price_disk", PRICE, "storage price, $/GB/month (default 0.10)"),
    Arg("-u --price_inetu", PRICE, "upload price, $/GB"),
    Arg("-d --price_inetd", PRICE, "download price, $/GB"),
    Arg("-b --price_min_bid", PRICE, "lowest bid per GPU, $/hr"),
    Arg("-m --min_chunk", COUNT, "minimum number of GPUs per rental", 1),
    Arg("-e --end_date", COMING, "last day of the offer, UTC, such as 2026-01-31"),
    Arg("-r --discount_rate", SHARE, "largest discount for prepayment; 0.4 means 40%", key="credit_discount_max"),
    Arg("-l --duration SPAN", TEXT,
        "keep the offer's end this far ahead, renewed daily: '3 weeks', '6 months' or seconds; not with --end_date"),
    Arg("-v --vol_size GB", COUNT, "space to offer for volumes, GB; 0 for none (default: half of the disk)"),
    Arg("-z --vol_price", PRICE, "volume price, $/GB/month (default: price_disk)"))
ITEM_OPTIONS = (
    Local("-s --start_date", DATE, "start date, UTC (default: a day before the end)"),
    Local("-e --end_date", DATE, "end date, UTC (default: now)"),
    Local("-c --only_charges", FLAG, "only charges"),
    Local("-p --only_credits", FLAG, "only payments"))
EARNINGS = ("gpu_earn", "sto_earn", "bwu_earn", "bwd_earn")
PDF = Local("--pdf", OUT_FILE, "also write the rows to this PDF file")
INVOICE_TYPES = parse_table("""\
transfers: transfer
stripe: stripe_payments
bitpay: bitpay
coinbase: coinbase
crypto.com: crypto.com
reserved: instance_prepay
payout_paypal: paypal_manual
payout_wise: wise_manual""")
CHARGE_TYPES = parse_table("""\
instance: instance
volume: volume
serverless: serverless
i: instance
v: volume
s: serverless""")
SCALER = Arg("--auto_instance", TEXT, "autoscaler to use", "prod", key="autoscaler_instance", hidden=True)


def endpoint_options(load: float | None = None, target: float | None = None, multiple: float | None = None,
                     cold: int | None = None, most: int | None = None) -> tuple[Arg, ...]:
    """What a serverless endpoint takes, with these defaults."""
    return (
        Arg("--min_load", NUMBER, "lowest load to be ready for, performance units per second, such as tokens/s", load),
        Arg("--min_cold_load", NUMBER, "lowest load to be ready for, including workers that must start first", load),
        Arg("--target_util", NUMBER, "target share of capacity in use, up to 1", target),
        Arg("--cold_mult", NUMBER, "stopped capacity to hold ready, as a multiple of the running capacity", multiple),
        Arg("--cold_workers", COUNT, "workers to hold ready without load", cold),
        Arg("--max_workers", COUNT, "maximum number of workers", most),
        Arg("--endpoint_name", TEXT, "endpoint name, used by programs to reach it"),
        Arg("--max_queue_time SECONDS", NUMBER, "maximum time that a request waits at a worker, seconds"),
        Arg("--target_queue_time SECONDS", NUMBER, "target time to clear a queue, seconds"),
        Arg("--inactivity_timeout SECONDS", WHOLE, "idle time before all workers are stopped, seconds"),
        SCALER)


WORKERGROUP_OPTIONS = (
    Arg("--template_hash HASH", NAME, "hash of the workers' template; brings its own search conditions"),
    Arg("--template_id", ID, "id of the workers' template"),
    Local("--search_params QUERY", TEXT, "conditions on offers, as for search offers"),
    Secret("--launch_args", TEXT, "options of create instance: '--disk 64 --env \"-e KEY=VALUE\"'"),
    Arg("--endpoint_name", TEXT, "name of the endpoint"),
    Arg("--endpoint_id ENDPOINT", ID, "id of the endpoint"),
    Arg("--gpu_ram", GB, "GPU memory per worker, GB"),
    Local("-n --no-default", FLAG, "drop the default conditions verified=true rentable=true rented=false"),
    *(arg for arg in endpoint_options()
      if arg.name in ("min_load", "target_util", "cold_mult", "cold_workers", "max_workers")),
    Arg("--test_workers", COUNT, "workers to benchmark the template on"))
LOG_OPTIONS = (
    Local("--level", COUNT, "log level: 0 least, 1 info, 2 trace, 3 debug", 1, choices=(0, 1, 2, 3)),
    Arg("--tail", COUNT, "number of lines from the end"))
WEBHOOK_SECRET = "signs with the secret {webhook[webhook_secret]}. Save it now; it is shown only once."


# ---------------------------------------------------------------------------------------- THE TABLE

register("Search and rent",
    Command("search offers", "POST /bundles/ -> offers[]", SAFE, READS, "Search GPU offers to rent",
        CONDITIONS,
        RENTAL_TYPE, *OFFER_SEARCH_OPTIONS, *JOB_OPTIONS,
        CliArg("--new", FLAG, "use the newer search service"),
        Local("--disable-bundling", FLAG, "list identical offers separately (deprecated)", hidden=True),
        of="Offer", columns=OFFER_COLUMNS, run="run_search_offers", rows="offers_shown",
        document="offers_shown", columns_for="offer_columns", footer="offers_footer",
        aliases="search instances", auth=False, fields=OFFER_FIELDS,
        note="Default conditions: verified=true external=false rentable=true. FIELD=any drops one of them; --no-default "
             "drops all. With --hours, --down or --up, each offer shows the price of the whole job, including traffic and the "
             "time to fetch the data, and the cheapest come first.",
        examples="""\
'gpu_name=RTX_4090 num_gpus=1 reliability>0.99' -o dph
'gpu_ram>=40 dph<2 geolocation in [US,CA]' --limit 5
gpu_name=RTX_4090 --hours 6 --down 80 --up 5 --storage 120
--interruptible 'num_gpus>=4 inet_down>500'"""),
    Command("watch offers", "-> none", SAFE, READS, "Watch for new offers that match",
        CONDITIONS, RENTAL_TYPE, *OFFER_SEARCH_OPTIONS[2:], *watch_options(60),
        run="run_watch_offers", face="cli", auth=False, fields=OFFER_FIELDS,
        note=WATCH_NOTE + ". A machine counts once, with its cheapest offer. Offers found by the first check count as matches.",
        examples="""\
'gpu_name=RTX_4090 num_gpus=1' --below 0.30
gpu_name=H100_SXM --below 1.8 --once && vastai launch instance …"""),
    Command("watch instances", "-> none", SAFE, READS, "Watch your instances and their use",
        *watch_options(10),
        run="run_watch_instances", face="cli", look="show instances",
        note=WATCH_NOTE + ", state *, outbid !, disk ! (over 90% full). A match is any change after the first check.",
        examples="\n--raw | jq -r .event\n--exec 'notify-send vastai' --interval 30"),
    Command("search offers-new", "PUT /search/asks/ -> offers[]", SAFE, READS, "Search GPU offers with the newer service",
        Local("query", QUERY, "conditions as for search offers", None),
        Local("--type KIND", TEXT, "rental type", "on-demand", choices=DEMAND),
        *OFFER_SEARCH_OPTIONS,
        of="Offer", columns=OFFER_COLUMNS, run="run_search_offers", rows="offers_shown", auth=False, face="sdk"),
    Command("search templates", "GET /template/ -> templates[]", SAFE, READS, "Search templates to start instances from",
        CONDITIONS, of="Template", columns=TEMPLATE_COLUMNS, build="build_filter_search", fields=TEMPLATE_FIELDS,
        examples="'count_created>100'\n'name=vLLM recommended=true'"),
    Command("show template", "GET /template/", SAFE, READS, "Show one template in full",
        Local("id TEMPLATE", TEXT_ID, "hash or id of the template, from search templates"), of="Template",
        columns=TEMPLATE_CARD, run="run_show_template", look="search templates",
        examples="88201\n631aeada9627e5cc9ce0e9a3d36b1113"),
    Command("create instance", "PUT /asks/{id}/", ONCE, SPENDS, "Rent an offer as a new instance",
        Arg("id OFFER", ID, "the offer, from search offers", old="ID"),
        *CREATE_OPTIONS, *WAIT, CONFIRM, MAX_HOURS, SPOT_ON_CREATE,
        of="CreatedInstance", body=CLIENT, needs="image template_hash",
        either="price bid_price, create_volume link_volume", build="build_instance", run="run_create_instance",
        piped="Started. {answer}", made="new_contract", footer="rented_footer",
        says="rented_sentence",
        note="Billing starts immediately and runs until `vastai destroy instance INSTANCE`. The instance is not running yet when the "
             "service answers: wait with --wait or `vastai wait instance INSTANCE`, then open a shell with "
             "`vastai ssh INSTANCE`. " + LEASE_NOTE,
        examples="""\
6995713 --image pytorch/pytorch --disk 40 --ssh --direct
6995713 --template_hash 661d064bbda1f2a1 --label train
6995713 --image vllm/vllm-openai --env '-p 8000:8000' --args --model Qwen/Qwen3-8B"""),
    Command("create instances", "POST /asks/bulk/", ONCE, SPENDS, "Rent several offers with the same options",
        Arg("ids OFFER", IDS, "the offers, from search offers"),
        *CREATE_OPTIONS, MAX_HOURS, SPOT_ON_CREATE,
        body=CLIENT, needs="image template_hash", either="price bid_price, create_volume link_volume",
        build="build_instance", run="run_bulk", made="new_contracts",
        done="Renting offers {ids} as instances {new_contracts}. Stop paying with `vastai destroy instances IDS`.",
        note=LEASE_NOTE,
        examples="6995713 6995714 --image pytorch/pytorch --disk 40 --ssh --direct --label train"),
    Command("launch instance", "PUT /launch_instance/", ONCE, SPENDS, "Find the best offer and rent it",
        Local("-g --gpu-name GPU", NAME, "Offer | GPU model, such as RTX_4090"),
        Local("-n --num-gpus N", TEXT, "Offer | number of GPUs: 1, 2, 4, 8, 12 or 14"),
        Arg("-i --image", IMAGE, "Image | Docker image"),
        Local("-r --region REGION", TEXT, "Offer | North_America, South_America, Europe, Asia, Oceania, Africa, or countries: [US,CA]"),
        Arg("-d --disk", GB, "Disk and volumes | disk size, GB", 10, cli=16.0),
        Local("-o --order", ORDER, "Offer | sort offers by these fields, best first; append `-` for descending (default: score-; "
            "with --query and its options dph_total)"),
        Local("--limit", COUNT, "Offer | number of offers to try", cli=3),
        *LAUNCH_OPTIONS,
        CANCEL, TEMPLATE_HASH, RUNTYPE, ARGS,
        Local("--query", QUERY, "Offer | conditions as for search offers, instead of GPU and region", many=False),
        *RUNTYPE_OPTIONS, *MACHINE_OPTIONS, *ONSTART_OPTIONS, *WAIT, CONFIRM,
        of="CreatedInstance", needs="image template_hash", either="bid bid_over",
        build="build_launch", run="run_launch", fields=OFFER_FIELDS,
        piped="Started. {answer}", made="new_contract", footer="rented_footer",
        says="rented_sentence",
        note="With --query or an option such as --max-price, it first says what it will rent and at what price, waits until "
             "the instance runs as ordered, and destroys any that does not before trying the next machine. " + LEASE_NOTE,
        examples="""\
-g RTX_4090 -n 1 -i pytorch/pytorch --ssh --direct
-g H100_SXM -n 8 -i vllm/vllm-openai -r Europe -d 200
--query 'gpu_name=RTX_4090 reliability>0.98' -i pytorch/pytorch --max-price 0.45 --max-hours 8"""),
    Command("run", "", ONCE, SPENDS, "Run a command on a rented machine",
        Arg("image", IMAGE, "Docker image"),
        Arg("command COMMAND", WORDS, "command and its arguments, after --", many=True),
        Arg("--gpu", GPU, "Offer | GPU model and number, such as RTX_4090:2 (default: the cheapest single GPU)"),
        Arg("--query QUERY", TEXT, "Offer | conditions as for search offers, instead of --gpu"),
        Arg("-o --order", ORDER, "Offer | sort offers by these fields, best first; append `-` for descending "
            "(default dph_total)"),
        *MACHINE_OPTIONS,
        Arg("--disk", GB, "Disk and volumes | disk size, GB", 10),
        LAUNCH_OPTIONS[0],
        Secret("--login", TEXT, "Image | docker login options for a private image: '-u USER -p TOKEN REGISTRY'"),
        Arg("--label NAME", TEXT, "label for the instance"),
        Arg("--upload LOCAL[:REMOTE]", TEXTS, "Files | file or folder to copy to /workspace before the command; can be "
            "repeated", again=True),
        Arg("--download REMOTE[:LOCAL]", TEXTS, "Files | file or folder to copy back after the command; can be repeated",
            again=True),
        Arg("--keep", FLAG, "keep the instance after the command ends"),
        IDENTITY,
        either="gpu query, bid bid_over", run="run_job", show="show_job", status="status", fields=OFFER_FIELDS,
        note="The command's own exit status is the result. The instance is destroyed at the end or when you interrupt the run. If "
             "this computer disconnects or shuts down, the command continues, and the instance destroys itself after --max-hours "
             "(default 24). If a download fails, the instance stays for one more hour. " + LEASE_NOTE,
        examples="""\
pytorch/pytorch --gpu RTX_4090 --upload src --download out -- python src/train.py
ubuntu:24.04 --max-price 0.2 -- nvidia-smi"""),
    look="show instances")

register("Instances",
    Command("show instances", "GET /api/v1/instances/ -> instances[]", SAFE, READS, "List your instances",
        Local("-s --status STATE", TEXTS, "Filters | only these states: running, loading, exited, created"),
        Local("--label", TEXTS, "Filters | only these labels; '' for instances without a label"),
        Local("--gpu-name GPU", TEXTS, "Filters | only these models"),
        Local("--verification", TEXTS, "Filters | only machines with this verification",
            choices="verified unverified deverified"),
        Local("--order-by COLUMN", TEXTS, "Pages | sort by 'COLUMN' or 'COLUMN desc'; can be repeated", again=True),
        Local("-l --limit", WHOLE, "Pages | page size, 1 to 25; prints one page"),
        Local("-t --next-token TOKEN", TEXT, "Pages | token of the next page"),
        Local("-a --all", FLAG, "Pages | get all pages, even with --limit"),
        CliArg("-v --verbose", FLAG, "show more columns"),
        CliArg("-q --quiet", FLAG, "print only ids, even with --raw", name="ids_only"),
        CliArg("--cols COLUMNS", TEXT, "columns to show, separated by commas: id, status, label, gpu, disk, volumes, dph, image, age, "
                            "verified, machine, net, location, template, ssh, msg"),
        of="Instance", columns=INSTANCE_COLUMNS, run="run_show_instances",
        columns_for="instance_columns", document="page_document", footer="instances_footer",
        aliases="show instances-v1",
        examples="""\
--status running
--label train --order-by 'dph_total desc'
--raw | jq '.[].ssh_host'"""),
    Command("show instances-v1", "GET /api/v1/instances/", SAFE, READS, "Get one page of instances as received",
        Arg("params", OBJECT, "select_filters, order_by, select_cols, limit, after_token", None, key="*"), face="sdk"),
    Command("show instance-filters", "GET /instances/filters/ -> filters[]", SAFE, READS,
        "List the states, models and verifications in use",
        face="sdk"),
    Command("show instance", "GET /instances/{id}/ -> instances", SAFE, READS, "Show one instance in full",
        Arg("id", INSTANCE_ID, "the instance", old="ID INSTANCE_ID"),
        query=OWNER, of="Instance", each="tidy_instance", columns=INSTANCE_CARD,
        look="show instances", examples="""\
4242
4242 --fields id,ssh_host,ssh_port
4242 --raw"""),
    Command("start instance", "PUT /instances/{id}/", SAFE, SPENDS, "Start a stopped instance",
        INSTANCE, *WAIT, body={"state": "running"}, run="run_change_state",
        done=CHANGED + "Starting instance {id}.", examples="4242\n4242 --wait"),
    Command("stop instance", "PUT /instances/{id}/", SAFE, SETS, "Stop an instance; its disk is still billed",
        INSTANCE, *WAIT_STOPPED, body={"state": "stopped"}, run="run_change_state",
        done=CHANGED + "Stopping instance {id}.", footer="stopped_footer"),
    Command("destroy instance", "DELETE /instances/{id}/", SAFE, DELETES, "Destroy an instance and delete its data",
        INSTANCE, *WAIT_GONE,
        ask="Destroy instance {id} and all its data?", run="run_destroy_instance", done="Destroyed instance {id}.",
        footer="volumes_footer", examples="4242\n4242 --yes --wait"),
    Command("start instances", "PUT /instances/", SAFE, SPENDS, "Start several stopped instances",
        INSTANCES,
        body={"state": "running"}, run="run_bulk", done="Starting instances {ids}."),
    Command("stop instances", "PUT /instances/", SAFE, SETS, "Stop several instances; disks are still billed",
        INSTANCES,
        body={"state": "stopped"}, run="run_bulk", done="Stopping instances {ids}."),
    Command("destroy instances", "DELETE /instances/", SAFE, DELETES, "Destroy several instances and delete their data",
        Arg("ids", INSTANCE_IDS, "the instances", key="instance_ids"),
        ask="Destroy instances {ids} and all their data?", run="run_bulk", done="Destroyed instances {ids}."),
    Command("reboot instance", "PUT /instances/reboot/{id}/", ONCE, SETS, "Restart the container and keep its GPU",
        INSTANCE, *WAIT, run="run_change_state",
        schedule="schedule_job", made="scheduled_job_id",
        done="Scheduled job {scheduled_job_id} to reboot instance {id}.|" + CHANGED + "Rebooting instance {id}."),
    Command("recycle instance", "PUT /instances/recycle/{id}/", ONCE, SETS, "Recreate the container and keep its GPU",
        INSTANCE, *WAIT, run="run_change_state", done=CHANGED + "Recreating the container of instance {id}.",
        ask="Recreate the container of instance {id}? All data outside volumes is lost.", ask_when="terminal"),
    Command("label instance", "PUT /instances/{id}/", SAFE, SETS, "Set or clear an instance's label",
        INSTANCE, Arg("label", TEXT, "label; '' removes it"),
        done="Labeled instance {id} {label!r}.", examples="4242 train\n4242 ''"),
    Command("update instance", "PUT /instances/update_template/{id}/", SAFE, SETS,
        "Change an instance's template, image or startup",
        Arg("id", INSTANCE_ID, "the instance", old="ID", to="path body"),
        Arg("--template_id", ID, "id of the template"),
        Arg("--template_hash_id HASH", NAME, "hash of the template"),
        Arg("--image", IMAGE, "Docker image"),
        Arg("--args", WORDS, "arguments for the entrypoint"),
        Secret("--env", ENV, "environment: '{\"KEY\": \"VALUE\"}', or as for create instance", again=True),
        Arg("--onstart", SCRIPT_OR_TEXT, "startup commands, or a file with them"),
        build="build_update_instance", needs="*", done="Changed instance {id}; its image is {updated_instance[image_uuid]}.|Changed instance {id}."),
    Command("prepay instance", "PUT /instances/prepay/{id}/", ONCE, SPENDS,
        "Prepay a reserved instance for a discount",
        INSTANCE, Arg("amount", DOLLARS, "amount to pay, $"),
        done="Prepaid ${amount:.2f} for instance {id}; months: {timescale:g}, discount: {discount_rate:.1%}.",
        look="show deposit",
        ask="Prepay ${amount:.2f} for instance {id}?", ask_when="terminal"),
    Command("change bid", "PUT /instances/bid_price/{id}/", SAFE, SPENDS, "Change the bid of an interruptible instance",
        INSTANCE,
        Arg("--price", PRICE, "new bid, $/hr (default: a bid that wins now)"),
        body=CLIENT, schedule="schedule_job", made="scheduled_job_id",
        done="Scheduled job {scheduled_job_id} to change the bid of instance {id}.|The bid for instance {id} is now "
             "${price}/hr.|Changed the bid for instance {id}.", examples="""\
4242 --price 0.35
4242"""),
    Command("execute", "PUT /instances/command/{id}/ -> text", ONCE, SETS, "Run ls, rm or du on an instance",
        INSTANCE, Arg("command", NAME, "command as one quoted argument: 'ls -l'", old="COMMAND"), RESULT_WAIT,
        run="run_logs", text="without_folder", schedule="schedule_job", made="scheduled_job_id",
        done="Scheduled job {scheduled_job_id} to run the command on instance {id}.", examples="""\
4242 'ls -l /workspace'
4242 'du -d2 -h'"""),
    Command("logs", "PUT /instances/request_logs/{instance_id}/ -> text", SAFE, READS, "Print an instance's logs",
        Arg("instance_id", INSTANCE_ID, "the instance", old="id ID INSTANCE_ID"),
        Arg("--tail", LINES, "number of lines from the end", sent=lambda lines: lines or None),
        Arg("--filter REGEX", TEXT, "regular expression that lines must match", sent=lambda text: text or None),
        Arg("--daemon-logs", FLAG, "print the machine's log about the instance, not the container's",
            sent=lambda on: "true" if on else None), RESULT_WAIT,
        CliArg("-f --follow", FLAG, "keep printing new lines until the instance stops"),
        run="run_logs", text="without_blank_lines", show="show_logs", look="show instances",
        examples="4242 --tail 100\n4242 --filter 'ERROR|WARN'\n4242 -f"),
    Command("wait instance", "", SAFE, READS, "Wait until an instance reaches a state",
        INSTANCE,
        Arg("--status STATE", TEXT, "state to wait for", "running",
            choices="running loading exited destroyed"),
        MAX_WAIT, Arg("--poll", SECONDS, "polling interval, seconds; grows up to threefold", 5),
        of="Instance", columns=INSTANCE_CARD, run="run_wait", look="show instances",
        note="Fails at once if the state can no longer be reached. On timeout, the exit status is 9.",
        examples="4242\n4242 --status exited --max-wait 3600\n4242 && vastai ssh 4242"),
    Command("ssh", "-> none", ONCE, SETS, "Open an instance's shell or run a command",
        INSTANCE, Arg("command", TEXTS, "rest of the line, passed to ssh unchanged: ssh options and a command", None, rest=True), IDENTITY,
        run="run_ssh", face="cli",
        note="Connects directly to the machine if it answers, otherwise through the proxy. Put vastai's own options before INSTANCE.",
        examples="""\
4242
4242 ls -la /workspace
4242 -L 8080:localhost:8080
-i ~/.ssh/id_ed25519 4242"""),
    Command("scp", "-> none", ONCE, SETS, "Copy files to or from an instance",
        Arg("source", PLACE, "INSTANCE:PATH or a local path"),
        Arg("target", PLACE, "INSTANCE:PATH or a local path"), IDENTITY,
        Arg("-r --recursive", FLAG, "copy whole folders"),
        run="run_scp", face="cli",
        examples="4242:/workspace/model.pt .\n-r data 4242:/workspace/"),
    Command("ssh-url", "-> text", SAFE, READS, "Print an instance's ssh:// address",
        INSTANCE, CliArg("--all", FLAG, "also print the proxy's address"),
        run="run_address", look="show instances", examples="4242\n4242 --all"),
    Command("scp-url", "-> text", SAFE, READS, "Print an instance's scp:// address",
        INSTANCE, CliArg("--all", FLAG, "also print the proxy's address"),
        run="run_address", look="show instances"),
    look="show instances")

register("Templates",
    Command("create template", "POST /template/", ONCE, SETS, "Save an image with options as a template",
        *TEMPLATE_OPTIONS, build="build_template", made="template.id",
        done="Created template {template[id]} with hash {template[hash_id]}.",
        examples="--name vllm --image vllm/vllm-openai --env '-p 8000:8000' --ssh --search_params 'gpu_ram>=24'"),
    Command("update template", "PUT /api/v1/template/", SAFE, SETS, "Replace a template; its hash changes",
        Arg("hash_id HASH", NAME, "hash of the template", old="HASH_ID"), *TEMPLATE_OPTIONS,
        build="build_template_change", run="run_update_template", needs="*",
        done="Replaced template {template[id]}; its hash is now {template[hash_id]}.",
        note="Options that you leave out stay unchanged. --ssh, --jupyter and --direct replace the access type together; "
             "--direct alone keeps SSH or Jupyter."),
    Command("delete template", "DELETE /template/", SAFE, DELETES, "Delete one of your templates",
        Arg("--template-id", ID, "id of the template"),
        Arg("--hash-id HASH", NAME, "hash of the template; takes precedence over the id"),
        build="build_delete_template", needs="template_id hash_id", done="Deleted template {hash_id}.|Deleted template {template_id}."),
    look="search templates")

register("Volumes",
    Command("search volumes", "POST /volumes/search/ -> offers[]", SAFE, READS, "Search volume offers on single machines",
        CONDITIONS, *SEARCH_OPTIONS,
        columns=VOLUME_OFFER_COLUMNS, build="build_volume_search", auth=False, fields=VOLUME_FIELDS,
        note="Default conditions: verified=true external=false disk_space>=1. --no-default drops them.",
        examples="""\
'disk_space>=100 geolocation in [SE,NO]' -o storage_cost
machine_id=36683"""),
    Command("search network-volumes", "POST /network_volumes/search/ -> offers[]", SAFE, READS,
        "Search network volume offers in clusters",
        CONDITIONS, *SEARCH_OPTIONS,
        columns=NETWORK_VOLUME_OFFER_COLUMNS, build="build_volume_search", auth=False, fields=VOLUME_FIELDS,
        note="Default conditions: verified=true external=false disk_space>=1. --no-default drops them.",
        examples="'nw_disk_avg_bw>=1000' -o storage_cost"),
    Command("show volumes", "GET /volumes -> volumes[]", SAFE, READS, "List your volumes",
        Arg("-t --type KIND", TEXT, "kind of volumes to list", "all", choices="all local network",
            sent=lambda kind: f"{kind}_volume"),
        of="Volume", each="tidy_volume", columns=VOLUME_COLUMNS, query=OWNER),
    Command("create volume", "PUT /volumes/", ONCE, SPENDS, "Rent a volume on one machine",
        Arg("id OFFER", ID, "the offer, from search volumes"), VOLUME_SIZE, VOLUME_NAME,
        made="volume_name", rents=True, done="Rented volume {volume_name}.", examples="555001 --size 100 --name data"),
    Command("create network-volume", "PUT /network_volumes/", ONCE, SPENDS, "Rent a network volume in a cluster",
        Arg("id OFFER", ID, "the offer, from search network-volumes"), VOLUME_SIZE, VOLUME_NAME,
        made="volume_name", rents=True, done="Rented network volume {volume_name}."),
    Command("clone volume", "POST /volumes/copy/", ONCE, SPENDS, "Rent a volume and copy another into it",
        Arg("source VOLUME", ID, "the volume to copy", key="src_id"),
        Arg("dest OFFER", ID, "the offer, from search volumes", key="dst_id"),
        Arg("-s --size", GB, "size, GB, at least the source's (default: the source's)"),
        Arg("-d --disable_compression", FLAG, "do not compress during the copy", sent=lambda on: on or None),
        made="volume_name", rents=True, done="Copying volume {source} to the new volume {volume_name}."),
    Command("delete volume", "DELETE /volumes/", SAFE, DELETES, "Delete an unused volume and its data",
        Arg("id VOLUME", ID, "the volume", to="query"), done="Deleted volume {id}.",
        ask="Delete volume {id} and all its data?", ask_when="terminal"),
    look="show volumes")

register("Volumes (for hosts)",
    Command("list volume", "POST /volumes/", ONCE, SETS, "Offer a machine's disk space as volumes",
        Arg("id MACHINE", ID, "the machine", key="machine"), VOLUME_SIZE, PRICE_DISK, OFFER_END,
        made="id", done="Offered volumes on machine {id} at ${price_disk}/GB/month as offer {answer[id]}."
             "|Offered volumes on machine {id} at ${price_disk}/GB/month."),
    Command("list volumes", "POST /volumes/", ONCE, SETS, "Offer several machines' disk space as volumes",
        Arg("ids MACHINE", IDS, "the machines", key="machine"), VOLUME_SIZE, PRICE_DISK, OFFER_END,
        made="id", done="Offered volumes on machines {ids} at ${price_disk}/GB/month as offer {id}."
             "|Offered volumes on machines {ids} at ${price_disk}/GB/month."),
    Command("unlist volume", "POST /volumes/unlist", SAFE, SETS, "Stop offering a volume",
        OFFER, done="Volume offer {id} is no longer listed."),
    Command("list network-volume", "POST /network_volumes/", ONCE, SETS, "Offer space on a network disk",
        Arg("disk_id DISK", ID, "the network disk, from show network-disks"),
        Arg("-p --price_disk", PRICE, "price, $/GB/month", 0.15), VOLUME_SIZE, OFFER_END,
        look="search network-volumes",
        made="id", done="Offered space on network disk {disk_id} at ${price_disk}/GB/month as offer {id}."
             "|Offered space on network disk {disk_id} at ${price_disk}/GB/month."),
    Command("unlist network-volume", "POST /network_volumes/unlist/", SAFE, SETS, "Stop offering a network volume",
        OFFER, look="search network-volumes", done="Network volume offer {id} is no longer listed."),
    Command("show network-disks", "GET /network_disk/", SAFE, READS, "List your clusters' network disks and mounts",
        member="data", columns=Columns("Cluster: cluster_id"), tables="network_disk_tables",
        empty="No network disks."),
    Command("add network-disk", "POST /network_disk/", ONCE, SETS, "Attach a network disk to cluster machines",
        Arg("machines MACHINE", IDS, "the machines"), Arg("mount_point", NAME, "mount point on the machines, such as /mnt/disk1"),
        Arg("-d --disk_id", ID, "disk id, if the service already knows the disk"),
        look="show network-disks", done="Attached network disk {disk_id} to machines {machines}."),
    look="search volumes", hosts=True)

register("Copies and backups",
    Command("copy", "PUT /commands/copy_direct/", ONCE, SETS, "Copy files to, from and between instances",
        Local("src", PLACE, "source"),
        Local("dst", PLACE, "destination"),
        CliArg("-i --identity", KEY_FILE, "private SSH key file"),
        CliArg("--exclude PATTERN", TEXTS, "rsync pattern of files to leave out; can be repeated",
            again=True),
        build="build_copy", run="run_copy",
        done="{copied} {src} to {dst} at {dst_addr}.|{copied} {src} from {src_addr} to {dst}."
             "|Copying {src} to {dst}. Check progress with `vastai show instances`.",
        note="SRC and DST are INSTANCE:PATH or C.INSTANCE:PATH, V.VOLUME:PATH, s3.ID:PATH, drive.ID:PATH … (a "
             "connection, from show connections), vast.ID:PATH (a backup), local:PATH or PATH (this computer; needs "
             "rsync and ssh). Do not copy to / or /root of an instance: its SSH keys are there.",
        examples="""\
6003036:/workspace/ 6003038:/workspace/
local:data C.6003036:/workspace/data --exclude '*.tmp'
6003036:/workspace/out results
s3.101:/data/ 6003036:/workspace/"""),
    Command("cancel copy", "DELETE /commands/copy_direct/", SAFE, SETS, "Cancel all copies to an instance",
        DESTINATION,
        body=CLIENT, done="Canceled the copies to instance {dst_id}."),
    Command("cancel sync", "DELETE /commands/rclone/", SAFE, SETS, "Cancel all cloud copies to an instance",
        DESTINATION,
        body=CLIENT, done="Canceled the cloud copies to instance {dst_id}."),
    Command("cloud copy", "POST /commands/rclone/", ONCE, SETS, "Copy between an instance and cloud storage",
        Arg("--src PATH", NAME, "path to copy from", REQUIRED),
        Arg("--dst PATH", NAME, "path to copy to", "/workspace"),
        Arg("--instance", GIVEN_INSTANCE_ID, "the instance", key="instance_id"),
        Arg("--connection", GIVEN_ID, "cloud storage connection, from show connections", key="selected"),
        Arg("--transfer", TEXT, "direction: 'Instance to Cloud' or 'Cloud to Instance'", "Instance to Cloud"),
        Local("--dry-run", FLAG, "only show what would be copied"),
        Local("--size-only", FLAG, "compare only sizes, not times or checksums"),
        Local("--ignore-existing", FLAG, "skip files that exist at the destination"),
        Local("--update", FLAG, "skip files that are newer at the destination"),
        Local("--delete-excluded", FLAG, "delete excluded files at the destination"),
        SdkArg("--flags", TEXTS, "rclone options, instead of the five above"),
        build="build_cloud_copy", schedule="schedule_cloud_copy", made="scheduled_job_id",
        done="Scheduled job {scheduled_job_id} to copy {src} to {dst}."
             "|Copying {src} to {dst}. Check progress with `vastai show instance {instance}`.",
        examples="""\
--src /workspace/out --dst backups --instance 6003036 --connection 1001
--src bucket/data --instance 6003036 --connection 1004 --transfer 'Cloud to Instance'
--src /data --dst saved --instance 6003036 --connection 1001 --schedule DAILY --day '*' --hour 3"""),
    Command("show connections", "GET /users/cloud_integrations/ -> []", SAFE, READS, "List your cloud storage connections",
        columns=CONNECTION_COLUMNS),
    Command("take snapshot", "POST /instances/take_snapshot/{instance_id}/", ONCE, SPENDS,
        "Push a container snapshot to a registry",
        Arg("instance_id", GIVEN_INSTANCE_ID, "the instance", old="id", key="id", to="path body"),
        Arg("--repo REPO", TEXT, "repository to push to: USER/NAME", key="personal_repo"),
        Arg("--container_registry", NAME, "registry host", "docker.io"),
        Arg("--docker_login_user USER", TEXT, "registry user"),
        Secret("--docker_login_pass", TEXT, "registry password or token"),
        Arg("--pause", TRUTH, "pause the container for a consistent image; slower", True,
            sent=lambda on: "true" if on else "false"),
        needs="repo",
        done="Pushing a snapshot of instance {instance_id} to {repo} at {container_registry}; it takes some minutes."),
    Command("show instance-backups", "GET /instance_backups/ -> backups[]", SAFE, READS, "List backups of your instances and volumes",
        Arg("--contract-id", INSTANCE_ID, "only this instance or volume"), columns=BACKUP_COLUMNS,
        note="To restore an instance's files: `vastai copy vast.CONTRACT:/upper/workspace INSTANCE:/workspace`. A volume's "
             "files are in vast.CONTRACT:/."),
    Command("show instance-backup-files", "GET /instance_backups/{contract_id}/download/", SAFE, READS,
        "List a backup's files and their URLs",
        Arg("contract_id", INSTANCE_ID, "the instance or volume"), member="files", columns=BACKUP_FILE_COLUMNS,
        tables="backup_file_tables", footer="backup_footer", empty="The backup has no files yet.",
        methods="instance_backup_files", look="show instance-backups"),
    look="show instances")

register("Deployments",
    Command("show deployments", "GET /deployments -> deployments[]", SAFE, READS, "List your serverless deployments",
        columns=DEPLOYMENT_COLUMNS),
    Command("show deployment", "GET /deployment/{id}/ -> deployment", SAFE, READS, "Show one deployment in full",
        DEPLOYMENT, columns=DEPLOYMENT_CARD, look="show deployments"),
    Command("show deployment-versions", "GET /deployment/{id}/versions/ -> versions[]", SAFE, READS, "List the versions of a deployment",
        DEPLOYMENT, columns=VERSION_COLUMNS, look="show deployments"),
    Command("start deployment", "POST /deployment/{id}/start/", SAFE, SPENDS, "Start a stopped deployment",
        DEPLOYMENT, done="Starting deployment {id}."),
    Command("stop deployment", "POST /deployment/{id}/stop/", SAFE, SETS, "Stop a deployment; it can be restarted",
        DEPLOYMENT, done="Stopping deployment {id}."),
    Command("delete deployment", "DELETE /deployment/{id}/", SAFE, DELETES, "Delete deployments by id or by name",
        Arg("id DEPLOYMENT", ID, "the deployment", None), Arg("--name", NAME, "name; deletes all deployments with that name"),
        Arg("--tag", TEXT, "tag; with --name, deletes only deployments with that tag", needs="name"),
        build="build_delete_deployment", one_of="id name",
        done="Deleted deployment {id}.|Deleted deployments named {name}: {count}."
             "|Deleted deployment {name}."),
    look="show deployments")

register("Price increases",
    Command("show pending-price-increases", "GET /instances/pending-price-increases/", SAFE, READS,
        "List price increases that hosts ask for",
        member="pending_price_increases", columns=PRICE_INCREASE_COLUMNS, footer="truncated_footer",
        empty="No price increases are pending."),
    *(Command(f"{verb} price-increase", f"PUT /instances/{verb}-price-increase/", ONCE, effect, summary,
        CliArg("ids", INSTANCE_IDS, "the instances"),
        Local("instance_id", INSTANCE_ID, "the instance", face="sdk"),
        run="run_price_increase", says="settled_sentence",
        ask=f"{verb.title()} the price increases for instances {{ids}}?")
      for verb, effect, summary in (
          ("accept", SPENDS, "Accept a higher price to extend the rental"),
          ("reject", SETS, "Reject a higher price; the end date stays"))),
    look="show pending-price-increases")

register("Benchmarks",
    Command("search benchmarks", "GET /benchmarks -> benchmarks[]", SAFE, READS, "Search benchmark results",
        CONDITIONS, Local("-o --order", ORDER, "sort by these fields; append `-` for descending"),
        Local("-l --limit", COUNT, "page size; prints one page"),
        Local("-t --next-token TOKEN", TEXT, "token of the next page", name="after_token", old="next_token"),
        Local("-a --all", FLAG, "get all pages, even with --limit", name="all_pages"),
        columns=BENCHMARK_COLUMNS, run="run_search_benchmarks", document="benchmark_document",
        footer="next_page", fields=BENCHMARK_FIELDS, strict=True,
        examples="'gpu_name=RTX_4090 value>100'\n'last_update>=2026-01-15' --limit 20"),
    Command("search benchmarks-v1", "GET /benchmarks", SAFE, READS, "Get one page of benchmarks as received",
        Arg("params", OBJECT, "select_cols, select_filters, order_by, limit, after_token", None, key="*"), face="sdk"))

register("Market (for hosts)",
    Command("show gpu-metrics", "GET /metrics/gpu/current/", SAFE, READS, "Show GPU supply, use and prices",
        *MARKET_OPTIONS, MARKET_SIZE,
        member="gpus", columns=GPU_METRICS_COLUMNS, build="build_market", footer="host_footer", aliases="metrics gpu"),
    Command("show gpu-trends", "GET /metrics/gpu/history/", SAFE, READS, "Show GPU supply and prices over time",
        Arg("name", NAME, "GPU models, such as RTX_4090,H100_SXM, or all", "RTX 5090,RTX 4090,RTX 3090", key="gpu_name",
            sent=lambda names: names.replace("_", " ")),
        *MARKET_OPTIONS, MARKET_SIZE,
        Arg("--start", DATE, "start, UTC (default: a day before the end)"),
        Arg("--end", DATE, "end, UTC (default: now)"),
        Arg("--step SECONDS", COUNT, "time between points, seconds"),
        build="build_market", run="run_gpu_trends", rows="trend_rows", tables="trend_tables", footer="host_footer",
        empty="No data.", columns=GPU_TRENDS_COLUMNS, aliases="metrics gpu-trends",
        examples="""\
RTX_5090 --verified true
all --start 2026-03-12 --end 2026-03-18 --step 3600 --raw"""),
    Command("show gpu-locations", "GET /metrics/gpu/locations/", SAFE, READS, "List where the GPUs are",
        *MARKET_OPTIONS,
        Local("--rented", TEXT, "only rented GPUs (true) or only others (false)", "all", choices=EITHER),
        Local("--state", TEXT, "only GPUs in this state", "all", choices="all rented available unavailable"),
        Local("--gpu GPU", TEXT, "only these models, such as RTX_4090,H100_SXM"),
        member="locations", rows="location_rows", columns=GPU_LOCATION_COLUMNS, run="run_gpu_locations", footer="host_footer",
        aliases="metrics gpu-locations"), hosts=True)

register("Keys",
    Command("set api-key", "-> none", SAFE, SETS, "Save your API key to a file",
        Secret("new_api_key API-KEY", NAME, "API key; asked for if left out", None, name="api_key", old="new_api_key"),
        run="run_set_api_key", done="API key saved to {path}|This client uses the API key.", auth=False, examples="- < key.txt",
        note="Create a key at https://cloud.vast.ai/manage-keys/. With - on the command line, the key stays out of the shell's history."),
    Command("show ssh-keys", "GET /ssh/ -> []", SAFE, READS, "List your account's SSH keys",
        columns=SSH_KEY_COLUMNS),
    Command("create ssh-key", "POST /ssh/", ONCE, SETS, "Add an SSH key to your account",
        Arg("ssh_key", PUBLIC_KEY, "public key or its file (default: a new key made by ssh-keygen)", None), YES,
        Local("--name", TEXT, "accepted for programs for the SDK before 1.0; no effect", face="sdk", hidden=True),
        run="run_create_ssh_key", made="key.id", done="Added SSH key {key[id]} to your account.|Added the SSH key to your account.",
        examples="~/.ssh/id_ed25519.pub\n"),
    Command("attach ssh", "POST /instances/{instance_id}/ssh/", SAFE, SETS, "Add an SSH key to an instance",
        Arg("instance_id", INSTANCE_ID, "the instance", old="id"), Arg("ssh_key", PUBLIC_KEY, "public key or its file"),
        run="run_ssh_key", done="Added the SSH key to instance {instance_id}.", look="show instances",
        examples="4242 ~/.ssh/id_ed25519.pub"),
    Command("show instance-ssh-keys", "GET /instances/{id}/ssh/ -> any", SAFE, READS, "List an instance's SSH keys",
        Arg("id", INSTANCE_ID, "the instance", old="ID instance_id INSTANCE_ID"), of="list[dict[str, Any]]",
        columns=SSH_KEY_COLUMNS, run="run_instance_ssh_keys", look="show instances"),
    Command("detach ssh", "DELETE /instances/{instance_id}/ssh/{ssh_key_id}/", SAFE, SETS, "Remove an SSH key from an instance",
        Arg("instance_id", INSTANCE_ID, "the instance", old="id"), Arg("ssh_key_id KEY", ID, "the key, from show ssh-keys"),
        done="Removed SSH key {ssh_key_id} from instance {instance_id}.", look="show instance-ssh-keys"),
    Command("update ssh-key", "PUT /ssh/{id}/", SAFE, SETS, "Replace one of your SSH keys",
        Arg("id KEY", ID, "the key, from show ssh-keys", old="ssh_key_id", to="path body"),
        Arg("ssh_key", PUBLIC_KEY, "new public key or its file"),
        run="run_ssh_key", done="Replaced SSH key {id}."),
    Command("delete ssh-key", "DELETE /ssh/{id}/", SAFE, DELETES, "Delete an SSH key from your account",
        Arg("id KEY", ID, "the key, from show ssh-keys", old="ssh_key_id"),
        done="Deleted SSH key {id}."),
    Command("show api-keys", "GET /auth/apikeys/ -> apikeys[]", SAFE, READS, "List your API keys",
        columns=API_KEY_COLUMNS, document="answer_document"),
    Command("show api-key", "GET /auth/apikeys/{id}/", SAFE, READS, "Show one API key's name and permissions",
        Arg("id KEY", ID, "the key, from show api-keys"), columns=API_KEY_COLUMNS, look="show api-keys"),
    Command("create api-key", "POST /auth/apikeys/", ONCE, SETS, "Create an API key with limited permissions",
        Arg("--name", NAME, "name of the key", REQUIRED),
        Arg("--permission_file", FILE_OBJECT, "JSON file with its permissions (default: all of yours)",
            name="permissions", old="permission_file"),
        Arg("--key_params", TEXT_OR_OBJECT,
            "limits for individual permissions, as documented by the service"),
        made="id", done="Created API key {id}: {key}", look="show api-keys", only_copy=True,
        note='The key is shown only once. A file with {"api": {"misc": {}, "user_read": {}, "instance_read": {}}} '
             "allows it only to read your instances.",
        examples="--name ci --permission_file permissions.json"),
    Command("delete api-key", "DELETE /auth/apikeys/{id}/", SAFE, DELETES, "Revoke an API key",
        Arg("id KEY", ID, "the key, from show api-keys"), sentence=True, done="Revoked API key {id}.", look="show api-keys",
        ask="Revoke API key {id}? Programs that use it lose access.", ask_when="terminal"),
    Command("reset api-key", "PUT /commands/reset_apikey/", ONCE, SETS, "Replace your main API key, revoking the old",
        body=CLIENT, done="Replaced your main API key; the old one is revoked. The new one: {new_api_key}", look="show user", only_copy=True,
        note="Save the new key with `vastai set api-key`.",
        ask="Replace your main API key? The old one is revoked at once.", ask_when="terminal"),
    Command("set role", "-> none", SAFE, SETS, "Choose which commands --help lists",
        Arg("role", TEXT, "host: list all commands; client: hide those for hosts", choices="host client"),
        run="run_set_role", done="`vastai --help` now lists the commands for a {role}.", auth=False),
    look="show ssh-keys")

register("Environment variables",
    Command("show env-vars", "GET /secrets/ -> secrets", SAFE, READS, "List environment variables set in your instances",
        Local("-s --show-values", FLAG, "also show the values"),
        columns=ENV_COLUMNS, run="run_show_env_vars", rows="env_rows", document="env_document"),
    Command("create env-var", "POST /secrets/", ONCE, SETS, "Add an environment variable for your instances",
        VARIABLE_NAME, Secret("value", TEXT, "value of the variable"), done="Added environment variable {name}."),
    Command("update env-var", "PUT /secrets/", SAFE, SETS, "Change an environment variable",
        VARIABLE_NAME, Secret("value", TEXT, "new value"), done="Changed environment variable {name}."),
    Command("delete env-var", "DELETE /secrets/", SAFE, DELETES, "Delete an environment variable",
        VARIABLE_NAME, done="Deleted environment variable {name}."),
    look="show env-vars")

register("Two-factor authentication",
    Command("tfa login", "POST /tfa/", ONCE, SETS, "Start a 2FA session on this computer",
        *TFA_PROOF, either="code backup_code", build="build_code", run="run_tfa_login",
        done="{said} Backup codes left: {backup_codes_remaining}.|{said}|The code was right, but no key of a session was saved.",
        note="The session key is saved beside the API key and replaces it until it expires. To get a code by SMS or "
             "email, run `vastai tfa send-sms` or `vastai tfa send-email`.",
        examples="-t totp -c 123456\n-t sms -c 123456 -s SECRET\n-bc ABCD-EFGH-IJKL"),
    Command("tfa logout", "", SAFE, SETS, "End the 2FA session on this computer",
        run="run_tfa_logout", auth=False, done="{msg}",
        note="Deletes the session key from this computer; the API key is used again. The service is not notified."),
    Command("tfa status", "GET /tfa/status/", SAFE, READS, "Show your 2FA methods and remaining backup codes",
        rows="tfa_rows", columns=TFA_COLUMNS, columns_for="tfa_columns", footer="tfa_footer",
        empty="Two-factor authentication is off."),
    Command("tfa auth-new", "POST /tfa/authorize-new-method/", ONCE, SETS, "Prove your identity before adding a method",
        Local("-c --code", CODE, "code for the second step", secret=True, needs="secret"),
        Local("-s --secret", CODE, "secret that the first step printed", secret=True, needs="code"),
        Secret("-bc --backup-code", CODE, "one of your backup codes, instead of a method"),
        Arg("-t --method-type", TEXT, "method that sends or shows the code (default email)", key="tfa_method",
            choices=TFA_METHODS),
        Arg("-id --method-id", GIVEN_ID, "id of that method, if you have several of one kind", key="tfa_method_id"),
        either="backup_code method_id method_type",
        run="run_tfa_auth_new",
        done="You can add a method now: run `vastai tfa totp-setup` or `vastai tfa send-sms`, then `vastai tfa activate`.",
        note="The first step sends a code and prints a secret; the second step takes both. The command line asks for the "
             "code. With --secret and --code, only the second step runs.",
        examples="-t totp\n--secret SECRET --code 123456"),
    Command("tfa totp-setup", "POST /tfa/totp-setup/", ONCE, SETS, "Get a secret for an authenticator app",
        columns=TOTP_CARD, only_copy=True,
        note="Enter the secret in the app, or show it the URI as a QR code. Then run `vastai tfa activate CODE --secret SECRET`."),
    Command("tfa send-sms", "POST /tfa/sms/", ONCE, SETS, "Send a code by SMS",
        PHONE,
        done="Sent a code by SMS. Use it with --secret {secret} in `vastai tfa login -t sms` or `vastai tfa "
             "activate -t sms`.", only_copy=True),
    Command("tfa resend-sms", "POST /tfa/sms/resend/", ONCE, SETS, "Send the SMS code again",
        Secret("-s --secret", CODE, "secret that tfa send-sms printed", REQUIRED), PHONE,
        done="Sent the code again."),
    Command("tfa send-email", "POST /tfa/email/", ONCE, SETS, "Send a code by email",
        done="Sent a code by email. Use it with --secret {secret} in `vastai tfa login -t email`.", only_copy=True),
    Command("tfa activate", "POST /tfa/confirm-new/", ONCE, SETS, "Add a method using its first code",
        Secret("code", NAME, "code from the app or SMS"),
        Secret("--secret", CODE, "secret from tfa totp-setup or tfa send-sms", REQUIRED),
        Arg("-t --method-type", TEXT, "method type", "totp", key="tfa_method", choices="sms totp"),
        Arg("--phone-number NUMBER", TEXT, "phone number for sms, such as +12025550123"),
        Arg("-l --label NAME", TEXT, "name for the method"),
        SdkArg("--method-id", GIVEN_ID, "id of the method", key="tfa_method_id"),
        show="show_backup_codes", done="Activated the method.", only_copy=True,
        note="Run `vastai tfa auth-new` first. Your first method comes with backup codes; you are asked where to "
             "save them.",
        examples="""\
123456 --secret SECRET
123456 -t sms --secret SECRET --phone-number +12025550123 -l work"""),
    Command("tfa update", "PUT /tfa/update/", SAFE, SETS, "Rename a method or make it primary",
        Arg("method_id METHOD", ID, "the method, from tfa status", key="tfa_method_id"),
        Arg("-l --label NAME", TEXT, "new name"),
        Arg("-p --set-primary", TRUTH, "whether to make it the primary method", key="is_primary"),
        needs="label set_primary", done="Changed method {method_id}."),
    Command("tfa delete", "DELETE /tfa/", ONCE, DELETES, "Delete a 2FA method",
        *TFA_PROOF[:4],
        Arg("--method-id", GIVEN_ID, "id of the method, if you have several of one kind", key="tfa_method_id"),
        Arg("-id --id-to-delete", ID, "method to delete, from tfa status", key="target_id"),
        ask="Delete this method of two-factor authentication?", one_of="code backup_code", build="build_tfa_delete",
        done="Deleted the method; methods left: {remaining_methods}.|Deleted the last method: 2FA is off, and your backup codes "
             "are void.",
        examples="""\
--id-to-delete 123 -t totp -c 456789
-id 123 -t email -s SECRET -c 456789"""),
    Command("tfa regen-codes", "PUT /tfa/regen-backup-codes/", ONCE, SETS, "Replace your backup codes",
        *TFA_PROOF,
        ask="Replace your backup codes? The old ones stop working.", one_of="code backup_code", build="build_code",
        show="show_backup_codes", only_copy=True,
        done="The old backup codes no longer work, but the service sent no new ones."),
    look="tfa status")

register("Teams",
    Command("create team", "POST /team/", ONCE, SPENDS, "Turn your account into a team",
        Arg("--team-name", NAME, "name of the team", REQUIRED),
        Arg("--transfer-credit", DOLLARS, "credit to move to the team, $", 0),
        made="team_id", done="Created team {team_name} with id {team_id}.|Created team {team_name}."),
    Command("destroy team", "DELETE /team/", SAFE, DELETES, "Destroy your team",
        done="Destroyed the team.",
        ask="Destroy your team? Its members lose access.", ask_when="terminal"),
    Command("show members", "GET /team/members/ -> []", SAFE, READS, "List your team's members",
        columns=MEMBER_COLUMNS, methods="show_team_members", aliases="show team-members"),
    Command("invite member", "POST /team/invite/", ONCE, SETS, "Invite someone to your team by email",
        Arg("--email", EMAIL, "email address", REQUIRED, to="query"),
        Arg("--role NAME", NAME, "role, from show team-roles", REQUIRED, to="query"),
        done="Invited {email} as {role}.", methods="invite_team_member", aliases="invite team-member"),
    Command("remove member", "DELETE /team/members/{id}/", SAFE, DELETES, "Remove someone from your team",
        Arg("id MEMBER", ID, "the member, from show members", old="ID"), done="Removed member {id}.",
        methods="remove_team_member", aliases="remove team-member"),
    Command("show team-roles", "GET /team/roles-full/ -> []", SAFE, READS, "List your team's roles and permissions",
        columns=ROLE_COLUMNS),
    Command("show team-role", "GET /team/roles/{name}/", SAFE, READS, "Show one role and its permissions",
        ROLE, columns=ROLE_COLUMNS, look="show team-roles"),
    Command("create team-role", "POST /team/roles/", ONCE, SETS, "Create a team role",
        Arg("--name", NAME, "name of the role", REQUIRED, old="NAME"),
        Arg("--permissions", FILE_OBJECT, "JSON file with its permissions", REQUIRED),
        done="Created role {name}.", look="show team-roles"),
    Command("update team-role", "PUT /team/roles/{id}/", SAFE, SETS, "Rename a role or change its permissions",
        Arg("id ROLE", ID, "the role, from show team-roles", old="ID"), Arg("--name", NAME, "new name"),
        Arg("--permissions", FILE_OBJECT, "JSON file with its new permissions"),
        needs="*", sentence=True, done="Changed role {id}.", look="show team-roles"),
    Command("remove team-role", "DELETE /team/roles/{name}/", SAFE, DELETES, "Remove a team role",
        ROLE, done="Removed role {name}.", look="show team-roles"),
    look="show members")

register("Machines (for hosts)",
    Command("show machines", "GET /machines -> machines[]", SAFE, READS, "List your machines",
        query=OWNER, of="Machine", columns=MACHINE_COLUMNS, document="answer_document"),
    Command("show machine", "GET /machines/{id} -> any", SAFE, READS, "Show one of your machines",
        Arg("id MACHINE", ID, "the machine", old="Machine machine_id"), query=OWNER,
        of="Machine", columns=MACHINE_COLUMNS, run="run_show_machine", document="list_of_one", look="show machines"),
    Command("list machine", "PUT /machines/create_asks/", SAFE, SETS, "Offer a machine or change its prices",
        LISTED_MACHINE, *LISTING,
        says="listing_sentence", done="Machine {id} is listed",
        note="Test the machine first: if it fails while rented, its reliability drops permanently. Current rentals "
             "continue after the end date.",
        examples="""\
1234 -g 0.45 -s 0.15 -m 1 -e 2027-12-31
1234 -g 0.45 -b 0.2 -l '3 weeks' -v 0"""),
    Command("list machines", "PUT /machines/create_asks/ -> []", SAFE, SETS, "Offer several machines on the same terms",
        Local("ids MACHINE", IDS, "the machines"), *LISTING,
        run="run_list_machines", says="listing_sentence", done="Machine {id} is listed"),
    Command("unlist machine", "DELETE /machines/{id}/asks/", SAFE, SETS, "Stop offering a machine; current rentals continue",
        MACHINE, done="Machine {id} is no longer listed; current rentals continue."),
    Command("delete machine", "POST /machines/{id}/force_delete/", SAFE, DELETES, "Delete a machine that nobody rents",
        MACHINE, done="Deleted machine {id}."),
    Command("cleanup machine", "PUT /machines/{id}/cleanup/", SAFE, DELETES, "Delete expired storage on a machine",
        MACHINE, done="Deleted expired storage on machine {id}; contracts deleted: {num_deleted}.|Deleted expired storage on machine {id}."),
    Command("defrag machines", "PUT /machines/defrag_offers/", SAFE, SETS, "Regroup GPUs into larger offers",
        Arg("ids MACHINE", IDS, "the machines", key="machine_ids", old="IDs machine_ids"),
        done="Regrouped the offers of machines {ids}: {summary}."),
    Command("set min-bid", "PUT /machines/{id}/minbid/", SAFE, SETS, "Set the lowest bid for a machine's GPUs",
        MACHINE, Arg("--price", PRICE, "lowest bid per GPU, $/hr"),
        body=CLIENT, needs="price", done="The lowest bid for machine {id} is now ${price}/hr per GPU."),
    Command("set defjob", "PUT /machines/create_bids/", SAFE, SETS, "Set what a machine runs while unrented",
        LISTED_MACHINE,
        Arg("--price_gpu", PRICE, "price, $/GPU/day"),
        Arg("--price_inetu", PRICE, "upload price, $/GB"),
        Arg("--price_inetd", PRICE, "download price, $/GB"),
        Arg("--image", IMAGE, "Docker image"),
        Arg("--args", WORDS, "arguments for the image's entrypoint: the rest of the line", rest=True),
        needs="*", says="listing_sentence", done="The default job of machine {id} is set",
        examples="1234 --price_gpu 0.05 --image miner/xmr --args --donate-level 1"),
    Command("remove defjob", "DELETE /machines/{id}/defjob/", SAFE, DELETES, "Remove a machine's default job",
        MACHINE, done="Removed the default job of machine {id}."),
    Command("show maints", "GET /machines/maintenances -> []", SAFE, READS, "List your machines' maintenance windows",
        Arg("-i --ids MACHINE", IDS, "machines, such as 12,34", REQUIRED, many=False, key="machine_ids", old="machine_ids"),
        query=OWNER, columns=MAINT_COLUMNS, empty="No maintenance is scheduled."),
    Command("schedule maint", "PUT /machines/{id}/dnotify/", ONCE, SETS, "Announce maintenance to a machine's renters",
        MACHINE,
        Arg("--sdate", COMING, "start, UTC, such as 2026-01-31T14:00", REQUIRED),
        Arg("--duration HOURS", NUMBER, "duration, hours", REQUIRED),
        Arg("--maintenance_category", TEXT, "category: power, internet, disk, gpu, software or other", "not provided",
            name="category", key="maintenance_category", old="maintenance_category"),
        body=CLIENT, look="show maints",
        examples="1234 --sdate 2030-03-15T14:00 --duration 0.5 --maintenance_category power",
        ask="Notify all renters of machine {id} that it will be down for {duration:g} h from {sdate} UTC?",
        done="Announced maintenance of machine {id} from {sdate} UTC for {duration:g} h."),
    Command("cancel maint", "PUT /machines/{id}/cancel_maint/", SAFE, SETS, "Cancel a machine's maintenance",
        Arg("id MACHINE", ID, "the machine", old="machine_id", key="machine_id", to="path body"),
        body=CLIENT, ask="Cancel all maintenance of machine {id}?",
        done="Canceled the maintenance of machine {id}.", look="show maints"),
    Command("reports", "GET /machines/{id}/reports/ -> []", SAFE, READS, "List problems users reported about a machine",
        MACHINE, columns=REPORT_COLUMNS, look="show machines"),
    look="show machines", hosts=True)

register("Clusters and overlays",
    Command("show clusters", "GET /clusters/", SAFE, READS, "List your clusters of machines",
        rows="cluster_rows", columns=CLUSTER_COLUMNS),
    Command("create cluster", "POST /cluster/", ONCE, SETS, "Create a cluster of machines",
        Arg("subnet", NAME, "local network of the machines, such as 10.0.0.0/24"),
        Arg("manager_id MACHINE", ID, "machine that manages the cluster"),
        done="{msg}|Created the cluster."),
    Command("delete cluster", "DELETE /cluster/", SAFE, DELETES, "Delete a cluster",
        CLUSTER, done="Deleted cluster {cluster_id}."),
    Command("join cluster", "PUT /cluster/", SAFE, SETS, "Add machines to a cluster",
        CLUSTER, Arg("machine_ids MACHINE", IDS, "the machines"),
        done="Added machines {machine_ids} to cluster {cluster_id}."),
    Command("remove-machine-from-cluster", "DELETE /cluster/remove_machine/", SAFE, SETS, "Remove a machine from its cluster",
        Arg("cluster_id CLUSTER", ID, "the cluster"), Arg("machine_id MACHINE", ID, "the machine"),
        Arg("new_manager_id MACHINE", ID, "machine that becomes the manager, if this one was", None),
        done="Removed machine {machine_id} from cluster {cluster_id}."),
    Command("show overlays", "GET /overlay/ -> []", SAFE, READS, "List your overlay networks",
        columns=OVERLAY_COLUMNS),
    Command("create overlay", "POST /overlay/", ONCE, SETS, "Create an overlay network on a cluster",
        Arg("cluster_id CLUSTER", ID, "the cluster"), Arg("name", NAME, "name of the overlay"),
        made="overlay_id", done="Created overlay {name}.", look="show overlays"),
    Command("join overlay", "PUT /overlay/", SAFE, SETS, "Add an instance to an overlay network",
        Arg("name", NAME, "the overlay"), Arg("instance_id", INSTANCE_ID, "the instance", old="INSTANCE_ID"),
        done="Added instance {instance_id} to overlay {name}.", look="show overlays"),
    Command("delete overlay", "DELETE /overlay/", SAFE, DELETES, "Delete an overlay network and its instances",
        Local("overlay_identifier OVERLAY", TEXT_ID, "id or name of the overlay", old="overlay_id overlay_name"),
        build="build_overlay", done="Deleted overlay {overlay_identifier}.", look="show overlays"),
    look="show clusters")

register("Account",
    Command("show user", "GET /users/current", SAFE, READS, "Show your account and its credit",
        of="User", columns=USER_CARD, drops="api_key", footer="user_footer"),
    Command("cost", "", SAFE, READS, "Show running costs and how long credit lasts",
        of="Cost", run="run_cost", member="rows", columns=COST_COLUMNS, columns_for="cost_columns", footer="cost_footer", gaps="unknown",
        empty="Nothing is billed now.", look="show instances",
        note="A stopped instance is billed for its disk; an endpoint's cost is that of its workers. The last "
             "column says why something looks forgotten. If a part cannot be read, `unknown` names it, the sum is "
             "too low, and the exit status is 8.",
        examples="\n--raw | jq .hours_left"),
    Command("show audit-logs", "GET /audit_logs/ -> []", SAFE, READS, "List what was done with your account",
        columns=AUDIT_COLUMNS),
    Command("set user", "PUT /users/", SAFE, SETS, "Change your account's details",
        Secret("--file", FILE_OBJECT, "JSON file with the members to change", REQUIRED, name="params", key="*", old="file"),
        done="Changed the account.",
        note="The members include ssh_key, fullname, billaddress_line1, billaddress_city, billaddress_zip, billaddress_country, "
             "billaddress_taxinfo, balance_threshold, balance_threshold_enabled, autobill_threshold and phone_number.",
        examples="--file account.json"),
    Command("show subaccounts", "GET /subaccounts -> users[]", SAFE, READS, "List your subaccounts",
        query=OWNER, columns=SUBACCOUNT_COLUMNS),
    Command("create subaccount", "POST /users/", ONCE, SETS, "Create a subaccount",
        Arg("--email", EMAIL, "email address", REQUIRED),
        Arg("--username USER", NAME, "user name", REQUIRED),
        Secret("--password PASSWORD", NAME, "password", REQUIRED),
        Arg("--type", ACCOUNT_TYPE, "account type: host (only offers machines) or client", key="host_only",
            sent=lambda kind: kind == "host"),
        body={"parent_id": "me"}, made="id", done="Created account {id} for {email}.", look="show subaccounts"),
    Command("show ipaddrs", "GET /users/me/ipaddrs -> results[]", SAFE, READS, "List IP addresses that used your account",
        query=OWNER, columns=ADDRESS_COLUMNS),
    look="show user")

register("Billing",
    Command("show invoices", "GET /users/me/invoices", SAFE, READS, "List charges and payments, item by item",
        *ITEM_OPTIONS,
        CliArg("--instance_label NAME", TEXT, "only charges of instances with this label"), PDF,
        query=OWNER, either="only_charges only_credits", columns=ITEM_COLUMNS, run="run_show_invoices", rows="invoice_rows",
        document="invoice_rows", footer="invoice_totals",
        note="Without dates, it covers the last day. `vastai show invoices-v1` is newer and has pages.",
        examples="""\
-s 2026-01-01 -e 2026-02-01 --only_charges
-s 2026-01-01 --pdf january.pdf"""),
    Command("show invoices-v1", "GET /api/v1/invoices/", SAFE, READS, "List invoices or charges, page by page",
        CliArg("-i --invoices", FLAG, "list payments, transfers and payouts"),
        Local("-c --charges", FLAG, "list what instances, volumes and endpoints cost"),
        Local("-s --start-date", DATE, "first day, UTC, such as 2026-01-31"),
        Local("-e --end-date", DATE, "last day, UTC"),
        Arg("-l --limit", WHOLE, "page size, at most 100", 20),
        Arg("-t --next-token TOKEN", TEXT, "token of the next page", key="after_token", sent=lambda token: token or None),
        Arg("--latest-first", FLAG, "list newest first"),
        Local("-ct --charge-type", TEXTS, "only these charges", choices=tuple(CHARGE_TYPES), needs="charges"),
        Local("-f --format SHAPE", TEXT, "how to display charges", "table", choices="table tree"),
        Local("-it --invoice-type", TEXTS, "only these invoices", choices=tuple(INVOICE_TYPES)),
        CliArg("-v --verbose", FLAG, "in a tree, also show the parts of instances and volumes"),
        PDF,
        one_of="invoices charges", either="invoice_type charges", member="results", build="build_billing", run="run_show_invoices_v1",
        show="show_billing",
        note="Without dates, it covers the last 7 days; with one date, the 7 days after or before it. Days are UTC.",
        examples="""\
-i -s 2026-01-01 -e 2026-01-31
-c --charge-type instance volume --format tree -v
-i -s 2026-01-01 -e 2026-01-31 --pdf january.pdf"""),
    Command("generate pdf-invoices", "GET /users/me/invoices -> text", SAFE, SETS, "Write a period's items to a PDF",
        *ITEM_OPTIONS, PDF, query=OWNER, either="only_charges only_credits", run="run_pdf_invoices", face="sdk",
        note="Returns the path. Without `pdf` the file is invoice_NUMBER….pdf in the current folder, named by month, dates and kind."),
    Command("search invoices", "GET /invoices -> []", SAFE, READS, "Search your invoices",
        CONDITIONS,
        of="Invoice", columns=INVOICE_COLUMNS, build="build_filter_search", fields=INVOICE_FIELDS,
        examples="'amount_cents>3000 when>=2026-01-01'\n'is_credit=true'"),
    Command("show earnings", "GET /users/{user_id}/machine-earnings", SAFE, READS, "Show what your machines have earned",
        Local("-s --start_date", DATE, "first day, UTC (default: yesterday)"),
        Local("-e --end_date", DATE, "last day, UTC"),
        Local("-m --machine_id MACHINE", ID, "only this machine"), NO_IDS,
        Arg("--last_days", COUNT, "number of past days, instead of the dates"),
        Arg("--user_id", GIVEN_ID, "account id; me is your own", "me"),
        query=OWNER, either="last_days start_date, last_days end_date", rows="earning_rows", columns=EARNING_COLUMNS,
        footer="earning_totals", build="build_earnings", examples="-s 2026-01-01 -e 2026-01-31 -m 4242"),
    Command("show deposit", "GET /instances/balance/{id}/", SAFE, READS, "Show a reserved instance's deposit and discount",
        Arg("id", INSTANCE_ID, "the instance", old="Id ID"), NO_IDS,
        query=OWNER, columns=DEPOSIT_CARD, look="show instances"),
    Command("transfer credit", "PUT /commands/transfer_credit/", ONCE, SPENDS, "Transfer credit to another account, permanently",
        CliArg("recipient", ACCOUNT, "email address or id of the account", None, name="recipient_pos"),
        CliArg("amount", DOLLARS, "amount, $", None, name="amount_pos"),
        Arg("-r --recipient", ACCOUNT, "same, as an option", REQUIRED, cli=None),
        Arg("-a --amount", DOLLARS, "same, as an option", REQUIRED, cli=None),
        CliArg("--skip", FLAG, "do not ask for confirmation"),
        body={"sender": "me"}, build="build_transfer", asks="transfer_question",
        one_of="recipient_pos recipient, amount_pos amount", done="Sent ${amount:.2f} to {recipient}.", look="show user",
        examples="ada@example.com 25\n-r ada@example.com -a 25 --yes"),
    Command("fetch contracts", "POST /contracts/fetch/ -> contracts[]", SAFE, READS, "Get contracts by label and id",
        Arg("label", TEXT, "only contracts with this label", None), Arg("contract_ids", ANY_IDS, "only contracts with these ids", None),
        face="sdk"))

register("Scheduled jobs",
    Command("show scheduled-jobs", "GET /commands/schedule_job/ -> []", SAFE, READS, "List your scheduled jobs",
        columns=JOB_COLUMNS),
    Command("delete scheduled-job", "DELETE /commands/schedule_job/{id}/", SAFE, DELETES, "Delete a scheduled job",
        SCHEDULED_JOB, done="Deleted scheduled job {id}."),
    Command("create scheduled-job", "POST /commands/schedule_job/", ONCE, SPENDS, "Schedule a request to be repeated",
        Arg("start_time", DATE, "first time, UTC"),
        Arg("end_time", DATE, "last time, UTC"),
        Arg("api_endpoint", NAME, "path of the request, such as /api/v0/instances/reboot/ID/"),
        Arg("request_method", NAME, "HTTP method: PUT, POST …"),
        Arg("request_body", OBJECT, "body of the request"),
        Arg("frequency", NAME, "HOURLY, DAILY or WEEKLY"),
        Arg("instance_id", GIVEN_INSTANCE_ID, "instance that the request is for"),
        Arg("day_of_the_week", COUNT, "0 (Sunday) to 6 for WEEKLY, else None", None),
        Arg("hour_of_the_day", COUNT, "0 to 23, UTC, for DAILY and WEEKLY, else None", None),
        face="sdk"),
    Command("update scheduled-job", "PUT /commands/schedule_job/{id}/", SAFE, SPENDS, "Change a scheduled job",
        SCHEDULED_JOB,
        Arg("request_body", OBJECT, "body of the request"),
        Arg("start_time", DATE, "first time, UTC", None),
        Arg("end_time", DATE, "last time, UTC", None),
        Arg("api_endpoint", TEXT, "path of the request", None),
        Arg("request_method", TEXT, "HTTP method", None),
        Arg("frequency", TEXT, "HOURLY, DAILY or WEEKLY", None),
        Arg("instance_id", GIVEN_INSTANCE_ID, "instance that the request is for", None),
        Arg("day_of_the_week", COUNT, "0 (Sunday) to 6", None),
        Arg("hour_of_the_day", COUNT, "0 to 23, UTC", None),
        face="sdk"),
    look="show scheduled-jobs")

register("Serverless",
    Command("show endpoints", "GET /endptjobs/ -> results[]", SAFE, READS, "List your serverless endpoints",
        of="EndpointRow", columns=ENDPOINT_COLUMNS,
        drops="api_key auto_delete_in_seconds auto_delete_due_24h"),
    Command("create endpoint", "POST /endptjobs/", ONCE, SPENDS, "Create a serverless endpoint",
        *endpoint_options(0.0, 0.9, 2.5, 5, 20), body=CLIENT, made="result", rents=True,
        done="Created endpoint {result}.", examples="--endpoint_name chat --cold_workers 2 --max_workers 10"),
    Command("update endpoint", "PUT /endptjobs/{id}/", SAFE, SPENDS, "Change a serverless endpoint",
        ENDPOINT,
        *endpoint_options(),
        Arg("--endpoint_state", TEXT, "state to set", choices="active suspended stopped"),
        body=CLIENT, needs="*", done="Changed endpoint {id}.",
        examples="4242 --max_workers 5\n4242 --endpoint_state suspended"),
    Command("delete endpoint", "DELETE /endptjobs/{id}/", SAFE, DELETES, "Delete an endpoint and its workergroups",
        ENDPOINT, body=CLIENT, done="Deleted endpoint {id}.",
        ask="Delete endpoint {id} and its workergroups?", ask_when="terminal"),
    Command("get endpt-logs", "POST run:/get_endpoint_logs/", SAFE, READS, "Print an endpoint's logs",
        Arg("id ENDPOINT", ID, "the endpoint", None), *LOG_OPTIONS,
        Arg("--endpoint", NAME, "name of the endpoint, instead of the id"),
        body={"api_key": KEY}, strict=True, one_of="id endpoint", text="log_text", footer="log_footer", look="show endpoints",
        examples="4242 --level 3 --tail 200"),
    Command("get endpt-workers", "POST run:/get_endpoint_workers/ -> workers[]", SAFE, READS, "List an endpoint's workers",
        Arg("id ENDPOINT", ID, "the endpoint"), columns=WORKER_COLUMNS, strict=True, look="show endpoints",
        methods="get_endpoint_workers"),
    Command("show workergroups", "GET /autojobs/ -> results[]", SAFE, READS, "List your endpoints' workergroups",
        of="Workergroup", columns=WORKERGROUP_COLUMNS, methods="show_autogroups show_autoscalers"),
    Command("create workergroup", "POST /autojobs/", ONCE, SPENDS, "Create a workergroup for an endpoint",
        *WORKERGROUP_OPTIONS, SCALER,
        body=CLIENT, build="build_workergroup", made="id", rents=True, done="Created workergroup {id}.", look="show workergroups",
        methods="create_autogroup create_autoscaler",
        examples="""\
--endpoint_name chat --template_hash 661d064bbda1f2a1
--endpoint_id 4242 --template_id 77"""),
    Command("update workergroup", "PUT /autojobs/{id}/", SAFE, SPENDS, "Change a workergroup",
        WORKERGROUP, *WORKERGROUP_OPTIONS,
        body=CLIENT, build="build_workergroup_change", needs="*", done="Changed workergroup {id}.",
        look="show workergroups", methods="update_autogroup update_autoscaler",
        note="Options that you leave out stay unchanged."),
    Command("delete workergroup", "DELETE /autojobs/{id}/", SAFE, DELETES, "Delete a workergroup; its instances stay",
        WORKERGROUP, body=CLIENT,
        done="Deleted workergroup {id}; its instances stay and are billed.", look="show workergroups", methods="delete_autogroup delete_autoscaler"),
    Command("get wrkgrp-logs", "POST run:/get_autogroup_logs/", SAFE, READS, "Print a workergroup's logs",
        Arg("id WORKERGROUP", ID, "the workergroup"), *LOG_OPTIONS,
        body={"api_key": KEY}, strict=True, text="log_text", footer="log_footer", look="show workergroups",
        examples="8001 --tail 200"),
    Command("get wrkgrp-workers", "POST run:/get_workergroup_workers/ -> workers[]", SAFE, READS, "List a workergroup's workers",
        Arg("id WORKERGROUP", ID, "the workergroup"), columns=WORKER_COLUMNS, strict=True,
        look="show workergroups", methods="get_workergroup_workers"),
    Command("update workers", "POST run:/update_workers/", ONCE, SETS, "Update a workergroup's workers one by one",
        Arg("id WORKERGROUP", ID, "the workergroup", key="workergroup_id"),
        Arg("--cancel", FLAG, "cancel a running update", key="cancel_update", sent=lambda on: on or None),
        body={"api_key": KEY}, strict=True, look="show workergroups",
        done="Updating workers of workergroup {id}: {workers_to_update}.|Canceled the update of workergroup {id}: "
             "{cancelled}."),
    Command("route", "POST run:/route/", ONCE, SETS, "Get the address of a free worker",
        Arg("endpoint", NAME, "name of the endpoint"),
        Arg("cost", NUMBER, "load of the request in the endpoint's units, such as tokens"),
        columns=ROUTE_CARD, strict=True, examples="chat 242"),
    Command("request", "-> any", ONCE, SPENDS, "Send a request to an endpoint's worker",
        Arg("endpoint", NAME, "name or id of the endpoint"),
        Arg("route", NAME, "path on the worker, such as /v1/completions"),
        Arg("--json", OBJECT, "JSON object to send to the worker", name="payload"),
        CliArg("stdin", TEXT, "- reads the JSON object from stdin", None, choices="-"),
        CliArg("--file", FILE_OBJECT, "file with the JSON object"),
        Arg("--cost", NUMBER, "expected load in the endpoint's units, such as tokens", 100),
        Arg("--stream", FLAG, "print the events of the answer as they arrive"),
        Arg("--timeout", SECONDS, "time limit for everything, for a stream until its first byte, seconds", cli=600.0),
        Arg("--worker-timeout", SECONDS, "time limit for one try on a worker, seconds", 600.0),
        SdkArg("retry", FLAG, "repeat the job if a worker fails or is lost", True),
        CliArg("--no-retry", FLAG, "do not repeat the job if a worker fails or is lost"),
        Arg("--max-retries", COUNT, "maximum number of tries"),
        CliArg("--text", FLAG, "print only the model's text"),
        CliArg("--out", OUT_FILE, "file for the response"),
        either="payload file stdin", run="run_request", show="show_response", document="document_response", rows="response_rows",
        note="A job may be billed each time it runs; limit that with --max-retries. "
             "If the answer is lost and the job is not repeated, the exit status is 7.",
        examples="chat /v1/completions --json '{\"prompt\": \"Hi\"}' --cost 16"),
    look="show endpoints")

register("Notifications",
    Command("show notification-types", "GET /notification-types/ -> notification_types[]", SAFE, READS, "List the kinds of notifications",
        columns=NOTIFICATION_COLUMNS),
    Command("show notifications", "GET /users/{user_id}/notification-prefs/ -> notification_preferences", SAFE, READS,
        "Show which notifications you get",
        USER_ID,
        run="run_notifications", rows="notification_rows",
        columns_for="notification_columns"),
    Command("set notifications", "PUT /users/{user_id}/notification-prefs/ -> notification_preferences", SAFE, SETS,
        "Replace your notification choices",
        Arg("notification_preferences", OBJECT, 'JSON: {"client": {"low_credit": {"email": true, "webhooks": false}}}'),
        USER_ID,
        run="run_notifications", rows="notification_rows",
        columns_for="notification_columns",
        look="show notifications", note="`vastai show notifications --raw` prints the current choices in this form."),
    Command("show webhooks", "GET /webhooks/ -> webhooks[]", SAFE, READS, "List your webhooks",
        columns=WEBHOOK_COLUMNS),
    Command("create webhook", "POST /webhooks/", ONCE, SETS, "Create a webhook for notifications",
        Arg("webhook_url", NAME, "URL of the webhook, https://…"),
        Arg("event_types", TEXTS, "event types, from show notification-types, such as client:low_credit"),
        Arg("--name", TEXT, "name for the webhook"),
        made="webhook.id", done="Created webhook {webhook[id]}; it " + WEBHOOK_SECRET, only_copy=True,
        examples="https://example.com/hook client:low_credit client:outbid"),
    Command("update webhook", "PUT /webhooks/{id}/", SAFE, SETS, "Change a webhook",
        WEBHOOK, Arg("--webhook_url URL", TEXT, "new URL"),
        Arg("--event_types", TEXTS, "new event types, replacing the old ones"), Arg("--name", TEXT, "new name"),
        needs="*", done="Changed webhook {id}."),
    Command("delete webhook", "DELETE /webhooks/{id}/", SAFE, DELETES, "Delete a webhook",
        WEBHOOK, done="Deleted webhook {id}."),
    Command("rotate webhook-secret", "POST /webhooks/{id}/rotate-secret/", ONCE, SETS, "Replace a webhook's signing secret",
        WEBHOOK, done="Webhook {webhook[id]} now " + WEBHOOK_SECRET, only_copy=True),
    Command("test webhook", "POST /webhooks/{id}/test/", ONCE, SETS, "Send a test to a webhook",
        WEBHOOK, done="Sent a test to webhook {id}."),
    look="show webhooks")

register("Diagnostics",
    Command("self-test machine", "", ONCE, SPENDS, "Rent your machine and test it",
        Arg("machine_id MACHINE", GIVEN_ID, "the machine", old="id"),
        Arg("--debugging", FLAG, "print each line of progress on stderr"),
        Arg("--ignore-requirements", FLAG, "test the machine even if it fails requirements"),
        Arg("--test-image", IMAGE, "test image to use; VAST_SELF_TEST_IMAGE also sets it"),
        Arg("--support-bundle-dir PATH", TEXT, "folder for diagnostics after a failure (default /tmp)"),
        Arg("--no-support-bundle", FLAG, "write no diagnostics after a failure, same as VAST_SELF_TEST_SUPPORT_BUNDLE=0"),
        run="run_self_test", member="checks", columns=SELF_TEST_COLUMNS, says="self_test_sentence",
        note="It costs one short rental and takes up to 25 minutes. If the machine fails, the exit status is 1."),
    Command("dump-logs", "", SAFE, READS, "Pack diagnostics for Vast.ai support",
        Arg("machine_id MACHINE", GIVEN_ID, "the machine"),
        Arg("--instance-id", INSTANCE_ID, "instance whose logs to include"),
        Arg("--output-dir PATH", NAME, "folder for the archive", "/tmp"),
        Arg("--include-local-host-artifacts", FLAG, "include logs and settings of this computer; only on the host"),
        run="run_dump_logs", says="bundle_sentence", look="show machines", examples="4242 --instance-id 7000",
        note="Keys, passwords and other secrets that can be recognized are left out of the archive."),
    Command("run benchmarks", "-> []", ONCE, SPENDS, "Benchmark a template on several GPUs",
        Arg("--template_hash HASH", NAME, "hash of the template"),
        Arg("--template_id", ID, "id of the template"),
        Arg("--gpus GPUS", TEXTS, "GPUs, such as '2x RTX_4090, RTX_3090' (default: RTX_5090, RTX_4090, RTX_3090, RTX_A6000)", many=False),
        Arg("--num_gpus", COUNT, "number of GPUs each, if --gpus does not say"),
        Arg("--timeout", SECONDS, "maximum wait for the measurements, seconds", 1800),
        Arg("--no-cache", FLAG, "repeat measurements of the last 30 days"),
        Arg("--auto_instance", TEXT, "serverless service to use", hidden=True),
        Arg("--autoscaler_url", TEXT, "address of its worker list", hidden=True),
        needs="template_hash template_id", run="run_benchmarks", look="show endpoints",
        ask="Rent {names} for up to {minutes:g} minutes, at {rate} together?", ask_when="within",
        columns=MEASUREMENT_COLUMNS,
        note="Rents real GPUs; the command line asks first, a method call does not. All are destroyed at the end. "
             "Perf/$ is performance per $/hr.",
        examples="""\
--template_hash 79ebdd2ebfb9d42c --gpus '2x RTX_4090, L40S'
--template_id 88201 --no-cache -y"""),
    look="show instances")

register("Tools",
    Command("update", "-> none", SAFE, READS, "Show how to update this copy",
        Arg("--check", FLAG, "only check for a newer version"), run="run_update", face="cli", auth=False),
    Command("uninstall", "-> none", SAFE, SETS, "Uninstall this copy if pip installed it",
        asks="uninstall_question", run="run_uninstall", face="cli", auth=False),
    Command("help", "", SAFE, READS, "Explain a command, same as its --help",
        Arg("command", TEXTS, "command, or its first word", None), run="run_help", text="help_text",
        member="commands", columns=Columns("Command: name 0"), face="cli", auth=False,
        note="With --raw it describes the commands for programs: names, effects, arguments, exit statuses.",
        examples="show instances\n--raw | jq '.commands[].name'"),
    Command("repl", "-> none", SAFE, SETS, "Run commands from a prompt or script",
        run="run_repl", face="cli", auth=False,
        note="Global options given here apply to all commands. `exit`, `quit` or Ctrl-D ends the session.",
        examples="--raw < commands.txt"),
    Command("completion", "-> text", SAFE, READS, "Print a shell completion script",
        Arg("shell", TEXT, "bash, zsh or fish", choices="bash zsh fish"),
        run="run_completion", face="cli", auth=False,
        note='To enable it permanently, add eval "$(vastai completion bash)" to ~/.bashrc, eval "$(vastai completion zsh)" to '
             "~/.zshrc, or vastai completion fish | source to ~/.config/fish/config.fish.",
        examples="bash"))
# fmt: on


# ---------------------------------------------------------------------- from arguments to a request


class View:
    """How an answer is shown, and whether its user has `confirmed` the question; a program is not
    asked.  `common` are the global options of a line.
    """

    def __init__(
        self,
        format: str = "json",
        quiet: bool = False,
        confirmed: bool = True,
        common: Row | None = None,
    ) -> None:
        self.format = format
        self.quiet = quiet
        self.confirmed = confirmed
        self.common = common or {}
        self.fields = self.common.get("fields", "")
        self.color = not self.common.get("no_color")
        self.full = self.common.get("full", False)
        self.raw = self.common.get("raw", False)
        self.warned: set[str] = set()  # what was warned of: a request may be built several times

    @property
    def columns_only(self) -> bool:
        """Is nothing shown but a table's own columns?  Then the service need not send the rest."""
        return self.quiet or (self.format == "table" and not self.fields)


class Call:
    """One use of a command: who calls, which row, with what, from which face."""

    def __init__(
        self, client: VastAI, row: Command, params: Row, view: View, cli: bool = False
    ) -> None:
        self.client = client
        self.row = row
        self.params = params
        self.view = view
        self.cli = cli
        self.secrets = client.secrets  # texts that nothing may show; each request adds its own

    def __getitem__(self, name: str) -> Any:
        return self.params.get(name)

    def send(self, query: Row | None = None, body: Row | None = None, **params: Any) -> Any:
        """Sends this row's own request, with members and parameters replaced; the row's result."""
        call = self.of(self.row, **{**self.params, **params})
        answer = send_with_retries(call, build_request(call, query, body))
        self.secrets = call.secrets
        return extract_result(call, answer)

    def do(self, name: str, **params: Any) -> Any:
        """Runs another row, by its name in Python, on the same client as a program would."""
        row = METHODS[name]
        with row:
            return perform(Call(self.client, row, check_params(row, params, cli=False), View()))

    def of(self, row: Command, client: VastAI | None = None, /, **params: Any) -> Call:
        """A call of another row or by another client, from the same face and with the same view."""
        return Call(client or self.client, row, params, self.view, self.cli)

    def hurried(self, most: float = FOREVER) -> Call:
        """This call with one try a request, which takes at most so many seconds."""
        client = self.client.varied(retry=1, timeout=min(self.client.timeout, most))
        return self.of(self.row, client)

    @property
    def at_terminal(self) -> bool:
        """Can a person be asked?"""
        return self.cli and is_terminal(sys.stdin) and is_terminal(sys.stderr)

    @property
    def has_reader(self) -> bool:
        """Does a person read the table?  Only then may a remark below it take another request."""
        quiet = self.view.quiet or self.client.quiet or self.client.curl or not self.cli
        shown = self.view.format == "table" and not quiet
        return shown and is_terminal(sys.stdout) and is_terminal(sys.stderr)

    def get(self, name: str, default: Any) -> Any:
        """A parameter, or `default` if it is None."""
        value = self.params.get(name)
        return default if value is None else value

    def label(self, name: str) -> str:
        """How an error names an argument."""
        return next(arg for arg in self.row.args if arg.name == name).label(self.cli)

    def agrees(self, question: str) -> bool:
        """Does the user of the command line say yes?  A program is not asked, and does not."""
        return self.cli and agreed(question)

    def signals_caught(self, wanted: bool = True, tells: Callable[[], str] = str) -> SignalGuard:
        """A block in which signals interrupt as Ctrl-C does, and what it then `tells` is said on
        stderr; signals of a program are its own.
        """
        return SignalGuard(tells, off=not (self.cli and wanted))

    def remark(self, text: str) -> None:
        """Tells the user of the command line something, unless --quiet is given."""
        if self.cli:
            remark(self, text)

    def tell(self, text: str) -> None:
        """A line on stderr about what is rented, tried or destroyed; never held back, as it is
        about money.  Methods print nothing.
        """
        if self.cli and text:
            say(text)

    def warn(self, text: str) -> None:
        """Warns of something in the input: on stderr, or with warnings.warn() in a program."""
        text = redact_sentence(text, self.secrets)
        if not self.cli:
            import warnings

            try:
                warnings.warn(text, stacklevel=2)
            except ValueError:  # stderr is closed
                pass
        elif not self.client.quiet and text not in self.view.warned:
            self.view.warned.add(text)
            warn(text)

    def progress(self, text: str, changing: str = "", in_pipe: bool = False) -> None:
        """Shows progress to a person who waits; see show_progress().  "" clears it."""
        if self.cli and not self.client.quiet:
            text = redact_sentence(text, self.secrets)
            changing = redact_sentence(changing, self.secrets)
            show_progress(text, changing, in_pipe and self.view.format != "json")

    def confirm(self, **words: Any) -> None:
        """Asks the row's question, with `words` in its braces.  Raises UsageError unless agreed."""
        confirm(self, fill(self, self.row.ask, words))


class Rows(list):  # type: ignore[type-arg]
    """Rows of an answer; `answer` is all that the service said, of several pages the last one."""

    __slots__ = ("answer",)

    def __init__(self, rows: Iterable[Row] = (), answer: Row | None = None) -> None:
        super().__init__(rows)
        self.answer: Row = answer or {}

    @property
    def next_token(self) -> str | None:
        """What `after_token` or `next_token` takes to get the next page; None after the last."""
        return self.answer.get("next_token") or None


def as_plain(result: Any) -> Any:
    """A result as a caller of the SDK gets it: a plain list or text, which every library takes."""
    for plain in (list, str):
        if isinstance(result, plain):
            return plain(result)
    return result


def bind_params(row: Command, args: Sequence[Any], given: Row) -> Row:
    """The parameters of a method call, taken as a Python function does; TypeError as from one."""
    name = row.methods[0]
    mine = row.args_of("sdk")
    if len(args) > len(mine):
        raise TypeError(f"{name}() takes at most {len(mine)} arguments ({len(args)} given)")
    params = {arg.name: value for arg, value in zip(mine, args)}
    spelling = {old: arg.name for arg in mine for old in arg.old}
    names = {arg.name for arg in mine}
    placed = set(params)
    for word, value in given.items():
        target = word if word in names else spelling.get(word)
        if target is None:
            raise TypeError(
                f"{name}() got an unexpected keyword argument {word!r}{suggest(word, names)}"
            )
        known = params.get(target)
        differs = known is not None and value is not None and value != known
        if word in placed or differs:
            raise TypeError(f"{name}() got multiple values for argument {target!r}")
        params[target] = known if value is None else value
    missing = [arg.name for arg in mine if arg.default is REQUIRED and arg.name not in params]
    if missing:
        names_missing = ", ".join(map(repr, missing))
        raise TypeError(f"{name}() missing {len(missing)} required argument(s): {names_missing}")
    return params


def check_params(row: Command, params: Row, cli: bool) -> Row:
    """Every parameter of the row, converted and with its default.  Raises UsageError."""
    result = {}
    for arg in row.args:
        default = arg.cli if cli else arg.default
        if default is REQUIRED and arg.face == ("sdk" if cli else "cli"):
            default = None
        value = params.get(arg.name)
        if value is None:
            if default is REQUIRED:
                raise missing_argument_error(row, arg, cli)
            value = default
        if value is not None and arg.name in params:
            value = convert_value(arg, value, cli)
        result[arg.name] = value
    check_together(row, params, cli)
    return result


def check_together(row: Command, params: Row, cli: bool) -> None:
    """Raises UsageError unless the parameters that a caller gave go together: exactly one of each
    set of `one_of`, at most one of each of `either`, one of `needs`, and what an argument `needs`.
    """
    args = {arg.name: arg for arg in row.args}
    given = {
        name
        for name, value in params.items()
        if value is not None and value is not False and (type(value) is not list or value)
    }
    mine = {arg.name for arg in row.args_of("cli" if cli else "sdk")}
    one_of = row.one_of.split(", ")
    for choice in one_of + row.either.split(", "):
        names = choice.split()
        count = len(given.intersection(names))
        due = names and choice in one_of and mine.issuperset(names)
        if count > 1 or (due and not count):
            raise UsageError(f"give either {labels_of(args, names, cli)}")
    for arg in row.args:
        names = arg.needs.split() if arg.name in given else []
        lacks = names and not given.intersection(names)
        if lacks and (cli or str(params[arg.name]) != arg.default):
            raise UsageError(f"{arg.label(cli)} needs {labels_of(args, names, cli)}")
    if row.needs:
        check_needs(row, args, params, cli)


def check_needs(row: Command, args: dict[str, Arg], params: Row, cli: bool) -> None:
    """Raises UsageError unless one of the arguments that a row `needs` is given."""
    mine = [arg for arg in row.args_of("cli" if cli else "sdk") if arg.option and arg is not YES]
    names = row.needs.split() if row.needs != "*" else [arg.name for arg in mine]
    for name in names:
        value = params.get(name)
        if value is not None and (value is not False or args[name].default is None):
            return
    if len(names) == 1:
        raise missing_argument_error(row, args[names[0]], cli)
    if row.needs != "*":
        raise UsageError(f"give {labels_of(args, names, cli)}")
    raise UsageError(f"nothing to change; say what, such as {mine[0].label(cli)}")


def labels_of(args: dict[str, Arg], names: Iterable[str], cli: bool) -> str:
    """The arguments of these names as an error lists them: --a or --b."""
    return " or ".join(args[name].label(cli) for name in names)


def convert_value(arg: Arg, value: Any, cli: bool) -> Any:
    """One value as the row wants it.  Raises UsageError."""
    try:
        value = arg.kind.convert(value)
    except UsageError as error:
        raise UsageError(f"{arg.label(cli)}: {error.msg}") from None
    except RecursionError:
        if not is_deep(value):  # the program's own calls are
            raise
        raise UsageError(f"{arg.label(cli)}: nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        if arg.kind is VARIABLE and isinstance(value, str):  # with the name may stand its value
            value = without_value(value)
        found = "" if arg.secret else f", not {short_repr(value)}{number_hint(arg.kind, value)}"
        raise UsageError(f"{arg.label(cli)}: expected {arg.kind.expects}{found}") from None
    if not arg.choices:
        return value
    for choice in value if arg.kind.many else [value]:
        if choice not in arg.choices:
            allowed = [str(choice) for choice in arg.choices]
            raise UsageError(
                f"{arg.label(cli)}: expected one of {', '.join(allowed)}, "
                f"not {short_repr(str(choice))}{suggest(str(choice), allowed)}"
            )
    return value


@record
class Request:
    """A request in the service's terms: method, URL, query and JSON body.

    `hidden` names the members of the body that nothing may show, `secrets` their texts.  `safe` is
    the row's.  `auth` is False if the key must not go along, as with the address of a result.
    """

    method: str
    url: str
    query: Row
    body: Row | None
    safe: bool
    auth: bool = True
    hidden: Sequence[str] = ()

    @property
    def secrets(self) -> list[str]:
        return [text for name in self.hidden for text in _texts((self.body or {}).get(name))]

    @property
    def target(self) -> str:
        """The URL with its query.  Raises UsageError for what cannot be sent."""
        return f"{self.url}?{encode_query(self.query)}" if self.query else self.url


def encode_query(query: Row) -> str:
    """The query of a URL; values that are not text go as JSON.  Raises UsageError for what JSON
    cannot hold: NaN, half a character, an object of the program.
    """
    import json
    from urllib.parse import quote

    pairs = []
    try:
        for name, value in query.items():
            text = value if type(value) in (str, int) else json.dumps(value, allow_nan=False)
            pairs.append(f"{quote(name, safe='')}={quote(str(text), safe='')}")
    except (TypeError, ValueError, RecursionError) as problem:
        raise unsendable(problem, query) from None
    return "&".join(pairs)


def encode_json(body: Any) -> bytes:
    """A body as JSON in UTF-8.  Raises UsageError for what JSON cannot hold."""
    import json

    try:
        text = json.dumps(body, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8", "backslashreplace")  # half a character as its escape
    except (TypeError, ValueError, RecursionError) as problem:
        raise unsendable(problem, body) from None


def unsendable(problem: Exception, value: Any) -> Exception:
    """The error of a value that JSON cannot hold; a full stack of the program's own stays itself."""
    if isinstance(problem, RecursionError) and not is_deep(value):
        return problem
    return UsageError(
        "expected arguments that JSON can hold: text, finite numbers, True, False, None, lists, "
        "dicts"
    )


def build_request(call: Call, query: Row | None = None, body: Row | None = None) -> Request:
    """The request of a call, from its row and parameters alone; what is None is left out."""
    row = call.row
    client = call.client
    slots = {"query": dict(row.query), "body": dict(row.body), "path": {}}
    nullable = {*row.body, *(body or ())}  # members that go out even as null
    hidden = ["api_key"] if KEY in row.body.values() else []
    filled = slots["query" if row.method == "GET" else "body"]
    for arg in row.args:
        value = call[arg.name]
        names = [arg.key]
        if arg.sent:
            value = arg.sent(value)
        if arg.key == "*":  # all members, with their nulls
            names = list(value or ())
            filled.update(value or {})
            nullable.update(names)
        elif value is not None:
            for place in row.places(arg):
                slots[place][arg.key if place != "path" else arg.name] = value
        if arg.secret:
            hidden += names
    path = row.build(call, filled) if row.build else None
    slots["query"].update(query or {})
    slots["body"].update(body or {})
    sent = None
    if row.method != "GET":
        sent = {
            name: client.api_key if value is KEY else value
            for name, value in slots["body"].items()
            if value is not None or name in nullable
        }
    url = url_of(client.server_url, path or row.path, slots["path"])
    return Request(row.method, url, slots["query"], sent, row.safe, hidden=hidden)


def url_of(server: str, path: str, parts: Row) -> str:
    """The address of a path of the table; `parts` fill its braces, each percent-encoded whole."""
    root, _, path = path.rpartition(":")
    if root == "run" and server == SERVER:
        server = SERVERLESS
    if not root and not path.startswith("/api/"):
        path = "/api/v0" + path
    if parts:
        path = path.format_map({name: path_part(name, value) for name, value in parts.items()})
    return server + path


def path_part(name: str, value: Any) -> str:
    """A value as one part of a path: percent-encoded whole, and dots if they mean a folder."""
    from urllib.parse import quote

    text = quote(str(value), safe="")
    if not str(value).strip() or len(str(value)) > 300:
        raise UsageError(f"{name}: expected a name of 1 to 300 characters, not {short_repr(value)}")
    return text.replace(".", "%2E") if text in (".", "..") else text


def extract_result(call: Call, answer: Answer) -> Any:
    """The part of the answer that the row promises, with the row's changes to each object.  Raises
    if it is not there, or is a refusal.
    """
    row = call.row
    result = result_of(row, answer)
    if not row.each and not row.drops:
        return result
    for item in listed(result):
        if item is None:
            continue
        for name in row.drops.split():
            item.pop(name, None)
        if row.each:
            row.each(item)
    return result


def result_of(row: Command, answer: Answer) -> Any:
    """As extract_result(), before the row's changes to each object."""
    promises = row.is_list or row.made or row.member or row.effect == READS
    if answer.status_code == 204 and not answer.content and not promises:
        return {}  # "done", without more
    try:
        body = answer.json()
    except ValueError as problem:
        raise unusable_answer_error(row, answer, unusable_because(answer, problem)) from None
    check_accepted(row, body, answer)
    if row.returns == "any":
        return body
    if isinstance(body, str) and row.sentence:
        return {"success": True, "msg": body}
    try:
        return promised_part(row, body)
    except ValueError as problem:
        raise unusable_answer_error(row, answer, str(problem)) from None


def promised_part(row: Command, body: Any) -> Any:
    """The part of an answer that the row promises.  Raises ValueError with what is there
    instead.
    """
    part = body
    is_list = row.is_list
    member = "" if row.returns in ("text", "none") else row.returns.replace("[]", "")
    if member and not (row.strict and isinstance(body, list)):  # a bare list, at times
        if member not in as_dict(body):
            raise ValueError(f"an answer without {member!r}")
        if body[member] is None and not is_list:
            return None
        part = body[member]
    expected = "a list of objects" if is_list else "a JSON object"
    if not (is_rows(part) if is_list else isinstance(part, dict)):
        raise ValueError(f"{kind_of(part)} instead of {expected}")
    if is_list:
        return Rows(part, as_dict(body))
    if row.member and not (part.get("needs_machine") or is_rows(get_path(part, row.member))):
        raise ValueError(f"an answer without a list {row.member!r}")
    return part


def check_accepted(row: Command, body: Any, answer: Answer) -> None:
    """Raises the service's refusal, if the answer is one, and an error if it confirms nothing."""
    members = as_dict(body)
    changes = row.effect != READS
    failed = has_failed(members) and (row.strict or (changes and not confirms(members)))
    if denies(members) or failed:
        raise refusal_error(members, answer)
    doubt = doubt_about(row, body)
    if doubt and row.effect == SPENDS and not row.safe:
        raise outcome_unknown_error(row, doubt, answer)
    if doubt:
        hint = look_first(row) if changes else ""
        raise make_error(VastAIError, doubt, response=answer, hint=hint)


def doubt_about(row: Command, body: Any) -> str:
    """Why an answer does not confirm what the row does; "" if it does, or if nothing is due."""
    changes = row.effect != READS
    if isinstance(body, dict):
        if changes and not confirms(body) and (not body or "success" in body):
            return "the service did not confirm it"
        if row.rents and get_path(body, row.made) in (None, ""):
            return f"the service confirmed it without {row.made!r}"
    elif isinstance(body, str) and (row.strict or changes) and not row.sentence:
        said = f"said {one_line(body)!r}" if body else "sent an empty answer"
        return f"the service {said}{', which does not confirm it' if changes else ''}"
    return ""


def confirms(body: Row) -> bool:
    """Does an answer say that it was done?"""
    return body.get("success") in (True, "true")


def denies(body: Row) -> bool:
    """Does an answer say that it was refused?"""
    return body.get("success", True) in (False, "false")


def has_failed(body: Row) -> bool:
    """Does an answer tell of an error?  What only reads may have a member of that name."""
    told = body.get("error") or body.get("error_msg")
    return bool(told) or body.get("status") == "error"


def is_rows(value: Any) -> bool:
    """Is a value of the service a list of objects?"""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def kind_of(value: Any) -> str:
    """What a JSON value is, for an error."""
    names = {dict: "a JSON object", list: "a list", str: "a text", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


# What `build` names: query and body, if a row's arguments are not sent as they are.  In the
# table's order.

OFFER_DEFAULTS: Row = {
    "verified": {"eq": True},
    "external": {"eq": False},
    "rentable": {"eq": True},
}


def parse_offers(call: Call, query: Any, start: Row) -> Row:
    """The conditions of a query text on offers, with its directives, on top of `start`."""
    return parse_query(query, start, OFFER_FIELDS, ALIASES, MULTIPLIERS, call.warn)


def offers_where(call: Call, query: Any, start: Row) -> Row:
    """The conditions of a query text on offers, on top of `start`."""
    found = parse_offers(call, query, start)
    if "chunked" in take_directives(call, found):
        raise UsageError("chunked is for `vastai search offers` only")
    return found


def take_directives(call: Call, found: Row) -> set[str]:
    """Takes the directives, which are no fields, out of conditions: "georegion", "chunked"."""
    given = {name: found.pop(name) for name in DIRECTIVES if name in found}
    taken = {name for name, condition in given.items() if condition == {"eq": True}}
    if not call.cli:
        return taken
    for name in given:
        if name not in taken:
            raise UsageError(f"{name} works only as {name}=true")
    if "georegion" in taken and "geolocation" not in found:
        raise UsageError(
            "georegion=true needs a region; write geolocation=EU georegion=true "
            f"({', '.join(GEOREGIONS)})"
        )
    return taken


def offer_query(call: Call) -> tuple[Row, set[str]]:
    """The conditions of an offers search, with their defaults, and its directives."""
    query = call["query"]
    start = {} if call["no_default"] else OFFER_DEFAULTS
    if query is None or isinstance(query, dict):  # the command line has "" for none
        rented = {} if call["no_default"] else {"rented": {"eq": False}}
        return {**start, **rented, **(query or {})}, set()
    found = parse_offers(call, query, start)
    return found, take_directives(call, found)


def search_body(call: Call, conditions: Row, fields: str, **more: Any) -> Row:
    """The body of a search: conditions, order, allocated storage, and the limit if there is one."""
    limit = {"limit": call["limit"]} if call["limit"] else {}
    order = parse_order(call["order"], ALIASES, fields, call.warn)
    return {**conditions, "order": order, "allocated_storage": call["storage"], **limit, **more}


def build_filter_search(call: Call, query: Row) -> None:
    """`select_filters` from a query: templates, invoices, benchmarks."""
    conditions = call["query"]
    if not isinstance(conditions, dict):
        conditions = parse_query(conditions, {}, call.row.fields, tell=call.warn)
    query.clear()
    query.update(select_cols=["*"], select_filters=conditions)


def build_instance(call: Call, body: Row) -> None:
    """The body of create instance(s)."""
    body["price"] = call.get("price", call["bid_price"])
    start_up(call, body)
    portal = body["env"].get("PORTAL_CONFIG")
    runtype = "jupyter" if call["template_hash"] else ""  # a template may bring Jupyter
    if portal and "jupyter" not in body.get("runtype", runtype):
        entries = [entry for entry in str(portal).split("|") if "jupyter" not in entry.lower()]
        if not any(entries):
            raise UsageError(
                "PORTAL_CONFIG has only Jupyter entries, but the instance has no Jupyter"
            )
        body["env"]["PORTAL_CONFIG"] = "|".join(entries)
    volume = volume_of(call)
    if volume:
        body["volume_info"] = volume
    if call["vm"]:
        body["vm"] = True


def environment_of(call: Call) -> dict[str, str]:
    """The environment that a caller gives, as the service stores it."""
    label = call.label("env")
    try:
        return parse_env(call["env"], lambda text: call.warn(f"{label}: {text}"))
    except UsageError as error:
        raise UsageError(f"{label}: {error.msg}") from None


def build_update_instance(call: Call, body: Row) -> None:
    """The environment as an object."""
    if call["env"] is not None:
        body["env"] = environment_of(call)


def start_commands(call: Call) -> str | None:
    """What the container runs at its start, from the option that takes precedence."""
    given = [name for name in ("onstart", "onstart_cmd", "entrypoint") if call[name] is not None]
    for name in given[1:]:
        call.warn(f"{call.label(given[0])} takes precedence over {call.label(name)}")
    return call[given[0]] if given else None


def start_up(call: Call, body: Row) -> None:
    """What `create instance` and `launch instance` have in common: environment, access, commands at
    the start.
    """
    runtype = runtype_of(call)
    body["env"] = environment_of(call)
    body["onstart"] = start_commands(call)
    if runtype:
        body["runtype"] = runtype
    if call["args"] and call["args"] != [""]:
        body["args"] = call["args"]
    if call["max_hours"] is not None:
        body["onstart"] = with_lease(call, body)


ONLY_DIRECT = "direct has no effect without ssh or jupyter"


def runtype_of(call: Call) -> str | None:
    """The kind of access that the flags ask for, in the service's words; None leaves it to the
    template or service.
    """
    runtype = call["runtype"]
    ssh = call["ssh"]
    direct = call["direct"]
    args = call.get("args", call["args_str"])
    asked = ssh or call["jupyter"] or direct
    if call["template_hash"]:
        if asked:
            call.warn("ssh, jupyter and direct have no effect: the template sets the access")
        return runtype or None
    if runtype:
        if asked:
            raise UsageError("runtype cannot be combined with ssh, jupyter or direct")
        return str(runtype)
    if call["jupyter"] or call["jupyter_lab"] or call["jupyter_dir"]:
        if args is not None:
            raise UsageError(
                "args cannot be combined with jupyter: Jupyter replaces the entrypoint"
            )
        return "jupyter_direc ssh_direc ssh_proxy" if direct else "jupyter_proxy ssh_proxy"
    if ssh:
        return "ssh_direc ssh_proxy" if direct else "ssh_proxy"
    if direct and not call.cli:
        raise UsageError("direct needs ssh or jupyter")
    if direct:
        call.warn(ONLY_DIRECT)
    if args is not None:
        return "args"
    return "ssh" if call.cli else None


def volume_of(call: Call) -> Row | None:
    """`volume_info` from the volume options."""
    create = call["create_volume"]
    link = call["link_volume"]
    size = call["volume_size"]
    path = call["mount_path"]
    name = call["volume_label"]
    volume = link if create is None else create
    if volume is None:
        return None
    if not path or path == "/" or "//" in path:
        found = f", not {printable(path)!r}" if path else ""
        raise UsageError(f"a volume needs --mount-path, a path such as /root/volume{found}")
    info = {"mount_path": path, "create_new": create is not None, "volume_id": volume}
    if name:
        info["name"] = name
    if create is not None:
        info["size"] = 15 if size is None else size
    return info


def build_launch(call: Call, body: Row) -> None:
    """The body of launch instance: the offers query and the instance in one."""
    own = {"type": "on-demand", "allocated_storage": call["disk"]}
    body["q"] = search_body(call, launch_conditions(call), OFFER_FIELDS, **own)
    start_up(call, body)


def launch_conditions(call: Call) -> Row:
    """The conditions on offers: from --query, or from GPU, region and disk."""
    query = call["query"]
    options = [call[name] for name in ("gpu_name", "num_gpus", "region")]
    if query is None:
        if None in options[:2]:
            raise UsageError("give --gpu-name and --num-gpus, or --query")
        return launch_query(call)
    if not isinstance(query, dict):  # a dict replaces them, as in the service's own client
        if options != [None, None, None]:
            raise UsageError("give either --query, or --gpu-name, --num-gpus and --region")
        conditions, directives = offer_query(call)
        if "chunked" in directives:
            for field, least in CHUNK.items():
                narrow(conditions, field, least)
        return conditions
    for field, limits in query.items():
        if not isinstance(limits, dict):
            raise UsageError(
                f"query: expected {{operator: value}} for {field}, not {short_repr(limits)}"
            )
    return {field: dict(limits) for field, limits in query.items()}  # they are changed


def launch_query(call: Call) -> Row:
    """The conditions that the options of launch instance stand for."""
    number = str(call["num_gpus"]).strip()
    usual = number in ("1", "2", "4", "8", "12", "14")
    if not usual and (call.cli or not is_digits(number)):
        raise UsageError(f"--num-gpus: expected 1, 2, 4, 8, 12 or 14, not {printable(number)!r}")
    conditions = {**OFFER_DEFAULTS, "rented": {"eq": False}, "num_gpus": {"eq": number}}
    model = call["gpu_name"].strip("\"' ").replace("_", " ")
    if not model or any(c in "\"'=<>![]{},;|&" or not c.isprintable() for c in model):
        raise UsageError(
            f"--gpu-name: expected one model such as RTX_4090, not {printable(call['gpu_name'])!r}"
        )
    if model not in ("any", "?", "*"):
        conditions["gpu_name"] = {"eq": model}
    # '' is a mistake on the command line, but programs have it for "anywhere"
    if call["region"] is not None and (call.cli or call["region"]):
        conditions["geolocation"] = {"in": launch_countries(call["region"])}
    if call["disk"]:
        conditions["disk_space"] = {"gte": str(call["disk"])}
    return conditions


def launch_countries(region: str) -> list[str]:
    """The countries of one of REGIONS, or those of a text such as [US,CA]."""
    known = {name.lower(): countries for name, countries in REGIONS.items()}
    name = region.strip().replace(" ", "_").lower()
    places = known.get(name) or region.replace('"', " ").replace(",", " ").strip("[] ")
    codes = {code for codes in GEOREGIONS.values() for code in codes.split()}
    countries = [place.upper() for place in places.split()]
    if not countries or not codes.issuperset(countries):
        raise UsageError(
            f"--region: expected one of {', '.join(REGIONS)}, or countries such as [US,CA], "
            f"not {printable(region)!r}{suggest(region, REGIONS)}"
        )
    return countries


def schedule_of(call: Call, request: Request) -> Row:
    """The job that repeats `request`, from the options of SCHEDULE.  Raises UsageError."""
    frequency = call["schedule"]
    day, hour = (None if call[name] is None else int(call[name]) for name in ("day", "hour"))
    if (day is not None, hour is not None) != (frequency == "WEEKLY", frequency != "HOURLY"):
        raise UsageError(
            f"--schedule {frequency}: expected --day '*' --hour '*' for HOURLY, --day '*' and an "
            "--hour for DAILY, a --day and an --hour for WEEKLY"
        )
    today = time.time() // 86400 * 86400
    start = float(call.get("start_date", today))
    end = float(call.get("end_date", today + 7 * 86400))
    check_period(start, end)
    if start == end:
        raise UsageError("the --start_date and --end_date of a job must differ")
    return {
        "start_time": start,
        "end_time": end,
        "api_endpoint": request.url[len(call.client.server_url) :],
        "request_method": request.method,
        "request_body": request.body,
        "day_of_the_week": day,
        "hour_of_the_day": hour,
        "frequency": frequency,
        "instance_id": call.get("id", call["instance"]),
    }


# the flags that set members of a template
TEMPLATE_FLAGS = parse_table("""\
ssh jupyter direct: jup_direct ssh_direct use_ssh runtype
jupyter_lab: use_jupyter_lab
login: docker_login_repo
hide_readme: readme_visible
search_params: extra_filters
public: private""")


def template_members(call: Call) -> Row:
    """The members of a template that its flags stand for, in the service's words."""
    ssh = call["ssh"]
    jupyter = call["jupyter"]
    direct = call["direct"]
    login = (call["login"] or "").split()
    search = call["search_params"]
    plain = call["no_default"] or (search is None and not call.cli)
    return {
        "jup_direct": jupyter and direct,
        "ssh_direct": ssh and direct,
        "use_ssh": ssh or jupyter,
        "runtype": "jupyter" if jupyter else "ssh" if ssh else "args",
        "use_jupyter_lab": call["jupyter_lab"],
        "docker_login_repo": login[0] if login else None,
        "readme_visible": not call["hide_readme"],
        "extra_filters": offers_where(call, search, {} if plain else OFFER_DEFAULTS),
        "private": not call["public"],
    }


def build_template(call: Call, body: Row) -> None:
    """A new template: what the flags mean, unless Python gives the service's own members."""
    if call["direct"] and not (call["ssh"] or call["jupyter"]):
        call.warn(ONLY_DIRECT)
    body.update({**template_members(call), **body})


def build_template_change(call: Call, body: Row) -> None:
    """A changed template: only what is named, in the service's words."""
    if call["no_default"] and call["search_params"] is None:  # conditions that stay have none
        raise UsageError("--no-default needs --search_params")
    made = template_members(call)
    for flags, members in TEMPLATE_FLAGS.items():
        if any(call[flag] not in (None, False) for flag in flags.split()):
            body.update({name: made[name] for name in members.split() if name not in body})


# what an update sends of a template as it was
TEMPLATE_MEMBERS = """\
name image tag href repo env onstart jup_direct ssh_direct use_jupyter_lab runtype use_ssh
jupyter_dir docker_login_repo docker_login_user extra_filters recommended_disk_space readme
readme_visible desc private args_str volume_info"""


def build_delete_template(call: Call, body: Row) -> None:
    """The hash takes precedence over the id."""
    body.pop("template_id" if call["hash_id"] else "hash_id", None)


def build_volume_search(call: Call, body: Row) -> None:
    """The body of a volume search; in the SDK a condition replaces the defaults on its field."""
    given = call["query"]
    start = {}
    if not call["no_default"]:
        start = {"verified": {"eq": True}, "external": {"eq": False}, "disk_space": {"gte": 1}}
    if isinstance(given, dict):
        found = {**start, **given}
    else:
        first = start if call.cli else {name: {} for name in start}
        found = parse_query(given, first, VOLUME_FIELDS, None, MULTIPLIERS, call.warn)
    found = {name: conditions or start.get(name, {}) for name, conditions in found.items()}
    body.update(search_body(call, found, VOLUME_FIELDS))


def build_copy(call: Call, body: Row) -> str | None:
    """Both sides of a copy; one without an id goes to another address of the service."""
    src, src_path = place_of(call, "src")
    dst, dst_path = place_of(call, "dst")
    if {src, dst} <= {None, "local"}:
        raise UsageError("both places are on this computer; write one of them as INSTANCE:PATH")
    if call["exclude"] and not {src, dst} & {None, "local"}:
        raise UsageError("--exclude is for copies from or to this computer")
    body.update(client_id="me", src_id=src, dst_id=dst, src_path=src_path, dst_path=dst_path)
    return "/commands/rsync/" if None in (src, dst) else None


def place_of(call: Call, name: str) -> tuple[int | str | None, str]:
    """(id, path) of one side of a copy; the id is None or "local" for this computer.

    A word that names a local file or folder is that one, even with a colon in it.
    Raises UsageError.
    """
    text = call[name]
    id: int | str | None
    id, colon, path = text.partition(":")
    if not colon or on_drive(text) or (call.cli and os.path.exists(os.path.expanduser(text))):
        id = None
        path = text
        if is_id(text):
            id = int(text)
            path = "/"
    remote = id not in (None, "local")
    good = id != "" and path and "//" not in path and "-" not in (path[0], str(id)[0])
    if not good or (remote and ":" in path):
        raise UsageError(
            f"{name}: cannot read {printable(text)!r}; "
            "write INSTANCE:PATH, V.VOLUME:PATH or local:PATH"
        )
    return id, path


def on_drive(text: str) -> bool:
    r"""Is a text a path of Windows: C:\data, C:/data?"""
    return text[1:2] == ":" and text[:1].isalpha() and text[2:3] in ("/", "\\")


def build_cloud_copy(call: Call, body: Row) -> None:
    """The options of rclone that the flags stand for."""
    if call["instance"] is None or call["connection"] is None:
        raise UsageError("give --instance and --connection")
    given = call["transfer"]
    expected = "'Instance to Cloud' or 'Cloud to Instance'"
    if call["schedule"]:
        expected = "'Instance to Cloud', the only direction that can be scheduled"
    if f"'{given.lower()}'" not in expected.lower():
        raise UsageError(f"--transfer: expected {expected}, not {printable(given)!r}")
    names = ("dry_run", "size_only", "ignore_existing", "update", "delete_excluded")
    body.setdefault("flags", ["--" + name.replace("_", "-") for name in names if call[name]])


def build_delete_deployment(call: Call, body: Row) -> str | None:
    return None if call["name"] is None else "/deployments/"


def build_code(call: Call, body: Row) -> None:
    """A command line names a method in one way; published programs give its type as well."""
    if call.cli and call["method_type"] and call["method_id"]:
        raise UsageError("give either --method-type or --method-id")


def build_tfa_delete(call: Call, body: Row) -> None:
    """A code by SMS or email is only good with its secret."""
    build_code(call, body)
    method = call["method_type"]
    if method in ("sms", "email") and not call["secret"]:
        raise UsageError(
            f"a code by {method} needs the --secret that `vastai tfa send-{method}` prints"
        )


def build_market(call: Call, query: Row) -> None:
    """The filters of market metrics in the service's words."""
    verified = {"true": "yes", "false": "no", "all": "all"}
    hosting = {"true": "secure_cloud", "false": "community", "all": "all"}
    query["verified"] = verified[call["verified"]]
    query["hosting_type"] = hosting[call["datacenter"]]


def build_overlay(call: Call, body: Row) -> None:
    """A whole number is an overlay's id, anything else its name."""
    overlay = call["overlay_identifier"]
    if is_id(overlay):
        body["overlay_id"] = int(overlay)
    else:
        body["overlay_name"] = overlay


def check_period(start: float, end: float) -> None:
    """Raises UsageError for a period that ends before it starts."""
    if end < start:
        raise UsageError(
            f"the start date {format_utc(start)} is after the end date {format_utc(end)}; "
            "give an earlier start"
        )


def build_billing(call: Call, query: Row) -> str | None:
    """A page of invoices or of charges: the period, its types."""
    week = 7 * 86400
    path = None
    when = "when"
    kind = "service"
    names = INVOICE_TYPES
    types = call["invoice_type"]
    if call["charges"]:
        path = "/charges/"
        when = "day"
        kind = "type"
        names = CHARGE_TYPES
        types = call["charge_type"]
        query["format"] = call["format"]
    start = call.get("start_date", call.get("end_date", int(time.time())) - week)
    end = call.get("end_date", start + week)
    check_period(start, end)
    query["select_filters"] = {when: {"gte": start, "lte": end}}
    if types:
        query["select_filters"][kind] = {"in": [names[name] for name in types]}
    query["limit"] = min(call["limit"], 100) if call["limit"] > 0 else 20
    return path


def build_workergroup(call: Call, body: Row) -> None:
    """The search conditions of a new workergroup, as text."""
    parse_offers(call, call["search_params"], {})
    default = "" if call["no_default"] else " verified=True rentable=True rented=False"
    body["search_params"] = ((call["search_params"] or "") + default).strip()


def build_workergroup_change(call: Call, body: Row) -> None:
    """The search conditions of a workergroup stay unless new ones are given."""
    if call["search_params"] is not None or call["no_default"]:
        build_workergroup(call, body)


def build_earnings(call: Call, query: Row) -> None:
    """The period in days since 1970, with fractions; the service wants `machid` even when it is
    null.
    """
    start = call["start_date"]
    end = call["end_date"]
    if call["last_days"] is None:
        query["machid"] = None
        for name, date in (("sday", start), ("eday", end)):
            days = (time.time() - 86400 if date is None else date) / 86400
            query[name] = int(days) if days == int(days) else days
        if start is not None and end is not None:
            check_period(start, end)
    if call["machine_id"] is not None:
        query["machid"] = call["machine_id"]


# ---------------------------------------------------------------------------------------- transport
# One request, one answer.  What may be repeated is decided by `failure_kind` and `retry_pause`, and
# nowhere else but for serverless, which has `ask_service` and `Job`.


class Headers(dict):  # type: ignore[type-arg]
    """The header lines of an answer, found by their names in any case.  A name that comes twice
    has both values, with a comma between them.
    """

    def __getitem__(self, name: str) -> str:
        return str(super().__getitem__(name.lower()))

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


class Answer:
    """What the service answered; the shape that users of `requests` know.

    `fault` says why the content cannot be used although the service has answered ("" if it can),
    `after_loss` whether an earlier try of the same request got no answer, and `secrets` are the
    texts that no error may show, should the service echo one.  A streamed answer has `events`, an
    iterator, and no content.
    """

    after_loss = False
    secrets: Sequence[str] = ()

    def __init__(
        self,
        status_code: int,
        headers: Any,
        content: bytes,
        url: str,
        fault: str = "",
        events: Any = None,
    ) -> None:
        self.status_code = status_code
        self.headers = headers
        self.content = content
        self.url = url
        self.fault = fault
        self.events = events

    @property
    def ok(self) -> bool:
        return self.status_code < 400

    @property
    def reason(self) -> str:
        """The name of the status, such as "Not Found"; "" if it has none."""
        from http import HTTPStatus

        try:
            return HTTPStatus(self.status_code).phrase
        except ValueError:
            return ""

    @property
    def redirect(self) -> str:
        """The address that a redirect leads to; "" if it is none."""
        redirects = self.status_code in (301, 302, 303, 307, 308)
        return (self.headers.get("Location") or "") if redirects else ""

    @property
    def text(self) -> str:
        return self.content.decode("utf-8-sig", "replace")

    def json(self) -> Any:
        """The answer parsed.  Raises ValueError if it is not JSON, or JSON that cannot be used."""
        if self.fault:
            raise ValueError(self.fault)
        return parse_json(self.content)

    def redacted(self) -> Answer:
        """The answer with *** for its secrets."""
        if not self.secrets:
            return self
        import json

        try:
            body = self.json()
            clean = redact_value(body, self.secrets)
            content = self.content if clean == body else json.dumps(clean).encode()
        except ValueError:
            text = self.content.decode("utf-8", "surrogateescape")
            content = redact_text(text, self.secrets).encode("utf-8", "surrogateescape")
        headers = Headers(redact_value(self.headers, self.secrets))
        url = redact_text(self.url, self.secrets)
        return Answer(self.status_code, headers, content, url, self.fault)


DIGITS_AS_ZERO = bytes(
    48 if chr(code) in "0123456789" else 101 if chr(code) in "eE" else code for code in range(256)
)
NO_BRACKETS = bytes(code for code in range(256) if chr(code) not in "[]{}")
DEEPEST = 100  # levels of JSON; the service needs about five
LONGEST_NUMBER = 100  # digits
LARGE = 1 << 24  # bytes of JSON that can be parsed in any memory, whatever they hold
MOST_MEMORY = 1 << 29  # bytes that a parsed answer may take


def parse_json(content: bytes) -> Any:
    """The value of a JSON text.  Raises ValueError, also for JSON that cannot be used: NaN,
    infinite numbers (1e999), integers of hundreds of digits, nesting that nothing could show, and
    more than a small machine can hold.
    """
    import json

    if len(content) > LARGE and _memory_of(content) > MOST_MEMORY:
        raise ValueError("larger than memory allows")
    # A look at each number takes as long as all the rest, so there is one only if the text may have
    # a large exponent or a long number in it.
    zeros = content.translate(DIGITS_AS_ZERO, b"+")
    long = b"0" * LONGEST_NUMBER in zeros
    integer = _short_integer if long else int
    text = content.decode("utf-8-sig" if content[:3] == b"\xef\xbb\xbf" else "utf-8")
    try:
        value = json.loads(text, parse_constant=_no_number, parse_int=integer)
    except RecursionError:
        if not _may_be_deep(content):  # the program's own calls are
            raise
        raise ValueError("nested too deeply") from None
    if long or b"0e000" in zeros or _may_be_deep(content):
        check_value(value)
    return value


def _memory_of(content: bytes) -> int:
    """About how many bytes the value of a JSON text takes."""
    count = content.count
    return len(content) + 64 * count(b",") + 72 * count(b"[") + 240 * count(b"{")


def _short_integer(word: str) -> int:
    return int(word) if len(word) <= LONGEST_NUMBER else _no_number(f"{word[:20]}…")


def _may_be_deep(content: bytes) -> bool:
    """False for all JSON of up to DEEPEST levels that has no odd brackets in its texts."""
    brackets = content.translate(None, NO_BRACKETS)
    for _ in range(DEEPEST):  # each round takes the innermost level away
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return True


def is_deep(value: Any) -> bool:
    """Is a value, or the JSON in a text, nested too deeply to be sent?"""
    if isinstance(value, str):
        return _may_be_deep(value.encode("utf-8", "replace"))
    level = [value]
    for _ in range(DEEPEST):
        holders = [item for item in level if isinstance(item, (dict, list, tuple))]
        inner = (item.values() if isinstance(item, dict) else item for item in holders)
        level = [item for items in inner for item in items][:1000]  # it may hold itself
    return bool(level)


def check_value(value: Any) -> None:
    """Raises ValueError for infinite numbers and deep nesting in a parsed JSON text."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for item in level:
            if type(item) is dict:
                inner += item.values()
            elif type(item) is list:
                inner += item
            elif type(item) is float and item - item != 0:
                _no_number("Infinity")
        if not inner:
            return
        level = inner
    raise ValueError("nested too deeply")


loading = allocate_lock()  # held while modules are loaded, and while the process forks
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=loading.acquire, after_in_parent=loading.release, after_in_child=loading.release
    )


def load_modules() -> None:
    """Loads what a first request needs.  A fork by another thread waits until that is done: its
    child would find the modules half loaded, and wait forever for the thread that loads them.
    """
    with loading:
        import json  # noqa: F401
        import select  # noqa: F401
        import socket  # noqa: F401
        import urllib.parse  # noqa: F401
        import zlib  # noqa: F401


class NoAnswer(Exception):
    """A request to `url` brought no answer."""

    def __init__(self, reason: str, url: str = "") -> None:
        super().__init__(reason)
        self.url = url


class Unsent(NoAnswer):
    """The request cannot have reached the service."""


class Unanswered(NoAnswer):
    """The request may have been read, but no whole answer came."""


class NothingSent(Exception):
    """`curl` was asked for: the request was printed, not sent."""


# How an attempt can fail.
UNSENT = "unsent"  # it cannot have reached the service
LIMITED = "limited"  # the service asks to come back later, and has done nothing
UNANSWERED = "unanswered"  # it may have been carried out, nobody knows
REFUSED = "refused"  # the service has decided

NO_ANSWER = (408, 502, 503, 504, *range(520, 525))  # what gateways say instead of an answer


def failure_kind(status: int) -> str:
    """How an attempt failed that was answered with an HTTP status of 300 or more."""
    return LIMITED if status == 429 else UNANSWERED if status in NO_ANSWER else REFUSED


def may_pass(status: int) -> bool:
    """Does an HTTP status say that the same request may succeed later?"""
    return status in (408, 429) or 500 <= status < 600


def retry_pause(
    safe: bool,
    failure: str,
    attempt: int,
    attempts: int,
    asked: float | None,
    jitter: Callable[[float, float], float],
) -> float | None:
    """May a failed request be sent again?  The seconds to wait before that, or None for no.

    `safe` says whether the request may be carried out twice, `asked` is the pause that the service
    asks for (seconds, or None), and `jitter(low, high)` chooses a number between its arguments.
    """
    if failure == REFUSED or attempt >= attempts:
        return None
    if failure == UNANSWERED and not safe:
        return None  # at most once
    if asked is not None:
        return asked if asked <= LONGEST_PAUSE else None
    doublings = min(attempt - 1, 8)
    return jitter(0, min(LONGEST_PAUSE, 0.25 * 2**doublings))


def jitter(low: float, high: float) -> float:
    """A random number between `low` and `high`."""
    import random

    return random.uniform(low, high)


def send_with_retries(call: Call, request: Request) -> Answer:
    """The answer to a request, of HTTP status 2xx; raises the error of any other outcome.

    `retry_pause` decides what is repeated.  Beyond its rules, a request refused because the 2FA
    session has ended is sent again with the next key, and `send_once` replaces a kept connection
    that the service had closed, for a safe request.
    """
    client = call.client
    row = call.row
    call.secrets = list(dict.fromkeys([*call.secrets, *request.secrets, *client.secrets]))
    announce_request(call, request)
    # Interrupted, what is vital asks whether it was carried out.  Rentals say that themselves, and a
    # team without credit costs nothing.
    said = row.made.startswith("new_contract") or call["transfer_credit"] == 0
    vital = not request.safe and (row.only_copy or (row.effect == SPENDS and not said))
    attempt = 0
    lost = False  # an earlier attempt was sent, and got no answer
    while True:
        attempt += 1
        asked = None
        require_key(client, row)
        try:
            with call.signals_caught(
                vital, lambda: f"Was `vastai {row.name}` carried out? {look_first(row)}"
            ):
                answer = send_following_redirects(client, request, client.timeout)
        except NoAnswer as problem:
            failure = UNSENT if isinstance(problem, Unsent) else UNANSWERED
            error = no_answer_error(row, request, problem)
        else:
            answer.secrets = call.secrets
            answer.after_loss = lost and row.effect != READS
            if answer.status_code < 300:
                return answer
            failure = failure_kind(answer.status_code)
            error, asked = http_error(client, row, request, answer)
            if isinstance(error, AuthError) and renew_key(client, request, error):
                call.secrets += client.secrets
                attempt -= 1
                continue  # it was refused, not carried out
        pause = retry_pause(request.safe, failure, attempt, client.retry, asked, jitter)
        if pause is None:
            raise error
        lost = lost or failure == UNANSWERED
        sleep(pause)


def sleep(seconds: float) -> None:
    """time.sleep() a second at a time: a signal that comes just before it begins ends none, and is
    seen only after it.
    """
    for _ in range(int(seconds)):
        time.sleep(1.0)
    time.sleep(seconds % 1)


def announce_request(call: Call, request: Request) -> None:
    """Shows the request if `explain` or `curl` asks for that.  Raises NothingSent for `curl`."""
    client = call.client
    if client.explain:
        explain_request(client, request)
    if client.curl:
        line = format_curl(request)
        write_out(line + "\n")
        if "***" in line:
            call.warn("Replace *** with the secret before running this line")
        raise NothingSent


def require_key(client: VastAI, row: Command) -> None:
    """Raises AuthError if the command needs a key and there is none, UsageError for one that cannot
    be a key.
    """
    key: Any = client.api_key
    if key:
        check_key(key, client.key_origin)
    elif row.auth or client.profile:
        raise no_key_error(client.profile)


def renew_key(client: VastAI, request: Request, error: AuthError) -> bool:
    """Deletes the key of a 2FA session that is over and takes the next one: of the session that
    another process may have begun meanwhile, else the API key.

    False if it was another key that was refused; only the command line uses one of a session.
    """
    path = client.key_origin
    refused = client.api_key
    if path != profile_file("vast_tfa_key", client.profile) or not key_refused(error.msg):
        return False
    newer = read_key(path) not in ("", refused)
    if not newer:
        try:
            os.unlink(path)
        except OSError:  # another process was faster, or the folder is read-only
            pass
    client._find_key(session=newer)
    if request.body and request.body.get("api_key") == refused:
        request.body["api_key"] = client.api_key
    if not newer:
        then = "; continuing with the API key" if client.api_key else ""
        warn(f"The 2FA session has ended{then}. Start another: `vastai tfa login`")
    return True


def http_error(
    client: VastAI, row: Command, request: Request, answer: Answer
) -> tuple[VastAIError, float | None]:
    """The error of an answer of HTTP status 300 or more, and the pause in seconds that the service
    asks for, if it does; infinite for a daily quota.
    """
    status = answer.status_code
    words = service_words(answer)
    asked = pause_asked(answer)
    if status in (401, 403) or (status in (404, 410) and key_refused(words)):
        hint = code_hint(answer) or auth_hint(client, words)
        return make_error(AuthError, words, response=answer, hint=hint), None
    if status == 429 and "search_quota_exceeded" in answer.text:
        return quota_error(answer, words), float("inf")
    if failure_kind(status) == UNANSWERED and not request.safe:
        return outcome_unknown_error(row, words, answer), None
    if asked is not None and (status == 429 or (status >= 500 and asked > LONGEST_PAUSE)):
        pause = f"{round(asked, 1):.15g} s"
        if asked >= 120:
            pause += f" ({format_duration(asked)})"
        words = f"{words.rstrip('.')}; try again in {pause}"
    if status == 429:
        return make_error(RateLimitError, words, response=answer, retry_after=asked), asked
    family = VastAIError
    hint = ""
    if status in (404, 410):
        family = NotFoundError
        listing = listing_of(row)
        if listing:
            hint = f"see `vastai {listing}`"
    elif status == 407:
        family = NetworkError
    elif lacks_credit(words):
        hint = CREDIT_HINT
    elif status >= 500:
        again = "Try again later." if request.safe else look_first(row)
        hint = f"The service has a problem. {again}"
    return make_error(family, words, response=answer, hint=loss_hint(answer) or hint), asked


def listing_of(row: Command) -> str:
    """The command that lists what the arguments of a row name, or "" if they are of two kinds.

    That is `look`, unless that shows what a request has made.
    """
    if row.look and row.safe:
        return row.look
    things = [arg for arg in row.args if not arg.option]
    names = [arg.help.partition(", from ")[2] or f"show {arg.kind.metavar}s" for arg in things]
    known = {name.lower() for name in names} & NAMES.keys()
    return known.pop() if len(known) == 1 else ""


CREDIT_HINT = (
    "Add credit at https://cloud.vast.ai/billing/; `vastai show user` shows what you have."
)


def lacks_credit(words: str) -> bool:
    """Do the service's words say that there is too little credit?"""
    lack = "insufficient, lack, not enough, no credit, out of credit, more credit"
    return mentions(words, "credit, balance") and mentions(words.replace("_", " "), lack)


def quota_error(answer: Answer, words: str) -> VastAIError:
    """The error of a daily quota that is used up."""
    reset = answer.headers.get("X-RateLimit-Reset", "")
    seconds = None
    if is_digits(reset) and len(reset) < 16:
        seconds = max(0.0, float(reset) - time.time())
        words += f"; it is refilled at {format_utc(reset)} UTC"
    return make_error(RateLimitError, words, response=answer, retry_after=seconds)


def key_refused(words: str) -> bool:
    """Do the service's words say that the key, or the 2FA session, is no good?"""
    return mentions(words, "invalid user key, session expired, invalid api key")


def code_hint(answer: Answer) -> str:
    """What to do if a code of two-factor authentication is refused; "" if it was something else."""
    body = as_dict(parse_body(answer))
    error = body.get("error")
    if error == "2fa_expired":
        return (
            "The code and secret have expired; get new ones with `vastai tfa send-sms` or "
            "`vastai tfa send-email`."
        )
    if error not in ("2fa_verification_failed", "tfa_locked"):
        return ""
    until = body.get("locked_until")
    locked = f" Locked until {format_utc(until)} UTC." if until else ""
    fails = body.get("fail_count") or "some"
    return f"Failed attempts: {fails}.{locked} See your methods with `vastai tfa status`."


def auth_hint(client: VastAI, words: str) -> str:
    """What to do if the service refuses the key."""
    if "two factor" in words.lower() or "2fa" in words.lower():
        return (
            "Start a 2FA session: `vastai tfa login -t totp -c CODE`; "
            "for a code by SMS or email, run "
            "`vastai tfa send-sms` or `vastai tfa send-email` first."
        )
    if not client.api_key:
        return "No API key was sent. Save yours with `vastai set api-key`."
    option = f" --profile {client.profile}" if client.profile else ""
    save = f"save it with `vastai set api-key{option}`"
    if client.creds_source == "ENV":
        save = f"set {client.key_origin} to it"
    return (
        f"The API key comes from {client.key_origin}. "
        f"Create another at https://cloud.vast.ai/manage-keys/ and {save}."
    )


def service_words(answer: Answer) -> str:
    """The service's own words for a failure, else its text, else the name of the status."""
    try:
        body = answer.json()
    except ValueError:
        body = "" if "<html" in answer.text[:300].lower() else answer.text
    if isinstance(body, dict):
        body = reason_of(body)
    words = one_line(redact_text(str(body or ""), answer.secrets))
    return words or answer.reason or "no reason given"


def pause_asked(answer: Answer) -> float | None:
    """Seconds that the service asks to wait: Retry-After (seconds or a date), or the threshold that
    its text names.
    """
    text = (answer.headers.get("Retry-After") or "").strip()
    if not text and answer.status_code == 429:
        import re

        found = re.search("threshold=([0-9.]*[0-9])", answer.text[:500])
        text = found.group(1) if found else ""
    try:
        seconds = _number(text)
        return seconds if seconds >= 0 else None
    except ValueError:
        moment = http_date(text)
        now = http_date(answer.headers.get("Date"))  # by the same clock
        return None if moment is None else max(0.0, moment - (now or time.time()))


def http_date(text: str | None) -> float | None:
    """Unix seconds of a date in a header; None if it is none."""
    from email.utils import mktime_tz, parsedate_tz

    try:
        return mktime_tz(parsedate_tz(text))  # type: ignore[arg-type]
    except (AttributeError, TypeError, ValueError, OverflowError, IndexError):
        return None


def send_following_redirects(client: VastAI, request: Request, timeout: float) -> Answer:
    """One request with its redirects, five at most.  Raises Unsent or Unanswered, and VastAIError
    for a redirect that is not followed.
    """
    url = request.target
    trusted = request.auth
    body = request.body
    redirects = 0
    while True:
        data = None if body is None else encode_json(body)
        key = client.api_key if trusted else None
        ask = Ask(url, data, request.method, key or "", safe=request.safe, limit=timeout)
        answer = send_once(client, ask)
        location = answer.redirect
        if not location:
            return answer
        try:
            url, same_place = redirect_target(request.method, url, answer.status_code, location)
        except ValueError as problem:
            reason = str(problem)
            break
        trusted = trusted and same_place
        if not trusted and body and request.hidden:
            body = {name: value for name, value in body.items() if name != "api_key"}
            if any(body.get(name) is not None for name in request.hidden):
                reason = f"to {url}, which must not see this request's secrets"
                break
        redirects += 1
        if redirects > 5:
            reason = f"more than 5 times, the last time to {url}"
            break
    answer.secrets = request.secrets + client.secrets
    words = printable(redact_text(reason, answer.secrets), 300)
    raise make_error(VastAIError, f"the service redirects {words}; not followed", response=answer)


def redirect_target(method: str, url: str, status: int, location: str) -> tuple[str, bool]:
    """The address that a redirect of a request to `url` leads to, and whether the key may go there.

    GET follows every redirect, what has a body only 307 and 308.  Raises ValueError, which says
    what the redirect does, for one that must not be followed.
    """
    from urllib.parse import quote, urljoin, urlsplit

    if method != "GET" and status not in (307, 308):
        raise ValueError(f"a {method} to {location}")
    try:
        old = urlsplit(url)
        new = urlsplit(urljoin(url, quote(location, safe=URL_SAFE)))
        same_place = key_may_go(old, new)
    except ValueError:
        raise ValueError(f"to {location}, which is not a URL") from None
    downgrade = old.scheme == "https" and new.scheme == "http"
    if new.scheme not in ("http", "https") or not new.hostname or downgrade:
        raise ValueError(f"to {location}, which is not safe")
    return new._replace(fragment="").geturl(), same_place


def key_may_go(old: Any, new: Any) -> bool:
    """Does the key go along with a redirect?  To the same scheme, host and port, and between https
    hosts of vast.ai.  Takes split URLs; raises ValueError for an invalid port.
    """
    places = [
        (at.scheme, at.hostname, at.port or {"http": 80, "https": 443}.get(at.scheme))
        for at in (old, new)
    ]
    return places[0] == places[1] or all(
        scheme == "https" and (host == "vast.ai" or (host or "").endswith(".vast.ai"))
        for scheme, host, _ in places
    )


@record
class Ask:
    """One HTTP request, as it is sent.

    `key` goes into the header ("": none).  The exchange may take `limit` seconds and ends at
    `deadline` (time.monotonic()) at the latest.  What is `safe` may be sent again if a kept
    connection turns out to be closed.  `stream` asks for the answer after its headers, with an
    iterator of events.  A worker's certificate may be signed by the `root` (PEM) that is found at
    `root_url`.
    """

    url: str
    payload: bytes | None = None
    method: str = "POST"
    key: str = ""
    limit: float = FOREVER
    deadline: float = FOREVER
    safe: bool = True
    root_url: str = ""
    stream: bool = False
    root: str = ""

    def ends(self) -> float:
        """The moment of time.monotonic() at which the exchange is over if it begins now."""
        return min(time.monotonic() + self.limit, self.deadline)


def send_once(client: VastAI, ask: Ask) -> Answer:
    """One request over one connection.  Raises Unsent or Unanswered.

    An idle connection may have been closed by the service, which shows only when it is used.  So
    what must not be repeated gets a new one, and a safe request that finds its connection closed
    takes a new one, once.
    """
    ends = ask.ends()
    fresh = not ask.safe
    while True:
        try:
            place, target = client.pool.find_place(ask.url, ask.root)
            message = place.build_message(ask, target, client.user_agent)
            reused = None if fresh else client.pool.waiting(place)
            connection = reused or connect(place, ends)
            connection.deadline = ends
        except VastAIError:  # a proxy that cannot be used
            raise
        except (OSError, ValueError) as error:
            raise Unsent(_reason(error), ask.url) from error
        incoming = Incoming(ask)
        try:
            whole = connection.send(message)
            while not incoming.done:
                incoming.feed(connection.receive())
                if incoming.streamed:
                    return incoming.answer(receive_events(connection, incoming))
            answer = incoming.answer()
        except OSError as error:
            connection.close()
            if not reused or incoming.status or _timed_out(error):
                raise Unanswered(_reason(error), ask.url) from error
            fresh = True
        except BaseException:  # Ctrl-C leaves no half-used connection behind
            connection.close()
            raise
        else:
            # a job never goes over a kept connection, so a worker's is of no use
            client.pool.give(connection, incoming.keep and whole and not ask.root_url)
            return answer


def _timed_out(error: BaseException | None) -> bool:
    # socket.timeout is a class of its own before 3.10
    return isinstance(error, TimeoutError) or type(error).__name__ == "timeout"


def _reason(error: BaseException) -> str:
    """An OSError in words that a user can act on."""
    if _timed_out(error):
        return "timed out"
    if isinstance(error, ConnectionRefusedError):  # asyncio's own words are others
        return "Connection refused"
    words = (
        getattr(error, "verify_message", ""),
        getattr(error, "strerror", ""),
        str(error),
        type(error).__name__,
    )
    return printable(str(next(filter(None, words))), 300)


TOO_LARGE = f"an answer of more than {LARGEST_ANSWER >> 20} MB"


def unzip(content: bytes, left: int = LARGEST_ANSWER) -> tuple[bytes, str]:
    """A gzip body unpacked to at most so many bytes, and why it cannot be used, or "".  Raises
    ConnectionError if it is cut.
    """
    import zlib

    parts = []
    while content[:2] == b"\x1f\x8b":  # a body may have several members
        member = zlib.decompressobj(31)
        try:
            part = member.decompress(content, left)
        except zlib.error:
            return content, "broken gzip"
        left -= len(part)
        if member.unconsumed_tail or left <= 0:
            return b"", TOO_LARGE
        if not member.eof:
            raise ConnectionError("the answer was cut")
        parts.append(part)
        content = member.unused_data
    if content and not parts:
        return content, "not gzip, although its header says so"
    return b"".join(parts), ""


def seconds_left(deadline: float) -> float:
    """The time until a moment of time.monotonic(), as a socket takes it.  Raises TimeoutError if
    that has passed.
    """
    rest = deadline - time.monotonic()
    if rest <= 0:
        raise TimeoutError("timed out")
    return min(rest, LONGEST_TIMEOUT)


class Incoming:
    """The answer to an Ask, as it comes.  It does no I/O: feed() takes the bytes of a connection,
    however they are cut.

    `status` and `headers` are there once the head has come (0 before), `parts` is the content so
    far, `begun` says that some of it has come, `done` that all has, and `keep` that the connection
    may then be used again.
    """

    status = 0
    keep = begun = done = chunked = streamed = False
    fault = ""  # why the content cannot be used
    size = 0  # bytes of the content, those of the chunk or body that has begun included
    left: int | None = 0  # bytes to come of the chunk or body; None: all up to the end
    next_line = "size"  # what the next line between chunks is: size, end or trailer
    buffer = b""  # what has come and is not taken yet

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.headers = Headers()
        # what a worker makes may be large
        self.most = sys.maxsize if ask.root_url else LARGEST_ANSWER
        self.parts: list[bytes] = []

    def feed(self, data: bytes) -> None:
        """Takes the next bytes; none say that the connection was closed.  Raises ConnectionError
        if the answer is cut, or is not HTTP.
        """
        if not data:
            if self.status < 200 or self.left is not None:
                begun = self.status or self.buffer
                raise ConnectionError(CUT if begun else "the connection was closed")
            self.done = True
            return
        self.buffer += data
        while self.status < 200:  # 1xx only announces the answer
            if not self.take_head():
                return
        if self.chunked:
            self.take_chunks()
        else:
            self.buffer = self.buffer[self.take_content(0) :]
            self.done = self.left == 0
        if self.size > self.most and not self.streamed:
            self.fault = TOO_LARGE
            self.parts = []
            self.done = True
            self.keep = False
        if self.done and self.buffer:
            self.keep = False

    def take_head(self) -> bool:
        """Takes a head out of the buffer, if it has come whole."""
        import re

        data = self.buffer
        end = re.search(rb"\n\r?\n", data)
        if end:
            self.buffer = data[end.end() :]
            lines = re.sub(rb"\n[ \t]+", b" ", data[: end.start()])  # one may go on in the next
            self.read_head(lines.decode("latin-1"))
        elif data[:5] != b"HTTP/"[: len(data)]:
            raise not_http_error(data.decode("latin-1"))
        elif len(data) > 1 << 17:
            raise ConnectionError("the answer's headers do not end")
        return bool(end)

    def read_head(self, text: str) -> None:
        """Reads the status line and the headers."""
        first, *lines = text.split("\n")
        version, _, rest = first.strip().partition(" ")
        code = rest.lstrip()[:3]
        if not version.startswith("HTTP/1.") or not is_digits(code):
            raise not_http_error(first)
        self.status = int(code)
        self.headers = headers = Headers()
        for line in lines:
            name, colon, value = line.partition(":")
            if colon:
                name = name.strip().lower()
                value = value.strip()
                headers[name] = f"{headers[name]}, {value}" if name in headers else value
        options = headers.get("Connection", "").lower()
        empty = self.status in (204, 304)  # whatever the headers say
        self.chunked = "chunked" in headers.get("Transfer-Encoding", "").lower() and not empty
        length, *others = {each.strip() for each in headers.get("Content-Length", "").split(",")}
        if others and not self.chunked:
            raise ConnectionError("the answer has two lengths")
        self.left = None
        if self.chunked or empty:
            self.left = 0
        elif is_digits(length):
            self.left = int(length[:19])
        self.size = self.left or 0
        self.keep = "close" not in options and (version != "HTTP/1.0" or "keep-alive" in options)
        self.keep = self.keep and self.left is not None
        self.streamed = self.ask.stream and 200 <= self.status < 300

    def take_content(self, at: int) -> int:
        """Takes content that begins at a place in the buffer; returns the place of its end."""
        end = len(self.buffer)
        if self.left is None:
            self.size += end - at
        else:
            end = min(end, at + self.left)
            self.left -= end - at
        if end > at:
            self.parts.append(self.buffer[at:end])
            self.begun = True
        return end

    def take_chunks(self) -> None:
        """Takes the content of the chunks in the buffer; what may be half a line stays."""
        at = 0
        while not self.done:
            at = self.take_content(at)
            end = self.buffer.find(b"\n", at)
            if end < 0 or self.left:
                break
            line = self.buffer[at:end].strip()
            at = end + 1
            if self.next_line == "size":
                self.left = chunk_size(line)
                self.size += self.left
                self.next_line = "end" if self.left else "trailer"
            elif self.next_line == "trailer":
                self.done = not line
            elif line:
                raise ConnectionError(CUT)
            else:
                self.next_line = "size"
        self.buffer = self.buffer[at:]
        if len(self.buffer) > 1 << 16 and not self.done:
            raise ConnectionError("the answer has a line that does not end")

    def piece_ends(self) -> float:
        """The moment of time.monotonic() at which the next piece of a stream must be here.  The
        deadline of its request is over with the first one.
        """
        return time.monotonic() + self.ask.limit if self.begun else self.ask.ends()

    @property
    def zipped(self) -> bool:
        return self.headers.get("Content-Encoding", "").strip().lower() in ("gzip", "x-gzip")

    def answer(self, events: Any = None) -> Answer:
        """The answer when it has come whole, or has a stream of `events` to come.  Raises
        ConnectionError for cut gzip.
        """
        content = b"".join(self.parts)
        fault = self.fault
        if self.zipped and not fault and events is None:
            content, fault = unzip(content, self.most)
        return Answer(self.status, self.headers, content, self.ask.url, fault, events)


def not_http_error(text: str) -> ConnectionError:
    return ConnectionError(f"no HTTP answer, but {text.strip()[:60]!r}")


def chunk_size(line: bytes) -> int:
    """The number of bytes in a chunk, from the line before it.  Raises ConnectionError."""
    digits = line.partition(b";")[0].strip()
    try:
        if digits.isalnum():
            return int(digits, 16)
    except ValueError:
        pass
    raise ConnectionError("the answer has a chunk without a valid size")


@record
class HttpConnection:
    """One connection to a place, with or without TLS.  All its waits count against `deadline`, so
    that a trickle of bytes cannot outlast the timeout.  Its methods raise OSError.
    """

    place: Place
    sock: Any
    deadline: float

    def send(self, data: bytes) -> bool:
        """Did all of it leave?  If not, there may still be an answer, such as "too large"."""
        self.sock.settimeout(seconds_left(self.deadline))
        try:
            self.sock.sendall(data)
        except ConnectionError:
            return False
        return True

    def receive(self) -> bytes:
        """Some bytes; none at the end of the connection."""
        self.sock.settimeout(seconds_left(self.deadline))
        data: bytes = self.sock.recv(1 << 16)
        return data

    def is_quiet(self) -> bool:
        return is_quiet(self.sock)

    def close(self) -> None:
        self.sock.close()

    def __del__(self) -> None:  # of a stream that nobody has begun to read
        self.close()


def is_quiet(sock: Any) -> bool:
    """Is there nothing to read?  An idle connection only ever brings its end, or an answer that
    nobody waits for.
    """
    import select

    try:
        return not select.select([sock], [], [], 0)[0]
    except (OSError, ValueError):  # too many files for select
        return False


CUT = "the answer was cut"


class Place:
    """The scheme, host and port of an address, the proxy that leads there, if any, and the `root`
    certificate that is trusted there beside the system's ("": none).
    """

    def __init__(self, parts: Any, root: str) -> None:
        """Takes a split URL.  Raises ValueError for an invalid host or port, and NetworkError
        for a proxy that cannot be used.
        """
        if not parts.hostname:
            raise ValueError("the address has no host")
        self.root = root
        self.tls = parts.scheme == "https"
        self.host: str = parts.hostname
        usual = 443 if self.tls else 80
        self.port: int = parts.port or usual
        host = bracketed(self.host)
        self.name = f"{host}:{self.port}"
        self.host_header = host if self.port == usual else self.name
        self.proxy = find_proxy(parts.scheme, self.host, self.port)

    def build_message(self, ask: Ask, target: str, user_agent: str) -> bytes:
        """A request to this place as it goes over the wire; `target` is what find_place() gave."""
        lines = [
            f"{ask.method} {target} HTTP/1.1",
            f"Host: {self.host_header}",
            f"Accept: {'*/*' if ask.root_url else 'application/json'}",
            "Accept-Encoding: gzip",
            f"User-Agent: {user_agent}",
        ]
        if ask.key:
            lines.append(f"Authorization: Bearer {ask.key}")
        if self.proxy and not self.tls:
            lines += self.proxy.headers
        if ask.payload is not None:
            length = len(ask.payload)
            lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        return "\r\n".join([*lines, "", ""]).encode("ascii") + (ask.payload or b"")


class Pool:
    """Connections that wait for their next request, up to `most` a place.  Threads share it: each
    takes one out for a request and gives it back.

    No lock, as a signal's handler may come in between: each step on a list or dict is whole, and a
    connection that is given to a pool just closed is closed when nothing holds it anymore.
    """

    owner = 0  # the process whose connections they are; none's, if a signal came in __init__()

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self.reset()

    def __reduce__(self) -> Any:
        return Pool, (self.most,)  # a copied or pickled client gets a pool of its own

    def reset(self) -> None:
        """Forgets all connections without closing them."""
        self.idle: dict[Place, list[Any]] = {}
        self.places: dict[tuple[str, str, str], Place] = {}
        self.owner = os.getpid()

    def find_place(self, url: str, root: str) -> tuple[Place, str]:
        """The place of an address, which is remembered, and the path with the query that is asked
        for there.  Raises ValueError for an invalid address.
        """
        from urllib.parse import urlsplit

        if self.owner != os.getpid():  # after a fork the connections are the parent's
            self.reset()
        parts = urlsplit(url)
        key = (parts.scheme, parts.netloc, root)
        place = self.places.get(key)
        if place is None:
            place = self.places[key] = Place(parts, root)
        target = parts.path or "/"
        if parts.query:
            target += f"?{parts.query}"
        if place.proxy and not place.tls:  # such a proxy reads the request: it has to know the host
            target = f"http://{place.host_header}{target}"
        return place, target

    def waiting(self, place: Place) -> Any:
        """A connection to `place` that was used before and is still good, or None."""
        while True:
            try:
                connection = self.idle[place].pop()
            except (KeyError, IndexError):
                return None
            # Servers close after 60 s or more.
            if time.monotonic() - connection.idle_since < 50 and connection.is_quiet():
                return connection
            connection.close()

    def give(self, connection: Any, keep: bool) -> None:
        """Takes a connection back after a whole answer; closes it if it is not to be kept."""
        connection.idle_since = time.monotonic()
        waiting = self.idle.setdefault(connection.place, [])
        if keep and len(waiting) < self.most:
            waiting.append(connection)
        else:
            connection.close()

    def drop(self, connection: Any) -> None:
        """Closes a connection that has waited long enough."""
        try:
            self.idle[connection.place].remove(connection)
        except (KeyError, ValueError):  # it is in use again
            pass
        connection.close()

    def close(self) -> None:
        """Closes the idle connections; those in use are closed by their own threads."""
        if self.owner == os.getpid():
            idle, self.idle, self.places = self.idle, {}, {}
            for waiting in idle.values():
                try:
                    while True:  # each is taken by one thread alone
                        waiting.pop().close()
                except IndexError:
                    pass

    def __del__(self) -> None:
        Pool.close(self)


def connect(place: Place, deadline: float) -> HttpConnection:
    """A new connection to a place, through its proxy if it has one, and with TLS for https.  Raises
    OSError.
    """
    connection = open_socket(place, deadline)
    try:
        if place.tls:
            context = tls_context(place.root)
            connection.sock.settimeout(seconds_left(deadline))
            connection.sock = context.wrap_socket(connection.sock, server_hostname=place.host)
        seconds_left(deadline)  # later it would be too late: a part of the request would have left
    except BaseException:
        connection.close()
        raise
    return connection


def open_socket(place: Place, deadline: float) -> HttpConnection:
    """A connection to a place without TLS, through its proxy if it has one.  Raises OSError."""
    near = place.proxy or place
    try:
        sock = dial(near.host, near.port, deadline)
    except OSError as error:
        if place.proxy is None:
            raise
        proxy = f"{bracketed(near.host)}:{near.port}"
        raise OSError(f"the proxy {proxy} cannot be reached: {_reason(error)}") from error
    connection = HttpConnection(place, sock, deadline)
    try:
        if place.tls and place.proxy:
            open_tunnel(connection, place.proxy)
    except BaseException:
        connection.close()
        raise
    return connection


def dial(host: str, port: int, deadline: float) -> Any:
    """A socket connected to the first address of a host that answers; each gets its share of the
    time that is left.  Raises OSError.
    """
    import socket

    # A host in bytes spares the interpreter loading what it needs for hosts in Unicode.
    addresses = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    problem = OSError("the host has no address")
    for tried, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)  # fails for IPv6 where that is off
            sock.settimeout(seconds_left(deadline) / (len(addresses) - tried))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except BaseException as error:
            if sock is not None:
                sock.close()
            if not isinstance(error, OSError):
                raise
            problem = error
    raise problem


def open_tunnel(connection: HttpConnection, proxy: Proxy) -> None:
    """Has the proxy at the other end connect to the place.  Raises OSError."""
    name = connection.place.name
    lines = [f"CONNECT {name} HTTP/1.1", f"Host: {name}", *proxy.headers, "", ""]
    connection.send("\r\n".join(lines).encode("ascii"))
    incoming = Incoming(Ask("", method="CONNECT"))
    while incoming.status < 200:
        incoming.feed(connection.receive())
    if incoming.status != 200:
        raise OSError(f"the proxy refused: HTTP {incoming.status}")
    if incoming.parts or incoming.buffer:
        raise OSError("the proxy sent unexpected data")


_contexts: dict[Any, ssl.SSLContext] = {}


def tls_context(root: str) -> ssl.SSLContext:
    """The TLS context of the process: reading the system's certificates costs more than a request.

    A `root` certificate (PEM) gives one that trusts it as well, for workers.  Raises OSError if it
    is none, or if the certificates of the environment cannot be read.
    """
    with loading:
        import ssl

    bundle = os.getenv("REQUESTS_CA_BUNDLE") or None
    key = (root, bundle, os.getenv("SSL_CERT_FILE"), os.getenv("SSL_CERT_DIR"))
    if key not in _contexts:
        place = {"capath" if os.path.isdir(bundle) else "cafile": bundle} if bundle else {}
        try:
            context = ssl.create_default_context(**place)  # type: ignore[arg-type]
        except OSError as error:
            if not bundle:
                raise
            raise OSError(
                f"cannot read the certificates of REQUESTS_CA_BUNDLE: {error.strerror or error}"
            ) from None
        if root:
            context.load_verify_locations(cadata=root)
            # older roots do not say what they are for
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        _contexts[key] = context
    return _contexts[key]


def user_agent() -> str:
    return f"vastai/{__version__} (python {sys.version_info[0]}.{sys.version_info[1]})"


class Proxy:
    """An HTTP proxy: its host and port, and the headers that it wants."""

    def __init__(self, variable: str, url: str) -> None:
        """Takes the value of an environment variable.  Raises NetworkError if it is no such proxy;
        its text has nothing of the value but the scheme, as there may be a password in it.
        """
        from urllib.parse import unquote, urlsplit

        url = url if "://" in url else f"http://{url}"
        scheme = url.partition("://")[0].lower()
        kind = "a SOCKS" if scheme.startswith("socks") else "an https" if scheme == "https" else ""
        try:
            parts = urlsplit(url)
            self.host = parts.hostname or ""
            self.port = parts.port or 80
            usable = scheme == "http" and self.host and self.host.isascii()
            if not usable or "@" in f"{parts.path}{parts.query}{parts.fragment}":
                raise ValueError("no host, or one that is a part of the password")
        except ValueError:
            problem = "is not the URL of a proxy"
            if kind:
                problem = f"names {kind} proxy ({printable(scheme, 20)}://), which is not supported"
            wanted = "expected a URL such as http://user:password@host:port"
            coded = "write / # ? in the password as %2F %23 %3F"
            raise make_error(NetworkError, f"{variable} {problem}; {wanted}; {coded}") from None
        self.headers: list[str] = []
        if parts.username:
            from base64 import b64encode

            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            coded = b64encode(pair.encode()).decode()
            self.headers.append(f"Proxy-Authorization: Basic {coded}")


def find_proxy(scheme: str, host: str, port: int) -> Proxy | None:
    """The proxy that the environment names for a host.  Raises NetworkError if it is no proxy."""
    for way in (scheme, "all"):
        for name in (f"{way}_proxy", f"{way}_proxy".upper()):
            if name == "HTTP_PROXY" and "REQUEST_METHOD" in os.environ:
                continue  # in a CGI script the client's Proxy header sets it
            url = os.getenv(name, "").strip()
            if url:
                exempt = os.getenv("no_proxy") or os.getenv("NO_PROXY") or ""
                return None if is_exempt(exempt, host, port) else Proxy(name, url)
    return None


def is_exempt(exempt: str, host: str, port: int) -> bool:
    """Does a NO_PROXY list name the host?  Its entries are `*`, hosts, domains (`.example.com`,
    `*.example.com`, also without the dot), addresses and CIDR ranges; all but the ranges may have a
    port.
    """
    import re

    for entry in exempt.lower().replace(",", " ").split():
        if entry == "*" or (is_address(host) and _is_in_range(host, entry)):
            return True
        found = re.fullmatch(r"(\[.+\]|[^:]+):([0-9]+)", entry)
        name, its_port = found.groups() if found else (entry, str(port))
        if its_port == str(port) and f".{host}".endswith("." + name.strip("[]").lstrip("*.")):
            return True
    return False


def is_address(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()


def _is_in_range(address: str, entry: str) -> bool:
    """Is an IP address in a CIDR range, or the same as another address?  False for what is
    neither.
    """
    import ipaddress

    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(
            entry.strip("[]"), strict=False
        )
    except ValueError:
        return False


def explain_request(client: VastAI, request: Request) -> None:
    """Writes the request to stderr, without its secrets."""
    lines = [f"{request.method} {request.target}"]
    if client.api_key and request.auth:
        lines.append("Authorization: Bearer ***")
    if request.body is not None:
        body = encode_json(redact_body(request)).decode()
        lines += ["Content-Type: application/json", "", body]
    text = redact_text("\n".join(lines), request.secrets + client.secrets)
    write_err(printable_lines(text) + "\n\n")


def format_curl(request: Request) -> str:
    """The request as a line for the shell, with $VAST_API_KEY in the key's place."""
    from shlex import quote

    words = ["curl", "-X", request.method, quote(request.target)]
    if request.auth:
        words += ["-H", '"Authorization: Bearer $VAST_API_KEY"']
    if request.body is not None:
        body = redact_body(request)
        mark = os.urandom(9).hex()
        if "api_key" in body:
            body = {**body, "api_key": mark}
        text = quote(encode_json(body).decode()).replace(mark, "'\"$VAST_API_KEY\"'")
        words += ["-H", "'Content-Type: application/json'", "-d", text]
    return " ".join(words)


# ------------------------------------------------------------------------------------ this computer
# Its files, its other programs, and the person at the terminal.


def own_file(kind: str, name: str) -> str:
    """A file in this client's folder of a kind, "config" or "cache"; "" if that folder is relative
    or unknown.
    """
    usual = os.path.join(os.path.expanduser("~"), f".{kind}")
    base = os.getenv(f"XDG_{kind.upper()}_HOME") or usual
    return os.path.join(base, "vastai", name) if os.path.isabs(base) else ""


def folder_problem() -> str:
    """Why this client has no folder to keep files in."""
    for variable in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        base = os.getenv(variable, "")
        if base and not os.path.isabs(base):
            return f"{variable} is {printable(base)!r}, not an absolute path"
    return "there is no home folder; set HOME or XDG_CONFIG_HOME to an absolute path"


def old_key_file() -> str:
    """Where older clients keep the API key; "" if there is no home folder."""
    path = os.path.expanduser(os.path.join("~", ".vast_api_key"))
    return path if os.path.isabs(path) else ""


def profile_name(given: str | None = None) -> str:
    """The profile that is chosen, by --profile or VAST_PROFILE; "" for none.  Raises UsageError."""
    name = (given or os.environ.get("VAST_PROFILE", "")).strip()
    if name and not (name.isascii() and name.replace("-", "").replace("_", "").isalnum()):
        where = "--profile" if given else "VAST_PROFILE"
        raise UsageError(f"{where}: expected letters, digits, - and _, not {short_repr(name)}")
    return name


def profile_file(name: str, profile: str) -> str:
    """A file in the configuration folder that each profile has its own of; as own_file()."""
    return own_file("config", f"{name}.{profile}" if profile else name)


def key_files(session: bool = False, profile: str = "") -> list[str]:
    """The places of an API key, in the order of looking; `session` adds the 2FA session's."""
    paths = [profile_file("vast_api_key", profile), "" if profile else old_key_file()]
    if session:
        paths.insert(0, profile_file("vast_tfa_key", profile))
    return [path for path in paths if path]


def find_key(given: str | None, profile: str, session: bool = False) -> tuple[str | None, str, str]:
    """The API key, its origin ('CODE', 'ENV', 'FILE', 'NONE'), and the origin in words; a blank
    key does not count.  With a profile, only its own file is read.
    """
    if given is not None and str(given).strip():
        return given, "CODE", "--api-key or api_key="
    key = os.getenv("VAST_API_KEY", "")
    if key.strip():
        return key, "ENV", "the environment variable VAST_API_KEY"
    for path in key_files(session, profile):
        key = read_key(path)
        if key:
            return key, "FILE", path
    return None, "NONE", "nowhere"


EMPTY_KEY_FILE = "is empty"


def read_key(path: str) -> str:
    """The key that a file holds; "" if there is none that can be read."""
    return read_key_file(path)[0]


def read_key_file(path: str) -> Pair:
    """The key that a file holds, stripped, and why it has none although it is there ("" for a
    file that is not there).
    """
    if is_special(path):  # reading from a FIFO would wait for its writer
        return "", "cannot be read: it is not a regular file"
    try:
        with open(path, "rb") as file:
            key = decode_file(file.read(4 * LONGEST_API_KEY)).strip()
        return key, "" if key else EMPTY_KEY_FILE
    except (FileNotFoundError, NotADirectoryError):
        return "", ""
    except OSError as error:
        return "", f"cannot be read: {error.strerror}"
    except ValueError:
        return "", "is not a text file"


def key_fault(key: Any) -> str:
    """Why a text cannot be an API key, or "" if it can."""
    if not isinstance(key, str):
        return "is not text"
    if not key.isascii() or not key.isprintable() or " " in key:
        return "contains a space, line break or other invalid character"
    if len(key) > LONGEST_API_KEY:
        return "is too long"
    if key[:1] in ("'", '"') or key[-1:] in ("'", '"'):
        return "is in quotes: remove them"
    if key[:1] == "$":
        return "is the name of a variable, not its value: check the quotes around it"
    return ""


def check_key(key: Any, origin: str) -> None:
    """Raises UsageError, which does not show the key, for one that cannot be an API key."""
    fault = key_fault(key)
    if fault:
        raise UsageError(
            f"the API key {fault}; it was not used", hint=f"The key comes from {origin}."
        )


def save_api_key(key: str, profile: str) -> str:
    """Saves the API key for later commands; returns the path of its file.  Raises UsageError."""
    path = profile_file("vast_api_key", profile)
    old = "" if profile else old_key_file()
    write_private(path, key, lasting=True)
    try:
        if os.path.isfile(old):
            os.unlink(old)
    except OSError as error:
        warn(f"{old} still holds another key: {error.strerror}")
    return path


def is_special(path: str) -> bool:
    """Is it a device or a FIFO, which must be written into rather than replaced?"""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def write_private(path: str, content: str | bytes, lasting: bool = False) -> None:
    """Writes a file of mode 0600, whole or not at all, and makes its folder, of mode 0700, if there
    is none.  A symbolic link is written through, and so is a device unless the content is to be
    `lasting`.  Raises UsageError, also for "", which stands for a file of ours without a folder.
    """
    import tempfile

    if not path:
        raise UsageError(f"cannot save it: {folder_problem()}")
    target = os.path.realpath(path) if os.path.islink(path) else os.path.abspath(path)
    folder = os.path.dirname(target)
    data = content.encode() if isinstance(content, str) else content
    try:
        if is_special(path):
            if lasting:
                raise UsageError(f"cannot write {path}: it is not a regular file")
            with open(path, "wb") as file:
                file.write(data)
            return
        make_private_folder(folder)
        if folder == os.path.dirname(own_file("config", "x")):
            os.chmod(folder, 0o700)  # it may have been there
        handle, temporary = tempfile.mkstemp(dir=folder)
        try:
            os.chmod(temporary, 0o600)  # whatever the umask
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def make_private_folder(folder: str) -> None:
    """Makes a folder, and those above that are missing, of mode 0700 whatever the umask."""
    if os.path.isdir(folder):
        return
    above = os.path.dirname(folder)
    if above != folder:
        make_private_folder(above)
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise
    else:
        os.chmod(folder, 0o700)


def run_program(words: list[str], how_to_get: str, told: bool = True, aside: bool = False) -> None:
    """Runs another program with our own stdin, stdout and stderr.  Raises ProgramError with its
    exit status; `told` is off if that is a remote command's and no error of ours.  With `aside` its
    output goes to stderr.
    """
    import subprocess

    flush(sys.stdout)
    flush(sys.stderr)
    try:
        status = subprocess.run(
            words, stdout=2 if aside and sys.stderr is not None else None
        ).returncode
    except OSError:
        raise ProgramError(
            f"{words[0]} is not installed here. {how_to_get}", exit_status=127
        ) from None
    if status:
        raise ProgramError(
            f"{words[0]} exited with status {status}" if told else "",
            exit_status=status if status > 0 else 128 - status,
        )


# ------------------------------------------------------------------------ commands of several steps
# Named by their rows in `run`, and in the table's order.  They call their own row (call.send) and
# others (call.do); only `all_pages` and `result_text` go to the transport themselves.


def perform(call: Call) -> Any:
    """What a command returns in the SDK; both faces come through here."""
    row = call.row
    try:
        if call["schedule"] is not None:
            return row.schedule(call)
        return row.run(call) if row.run else call.send()
    except VastAIError as error:
        error.redact(call.secrets)
        raise


CONCURRENCY = 5  # requests of one command that are under way at the same time
CHANGES_APART = 0.03  # seconds between two changes, which reach the service in their order


def at_once(call: Call, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """What `work` returns for each item, in their order; a few run at the same time, but changes
    one by one until the first is accepted, and the others begin in their order.  A VastAIError or
    NothingSent that it raises stands in its place; a key that is refused at the first change raises
    AuthError, as the others would meet the same.
    """
    import threading

    tasks = list(items)
    stopped = threading.Event()
    in_order = call.client.curl or call.client.explain  # these print
    changes = call.row.effect != READS

    def outcome(task: Any) -> Any:
        if stopped.is_set():
            return None
        try:
            return work(task)
        except (VastAIError, NothingSent) as error:
            return error

    done = []
    while tasks and (changes or in_order or len(tasks) == 1):
        done.append(outcome(tasks.pop(0)))
        first = done[0]
        if changes and isinstance(first, AuthError) and first.status != 403:
            raise first
        if not in_order and not isinstance(done[-1], VastAIError):
            break
    if not tasks:
        return done
    try:
        from concurrent.futures import ThreadPoolExecutor

        pool = ThreadPoolExecutor(min(len(tasks), CONCURRENCY))
        pool.submit(int)
    except RuntimeError:  # a program that is ending starts no more threads
        return done + [outcome(task) for task in tasks]
    started = []
    try:
        for task in tasks:
            started.append(pool.submit(outcome, task))
            time.sleep(CHANGES_APART if changes else 0)
        return done + [one.result() for one in started]
    finally:
        stopped.set()  # an interruption waits for no answer, and sends nothing more
        pool.shutdown(wait=False)


def objects(value: Any) -> list[Row]:
    """`value`, if it is a list of objects.  Raises VastAIError if not."""
    if not is_rows(value):
        raise VastAIError("the service sent something other than a list of objects")
    return list(value)


def run_search_offers(call: Call) -> Rows:
    """The offers, each with `datacenter`, and with what the two directives of the query ask for.

    With the options of a job each has `job_total`, and unless an order is given, all that the
    service has are compared and the cheapest come first.
    """
    asked = dict(call.params)
    job = any(call[arg.name] is not None for arg in JOB_OPTIONS)
    by_job = job and asked["order"] is None
    limit = call["limit"]
    if by_job:  # only rows that came can be put in this order
        call.params["limit"] = None
    if asked["order"] is None:
        call.params["order"] = "dph_total" if job else "score-"
    call.params["storage"] = call.get("storage", 5.0)
    conditions, directives = offer_query(call)
    call.params["conditions"] = conditions  # the remark below the table names them
    kind = "bid" if call["type"] == "interruptible" else call["type"]
    more = {"disable_bundling": True} if call["disable_bundling"] else {}
    body = search_body(call, conditions, OFFER_FIELDS, type=kind, **more)
    search = METHODS["search_offers_new"] if call["new"] else call.row
    if search.method == "PUT":
        body = {"select_cols": ["*"], "q": body}
    found: Rows = call.of(search, **call.params).send(body=body)
    call.params["limit"] = limit
    offers: list[Row] = found
    if "georegion" in directives:
        offers = [with_region(row) for row in offers]
    if "chunked" in directives:
        offers = [chunk(row) for row in offers if is_large(row)]
    if job:
        tell_of_job(call, asked, len(offers))
        offers = [{**row, "job_total": job_total(call, row)} for row in offers]
    if by_job:
        offers.sort(key=lambda row: (row["job_total"] is None, row["job_total"]))
        offers = offers[: limit or None]
    for row in offers:
        row["datacenter"] = row.get("hosting_type") == 1
    return Rows(offers, found.answer)


def job_total(call: Call, offer: Row) -> float | None:
    """What a job costs on an offer, in dollars: the hours that it runs and fetches its data, and
    the traffic.  None if the offer lacks a price or a speed for that.
    """
    hours, down, up = (call[arg.name] or 0.0 for arg in JOB_OPTIONS)
    price = price_of(offer, "dph_total")
    speed = price_of(offer, "inet_down")
    total = 0.0
    for size, name in ((down, "inet_down_cost"), (up, "inet_up_cost")):
        cost = price_of(offer, name) if size else 0.0
        if cost is None:
            return None
        total += size * cost
    if price is None or (down and not speed):
        return None
    if down and speed:
        hours += down * 8000 / speed / 3600  # GB, at Mbit/s
    return total + price * hours


def tell_of_job(call: Call, asked: Row, count: int) -> None:
    """Says on stderr what the prices of a job rest on."""
    words = []
    if asked["order"] is None:
        words.append(f"compared {count_of(count, 'offer')} by the price of the job")
    if asked["storage"] is None:
        words.append("prices include 5 GB of disk; --storage changes that")
    if words:
        call.remark(f"vastai: {'; '.join(words)}")


def with_region(row: Row) -> Row:
    """An offer whose `geolocation` names the region as well: "Sweden, SE, EU"."""
    place = text_of(row, "geolocation")
    region = next((code for code, all in GEOREGIONS.items() if place[-2:] in all.split()), None)
    return {**row, "geolocation": f"{place}, {region}"} if region else row


CHUNK = {"cpu_ram": 65536, "cpu_cores": 32, "min_bid": 0}  # MB, threads, $/hr


def is_large(row: Row) -> bool:
    """Has an offer room for a chunk of the common size?"""
    sizes = {name: number_of(row, name) for name in CHUNK}
    return all(size is None or size >= CHUNK[name] for name, size in sizes.items())


def chunk(row: Row) -> Row:
    """An offer rounded down to a common size, so that many machines look alike."""
    ram = number_of(row, "gpu_ram") or 0
    disk = number_of(row, "disk_space") or 0
    return {**row, **CHUNK, "gpu_ram": int(ram) // 16 * 16, "disk_space": int(disk) // 64 * 64}


def refuse_spot(call: Call) -> None:
    """Only `launch instance` chooses a bid itself; without one the rental would be on demand."""
    if call["spot"]:
        raise UsageError("--spot is an option of launch instance; bid with --bid_price here")


def run_create_instance(call: Call) -> Row:
    """One rental; with `wait` the instance that came of it stands under "instance"."""
    refuse_spot(call)
    fetch_commands(call)
    rented = rental(call, call["label"], call["confirm"])
    # the command line says what was rented, also if its search is interrupted
    with call.signals_caught(tells=rented.still_costs):
        try:
            answer = rent(call, rented)
            if call["wait"]:
                goal = "exited" if call["target_state"] == "stopped" else "running"
                answer["instance"] = row = wait_for(call, rented.id, goal)
                lack = lack_of_disk(row, call.get("disk", 0.0))
                if lack:
                    call.warn(f"instance {rented.id}: {lack}")
            return answer
        except VastAIError as error:
            if rented.id == "?" and rented.name:
                look_for_instance(error, rented)
            ended = isinstance(error, NotFoundError) or error.details.get("fault")
            if rented.found and not (error.found or ended):
                error.msg += f"; {rented.still_costs()}"  # the wait failed, not the rental
            error.found = error.details["found"] = error.found or rented.found
            raise


def rental(call: Call, label: str | None, made_up: bool = True, behind: float = 60) -> Rented:
    """The rental to come, labeled by the caller or, with `made_up`, uniquely by us.

    With the caller's label, only instances that started after this count as ours; the service's
    clock may be `behind` by so many seconds.  A blank label is none: instances of others may have
    no label either.
    """
    label = label if label and label.strip() else ""
    since = time.time() - behind

    def new(row: Row) -> bool:
        return (number_of(row, "start_date") or since) >= since

    if label or not made_up:
        return Rented(call, "instance", label, made_up=False, ours=new)
    return Rented(call, "instance", f"vastai-{os.urandom(6).hex()}")


def rent(call: Call, rented: Rented, **params: Any) -> Row:
    """Sends the rental and sets the id of `rented`.  The errors say what may be left behind."""
    rented.id = "?"
    rented.seen = False
    rented.runs = True
    rented.began, rented.began_at = time.monotonic(), time.time()
    try:
        answer: Row = call.send(label=rented.name or call["label"], **params)
    except VastAIError as error:
        made = contracts_of(error.body)
        if not made and not is_lost(error):
            rented.id = None
        refused_but_made(call, error, made, [], rented)
    ids = contracts_of(answer)
    if not ids:
        raise outcome_unknown_error(call.row, "the service confirmed it but named no instance")
    rented.id = ids[0]
    return answer


def contracts_of(answer: Any) -> list[int]:
    """The ids of the instances that an answer says were made."""
    members = as_dict(answer)
    named = [members.get("new_contract"), *as_list(members.get("new_contracts"))]
    return list(dict.fromkeys(id for id in map(as_whole, named) if id and id > 0))


def refused_but_made(
    call: Call, error: VastAIError, ids: list[int], left: list[int], first: Rented | None = None
) -> NoReturn:
    """Raises a refusal, with the instances that were made all the same; with `cancel_unavail` they
    are destroyed before, and PartialError is raised if one cannot be.

    `left` holds those of them that may be there, at any time; `first` is what stands for the first.
    """
    left += ids
    for id in ids:
        rented = first or Rented(call, "instance", "")
        first = None
        rented.id = id
        rented.began = time.monotonic()
        if not is_lost(error):  # what a refusal has made does not run
            rented.runs = False
            rented.price = rented.disk_price or None
        if call["cancel_unavail"]:
            rented.give_back()
        told = rented.still_costs()
        if not told:
            left.remove(id)
            told = f"it created instance {id} anyway, which was destroyed"
        error.msg += f"; {told}"
    found = [id for id in ids if id in left]
    if found:
        error.found = error.details["found"] = found[0] if len(found) == 1 else found
    if found and call["cancel_unavail"]:
        raise PartialError(error.msg, **error.details) from error
    raise error


def look_for_instance(error: VastAIError, rented: Rented) -> None:
    """Adds to an error of unknown outcome what one look at the instances of its label shows."""
    ids = rented.find(tries=1) or [None]
    named = f"labeled {rented.name!r}"
    words = f"Looked for instances {named}: {rented.problem or ids}."
    if len(ids) == 1 and ids[0]:
        rented.id = error.found = error.details["found"] = ids[0]
        likely = "probably" if rented.made_up else "maybe"
        words = f"Instance {ids[0]}, {named}, appeared after the request; {likely} yours."
    error.hint = f"{printable(words, 1000)}\n  {error.hint}"


def lack_of_disk(row: Row, size: float) -> str:
    """How much less disk an instance has than was ordered; "" if it has enough."""
    disk = number_of(row, "disk_space")
    enough = disk is None or disk >= size * 0.99
    return "" if enough else f"it has {disk:g} GB of disk, not {size:g} GB"


def all_pages(call: Call, query: Row, everything: bool) -> Rows:
    """The rows of a listing, following `next_token` to the end if `everything` is wanted; `answer`
    is that of the last page.

    Raises VastAIError if a token repeats, which would loop forever.
    """
    result = Rows()
    seen = set()
    while True:
        answer = send_with_retries(call, build_request(call, query))
        rows = extract_result(call, answer)
        if not isinstance(rows, Rows):  # a row whose result is the whole answer
            rows = Rows(rows[call.row.member], rows)
        result += rows
        result.answer = rows.answer
        call.progress(f"rows: {len(result)} …")
        token = rows.next_token
        if not token or not everything:
            call.progress("")
            return result
        if not isinstance(token, str) or token in seen:
            raise unusable_answer_error(call.row, answer, "the same page again")
        seen.add(token)
        query = {**query, "after_token": token}


def run_show_instances(call: Call) -> Rows:
    """All your instances, over all pages; with --limit or --next-token one page."""
    query = instance_filters(call)
    query["limit"] = min(25, max(1, call.get("limit", 25)))
    if call["next_token"]:
        query["after_token"] = call["next_token"]
    if call["all"] and not call.view.columns_only:  # from the first page on
        query["limit"] = 25
        query.pop("after_token", None)
    if call.view.columns_only and not call.view.raw:
        more = set(instance_columns(call, [])).intersection(INSTANCE_MORE)
        query["select_cols"] = SUMMARY_COLS.split() + (DETAIL_COLS.split() if more else [])
        if not call.view.quiet:
            query["select_cols"].append("storage_total_cost")  # for the sum below the table
    rows = all_pages(call, query, not is_one_page(call))
    return Rows([tidy_instance(stripped(row)) for row in rows], rows.answer)


def is_one_page(call: Call) -> bool:
    """Did the caller of show instances ask for a single page?"""
    some = call["limit"] is not None or call["next_token"] is not None
    return some and not call["all"]


# What the service is asked for if only a table is due, and the names of --cols that are not those
# of the fields.
SUMMARY_COLS = """\
id actual_status label num_gpus gpu_name gpu_util disk_space disk_usage disk_util volume_info
dph_total image_uuid start_date verification"""
DETAIL_COLS = """\
machine_id template_id template_name geolocation inet_up inet_down ssh_host ssh_port
status_msg"""
COLUMN_NAMES = parse_table("""\
actual_status: status
dph_total: dph
image_uuid: image
start_date: age
verification: verified
machine_id: machine
geolocation: location
status_msg: msg""")


def instance_columns(call: Call, rows: list[Row]) -> Iterable[Any]:
    """The columns that --verbose or --cols ask for; volumes only if an instance has some."""
    if not call["cols"]:
        columns = [*INSTANCE_COLUMNS, *(INSTANCE_MORE if call["verbose"] else ())]
        volumes = any(row.get("volume_info") for row in rows)
        return tuple(column for column in columns if volumes or column[1] != "volumes")
    known = {
        COLUMN_NAMES.get(column[1], column[1]): column
        for column in (*INSTANCE_COLUMNS, *INSTANCE_MORE)
    }
    names = [name.strip() for name in call["cols"].split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"--cols: no column {printable(name)!r}{suggest(name, known)}")
    return tuple(known[name] for name in names)


def instance_filters(call: Call) -> Row:
    """`select_filters` and `order_by` from the options of show instances."""
    filters = {
        "actual_status": call["status"],
        "label": [text or None for text in call["label"] or ()],
        "gpu_name": [name.replace("_", " ") for name in call["gpu_name"] or ()],
        "verification": call["verification"],
    }
    order = order_columns(call["order_by"] or [], "", lambda text: None)
    if all(part.get("col") != "id" for part in order):
        order.append({"col": "id", "dir": "asc"})
    for state in call["status"] or ():
        if state not in INSTANCE_STATES.split(", "):
            call.warn(f"unknown state {printable(state)!r}; the states are {INSTANCE_STATES}")
    chosen = {name: {"in": values} for name, values in filters.items() if values}
    return {"select_filters": chosen, "order_by": order}


def order_columns(order: Any, fields: str, tell: Tell) -> list[Row]:
    """An order as a listing takes it: an object for each column.  As parse_order()."""
    parts = parse_order(order, {}, fields, tell)
    return [part if isinstance(part, dict) else dict(zip(("col", "dir"), part)) for part in parts]


INSTANCE_STATES = "running, loading, exited, created"


def tidy_instance(row: Row) -> Row:
    """Gives an instance or volume its age in seconds, and its environment as an object."""
    started = number_of(row, "start_date")
    if started is not None:
        row["duration"] = time.time() - started
    if isinstance(row.get("extra_env"), list):
        pairs = [pair for pair in row["extra_env"] if isinstance(pair, list) and len(pair) == 2]
        row["extra_env"] = {name: value for name, value in pairs if isinstance(name, str)}
    return row


def tidy_volume(row: Row) -> Row:
    """A volume with its age, and without blanks around its texts."""
    row.update(stripped(row))
    return tidy_instance(row)


def stripped(value: Any) -> Any:
    """A value with every text in it stripped of outer white space."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, dict):
        return {name: stripped(item) for name, item in value.items()}
    return [stripped(item) for item in value] if isinstance(value, list) else value


def schedule_job(call: Call) -> Row:
    """Makes a scheduled job of a command instead of running it now."""
    request = build_request(call)
    instance = call.get("id", call["instance"])
    request.body = {**(request.body or {}), "instance_id": instance}
    if "price" in call.params:
        request.body["price"] = call["price"]  # null asks for a bid that wins
    job = schedule_of(call, request)
    try:
        answer: Row = call.of(METHODS["create_scheduled_job"]).send(body=job)
        return answer
    except VastAIError as error:
        existing = as_whole(get_path(error.body, "scheduled_job_id"))
        if error.status != 422 or existing is None or not call.cli:
            raise
    confirm(call, f"Job {existing} already does this. Replace it?")
    answer = call.of(METHODS["update_scheduled_job"], id=existing).send(body=job)
    return {"scheduled_job_id": existing, **answer}


def schedule_cloud_copy(call: Call) -> Row:
    """Schedules a copy from an instance to the cloud, by default until the rental ends."""
    last = call["end_date"]
    call.params["end_date"] = call.get("end_date", LAST_MOMENT)
    schedule_of(call, build_request(call))  # wrong times are told before anything is sent
    instance = find_instance(call, call["instance"])
    if instance is None:
        raise not_found_error("instance", call["instance"], "show instances")
    price = number_of(instance, "internet_up_cost_per_tb")
    if price is not None:
        confirm(call, f"Each upload costs ${price:.2f} per TB. Schedule the copy?")
    call.params["end_date"] = instance.get("end_date") if last is None else last
    return schedule_job(call)


def run_destroy_instance(call: Call) -> Row:
    if call.has_reader:  # the service lists its volumes only while it exists
        try:
            volumes = call.do("show_volumes")
        except VastAIError:
            volumes = []
        call.params["volumes"] = [
            row for row in volumes if call["id"] in map(as_whole, as_list(row.get("instances")))
        ]
    answer: Row = call.send()
    if call["wait"]:
        wait_for(call, call["id"], "destroyed")
    return answer


def run_change_state(call: Call) -> Row:
    """Starts, stops, reboots or recycles an instance; with `wait` what it has become stands under
    "instance".
    """
    answer: Row = call.send()
    if call["wait"]:
        goals = {"running": ("running", "exited"), "stopped": ("exited", "")}
        goal, stale = goals.get(call.row.body.get("state", ""), ("running", "running"))
        answer["instance"] = wait_for(call, call["id"], goal, stale=stale)
    return answer


def run_wait(call: Call) -> Row:
    return wait_for(call, call["id"], call["status"], call["poll"])


def run_bulk(call: Call) -> Row:
    """One request for each 64 ids; a part that fails does not stop the others."""
    refuse_spot(call)
    fetch_commands(call)
    bulk = Bulk(call)
    with call.signals_caught(tells=bulk.interrupted):
        bulk.send()
    return bulk.result()


class Bulk:
    """A command for many ids: what was answered so far, an entry for each id, and the instances
    that it made.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.results = not_sent(call["ids"])
        self.answers: list[Row] = []
        self.failures: list[VastAIError] = []
        self.made: list[int] = []

    def send(self) -> None:
        for at in range(0, len(self.results), BULK):
            entries = self.results[at : at + BULK]
            try:
                made = send_for(entries, self.call.row, self.send_part)
            except NothingSent:
                continue
            except VastAIError as error:
                self.failures.append(error)
                if isinstance(error, (AuthError, UsageError)):
                    return  # the others would meet the same
            else:
                for entry, id in zip(entries, made):
                    entry["new_contract"] = id

    def send_part(self, ids: list[Any]) -> list[int]:
        """The instances that one request made."""
        try:
            answer: Row = self.call.send(ids=ids)
        except VastAIError as error:
            refused_but_made(self.call, error, contracts_of(error.body), self.made)
        made = []
        if self.call.row.made:
            made = contracts_of(answer)
            self.made += made
            answer["new_contracts"] = made  # the service may name a single one otherwise
            if len(made) < len(ids):
                raise outcome_unknown_error(
                    self.call.row,
                    f"the service confirmed it but named {len(made)} of {len(ids)} instances",
                )
        self.answers.append(answer)
        return made

    def result(self) -> Row:
        """The answers as one; raises what went wrong with some ids, or with all."""
        unknown = [error for error in self.failures if isinstance(error, OutcomeUnknownError)]
        in_doubt = self.in_doubt and not unknown  # of a 5xx, say
        several = self.answers or (len(self.failures) > 1 and (self.made or in_doubt))
        if self.failures and several:
            raise self.named(partial(self.results))
        if unknown:
            unknown[0].msg = partial(self.results).msg  # which has its own words as the reason
            raise self.named(unknown[0])
        if self.failures:
            raise self.failures[0]
        if not self.answers:
            raise NothingSent
        merged: Row = {}
        for answer in self.answers:
            for name, value in answer.items():
                both = isinstance(value, list) and isinstance(merged.get(name), list)
                merged[name] = merged[name] + value if both else value
        return merged

    def named(self, error: VastAIError) -> VastAIError:
        """The error with what is known of each id, and with the instances that were made."""
        known = {"results": self.results, "found": self.made or None}
        error.details.update(known)
        vars(error).update(known)
        error.msg += self.made_words()
        if not error.hint and self.in_doubt:
            error.hint = look_first(self.call.row)
        return error

    @property
    def in_doubt(self) -> bool:
        """Is it unknown of some ids what became of them?"""
        return any(entry["success"] is None for entry in self.results)

    def made_words(self) -> str:
        return f"; created: instances {', '.join(map(str, self.made))}" if self.made else ""

    def interrupted(self) -> str:
        return f"interrupted; {partial(self.results).msg}{self.made_words()}"


def not_sent(ids: Iterable[Any]) -> list[Row]:
    """An entry for each id, in which send_for() notes what becomes of it."""
    return [{"id": id, "success": False, "msg": "not sent"} for id in ids]


def send_for(entries: list[Row], row: Command, send: Callable[[list[Any]], Any]) -> Any:
    """What `send` returns for the ids of `entries`, which always hold what is known so far."""
    mark(entries, success=None, msg="no answer yet")
    try:
        answer = send([entry["id"] for entry in entries])
    except VastAIError as error:
        done = None if is_lost(error) and not row.safe else False
        mark(entries, success=done, status_code=error.status, msg=error.msg)
        raise
    mark(entries, success=True)
    return answer


def mark(entries: list[Row], **what: Any) -> None:
    """Sets what became of some ids; `success` is None while nobody knows."""
    for entry in entries:
        id = entry["id"]
        entry.clear()
        entry.update(id=id, **what)


def run_logs(call: Call) -> Any:
    """Asks for a text that the instance writes to a storage address, and fetches it from there."""
    if call["follow"] and call.view.format != "table":
        raise UsageError("--follow cannot be combined with --raw or --format")
    answer = call.send()
    url = text_of(answer, "result_url")
    if not url:
        hint = "" if call.row.safe else look_first(call.row)
        raise VastAIError("the service did not say where the result is", hint=hint)
    call.params["folder"] = text_of(answer, "writeable_path")
    return result_text(call, url, call["max_wait"])


def without_blank_lines(call: Call, text: str) -> str:
    """Logs as a reader wants them."""
    return "\n".join(line for line in text.splitlines() if line.strip())


def without_folder(call: Call, text: str) -> str:
    """The output of `execute` without the folder of the host that it ran in."""
    folder = call["folder"].rstrip("/")
    return text.replace(folder, "") if folder else text


def show_logs(call: Call, text: Any) -> None:
    """Prints the log, and with --follow goes on until the instance is gone or has stopped."""
    if not isinstance(text, str):
        present_table(call, text)
        return
    if not call["follow"]:
        write_text(call, text)
        return
    last: list[str] = []
    ended = False

    def look(left: float) -> Any:
        nonlocal last, ended, text
        lines = text.splitlines()
        fresh = new_lines(last, lines)
        if fresh:
            write_out("\n".join(fresh) + "\n", plain=True)
            flush(sys.stdout)
            last = lines
        row = None if ended else find_instance(call, call["instance_id"])
        if row is None:
            return True
        ended = row.get("actual_status") == "exited"  # before the log, so that its end is not lost
        url = call.send(tail=call["tail"] or "1000").get("result_url")
        text = result_text(call, str(url), call["max_wait"]) if url else text
        return MOVED if fresh else None

    poll_until(look, FOREVER, 2.0, 15.0)


def new_lines(last: list[str], lines: list[str]) -> list[str]:
    """The lines after those that were there before; the log's beginning moves on, so they may
    stand further up.
    """
    # Enough to tell, and a log that says the same all the time takes no longer than others.
    last = last[-1000:]
    for at in range(len(lines), 0, -1):
        if last and lines[at - 1] == last[-1] and lines[max(0, at - len(last)) : at] == last[-at:]:
            return lines[at:]
    return lines


def result_text(call: Call, url: str, max_wait: float) -> str:
    """The text at a presigned address, once it is there.  The API key is not sent.  Raises
    WaitTimeoutError.
    """
    from urllib.parse import quote, urlsplit

    try:
        parts = urlsplit(quote(url, safe=URL_SAFE))
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        sent = truncate(redact_text(url, call.secrets), 100)
        raise VastAIError(f"the service sent {sent!r} as the address of the result") from None
    url = parts.geturl()
    request = Request("GET", url, {}, None, SAFE, auth=False)
    if call.client.explain:
        explain_request(call.client, request)

    def look(left: float) -> str | None:
        call.progress("waiting for the result …")
        timeout = min(max(0.5, left), call.client.timeout)
        try:
            answer = send_following_redirects(call.client, request, timeout)
        except NoAnswer:
            return None
        if answer.status_code != 200:
            return None
        if answer.fault:
            raise unusable_answer_error(call.row, answer, answer.fault)
        return answer.text

    time.sleep(min(0.3, max_wait))  # it takes a moment
    text: str | None = poll_until(look, max_wait, 0.3, 3.0)
    call.progress("")
    if text is None:
        raise WaitTimeoutError(f"no result after {max_wait:g} s")
    return text


HOW_TO_GET_SSH = (
    "It comes with OpenSSH: run `apt-get install openssh-client`, or add the OpenSSH client of "
    "Windows."
)


def run_ssh(call: Call) -> None:
    host, port = ssh_target(call, call["id"])
    words = ["ssh", "-p", str(port), *ssh_options(call, call["id"]), f"root@{host}"]
    run_program(words + list(call["command"] or ()), HOW_TO_GET_SSH, told=False)


def run_scp(call: Call) -> None:
    """scp with ID:PATH replaced by the address of the instance."""
    places = [call["source"], call["target"]]
    ids = [instance_of_place(place) for place in places]
    id = next(filter(None, ids), None)
    if id is None or None not in ids:
        raise UsageError(
            "write one of the places as INSTANCE:PATH; `vastai copy` copies between instances"
        )
    for place in places:
        if place.startswith("-"):
            raise UsageError(f"a path must not begin with -: write ./{printable(place)}")
    host, port = ssh_target(call, id)
    words = [
        plain_path(place) if other is None else f"root@{bracketed(host)}:{place.partition(':')[2]}"
        for place, other in zip(places, ids)
    ]
    options = ssh_options(call, id) + (["-r"] if call["recursive"] else [])
    run_program(["scp", "-P", str(port), *options, "--", *words], HOW_TO_GET_SSH)


def instance_of_place(place: str) -> int | None:
    """The instance that ID:PATH names; None for a local path."""
    id, colon, _ = place.partition(":")
    return int(id) if colon and is_id(id) else None


def run_address(call: Call) -> str:
    """`ssh://root@HOST:PORT`: the machine's mapped port 22, else the proxy; with `all` both."""
    row = next((row for row in call.do("show_instances") if row.get("id") == call["id"]), None)
    scheme = call.row.name.partition("-")[0]
    found = [
        f"{scheme}://root@{bracketed(host)}:{port}"
        for host, port in reachable(call, row, call["id"])
    ]
    return "\n".join(found if call["all"] else found[:1])


def bracketed(host: str) -> str:
    """A host as it stands in an address: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def ssh_target(call: Call, id: int) -> tuple[str, int]:
    """The first SSH address of an instance that answers; the last one if none does, for ssh to say
    why.
    """
    import socket

    row = find_instance(call, id)
    if row and (row.get("actual_status"), row.get("intended_status")) == ("exited", "stopped"):
        raise VastAIError(
            f"instance {id} is stopped", hint=f"Start it with `vastai start instance {id} --wait`."
        )
    found = reachable(call, row, id)
    for host, port in found[:-1]:
        try:
            socket.create_connection((host, port), 4).close()
            return host, port
        except OSError:
            warn(f"{host}:{port} does not answer; trying the proxy")
    return found[-1]


def ssh_options(call: Call, id: int) -> list[str]:
    """Host keys are remembered by instance, since a rented address comes back with another key: a
    new one is accepted, a changed one refused.
    """
    options = ["-o", "StrictHostKeyChecking=accept-new", "-o", f"HostKeyAlias=vastai-{id}"]
    if call["identity"] is not None:
        options += ["-i", os.path.expanduser(call["identity"])]
    return options


def reachable(call: Call, row: Row | None, id: int) -> list[tuple[str, int]]:
    """The SSH addresses of an instance.  Raises if there is no such instance or no address."""
    if not row:
        raise not_found_error("instance", id, "show instances")
    found = ssh_addresses(row)
    if not found:
        raise VastAIError(
            f"instance {id} has no SSH port yet; is it running?",
            hint=f"Wait for it with `vastai wait instance {id}`.",
        )
    return found


def ssh_addresses(row: Row) -> list[tuple[str, int]]:
    """Where an instance listens for SSH: direct first, then the proxy; hosts and ports that can be
    used as they are.
    """
    mapped = as_rows(get_path(row, "ports.22/tcp"))[:1]
    behind = "jupyter" in str(row.get("image_runtype"))
    found = [(row.get("public_ipaddr"), place.get("HostPort"), 0) for place in mapped]
    found.append((row.get("ssh_host"), row.get("ssh_port"), behind))
    good = []
    for host, place, more in found:
        name = safe_host(host)
        port = as_whole(place) or 0
        if name and 0 < port < 65536:
            good.append((name, port + more))
    return good


def safe_host(host: Any) -> str:
    """A host from the service as it may stand in a command, if it is not an option; else ""."""
    name = as_text(host).strip()
    plain = name.isascii() and name.translate(dict.fromkeys(map(ord, ".-:"), "a")).isalnum()
    return name if plain and name[0] != "-" else ""


def run_show_template(call: Call) -> Row:
    text = call["id"]
    if is_digits(text) and len(text) < 16:
        return template_of(call, "id", int(text))
    return template_of(call, "hash_id", text)


def run_update_template(call: Call) -> Row:
    """Fetches the template and sends all of it, with the members that were named replaced."""
    build_request(call)  # what is wrong with the arguments is said before anything is sent
    template = template_of(call, "hash_id", call["hash_id"])
    if call["direct"] and not (call["ssh"] or call["jupyter"] or call["runtype"]):
        present = as_text(template.get("runtype"))
        kind = next((kind for kind in ("jupyter", "ssh") if kind in present), "")
        if not kind:
            raise UsageError("--direct needs --ssh or --jupyter; the template has neither")
        call.params[kind] = True
    named = build_request(call).body or {}
    body = {name: template.get(name) for name in TEMPLATE_MEMBERS.split()}
    body["extra_filters"] = parse_text(body["extra_filters"])
    body.update(named, id=template.get("id"))
    answer: Row = call.send(body={name: body[name] for name in body if body[name] is not None})
    return answer


def parse_text(value: Any) -> Any:
    """The value of a JSON text, such as the service has for a template's conditions; anything else
    as it is.
    """
    import json

    try:
        return json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return value


def template_of(call: Call, name: str, value: Any) -> Row:
    """The template with this id or hash; of several with one hash your own."""
    found: list[Row] = call.do("search_templates", query={name: {"eq": value}})
    if not found:
        raise not_found_error("template", value, "search templates")
    if len(found) > 1:
        me = call.do("show_user").get("id")
        found = [row for row in found if me is not None and row.get("creator_id") == me] or found
    return found[0]


def run_copy(call: Call) -> Row:
    """Asks for a copy; if one side is this computer, rsync carries it out on the command line."""
    src, src_path = place_of(call, "src")
    dst, dst_path = place_of(call, "dst")
    if (call["identity"] or "").startswith("-"):
        raise UsageError("--identity: put ./ before a file name that begins with -")
    try:
        answer: Row = call.send()
    except VastAIError as error:
        if "VMs" in error.msg:
            error.hint = "Only the whole disk of a VM can be copied; leave out the path."
        raise
    if {src, dst} & {None, "local"}:  # else the service copies, which takes a while
        call.params["copied"] = "Copied" if call.cli else "Now rsync can copy"
    if not call.cli:
        return answer
    if src in (None, "local"):
        there = rsync_place(answer, "dst", dst, dst_path)
        run_rsync(call, answer["dst_port"], [for_rsync(os.path.expanduser(src_path)), there])
    elif dst in (None, "local"):
        there = rsync_place(answer, "src", src, src_path)
        here = local_target(os.path.expanduser(dst_path), src_path)
        run_rsync(call, answer["src_port"], [there, for_rsync(here)])
    return answer


def rsync_place(answer: Row, side: str, id: Any, path: str) -> str:
    """The remote side of a copy in rsync's words.  Raises VastAIError if its address is
    unusable.
    """
    host = safe_host(answer.get(f"{side}_addr"))
    port = whole_of(answer, f"{side}_port") or 0
    if not host or not 0 < port < 65536:
        raise VastAIError("the service sent no usable address for rsync")
    return f"vastai_kaalia@{bracketed(host)}::{id}/{path}"


def local_target(here: str, source: str) -> str:
    """Where a download goes: a folder, which is made, or a file if it is one or has the name of the
    source's.  Raises VastAIError.
    """
    names = os.path.basename(here), source.rpartition("/")[2]
    is_file = os.path.isfile(here) or (names[0] == names[1] and "." in names[1])
    folder = os.path.dirname(here) if is_file else here
    try:
        os.makedirs(folder or ".", exist_ok=True)
    except OSError as error:
        raise VastAIError(f"cannot make {printable(folder)}: {error.strerror}") from None
    return here


def for_rsync(path: str) -> str:
    """A local path as rsync takes it, which would read C: on Windows as a host."""
    if os.name == "nt" and on_drive(path):
        return f"/proc/cygdrive/{path[0]}/" + path[2:].replace("\\", "/").lstrip("/")
    return plain_path(path)


def plain_path(path: str) -> str:
    """A local path that no program reads as HOST:PATH."""
    remote = ":" in path.partition("/")[0] and not (os.name == "nt" and on_drive(path))
    return f"./{path}" if remote else path


def run_rsync(call: Call, port: Any, places: list[str]) -> None:
    """Copies with rsync over ssh."""
    from shlex import quote

    key = f"-i {quote(os.path.expanduser(call['identity']))} " if call["identity"] else ""
    shell = f"ssh {key}-p {as_whole(port)} -o StrictHostKeyChecking=no"
    excluded = [f"--exclude={pattern}" for pattern in call["exclude"] or ()]
    words = ["rsync", "-arz", "-v", "--progress", "--rsh=ssh", "-e", shell, *excluded, *places]
    how = "Get it with `apt-get install rsync`, `brew install rsync` or, on Windows, in WSL."
    run_program(words, how, aside=call.view.format != "table")


def run_price_increase(call: Call) -> Row:
    """Accepts or rejects what is pending for one instance, or for each of several."""
    if call["ids"] is None:
        return settle(call, call["instance_id"], pending_increases(call))
    numbers = pending_increases(call)
    entries = not_sent(dict.fromkeys(call["ids"]))

    def work(entry: Row) -> Any:
        return send_for([entry], call.row, lambda ids: settle(call, ids[0], numbers))

    with call.signals_caught(tells=lambda: f"interrupted; {partial(entries).msg}"):
        answers = at_once(call, work, entries)
    if len(entries) == 1 and isinstance(answers[0], VastAIError):
        raise answers[0]
    results = []
    for entry, answer in zip(entries, answers):
        id = entry["id"]
        number = numbers.get(id)
        result = {"instance_id": id, "contract_id": id, "pending_price_increase_id": number}
        if isinstance(answer, VastAIError):
            result.update(status=failure_status(answer), error=answer.msg)
        else:
            result.update(status=f"{call.row.name.split()[0]}ed", response=answer)
        results.append(result)
    if not all(entry["success"] for entry in entries):
        raise PartialError(partial(entries).msg, results=results)
    count = len(entries)
    counts = {"requested": count, "acted": count, "stale": 0, "failed": 0}
    return {"success": True, "exit_code": 0, **counts, "results": results}


def pending_increases(call: Call) -> dict[Any, Any]:
    """{instance: id of its price increase}; the first one counts."""
    rows = call.do("show_pending_price_increases")["pending_price_increases"]
    return {
        whole_of(row, "contract_id"): whole_of(row, "pending_price_increase_id")
        for row in reversed(rows)
    }


def settle(call: Call, id: int, numbers: dict[int, Any]) -> Row:
    """Accepts or rejects the price increase of one instance."""
    if numbers.get(id) is None:
        raise NotFoundError(
            f"no price increase is pending for instance {id}",
            hint="see `vastai show pending-price-increases`",
        )
    answer: Row = call.send(body={"pending_price_increase_id": numbers[id]})
    return answer


def failure_status(error: VastAIError) -> str:
    """What became of a price increase: "stale", "unknown" or "failed"."""
    gone = error.status == 409 or get_path(error.body, "error") == "no_pending_price_increase"
    if gone or (isinstance(error, NotFoundError) and not error.status):
        return "stale"
    return "unknown" if is_lost(error) else "failed"


def run_search_benchmarks(call: Call) -> Rows:
    """The benchmarks of all pages, or of one."""
    query: Row = {}
    build_filter_search(call, query)
    if call["order"] is not None:
        query["order_by"] = order_columns(call["order"], BENCHMARK_FIELDS, call.warn)
    for name in ("limit", "after_token"):
        if call[name] not in (None, ""):
            query[name] = call[name]
    return all_pages(call, query, wants_all_benchmarks(call))


def wants_all_benchmarks(call: Call) -> bool:
    """On the command line every page is read unless one is asked for; in the SDK one is."""
    one = call["limit"] is not None or call["after_token"] is not None
    return call["all_pages"] or (call.cli and not one)


def run_gpu_trends(call: Call) -> Row:
    """{GPU: {stats, rows}} from the service's parallel lists, in the order that was asked for."""
    answer = call.send()
    if answer.get("needs_machine"):
        return dict(answer)
    gpus = {call["name"]: answer} if "supply_demand" in answer else answer.get("gpus")
    if not isinstance(gpus, dict) or not all(isinstance(part, dict) for part in gpus.values()):
        raise VastAIError("the service sent an answer without 'gpus'")
    asked = [name.strip() for name in call["name"].replace("_", " ").split(",")]
    names = [*filter(gpus.__contains__, asked), *gpus]
    return {gpu: trend_of(gpus[gpu]) for gpu in names}


def trend_of(part: Row) -> Row:
    """One GPU's parallel lists as rows of what the table shows, null if a list is too short."""
    members = {**as_dict(part.get("pricing")), **as_dict(part.get("supply_demand"))}
    lists = {name: as_list(members.get(name)) for _, name, *_ in GPU_TRENDS_COLUMNS}
    rows = []
    for at, moment in enumerate(as_list(members.get("timestamps"))):
        row = {name: values[at] if at < len(values) else None for name, values in lists.items()}
        row.update(date=format_utc(moment, "%Y-%m-%d %H:%M:%S"), timestamp=moment)
        rows.append(row)
    return {"stats": as_dict(part.get("stats")), "rows": rows}


def run_gpu_locations(call: Call) -> Row:
    """The places that the filters let through; the service knows no filters here."""
    answer = call.send()
    names = (call["gpu"] or "").replace("_", " ").split(",")
    gpus = {name.strip() for name in names if name.strip()}
    found = []
    for row in as_rows(answer.get("locations")):
        state = state_of(row)
        facts = {name: bool(row.get(name)) for name in ("verified", "datacenter")}
        facts.update(rented=state == "rented")
        passes = call["state"] in ("all", state) and all(
            call[name] in ("all", str(fact).lower()) for name, fact in facts.items()
        )
        if passes and (not gpus or text_of(row, "gpu_name") in gpus):
            found.append(row)
    return {**answer, "locations": found}


def state_of(row: Row) -> str:
    """The state of a GPU on the map, which older answers give as a flag."""
    return text_of(row, "state") or ("rented" if row.get("rented") else "available")


def location_rows(call: Call, answer: Row) -> list[Row]:
    return [{**row, "state": state_of(row)} for row in as_rows(answer.get("locations"))]


def run_set_api_key(call: Call) -> None:
    """Saves a key: on the command line in the key file, in Python in this client."""
    key = (call["api_key"] or "").strip()
    if not call.cli:
        check_key(key, "this command")
        call.client.api_key = key
        return
    key = key or ask_secret("API key")
    check_key(key, "this command")
    call.params["path"] = save_api_key(key, call.client.profile)
    used = find_key(None, session=True, profile=call.client.profile)[2]
    if used != call["path"]:  # of a 2FA session, say
        call.warn(f"{used} takes precedence over the file")


def run_ssh_key(call: Call) -> Any:
    """Sends a public key; on the command line it may stand in a file."""
    word = text = call["ssh_key"] or ""
    if call.cli and os.path.exists(os.path.expanduser(word)):
        text = _read_file(word)
    if "PRIVATE KEY" in text:
        raise UsageError(
            "this is a private key; give the public one, from the file that ends in .pub"
        )
    if call.cli and not text.strip().startswith(("ssh-", "ecdsa-", "sk-")):
        raise UsageError(
            f"{printable(word, 60)!r} is neither a public SSH key nor a file that holds one"
        )
    return call.send(ssh_key=text)


KEY_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")


def run_create_ssh_key(call: Call) -> Any:
    """Adds a public key: a given one, one of this computer's, or a new one from ssh-keygen."""
    if call["ssh_key"] is not None:
        return run_ssh_key(call)
    if not call.cli:
        raise UsageError(
            "ssh_key: expected a public key, such as the text of ~/.ssh/id_ed25519.pub"
        )
    if call.client.curl:
        return call.send(ssh_key="PUBLIC_KEY")
    folder = os.path.join(os.path.expanduser("~"), ".ssh")
    if not os.path.isabs(folder):
        raise UsageError("there is no home folder for a key; set HOME, or name a public key")
    public = [os.path.join(folder, f"{name}.pub") for name in KEY_NAMES]
    path = next(filter(os.path.isfile, public), None)
    if path:
        confirm(call, f"Add the existing key {path}?")
    else:
        path = make_ssh_key(os.path.join(folder, KEY_NAMES[0]))
    return call.send(ssh_key=_read_file(path).strip())


def make_ssh_key(path: str) -> str:
    """Makes a key pair with ssh-keygen; the path of the public key.  Never replaces a file."""
    import getpass

    if os.path.lexists(path):
        raise UsageError(
            f"{path} exists, but {path}.pub does not; make it with "
            f"`ssh-keygen -y -f {path} > {path}.pub`"
        )
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = "user"
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-f", path, "-N", "", "-C", f"{user}-vast.ai"]
    run_program(words, HOW_TO_GET_SSH, aside=True)
    os.chmod(path, 0o600)
    warn(f"created the SSH key {path}")
    return f"{path}.pub"


def run_instance_ssh_keys(call: Call) -> list[Row]:
    """The keys of an instance; the service gives them as a list or as the JSON text of one."""
    answer = call.send()
    keys = answer.get("ssh_keys") if isinstance(answer, dict) else answer
    return objects(parse_text(keys))


def run_set_role(call: Call) -> None:
    """Saves the role that the overview of commands is for."""
    write_private(profile_file("vast_role", call.client.profile), call["role"])


def run_show_env_vars(call: Call) -> Row:
    """The environment variables; without their values unless those are asked for."""
    values = call.send()
    if values is None:
        raise VastAIError("the service sent null instead of the variables")
    return values if call["show_values"] else dict.fromkeys(values, "****")


def env_document(call: Call, values: Row) -> Row:
    return values if call["show_values"] else dict.fromkeys(values, "*****")


def env_rows(call: Call, values: Row) -> list[Row]:
    shown = env_document(call, values)
    return [{"name": name, "value": value} for name, value in shown.items()]


def run_tfa_login(call: Call) -> Row:
    """Proves who is there; the command line saves the key of the session that this starts."""
    if call["code"] is None and call["backup_code"] is None:
        if not call.at_terminal or call.client.curl:
            raise UsageError("give either --code or --backup-code")
        call.params["code"] = ask_secret("Code")
    answer: Row = call.send()
    key = answer.get("session_key")
    if not call.cli or not key:
        return answer
    call.params["said"] = "The key in use is that of a 2FA session already."
    if key != call.client.api_key:
        path = profile_file("vast_tfa_key", call.client.profile)
        try:
            check_key(key, "the service")
            write_private(path, key, lasting=True)
        except UsageError as error:
            raise VastAIError(f"the code was right, but {error.msg}") from None
        call.params["said"] = f"2FA session started; its key is in {path}."
        if call.client.creds_source in ("CODE", "ENV"):
            call.warn("--api-key and VAST_API_KEY take precedence over the session's key")
    left = whole_of(answer, "backup_codes_remaining")
    if left is not None and left <= 3:
        call.warn(f"backup codes left: {left}; create new ones with `vastai tfa regen-codes`")
    return answer


def run_tfa_logout(call: Call) -> Row:
    """Deletes the key of the session, if there is one."""
    path = profile_file("vast_tfa_key", call.client.profile)
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return {"success": True, "msg": "There was no 2FA session."}
    except OSError as error:
        raise VastAIError(f"cannot delete {path}: {error.strerror}") from None
    return {"success": True, "msg": f"2FA session ended: {path} deleted."}


def run_tfa_auth_new(call: Call) -> Row:
    """Both steps of the proof that a new method needs; in Python one of them, by what is given."""
    code = call["code"]
    secret = call["secret"]
    if code is None:
        chosen = build_request(call).body
        answer: Row = call.send(body={} if chosen else {"tfa_method": "email"})
        if not call.cli or (
            call["backup_code"] and answer.get("msg") == "Authorization successful."
        ):
            return answer
        secret = text_of(answer, "secret")
        if not secret:
            raise VastAIError("the service sent no secret for the second step; start again")
        code = ask_line(f"Secret: {secret}. Code:")
        if not code:
            raise VastAIError(
                "no code was given",
                hint=f"Continue with `vastai tfa auth-new --secret {printable(secret)} --code CODE`.",
            )
    done: Row = call.of(AUTH_NEW_END, secret=secret, code=code).send()
    return done


def run_show_machine(call: Call) -> Row:
    """One machine, which the service gives as a list of one."""
    found = objects(call.send())
    if not found:
        raise not_found_error("machine", call["id"], "show machines")
    if len(found) > 1:
        raise VastAIError(f"the service sent {len(found)} machines for {call['id']}")
    return found[0]


def list_of_one(call: Call, result: Row) -> list[Row]:
    """As the service gives a single thing, and scripts expect it with --raw."""
    return [result]


def answer_document(call: Call, rows: Rows) -> Any:
    """All that the service said, rather than its rows."""
    return rows.answer or list(rows)


def page_document(call: Call, rows: Rows) -> Any:
    """The answer as it came if one page was asked for, else the rows."""
    return rows.answer if is_one_page(call) else rows


def benchmark_document(call: Call, rows: Rows) -> Any:
    """A page of benchmarks with its token if one was asked for, else the rows."""
    if wants_all_benchmarks(call):
        return rows
    return {
        "success": True,
        "benchmarks_found": len(rows),
        "benchmarks": list(rows),
        "next_token": rows.answer.get("next_token"),
    }


def run_list_machines(call: Call) -> list[Row]:
    """One request for each machine, a few at the same time; one that fails does not stop the
    others.
    """
    terms = {arg.name: call[arg.name] for arg in LISTING}
    results = not_sent(call["ids"])

    def work(entry: Row) -> Row:
        answer: Row = send_for(
            [entry], call.row, lambda ids: call.do("list_machine", id=ids[0], **terms)
        )
        entry.update({**answer, **entry})
        return answer

    call.progress(f"machines: {len(results)} …")
    found = at_once(call, work, results)
    call.progress("")
    failed = any(isinstance(answer, VastAIError) for answer in found)
    if isinstance(found[0], NothingSent) or (failed and len(found) == 1):
        raise found[0]
    if failed:
        raise partial(results)
    return found


def cluster_rows(call: Call, answer: Row) -> list[Row]:
    """A row for each cluster, with its machines and the one that manages it."""
    if not isinstance(answer.get("clusters"), dict):
        raise VastAIError("the service sent an answer without 'clusters'")
    rows = []
    for id, cluster in answer["clusters"].items():
        nodes = as_rows(get_path(cluster, "nodes"))
        manager = next((node for node in nodes if node.get("is_cluster_manager")), {})
        rows.append(
            {
                "id": id,
                "subnet": get_path(cluster, "subnet"),
                "nodes": nodes,
                "manager": manager.get("machine_id"),
                "manager_ip": manager.get("local_ip"),
                "machine_ids": [node.get("machine_id") for node in nodes],
            }
        )
    return rows


def run_show_invoices(call: Call) -> Row:
    """The items of a period as they came, and what is not billed yet; with `pdf` a file as well."""
    answer = invoice_items(call, inc_charges=not call["only_credits"])
    if call["instance_label"]:
        answer["invoices"] = with_label(call, invoice_rows(call, answer))
    if call["pdf"]:
        write_invoice(call, call["pdf"], invoice_rows(call, answer))
    return answer


def invoice_items(call: Call, **more: Any) -> Row:
    """`invoices` and `current` of a period."""
    answer = call.send(query={**invoice_period(call), **more})
    kind = "charge" if call["only_charges"] else "payment" if call["only_credits"] else None
    items = objects(answer.get("invoices"))
    return {
        "invoices": [row for row in items if kind in (None, row.get("type"))],
        "current": answer.get("current"),
    }


def invoice_period(call: Call) -> Row:
    """`sdate` and `edate` in unix seconds; the last day if no dates are given."""
    end = call.get("end_date", time.time())
    start = call.get("start_date", end - 86400)
    check_period(start, end)
    return {"sdate": start, "edate": end}


def with_label(call: Call, rows: list[Row]) -> list[Row]:
    """The items of instances with the label that was asked for."""
    ids = {whole_of(row, "instance_id") for row in rows} - {None, 0}
    found = call.do("fetch_contracts", label=call["instance_label"], contract_ids=list(ids))
    kept = ids.intersection(whole_of(contract, "id") for contract in found)
    return [row for row in rows if whole_of(row, "instance_id") in kept]


def invoice_rows(call: Call, answer: Row) -> list[Row]:
    """The items that are not 0 and lie between the given dates."""
    start = call.get("start_date", -FOREVER)
    end = call.get("end_date", FOREVER)
    return [
        row
        for row in as_rows(answer.get("invoices"))
        if number_of(row, "amount") != 0 and start <= (number_of(row, "timestamp") or 0) <= end
    ]


def invoice_totals(call: Call, answer: Row) -> list[str]:
    """The sums of charges and of payments, and what is not billed yet."""
    sums = sums_of(invoice_rows(call, answer))
    facts = [f"{kind.lower()} {format_money(amount)}" for kind, amount in sums.items()]
    lines = [f"Total {format_money(sum(sums.values()))}: {', '.join(facts)}"] if facts else []
    if call["pdf"]:
        lines.append(f"Written to {call['pdf']}")
    current = as_dict(answer.get("current"))
    if current:
        facts = [f"{name} {format_money(as_number(value) or 0)}" for name, value in current.items()]
        lines.append(f"Current: {', '.join(facts).replace('_', ' ')}")
    return lines


def sums_of(rows: list[Row]) -> dict[str, float]:
    """The sums of charges and of payments, $, in the order in which they begin."""
    sums: dict[str, float] = {}
    for row in rows:
        kind = "Payments" if row.get("type") == "payment" else "Charges"
        sums[kind] = sums.get(kind, 0) + (number_of(row, "amount") or 0)
    return sums


def format_money(amount: float) -> str:
    """Dollars and cents: $25.00, -$3.10."""
    return f"-${-amount:,.2f}" if amount < 0 else f"${amount:,.2f}"


def run_show_invoices_v1(call: Call) -> Row:
    """A page of invoices or charges as it came; all pages of them if they are to become a PDF."""
    if not call["pdf"]:
        answer: Row = call.send()
        return answer
    query = build_request(call).query
    results = list(all_pages(call, query, True))
    title = "Invoices"
    kind = "payment"
    when = "when"
    if call["charges"]:
        title = "Charges"
        kind = "charge"
        when = "day"
    items = [
        {
            "timestamp": row.get("start") if isinstance(row.get("end"), str) else row.get("end"),
            "type": kind,
            "amount": row["amount"],
            "description": row.get("description") or row.get("source"),
        }
        for row in bill_rows(call, results)
    ]
    write_invoice(call, call["pdf"], items, query["select_filters"][when], title)
    return {"results": results, "count": len(results), "total": len(results), "next_token": None}


def bill_rows(call: Call, results: list[Row]) -> list[Row]:
    """The results of a page as people read them: without zeros, payments as gains, `instance-12`
    in two parts.
    """
    rows = []
    for row in results:
        amount = number_of(row, "amount")
        if amount == 0:
            continue
        row = {**row, "amount": row.get("amount") if amount is None else amount}
        kind, dash, number = str(row.get("source") or "").partition("-")
        if call["charges"] and dash:
            row.update(type=kind, source=number)
        elif not call["charges"]:
            row["end"] = row.get("end") or "N/A"
            if amount and row.get("type") not in ("transfer", "payout"):
                row["amount"] = -amount
        rows.append(row)
    return rows


def run_pdf_invoices(call: Call) -> str:
    """Writes the items of a period as a PDF; the path."""
    name = f"invoice_{invoice_number()}"
    for letter, date in (("S", call["start_date"]), ("E", call["end_date"])):
        if date is not None:
            name += f"-{letter}:{format_utc(date, '%Y-%m-%dT%H:%M:%S')}"
    for flag in ("only_charges", "only_credits"):
        name += f"-{flag}" if call[flag] else ""
    if os.name == "nt":
        name = name.replace(":", ".")
    path = call["pdf"] or f"{name}.pdf"
    write_invoice(call, path, invoice_rows(call, invoice_items(call)))
    return str(path)


def invoice_number() -> int:
    """Months since the year 0: one number for all invoices of a month."""
    today = time.localtime()
    return 12 * today.tm_year + today.tm_mon - 1


def write_invoice(
    call: Call, path: str, rows: list[Row], limits: Row | None = None, title: str = "Invoice"
) -> None:
    """Puts invoice items into a PDF file, with the account as addressee and a sum for each kind.
    `limits` are those of the period if it is not invoice_period()'s.
    """
    user = call.of(METHODS["show_user"]).send(query=OWNER)
    totals = [(kind, format_money(amount)) for kind, amount in sums_of(rows).items()]
    moments = (limits or invoice_period(call)).values()
    period = " - ".join(format_utc(moment, "%Y-%m-%d") for moment in moments)
    document = invoice_pdf(
        rows, user, title=title, number=str(invoice_number()), period=period, totals=totals
    )
    write_private(os.path.expanduser(path), document)


def earning_rows(call: Call, answer: Row) -> list[Row]:
    """What the machines earned, day by day, each part and their sum in dollars."""
    rows = []
    for row in objects(answer.get("per_day")):
        parts = [number_of(row, name) or 0 for name in EARNINGS]
        day = number_of(row, "day")
        rows.append({**row, "date": None if day is None else day * 86400, "total": sum(parts)})
    return rows


def earning_totals(call: Call, answer: Row) -> Iterator[str]:
    """What each machine earned."""
    for row in as_rows(answer.get("per_machine")):
        total = sum(number_of(row, name) or 0 for name in EARNINGS)
        yield f"Machine {as_text(row.get('machine_id'))}: {format_money(total)}"


def transfer_question(call: Call) -> str:
    if call["skip"]:
        return ""
    return (
        f"Send ${call['amount']:.2f} of your credit to {call['recipient']}? This cannot be undone."
    )


def build_transfer(call: Call, body: Row) -> None:
    """On the command line recipient and amount may stand alone, too."""
    for name in ("recipient", "amount"):
        word = call.params.pop(f"{name}_pos", None)
        body[name] = call.params[name] = call.get(name, word)


def run_notifications(call: Call) -> Any:
    """The notification choices of an account, of your own unless another is named."""
    user = call["user_id"]
    if user is None:
        user = as_whole(call.do("show_user").get("id"))
    if user is None:
        raise VastAIError("the service did not say which account this is; name it with --user_id")
    return call.send(user_id=user)


def notification_rows(call: Call, choices: Row) -> list[Row]:
    """A row for each kind of notification, with the ways in which it comes."""
    rows = []
    for context, kinds in as_dict(choices).items():
        for kind, ways in as_dict(kinds).items():
            ways = ways if isinstance(ways, dict) else {"email": ways}
            rows.append({"key": f"{context}:{kind}", **ways})
    return rows


def notification_columns(call: Call, rows: list[Row]) -> Iterable[Any]:
    """The key, and a column for each way in which a notification can come."""
    names = dict.fromkeys(name for row in rows for name in row if name != "key")
    return (("Key", "key", "", 0), *((format_value(name), name, "", 0) for name in names))


def run_update(call: Call) -> None:
    """Shows how to update this copy; there is no place to fetch a newer one from safely."""
    how, place = installation()
    advice = "to update, replace this single file with a newer vastai.py"
    if how == "pip":
        advice = f"to update, run `{sys.executable} -m pip install --upgrade PATH_OR_URL`"
    raise VastAIError(f"this is vastai {__version__} in {place}; {advice}")


def uninstall_question(call: Call) -> str:
    """Raises VastAIError for a copy that pip did not install, and says where it is."""
    how, place = installation()
    if how == "file":
        raise VastAIError(
            f"pip did not install this copy; to remove it, delete {place}; to remove your keys, "
            f"delete {os.path.dirname(own_file('config', 'x'))}"
        )
    return f"Uninstall {place} with pip?"


def run_uninstall(call: Call) -> None:
    run_program([sys.executable, "-m", "pip", "uninstall", "--yes", "vastai"], "")


def installation() -> Pair:
    """How this copy came here ("pip" or "file"), and where it is."""
    from importlib.metadata import PackageNotFoundError, distribution

    place = os.path.realpath(__file__)
    try:
        package = distribution("vastai")
        if any(
            os.path.realpath(str(package.locate_file(file))) == place
            for file in package.files or ()
        ):
            return "pip", place
    except PackageNotFoundError:
        pass
    return "file", place


# ------------------------------------------------------------------------- waiting and cleaning up
# One way to wait, one table of what can never run, one way to clean up: for whatever rents.

NOT_THERE_YET = 30.0  # seconds after a rental in which the service may not know the new instance
SETTLING = 10.0  # seconds after a start or restart in which the old state may still be shown
GIVE_BACK_TRIES = 10  # tries to destroy
GIVE_BACK_PAUSE = 10.0  # seconds between them
MOVED = object()  # what a look of poll_until returns if something happened, but not yet the end

# Whose fault it is that an instance never runs: parts of its `status_msg`, with commas between.
FINAL_MESSAGES = parse_table("""\
image: manifest unknown, unauthorized, pull access denied, access to the resource is denied, \
repository does not exist, no matching manifest, invalid reference format
host: error response from daemon, oci runtime, no space left on device, unexpected eof, \
failed to pull, failed to create, failed to start, failed to register layer, \
cannot connect to the docker daemon, could not select device driver, nvidia-container-cli, \
port is already allocated, tls handshake timeout, context deadline exceeded, toomanyrequests""")


def poll_until(
    look: Callable[[float], Any],
    limit: float,
    pause: float,
    most: float = 0,
    *,
    tries: int = 0,
    longest: float = LONGEST_PAUSE,
    clock: Callable[[], float] | None = None,
    sleep: Callable[[float], None] = sleep,
) -> Any:
    """What `look(seconds left)` returns, once that is not None; None after `limit` seconds or
    `tries` looks.

    The pauses between two looks begin at `pause` seconds and grow by a quarter each time, up to
    `most`; after a look that returns MOVED they begin again.  A look that meets the rate limit is
    repeated after the pause that the service asks for, but `longest` at most.
    """
    clock = clock or time.monotonic
    end = clock() + limit
    first = pause
    looks = 0
    while True:
        asked = 0.0
        try:
            result = look(max(0.0, end - clock()))
        except RateLimitError as error:
            result = None
            asked = min(error.retry_after or 0.0, longest)
        if result is not None and result is not MOVED:
            return result
        looks += 1
        left = end - clock()
        if left <= 0 or looks == tries:
            return None
        pause = first if result is MOVED else pause
        sleep(min(left, max(pause, asked)))
        pause = min(pause * 1.25, max(most, first))


def fault_of(row: Row, exited_before: bool = False) -> Pair:
    """Why an instance can never run, as (whose fault, what it shows); two empty texts while it may.

    The fault is the "host"'s, the "image"'s, or it is "stopped".  A restart passes through
    `exited`: that counts if it was `exited_before` as well.
    """
    states = [row.get(name) for name in ("intended_status", "cur_state", "next_state")]
    state = row.get("actual_status")
    told = str(row.get("status_msg") or "").strip()
    shown = f"it is {state or 'not started'}" + (f": {told}" if told else "")
    if states == ["stopped"] * 3:
        return "stopped", f"{shown} (outbid, stopped or out of credit)"
    if state == "running":
        return "", ""
    fault = failure_of(told, FINAL_MESSAGES)
    if fault:
        return fault, shown
    if told.lower().startswith("error"):
        return "host", shown
    if state == "exited" and states[0] == "stopped":
        return "stopped", shown
    if state in ("offline", "unknown") or (state == "exited" and exited_before):
        return "host", shown
    return "", ""


def find_instance(call: Call, id: Any) -> Row | None:
    """An instance; None if it is gone."""
    try:
        row: Row | None = call.do("show_instance", id=id)
    except NotFoundError:
        return None
    return row


class Watch:
    """Polls one instance: its last state (`row`), whether it was ever seen, and what is wrong with
    it; `problem` says why the last look told nothing.
    """

    seen = False
    problem = ""
    exited = 0  # looks in a row that showed it exited
    odd = 0  # looks in a row whose answer made no sense

    def __init__(self, call: Call, id: int) -> None:
        self.call = call.hurried()  # one try a look: who looks repeats it anyway
        self.id = id
        self.begun = time.monotonic()
        self.row: Row = {}

    def look(self, left: float) -> Row | None:
        """The instance; {} if the service does not tell this time, None if it is gone.

        One that was not seen yet is not gone at first, but not there yet.  Raises VastAIError.
        """
        client = self.call.client
        client.timeout = min(client.timeout, max(0.5, left))
        try:
            row = find_instance(self.call, self.id)
        except RateLimitError:
            raise
        except VastAIError as error:
            self.odd = self.odd + 1 if 200 <= error.status < 300 else 0
            puzzling = 0 < self.odd < 4 and get_path(error.body, "success") is not False
            lost = isinstance(error, NetworkError) or may_pass(error.status)
            if not (lost or puzzling):
                raise relabel_error(error, f"instance {self.id} cannot be checked") from error
            self.problem = error.msg
            return {}  # one lost answer is no reason to give up
        self.problem = ""
        if row is None:
            fresh = time.monotonic() - self.begun < NOT_THERE_YET and not self.seen
            return {} if fresh else None
        self.row = row
        self.seen = True
        self.odd = 0
        self.exited = self.exited + 1 if row.get("actual_status") == "exited" else 0
        return row

    def dead_error(self, words: str) -> VastAIError | None:
        """The error to raise if the instance can never run; `fault` says whose fault."""
        fault, shown = fault_of(self.row, self.exited > 1)
        hint = f"`vastai logs {self.id}` may say why; it is billed until it is destroyed."
        if fault == "stopped":
            hint = (
                f"`vastai start instance {self.id}` starts it; "
                "its disk is billed until it is destroyed."
            )
        if fault == "stopped" and self.row.get("is_bid"):
            hint = f"Raise the bid with `vastai change bid {self.id} --price {next_bid(self.row)}`."
        told = f"instance {self.id} {words}: {printable(shown, 400)}"
        return VastAIError(told, hint=hint, fault=fault) if fault else None


def wait_for(
    call: Call, id: int, status: str, poll: float = 5, stale: str = "", limit: float | None = None
) -> Row:
    """The instance once it is in a state; `stale` is one that it may still show from before.

    Raises WaitTimeoutError; VastAIError or NotFoundError if that state can no longer come.
    """
    poll = max(poll, 0.2)  # seconds; a poll of 0 must not flood the service
    watch = Watch(call, id)
    changed = not stale
    watch.seen = status == "destroyed"  # then one that is not there is gone
    most: float = call["max_wait"] if limit is None else limit

    def look(left: float) -> Row | None:
        nonlocal changed
        row = watch.look(left)
        if row is None and status == "destroyed":
            return {"id": id, "actual_status": status}
        if row is None:
            raise not_found_error("instance", id, "show instances")
        state = row.get("actual_status")
        elapsed = time.monotonic() - watch.begun
        changed = changed or (row != {} and state != stale) or elapsed > SETTLING
        runs = row and status in ("running", "loading")
        dead = watch.dead_error(f"cannot become {status}") if runs else None
        if dead and changed:
            raise dead
        if state == status and changed:
            return row
        told = str(row.get("status_msg") or "").strip()[:60]
        shown = state or printable(watch.problem, 200) or "…"
        call.progress(f"instance {id}: {shown}", f"{elapsed:.0f} s {told}", in_pipe=True)
        return None

    row: Row | None = poll_until(look, most, max(poll / 4, 0.1), poll * 3)
    call.progress("")
    if row is None:
        missing = "not started" if watch.seen else "unknown to the service"
        state = watch.row.get("actual_status") or missing
        goal = "" if status == "running" else f" --status {status}"
        raise WaitTimeoutError(
            f"instance {id} was not {status} after {most:g} s: {watch.problem or f'it is {state}'}",
            hint=f"Keep waiting with `vastai wait instance {id}{goal}`.",
        )
    return row


class Interrupted(KeyboardInterrupt):
    """SIGTERM, SIGHUP or SIGBREAK, as an interruption like Ctrl-C."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.exit_status = 128 + signum


class SignalGuard:
    """In its block SIGTERM, SIGHUP and SIGBREAK interrupt as Ctrl-C does, unless it is `off`; what
    it then `tells` is said on stderr.

    Only in the main thread, and only those whose handler is the default one: nohup, and a program's
    own handlers, stay in force.
    """

    def __init__(self, tells: Callable[[], str] = str, off: bool = False) -> None:
        self.tells = tells
        self.off = off
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> Any:
        if self.off:
            return self
        import signal
        import threading

        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
                number = getattr(signal, name, None)  # not every system has all of them
                if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                    self.handlers[number] = signal.signal(number, self.interrupt)
        return self

    def interrupt(self, number: int, frame: Any) -> None:
        raise Interrupted(number)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.off:
            return
        import signal

        words = self.tells() if isinstance(error, KeyboardInterrupt) else ""
        if words:
            say(words)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Rented:
    """Something rented that must be deleted: an "instance", an "endpoint" or a "workergroup".

    Its `id` is None while there is none, and "?" from the moment its request is sent until the
    answer is read: then it is found by its `name`.  If that name is not `made_up` by us, only a
    single row that is `ours` counts.  `price` is in $/hr, or None.
    """

    results: list[Row] = []
    looks = True  # must it be seen to be gone, or is the confirmed request enough?
    id: Any = None
    price: Any = None
    disk_price: Any = None  # the disk's part of it
    last: Any = None  # its id before it was deleted
    problem = ""  # why it could not be destroyed
    given_up = False  # after ten tries
    began = -FOREVER  # time.monotonic() of the rental
    began_at = FOREVER  # time.time() of it: a computer that sleeps stops the other clock
    seen = False  # by a look at it since then
    runs = True  # else its disk alone is billed
    hours = 0.0  # of the last one
    cost = 0.0  # $ of all of this name, without traffic

    def __init__(
        self,
        call: Call,
        kind: str,
        name: str,
        made_up: bool = True,
        ours: Callable[[Row], bool] = lambda row: True,
    ) -> None:
        self.call = call.hurried(30.0)
        self.kind = kind
        self.name = name
        self.verb = "destroy" if kind == "instance" else "delete"
        self.made_up = made_up
        self.ours = ours
        self.past: set[Any] = set()  # all its ids so far: one name may serve for several tries
        self.workers: list[Any] = []  # that its deletion has named, gone or not

    @property
    def found(self) -> Any:
        """The id, if it is known."""
        return None if self.id == "?" else self.id

    def find(self, tries: int = 3) -> list[Any] | None:
        """The ids of our rows of this name: three looks within 15 s, until there are some.  None if
        the last look failed.  `problem` says why they cannot be deleted, "" if they can.
        """
        rows = poll_until(lambda left: self.rows() or None, 15, 7, tries=tries) or []
        if self.problem:
            return None
        ids = [whole_of(row, "id") for row in rows]
        if not ids:
            self.problem = "none has appeared so far"
        elif None in ids:
            self.problem = "one has appeared without an id"
        elif len(ids) > 1 and not self.made_up:
            self.problem = f"several have appeared: {', '.join(map(str, ids))}"
        elif not (self.made_up or number_of(rows[0], "start_date")):
            self.problem = f"when {ids[0]} started is unknown"
        return ids

    def rows(self) -> list[Row] | None:
        """One look at our rows of this name; None if it failed, then `problem` says why."""
        self.problem = ""
        params = {"label": [self.name]} if self.kind == "instance" else {}
        try:
            rows = self.call.do(f"show_{self.kind}s", **params)
        except VastAIError as error:
            self.problem = f"they could not be listed: {error.msg}"
            return None
        return [
            row
            for row in rows
            if self.name.strip() in (row.get("label"), row.get("endpoint_name"))
            and whole_of(row, "id") not in self.past
            and self.ours(row)
        ]

    def give_back(self) -> None:
        """Deletes it and checks that it is gone; keeps the id if that is uncertain."""
        if self.id is None or self.given_up:
            return
        ids = [self.id]
        if self.id == "?":
            found = self.find()
            if found is None or (found and self.problem):
                return
            if not found:
                self.call.tell(self.still_costs())
            ids = found
        left = [id for id in ids if not self.remove(id)]
        self.id, self.given_up = left[0] if left else None, bool(left)
        self.past.update(ids)
        if ids:
            self.end(ids[-1])

    def remove(self, id: Any) -> bool:
        """Deletes what has this id, in up to ten tries, 10 s apart.  Is it seen to be gone?"""

        def attempt(left: float) -> bool | None:
            try:
                self.problem = "the service still shows it"
                return None if self.delete(id) else True
            except Exception as error:  # whatever comes, the clean-up goes on
                self.problem = getattr(error, "msg", "") or f"{type(error).__name__}: {error}"
                if isinstance(error, RateLimitError):
                    raise
                self.call.progress(f"{self.kind} {id}: {self.problem}; trying again …")
                return None

        return bool(poll_until(attempt, FOREVER, GIVE_BACK_PAUSE, tries=GIVE_BACK_TRIES))

    def delete(self, id: Any) -> bool:
        """One request that deletes it, and one look: does the service still show it?

        Raises VastAIError if it may be there though it is not shown.
        """
        try:
            answer = self.call.do(f"{self.verb}_{self.kind}", id=id)
            for name in ("deleted_workers", "failed_workers"):
                self.workers += as_list(as_dict(answer).get(name))
            if not self.looks:
                return False
        except VastAIError as error:
            gone = isinstance(error, NotFoundError) or "no such" in error.msg.lower()
            if not gone or self.is_new():
                raise
        if self.kind == "instance":
            return find_instance(self.call, id) is not None
        return any(whole_of(row, "id") == id for row in self.call.do(f"show_{self.kind}s"))

    def is_new(self) -> bool:
        """May the service not know it yet?"""
        return not self.seen and time.monotonic() - self.began < NOT_THERE_YET

    def end(self, id: Any) -> None:
        """Notes the last id, and what it has come to."""
        seconds = max(time.monotonic() - self.began, time.time() - self.began_at)
        self.last = id
        self.hours = seconds / 3600
        self.cost += self.hours * (self.price or 0)

    def still_costs(self) -> str:
        """A sentence on what may be left, what it costs, and how to end it; "" if nothing is."""
        if self.id is None:
            return ""
        reason = f" ({printable(self.problem, 200)})" if self.problem else ""
        if self.id == "?":
            named = f" labeled {self.name!r}" if self.name else ""
            return (
                f"whether the {self.kind}{named} was created is unknown{reason}; "
                f"check with `vastai show {self.kind}s`"
            )
        state = "is rented" if self.runs else "exists"
        if reason:
            state = f"could not be destroyed{reason}"
        rate = "" if self.price is None else f" {format_rate(self.price)}"
        rate += "" if self.runs else " for its disk"
        return (
            f"{self.kind} {self.id} {state} and is billed{rate} until "
            f"`vastai {self.verb} {self.kind} {self.id}` ends it"
        )


class CleanupGuard(SignalGuard):
    """Calls `rented.give_back()` however its block ends.  Raises PartialError if something is left.

    The first signal starts the cleanup, or waits until it is done; the next one stops it, and what
    is left is reported.
    """

    def __init__(self, call: Call, rented: Any) -> None:
        super().__init__()
        self.call = call
        self.rented = rented

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        signal = error if isinstance(error, KeyboardInterrupt) else None
        billed = ""
        try:
            while True:
                try:
                    billed = self.rented.still_costs() if signal is not None else ""
                    if billed:
                        self.call.tell("Cleaning up; another signal stops the cleanup")
                    self.rented.give_back()
                    break
                except KeyboardInterrupt as another:
                    if signal is not None:
                        self.call.tell(self.rented.still_costs())
                        raise signal from None
                    signal = another
        finally:
            super().__exit__(kind, error, trace)
        left = self.rented.still_costs()
        if left and not isinstance(error, PartialError):
            raise PartialError(
                left, results=self.rented.results, found=self.rented.found
            ) from error
        says_so = self.call.row.status  # the last words of `run` are about that
        if billed and not (left or says_so or "is unknown" in billed):
            self.call.tell("Destroyed all that was rented")
        if signal is not None and signal is not error:
            raise signal


def format_rate(price: Any) -> str:
    """$0.41/hr, with two to four digits."""
    text = f"${as_number(price) or 0:,.4f}"
    return (text[:-2] if text.endswith("00") else text.rstrip("0")) + "/hr"


def bid_over(price: float, percent: float) -> float:
    """A bid, $/hr, so much above another price, rounded up to a tenth of a cent."""
    tenths = price * (100 + percent) * 10  # of a cent; a little off, as floats are
    return -(-round(tenths, 6) // 1) / 1000


def next_bid(row: Row) -> str:
    """What to bid for an interruptible instance that was outbid."""
    prices = [number_of(row, name) or 0 for name in ("min_bid", "dph_base")]
    return f"{bid_over(max(prices), 10):g}" if max(prices) > 0 else "PRICE"


# ------------------------------------------------------------------------------------------ renting
# Commands that spend the user's money.  Nobody pays for something forgotten, unwanted, or rented
# without being told its price.

LEASE_FILE = "/var/lib/vastai-lease"  # unix time at which the instance ends itself
LEASE = r"""(F=@F; E=$(cat $F 2>/dev/null); case $E in ''|*[!0-9]*) E=$(($(date +%s)+@S)); echo $E >$F;; esac
trap '' HUP; until [ $(date +%s) -ge $E ]; do sleep 60; N=$(cat $F 2>/dev/null); case $N in ''|*[!0-9]*);; *) E=$N;; esac; done
U=@U/api/v0/instances/${CONTAINER_ID#C.}/; H="Authorization: Bearer $CONTAINER_API_KEY"; export U H
while :; do curl -fsS -m 30 -X DELETE -H "$H" $U || wget -qO- -T 30 -t 1 --method=DELETE --header="$H" $U ||
python3 -c 'import os,urllib.request as u;u.urlopen(u.Request(os.environ["U"],method="DELETE",headers={"Authorization":os.environ["H"][15:]}),timeout=30)'
sleep 60; done) >/dev/null 2>&1 </dev/null &
"""
LONGEST_ONSTART = 4096  # characters that the service takes as commands to run at the start
RENTAL_PAUSE = 4.5  # seconds between two rentals; the service refuses what comes faster
SHORT_OF_CREDIT = 1.0  # hours
LOW_BID_SIGNS = "invalid_price, bid_too_low"


def with_lease(call: Call, body: Row) -> str:
    """The commands of a rental, after the script that ends the instance after `max_hours`.

    It needs only what the service gives a container: CONTAINER_ID and CONTAINER_API_KEY.  Raises
    UsageError if nothing would run it.
    """
    arguments = call["args_str"] or "args" in body or text_of(body, "runtype").strip() == "args"
    if call["vm"] or arguments:
        raise UsageError(
            "--max-hours cannot be combined with --args, runtype args or --vm: "
            "nothing would destroy the instance"
        )
    seconds = max(1, round(call["max_hours"] * 3600))
    server = call.client.server_url.rstrip("/")
    script = fill_script(LEASE, F=LEASE_FILE, S=seconds, U=server) + (body["onstart"] or "")
    if len(script) > LONGEST_ONSTART:
        raise UsageError(
            f"--max-hours: with its script the commands to run at the start are {len(script)} "
            f"characters; the service takes {LONGEST_ONSTART}"
        )
    return script


def fill_script(script: str, **words: Any) -> str:
    """A script for the shell in which each @X stands for a word, quoted."""
    import re
    from shlex import quote

    return re.sub("@([A-Z])", lambda match: quote(str(words[match.group(1)])), script)


def fetch_commands(call: Call) -> None:
    """Before a rental with `max_hours`: looks at the arguments, and takes the template's commands,
    which would be replaced otherwise.
    """
    if call["max_hours"] is None:
        return
    build_request(call)  # what is wrong with the arguments is said before anything is sent
    given = (call["onstart"], call["onstart_cmd"], call["entrypoint"])
    if call["template_hash"] and given == (None, None, None) and not call.client.curl:
        template = template_of(call, "hash_id", call["template_hash"])
        call.params["onstart_cmd"] = text_of(template, "onstart")
        if template.get("runtype") == "args":
            raise UsageError(
                "--max-hours: the template only runs args; nothing would destroy the instance"
            )


def run_launch(call: Call) -> Row:
    """Rents the best offer: the service's choice, or with one of MACHINE_OPTIONS ours, until it
    runs.
    """
    given = [call[arg.name] for arg in MACHINE_OPTIONS]
    if not isinstance(call["query"], str) and all(
        value is None or value is False for value in given
    ):
        return run_create_instance(call)
    launch = Launch(call)
    with CleanupGuard(call, launch.rented):
        answer = launch.run()
        launch.rented.id = None  # handed over
    return answer


class Launch:
    """The search for a machine that works: one rental after the other, never two at once."""

    credit: float | None = None
    needs_credit = False  # is there no sense in a search without any?
    next_rental = 0.0  # time.monotonic() before which none is sent

    def __init__(self, call: Call) -> None:
        self.call = call
        self.spot = call["spot"]
        self.cap = call["max_price"]
        self.disk = call["disk"]
        self.excluded: list[Any] = list(call["exclude_machine"] or ())
        self.most: int = call.get("tries", 3)
        self.rented = rental(call, call["label"])
        self.rental_call = self.call_of_a_rental()
        self.tries: list[Row] = []
        self.conditions = launch_conditions(call)
        self.order = parse_order(call["order"] or "dph_total", ALIASES, OFFER_FIELDS, call.warn)

    def call_of_a_rental(self) -> Call:
        """The call of `create instance` with our options; looks at them before anything is sent."""
        row = METHODS["create_instance"]
        names = {arg.name for arg in row.args}
        given = {name: value for name, value in self.call.params.items() if name in names}
        given.update(id=1, label=self.rented.name, cancel_unavail=True, price=None)
        # a file is text by now, and may not be read again
        given.update(onstart_cmd=start_commands(self.call), onstart=None, entrypoint=None)
        client = self.call.client.varied(retry=1)  # 429 is repeated by us alone
        params = check_params(row, given, cli=False)
        call = self.call.of(row, client, **params)
        build_request(call)
        return call

    def ready(self, row: Row) -> str:
        """A further test of a running instance: what is wrong with it, or ""."""
        return ""

    def run(self) -> Row:
        """The answer of the rental that runs, with its `instance` and the failed `tries`."""
        self.read_credit()
        if self.needs_credit and self.credit is not None and self.credit <= 0:
            raise UsageError(
                "your account has no credit; add some at https://cloud.vast.ai/billing/"
            )
        offers = self.search()
        fetch_commands(self.rental_call)
        self.note_those_there()
        for offer in offers:
            if len(self.tries) == self.most:
                break
            self.announce(offer)
            answer = self.rent(offer)
            row = answer and self.start(offer)
            if answer and row:
                return {**answer, "instance": row, "tries": self.tries}
        raise self.failure()

    def read_credit(self) -> None:
        """What the account has, $; a key that may not read it is no reason to stop."""
        try:
            self.credit = as_number(self.call.do("show_user").get("credit"))
        except VastAIError as error:
            self.call.tell(f"cannot read your credit: {error.msg}")

    def note_those_there(self) -> None:
        """Remembers who has the caller's label already: those are not ours, whatever comes.

        Raises VastAIError: if they could not be told apart later, nothing may be rented.
        """
        label = self.rented.name
        new = self.rented.ours
        if self.rented.made_up:
            return
        try:
            there = {whole_of(row, "id") for row in self.call.do("show_instances", label=[label])}
        except VastAIError as error:
            raise relabel_error(
                error, f"nothing was rented; the instances labeled {label!r} cannot be listed"
            ) from error
        self.rented.ours = lambda row: new(row) and whole_of(row, "id") not in there

    def search(self) -> list[Row]:
        """The offers to try, one for each machine, best first.  Raises NotFoundError."""
        call = self.call
        conditions = self.conditions
        order = self.order
        narrow(conditions, "disk_space", self.disk)
        if call["max_hours"] is not None:
            narrow(conditions, "duration", call["max_hours"] * 3600)
        if self.excluded:
            machines = conditions.setdefault("machine_id", {})
            machines["notin"] = listed(machines.get("notin", [])) + self.excluded
        # the first ones of another order may all be above the cap
        least = 2000 if self.cap and call["order"] else 64
        offers = call.do(
            "search_offers",
            query=conditions,
            no_default=True,
            type="bid" if self.spot else "on-demand",
            order=[*order, ["id", "asc"]],
            storage=self.disk,
            limit=max(least, 8 * self.most, call["limit"] or 0),
        )
        if not offers:
            raise NotFoundError(
                "no offer matches the conditions; nothing was rented", hint=model_hint(conditions)
            )
        best: Keyed = {}
        for offer in offers:
            price = self.price_of(offer)[0]
            machine = whole_of(offer, "machine_id")
            good = None not in (price, whole_of(offer, "id")) and machine not in self.excluded
            if good and not self.is_above_cap(price):
                best.setdefault(machine, offer)
        if not best:
            cap = "" if self.cap is None else f" for {format_rate(self.cap)} or less"
            raise NotFoundError(
                f"none of {len(offers)} offers is available{cap}; nothing was rented"
            )
        return list(best.values())

    def is_above_cap(self, price: float | None) -> bool:
        return None not in (price, self.cap) and price > self.cap + 1e-6  # floats are a little off

    def bid_for(self, offer: Row) -> float | None:
        """Our bid, $/hr for the whole offer without its disk; None on demand."""
        least = number_of(offer, "min_bid")
        given: float | None = self.call["bid"]
        if not self.spot or given is not None:
            return given
        return None if least is None else bid_over(least, self.call.get("bid_over", 10))

    def price_of(self, offer: Row) -> tuple[float | None, float]:
        """$/hr with our disk, and the disk's part of it; None if the offer names no price."""
        if self.spot:
            offer = {**offer, "dph_total": None, "dph_base": self.bid_for(offer)}
        return price_with_disk(offer, self.disk)

    def announce(self, offer: Row) -> None:
        """Says what is about to be rented, and what it costs."""
        price, disk = self.price_of(offer)
        bid = self.bid_for(offer)
        kind = "on demand" if bid is None else f"interruptible, bid {format_rate(bid)}"
        up = number_of(offer, "inet_up_cost")
        down = number_of(offer, "inet_down_cost")
        trust = as_number(offer.get("reliability2", offer.get("reliability")))
        end = number_of(offer, "end_date")
        part = f"{format_rate(disk)} for " if disk else ""
        place = text_of(offer, "geolocation") or "an unknown place"
        words = [
            f"Renting offer {offer.get('id')}, machine {offer.get('machine_id')}",
            f"{_gpu(offer)} in {place}",
            "reliability unknown" if trust is None else f"reliability {trust:.1%}",
            kind,
            f"{format_rate(price)} including {part}{self.disk:g} GB of disk",
            f"traffic {format_traffic(up)} up and {format_traffic(down)} down",
            f"until {format_utc(end)} UTC" if end else "without a known end",
        ]
        self.call.tell(", ".join(words))
        if price and self.credit is not None and self.credit < price * SHORT_OF_CREDIT:
            hours = format_duration(max(0, self.credit) / price * 3600)
            self.call.tell(f"Your credit of ${self.credit:.2f} lasts {hours} at that price")

    def rent(self, offer: Row) -> Row | None:
        """The answer of the rental; None if this offer cannot be had, but another may.

        Raises what ends the search; if it is unknown whether something was rented, the error of
        unknown outcome.
        """
        call = self.rental_call
        call.params.update(id=offer["id"], price=self.bid_for(offer))
        self.rented.price, self.rented.disk_price = self.price_of(offer)
        for tries_left in reversed(range(8)):
            sleep(max(0.0, self.next_rental - time.monotonic()))
            self.next_rental = time.monotonic() + RENTAL_PAUSE
            try:
                return rent(call, self.rented)
            except PartialError:
                raise  # what it made could not be destroyed
            except VastAIError as error:
                words = f"{get_path(error.body, 'error')} {error.msg}".lower()
                pause = getattr(error, "retry_after", None) or 0.0
                if contracts_of(error.body):  # rent() has destroyed it
                    self.give_up(offer, error.msg)
                elif isinstance(error, RateLimitError) and tries_left and pause <= LONGEST_PAUSE:
                    self.next_rental = max(self.next_rental, time.monotonic() + pause)
                    continue
                elif is_lost(error):
                    return self.find(error)
                elif "no_such_ask" in words:
                    error.msg = "it was taken by someone else"
                elif not (isinstance(error, NotFoundError) or mentions(words, LOW_BID_SIGNS)):
                    raise
                self.call.tell(f"Offer {offer['id']}: {error.msg}")
                break
        return None

    def find(self, error: VastAIError) -> Row:
        """What the rental made whose answer was lost.  Raises OutcomeUnknownError."""
        self.call.tell(f"{error.msg}; checking whether the instance exists")
        ids = self.rented.find()
        if ids and len(ids) == 1 and not self.rented.problem:
            self.rented.id = ids[0]
            return {"success": True, "new_contract": self.rented.id}
        self.rented.id = None  # nothing that could be destroyed
        if not isinstance(error, OutcomeUnknownError):
            error = outcome_unknown_error(self.rental_call.row, error.msg)
        label = self.rented.name
        found = self.rented.problem or ids
        error.msg += f"; looked for instances labeled {label!r}: {found}"
        raise error

    def start(self, offer: Row) -> Row | None:
        """The instance once it works as ordered; None once it is destroyed because it does not.

        Raises PartialError if that is not certain, VastAIError if no other machine does better.
        """
        limit = self.call.get("start_timeout", 900)
        stop = None
        try:
            row = wait_for(self.call, self.rented.id, "running", limit=limit)
            self.rented.seen = True
            price = price_of(row, "dph_total")
            told = self.rented.price
            self.rented.price = price or told
            if price and price > told * 1.01:
                rates = f"{format_rate(price)}, not {format_rate(told)}"
                self.call.tell(f"Instance {self.rented.id} costs {rates}")
            reason = self.mismatch(row) or self.ready(row)
            if not reason:
                return row
        except VastAIError as error:
            reason = error.msg
            stop = self.fatal(error)
            if isinstance(error, NotFoundError):
                self.rented.seen = True  # and it is gone
        self.call.tell(f"{reason}; destroying instance {self.rented.id}")
        self.show_logs()
        self.rented.give_back()
        if self.rented.id is not None:
            raise PartialError(
                f"{self.rented.still_costs()}; before that: {reason}",
                results=[],
                found=self.rented.id,
            )
        if stop:
            hint = "" if stop.details.get("fault") else stop.hint
            stop.hint = f"{hint} It was destroyed; another machine would fail the same way.".strip()
            raise stop
        self.give_up(offer, reason)
        return None

    def fatal(self, error: VastAIError) -> VastAIError | None:
        """An error after which no other machine does better: the image's fault, no credit, or one
        that has nothing to do with the machine.
        """
        fault = error.details.get("fault", "")
        if fault == "stopped":
            self.read_credit()
            if self.credit is None or self.credit > 0:
                return None
            error.msg += f"; your credit is ${self.credit:.2f}"
            return error
        machine = fault == "host" or isinstance(error, (WaitTimeoutError, NotFoundError))
        return None if machine else error

    def mismatch(self, row: Row) -> str:
        """How an instance differs from the order; "" if it does not."""
        price = number_of(row, "dph_total")
        lack = lack_of_disk(row, self.disk)
        if lack:
            return lack
        if self.is_above_cap(price):
            return f"it costs {format_rate(price)}, more than {format_rate(self.cap)}"
        if self.spot and row.get("is_bid") is not None and not row["is_bid"]:
            return "it is on-demand, not interruptible"
        return ""

    def show_logs(self) -> None:
        """The last lines that the container wrote, on stderr."""
        if not self.call.cli:
            return
        call = self.call.hurried(10.0)
        try:
            text = call.do("logs", instance_id=self.rented.id, tail="20", max_wait=10)
        except VastAIError:
            return  # it has written nothing yet, or nobody knows
        for line in text.splitlines()[-20:]:
            self.call.tell(f"  {line}")

    def give_up(self, offer: Row, reason: str) -> None:
        """Notes a try that failed, and never takes that machine again."""
        machine = offer.get("machine_id")
        self.excluded.append(machine)
        self.tries.append({"offer": offer["id"], "machine_id": machine, "reason": reason})

    def failure(self) -> VastAIError:
        """The error once no try is left, or no offer."""
        if not self.tries:
            return NotFoundError("every matching offer was refused; nothing was rented")
        lines = []
        for item in self.tries:
            place = f"offer {item['offer']}, machine {item['machine_id']}"
            lines.append(f"  {place}: {printable(item['reason'], 300)}")
        options = " ".join(f"--exclude-machine {id}" for id in self.excluded if id is not None)
        return VastAIError(
            "\n".join(["no machine worked; everything rented was destroyed:", *lines]),
            hint=options and f"For the next run: {options}",
            tries=self.tries,
        )


def price_with_disk(offer: Row, size: float) -> tuple[float | None, float]:
    """$/hr with so many GB of disk, and the disk's part; None if there is no price."""
    names = ("dph_total", "dph_base", "storage_cost")
    total, base, storage = (price_of(offer, name) for name in names)
    disk = (storage or 0) * size / HOURS_OF_MONTH
    if total is None and None in (base, storage):
        return None, disk
    return max((base or 0) + disk, total or 0), disk


def narrow(conditions: Row, field: str, least: float) -> None:
    """Adds a lower limit to conditions that may have one."""
    limits = conditions.setdefault(field, {})
    limits["gte"] = max(number_of(limits, "gte") or 0, least)


def is_lost(error: VastAIError) -> bool:
    """May a rental have taken place although no usable answer came?"""
    body = as_dict(error.body)
    refused = denies(body) or has_failed(body)
    unreadable = 200 <= error.status < 300 and not refused
    return isinstance(error, OutcomeUnknownError) or error.status >= 500 or unreadable


def format_traffic(price: float | None) -> str:
    return "unknown" if price is None else f"${price:.3g}/GB"


# ---------------------------------------------------------------------------------- remote commands
# `run`: a command on a machine of its own, from nothing to its exit status.

WORKSPACE = "/workspace"  # folder of the instance that paths are relative to
HOURS_OF_A_JOB = 24.0  # --max-hours, if it is not given
SILENCE = 60.0  # seconds of nothing but failures after which ssh is not waited for
SSH_OF_A_JOB = (
    "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
)
UNREACHABLE_SIGNS = "timed out, no route to host, unreachable, could not resolve"
UPLOAD_FOLDER = "mkdir -p @T && tar -C @T -xof -"
UPLOAD_FILE = "mkdir -p @P @D.up && tar -C @D.up -xof - && mv -f @D.up/@N @T"
KIND_OF = "if [ -d @T ]; then echo folder; elif [ -e @T ]; then echo file; fi"
# The job itself claims its folder: one that was killed before it began can be started again.
START = """mkdir -p @W @D; cd @D; : >>out; : >>err
($(command -v setsid || echo nohup) sh -c @Q </dev/null >/dev/null 2>&1 &)"""
# What ssh sessions lack of the container's own environment, such as the PATH to its Python.
ENVIRONMENT = r"""eval "$(tr '\0' '\n' </proc/1/environ 2>/dev/null | sed -n "s/'/'\\\\''/g
/^PATH=/{s/^PATH=\(.*\)/PATH='\1':\$PATH/p;d;}
s/^\([A-Za-z_][A-Za-z0-9_]*\)=\(.*\)$/[ \"\${\1+x}\" ] || export \1='\2'/p")"
"""
JOB = """mkdir @D/job 2>/dev/null || exit 0; echo $$ >@D/pid; cd @W; ENVIRONMENT(COMMAND) >@D/out 2>@D/err; echo $? >@D/rc.new; mv @D/rc.new @D/rc"""
# Sends what is new as frames, "out 12" or "err 12" and 12 bytes; then "rc 0".  "idle 0" shows that
# the connection lives.
FOLLOW = """cd @D || exit 1; o=@O; e=@P; n=0
while :; do
r=; [ -e rc ] && r=rc
[ "$r" ] || [ ! -s pid ] || kill -0 $(cat pid) 2>/dev/null || [ -e rc ] || r=lost
for f in out err; do
[ $f = out ] && p=$o || p=$e
s=$(($(wc -c <$f))); k=$((s-p))
[ $k -gt 0 ] || continue
echo "$f $k"; tail -c +$((p+1)) $f | head -c $k
[ $f = out ] && o=$s || e=$s
done
[ "$r" != rc ] || { echo "rc $(cat rc)"; exit 0; }
[ "$r" != lost ] || { echo "lost 0"; exit 0; }
n=$((n+1)); [ $n -lt 15 ] || { n=0; echo "idle 0"; }
sleep 0.3
done"""
SHORTEN = """N=$(($(date +%s)+3600)); O=$(cat @F 2>/dev/null)
case $O in ''|*[!0-9]*) ;; *) [ $O -gt $N ] || exit 0;; esac; echo $N >@F"""


def run_job(call: Call) -> Row:
    """Runs a command on a rented machine and destroys the instance; see RemoteJob."""
    job = RemoteJob(call)
    try:
        with CleanupGuard(call, job.rented):
            job.work()
    except BrokenPipeError:  # the reader has closed the pipe: nothing is said
        raise
    except VastAIError as error:
        error.hint = "\n  ".join(filter(None, [error.hint, job.last_words()]))
        raise
    except BaseException:  # also a stdout that is full
        if job.rented.id is None:  # else a second signal came, and what is left has been told
            call.tell(job.last_words())
        raise
    if job.problem:
        raise PartialError(f"{job.problem}\n  {job.last_words()}", results=[], found=job.id)
    call.tell(job.last_words(well=True))
    return {
        "status": job.status,
        "instance": job.id,
        "hours": job.rented.hours,
        "cost": job.rented.cost,
        "tries": job.tries,
    }


class RemoteJob(Launch):
    """A command on a machine of its own: upload, start, follow, download.

    It does not depend on the connection: it runs in its own session and writes to its own
    folder.  After a lost connection, reading resumes at the last byte received.
    """

    needs_credit = True
    watch: Watch
    address = ("", 0)
    id: Any = None
    status: int | None = None
    deadline = ends_at = 0.0  # the end of --max-hours, by time.monotonic() and time.time()
    problem = ""  # why the instance stays although that was not asked for
    kept = False

    def __init__(self, call: Call) -> None:
        import threading

        self.prints = call.cli  # in Python, what the job writes goes nowhere
        self.limit: float = call.get("max_hours", HOURS_OF_A_JOB)
        self.hours = format_duration(self.limit * 3600)
        self.uploads = [split_pair("--upload", text, here=True) for text in call["upload"] or ()]
        self.downloads = [split_pair("--download", text) for text in call["download"] or ()]
        query = call.get("query", call.get("gpu", "num_gpus=1"))
        call.params.update(max_hours=self.limit, ssh=True, direct=True, query=query)
        if not call["command"]:
            raise UsageError(
                "which command? Write it after --, as in: run IMAGE -- python train.py"
            )
        super().__init__(call)
        self.look_here()
        self.folder = f"/tmp/vastai-run-{os.urandom(6).hex()}"
        self.arrived = {"out": 0, "err": 0}  # bytes
        self.last = b"\n"  # the last one that ours may follow in a line
        self.heard = threading.Event()  # something came while it was followed

    def look_here(self) -> None:
        """Before any money: are the programs and the files here, and is there a key for ssh?"""
        from shutil import which

        for program in ("ssh", "tar") if self.uploads or self.downloads else ("ssh",):
            if not which(program):
                hint = HOW_TO_GET_SSH if program == "ssh" else ""
                raise UsageError(f"{program} is not installed here", hint=hint)
        for local, _ in self.uploads:
            if not os.path.exists(local):
                raise UsageError(f"--upload: no file or folder {printable(local)}")
        key = self.call["identity"]
        if key is not None and not os.path.isfile(os.path.expanduser(key)):
            raise UsageError(f"--identity: no file {printable(key)}")
        if not self.call.client.curl and not self.call.do("show_ssh_keys"):
            raise UsageError("your account has no SSH key; `vastai create ssh-key` adds one")

    def work(self) -> None:
        """The job to its end; what it leaves behind is decided by `rented` and `problem`."""
        self.call.tell(f"The instance destroys itself after {self.hours} (--max-hours)")
        self.run()
        for local, remote in self.uploads:
            self.insist(self.upload, local, remote)
        self.insist(self.begin)
        try:
            self.status = self.insist(self.follow)
        finally:
            if self.last != b"\n":
                write_err("\n")
        for remote, local in self.downloads:
            try:
                self.insist(self.download, remote, local)
            except (VastAIError, OSError) as error:
                lost = bool(getattr(error, "fault", ""))
                if lost or isinstance(error, WaitTimeoutError):
                    raise  # there is nothing left to fetch it from
                self.problem += f"{remote} could not be downloaded: {error}. "
        if self.problem:
            left = "for one more hour"
            if self.ssh(self.fill(SHORTEN), 30.0)[0]:
                left = f"and destroys itself {self.hours} after its start"
            self.problem += f"Instance {self.id} stays {left}"
        if self.problem or self.call["keep"]:
            self.rented.end(self.id)
            self.kept, self.rented.id = True, None  # not to be destroyed

    # The connection

    def ready(self, row: Row) -> str:
        """Waits until ssh answers; returns why this machine is no good, or ""."""
        self.id = self.rented.id
        self.deadline = time.monotonic() + self.limit * 3600
        self.ends_at = time.time() + self.limit * 3600  # if the computer sleeps in between
        self.watch = Watch(self.call, self.id)
        begun = admitted = time.monotonic()  # when ssh was last not denied
        alive = False
        told = "no address"

        def look(left: float) -> str | None:
            nonlocal alive, admitted, told
            denied = False
            self.call.progress(f"instance {self.id}: waiting for ssh", in_pipe=True)
            self.check()
            for address in ssh_addresses(self.watch.row):
                self.address = address
                status, _, told = self.ssh("true", limit=min(20.0, max(1.0, left)))
                if status == 0:
                    return ""
                denied = denied or "permission denied" in told.lower()
                alive = alive or not mentions(told, UNREACHABLE_SIGNS)
            now = time.monotonic()
            admitted = admitted if denied else now
            if now - admitted >= SILENCE:
                raise VastAIError(
                    f"instance {self.id} refuses the SSH key of this computer",
                    hint="With -i, give the private key of one of `vastai show ssh-keys`.",
                )
            late = now - begun >= SILENCE
            return f"ssh did not answer for {SILENCE:g} s" if late and not alive else None

        problem = poll_until(look, self.call.get("start_timeout", 900), 1.0, 10.0)
        reason = f"ssh cannot log in: {printable(' '.join(told.split()), 300)}"
        return reason if problem is None else str(problem)

    def check(self) -> None:
        """Looks at the instance.  Raises VastAIError if it is lost."""
        watch = self.watch
        row = watch.look(30.0)
        left = min(self.deadline - time.monotonic(), self.ends_at - time.time())
        if left <= 0 or (row is None and left < 120):  # its lease was faster than we
            raise self.over_error()
        if row is None:
            raise VastAIError(f"instance {self.id} is gone", fault="host")
        dead = watch.dead_error("is lost") if row else None
        if dead:
            dead.hint = dead.hint if is_outbid(watch.row) else ""  # it is about to be destroyed
            raise dead

    def insist(self, attempt: Callable[..., Any], *args: str) -> Any:
        """What an attempt returns; while the connection is lost (None) and the instance is not,
        another one follows.  Raises WaitTimeoutError at the end of --max-hours.
        """

        def look(left: float) -> Any:
            result = attempt(left, *args)
            if result is None or result is MOVED:
                self.check()
                if self.last == b"\n":
                    self.call.progress(
                        f"instance {self.id}: connection lost, trying again", in_pipe=True
                    )
            return result

        result = poll_until(look, self.deadline - time.monotonic(), 1.0, 30.0)
        if result is None:
            raise self.over_error()
        return result

    def over_error(self) -> WaitTimeoutError:
        what = "command" if self.status is None else "download"
        return WaitTimeoutError(f"the {what} did not finish within {self.hours} (--max-hours)")

    def ssh_words(self, command: str) -> list[str]:
        host, port = self.address
        options = [*ssh_options(self.call, self.id), *SSH_OF_A_JOB.split()]
        return ["ssh", "-p", str(port), *options, f"root@{host}", command]

    def ssh(self, command: str, limit: float, **streams: Any) -> tuple[int, bytes, str]:
        """(status, stdout, stderr) of a command on the instance; 255 if the connection is lost."""
        import subprocess

        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **streams}
        words = self.ssh_words(command)
        limit = min(limit, LONGEST_TIMEOUT)
        try:
            done = subprocess.run(words, stderr=subprocess.PIPE, timeout=limit, **streams)
        except subprocess.TimeoutExpired:
            return 255, b"", "timed out"
        told = done.stderr.decode("utf-8", "replace")
        return 255 if done.returncode < 0 else done.returncode, done.stdout or b"", told

    def command(self, text: str, left: float, **streams: Any) -> bytes | None:
        """What a command on the instance writes; None if the connection is lost.  Raises
        VastAIError if it fails.
        """
        status, out, told = self.ssh(text, left, **streams)
        if status not in (0, 255):
            words = printable(" ".join(told.split()), 300) or f"status {status}"
            raise VastAIError(f"instance {self.id}: {words}")
        return None if status else out

    # The steps

    def fill(self, script: str, **values: Any) -> str:
        """As fill_script(), with the places that the scripts of a job have in common."""
        return fill_script(script, D=self.folder, W=WORKSPACE, F=LEASE_FILE, **values)

    def upload(self, left: float, local: str, remote: str) -> bytes | None:
        import subprocess

        self.call.progress(f"instance {self.id}: uploading {local}", in_pipe=True)
        place = os.path.abspath(local)
        folder, name = os.path.split(place)
        if os.path.isdir(place):
            words = ["tar", "-C", place, "-cf", "-", "."]
            script = UPLOAD_FOLDER
        else:
            words = ["tar", "-C", folder, "-cf", "-", f"./{name}"]
            script = UPLOAD_FILE
        target = remote_path(remote or name)
        parent = target.rpartition("/")[0] or "/"
        script = self.fill(script, T=target, P=parent, N=name)
        done = None
        with subprocess.Popen(words, stdout=subprocess.PIPE) as tar:
            try:
                done = self.command(script, left, stdin=tar.stdout)
            finally:
                if done is None:
                    tar.kill()
        if done is not None and tar.returncode:
            raise VastAIError(f"tar could not read {printable(local)}")
        return done

    def begin(self, left: float) -> bytes | None:
        """Starts the job, once, however often it is sent."""
        from shlex import quote

        given = self.call["command"]
        text = f"sh -c {quote(given)}" if isinstance(given, str) else " ".join(map(quote, given))
        job = self.fill(JOB).replace("ENVIRONMENT", ENVIRONMENT).replace("COMMAND", text)
        return self.command(self.fill(START, Q=job), min(left, 60.0))

    def follow(self, left: float) -> Any:
        """The exit status of the job; what it wrote is passed on as it comes.  None or MOVED if the
        connection is lost before.
        """
        import re
        import subprocess
        import threading

        script = self.fill(FOLLOW, O=self.arrived["out"], P=self.arrived["err"])
        moved = None

        def guard() -> None:
            """Ends an ssh that hangs, and one that is there at the end of --max-hours."""
            while self.heard.wait(max(0.0, min(SILENCE, self.deadline - time.monotonic()))):
                self.heard.clear()
                if ssh.poll() is not None:
                    return
            ssh.kill()

        with subprocess.Popen(
            self.ssh_words(script),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as ssh:
            threading.Thread(target=guard, daemon=True).start()
            try:
                source: Any = ssh.stdout
                for line in iter(lambda: source.readline(4096), b""):
                    self.heard.set()
                    frame = re.fullmatch("([a-z]+) ([0-9]{1,15})\n", line.decode("latin-1"))
                    if not frame:
                        continue  # the connection was cut within it, or it is not ours
                    self.call.progress("")
                    name = frame[1]
                    number = int(frame[2])
                    if name == "rc" and number < 256:
                        return number
                    if name == "lost":
                        raise VastAIError(f"the job is lost: instance {self.id} was restarted")
                    if name in self.arrived:
                        self.pass_on(name, source, number)
                    if name == "idle" and self.prints:
                        check_reader(sys.stdout)
                    moved = MOVED
                ssh.wait(5)
            except subprocess.TimeoutExpired:
                pass
            finally:
                ssh.kill()
                self.heard.set()
        if ssh.returncode == 1 and not moved:
            raise VastAIError(f"the job is lost: its folder on instance {self.id} is gone")
        if ssh.returncode == 0:  # it ends well only with what became of the job
            raise VastAIError(f"instance {self.id} sent an unexpected answer")
        return moved

    def pass_on(self, name: str, source: Any, count: int) -> None:
        """Copies so many bytes to our stdout or stderr; fewer if the connection is cut."""
        plain = self.call.view.format == "table"  # else stdout is for the result
        while count:
            data = source.read1(min(count, 1 << 16))
            if not data:
                return
            self.heard.set()
            if plain and name == "out":
                write_bytes(sys.stdout, data)
            elif self.prints:
                try:
                    write_bytes(sys.stderr, data)
                except OSError:  # a terminal that is gone is no reason to end the job
                    pass
            self.arrived[name] += len(data)
            if name == "err" or is_terminal(sys.stdout):
                self.last = data[-1:]
            count -= len(data)

    def download(self, left: float, remote: str, local: str) -> bytes | None:
        import subprocess

        self.call.progress(f"instance {self.id}: downloading {remote}", in_pipe=True)
        source = remote_path(remote)
        place = os.path.expanduser(local or source.rstrip("/").rpartition("/")[2] or ".")
        kind = self.command(self.fill(KIND_OF, T=source), min(left, 60.0))
        if kind is None:
            return None
        if not kind.strip():
            raise VastAIError("it is not there")
        folder = kind.strip() == b"folder"
        os.makedirs(place if folder else os.path.dirname(place) or ".", exist_ok=True)
        if folder:
            with subprocess.Popen(["tar", "-C", place, "-xof", "-"], stdin=subprocess.PIPE) as tar:
                done = self.command(
                    self.fill("tar -C @T -cf - .", T=source), left, stdout=tar.stdin
                )
                failed = bool(tar.poll())  # by itself, before the end of what it reads
            if failed or (done is not None and tar.returncode):
                raise VastAIError(f"tar could not write {printable(place)}")
            return done
        part = place if is_special(place) else f"{place}.part"
        with open(part, "wb") as file:
            done = self.command(self.fill("cat @T", T=source), left, stdout=file)
            if done is None and part != place:
                os.write(file.fileno(), b"x")  # a full disk ends ssh as a lost connection does
        if done is not None and part != place:
            os.replace(part, place)
        return done

    # What it came to

    def last_words(self, well: bool = False) -> str:
        """What became of the command and the instance, and what it cost.

        If all went `well`, our exit status is the command's: that it is 0 needs no words.
        """
        id = self.rented.found or self.rented.last
        if id is None:
            return ""
        words = f"instance {id} destroyed after {self.rented.hours:.2f} h"
        cost = f"about ${self.rented.cost:.2f} without traffic"
        if self.kept:
            rate = format_rate(self.rented.price)
            words = (
                f"instance {id} stays at {rate}; stop paying with `vastai destroy instance {id}`"
            )
        elif self.rented.id is not None:
            words = self.rented.still_costs()
        if self.status or (self.status == 0 and not well):
            machine = self.watch.row.get("machine_id")
            words = f"the command exited with status {self.status} on machine {machine}; {words}"
        return f"{words}; {cost}"


def show_job(call: Call, result: Row) -> None:
    """Nothing more: stdout has what the command wrote there."""


def split_pair(flag: str, text: str, here: bool = False) -> Pair:
    """FROM[:TO]; `here` means that FROM is a path of this computer, which may hold a colon."""
    drive = text[:2] if here and text[1:2] == ":" and os.name == "nt" else ""
    source, _, target = text[len(drive) :].partition(":")
    if here and os.path.exists(text):
        source = text[len(drive) :]
        target = ""
    if not source:
        raise UsageError(f"{flag}: expected FROM or FROM:TO, not {printable(text)!r}")
    return os.path.expanduser(drive + source) if here else source, target


def remote_path(path: str) -> str:
    return path if path.startswith("/") else f"{WORKSPACE}/{path}"


def check_reader(stream: TextIO | None) -> None:
    """Raises BrokenPipeError if nobody reads what we write to a pipe anymore."""
    import select

    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # type: ignore[union-attr]
        gone = any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # not on this system, or no real stream
        return
    if gone:
        raise BrokenPipeError


def write_bytes(stream: Any, data: bytes) -> None:
    """Passes bytes on as they are; nothing if the stream is missing or closed."""
    if is_gone(stream):
        return
    stream.flush()
    if hasattr(stream, "buffer"):
        stream.buffer.write(data)
    else:
        stream.write(data.decode("utf-8", "replace"))
    stream.flush()


# -------------------------------------------------------------------------------------------- costs
# hourly_cost() alone says what an instance costs; every sum is built on it.

HOURS_OF_MONTH = 720  # as the service bills
YEAR_10000 = 253402300800  # unix seconds at which year 10000 begins


def hourly_cost(row: Row) -> float | None:
    """What an instance costs at present, $/hr: all of it while it runs, else its disk; None if the
    service does not tell.
    """
    state = row.get("actual_status")
    if state == "offline":
        return 0.0
    if state == "running":
        return price_of(row, "dph_total")
    price = row.get("storage_total_cost")
    return as_price(get_path(row, "instance.diskHour") if price is None else price)


def run_cost(call: Call) -> Row:
    """What everything costs, and how long the credit lasts; `unknown` names what is not
    included.
    """
    now = time.time()
    parts = ("user", "instances", "volumes", "endpoints", "charges")

    def read(part: str) -> Any:
        if part == "charges":
            return charges_between(call, now - 86400, now)
        return call.do(f"show_{part}")

    found: Row = dict(zip(parts, at_once(call, read, parts)))
    if all(isinstance(part, Exception) for part in found.values()):
        raise found["instances"]
    endpoints = as_rows(found["endpoints"])
    listings = at_once(call, lambda row: call.do("get_endpt_workers", id=row.get("id")), endpoints)
    bill = Bill(found, now)
    bill.add_endpoints(endpoints, listings)
    bill.add_instances()
    bill.add_volumes()
    threshold = as_number(as_dict(found["user"]).get("balance_threshold"))
    call.params.update(reasons=bill.reasons, threshold=threshold)  # for the remarks below the table
    return bill.result()


def charges_between(call: Call, start: float, end: float) -> list[Row]:
    """The charges of a period, of all pages."""
    row = METHODS["show_invoices_v1"]
    period = {"charges": True, "start_date": start, "end_date": end, "limit": 100}
    part = call.of(row, **check_params(row, period, cli=False))
    with row:
        return all_pages(part, {}, True)


class Bill:
    """The lines of `cost` and their sum.

    `found` holds the answers, `reasons` what is not included and why.
    """

    def __init__(self, found: Row, now: float) -> None:
        self.found = found
        self.now = now
        self.reasons = {
            name: part.msg for name, part in found.items() if isinstance(part, VastAIError)
        }
        instances = enumerate(as_rows(found["instances"]), 1)
        # one without an id is one of its own
        self.instances = {whole_of(row, "id") or -nth: row for nth, row in instances}
        self.rows: list[Row] = []
        self.ran: set[str] = set()  # sources of charges for GPUs, such as "instance-7"
        nothing = None if "charges" in self.reasons else 0.0
        self.last_day: Row = dict.fromkeys(("gpu", "disk", "traffic", "total"), nothing)
        for charge in as_rows(found["charges"]):
            self.last_day["total"] += number_of(charge, "amount") or 0
            self.sort_charge(charge, text_of(charge, "source"))

    def sort_charge(self, charge: Row, source: str) -> None:
        """Adds the parts of a charge to what they are for."""
        parts = as_rows(charge.get("items"))
        for part in parts:
            self.sort_charge(part, text_of(part, "source") or source)
        amount = number_of(charge, "amount") or 0
        use = CHARGE_USES.get(text_of(charge, "type"))
        if use and not parts:
            self.last_day[use] += amount
        if use == "gpu" and amount > 0:
            self.ran.add(source)

    def add(self, kind: str, row: Row, hour: float | None, state: Any, **more: Any) -> None:
        """Adds a line; without a price it is not in the sum."""
        id = row.get("id")
        if hour is None and kind != "endpoint":
            self.reasons[f"{kind} {id}"] = "the service gives no price"
        label = row.get("endpoint_name" if kind == "endpoint" else "label") or None
        line = {"kind": kind, "id": id, "label": label, "hour": hour, "state": state}
        self.rows.append({**line, "later": None, "why": None, **more})

    def add_endpoints(self, endpoints: list[Row], listings: list[Any]) -> None:
        """A line for each endpoint; its workers, which are instances too, have none of their
        own.
        """
        for endpoint, workers in zip(endpoints, listings):
            if isinstance(workers, VastAIError):
                self.reasons[f"workers of endpoint {endpoint.get('id')}"] = workers.msg
            ids = {whole_of(worker, "id") for worker in as_rows(workers)}
            mine = [self.instances.pop(id) for id in ids if id in self.instances]
            for row in mine:
                if hourly_cost(row) is None:
                    self.reasons[f"instance {row.get('id')}"] = "the service gives no price"
            known = "instances" not in self.reasons and isinstance(workers, list)
            hour = sum((hourly_cost(row) or 0.0 for row in mine), 0.0) if known else None
            later = None
            if any(map(later_cost, mine)):
                later = sum(later_cost(row) or hourly_cost(row) or 0.0 for row in mine)
            self.add("endpoint", endpoint, hour, endpoint.get("endpoint_state"), later=later)

    def add_instances(self) -> None:
        for row in self.instances.values():
            unstarted = "stopped" if row.get("intended_status") == "stopped" else "created"
            state = row.get("actual_status") or unstarted
            why = self.why_orphan(row, state)
            later = later_cost(row)
            self.add("instance", row, hourly_cost(row), state, later=later, why=why)

    def why_orphan(self, row: Row, state: str) -> str | None:
        """Why an instance looks forgotten, if it does."""
        if state == "offline":
            return "offline"
        if state == "running":
            idle = not row.get("label") and number_of(row, "gpu_util") == 0
            return "running, no label, GPU at 0 % now" if idle else None
        stopped = state in ("exited", "stopped") or row.get("intended_status") == "stopped"
        begun = number_of(row, "start_date")
        old = begun is not None and self.now - begun > 86400
        ran = "charges" in self.reasons or f"instance-{row.get('id')}" in self.ran
        return "stopped for over a day" if stopped and old and not ran else None

    def add_volumes(self) -> None:
        for row in as_rows(self.found["volumes"]):
            if row.get("status") == "deleted":
                continue
            why = None if row.get("instances") else "volume on nothing"
            hour = price_of(row, "storage_total_cost")
            self.add("volume", row, hour, row.get("status"), why=why)

    def result(self) -> Row:
        """What `cost` returns."""
        self.rows.sort(key=lambda row: row["kind"] == "endpoint")  # at the end
        hour = sum((row["hour"] or 0.0 for row in self.rows), 0.0)
        credit = as_number(as_dict(self.found["user"]).get("credit"))
        left = None if credit is None or hour <= 0 else max(0.0, credit) / hour
        end = self.now + (left or 0) * 3600
        dated = left is not None and end < YEAR_10000
        return {
            "hour": hour,
            "day": hour * 24,
            "month": hour * HOURS_OF_MONTH,
            "credit": credit,
            "hours_left": left,
            "runs_out": format_utc(end, "%Y-%m-%dT%H:%M:%SZ") if dated else None,
            "rows": self.rows,
            "last_day": self.last_day,
            "unknown": list(self.reasons),
        }


CHARGE_USES = parse_table("""\
gpu: gpu
disk: disk
volume: disk
bwd: traffic
bwu: traffic""")


def later_cost(row: Row) -> float | None:
    """What an instance that is being started will cost, $/hr; None for the others."""
    starting = row.get("actual_status") in ("loading", "created", None)
    if not starting or row.get("intended_status") == "stopped":
        return None
    return price_of(row, "dph_total")


def cost_words(cost: Row) -> str:
    """The sum of `cost` and how long the credit lasts, as one sentence."""
    at_least = "at least " if cost["unknown"] else ""
    hour = cost["hour"]
    credit = cost["credit"]
    words = f"{at_least}{format_rate(hour)}, ${cost['day']:.2f}/day, ${cost['month']:.2f}/month"
    if hour <= 0:
        words = f"{at_least}$0.00/hr" if at_least else "nothing is billed now"
    if credit is not None:
        words += f"; credit ${credit:.2f}"
    if cost["hours_left"] is not None:
        at_most = " at most" if cost["unknown"] else ""
        words += f" lasts{at_most} {format_duration(cost['hours_left'] * 3600)}"
    if cost["runs_out"]:
        words += f", until {cost['runs_out'][:16].replace('T', ' ')} UTC"
    return words[:1].upper() + words[1:]


def cost_columns(call: Call, rows: list[Row]) -> Iterable[Any]:
    """On a terminal, what something will cost later has a column only if there is something."""
    later = not is_terminal(sys.stdout) or any(row["later"] is not None for row in rows)
    return tuple(column for column in COST_COLUMNS if later or column[1] != "later")


def cost_footer(call: Call, cost: Row) -> list[str]:
    """The sum, what the last day cost, a low credit, and why something is not included."""
    lines = [cost_words(cost)] if cost["rows"] or cost["unknown"] else []
    if cost["last_day"]["total"]:
        parts = [f"{name} ${amount:.2f}" for name, amount in cost["last_day"].items()]
        lines.append(f"Last 24 hours: {', '.join(parts).replace('gpu', 'GPU')}")
    threshold = call["threshold"]
    credit = cost["credit"]
    if threshold and credit is not None and credit < threshold:
        lines.append(f"Credit ${credit:.2f} is below your alert threshold of ${threshold:.2f}.")
    return lines + [f"Not included: {name}: {reason}" for name, reason in call["reasons"].items()]


def user_footer(call: Call, user: Row) -> list[str]:
    """Which key is in use and, on a terminal, how long the credit lasts at the present rate."""
    key = as_text(call.client.api_key)
    ending = f" ending in …{key[-4:]}" if len(key) >= 20 else ""
    lines = [f"API key{ending} from {call.client.key_origin}"]
    if call.has_reader:
        try:
            lines.insert(0, cost_words(call.do("cost")))
        except VastAIError:
            pass  # the card is complete without it
    return lines


def stopped_footer(call: Call, answer: Row) -> list[str]:
    """On a terminal, what the disk of a stopped instance still costs."""
    if not call.has_reader:
        return []
    id = call["id"]
    try:
        row = find_instance(call, id) or {}
    except VastAIError:
        return []
    price = hourly_cost({**row, "actual_status": "exited"})
    if price is None:
        return []
    month = price * HOURS_OF_MONTH
    end = f"stop paying with `vastai destroy instance {id}`"
    return [f"Its disk is still billed: {format_rate(price)}, ${month:.2f}/month; {end}."]


def volumes_footer(call: Call, answer: Row) -> list[str]:
    """On a terminal, which volumes of a destroyed instance stay, and what they cost."""
    lines = []
    for row in call["volumes"] or ():
        id = row.get("id")
        price = price_of(row, "storage_total_cost")
        rate = "" if price is None else f" at {format_rate(price)}"
        lines.append(
            f"Volume {id} stays and is billed{rate}; stop paying with `vastai delete volume {id}`."
        )
    return lines


# ----------------------------------------------------------------------------------------- watching
# `watch` polls, and prints what has changed.

BLOCKS = "▁▂▃▄▅▆▇█"  # eight steps
LONGEST_WATCH_PAUSE = 300.0  # seconds between two looks while the service asks for fewer of them
SAMPLES = 20  # of the use of a GPU, in its sparkline


def level(share: float) -> str:
    """The sign for a share from 0 to 1."""
    return BLOCKS[int(min(7, max(0, share * 8)))]


def sparkline(values: Sequence[Any], low: float | None = None, high: float | None = None) -> str:
    """Numbers as a line of eight heights, from the lowest to the highest unless told otherwise; a
    blank for what is no number.
    """
    heights = [as_number(value) for value in values]
    known = [height for height in heights if height is not None]
    if not known:
        return ""
    low = min(known) if low is None else low
    span = ((max(known) if high is None else high) - low) or 1.0
    return "".join(" " if height is None else level((height - low) / span) for height in heights)


def format_use(share: float | None) -> str:
    """A share from 0 to 1 as a bar of eight steps and in percent; "-" if it is not known."""
    if share is None or share < 0:
        return "-"
    return f"{level(share)} {min(share, 9.99) * 100:.0f}%"


class Monitor:
    """`watch`: the rows as they were at the last look, and what is done when they change.

    Subclasses say what is looked at: `fetch` the rows that count, by what makes them the same,
    `events` the names of what has changed in one of them, `match` the one event that counts for
    --exec and --once ("": each), `columns` and `cells` the table for a terminal, `footer` the lines
    below it.
    """

    columns: Iterable[Any]
    match = ""
    first = True
    away = ""
    status = 0
    drawn = 0  # lines of the table on the terminal

    def __init__(self, call: Call) -> None:
        self.call = call
        self.client = call.client
        self.words = call["exec"]
        self.rows: Keyed = {}
        self.pause = call["interval"]
        shown = call.view.format == "table" and not call.view.quiet
        self.live = shown and erasable(sys.stdout)

    if TYPE_CHECKING:

        def fetch(self) -> Keyed: ...
        def footer(self, changed: bool) -> list[str]: ...

    def is_cheap(self, row: Row) -> bool:
        price = price_of(row, "dph_total")
        below = self.call["below"]
        return below is None or (price is not None and price < below)

    def events(self, old: Row, new: Row) -> list[str]:
        return ["price"] if old.get("dph_total") != new.get("dph_total") else []

    def cells(self, key: Any, row: Row) -> Row:
        return row

    def run(self) -> None:
        """Raises WaitTimeoutError at the end of --max-wait, ProgramError with the status of
        --exec.
        """
        limit = self.call.get("max_wait", FOREVER)
        if poll_until(self.look, limit, self.call["interval"], longest=FOREVER) is None:
            raise WaitTimeoutError(f"timed out after {limit:g} s (--max-wait)")
        if self.status:
            raise ProgramError("", exit_status=self.status)

    def look(self, left: float) -> bool | None:
        """One look; True if it is the last one."""
        self.call.client = self.client.varied(
            retry=1, timeout=min(self.client.timeout, max(0.5, left))
        )
        try:
            rows = self.fetch()
        except RateLimitError as error:
            pause = max(self.pause * 2, error.retry_after or 0.0)
            error.retry_after = self.pause = min(pause, LONGEST_WATCH_PAUSE)
            raise
        except VastAIError as error:
            refused = error.status >= 400 and not may_pass(error.status)
            if refused or isinstance(error, (AuthError, UsageError)):
                raise
            if not self.away:
                self.say(f"no answer, still trying: {error.msg}")
            self.away = error.msg
            return None
        if self.away:
            self.say("the service answers again")
        self.away = ""
        self.pause = self.call["interval"]
        found = self.compare(rows)
        self.rows = rows
        first = self.first
        self.first = False
        if self.live:
            self.draw({key: event for key, event, _ in found}, bool(found) or first)
        for _, event, row in found:
            if not self.live:
                self.write(event, row)
            if self.call["once"] and self.match in ("", event):
                break
        return self.act([row for _, event, row in found if self.match in ("", event)])

    def compare(self, rows: Keyed) -> Changes:
        """What has changed since the last look: (key, event, row)."""
        found = []
        for key, row in rows.items():
            old = self.rows.get(key)
            names = ["new"] if old is None else self.events(old, row)
            found += [(key, name, row) for name in names]
        return found + [(key, "gone", row) for key, row in self.rows.items() if key not in rows]

    def act(self, matches: list[Row]) -> bool | None:
        """Runs --exec for what matches, one after the other; True after the first with --once."""
        for row in matches:
            if self.words:
                self.drawn = 0
                self.status = run_for_row(self.client, self.words, row)
                if self.status:
                    self.say(f"{self.words[0]} exited with status {self.status}")
            if self.call["once"]:
                return True
        return None

    def say(self, text: str) -> None:
        self.drawn = 0
        self.call.warn(text)

    def write(self, event: str, row: Row) -> None:
        """One line for a change: JSON, or the id alone."""
        import json

        line = json.dumps({"event": event, "id": row.get("id"), "row": row}, sort_keys=True)
        write_out((format_value(row.get("id")) if self.call.view.quiet else line) + "\n")
        flush(sys.stdout)

    def draw(self, events: dict[Any, str], changed: bool) -> None:
        """Draws the table in the place of the last one."""
        width = terminal_width()
        height = terminal_height()
        shown = [
            {**self.cells(key, row), "mark": MARKS.get(events.get(key, ""), "")}
            for key, row in self.rows.items()
        ]
        now = time.strftime("%H:%M:%S")
        pause = f"{self.call['interval']:g} s"
        clock = f"{now}; refreshes every {pause}; Ctrl-C to stop"
        footer = "\n".join(wrap_line(line, width) for line in [*self.footer(changed), clock])
        room = max(1, height - 4 - footer.count("\n"))
        if len(shown) > room:
            footer = f"… {len(shown) - room} more\n{footer}"
        bright = self.call.view.color and colored()
        lines = format_table(shown[:room], self.columns, width, bright)[0] if shown else []
        text = "\n".join([*lines, footer]) + "\n"
        back = f"\033[{self.drawn}F\033[J" if self.drawn else ""
        write_out(back + text)
        flush(sys.stdout)
        self.drawn = text.count("\n")


MARKS = parse_table("""\
new: +
price: $
state: *
outbid: !
disk: !""")


class OfferMonitor(Monitor):
    """Offers: the cheapest of each machine."""

    columns = (*Columns(": mark mark 0"), *OFFER_COLUMNS)
    match = "new"

    def fetch(self) -> Keyed:
        call = self.call
        found: Keyed = {}
        given = {name: call[name] for name in ("query", "type", "storage", "no_default")}
        search = call.of(METHODS["search_offers"], order="dph_total", **given)
        for row in offers_shown(call, run_search_offers(search)):
            if self.is_cheap(row):
                found.setdefault(str(row.get("machine_id") or f"offer {row.get('id')}"), row)
        return found

    def footer(self, changed: bool) -> list[str]:
        count = len(self.rows)
        matching = f"{count_of(count, 'machine')} match{'es' if count == 1 else ''}"
        return [f"{matching}; + new, $ price changed"]


class InstanceMonitor(Monitor):
    """Your instances, with the use of their parts."""

    columns = Columns("""\
: mark mark 0
ID: id 0
Status: actual_status state 0
Label: label
GPU: model
$/hr: dph_total .4f 0
Age: start_date age 2
GPU: gpu_use 0
CPU: cpu_use
Mem: memory_use
Disk: disk_use
GPU so far: history 2""")

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.history: dict[Any, list[float | None]] = {}
        self.cost = ""
        self.cost_read = -FOREVER

    def fetch(self) -> Keyed:
        rows = {}
        for row in self.call.do("show_instances"):
            key = str(row.get("id"))
            if price_of(row, "dph_total") is None and key in self.rows:
                row["dph_total"] = self.rows[key].get("dph_total")
            # a higher price does not mean that it is gone
            if self.is_cheap(row) or key in self.rows:
                rows[key] = row
        self.history = {
            key: [*self.history.get(key, []), share_of(row.get("gpu_util"), 100)][-SAMPLES:]
            for key, row in rows.items()
        }
        return rows

    def events(self, old: Row, new: Row) -> list[str]:
        found = super().events(old, new)
        if is_outbid(new) and not is_outbid(old):
            id = format_value(new.get("id"))
            self.say(
                f"instance {id} is outbid or stopped; to raise the bid: "
                f"`vastai change bid {id} --price {next_bid(new)}`"
            )
            found.append("outbid")
        elif old.get("actual_status") != new.get("actual_status"):
            found.append("state")
        disks = [share_of(row.get("disk_util"), 1) or 0.0 for row in (old, new)]
        return found + ["disk"] * (disks[0] <= 0.9 < disks[1])

    def compare(self, rows: Keyed) -> Changes:
        return [] if self.first else super().compare(rows)

    def cells(self, key: Any, row: Row) -> Row:
        cpu = number_of(row, "cpu_util")
        memory = share_of(row.get("mem_usage"), number_of(row, "mem_limit") or 0)
        return {
            **row,
            "model": _gpu({**row, "gpu_util": None}),
            "gpu_use": format_use(self.history[key][-1]),
            "cpu_use": format_use(share_of(cpu, 100 if cpu and cpu > 1 else 1)),
            "memory_use": format_use(memory),
            "disk_use": format_use(share_of(row.get("disk_util"), 1)),
            "history": sparkline(self.history[key], 0.0, 1.0).strip() or "-",
        }

    def footer(self, changed: bool) -> list[str]:
        """The burn rate and how long the credit lasts, read again each minute and on a change."""
        if changed or time.monotonic() - self.cost_read >= 60:
            try:
                self.cost = cost_words(self.call.do("cost"))
            except VastAIError:
                pass  # the last one stays
            self.cost_read = time.monotonic()
        return [self.cost] if self.cost else []


def share_of(value: Any, whole: float) -> float | None:
    """What part of a whole a number of the service is; None if it is not known, such as -1."""
    number = as_number(value)
    return None if number is None or number < 0 or whole <= 0 else number / whole


def is_outbid(row: Row) -> bool:
    """Is an interruptible instance stopped?  Outbid, most likely."""
    return bool(row.get("is_bid")) and fault_of(row)[0] == "stopped"


def run_for_row(client: VastAI, words: list[str], row: Row) -> int:
    """Runs a command with a row as JSON on its stdin; its exit status.  It gets no key, and its
    output goes to stderr, as stdout is for the changes.
    """
    import json
    import subprocess

    values = {
        name: value
        for name, value in os.environ.items()
        if value != client.api_key and name not in ("VAST_API_KEY", "VASTAI_API_KEY")
    }
    values.update(VAST_ID=text_of(row, "id"), VAST_PRICE=text_of(row, "dph_total"))
    flush(sys.stdout)
    out = None if is_terminal(sys.stdout) or sys.stderr is None else 2
    try:
        done = subprocess.run(words, input=json.dumps(row).encode(), env=values, stdout=out)
    except (OSError, ValueError) as error:
        warn(f"cannot run {printable(words[0], 200)}: {getattr(error, 'strerror', None) or error}")
        return 127
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


def run_watch_offers(call: Call) -> None:
    OfferMonitor(call).run()


def run_watch_instances(call: Call) -> None:
    InstanceMonitor(call).run()


# ----------------------------------------------------------------------- diagnostics and benchmarks
# They rent what they test, and destroy it whatever happens.


def run_self_test(call: Call) -> Row:
    """Rents the machine, runs Vast.ai's tests on it and removes the instance, whatever happens."""
    if not call.client.curl:
        require_key(call.client, call.row)
    test = SelfTest(call)
    with CleanupGuard(call, test):
        test.run()
    test.save()
    return test.result


PAGE_WAIT = 10.0  # seconds for the page of a test
TEST_IMAGES = (11.8, 12.8, 13.0, 13.3)  # versions of CUDA with a test image


class SelfTest:
    """One self-test: what it found, what it said, and the instance that it must not leave
    behind.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.machine = str(call["machine_id"])
        # The service knows this label.  A machine cannot be rented twice: what a test of the last
        # 600 s has rented is ours.
        self.rented = rental(call, f"vast-self-test-machine-{self.machine}", behind=600)
        self.rented.looks = False  # as the official client, whose calls are recorded
        self.still_costs = self.rented.still_costs
        self.lines: list[str] = []
        self.row: Row = {}  # the instance as it was seen last
        self.result: Row = {
            "success": False,
            "reason": "",
            "phase": "",
            "stage": "",
            "failure_code": None,
            "failure": None,
            "checks": [],
            "offer": None,
            "error": None,
            "machine_id": self.machine,
            "diagnostics": {},
            "warning": None,
        }
        if call["ignore_requirements"]:
            self.result["warning"] = (
                "Requirements are ignored; passing does not qualify the machine for verification."
            )
        self.results = [self.result]

    def say(self, text: str) -> None:
        self.lines.append(text)
        if self.call["debugging"]:
            self.call.tell(f"vastai: {printable(text, 500)}")
        else:
            self.call.progress(printable(text, 500))

    def run(self) -> None:
        """The test; how it ends is in `result`."""
        result = self.result
        steps = (self.choose, self.rent, self.wait, self.watch)
        try:
            for phase, step in zip(("preflight", "rental", "wait", "test"), steps):
                result["phase"] = phase
                step()
            result.update(phase="complete", stage="complete", success=True)
        except Unfit as failure:
            self.fail(*failure.args)

    def fail(self, code: str, stage: str, reason: str) -> None:
        """Notes how the test failed."""
        self.say(f"{code}: {reason}")
        self.result.update(
            success=False,
            failure_code=code,
            stage=stage,
            reason=reason,
            failure={"code": code, "stage": stage, "summary": reason},
        )

    def choose(self) -> None:
        """Finds the machine's best offer, even if parts are rented, and checks whether it is good
        enough.
        """
        query: Row = {
            "machine_id": {"eq": self.machine},
            "verified": {"eq": "any"},
            "rentable": {"eq": True},
            "rented": {"eq": "any"},
        }
        code = "no_offer"
        reason = "the machine is not listed; list it with `vastai list machine`"
        try:
            offers = self.call.do("search_offers", query=query, no_default=True)
            query["rentable"] = {"eq": "any"}
            if not offers and self.call.do("search_offers", query=query, no_default=True):
                code = "no_rentable_offer"
                reason = "no offer of the machine can be rented now"
            elif not offers:
                self.call.do("show_machine", id=self.machine)
        except (AuthError, NotFoundError) as error:
            offers = []
            reason = error.msg
            code = "api_permission_failed" if isinstance(error, AuthError) else code
        if not offers:
            raise Unfit(code, "select_offer", reason)
        offer = max(offers, key=lambda row: number_of(row, "dlperf") or 0)
        self.result.update(offer=offer, checks=requirements(offer))
        missed = [
            f"{row['title']} {row['actual']:g}, "
            f"needs {row['operator']} {row['required']:g} {row['unit']}"
            for row in self.result["checks"]
            if row["status"] == "fail"
        ]
        if missed and not self.call["ignore_requirements"]:
            raise Unfit(
                "preflight_requirements_failed", "preflight_requirements", "; ".join(missed)
            )

    def rent(self) -> None:
        """Makes the instance, with the newest image that the machine can run."""
        offer = self.result["offer"]
        id = offer.get("id")
        capability = number_of(offer, "compute_cap") or 0
        cuda = number_of(offer, "cuda_max_good") or 0
        if 0 < capability < 750:  # older GPUs, which newer CUDA no longer runs on
            cuda = min(cuda, 11.8 if capability < 700 else 12.8)
        newest = max((known for known in TEST_IMAGES if known <= cuda), default=TEST_IMAGES[0])
        image = self.call["test_image"] or os.getenv("VAST_SELF_TEST_IMAGE")
        image = image or f"vastai/test:self-test-v2-cuda-{newest}"
        self.say(f"renting offer {id} with {image}")
        price, self.rented.disk_price = price_with_disk(offer, 40)
        rate = "an unknown price" if price is None else format_rate(price)
        self.call.tell(f"Renting offer {id} of machine {self.machine} at {rate}")
        self.rented.price = price
        row = METHODS["create_instance"]
        order = {
            "id": id,
            "image": image,
            "disk": 40,
            "runtype": "ssh_direc ssh_proxy",
            "env": "-e TZ=PDT -e XNAME=XX4 -p 5000:5000 -p 1234:1234",
            "onstart_cmd": "/verification/remote.sh",
            "cancel_unavail": True,  # not sent: has us destroy what a refusal has made
        }
        try:
            call = self.call.of(row, **check_params(row, order, cli=False))
            rent(call, self.rented, cancel_unavail=False)
        except VastAIError as error:
            code = "instance_create_failed"
            if self.rented.id == "?" and not error.status:
                code = "instance_create_missing_contract"
            self.result["error"] = error.msg
            raise Unfit(code, "create_instance", error.msg) from None

    def look(self) -> Row:
        """The instance as it is; {} if the service does not tell, which may pass."""
        try:
            self.row = self.call.do("show_instance", id=self.rented.id) or {}
            self.rented.seen = self.rented.seen or self.row != {}
        except VastAIError as error:
            self.row = {}
            self.say(f"instance {self.rented.id}: {error.msg}")
        return self.row

    def wait(self) -> None:
        """Waits until the instance runs."""

        def look(left: float) -> bool | None:
            row = self.look()
            state = row.get("actual_status")
            told = text_of(row, "status_msg").strip()
            ended = any(end in (state, row.get("intended_status")) for end in ("stopped", "exited"))
            if ended or fault_of(row)[0] or mentions(told, STATUS_SIGNS):
                code = "daemon_startup_failed"
                if state == "offline":
                    code = "instance_offline_before_test"
                elif told:
                    code = failure_of(told, STATUS_FAILURES, "instance_status_error")
                reason = told or f"the instance was {state or 'stopped'} before the test"
                raise Unfit(code, "startup", reason)
            self.say(f"instance {self.rented.id}: {state or 'no state yet'} {told}")
            return True if state == row.get("intended_status") == "running" else None

        if not poll_until(look, 900, 10):
            reason = "the instance did not run within 900 s"
            raise Unfit("instance_start_timeout", "startup", reason)

    def watch(self) -> None:
        """Follows the page of the test, which grows by lines, to its DONE or ERROR."""
        ports = mapped_ports(self.row)
        if not text_of(self.row, "public_ipaddr").strip():
            raise Unfit(
                "missing_public_ip", "instance_network", "the instance has no public address"
            )
        if "5000/tcp" not in ports:
            raise Unfit(
                "progress_port_not_mapped",
                "instance_network",
                "port 5000 of the instance cannot be reached from outside, only: "
                f"{', '.join(ports) or 'none'}",
            )
        sleep(15)
        heard = time.monotonic()
        reached = False
        page = f"https://{ports['5000/tcp']}/progress"

        def look(left: float) -> bool | None:
            nonlocal heard, reached
            row = self.look()
            if row.get("actual_status") == "offline":
                raise Unfit(
                    "instance_offline_before_test",
                    "runtime",
                    "the instance went offline during the test",
                )
            text, problem = read_page(page)
            reached = reached or text != ""
            for line in filter(None, map(str.strip, text.splitlines())):
                heard = time.monotonic()
                if line not in self.lines:
                    self.say(line)
                if line == "DONE":
                    return True
                if line.startswith("ERROR"):
                    raise Unfit(
                        failure_of(line, TEST_FAILURES, "legacy_progress_error"), "runtime", line
                    )
            if row.get("actual_status") == "running" and time.monotonic() - heard >= 120:
                if not problem:
                    raise Unfit(
                        "progress_empty_timeout", "runtime_progress", f"{page} was empty for 120 s"
                    )
                raise Unfit(
                    "progress_endpoint_lost" if reached else "progress_endpoint_unreachable",
                    "runtime_connect",
                    f"{page} did not answer for 120 s: {problem}",
                )
            return None

        if not poll_until(look, 600, 20):
            raise Unfit("runtime_test_timeout", "runtime", "the test did not finish within 600 s")

    def give_back(self) -> None:
        """Removes the instance unless it is gone; after a failure its diagnostics are written
        before.
        """
        rented = self.rented
        if rented.id is None:
            return
        try:
            row = self.look() if rented.found else {}
            state = row.get("intended_status") or row.get("actual_status")
            if state in ("destroyed", "terminated"):
                rented.id = None
            else:
                self.save(rented.found)
                self.say(f"removing instance {rented.id}")
        finally:
            rented.give_back()
            if rented.id is not None:
                self.fail(
                    "cleanup_failed", "cleanup", f"{rented.still_costs()}. {self.result['reason']}"
                )

    @property
    def found(self) -> Any:
        return self.rented.found

    def save(self, instance: int | None = None) -> None:
        """Writes the diagnostics of a failure, once."""
        call = self.call
        notes = self.result["diagnostics"]
        wish = os.getenv("VAST_SELF_TEST_SUPPORT_BUNDLE", "").strip().lower()
        off = wish in ("0", "false", "no", "off")
        if self.result["failure_code"] and not (notes or off or call["no_support_bundle"]):
            try:
                notes["support_bundle"] = write_bundle(
                    call, call["support_bundle_dir"] or "/tmp", self.result, self.lines, instance
                )
            except UsageError as error:
                notes["support_bundle_error"] = error.msg


def read_page(url: str) -> tuple[str, str]:
    """What a page has sent within some seconds, though it may never end, and what went wrong.  The
    text is "" only if the host did not answer.
    """
    import ssl
    from http.client import HTTPException
    from urllib.request import urlopen

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # hosts sign their own certificates
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    data = b""
    problem = ""
    end = time.monotonic() + PAGE_WAIT
    try:
        with urlopen(url, timeout=PAGE_WAIT, context=context) as response:
            part = b"\n"
            while part and len(data) < 1 << 20 and time.monotonic() < end:
                data += part
                part = response.read1(1 << 16)
    except (OSError, ValueError, HTTPException) as error:
        problem = str(error) or type(error).__name__
    return data.decode("utf-8", "replace"), problem


class Unfit(Exception):
    """A self-test ends: failure code, stage and reason."""


def requirements(offer: Row) -> list[Row]:
    """What a machine must have to be verified, beside what it has."""
    has = {name: as_number(value) or 0 for name, value in offer.items()}
    gpus = has.get("num_gpus") or 1
    vram = has.get("gpu_total_ram", 0)
    ram = has.get("gpu_ram", 0)
    has["memory"] = vram / gpus / 1024 or ram / (1024 if ram >= 1024 else 1)
    speed = min(500.0, max(100.0, 500 * vram / 1024 / 192))
    rows = [
        ("CUDA version", "cuda_max_good", ">=", 11.8, "CUDA"),
        ("Reliability", "reliability", ">", 0.9, "ratio"),
        ("Open ports", "direct_port_count", ">=", 3 * gpus, "ports"),
        ("PCIe bandwidth", "pcie_bw", ">", 2.85, "GB/s"),
        ("Download", "inet_down", ">=", speed, "Mb/s"),
        ("Upload", "inet_up", ">=", speed, "Mb/s"),
        ("Memory per GPU", "memory", ">", 7, "GiB"),
        ("Main memory", "cpu_ram", ">=", min(0.95 * vram, 2_000_000), "MiB"),
        ("CPU cores", "cpu_cores", ">=", 2 * gpus, "cores"),
        ("Useful ports", "direct_port_count", "<=", 64 * gpus, "ports"),
    ]
    checks = []
    for title, name, sign, due, unit in rows:
        value = has.get(name, 0)
        passes = value > due or (value, sign) == (due, ">=")
        check = {"title": title, "actual": round(value, 3), "operator": sign, "unit": unit}
        check.update(required=round(due, 3), status="pass" if passes else "fail")
        if sign != "<=":
            checks.append(check)
        elif passes:  # more than is of use
            checks.append({**check, "status": "info"})
    return checks


STATUS_FAILURES = parse_table("""\
docker_pull_failed: pull, manifest, not found, unauthorized, denied, repository does not exist, \
no such image
daemon_startup_failed: daemon, container, startup, failed to start, oci runtime, runc, docker, \
exited, mount, entrypoint""")
STATUS_SIGNS = "error, failed, failure, exception, traceback, oci runtime, permission denied"
TEST_FAILURES = parse_table("""\
nvml_failed: nvml, nvidia-smi, driver/library version mismatch
nccl_failed: nccl, unhandled system error, connection timed out, allreduce, peer access
ecc_failed: ecc, volatile double bit, aggregate single bit
stress_gpu_burn_failed: stress, gpu-burn, xid, thermal, power limit, burn-in, hardware error
resnet_failed: resnet, torch, out of memory, outofmemory, cudnn, cublas, cuda error, runtimeerror""")


def run_dump_logs(call: Call) -> Row:
    """The bundle alone, with the logs of an instance if one is named."""
    instance = call["instance_id"]
    machine = str(call["machine_id"])
    if instance is not None:
        require_key(call.client, call.row)
    result = {"machine_id": machine, "stage": "manual_dump_logs", "instance_id": instance}
    return write_bundle(
        call,
        call["output_dir"],
        result,
        [f"dump-logs for machine {machine}; instance: {instance}"],
        instance,
        call["include_local_host_artifacts"],
    )


def write_bundle(
    call: Call, folder: str, result: Row, lines: list[str], instance: Any, local: bool = False
) -> Row:
    """Writes an archive for Vast.ai's support, without secrets, and says what is in it.  Raises
    UsageError.
    """
    import re

    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    machine = result["machine_id"]
    members, errors = collect_diagnostics(call, instance, local)
    members["self-test-output.log"] = "\n".join(lines)
    members["self-test-result.json"] = result
    members["collection-errors.json"] = errors
    names = sorted([*members, "manifest.json"])
    members["manifest.json"] = {
        "bundle_version": 1,
        "machine_id": machine,
        "created_at_utc": stamp,
        "files": names,
        "collection_errors": errors,
        "includes_local_host_artifacts": local,
    }
    packed = pack_diagnostics(members, call.client.secrets)
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", machine)[:80]
    path = os.path.join(os.path.expanduser(folder), f"vast_selftest_{safe}_{stamp}.tar.gz")
    write_private(path, packed)
    call.progress("")
    return {
        "path": path,
        "created_at_utc": stamp,
        "size_bytes": len(packed),
        "files": names,
        "collection_errors": redact_diagnostics(errors, call.client.secrets),
    }


def collect_diagnostics(call: Call, instance: Any, local: bool) -> tuple[Row, list[Row]]:
    """What an instance and, if `local`, this machine tell, by names of files; and what cannot be
    had.
    """
    import glob
    import subprocess

    sources: dict[str, Any] = {}  # the parameters of a command, or the line of a program
    if instance is not None:
        logs = {"instance_id": instance, "tail": 1000, "max_wait": 9}
        sources["instance/show-instance.json"] = {"id": instance}
        sources["instance/container.log"] = logs
        sources["instance/daemon.log"] = {**logs, "daemon_logs": True}
    if local:
        for path in glob.glob("/var/lib/vastai_kaalia/kaalia.log*"):
            sources[f"host/kaalia/{os.path.basename(path)}"] = f"tail -c {LOG_END} {path}"
        sources.update((f"host/{name}", line) for name, line in LOCAL_ARTIFACTS.items())
    members: Row = {}
    errors = []
    for name, source in sources.items():
        call.progress(f"fetching {name} …")
        try:
            if isinstance(source, str):
                members[name] = output_of(source)
                continue
            row = METHODS["logs" if "tail" in source else "show_instance"]
            # past the check of parameters, which would make a text of `tail`
            members[name] = perform(Call(call.client, row, source, View()))
        except (VastAIError, OSError, subprocess.TimeoutExpired) as error:
            errors.append({"artifact": name, "error": getattr(error, "msg", "") or str(error)})
    return members, errors


def pack_diagnostics(members: Row, secrets: Sequence[str]) -> bytes:
    """A .tar.gz archive of texts and JSON values by their names, without what looks like a
    secret.
    """
    import tarfile

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, found in sorted(members.items()):
            if isinstance(found, str):
                found = found[-4 * LOG_END :]  # more would only take time
            clean = redact_diagnostics(found, secrets)
            text = clean if isinstance(clean, str) else format_json(clean)
            data = text.encode("utf-8", "replace")
            data = data if name.endswith(".json") else data[-LOG_END:]
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mtime = int(time.time())
            member.mode = 0o600
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


LOG_END = 1 << 18  # bytes that are kept of the end of a log
DMESG_WORDS = "warn, err, fail, fault, crit, panic, oops, bug"
LOCAL_ARTIFACTS = parse_table("""\
dmesg-filtered.log: dmesg -T
nvidia-smi.txt: nvidia-smi
nvidia-smi-L.txt: nvidia-smi -L
docker-info.txt: docker info
ip-addr.txt: ip addr
ss-tlnp-summary.txt: ss -tlnp
etc-docker-daemon.json: cat /etc/docker/daemon.json
docker-mounts.txt: grep docker /proc/mounts
journalctl.log: journalctl -b -p err..alert -u docker -u vastai_kaalia --since -24h --no-pager""")


def output_of(line: str) -> str:
    """The output of a program on this machine.  Raises OSError, and TimeoutExpired after 10 s."""
    import subprocess

    done = subprocess.run(
        line.split(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=10,
    )
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    if done.returncode:
        raise OSError(f"{line}: status {done.returncode}: {' '.join(lines)[:300]}")
    if line.startswith("ss "):  # the other columns name processes
        return "\n".join(" ".join(text.split()[:5]) for text in lines)
    words = DMESG_WORDS if line.startswith("dmesg") else ""
    return "\n".join(text for text in lines if mentions(text, words))


def run_benchmarks(call: Call) -> list[Row]:
    """How fast a template is on some GPUs: from measurements of the last 30 days, else by renting
    each.
    """
    field = "id"
    value = call["template_id"]
    if value is None:
        field = "hash_id"
        value = call["template_hash"]
    template = template_of(call, field, value)
    try:
        filters = _json_object(parse_text(template.get("extra_filters")) or {})
    except (ValueError, RecursionError):  # without them, machines of any kind would be rented
        raise VastAIError("the conditions of the template cannot be read") from None
    rows = []
    wanted: dict[Spec, float | None] = {}  # and the price of an offer
    for name, count in gpu_specs(",".join(call["gpus"] or ()), call["num_gpus"], filters):
        call.progress(f"{count}x {name} …")
        gpu = {"gpu_name": {"eq": name}, "num_gpus": {"eq": count}}
        perf, price = (0, 0) if call["no_cache"] else known_benchmark(call, template, gpu)
        offers = call.do("search_offers", query={**filters, **gpu}, limit=1)
        call.progress("")
        question = f"{count}x {name}: {perf:.1f}, measured recently. Rent it to measure again?"
        asks = offers and call.view.format == "table" and not call.view.confirmed
        if perf and not (asks and call.agrees(question)):
            rows.append(benchmark(name, count, "cached", perf, price))
        elif offers:
            wanted[name, count] = as_price(offers[0].get("dph_total"))
        else:
            rows.append(benchmark(name, count, "skipped"))
            reason = why_no_offer(call, filters, gpu)
            call.remark(f"{count}x {name} is left out: {reason}")
    if wanted:
        names = ", ".join(f"{count}x {name}" for name, count in wanted)
        total = f"about {format_rate(sum(filter(None, wanted.values())))}"
        total = "an unknown price" if None in wanted.values() else total
        call.confirm(names=names, minutes=call["timeout"] / 60, rate=total)
        if call.view.confirmed:  # nobody was asked
            call.tell(f"Renting {names} at {total} together")
        bench = Bench(call, list(wanted))
        with CleanupGuard(call, bench):
            bench.run()
        rows += bench.results
    return sorted(rows, key=lambda row: row["perf_per_dollar"] or -1, reverse=True)


# what is measured unless told otherwise, with its memory in MB
USUAL_GPUS = {"RTX 5090": 32607, "RTX 4090": 24564, "RTX 3090": 24576, "RTX A6000": 49140}


def gpu_specs(text: str, count: int | None, filters: Row) -> list[Spec]:
    """(GPU, number) of `2x RTX_4090, rtx_3090`; without a text the usual ones, as many as the
    memory filter needs.
    """
    import re

    models = {model.lower(): model for model in MODELS.split()}
    limits = as_dict(filters.get("gpu_total_ram"))
    over = number_of(limits, "gt")
    least = number_of(limits, "gte")
    least = (least or 0) - 1 if over is None else over  # MB; all cards must have more
    specs = [
        (name, count or next((n for n in (1, 2, 4) if n * size > least), 8))
        for name, size in USUAL_GPUS.items()
        if not text
    ]
    for times, name in re.findall(r"(?i)[ _]*(?:(\d{1,4})[ _]*x[ _]*)?([^,]+)", text):
        name = "_".join(name.replace("_", " ").split())
        if name:
            name = models.get(name.lower(), name).replace("_", " ")
            specs.append((name, int(times or count or 1)))
    if not specs:
        raise UsageError("--gpus: expected names such as '2x RTX_4090, RTX_3090'")
    return list(dict.fromkeys(specs))


def benchmark(name: str, count: int, status: str, perf: float = 0, price: float = 0) -> Row:
    """A row of the result; None for what is not known."""
    return {
        "gpu_name": name,
        "num_gpus": count,
        "status": status,
        "measured_perf": perf or None,
        "rental_dph": price or None,
        "perf_per_dollar": perf / price if perf and price else None,
    }


def known_benchmark(call: Call, template: Row, gpu: Row) -> tuple[float, float]:
    """The medians of what was measured: performance and $/hr; 0 if nothing was."""
    from statistics import median

    found: Row = {}
    query = {"type": {"eq": "perf"}, **gpu, "last_update": {"gte": time.time() - 30 * 86400}}
    order = [{"col": "last_update", "dir": "desc"}]
    for field, name in (("template_hash", "hash_id"), ("template_id", "id")):
        if template.get(name):
            given = {**query, field: {"eq": template[name]}}
            for row in call.do("search_benchmarks", query=given, limit=100, order=order):
                if (number_of(row, "value") or 0) > 0:
                    found[text_of(row, "id")] = row

    def middle(name: str) -> float:
        values = (number_of(row, name) or 0 for row in found.values())
        return median([value for value in values if value > 0] or [0])

    return middle("value"), middle("dph_base")


def why_no_offer(call: Call, filters: Row, gpu: Row) -> str:
    """Which filter of the template leaves no offer of a GPU."""
    from operator import eq, ge, gt, le, lt, ne

    sample = next(iter(call.do("search_offers", query=gpu, limit=1)), None) if filters else None
    if sample is None:
        return "it has no offers"
    compare = {"gt": gt, "gte": ge, "lt": lt, "lte": le, "eq": eq, "neq": ne}
    for field, limits in filters.items():
        try:
            met = all(
                compare[sign](float(sample[field]), float(limit)) for sign, limit in limits.items()
            )
        except (LookupError, TypeError, ValueError, AttributeError):
            met = False  # not a comparison of numbers: a search tells
        if not met and not call.do("search_offers", query={field: limits, **gpu}, limit=1):
            return f"the template asks for {field} {limits}, an offer of it has {sample.get(field)}"
    return "no offer of it meets all filters of the template at once"


class Bench:
    """Benchmarks under way: a serverless worker of each GPU measures itself, side by side, until
    all have or the time is over.
    """

    found = None  # no single instance: see CleanupGuard

    def __init__(self, call: Call, specs: list[Spec]) -> None:
        watcher = call
        if call["autoscaler_url"]:
            url = checked_url(call["autoscaler_url"])
            watcher = call.of(call.row, call.client.varied(server_url=url))
        self.call = call
        self.parts = [Measurement(call, watcher, spec) for spec in specs]

    @property
    def results(self) -> list[Row]:
        return [part.row for part in self.parts]

    def run(self) -> None:
        for part in self.parts:
            part.start()
        poll_until(self.look, self.call["timeout"], 10)

    def look(self, left: float) -> bool | None:
        """One look at all workers; those that have measured themselves are destroyed."""
        for part in self.parts:
            if part.row["status"] == "timeout":
                part.list_workers()
        done = [part for part in self.parts if part.row["status"] == "ok"]
        for part in done:
            part.give_back()
        self.call.progress(f"measured {len(done)} of {len(self.parts)} …", in_pipe=True)
        return True if len(done) == len(self.parts) else None

    def give_back(self) -> None:
        for part in self.parts:
            part.give_back()

    def still_costs(self) -> str:
        return "; ".join(filter(None, (words for part in self.parts for words in part.left())))


class Measurement:
    """The benchmark of one GPU: what was measured, and all that was rented for it, in the order in
    which to delete it.
    """

    def __init__(self, call: Call, watcher: Call, spec: Spec) -> None:
        self.call = call
        self.watcher = watcher
        self.spec = spec
        self.row = benchmark(*spec, "timeout")
        self.name = f"benchmark {spec[1]}x {spec[0]} {os.urandom(4).hex()}"
        self.rented: list[Rented] = []
        self.endpoint: Any = None
        self.unlisted = False  # its workers are not known

    def start(self) -> None:
        chosen = "template_hash" if self.call["template_id"] is None else "template_id"
        self.endpoint = self.make("endpoint", cold_workers=1, max_workers=1, min_load=1.0)
        search = f"gpu_name={self.spec[0].replace(' ', '_')} num_gpus={self.spec[1]}"
        template = {chosen: self.call[chosen], "search_params": search}
        self.make("workergroup", endpoint_id=self.endpoint, **template)

    def make(self, kind: str, **params: Any) -> Any:
        """Makes an endpoint or workergroup; it may be there from the first line on, whatever
        becomes of the answer.
        """
        rented = Rented(self.call, kind, self.name)
        self.rented.insert(0, rented)
        rented.id = "?"
        scaler = self.call["auto_instance"]
        try:
            answer = self.call.do(
                f"create_{kind}", endpoint_name=rented.name, auto_instance=scaler, **params
            )
        except VastAIError as error:
            rented.id = rented.id if is_lost(error) else None
            raise
        rented.id = as_whole(answer.get("result", answer.get("id"))) or "?"
        if rented.found is None:  # it is looked for by its name when it is deleted
            row = METHODS[f"create_{kind}"]
            raise outcome_unknown_error(row, f"the service confirmed it but named no {kind}")
        return rented.id

    def list_workers(self) -> bool | None:
        """One look at the workers of the endpoint; None if they could not be listed."""
        listed = None
        try:
            workers = self.watcher.do("get_endpoint_workers", id=self.endpoint)
            self.hold([worker.get("id") for worker in workers])
            listed = True
            for worker in workers:
                self.measure(worker)
        except VastAIError as error:
            self.call.progress(f"{self.name}: {error}")
        return listed

    def hold(self, ids: list[Any]) -> None:
        """Notes workers, which outlive their workergroup."""
        known = {rented.id or rented.last for rented in self.rented if rented.kind == "instance"}
        for id in {*map(as_whole, ids)} - known - {None, 0}:
            rented = Rented(self.call, "instance", "")
            rented.id = id
            self.rented.append(rented)

    def measure(self, worker: Row) -> None:
        """Notes what a worker costs, and how fast it is once it has measured itself."""
        id = whole_of(worker, "id")
        perf = number_of(worker, "measured_perf") or 0
        rented = next((rented for rented in self.rented if rented.id == id), None)
        done = worker.get("status") == "idle" and perf > 0  # else it is an estimate
        if rented and (done or rented.price is None):
            row = self.call.do("show_instance", id=id) or {}
            rented.price = price_of(row, "dph_total")
            price = price_of(row, "dph_base") or rented.price or 0
            self.row = benchmark(*self.spec, "ok", perf, price) if done else self.row

    def give_back(self) -> None:
        self.list_last_workers()
        for rented in self.rented:  # last the workers, also those added meanwhile
            rented.give_back()
            self.hold(rented.workers)
            if rented.kind == "workergroup":
                self.list_last_workers()  # one may have come up until then

    def list_last_workers(self) -> None:
        """Lists the workers while the endpoint is there, in up to three looks."""
        if any(rented.kind == "endpoint" and rented.found for rented in self.rented):
            self.unlisted = True
            self.unlisted = not poll_until(lambda left: self.list_workers(), 15, 7, tries=3)

    def left(self) -> list[str]:
        """Sentences on what may be left of it."""
        left = [rented.still_costs() for rented in self.rented]
        if self.unlisted:
            words = f"the workers of endpoint {self.endpoint} could not be listed"
            left.append(f"{words}; check with `vastai show instances`")
        return left


# --------------------------------------------------------------------------------------- serverless
# Jobs for the workers of an endpoint.  The router names a worker and signs a grant; the job goes to
# that worker, together with the grant.
#
# Every rule stands in generators that do no I/O.  They yield what is to be done next, and return
# the result: an `Ask` is answered with an Answer, or Unsent or Unanswered is thrown in; a number is
# a pause in seconds.  Two drivers run them: `drive`, over this module's own transport, for
# `VastAI().request()` and the command line; `Streams.drive`, over asyncio, for `Serverless` and
# `CoroutineServerless`.
#
# A worker is paid by the job, so a job is sent at most once unless the caller lets it be repeated.

ROOT_URL = f"{SERVER}/static/jvastai_root.cer"  # signs the certificates of workers
ROUTERS = parse_table("""\
alpha: https://run-alpha.vast.ai
candidate: https://run-candidate.vast.ai
local: http://localhost:8080""")
ROUTE_LIMIT = 10.0  # seconds for one question to the router
CONSOLE_LIMIT = 30.0  # seconds for one request to the console
PATIENCE = 5  # tries in a row that the console and the router get
DAY = 86_400  # seconds; the root certificate is cached for one


if TYPE_CHECKING:
    import asyncio
    from typing import Awaitable, Coroutine, Generator, Generic, TypeVar, Union

    R = TypeVar("R", bound=Awaitable[Any])
    C = TypeVar("C", bound="ServerlessClient[Any]")
    Steps = Generator[Any, Any, Any]
    Tracker = Union["ServerlessRequest", "RequestStatus", None]

    class ServerlessRequest(asyncio.Future[Row]):
        tracker: RequestStatus
        status: str
        create_time: float
        start_time: float | None
        complete_time: float | None
        req_idx: int

        def __init__(self, tracker: RequestStatus | None = None) -> None: ...
        def then(self, callback: Callable[[Row], object]) -> ServerlessRequest: ...
else:
    R = None

    class Generic:  # typing's own would double the start-up
        def __class_getitem__(cls, item):
            return cls


def serverless_error(
    text: str,
    kind: type[BaseException] = Exception,
    family: type[VastAIError] = VastAIError,
    lost: str = "",
    **details: Any,
) -> VastAIError:
    """An error of `family` that is also a `kind` and has its name: the official client raises plain
    ones.  If a job was `lost`, which says how, the outcome is unknown, whatever came after.
    """
    if lost:
        family = OutcomeUnknownError
        unknown = f"the request was sent, but its outcome is unknown ({lost})"
        text = f"{text}; {unknown}" if text else unknown
    timed_out = kind is TimeoutError if issubclass(kind, OSError) else None
    return make_error(family, text, kind=kind, timed_out=timed_out, **details)


def refused_error(
    what: str,
    answer: Answer,
    key: str = "",
    kind: type[BaseException] = RuntimeError,
    lost: str = "",
) -> VastAIError:
    """The error of an unusable answer.  Programs look for its `HTTP N - BODY`."""
    import json

    families = {401: AuthError, 403: AuthError, 404: NotFoundError, 410: NotFoundError}
    family: type[VastAIError] = families.get(answer.status_code, VastAIError)
    answer.secrets = [key] if key else []
    details: Row = {"response": answer}
    if answer.status_code == 429:
        family = RateLimitError
        details["retry_after"] = pause_asked(answer)
    words = printable(redact_text(answer.text[:2000], answer.secrets).strip(), 512)
    body = parse_object(answer)
    if body is not None and len(answer.content) < LONGEST_TEXT:  # programs parse it
        words = json.dumps(redact_value(body, answer.secrets))
    status = "unusable answer" if succeeded(answer) else f"HTTP {answer.status_code}"
    return serverless_error(f"{what}: {status} - {words}", kind, family, lost, **details)


def succeeded(answer: Answer) -> bool:
    return 200 <= answer.status_code < 300


def backoff(tries: int, longest: float, answer: Answer | None = None) -> float:
    """Seconds to wait after so many tries: 2, 4, 8 … and up to 1 more, or what the answer asks
    for.
    """
    pause = min(2.0 ** min(tries, 20) + jitter(0, 1), longest)
    asked = pause_asked(answer) if answer and answer.status_code in (429, 503) else None
    return max(pause, min(asked or 0.0, LONGEST_PAUSE))


def reach(ask: Ask) -> Steps:
    """Yields an Ask, then up to five to which it is redirected; returns the last answer.

    A worker that is addressed by its IP address may have a certificate that Vast.ai has signed; a
    root that does not fit is fetched again.
    """
    from urllib.parse import urlsplit

    redirects = 0
    while True:
        try:
            parts = urlsplit(ask.url)
            signed = parts.scheme == "https" and is_address(parts.hostname or "")
        except ValueError as error:
            raise Unsent(str(error), ask.url) from error
        old = ask.root = ""
        if signed and ask.root_url:
            old = ask.root = yield from find_root(ask, DAY)
        try:
            answer = yield ask
        except Unsent as problem:
            if old and type(problem.__cause__).__name__ == "SSLCertVerificationError":
                ask.root = yield from find_root(ask, 60)
            if ask.root == old:
                raise
            answer = yield ask
        redirects += 1
        if not answer.redirect or redirects > 5:
            break
        try:
            url, same = redirect_target(ask.method, ask.url, answer.status_code, answer.redirect)
        except ValueError:
            break
        if not (same or ask.root_url) and (ask.key or ask.payload):  # a key may be in either
            break
        ask.url = url
    return answer


def ask_service(
    what: str,
    ask: Ask,
    key: str,
    kind: type[BaseException] = Exception,
    tries: int = PATIENCE,
    longest: float = 5.0,
    lost: str = "",
) -> Steps:
    """Yields a request to console, router or session up to so many times; returns the 2xx answer.

    What is not safe is repeated only if it cannot have been carried out.  `what` begins the text of
    an error, in which the `key` is masked.
    """
    count = 0
    while True:
        count += 1
        answer = None
        try:
            answer = yield from reach(ask)
        except NoAnswer as problem:
            if kind is Exception:
                kind = TimeoutError if _timed_out(problem.__cause__) else ConnectionError
            if not ask.safe and isinstance(problem, Unanswered):
                lost = str(problem)
            failure = serverless_error(f"{what}: {what_failed(problem)}", kind, NetworkError, lost)
            again = ask.safe or not lost
        else:
            if succeeded(answer):
                break
            if not ask.safe and failure_kind(answer.status_code) == UNANSWERED:
                lost = f"HTTP {answer.status_code}"
            failure = refused_error(what, answer, key, kind, lost)
            again = may_pass(answer.status_code) and (ask.safe or answer.status_code == 429)
            again = again and (pause_asked(answer) or 0.0) <= LONGEST_PAUSE
        if not again or count == tries:
            raise failure
        yield min(backoff(count, longest, answer), max(0.0, ask.deadline - time.monotonic()))
        if time.monotonic() > ask.deadline - 0.001:
            raise failure
    return answer


def ask_console(
    what: str,
    url: str,
    key: str,
    method: str = "GET",
    body: Any = None,
    deadline: float = FOREVER,
) -> Steps:
    """Yields a request to the console or the router; returns the JSON object of the answer."""
    data = None if body is None else encode_json(body)
    ask = Ask(url, data, method, key, CONSOLE_LIMIT, deadline)
    ask.safe = method != "POST" or url.endswith("/update_workers/")
    answer = yield from ask_service(what, ask, key)
    if method == "DELETE" and not answer.content:
        return {}
    result = parse_body(answer)
    body = as_dict(result)
    failed = method != "GET" and has_failed(body) and not confirms(body)
    lost = "" if ask.safe or isinstance(result, dict) else "the answer cannot be read"
    if result != body or denies(body) or failed:
        raise refused_error(what, answer, key, Exception, lost)
    return body


def find_rows(thing: str, console: str, path: str, key: str, deadline: float = FOREVER) -> Steps:
    """Yields what to ask the console; returns the rows of its answer."""
    what = f"cannot list the {thing}"
    result = yield from ask_console(what, f"{console}/api/v0/{path}", key, deadline=deadline)
    rows = result.get("results")
    if as_rows(rows) != rows:
        raise serverless_error(f"{what}: the answer has no list 'results'")
    return rows


ENDPOINTS = "endptjobs/?client_id=me"  # the account's, keys included


@record
class Job:
    """One request to an endpoint, and how far it has come.

    `endpoint` has a name and an api_key.  `timeout` bounds all of it, `worker_timeout` one try of a
    worker (seconds; None and 0 are unlimited); `max_retries` counts all tries.  With a `session`
    the job goes to the session's worker and no other.  `warn` is called with a sentence when a job
    whose outcome is unknown is about to be repeated.  `refresh` begins to renew the endpoint's key
    if that is old, and returns the task that has to be waited for, or None.
    """

    endpoint: Any
    route: str
    payload: Any
    router: str
    cost: float = 100
    stream: bool = False
    timeout: float | None = None
    worker_timeout: float | None = 600
    retry: bool = True
    max_retries: int | None = None
    session: Session | None = None
    tracker: Any = None  # a RequestStatus or what has its attributes
    root_url: str = ROOT_URL
    longest_pause: float = 5.0
    warn: Callable[[str], object] = lambda text: None
    refresh: Callable[[], Any] = lambda: None
    deadline: float = FOREVER
    content: bytes = b""  # the payload as JSON
    number: int = 0  # the router's number for this request; it stays the same over all tries
    reason: str = ""  # why no worker has taken the job yet
    lost: str = ""  # why the outcome of a try is unknown
    answer: Any = None  # of a worker, when it has come

    def steps(self) -> Steps:
        """Yields Asks and pauses; returns the worker's answer as the official client's dict."""
        if self.timeout is not None:
            self.deadline = min(self.deadline, time.monotonic() + self.timeout)
        try:
            return (yield from self.run())
        except GeneratorExit:  # the driver gives up: cancelled, Ctrl-C
            self.tracker.status = "Cancelled"
            raise
        except Exception as error:
            self.tracker.status = "Errored"
            if self.lost and isinstance(error, NetworkError):  # the client was closed
                raise serverless_error(error.msg, RuntimeError, lost=self.lost) from error
            raise

    def run(self) -> Steps:
        """One try after the other, until there is an answer or a reason to stop."""
        if not (isinstance(self.route, str) and self.route and self.route.isprintable()):
            given = short_repr(self.route)
            raise UsageError(f"the route must be a path such as /v1/completions, not {given}")
        self.content = encode_json(self.payload)  # before a worker is asked for
        tries = unreached = 0
        while True:
            self.tracker.status = "Queued"
            self.check_time()
            grant = yield from self.find_worker()
            worker = as_text(self.session.url if self.session else grant.get("url"))
            self.tracker.status = "In Progress"
            self.tracker.start_time = time.time()
            tries += 1
            another = self.max_retries is None or tries < self.max_retries
            try:
                answer = yield from reach(self.ask_worker(worker, grant))
            except NoAnswer as problem:
                sent = isinstance(problem, Unanswered)
                unreached = 0 if sent else unreached + 1
                pause = backoff(tries if sent else unreached - 1, self.longest_pause)
                pause = 0.0 if unreached == 1 else pause
                repeats = self.retry or 0 < unreached < PATIENCE
                self.note_failure(worker, problem, sent, another and repeats)
            else:
                unreached = 0
                if not (self.retry and another and may_pass(answer.status_code)):
                    return self.result(answer, worker, grant)
                self.reason = f"{worker} answered HTTP {answer.status_code}"
                pause = backoff(tries, self.longest_pause, answer)
            self.tracker.status = "Retrying"
            yield from self.sleep(pause)

    def find_worker(self) -> Steps:
        """Yields until the router names a worker; returns its grant."""
        if self.session is not None:
            return self.session.auth_data
        fixed = os.getenv("VAST_DEBUG_WORKER_URL")
        if fixed:
            self.number = 1
            return {"request_idx": 1, "url": fixed}
        refreshing = self.refresh()
        while refreshing and not refreshing.done():
            yield from self.sleep(0.02)
        polls = 0
        while True:
            grant = yield from self.ask_router()
            if grant.get("url"):
                return grant
            self.tracker.status = "Polling"
            polls += 1
            pause = jitter(0.1, backoff(polls - 1, self.longest_pause))
            yield from self.sleep(pause if polls > 1 else min(1.0, self.longest_pause))

    def ask_router(self) -> Steps:
        """Yields the question; returns a grant, or a status without url.  Raises for a refusal."""
        name = self.endpoint.name
        key = self.endpoint.api_key
        check_key(key, f"endpoint {name}")
        body = {
            "endpoint": name,
            "api_key": key,
            "cost": self.cost,
            "request_idx": self.number,
            "replay_timeout": 60.0,
        }
        what = f"cannot route a request to endpoint {name}"
        ask = Ask(
            f"{self.router}/route/", encode_json(body), "POST", key, ROUTE_LIMIT, self.deadline
        )
        answer = yield from self.in_time(
            ask_service(what, ask, key, RuntimeError, longest=self.longest_pause, lost=self.lost)
        )
        grant = parse_body(answer)
        url = as_dict(grant).get("url")
        usable = not url or (
            isinstance(url, str) and url.isprintable() and url.startswith(("http://", "https://"))
        )
        if not isinstance(grant, dict) or grant.get("error_msg") or not usable:
            raise refused_error(what, answer, key, lost=self.lost)
        self.number = grant.get("request_idx") or self.number
        if not url:
            status = printable(text_of(grant, "status"), 200)
            self.reason = f"the router: {status or 'no worker'}"
        return grant

    def in_time(self, steps: Steps) -> Steps:
        """Yields and returns what the steps do.  If they fail and the time of the whole request is
        up, that is the error.
        """
        try:
            return (yield from steps)
        except VastAIError as error:
            self.reason = self.reason or error.msg
            self.check_time()
            raise

    def ask_worker(self, worker: str, grant: Row) -> Ask:
        """The job.  The grant goes as it came, since its signature is checked; no key goes
        along.
        """
        from urllib.parse import quote

        url = worker.rstrip("/") + "/" + quote(self.route.lstrip("/"), safe=URL_SAFE)
        session_id = self.session.session_id if self.session else None
        head = encode_json({"auth_data": grant, "session_id": session_id})[:-1]
        body = head + b', "payload": ' + self.content + b"}"
        ask = Ask(url, body, safe=False, root_url=self.root_url, stream=self.stream)
        ask.limit = self.worker_timeout or FOREVER
        ask.deadline = self.deadline
        return ask

    def note_failure(self, worker: str, problem: NoAnswer, sent: bool, another: bool) -> None:
        """Notes why a job that may have been `sent` brought no answer.  Raises if there must not be
        another try.
        """
        late = sent and _timed_out(problem.__cause__)
        if sent:
            self.lost = f"{worker}: {problem}"
        # A try that our own deadline cuts short says less than the one before it.
        elif not (self.reason and self.time_is_up()):
            self.reason = f"cannot reach the worker {worker}: {problem}"
        self.check_time()
        if self.session is not None and not late:
            self.session.open = another = False
        if not another:
            kind = TimeoutError if late else ConnectionError
            text = "" if sent else self.reason
            raise serverless_error(text, kind, NetworkError, self.lost) from problem
        if sent:
            self.warn(f"the job was sent to {worker}, but {problem}; sending it again")

    def time_is_up(self) -> bool:
        return time.monotonic() > self.deadline - 0.001

    def check_time(self) -> None:
        """Raises if the whole request has taken its time."""
        if self.time_is_up():
            text = f"no answer within {self.timeout:.15g} s"
            if self.reason:
                text += f"; the last reason: {self.reason}"
            raise serverless_error(text, TimeoutError, WaitTimeoutError, self.lost)

    def sleep(self, seconds: float) -> Steps:
        """Yields a pause, but ends with the time of the whole request."""
        yield min(seconds, max(0.0, self.deadline - time.monotonic()))
        self.check_time()

    def result(self, answer: Answer, worker: str, grant: Row) -> Row:
        """The official client's dict.  Raises if a 2xx is not the JSON that it claims to be."""
        self.answer = answer
        ok = succeeded(answer)
        text = ""
        value = answer.events
        if not ok:
            text = decode_text(answer)
            value = parse_object(answer)
            value = {"error": text} if value is None else value
        elif value is None:
            value, text = self.read_answer(answer, worker)
        tracker = self.tracker
        tracker.status = "Complete"
        tracker.complete_time = time.time()
        result = {
            "response": value,
            "ok": ok,
            "status": answer.status_code,
            "text": text,
            "latency": tracker.complete_time - tracker.start_time,
            "url": worker,
            "request_idx": self.number,
            "auth_data": grant,
        }
        if ok:
            result["content_type"] = media_type(answer)
        return result

    def read_answer(self, answer: Answer, worker: str) -> tuple[Any, str]:
        """The value of a 2xx (parsed JSON, text or bytes) and its text ("" for media)."""
        import json

        kind = media_type(answer)
        value = parse_object(answer)
        fault = answer.fault
        if not fault and kind and "json" not in kind and not kind.startswith("text/"):
            return (answer.content if value is None else value), ""
        text = decode_text(answer)
        if kind.startswith("text/"):
            value = text if value is None else value
        elif value is None and text.strip():
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                fault = fault or f"broken JSON: {printable(text[:120].strip(), 100)!r}"
        if fault:
            raise serverless_error(
                f"{worker} answered {self.route} with HTTP {answer.status_code} and {fault}",
                RuntimeError,
                response=answer,
                hint="The job was done and is not repeated.",
            )
        return value, text


def parse_body(answer: Answer) -> Any:
    """The value of an answer that should be JSON; None if it is not."""
    try:
        return answer.json()
    except ValueError:
        return None


def media_type(answer: Answer) -> str:
    """The declared type of a body, without its parameters; "" if there is none."""
    kind = answer.headers.get("Content-Type") or ""
    return kind.partition(";")[0].strip().lower()


def decode_text(answer: Answer) -> str:
    """A body as text, in its declared encoding."""
    _, _, name = (answer.headers.get("Content-Type") or "").lower().partition("charset=")
    name = name.partition(";")[0].strip(" \"'")
    try:
        return answer.text if name in ("", "utf-8") else answer.content.decode(name, "replace")
    except (LookupError, ValueError):  # idna knows no "replace"
        return answer.text


def parse_object(answer: Answer) -> Any:
    """The JSON object or list that a body is, whatever its type says; None if it is something
    else.
    """
    if answer.content[:100].lstrip()[:1] not in (b"{", b"["):
        return None
    value = parse_text(decode_text(answer))
    return None if isinstance(value, str) else value


def read_events(incoming: Incoming) -> Iterator[list[Any]]:
    """Yields the objects that are complete by now, after each feed() of a streamed answer, up to
    its end.  Raises ConnectionError.

    One object a line, with or without `data:` before it.  Comments, `[DONE]`, names of events and
    broken lines are passed over, as the official client does.
    """
    import json
    import zlib

    member = zlib.decompressobj(31)
    rest = []  # the pieces of the line that has begun
    size = 0
    done = False
    while not done:
        done = incoming.done
        data = b"".join(incoming.parts)
        incoming.parts = []
        if incoming.zipped:
            packed = data
            data = b""
            while packed:  # there may be several members
                member = zlib.decompressobj(31) if member.eof else member
                try:
                    data += member.decompress(packed)
                except zlib.error:
                    raise ConnectionError("the answer is not gzip") from None
                packed = member.unused_data
        cut = done and incoming.zipped and incoming.begun and not member.eof
        rest.append(data)
        size += len(data)
        lines = []
        if done or b"\n" in data:
            lines = b"".join(rest).split(b"\n")
            tail = b"" if done and not cut else lines.pop()
            rest = [tail]
            size = len(tail)
        if size > LARGEST_ANSWER:
            raise ConnectionError(TOO_LARGE)
        events = []
        for line in lines:
            line = line.strip()
            if line.startswith(b"data:"):
                line = line[5:].lstrip()
            try:
                if line:
                    events.append(json.loads(line.decode()))
            except (ValueError, RecursionError):
                continue
        yield events
        if cut:
            raise ConnectionError(CUT)


def stream_error(problem: BaseException) -> VastAIError:
    """The error of a stream that ends before its end."""
    kind = TimeoutError if _timed_out(problem) else ConnectionError
    return serverless_error(
        f"the worker's stream ended early ({_reason(problem)})", kind, OutcomeUnknownError
    )


# The root certificate of the workers, fetched when the first https worker comes.

_roots: dict[str, tuple[str, float]] = {}  # address -> certificate (PEM), when it was fetched
_fetching: set[str] = set()  # addresses


def find_root(worker: Ask, age: float) -> Steps:
    """Yields what to ask, unless a root certificate of at most that age (seconds) is at hand;
    returns it (PEM).  Raises Unsent: without it the job cannot leave.
    """
    url = worker.root_url
    ends = worker.ends()
    while url in _fetching and time.monotonic() < ends:  # once for all who wait for it
        yield 0.02
    text = cached_root(url, age)
    if text:
        return text
    _fetching.add(url)
    try:
        answer = yield from reach(Ask(url, None, "GET", limit=CONSOLE_LIMIT, deadline=ends))
        text = answer.text
        if not succeeded(answer):
            raise OSError(f"HTTP {answer.status_code}")
        if not text.isascii() or "BEGIN CERTIFICATE" not in text:
            raise ValueError("it is not a certificate")
        tls_context(text)
    except VastAIError:  # a proxy that cannot be used, a client that was closed
        raise
    except (NoAnswer, OSError, ValueError) as error:
        raise Unsent(
            f"cannot use Vast.ai's root certificate from {url}: {_reason(error)}", url
        ) from error
    finally:
        _fetching.discard(url)
    _roots[url] = text, time.time()
    try:
        write_private(root_file(url), text)
    except UsageError:  # an unwritable folder: the next process fetches it again
        pass
    return text


def cached_root(url: str, age: float) -> str:
    """The root certificate from memory or the cache folder, if it is not older than `age`; else
    "".
    """
    if url not in _roots:
        path = root_file(url)
        try:
            with open(path, encoding="ascii") as file:
                text = file.read(100_000)
            tls_context(text)
            _roots[url] = text, os.stat(path).st_mtime
        except (OSError, ValueError):  # none, or a broken one
            return ""
    text, fetched = _roots[url]
    return text if time.time() - fetched < age else ""


def root_file(url: str) -> str:
    """The cache file of a root certificate."""
    return own_file("cache", f"root-{plain_name(url[-80:])}.cer")


def plain_name(text: str) -> str:
    """A text as a part of the name of a file: letters, digits and dashes."""
    return "".join(c if c.isalnum() else "-" for c in text)


# The driver over this module's transport, and the command `request`.


def drive(
    steps: Steps, send: Callable[[Ask], Answer], pausing: Callable[[], object] = lambda: None
) -> Any:
    """Runs a generator of Asks and pauses to its end; returns its result.  `pausing` is called
    before each pause.
    """
    answer = None
    problem = None
    try:
        while True:
            step = steps.throw(problem) if problem else steps.send(answer)
            answer = problem = None
            try:
                if isinstance(step, Ask):
                    answer = send(step)
                else:
                    pausing()
                    sleep(step)
            except NoAnswer as error:
                problem = error
    except StopIteration as end:
        return end.value
    finally:
        steps.close()


def receive_events(connection: HttpConnection, incoming: Incoming) -> Iterator[Any]:
    """Yields the events of a worker as they come; to close it closes the connection."""
    try:
        for events in read_events(incoming):
            yield from events
            if not incoming.done:
                connection.deadline = incoming.piece_ends()
                incoming.feed(connection.receive())
    except OSError as error:
        raise stream_error(error) from error
    finally:
        connection.close()


def run_request(call: Call) -> Any:
    """The response of a worker: parsed JSON, a text, bytes, or an iterator of events."""
    client = call.client
    console = call.client.server_url
    require_key(client, call.row)
    payload = read_payload(call)
    for option in ("out", "text"):
        if call[option] and call.view.format != "table":
            raise UsageError(f"--{option} cannot be combined with --raw or --format")

    def send(ask: Ask) -> Answer:
        announce_ask(call, ask)
        return send_once(client, ask)

    job = Job(None, call["route"], payload, console, warn=call.warn, tracker=RequestStatus())
    for name in ("cost", "stream", "timeout", "worker_timeout", "max_retries"):
        setattr(job, name, call[name])
    if job.timeout is not None:
        job.deadline = time.monotonic() + job.timeout
    finding = find_rows("endpoints", console, ENDPOINTS, client.api_key or "", job.deadline)
    job.endpoint = choose_endpoint(drive(job.in_time(finding), send), call["endpoint"])
    call.secrets = [*client.secrets, job.endpoint.api_key]
    job.retry = call.get("retry", True) and not call["no_retry"]
    if console == SERVER:
        job.router = SERVERLESS
    else:
        job.root_url = f"{console}/static/jvastai_root.cer"
    result = drive(job.steps(), send, lambda: call.progress(job.reason))
    call.progress("")
    if not result["ok"]:
        raise refused_error(f"the worker's answer to {job.route}", job.answer)
    response = result["response"]
    if isinstance(response, bytes):
        response = Media(response)
        response.subtype = result["content_type"].partition("/")[2]
    return response


class Media(bytes):
    """A response that is not text; `subtype` is "png" for image/png."""

    subtype = ""


def read_payload(call: Call) -> Row:
    """What the worker is sent: the object of --json, of --file or from stdin."""
    payload: Row = call["payload"] or call["file"] or {}
    if not call["stdin"]:
        return payload
    # not in the terminal's encoding; what a program put in its place may have no buffer
    source = getattr(sys.stdin, "buffer", sys.stdin)
    data = source.read() if source else ""
    try:
        payload = OBJECT.convert(decode_file(data) if isinstance(data, bytes) else data)
    except (ValueError, RecursionError):
        raise UsageError("expected a JSON object on stdin") from None
    return payload


def choose_endpoint(rows: list[Row], wanted: str) -> EndpointData:
    """An endpoint by its name, else by its id.  Raises NotFoundError."""
    for member in ("endpoint_name", "id"):
        for row in rows:
            if text_of(row, member) == wanted:
                return read_endpoint(row)
    raise not_found_error("endpoint", wanted, "show endpoints")


def announce_ask(call: Call, ask: Ask) -> None:
    """Shows a request if `explain` or `curl` asks for that.  Raises NothingSent for `curl`."""
    if call.client.explain or call.client.curl:
        body = parse_json(ask.payload) if ask.payload else None
        hidden = ["api_key"] if ask.key else []
        request = Request(ask.method, ask.url, {}, body, ask.safe, bool(ask.key), hidden)
        announce_request(call, request)


def show_response(call: Call, response: Any) -> None:
    """Prints a worker's response, or writes it to --out; events as they come.  Media are saved
    rather than shown on a terminal.
    """
    path = call["out"]
    if isinstance(response, Media) and not path and is_terminal(sys.stdout):
        path = free_name(call["route"], response.subtype)
    if path:
        save_response(call, response, path)
        return
    for part in response_parts(call, response):
        if not isinstance(part, bytes):
            write_out(part, plain=True)
        elif hasattr(sys.stdout, "buffer"):  # what a program put in its place may have none
            sys.stdout.buffer.write(part)
        flush(sys.stdout)


def response_parts(call: Call, response: Any) -> Iterator[Any]:
    """A response as pieces of text, or bytes: a line of JSON for each event, or only what a model
    says, if it is an answer of one.
    """
    import json

    only_text = call["text"]
    if isinstance(response, bytes):
        yield response
    elif isinstance(response, str):
        yield response if response.endswith("\n") else response + "\n"
    elif call["stream"]:
        for event in response:
            line = json.dumps(event, ensure_ascii=False) + "\n"
            yield completion_text(event) if only_text else line
        yield "\n" if only_text else ""
    else:
        said = only_text and as_dict(response).get("choices")
        yield (completion_text(response) if said else format_json(response)) + "\n"


def completion_text(event: Any) -> str:
    """What a model says in an answer, or in one event of it: the texts of its choices."""
    texts = []
    for choice in as_rows(as_dict(event).get("choices")):
        said = as_dict(choice.get("delta")) or as_dict(choice.get("message"))
        texts.append(text_of(choice, "text") or text_of(said, "content"))
    return "".join(texts)


def document_response(call: Call, response: Any) -> Any:
    """A response as one JSON document: media in base64, events in a list.  Raises VastAIError for
    NaN, which is no JSON.
    """
    import json

    if isinstance(response, bytes):
        from base64 import b64encode

        return b64encode(response).decode()
    document = list(response) if call["stream"] else response
    try:
        json.dumps(document, allow_nan=False)
    except ValueError:
        text = "the response has NaN or infinite numbers, which JSON does not know"
        hint = "The job was done.  Without --raw and --format the response is printed as it came."
        raise VastAIError(text, hint=hint) from None
    return document


def response_rows(call: Call, response: Any) -> list[Row]:
    """A response for csv and the like: its objects; any other value as {"response": value}."""
    found = document_response(call, response)
    return [part if isinstance(part, dict) else {"response": part} for part in listed(found)]


def free_name(route: str, subtype: str) -> str:
    """A file in this folder that is not there yet, named after a route and a type of media."""
    stem = plain_name(route.strip("/")[:80]) or "response"
    ending = plain_name(subtype)
    number = 1
    while os.path.exists(f"{stem}-{number}.{ending}"):
        number += 1
    return f"{stem}-{number}.{ending}"


def save_response(call: Call, response: Any, path: str) -> None:
    """Writes a response to a file.  Raises VastAIError if that fails: the job was done."""
    size = 0
    parts = response_parts(call, response)
    try:
        with open(os.path.expanduser(path), "wb") as file:
            for part in parts:
                data = part if isinstance(part, bytes) else part.encode("utf-8", "backslashreplace")
                size += file.write(data)
    except OSError as error:
        if isinstance(error, VastAIError):  # of the worker
            raise
        raise VastAIError(f"cannot write {path}: {error.strerror or error}") from None
    remark(call, f"Saved {size:,} bytes to {printable(path, 300)}")


# The driver over asyncio.


@record
class TimeLimit:
    """`with TimeLimit(moment):` ends what is awaited inside with TimeoutError at that moment of
    time.monotonic().
    """

    moment: float
    late = False

    def __enter__(self) -> None:
        import asyncio

        seconds = max(0.0, self.moment - time.monotonic())
        self.task: Any = asyncio.current_task()
        self.cancelled = getattr(self.task, "cancelling", int)()  # how often, since 3.11
        self.timer = asyncio.get_running_loop().call_later(seconds, self.end)

    def end(self) -> None:
        self.late = True
        self.task.cancel()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.timer.cancel()
        if self.late and kind is not None and kind.__name__ == "CancelledError":
            uncancel = getattr(self.task, "uncancel", int)
            if uncancel() <= self.cancelled:  # nobody else has cancelled the task meanwhile
                raise TimeoutError("timed out") from None


class Connection:
    """A connection of one event loop.  `slot` is the semaphore that a streamed answer holds."""

    IDLE = 15.0  # seconds that it waits for its next request
    slot: Any = None
    timer: Any = None

    def __init__(self, place: Place, reader: Any, writer: Any) -> None:
        self.place = place
        self.reader = reader
        self.writer = writer
        self.transport = writer.transport

    def is_quiet(self) -> bool:
        # What has come meanwhile is no longer in the socket: the event loop has read it.
        spoilt = self.transport.is_closing() or self.reader.at_eof() or self.reader._buffer
        sock = self.transport.get_extra_info("socket")  # before 3.11 None if it was reset under TLS
        quiet = sock is not None and not spoilt and is_quiet(sock)
        # of a request that was answered early, the rest may still be on its way
        return quiet and not self.transport.get_write_buffer_size()

    async def receive(self) -> bytes:
        """Some bytes; none at the end of the connection."""
        try:
            data: bytes = await self.reader.read(1 << 16)
        except AttributeError:  # before 3.11, of TLS that was closed while much was still to read
            raise ConnectionError("the connection was closed") from None
        return data

    def free_slot(self) -> None:
        slot, self.slot = self.slot, None
        if slot:
            slot.release()

    def close(self) -> None:
        self.free_slot()
        if self.timer:
            self.timer.cancel()
        try:
            self.transport.abort()  # at once, which is how a worker learns that nobody waits
        except RuntimeError:  # its loop is closed, and with it the connection
            pass

    def __del__(self) -> None:  # a stream that nobody has begun to read
        self.close()


class Streams:
    """The connections of one client in one event loop: those in use, and idle ones for the next."""

    def __init__(self, client: ServerlessClient[Any], loop: Any) -> None:
        import asyncio
        from weakref import WeakSet

        self.client = client
        self.loop = loop
        self.closed = False
        most = client.connection_limit or sys.maxsize
        self.slots = asyncio.Semaphore(most)
        self.pool = Pool(most)
        self.used: WeakSet[Connection] = WeakSet()
        self.tasks: set[Any] = set()

    async def drive(self, steps: Steps) -> Any:
        """Runs a generator of Asks and pauses to its end; returns its result."""
        import asyncio

        answer = None
        problem = None
        try:
            while True:
                step = steps.throw(problem) if problem else steps.send(answer)
                answer = problem = None
                try:
                    self.check_open()
                    answer = await (
                        self.send(step) if isinstance(step, Ask) else asyncio.sleep(step)
                    )
                except (NoAnswer, VastAIError) as error:
                    problem = error
        except StopIteration as end:
            return end.value
        finally:
            steps.close()

    def check_open(self) -> None:
        if self.closed:
            raise serverless_error("the client was closed", RuntimeError, NetworkError)

    async def send(self, ask: Ask, fresh: bool = False) -> Answer:
        """The answer to an Ask, over a kept connection or a new one.  Raises Unsent or
        Unanswered.
        """
        try:
            with TimeLimit(ask.deadline):
                await self.slots.acquire()
        except TimeoutError as error:
            raise Unsent("all connections are in use", ask.url) from error
        ends = ask.ends()
        incoming = Incoming(ask)
        connection = None
        reused = None
        try:
            with TimeLimit(ends):
                place, target = self.pool.find_place(ask.url, ask.root)
                message = place.build_message(ask, target, self.client.user_agent)
                # what creates something never goes over an idle connection, a job may
                fresh = fresh or not (ask.safe or ask.root_url)
                reused = None if fresh else self.pool.waiting(place)
                connection = reused or await self.connect(place, ends)
                self.use(connection)
                connection.writer.write(message)
                while not (incoming.done or incoming.streamed):
                    incoming.feed(await connection.receive())
            events = self.events(connection, incoming) if incoming.streamed else None
            answer = incoming.answer(events)
        except BaseException as error:
            self.release(connection)
            if isinstance(error, VastAIError) or not isinstance(error, (OSError, ValueError)):
                raise
            if connection is None:
                raise Unsent(_reason(error), ask.url) from error
            if not (reused and ask.safe) or incoming.status or _timed_out(error):
                raise Unanswered(_reason(error), ask.url) from error
            return await self.send(ask, fresh=True)
        self.client.log(f"{ask.method} {ask.url}: {incoming.status}")
        if events is None:
            self.release(connection, incoming.keep)
        return answer

    async def events(self, connection: Connection, incoming: Incoming) -> Any:
        """The events of a worker as they come.  To close it closes the connection, and so ends the
        worker's job.
        """
        try:
            for events in read_events(incoming):
                for event in events:
                    yield event
                if not incoming.done:
                    with TimeLimit(incoming.piece_ends()):
                        incoming.feed(await connection.receive())
        except OSError as error:
            raise stream_error(error) from error
        finally:
            self.release(connection, incoming.done and incoming.keep)

    def use(self, connection: Connection) -> None:
        """Takes a connection for a request; one that was idle does not end by itself anymore."""
        self.used.add(connection)
        connection.slot = self.slots
        if connection.timer:
            connection.timer.cancel()
        self.check_open()

    def release(self, connection: Connection | None, keep: bool = False) -> None:
        """Ends the use of a connection; if it can be kept, it waits for its next request."""
        if connection is None:
            self.slots.release()
        else:
            self.used.discard(connection)
            connection.free_slot()
            keep = keep and not self.closed and connection.is_quiet()
            if keep:
                connection.timer = self.loop.call_later(connection.IDLE, self.pool.drop, connection)
            self.pool.give(connection, keep)

    async def connect(self, place: Place, ends: float) -> Connection:
        """A new connection, through the proxy if there is one, and with TLS for https.  Raises
        OSError, at that moment of time.monotonic() at the latest if there is a proxy.
        """
        import asyncio

        options: Any = {}
        if place.tls:
            options = {"ssl": tls_context(place.root), "server_hostname": place.host}
        if place.tls and place.proxy:
            ends = min(ends, time.monotonic() + CONSOLE_LIMIT)  # the program's end waits for it
            tunnel = await self.loop.run_in_executor(None, open_socket, place, ends)
            sock = tunnel.sock.dup()  # the tunnel closes its own
            sock.setblocking(False)
            both = await asyncio.open_connection(sock=sock, **options)
        else:
            near = place.proxy or place
            if isinstance(self.loop, asyncio.BaseEventLoop) and not is_address(near.host):
                # seconds until the next address is tried; uvloop does not know it
                options["happy_eyeballs_delay"] = 0.25
            both = await asyncio.open_connection(near.host, near.port, **options)
        return Connection(place, *both)

    def close(self) -> None:
        """Closes every connection and cancels what was begun with `Serverless`."""
        self.closed = True
        for task in list(self.tasks):
            task.cancel()
        for connection in list(self.used):
            connection.close()
        self.pool.close()


# What programs import: `from vastai import Serverless`.


@record
class RequestStatus:
    """How far a request has come: New, Queued, Polling, In Progress, Retrying, and at the end
    Complete, Cancelled or Errored.  Times are unix seconds.
    """

    status: str = "New"
    create_time: float = 0.0
    start_time: float | None = None
    complete_time: float | None = None
    req_idx: int = 0

    def __post_init__(self) -> None:
        self.create_time = self.create_time or time.time()


def make_request_class() -> type[ServerlessRequest]:
    """The class ServerlessRequest.  It is made when it is first asked for, because its base loads
    asyncio.
    """
    import asyncio

    class ServerlessRequest(asyncio.Future):  # type: ignore[type-arg]
        """The future answer of a worker.  It runs from the moment of the call; cancel() ends it.
        `status` and the times are those of its `tracker`, a RequestStatus.
        """

        def __init__(self, tracker: RequestStatus | None = None) -> None:
            super().__init__()
            self.tracker = RequestStatus() if tracker is None else tracker

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tracker, name)

        def __setattr__(self, name: str, value: Any) -> None:
            if name in RequestStatus.__annotations__:
                setattr(self.tracker, name, value)
            else:
                super().__setattr__(name, value)

        def cancel(self, *args: Any, **message: Any) -> bool:
            cancelled: bool = super().cancel(*args, **message)
            if cancelled:
                self.status = "Cancelled"  # at once: its job may not even have begun
            return cancelled

        def then(self, callback: Callable[[Row], object]) -> Any:
            """Calls `callback` with the result; an error is printed."""

            def done(request: Any) -> None:
                if request.cancelled():
                    return
                if request.exception() is not None:
                    print(request.exception())
                else:
                    callback(request.result())

            self.add_done_callback(done)
            return self

    ServerlessRequest.__qualname__ = "ServerlessRequest"
    made: type[Any] = globals().setdefault("ServerlessRequest", ServerlessRequest)
    return made


class Settings:
    """What an endpoint or a workergroup is created with."""

    def to_dict(self) -> Row:
        """What is not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


@record
class EndpointConfig(Settings):
    """The settings of an endpoint; the service has its own for those that are None."""

    endpoint_name: str
    cold_workers: int | None = None
    max_workers: int | None = None
    min_load: float | None = None
    min_cold_load: float | None = None
    target_util: float | None = None
    cold_mult: float | None = None
    max_queue_time: float | None = None
    target_queue_time: float | None = None
    autoscaler_instance: str | None = None
    endpoint_state: str | None = None
    inactivity_timeout: float | None = None


@record
class WorkergroupConfig(Settings):
    """The settings of a workergroup; it needs an endpoint and a template."""

    search_params: str | dict[str, Any] = ""
    endpoint_id: int | None = None
    endpoint_name: str | None = None
    template_hash: str | None = None
    template_id: int | None = None
    launch_args: str | None = None
    min_cold_load: float | None = None
    max_workers: int | None = None
    gpu_ram: float | None = None
    autoscaler_instance: str | None = None
    docker_login_user: str | None = None
    docker_login_pass: str | None = None
    docker_login_repo: str | None = None


@record
class EndpointData:
    """An endpoint as the console describes it."""

    id: int
    config: EndpointConfig
    api_key: str
    user_id: int = 0
    created_at: float = 0.0
    auto_delete_in_seconds: float | None = None
    auto_delete_due_24h: bool = False

    @property
    def name(self) -> str:
        return self.config.endpoint_name


def read_endpoint(row: Row) -> EndpointData:
    """An endpoint from the console's row.  Raises an error that is also a KeyError if that lacks
    what an endpoint has.
    """
    for name in ("id", "endpoint_name", "api_key", "user_id", "created_at"):
        if name not in row:
            raise serverless_error(f"the service describes an endpoint without {name!r}", KeyError)
    known = EndpointConfig.__annotations__
    config = EndpointConfig(**{name: row[name] for name in known if name in row})
    own = {name: row[name] for name in EndpointData.__annotations__ if name in row}
    return EndpointData(**{**own, "config": config, "api_key": as_text(row["api_key"])})


@record
class ServerlessWorker:
    """A worker of an endpoint, as the router describes it."""

    id: int
    status: str = "UNKNOWN"
    cur_load: float = 0.0
    new_load: float = 0.0
    cur_load_rolling_avg: float = 0.0
    cur_perf: float = 0.0
    perf: float = 0.0
    measured_perf: float = 0.0
    dlperf: float = 0.0
    reliability: float = 0.0
    reqs_working: int = 0
    disk_usage: float = 0.0
    loaded_at: float = 0.0
    started_at: float = 0.0


ServerlessWorker.__name__ = ServerlessWorker.__qualname__ = "Worker"  # the official name


def read_worker(row: Row) -> ServerlessWorker:
    """A worker from the router's row."""
    names = list(ServerlessWorker.__annotations__)[2:]
    numbers: Row = {name: float(number_of(row, name) or 0) for name in names}
    numbers["reqs_working"] = int(numbers["reqs_working"])
    id = whole_of(row, "id") or 0
    status = text_of(row, "status")
    return ServerlessWorker(id, status or "UNKNOWN", **numbers)


class Endpoint(Generic[R]):
    """An endpoint, through which requests go to its workers.

    It comes from `await client.get_endpoint(name)`, or is made from its name, id and API key.
    """

    def __init__(
        self,
        client: ServerlessClient[R],
        name: str | None = None,
        id: int | None = None,
        api_key: str | None = None,
        data: EndpointData | None = None,
        soft_refresh_threshold: float = 3 * DAY,
        hard_refresh_threshold: float = 6 * DAY,
    ) -> None:
        if client is None:
            raise ValueError("an Endpoint needs a client")
        if data is None:
            if not (isinstance(name, str) and isinstance(id, int) and isinstance(api_key, str)):
                raise ValueError("an Endpoint needs data, or a name, an id and an api_key")
            data = EndpointData(id, EndpointConfig(name), api_key)
        self.client = client
        self.soft_refresh_threshold = soft_refresh_threshold
        self.hard_refresh_threshold = hard_refresh_threshold
        self.refreshing: Any = None
        self.use(data)

    def use(self, data: EndpointData) -> None:
        """Takes what the console says about the endpoint."""
        self.data = data
        self.name = data.name
        self.id = data.id
        self.api_key = data.api_key
        self.last_refresh = time.time()

    def __repr__(self) -> str:
        return f"<Endpoint {self.name} (id={self.id})>"

    def refresh_if_old(self) -> Any:
        """The key of an endpoint may change: fetches the data again in the background once it is
        old.  Returns the task that does, if it has to be waited for.
        """
        import asyncio

        age = time.time() - self.last_refresh
        if age > self.soft_refresh_threshold and self.refreshing is None:
            self.refreshing = asyncio.ensure_future(self.refresh())
        return self.refreshing if age > self.hard_refresh_threshold else None

    async def refresh(self) -> None:
        try:
            self.use(await self.client.fetch_endpoint(self.id))
        except VastAIError as error:
            self.client.log(str(error))
        finally:
            self.refreshing = None

    def request(
        self,
        route: str,
        payload: Any,
        serverless_request: Tracker = None,
        cost: float = 100,
        retry: bool = True,
        stream: bool = False,
        timeout: float | None = None,
        session: Session | None = None,
        worker_timeout: float | None = 600,
        max_retries: int | None = None,
    ) -> R:
        """A request to a worker; awaited, it gives the official client's dict.

        Args:
            route: the worker's path, such as /v1/completions.
            payload: what it is sent, JSON.
            serverless_request: a tracker for the status.
            cost: the expected work, in the endpoint's own unit.
            retry: send the job again if the worker fails or is lost.
            stream: the response is an async iterator of events.
            timeout: seconds for all of it, up to the first byte of a stream; None waits forever.
            session: the session whose worker gets the job.
            worker_timeout: seconds for one try of a worker, or between two pieces of a stream; None is
                unlimited.
            max_retries: tries in all; None is unlimited.
        """
        # by its names, for programs that put a function of theirs in its place
        return self.client.queue_endpoint_request(
            endpoint=self,
            worker_route=route,
            worker_payload=payload,
            session=session,
            serverless_request=serverless_request,
            cost=cost,
            timeout=timeout,
            worker_timeout=worker_timeout,
            retry=retry,
            max_retries=max_retries,
            stream=stream,
        )

    async def session(
        self,
        cost: float = 100,
        lifetime: float = 60,
        on_close_route: str | None = None,
        on_close_payload: Row | None = None,
        timeout: float | None = None,
    ) -> Session:
        """A session with one worker, which stays reserved for `lifetime` seconds after each
        request.
        """
        payload = {
            "lifetime": lifetime,
            "on_close_route": on_close_route,
            "on_close_payload": on_close_payload,
        }
        result = await self.request(
            "/session/create", payload, cost=cost, timeout=timeout, worker_timeout=10
        )
        made = as_dict(result["response"])
        if not result["ok"] or made.get("session_id") is None:
            status = "no session_id" if result["ok"] else f"HTTP {result['status']}"
            raise serverless_error(f"cannot create a session: {status} - {result['text'][:512]}")
        return Session(
            self,
            made["session_id"],
            lifetime,
            made.get("expiration"),
            result["url"],
            result["auth_data"],
            on_close_route,
            on_close_payload,
        )

    async def get_session(self, session_id: str, session_auth: Row, timeout: float = 10) -> Session:
        """A session that was created earlier, by its id and `auth_data`."""
        url = as_text(as_dict(session_auth).get("url"))
        session = Session(self, session_id, 0, None, url, session_auth)
        answer = await session.ask("get", timeout)
        session.lifetime = number_of(answer, "lifetime") or 0
        session.expiration = answer.get("expiration")
        session.auth_data = as_dict(answer.get("auth_data"))
        session.url = text_of(session.auth_data, "url")
        if not session.url:
            raise serverless_error(
                f"session {session_id}: the answer has no 'auth_data' with a 'url'"
            )
        return session

    async def get_workers(self) -> list[ServerlessWorker]:
        """The endpoint's workers; none while they are not ready to be asked for."""
        return await self.client.get_endpoint_workers(self)


Endpoint_ = Endpoint  # as the official package has it


class Session:
    """A worker that is reserved for a series of requests; `async with` ends it.

    It comes from `await endpoint.session()`.
    """

    def __init__(
        self,
        endpoint: Endpoint[Any],
        session_id: str,
        lifetime: float,
        expiration: Any,
        url: str,
        auth_data: Row,
        on_close_route: str | None = None,
        on_close_payload: Row | None = None,
    ) -> None:
        if endpoint is None or session_id is None or url is None:
            raise ValueError("a Session needs an endpoint, a session_id and a url")
        self.endpoint = endpoint
        self.session_id = session_id
        self.lifetime = lifetime
        self.expiration = expiration
        self.url = url
        self.auth_data = auth_data
        self.on_close_route = on_close_route
        self.on_close_payload = on_close_payload
        self.open = True

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def ask(self, verb: str, timeout: float = 10) -> Row:
        """The JSON object that the worker answers to /session/VERB."""
        if not self.url:
            raise ValueError("expected the auth_data of a session, which has a url")
        client = self.endpoint.client
        body = encode_json({"session_id": self.session_id, "session_auth": self.auth_data})
        ask = Ask(f"{self.url.rstrip('/')}/session/{verb}", body, root_url=client.SSL_CERT_URL)
        ask.safe = verb == "get"
        ask.deadline = time.monotonic() + (timeout or FOREVER)  # the wait for a connection included
        steps = ask_service(f"session {self.session_id}", ask, client.api_key, tries=1)
        return as_dict(parse_object(await client.streams().drive(steps)))

    async def is_open(self) -> bool:
        """Asks the worker.  Raises if it cannot tell now."""
        try:
            await self.ask("get")
            self.open = True
        except TimeoutError:
            raise
        except VastAIError as error:
            if error.response and may_pass(error.status):
                raise
            self.open = False
        return self.open

    async def close(self) -> None:
        """Ends the session, once; a worker that does not answer is left to let it expire."""
        if self.open:
            self.open = False
            try:
                await self.ask("end")
            except VastAIError as error:
                self.endpoint.client.log(str(error))

    def request(
        self,
        route: str,
        payload: Any,
        serverless_request: Tracker = None,
        cost: float = 100,
        retry: bool = True,
        stream: bool = False,
        **limits: Any,
    ) -> Coroutine[Any, Any, Row]:
        """As Endpoint.request(), to the session's worker, once it is awaited.  Raises ValueError if
        the session is closed.
        """
        self.check_open()
        tracker = serverless_request

        async def finish() -> Row:
            result: Row = await self.endpoint.request(
                route, payload, tracker, cost, retry, stream, session=self, **limits
            )
            if result["status"] == 410:
                self.open = False
                self.check_open()
            return result

        return finish()

    def check_open(self) -> None:
        if not self.open:
            raise serverless_error(
                f"session {self.session_id} is closed; create another", ValueError, NotFoundError
            )


class ManagedEndpoint(Generic[R]):
    """An endpoint by its id; its data is fetched when a request needs it."""

    def __init__(self, id: int, client: ServerlessClient[R]) -> None:
        self.id = id
        self.client = client
        self.endpoint: Endpoint[R] | None = None

    async def request(self, route: str, payload: Any, **options: Any) -> Row:
        """As Endpoint.request()."""
        if self.endpoint is None:
            data = await self.client.fetch_endpoint(self.id)
            self.endpoint = Endpoint(self.client, data=data)
        return as_dict(await self.endpoint.request(route, payload, **options))

    async def add_workergroup(
        self, config: WorkergroupConfig | str | None = None, **settings: Any
    ) -> int:
        """Creates a workergroup from its settings or the hash of a template; returns its id."""
        if not isinstance(config, WorkergroupConfig):
            if config is not None:
                settings["template_hash"] = config
            config = WorkergroupConfig(**settings)
        if config.endpoint_id is None:
            config.endpoint_id = self.id
        return await self.client.create_workergroup(config)

    async def delete(self) -> None:
        await self.client.delete_endpoint(self.id)

    def invalidate(self) -> None:
        """The next request fetches the data again."""
        self.endpoint = None

    def __repr__(self) -> str:
        return f"<ManagedEndpoint id={self.id} ({'loaded' if self.endpoint else 'lazy'})>"


class ServerlessClient(Generic[R]):
    """What `Serverless` and `CoroutineServerless` have in common: endpoints, workers, connections.

    Args:
        api_key: the account's key; without it VAST_API_KEY, then the key files, are read.
        debug: log each request to stderr.
        instance: prod, alpha, candidate or local: which router.
        autoscaler_url: the router's address, instead of `instance`.
        webserver_url: the console's address.
        connection_limit: requests at a time; more wait.  0 is no limit.
        default_request_timeout: not used, as in the official client.
        max_poll_interval: seconds between two questions to the router, at most.
    """

    SSL_CERT_URL = ROOT_URL
    VAST_WEB_URL = SERVER

    def __init__(
        self,
        api_key: str | None = None,
        *,
        debug: bool = False,
        instance: str = "prod",
        autoscaler_url: str | None = None,
        webserver_url: str = SERVER,
        connection_limit: int = 500,
        default_request_timeout: float = 600.0,
        max_poll_interval: float = 5.0,
    ) -> None:
        from collections import deque

        profile = profile_name()
        key, _, origin = find_key(api_key, profile=profile)
        if not key:
            missing = no_key_error(profile)
            raise serverless_error(missing.msg, AttributeError, AuthError, hint=missing.hint)
        check_key(key, origin)
        self.api_key = key
        self.vast_web_url = webserver_url
        self.autoscaler_url = autoscaler_url or ROUTERS.get(instance, SERVERLESS)
        self.debug = debug
        self.connection_limit = connection_limit
        self.default_request_timeout = float(default_request_timeout)
        self.max_poll_interval = float(max_poll_interval)
        self.latencies: deque[float] = deque(maxlen=50)
        self.user_agent = user_agent()
        self._streams: dict[Any, Streams] = {}

    async def __aenter__(self: C) -> C:
        self.streams()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def log(self, text: str) -> None:
        if self.debug:
            write_err(printable(text, 2000) + "\n")

    def streams(self) -> Streams:
        """The connections of the running event loop."""
        import asyncio

        loop = asyncio.get_running_loop()
        opened = self._streams
        if loop not in opened:
            for other in list(opened):  # a copy, since other threads may add theirs
                if other.is_closed():
                    opened.pop(other, None)
            opened[loop] = Streams(self, loop)
        return opened[loop]

    def is_open(self) -> bool:
        """Has it been used, and not been closed since?"""
        return any(not loop.is_closed() for loop in list(self._streams))

    async def close(self) -> None:
        """Cancels what runs and closes the connections; the client can be used again."""
        import asyncio

        opened, self._streams = self._streams, {}
        running = opened.pop(asyncio.get_running_loop(), None)
        for loop, streams in opened.items():  # those of other threads, or of loops that are over
            if not loop.is_closed():
                loop.call_soon_threadsafe(streams.close)
        if running is not None:
            running.close()
            await asyncio.gather(*running.tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the event loop closes the sockets in its next round

    async def get_endpoints(self) -> list[Endpoint[R]]:
        """The account's endpoints."""
        steps = find_rows("endpoints", self.vast_web_url, ENDPOINTS, self.api_key)
        rows = await self.streams().drive(steps)
        return [Endpoint(self, data=read_endpoint(row)) for row in rows]

    async def get_endpoint(self, name: str = "") -> Endpoint[R]:
        """The first endpoint of that name.  Raises NotFoundError."""
        for endpoint in await self.get_endpoints():
            if endpoint.name == name:
                return endpoint
        raise not_found_error("endpoint", repr(name), "show endpoints")

    async def get_endpoint_workers(self, endpoint: Endpoint[Any]) -> list[ServerlessWorker]:
        """An endpoint's workers; none while they are not ready to be asked for.  The service allows
        about one call a second.
        """
        if not isinstance(endpoint, Endpoint):
            raise ValueError(f"expected an Endpoint, not {short_repr(endpoint)}")
        what = f"cannot list the workers of endpoint {endpoint.id}"
        key = self.api_key
        body = encode_json({"id": endpoint.id, "api_key": key})
        ask = Ask(f"{self.autoscaler_url}/get_endpoint_workers/", body, limit=CONSOLE_LIMIT)
        answer = await self.streams().drive(ask_service(what, ask, key, RuntimeError, 1))
        rows = parse_body(answer)
        if isinstance(rows, dict) and "error_msg" in rows:
            self.log(f"{what}: {rows['error_msg']}")
            return []
        if as_rows(rows) != rows:
            raise refused_error(what, answer, key)
        return [read_worker(row) for row in rows]

    async def fetch_endpoint(self, endpoint_id: int) -> EndpointData:
        """An endpoint's data by its id."""
        result = await self.manage("fetch", "endpoint", endpoint_id)
        return read_endpoint(as_dict(result.get("result")))

    async def create_endpoint(self, config: EndpointConfig) -> ManagedEndpoint[R]:
        result = await self.manage("create", "endpoint", config=config)
        return ManagedEndpoint(self.new_id(result.get("result")), self)

    async def delete_endpoint(self, endpoint_id: int) -> None:
        await self.manage("delete", "endpoint", endpoint_id)

    async def create_workergroup(self, config: WorkergroupConfig) -> int:
        """Creates a workergroup; returns its id."""
        result = await self.manage("create", "workergroup", config=config)
        return self.new_id(result.get("id"))

    async def delete_workergroup(self, workergroup_id: int) -> None:
        await self.manage("delete", "workergroup", workergroup_id)

    async def find_workergroup_for_endpoint(self, endpoint_id: int) -> int | None:
        """The id of the endpoint's first workergroup, or None."""
        steps = find_rows("workergroups", self.vast_web_url, "workergroups/", self.api_key)
        for row in await self.streams().drive(steps):
            if row.get("endpoint_id") == endpoint_id:
                return whole_of(row, "id")
        return None

    async def update_workers(self, workergroup_id: int) -> Row:
        """Has the workers of a workergroup updated, one after the other."""
        what = f"cannot update the workers of workergroup {workergroup_id}"
        url = f"{self.autoscaler_url}/update_workers/"
        body = {"workergroup_id": workergroup_id, "api_key": self.api_key}
        steps = ask_console(what, url, self.api_key, "POST", body)
        return as_dict(await self.streams().drive(steps))

    async def manage(
        self, verb: str, thing: str, id: int | None = None, config: Settings | None = None
    ) -> Row:
        """The console's answer."""
        method = {"create": "POST", "delete": "DELETE"}.get(verb, "GET")
        path = {"endpoint": "endptjobs/", "workergroup": "workergroups/"}[thing]
        url = f"{self.vast_web_url}/api/v0/{path}"
        body = None if config is None else config.to_dict()
        if config is None:
            number = as_whole(id)
            if number is None:
                raise UsageError(f"expected the id of the {thing}, not {short_repr(id)}")
            url += f"{number}/"
        steps = ask_console(f"cannot {verb} the {thing}", url, self.api_key, method, body)
        return as_dict(await self.streams().drive(steps))

    def new_id(self, value: Any) -> int:
        """The id of what was created.  Without one the outcome is unknown."""
        number = as_whole(value)
        if number is None:
            raise serverless_error(
                "the answer has no id, so the outcome is unknown", KeyError, OutcomeUnknownError
            )
        return number

    def queue_endpoint_request(
        self,
        endpoint: Endpoint[R],
        worker_route: str,
        worker_payload: Any,
        session: Session | None = None,
        serverless_request: Tracker = None,
        cost: float = 100,
        timeout: float | None = None,
        worker_timeout: float | None = 600,
        retry: bool = True,
        max_retries: int | None = None,
        stream: bool = False,
    ) -> R:
        """Endpoint.request() under its other name."""
        tracker = getattr(serverless_request, "tracker", serverless_request)
        job = Job(
            endpoint,
            worker_route,
            worker_payload,
            self.autoscaler_url,
            cost,
            stream,
            timeout,
            worker_timeout,
            retry,
            max_retries,
            session,
            tracker or RequestStatus(),
            self.SSL_CERT_URL,
            self.max_poll_interval,
            self.log,
            endpoint.refresh_if_old,
        )
        return self.begin(job, serverless_request)

    if TYPE_CHECKING:

        def begin(self, job: Job, request: Tracker) -> R: ...

    async def run(self, job: Job) -> Row:
        """A worker's answer."""
        result: Row = await self.streams().drive(job.steps())
        self.latencies.append(result["latency"])
        return result


class CoroutineServerless(ServerlessClient["Coroutine[Any, Any, Row]"]):
    """The serverless client whose requests are coroutines: they begin when they are awaited."""

    def begin(self, job: Job, request: Tracker) -> Coroutine[Any, Any, Row]:
        return self.run(job)


class Serverless(ServerlessClient["ServerlessRequest"]):
    """The serverless client whose requests are futures: they begin at once.

    async with Serverless() as client:
        endpoint = await client.get_endpoint("my-endpoint")
        payload = {"prompt": "Hi", "max_tokens": 8}
        answer = await endpoint.request("/v1/completions", payload, cost=8)
        print(answer["response"])
    """

    def begin(self, job: Job, request: Tracker) -> ServerlessRequest:
        import asyncio

        # made when it is first asked for
        kind: type[ServerlessRequest] = sys.modules[__name__].ServerlessRequest
        future = request if isinstance(request, kind) else kind(job.tracker)
        if future.done() and not future.cancelled():
            raise UsageError("expected a ServerlessRequest that has not been used")
        tasks = self.streams().tasks
        task = asyncio.ensure_future(self.run(job))
        tasks.add(task)

        def finished(task: Any) -> None:
            tasks.discard(task)
            problem = None if task.cancelled() else task.exception()
            if future.done():
                return
            if task.cancelled():
                future.cancel()
            elif problem is not None:
                future.set_exception(problem)
            else:
                future.set_result(task.result())

        task.add_done_callback(finished)
        future.add_done_callback(lambda _: task.cancel())
        return future


# ------------------------------------------------------------------------------------------- VastAI


class Method:
    """A row as a method.  It looks like a function with the row's signature, but builds that only
    when asked.
    """

    def __init__(self, name: str, row: Command) -> None:
        self.__name__ = name
        self.__qualname__ = f"VastAI.{name}"
        self.row = row

    def __get__(self, client: VastAI | None, owner: Any = None) -> Any:
        if client is None:
            return self
        from types import MethodType

        return MethodType(self, client)

    def __call__(self, *args: Any, **given: Any) -> Any:
        # no parameter has a name: unittest.mock would ask callers of a stand-in for it
        if not args:
            raise TypeError(f"{self.__name__}() missing 1 required positional argument: 'self'")
        return args[0]._call(self.row, args[1:], given)

    def __reduce__(self) -> str:
        return self.__qualname__  # found by its name

    def __repr__(self) -> str:
        return f"<function {self.__qualname__}>"

    __doc__ = property(lambda self: docstring(self.row))
    __signature__ = property(lambda self: signature(self.row))

    @property
    def __annotations__(self) -> dict[str, Any]:  # type: ignore[override]
        result = {arg.name: arg.annotation for arg in self.row.args_of("sdk")}
        return {**result, "return": self.row.annotation}


def signature(row: Command) -> Any:
    """The inspect.Signature of a row's method."""
    from inspect import Parameter, Signature

    kind = Parameter.POSITIONAL_OR_KEYWORD
    parameters = [Parameter("self", kind)]
    for arg in row.args_of("sdk"):
        default = Parameter.empty if arg.default is REQUIRED else arg.default
        parameters.append(Parameter(arg.name, kind, default=default, annotation=arg.annotation))
    return Signature(parameters, return_annotation=row.annotation)


def docstring(row: Command) -> str:
    """What help() shows of a row's method."""
    width = 88
    args = row.args_of("sdk")
    lines = [f"{row.summary[:1].upper()}{row.summary[1:]}."]
    if row.note:
        lines += ["", wrap_text(for_python(row.note, row), width)]
    if args:
        lines += ["", "Args:"]
    for arg in args:
        unit = unit_of(arg) or ""
        facts = [unit] if unit not in arg.help else []
        facts += [f"one of {', '.join(map(repr, arg.choices))}"] if arg.choices else []
        facts += [] if arg.default in (REQUIRED, None, False) else [f"default {arg.default!r}"]
        more = f" ({'; '.join(facts)})" if facts else ""
        meaning = f"{arg.name}: {for_python(arg.help, row)}{more}"
        lines.append("    " + wrap_text(meaning, width - 4, 4).replace("\n", "\n    "))
    if row.fields and any(arg.kind is QUERY for arg in args):
        lines += ["", "Fields of the query:"]
        lines += [f"    {name}: {meaning}" for name, meaning in field_help(row.fields)]
    part = row.returns.partition("[")[0]
    returned = f", the member {part!r} of the answer" if part not in RETURNED_WHOLE else ""
    possible = set(exit_statuses(row)) - {VastAIError.exit_status}
    families = [c.__name__ for c in VastAIError.__subclasses__() if c.exit_status in possible]
    lines += [
        "",
        f"Returns {row.annotation}{returned}.",
        wrap_text(f"Raises {', '.join(families)} or another VastAIError.", width, 4),
    ]
    if row.path:
        once = "" if row.safe else ", sent at most once"
        lines.append(f"Request: {row.method} {row.path.partition(':')[2] or row.path}{once}")
    lines.append(f"Command line: vastai {row.name}" if row.face != "sdk" else "Only in the SDK.")
    return "\n".join(lines)


UNITS = {"GB": "GB", "USD": "$", "SECONDS": "seconds", "HOURS": "hours", "PERCENT": "percent"}
RETURNED_WHOLE = ("", "text", "any", "none")


def unit_of(arg: Arg) -> str | None:
    """The unit of a value: "GB", "$", "$/hr"; of a price it stands in the help."""
    unit = UNITS.get(arg.kind.metavar)
    per = arg.help.partition("$/")[2].split(" ")[0].rstrip(",;")
    return f"$/{per}" if unit == "$" and per else unit


ONLY_TYPED = ("; can be repeated", ": the rest of the line", ", after --")


def for_python(text: str, row: Command) -> str:
    """A text of the help as a caller of the SDK needs it: parameters instead of options, methods
    instead of commands, exceptions instead of exit statuses.
    """
    import re

    for arg in row.args:
        given = f"{arg.name}=True" if arg.kind is FLAG else arg.name
        for flag in arg.flags if arg.option else ():
            if flag.startswith("--") and flag in text:
                text = re.sub(rf"{flag}(?![\w-])", given, text)
    for part in ONLY_TYPED:
        text = text.replace(part, "")

    def method(found: Any) -> str:
        quoted = found.group(1) == "`"
        name = found.group(2)
        command = find_command(name.split())[0] if quoted else COMMANDS.get(name)
        if command is None or command.face == "cli":
            return str(found.group())
        return f"{found.group(1)}{command.methods[0]}()"

    text = re.sub(r"\b((?:from|for|of|or|see) )([a-z]+ [a-z-]+)\b", method, text)
    kinds: list[type[VastAIError]] = [VastAIError, *VastAIError.__subclasses__()]
    for kind in kinds:
        text = text.replace(f"the exit status is {kind.exit_status}", f"it raises {kind.__name__}")
    return re.sub(r"(`)vastai ([^`]+)", method, text)


# fmt: off
if TYPE_CHECKING:  # the rows that programs touch most, for type checkers; at run time they are plain dicts
    Offer = TypedDict("Offer", {
        "id": int, "ask_contract_id": int, "bundle_id": int, "machine_id": int, "host_id": int, "gpu_name": str,
        "num_gpus": int, "gpu_ram": float, "gpu_total_ram": float, "gpu_arch": str, "gpu_frac": float,
        "gpu_mem_bw": float, "gpu_max_power": float, "gpu_max_temp": float, "gpu_display_active": bool,
        "gpu_ids": List[Any], "compute_cap": int, "cuda_max_good": float, "driver_version": str, "cpu_name": str,
        "cpu_arch": str, "cpu_cores": int, "cpu_cores_effective": float, "cpu_ghz": float, "cpu_ram": float,
        "has_avx": int, "mobo_name": str, "pci_gen": float, "pcie_bw": float, "bw_nvlink": float, "disk_name": str,
        "disk_space": float, "disk_bw": float, "inet_up": float, "inet_down": float, "inet_up_cost": float,
        "inet_down_cost": float, "storage_cost": float, "storage_total_cost": float, "dph_base": float,
        "dph_total": float, "job_total": Optional[float], "discounted_dph_total": float, "discount_rate": float,
        "credit_discount_max": float, "min_bid": float, "is_bid": bool, "dlperf": float, "dlperf_per_dphtotal": float,
        "flops_per_dphtotal": float, "total_flops": float, "score": float, "reliability": float,
        "reliability2": float, "verification": str, "vericode": int, "rentable": bool, "rented": Optional[bool],
        "external": Optional[bool], "datacenter": bool, "hosting_type": Optional[int], "geolocation": str,
        "public_ipaddr": str, "static_ip": bool, "direct_port_count": int, "duration": float, "start_date": float,
        "end_date": float, "os_version": str, "vms_enabled": bool, "cluster_id": Optional[int],
        "webpage": Optional[str], "search": Dict[str, Any]})
    Instance = TypedDict("Instance", {
        "id": int, "actual_status": Optional[str], "intended_status": str, "cur_state": str, "next_state": str,
        "status_msg": Optional[str], "label": Optional[str], "machine_id": int, "host_id": int, "bundle_id": int,
        "image_uuid": str, "image_args": List[Any], "image_runtype": str, "template_id": Optional[int],
        "template_hash_id": Optional[str], "template_name": Optional[str], "extra_env": Dict[str, str],
        "onstart": Optional[str], "jupyter_token": str, "ssh_host": str, "ssh_idx": str, "ssh_port": int,
        "public_ipaddr": str, "local_ipaddrs": Optional[str], "ports": Dict[str, Any], "direct_port_count": int,
        "start_date": float, "end_date": Optional[float], "duration": float, "uptime_mins": Optional[float],
        "gpu_name": str, "num_gpus": int, "gpu_ram": float, "gpu_frac": float, "gpu_util": Optional[float],
        "gpu_temp": Optional[float], "cpu_name": str, "cpu_cores": int, "cpu_cores_effective": float,
        "cpu_ram": float, "cpu_util": float, "mem_limit": Optional[float], "mem_usage": Optional[float],
        "disk_name": str, "disk_space": float, "disk_usage": float, "disk_util": float,
        "volume_info": Optional[List[Any]], "dph_base": float, "dph_total": float, "min_bid": float, "is_bid": bool,
        "storage_cost": float, "inet_up": Optional[float], "inet_down": Optional[float], "reliability2": float,
        "verification": str, "geolocation": str, "static_ip": bool, "instance": Dict[str, Any],
        "webpage": Optional[str], "credit_balance": Optional[float]})
    CreatedInstance = TypedDict("CreatedInstance", {
        "success": bool, "new_contract": int, "msg": str, "instance": Instance})
    Template = TypedDict("Template", {
        "id": int, "hash_id": str, "name": str, "image": str, "tag": Optional[str], "creator_id": int,
        "count_created": int, "created_at": float, "recent_create_date": Optional[float], "private": bool,
        "recommended": bool, "recommended_disk_space": Optional[float], "runtype": str, "ssh_direct": bool,
        "jup_direct": bool, "use_ssh": bool, "extra_filters": Any, "desc": Optional[str], "env": Optional[str],
        "href": Optional[str], "readme": Optional[str]})
    Volume = TypedDict("Volume", {
        "id": int, "cluster_id": Optional[int], "label": Optional[str], "disk_space": float, "disk_name": str,
        "status": str, "driver_version": str, "inet_up": float, "inet_down": float, "reliability2": float,
        "start_date": float, "duration": float, "machine_id": int, "host_id": int, "verification": str,
        "geolocation": str, "public_ipaddr": str, "instances": List[Any]})
    Machine = TypedDict("Machine", {
        "id": int, "num_gpus": int, "gpu_name": str, "gpu_occupancy": str, "disk_space": float, "hostname": str,
        "driver_version": Optional[str], "reliability2": float, "verification": str, "public_ipaddr": Optional[str],
        "geolocation": str, "num_reports": int, "listed": bool, "listed_gpu_cost": Optional[float],
        "listed_inet_up_cost": float, "listed_inet_down_cost": float, "min_bid_price": float,
        "credit_discount_max": float, "earn_hour": float, "clients": List[Any], "error_description": Optional[str]})
    EndpointRow = TypedDict("EndpointRow", {
        "id": int, "endpoint_name": Optional[str], "endpoint_state": str, "min_load": float, "target_util": float,
        "cold_mult": float, "cold_workers": int, "max_workers": int, "user_id": int, "created_at": str})
    Workergroup = TypedDict("Workergroup", {
        "id": int, "endpoint_id": Optional[int], "endpoint_name": str, "template_hash": Optional[str],
        "template_id": Optional[int], "search_query": Dict[str, Any], "launch_args": Optional[str], "gpu_ram": float})
    User = TypedDict("User", {
        "id": int, "username": str, "email": str, "fullname": str, "balance": float, "credit": float,
        "balance_threshold": float, "balance_threshold_enabled": bool, "can_pay": bool, "has_billing": bool,
        "last4": Optional[str], "ssh_key": Optional[str]})
    Cost = TypedDict("Cost", {
        "hour": float, "day": float, "month": float, "credit": Optional[float], "hours_left": Optional[float],
        "runs_out": Optional[str], "rows": List[Dict[str, Any]], "last_day": Dict[str, Optional[float]],
        "unknown": List[str]})
    Invoice = TypedDict("Invoice", {
        "id": int, "user_id": int, "when": float, "paid_on": Optional[float], "payment_expected": Optional[float],
        "amount_cents": float, "original_amount": Optional[float], "balance_before": float, "balance_after": float,
        "is_credit": bool, "is_delayed": bool, "is_check": bool, "failed": bool, "refunded": bool, "service": str,
        "event_id": Optional[str], "error": Optional[str], "extra": Any, "paypal_email": Optional[str]})
# fmt: on


class VastAI:
    """A client of Vast.ai; every command of the service is a method.

    Args:
        api_key: the key; without it VAST_API_KEY, then the key files, are read; VAST_PROFILE names
            one of several accounts.
        server_url: the service; without it VAST_URL, then https://console.vast.ai.
        retry: attempts of a request that may be repeated, the first included.
        raw: return parsed JSON; False prints what the command line would print and returns None.
        explain: write each request to stderr.
        quiet: no remarks on stderr.
        curl: print each request as a curl command and send nothing.
        timeout: seconds that one request may take.

    Any number of threads can share one object.  `close()`, or leaving a `with` block, closes its
    connections.  Raises UsageError for an invalid server_url, retry or timeout.  Each method also
    takes raw, explain, quiet and curl for one call.
    """

    def __init__(
        self,
        api_key: str | None = None,
        server_url: str | None = None,
        retry: int = 3,
        raw: bool = True,
        explain: bool = False,
        quiet: bool = False,
        curl: bool = False,
        timeout: float = 120,
    ) -> None:
        load_modules()
        self.raw = raw
        self.explain = explain
        self.quiet = quiet
        self.curl = curl
        self.retry: int = checked("retry", ATTEMPTS, retry)
        self.timeout: float = checked("timeout", TIMEOUT, timeout)
        self.server_url = checked_url(server_url or os.getenv("VAST_URL", "").strip() or SERVER)
        self.user_agent = user_agent()
        self.pool = Pool()
        self.profile = profile_name()
        self._find_key(api_key)
        self.last_result: Any = None  # of the method called last, in whatever thread

    def _find_key(self, given: str | None = None, session: bool = False) -> None:
        """Takes the key that is given, or else the first that is found for the profile."""
        found = find_key(given, self.profile, session)
        self.api_key, self.creds_source, self.key_origin = found

    @property
    def last_output(self) -> str:
        """What the last method returned, as text: programs for the SDK before 1.0 read it here."""
        result = self.last_result
        if isinstance(result, str):
            return result
        return "" if result is None else format_json(result)

    @property
    def api_key_access(self) -> str | None:
        """Another name for `api_key`."""
        return self.api_key

    @api_key_access.setter
    def api_key_access(self, key: str | None) -> None:
        self.api_key = key

    @property
    def client(self) -> VastAI:
        """The client itself: programs for the official SDK read `client.api_key` from here."""
        return self

    @property
    def secrets(self) -> list[str]:
        """The texts that no message may show."""
        return [self.api_key] if isinstance(self.api_key, str) and len(self.api_key) >= 8 else []

    def __repr__(self) -> str:
        return f"VastAI(server_url={self.server_url!r}, creds_source={self.creds_source!r})"

    def __enter__(self) -> VastAI:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections that are kept for the next call; the object can be used again."""
        self.pool.close()

    def varied(self, **now: Any) -> VastAI:
        """The same client with other attributes, over the same connections."""
        client = VastAI.__new__(VastAI)
        client.__dict__.update(self.__dict__, **now)
        return client

    def _call(self, row: Command, args: Sequence[Any], given: Row) -> Any:
        """A method call: binds, checks, performs; prints instead of returning if `raw` is off."""
        asked = given.keys() & {"raw", "explain", "quiet", "curl"}
        if asked:  # for this call alone
            asked -= {arg.name for arg in row.args_of("sdk")}
        now = {name: given.pop(name) for name in asked}
        client = self.varied(**now) if now else self
        key = self.api_key
        view = View("json" if client.raw else "table")
        with row:
            call = Call(
                client, row, check_params(row, bind_params(row, args, given), cli=False), view
            )
            try:
                answer = perform(call)
            except NothingSent:
                return None
            except VastAIError as error:
                if isinstance(error, UsageError):
                    error.msg = for_python(error.msg, row)
                if (
                    error.status != 200
                    or get_path(error.body, "success") is not False
                    or not row.path  # it is the answer of another row
                    or row.annotation.startswith(("list", "str"))
                ):
                    raise
                answer = error.body  # for `if result.get("success"): …`
                if contracts_of(answer):
                    answer["msg"] = error.msg  # it says what became of the instance
            finally:
                if client.api_key != key:  # set_api_key is meant for this client
                    self.api_key = client.api_key
            result = as_plain(answer)
            self.last_result = result
            return result if view.format == "json" else present(call, answer)

    # fmt: off
    # stubs: begin
    if TYPE_CHECKING:  # written by `python3 test_vastai.py write`
        def search_offers(self, query: str | dict[str, Any] | None = None, type: Literal['on-demand', 'bid',
                'reserved', 'interruptible'] = 'on-demand', order: str | Sequence[Any] | None = None,
                limit: int | None = None, storage: float | None = None, no_default: bool = False,
                hours: float | None = None, down: float | None = None, up: float | None = None,
                disable_bundling: bool = False) -> list[Offer]:
            "Search GPU offers to rent."; ...
        def search_offers_new(self, query: str | dict[str, Any] | None = None, type: Literal['on-demand', 'bid',
                'reserved', 'interruptible'] = 'on-demand', order: str | Sequence[Any] | None = None,
                limit: int | None = None, storage: float | None = None, no_default: bool = False) -> list[Offer]:
            "Search GPU offers with the newer service."; ...
        def search_templates(self, query: str | dict[str, Any] | None = None) -> list[Template]:
            "Search templates to start instances from."; ...
        def show_template(self, id: str) -> Template: "Show one template in full."; ...
        def create_instance(self, id: int, image: str | None = None, disk: float = 10,
                env: str | dict[str, str] | None = None, price: float | None = None, label: str | None = None,
                extra: str | dict[str, Any] | None = None, onstart_cmd: str | None = None, login: str | None = None,
                python_utf8: bool = False, lang_utf8: bool = False, jupyter_lab: bool = False,
                jupyter_dir: str | None = None, force: bool = False, cancel_unavail: bool = False,
                template_hash: str | None = None, user: str | None = None, runtype: str | None = None,
                args: Sequence[str] | None = None, volume_info: dict[str, Any] | None = None,
                bid_price: float | None = None, ssh: bool = False, jupyter: bool = False, direct: bool = False,
                create_volume: int | None = None, link_volume: int | None = None, volume_size: float | None = None,
                mount_path: str | None = None, volume_label: str | None = None,
                target_state: Literal['running', 'stopped'] | None = None, vm: bool = False,
                args_str: str | None = None, wait: bool = False, max_wait: float = 600, confirm: bool = False,
                max_hours: float | None = None) -> CreatedInstance:
            "Rent an offer as a new instance."; ...
        def create_instances(self, ids: Sequence[int], image: str | None = None, disk: float = 10,
                env: str | dict[str, str] | None = None, price: float | None = None, label: str | None = None,
                extra: str | dict[str, Any] | None = None, onstart_cmd: str | None = None, login: str | None = None,
                python_utf8: bool = False, lang_utf8: bool = False, jupyter_lab: bool = False,
                jupyter_dir: str | None = None, force: bool = False, cancel_unavail: bool = False,
                template_hash: str | None = None, user: str | None = None, runtype: str | None = None,
                args: Sequence[str] | None = None, volume_info: dict[str, Any] | None = None,
                bid_price: float | None = None, ssh: bool = False, jupyter: bool = False, direct: bool = False,
                create_volume: int | None = None, link_volume: int | None = None, volume_size: float | None = None,
                mount_path: str | None = None, volume_label: str | None = None,
                target_state: Literal['running', 'stopped'] | None = None, vm: bool = False,
                args_str: str | None = None, max_hours: float | None = None) -> dict[str, Any]:
            "Rent several offers with the same options."; ...
        def launch_instance(self, gpu_name: str | None = None, num_gpus: str | None = None, image: str | None = None,
                region: str | None = None, disk: float = 10, order: str | Sequence[Any] | None = None,
                limit: int | None = None, env: str | dict[str, str] | None = None, label: str | None = None,
                extra: str | dict[str, Any] | None = None, onstart_cmd: str | None = None, login: str | None = None,
                python_utf8: bool = False, lang_utf8: bool = False, jupyter_lab: bool = False,
                jupyter_dir: str | None = None, cancel_unavail: bool = False, template_hash: str | None = None,
                runtype: str | None = None, args: Sequence[str] | None = None,
                query: str | dict[str, Any] | None = None, ssh: bool = False, jupyter: bool = False,
                direct: bool = False, max_price: float | None = None, max_hours: float | None = None,
                spot: bool | None = None, bid: float | None = None, bid_over: float | None = None,
                tries: int | None = None, start_timeout: float | None = None,
                exclude_machine: Sequence[int] | None = None, wait: bool = False, max_wait: float = 600,
                confirm: bool = False) -> CreatedInstance:
            "Find the best offer and rent it."; ...
        def run(self, image: str, command: Sequence[str], gpu: str | None = None, query: str | None = None,
                order: str | Sequence[Any] | None = None, max_price: float | None = None,
                max_hours: float | None = None, spot: bool | None = None, bid: float | None = None,
                bid_over: float | None = None, tries: int | None = None, start_timeout: float | None = None,
                exclude_machine: Sequence[int] | None = None, disk: float = 10,
                env: str | dict[str, str] | None = None, login: str | None = None, label: str | None = None,
                upload: Sequence[str] | None = None, download: Sequence[str] | None = None, keep: bool = False,
                identity: str | None = None) -> dict[str, Any]:
            "Run a command on a rented machine."; ...
        def show_instances(self, status: Sequence[str] | None = None, label: Sequence[str] | None = None,
                gpu_name: Sequence[str] | None = None, verification: Sequence[Literal['verified', 'unverified',
                'deverified']] | None = None, order_by: Sequence[str] | None = None, limit: int | None = None,
                next_token: str | None = None, all: bool = False) -> list[Instance]:
            "List your instances."; ...
        def show_instances_v1(self, params: dict[str, Any] | None = None) -> dict[str, Any]:
            "Get one page of instances as received."; ...
        def show_instance_filters(self) -> list[dict[str, Any]]:
            "List the states, models and verifications in use."; ...
        def show_instance(self, id: int) -> Instance | Any: "Show one instance in full."; ...
        def start_instance(self, id: int, wait: bool = False, max_wait: float = 600) -> dict[str, Any]:
            "Start a stopped instance."; ...
        def stop_instance(self, id: int, wait: bool = False, max_wait: float = 600) -> dict[str, Any]:
            "Stop an instance; its disk is still billed."; ...
        def destroy_instance(self, id: int, wait: bool = False, max_wait: float = 600) -> dict[str, Any]:
            "Destroy an instance and delete its data."; ...
        def start_instances(self, ids: Sequence[int]) -> dict[str, Any]: "Start several stopped instances."; ...
        def stop_instances(self, ids: Sequence[int]) -> dict[str, Any]:
            "Stop several instances; disks are still billed."; ...
        def destroy_instances(self, ids: Sequence[int]) -> dict[str, Any]:
            "Destroy several instances and delete their data."; ...
        def reboot_instance(self, id: int, wait: bool = False, max_wait: float = 600, schedule: Literal['HOURLY',
                'DAILY', 'WEEKLY'] | None = None, start_date: str | float | None = None,
                end_date: str | float | None = None, day: str = '0', hour: str = '0') -> dict[str, Any]:
            "Restart the container and keep its GPU."; ...
        def recycle_instance(self, id: int, wait: bool = False, max_wait: float = 600) -> dict[str, Any]:
            "Recreate the container and keep its GPU."; ...
        def label_instance(self, id: int, label: str) -> dict[str, Any]: "Set or clear an instance's label."; ...
        def update_instance(self, id: int, template_id: int | None = None, template_hash_id: str | None = None,
                image: str | None = None, args: Sequence[str] | None = None, env: str | dict[str, str] | None = None,
                onstart: str | None = None) -> dict[str, Any]:
            "Change an instance's template, image or startup."; ...
        def prepay_instance(self, id: int, amount: float) -> dict[str, Any]:
            "Prepay a reserved instance for a discount."; ...
        def change_bid(self, id: int, price: float | None = None, schedule: Literal['HOURLY', 'DAILY',
                'WEEKLY'] | None = None, start_date: str | float | None = None, end_date: str | float | None = None,
                day: str = '0', hour: str = '0') -> dict[str, Any]:
            "Change the bid of an interruptible instance."; ...
        def execute(self, id: int, command: str, max_wait: float = 60, schedule: Literal['HOURLY', 'DAILY',
                'WEEKLY'] | None = None, start_date: str | float | None = None, end_date: str | float | None = None,
                day: str = '0', hour: str = '0') -> str:
            "Run ls, rm or du on an instance."; ...
        def logs(self, instance_id: int, tail: int | str | None = None, filter: str | None = None,
                daemon_logs: bool = False, max_wait: float = 60) -> str:
            "Print an instance's logs."; ...
        def wait_instance(self, id: int, status: Literal['running', 'loading', 'exited', 'destroyed'] = 'running',
                max_wait: float = 600, poll: float = 5) -> Instance:
            "Wait until an instance reaches a state."; ...
        def ssh_url(self, id: int) -> str: "Print an instance's ssh:// address."; ...
        def scp_url(self, id: int) -> str: "Print an instance's scp:// address."; ...
        def create_template(self, name: str | None = None, image: str | None = None, image_tag: str | None = None,
                href: str | None = None, repo: str | None = None, login: str | None = None, env: str | None = None,
                ssh: bool = False, jupyter: bool = False, direct: bool = False, jupyter_dir: str | None = None,
                jupyter_lab: bool = False, onstart_cmd: str | None = None, search_params: str | None = None,
                no_default: bool = False, disk_space: float | None = None, readme: str | None = None,
                hide_readme: bool = False, desc: str | None = None, public: bool = False, runtype: str | None = None,
                use_ssh: bool | None = None, jup_direct: bool | None = None, ssh_direct: bool | None = None,
                use_jupyter_lab: bool | None = None, docker_login_repo: str | None = None,
                extra_filters: dict[str, Any] | None = None, readme_visible: bool | None = None,
                private: bool | None = None, docker_login_user: str | None = None,
                docker_login_pass: str | None = None, args_str: str | None = None, volume_info: dict[str,
                Any] | None = None) -> dict[str, Any]:
            "Save an image with options as a template."; ...
        def update_template(self, hash_id: str, name: str | None = None, image: str | None = None,
                image_tag: str | None = None, href: str | None = None, repo: str | None = None,
                login: str | None = None, env: str | None = None, ssh: bool = False, jupyter: bool = False,
                direct: bool = False, jupyter_dir: str | None = None, jupyter_lab: bool = False,
                onstart_cmd: str | None = None, search_params: str | None = None, no_default: bool = False,
                disk_space: float | None = None, readme: str | None = None, hide_readme: bool = False,
                desc: str | None = None, public: bool = False, runtype: str | None = None, use_ssh: bool | None = None,
                jup_direct: bool | None = None, ssh_direct: bool | None = None, use_jupyter_lab: bool | None = None,
                docker_login_repo: str | None = None, extra_filters: dict[str, Any] | None = None,
                readme_visible: bool | None = None, private: bool | None = None, docker_login_user: str | None = None,
                docker_login_pass: str | None = None, args_str: str | None = None, volume_info: dict[str,
                Any] | None = None) -> dict[str, Any]:
            "Replace a template; its hash changes."; ...
        def delete_template(self, template_id: int | None = None, hash_id: str | None = None) -> dict[str, Any]:
            "Delete one of your templates."; ...
        def search_volumes(self, query: str | dict[str, Any] | None = None, order: str | Sequence[Any] = 'score-',
                limit: int | None = None, storage: float = 1.0, no_default: bool = False) -> list[dict[str, Any]]:
            "Search volume offers on single machines."; ...
        def search_network_volumes(self, query: str | dict[str, Any] | None = None,
                order: str | Sequence[Any] = 'score-', limit: int | None = None, storage: float = 1.0,
                no_default: bool = False) -> list[dict[str, Any]]:
            "Search network volume offers in clusters."; ...
        def show_volumes(self, type: Literal['all', 'local', 'network'] = 'all') -> list[Volume]:
            "List your volumes."; ...
        def create_volume(self, id: int, size: float = 15, name: str | None = None) -> dict[str, Any]:
            "Rent a volume on one machine."; ...
        def create_network_volume(self, id: int, size: float = 15, name: str | None = None) -> dict[str, Any]:
            "Rent a network volume in a cluster."; ...
        def clone_volume(self, source: int, dest: int, size: float | None = None,
                disable_compression: bool = False) -> dict[str, Any]:
            "Rent a volume and copy another into it."; ...
        def delete_volume(self, id: int) -> dict[str, Any]: "Delete an unused volume and its data."; ...
        def list_volume(self, id: int, size: float = 15, price_disk: float = 0.1,
                end_date: str | float | None = None) -> dict[str, Any]:
            "Offer a machine's disk space as volumes."; ...
        def list_volumes(self, ids: Sequence[int], size: float = 15, price_disk: float = 0.1,
                end_date: str | float | None = None) -> dict[str, Any]:
            "Offer several machines' disk space as volumes."; ...
        def unlist_volume(self, id: int) -> dict[str, Any]: "Stop offering a volume."; ...
        def list_network_volume(self, disk_id: int, price_disk: float = 0.15, size: float = 15,
                end_date: str | float | None = None) -> dict[str, Any]:
            "Offer space on a network disk."; ...
        def unlist_network_volume(self, id: int) -> dict[str, Any]: "Stop offering a network volume."; ...
        def show_network_disks(self) -> dict[str, Any]: "List your clusters' network disks and mounts."; ...
        def add_network_disk(self, machines: Sequence[int], mount_point: str,
                disk_id: int | None = None) -> dict[str, Any]:
            "Attach a network disk to cluster machines."; ...
        def copy(self, src: str, dst: str) -> dict[str, Any]: "Copy files to, from and between instances."; ...
        def cancel_copy(self, dst_id: int | str) -> dict[str, Any]: "Cancel all copies to an instance."; ...
        def cancel_sync(self, dst_id: int | str) -> dict[str, Any]: "Cancel all cloud copies to an instance."; ...
        def cloud_copy(self, src: str, dst: str = '/workspace', instance: int | str | None = None,
                connection: int | str | None = None, transfer: str = 'Instance to Cloud', dry_run: bool = False,
                size_only: bool = False, ignore_existing: bool = False, update: bool = False,
                delete_excluded: bool = False, flags: Sequence[str] | None = None, schedule: Literal['HOURLY', 'DAILY',
                'WEEKLY'] | None = None, start_date: str | float | None = None, end_date: str | float | None = None,
                day: str = '0', hour: str = '0') -> dict[str, Any]:
            "Copy between an instance and cloud storage."; ...
        def show_connections(self) -> list[dict[str, Any]]: "List your cloud storage connections."; ...
        def take_snapshot(self, instance_id: int | str, repo: str | None = None, container_registry: str = 'docker.io',
                docker_login_user: str | None = None, docker_login_pass: str | None = None,
                pause: bool = True) -> dict[str, Any]:
            "Push a container snapshot to a registry."; ...
        def show_instance_backups(self, contract_id: int | None = None) -> list[dict[str, Any]]:
            "List backups of your instances and volumes."; ...
        def show_instance_backup_files(self, contract_id: int) -> dict[str, Any]:
            "List a backup's files and their URLs."; ...
        instance_backup_files = show_instance_backup_files
        def show_deployments(self) -> list[dict[str, Any]]: "List your serverless deployments."; ...
        def show_deployment(self, id: int) -> dict[str, Any] | Any: "Show one deployment in full."; ...
        def show_deployment_versions(self, id: int) -> list[dict[str, Any]]: "List the versions of a deployment."; ...
        def start_deployment(self, id: int) -> dict[str, Any]: "Start a stopped deployment."; ...
        def stop_deployment(self, id: int) -> dict[str, Any]: "Stop a deployment; it can be restarted."; ...
        def delete_deployment(self, id: int | None = None, name: str | None = None,
                tag: str | None = None) -> dict[str, Any]:
            "Delete deployments by id or by name."; ...
        def show_pending_price_increases(self) -> dict[str, Any]: "List price increases that hosts ask for."; ...
        def accept_price_increase(self, instance_id: int) -> dict[str, Any]:
            "Accept a higher price to extend the rental."; ...
        def reject_price_increase(self, instance_id: int) -> dict[str, Any]:
            "Reject a higher price; the end date stays."; ...
        def search_benchmarks(self, query: str | dict[str, Any] | None = None,
                order: str | Sequence[Any] | None = None, limit: int | None = None, after_token: str | None = None,
                all_pages: bool = False) -> list[dict[str, Any]]:
            "Search benchmark results."; ...
        def search_benchmarks_v1(self, params: dict[str, Any] | None = None) -> dict[str, Any]:
            "Get one page of benchmarks as received."; ...
        def show_gpu_metrics(self, verified: Literal['true', 'false', 'all'] = 'all',
                datacenter: Literal['true', 'false', 'all'] = 'all', num_gpus: Literal['all', '1', '2', '4', '8',
                'other'] = 'all') -> dict[str, Any]:
            "Show GPU supply, use and prices."; ...
        def show_gpu_trends(self, name: str = 'RTX 5090,RTX 4090,RTX 3090',
                verified: Literal['true', 'false', 'all'] = 'all', datacenter: Literal['true', 'false', 'all'] = 'all',
                num_gpus: Literal['all', '1', '2', '4', '8', 'other'] = 'all', start: str | float | None = None,
                end: str | float | None = None, step: int | None = None) -> dict[str, Any]:
            "Show GPU supply and prices over time."; ...
        def show_gpu_locations(self, verified: Literal['true', 'false', 'all'] = 'all',
                datacenter: Literal['true', 'false', 'all'] = 'all', rented: Literal['true', 'false', 'all'] = 'all',
                state: Literal['all', 'rented', 'available', 'unavailable'] = 'all',
                gpu: str | None = None) -> dict[str, Any]:
            "List where the GPUs are."; ...
        def set_api_key(self, api_key: str | None = None) -> None: "Save your API key to a file."; ...
        def show_ssh_keys(self) -> list[dict[str, Any]]: "List your account's SSH keys."; ...
        def create_ssh_key(self, ssh_key: str | None = None, name: str | None = None) -> dict[str, Any]:
            "Add an SSH key to your account."; ...
        def attach_ssh(self, instance_id: int, ssh_key: str) -> dict[str, Any]: "Add an SSH key to an instance."; ...
        def show_instance_ssh_keys(self, id: int) -> list[dict[str, Any]]: "List an instance's SSH keys."; ...
        def detach_ssh(self, instance_id: int, ssh_key_id: int) -> dict[str, Any]:
            "Remove an SSH key from an instance."; ...
        def update_ssh_key(self, id: int, ssh_key: str) -> dict[str, Any]: "Replace one of your SSH keys."; ...
        def delete_ssh_key(self, id: int) -> dict[str, Any]: "Delete an SSH key from your account."; ...
        def show_api_keys(self) -> list[dict[str, Any]]: "List your API keys."; ...
        def show_api_key(self, id: int) -> dict[str, Any]: "Show one API key's name and permissions."; ...
        def create_api_key(self, name: str, permissions: dict[str, Any] | str | None = None,
                key_params: str | dict[str, Any] | None = None) -> dict[str, Any]:
            "Create an API key with limited permissions."; ...
        def delete_api_key(self, id: int) -> dict[str, Any]: "Revoke an API key."; ...
        def reset_api_key(self) -> dict[str, Any]: "Replace your main API key, revoking the old."; ...
        def set_role(self, role: Literal['host', 'client']) -> None: "Choose which commands --help lists."; ...
        def show_env_vars(self, show_values: bool = False) -> dict[str, Any] | Any:
            "List environment variables set in your instances."; ...
        def create_env_var(self, name: str, value: str) -> dict[str, Any]:
            "Add an environment variable for your instances."; ...
        def update_env_var(self, name: str, value: str) -> dict[str, Any]: "Change an environment variable."; ...
        def delete_env_var(self, name: str) -> dict[str, Any]: "Delete an environment variable."; ...
        def tfa_login(self, code: str | None = None, backup_code: str | None = None,
                method_type: Literal['email', 'sms', 'totp'] | None = None, secret: str | None = None,
                method_id: int | str | None = None) -> dict[str, Any]:
            "Start a 2FA session on this computer."; ...
        def tfa_logout(self) -> dict[str, Any]: "End the 2FA session on this computer."; ...
        def tfa_status(self) -> dict[str, Any]: "Show your 2FA methods and remaining backup codes."; ...
        def tfa_auth_new(self, code: str | None = None, secret: str | None = None, backup_code: str | None = None,
                method_type: Literal['email', 'sms', 'totp'] | None = None,
                method_id: int | str | None = None) -> dict[str, Any]:
            "Prove your identity before adding a method."; ...
        def tfa_totp_setup(self) -> dict[str, Any]: "Get a secret for an authenticator app."; ...
        def tfa_send_sms(self, phone_number: str | None = None) -> dict[str, Any]: "Send a code by SMS."; ...
        def tfa_resend_sms(self, secret: str, phone_number: str | None = None) -> dict[str, Any]:
            "Send the SMS code again."; ...
        def tfa_send_email(self) -> dict[str, Any]: "Send a code by email."; ...
        def tfa_activate(self, code: str, secret: str, method_type: Literal['sms', 'totp'] = 'totp',
                phone_number: str | None = None, label: str | None = None,
                method_id: int | str | None = None) -> dict[str, Any]:
            "Add a method using its first code."; ...
        def tfa_update(self, method_id: int, label: str | None = None,
                set_primary: bool | None = None) -> dict[str, Any]:
            "Rename a method or make it primary."; ...
        def tfa_delete(self, code: str | None = None, backup_code: str | None = None,
                method_type: Literal['email', 'sms', 'totp'] | None = None, secret: str | None = None,
                method_id: int | str | None = None, id_to_delete: int | None = None) -> dict[str, Any]:
            "Delete a 2FA method."; ...
        def tfa_regen_codes(self, code: str | None = None, backup_code: str | None = None,
                method_type: Literal['email', 'sms', 'totp'] | None = None, secret: str | None = None,
                method_id: int | str | None = None) -> dict[str, Any]:
            "Replace your backup codes."; ...
        def create_team(self, team_name: str, transfer_credit: float = 0) -> dict[str, Any]:
            "Turn your account into a team."; ...
        def destroy_team(self) -> dict[str, Any]: "Destroy your team."; ...
        def show_members(self) -> list[dict[str, Any]]: "List your team's members."; ...
        show_team_members = show_members
        def invite_member(self, email: str, role: str) -> dict[str, Any]: "Invite someone to your team by email."; ...
        invite_team_member = invite_member
        def remove_member(self, id: int) -> dict[str, Any]: "Remove someone from your team."; ...
        remove_team_member = remove_member
        def show_team_roles(self) -> list[dict[str, Any]]: "List your team's roles and permissions."; ...
        def show_team_role(self, name: str) -> dict[str, Any]: "Show one role and its permissions."; ...
        def create_team_role(self, name: str, permissions: dict[str, Any] | str) -> dict[str, Any]:
            "Create a team role."; ...
        def update_team_role(self, id: int, name: str | None = None, permissions: dict[str,
                Any] | str | None = None) -> dict[str, Any]:
            "Rename a role or change its permissions."; ...
        def remove_team_role(self, name: str) -> dict[str, Any]: "Remove a team role."; ...
        def show_machines(self) -> list[Machine]: "List your machines."; ...
        def show_machine(self, id: int) -> Machine: "Show one of your machines."; ...
        def list_machine(self, id: int, price_gpu: float | None = None, price_disk: float | None = None,
                price_inetu: float | None = None, price_inetd: float | None = None, price_min_bid: float | None = None,
                min_chunk: int = 1, end_date: str | float | None = None, discount_rate: float | None = None,
                duration: str | None = None, vol_size: int | None = None,
                vol_price: float | None = None) -> dict[str, Any]:
            "Offer a machine or change its prices."; ...
        def list_machines(self, ids: Sequence[int], price_gpu: float | None = None, price_disk: float | None = None,
                price_inetu: float | None = None, price_inetd: float | None = None, price_min_bid: float | None = None,
                min_chunk: int = 1, end_date: str | float | None = None, discount_rate: float | None = None,
                duration: str | None = None, vol_size: int | None = None,
                vol_price: float | None = None) -> list[dict[str, Any]]:
            "Offer several machines on the same terms."; ...
        def unlist_machine(self, id: int) -> dict[str, Any]: "Stop offering a machine; current rentals continue."; ...
        def delete_machine(self, id: int) -> dict[str, Any]: "Delete a machine that nobody rents."; ...
        def cleanup_machine(self, id: int) -> dict[str, Any]: "Delete expired storage on a machine."; ...
        def defrag_machines(self, ids: Sequence[int]) -> dict[str, Any]: "Regroup GPUs into larger offers."; ...
        def set_min_bid(self, id: int, price: float | None = None) -> dict[str, Any]:
            "Set the lowest bid for a machine's GPUs."; ...
        def set_defjob(self, id: int, price_gpu: float | None = None, price_inetu: float | None = None,
                price_inetd: float | None = None, image: str | None = None,
                args: Sequence[str] | None = None) -> dict[str, Any]:
            "Set what a machine runs while unrented."; ...
        def remove_defjob(self, id: int) -> dict[str, Any]: "Remove a machine's default job."; ...
        def show_maints(self, ids: Sequence[int]) -> list[dict[str, Any]]:
            "List your machines' maintenance windows."; ...
        def schedule_maint(self, id: int, sdate: str | float, duration: float,
                category: str = 'not provided') -> dict[str, Any]:
            "Announce maintenance to a machine's renters."; ...
        def cancel_maint(self, id: int) -> dict[str, Any]: "Cancel a machine's maintenance."; ...
        def reports(self, id: int) -> list[dict[str, Any]]: "List problems users reported about a machine."; ...
        def show_clusters(self) -> dict[str, Any]: "List your clusters of machines."; ...
        def create_cluster(self, subnet: str, manager_id: int) -> dict[str, Any]: "Create a cluster of machines."; ...
        def delete_cluster(self, cluster_id: int) -> dict[str, Any]: "Delete a cluster."; ...
        def join_cluster(self, cluster_id: int, machine_ids: Sequence[int]) -> dict[str, Any]:
            "Add machines to a cluster."; ...
        def remove_machine_from_cluster(self, cluster_id: int, machine_id: int,
                new_manager_id: int | None = None) -> dict[str, Any]:
            "Remove a machine from its cluster."; ...
        def show_overlays(self) -> list[dict[str, Any]]: "List your overlay networks."; ...
        def create_overlay(self, cluster_id: int, name: str) -> dict[str, Any]:
            "Create an overlay network on a cluster."; ...
        def join_overlay(self, name: str, instance_id: int) -> dict[str, Any]:
            "Add an instance to an overlay network."; ...
        def delete_overlay(self, overlay_identifier: str) -> dict[str, Any]:
            "Delete an overlay network and its instances."; ...
        def show_user(self) -> User: "Show your account and its credit."; ...
        def cost(self) -> Cost: "Show running costs and how long credit lasts."; ...
        def show_audit_logs(self) -> list[dict[str, Any]]: "List what was done with your account."; ...
        def set_user(self, params: dict[str, Any] | str) -> dict[str, Any]: "Change your account's details."; ...
        def show_subaccounts(self) -> list[dict[str, Any]]: "List your subaccounts."; ...
        def create_subaccount(self, email: str, username: str, password: str,
                type: str | None = None) -> dict[str, Any]:
            "Create a subaccount."; ...
        def show_ipaddrs(self) -> list[dict[str, Any]]: "List IP addresses that used your account."; ...
        def show_invoices(self, start_date: str | float | None = None, end_date: str | float | None = None,
                only_charges: bool = False, only_credits: bool = False, pdf: str | None = None) -> dict[str, Any]:
            "List charges and payments, item by item."; ...
        def show_invoices_v1(self, charges: bool = False, start_date: str | float | None = None,
                end_date: str | float | None = None, limit: int = 20, next_token: str | None = None,
                latest_first: bool = False, charge_type: Sequence[Literal['instance', 'volume', 'serverless', 'i', 'v',
                's']] | None = None, format: Literal['table', 'tree'] = 'table',
                invoice_type: Sequence[Literal['transfers', 'stripe', 'bitpay', 'coinbase', 'crypto.com', 'reserved',
                'payout_paypal', 'payout_wise']] | None = None, pdf: str | None = None) -> dict[str, Any]:
            "List invoices or charges, page by page."; ...
        def generate_pdf_invoices(self, start_date: str | float | None = None, end_date: str | float | None = None,
                only_charges: bool = False, only_credits: bool = False, pdf: str | None = None) -> str:
            "Write a period's items to a PDF."; ...
        def search_invoices(self, query: str | dict[str, Any] | None = None) -> list[Invoice]:
            "Search your invoices."; ...
        def show_earnings(self, start_date: str | float | None = None, end_date: str | float | None = None,
                machine_id: int | None = None, last_days: int | None = None,
                user_id: int | str = 'me') -> dict[str, Any]:
            "Show what your machines have earned."; ...
        def show_deposit(self, id: int) -> dict[str, Any]: "Show a reserved instance's deposit and discount."; ...
        def transfer_credit(self, recipient: str, amount: float) -> dict[str, Any]:
            "Transfer credit to another account, permanently."; ...
        def fetch_contracts(self, label: str | None = None,
                contract_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
            "Get contracts by label and id."; ...
        def show_scheduled_jobs(self) -> list[dict[str, Any]]: "List your scheduled jobs."; ...
        def delete_scheduled_job(self, id: int) -> dict[str, Any]: "Delete a scheduled job."; ...
        def create_scheduled_job(self, start_time: str | float, end_time: str | float, api_endpoint: str,
                request_method: str, request_body: dict[str, Any], frequency: str, instance_id: int | str,
                day_of_the_week: int | None = None, hour_of_the_day: int | None = None) -> dict[str, Any]:
            "Schedule a request to be repeated."; ...
        def update_scheduled_job(self, id: int, request_body: dict[str, Any], start_time: str | float | None = None,
                end_time: str | float | None = None, api_endpoint: str | None = None,
                request_method: str | None = None, frequency: str | None = None, instance_id: int | str | None = None,
                day_of_the_week: int | None = None, hour_of_the_day: int | None = None) -> dict[str, Any]:
            "Change a scheduled job."; ...
        def show_endpoints(self) -> list[EndpointRow]: "List your serverless endpoints."; ...
        def create_endpoint(self, min_load: float = 0.0, min_cold_load: float = 0.0, target_util: float = 0.9,
                cold_mult: float = 2.5, cold_workers: int = 5, max_workers: int = 20, endpoint_name: str | None = None,
                max_queue_time: float | None = None, target_queue_time: float | None = None,
                inactivity_timeout: int | None = None, auto_instance: str = 'prod') -> dict[str, Any]:
            "Create a serverless endpoint."; ...
        def update_endpoint(self, id: int, min_load: float | None = None, min_cold_load: float | None = None,
                target_util: float | None = None, cold_mult: float | None = None, cold_workers: int | None = None,
                max_workers: int | None = None, endpoint_name: str | None = None, max_queue_time: float | None = None,
                target_queue_time: float | None = None, inactivity_timeout: int | None = None,
                auto_instance: str = 'prod', endpoint_state: Literal['active', 'suspended',
                'stopped'] | None = None) -> dict[str, Any]:
            "Change a serverless endpoint."; ...
        def delete_endpoint(self, id: int) -> dict[str, Any]: "Delete an endpoint and its workergroups."; ...
        def get_endpt_logs(self, id: int | None = None, level: Literal[0, 1, 2, 3] = 1, tail: int | None = None,
                endpoint: str | None = None) -> dict[str, Any]:
            "Print an endpoint's logs."; ...
        def get_endpt_workers(self, id: int) -> list[dict[str, Any]]: "List an endpoint's workers."; ...
        get_endpoint_workers = get_endpt_workers
        def show_workergroups(self) -> list[Workergroup]: "List your endpoints' workergroups."; ...
        show_autogroups = show_workergroups
        show_autoscalers = show_workergroups
        def create_workergroup(self, template_hash: str | None = None, template_id: int | None = None,
                search_params: str | None = None, launch_args: str | None = None, endpoint_name: str | None = None,
                endpoint_id: int | None = None, gpu_ram: float | None = None, no_default: bool = False,
                min_load: float | None = None, target_util: float | None = None, cold_mult: float | None = None,
                cold_workers: int | None = None, max_workers: int | None = None, test_workers: int | None = None,
                auto_instance: str = 'prod') -> dict[str, Any]:
            "Create a workergroup for an endpoint."; ...
        create_autogroup = create_workergroup
        create_autoscaler = create_workergroup
        def update_workergroup(self, id: int, template_hash: str | None = None, template_id: int | None = None,
                search_params: str | None = None, launch_args: str | None = None, endpoint_name: str | None = None,
                endpoint_id: int | None = None, gpu_ram: float | None = None, no_default: bool = False,
                min_load: float | None = None, target_util: float | None = None, cold_mult: float | None = None,
                cold_workers: int | None = None, max_workers: int | None = None,
                test_workers: int | None = None) -> dict[str, Any]:
            "Change a workergroup."; ...
        update_autogroup = update_workergroup
        update_autoscaler = update_workergroup
        def delete_workergroup(self, id: int) -> dict[str, Any]: "Delete a workergroup; its instances stay."; ...
        delete_autogroup = delete_workergroup
        delete_autoscaler = delete_workergroup
        def get_wrkgrp_logs(self, id: int, level: Literal[0, 1, 2, 3] = 1, tail: int | None = None) -> dict[str, Any]:
            "Print a workergroup's logs."; ...
        def get_wrkgrp_workers(self, id: int) -> list[dict[str, Any]]: "List a workergroup's workers."; ...
        get_workergroup_workers = get_wrkgrp_workers
        def update_workers(self, id: int, cancel: bool = False) -> dict[str, Any]:
            "Update a workergroup's workers one by one."; ...
        def route(self, endpoint: str, cost: float) -> dict[str, Any]: "Get the address of a free worker."; ...
        def request(self, endpoint: str, route: str, payload: dict[str, Any] | None = None, cost: float = 100,
                stream: bool = False, timeout: float | None = None, worker_timeout: float = 600.0, retry: bool = True,
                max_retries: int | None = None) -> Any:
            "Send a request to an endpoint's worker."; ...
        def show_notification_types(self) -> list[dict[str, Any]]: "List the kinds of notifications."; ...
        def show_notifications(self, user_id: int | None = None) -> dict[str, Any] | Any:
            "Show which notifications you get."; ...
        def set_notifications(self, notification_preferences: dict[str, Any],
                user_id: int | None = None) -> dict[str, Any] | Any:
            "Replace your notification choices."; ...
        def show_webhooks(self) -> list[dict[str, Any]]: "List your webhooks."; ...
        def create_webhook(self, webhook_url: str, event_types: Sequence[str],
                name: str | None = None) -> dict[str, Any]:
            "Create a webhook for notifications."; ...
        def update_webhook(self, id: int, webhook_url: str | None = None, event_types: Sequence[str] | None = None,
                name: str | None = None) -> dict[str, Any]:
            "Change a webhook."; ...
        def delete_webhook(self, id: int) -> dict[str, Any]: "Delete a webhook."; ...
        def rotate_webhook_secret(self, id: int) -> dict[str, Any]: "Replace a webhook's signing secret."; ...
        def test_webhook(self, id: int) -> dict[str, Any]: "Send a test to a webhook."; ...
        def self_test_machine(self, machine_id: int | str, debugging: bool = False, ignore_requirements: bool = False,
                test_image: str | None = None, support_bundle_dir: str | None = None,
                no_support_bundle: bool = False) -> dict[str, Any]:
            "Rent your machine and test it."; ...
        def dump_logs(self, machine_id: int | str, instance_id: int | None = None, output_dir: str = '/tmp',
                include_local_host_artifacts: bool = False) -> dict[str, Any]:
            "Pack diagnostics for Vast.ai support."; ...
        def run_benchmarks(self, template_hash: str | None = None, template_id: int | None = None,
                gpus: Sequence[str] | None = None, num_gpus: int | None = None, timeout: float = 1800,
                no_cache: bool = False, auto_instance: str | None = None,
                autoscaler_url: str | None = None) -> list[dict[str, Any]]:
            "Benchmark a template on several GPUs."; ...
    # stubs: end
    # fmt: on


def checked(name: str, kind: Kind, value: Any) -> Any:
    """A value of a constructor as its kind has it.  Raises UsageError."""
    try:
        return kind.convert(value)
    except (ValueError, TypeError, AttributeError):
        raise UsageError(f"{name}: expected {kind.expects}, not {short_repr(value)}") from None


def checked_url(url: str) -> str:
    """A server URL without its final slash and /api/v0.  Raises UsageError, which does not show
    what may be a password.
    """
    from urllib.parse import urlsplit

    wanted = f"the server must be a URL such as {SERVER}"
    text = str(url)
    if not set("@?#").isdisjoint(text):
        raise UsageError(f"{wanted}, without a user, a password or a query")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        good = good and url.isascii() and url.isprintable() and " " not in url
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good:
        raise UsageError(f"{wanted}, not {short_repr(url)}")
    base, _, version = url.rstrip("/").rpartition("/api/")
    return (base if version in ("v0", "v1") else url).rstrip("/")


for method, command in METHODS.items():
    setattr(VastAI, method, Method(method, command))
del method, command


# ------------------------------------------------------------------------- the official SDK's names


def other_name(name: str) -> Any:
    """`from vastai import vastai_sdk`, `vastai.api.query.offers_fields`, the row types, which are
    dicts, and ServerlessRequest, whose base is expensive to load.
    """
    if name == "offers_fields":
        return {field for field, _ in field_help(OFFER_FIELDS)}
    if name in OFFICIAL_MODULES.replace(".", " ").split():
        return sys.modules[__name__]
    if name in {row.of for row in COMMANDS.values() if row.of}:
        return dict
    if name == "ServerlessRequest":
        return make_request_class()
    if name in OFFICIAL_ONLY and is_import(sys._getframe(1)):
        raise ImportError(f"cannot import {name!r}: {OFFICIAL_ONLY[name]}", name=__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_import(frame: Any) -> bool:
    """Is a frame in the middle of `from … import …`?  Other questions, such as hasattr(), need an
    AttributeError.
    """
    from opcode import opname

    name: str = opname[frame.f_code.co_code[frame.f_lasti]]
    return name == "IMPORT_FROM"


_WORKER_SIDE = (
    "this module is the client's side of serverless. Workers run the official package, which the "
    "service's start script installs there"
)
OFFICIAL_ONLY = {
    **dict.fromkeys(
        ("Worker", "WorkerConfig", "HandlerConfig", "LogActionConfig", "BenchmarkConfig"),
        _WORKER_SIDE,
    ),
    "Deployment": f"{_WORKER_SIDE}; deploy from an environment that has it: pip install vastai",
    "SyncClient": "use VastAI, which has the same calls: search_offers, create_instance, …",
    "AsyncClient": "use VastAI in a thread (asyncio.to_thread), and Serverless for endpoints",
}
OFFICIAL_MODULES = """\
sdk vastai_sdk utils api api.query cli cli.main data data.endpoint data.workergroup
serverless serverless.client serverless.client.client serverless.client.endpoint
serverless.client.managed serverless.client.request_status serverless.client.session
serverless.client.worker"""

# not by its name: type checkers would take every misspelled name for good
globals()["__getattr__"] = other_name
offers_alias = ALIASES  # in `vastai.api.query`, as the next one
offers_mult = MULTIPLIERS
if __name__ == "vastai":  # the official package's modules: this one answers for them
    for module in OFFICIAL_MODULES.split():
        for package in ("vastai", "vastai_sdk"):
            sys.modules.setdefault(f"{package}.{module}", sys.modules[__name__])


# ------------------------------------------------------------------------------- results and shapes
# A command returns what the SDK returns.  Here the command line makes of it what its user asked
# for: rows, then text by one of WRITERS.


class Listing:
    """Rows on their way to stdout.

    `columns` are those of a table, `fields` the names that --fields chose, `single` says that the
    one row is a single thing rather than a list.  `hidden` are the headers that found no room.
    """

    def __init__(
        self, rows: list[Row], columns: Iterable[Any], view: View, single: bool = False
    ) -> None:
        self.rows = rows
        self.single = single
        self.bright = view.color and colored()
        names: list[str] = view.fields.split(",")
        self.fields = [name.strip() for name in names if name.strip()]
        self.columns = [(name, name, "", 0) for name in self.fields] or columns
        self.hidden: list[str] = []

    @property
    def chosen(self) -> list[Row]:
        """The rows with nothing but the fields that were asked for."""
        if not self.fields:
            return self.rows
        values = [column_values(name, self.rows) for name in self.fields]
        return [dict(zip(self.fields, found)) for found in zip(*values)]


def write_json(listing: Listing) -> str:
    rows = listing.chosen
    return format_json(rows[0] if listing.single else rows) + "\n"


def write_jsonl(listing: Listing) -> str:
    import json

    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in listing.chosen)


def write_csv(listing: Listing, delimiter: str = ",") -> str:
    """A header and a line for each row, quoted as RFC 4180 has it; objects and lists as JSON."""
    rows = listing.chosen
    names = listing.fields or sorted({name for row in rows for name in row})
    if not names:
        return ""
    special = {delimiter, '"', "\n", "\r"}
    lines = [csv_line(names, delimiter, special)]
    lines += (csv_line([row.get(name) for name in names], delimiter, special) for row in rows)
    return "".join(lines)


def csv_line(values: Sequence[Any], delimiter: str, special: set[str]) -> str:
    """One line of CSV; its fields are quoted if one of the `special` characters is in them."""
    import json

    fields = []
    for value in values:
        if isinstance(value, (dict, list)):
            value = json.dumps(value, sort_keys=True)
        text = "" if value is None else str(value)
        if not special.isdisjoint(text) or (not text and len(values) == 1):
            text = '"' + text.replace('"', '""') + '"'
        fields.append(text)
    return delimiter.join(fields) + "\n"


def write_tsv(listing: Listing) -> str:
    return write_csv(listing, "\t")


def write_table(listing: Listing) -> str:
    """A table, or a card of a single thing."""
    if listing.single:
        return format_card(listing)
    width = terminal_width() if is_terminal(sys.stdout) else None
    if not listing.rows and width is not None:
        return ""
    lines, listing.hidden = format_table(listing.rows, listing.columns, width, listing.bright)
    return "\n".join(lines) + "\n"


WRITERS: dict[str, Callable[[Listing], str]] = {  # what --format can be
    "table": write_table,
    "json": write_json,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "tsv": write_tsv,
}


def present(call: Call, result: Any) -> None:
    """Prints what a command returned, in the shape that was asked for; remarks go to stderr."""
    row = call.row
    view = call.view
    plain = not view.fields
    is_response = row.show and row.returns == "any"  # of a worker
    # What a reader asked for: a log, help, the answer of a worker.
    is_text = isinstance(result, str) or row.text or is_response
    events = view.format == "jsonl" and call["stream"]  # a line each, as they come
    show_progress("")  # the work is over
    if view.quiet and not is_text:
        write_out(format_ids(call, result))
        if row.only_copy:
            present_only_copy(call, result)
    elif row.show and plain and (view.format == "table" or events):
        row.show(call, result)
    elif isinstance(result, str):
        write_text(call, result)
    elif (result is None and not is_response) or (plain and view.format == "table"):
        present_table(call, result)
    elif plain and view.format == "json":
        document = row.document(call, result) if row.document else result
        write_out(format_json(document) + "\n")
    else:
        found = rows_of(call, result)
        rows: list[Any] = [result] if found is None else found
        listing = Listing(rows, row.columns, view, is_single(row, result))
        warn_of_fields(call, listing)
        write_out(WRITERS[view.format](listing))


def present_only_copy(call: Call, result: Any) -> None:
    """With --quiet, what is shown only once, such as a new key: not on stdout, but not held back."""
    if call.row.show:
        call.row.show(call, result)
    elif call.row.done:
        call.tell(redact_sentence(sentence(call, result), call.secrets))


def present_table(call: Call, result: Any) -> None:
    """Prints rows as a table, a single thing as a card, anything else as a text or sentence."""
    row = call.row
    if result is None:
        if call.view.format == "table" and (row.says or row.done):
            write_sentence(call, sentence(call, {}), {})
        return
    if row.text and row.returns != "text":
        write_text(call, row.text(call, result))
        write_footer(call, result)
        return
    rows = None if is_refused(row, result) else rows_of(call, result)
    hidden = []
    if row.tables and rows:
        hidden = write_tables(call, row.tables(call, result))
    elif rows is not None and (row.columns or row.columns_for or not row.says):
        columns = row.columns_for(call, rows) if row.columns_for else row.columns
        hidden = write_listing(call, Listing(rows, columns, call.view, is_single(row, result)))
    if rows is None or row.says:
        write_sentence(call, sentence(call, result), result)
    told = write_footer(call, result)
    if rows == [] and not told and not row.says:
        noun = row.name.split()[-1].replace("-", " ")
        remark(call, row.empty or f"No {noun}.")
    remark_hidden(call, hidden)


def write_tables(call: Call, tables: Tables) -> list[str]:
    """Prints (heading, rows, columns) one after the other; the headers that found no room.  In a
    pipe the headings go to stderr, and rows of the same columns stand under one line of headers.
    """
    hidden = []
    joined: dict[Columns, list[Row]] = {}  # in a pipe
    for heading, rows, columns in tables:
        if is_terminal(sys.stdout):
            if heading:
                write_out(wrap_line(heading, terminal_width()) + "\n")
            hidden += write_listing(call, Listing(rows, columns, call.view))
        else:
            if heading:
                remark(call, heading)
            joined.setdefault(columns, []).extend(rows)
    for columns, rows in joined.items():
        write_listing(call, Listing(rows, columns, call.view))
    return hidden


def write_footer(call: Call, result: Any) -> bool:
    """Prints the remarks below an answer; are there any?"""
    lines = list(call.row.footer(call, result)) if call.row.footer else []
    for text in lines:
        remark(call, text)
    return bool(lines)


def rows_of(call: Call, result: Any) -> list[Row] | None:
    """The rows of a result; None if it has none, such as a confirmation."""
    row = call.row
    if row.rows:
        rows: list[Row] = row.rows(call, result)
        return rows
    if row.member:
        return as_rows(result.get(row.member))
    if isinstance(result, list):
        return result
    return [result] if row.columns and isinstance(result, dict) else None


def is_single(row: Command, result: Any) -> bool:
    """Is the result one thing, whose only row it is itself?"""
    return isinstance(result, dict) and not row.rows and not row.member


def is_refused(row: Command, result: Any) -> bool:
    """Does the service's answer, which is the result, say that it refused?"""
    return bool(row.path) and isinstance(result, dict) and result.get("success") is False


def write_listing(call: Call, listing: Listing) -> list[str]:
    """Prints a table, through $PAGER if it is long; the headers that found no room.  The API key,
    which the service may have in a message, is masked.
    """
    page_out(redact_text(write_table(listing), call.client.secrets), call.view.full)
    return listing.hidden


def format_ids(call: Call, result: Any) -> str:
    """What --quiet prints: a line for each id of the rows, or of what the command made."""
    row = call.row
    rows = None if is_refused(row, result) else rows_of(call, result)
    if rows is not None:
        first = [column[1] for column in row.columns][:1]
        names = ["id", "metadata.invoice_id", "source", *first]
        named = [name for name in names if any(get_path(item, name) is not None for item in rows)]
        ids = [get_path(item, named[0]) for item in rows] if named else []
    else:
        made = get_path(result, row.made) if row.made else None
        ids = [] if made is None else listed(made)
    return "".join(f"{format_value(id)}\n" for id in ids)


def write_text(call: Call, text: str) -> None:
    """Prints a result that is a text; --raw prints an address alone, and what was logged or
    printed in an instance as JSON, as recorded calls have it.
    """
    if call.view.format == "json" and (call.row.text or not call.view.raw):
        write_out(format_json(str(text)) + "\n")
        return
    if call.row.text and call.row.returns == "text":
        text = call.row.text(call, text)
    write_out(text if text.endswith("\n") or not text else text + "\n", plain=True)


def sentence(call: Call, answer: Row) -> str:
    """What a command without rows says: its own sentence, the service's, or the answer itself."""
    row = call.row
    refused = is_refused(row, answer)
    if row.says and not refused:
        return str(row.says(call, answer))
    forms = row.done.split("|") if row.done and not refused else []
    for form in forms[:1] if call["schedule"] is not None else forms:  # the first is of the job
        try:
            return fill(call, form, answer)
        except (LookupError, ValueError, TypeError):  # the answer lacks what this form needs
            continue
    told = text_of(answer, "msg")
    return told if told and len(answer) <= 2 else format_json(answer)


def write_sentence(call: Call, text: str, result: Any) -> None:
    """Prints the sentence of a command; in a pipe, `piped` takes its place and it goes to
    stderr.
    """
    text = redact_sentence(text, call.secrets)
    if call.row.piped and not is_terminal(sys.stdout) and not is_refused(call.row, result):
        line = call.row.piped.format(answer=redact_value(result, call.secrets))
        write_out(printable(line, 0) + "\n")
        remark(call, text)
    elif text:
        lines = [printable(line, 2000) for line in text.split("\n")]
        if is_terminal(sys.stdout) and len(lines) == 1:  # else it may be JSON
            lines = [wrap_line(lines[0], terminal_width())]
        write_out("\n".join(lines) + "\n")


def fill(call: Call, text: str, answer: Row) -> str:
    """A question or sentence of a row, with parameters and members of the answer in its braces.

    Raises LookupError, ValueError or TypeError if one of them is not there.
    """
    words: Row = {}
    for source in ({"answer": answer}, answer, call.params):
        words.update((name, value) for name, value in source.items() if value is not None)
    for name, value in words.items():
        if isinstance(value, list):
            words[name] = ", ".join(map(str, value))
            if len(value) == 1:  # "machine 7", not "machines 7"
                text = text.replace(f"s {{{name}}}", f" {{{name}}}")
        elif isinstance(value, dict) and f"{{{name}[" not in text:
            words[name] = format_value(value)
        elif name == "sdate" or name.endswith("_date"):
            words[name] = format_utc(value)
        elif name in ("price", "price_disk"):
            words[name] = format_rate(value)[1:-3]  # 0.30, 0.3547
    return text.format_map(words)


def warn_of_fields(call: Call, listing: Listing) -> None:
    """Names each field of --fields that no row has, with the nearest one.  If there is none at all,
    what must not be lost is told.
    """
    known = {name for row in listing.rows for name in row}
    fields = [name for name in listing.fields if known]
    missing = [name for name in fields if not any(has_path(row, name) for row in listing.rows)]
    for name in missing:
        near = suggest(ALIASES.get(name, name), known)
        remark(call, f"--fields: no row has {printable(name)!r}{near}")
    if missing and missing == fields:
        tell_result(call, listing.rows[0])


def format_card(listing: Listing) -> str:
    """One thing as two columns: name and value, without what is not there."""
    (row,) = listing.rows
    facts = {column[0]: (format_cell(column, row), column[2]) for column in listing.columns}
    if not is_terminal(sys.stdout):  # as in tables, for awk
        facts = {without_blanks(name): fact for name, fact in facts.items()}
    wide = max(map(len, facts), default=0)
    lines = []
    for name, (text, form) in facts.items():
        if text != "-" or listing.fields:
            lines.append(f"{name:<{wide}}  {paint(text, form) if listing.bright else text}\n")
    return "".join(lines) or format_json(row) + "\n"


def remark(call: Call, text: str) -> None:
    """A line beside the answer, on stderr; `quiet` silences it."""
    if not call.view.quiet and not call.client.quiet:
        say(printable(text, 1000))


def remark_hidden(call: Call, headers: list[str]) -> None:
    if headers:
        remark(call, f"Hidden to fit: {', '.join(dict.fromkeys(headers))}")


# Tables


def format_table(
    rows: list[Row], columns: Iterable[Any], width: int | None, bright: bool
) -> tuple[list[str], list[str]]:
    """The lines of a table, and the headers of columns that a terminal `width` columns wide has no
    room for.

    Without a width it is for a pipe: nothing is cut or hidden, and awk finds every cell, as only
    those of the last column have blanks.
    """
    every = [TableColumn(column, rows) for column in columns]
    if width is None:
        kept = every
        for column in every:
            column.fill_blanks(column is every[-1])
    else:
        kept = fit_columns(every, width)
    forms = [column.lay_out(bright, column is kept[0], column is kept[-1]) for column in kept]
    lines = list(map("  ".join(forms).__mod__, zip(*(column.texts for column in kept))))
    if bright:
        lines[0] = f"\033[1m{lines[0]}\033[0m"
    hidden = [column for column in every if column not in kept]
    hidden.sort(key=lambda column: column.rank)
    return lines, [column.texts[0] for column in hidden]


class TableColumn:
    """One column of a table being laid out: its texts, which are the header and the cells, and the
    room that it gets.
    """

    def __init__(self, column: Sequence[Any], rows: list[Row]) -> None:
        cells = format_cells(column, rows)
        self.texts = [column[0], *cells]
        self.form = column[2]
        self.rank = column[3]
        plain = self.form[:1] in (".", "{") or "".join(cells).isdigit()
        self.number = plain or all(map(_is_number, cells))
        self.measure()
        # a cell of more than 200 places is not aligned to
        self.room = max([self.sizes[0], *filter((200).__ge__, self.sizes)])

    def measure(self) -> None:
        self.ascii = "".join(self.texts).isascii()
        self.sizes = list(map(len if self.ascii else display_width, self.texts))

    def fill_blanks(self, last: bool) -> None:
        """Puts _ for each blank of the header, and of the cells unless they are the `last` of their
        lines.
        """
        self.texts[0] = without_blanks(self.texts[0])
        cells = self.texts[1:]
        if not self.number and (" " in "".join(cells) or not self.ascii):
            cells = cells if last else list(map(without_blanks, cells))
            self.texts[1:] = [cell if cell.strip() else "-" for cell in cells]
            self.measure()

    @property
    def least(self) -> int:
        """The room below which it says too little: a number or a short text whole, a long text 16
        places.
        """
        if self.number or self.room <= (24 if self.rank else 40):
            return self.room
        return max(16 if self.rank else 40, self.sizes[0])

    def cut(self) -> None:
        if max(self.sizes) > self.room:
            self.texts = [truncate(text, self.room) for text in self.texts]
            self.measure()

    def lay_out(self, bright: bool, first: bool, last: bool) -> str:
        """How % writes a text in its line; colors, and blanks that % would miscount, are put in."""
        right = self.number and not first
        room = self.room if right or not last else 0
        colored = bright and self.form in ("state", "mark")
        if self.ascii and not colored:
            return f"%{'' if right else '-'}{room}s"
        pad = str.rjust if right else str.ljust
        sized = zip(self.texts, self.sizes)  # len() need not tell how wide a text is
        self.texts = [pad(text, room + len(text) - size) for text, size in sized]
        if colored:
            self.texts = [paint(text, "state") for text in self.texts]
        return "%s"


def without_blanks(text: str) -> str:
    """A text with _ for each blank."""
    if text.isascii():
        return text.replace(" ", "_")
    return "".join("_" if char.isspace() else char for char in text)


def fit_columns(columns: list[TableColumn], width: int) -> list[TableColumn]:
    """The columns that fit side by side, by rank; what room is left over goes to those that had to
    shrink.
    """
    left = width + 2
    kept = columns[:0]
    for column in sorted(columns, key=lambda column: column.rank):
        if not kept or not column.rank or column.least + 2 <= left:
            left -= column.least + 2
            kept.append(column)
    for column in kept:
        more = max(0, min(left, column.room - column.least))
        column.room = column.least + more
        left = left - more
    while left < 0 and max(column.room for column in kept) > 8:
        max(kept, key=lambda column: column.room).room -= 1
        left += 1
    for column in kept:
        column.cut()
    return [column for column in columns if column in kept]


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.lstrip("-").replace(".", "", 1).isdigit()


# Cells


def format_cells(column: Sequence[Any], rows: Sequence[Row]) -> list[str]:
    """A column's cells; null, missing and empty are `-`."""
    name = column[1]
    form = column[2]
    if form in ROW_FORMATS:
        return [ROW_FORMATS[form](row) or "-" for row in rows]
    values = column_values(name, rows)
    make = FORMATS.get(form)
    if not make:
        form, times, factor = form.partition("*")
        form, over, divisor = form.partition("/")
        scale = float(factor) if times else 1 / float(divisor) if over else 1
        shape = form.replace("{}", "%s") if "{" in form else f"%{form or 's'}"
        if {int, float}.issuperset(map(type, values)):
            return list(map(shape.__mod__, values if scale == 1 else [v * scale for v in values]))

        def number_or_text(value: Any) -> str:
            if type(value) is str and form[-1:] == "f":  # the service has some numbers as text
                value = value if as_number(value) is None else as_number(value)
            if type(value) is float or type(value) is int:
                return shape % (value * scale)
            return format_value(value)

        make = number_or_text

    if {str}.issuperset(map(type, values)):  # names and states: each stands in many rows
        cells = {value: make(value) for value in set(values)}
        return [cells[value] or "-" for value in values]
    return [make(value) or "-" for value in values]


def column_values(name: str, rows: Sequence[Row]) -> list[Any]:
    """What the rows have under a field's name; of "a|b" the first that is there."""
    if {"|", "."}.isdisjoint(name) or any(name in row for row in rows):  # its own name has a dot
        return [row.get(name) for row in rows]
    names = name.split("|")
    found = ((get_path(row, name) for name in names) for row in rows)
    return [next((value for value in some if value is not None), None) for some in found]


def format_cell(column: Sequence[Any], row: Row) -> str:
    """The cell of one row."""
    return format_cells(column, [row])[0]


# Cells that are more than a number or a text.  The service can send anything: what is not of the
# type that is expected is shown as it is, or as -.


def _age(value: Any) -> str:
    started = as_number(value)
    return "-" if started is None else format_duration(time.time() - started)


def _hours(value: Any) -> str:
    since = as_number(value)
    return "-" if since is None else f"{(time.time() - since) / 3600:.2f}"


def _moment(form: str) -> Callable[[Any], str]:
    """A format for unix seconds or the text of a date."""

    def cell(value: Any) -> str:
        if isinstance(value, str) and value[10:11] in ("T", " ") and value[:4].isdigit():
            value = seconds_of(value) or value
        return format_value(format_utc(value, form)) if value else "-"

    return cell


def seconds_of(text: str) -> float | None:
    """Unix seconds of a date as services write it, 2026-01-31T13:00:00Z; None for any other
    text.
    """
    from datetime import datetime, timezone

    try:
        date = datetime.fromisoformat(
            text[:19] + text[19:].lstrip(".0123456789").replace("Z", "+00:00")
        )
    except ValueError:
        return None
    return (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp()


def _weekday(value: Any) -> str:
    if value is None:
        return "Everyday"
    days = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
    day = as_whole(value)
    return days[day] if day is not None and 0 <= day < 7 else format_value(value)


def _hour(value: Any) -> str:
    if value is None:
        return "every hour"
    hour = as_whole(value)
    if hour is None or hour not in range(24):
        return format_value(value)
    return f"{hour % 12 or 12} {'AM' if hour < 12 else 'PM'}"


def _minute(value: Any) -> str:
    if value is None:
        return "every minute"
    minute = as_whole(value)
    return format_value(value if minute is None else minute).zfill(2)


def _join(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(format_value, value)) or "-"
    return format_value(value) if value else "-"


def _change(name: str, factor: float, digits: int = 4) -> Callable[[Row], str]:
    """A format for the old and the new price of a row, in other units by a factor."""

    def cell(row: Row) -> str:
        old = number_of(row, f"old_{name}")
        new = number_of(row, f"new_{name}")
        if new is None:
            return "-"
        before = "?" if old is None else f"{old * factor:.{digits}f}"
        return f"{before} -> {new * factor:.{digits}f}"

    return cell


def _gpu(row: Row) -> str:
    use = number_of(row, "gpu_util")
    busy = "" if use is None else f" ({use:.0f}%)"
    model = format_value(row.get("gpu_name") or "?").replace(" ", "_")
    return f"{format_value(row.get('num_gpus') or '?')}x {model}{busy}"


def _usage(used: float | None, total: float) -> str:
    return f"?/{total:.0f}" if used is None or used < 0 else f"{used:.1f}/{total:.0f}"


def _disk(row: Row) -> str:
    total = number_of(row, "disk_space")
    part = number_of(row, "disk_util")
    if total is None:
        return "-"
    percent = "" if part is None or part < 0 else f" ({part * 100:.0f}%)"
    return _usage(number_of(row, "disk_usage"), total) + percent


def _volumes(row: Row) -> str:
    found = []
    for volume in as_rows(row.get("volume_info")):
        total = number_of(volume, "total_space")
        free = number_of(volume, "avail_space")
        found.append(f"#{volume.get('id')}")
        if total is not None and free is not None:
            found[-1] += f" {_usage(total - free, total)}"
    return format_value(", ".join(found)) if found else "-"


def _net(row: Row) -> str:
    speeds = (number_of(row, name) for name in ("inet_up", "inet_down"))
    up, down = ("?" if speed is None else f"{speed:.0f}" for speed in speeds)
    return f"↑{up} ↓{down}"


def _template(row: Row) -> str:
    if not row.get("template_id"):
        return "-"
    return format_value(f"{row.get('template_name') or '?'} ({row['template_id']})")


def _ssh(row: Row) -> str:
    host = row.get("ssh_host")
    return format_value(f"{host}:{row.get('ssh_port')}") if host else "-"


def mapped_ports(row: Row) -> dict[str, str]:
    """{"22/tcp": "203.0.113.45:40010"}: where the ports of an instance can be reached."""
    host = bracketed(text_of(row, "public_ipaddr").strip())
    found = {}
    for inner, outer in as_dict(row.get("ports")).items():
        port = next((text_of(place, "HostPort") for place in as_rows(outer)), "")
        if host and port:
            found[inner] = f"{host}:{port}"
    return found


def _ports(row: Row) -> str:
    return format_value(" ".join(f"{at}->{inner}" for inner, at in mapped_ports(row).items()))


def jupyter_address(row: Row) -> str:
    """The URL of a running instance's Jupyter, with its token; "" if it has none."""
    token = text_of(row, "jupyter_token")
    at = mapped_ports(row).get("8080/tcp")
    runtype = text_of(row, "image_runtype")
    if row.get("actual_status") != "running" or "jupyter" not in runtype or not token:
        return ""
    if not at or "jupyter_direc" not in runtype:
        index = text_of(row, "ssh_idx")
        port = text_of(row, "ssh_port")
        at = f"jupyter.vast.ai/jm/{index}/{port}" if index and port else ""
    return f"https://{at}/?token={token}" if at else ""


FORMATS: dict[str, Callable[[Any], str]] = {  # a column's format -> the cell of a value
    "state": lambda value: format_value(value or "-"),
    "mark": lambda value: format_value(value or " "),
    "unknown": lambda value: format_value(value or "unknown"),
    "N/A": lambda value: format_value(value or "N/A"),
    "_": lambda value: format_value(value or "-").replace(" ", "_"),
    "count": lambda value: str(len(value)) if isinstance(value, list) else "-",
    "join": _join,
    "age": _age,
    "hours": _hours,
    "weekday": _weekday,
    "hour": _hour,
    "min": _minute,
    "day": _moment("%Y-%m-%d"),
    "minute": _moment("%Y-%m-%d %H:%M"),
}
ROW_FORMATS: dict[str, Callable[[Row], str]] = {  # the same, of a row
    "gpu": _gpu,
    "disk": _disk,
    "volumes": _volumes,
    "net": _net,
    "template": _template,
    "ssh": _ssh,
    "ports": _ports,
    "jupyter": lambda row: format_value(jupyter_address(row)),
    "gpu_price": _change("gpu_costpersec", 3600),
    "disk_price": _change("disk_ram_costpersec", 2592000),
    "up_price": _change("bwu_cost", 1),
    "down_price": _change("bwd_cost", 1),
    "fee": _change("platform_fee", 100, 2),
}


# Functions that the table names in `columns_for`, `tables`, `says`, `footer` and `show`.


def rented_sentence(call: Call, answer: Row) -> str:
    """What was rented, at what price if it was waited for, and how to stop paying."""
    id = answer.get("new_contract")
    row = as_dict(answer.get("instance"))
    offer = call["id"]
    end = f"stop paying with `vastai destroy instance {id}`."
    if not row:
        source = f"offer {offer} as " if offer else ""
        return f"Renting {source}instance {id}. Wait for it with `vastai wait instance {id}`; {end}"
    model = _gpu({**row, "gpu_util": None})
    price = hourly_cost(row)
    facts = [f"{model} in {format_value(row.get('geolocation') or 'an unknown place')}"]
    facts += [f"offer {offer}"] if offer else []
    facts += [] if price is None else [format_rate(price)]
    return (
        f"Instance {id} is {row.get('actual_status')}: {', '.join(facts)}. "
        f"Open a shell with `vastai ssh {id}`; {end}"
    )


def rented_footer(call: Call, answer: Row) -> list[str]:
    """Where the ports and the Jupyter of an instance that was waited for can be reached."""
    row = as_dict(answer.get("instance"))
    cells = {"Ports": _ports(row), "Jupyter": jupyter_address(row)}
    return [f"{name}: {cell}" for name, cell in cells.items() if cell]


def offers_shown(call: Call, rows: Rows) -> list[Row]:
    """The offers as the service sent them, without what Python programs get on top."""
    for row in rows:
        del row["datacenter"]
    return rows


def offer_columns(call: Call, rows: list[Row]) -> Iterable[Any]:
    columns = tuple(RESERVED_COLUMNS if call["type"] == "reserved" else OFFER_COLUMNS)
    if all(call[arg.name] is None for arg in JOB_OPTIONS):
        return columns
    at = [column[0] for column in columns].index("$/hr") + 1
    return (*columns[:at], ("$ job", "job_total", ".2f", 0), *columns[at:])


def offers_footer(call: Call, rows: Rows) -> list[str]:
    """How many offers there are, and which conditions they meet; if none, what to change."""
    count = count_of(len(rows), "offer")
    if len(rows) == call["limit"]:
        count += " (--limit reached)"
    words = [text for field in call["conditions"] for text in condition_words(call, field)]
    lines = [f"{count}; conditions: {' '.join(words) or 'none'}"]
    if not rows:
        lines.append(empty_search_hint(call))
    return lines


def condition_words(call: Call, field: str) -> list[str]:
    """The conditions on a field as a query has them."""
    signs = {
        name: sign if sign in "<=>=!=" else f" {sign} "
        for sign, name in reversed(list(OPERATORS.items()))
    }
    limits = as_dict(call["conditions"][field])
    return [
        f"{field}{signs.get(operator, operator)}{as_typed(field, value)}"
        for operator, value in limits.items()
    ]


# common ones, as a query has them
MODELS = """\
RTX_5090 RTX_5080 RTX_5070_Ti RTX_5070 RTX_5060_Ti RTX_5060 RTX_4090 RTX_4090D RTX_4080S
RTX_4080 RTX_4070S_Ti RTX_4070_Ti RTX_4070S RTX_4070 RTX_4060_Ti RTX_4060 RTX_3090_Ti
RTX_3090 RTX_3080_Ti RTX_3080 RTX_3070_Ti RTX_3070 RTX_3060_Ti RTX_3060 RTX_2080_Ti
RTX_2080 GTX_1080_Ti GTX_1080 RTX_PRO_6000_WS RTX_PRO_6000_S RTX_6000Ada RTX_5000Ada
RTX_4000Ada RTX_A6000 RTX_A5000 RTX_A4500 RTX_A4000 A100_SXM4 A100_PCIE A40 A10 A30 L40S
L40 L4 H100_SXM H100_PCIE H100_NVL H200 H200_NVL B200 B300 GH200_SXM Tesla_V100 Tesla_T4
Tesla_P100 Tesla_P40 Tesla_P4 Tesla_M40 Tesla_K80 A10g A16 A100X RTX_PRO_6000 RTX_PRO_5000
RTX_PRO_4500 RTX_PRO_4000 RTX_5880Ada RTX_4500Ada RTX_2000Ada RTX_A2000 RTX_3050 RTX_2080S
RTX_2070S RTX_2070 RTX_2060S RTX_2060 GTX_1660_Ti GTX_1660_S GTX_1660 GTX_1650_Ti GTX_1650_S
GTX_1650 GTX_1070_Ti GTX_1070 GTX_1060 GTX_1050_Ti GTX_1050 GTX_TITAN_X Titan_RTX Titan_V
Titan_Xp Q_RTX_8000 Q_RTX_6000 Q_RTX_5000 Q_RTX_4000 Quadro_GV100 Quadro_P6000 Quadro_P5000
Quadro_P4000 Quadro_P2000 RTX_4080_laptop RTX_4070_laptop RTX_4060_laptop RTX_3070_laptop
RTX_3060_laptop RX_7900_XTX RX_7900_XT RX_6900_XT RX_6800_XT RX_6800 Titan_X Radeon_VII"""


def likely_models(name: str) -> list[str]:
    """The models that somebody means who wrote `name`; none if it is one, or like none."""

    def plain(text: str) -> str:
        return "".join(char for char in text.lower() if char.isalnum()).replace("nvidia", "")

    models = MODELS.split()
    wanted = plain(name)
    if not wanted or name.replace(" ", "_") in models:
        return []
    exact = [model for model in models if plain(model) == wanted]
    return exact or [model for model in models if wanted in plain(model)][:3]


def empty_search_hint(call: Call) -> str:
    """What to change in a search that found nothing: the name of a model; else, on a terminal, the
    condition without which there are most offers, by at most two more searches.
    """
    conditions = call["conditions"]
    hint = model_hint(conditions)
    if hint:
        return hint
    own = [
        name for name, limits in conditions.items() if limits and limits != OFFER_DEFAULTS.get(name)
    ]
    own.sort(key=lambda name: (name in ("num_gpus", "gpu_name"), name != "dph_total"))
    if call.has_reader and own:
        found = at_once(call, lambda name: offers_without(call, name), own[:2])
        counts = [len(rows) if isinstance(rows, list) else 0 for rows in found]
        most = counts.index(max(counts))
        if counts[most]:
            words = " ".join(condition_words(call, own[most]))
            return f"Without {words} there would be {count_of(counts[most], 'offer')}."
    return "Fewer conditions find more; drop one with FIELD=any, such as verified=any."


def model_hint(conditions: Row) -> str:
    """What to write instead of a GPU model that does not exist; "" if all exist."""
    for value in as_dict(conditions.get("gpu_name")).values():
        for name in map(as_text, listed(value)):
            models = likely_models(name)
            if models:
                likely = " or ".join(f"gpu_name={model}" for model in models)
                return f"No model is called {name.replace(' ', '_')!r}; write {likely}"
    return ""


def offers_without(call: Call, field: str) -> list[Row]:
    conditions = {name: limits for name, limits in call["conditions"].items() if name != field}
    kind = {"type": call["type"], "storage": call["storage"], "no_default": True}
    return as_rows(call.do("search_offers", query=conditions, **kind))


def as_typed(field: str, value: Any) -> str:
    """The value of a condition as a query has it: in the units of the help, and in one word."""
    if isinstance(value, list):
        return f"[{','.join(as_typed(field, item) for item in value)}]"
    if isinstance(value, float) and field in MULTIPLIERS:
        value = f"{value / MULTIPLIERS[field]:g}"
    return format_value(str(value).lower() if isinstance(value, bool) else value).replace(" ", "_")


def instances_footer(call: Call, rows: Rows) -> Iterator[str]:
    """How many instances there are, what they cost now, and on a terminal how to see fewer."""
    total = whole_of(rows.answer, "total_instances") or len(rows)
    if rows:
        costs = [hourly_cost(row) for row in rows]
        labels = as_dict(rows.answer.get("label_counts"))
        names = ", ".join(f"{name or '(none)'} {count}" for name, count in labels.items())
        at_least = "at least " if None in costs else ""
        count = f"{len(rows)} of {count_of(total, 'instance')}"
        line = f"{count}, {at_least}${sum(filter(None, costs)):.4f}/hr"
        yield f"{line}; labels: {names}" if names else line
    elif any(call[name] for name in ("status", "label", "gpu_name", "verification")):
        yield "No instance meets these filters."
    filters = filter_values(call) if call.has_reader else []
    if filters:
        yield "Filter with " + " ".join(filters)
    yield from next_page(call, rows)


def filter_values(call: Call) -> list[str]:
    """What the filters of show instances can be; nothing if the service does not tell."""
    found = []
    try:
        combinations = call.do("show_instance_filters")
    except VastAIError:
        return []
    names = {"actual_status": "status", "gpu_name": "gpu-name", "verification": "verification"}
    for name, option in names.items():
        values = sorted(
            {without_blanks(as_text(row[name])) for row in combinations if row.get(name)}
        )
        if len(values) > 1:
            found.append(f"--{option} {'|'.join(values)}")
    return found


def next_page(call: Call, rows: Any) -> Iterator[str]:
    """How to ask for the next page, if there is one."""
    token = rows.next_token if isinstance(rows, Rows) else rows.get("next_token")
    if token:
        yield f"Next page: --next-token {format_value(token)}"


def network_disk_tables(call: Call, answer: Row) -> Tables:
    """A table of disks and one of mounts for each cluster; in a pipe a row for each disk."""
    for cluster in as_rows(answer.get("data")):
        disks = as_rows(cluster.get("network_disks"))
        cluster_id = cluster.get("cluster_id")
        mounts = as_dict(cluster.get("mounts"))
        ids = as_list(cluster.get("machine_ids"))
        places = [{"id": id, "mount": mounts.get(str(id)) or "N/A"} for id in ids]
        if is_terminal(sys.stdout):
            yield f"Cluster {format_value(cluster_id)}", disks, NETWORK_DISK_COLUMNS
            yield "", places, MOUNT_COLUMNS
        else:
            at = [f"{place['id']}:{place['mount']}" for place in places]
            shared = {"cluster_id": cluster_id, "at": at}
            yield "", [{**disk, **shared} for disk in disks or [{}]], PIPED_DISK_COLUMNS


def backup_file_tables(call: Call, answer: Row) -> Tables:
    """The files, with the token in their addresses; an address is never cut."""
    from urllib.parse import quote

    token = text_of(answer, "authorization_token")
    rows = [dict(row) for row in as_rows(answer.get("files"))]
    for row in rows:
        url = text_of(row, "url")
        if url and token:
            mark = "&" if "?" in url else "?"
            row["url"] = f"{url}{mark}Authorization={quote(token, safe='')}"
    yield "", rows, BACKUP_FILE_COLUMNS


def backup_footer(call: Call, answer: Row) -> Iterator[str]:
    """How long the addresses are good for, and whether there are more files."""
    token = format_value(answer.get("authorization_token"))
    seconds = format_value(answer.get("expires_in_sec"))
    yield f"Token: {token}; it is part of the URLs and valid for {seconds} seconds."
    if answer.get("truncated"):
        yield (
            "This list is truncated: the backup has more files. "
            f"`vastai copy vast.{call['contract_id']}:/ INSTANCE:/PATH` restores them all."
        )


def truncated_footer(call: Call, answer: Row) -> Iterator[str]:
    """Says so if the service cut a list."""
    if answer.get("truncated"):
        yield "The service truncated the list: there are more."


def settled_sentence(call: Call, answer: Row) -> str:
    """What became of each price increase, a line each."""
    verb = call.row.name.split()[0]
    results = as_rows(answer.get("results")) or [{"status": f"{verb}ed", **answer}]
    lines = []
    for result in results:
        number = format_value(result.get("pending_price_increase_id"))
        instance = format_value(result.get("contract_id"))
        lines.append(f"Instance {instance}: price increase {number} {result['status']}")
    return "\n".join(lines)


def trend_rows(call: Call, answer: Row) -> list[Row]:
    """A row for each GPU and moment."""
    if answer.get("needs_machine"):
        return []
    return [{"gpu": gpu, **row} for gpu, part in answer.items() for row in part["rows"]]


def trend_tables(call: Call, answer: Row) -> Tables:
    """A table for each GPU; of 40 points and more only about 20, unless --full is given."""
    stats = {"TFLOPS": "tflops", "DLPerf": "dlperf", "TFLOPS/$": "tflops_per_dollar"}
    for gpu, part in answer.items():
        facts = [f"{head} {format_value(part['stats'].get(name))}" for head, name in stats.items()]
        rows = trend_rows(call, {gpu: part})
        step = 1 if call.view.full else max(1, len(rows) // 20)
        heading = f"{format_value(gpu)}: {', '.join(facts)}{price_trend(rows)}"
        if step > 1:
            heading += f"; 1 point in {step} (--full shows all)"
        columns = GPU_TRENDS_COLUMNS if is_terminal(sys.stdout) else PIPED_TRENDS_COLUMNS
        yield heading if rows else f"{heading}, no data", rows[::step], columns


def price_trend(rows: list[Row]) -> str:
    """The median price over time as a sparkline with its lowest and highest; "" without prices."""
    for name in ("avail_median", "rented_median"):
        values = [number_of(row, name) for row in rows]
        known = [value for value in values if value is not None]
        if known:
            line = sparkline(values[:: max(1, len(values) // 30)])
            return f", median {line} ${min(known):.4f} to ${max(known):.4f}/hr"
    return ""


def host_footer(call: Call, answer: Row) -> Iterator[str]:
    """Says so if the service shows numbers only to owners of machines."""
    if answer.get("needs_machine"):
        yield FOR_HOSTS


def tfa_columns(call: Call, rows: list[Row]) -> Iterable[Any]:
    """Phone numbers are shown only if a method has one."""
    phones = any(row.get("method") == "sms" for row in rows)
    return tuple(column for column in TFA_COLUMNS if phones or column[1] != "phone_number")


def tfa_rows(call: Call, answer: Row) -> list[Row]:
    methods = answer.get("methods")
    off = answer.get("tfa_enabled") is False
    return objects([] if off and methods is None else methods)


def tfa_footer(call: Call, answer: Row) -> Iterator[str]:
    if answer.get("methods"):
        yield f"Backup codes left: {format_value(answer.get('backup_codes_remaining'))}"


CODES_LOST = "the new backup codes are lost, and the old ones no longer work"
NEW_CODES = "Create new ones with `vastai tfa regen-codes`."


def show_backup_codes(call: Call, answer: Row) -> None:
    """Shows or saves new backup codes; says so if they are lost on the way."""
    codes = as_list(answer.get("backup_codes"))
    if not codes:
        if not call.view.quiet:
            write_sentence(call, sentence(call, answer), answer)
        return
    saved = ""
    try:
        saved = save_backup_codes(call, codes)
        write_out(saved)
        flush(sys.stdout)
    except (KeyboardInterrupt, OSError):
        if " saved to " not in saved:
            call.tell(f"{CODES_LOST}. {NEW_CODES}")
        raise


def save_backup_codes(call: Call, codes: list[Any]) -> str:
    """Asks where to put new backup codes: on the screen only on demand, into the usual file if
    nobody answers.  Returns the codes, or the sentence that they are saved.
    """
    title = "Backup codes for Vast.ai; each works once. All earlier codes are void."
    text = "\n".join([title, *map(format_value, codes)]) + "\n"
    stamp = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{time.time_ns() % 10**9:09}"
    name = f"vastai_backup_codes_{stamp}.txt"
    usual = os.path.expanduser(os.path.join("~", "Downloads", name))
    if not os.path.isabs(usual):
        usual = os.path.abspath(name)
    question = f"{len(codes)} new backup codes. 1: save them to {usual}, "
    question += "2: to another file, 3: show them here."
    while call.cli:
        choice = ask_line(f"{question} 1, 2 or 3?")
        path = usual
        question = "Where should the backup codes go?"
        if choice == "2":
            path = os.path.abspath(os.path.expanduser(ask_line("File:") or usual))
            path = os.path.join(path, name) if os.path.isdir(path) else path
        elif choice == "3":
            if agreed("Anyone who sees this screen can read them. Show them?"):
                break
            continue
        elif choice not in ("1", None):
            continue
        try:
            if os.path.exists(path):
                raise UsageError(f"{path} exists already")
            write_private(path, text)
            return f"{len(codes)} backup codes saved to {path}\n"
        except UsageError as error:
            if choice is None:
                raise VastAIError(f"{CODES_LOST}: {error.msg}", hint=NEW_CODES) from None
            warn(error.msg)
    return text


def format_term(arg: Arg, value: Any) -> Any:
    """The value of an option, a price per what its help says."""
    unit = unit_of(arg) or ""
    if unit.startswith("$/"):
        dollars, _, rest = f"{value:.10f}".partition(".")  # not rounded, as traffic is cheap
        return f"${dollars}.{rest.rstrip('0'):0<2}{unit[1:]}"
    if isinstance(value, list):
        return " ".join(value)
    return f"{format_utc(value)} UTC" if arg.name == "end_date" else value


def listing_sentence(call: Call, result: Any) -> str:
    """On which terms machines are offered, or run their default job, a line each."""
    terms = []
    for arg in call.row.args:
        value = call[arg.name]
        if arg.option and value is not None:
            terms.append(f"{arg.name} {format_term(arg, value)}")
    lines = []
    for id, answer in zip(call["ids"] or [call["id"]], listed(result)):
        line = f"{call.row.done.format(id=id)}: {', '.join(terms)}."
        if answer.get("extended"):
            line += f" Rentals extended: {format_value(answer['extended'])}."
        lines.append(line)
    return "\n".join(lines)


def show_billing(call: Call, answer: Row) -> None:
    """Pages of invoices or charges, each after a question."""
    columns: Iterable[Any] = CHARGE_COLUMNS if call["charges"] else BILL_COLUMNS
    if call["charge_type"] and not {"s", "serverless"} & set(call["charge_type"]):
        columns = list(CHARGE_COLUMNS)[:5]
    count = 0
    while True:
        rows = bill_rows(call, answer["results"])
        count += len(answer["results"])
        if call["charges"] and call["format"] == "tree":
            write_out("".join(charge_lines(call, rows, 0)))
        elif rows or not is_terminal(sys.stdout):
            remark_hidden(call, write_listing(call, Listing(rows, columns, call.view)))
        total = answer.get("total")
        total = count if total is None else format_value(total)
        remark(call, f"{count} of {count_of(total, 'result')}")
        if call["pdf"]:
            remark(call, f"Written to {call['pdf']}")
        for text in next_page(call, answer):
            remark(call, text)
        call.params["next_token"] = answer.get("next_token")
        if not call["next_token"] or not call.agrees("Show the next page?"):
            return
        answer = call.send()


def charge_lines(call: Call, rows: list[Row], depth: int) -> Iterator[str]:
    """Charges as a tree; the parts of instances and volumes only with --verbose."""
    amount = list(CHARGE_COLUMNS)[2]
    for row in rows:
        start, end = (FORMATS["day"](row.get(name)) for name in ("start", "end"))
        words = [
            row.get("type") or "-",
            row.get("source"),
            f"${format_cell(amount, row)}",
            row.get("description"),
            f"({start})" if start == end else f"({start} to {end})",
        ]
        yield "  " * depth + "  ".join(format_value(word) for word in words if word) + "\n"
        brief = text_of(row, "type").lower() in ("instance", "volume") and not call["verbose"]
        if row.get("items") and not brief:
            yield from charge_lines(call, bill_rows(call, objects(row["items"])), depth + 1)


LEVELS = ("info0", "info1", "trace", "debug")


def log_text(call: Call, answer: Row) -> str:
    """The log of the chosen level."""
    text = answer.get(LEVELS[call["level"]], answer.get("logs"))
    if isinstance(text, str):
        return text
    return format_value(text) if text else ""


def log_footer(call: Call, answer: Row) -> Iterator[str]:
    level = call["level"]
    if not log_text(call, answer):
        yield f"nothing was logged at level {level} ({LEVELS[level]})"


def self_test_sentence(call: Call, answer: Row) -> str:
    """What came of the test, and where the diagnostics of a failure are."""
    machine = printable(answer["machine_id"])
    lines = [answer["warning"]] if answer["warning"] else []
    if answer["success"]:
        lines.append(f"Machine {machine} passed.")
    else:
        lines.append(f"Machine {machine} failed: {printable(answer['reason'], 500)}")
    bundle = answer["diagnostics"].get("support_bundle")
    if bundle:
        lines.append(bundle_sentence(call, bundle))
    return "\n".join(lines)


def bundle_sentence(call: Call, bundle: Row) -> str:
    """The archive's path, what is in it and what is missing."""
    missing = [
        f"missing: {item['artifact']}: {item['error']}" for item in bundle["collection_errors"]
    ]
    files = [f"  {name}" for name in bundle["files"]]
    end = "Review it before you send it to Vast.ai support."
    return "\n".join([f"Diagnostics: {bundle['path']}", *files, *missing, end])


# ---------------------------------------------------------------------------------- invoices as PDF
# Letter pages in the two Helvetica faces that every viewer brings along, so nothing is embedded.
# Bold text is measured as if it were regular, which holds for digits.

# Advance widths in 1/1000 of the font size, from Adobe's metrics files, of the codes 32 to 255 of
# WinAnsiEncoding (cp1252).
_PDF_WIDTHS_AS_TEXT = """\
278 278 355 556 556 889 667 191 333 333 389 584 278 333 278 278 556 556 556 556 556 556 556 556 556
556 278 278 584 584 584 556 1015 667 667 722 722 667 611 778 722 278 500 667 556 833 722 778 667
778 722 667 611 722 667 944 667 667 611 278 278 278 469 556 333 556 556 500 556 556 278 556 556 222
222 500 222 833 556 556 556 556 333 500 278 556 500 722 500 500 500 334 260 334 584 350 556 350 222
556 333 1000 556 556 333 1000 667 333 1000 350 611 350 350 222 222 333 333 350 556 1000 333 1000
500 333 944 350 500 667 278 333 556 556 556 556 260 556 333 737 370 556 584 333 737 333 400 584 333
333 333 556 537 278 333 333 365 556 834 834 834 611 667 667 667 667 667 667 1000 722 667 667 667
667 278 278 278 278 722 722 778 778 778 778 778 584 778 722 722 722 722 667 667 611 556 556 556 556
556 556 889 500 556 556 556 556 278 278 278 278 556 556 556 556 556 556 556 584 611 556 556 556 556
500 556 500"""
_PDF_WIDTHS = tuple(map(int, _PDF_WIDTHS_AS_TEXT.split()))
# Font, size, color.
_PDF_STYLES = parse_table("""\
brand: F2 22 0.06 0.20 0.38 rg
title: F1 22 0.50 g
label: F2 7 0.50 g
body: F1 9 0.13 g
strong: F2 10 0.06 0.20 0.38 rg
note: F1 8 0.45 g
credit: F1 9 0.05 0.43 0.25 rg""")
# points, from the bottom left corner
_PDF_LEFT = 54
_PDF_RIGHT = 558
_PDF_TOP = 730
_PDF_BOTTOM = 68
_PDF_COLUMNS = (
    (b"DATE", 54, 108),
    (b"DESCRIPTION", 114, 354),
    (b"QUANTITY", 360, 420),
    (b"RATE", 424, 484),
    (b"AMOUNT", 488, 558),
)


def invoice_pdf(
    rows: Iterable[Row],
    user: Row,
    title: str = "Invoice",
    number: str = "",
    period: str = "",
    totals: Sequence[Pair] = (),
) -> bytes:
    """An invoice as the bytes of a PDF file; the same arguments give the same bytes.

    `rows` are the service's, in the order to show them; a "payment" shows its amount alone.  `user`
    is the account that show_user gives.  `totals` are (label, text) below the table.  Every value
    may be missing, null or of any type.
    """

    def field(name: str) -> bytes:
        return _pdf_text(user.get(name))

    pages = _PdfPages((_pdf_text(title) + b" " + _pdf_text(number)).strip())
    pages.write(_PDF_LEFT, b"Vast.ai", "brand")
    pages.write(_PDF_RIGHT, _pdf_text(title), "title", 380, right=True)
    pages.rule(0.3, 16, 26)
    city = (field("billaddress_city") + b" " + field("billaddress_zip")).strip()
    billed = [
        field("fullname") or field("username"),
        field("billaddress_line1"),
        field("billaddress_line2"),
        city,
        field("billaddress_country"),
    ]
    account = dict.fromkeys((field("username"), field("email")))
    pages.y = -18 + min(
        pages.block(_PDF_LEFT, 150, b"BILLED TO", billed),
        pages.block(214, 140, b"ACCOUNT", account),
        pages.block(364, 70, b"NUMBER", [_pdf_text(number)]),
        pages.block(444, 114, b"PERIOD", [_pdf_text(period)]),
    )
    pages.headings()
    left, right = _PDF_COLUMNS[1][1:]
    numbers = (("quantity", 4, ""), ("rate", 6, "$"), ("amount", 4, "$"))
    for row in list(rows) or [{"description": "There is nothing in this period."}]:
        payment = row.get("type") == "payment"
        moment = row.get("timestamp")
        description = row.get("description") or str(row.get("type") or "").capitalize()
        lines = _pdf_wrap(_pdf_text(description, 500), right - left)
        pages.need(12 * len(lines))
        for (_, start, end), (name, places, unit) in zip(_PDF_COLUMNS[2:], numbers):
            if name == "amount" or not payment:
                text = _pdf_number(row.get(name), places, unit)
                pages.write(end, text, "credit" if payment else "body", end - start, right=True)
        date = b"" if moment is None else _pdf_text(format_utc(moment, "%Y-%m-%d"))
        pages.write(_PDF_LEFT, date, "note", 54)
        for line in lines:
            pages.write(left, line)
            pages.y -= 12
        pages.rule(0.88, -7, 13)
    for index, (label, total) in enumerate(totals):
        pages.need(17 * (len(totals) - index))
        pages.write(_PDF_COLUMNS[2][1], _pdf_text(label), "strong", 110)
        pages.write(_PDF_RIGHT, _pdf_text(total), "strong", 84, right=True)
        pages.y -= 17
    return pages.file()


class _PdfPages:
    """The drawing commands of each page, and a pen that moves down the last one."""

    def __init__(self, caption: bytes) -> None:
        self.caption = caption  # the document's title, which stands at the top of the later pages
        self.pages: list[list[bytes]] = [[]]
        self.page = self.pages[0]
        self.y = float(_PDF_TOP)

    def write(
        self, x: float, text: bytes, style: str = "body", room: float = 600, right: bool = False
    ) -> None:
        """Writes a text, cut to its room, at the height of the pen: from `x` on or, with `right`,
        up to it.
        """
        text = _pdf_cut(text, style, room)
        font, size, color = _PDF_STYLES[style].encode().split(b" ", 2)
        x = x - _pdf_width(text, style) if right else x
        text = text.replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)")
        self.page.append(
            b"BT /%b %b Tf %b %.2f %.2f Td (%b) Tj ET" % (font, size, color, x, self.y, text)
        )

    def rule(self, gray: float, above: float, below: float) -> None:
        """Draws a thin line, so far below what was written and above what comes."""
        self.y -= above
        self.page.append(
            b"%.2f G 0.5 w %d %.2f m %d %.2f l S" % (gray, _PDF_LEFT, self.y, _PDF_RIGHT, self.y)
        )
        self.y -= below

    def headings(self) -> None:
        for index, (heading, left, right) in enumerate(_PDF_COLUMNS):
            self.write(right if index > 1 else left, heading, "label", right=index > 1)
        self.rule(0.3, 7, 14)

    def need(self, height: float) -> None:
        """Goes on to the next page if this one has less room."""
        if self.y - height < _PDF_BOTTOM:
            self.page = []
            self.y = _PDF_TOP
            self.pages.append(self.page)
            self.write(_PDF_LEFT, b"Vast.ai", "strong")
            self.write(_PDF_RIGHT, self.caption, "note", 400, right=True)
            self.y -= 30
            self.headings()

    def block(self, left: float, room: float, label: bytes, texts: Iterable[bytes]) -> float:
        """Writes a label over its lines, if it has any, and puts the pen back; tells how low it
        was.
        """
        top = self.y
        lines = [line for text in texts if text for line in _pdf_wrap(text, room)]
        for index, line in enumerate([label, *lines] if lines else []):
            self.write(left, line, "body" if index else "label")
            self.y -= 13
        low = self.y
        self.y = top
        return low

    def file(self) -> bytes:
        """The finished document: numbers the pages and puts the objects one after the other."""
        import zlib

        count = len(self.pages)
        title = ("\ufeff" + self.caption.decode("cp1252")).encode("utf-16-be").hex().encode()
        kids = b" ".join(b"%d 0 R" % (6 + 2 * index) for index in range(count))
        fonts = b"/Resources << /Font << /F1 4 0 R /F2 5 0 R >> >>"
        font = b"<< /Type /Font /Subtype /Type1 /BaseFont /%b /Encoding /WinAnsiEncoding >>"
        objects = [
            b"<< /Type /Catalog /Pages 2 0 R /Lang (en-US) >>",
            b"<< /Type /Pages /Count %d /Kids [%b] /MediaBox [0 0 612 792] %b >>"
            % (count, kids, fonts),
            b"<< /Title <%b> /Producer (vastai) >>" % title,
            font % b"Helvetica",
            font % b"Helvetica-Bold",
        ]
        for number, page in enumerate(self.pages, 1):
            self.page = page
            self.y = 40
            self.write(_PDF_LEFT, b"All dates are in UTC.", "note")
            self.write(_PDF_RIGHT, b"Page %d of %d" % (number, count), "note", right=True)
            stream = zlib.compress(b"\n".join(page))
            objects += [
                b"<< /Type /Page /Parent 2 0 R /Contents %d 0 R >>" % (len(objects) + 2),
                b"<< /Length %d /Filter /FlateDecode >>\nstream\n%b\nendstream"
                % (len(stream), stream),
            ]
        # Bytes above 127 tell every program that the file is binary.
        data = bytearray(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")
        size = len(objects) + 1
        table = b"xref\n0 %d\n0000000000 65535 f \n" % size
        for number, content in enumerate(objects, 1):
            table += b"%010d 00000 n \n" % len(data)
            data += b"%d 0 obj\n%b\nendobj\n" % (number, content)
        trailer = b"trailer\n<< /Size %d /Root 1 0 R /Info 3 0 R >>\n" % size
        return bytes(data) + table + trailer + b"startxref\n%d\n%%%%EOF\n" % len(data)


def _pdf_text(value: Any, limit: int = 80) -> bytes:
    """At most `limit` characters of any value as a line of cp1252; for letters that it lacks, their
    base or `?`.
    """
    from unicodedata import combining, normalize

    def known(c: str) -> str:
        base = "".join(part for part in normalize("NFKD", c) if not combining(part))
        for text in (c, base) if c.isprintable() else ():  # the rest would leave no trace on paper
            if text and text.encode("cp1252", "ignore").decode("cp1252") == text:
                return text
        return "-" if c == "\u2212" else "?"  # a minus sign must not get lost

    text = "" if value is None else str(value)
    text = normalize("NFC", text if len(text) <= limit else text[: limit - 1] + "\u2026")
    text = " ".join(text.split())
    return "".join(c if " " <= c <= "~" else known(c) for c in text).encode("cp1252")


def _pdf_number(value: Any, places: int, unit: str) -> bytes:
    """A number, or a text that holds one, with at most `places` decimals; any other text stays as
    it is.
    """
    text = _pdf_text(value)
    try:
        number = round(float(text), places)
    except (ValueError, OverflowError):
        return text
    if not abs(number) < 1e11:  # nor NaN
        return text
    whole, _, part = f"{abs(number):,.{places}f}".partition(".")
    part = part.rstrip("0").ljust(2 if unit else 0, "0")  # money shows its cents
    sign = "-" if number < 0 else ""
    point = "." if part else ""
    return f"{sign}{unit}{whole}{point}{part}".encode()


def _pdf_width(text: bytes, style: str) -> float:
    """How many points wide a text is."""
    size = int(_PDF_STYLES[style].split()[1])
    return sum(_PDF_WIDTHS[code - 32] for code in text) * size / 1000


def _pdf_cut(text: bytes, style: str, room: float, mark: bytes = b"\x85") -> bytes:
    """As much of a text as there is room for; an ellipsis tells that something is missing."""
    if _pdf_width(text, style) <= room:
        return text
    at = 0
    while _pdf_width(text[: at + 1] + mark, style) <= room:
        at += 1
    return text[:at] + mark


def _pdf_wrap(text: bytes, room: float) -> list[bytes]:
    """The text as lines, broken at blanks and inside words that are wider themselves."""
    lines = []
    while text:
        line = _pdf_cut(text, "body", room, b"")
        line = line if line == text else text[: len(line) + 1].rpartition(b" ")[0] or line
        lines.append(line)
        text = text[len(line) :].strip(b" ")
    return lines or [b""]


# ------------------------------------------------------------------------------------- command line

# fmt: off
GLOBAL_ARGS = Command("vastai", "", SAFE, READS, "",
    Secret("--api-key KEY", TEXT, "API key for this call"),
    Arg("--profile PROFILE", NAME, "account whose key to use, saved with set api-key --profile PROFILE; otherwise VAST_PROFILE"),
    Arg("--url URL", TEXT, f"URL of the service; otherwise VAST_URL, then {SERVER}"),
    Arg("--retry", ATTEMPTS, "attempts of a request that may be repeated", 3),
    Arg("--timeout", TIMEOUT, "time limit of one request, seconds", 120),
    Arg("--raw", FLAG, "print the answer as JSON; same as --format json"),
    Arg("--format FORMAT", TEXT, "output format", "table", choices=tuple(WRITERS)),
    Arg("--fields FIELDS", FIELDS, "only these fields: id,gpu_name,a.b", ""),
    Arg("-q --quiet", FLAG, "print only ids, one per line"),
    Arg("--full", FLAG, "no pager; show all points in show gpu-trends"),
    Arg("--explain", FLAG, "show each request on stderr"),
    Arg("--curl", FLAG, "print the request as a curl command and send nothing"),
    Arg("--no-color", FLAG, "no colors"),
    Arg("--version", FLAG, "print the version"),
    Arg("-h --help", FLAG, "print this help"))
# fmt: on


def canonical(word: str) -> str:
    """An option as it is looked up: without its value, with dashes for underscores."""
    return word.partition("=")[0].replace("_", "-") if word.startswith("--") else word


def is_dashed(word: str) -> bool:
    """Does a word look like an option?"""
    return word.startswith("-") and word != "-"


def commands_of_verb(word: str) -> list[str]:
    """The commands that begin with a word."""
    return [name for name in NAMES if name.split()[0] == word]


def find_command(argv: list[str]) -> tuple[Command | None, list[str], list[str]]:
    """The command that a line names, the line without its name, and the words that should have
    named one.  Options may stand before, between and after the words of the name.
    """
    places = places_of_words(argv)
    for first in places:
        word = argv[first]
        following = [at for at in places if at > first]
        for second in following:
            row = NAMES.get(f"{word} {argv[second]}")
            if row:
                return row, [w for at, w in enumerate(argv) if at not in (first, second)], []
            if not places[second]:
                break
        if word in NAMES:
            return NAMES[word], argv[:first] + argv[first + 1 :], []
        if commands_of_verb(word) or not places[first]:
            return None, argv, [word, *(argv[at] for at in following[:1])]
    return None, argv, []


def places_of_words(argv: list[str]) -> dict[int, bool]:
    """The places of the words that are neither options nor values of global ones: may they be the
    value of an option before them?
    """
    is_flag = {flag: arg.kind is FLAG for arg in GLOBAL_ARGS.args for flag in arg.flags}
    places = {}
    before = ""
    skip = False
    for at, word in enumerate(argv):
        option = canonical(before)
        skip = not skip and is_flag.get(option) is False and "=" not in before
        if not skip and not is_dashed(word):
            places[at] = before[:1] == "-" and not is_flag.get(option)
        before = word
    return places


def args_of_line(row: Command | None) -> list[Arg]:
    """The arguments that a command line can have: the command's and those of every command."""
    mine = row.args_of("cli") if row else []
    taken = {flag for arg in mine for flag in arg.flags if arg.option}
    return mine + [arg for arg in GLOBAL_ARGS.args if not taken & set(arg.flags)]


def option_parser(row: Command) -> Any:
    """The argparse parser of a command's options and of those of every command.

    What goes wrong is said in our words, which repeat no value: it may be a secret.
    """
    import argparse

    args = [arg for arg in args_of_line(row) if arg.option]

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            problem: Any = sys.exc_info()[1]  # an ArgumentError
            flag = problem.argument_name.split("/")[0]
            if "expected" not in message:
                raise UsageError(f"{flag} takes no value")
            arg = next(arg for arg in args if flag in map(canonical, arg.flags))
            flag = arg.flags[-1]
            kind = arg.kind
            expected = "a value" if kind.expects.startswith("text") else kind.expects
            hint = f"write {flag} {kind.metavar}, or {flag}=-… for a value that begins with -"
            raise UsageError(f"{flag}: expected {expected}, found nothing; {hint}")

        def _get_option_tuples(self, option_string: str) -> Any:
            """The options that a prefix can mean."""
            found = super()._get_option_tuples(option_string)
            if len(found) > 1:
                several = ", ".join(option[1] for option in found)
                prefix = printable(option_string.partition("=")[0])
                raise UsageError(f"{prefix} is ambiguous: it can mean {several}")
            return found

    parser = Parser(
        prog="vastai",
        add_help=False,
        argument_default=argparse.SUPPRESS,
        # Without a width, argparse asks for the terminal's at each option.
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80),
    )
    for arg in args:
        how: dict[str, Any] = {}
        if arg.kind is FLAG:
            how["action"] = "store_true"
        elif arg.again:
            how["action"] = "append"
        elif arg.many:
            how["nargs"] = "+"
        parser.add_argument(*map(canonical, arg.flags), dest=arg.name, **how)
        how = {"dest": arg.name, "action": "store_const"}
        for flag, value in arg.shortcuts.items():
            parser.add_argument(canonical(flag), const=value, **how)
    return parser


class TypedWords:
    """The words of a line that may be incomplete, without those of its command's name.

    alone    the arguments that are no options
    options  the options, by their flags with dashes
    before   the words that may be options, spelled with dashes, and the values of those
    after    the words that follow, after `--` or in what goes to another program as it is
    seen     the names of options that are there, with their last value
    due      the option whose value comes next
    loose    how many words stand alone
    literal  no word is an option anymore
    """

    def __init__(self, args: list[Arg], words: list[str]) -> None:
        self.alone = [arg for arg in args if not arg.option]
        self.options = {canonical(flag): arg for arg in args if arg.option for flag in arg.flags}
        self.before: list[str] = []
        self.after: list[str] = []
        self.seen: Row = {}
        self.due: Arg | None = None
        self.loose = 0
        self.literal = False
        for word in words:
            if self.literal:
                self.after.append(word)
                self.read_value(word)
            elif word == "--":
                self.literal = True
                self.due = None
            elif self.begins_value(word):
                self.before[-1] += ("=" if self.before[-1].startswith("--") else "") + word
                self.read_value(word)
            else:
                self.read_word(word)

    def begins_value(self, word: str) -> bool:
        """Does a word that looks like an option belong to the option before it?  An environment may
        begin with -eNAME=VALUE, and an order with -FIELD.
        """
        if not self.due or word[:1] != "-" or word in self.options:
            return False
        if self.due.kind is ORDER:
            return word[1:2] != "-"
        return self.due.kind in (ENV, ENV_TEXT) and word[:2] in ENV_OPTIONS and len(word) > 2

    def read_word(self, word: str) -> None:
        """Reads an option, or a word that stands alone."""
        if not is_dashed(word):
            self.before.append(word)
            self.read_value(word)
            return
        name = canonical(word)
        meant = [arg for flag, arg in self.options.items() if flag.startswith(name)]
        self.due = arg = self.options.get(name) or (meant[0] if len(meant) == 1 else None)
        if arg:
            self.seen[arg.name] = word.partition("=")[2]
            if arg.kind is FLAG or "=" in word:
                self.due = None
        if self.due and self.due.rest:
            self.literal = True
        else:
            self.before.append(word if " " in name else name + word[len(name) :])

    def read_value(self, word: str) -> None:
        """Reads the value of the option that is due, or a word that stands alone."""
        if self.due:
            self.seen[self.due.name] = word
            if self.due.again or not (self.due.many or self.due.rest):
                self.due = None
            return
        self.loose += 1
        following = self.next_arg()
        self.literal = self.literal or bool(following and following.rest)

    def next_arg(self) -> Arg | None:
        """What the next word is for, if it is no option."""
        left = (arg for at, arg in enumerate(self.alone) if at == self.loose or arg.many)
        return self.due or next(left, None)


def parse_line(row: Command, words: list[str], start: Row | None = None) -> tuple[Row, Row]:
    """The parameters of a command and the global options, from the words of a line.  Raises
    UsageError.
    """
    typed = TypedWords(args_of_line(row), words)
    parser = option_parser(row)
    try:
        found, loose = parser.parse_known_args(typed.before)
    except IndexError:  # Python 3.8 cannot read -q=
        raise UsageError("a flag takes no value: leave out the =") from None
    for word in loose:
        if is_dashed(word) and not word[1].isdigit() and " " not in word:
            raise unknown_option_error(row, word)
    mine = row.args_of("cli")
    common = vars(found)
    given = {arg.name: common.pop(arg.name) for arg in mine if arg.name in common}
    if typed.due and typed.due.rest:
        given[typed.due.name] = typed.after
        typed.after = []
    given.update(positionals(row, typed.alone, loose + typed.after))
    asked = {**(start or {}), **common}
    return given, {**asked, **check_params(GLOBAL_ARGS, asked, cli=True)}


def positionals(row: Command, args: list[Arg], words: list[str]) -> Row:
    """Assigns the words without a dash to the positional arguments, in order."""
    given = {}
    for at, arg in enumerate(args):
        later = sum(other.default is REQUIRED for other in args[at + 1 :])
        count = max(len(words) - later, arg.default is REQUIRED)
        mine = words[: count if arg.several else min(count, 1)]
        if mine:
            given[arg.name] = mine if arg.several else mine[0]
        words = words[len(mine) :]
    if words:
        problem = f"unexpected {without_value(words[0])!r}"
        if any(arg.secret for arg in row.args):
            problem = "unexpected words; quote a value that contains spaces"
        many = NAMES.get(f"{row.name}s")
        if many and any(arg.many and not arg.option for arg in many.args):
            problem += f"; for several, use `vastai {many.name}`"
        raise UsageError(problem, hint=usage_of(row) if args else "")
    return given


def run_line(argv: list[str], start: Row | None = None) -> int:
    """Runs one command line; returns its exit status or raises VastAIError.

    A prompt hands in `start`: the global options that hold unless the line says otherwise, and the
    `pool` of connections that it keeps.
    """
    if argv[:1] == ["__complete"]:
        for word, meaning in complete(argv[1:]):
            write_out(f"{word}\t{meaning}\n" if meaning else f"{word}\n")
        return 0
    row, words, unknown = find_command(argv)
    seen = TypedWords(args_of_line(row), words).seen
    helping = "help" in seen
    if row is None:
        if "version" in seen:
            write_out(f"{__version__}\n")
            return 0
        if unknown and not (helping and len(unknown) == 1 and commands_of_verb(unknown[0])):
            raise UsageError(unknown_command_message(unknown))
        if words and not helping:
            with GLOBAL_ARGS:
                parse_line(GLOBAL_ARGS, words)  # is there a misspelled option?
        verb = unknown[0] if unknown else ""
        write_out(overview(verb, profile_of(seen)) if words else start_page())
        return 0
    with row:
        try:
            given, common = parse_line(row, words, start)
        except UsageError:
            if not helping:
                raise
            given = {}
            common = {"help": True}
        if common["help"] or common["version"]:
            write_out(command_help(row) if common["help"] else f"{__version__}\n")
            return 0
        return run_row(row, given, common)


def run_row(row: Command, given: Row, common: Row) -> int:
    """Runs a command with the parameters and global options of its line; as run_line."""
    own = next((arg.choices for arg in row.args if arg.name == "format"), ())
    if given.get("format") in set(WRITERS).difference(own):
        common["format"] = given.pop("format")  # meant for the shape, not for the row's own option
    if common["raw"]:
        common["format"] = "json"
    ask_for_secrets(GLOBAL_ARGS, common)
    ask_for_secrets(row, given)
    quiet = (common["quiet"] and common["format"] != "json") or given.get("ids_only", False)
    view = View(common["format"], quiet, given.get("yes", False), common)
    ids: dict[str, int] = {}  # of the labels: 0 until they are looked up
    params = check_params(row, map_labels(row, given, ids), cli=True)
    with client_of(common) as client:
        if ids:
            ids.update(look_up_labels(client, list(ids)))
            params = check_params(row, map_labels(row, given, ids), cli=True)
        return run_call(Call(client, row, params, view, cli=True))


def ask_for_secrets(row: Command, given: Row) -> None:
    """Replaces each secret that is given as `-` by one that is asked for."""
    for arg in row.args:
        value = given.get(arg.name)
        if arg.secret and value is not None:
            words = value if arg.again else [value]
            words = [ask_secret(arg.label(cli=True)) if word == "-" else word for word in words]
            given[arg.name] = words if arg.again else words[0]


def client_of(common: Row) -> VastAI:
    """The client that global options ask for, over connections of its own unless there is a `pool`
    among them.
    """
    names = ("api_key", "retry", "explain", "quiet", "curl", "timeout")
    client = VastAI(server_url=common["url"], **{name: common[name] for name in names})
    client.profile = profile_name(common["profile"])
    client._find_key(common["api_key"], session=True)
    client.pool = common.get("pool") or client.pool
    return client


def run_call(call: Call) -> int:
    """Asks if the row says so, performs a call and prints its result."""
    row = call.row
    if (row.ask or row.asks) and not call.client.curl:
        if row.build:
            build_request(call)  # what is wrong with the arguments shows before the question
        ask_before(call)
    result = None
    try:
        with call.signals_caught(is_vital(row)):
            result = perform(call)
            if result is None and row.path and row.returns not in ("none", "text"):
                raise gone_error(call)
            present(call, result)
            flush(sys.stdout)
    except NothingSent:
        return 0
    except PartialError as error:
        try:
            show_partial(call, error)
        except OSError:
            pass  # said when the command ends; the error must not be lost with stdout
        raise
    except (OSError, KeyboardInterrupt) as error:
        tell_result(call, result)
        if row.status and isinstance(error, BrokenPipeError):  # 0 would be the command's
            discard(sys.stdout)
            raise ProgramError("", exit_status=141) from None
        raise
    if is_gone(sys.stdout):
        tell_result(call, result)
    return final_status(row, result)


def ask_before(call: Call) -> None:
    """Asks the row's question if the table says so.  Raises UsageError unless it is agreed to."""
    row = call.row
    if row.ask_when == "within" or (row.ask_when == "terminal" and not call.at_terminal):
        return
    question = row.asks(call) if row.asks else fill(call, row.ask, {})
    if question:
        confirm(call, question)


def show_partial(call: Call, error: PartialError) -> None:
    """Prints the results of an error in the shape that was asked for, unless report() does."""
    view = call.view
    found = error.found
    if view.quiet:
        write_out("".join(f"{id}\n" for id in listed(found) if id is not None))
    elif view.fields or view.format not in ("table", "json"):
        results = error.results
        error.results = []
        write_out(WRITERS[view.format](Listing(results, (), view)))


def final_status(row: Command, result: Any) -> int:
    """The exit status of a result that was shown.  Raises VastAIError if it tells of a failure."""
    members = as_dict(result)
    if members.get("success") is False:  # found out in several steps, and shown in full
        raise VastAIError(text_of(members, "reason") or reason_of(members))
    if members.get(row.gaps):
        missing = ", ".join(members[row.gaps])
        raise PartialError(f"could not be read, and is not included: {missing}")
    return whole_of(members, row.status) or 0


def gone_error(call: Call) -> VastAIError:
    """The error of a single thing that the service answers with null for."""
    row = call.row
    noun = row.name.partition(" ")[2]
    ids = (call[arg.name] for arg in row.args if "path" in row.places(arg))
    return not_found_error(noun, next(ids, ""), row.look)


def is_vital(row: Command) -> bool:
    """Must its result reach the user, whatever comes?"""
    return row.effect == SPENDS or row.only_copy


def tell_result(call: Call, result: Any) -> None:
    """What a command spent money on, or the only copy of its answer, on stderr: it must not be lost
    with stdout.
    """
    row = call.row
    said = row.status or (row.only_copy and row.show)  # by the row's own function
    if call.view.format == "table" and said and not call.view.fields:
        return
    if is_vital(row) and isinstance(result, dict):
        say(f"{row.name}: {printable(str(redact_value(result, call.secrets)), 2000)}")


# Labels instead of ids


def map_labels(row: Command, given: Row, ids: dict[str, int]) -> Row:
    """The arguments of a line, with ids in the places of labels; `ids` gets those it lacks, as 0."""
    result = dict(given)
    for arg in row.args:
        value = given.get(arg.name)
        if value is None or (arg.kind.completes != "instances" and arg.kind is not PLACE):
            continue
        words = listed(value)
        if arg.kind.many:
            words = [part.strip() for word in words for part in word.strip(", ").split(",")]
        words = [map_label(word, arg.kind, ids) for word in words]
        result[arg.name] = words if isinstance(value, list) else words[0]
    return result


def map_label(word: str, kind: Kind, ids: dict[str, int]) -> str:
    """A word that stands for an instance, or a place, with the id in the place of a label."""
    head = word
    colon = ""
    path = ""
    if kind is PLACE:
        head, colon, path = word.partition(":")
        local = not colon or "/" in head or head in PLACES or on_drive(word)
        if local or os.path.exists(os.path.expanduser(word)):
            return word  # no instance, but a local path, a volume or a connection
    return f"{ids.setdefault(head, 0)}{colon}{path}" if is_label(head, kind) else word


# What stands before the colon of a place without being an instance: this computer, a cloud.
PLACES = ("local", "drive", "gdrive", "s3", "b2", "dropbox", "azure", "gcs", "hf", "vast")


def is_label(word: str, kind: Kind) -> bool:
    """Is a word that stands for an instance its label?"""
    word = word.strip()
    mistyped = word[:1].isdigit() and word.isalnum()  # an id, perhaps
    if mistyped or not word.strip("0123456789 .,_") or word[0] in "-+":
        return False
    letters, point, digits = word.partition(".")  # C.7 and the like go to the service as they are
    known = word.rstrip(":") in PLACES or (point and letters.isalnum() and digits.isdigit())
    return not (known and kind.convert in (GIVEN_ID.convert, PLACE.convert))


def look_up_labels(client: VastAI, labels: list[str]) -> dict[str, int]:
    """{label: id of its instance}, from one request.  Raises NotFoundError for a label that none
    has, UsageError for one that several have.
    """
    first = f"{printable(labels[0], 60)!r}"
    if client.curl:
        raise UsageError(f"--curl sends nothing to look up {first}; give the id")
    try:
        rows = client.show_instances(label=labels)
    except VastAIError as error:
        raise relabel_error(error, f"the label {first} cannot be looked up") from error
    found = {}
    for label in labels:
        named_so = [row for row in rows if text_of(row, "label") == label.strip()]
        ids = [whole_of(row, "id") for row in named_so]
        named = f"labeled {printable(label, 60)!r}"
        if not ids:
            raise NotFoundError(f"no instance {named}; see `vastai show instances`")
        if len(ids) > 1:
            several = ", ".join(map(str, ids[:20]))
            raise UsageError(f"{len(ids)} instances are {named}: {several}; give the id")
        if ids[0] is None:
            raise VastAIError(f"the service sent no id of the instance {named}")
        found[label] = ids[0]
    return found


# Unknown words


def unknown_option_error(row: Command, word: str) -> UsageError:
    """The error of a word that looks like an option.  What may be a secret is not repeated: neither
    a value, nor anything if a secret is due.
    """
    name = word.partition("=")[0] if word.startswith("--") else word[:2]
    hidden = any(arg.secret and not arg.option for arg in row.args)
    for arg in (*row.args, *GLOBAL_ARGS.args):  # those of the SDK as well
        for flag in arg.flags if arg.secret else ():
            if canonical(name).startswith(canonical(flag)):
                name = flag
    close = suggest_option(row, name)
    if hidden:
        return UsageError(f"no such option; write -- before a value that begins with -{close}")
    return UsageError(f"no option {without_value(name)!r}{close}")


def suggest_option(row: Command, name: str) -> str:
    """'; did you mean --order?' for an option that a command does not have, or nothing."""
    plain = name.lstrip("-").replace("-", "_")
    for arg in row.args_of("cli"):
        if not arg.option and plain in (arg.name, *arg.old):
            return f"; {placeholder(arg)} is a word of its own: `{usage_of(row)[7:]}`"
    fields = [field for field, _ in field_help(row.fields)] if row.fields else []
    if plain in fields:
        return f"; write it as a condition: '{plain}=…'"
    options = (arg for arg in args_of_line(row) if arg.option and not arg.hidden)
    known = [canonical(flag) for arg in options for flag in (*arg.flags, *arg.shortcuts)]
    for flag in HABITS.get(canonical(name), "").split():
        if flag in known:
            return f"; did you mean {flag!r}?"
    return suggest(canonical(name), filter(lambda flag: flag.startswith("--"), known))


def unknown_command_message(words: list[str]) -> str:
    """What to say of words that name no command."""
    if commands_of_verb(words[0]) and len(words) == 1:
        return f"`vastai {words[0]}` is not complete; choose one:\n{overview(words[0]).rstrip()}"
    name = " ".join(map(without_value, words))
    problem = f"no command {name!r}" if len(name) <= 48 else "no such command"
    verb = f"vastai {words[0]}" if commands_of_verb(words[0]) else "vastai --help"
    meant = suggest_command(words)
    return f"{problem}{meant} See `{verb}`" if meant else f"{problem}; see `{verb}`"


def suggest_command(words: list[str]) -> str:
    """'; did you mean 'show user'?' for words that name no command, or nothing."""
    plain = " ".join(words[:2]).lower().replace("-", " ").replace("_", " ")
    first, *others = plain.split()[:2] or [""]
    verbs = [first, *VERBS.get(first, "").split()] if others else ["show", "search"]
    named = ["instance" if is_id(word) else word for word in others or [first]]  # start 4242
    things = [thing for word in named for thing in (word, word + "s", word.rstrip("s"))]
    likely = [f"{verb} {thing}" for verb in verbs for thing in things]
    for name in [*likely, HABITS.get(words[0].lower(), "")]:
        if name in NAMES or name.startswith("--"):
            return f"; did you mean {name!r}?"
    own = commands_of_verb(words[0])
    verb = "" if own else suggest(words[0], {n.split()[0] for n in NAMES})

    def fits(name: str) -> bool:  # the verb that they share makes any two names alike
        thing = name.partition(" ")[2]
        last = words[-1]
        return name not in own or thing.startswith(last) or bool(suggest(last, [thing], 0.6))

    return suggest(" ".join(words), filter(fits, sorted(NAMES))) or verb


# What people type from habit, and what does it here.
HABITS = parse_table("""\
--sort: --order --order-by
--sort-by: --order --order-by
--json: --raw
--output: --format
--verbose: --explain
--force: --yes
--name: --label
--gpus: --num-gpus
login: set api-key
auth: set api-key
configure: set api-key
whoami: show user
balance: show user
credit: show user
status: show instances
upgrade: update
ls: show instances
ps: show instances
list: show instances
rm: destroy instance
kill: destroy instance
rent: create instance
bid: change bid
exec: execute
ssh-key: show ssh-keys
version: --version""")


# those of other programs
VERBS = parse_table("""\
list: show search
ls: show search
get: show search
describe: show
find: search
rm: destroy delete remove
remove: delete destroy
delete: destroy remove
destroy: delete
kill: destroy
terminate: destroy
new: create
add: create attach
rent: create
edit: update
modify: update
restart: reboot""")


# Help


def run_help(call: Call) -> Row:
    """The table for programs: all commands, one, or those that begin with a word."""
    row, _, unknown = find_command(call["command"] or [])
    rows = [row] if row else list(COMMANDS.values())
    if unknown:
        rows = [NAMES[name] for name in commands_of_verb(unknown[0])]
        if len(unknown) > 1 or not rows:
            raise UsageError(unknown_command_message(unknown))
    return {
        "version": __version__,
        "commands": [describe_command(row) for row in dict.fromkeys(rows)],
        "options": [describe_argument(arg, "cli") for arg in GLOBAL_ARGS.args],
        "exit_statuses": EXIT_STATUSES,
    }


def help_text(call: Call, document: Row) -> str:
    """The help of a command, or of all that begin with a word."""
    row, _, unknown = find_command(call["command"] or [])
    verb = unknown[0] if unknown else ""
    return command_help(row) if row else overview(verb, call.client.profile)


def describe_command(row: Command) -> Row:
    """A row of the table for programs."""
    return {
        "name": row.name,
        "aliases": row.aliases,
        "method": row.methods[0] if row.face != "cli" else None,
        "command_line": row.face != "sdk",
        "group": row.group,
        "summary": row.summary,
        "effect": row.effect,
        "repeatable": row.safe,
        "asks": bool(row.ask or row.asks),
        "arguments": [describe_argument(arg, arg.face) for arg in row.args if not arg.hidden],
        "returns": row.annotation,
        "exit_statuses": exit_statuses(row),
    }


def describe_argument(arg: Arg, face: str) -> Row:
    """An argument for programs: its spellings, and what it takes."""
    default = arg.cli if face == "cli" else arg.default
    return {
        "name": arg.name,
        "flags": arg.flags if arg.option else [],
        "face": face or "both",
        "help": arg.help,
        "type": arg.annotation,
        "required": default is REQUIRED,
        "default": None if default is REQUIRED else default,
        "unit": unit_of(arg),
        "choices": list(arg.choices),
        "many": arg.several,
        "secret": arg.secret,
    }


def exit_statuses(row: Command) -> list[int]:
    """The statuses that a command can end with, besides those of programs that it runs."""
    names = {arg.name for arg in row.args}
    found = {0, 1, 2, 130}
    if row.path or row.auth or "query" in names:
        found |= {3, 4, 5, 6}
    if not row.safe:
        found.add(7)
    rents = row.effect == SPENDS and not row.safe
    if row.gaps or rents or names & {"ids", "machines"}:
        found.add(8)
    if names & {"max_wait", "timeout", "max_hours"}:
        found.add(9)
    if rents:
        found |= {129, 143}
    if row.status:
        found.add(141)
    return sorted(found)


EXIT_STATUSES = parse_table("""\
0: done, as the service confirmed
1: the service refused or failed
2: wrong use; nothing was sent
3: not allowed: no key, a wrong one, or a second factor is needed
4: no such thing
5: rate limit
6: the service was not reached, or a request that may be repeated got no answer
7: outcome unknown: a request that must not be repeated got no answer
8: a part failed; the rest was done
9: a wait ran out of time
129: SIGHUP ended it
130: interrupted
141: nobody reads its output anymore
143: SIGTERM ended it""")


USAGE = "usage: vastai COMMAND [argument …] [option …]"


START_PAGE = parse_table("""\
search offers 'gpu_name=RTX_4090': find machines to rent, with their prices
create instance OFFER --image IMAGE --ssh: rent one of them
show instances: list what you rent
ssh INSTANCE: open a shell on it
destroy instance INSTANCE: destroy it and stop paying
set api-key: save your API key, once
COMMAND --help: explain a command, with examples
--help: list all commands and options""")


def start_page() -> str:
    """What `vastai` alone prints."""
    pairs = [(f"vastai {line}", meaning) for line, meaning in START_PAGE.items()]
    width = min(terminal_width(), 120)
    return join_blocks(
        [wrap_text(USAGE, width, 7), *help_sections({"Rent GPUs at Vast.ai": pairs}, 54, width)]
    )


def help_sections(sections: dict[str, Pairs], wide: int, width: int) -> Iterator[str]:
    """The sections of a help text by their titles: names, and what they mean."""
    for title, pairs in sections.items():
        yield "\n".join([f"{title}:", *(two_columns(*pair, wide, width) for pair in pairs)])


def join_blocks(blocks: Iterable[str]) -> str:
    return "\n\n".join(blocks) + "\n"


def profile_of(seen: Row) -> str:
    """The profile that the options of a line choose; "" if it cannot be told."""
    try:
        return profile_name(seen.get("profile"))
    except UsageError:
        return ""


def overview(verb: str = "", profile: str = "") -> str:
    """The commands in groups with a line each, fitted to the terminal; with a verb those that begin
    with it.
    """
    rows = [row for row in COMMANDS.values() if row.face != "sdk"]
    rows = [row for row in rows if not verb or row.name.split()[0] == verb] or rows
    if not verb and read_key(profile_file("vast_role", profile)) == "client":
        rows = [row for row in rows if not row.hosts]
    width = min(terminal_width(), 120)
    wide = max(len(row.name) for row in rows) + 4
    about = "Rent GPUs at Vast.ai. `vastai COMMAND --help` explains a command."
    sections: dict[str, Pairs] = {}
    for row in rows:
        sections.setdefault(row.group, []).append((row.name, row.summary))
    if not verb:
        options = [(format_flags(arg), format_meaning(arg)) for arg in GLOBAL_ARGS.args]
        sections["Options of every command"] = options
    head = [] if verb else [wrap_text(USAGE, width, 7), wrap_text(about, width)]
    return join_blocks([*head, *help_sections(sections, wide, width)])


# in this order
LAST_GROUPS = ("Access", "Disk and volumes", "Price and time", "Waiting", "Options")


def command_help(row: Command) -> str:
    """Usage, arguments, options in groups, fields of the query language and examples of a
    command.
    """
    width = min(terminal_width(), 120)
    mine = [arg for arg in row.args_of("cli") if not arg.hidden]
    blocks = [wrap_text(usage_of(row), width, 7), wrap_text(f"{row.summary}.", width)]
    if row.note:
        blocks.append(wrap_text(row.note, width))
    sections: dict[str, Pairs] = {}
    for arg in mine:
        title = arg.group or "Options" if arg.option else "Arguments"
        pairs = sections.setdefault(title, [])
        pairs += [(format_flags(arg), format_meaning(arg)), *short_ways(arg)]
    for title in LAST_GROUPS:
        if title in sections:
            sections[title] = sections.pop(title)
    if row.fields:
        sections["Fields of the query"] = field_help(row.fields)
    blocks += help_sections(sections, 28, width)
    if row.fields:
        blocks.append(wrap_text(QUERY_HELP, width))
    if row.aliases:
        blocks.append(wrap_text(f"Other name: vastai {', vastai '.join(row.aliases)}", width))
    if row.examples:
        lines = [f"vastai {row.name} {words}".rstrip() for words in row.examples.split("\n")]
        blocks.append("\n".join(["Examples:", *(format_example(line, width) for line in lines)]))
    everywhere = " ".join(arg.flags[-1] for arg in GLOBAL_ARGS.args)
    blocks.append(wrap_text(f"Options of every command: {everywhere}", width, 2))
    if row.face != "cli":
        blocks[-1] += f"\nIn Python: VastAI().{row.methods[0]}(…)"
    return join_blocks(blocks)


QUERY_HELP = (
    "Operators: > >= < <= = != in notin. A list is [A,B]; write a text with spaces as A_B or in "
    "double quotes. All conditions must hold."
)


def format_example(line: str, width: int) -> str:
    """A command line to copy, continued with a backslash if it is wider than the terminal."""
    words: list[str] = []
    for word in line.split(" "):
        if words and words[-1].count("'") % 2:  # within quotes
            words[-1] += f" {word}"
        elif words and words[-1].startswith("-") and not word.startswith("-"):
            words[-1] += f" {word}"  # a value stays with its option
        else:
            words.append(word)
    lines = [f"  {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) <= width - 2:
            lines[-1] += f" {word}"
        else:
            lines.append(f"      {word}")
    return " \\\n".join(lines)


def usage_of(row: Command) -> str:
    """The usage line.  Options stand after the arguments, but before words that go elsewhere."""
    mine = [arg for arg in row.args_of("cli") if not arg.hidden]
    words = [placeholder(arg) for arg in mine if not arg.option]
    flags = [arg for arg in mine if arg.option]
    due = [arg for arg in flags if arg.cli is REQUIRED or arg.name == row.needs]
    options = [f"{arg.flags[-1]} {arg.kind.metavar}" for arg in due]
    if len(flags) > len(due):
        options.append("[option …]")
    if any(arg.rest and not arg.option for arg in mine):
        words = options + words
    elif any(arg.kind.convert is WORDS.convert and not arg.option for arg in mine):
        words[-1:] = [*options, "--", words[-1]]
    else:
        words += options
    return " ".join([f"usage: vastai {row.name}", *words])


def word_of(arg: Arg) -> str:
    """The name of a positional argument in the help: for an id, the kind of thing it names."""
    word = arg.flags[0].upper().replace("_", "-")
    is_id = word.rstrip("S").endswith("ID") and arg.kind.metavar != "ID"
    return arg.kind.metavar if is_id else word


def placeholder(arg: Arg) -> str:
    """A positional argument as it appears in a usage line."""
    word = word_of(arg)
    word = f"{word} …" if arg.many else word
    return word if arg.default is REQUIRED else f"[{word}]"


def format_flags(arg: Arg) -> str:
    """An argument as it is typed."""
    if not arg.option:
        return placeholder(arg)
    flags = ", ".join(arg.flags)
    if arg.kind is FLAG:
        return flags
    if arg.rest:
        return f"{flags} …"
    word = "{" + ",".join(map(str, arg.choices)) + "}" if has_few_choices(arg) else arg.kind.metavar
    return f"{flags} {word}" + (" …" if arg.many and not arg.again else "")


def format_meaning(arg: Arg) -> str:
    """What an argument's help says, with its choices unless they stand beside it, and its
    default.
    """
    facts = []
    if arg.choices and not has_few_choices(arg):
        facts.append(f"one of {', '.join(map(str, arg.choices))}")
    if arg.secret:
        facts.append("- reads it from stdin")
    if arg.cli not in (REQUIRED, None, False, ""):
        default = str(arg.cli).lower() if isinstance(arg.cli, bool) else arg.cli
        facts.append(f"default {format(default, 'g' if isinstance(default, float) else '')}")
    return f"{arg.help} ({'; '.join(facts)})" if facts else arg.help


def has_few_choices(arg: Arg) -> bool:
    return bool(arg.choices) and len(str(arg.choices)) < 40


def short_ways(arg: Arg) -> Iterator[Pair]:
    """The flags that stand for a value of an option, and what they stand for."""
    for value in dict.fromkeys(arg.shortcuts.values()):
        flags = [flag for flag, meant in arg.shortcuts.items() if meant == value]
        yield ", ".join(flags), f"same as {arg.flags[-1]} {value}"


# ------------------------------------------------------------------------------------------- shells
# Completion and the prompt.  The scripts only ask back, `vastai __complete WORD …`, so that the
# table alone decides.

# no meaning: the shell completes the names of files
FILES = "FILE"


def complete(words: Sequence[str], start: Row | None = None) -> Pairs:
    """What the last of `words` (a line without its `vastai`) can become, each with its meaning or
    "".

    If files are due there is one pair, of what stands before the name and FILES.  `start`: as for
    run_line.
    """
    *before, word = words or [""]
    helping = before[:1] == ["help"]
    row, others, stem = find_command(before[1:] if helping else before)
    if row and before[-1] == row.name:  # it may be the first word of others, too
        stem = [row.name]
    typed = TypedWords([] if helping else args_of_line(row), others)
    arg = typed.next_arg()
    prefix = ""
    if arg and arg.rest:  # all that follows belongs to another program
        return []
    if not typed.literal and word.startswith("-"):
        name, equals, _ = word.partition("=")
        if not equals or not word.startswith("--"):
            return list(option_words(typed, word))
        arg = typed.options.get(canonical(word))
        prefix = f"{name}="
    names = {"api_key", "profile", "url"}.intersection(typed.seen)
    whom = {name: typed.seen[name] for name in names}
    values = value_words(arg, row, {**(start or {}), **whom}, before)
    found = [(prefix + text, meaning) for text, meaning in values]
    if not prefix and not typed.due and (stem or not row):
        found = next_words(stem) + found
    elif not word and not arg:
        found = list(option_words(typed, ""))
    return [pair for pair in found if FILES in pair or pair[0].startswith(word)]


def option_words(typed: TypedWords, word: str) -> Iterator[Pair]:
    """The options that begin with `word` and can still be given, with their meanings."""
    for arg in dict.fromkeys(typed.options.values()):
        if arg.hidden or (arg.name in typed.seen and not arg.again):
            continue
        for flag in (*arg.flags, *arg.shortcuts):
            start = flag[:2]
            name = flag[2:]
            forms = (flag, start + name.replace("_", "-"), start + name.replace("-", "_"))
            form = next((form for form in forms if form.startswith(word)), "")
            if form.startswith("--") or (form and form == word):
                same = f"{arg.flags[-1]} {arg.shortcuts[flag]}" if flag in arg.shortcuts else ""
                yield form, same or arg.help


def next_words(stem: list[str]) -> Pairs:
    """The words that go on from `stem` to the name of a command."""
    found = {}
    start = "".join(f"{word} " for word in stem)
    for row in COMMANDS.values():
        if row.face != "sdk" and row.name.startswith(start):
            word, _, rest = row.name[len(start) :].partition(" ")
            if not rest or word not in found:
                found[word] = rest or row.summary
            elif len(found[word]) < 50:
                found[word] += f", {rest}"
    return list(found.items())


def value_words(arg: Arg | None, row: Command | None, given: Row, before: Sequence[str]) -> Pairs:
    """The values that an argument can take, if they are known, each with its meaning; not those
    that its list has already.
    """
    found: Pairs = []
    if arg is None:
        return found
    if arg.choices or arg.kind is TRUTH:
        found = [(str(choice), "") for choice in arg.choices or ("true", "false")]
    elif row and row.fields and arg.kind in (QUERY, ORDER):
        found = field_help(row.fields)
    elif arg.kind.completes == "instances":
        found = instance_ids(given)
    elif arg.kind.completes == "files":
        found = [("", FILES)]
    return [pair for pair in found if not arg.many or pair[0] not in before]


def instance_ids(given: Row) -> Pairs:
    """Your instances: at most a minute old, asked for at most two seconds, none if that fails."""
    import threading

    found: Pairs = []

    def ask() -> None:
        try:
            given.update(retry=1, timeout=2, explain=False, curl=False)
            client = client_of({**given, **check_params(GLOBAL_ARGS, given, cli=True)})
            from hashlib import sha256

            whose = sha256(f"{client.server_url} {client.api_key}".encode()).hexdigest()[:24]
            path = own_file("cache", f"instances-{whose}")
            cached = os.path.exists(path) and 0 <= time.time() - os.stat(path).st_mtime < 60
            if cached:
                lines = _read_file(path).splitlines()
            else:
                row = METHODS["show_instances"]
                params = check_params(row, {}, cli=False)
                lines = completion_lines(perform(Call(client, row, params, View(quiet=True))))
            parts = (line.partition("\t") for line in lines)
            found.extend((word, meaning) for word, _, meaning in parts)
            if not cached:
                write_private(path, "\n".join(lines))
        except Exception:  # noqa: BLE001 - nothing to offer, and nothing to say amid a line
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2)  # a look-up of the service's name knows no timeout
    return found


def completion_lines(rows: list[Row]) -> list[str]:
    """A line for each instance, its id and what it is, and one for each label that names a single
    instance and needs no quotes.
    """
    import re

    facts = ("actual_status", "num_gpus", "gpu_name", "label")
    lines = []
    labels = [text_of(row, "label") for row in rows]
    for row, label in zip(rows, labels):
        id = str(_whole(row["id"]))
        meaning = " ".join(printable(str(row[name])) for name in facts if row.get(name))
        lines.append(f"{id}\t{meaning}")
        if re.fullmatch(r"[A-Za-z_.][\w.-]*", label, re.A) and labels.count(label) == 1:
            lines.append(f"{label}\tinstance {id}")
    return lines


def run_completion(call: Call) -> str:
    return SCRIPTS[call["shell"]]


SCRIPTS = {
    "bash": r"""# Completion of vastai for bash; in ~/.bashrc: eval "$(vastai completion bash)"
_vastai() {
    local i line last=${COMP_WORDS[COMP_CWORD]} head words=()
    for ((i = 1; i <= COMP_CWORD; i++)); do  # bash splits --a=b and a:b; that is undone
        if [[ $i -gt 1 && (${COMP_WORDS[i]} == [=:]* || ${COMP_WORDS[i-1]} == *[=:]) ]]; then
            words[${#words[@]}-1]+=${COMP_WORDS[i]}
        else
            words+=("${COMP_WORDS[i]}")
        fi
    done
    [[ $last == [=:]* ]] && last=
    i=$((${#words[@]} - 1)) head=${words[i]%"$last"} words[i]=${words[i]#[\'\"]}
    head=${head#[\'\"]} COMPREPLY=()
    while IFS= read -r line; do
        if [[ $line == *$'\tFILE' ]]; then
            compopt -o default 2> /dev/null || IFS=$'\n' COMPREPLY=($(compgen -f -- "$last"))
        else
            line=${line%%$'\t'*} COMPREPLY+=("${line#"$head"}")
        fi
    done < <("${COMP_WORDS[0]/#\~/$HOME}" __complete "${words[@]}" 2> /dev/null)
}
complete -F _vastai vastai vastai.py
""",
    "zsh": r"""#compdef vastai vastai.py
# Completion of vastai for zsh; in ~/.zshrc: eval "$(vastai completion zsh)"
_vastai() {
    local line
    local -a found
    for line in "${(@f)$("${(Q)words[1]/#\~/$HOME}" __complete "${(@Q)words[2,CURRENT-1]}" \
                         "${(Q)PREFIX}" 2> /dev/null)}"; do
        case $line in
            (*$'\tFILE') compset -P '--*='; _files; return ;;
            (?*$'\t'*) found+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}") ;;
            (?*) found+=("${line//:/\\:}") ;;
        esac
    done
    _describe vastai found
}
if [[ $funcstack[1] == _vastai ]]; then
    _vastai "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }
    compdef _vastai vastai vastai.py
fi
""",
    "fish": r"""# Completion of vastai for fish; in ~/.config/fish/config.fish: vastai completion fish | source
function __vastai_complete
    set -l words (commandline -opc)
    set -l program (string replace -r '^~(?=/)' -- $HOME $words[1])
    set -e words[1]
    set -l last (commandline -ct)
    for line in ($program __complete $words "$last" 2> /dev/null)
        set -l parts (string split \t -- $line)
        if test "$parts[2]" = FILE
            set -l start (string length -- "$parts[1]")
            __fish_complete_path (string sub -s (math $start + 1) -- "$last") | string replace -r '^' -- "$parts[1]"
        else
            printf '%s\n' $line
        end
    end
end
complete -c vastai -f -a '(__vastai_complete)'
complete -c vastai.py -f -a '(__vastai_complete)'
""",
}


def run_repl(call: Call) -> None:
    """Runs commands from stdin, each with the global options of this one."""
    if isinstance(call.client.pool, KeptPool):
        raise UsageError("this is the prompt already")
    status = repl({**call.view.common, "raw": False})  # --raw would outdo the --format of a line
    if status:
        raise ProgramError("", exit_status=status)


class KeptPool(Pool):
    """Connections that outlive the clients that use them."""

    def close(self) -> None:
        pass


def repl(start: Row) -> int:
    """Runs commands from stdin, each with the global options `start`, over one pool of connections.

    At a terminal the answer is 0; of a script it is the status of the last command that failed.
    """
    talking = is_terminal(sys.stdin)
    status = 0
    failed = 0
    start["pool"] = pool = KeptPool()
    editing = talking and is_terminal(sys.stdout)
    remember = line_editor(start) if editing else None

    def tell(text: str) -> None:
        if talking:
            write_err(text)

    while True:
        prompt = f"vastai [{status}]> " if status else "vastai> "
        try:
            if editing:
                line = input(prompt) + "\n"
            else:
                tell(prompt)
                text = read_line(-1)
                line = "" if text is None else text + "\n"
        except KeyboardInterrupt:
            if not talking:
                raise
            tell("\n")
            continue
        except (EOFError, OSError, ValueError):  # at the end, or closed
            line = ""
        try:
            words = line_words(line)
        except UsageError as error:
            status = failed = report(error, ["--raw"] if start["format"] == "json" else [])
            continue
        if not line or words in (["exit"], ["quit"]):
            break
        if not words:
            continue
        if remember:
            remember(line.rstrip("\n"), words)
        status = run_guarded(words, start)
        failed = status or failed
        if status == 130:
            if not talking:
                break
            tell("\n")
    Pool.close(pool)
    tell("" if line else "\n")
    return 0 if talking else failed


def line_words(line: str) -> list[str]:
    """The words of a line at the prompt, without a `vastai` before them; none of a comment.

    Raises UsageError if a quote is open.
    """
    words = [] if line.lstrip().startswith("#") else shell_words(line)
    return words[1:] if words[:1] == ["vastai"] else words


def shell_words(line: str) -> list[str]:
    """The words of a line, quotes and backslashes read as a shell does; UsageError if a quote is
    open.

    shlex does the same, and takes 15 s for a word of a megabyte.
    """
    import re

    words: list[list[str]] = []
    end = -1
    for piece in re.finditer(
        r"""'([^']*)'|"([^"\\]*(?:\\.[^"\\]*)*)"|\\(.)|[^ \t\r\n'"\\]+|\S""", line, re.S
    ):
        text = piece.group()
        if text in "'\"\\":
            fault = f"has a quote {text} that is not closed"
            if text == "\\":
                fault = "ends in a backslash"
            raise UsageError(f"cannot read the line: it {fault}")
        if piece.start() != end:
            words.append([])
        end = piece.end()
        inner = piece.group(piece.lastindex or 0)
        words[-1].append(re.sub(r'\\(["\\])', r"\1", inner) if text[0] == '"' else inner)
    return list(map("".join, words))


def line_editor(start: Row) -> Callable[[str, list[str]], None] | None:
    """Gives input() editing, completion and a history; returns the function that remembers a line,
    or None if Python has no readline.
    """
    import shlex

    try:
        import readline
    except ImportError:
        return None
    path = own_file("cache", "history")
    found: Pairs = []

    def lines_before() -> list[str]:
        try:
            return _read_file(path).splitlines()[-1000:]
        except UsageError:
            return []

    def offer(text: str, state: int) -> str | None:
        if not state:
            try:
                words = line_words(readline.get_line_buffer()[: readline.get_begidx()])
                found[:] = complete([*words, text], start)
            except Exception:  # noqa: BLE001 - an open quote; nothing may be said amid a line
                found.clear()
            if found and found[0][1] == FILES:
                from glob import escape, glob

                head = found[0][0]
                found.clear()
                for name in sorted(glob(escape(os.path.expanduser(text[len(head) :])) + "*")):
                    end = "/" if os.path.isdir(name) else ""
                    found.append((f"{head}{shlex.quote(name)}{end}", ""))
        word = found[state][0] if state < len(found) else None
        return word if word is None or word.endswith("/") else word + " "

    def remember(line: str, words: list[str]) -> None:
        readline.add_history(line)
        if not may_tell_secret(words):
            try:
                write_private(path, "\n".join([*lines_before()[-999:], line]) + "\n")
            except (UsageError, ValueError):
                pass

    readline.set_auto_history(False)
    readline.set_completer(offer)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind(
        "bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete"
    )
    for line in lines_before():
        readline.add_history(line)
    return remember


def may_tell_secret(words: list[str]) -> bool:
    """Is a secret among the arguments of a line?  One that cannot be read counts as if."""
    row, rest, _ = find_command(words)
    if not row:
        return True
    try:
        given, common = parse_line(row, rest)
    except UsageError:
        return True
    values = {**common, **given}
    return any(arg.secret and values.get(arg.name) is not None for arg in args_of_line(row))


# --------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: runs `argv` (sys.argv without its first word, if not given) and returns the
    exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # surrogateescape: as in sys.argv
        errors = "surrogateescape" if stream is sys.stdin else "backslashreplace"
        try:
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)
        except ValueError:  # it is closed, or the program has read from it
            pass
    status = run_guarded(words)
    for stream in (sys.stdout, sys.stderr):
        try:
            flush(stream)
        except OSError:
            discard(stream)
    return status


def program() -> NoReturn:
    """The command line as its own process, which exits after main() without the interpreter's
    cleanup.

    That cleanup takes a tenth of a short run.  Profilers need it: VASTAI_DEBUG=1 keeps it.
    """
    gc.set_threshold(100_000)  # what a short process makes is hardly ever garbage
    status = main()
    if os.getenv("VASTAI_DEBUG"):
        sys.exit(status)
    os._exit(status)


def run_guarded(words: list[str], start: Row | None = None) -> int:
    """Runs a command line as run_line does and says what went wrong; returns the exit status."""
    debug = os.getenv("VASTAI_DEBUG")
    status = 0
    said_as = ["--raw"] if start and start["format"] == "json" else words
    try:
        try:
            status = run_line(words, start)
        except VastAIError as error:
            if debug:
                raise
            status = error.exit_status
            report(error, said_as)
        flush(sys.stdout)
        return status
    except KeyboardInterrupt as signal:
        if is_terminal(sys.stderr):
            write_err(CLEAR if erasable(sys.stderr) else "\n")
        unsaid = signal.__context__  # it came while an error was about to be said
        if isinstance(unsaid, VastAIError) and unsaid.found:
            report(unsaid, said_as)
        if start and isinstance(signal, Interrupted):
            raise  # it ends the prompt, too, and the lines of a script that follow
        return getattr(signal, "exit_status", 130)
    except BrokenPipeError:  # the reader has closed the pipe
        if start:
            raise  # nobody would see what the next lines bring
        discard(sys.stdout)
        return status
    except Exception as error:  # no traceback for a user; VASTAI_DEBUG=1 shows it
        if debug or (start and isinstance(error, OSError) and not error.filename):
            raise
        if isinstance(error, OSError):
            name = printable(str(error.filename or "stdout"), 300)
            problem = f"cannot use {name}: {error.strerror or error}"
            discard(sys.stdout)
        else:
            words_of_it = printable(f"{type(error).__name__}: {error}", 300)
            problem = (
                f"{words_of_it} (a defect of this program; VASTAI_DEBUG=1 shows the traceback)"
            )
        report(VastAIError(problem, command="vastai"), said_as)
        return 1


def report(error: VastAIError, words: Sequence[str]) -> int:
    """A failure on stderr, as text or, with --raw, as one JSON object; the exit status."""
    if error.msg:  # first, as it must not be lost with stdout
        import json

        members = {"error": True, "status_code": error.status, "msg": error.msg}
        more = {"hint": error.hint, "found": error.found, "tries": error.details.get("tries")}
        members.update({name: value for name, value in more.items() if value})
        if wants_json(words):
            show_progress("")
            write_err(json.dumps(members) + "\n")
        else:
            say(str(error))
    if isinstance(error, PartialError) and error.results:
        write_out(format_json(error.results) + "\n")
    return error.exit_status


def wants_json(words: Sequence[str]) -> bool:
    """Does a line ask for JSON?  Also one that cannot be parsed."""
    row, rest, _ = find_command(list(words))
    seen = TypedWords(args_of_line(row), rest).seen
    return "raw" in seen or seen.get("format") == "json"


# `import vastai.cli.main`: in the official package that is a module.
main.main = main  # type: ignore[attr-defined]

resolve_table()
if collecting:
    gc.enable()

if __name__ == "__main__":
    program()
