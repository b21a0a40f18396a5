#!/bin/sh
# code.sh: the runner's wheel from /build/source as the layers demo and code, and the SBOM of the whole image.
#
# The demo's model is most of our bytes and hardly ever changes: it lies in a layer below the code's.
set -eu
packages=opt/venv/lib/python3.11/site-packages
demo=$packages/runner/demo
documents=/layers/code/usr/share/doc/vlm-runner

tools/bin/pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir dist ./source
./layer.sh code --no-index dist/*.whl
mkdir -p "/layers/demo/$demo" "$documents"
mv "/layers/code/$demo/smolvlm-tiny" "/layers/demo/$demo/"

PYTHONPATH=/layers/torch/$packages:/layers/ecosystem/$packages:/layers/code/$packages \
  tools/bin/cyclonedx-py environment --output-reproducible --pyproject source/pyproject.toml /opt/venv/bin/python \
  | python3 sbom.py /debian.txt >"$documents/sbom.cdx.json"
cp source/LICENSE "$documents/"
find /layers/demo /layers/code -exec touch --no-dereference --date=@315532800 {} +
