#!/bin/bash
# Pretrains under SLURM, on as many hosts as the job gets. From the root of the repository, with Python's environment on:
#
#     sbatch --nodes 8 recipes/launch/slurm.sh --plan recipes/configs/gpt_bert_32k.yaml --corpus my_texts/
#
# The job goes back into the queue when its time is over or a host fails, and then goes on from the newest complete
# checkpoint. Lower --save_steps if that is too far back.
#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:USR1@120
set -euo pipefail

: "${SLURM_JOB_ID:?start this script with sbatch, or without SLURM recipes/launch/torchrun.sh on every host}"
HOSTS=$SLURM_JOB_NUM_NODES
ALL_HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
FIRST_HOST=${ALL_HOSTS%%$'\n'*}  # not by `head`: scontrol would end with SIGPIPE, and pipefail end the job
JOB=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
export HOSTS FIRST_HOST JOB
# Since SLURM 22.05 srun does not read what sbatch was given.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# SLURM sends USR1 to this script 120 seconds before the time is over (--signal). Requeuing ends the training.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

# In the background, because bash runs a trap only between commands; `wait` returns when one has run.
srun --kill-on-bad-exit=1 bash recipes/launch/torchrun.sh "$@" &
training=$!
while kill -0 "$training" 2>/dev/null; do wait "$training" || true; done
wait "$training"
