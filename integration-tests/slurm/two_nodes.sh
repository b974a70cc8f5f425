#!/usr/bin/env bash
# A real Slurm of two nodes on this machine's loopback, and `gpt` under it: by srun, by the file that users copy, with a
# process killed, and with the launcher. Takes the folder of the release programs. Ends with 77 when it cannot run here.
#
# All of it lives in namespaces of its own (mounts, processes, network, host names): it sees no Slurm that runs already, has
# its own names node1 and node2, and nothing is left of it however it ends.
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

# within SECONDS COMMAND..: repeats the command until it succeeds; its last output is shown if it never does.
within() {
    local deadline=$((SECONDS + $1)) output
    shift
    until output=$("$@" 2>&1); do
        [ $SECONDS -lt $deadline ] || fail "in vain: $*"$'\n'"$output"
        sleep 0.1
    done
}

outside() {
    local programs=$1 as_root=() folder program code=0
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || skip "neither root nor sudo without a password"
        as_root=(sudo -n)
    fi
    PATH="$PATH:/usr/sbin:/sbin"
    for program in slurmctld slurmd munged srun ip pgrep; do
        command -v "$program" >/dev/null || skip "no $program: it needs Debian's slurm-wlm, munge, iproute2 and procps"
    done
    "${as_root[@]}" unshare --mount --pid --net --uts --ipc --fork true 2>/dev/null || skip "no namespaces (unshare)"
    folder=$(mktemp -d)
    # While this process holds the pipe open, those inside may run: so they end with it, even when it is killed.
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

# ---- What follows runs in the namespaces, as root.

start_slurm() {
    ip link set lo up
    # The C library gives no IPv4 address to a program that asks politely where 127.0.0.1 is all there is.
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
# A job that is queued again waits for as long as its old credentials hold: two minutes, unless this says less.
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
# Cores that are not there: the nodes must be as large as the file that users copy asks for.
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
    # Each on a host of its name, as far as programs can tell.
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

# losses FILE: step and loss of each line, as written; numbers are written so that they read back to the same bits. A step
# that was done again after a restart may stand there twice, with the same loss.
losses() {
    grep -o '"step":[^,]*,\|"loss":[^,]*,' "$1" | paste -d ' ' - - | sort -u
}

# same_losses FILE ONE: both have the same steps with the same losses, and at least one.
same_losses() {
    logged "$1" 1 || fail "$1 holds no step"
    diff <(losses "$2") <(losses "$1") >&2 || fail "other losses than in one process: $1"
}

# pid_of VARIABLE=VALUE: the gpt with this in its environment.
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
            echo "$tasks processes on 2 nodes by $transport: the bits of one process"
        done
    done
}

# A process is killed: the others notice and name it, and srun ends with a code that docs/guide.md lists.
check_kill() {
    local begin code=0 victim
    srun --nodes=2 --ntasks=4 --kill-on-bad-exit=0 --wait=60 --label \
        $gpt $mesh --steps 100000 --log-json killed >out-killed 2>&1 &
    local job=$!
    within 30 logged killed 20
    victim=$(pid_of SLURM_PROCID=3) || fail "no process 3 runs"
    begin=$SECONDS
    kill -KILL "$victim"
    within 30 gone "$job"
    wait "$job" || code=$?
    # srun gives the highest code: that of the killed one is 128 + 9.
    [ $code = 137 ] || { cat out-killed >&2; fail "process 3 was killed, and srun ended with $code, not 137"; }
    grep -q 'error:.*rank 3' out-killed || { cat out-killed >&2; fail "nobody named rank 3"; }
    echo "process 3 killed: named by the others, srun ended with $code after $((SECONDS - begin)) s"
    grep 'error:' out-killed
}

gone() {
    ! kill -0 "$1" 2>/dev/null
}

# The file that users copy, as it is. Asked to end in the middle, it is queued again and goes on from its checkpoint.
check_sbatch() {
    local job steps=600
    timeout 60 $gpt --steps $steps --mesh data=2,stage=2 --micro-batches 4 --log-json one-batch >/dev/null
    job=$(sbatch --parsable "$root/docs/deploy/job.sbatch" $model --steps $steps --log-json batch)
    within 30 logged batch 50
    # What Slurm sends two minutes before the end of the job's time.
    scancel --signal=TERM "$job"
    within 60 grep -qs 'code 143, queued again (1 of ' "gpt-$job.out"
    within 90 has_ended "$job"
    scontrol show job "$job" | grep -q JobState=COMPLETED ||
        { cat "gpt-$job.out" >&2; scontrol show job "$job" >&2; fail "job.sbatch did not end well"; }
    grep -q 'going on from step' "gpt-$job.out" || { cat "gpt-$job.out" >&2; fail "the second run began anew"; }
    same_losses batch one-batch
    echo "job.sbatch: asked to end, queued again, went on from its checkpoint to the losses of one process"
    grep 'job.sbatch:\|going on' "gpt-$job.out"
}

# The commands of docs/slurm.md for the launcher, with a smaller model; a process is killed, and all are started again.
check_launcher() {
    local job victim
    { echo '#!/bin/bash'; awk '/^## / { ours = /With the launcher/ } /^```/ { code = !code; next } code && ours' \
        "$root/docs/slurm.md"; } >launcher.sh
    sed -i "s|target/release/gpt .*'|target/release/gpt $model $mesh --steps 400 --checkpoint ck --checkpoint-every 20 \
        --log-json launched'|" launcher.sh
    grep -q 'log-json launched' launcher.sh || { cat launcher.sh >&2; fail "docs/slurm.md has no such command"; }
    timeout 60 $gpt $mesh --steps 400 --log-json one-launched >/dev/null
    PATH="$PATH:$programs" salloc --nodes=2 --quiet bash launcher.sh >out-launched 2>&1 &
    job=$!
    within 30 logged launched 50
    victim=$(pid_of SHARDFLOW_RANK=2) || fail "no process 2 runs"
    kill -KILL "$victim"
    within 60 gone "$job"
    wait "$job" || { cat out-launched >&2; fail "the launchers ended with $?"; }
    grep -q 'going on from step' out-launched || { cat out-launched >&2; fail "the launchers did not start anew"; }
    same_losses launched one-launched
    echo "docs/slurm.md with the launcher: process 2 killed, all went on to the losses of one process"
    grep 'going on' out-launched
}

has_ended() {
    local state
    state=$(scontrol show job "$1" | grep -o 'JobState=[A-Z]*')
    case $state in
    JobState=COMPLETED | JobState=FAILED | JobState=CANCELLED | JobState=TIMEOUT | JobState=NODE_FAIL) ;;
    *) scontrol show job "$1"; return 1 ;;
    esac
}

# As process 1 of its namespace, all others end with this one: when the checks are through, or when the pipe is closed.
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
    mkdir -p target/release
    ln -s "$programs/gpt" target/release/gpt
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
