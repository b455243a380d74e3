# shellcheck shell=bash
# shellcheck disable=SC2034  # read by ../common.sh
# Example 4: tensor parallel becomes pipeline parallel (TP2 -> PP2). Read by the scripts beside it.
EXAMPLE=ex4
: "${SOURCE_TP:=2}" "${SOURCE_PP:=1}" "${SOURCE_DP:=1}"
: "${TARGET_TP:=1}" "${TARGET_PP:=2}" "${TARGET_DP:=1}"
# The Source is example 2's: where that was run with the same settings, its Source and control are read, not
# trained again. Nothing is written there.
: "${SOURCE_RUN_DIR:=}"
