# Shared by the scripts in this folder: sourced by POSIX sh, with the repository as the current folder.

say() { printf '\n== %s\n' "$*"; }
die() {
    printf '\nerror: %s\n' "$*" >&2
    exit 1
}

upstream_version() { sed -n 's/^version = //p' third_party/llama-cpp-python.pin; }

# make_venv DIR: a virtual environment with pip, by $PYTHON (python3). Sets $PY to its interpreter.
make_venv() {
    PY=$1/bin/python
    if "$PY" -m pip --version >/dev/null 2>&1; then
        return 0
    fi
    base=${PYTHON:-python3}
    command -v "$base" >/dev/null || die "$base was not found: install Python 3.9 or later, or name one in \$PYTHON"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
        die "$("$base" --version) is too old: Python 3.9 or later is needed (name another one in \$PYTHON)"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$base cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"
    say "virtual environment: $1"
    "$base" -m venv "$1" || die "could not make $1"
}

need_compiler() {
    command -v "${CXX:-c++}" >/dev/null || die "no C++ compiler (${CXX:-c++}). On Debian and Ubuntu: apt install g++"
}

# install_bindings: llama-cpp-python of the pinned release without libraries of its own (seconds instead of minutes).
# Not through pip's wheel cache: a wheel without libraries must not be found there by somebody who wants them.
install_bindings() {
    want=$(upstream_version)
    have=$("$PY" -c 'import importlib.metadata as m; print(m.version("llama-cpp-python"))' 2>/dev/null || true)
    if [ "$have" != "$want" ]; then
        say "llama-cpp-python $want (the bindings alone: the libraries are ours)"
        CMAKE_ARGS=-DLLAMA_BUILD=OFF "$PY" -m pip install --quiet --no-cache-dir "llama-cpp-python==$want"
    fi
}

# install_build_tools: what pyproject.toml asks for to build, so that a build folder can be used again (an isolated build
# has its tools in another place each time).
install_build_tools() {
    set -- scikit-build-core cffi
    for tool in cmake ninja; do
        command -v "$tool" >/dev/null || set -- "$@" "$tool"
    done
    "$PY" -m pip install --quiet "$@"
    PATH=$(cd "$(dirname "$PY")" && pwd):$PATH
    export PATH
}

# use_build_dir NAME: sets $BUILD to a build folder outside of the clone, named after all that the objects depend on except
# for sources (ninja and third_party/fetch_upstream.py look after these), and waits until nobody else uses it. The folder
# saves time and is never needed: remove it whenever you like.
use_build_dir() {
    cache=${HOBBIT_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/hobbit-cpp}
    key=$({
        echo "layout 1 $1"
        cat third_party/llama-cpp-python.pin
        "${CC:-cc}" --version
        "${CXX:-c++}" --version
        cmake --version
        ninja --version  # one release does not read the log of another
        grep -m1 '^flags' /proc/cpuinfo || uname -m
        "$PY" -c 'import sys, sysconfig; print(sys.version, sysconfig.get_paths()["include"])'
        env | grep -E '^(CC|CXX|CFLAGS|CXXFLAGS|CPPFLAGS|LDFLAGS|CMAKE_.*|SKBUILD_.*|HOBBIT_LLAMA_CPP_DIR)=' | sort
    } 2>&1 | sha256sum | cut -c1-16)
    BUILD=$cache/build/$1-$key
    if ! { mkdir -p "$BUILD" && [ -w "$BUILD" ]; } 2>/dev/null; then
        BUILD=$PWD/build/$1-$key
        mkdir -p "$BUILD" || die "neither $cache nor $PWD/build can be written"
    fi
    if command -v flock >/dev/null; then
        exec 9>"$BUILD.lock"
        flock -n 9 || {
            echo "waiting for another run that uses $BUILD"
            flock 9
        }
    fi
    # A source that differs from the one compiled last but is not newer (another clone at the same place, a copy with old
    # times) would be taken for unchanged.
    manifest=$(find "$PWD/csrc" "$PWD/tests/cpp" "$PWD/scripts/gen_cffi.py" -type f -exec sha256sum {} + | sort)
    if [ -f "$BUILD/sources" ]; then
        printf '%s\n' "$manifest" |
            awk '{ sum = $1; path = substr($0, 67) }
                 NR == FNR { old[path] = sum; next }
                 (path in old) && old[path] != sum { print path }' "$BUILD/sources" - |
            while IFS= read -r path; do
                [ "$path" -nt "$BUILD/sources" ] || touch "$path"
            done
    fi
    SOURCES=$manifest
}

# adopt_build_dir: lets CMake configure $BUILD for this clone when another one used it before. The objects of upstream stay.
adopt_build_dir() {
    if [ -f "$BUILD/CMakeCache.txt" ] && ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$PWD" "$BUILD/CMakeCache.txt"; then
        rm -rf "$BUILD/CMakeCache.txt" "$BUILD/CMakeFiles"
    fi
}

# build_is_done: the sources in the build folder are now those of $SOURCES.
build_is_done() { printf '%s\n' "$SOURCES" >"$BUILD/sources"; }
