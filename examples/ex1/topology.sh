# shellcheck shell=bash
# shellcheck disable=SC2034  # read by ../common.sh
# Example 1: a pipeline of two stages becomes one rank (PP2 -> 1). Read by the scripts beside it.
EXAMPLE=ex1
: "${SOURCE_TP:=1}" "${SOURCE_PP:=2}" "${SOURCE_DP:=1}"
: "${TARGET_TP:=1}" "${TARGET_PP:=1}" "${TARGET_DP:=1}"
