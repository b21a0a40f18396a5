"""docs/iam/: the rights that a run and a reader need, and none more, at a server that enforces them.

The server knows no conditions of policies; that every list names the prefix is seen in the requests.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from runner import checkpoint_verbs, cli
from runner.checkpoint.collect import GRACE
from runner.checkpoint.head import HEAD, TTL
from runner.checkpoint.restore import restore
from runner.checkpoint.s3 import S3Store, Settings
from runner.checkpoint.store import Patience, probe
from runner.errors import AccessDenied, StorageError
from tests.fault_proxy import FaultProxy
from tests.runs_in_store import Clock, Run
from tests.s3_server import BUCKET, ENVIRONMENT, s3_server

POLICIES = Path(__file__).parents[1] / "docs" / "iam"

PART = 5 << 20

RIGHTS = {
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "CompleteMultipartUpload": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListObjectsV2": "s3:ListBucket",
    "ListParts": "s3:ListMultipartUploadParts",
    "PutObject": "s3:PutObject",
    "UploadPart": "s3:PutObject",
}
"""What an operation needs: the service authorization reference of Amazon S3."""


def operation(method: str, path: str) -> str:
    """Of a request to S3, by its method and query."""
    query = parse_qs(urlsplit(path).query, keep_blank_values=True)
    upload = "uploadId" in query
    match method:
        case "GET" if "list-type" in query:
            return "ListObjectsV2"
        case "GET" if "uploads" in query:
            return "ListMultipartUploads"
        case "GET":
            return "ListParts" if upload else "GetObject"
        case "HEAD":
            return "HeadObject"
        case "PUT":
            return "UploadPart" if upload else "PutObject"
        case "POST":
            return "CompleteMultipartUpload" if upload else "CreateMultipartUpload"
        case "DELETE":
            return "AbortMultipartUpload" if upload else "DeleteObject"
    raise AssertionError(f"{method} {path} is no operation that this test knows")


def policy(name: str, prefix: str) -> list[dict[str, Any]]:
    """The statements of a policy about S3, filled in."""
    text = (POLICIES / f"{name}.json").read_text("utf-8")
    statements = json.loads(text.replace("BUCKET", BUCKET).replace("PREFIX", prefix))["Statement"]
    return [one for one in statements if one["Action"][0].startswith("s3:")]


def actions(statements: list[dict[str, Any]]) -> set[str]:
    return {action for statement in statements for action in statement["Action"]}


class Account:
    """A server, a user whose rights change, and the requests that it made."""

    def __init__(self, port: int, proxy: FaultProxy, prefix: str) -> None:
        self.proxy = proxy
        self.prefix = prefix
        self.clock = Clock()
        self._port = port
        self._opened: list[S3Store] = []

    def enforce(self, enforced: bool) -> None:
        connection = HTTPConnection("127.0.0.1", self._port)
        connection.request("POST", "/moto-api/reset-auth", b"0" if enforced else b"inf")
        assert connection.getresponse().status == 200
        connection.close()

    def grant(self, statements: list[dict[str, Any]]) -> None:
        """From now on a new user's rights are these."""
        import boto3

        self.enforce(False)
        iam = boto3.session.Session().client("iam", endpoint_url=f"http://127.0.0.1:{self._port}")
        user = f"user-{next(_COUNT)}"
        iam.create_user(UserName=user)
        bare = [{name: part for name, part in one.items() if name != "Condition"} for one in statements]
        document = json.dumps({"Version": "2012-10-17", "Statement": bare})
        iam.put_user_policy(UserName=user, PolicyName="rights", PolicyDocument=document)
        key = iam.create_access_key(UserName=user)["AccessKey"]
        iam.close()
        os.environ["AWS_ACCESS_KEY_ID"] = key["AccessKeyId"]
        os.environ["AWS_SECRET_ACCESS_KEY"] = key["SecretAccessKey"]
        self.enforce(True)
        self.proxy.clear()

    def everything(self) -> None:
        """No enforcement any more, for what prepares a test."""
        self.enforce(False)
        self.proxy.clear()

    def store(self) -> S3Store:
        settings = Settings(bucket=BUCKET, prefix=f"{self.prefix}/run", whole=PART, part=PART)
        self._opened.append(S3Store(settings, Patience(60, Clock(), lambda event: None)))
        return self._opened[-1]

    def run(self, path: Path, name: str) -> Run:
        return Run(self.store(), path, self.clock, name)

    @property
    def uri(self) -> str:
        return f"s3://{BUCKET}/{self.prefix}/run"

    def used(self) -> set[str]:
        """The rights that the requests so far needed."""
        for method, path in self.proxy.requests:
            query = parse_qs(urlsplit(path).query)
            assert urlsplit(path).path.startswith(f"/{BUCKET}/{self.prefix}/") or (
                operation(method, path) == "ListObjectsV2"
                and query["prefix"][0].startswith(f"{self.prefix}/")
            ), path
        return {RIGHTS[operation(method, path)] for method, path in self.proxy.requests}

    def close(self) -> None:
        self.enforce(False)
        for store in self._opened:
            store.close()


