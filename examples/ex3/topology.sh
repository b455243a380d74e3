# shellcheck shell=bash
# shellcheck disable=SC2034  # read by ../common.sh
# Example 3: two data-parallel ranks become one (DP2 -> 1). Read by the scripts beside it.
EXAMPLE=ex3
: "${SOURCE_TP:=1}" "${SOURCE_PP:=1}" "${SOURCE_DP:=2}"
: "${TARGET_TP:=1}" "${TARGET_PP:=1}" "${TARGET_DP:=1}"
