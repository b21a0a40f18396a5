#!/bin/sh
# Build the image, and write its SBOM to build/. What `make image` runs; all settings are variables:
#
#   TARGET           gpu (default) or cpu
#   BUILDER          docker or podman; the first that answers
#   IMAGE            name and tag; vlm-runner:VERSION-TARGET
#   BASE             another base image with Debian 12's packages
#   TORCH_CPU_LINKS  where pip finds torch without CUDA: a page; with podman also a folder
#   IMAGE_ARGS       more arguments of the builder
#
# The certificate, index and proxy that this machine's pip is configured for go into the build as a secret.
set -eu
cd "$(dirname "$0")/.."
TARGET=${TARGET:-gpu}
case $TARGET in cpu | gpu) ;; *) echo "TARGET is cpu or gpu, not $TARGET" >&2; exit 64 ;; esac
BUILDER=$(docker/builder.sh)
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' runner/__init__.py)
IMAGE=${IMAGE:-vlm-runner:$version-$TARGET}
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ "$revision" = unknown ] || [ -z "$(git status --porcelain -- runner k8s docker LICENSE README.md pyproject.toml)" ] || revision=$revision-dirty
# Without the name and password that an address may hold.
source=$(git remote get-url origin 2>/dev/null | sed -nE 's#^https://([^/@]*@)?#https://#p' || true)
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}

secrets=$(mktemp -d)
trap 'rm -rf "$secrets"' EXIT
pip_says() { python3 -m pip config get "global.$1" 2>/dev/null || true; }
{
  echo '[global]'
  for name in index-url extra-index-url proxy timeout; do
    value=$(pip_says "$name" | tr ' ' '\n' | grep -v '^file:' | tr '\n' ' ')
    [ -z "$value" ] || echo "$name = $value"
  done
} >"$secrets/pip.conf"
certificate=${PIP_CERT:-$(pip_says cert)}
: >"$secrets/ca.crt"
if [ -n "$certificate" ]; then
  cp "$certificate" "$secrets/ca.crt"
  echo 'cert = /run/secrets/ca.crt' >>"$secrets/pip.conf"
fi

set -- --file docker/Dockerfile --tag "$IMAGE" \
  --secret "id=pip.conf,src=$secrets/pip.conf" --secret "id=ca.crt,src=$secrets/ca.crt" \
  --build-arg "TARGET=$TARGET" --build-arg "VERSION=$version" --build-arg "REVISION=$revision" \
  --build-arg "SOURCE=${source:-unknown}" \
  --build-arg "CREATED=$(date --utc --date="@$epoch" +%Y-%m-%dT%H:%M:%SZ)"
[ -z "${BASE:-}" ] || set -- "$@" --build-arg "BASE=$BASE"
[ -z "${TORCH_CPU_LINKS:-}" ] || set -- "$@" --build-arg "TORCH_CPU_LINKS=$TORCH_CPU_LINKS"
if [ "${BUILDER##*/}" = podman ]; then
  # chroot asks for no network of its own, and works inside a container.
  set -- "$@" --isolation chroot --layers --ignorefile docker/Dockerfile.dockerignore
  [ ! -d "${TORCH_CPU_LINKS:-}" ] || set -- "$@" --volume "$TORCH_CPU_LINKS:$TORCH_CPU_LINKS:ro"
fi
# shellcheck disable=SC2086  # words
"$BUILDER" build "$@" ${IMAGE_ARGS:-} .

container=$("$BUILDER" create "$IMAGE")
mkdir -p build
"$BUILDER" cp "$container:/usr/share/doc/vlm-runner/sbom.cdx.json" "build/sbom-$TARGET.cdx.json"
"$BUILDER" rm "$container" >/dev/null
echo "$IMAGE is built; its SBOM is build/sbom-$TARGET.cdx.json"