_COUNT = iter(range(1_000_000))


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, FaultProxy]]:
    with s3_server() as port, FaultProxy(port) as proxy:
        yield port, proxy


@pytest.fixture
def account(server: tuple[int, FaultProxy], monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server[1].url}.items():
        monkeypatch.setenv(name, value)
    account = Account(*server, f"team/{next(_COUNT)}")
    monkeypatch.setattr(checkpoint_verbs, "BootClock", lambda: account.clock)
    yield account
    account.close()


class Failed(Exception):
    """A verb that ended with a code."""


def verb(*words: str) -> None:
    if (code := cli.main(["checkpoints", *words])) != 0:
        raise AccessDenied("a verb") if code == AccessDenied.exit_code else Failed(f"{words}: {code}")


def life(account: Account, path: Path) -> None:
    """A run from its first request to its last, by two owners, and every verb."""
    assert probe(account.store()) is None
    first = account.run(path, "first").taken()
    large = os.urandom(PART + 1)
    fault = account.proxy.fail("PUT", ".*partNumber=1.*", "400 EntityTooLarge")
    with pytest.raises(StorageError, match="EntityTooLarge"):
        first.commit(1, large=large)
    assert fault.met
    account.proxy.fail("POST", r".*\?uploadId=.*", "after")  # its fate is read from the object
    (path / first.path.name / "outbox" / "00000001-0001").rename(path / f"failed-{next(_COUNT)}")
    for step in (2, 4, 6):
        entry = first.commit(step, large=large)
    account.clock.time += GRACE
    first.lease.renew()
    assert first.collector.collect()
    second = account.run(path, "second").taken()
    assert account.clock.time >= GRACE + TTL
    found = restore(second.store, second.lease, second.manifests, path / f"{next(_COUNT)}", lambda said: None)
    assert found is not None
    second.committer.trust(found[1])
    second.parent = found[0].id
    second.commit(8, large=large)
    second.lease.release()
    verb("ls", account.uri)
    verb("verify", account.uri)
    verb("pull", account.uri, "--checkpoint", "--to", str(path / f"{next(_COUNT)}"))
    verb("gc", account.uri, "--no-grace")
    verb("rm", account.uri, "--id", entry.id, "--yes", "--no-grace")
    kept = second.lease.head.newest
    assert kept is not None
    second.store.delete(HEAD)
    verb("adopt", f"{account.uri}/{kept.key}")
    verb("rm", account.uri, "--yes")


def test_a_run_uses_every_right_of_its_policy_and_no_other(account: Account, tmp_path: Path) -> None:
    rights = policy("runner", account.prefix)
    account.grant(rights)
    life(account, tmp_path)
    assert account.used() == actions(rights)


