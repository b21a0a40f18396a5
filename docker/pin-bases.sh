#!/bin/sh
# Write into docker/Dockerfile the digest that the tag of its base has in the registry now. What `make pin-bases` runs.
#
# Asks skopeo, or docker's buildx. A registry that does not answer leaves the file as it is, and is 69.
set -eu
cd "$(dirname "$0")"
image=$(sed -n 's/^ARG BASE=\([^@]*\).*/\1/p' Dockerfile)

digest() {
  if command -v skopeo >/dev/null; then
    # The digest of an index is that of its bytes.
    manifest=$(mktemp)
    skopeo inspect --raw "docker://$image" >"$manifest" || { rm "$manifest"; return 1; }
    echo "sha256:$(sha256sum "$manifest" | cut -d ' ' -f 1)"
    rm "$manifest"
  else
    docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$image"
  fi
}

found=$(digest) || found=
if ! echo "$found" | grep -Eqx 'sha256:[0-9a-f]{64}'; then
  echo "the registry does not say which digest $image has: docker/Dockerfile stays as it is" >&2
  exit 69
fi
sed -i "s|^ARG BASE=.*|ARG BASE=$image@$found|" Dockerfile
echo "ARG BASE=$image@$found"
