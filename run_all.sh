#!/usr/bin/env bash
# Everything, from nothing to REPORT.md:   bash run_all.sh               all stages but study and test
#                                          bash run_all.sh train report  the stages that are named
# PRESET=laptop (default; on the CPU, whatever is there), cifar or paper; JOBS=n processes (default: one per core, or per GPU);
# TRAIN_FLAGS="--no-graph" and the like go to every call of train.py; PYTHON=python3 is the Python that runs it all.
# Every stage can be interrupted and run again: what is finished is not done twice. Results: runs/$PRESET/results/REPORT.md
set -euo pipefail
unset CDPATH PYTHONSAFEPATH # with these, cd prints, and Python doesn't find crate/
cd "$(dirname "$0")"
usual="setup attention layers train measure correlate report"
stages=${*:-$usual} PRESET=${PRESET:-laptop}
fail() { echo "run_all.sh: error: $*" >&2; exit 2; }
[ -f train.py ] || fail "train.py isn't beside it; call it by its own path, not by a link"
for stage in $stages; do case " $usual study test " in *" $stage "*) ;; *) fail "no stage '$stage'; choose from: $usual study test" ;; esac; done
case $PRESET in laptop | cifar | paper) ;; *) fail "PRESET=$PRESET: must be laptop, cifar or paper" ;; esac
case ${JOBS:-1} in *[!0-9]* | 0) fail "JOBS=$JOBS: must be a whole number, at least 1" ;; esac

# The running Python if it has what requirements.txt names, else .venv, made on first use.
python=${PYTHON:-python3}
"$python" -c '' 2>/dev/null || fail "PYTHON=$python: can't be run; name a Python 3.10 or later"
modules=$(sed 's/[^a-z].*//' requirements.txt)
has() { "$1" -c 'import importlib.util, sys; sys.exit(any(importlib.util.find_spec(m) is None for m in sys.argv[1:]))' $modules 2>/dev/null; }
has "$python" || python=.venv/bin/python
if ! has "$python"; then
  echo "== installing requirements.txt into .venv: 2 to 10 minutes, torch is large"
  "${PYTHON:-python3}" -m venv .venv
  .venv/bin/python -m pip install --disable-pip-version-check -q -r requirements.txt
fi
gpu=$("$python" -c 'from crate.runs import resolve_device; print(resolve_device("auto").type)')
if [ "$PRESET" = laptop ] || [ "$gpu" = cpu ]; then device=cpu workers='cli.cores()'; else device=cuda workers='torch.cuda.device_count()'; fi
[ "$PRESET $device" != "paper cpu" ] || fail "PRESET=paper needs a GPU that torch can use (on a CPU it takes months); PRESET=cifar doesn't"
JOBS=${JOBS:-$("$python" -c "import torch; from crate import cli; print($workers)")}
# glibc's allocator gives memory back after every operation; asking for it again costs 5 to 20 % of a small model's time.
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000

child= failed=0
trap 'kill -TERM $child 2>/dev/null || true; wait; exit 143' TERM HUP
trap 'wait; exit 130' INT # the terminal has told the child already
go() { # where something fails, what comes after it works on what is there
  local code=0
  "$python" "$@" & child=$!
  wait $child || code=$?
  [ $code -lt 128 ] || exit $code
  [ $code = 0 ] || { failed=$((failed + 1)); echo "run_all.sh: exit code $code: $*" >&2; }
}
train() { go train.py --preset "$PRESET" --device $device --jobs "$JOBS" ${TRAIN_FLAGS:-} --out "$runs/$1" "${@:2}"; }
measure() { go measure.py "$runs/$1" --out "$results/$2.csv" --device $device --jobs "$JOBS"; }
correlate() { go correlate.py "$results/$1.csv" --out "$results/$2" --hyperparameters "${@:3}"; }

