"""Add Debian's packages to the SBOM of the Python environment: CycloneDX on stdin and on stdout.

    cyclonedx-py environment ... | python3 sbom.py PACKAGES

PACKAGES: what dpkg-query shows of the image, lines of name, version and architecture.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from urllib.parse import quote


def main() -> None:
    sbom = json.load(sys.stdin)
    for line in Path(sys.argv[1]).read_text().splitlines():
        name, version, architecture = line.split()
        purl = f"pkg:deb/debian/{name}@{quote(version, safe='')}?arch={architecture}"
        sbom["components"].append(
            {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
        )
    json.dump(sbom, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
