"""The client of OpenAI-compatible servers, against one that misbehaves in every way we know of."""

from __future__ import annotations

import email.utils
import json
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_server import FakeServer, Reply, completion, serving

from leaml_plugin.errors import LeamlError
from leaml_plugin.teachers import Answer, Failure
from leaml_plugin.teachers.client import MAX_ANSWER, ChatClient, ServerConfig, _Pace, _retry_after, check_url

QUICK = {"backoff": 0.01, "max_backoff": 0.05, "wait": 2.0, "timeout": 5.0, "total_timeout": 20.0, "concurrency": 4}
BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}


def client(server: FakeServer | str, **options) -> ChatClient:
    url = server if isinstance(server, str) else server.url
    return ChatClient(url, options.pop("model", "tiny"), ServerConfig(**{**QUICK, **options}))


def first_then(*replies):
    """These replies in order, then a good one for ever."""
    return lambda body, number: replies[number] if number < len(replies) else "Here."


def test_an_answer_with_its_tokens():
    with serving(FakeServer(lambda body, n: "A red spot.")) as server, client(server) as chat:
        assert chat.connect() == "tiny"
        answer = chat.ask(BODY)
    assert answer == Answer("A red spot.", "stop", "", 100, 3, None, "tiny")
    assert server.requests == [{"model": "tiny", **BODY}]
    assert "Authorization" not in server.headers[0]


def test_parts_logprobs_and_halves_of_characters():
    said = completion("")
    said["choices"][0] |= {
        "message": {"content": [{"type": "text", "text": "two "}, {"type": "text", "text": "parts\ud800"}]},
        "logprobs": {"content": [{"token": "two", "logprob": -0.5}, {"token": "parts", "logprob": -1}]},
    }
    with serving(FakeServer(lambda body, n: said)) as server, client(server) as chat:
        answer = chat.ask(BODY)
    assert (answer.text, answer.logprobs) == ("two parts?", (-0.5, -1.0))


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_tries_again(status):
    bad = Reply(status, {"error": {"message": "not now"}})
    with serving(FakeServer(first_then(bad, bad))) as server, client(server) as chat:
        assert chat.ask(BODY).text == "Here."
        assert chat.retried == 2
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, b'{"choices": [{'),  # malformed
        Reply(200, b"<html>busy</html>", {"Content-Type": "text/html"}),
        Reply(200, {"choices": []}),
        Reply(200, {"choices": [{"message": {"content": 3}}]}),
        Reply(200, {"error": {"message": "upstream", "code": 502}}),
        Reply(200, json.dumps(completion("x" * 400)).encode()[:200], {"Content-Length": "600"}, hang_up=True),
        Reply(200, b"\xff\xfe", {"Content-Encoding": "gzip"}),
    ],
    ids=["cut", "html", "no choice", "no text", "error as success", "truncated", "not gzip"],
)
def test_unusable_answers_are_asked_for_again(reply):
    with serving(FakeServer(first_then(reply))) as server, client(server) as chat:
        assert chat.ask(BODY).text == "Here."
    assert len(server.requests) == 2


def test_gives_up_after_its_retries():
    with (
        serving(FakeServer(lambda body, n: Reply(500, {"error": {"message": "broken\nmodel"}}))) as server,
        client(server, retries=3) as chat,
    ):
        answer = chat.ask(BODY)
    assert answer == Failure("failed", "the server answers 500: broken model (try 4 of 4)")
    assert len(server.requests) == 4


def test_a_busy_server_costs_no_tries():
    busy = [Reply(503, {}) for _ in range(9)]
    with serving(FakeServer(first_then(*busy))) as server, client(server, retries=0) as chat:
        assert chat.ask(BODY).text == "Here."


def test_waits_as_long_as_the_server_asks_and_so_does_everybody():
    times = []

    def answer(body, number):
        times.append(time.monotonic())
        return Reply(429, {}, {"Retry-After": "1"}) if number == 0 else "Here."

    with serving(FakeServer(answer)) as server, client(server, concurrency=1) as chat:
        assert chat.ask(BODY).text == "Here."
        assert times[1] - times[0] >= 1.0
        chat._pace.pause(0.4)
        began = time.monotonic()
        chat.ask(BODY)
        assert time.monotonic() - began >= 0.4


def test_retry_after_in_all_its_forms():
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert _retry_after({"retry-after": "2"}) == 2.0
    assert _retry_after({"retry-after-ms": "1500", "retry-after": "2"}) == 1.5
    assert 25 < _retry_after({"retry-after": date}) <= 30
    for value in ("", "soon", "-3", "Mon, 99 Foo"):
        assert _retry_after({"retry-after": value}) == 0.0
    assert _retry_after({}) == 0.0


