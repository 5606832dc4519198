#!/bin/bash
# First process of a guest that is a node.
. /csv/own/env
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t tmpfs -o mode=0755 run /run
mount -t tmpfs tmp /tmp
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
hostname "$NAME"
ip link set lo up
ip addr add "$ADDR/24" dev eth0
ip link set eth0 up

# What survives a power cut.
mkdir -p /csv/state
mount -t ext4 /dev/vda /csv/state || echo "guest: no disk for /csv/state"
for dir in /etc/csv /var/lib/csv; do
    mkdir -p "/csv/state$dir" "$dir"
    mount --bind "/csv/state$dir" "$dir"
done
mkdir -p /ClusterStorage
mount -t tmpfs -o mode=0755 volumes /ClusterStorage

/csv/own/agent guest /dev/vport*p1 &
while :; do wait -n || sleep 1; done
