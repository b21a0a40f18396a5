"""One contract for all stores, the bucket behind a real server and a proxy that plays every fault."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint.folder import KEPT, FolderStore
from runner.checkpoint.memory import MemoryStore
from runner.checkpoint.s3 import S3Store, Settings
from runner.checkpoint.s3_errors import Meaning, meaning
from runner.checkpoint.s3_parts import Slice, cut, joined
from runner.checkpoint.store import Interruptible, Missing, Patience, Store, Transient, probe
from runner.errors import AccessDenied, DataError, JobError, Preempted, StorageError
from tests.fault_proxy import FaultProxy
from tests.runs_in_store import Clock
from tests.s3_server import BUCKET, ENVIRONMENT, s3_server

PART = 5 << 20
"""S3's smallest, and moto's."""


@pytest.fixture(scope="module")
def server() -> Iterator[FaultProxy]:
    with s3_server() as port, FaultProxy(port) as proxy:
        yield proxy


class Bucket:
    """A store in a bucket, its proxy, and what it said."""

    def __init__(self, proxy: FaultProxy, prefix: str) -> None:
        self.proxy = proxy
        self.events: list[Mapping[str, Any]] = []
        self.settings = Settings(bucket=BUCKET, prefix=prefix, whole=PART, part=PART)
        self.opened: list[S3Store] = []
        self.store = self.again()

    def again(self, patience: float = 60, **changes: Any) -> S3Store:
        """The store of another process."""
        patient = Patience(patience, Clock(), self.events.append)
        self.opened.append(S3Store(replace(self.settings, **changes), patient))
        return self.opened[-1]


_COUNT = iter(range(1_000_000))


@pytest.fixture
def bucket(server: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    server.clear()
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    bucket = Bucket(server, f"runs/{next(_COUNT)}")
    yield bucket
    for store in bucket.opened:
        store.close()


@pytest.fixture(params=["s3", "folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return FolderStore(tmp_path / "store")
    if request.param == "memory":
        return MemoryStore()
    bucket: Bucket = request.getfixturevalue("bucket")
    store: Store = bucket.store
    return store


def file_of(path: Path, data: bytes) -> tuple[Path, int, str]:
    path.write_bytes(data)
    return path, len(data), hashlib.sha256(data).hexdigest()


def held(store: Store, key: str) -> bytes | None:
    found = store.read(key)
    return None if found is None else found.data


def test_server_of_these_tests_keeps_its_conditions_whoever_meets() -> None:
    """moto alone does not: every one of these writes is under way while the next looks."""

    signed = "AWS4-HMAC-SHA256 Credential=test/20300101/us-east-1/s3/aws4_request"

    def asked(method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        with contextlib.closing(HTTPConnection("127.0.0.1", port)) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, f"/{BUCKET}/{path}", body, {"Authorization": signed, **named})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def sent(number: int) -> str:
        _, begun = asked("POST", "parts?uploads")
        upload = begun.partition(b"<UploadId>")[2].partition(b"</UploadId>")[0].decode()
        asked("PUT", f"parts?partNumber=1&uploadId={upload}", str(number).encode())
        return upload

    def completed(upload: str) -> int:
        etag = hashlib.md5(str(uploads.index(upload)).encode(), usedforsecurity=False).hexdigest()
        part = f"<Part><PartNumber>1</PartNumber><ETag>{etag}</ETag></Part>"
        body = f"<CompleteMultipartUpload>{part}</CompleteMultipartUpload>".encode()
        return asked("POST", f"parts?uploadId={upload}", body, If_None_Match="*")[0]

    with s3_server(window=0.05) as port, ThreadPoolExecutor(8) as pool:
        made = pool.map(lambda n: asked("PUT", "once", str(n).encode(), If_None_Match="*")[0], range(8))
        assert sorted(made) == [200, *[412] * 7]
        etag = hashlib.md5(asked("GET", "once")[1], usedforsecurity=False).hexdigest()
        swapped = pool.map(lambda n: asked("PUT", "once", b"next", If_Match=etag)[0], range(8))
        assert sorted(swapped) == [200, *[412] * 7]
        uploads = [sent(number) for number in range(8)]
        assert sorted(pool.map(completed, uploads)) == [200, *[412] * 7]


# --- the contract ---


def test_key_is_created_once_and_twice_the_same_is_once(store: Store) -> None:
    assert store.read("a/b.json") is None
    assert store.create("a/b.json", b"one")
    assert store.create("a/b.json", b"one")
    assert not store.create("a/b.json", b"two")
    assert held(store, "a/b.json") == b"one"


def test_object_is_replaced_only_under_its_etag(store: Store) -> None:
    assert store.swap("HEAD", b"0", "7-none") is None
    first = store.swap("HEAD", b"1", None)
    assert first is not None
    assert store.swap("HEAD", b"x", None) is None
    second = store.swap("HEAD", b"2", first)
    assert second not in (None, first)
    assert store.swap("HEAD", b"3", first) is None
    found = store.read("HEAD")
    assert found is not None
    assert (found.data, found.etag) == (b"2", second)
    assert list(store.keys("")) == ["HEAD"]


def test_of_many_writers_every_reported_swap_counts(store: Store) -> None:
    store.swap("HEAD", b"0", None)
    won = []

    def add() -> None:
        while len(won) < 24:
            found = store.read("HEAD")
            assert found is not None
            if store.swap("HEAD", str(int(found.data) + 1).encode(), found.etag) is not None:
                won.append(1)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held(store, "HEAD") == str(len(won)).encode()


def test_of_many_creators_one_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: store.create("once", str(number).encode()), range(8)))
    assert won.count(True) == 1
    assert held(store, "once") == str(won.index(True)).encode()


@pytest.mark.parametrize("size", [0, 1, 300_000, 2 * PART + 17])
def test_file_goes_there_and_back(store: Store, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    path, size, sha256 = file_of(tmp_path / "file", data)
    assert store.create_file("blobs/1/x", path, size, sha256)
    assert store.create_file("blobs/1/x", path, size, sha256)
    other = file_of(tmp_path / "other", data + b"x")
    assert not store.create_file("blobs/1/x", *other)
    store.fetch("blobs/1/x", tmp_path / "back", size)
    assert (tmp_path / "back").read_bytes() == data
    for wrong in (size + 1, size + PART + 1):
        with pytest.raises(DataError, match="bytes"):
            store.fetch("blobs/1/x", tmp_path / "wrong", wrong)


def test_keys_are_listed_by_prefix_and_deleted_once_or_twice(store: Store) -> None:
    for key in ("b/2", "b/1", "bc", "a/1"):
        store.create(key, b"")
    assert list(store.keys("b/")) == ["b/1", "b/2"]
    assert list(store.keys("")) == ["a/1", "b/1", "b/2", "bc"]
    store.delete("b/1")
    store.delete("b/1")
    assert list(store.keys("b")) == ["b/2", "bc"]
    assert list(store.keys("nothing/")) == []


def test_what_is_not_there_is_missing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(Missing, match="no such"):
        store.fetch("blobs/1/x", tmp_path / "file", 3)


def test_probe_finds_both_stores_fit_and_leaves_nothing(store: Store) -> None:
    assert probe(store) is None
    assert list(store.keys("")) == []


# --- the folder ---


@pytest.mark.parametrize(("others", "verdict"), [(1, "lost"), (KEPT, "lost"), (3 * KEPT, "unknown")])
def test_writer_that_slept_before_its_link_never_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: int, verdict: str
) -> None:
    """With few others its number is taken; with many it has been swept and is free again."""
    sleeper, link = FolderStore(tmp_path), os.link
    began = sleeper.swap("HEAD", b"0", None)

    def sleep(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        etag = began
        for number in range(1, others + 1):
            etag = FolderStore(tmp_path).swap("HEAD", str(number).encode(), etag)
        link(source, target)

    monkeypatch.setattr(os, "link", sleep)
    if verdict == "lost":
        assert sleeper.swap("HEAD", b"stale", began) is None
    else:
        with pytest.raises(Transient, match="overtaken"):
            sleeper.swap("HEAD", b"stale", began)
    assert held(sleeper, "HEAD") == str(others).encode()
    assert len(list(tmp_path.glob("HEAD.*"))) <= KEPT + 1


def test_file_system_without_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(JobError, match="no hard links"):
        FolderStore(tmp_path).create("a", b"")


def test_link_whose_answer_was_lost_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def lost(source: Path, target: Path) -> None:
        link(source, target)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", lost)
    assert FolderStore(tmp_path).create("a", b"1")


def test_read_only_reader_writes_nothing(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "none")
    assert store.read("HEAD") is None
    assert list(store.keys("")) == []
    assert not (tmp_path / "none").exists()


# --- faults of the bucket ---

LOST = ["before", "after", "409", "500", "503", "truncate"]


@pytest.mark.parametrize("how", [*LOST, "403 ExpiredToken"])
def test_fault_changes_nothing_but_the_time(bucket: Bucket, tmp_path: Path, how: str) -> None:
    store, proxy = bucket.store, bucket.proxy
    assert store.create("first", b"")
    data = os.urandom(2 * PART + 17)
    large, small = file_of(tmp_path / "large", data), file_of(tmp_path / "small", data[:999])
    faults = [
        proxy.fail("PUT", "/created", how),
        proxy.fail("PUT", "/small", how),
        proxy.fail("POST", r"/large\?uploads", how),
        proxy.fail("PUT", "partNumber=2.*|uploadId=.*partNumber=2", how),
        proxy.fail("POST", r"/large\?uploadId=.*", how),
        proxy.fail("GET", "/created", how),
        proxy.fail("GET", "/large", how),
        proxy.fail("GET", "list-type=2.*", how),
        proxy.fail("DELETE", "/created", how),
    ]
    assert store.create("created", b"content")
    assert held(store, "created") == b"content"
    assert store.create_file("small", *small)
    assert store.create_file("large", *large)
    store.fetch("large", tmp_path / "back", len(data))
    assert (tmp_path / "back").read_bytes() == data
    assert list(store.keys("")) == ["created", "first", "large", "small"]
    store.delete("created")
    assert [fault.path for fault in faults if not fault.met] == []
    empty_answers = {"truncate": 4}.get(how, 0)  # of those, half is nothing less
    assert len(bucket.events) >= len(faults) - empty_answers
    assert all(event["event"] == "store" for event in bucket.events)


@pytest.mark.parametrize("how", ["before", "after", "409", "500", "503"])
def test_unanswered_swap_is_the_callers_to_judge(bucket: Bucket, how: str) -> None:
    etag = bucket.store.swap("HEAD", b"1", None)
    bucket.proxy.fail("PUT", "/HEAD", how)
    with pytest.raises(Transient):
        bucket.store.swap("HEAD", b"2", etag)
    assert held(bucket.store, "HEAD") == (b"2" if how == "after" else b"1")
    assert len(bucket.proxy.heads) == (2 if how == "after" else 1)


def test_upload_that_vanished_is_sent_again(bucket: Bucket, tmp_path: Path) -> None:
    data = os.urandom(PART + 1)
    fault = bucket.proxy.fail("POST", r"/large\?uploadId=.*", "404 NoSuchUpload")
    assert bucket.store.create_file("large", *file_of(tmp_path / "large", data))
    assert fault.met
    assert held(bucket.store, "large") == data


def test_object_that_the_server_stored_wrong_is_not_taken_for_ours(bucket: Bucket) -> None:
    data = os.urandom(999)
    bucket.proxy.fail("PUT", "/rotten", "rot", times=2)
    assert bucket.store.create("rotten", data)
    assert not bucket.store.create("rotten", data)


def test_a_notice_ends_a_long_download_between_its_parts(bucket: Bucket, tmp_path: Path) -> None:
    clock = Interruptible()
    store = S3Store(bucket.settings, Patience(60, clock, bucket.events.append))
    bucket.opened.append(store)
    path, size, sha256 = file_of(tmp_path / "large", bytes(3 * PART))
    assert store.create_file("large", path, size, sha256)
    store.fetch("large", tmp_path / "back", size)
    clock.end(Preempted("SIGTERM"))
    with pytest.raises(Preempted):
        store.fetch("large", tmp_path / "back", size)
    assert held(store, "large") == bytes(3 * PART)  # one call is no waiting: the run is still given back


def test_damaged_answer_of_a_range_is_the_readers_to_verify(bucket: Bucket, tmp_path: Path) -> None:
    bucket.store.create("blob", b"12345")
    bucket.proxy.fail("GET", "/blob", "corrupt")
    bucket.store.fetch("blob", tmp_path / "back", 5)
    assert (tmp_path / "back").read_bytes() == b"12344"


def test_store_that_stays_silent_is_74_after_patience(bucket: Bucket) -> None:
    bucket.proxy.fail("GET", "/HEAD", "503", times=1000)
    with pytest.raises(StorageError, match=r"503.*remedy: check the store") as caught:
        bucket.store.read("HEAD")
    assert not isinstance(caught.value, Transient)
    assert 3 < len(bucket.events) < 20
    assert bucket.events[-1]["waited"] > 20


def test_expired_token_is_read_again_and_77_after_patience(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.proxy.fail("GET", "/HEAD", "400 ExpiredToken", times=2)
    assert bucket.store.read("HEAD") is None
    bucket.proxy.fail("GET", "/HEAD", "400 ExpiredToken", times=1000)
    with pytest.raises(AccessDenied, match="token has expired: renew it"):
        bucket.store.read("HEAD")


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        ("403 AccessDenied", AccessDenied, "without that last right S3 answers 403 for an object that does"),
        ("403 InvalidAccessKeyId", AccessDenied, "AWS_ACCESS_KEY_ID"),
        ("403 SignatureDoesNotMatch", AccessDenied, "its secret is wrong"),
        ("404 NoSuchBucket", JobError, "there is no such bucket"),
        ("301 PermanentRedirect", JobError, "set AWS_REGION to"),
        ("400 AuthorizationHeaderMalformed", JobError, "set AWS_REGION to"),
        ("501 NotImplemented", JobError, "allow_unfenced"),
        ("400 EntityTooLarge", StorageError, "EntityTooLarge"),
    ],
)
def test_first_refusal_is_told_by_its_code(
    bucket: Bucket, answer: str, kind: type[Exception], message: str
) -> None:
    bucket.proxy.fail("GET", "/HEAD", answer, times=9)
    with pytest.raises(kind, match=message):
        bucket.store.read("HEAD")
    assert bucket.events == []


def test_no_credentials_and_no_bucket(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError, match="there is no such bucket"):
        bucket.again(bucket="another").read("HEAD")
    with pytest.raises(JobError, match="not a place in S3"):
        bucket.again(bucket="no bucket").read("HEAD")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(AccessDenied, match="no credentials were found"):
        bucket.again().read("HEAD")


@pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", JobError, "correct AWS_ENDPOINT_URL"),
        ("AWS_REGION", "us east", JobError, "AWS_REGION"),
        ("AWS_PROFILE", "typo", AccessDenied, r"profile \(typo\) could not be found"),
        ("AWS_SECRET_ACCESS_KEY", None, AccessDenied, "missing: AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_client_that_cannot_be_made_is_told_at_once(
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str | None,
    kind: type[Exception],
    message: str,
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(kind, match=message):
        bucket.again().read("HEAD")
    assert bucket.events == []


def test_file_of_a_web_identity_that_is_missing_is_named(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/x")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(AccessDenied, match="token: No such file"):
        bucket.again().read("HEAD")


def test_store_without_conditions_is_found_out_and_works_unfenced(bucket: Bucket, tmp_path: Path) -> None:
    class Careless(S3Store):
        """Sends no conditions and does not look either: a store that ignores them."""

        def create(self, key: str, data: bytes) -> bool:
            return self._put(key, data, hashlib.sha256(data).digest(), {}) is not None

    careless = Careless(bucket.settings, Patience(60, Clock(), bucket.events.append))
    assert probe(careless) == "it let a key be created twice"
    careless.close()
    unfenced = bucket.again(fenced=False)
    assert unfenced.create("a", b"1")
    assert not unfenced.create("a", b"2")
    etag = unfenced.swap("HEAD", b"1", None)
    assert unfenced.swap("HEAD", b"2", None) is None
    assert unfenced.swap("HEAD", b"2", etag) is not None
    large = file_of(tmp_path / "large", os.urandom(PART + 1))
    small = file_of(tmp_path / "small", b"x")
    for key, file in (("large", large), ("small", small)):
        assert unfenced.create_file(key, *file)
        assert unfenced.create_file(key, *file)


def test_owner_and_key_of_the_bucket_are_named_in_every_request(bucket: Bucket) -> None:
    store = bucket.again(owner="123456789012", kms_key="alias/checkpoints")
    assert store.create("a", b"1")
    answer = store._head("a")
    assert (answer["ServerSideEncryption"], answer["SSEKMSKeyId"]) == ("aws:kms", "alias/checkpoints")


# --- rules ---


@pytest.mark.parametrize(
    ("code", "status", "worked", "expected"),
    [
        ("NoSuchKey", 404, True, Meaning.ABSENT),
        ("NoSuchBucket", 404, True, Meaning.NO_BUCKET),
        ("AccessDenied", 403, False, Meaning.DENIED),
        ("AccessDenied", 403, True, Meaning.EXPIRED),
        ("403", 403, False, Meaning.DENIED),
        ("401", 401, True, Meaning.EXPIRED),
        ("ExpiredToken", 400, False, Meaning.EXPIRED),
        ("RequestTimeTooSkewed", 403, False, Meaning.EXPIRED),
        ("InternalError", 500, True, Meaning.AGAIN),
        ("501", 501, True, Meaning.UNFIT),
        ("404", 404, True, Meaning.ABSENT),
        ("412", 412, True, Meaning.LOST),
        ("409", 409, True, Meaning.AGAIN),
        ("MalformedXML", 400, True, Meaning.REFUSED),
    ],
)
def test_meaning_of_an_answer(code: str, status: int, worked: bool, expected: Meaning) -> None:
    assert meaning(code, status, worked) is expected


@pytest.mark.parametrize(
    ("size", "part", "parts"),
    [(0, 4, [(0, 0)]), (8, 4, [(0, 4), (4, 4)]), (9, 4, [(0, 4), (4, 4), (8, 1)])],
)
def test_parts(size: int, part: int, parts: list[tuple[int, int]]) -> None:
    assert cut(size, part) == parts


def test_no_more_parts_than_s3_takes() -> None:
    parts = cut(10_001 * 4 + 3, 4)
    assert len(parts) <= 10_000
    assert sum(length for _, length in parts) == 10_001 * 4 + 3


@pytest.mark.parametrize("size", [0, 1, 1000, 1 << 20, PART + 3])
def test_crc_of_a_file_is_that_of_its_parts(tmp_path: Path, size: int) -> None:
    path, data = tmp_path / "file", os.urandom(1000 + size)
    path.write_bytes(data)
    with Slice(path, 0, 1000) as first, Slice(path, 1000, size) as second:
        assert joined(first.crc32(), second.crc32(), size) == zlib.crc32(data)
        assert joined(0, second.crc32(), size) == zlib.crc32(data[1000:])


def test_slice_is_read_to_its_end_and_once_more(tmp_path: Path) -> None:
    path, data = tmp_path / "file", os.urandom(2 << 20)
    path.write_bytes(data)
    with Slice(path, 1000, 1 << 20) as body:
        for _ in range(2):
            body.seek(0)
            assert (
                b"".join(bytes(piece) for piece in iter(lambda: body.read(16), b"")) == data[1000:][: 1 << 20]
            )
        assert (len(body), body.tell()) == (1 << 20, 1 << 20)
