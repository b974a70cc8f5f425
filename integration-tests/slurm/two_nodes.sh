#!/usr/bin/env bash
# Runs `gpt` under a real Slurm with two nodes on this machine's loopback interface. The runs use srun,
# docs/deploy/job.sbatch and the launcher, and one run kills a process. The argument is the folder of the release
# programs. The exit code is 77 if the script cannot run here.
#
# Everything runs in separate namespaces for mounts, processes, network and host names. The runs do not see another
# Slurm on this machine, have their own host names node1 and node2, and leave no processes behind.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

skip() {
    echo "SKIPPED Slurm: $1"
    exit 77
}

fail() {
    echo "error: $1" >&2
    exit 1
}

# within SECONDS COMMAND..: repeats the command until it succeeds. After that time, prints its last output and fails.
within() {
    local deadline=$((SECONDS + $1)) output
    shift
    until output=$("$@" 2>&1); do
        [ $SECONDS -lt $deadline ] || fail "timeout: $*"$'\n'"$output"
        sleep 0.1
    done
}

outside() {
    local programs=$1 as_root=() folder program code=0
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || skip "this needs root, or sudo without a password"
        as_root=(sudo -n)
    fi
    PATH="$PATH:/usr/sbin:/sbin"
    for program in slurmctld slurmd munged srun ip pgrep; do
        command -v "$program" >/dev/null ||
            skip "$program not found: install Debian's slurm-wlm, munge, iproute2 and procps"
    done
    "${as_root[@]}" unshare --mount --pid --net --uts --ipc --fork true 2>/dev/null || skip "namespaces are not permitted (unshare)"
    folder=$(mktemp -d)
    # The processes in the namespaces end when the pipe closes, and the pipe closes even if this process is killed.
    mkfifo "$folder/alive"
    exec 9<>"$folder/alive"
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    trap 'exec 9>&-; wait; "${as_root[@]}" rm -rf "$folder"' EXIT
    "${as_root[@]}" unshare --mount --pid --net --uts --ipc --fork --kill-child=KILL --mount-proc \
        env PATH="$PATH" bash "${BASH_SOURCE[0]}" --inside "$programs" "$folder" <"$folder/alive" 9>&- &
    wait $! || code=$?
    exit "$code"
}

# ---- The functions below run as root in the namespaces.

start_slurm() {
    ip link set lo up
    # With AI_ADDRCONFIG, the C library returns no IPv4 address if the machine has only 127.0.0.1.
    ip address add 127.0.0.2/8 dev lo
    ip address add 127.0.0.3/8 dev lo
    printf '127.0.0.1 localhost\n127.0.0.2 node1\n127.0.0.3 node2\n' >"$folder/hosts"
    mount --bind "$folder/hosts" /etc/hosts
    mkdir -p "$folder"/{state,munge,spool1,spool2,submit}
    chmod 755 "$folder" "$folder/munge"
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
    munged --foreground --force --socket="$folder/munge/socket" --key-file="$folder/munge/key" \
        --pid-file="$folder/munge/pid" --seed-file="$folder/munge/seed" >"$folder/munged.log" 2>&1 &
    within 20 test -S "$folder/munge/socket"
    cat >"$folder/slurm.conf" <<END
ClusterName=loopback
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credentials expire, which takes two minutes by default.
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
# The nodes declare more cores than the machine has, because job.sbatch requests them.
SlurmdParameters=config_overrides
SlurmctldPort=6817
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdSpoolDir=$folder/spool-%n
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/slurmd-%n.log
ReturnToService=2
NodeName=node1 Port=6821 CPUs=16 RealMemory=1024 State=UNKNOWN
NodeName=node2 Port=6822 CPUs=16 RealMemory=1024 State=UNKNOWN
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
END
    export SLURM_CONF="$folder/slurm.conf"
    # Each daemon runs with its own host name.
    unshare --uts bash -c 'hostname node1 && exec slurmctld -D' >/dev/null 2>&1 &
    local node
    for node in node1 node2; do
        mkdir -p "$folder/spool-$node"
        unshare --uts bash -c "hostname $node && exec slurmd -D -N $node" >/dev/null 2>&1 &
    done
    within 30 both_idle
    sinfo --Node --long
}

both_idle() {
    [ "$(sinfo --noheader --Node --format=%T)" = $'idle\nidle' ] || { sinfo --Node; return 1; }
}

# losses FILE: prints the text of the step and of the loss of each line, without duplicates. The text of a loss
# determines its bits. So a step that was repeated after a restart with the same loss is printed only once.
losses() {
    grep -o '"step":[^,]*,\|"loss":[^,]*,' "$1" | paste -d ' ' - - | sort -u
}

# same_losses FILE ONE: fails unless both files have the same steps and losses, and at least one step.
same_losses() {
    logged "$1" 1 || fail "$1 has no step"
    diff <(losses "$2") <(losses "$1") >&2 || fail "the losses differ from those of one process: $1"
}

# pid_of VARIABLE=VALUE: prints the process id of the `gpt` process that has this variable in its environment.
pid_of() {
    local pid
    for pid in $(pgrep -x gpt); do
        if tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -qx "$1"; then
            echo "$pid"
            return
        fi
    done
    return 1
}

logged() {
    [ "$(grep -c '"step":' "$1" 2>/dev/null)" -ge "$2" ]
}

check_srun() {
    local tasks transport
    for tasks in 2 4; do
        for transport in auto tcp; do
            SHARDFLOW_TRANSPORT=$transport timeout 60 srun --nodes=2 --ntasks=$tasks --kill-on-bad-exit=0 --label \
                $gpt $mesh --steps 5 --log-json "srun-$tasks-$transport" >"out-$tasks-$transport" 2>&1 ||
                { cat "out-$tasks-$transport" >&2; fail "srun of $tasks tasks ended with $?"; }
            same_losses "srun-$tasks-$transport" one
            echo "$tasks processes on 2 nodes with $transport: the losses are bit-identical to those of one process"
        done
    done
}

