# shellcheck shell=bash
# shellcheck disable=SC2034  # read by ../common.sh
# Example 2: matrices cut in two become whole (TP2 -> 1). Read by the scripts beside it.
EXAMPLE=ex2
: "${SOURCE_TP:=2}" "${SOURCE_PP:=1}" "${SOURCE_DP:=1}"
: "${TARGET_TP:=1}" "${TARGET_PP:=1}" "${TARGET_DP:=1}"
