#!/bin/bash
# Pretrains on one host or several. Start it on each of them, with the same FIRST_HOST:
#
#     HOSTS=2 FIRST_HOST=node1 bash recipes/launch/torchrun.sh --plan recipes/configs/gpt_bert_32k.yaml --corpus my_texts/
#
# All hosts must see the same --output_dir. If a process fails, torchrun starts all of them again, up to RESTARTS times,
# and they go on from the newest complete checkpoint. Started again after that, this script does the same.
set -euo pipefail
: "${HOSTS:=1}"
[[ $HOSTS == 1 ]] || : "${FIRST_HOST:?give the host that all others reach, such as FIRST_HOST=node1}"
: "${FIRST_HOST:=localhost}" "${PORT:=29500}" "${JOB:=pretrain}" "${RESTARTS:=3}"
: "${PROCESSES_PER_HOST:=gpu}" # one for each GPU

# Without it, restarted processes look for those before them (https://github.com/pytorch/pytorch/issues/135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# c10d: the processes find each other through FIRST_HOST, in whatever order the hosts come, and their ranks follow.
exec python -m torch.distributed.run \
    --nnodes "$HOSTS" --nproc_per_node "$PROCESSES_PER_HOST" --max_restarts "$RESTARTS" \
    --rdzv_backend c10d --rdzv_endpoint "$FIRST_HOST:$PORT" --rdzv_id "$JOB" \
    -m recipes.pretrain_bert --resume_from_checkpoint auto "$@"
