"""The reader behind an endpoint: what it asks, what it bears, what it counts, and that its key stays with it.

One file: one reader against one endpoint, fault by fault.
"""

from __future__ import annotations

import email.utils
import json
import pickle
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from evrep_server import ChatServer, Fault, completion, serve
from torch import Tensor

from downstream.llm_evrep.readers import Answers, CachedReader, build_reader
from downstream.llm_evrep.readers.openai import OpenAIReader

SECRET = "sk-test-4f9a/7d+21=secret"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def mean_of(pixels: np.ndarray, prompt: str) -> str:
    return f"{prompt} {pixels.shape[0]}x{pixels.shape[1]} {pixels.reshape(-1, 3).mean(axis=0).round().astype(int)}"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serve(mean_of) as running:
        yield running


def reader_of(server: ChatServer, **settings: object) -> OpenAIReader:
    return OpenAIReader("tiny", base_url=server.url, **{"backoff_s": 0.01, "timeout_s": 10.0, **settings})


def greys(count: int, size: tuple[int, int] = (5, 7)) -> Tensor:
    """Images that differ, each of one grey."""
    return (torch.arange(count) / 255)[:, None, None, None].expand(-1, 3, *size)


# ---- what is asked ----------------------------------------------------------------------------------


def test_images_arrive_bit_for_bit_and_answers_come_in_order(server: ChatServer) -> None:
    images = torch.rand(6, 3, 9, 4, generator=torch.Generator().manual_seed(0))
    pixels = (images * 255).round().to(torch.uint8)
    arrived: list[np.ndarray] = []

    def slow_first(seen: np.ndarray, prompt: str) -> str:
        arrived.append(seen)
        index = next(i for i in range(6) if np.array_equal(seen, pixels[i].permute(1, 2, 0).numpy()))
        time.sleep(0.1 * (index == 0))
        return f"image {index}"

    server.answer = slow_first
    told: list[tuple[int, str]] = []
    reader = reader_of(server, concurrency=3)
    answers = reader.describe(images, "what?", on_answer=lambda index, text: told.append((index, text)))
    assert answers == [f"image {i}" for i in range(6)] == [text for _, text in sorted(told)]
    assert told[0][0] != 0, "answers are told as they come, not in the order of the images"
    assert len(arrived) == 6 and reader.describe(pixels, "what?") == answers
    payload = server.seen[0].payload
    assert {name: payload[name] for name in ("model", "temperature", "seed", "max_tokens")} == {
        "model": "tiny", "temperature": 0, "seed": 0, "max_tokens": 64,
    }  # fmt: skip
    assert server.seen[0].authorization == f"Bearer {SECRET}"
    assert not reader.has_weights
    with pytest.raises(ValueError, match=r"estimator=score"):
        reader.token_log_probs(images, answers, "what?")


def test_usage_counts_tokens_and_cost(server: ChatServer) -> None:
    reader = reader_of(server, price_in=2.5, price_out=10.0)
    server.faults = [Fault(500, "later")]
    reader.describe(greys(4), "p")
    assert reader.usage == pytest.approx(
        {"calls": 4, "images": 4, "tokens_in": 400, "tokens_out": 40, "refused": 0, "cost": 0.0014, "retries": 1}
    )


