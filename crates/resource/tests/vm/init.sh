#!/bin/busybox sh
# The guest's only program. What it does stands on the kernel's command line, in words vm.NAME.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
read -r cmdline </proc/cmdline
asked() { case " $cmdline " in *" vm.$1 "*) true ;; *) false ;; esac; }

asked button && (
    # The disk is clean afterwards, or this says so.
    /button && echo "guest: button" && echo >/stop
) &

while read -r module; do
    case $module in
        virtio_blk* | crc* | mbcache* | jbd2* | ext4*) $b insmod "/modules/$module" 2>/dev/null ;;
    esac
done </modules/order.node

# An agent in a few lines: enough for a heartbeat.
agent() {
    answered=0
    for port in /dev/vport*p1; do exec 3<>"$port"; done
    while true; do
        if ! read -r line <&3; then
            $b usleep 50000
            continue
        fi
        asked agent-dies && [ $answered -ge 2 ] && continue
        case $line in
            *guest-sync-delimited*)
                id=${line##*\"id\":}
                $b printf '\377{"return": %s}\n' "${id%%\}*}" >&3
                ;;
            *guest-ping*)
                $b printf '{"return": {}}\n' >&3
                answered=$((answered + 1))
                ;;
        esac
    done
}
asked agent && agent &

echo "guest: up"
if asked poweroff; then
    $b poweroff -f
fi
if asked count; then
    $b mkdir /disk /disk1
    $b mount -t ext4 /dev/vda /disk || echo "guest: error: no disk"
    [ -b /dev/vdb ] && { $b mount -t ext4 /dev/vdb /disk1 || echo "guest: error: no second disk"; }
    last=0
    [ -e /disk/counter ] && last=$($b tail -n 1 /disk/counter)
    while [ ! -e /stop ]; do
        last=$((last + 1))
        echo $last >>/disk/counter || echo "guest: error: write"
        [ -b /dev/vdb ] && echo $last >>/disk1/counter
        # The console tells only of what is durable.
        $b sync || echo "guest: error: sync"
        echo "guest: count $last"
        $b usleep 200000
    done
    for disk in /disk /disk1; do $b mountpoint -q $disk && $b umount $disk; done
    $b poweroff -f
fi
if asked fill; then
    $b mkdir /disk
    $b mount -t ext4 /dev/vda /disk || echo "guest: error: no disk"
    $b dd if=/dev/urandom of=/disk/big bs=1M count=8 conv=fsync 2>/dev/null && echo "guest: filled"
fi
while [ ! -e /stop ]; do $b usleep 100000; done
$b poweroff -f
