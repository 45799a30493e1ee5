#!/usr/bin/env bash
# A Slurm cluster of two virtual nodes on this machine, for the tests of `--spread` under srun and sbatch. As root:
#     apt-get install slurmd slurmctld slurm-client munge
#     export CKPT_SLURM_CONF=$(bash tests/oracles/slurm.sh start FOLDER)
#     bash tests/oracles/slurm.sh stop FOLDER
set -euo pipefail
action=$1 folder=$(realpath -m "$2")
conf=$folder/slurm.conf
if [ "$action" = stop ]; then
  for pid in "$folder"/*.pid; do kill "$(cat "$pid")" || true; done
  exit
fi
mkdir -p "$folder/state"
name=$(hostname -s)
cat > "$conf" <<EOF
ClusterName=ckpttools
SlurmctldHost=$name(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
SlurmctldPort=16817
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
NodeName=n[1-2] NodeHostname=$name NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 State=UNKNOWN
PartitionName=p Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
EOF
if ! pgrep -x munged > /dev/null; then
  install -d -o munge /run/munge
  su -s /bin/sh munge -c /usr/sbin/munged >&2
fi
slurmctld -f "$conf" >&2
for node in n1 n2; do slurmd -f "$conf" -N "$node" >&2; done
echo "$conf"
