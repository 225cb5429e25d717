#!/usr/bin/env bash
# Runs the operations' tests on a CPU library with AddressSanitizer and UndefinedBehaviorSanitizer, built by g++ into
# ops/build/sanitize, beside the installed one:
#
#     ops/tests/sanitize_cpu.sh [ARGUMENTS OF PYTEST]
#
# PYTHON names the interpreter, which needs torch and what the tests need. Every report of a sanitizer ends the run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
folder=$PWD/build/sanitize

mkdir -p "$folder"
cp -rpL setup.py build_backend.py pyproject.toml LICENSE grootvl_ops csrc tests "$folder"
rm -f "$folder"/grootvl_ops/_C*.so

# The types of torch's classes are in libraries that were built without the check of vptr.
flags="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer"
(cd "$folder" && CXX=g++ CC=g++ CFLAGS=$flags CXXFLAGS=$flags LDFLAGS=$flags FORCE_CUDA=0 \
  "$python" setup.py --quiet build_ext --inplace)

# The interpreter is not built with the sanitizers, so their libraries, and the one whose exceptions they watch, come
# first. Python frees little of its memory at the end: leaks cannot be told from that.
for library in libasan.so libubsan.so libstdc++.so; do
  LD_PRELOAD=${LD_PRELOAD:+$LD_PRELOAD:}$(g++ -print-file-name=$library)
done
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$folder
cd "$folder"  # whose packages come before those of any other folder
"$python" -c 'import grootvl_ops; assert grootvl_ops.backend("cpu") == "compiled", grootvl_ops.__file__'
exec "$python" -m pytest tests -q -p no:cacheprovider "$@"