runs=runs/$PRESET results=runs/$PRESET/results models="crate-c crate-n crate-t crate" others="crate-fix crate-identity crate-e vit"
settings="model batch_size dropout weight_decay" # of the models of one learning rate
size= # of the models of Section 6, if not the preset's
etas="-0.01 -0.001 0 0.001 0.01" # of the intervention; a negative one that is larger may keep a model from fitting its data
# The grid of Section 5 (Table 4); the study's ranges, at random rates and at one; Table 6's layers; patch, pictures of stage layers
case $PRESET in
  laptop)
    grid="--width 48 96 --batch-size 32 128 --lr 1e-3 3e-3 --dropout 0 0.02 --epochs 400"
    study="--batch-size 16 32 64 128 --lr 7e-4 7e-3 --dropout 0 0.1 --weight-decay 0 0.1 --epochs 400"
    one_lr="--lr 2e-3 --batch-size 16 32 64 128 256 --dropout 0 0.1 --weight-decay 0 0.2 --epochs 400"
    table6="1 2 3 last random" layers="--width 384 --patch-size 2 --train-subset 100 --seed 0 1 2" ;;
  cifar)
    grid="--width 96 192 --batch-size 64 128 --lr 1e-3 3e-3 --dropout 0 0.1 --epochs 200"
    study="--batch-size 32 64 128 --lr 5e-4 3e-3 --dropout 0 0.03 --weight-decay 0 0.1 --epochs 200"
    one_lr="--lr 1e-3 --batch-size 32 64 128 256 --dropout 0 0.02 --weight-decay 0 0.2 --epochs 300"
    size="--patch-size 4 --width 384 --depth 12 --batch-size 32 --lr 3e-4 --epochs 15 --log-srr-every 3 --validate-every 15"
    table6="2 4 6 8 10 last random" layers="--width 384 --patch-size 4 --train-subset 250 --seed 0 1 2 3 4" etas="-0.003 0 0.003 0.01" ;;
  paper)
    grid="--width 384 768 --batch-size 64 128 --lr 1e-4 3e-4 --dropout 0 0.1 --epochs 300"
    study="--batch-size 32 64 128 --lr 5e-5 5e-4 --dropout 0 0.3 --weight-decay 0 0.1 --epochs 300"
    one_lr="--lr 1e-4 --batch-size 32 64 128 256 --dropout 0 0.3 --weight-decay 0 0.3 --epochs 300"
    table6="2 4 6 8 10 last random" layers="--width 384 768 --patch-size 4 --train-subset 520 --seed 0 1 2 3 4" ;;
esac
until_low="--augment none --schedule constant --stop-at-loss 0.01 --validate-every 1000 --log-srr-every 0"

for stage in $stages; do
  echo "== $stage ($PRESET, $JOBS processes)"; began=$SECONDS
  case $stage in
    setup) "$python" -c 'import torch; print("torch", torch.__version__)' ;;
    attention) go attention_only.py --out "$results/attention_only" ;; # Figs. 1, 5
    layers) train layers --model $models crate-e --depth 12 --epochs 0 --log-srr-every 1 $layers --hold-out 0.02 ;; # Fig. 2's start
    train)
      train table2 --model $models --srr-reg 0 1e-3 $size --seed 0 1 2                 # Table 2, Fig. 2
      train table3 --model $others $size --seed 0 1 2                                  # Table 3
      train table6 --model crate-c --srr-reg 1e-3 --srr-layer $table6 $size --seed 0 1 2 # Table 6
      [ "$PRESET" != paper ] || train table2-cifar100 --dataset cifar100 --model $models --srr-reg 0 1e-3 --seed 0 1 2 # Fig. 3
      train grid --model $models $grid $until_low --seed own ;;                        # Tables 1, 4, 5; Figs. 4, 6
    measure) measure grid measures ;;
    correlate) correlate measures correlation model batch_size lr dropout --by width ;;
    report) go -m crate.report "$runs" ;;
    study) # goes further than the paper; then `report` shows it too
      train study --model $models --draw 40 $study $until_low --seed own
      train study --model $others --draw 10 $study $until_low --seed own
      measure study study_measures
      correlate study_measures study_correlation model batch_size lr dropout weight_decay
      train one-lr --model $models --draw 40 $one_lr $until_low --seed 0 1 # one learning rate, each setting with two seeds
      measure one-lr one_lr_measures
      correlate one_lr_measures one_lr_correlation $settings --same model ${settings// /,}
      correlate one_lr_measures one_lr_correlation/means $settings --same model --mean-over-seeds
      train intervention --model $models $until_low --log-srr-every 1000 --epochs 200 --srr-reg $etas --srr-layer last all \
        --seed $(seq -s " " 0 9)
      [ -n "$size" ] || train table2 --model $models --srr-reg 0 1e-3 1e-2 1e-1 1 --seed $(seq -s " " 0 19) # searches eta
      [ -z "$size" ] || train table2-small --model $models --srr-reg 0 1e-3 1e-2 --seed $(seq -s " " 0 9) # at the preset's own size
      [ -z "$size" ] || train table2-small --model $others --seed $(seq -s " " 0 9) ;;
    test) "$python" -m pytest -q ;;
  esac
  echo "== $stage took $((SECONDS - began)) s"
done
echo "== all took $SECONDS s"
[ $python != .venv/bin/python ] || echo "To use what was installed in your own commands:   source .venv/bin/activate"
[ "$PRESET $gpu" != "laptop cuda" ] || echo "There is a GPU. The paper's sizes, about 21 hours on an H100 (an estimate; README, GPU):
  python tests/gpu_check.py && PRESET=paper bash run_all.sh"
[ $failed = 0 ] || fail "$failed commands failed, see above; the same command again repeats what failed"