def test_a_server_that_asks_to_wait_too_long_ends_the_run():
    with (
        serving(FakeServer(lambda body, n: Reply(429, {}, {"Retry-After": "3600"}))) as server,
        client(server) as chat,
        pytest.raises(LeamlError, match=r"asks to wait 1:00:00.*repeat the command"),
    ):
        chat.ask(BODY)


def test_a_slow_try_is_given_up():
    slow = threading.Event()

    def answer(body, number):
        if number == 0:
            slow.wait(5)
        return "Here."

    with serving(FakeServer(answer)) as server, client(server, timeout=0.3) as chat:
        began = time.monotonic()
        assert chat.ask(BODY).text == "Here."
        assert 0.3 <= time.monotonic() - began < 3
        slow.set()


def test_a_server_that_dribbles_is_given_up():
    """Every byte is in time, the whole is not."""
    slow = Reply(200, completion("Here."), pause=0.05)
    with serving(FakeServer(lambda body, n: slow)) as server, client(server, timeout=0.3, retries=0) as chat:
        began = time.monotonic()
        assert "no complete answer in 0.3 s" in chat.ask(BODY).detail
        assert time.monotonic() - began < 2


def test_an_endless_answer_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr("leaml_plugin.teachers.client.MAX_ANSWER", 1000)
    assert MAX_ANSWER > 1 << 20
    with serving(FakeServer(lambda body, n: "x" * 5000)) as server, client(server, retries=0) as chat:
        assert "more than 1000 bytes" in chat.ask(BODY).detail


def test_nobody_there_at_the_start():
    with (
        client("http://127.0.0.1:9/v1", wait=0.1) as chat,
        pytest.raises(LeamlError, match=r"127.0.0.1:9/v1: no connection .*start the server"),
    ):
        chat.connect()


def test_a_server_that_goes_away_and_comes_back(capsys):
    fake = FakeServer(lambda body, n: "Here.")
    with serving(fake) as server, client(server, retries=0) as chat:
        assert chat.ask(BODY).text == "Here."
        port = int(server.url.split(":")[2].split("/")[0])
    chat = client(server, retries=0)
    results = []
    thread = threading.Thread(target=lambda: results.append(chat.ask(BODY)))
    thread.start()
    time.sleep(0.3)
    assert not results
    with serving(fake, port):
        thread.join(10)
    assert results[0].text == "Here."
    assert "no connection" in capsys.readouterr().err


def test_a_server_that_stays_away_ends_the_run():
    with (
        client("http://127.0.0.1:9/v1", total_timeout=0.2) as chat,
        pytest.raises(LeamlError, match=r"no connection .*everything written so far is kept: repeat"),
    ):
        chat.ask(BODY)


# -- keys and addresses ------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_never_shown(monkeypatch, capsys):
    key = "sk-very-secret-1234"
    monkeypatch.setenv("MY_KEY", key)
    wrong = Reply(401, {"error": {"message": f"Incorrect API key provided: {key}."}})
    with (
        serving(FakeServer(lambda body, n: wrong)) as server,
        client(server, api_key_env="MY_KEY") as chat,
        pytest.raises(LeamlError, match=r"API key is refused .*MY_KEY") as error,
    ):
        chat.ask(BODY)
    assert server.headers[0]["Authorization"] == f"Bearer {key}"
    assert key not in str(error.value) and "***" in str(error.value)
    echo = Reply(500, f"failed with {key}".encode())
    with serving(FakeServer(lambda body, n: echo)) as server, client(server, api_key_env="MY_KEY", retries=1) as chat:
        assert key not in chat.ask(BODY).detail
    assert key not in "".join(capsys.readouterr())


def test_keys_that_are_missing_or_broken(monkeypatch):
    with pytest.raises(LeamlError, match="MY_KEY is not set"):
        client("http://127.0.0.1:9", api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "two\nlines")
    with pytest.raises(LeamlError, match="characters that no key has") as error:
        client("http://127.0.0.1:9", api_key_env="MY_KEY")
    assert "two" not in str(error.value)
    with (
        serving(FakeServer(lambda body, n: Reply(403, {}))) as server,
        client(server) as chat,
        pytest.raises(LeamlError, match=r"an API key is wanted .*LEAML_API_KEY"),
    ):
        chat.ask(BODY)


def test_a_key_on_the_open_road_is_told(monkeypatch, capsys):
    monkeypatch.setenv("LEAML_API_KEY", "k")
    client("http://192.0.2.1/v1").close()
    assert "unencrypted" in capsys.readouterr().err
    client("https://192.0.2.1/v1").close()
    client("http://localhost:8000/v1").close()
    assert capsys.readouterr().err == ""


def test_redirects_are_not_followed(monkeypatch):
    monkeypatch.setenv("LEAML_API_KEY", "secret")
    with serving(FakeServer(lambda body, n: "Here.")) as other:
        away = Reply(307, {}, {"Location": other.url + "/chat/completions"})
        with (
            serving(FakeServer(lambda body, n: away)) as server,
            client(server) as chat,
            pytest.raises(LeamlError, match="sends on to http"),
        ):
            chat.ask(BODY)
    assert not other.requests


