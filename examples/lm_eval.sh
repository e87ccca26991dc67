#!/bin/sh
# lm-eval on the task beside this file: examples/lm_eval.sh out/sft/adapter [mode=detached]
set -e
umbra lm_eval run --model umbra --model_args "adapter=$1${2:+,$2}" --tasks sums --include_path "$(dirname "$0")/lm_eval"
