#!/bin/sh
# The compiler for fuzz targets: as RUSTC_WORKSPACE_WRAPPER it gives the coverage that libFuzzer steers by to this
# workspace's crates only, so that their dependencies are those of the tests and are not built again.
case " $* " in
*" --crate-name build_script_"* | *" --crate-type proc-macro "* | *" --print"* | *" -vV "*) exec "$@" ;;
esac
exec "$@" --cfg fuzzing -Copt-level=1 -Cdebug-assertions=on -Coverflow-checks=on -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares
