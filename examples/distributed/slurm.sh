#!/usr/bin/env bash
#SBATCH --job-name=metarec
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --signal=TERM@120
# sbatch slurm.sh /shared/ratings.parquet /shared/run
# Two minutes before the time limit, and on preemption, SIGTERM makes the run save and exit 0; the requeued job resumes.
srun --kill-on-bad-exit=1 metarec fit "$1" --out "$2"
status=$?
[ $status -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