# Kills a process. The others must report its rank, and srun must end with a code of docs/guide/troubleshooting.md.
check_kill() {
    local begin code=0 victim
    srun --nodes=2 --ntasks=4 --kill-on-bad-exit=0 --wait=60 --label \
        $gpt $mesh --steps 100000 --log-json killed >out-killed 2>&1 &
    local job=$!
    within 30 logged killed 20
    victim=$(pid_of SLURM_PROCID=3) || fail "process 3 does not run"
    begin=$SECONDS
    kill -KILL "$victim"
    within 30 gone "$job"
    wait "$job" || code=$?
    # srun returns the highest exit code. This is the code of the killed process, 128 + 9.
    [ $code = 137 ] || { cat out-killed >&2; fail "process 3 was killed, but srun ended with $code, not 137"; }
    grep -q 'error:.*rank 3' out-killed || { cat out-killed >&2; fail "no process reported an error of rank 3"; }
    echo "process 3 was killed: the others reported rank 3, and srun ended with $code after $((SECONDS - begin)) s"
    grep 'error:' out-killed
}

gone() {
    ! kill -0 "$1" 2>/dev/null
}

# Runs job.sbatch unchanged, and sends SIGTERM. The job must requeue itself and continue from its checkpoint.
check_sbatch() {
    local job steps=600
    timeout 60 $gpt --steps $steps --mesh data=2,stage=2 --micro-batches 4 --log-json one-batch >/dev/null
    job=$(PATH="$PATH:$programs" sbatch --parsable "$root/docs/deploy/job.sbatch" $model --steps $steps --log-json batch)
    within 30 logged batch 50
    # Slurm sends this signal two minutes before the time limit of the job.
    scancel --signal=TERM "$job"
    within 60 grep -qs 'code 143, requeued (1 of ' "gpt-$job.out"
    within 90 has_ended "$job"
    scontrol show job "$job" | grep -q JobState=COMPLETED ||
        { cat "gpt-$job.out" >&2; scontrol show job "$job" >&2; fail "job.sbatch did not complete"; }
    grep -q 'continuing from step' "gpt-$job.out" ||
        { cat "gpt-$job.out" >&2; fail "the second run did not continue from the checkpoint"; }
    same_losses batch one-batch
    echo "job.sbatch: ended on SIGTERM, requeued, continued from its checkpoint; the losses are those of one process"
    grep 'job.sbatch:\|continuing from' "gpt-$job.out"
}

# Runs the commands of docs/slurm.md for the launcher, with a smaller model. Kills a process; all must restart.
check_launcher() {
    local job victim
    { echo '#!/bin/bash'; awk '/^## / { ours = /With the launcher/ } /^```/ { code = !code; next } code && ours' \
        "$root/docs/slurm.md"; } >launcher.sh
    sed -i "s|-- gpt .*'|-- gpt $model $mesh --steps 400 --checkpoint ck --checkpoint-every 20 \
        --log-json launched'|" launcher.sh
    grep -q 'log-json launched' launcher.sh || { cat launcher.sh >&2; fail "docs/slurm.md does not launch gpt"; }
    timeout 60 $gpt $mesh --steps 400 --log-json one-launched >/dev/null
    PATH="$PATH:$programs" salloc --nodes=2 --quiet bash launcher.sh >out-launched 2>&1 &
    job=$!
    within 30 logged launched 50
    victim=$(pid_of SHARDFLOW_RANK=2) || fail "process 2 does not run"
    kill -KILL "$victim"
    within 60 gone "$job"
    wait "$job" || { cat out-launched >&2; fail "the launchers ended with $?"; }
    grep -q 'continuing from step' out-launched ||
        { cat out-launched >&2; fail "the restarted processes did not continue from the checkpoint"; }
    same_losses launched one-launched
    echo "launcher of docs/slurm.md: process 2 was killed, and after the restart, the losses are those of one process"
    grep 'continuing from' out-launched
}

has_ended() {
    local state
    state=$(scontrol show job "$1" | grep -o 'JobState=[A-Z]*')
    case $state in
    JobState=COMPLETED | JobState=FAILED | JobState=CANCELLED | JobState=TIMEOUT | JobState=NODE_FAIL) ;;
    *) scontrol show job "$1"; return 1 ;;
    esac
}

# This process has the id 1 in its namespace, so its end (after the checks, or when the pipe closes) ends all others.
inside() {
    programs=$1 folder=$2
    local code=0
    exec 8<&0 </dev/null
    (checks) 8<&- &
    cat <&8 &
    wait -n || code=$?
    [ $code = 0 ] || tail -n 20 "$folder"/*.log >&2
    exit $code
}

checks() {
    start_slurm
    cd "$folder/submit"
    for _ in $(seq 40); do echo "the quick brown fox jumps over the lazy dog."; done >text
    model="--layers 4 --heads 4 --width 32 --context 16 --batch 8 --sample 0 --threads-per-device 1 --data text"
    gpt="$programs/gpt $model"
    mesh="--mesh data=2,stage=2,tensor=2 --micro-batches 2"
    SHARDFLOW_SECRET=$("$programs/shardflow" secret)
    export SHARDFLOW_SECRET
    timeout 60 $gpt $mesh --steps 5 --log-json one >/dev/null
    check_srun
    check_kill
    check_sbatch
    check_launcher
    echo "Slurm: all passed in $SECONDS s"
}

if [ "${1:-}" = --inside ]; then
    inside "$2" "$3"
else
    outside "$(cd "$1" && pwd)"
fi
