"""The seam to metadata services: a `Source` each for AWS, Google Compute Engine and Azure.

What counts, and what for, stands in the package's table.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Literal, Protocol

from runner.supervisor.metadata.http import Answer, Unusable, ask, timestamp

LINK_LOCAL = "http://169.254.169.254"
"""Where all three answer."""

AWS_IPV6 = "http://[fd00:ec2::254]"
"""The same on an instance without IPv4."""

SECONDS = 2.0
"""That an answer may take."""


@dataclass(frozen=True)
class Sign:
    """Something that was said about this machine."""

    kind: Literal["stop", "save"]
    """What the run is to do: end, or save at once and go on."""
    id: str
    """Of what was said; the same is told again until it has happened."""
    reason: str
    """For people."""
    seconds: float | None = None
    """Until it happens; None: not said."""


class Source(Protocol):
    """A metadata service."""

    name: str
    """For messages."""
    pause: float
    """Seconds between two questions."""

    def look(self) -> list[Sign]:
        """What is said now. May wait for a change.

        Raises:
            Unusable: it gave no answer that can be understood.
        """
        ...


class Aws:
    """IMDSv2: a token by PUT, then questions with it."""

    name = "AWS instance metadata"
    pause = 5.0
    """As AWS asks for."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._token: str | None = None

    def look(self) -> list[Sign]:
        if (found := self._get("spot/instance-action")) is not None:
            said = _document(found)
            action, at = said.get("action"), said.get("time")
            if action not in ("terminate", "stop", "hibernate"):
                raise Unusable(f"spot/instance-action: action {str(action)[:80]!r} means nothing")
            when, left = "", None
            if (known := _utc(at)) is not None:
                when, left = f" at {at}", None if action == "hibernate" else _until(known, found)
            # At once: what the next question may run into must not hide it.
            return [Sign("stop", f"{action}{when}", f"AWS takes this machine: {action}{when}", left)]
        if (found := self._get("events/recommendations/rebalance")) is not None:
            at = _document(found).get("noticeTime")
            if _utc(at) is None:
                raise Unusable("events/recommendations/rebalance: it has no noticeTime")
            return [Sign("save", f"rebalance {at}", f"AWS may take this machine soon (rebalance, {at})")]
        return []

    def _get(self, path: str) -> Answer | None:
        """What is there; None: nothing, which is the usual answer."""
        fresh = self._token is None
        token = self._token or self._new_token()
        headers = {"X-aws-ec2-metadata-token": token}
        found = ask("GET", self._endpoint, f"/latest/meta-data/{path}", headers, SECONDS)
        if found.status == 401 and not fresh:  # tokens end, and with the machine that was hibernated
            self._token = None
            return self._get(path)
        return _answered(found, path)

    def _new_token(self) -> str:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": "21600", "Content-Length": "0"}
        try:
            found = ask("PUT", self._endpoint, "/latest/api/token", headers, SECONDS)
        except Unusable as error:
            hint = "in a container the instance needs HttpPutResponseHopLimit 2"
            raise Unusable(f"{error} ({hint})") from error
        token = found.text.strip()
        if found.status != 200 or not token.isascii() or not token.isprintable() or not token:
            raise Unusable(f"/latest/api/token: status {found.status}, and no token")
        self._token = token
        return token


