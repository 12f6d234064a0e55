#!/usr/bin/env bash
# The GPU set: NF4 and bfloat16, random weights in the shapes of LLaMA3-8B and LLaMA2-7B, recomputation on.
#
#   bash benchmarks/gpu.sh STAGE...     from the repository's root; stages: check layer train hundred train-more llama2 memory
#   compile accuracy
#
# accuracy is the accuracy study: three tasks, five seeds; BASE names a folder of SmolLM2-135M, DATA that of the tasks' files.
# It goes on where it stopped, if the rows that it left are in $OUT again, and is not among those that run without a stage.
#
# Each stage is meant to end within ten minutes on one GPU of 80 GB or more; without a stage all run, one after the other.
# Results go to $OUT if that is set, else to benchmarks/results. A variant that fails is a line in its table.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
common=(--device gpu --keep-going --output "${OUT:-benchmarks/results}")
llama3=(--random llama3-8b --batch 4 --length 2048)
llama2=(--random llama2-7b --batch 4 --length 2048)
main=("frozen base" "LoRA r=32 q,v" "QLoRA r=32 q,v" "MoKA auto" "jax: MoKA auto, dropout")
status=0

bench() {
    local script=$1
    shift
    echo "== $script $*" >&2
    "$python" -m "benchmarks.$script" "$@" "${common[@]}" || status=1
}

stage() {
    case $1 in
    check)
        nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv || status=1
        bench layer --quick
        bench train_step --quick
        bench memory --quick
        ;;
    layer) bench layer ;;
    train) bench train_step "${llama3[@]}" --repeats 10 --variants "${main[@]}" ;;
    hundred) # a hundred steps of 8192 tokens, next to PEFT's QLoRA; the peak memory of the same variants: stage memory
        bench train_step "${llama3[@]}" --repeats 100 --label hundred --variants "${main[@]:2}"
        ;;
    train-more)
        bench train_step "${llama3[@]}" --repeats 5 --label more \
            --variants "frozen base" "LoRA r=32 q,v" "QLoRA r=32 q,v" "MoKA auto" up,down DoRA LoKr MoKA_s merged
        ;;
    llama2) bench train_step "${llama2[@]}" --repeats 10 --variants "${main[@]}" ;;
    memory) bench memory "${llama3[@]}" --remats on --variants "${main[@]}" ;;
    compile) bench compile_time --random llama3-8b --batch 4 --length 2048 --repeats 3 ;;
    accuracy)
        "$python" -m benchmarks.accuracy.study --base "$BASE" --data "$DATA" --device gpu --minutes 8 --seeds 5 \
            --tasks social_iqa,wikihow,vitaminc --rows "${OUT:-benchmarks/results}/accuracy_smollm2-135m_gpu.jsonl" || status=1
        ;;
    *)
        echo "gpu.sh: expected check, layer, train, hundred, train-more, llama2, memory, compile or accuracy; got $1" >&2
        exit 2
        ;;
    esac
}

for name in "${@:-}"; do
    if [ -n "$name" ]; then
        stage "$name"
    else
        for each in check layer train hundred train-more llama2 memory compile; do stage "$each"; done
    fi
done
exit $status
