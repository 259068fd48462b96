#!/bin/sh
# All checks and tests, from nothing: sh scripts/test.sh [arguments for pytest]
#
# Makes a virtual environment (.venv, or $HOBBIT_VENV), installs hobbit-cpp with its test extra, then runs ruff, mypy,
# clang-format and the layer check, the C++ tests, and last pytest. Exit status 0 if everything passed.
set -eu
cd "$(dirname "$0")/.."
. scripts/common.sh

need_compiler
make_venv "${HOBBIT_VENV:-.venv}"
say "build tools"
install_build_tools
install_bindings
use_build_dir test

say "hobbit-cpp with its tests (build folder: $BUILD)"
SKBUILD_BUILD_DIR=$BUILD SKBUILD_CMAKE_DEFINE=HOBBIT_BUILD_TESTS=ON \
    "$PY" -m pip install --quiet --no-build-isolation ".[test]"
build_is_done

# The files that clang-format -i would change.
check_format() {
    find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.c' | sort | {
        changed=0
        while IFS= read -r path; do
            clang-format --dry-run --Werror "$path" 2>/dev/null || {
                echo "not formatted (clang-format -i): $path"
                changed=1
            }
        done
        return "$changed"
    }
}

failed=
check() {
    say "$*"
    "$@" || failed="$failed
    $*"
}
check "$PY" -m ruff check .
check "$PY" -m mypy python scripts third_party tests/python
check "$PY" scripts/check_layers.py
check check_format

say "C++ tests"
(cd "$BUILD" && ctest --output-on-failure) || failed="$failed
    ctest"

if [ -n "$failed" ]; then
    printf '\nFAILED so far (the exit status will say so):%s\n' "$failed"
fi
say "pytest"
status=0
HOBBIT_UNPATCHED_LIB=$BUILD/unpatched "$PY" -m pytest tests/python "$@" || status=$?
[ -z "$failed" ] || [ "$status" -ne 0 ] || status=1
exit "$status"
