"""Libraries of others that stand in every report, as their authors published them.

    d3.min.js        d3 7.9.2, ISC                  npm package d3, dist/d3.min.js
    plot.umd.min.js  Observable Plot 0.6.17, ISC    npm package @observablehq/plot, dist/plot.umd.min.js

Each with its licence beside it, which goes into the page as well. Read by `runner.report.render`, which runs
none of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Library:
    """A script and where it comes from."""

    name: str
    version: str
    package: str
    """Of the npm registry."""
    path: str
    """Of the script in that package."""
    file: str
    licence: str
    """File of its text."""
    spdx: str
    sha256: str
    """Of the script."""

    @property
    def script(self) -> str:
        """The script, after its licence as a comment."""
        here = files(__name__)
        licence = (here / self.licence).read_text("utf-8").strip()
        return f"/*! {self.name} {self.version}\n\n{licence}\n*/\n{(here / self.file).read_text('utf-8')}"


LIBRARIES = (
    Library(
        name="d3",
        version="7.9.2",
        package="d3",
        path="dist/d3.min.js",
        file="d3.min.js",
        licence="LICENSE-d3",
        spdx="ISC",
        sha256="912111098ea99503a6f4967361d2bbdc9dbf58cf9c678c8e27e5b02d1a07f0c1",
    ),
    Library(
        name="Observable Plot",
        version="0.6.17",
        package="@observablehq/plot",
        path="dist/plot.umd.min.js",
        file="plot.umd.min.js",
        licence="LICENSE-plot",
        spdx="ISC",
        sha256="4358086467740777dd788d6b27a95cebdbaefdd50c730a3060117073bd7134cb",
    ),
)
"""In the order that they are loaded in: Plot stands on d3."""
