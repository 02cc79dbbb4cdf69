#!/usr/bin/env bash
# Everything, from nothing to REPORT.md:   bash run_all.sh             all stages
#                                          bash run_all.sh test        one or more of them
#                                          bash run_all.sh --dry-run   what stage train (or study) would take on an H100
# Stages: setup attention train measure correlate report test, and, only when named, study: five seeds, regularisers at their
# chosen strength, the models beyond the paper, depth. Each can be interrupted and run again.
# PRESET=laptop|fashion|paper (default: paper where CUDA is present, else laptop)
# JOBS=n processes at a time (default: one per GPU, else one per CPU core)
set -euo pipefail
cd "$(dirname "$0")"

default="setup attention train measure correlate report test" all="$default study" dry=""
if [ "${1:-}" = --dry-run ]; then
  shift
  default=train all="train study" dry="--dry-run --amp bf16"
fi
stages=${*:-$default}
for stage in $stages; do
  case " $all " in *" $stage "*) ;; *) echo "run_all.sh: error: no stage '$stage'; choose from: $all" >&2; exit 2 ;; esac
done
case ${PRESET:-laptop} in laptop | fashion | paper) ;; *) echo "run_all.sh: error: PRESET=$PRESET: must be laptop, fashion or paper" >&2; exit 2 ;; esac
case ${JOBS:-1} in *[!0-9]* | 0) echo "run_all.sh: error: JOBS=$JOBS: must be a whole number, at least 1" >&2; exit 2 ;; esac

# The running Python if it has what requirements.txt names, else .venv, made on first use.
python=${PYTHON:-python3}
modules="torch torchvision numpy scipy matplotlib tqdm pytest hypothesis"
has() { "$1" - $modules <<<'import importlib.util, sys; sys.exit(any(importlib.util.find_spec(m) is None for m in sys.argv[1:]))' 2>/dev/null; }
if ! has "$python"; then
  if ! has .venv/bin/python; then
    echo "== plan: install requirements.txt into .venv (2 to 10 minutes: torch is large), then: $stages"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --disable-pip-version-check -q -r requirements.txt
    echo "== installed in $SECONDS s"
  fi
  python=.venv/bin/python
fi

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
PRESET=${PRESET:-$([ "$gpus" -gt 0 ] && echo paper || echo laptop)}
JOBS=${JOBS:-$([ "$gpus" -gt 0 ] && echo "$gpus" || nproc)}
models="crate-c crate-n crate-t crate"
# The grid of Section 5 (Table 4), the seeds of Section 6, the layers of Table 6 and how long training and measuring take.
case $PRESET in
  laptop)  data=digits;        widths="48 96";   batches="64 128"; rates="1.5e-3 3e-3"; dropouts="0 0.02"; epochs=150
           seeds="0 1 2"; few="0 1"; layers="1 2 3"; train="14 min"; measure="2 min"; study="80 min" ;;
  fashion) data=fashion-mnist; widths="48 96";   batches="64 128"; rates="1e-3 2e-3";   dropouts="0 0.02"; epochs=150
           seeds="0 1 2 3 4"; few="0 1 2"; layers="2 4"; train="2 h"; measure="5 min"; study="half a day (an estimate)" ;;
  paper)   data=cifar10;       widths="384 768"; batches="64 128"; rates="1e-4 3e-4";   dropouts="0 0.1";  epochs=300
           seeds="0 1 2"; few="0 1 2"; layers="2 4 6 8 10"; train="two days on one GPU (an estimate)"; measure="hours (an estimate)"; study="a week on one GPU (an estimate)" ;;
esac
runs=runs/$PRESET
results=results/$data
# glibc's allocator gives memory back after every operation; asking for it again costs 5 to 20 % of a small model's time.
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000

