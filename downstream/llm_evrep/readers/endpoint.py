"""A JSON endpoint behind HTTP that may fail: limits, retries, and a key that goes nowhere else."""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from gep import distributed

T = TypeVar("T")
KEY = "OPENAI_API_KEY"
_PASSING = (408, 409, 425, 429)  # and every 5xx
_LONGEST_WAIT, _MOST_BYTES, _EXCERPT = 120.0, 16 << 20, 300


class Stopped(Exception):
    """The caller gave up, as another of its requests failed for good."""


@dataclass(frozen=True)
class Reply:
    """What came of one try."""

    status: int
    """of HTTP; 0 = none came"""
    text: str
    """body, or what went wrong"""
    retry_after: float | None = None
    """seconds that the server asks to wait"""

    @property
    def error(self) -> Mapping[str, Any]:
        """The protocol's error object, {} where there is none."""
        try:
            error = json.loads(self.text)["error"]
        except (ValueError, KeyError, TypeError):
            return {}
        return error if isinstance(error, dict) else {}

    def passes(self) -> bool:
        """Whether the next try may do better."""
        if self.error.get("code") == "insufficient_quota":
            return False
        return self.status == 0 or self.status in _PASSING or self.status >= 500

    def __str__(self) -> str:
        what = f"HTTP {self.status}: " if self.status else ""
        return what + " ".join(self.text.split())[:_EXCERPT]


class Pace:
    """Lets requests begin at even distances, and none while the server asks to wait.

    Args:
        per_minute: most requests that begin in any 60 s, over all ranks; 0 = no limit.
    """

    def __init__(self, per_minute: float) -> None:
        self.interval = 60 * distributed.world_size() / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Returns when the caller may begin a request; raises Stopped."""
        while True:
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self.interval
                    return
                wait = self._next - now
            if stop.wait(wait):
                raise Stopped

    def hold(self, seconds: float) -> None:
        """No request begins for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Endpoint:
    """Where requests are posted. The key is read from OPENAI_API_KEY for each request and kept nowhere.

    Args:
        base_url: http(s) address.
        path: below it.
        requests_per_minute: see `Pace`.
        timeout_s: for one request, from connecting to the last byte.
        tries: how often one request is sent at most.
        backoff_s: wait before the second try, doubled for each further one, up to two minutes.
    Raises:
        ValueError: an address that is none, or holds a user, a password or a query.
    """

    def __init__(
        self,
        base_url: str,
        path: str,
        *,
        requests_per_minute: float = 0.0,
        timeout_s: float = 120.0,
        tries: int = 6,
        backoff_s: float = 1.0,
    ) -> None:
        host = _host(base_url)
        for name, value in (("tries", tries), ("timeout_s", timeout_s)):
            if value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
        if requests_per_minute < 0:
            raise ValueError(f"llm.requests_per_minute={requests_per_minute} is negative; 0 = no limit")
        self.url = base_url.rstrip("/") + path
        self.timeout_s, self.tries, self.backoff_s = timeout_s, tries, backoff_s
        self.pace = Pace(requests_per_minute)
        self.retries, self._lock = 0, threading.Lock()
        if _key() and base_url.startswith("http:") and not _is_local(host):
            warnings.warn(f"{host} is spoken to without encryption, and {KEY} is sent along", stacklevel=2)

    def post(self, payload: Any, read: Callable[[Any], T], stop: threading.Event | None = None) -> T:
        """Sends a request until it is answered, or as often as `tries` allows.

        Args:
            payload: JSON values.
            read: the answer's JSON -> what is wanted of it; where it fails as on data of another form, the answer is
                malformed, and the request is sent again.
            stop: when set, the request is given up.
        Raises:
            ValueError: the server says that the request itself is wrong (400, 401, 404 …).
            ConnectionError: no answer after all tries. Both name the address, the status and what the body begins with.
            Stopped: by `stop`.
        """
        body, stop, reply = json.dumps(payload).encode(), stop or threading.Event(), Reply(0, "")
        for attempt in range(self.tries):
            if attempt:
                with self._lock:
                    self.retries += 1
                if stop.wait(self._wait(attempt, reply)):
                    raise Stopped
            self.pace.wait(stop)
            reply = self._send(body)
            if 200 <= reply.status < 300:
                try:
                    return read(json.loads(reply.text))
                except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
                    pass
                reply = Reply(reply.status, f"malformed answer: {reply.text}")
            elif not reply.passes():
                raise Refused(self._say(reply), reply)
        raise ConnectionError(
            f"{self.url}: no answer after {self.tries} tries, the last: {reply}. What was answered is kept: start the "
            "same command again when the server answers, with a lower llm.concurrency or llm.requests_per_minute where "
            "it was asked too fast"
        )

    def _wait(self, attempt: int, reply: Reply) -> float:
        """Seconds before the next try: what a random part of an exponential, and no fewer than the server asks for."""
        asked = min(reply.retry_after or 0.0, _LONGEST_WAIT)
        self.pace.hold(asked)  # the other threads would be turned away too
        return max(asked, min(self.backoff_s * 2 ** (attempt - 1), _LONGEST_WAIT) * random.uniform(0.5, 1.0))

    def _say(self, reply: Reply) -> str:
        hint = {
            401: f"; set {KEY} to a key of this endpoint" if not _key() else f"; {KEY} is not accepted there",
            404: "; is the model's name right, and does llm.base_url end as the server wants it (often /v1)?",
        }.get(reply.status, "")
        if 300 <= reply.status < 400:
            hint = "; redirections are not followed, as the key would go along: set llm.base_url to the new address"
        return f"{self.url}: {reply}{hint}"

    def _send(self, body: bytes) -> Reply:
        """One try; every way in which it can fail is a Reply, so that no exception holds the request."""
        key = _key()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"}, method="POST")
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        deadline = time.monotonic() + self.timeout_s
        try:
            with _OPENER.open(request, timeout=self.timeout_s) as response:
                return Reply(response.status, _without(key, _read(response, deadline)))
        except urllib.error.HTTPError as error:
            try:
                with error:
                    text = _read(error, deadline)
            except (OSError, http.client.HTTPException):
                text = str(error.reason)
            return Reply(error.code, _without(key, text), _seconds(error.headers.get("Retry-After")))
        except TimeoutError:
            what = f"no answer within {self.timeout_s:g} s"
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            timed_out = isinstance(reason, TimeoutError)
            what = f"no answer within {self.timeout_s:g} s" if timed_out else f"{type(reason).__name__}: {reason}"
        return Reply(0, _without(key, what))


