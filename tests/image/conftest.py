"""What the tests of the image share. `make image-test` builds the image and runs them; nothing else does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.containers import Bucket, bucket

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "IMAGE_UNDER_TEST" not in os.environ:
        skipped = pytest.mark.skip(
            reason="`make image-test` builds the image that these look at, with docker or podman"
        )
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skipped)


@pytest.fixture(scope="session")
def store() -> Iterator[Bucket]:
    with bucket() as here:
        yield here
