#!/usr/bin/env bash
# Many controllers on GPUs under Slurm: sbatch --nodes=4 deploy/training/slurm.sh RUN.toml DIR
#
# One task a GPU: jax.distributed reads Slurm's variables and gives each task the GPU of its local number, so every task
# must see all GPUs of its node (no --gpus-per-task). Where a job is preempted, Slurm queues it again and the run goes on
# from its last checkpoint.
#SBATCH --job-name=gemcut-train
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

run=${1:?usage: sbatch --nodes=N slurm.sh RUN.toml DIR} out=${2:?name the folder of the run, which all nodes see}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

# One task that fails ends the others: they would wait in a collective for ever.
exec srun --kill-on-bad-exit=1 gemcut train run "$run" "$out" --resume