@pytest.mark.parametrize(
    ("url", "want"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("HTTPS://api.example.com/v1/", "https://api.example.com/v1"),
        ("http://host/openai/deployments/x", "http://host/openai/deployments/x"),
    ],
)
def test_addresses(url, want):
    assert check_url(url) == want


@pytest.mark.parametrize("url", ["ftp://host/v1", "host:8000", "http://", "http://host/v1?api_key=hush", "file:///etc"])
def test_no_addresses(url):
    with pytest.raises(LeamlError, match="no address of a server") as error:
        check_url(url)
    assert "hush" not in str(error.value)


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(LeamlError, match="host holds a password") as error:
        check_url("http://me:hush@host/v1")
    assert "hush" not in str(error.value)


def test_a_proxy_is_not_asked_for_loopback(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving(FakeServer(lambda body, n: "Here.")) as server, client(server, retries=0) as chat:
        assert chat.ask(BODY).text == "Here."


def test_the_library_of_older_releases_of_huggingface_hub(monkeypatch):
    """huggingface_hub 1 brings httpx, 2 brings httpx2; either does."""
    pytest.importorskip("httpx", reason="httpx is not installed; lmms-eval and huggingface_hub 1 bring it")
    monkeypatch.setitem(sys.modules, "httpx2", None)
    cut = Reply(200, b"{", {"Content-Length": "600"}, hang_up=True)
    with serving(FakeServer(first_then(cut, Reply(503, {})))) as server, client(server) as chat:
        assert chat._httpx.__name__ == "httpx"
        assert chat.connect() == "tiny" and chat.ask(BODY).text == "Here."
    with client("http://127.0.0.1:9", wait=0.0) as chat, pytest.raises(LeamlError, match="no connection"):
        chat.connect()


# -- models ------------------------------------------------------------------------------------------------------------


def test_the_model_is_the_only_one_listed_or_named():
    with serving(FakeServer(lambda body, n: "Here.", ("big",))) as server, client(server, model="") as chat:
        assert chat.connect() == "big"
    with (
        serving(FakeServer(lambda body, n: "Here.", ("big", "small"))) as server,
        client(server, model="") as chat,
        pytest.raises(LeamlError, match=r"name one of the server's models \(big, small\)"),
    ):
        chat.connect()
    with serving(FakeServer(lambda body, n: "Here.", None)) as server:
        with client(server, model="") as chat, pytest.raises(LeamlError, match="name one of the server's models"):
            chat.connect()
        with client(server) as chat:
            assert chat.connect() == "tiny"


def test_no_such_model():
    missing = Reply(404, {"error": {"message": "The model `tinny` does not exist."}})
    with (
        serving(FakeServer(lambda body, n: missing)) as server,
        client(server, model="tinny") as chat,
        pytest.raises(LeamlError, match=r"no model 'tinny'.*does not exist.*correct the model's name"),
    ):
        chat.ask(BODY)


def test_a_model_that_knows_the_limit_by_another_name():
    def answer(body, number):
        if "max_tokens" in body:
            return Reply(400, {"error": {"message": "Unsupported: 'max_tokens'. Use 'max_completion_tokens' instead."}})
        return "Here."

    with serving(FakeServer(answer)) as server, client(server) as chat:
        assert chat.ask(BODY).text == chat.ask(BODY).text == "Here."
    assert len(server.requests) == 3
    assert server.requests[-1]["max_completion_tokens"] == 8


def test_no_quota_left_is_not_waited_for():
    with (
        serving(FakeServer(lambda b, n: Reply(429, {"error": {"code": "insufficient_quota"}}))) as server,
        client(server) as chat,
        pytest.raises(LeamlError, match="no quota left"),
    ):
        chat.ask(BODY)
    assert len(server.requests) == 1


# -- many requests -----------------------------------------------------------------------------------------------------


def body_of(item):
    return {"messages": [{"role": "user", "content": str(item)}]}


def number_of(body) -> int:
    return int(body["messages"][0]["content"])


def test_many_at_a_time():
    gate = threading.Barrier(4, timeout=10)

    def answer(body, number):
        if number < 4:
            gate.wait()  # opens when four are there
        return f"said {number_of(body)}"

    with serving(FakeServer(answer)) as server, client(server) as chat:
        results = dict(chat.each(range(20), body_of))
    assert {n: a.text for n, a in results.items()} == {n: f"said {n}" for n in range(20)}
    assert server.most_at_once == 4


def test_refused_pictures_fail_alone():
    def answer(body, number):
        if number_of(body) % 3 == 0:
            return Reply(400, {"error": {"message": "image too large"}})
        if number_of(body) % 5 == 0:
            return Reply(400, {"error": {"code": "content_filter", "message": "no"}})
        return "Here."

    with serving(FakeServer(answer)) as server, client(server) as chat:
        results = dict(chat.each(range(12), body_of))
    assert results[3] == Failure("rejected", "the server answers 400: image too large")
    assert results[5].refusal and results[5].finish == "content_filter"
    assert results[4].text == "Here."
    assert len(results) == 12


def test_a_server_that_refuses_everything_is_not_taken_for_bad_pictures():
    with serving(FakeServer(lambda body, n: Reply(422, {"detail": "unknown field"}))) as server:
        with (
            client(server, max_failures=5) as chat,
            pytest.raises(LeamlError, match=r"the last 5 requests got no answer.*unknown field.*max_failures"),
        ):
            list(chat.each(range(100), body_of))
        assert len(server.requests) < 20
        with client(server) as chat, pytest.raises(LeamlError, match="the last 2 requests"):
            list(chat.each(range(2), body_of))
        with client(server) as chat:  # it answered before: these two are what is left
            assert [a.kind for _, a in chat.each(range(2), body_of, proven=True)] == ["rejected", "rejected"]


def test_a_failure_late_in_a_row_is_not_told_as_a_result():
    """What a server that breaks down says about pictures is kept from the results."""
    seen = []

    def answer(body, number):
        return "Here." if number < 5 else Reply(500, {})

    with (
        serving(FakeServer(answer)) as server,
        client(server, concurrency=1, retries=0, max_failures=3) as chat,
        pytest.raises(LeamlError, match="the last 3 requests"),
    ):
        for item, result in chat.each(range(50), body_of):
            seen.append((item, type(result)))
    assert seen == [(n, Answer) for n in range(5)]


def test_an_item_without_request_fails_alone():
    def request(item):
        if item == 2:
            raise LeamlError("2.png: the picture is damaged.")
        return body_of(item)

    with serving(FakeServer(lambda body, n: "Here.")) as server, client(server) as chat:
        results = dict(chat.each(range(4), request))
    assert results[2] == Failure("unreadable", "2.png: the picture is damaged.")
    assert len(server.requests) == 3


def test_an_error_of_the_items_comes_through():
    def items():
        yield 1
        raise LeamlError("list.jsonl line 2 is damaged.")

    with (
        serving(FakeServer(lambda body, n: "Here.")) as server,
        client(server) as chat,
        pytest.raises(LeamlError, match="line 2 is damaged"),
    ):
        list(chat.each(items(), body_of))


def test_given_up_half_way_everything_stops():
    with serving(FakeServer(lambda body, n: "Here.")) as server, client(server) as chat:
        stream = chat.each(range(10_000), body_of)
        next(stream)
        stream.close()
        deadline = time.monotonic() + 10
        while any(thread.name == "leaml-ask" for thread in threading.enumerate()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(thread.name == "leaml-ask" for thread in threading.enumerate())
        assert len(server.requests) < 200


# -- limits ------------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_requests_keep_their_distance():
    pace = _Pace(60, 0, 100, Clock())
    assert [pace.reserve()[0] for _ in range(4)] == [0.0, 1.0, 2.0, 3.0]


def test_tokens_are_estimated_and_settled():
    clock = Clock()
    pace = _Pace(0, 6000, 1000, clock)  # a hundred tokens a second
    assert pace.reserve() == (0.0, 1000)
    pace.settle(1000, 200)  # needed two seconds' worth, not ten
    start, booked = pace.reserve()
    assert start == 2.0 and booked < 1000
    pace.settle(booked, None)  # no answer: nothing used, nothing learnt
    assert pace.reserve() == (2.0, booked)


def test_no_minute_has_more_than_the_limit():
    clock, pace, starts = Clock(), None, []
    pace = _Pace(30, 0, 1, clock)
    for n in range(200):
        start, _ = pace.reserve()
        clock.now = max(clock.now, start) + (7.0 if n % 50 == 0 else 0.0)
        starts.append(start)
    assert all(sum(t <= s < t + 60 for s in starts) <= 31 for t in starts)


def test_the_limit_holds_on_the_wire():
    times = []

    def answer(body, number):
        times.append(time.monotonic())
        return "Here."

    with serving(FakeServer(answer)) as server, client(server, requests_per_minute=1200) as chat:
        list(chat.each(range(12), body_of))
    assert times[-1] - min(times) >= 11 * 0.05 - 0.03


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"concurrency": 0}, "at least 1"),
        ({"timeout": 0.0}, "positive"),
        ({"backoff": -1.0}, "negative"),
        ({"max_cost": 1.0}, "max_cost needs price_prompt"),
    ],
)
def test_impossible_settings(options, words):
    with pytest.raises(LeamlError, match=words):
        ServerConfig(**options)