class Refused(ValueError):
    """The server took the request for a wrong one; `reply` is what it said."""

    def __init__(self, message: str, reply: Reply) -> None:
        super().__init__(message)
        self.reply = reply


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _key() -> str:
    key = os.environ.get(KEY, "").strip()
    if not all("!" <= character <= "~" for character in key):  # http.client's own complaint would show it
        raise ValueError(f"{KEY} holds blanks, line breaks or other characters that no key has: set it anew")
    return key


def _without(key: str, text: str) -> str:
    """The text without the key, should the other side have repeated it."""
    return text.replace(key, f"[{KEY}]") if key else text


def _read(response: Any, deadline: float) -> str:
    """The body; a server that sends it drop by drop is cut off at the deadline."""
    parts, size = [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > _MOST_BYTES:
            raise ConnectionError(f"an answer of more than {_MOST_BYTES >> 20} MiB")
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts).decode("utf-8", "replace")


def _seconds(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date; None where it holds neither."""
    if retry_after is None:
        return None
    try:
        wait = float(retry_after)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, wait) if wait == wait else None


def _host(url: str) -> str:
    """The host of an address that a key may be sent to."""
    try:
        parts = urlsplit(url)
        host, scheme, _ = parts.hostname, parts.scheme, parts.port
    except ValueError:
        host = scheme = ""
    else:
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                f"llm.base_url holds a user, a password or a query: leave them out; the key goes into {KEY}"
            )
    if scheme not in ("http", "https") or not host or not all("!" <= character <= "~" for character in url):
        raise ValueError(f"llm.base_url={url} is no address: write http(s)://host[:port]/v1")
    return host


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
