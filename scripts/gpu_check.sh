#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of under 8 minutes:
#
#     scripts/gpu_check.sh [FOLDER]                 # by default gpu_check/
#     DEVICE=cpu SMALL=1 scripts/gpu_check.sh out   # the same commands at tiny sizes, on any machine
#
# FOLDER gets one log and, of measurements, one JSON file for each part, and summary.txt: what ran,
# with its status and seconds. A part that fails or runs out of time does not stop the others; the
# exit status is the number of parts that failed.
set -u
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${1:-gpu_check}" && cd "${1:-gpu_check}" && pwd)
PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda}
SMALL=${SMALL:-}
LIMIT=${LIMIT:-$([ -n "$SMALL" ] && echo 1800 || echo 470)}  # seconds of everything together
failed=0
: > "$OUT/summary.txt"

# part NAME SECONDS COMMAND...
part() {
    local name=$1 limit=$2
    shift 2
    local began=$SECONDS status=0 left=$((LIMIT - SECONDS))
    [ "$left" -ge 1 ] || left=1
    [ "$limit" -le "$left" ] || limit=$left
    timeout "$limit" "$@" > "$OUT/$name.log" 2>&1 || status=$?
    [ "$status" -eq 0 ] || failed=$((failed + 1))
    printf '%-22s status %3d  %4d s\n' "$name" "$status" "$((SECONDS - began))" \
        | tee -a "$OUT/summary.txt"
}

measure() {
    local name=$1 limit=$2 what=$3
    shift 3
    part "$name" "$limit" "$PYTHON" scripts/gpu_measure.py "$what" --device "$DEVICE" \
        --output_file "$OUT/$name.json" "$@"
}

if [ -n "$SMALL" ]; then
    training="--batch_size 2 --tokens 64 --rounds 1"
    sampling="--preset debug --batch_sizes 1 2 --tokens 16 --rounds 1"
    attention="--preset debug --batch_size 1 --tokens 64 --rounds 1"
    presets="debug"
    suite="tests/test_layers.py"
    workers=0
else
    training="--tokens 1024 --rounds 10"
    sampling="--batch_sizes 1 32 256 --tokens 256 --rounds 2 --compile"
    attention="--batch_size 16 --tokens 512"
    presets="tiny base"
    suite="tests"
    workers=8
fi

part machine 30 "$PYTHON" -m torch.utils.collect_env
for preset in $presets; do
    size=""
    [ -n "$SMALL" ] || { [ "$preset" = base ] && size="--batch_size 32" || size="--batch_size 128"; }
    # shellcheck disable=SC2086
    measure "training_$preset" 60 training --preset "$preset" $training $size
    # shellcheck disable=SC2086
    [ -n "$SMALL" ] || measure "training_${preset}_compiled" 90 training --preset "$preset" \
        $training $size --compile
done
# shellcheck disable=SC2086
measure attention 60 attention $attention
# shellcheck disable=SC2086
measure sampling 150 sampling $sampling

# FSDP2 on one process: what shards, gathers, saves and resumes is the code of a thousand
launch="$PYTHON -m accelerate.commands.launch --num_processes 1"
if [ "$DEVICE" = cpu ]; then
    launch="$launch --cpu"  # accelerate has no FSDP2 on a CPU; tests/test_sharding.py runs it there
else
    launch="$launch --config_file accelerate_configs/fsdp2.yaml"
fi
steps=$([ -n "$SMALL" ] && echo 2 || echo 20)
# shellcheck disable=SC2086
part fsdp2 90 $launch train_accelerate.py --preset debug "output_dir=$OUT/fsdp2" report_to=none \
    "codec.max_steps=$steps" "flow.max_steps=$steps" "codec.eval_steps=$steps" \
    "flow.eval_steps=$steps" num_samples=0
rm -rf "$OUT/fsdp2"

# training tests find the GPU by themselves
# shellcheck disable=SC2086
part suite 240 "$PYTHON" -m pytest $suite -n "$workers" -p no:cacheprovider

printf '%d parts failed, %d s\n' "$failed" "$SECONDS" | tee -a "$OUT/summary.txt"
exit "$failed"