def test_address_from_config_environment_and_name(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert OpenAIReader("gpt-4o").endpoint.url == "https://api.openai.com/v1/chat/completions"
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
    reader = build_reader("openai:tiny", max_new_tokens=9)
    assert reader.describe(greys(1), "hello")[0].startswith("hello 5x7")
    assert server.seen[0].payload["max_tokens"] == 9 and server.url not in reader.name
    assert OpenAIReader("m", base_url="http://localhost:1/v1").endpoint.url == "http://localhost:1/v1/chat/completions"
    named = build_reader(f"openai:org/model:7b@{server.url}", base_url="http://localhost:1/v1")
    assert named.model == "org/model:7b" and named.endpoint.url.startswith(server.url)
    # Two servers with models of one name are told apart by the name that says where.
    assert server.url in named.name and "localhost:1" not in named.name


def test_no_key_is_sent_where_there_is_none(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    reader_of(server).describe(greys(1), "p")
    assert server.seen[0].authorization is None
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        OpenAIReader("gpt-4o")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"base_url": "localhost:8000"}, "llm.base_url=localhost:8000 is no address"),
        ({"base_url": "http://host:port/v1"}, "is no address"),
        ({"base_url": "http://me:pass@host/v1"}, "leave them out"),
        ({"base_url": "http://host/v1?api-key=abc"}, "leave them out"),
        ({"base_url": "http://a host/v1"}, "is no address"),
        ({"concurrency": 0}, "llm.concurrency=0"),
        ({"requests_per_minute": -1}, "llm.requests_per_minute=-1"),
        ({"price_in": -1}, "llm.price_in=-1"),
        ({"tries": 0}, "tries=0"),
        ({"model": ""}, "names no model"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        OpenAIReader(**{"model": "m", "base_url": "http://localhost:1", **settings})
    assert "pass@" not in str(caught.value) and "abc" not in str(caught.value)


# ---- what it bears ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault(500, "oops"),
        Fault(503, "", {"Retry-After": "0"}),
        Fault(429, '{"error": {"code": "rate_limit_exceeded"}}'),
        Fault(429, "", {"Retry-After": "tomorrow"}),
        Fault(408, ""),
        Fault(200, "<html>gateway</html>"),
        Fault(200, '{"choices": []}'),
        Fault(200, '{"choices": [{"message": null}]}'),
        Fault(200, completion({"not": "text"})),
        Fault(200, completion(["no part"])),
        Fault(200, "[]"),
        Fault(200, b"\xff\xfe"),
        Fault(200, "[" * 100_000),
        Fault(200, '{"error": {"message": "no slot"}}'),
        Fault(200, completion("half"), kind="cut"),
        Fault(200, "5\r\nab", {"Transfer-Encoding": "chunked", "Connection": "close"}, kind="cut"),
        Fault(kind="reset"),
    ],
    ids=lambda fault: f"{fault.kind} {fault.status} {str(fault.body)[:20]}",
)
def test_a_passing_fault_is_tried_again(server: ChatServer, fault: Fault) -> None:
    server.faults = [fault]
    reader = reader_of(server)
    assert reader.describe(greys(1), "p") == ["p 5x7 [0 0 0]"]
    assert len(server.seen) == 2 and reader.usage["retries"] == 1 and reader.usage["calls"] == 1


@pytest.mark.parametrize("kind", ["hang", "drip"])
def test_a_server_that_does_not_end_is_left(server: ChatServer, kind: str) -> None:
    server.faults = [Fault(200, completion("never" * 100), kind=kind)]
    begin = time.monotonic()
    assert reader_of(server, timeout_s=0.3).describe(greys(1), "p") == ["p 5x7 [0 0 0]"]
    assert 0.3 <= time.monotonic() - begin < 6.0


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_waited_for_by_all_threads(server: ChatServer, as_date: bool) -> None:
    wait = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "0.4"
    server.faults = [Fault(429, "slow down", {"Retry-After": wait})]
    server.delay_s = 0.02
    reader_of(server, concurrency=2).describe(greys(8), "p")
    times = [seen.began for seen in server.seen]
    assert len(times) == 9
    # At most the other thread's request was under way; then nothing is asked until the time has come.
    assert min(b - times[0] for b in times[2:]) >= (0.9 if as_date else 0.39)


def test_waits_grow_and_have_jitter(server: ChatServer) -> None:
    server.faults = [Fault(500)] * 4
    reader_of(server, backoff_s=0.05).describe(greys(1), "p")
    times = [seen.began for seen in server.seen]
    waits = np.diff(times)
    assert len(waits) == 4
    for wait, longest in zip(waits, (0.05, 0.1, 0.2, 0.4)):
        assert 0.5 * longest - 0.005 <= wait <= longest + 1.0
    assert len({round(wait / longest, 2) for wait, longest in zip(waits, (0.05, 0.1, 0.2, 0.4))}) > 1