status=0 children=""
start() { "$python" "$@" & children="$children $!"; }
finish() { # a run that failed has been reported, and the others can still be used; but stop at an interrupt
  for child in $children; do wait "$child" || status=$?; done
  children=""
  [ $status -lt 128 ] || exit $status
}
go() { start "$@"; finish; }
trap 'kill -TERM $children 2>/dev/null || true; wait; exit 143' TERM # they save where they are
trap 'wait; exit 130' INT                                           # the terminal has told them already
train() {
  go train.py --preset "$PRESET" --jobs "$JOBS" $dry "$@"
  [ $status -eq 0 ] || ls $runs/*/result.json >/dev/null 2>&1 || { echo "run_all.sh: error: no run has finished" >&2; exit $status; }
}
grid() { # the models of Section 5, stopped at a train cross-entropy of 0.01 (Tables 1, 4, 5; Figs. 4, 6), and their measures
  train --model $models --width $widths --batch-size $batches --lr $rates --dropout $dropouts \
    --epochs $epochs --schedule constant --augment none --stop-at-loss 0.01 --log-srr-every 0 "$@"
}
measure() { # what is published in these tables goes: they hold the runs at hand, and those only
  go measure.py $runs/*_stop0.01 --only --out "$results/measures.csv" --jobs "$JOBS"
  # SRR alone of the models of Sections 4.3 and 6; of a standard transformer with query, key and value matrix in the place of U
  go measure.py $runs/*_p0_s[0-4] --only --groups srr --out "$results/srr.csv" --jobs "$JOBS"
}
correlate() { start correlate.py "$results/measures.csv" --hyperparameters model batch_size lr dropout --by width "$@"; }
correlate_both() { # at the same time: each takes one core
  correlate --gap gap --out "$results/correlation"
  correlate --gap gap_accuracy --out "$results/correlation_accuracy"
  finish
}
report() {
  go -m crate.report --runs "$runs" --results "$results"
  [ "$PRESET" != paper ] || go -m crate.report --runs runs/paper-cifar100 --results results/cifar100
}

echo "== plan: preset $PRESET ($data), $JOBS processes"
for stage in $stages; do
  case $stage in
    setup)     echo "   setup      versions" ;;
    attention) echo "   attention  Figs. 1, 5: 10 s" ;;
    train)     echo "   train      64 models of Section 5; Tables 2, 3, 6 and Fig. 2: $train" ;;
    measure)   echo "   measure    complexity measures of the 64 models: $measure" ;;
    correlate) echo "   correlate  Tables 1, 5, Figs. 4, 6: 1 min" ;;
    report)    echo "   report     $results/REPORT.md: 10 s" ;;
    study)     echo "   study      more seeds, chosen regularisers, depth, crate-e and vit: $study" ;;
    test)      echo "   test       the test suite: 1 min; with faults, where it is named: 3 min" ;;
  esac
done
for stage in $stages; do
  echo "== $stage"
  began=$SECONDS
  case $stage in
    setup) "$python" -c 'import sys, torch, torchvision; print(f"python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {torchvision.__version__}, {torch.cuda.device_count()} GPUs")' ;;
    attention) go attention_only.py ;;
    train)
      grid
      # Section 6: cross-entropy against cross-entropy + SRR on the last layer (Table 2, Fig. 2) ...
      train --model $models --srr-reg 0 1e-3 --seed $seeds
      # ... other output matrices (Table 3) and other layers (Table 6)
      train --model crate-fix crate-identity --seed $few
      train --model crate-c --srr-reg 1e-3 --srr-layer $layers random --seed $few
      # ... and the second data set of Table 2, Fig. 3
      [ "$PRESET" != paper ] || train --dataset cifar100 --model $models --srr-reg 0 1e-3 --seed $seeds --out runs/paper-cifar100
      ;;
    study)
      # The strength of each regulariser is chosen on held-out training images, then tried with five seeds (Table 2).
      for where in "--hold-out 0.2 --seed 0 1 2" "--seed 0 1 2 3 4"; do
        train --model $models crate-e vit --srr-reg 0 1e-4 1e-3 1e-2 1e-1 1 $where
        train --model $models --weight-decay 0.01 0.1 0.3 1 3 $where
        train --model $models --dropout 0.02 0.05 0.1 0.2 0.3 $where
      done
      train --model crate-fix crate-identity --seed 0 1 2 3 4
      train --model crate-c --srr-reg 1e-3 --srr-layer $layers random all --seed 0 1 2 3 4
      train --model crate-c --srr-reg 1e-3 --srr-sparsity l1 --seed 0 1 2 3 4
      train --model $models crate-e --depth 2 8 12 16 --seed 0 1 2
      grid --seed 1
      [ -z "$dry" ] || continue
      measure
      correlate_both
      report
      ;;
    measure) measure ;;
    correlate) correlate_both ;;
    report) report ;;
    test) if [ $# -gt 0 ]; then "$python" -m pytest -q; else "$python" -m pytest -q -m "not slow and not faults"; fi ;;
  esac
  echo "== $stage took $((SECONDS - began)) s"
done
echo "== all took $SECONDS s"
exit $status
