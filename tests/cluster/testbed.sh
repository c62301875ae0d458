#!/usr/bin/env bash
# A real Slurm of two nodes on the loopback interface of one machine, in a folder of its own.
#
#   testbed.sh start FOLDER    start munged, slurmctld and two slurmd; write FOLDER/env (source it)
#   testbed.sh stop FOLDER     end them, by the process ids that they wrote
#
# It needs root and Debian's packages slurm-wlm and munge, and touches nothing outside FOLDER: own key, own
# sockets, own ports (PORT, default 17000, and the three after it). GPUS=2 gives each node two pretended GPUs.
# OWNER=PID ends it all when that process has ended, however it ended.
# Nodes are called n1 and n2; Slurm knows their address (127.0.0.1), the machine's name service does not.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
port=${PORT:-17000}
gpus=${GPUS:-0}

write_configuration() {
    local folder=$1 host=$2
    mkdir -p "$folder"/{state,spool/n1,spool/n2,log,run,dev}
    chmod 755 "$folder" "$folder"/*
    if [[ ! -s $folder/munge.key ]]; then
        dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
        chmod 600 "$folder/munge.key"
    fi
    cat >"$folder/slurm.conf" <<CONF
ClusterName=testbed
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_min_interval=200000,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=20
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=4 RealMemory=4000
PartitionName=main Nodes=n[1-2] Default=YES
CONF
    echo "CgroupAutomount=no" >"$folder/cgroup.conf"
    if ((gpus > 0)); then
        local number
        for ((number = 0; number < gpus; number++)); do
            [[ -e $folder/dev/gpu$number ]] || mknod "$folder/dev/gpu$number" c 1 3
        done
        sed -i -e "s/^\(NodeName=.*\)/\1 Gres=gpu:$gpus/" -e '1i GresTypes=gpu' "$folder/slurm.conf"
        echo "Name=gpu File=$folder/dev/gpu[0-$((gpus - 1))]" >"$folder/gres.conf"
    fi
}

start() {
    local folder=$1 host node
    mkdir -p "$folder"
    folder=$(realpath "$folder")
    host=$(hostname -s)
    write_configuration "$folder" "$host"
    export SLURM_CONF=$folder/slurm.conf
    munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.socket" \
        --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" \
        --seed-file="$folder/run/munged.seed" --num-threads=2
    slurmctld -f "$SLURM_CONF"
    for node in n1 n2; do
        slurmd -N "$node" -f "$SLURM_CONF"
    done
    echo "export SLURM_CONF=$SLURM_CONF" >"$folder/env"
    for _ in {1..100}; do
        if [[ $(timeout 5 sinfo -h -N -o %T 2>/dev/null | sort -u) == idle ]]; then
            if [[ -n ${OWNER:-} ]]; then
                watch_owner "$folder" </dev/null >/dev/null 2>&1 &
            fi
            return 0
        fi
        sleep 0.2
    done
    echo "testbed: the nodes did not become idle; see $folder/log" >&2
    timeout 5 sinfo -N >&2 || true
    return 1
}

# A process that has ended may stay as a zombie where nobody waits for it: that counts as ended.
alive() {
    [[ -r /proc/$1/stat ]] && ! grep -q '^State:.Z' "/proc/$1/status"
}

watch_owner() {
    while alive "$OWNER"; do
        [[ -e $1/slurm.conf ]] || exit 0
        sleep 2
    done
    stop "$1"
    rm -rf "$1"
}

stop() {
    local folder file pid
    folder=$(realpath "$1")
    export SLURM_CONF=$folder/slurm.conf
    timeout 10 scancel --me 2>/dev/null || true
    sleep 0.5
    for file in "$folder"/run/slurmd.*.pid "$folder/run/slurmctld.pid" "$folder/run/munged.pid"; do
        [[ -r $file ]] || continue
        pid=$(<"$file")
        kill "$pid" 2>/dev/null || continue
        for _ in {1..50}; do
            alive "$pid" || continue 2
            sleep 0.1
        done
        kill -9 "$pid" 2>/dev/null || true
    done
}

case ${1:-} in
    start | stop) "$1" "${2:?folder}" ;;
    *)
        echo "usage: testbed.sh start|stop FOLDER" >&2
        exit 2
        ;;
esac
