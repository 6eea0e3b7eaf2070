"""A client of OpenAI-compatible chat servers (vLLM, SGLang, ``transformers serve``, hosted ones) that gets through.

Covers: many requests at a time; retries with exponential backoff and jitter on refused and broken connections,
timeouts, 408, 409, 425, 429, 5xx and answers that are no JSON; ``Retry-After``; limits of requests and tokens a minute;
a timeout for each try and one for all of a request's tries; telling a server that is down from a picture that it
refuses.
Does not cover: streaming, other endpoints than ``/models`` and ``/chat/completions``, several servers at once.

The HTTP library is the one that ``huggingface_hub`` brings: ``httpx2``, or ``httpx`` with its older releases; the two
have one interface. Redirects are not followed, so that a key goes to the named host only. The key comes from an
environment variable, lives in the client alone, and is cut out of everything that a server says before that is shown.
"""

from __future__ import annotations

import email.utils
import json
import os
import queue
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from leaml_plugin.errors import LeamlError
from leaml_plugin.progress import duration
from leaml_plugin.teachers import Answer, Failure

T = TypeVar("T")

_END: Any = object()
_GRACE = 20.0  # seconds that answers under way may still come after something went wrong

MAX_ANSWER = 16 << 20
"""An answer of more bytes than this is not read to its end (a caption has some hundred)."""

_BUSY = (429, 502, 503, 504, 529)  # the server is full, or coming up again: waiting helps, however often
_RETRIED = (408, 409, 425, *_BUSY)


@dataclass(frozen=True)
class ServerConfig:
    """How a server is spoken to. Nothing here changes what it is asked, so an unfinished run goes on with other values.

    Attributes:
        concurrency: requests under way at a time.
        retries: further tries of a request that the server answers wrongly or breaks off. Tries while it is down or
            busy do not count; those end with ``total_timeout``.
        timeout: seconds for one try, from sending to the last byte.
        total_timeout: seconds for all tries of one request, waits included. A server that is down for longer ends the
            run; the same command takes it up.
        wait: seconds to wait at the start for a server that does not answer yet.
        backoff: seconds before the first retry, doubled with each further one, with jitter.
        max_backoff: the longest such wait in seconds. What the server asks for (``Retry-After``) is never shortened.
        requests_per_minute, tokens_per_minute: limits; 0: none. Tokens are those of prompt and answer; what a request
            will need is estimated from the answers so far.
        max_failures: stop when so many pictures in a row got no answer; what they were told is not recorded then.
        price_prompt, price_completion: price of a million tokens, in any currency; the costs are told in the same.
        max_cost: stop when the captions of this run have cost more; 0: no limit.
        api_key_env: the environment variable with the API key; none is sent where it is not set.
    """

    concurrency: int = 8
    retries: int = 6
    timeout: float = 300.0
    total_timeout: float = 1800.0
    wait: float = 30.0
    backoff: float = 0.5
    max_backoff: float = 30.0
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    max_failures: int = 8
    price_prompt: float = 0.0
    price_completion: float = 0.0
    max_cost: float = 0.0
    api_key_env: str = "LEAML_API_KEY"

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("max_failures", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise LeamlError(f"server: {name} is {getattr(self, name)}; it must be at least {least}.")
        for name in ("timeout", "total_timeout", "max_backoff"):
            if getattr(self, name) <= 0:
                raise LeamlError(f"server: {name} is {getattr(self, name)}; it must be positive.")
        for name in ("wait", "backoff", "requests_per_minute", "tokens_per_minute", "price_prompt", "price_completion",
                     "max_cost"):  # fmt: skip
            if getattr(self, name) < 0:
                raise LeamlError(f"server: {name} is {getattr(self, name)}; it must not be negative.")
        if self.max_cost and not (self.price_prompt or self.price_completion):
            raise LeamlError("server: max_cost needs price_prompt and price_completion (a million tokens).")

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.price_prompt + completion_tokens * self.price_completion) / 1e6


