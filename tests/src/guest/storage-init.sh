#!/bin/bash
# First process of the guest that is the storage: the kernel's iSCSI target, set up through configfs alone, with LUN 1
# on /dev/vda. Persistent reservations that were registered with APTPL are kept by the kernel in /csv/own/target and
# given back to it here before the LUN is exported, as after a power cut of a real storage.
. /csv/own/env
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t tmpfs -o mode=0755 run /run
mount -t tmpfs tmp /tmp
hostname "$NAME"
ip link set lo up
ip addr add "$ADDR/24" dev eth0
ip link set eth0 up

mount -t configfs configfs /sys/kernel/config
target=/sys/kernel/config/target
disk=$target/core/iblock_0/lun1
serial=c5f50000-0000-4000-8000-000000000001
mkdir -p /csv/own/target/pr /csv/own/target/alua
# The core makes its directory only once it is loaded.
mkdir -p $target
echo /csv/own/target >$target/dbroot
mkdir -p $disk
echo udev_path=/dev/vda >$disk/control
echo $serial >$disk/wwn/vpd_unit_serial
echo 1 >$disk/enable

# One line of the kernel's file is one field; what it takes back is one registration, fields parted by commas.
saved=/csv/own/target/pr/aptpl_$serial
if [[ -s $saved ]]; then
    fields=
    while read -r line; do
        case $line in
            PR_REG_START:*) fields= ;;
            PR_REG_END:*) echo -n "$fields" >$disk/pr/res_aptpl_metadata || echo "storage: cannot restore $fields" ;;
            *) fields+=${fields:+,}${line// /} ;;
        esac
    done <"$saved"
fi

iqn=iqn.2024-01.org.csvfs:storage
tpg=$target/iscsi/$iqn/tpgt_1
mkdir -p $target/iscsi $tpg
mkdir -p $tpg/lun/lun_1
ln -s $disk $tpg/lun/lun_1/port
echo 0 >$tpg/attrib/authentication
echo 0 >$tpg/attrib/generate_node_acls
echo 0 >$tpg/attrib/demo_mode_write_protect
for node in g1 g2 g3; do
    acl=$tpg/acls/iqn.2024-01.org.csvfs:$node
    mkdir -p $acl/lun_1
    ln -s $tpg/lun/lun_1 $acl/lun_1/default
done
mkdir "$tpg/np/0.0.0.0:3260"
echo 1 >$tpg/enable

/csv/own/agent guest /dev/vport*p1 &
while :; do wait -n || sleep 1; done