@pytest.mark.parametrize("right", sorted(actions(policy("runner", "x"))))
def test_without_one_right_a_run_ends_with_77(account: Account, tmp_path: Path, right: str) -> None:
    rights = policy("runner", account.prefix)
    less = [{**one, "Action": [action for action in one["Action"] if action != right]} for one in rights]
    account.grant([one for one in less if one["Action"]])
    if right != "s3:AbortMultipartUpload":
        with pytest.raises(AccessDenied):
            life(account, tmp_path)
        return
    life(account, tmp_path)  # what is not aborted is paid for until the lifecycle rule takes it
    assert uploads(account) == 1


def uploads(account: Account) -> int:
    """Uploads that were begun and neither completed nor aborted."""
    import boto3

    account.everything()
    client = boto3.session.Session().client("s3")
    found = client.list_multipart_uploads(Bucket=BUCKET, Prefix=account.prefix).get("Uploads", [])
    client.close()
    return len(found)


def committed(account: Account, path: Path) -> Run:
    """A run to read, made by somebody with every right."""
    account.everything()
    run = account.run(path, "a").taken()
    for step in (2, 4):
        run.commit(step)
    return run


def read(account: Account, path: Path) -> None:
    if (code := cli.main(["status", account.uri])) != 0:
        raise AccessDenied("status") if code == AccessDenied.exit_code else Failed(f"status: {code}")
    verb("ls", account.uri)
    verb("verify", account.uri)
    verb("pull", account.uri, "--checkpoint", "--to", str(path / f"{next(_COUNT)}"))


def test_a_reader_uses_every_right_of_its_policy_and_no_other(
    account: Account, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    committed(account, tmp_path)
    rights = policy("reader", account.prefix)
    account.grant(rights)
    read(account, tmp_path)
    assert account.used() == actions(rights)
    assert capsys.readouterr().err == ""
    writes = [path for method, path in account.proxy.requests if method in ("PUT", "DELETE")]
    assert writes and all(re.search("/run/pins/[^/]*$", path) for path in writes)


def test_a_reader_may_do_without_pins(
    account: Account, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    committed(account, tmp_path)
    account.grant([one for one in policy("reader", account.prefix) if "Pins" not in one["Sid"]])
    read(account, tmp_path)
    assert "reading without a pin" in capsys.readouterr().err


def test_a_reader_lists_runs_without_pins(
    account: Account, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    committed(account, tmp_path)
    rights = [one for one in policy("reader", account.prefix) if "Pins" not in one["Sid"]]
    account.grant(rights)
    assert cli.main(["list", account.uri.removesuffix("/run")]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^run +starting .* kB ", out, re.MULTILINE) and err == ""
    assert account.used() == actions(rights)
    account.grant([one for one in rights if "s3:GetObject" in one["Action"]])
    assert cli.main(["list", account.uri.removesuffix("/run")]) == 77


def test_a_reader_changes_nothing(account: Account, tmp_path: Path) -> None:
    run = committed(account, tmp_path)
    run.lease.release()
    before = {key: run.store.read(key) for key in run.store.keys("")}
    account.grant(policy("reader", account.prefix))
    for words in (["gc", account.uri], ["rm", account.uri, "--yes"]):
        with pytest.raises(AccessDenied):
            verb(*words)
    with pytest.raises(AccessDenied):
        account.store().create("blobs/000001/x", b"")
    account.everything()
    assert {key: run.store.read(key) for key in run.store.keys("")} == before


@pytest.mark.parametrize("right", ["s3:GetObject", "s3:ListBucket"])
def test_without_one_right_a_reader_ends_with_77(account: Account, tmp_path: Path, right: str) -> None:
    committed(account, tmp_path)
    rights = policy("reader", account.prefix)
    account.grant([one for one in rights if right not in one["Action"]])
    with pytest.raises(AccessDenied):
        read(account, tmp_path)


def test_lists_are_bound_to_the_prefix() -> None:
    for name in ("runner", "reader"):
        (listing,) = [one for one in policy(name, "team/x") if one["Action"] == ["s3:ListBucket"]]
        assert listing["Condition"] == {"StringLike": {"s3:prefix": "team/x/*"}}
