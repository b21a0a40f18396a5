#!/bin/sh
# The builder: BUILDER, or the first of docker and podman that answers.
set -eu
for builder in ${BUILDER:-docker podman}; do
  if "$builder" info >/dev/null 2>&1; then
    echo "$builder"
    exit
  fi
done
echo "no image builder: ${BUILDER:-neither docker nor podman} answers (\`docker info\`); install one, or name it with BUILDER=" >&2
exit 69
