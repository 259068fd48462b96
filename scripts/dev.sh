#!/bin/sh
# Build in place: the libraries and the cffi module are put into python/hobbit_cpp, so that
#     PYTHONPATH=python .venv/bin/python ...
# uses this tree. After a change in csrc/ run it again: only what changed is compiled.
#
#   sh scripts/dev.sh                          build
#   sh scripts/dev.sh test                     build, and run the C++ tests
#   sh scripts/dev.sh sanitize      the same, and the C++ tests under ASan + UBSan and under TSan
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
tests=OFF
sanitize=OFF
case ${1:-} in
test) tests=ON ;;
sanitize) tests=ON sanitize=ON ;;
esac
cmake -S . -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=Release -DHOBBIT_BUILD_TESTS=$tests \
    -DHOBBIT_SANITIZE_TESTS=$sanitize -DPython_EXECUTABLE="$(command -v python)"
cmake --build "$BUILD" --target hobbit-all
[ -z "${SOURCES:-}" ] || build_is_done
cmake --install "$BUILD" --component hobbit --prefix python
if [ "$tests" = ON ]; then
    (cd "$BUILD" && ctest --output-on-failure)
fi
