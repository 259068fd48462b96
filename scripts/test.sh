#!/bin/sh
# All checks and tests, from nothing: sh scripts/test.sh [arguments for pytest]
#
# Makes a virtual environment (.venv, or $HOBBIT_VENV), installs hobbit-cpp with its test extra, then runs ruff, mypy,
# clang-format and the layer check, the C++ tests (as they are, under ASan + UBSan, those with threads under TSan), pytest, and a
# part of pytest over a core with ASan + UBSan. Exit status 0 if everything passed.
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
sanitizers=ON
echo 'int main() { return 0; }' >"$BUILD/try.cpp"
for sanitizer in address undefined thread; do
    if ! "${CXX:-c++}" -fsanitize=$sanitizer "$BUILD/try.cpp" -o "$BUILD/try" 2>/dev/null; then
        say "tests under sanitizers are left out: ${CXX:-c++} has no -fsanitize=$sanitizer (packages libasan, libubsan, libtsan)"
        sanitizers=OFF
    fi
done
SKBUILD_BUILD_DIR=$BUILD SKBUILD_CMAKE_DEFINE="HOBBIT_BUILD_TESTS=ON;HOBBIT_SANITIZE_TESTS=$sanitizers" \
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
(cd "$BUILD" && ctest --output-on-failure --timeout 600) || failed="$failed
    ctest"

if [ -n "$failed" ]; then
    printf '\nFAILED so far (the exit status will say so):%s\n' "$failed"
fi
say "pytest"
status=0
HYPOTHESIS_PROFILE=ci HOBBIT_UNPATCHED_LIB=$BUILD/unpatched HOBBIT_TESTING_LIB=$BUILD/testing "$PY" -m pytest tests/python "$@" || status=$?
[ -z "$failed" ] || [ "$status" -ne 0 ] || status=1

asan=$("${CXX:-c++}" -print-file-name=libasan.so)
if [ "$#" -gt 0 ] || [ "$sanitizers" = OFF ]; then
    say "left out: pytest over a core with ASan and UBSan"
else
    say "pytest over a core with ASan and UBSan"
    cmake --install "$BUILD" --component asan --prefix "$BUILD/asan/package" >/dev/null
    # Python does not give back all it takes at exit: leaks are looked for in the C++ tests.
    LD_PRELOAD="$asan $("${CXX:-c++}" -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
        PYTHONPATH=$BUILD/asan/package HOBBIT_TESTING_LIB=$BUILD/testing \
        "$PY" -m pytest -q -m "not no_asan" tests/python/test_offload.py tests/python/test_exact.py \
        tests/python/test_faults.py tests/python/test_lifetime.py || status=$?
fi
exit "$status"
