"""What `demo:<name>` means: the models and datasets that come with the package.

`resolve_model` gives a folder of the installation; `resolve_dataset` builds the dataset on first use in a
cache folder and gives it from there afterwards. Nothing is downloaded. The charts are in
`runner.demo.charts`, pairs of answers about them in `runner.demo.preferences`; the model's weights lie in
`smolvlm-tiny/` and are made by `python -m runner.demo.pretrain`, which nothing here imports.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from runner.errors import DataError, StorageError

PREFIX = "demo:"


def _charts() -> tuple[str, Callable[[Path], None]]:
    # Imported here, with Pillow behind it: `runner validate` needs the names only.
    from runner.demo import charts

    return charts.VERSION, charts.build


def _preferences() -> tuple[str, Callable[[Path], None]]:
    from runner.demo import preferences

    return preferences.VERSION, preferences.build


_DATASETS: dict[str, Callable[[], tuple[str, Callable[[Path], None]]]] = {
    "charts": _charts,
    "preferences": _preferences,
}
"""Name -> version of the generator and the function that fills an empty folder."""

MODELS = ("smolvlm-tiny",)
DATASETS = tuple(_DATASETS)


def resolve_model(name: str) -> Path:
    """The folder of `demo:<name>`, as `AutoProcessor.from_pretrained` and the model classes load it.

    Raises DataError for a name that is not in MODELS, and when the installation lacks the folder.
    """
    short = _known(name, MODELS, "model")
    folder = Path(__file__).parent / short
    if not (folder / "config.json").is_file():
        raise DataError(
            f"model {name}: {folder} has no config.json, so the installation is incomplete; install the "
            f"package again, or make the model with `python -m runner.demo.pretrain --output {folder}`"
        )
    return folder


def resolve_dataset(name: str, cache: Path) -> Path:
    """The folder of `demo:<name>` under `cache`, built first if it is not there (about ten seconds).

    The folder appears complete or not at all, and two processes may build at once: each builds aside and
    renames, and who comes second takes what is there. Raises DataError for a name that is not in DATASETS,
    StorageError when the cache cannot be written.
    """
    short = _known(name, DATASETS, "dataset")
    version, build = _DATASETS[short]()
    folder = cache / "demo" / f"{short}-v{version}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{short}-", dir=folder.parent))
        try:
            build(aside)
            aside.chmod(0o755)  # mkdtemp lets only its maker in; a cache may be shared
            aside.rename(folder)
        except OSError:
            # A folder that is there now is another process's, complete as every renamed one.
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"build {name}: cannot write {folder}: {error}; free space there, or name another folder in "
            "RUNNER_CACHE"
        ) from error
    return folder


def _known(name: str, names: tuple[str, ...], what: str) -> str:
    """The name without its prefix, if it is one of `names`."""
    short = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or short not in names:
        known = ", ".join(PREFIX + one for one in names)
        raise DataError(f"{what} {name!r}: no such embedded {what}; the known names are: {known}")
    return short
