#!/bin/sh
# Build in place: the libraries and the cffi module are put into python/hobbit_cpp, so that
#     PYTHONPATH=python .venv/bin/python ...
# uses this tree. After a change in csrc/ run it again: only what changed is compiled.
#
#   sh scripts/dev.sh                          build
#   sh scripts/dev.sh test                     build, and run the C++ tests
#   HOBBIT_SANITIZE=thread sh scripts/dev.sh test    (or address,undefined) the C++ tests under a sanitizer; installs nothing
#
# $HOBBIT_VENV: the virtual environment (.venv). $HOBBIT_BUILD_DIR: the build folder (one in the cache).
set -eu
cd "$(dirname "$0")/.."
. scripts/common.sh

need_compiler
make_venv "${HOBBIT_VENV:-.venv}"
PATH=$(cd "$(dirname "$PY")" && pwd):$PATH
export PATH
if ! "$PY" -c 'import cffi' 2>/dev/null || ! ninja --version >/dev/null 2>&1 || ! cmake --version >/dev/null 2>&1; then
    install_build_tools
fi
if [ -n "${HOBBIT_BUILD_DIR:-}" ]; then
    BUILD=$HOBBIT_BUILD_DIR
else
    use_build_dir dev
fi
adopt_build_dir
targets=hobbit-all
[ -z "${HOBBIT_SANITIZE:-}" ] || targets=hobbit-tests
tests=OFF
[ "${1:-}" != test ] || tests=ON
cmake -S . -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=Release -DHOBBIT_BUILD_TESTS=$tests \
    -DHOBBIT_SANITIZE="${HOBBIT_SANITIZE:-}" -DPython_EXECUTABLE="$(command -v python)"
cmake --build "$BUILD" --target "$targets"
[ -z "${SOURCES:-}" ] || build_is_done
if [ "$targets" = hobbit-all ]; then
    cmake --install "$BUILD" --component hobbit --prefix python
fi
if [ "$tests" = ON ]; then
    (cd "$BUILD" && ctest --output-on-failure)
fi