def test_the_number_of_tries_is_bounded(server: ChatServer) -> None:
    server.faults = [Fault(503, f"all {SECRET} busy " + "x" * 5000)] * 99
    with pytest.raises(
        ConnectionError, match=r"after 3 tries, the last: HTTP 503: all \[OPENAI_API_KEY\] busy x"
    ) as caught:
        reader_of(server, tries=3).describe(greys(1), "p")
    assert len(server.seen) == 3 and len(str(caught.value)) < 600
    assert server.url in str(caught.value) and "start the same command again" in str(caught.value)


def test_no_server_at_all() -> None:
    with serve(mean_of) as server:
        reader = reader_of(server, tries=2)
    with pytest.raises(ConnectionError, match="after 2 tries, the last: ConnectionRefusedError"):
        reader.describe(greys(1), "p")


@pytest.mark.parametrize(
    "status, body, message",
    [
        (400, '{"error": {"message": "bad image"}}', "HTTP 400: .*bad image"),
        (401, f'{{"error": "key {SECRET} is wrong"}}', r"HTTP 401: .*\[OPENAI_API_KEY\] is wrong.*not accepted there"),
        (404, "no model", "HTTP 404: no model; is the model's name right"),
        (429, '{"error": {"code": "insufficient_quota"}}', "insufficient_quota"),
        (307, "", "HTTP 307: .*set llm.base_url to the new address"),
    ],
)
def test_what_is_wrong_for_good_is_not_tried_again(server: ChatServer, status: int, body: str, message: str) -> None:
    with serve(mean_of) as elsewhere:
        server.faults = [Fault(status, body, {"Location": elsewhere.url + "/chat/completions"})] * 9
        with pytest.raises(ValueError, match=message):
            reader_of(server).describe(greys(1), "p")
    assert len(server.seen) == 1 and not elsewhere.seen, "a redirection would take the key along"


def test_one_fatal_request_ends_the_others_and_keeps_what_was_answered(server: ChatServer) -> None:
    server.faults = [Fault(400, "no")]
    server.delay_s = 0.05
    told: list[int] = []
    begin = time.monotonic()
    with pytest.raises(ValueError, match="HTTP 400"):
        reader_of(server, concurrency=2).describe(greys(50), "p", on_answer=lambda index, text: told.append(index))
    assert time.monotonic() - begin < 5.0 and len(server.seen) < 9
    while server.in_flight:  # the client may have an answer before the server's thread notes that it was sent
        time.sleep(0.01)
    assert len(told) == sum(seen.answered for seen in server.seen), "an answer that came is told even then"


def test_a_waiting_request_does_not_hold_up_the_end(server: ChatServer) -> None:
    server.faults = [Fault(429, "", {"Retry-After": "60"}), Fault(400, "no")]
    reader = reader_of(server, concurrency=2)
    reader.endpoint.pace.hold = lambda seconds: None  # or the second request would wait too
    begin = time.monotonic()
    with pytest.raises(ValueError, match="HTTP 400"):
        reader.describe(greys(2), "p")
    assert time.monotonic() - begin < 5.0


@pytest.mark.parametrize(
    "body, expected",
    [
        (completion(None, refusal="I cannot"), ""),
        (completion(""), ""),
        (completion(None), ""),
        (completion([{"type": "text", "text": "a "}, {"type": "text", "text": "dog"}]), "a dog"),
        (completion("\ud800 half"), "? half"),
        ('{"choices": [{"message": {"content": "no usage"}}], "usage": null}', "no usage"),
        ('{"choices": [{"message": {"content": "odd"}}], "usage": {"prompt_tokens": "many"}}', "odd"),
    ],
)
def test_what_counts_as_an_answer(server: ChatServer, body: str, expected: str, tmp_path: Path) -> None:
    server.faults = [Fault(200, body)]
    reader = CachedReader(reader_of(server), Answers(tmp_path))
    assert reader.describe(greys(1), "p") == [expected] == reader.describe(greys(1), "p")
    assert len(server.seen) == 1 and reader.usage["refused"] == (expected == "")


def test_a_filtered_image_is_an_empty_answer(server: ChatServer) -> None:
    server.faults = [Fault(400, '{"error": {"code": "content_filter", "message": "policy"}}')]
    reader = reader_of(server)
    assert reader.describe(greys(1), "p") == [""] and reader.usage["refused"] == 1