def check_url(url: str) -> str:
    """The base address of a server, ending in its version (``/v1`` where no path is given).

    Raises:
        LeamlError: not http or https, no host, or a key inside.
    """
    match = re.fullmatch(r"(https?)://([^/?#]+)(/[^?#]*)?", url.strip(), re.IGNORECASE)
    if match is None:
        shown = re.sub(r"//[^/@]*@", "//***@", re.split(r"[?#]", url)[0])
        raise LeamlError(f"{shown!r} is no address of a server; write http://host:port/v1, keys and queries left out.")
    scheme, host, path = match.groups()
    if "@" in host:
        host = host.rpartition("@")[2]
        raise LeamlError(f"the address at {host} holds a password; put it into the variable of the key.")
    return f"{scheme.lower()}://{host}{(path or '').rstrip('/') or '/v1'}"


class _Problem(Exception):
    """One try came to nothing. ``counts``: it counts against ``retries``; ``down``: the server is not there."""

    def __init__(self, text: str, *, counts: bool, down: bool = False, after: float = 0.0):
        super().__init__(text)
        self.counts, self.down, self.after = counts, down, after


class _Rejected(Exception):
    """The server will never answer this request."""

    def __init__(self, text: str, refusal: bool = False):
        super().__init__(text)
        self.refusal = refusal


class _Pace:
    """Limits of requests and tokens a minute, kept by even spacing; and a pause for everybody.

    A request starts no earlier than ``60 / limit`` seconds after the one before; with tokens, after the time that the
    tokens before it take at the limit. So no window of a minute holds more than the limit (and one request).
    """

    def __init__(self, requests: float, tokens: float, estimate: float, clock: Callable[[], float]):
        self._per_request = 60 / requests if requests else 0.0
        self._per_token = 60 / tokens if tokens else 0.0
        self._estimate, self._clock = estimate, clock
        self._next_request = self._next_token = self._paused = 0.0
        self._lock = threading.Lock()

    def reserve(self) -> tuple[float, float]:
        """When the next request may start (on the clock), and the tokens that it was booked with."""
        with self._lock:
            now = self._clock()
            start = max(now, self._paused, self._next_request, self._next_token)
            self._next_request = start + self._per_request
            self._next_token = start + self._per_token * self._estimate
            return start, self._estimate

    def settle(self, booked: float, used: int | None) -> None:
        """Correct a booking by what was used; ``None``: nothing, since there was no answer."""
        with self._lock:
            self._next_token += self._per_token * ((used or 0) - booked)
            if used is not None:
                self._estimate += 0.2 * (used - self._estimate)

    def pause(self, seconds: float) -> None:
        """Nobody starts for so long."""
        with self._lock:
            self._paused = max(self._paused, self._clock() + seconds)


