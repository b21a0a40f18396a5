#!/bin/sh
# code.sh: the runner's wheel from /build/source as the layers still and code, and the SBOM of the whole image.
#
# What hardly ever changes lies in a layer below the code's: the demo's model, most of our bytes; the libraries
# of a report's page; the SBOM.
set -eu
runner=opt/venv/lib/python3.11/site-packages/runner
documents=/layers/still/usr/share/doc/vlm-runner

tools/bin/pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir dist ./source
./layer.sh code --no-index dist/*.whl
for folder in demo/smolvlm-tiny report/vendor; do
  mkdir -p "/layers/still/$runner/${folder%/*}"
  mv "/layers/code/$runner/$folder" "/layers/still/$runner/$folder"
done

packages=${runner%/*}
mkdir -p "$documents"
PYTHONPATH=/layers/torch/$packages:/layers/ecosystem/$packages:/layers/code/$packages \
  tools/bin/cyclonedx-py environment --output-reproducible --pyproject source/pyproject.toml /opt/venv/bin/python \
  | python3 sbom.py /debian.txt >"$documents/sbom.cdx.json"
cp source/LICENSE "$documents/"
find /layers/still /layers/code -exec touch --no-dereference --date=@315532800 {} +
