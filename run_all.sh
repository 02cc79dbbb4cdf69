#!/usr/bin/env bash
# Everything, from nothing to REPORT.md:   bash run_all.sh             all stages but test
#                                          bash run_all.sh test        one or more of them
# Stages: setup attention train measure correlate report test. Each can be interrupted and run again.
# PRESET=laptop|fashion|paper (default: paper where CUDA is present, else laptop)
# JOBS=n processes at a time (default: one per GPU, else one per CPU core)
set -euo pipefail
cd "$(dirname "$0")"

known="setup attention train measure correlate report test"
stages=${*:-setup attention train measure correlate report}
for stage in $stages; do
  case " $known " in *" $stage "*) ;; *) echo "run_all.sh: error: no stage '$stage'; choose from: $known" >&2; exit 2 ;; esac
done
case ${JOBS:-1} in *[!0-9]* | 0) echo "run_all.sh: error: JOBS=$JOBS: must be a whole number, at least 1" >&2; exit 2 ;; esac

# The running Python if it has what requirements.txt names, else .venv, made on first use.
python=${PYTHON:-python3}
modules="torch torchvision numpy scipy matplotlib tqdm pytest"
has() { "$1" - $modules <<<'import importlib.util, sys; sys.exit(any(importlib.util.find_spec(m) is None for m in sys.argv[1:]))' 2>/dev/null; }
if ! has "$python"; then
  if ! has .venv/bin/python; then
    echo "== plan: install requirements.txt into .venv (2 to 10 minutes: torch is large), then: $stages"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --disable-pip-version-check -q -r requirements.txt
    echo "== installed, $SECONDS s"
  fi
  python=.venv/bin/python
fi

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
PRESET=${PRESET:-$([ "$gpus" -gt 0 ] && echo paper || echo laptop)}
JOBS=${JOBS:-$([ "$gpus" -gt 0 ] && echo "$gpus" || nproc)}
models="crate-c crate-n crate-t crate"
case $PRESET in # the grid of Section 5 (Table 4), the seeds of Section 6, the layers of Table 6, and how long it all takes
  laptop)  data=digits;        widths="48 96";   batches="64 128"; rates="1.5e-3 3e-3"; dropouts="0 0.05"; epochs=150; seeds="0 1 2"; layers="1 2 3"
           time="attention 10 s, train 20 min, measure 3 min, correlate 1 min (measured on two cores)" ;;
  fashion) data=fashion-mnist; widths="48 96";   batches="64 128"; rates="1e-3 2e-3";   dropouts="0 0.05"; epochs=60;  seeds="0 1 2"; layers="2 4"
           time="train several hours on two cores (an estimate)" ;;
  paper)   data=cifar10;       widths="384 768"; batches="64 128"; rates="1e-4 3e-4";   dropouts="0 0.1";  epochs=300; seeds="0";     layers="2 4 6 8 10"
           time="train days on one GPU (an estimate)" ;;
  *) echo "run_all.sh: error: PRESET=$PRESET: must be laptop, fashion or paper" >&2; exit 2 ;;
esac
runs=runs/$PRESET
results=results/$data
train() { "$python" train.py --preset "$PRESET" --jobs "$JOBS" "$@"; }
# glibc's allocator gives memory back after every operation; asking for it again costs 5 to 20 % of a small model's time.
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000

echo "== plan: preset $PRESET ($data), $JOBS processes, stages: $stages"
echo "==       $time"
for stage in $stages; do
  echo "== $stage"
  began=$SECONDS
  case $stage in
    setup) "$python" -c 'import sys, torch, torchvision; print(f"python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {torchvision.__version__}, {torch.cuda.device_count()} GPUs")' ;;
    attention) "$python" attention_only.py ;;
    train)
      # Section 5: 64 models, stopped at a train cross-entropy of 0.01 (Tables 1, 4, 5; Figs. 4, 6)
      train --model $models --width $widths --batch-size $batches --lr $rates --dropout $dropouts \
        --epochs $epochs --schedule constant --augment none --stop-at-loss 0.01 --log-srr-every 0
      # Section 6: cross-entropy against cross-entropy + SRR on the last layer (Table 2, Fig. 2) ...
      train --model $models --srr-reg 0 1e-3 --seed $seeds
      # ... other output matrices (Table 3) and other layers (Table 6)
      train --model crate-fix crate-identity --seed $seeds
      train --model crate-c --srr-reg 1e-3 --srr-layer $layers random all --seed $seeds
      ;;
    measure) "$python" measure.py $runs/*_stop0.01 --out "$results/measures.csv" --jobs "$JOBS" ;;
    correlate)
      "$python" correlate.py "$results/measures.csv" --hyperparameters model batch_size lr dropout --by width --gap gap --out "$results/correlation"
      "$python" correlate.py "$results/measures.csv" --hyperparameters model batch_size lr dropout --by width --gap gap_accuracy --out "$results/correlation_accuracy"
      ;;
    report) "$python" -m crate.report --runs "$runs" --results "$results" ;;
    test) "$python" -m pytest -q ;;
  esac
  echo "== $stage took $((SECONDS - began)) s"
done
echo "== all took $SECONDS s"
