#!/bin/busybox sh
# The guest's first program: mounts the disk, counts on it until the power button is pressed, unmounts it.
b=/bin/busybox
say() { echo "csv-counter: $* ok"; }
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
while read -r module; do
    case $module in
        virtio.ko | virtio_ring.ko | virtio_pci*.ko | virtio_blk.ko | *crc*.ko | mbcache.ko | jbd2.ko | ext4.ko | button.ko | evdev.ko)
            $b insmod "/modules/$module" || say "failed insmod $module"
            ;;
    esac
done </modules/order.node

for input in /sys/class/input/event*; do
    read -r name <"$input/device/name"
    [ "$name" = "Power Button" ] && button=/dev/input/${input##*/}
done
[ -n "$button" ] || say "failed no power button"
$b mkdir /disk
$b mount -t ext4 /dev/vda /disk || say "failed no disk"
/bin/csv-test-counter /disk/journal "$button" || say "failed the counter"
$b umount /disk && say unmounted
$b poweroff -f