class Gce:
    """Google's metadata server: one question that is answered when the answer changes."""

    name = "Google metadata server"
    pause = 1.0
    _HEADERS: ClassVar = {"Metadata-Flavor": "Google"}

    def __init__(self, endpoint: str, wait: int = 30) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._wait = wait
        self._etag: str | None = None

    def look(self) -> list[Sign]:
        query = ""
        if self._etag is not None:
            query = f"?wait_for_change=true&timeout_sec={self._wait}&last_etag={self._etag}"
        etag, self._etag = self._etag, None  # whatever goes wrong, the next question does not wait
        found = self._get(f"preempted{query}", SECONDS + (0 if etag is None else self._wait))
        if found is None:
            raise Unusable("instance/preempted: there is none")
        said = found.text.strip().upper()
        if said not in ("TRUE", "FALSE"):
            raise Unusable(f"instance/preempted: {said[:80]!r} is neither TRUE nor FALSE")
        if said == "TRUE":
            return [Sign("stop", "preempted", "Google takes this machine: preempted")]
        event = self._get("maintenance-event", SECONDS)
        new = found.headers.get("etag", "")
        self._etag = new if new.isalnum() else None
        said = "" if event is None else event.text.strip()
        if said == "TERMINATE_ON_HOST_MAINTENANCE":
            return [Sign("save", said, "Google stops this machine within the hour: host maintenance")]
        return []

    def _get(self, path: str, seconds: float) -> Answer | None:
        """What is there; None: nothing."""
        found = ask("GET", self._endpoint, f"/computeMetadata/v1/instance/{path}", self._HEADERS, seconds)
        answer = _answered(found, f"instance/{path.partition('?')[0]}")
        if answer is not None and answer.headers.get("metadata-flavor") != "Google":
            raise Unusable("what answers is not Google's metadata server")
        return answer


class Azure:
    """Scheduled events of the machine of this name."""

    name = "Azure instance metadata"
    pause = 1.0
    """As Microsoft asks for: the notice of a preemption is short."""
    FIRST = 130.0
    """Seconds that the first answer may take: the service is started by the first question."""
    _HEADERS: ClassVar = {"Metadata": "true"}

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._machine: str | None = None
        self._answered = False

    def look(self) -> list[Sign]:
        if self._machine is None:
            self._machine = self._name()
        path = "/metadata/scheduledevents?api-version=2020-07-01"
        seconds = SECONDS if self._answered else self.FIRST
        found = _answered(ask("GET", self._endpoint, path, self._HEADERS, seconds), "scheduledevents")
        events = None if found is None else _document(found).get("Events")
        if found is None or not isinstance(events, list):
            raise Unusable("scheduledevents: there is no list of events")
        self._answered = True
        known = [one for one in events if isinstance(one, dict) and isinstance(one.get("Resources"), list)]
        signs = [sign for event in known if (sign := self._sign(event, found)) is not None]
        if not signs and len(known) < len(events):
            raise Unusable("scheduledevents: an event is no event")
        return signs

    def _sign(self, event: Mapping[str, Any], found: Answer) -> Sign | None:
        if self._machine not in event["Resources"] or event.get("EventStatus") == "Completed":
            return None
        kind, id = event.get("EventType"), str(event.get("EventId"))
        if kind in ("Preempt", "Terminate"):
            left = _until(timestamp(str(event.get("NotBefore"))), found)
            return Sign("stop", id, f"Azure takes this machine: {kind}", left)
        if kind in ("Reboot", "Redeploy"):
            return Sign("save", id, f"Azure restarts this machine soon: {kind}")
        return None

    def _name(self) -> str:
        path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
        found = _answered(ask("GET", self._endpoint, path, self._HEADERS, SECONDS), "compute/name")
        name = "" if found is None else found.text.strip()
        if not re.fullmatch(r"[\w.-]+", name):  # kept for good, so that what is none would hide every event
            raise Unusable(f"instance/compute/name: {name[:80]!r} is no name")
        return name


def _answered(found: Answer, path: str) -> Answer | None:
    """The answer; None: nothing is there."""
    if found.status == 404:
        return None
    if found.status != 200:
        raise Unusable(f"{path}: status {found.status}")
    return found


def _document(found: Answer) -> Mapping[str, Any]:
    try:
        document = json.loads(found.text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"it said {found.text[:80]!r}, which is no JSON") from error
    if not isinstance(document, dict):
        raise Unusable(f"it said {found.text[:80]!r}, which is no JSON object")
    return document


def _utc(text: Any) -> float | None:
    """`2026-09-18T08:22:00Z` as Unix seconds; None if it is something else."""
    # It is shown and kept: `fromisoformat` alone takes any character for the T.
    if not isinstance(text, str) or not re.fullmatch(r"[0-9-]+T[0-9:.]+Z", text):
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _until(at: float | None, found: Answer) -> float | None:
    """Seconds until then, by the service's own clock; None: it did not say, or it has passed."""
    if at is None:
        return None
    left = at - (time.time() if found.at is None else found.at)
    return left if left > 0 else None