def test_options_that_a_model_does_not_take_are_left_out(server: ChatServer) -> None:
    unsupported = '{"error": {"code": "unsupported_%s", "param": "%s"}}'
    server.faults = [
        Fault(400, unsupported % ("parameter", "max_tokens")),
        Fault(400, unsupported % ("value", "temperature")),
    ]
    reader = reader_of(server, concurrency=1)
    reader.describe(greys(3), "p")
    assert len(server.seen) == 5
    for seen in server.seen[2:]:
        assert seen.payload["max_completion_tokens"] == 64 and seen.payload["seed"] == 0
        assert not {"max_tokens", "temperature"} & set(seen.payload)
    server.faults = [Fault(400, unsupported % ("value", "messages"))]
    with pytest.raises(ValueError, match="messages"):
        reader.describe(greys(1), "p")


# ---- limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_at_a_time_than_asked_for(server: ChatServer, concurrency: int) -> None:
    server.delay_s = 0.03
    reader_of(server, concurrency=concurrency).describe(greys(12), "p")
    assert server.most_in_flight == concurrency


def test_the_rate_is_kept_over_calls_and_retries(server: ChatServer) -> None:
    server.faults = [Fault(500), Fault(500)]
    reader = reader_of(server, concurrency=4, requests_per_minute=1200)
    for _ in range(3):
        reader.describe(greys(4), "p")
    times = np.sort([seen.began for seen in server.seen])
    assert len(times) == 14
    # 0.05 s between the begins of two requests; the server notes them with some delay.
    assert times[-1] - times[0] >= 13 * 0.05 - 0.02
    assert (np.diff(times) > 0.03).mean() > 0.6


# ---- the key ----------------------------------------------------------------------------------------


def test_the_key_is_nowhere(server: ChatServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd) -> None:
    caplog.set_level(0)
    server.answer = lambda pixels, prompt: f"you sent {SECRET}"
    reader = CachedReader(reader_of(server, tries=2), Answers(tmp_path / "answers"))
    reader.describe(greys(2), "p")
    found = [reader.name, repr(reader.reader), repr(vars(reader.reader)), repr(vars(reader.reader.endpoint))]
    for faults in ([Fault(500, SECRET)] * 2, [Fault(401, SECRET)], [Fault(200, SECRET)] * 2, [Fault(kind="reset")] * 2):
        server.faults = faults
        try:
            reader.describe(greys(5)[4:], "p")
        except (ValueError, OSError) as error:
            found += [str(error), repr(error), *traceback.format_exception(error)]
            found += everything_in(error)
            assert error.__cause__ is None and error.__context__ is None
        else:
            pytest.fail("no error")
    found += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    found += [caplog.text, *capfd.readouterr()]
    assert len(found) > 40 and SECRET not in "\n".join(found)
    assert "you sent [OPENAI_API_KEY]" in "\n".join(found)


def everything_in(error: BaseException) -> list[str]:
    """What a debugger or `pytest -l` shows: the local values of all frames that are the reader's."""
    frames = traceback.walk_tb(error.__traceback__)
    return [
        repr(value)
        for frame, _ in frames
        if "llm_evrep" in frame.f_code.co_filename or "concurrent" in frame.f_code.co_filename
        for value in frame.f_locals.values()
    ]


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-ä", "sk a"])
def test_a_key_that_is_none_is_not_shown(server: ChatServer, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds") as caught:
        reader_of(server).describe(greys(1), "p")
    assert key not in str(caught.value) and not server.seen


def test_a_key_in_the_clear_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match=r"example\.org is spoken to without encryption") as caught:
        OpenAIReader("m", base_url="http://example.org/v1")
    assert SECRET not in str(caught[0].message)


def test_nothing_beyond_the_standard_library_is_imported() -> None:
    source = Path(sys.modules["downstream.llm_evrep.readers.endpoint"].__file__).read_text()
    assert not any(f"import {name}" in source for name in ("httpx", "requests", "openai", "aiohttp"))
    assert json.loads(json.dumps(OpenAIReader("m", base_url="http://localhost:1").usage))
    assert SECRET.encode() not in pickle.dumps(OpenAIReader("m", base_url="http://localhost:1").name)