class ChatClient:
    """Asks one model on one server; use it as a context manager. :meth:`ask` may be called from any thread.

    Args:
        url: the base address, for example ``http://127.0.0.1:8000/v1``.
        model: the model's name there; empty: the only one that the server lists.
        tokens: about how many tokens a request and its answer have; only the token limit asks for it.

    Raises:
        LeamlError: a bad address, or a key that cannot be sent.
    """

    def __init__(self, url: str, model: str, config: ServerConfig, *, tokens: int = 1500):
        try:
            import httpx2 as httpx
        except ImportError:
            import httpx
        self._httpx: Any = httpx
        self.url, self.model, self.config = check_url(url), model, config
        self._key = os.environ.get(config.api_key_env, "").strip() if config.api_key_env else ""
        if not self._key and config.api_key_env not in ("", ServerConfig.api_key_env):
            raise LeamlError(f"the environment variable {config.api_key_env} is not set; put the API key there.")
        if not re.fullmatch(r"[\x21-\x7e]*", self._key):
            raise LeamlError(f"the API key in {config.api_key_env} has characters that no key has; set it again.")
        if self._key and self.url.startswith("http://") and not _is_local(self.url):
            print(f"leaml: warning: the API key goes to {self.url} unencrypted; use https.", file=sys.stderr)
        self._http = httpx.Client(
            timeout=httpx.Timeout(config.timeout, connect=min(10.0, config.timeout), pool=None),
            limits=httpx.Limits(max_connections=config.concurrency + 1, max_keepalive_connections=config.concurrency),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            follow_redirects=False,
            trust_env=not _is_local(self.url),  # a proxy of the environment does not know this machine's loopback
        )
        self._pace = _Pace(config.requests_per_minute, config.tokens_per_minute, float(tokens), time.monotonic)
        self._max_tokens_name = "max_tokens"
        self._stop = threading.Event()
        self._told = -1e9
        self._random = random.Random()
        self.retried = 0
        self.listed: list[str] = []

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is under way."""
        self._stop.set()
        self._http.close()

    # -- one request -----------------------------------------------------------------------------------------------

    def connect(self) -> str:
        """Wait until the server answers, at most ``wait`` seconds; returns the model's name.

        ``listed`` then holds the names of the models that the server tells of.

        Raises:
            LeamlError: nobody answers, the key is refused, or the model must be named.
        """
        deadline = time.monotonic() + self.config.wait
        while True:
            try:
                self.listed = _names(self._exchange("GET", "models", None, min(30.0, self.config.timeout)))
                break
            except _Rejected:
                break  # a server without a list of models
            except _Problem as problem:
                if problem.counts and self.model:
                    break  # somebody is there; requests have their own tries
                if time.monotonic() >= deadline:
                    raise LeamlError(f"{self.url}: {problem}; start the server, or correct the address.") from problem
                self._stop.wait(min(1.0, max(0.05, self.config.backoff)))
        if not self.model:
            if len(self.listed) != 1:
                known = f" ({', '.join(self.listed[:8])})" if self.listed else ""
                raise LeamlError(f"{self.url}: name one of the server's models{known}.")
            self.model = self.listed[0]
        return self.model

    def ask(self, body: Mapping[str, Any]) -> Answer | Failure:
        """The answer to one chat request, after as many tries as it takes.

        Args:
            body: the JSON fields beside ``model``; ``max_tokens`` is renamed where the server wants it.

        Raises:
            LeamlError: the server is down for ``total_timeout``, the key is refused, or there is no such model.
        """
        began = 0.0
        tries = waits = 0
        while True:
            start, booked = self._pace.reserve()
            self._sleep(start - time.monotonic())
            began = began or time.monotonic()  # waiting for one's turn is no trouble with the server
            try:
                answer = self._try(body)
            except _Rejected as rejected:
                self._pace.settle(booked, None)
                if rejected.refusal:
                    return Answer("", "content_filter", str(rejected))
                return Failure("rejected", str(rejected))
            except _Problem as problem:
                self._pace.settle(booked, None)
                tries, waits = tries + problem.counts, waits + 1
                wait = self.config.backoff * 2.0 ** min(waits - 1, 16)
                wait = min(wait, self.config.max_backoff) * self._random.uniform(0.5, 1.0)
                if problem.after:
                    wait = problem.after + self._random.uniform(0, 0.1 * self.config.backoff)
                    self._pace.pause(problem.after)
                elapsed = time.monotonic() - began
                if tries > self.config.retries:
                    return Failure("failed", f"{problem} (try {tries} of {tries})")
                if elapsed + wait > self.config.total_timeout:
                    if problem.counts:
                        return Failure("failed", f"{problem} (for {duration(elapsed)})")
                    asked = f" and asks to wait {duration(problem.after)}" if problem.after else ""
                    raise LeamlError(
                        f"{self.url}: {problem} for {duration(elapsed)}{asked}; everything written so far is kept: "
                        "repeat the command when the server is back."
                    ) from problem
                self.retried += 1
                if problem.down:
                    self._tell(f"{self.url}: {problem}; trying again")
                self._sleep(wait)
            else:
                used = (answer.prompt_tokens or 0) + (answer.completion_tokens or 0)
                self._pace.settle(booked, used or int(booked))
                return answer

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            self._stop.wait(seconds)
        if self._stop.is_set():
            raise _Stopped

    def _tell(self, text: str) -> None:
        """What goes wrong, at most twice a minute."""
        now = time.monotonic()
        if now - self._told > 30:
            self._told = now
            print(f"leaml: {text}.", file=sys.stderr)

    def _try(self, body: Mapping[str, Any]) -> Answer:
        sent = {"model": self.model, **body}
        if "max_tokens" in sent and self._max_tokens_name != "max_tokens":
            sent[self._max_tokens_name] = sent.pop("max_tokens")
        try:
            return self._read(self._exchange("POST", "chat/completions", sent, self.config.timeout))
        except _Rejected as rejected:
            # the newest hosted models know the limit by another name only
            if "max_completion_tokens" in str(rejected) and self._max_tokens_name == "max_tokens":
                self._max_tokens_name = "max_completion_tokens"
                return self._try(body)
            raise

    def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float) -> Any:
        """One HTTP exchange; the parsed JSON of a success."""
        httpx, deadline = self._httpx, time.monotonic() + timeout
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json"} if content is not None else {}
        data = bytearray()
        try:
            with self._http.stream(method, f"{self.url}/{path}", content=content, headers=headers) as response:
                status, told = response.status_code, response.headers
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > MAX_ANSWER:
                        raise _Problem(f"the answer has more than {MAX_ANSWER} bytes", counts=True)
                    if time.monotonic() > deadline:
                        raise _Problem(f"no complete answer in {timeout:g} s", counts=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Problem(f"no connection ({_first_line(error)})", counts=False, down=True) from error
        except httpx.TimeoutException as error:
            raise _Problem(f"no answer in {timeout:g} s", counts=True) from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.LocalProtocolError) as error:
            raise LeamlError(f"{self.url}: {_first_line(error)}; correct the address.") from error
        except httpx.TransportError as error:
            raise _Problem(f"the connection broke off ({_first_line(error)})", counts=True) from error
        except httpx.DecodingError as error:
            raise _Problem(f"the answer cannot be decoded ({_first_line(error)})", counts=True) from error
        except RuntimeError as error:  # a request on a client that close() has closed
            if self._stop.is_set():
                raise _Stopped from error
            raise
        if status == 200:
            try:
                return json.loads(data)
            except (ValueError, RecursionError) as error:
                raise _Problem(f"the answer is no JSON ({self._quote(bytes(data))})", counts=True) from error
        raise self._error(status, told, bytes(data), path)

    def _error(self, status: int, headers: Mapping[str, str], data: bytes, path: str) -> Exception:
        """What a status other than 200 means for the request."""
        message, code = _error_of(data)
        said = f"{status}: {self._quote(message or data)}" if message or data.strip() else str(status)
        if status in (401, 403):
            how = "is refused" if self._key else "is wanted"
            return LeamlError(f"{self.url}: an API key {how} ({said}); set {self.config.api_key_env or 'api_key_env'}.")
        if code == "insufficient_quota":
            return LeamlError(f"{self.url}: the account has no quota left ({said}); add some and repeat the command.")
        if 300 <= status < 400:
            where = self._quote(headers.get("location", "")) or "nowhere"
            return LeamlError(f"{self.url}: the server sends on to {where}; give that address if you trust it.")
        if status in _RETRIED or status >= 500:
            return _Problem(f"the server answers {said}", counts=status not in _BUSY, after=_retry_after(headers))
        if status == 404 and path != "models":
            return LeamlError(
                f"{self.url}: no model {self.model!r}, or no chat completions, at this address ({said}); "
                "correct the model's name or the address (most end in /v1)."
            )
        refusal = code in ("content_filter", "content_policy_violation") or "content_filter" in message
        return _Rejected(f"the server answers {said}", refusal)

    def _read(self, data: Any) -> Answer:
        """An answer from the JSON of a chat completion."""
        if isinstance(data, Mapping) and data.get("error"):
            message, _ = _error_of(json.dumps(data).encode())
            raise _Problem(f"the server answers with an error ({self._quote(message)})", counts=True)
        try:
            choice = data["choices"][0]
            message = choice["message"]
            text = message.get("content")
            if isinstance(text, list):
                text = "".join(part["text"] for part in text if part.get("type") == "text")
            if not isinstance(text, str | None):
                raise TypeError("content")
            usage = data.get("usage") or {}
            listed = (choice.get("logprobs") or {}).get("content")
            return Answer(
                _clean(text or ""),
                str(choice.get("finish_reason") or "stop"),
                _clean(str(message.get("refusal") or "")),
                _count(usage.get("prompt_tokens")),
                _count(usage.get("completion_tokens")),
                None if listed is None else tuple(float(token["logprob"]) for token in listed),
                str(data.get("model") or ""),
            )
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            shown = self._quote(json.dumps(data))
            raise _Problem(f"the answer is no chat completion ({shown})", counts=True) from error

    def _quote(self, text: str | bytes) -> str:
        """What a server said, on one short line and without the key."""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        if self._key:
            text = text.replace(self._key, "***")
        text = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
        return text if len(text) <= 200 else text[:197] + "..."

    # -- many requests ---------------------------------------------------------------------------------------------

    def each(
        self, items: Iterable[T], request: Callable[[T], Mapping[str, Any]], *, proven: bool = False
    ) -> Iterator[tuple[T, Answer | Failure]]:
        """Ask about every item, ``concurrency`` at a time; yields in the order of the answers.

        Failures that follow each other are held back until an answer comes after all, so that a server that breaks
        down is not taken for pictures that it refuses.

        Args:
            request: the body of an item; called in the threads that ask. A :class:`LeamlError` of it (a picture that
                cannot be opened) is that item's failure.
            proven: the server has answered before, so that a few failures alone may be all that is left to do.

        A generator that is not read to its end closes the client.

        Raises:
            LeamlError: as :meth:`ask`; ``max_failures`` in a row; nothing but failures.
        """
        stream, lock, enough = iter(items), threading.Lock(), threading.Event()
        results: queue.Queue[Any] = queue.Queue(maxsize=2 * self.config.concurrency)

        def put(result: Any) -> None:
            while not self._stop.is_set():
                try:
                    return results.put(result, timeout=0.2)
                except queue.Full:
                    continue

        def work() -> None:
            try:
                while not self._stop.is_set():
                    with lock:
                        item = _END if enough.is_set() else next(stream, _END)
                    if item is _END:
                        break
                    try:
                        body = request(item)
                    except LeamlError as error:
                        put((item, Failure("unreadable", str(error))))
                        continue
                    put((item, self.ask(body)))
            except _Stopped:
                pass
            except BaseException as error:  # told where the results are read
                put(error)
            put(None)

        threads = [threading.Thread(target=work, name="leaml-ask", daemon=True) for _ in range(self.config.concurrency)]
        for thread in threads:
            thread.start()
        held: list[tuple[T, Failure]] = []
        wrong: BaseException | None = None
        last = 0.0
        working, finished = len(threads), False
        try:
            while working:
                try:
                    result = results.get(timeout=max(0.0, last - time.monotonic()) if wrong else None)
                except queue.Empty:
                    break
                if result is None:
                    working -= 1
                    continue
                if isinstance(result, BaseException):
                    wrong = wrong or result
                elif isinstance(result[1], Failure) and result[1].kind != "unreadable":
                    if wrong is None:
                        held.append(result)
                        if len(held) >= self.config.max_failures:
                            wrong = self._broken(held)
                else:
                    if isinstance(result[1], Answer):
                        proven = True
                        if wrong is None:
                            yield from held
                            held = []
                    yield result
                if wrong and not enough.is_set():
                    # what is under way is paid for: it may still come
                    enough.set()
                    last = time.monotonic() + min(_GRACE, self.config.timeout)
            if wrong is None and held and not proven:
                wrong = self._broken(held)
            if wrong:
                raise wrong
            yield from held
            finished = True
        finally:
            if not finished:
                self.close()

    def _broken(self, held: list[tuple[Any, Failure]]) -> LeamlError:
        last = held[-1][1]
        many = f"the last {len(held)} requests" if len(held) > 1 else "the request"
        return LeamlError(
            f"{self.url}: {many} got no answer, the last one because {last.detail}; everything written so far is "
            "kept: see the server's log, correct the settings and repeat the command (or raise server.max_failures)."
        )


class _Stopped(Exception):
    """Somebody gave up the whole."""


def _is_local(url: str) -> bool:
    return re.match(r"http://(localhost|127\.|\[::1\])", url) is not None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _clean(text: str) -> str:
    """Without lone surrogates, which JSON may hold and no file can."""
    return text.encode("utf-8", "replace").decode()


def _names(data: Any) -> list[str]:
    rows = data.get("data") if isinstance(data, Mapping) else None
    return [str(row["id"]) for row in rows or () if isinstance(row, Mapping) and "id" in row]


def _error_of(data: bytes) -> tuple[str, str]:
    """Message and code of an error's body; servers nest them differently."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return "", ""
    error = found.get("error", found) if isinstance(found, Mapping) else found
    if isinstance(error, str):
        return error, ""
    if not isinstance(error, Mapping):
        return "", ""
    message = error.get("message") or error.get("detail") or ""
    return (message if isinstance(message, str) else json.dumps(message)), str(error.get("code") or "")


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait; 0 where it asks for none."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after", "")
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return float(value)
        when = email.utils.parsedate_to_datetime(value) if value else None
        return max(0.0, when.timestamp() - time.time()) if when else 0.0
    except (ValueError, TypeError):
        return 0.0
