#!/bin/sh
# From nothing to an answer by a model larger than the memory it may use: sh scripts/demo.sh ["your question"]
#
# What is made already is not made again, so run it as often as you like. $HOBBIT_VENV: the virtual environment
# (.venv-demo). $HOBBIT_DEMO_MEMORY: the memory budget in MiB (half of the model). Everything is under build/demo.
set -eu
cd "$(dirname "$0")/.."
. scripts/common.sh

question=${1:-"What is the capital of France?"}
demo=build/demo
model=$demo/demo-q8_0.gguf
converted=$demo/demo-q8_0-hobbit.gguf
mib() { echo $(($(wc -c <"$1") / 1048576)); }

need_compiler
make_venv "${HOBBIT_VENV:-.venv-demo}"
mkdir -p "$demo"

# Installed once, and again when a source has changed since.
stamp=$(dirname "$PY")/../hobbit-installed
if [ ! -f "$stamp" ] || [ -n "$(find pyproject.toml CMakeLists.txt csrc patches python third_party -type f \
    ! -name '*.so' ! -name '*.pyc' ! -name _build_info.py -newer "$stamp" | head -n 1)" ]; then
    say "installing hobbit-cpp (builds llama.cpp with our patches: about 4 minutes on 2 cores)"
    install_bindings
    install_build_tools
    use_build_dir demo
    SKBUILD_BUILD_DIR=$BUILD "$PY" -m pip install --quiet --no-build-isolation .
    build_is_done
    touch "$stamp"
else
    say "hobbit-cpp is installed in $(dirname "$(dirname "$PY")")"
fi
hobbit=$(dirname "$PY")/hobbit

if [ ! -f "$model" ]; then
    say "making the demo model: $model"
    "$PY" scripts/make_demo_model.py --preset demo --out "$demo/part-q8_0.gguf"
    mv "$demo/part-q8_0.gguf" "$model"
else
    say "the demo model is there: $model ($(mib "$model") MiB)"
fi

if [ ! -f "$converted" ]; then
    say "converting it: experts in Q8_0 as they are, and low-precision copies beside them"
    rm -f "$demo/part-hobbit.gguf"
    "$hobbit" convert "$model" -o "$demo/part-hobbit.gguf"
    mv "$demo/part-hobbit.gguf" "$converted"
else
    say "the converted model is there: $converted ($(mib "$converted") MiB)"
fi

memory=${HOBBIT_DEMO_MEMORY:-$(($(mib "$model") / 2))}
say "a model of $(mib "$model") MiB answers within $memory MiB of memory: $question"
# A short context and small batches: their buffers come out of the same budget.
"$hobbit" run "$converted" -p "$question" --memory "${memory}MiB" -n 48 -c 512 -b 128 -ub 128
