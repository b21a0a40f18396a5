#!/bin/sh
# layer.sh NAME PIP-ARGUMENTS...: what pip installs into /opt/venv, as a tree of its own below /layers/NAME.
#
# The same bytes from the same wheels, whoever builds when: fixed times, and bytecode that is bound to the
# content of its source and not to its time (the root is read-only, so Python can write none later). It is
# without the columns of tracebacks, a quarter of it; their lines are there.
set -eu
name=$1
shift
root=/layers/$name
packages=opt/venv/lib/python3.11/site-packages

# A source archive is built with setuptools, and deepspeed's with torch: both are in the layers below.
PYTHONPATH=/layers/torch/$packages DS_BUILD_OPS=0 PYTHONDONTWRITEBYTECODE=1 \
  python3 -m pip --python /opt/venv/bin/python install --quiet --no-deps --no-compile --ignore-installed \
  --use-pep517 --no-build-isolation --no-warn-script-location --root "$root" "$@"

# What no run needs, a third of the bytes: tests, headers, command lines, bitsandbytes for another CUDA than
# torch's (13.0, as requirements-torch-gpu.txt has it) and for other makers' GPUs, the server of TensorBoard.
cd "$root/$packages"
find . -depth -type d -name tests -exec rm -r {} +
rm -rf torch/test torch/include torch/bin/*_test torch/bin/test_* torch/bin/protoc* pyarrow/include \
  tensorboard_data_server/bin/server
find . -name 'libbitsandbytes_*' ! -name '*_cpu.so' ! -name '*_cuda130.so' -delete
find "$root/opt/venv/bin" -type f ! -name runner -delete

# Left out: a file of torch's in a newer Python's syntax.
PYTHONNODEBUGRANGES=1 /opt/venv/bin/python -m compileall -q -j 0 -x '/py312_intrinsics\.py$' \
  --invalidation-mode unchecked-hash -s "$root" -p / "$PWD"
find "$root" -exec touch --no-dereference --date=@315532800 {} +
