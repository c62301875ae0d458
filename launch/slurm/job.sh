# shellcheck shell=bash
# What the batch scripts of this folder share; they source it, with $root set to the checkout.
#
#   RESTARTS=3 sbatch …    start the job again after a failure (a lost process or node), at most so often
#
# After the signal before the time limit the training asks for its own restart; that is not counted here.

root=${root:?}

if [[ -x $root/.venv/bin/python ]]; then
    PATH=$root/.venv/bin:$PATH
fi
export PATH PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# One task per GPU; one per node where the job has none.
tasks=${SLURM_GPUS_ON_NODE:-0}
((tasks > 0)) || tasks=1

# SIGUSR1 may come to this shell alone (sbatch --signal=B:USR1@120, scancel --batch), to this shell and to
# everything below it (scancel --full), or to the tasks alone. The shell survives it, and srun hands it on; a
# training that has it already takes no notice of a second one.
signalled=0
training=
hand_on() {
    signalled=1
    [[ -z $training ]] || kill -USR1 "$training" 2>/dev/null || true
}
trap hand_on USR1

requeue() {
    # A job that is ending already was cancelled, or is on its way back to the queue.
    if scontrol show job "$SLURM_JOB_ID" --oneliner | grep -q 'JobState=RUNNING'; then
        echo "$1: job $SLURM_JOB_ID goes back to the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
}

# run COMMAND …: on every task of the job; ends the job when it ends.
# In a container: put it between srun's options and the command, for instance
#   srun … --container-image=IMAGE.sqsh --container-mounts="$PWD","$root" "$@"      (enroot with pyxis)
#   srun … apptainer exec --nv --bind "$PWD","$root" IMAGE.sif "$@"
run() {
    local status=0
    # --wait: when one task ends, the others get 20 s to end by themselves, so that they can say why.
    srun --ntasks="$((tasks * SLURM_JOB_NUM_NODES))" --ntasks-per-node="$tasks" --distribution=block \
        --cpus-per-task="$((SLURM_CPUS_ON_NODE / tasks))" --kill-on-bad-exit=0 --wait=20 \
        "$@" &
    training=$!
    while :; do # a trap ends `wait` early: then wait again
        signalled=0 status=0
        wait "$training" || status=$?
        ((signalled)) || break
    done
    case $status in
        0) ;; # finished
        2) ;; # the command line or a file is wrong: a restart does not help
        75) requeue "saved after a signal" ;; # it could not ask itself: no scontrol in its container
        *)    # 138: saved after SIGUSR1, and requeued by itself; anything else: a failure
            if ((${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-0})); then
                requeue "ended with exit code $status, restart $((${SLURM_RESTART_COUNT:-0} + 1))"
            fi
            ;;
    esac
    exit "$status"
}
