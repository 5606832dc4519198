#!/bin/bash
# Boots a virtual machine whose disk lies on the cluster volume, first from one node, then from another, and checks
# that the second boot reads what the first one wrote.
#
#   scripts/vm-demo.sh [--lab NAME] [FIRST_NODE [SECOND_NODE]]
#
# The machine is made of Debian's own kernel package (unpacked, not installed) and a busybox root in a raw ext4 image
# (made by mkfs.ext4 -d, so nothing is mounted). Kernel and image are kept in target/vm; the script may run again.
set -euo pipefail
cd "$(dirname "$0")/.."

lab=()
if [[ ${1:-} == --lab ]]; then
    lab=(--name "$2")
    shift 2
fi
first=${1:-n1}
second=${2:-n3}
csvctl=${CSVCTL:-target/release/csvctl}
volume=/ClusterStorage/Volume1
boot_limit_s=180
vm=$PWD/target/vm
mkdir -p "$vm"

die() { echo "vm-demo: $*" >&2; exit 1; }

# Debian's kernel and the modules for a virtio disk with ext4, as an initramfs.
make_kernel() {
    [[ -s $vm/vmlinuz && -s $vm/initrd.gz ]] && return
    echo "vm-demo: fetching and unpacking Debian's kernel" >&2
    local work package version root module path
    work=$(mktemp -d "$vm/kernel.XXXXXX")
    find_package() { apt-cache depends linux-image-amd64 2>/dev/null | awk '/Depends: linux-image-/ {print $2; exit}'; }
    package=$(find_package)
    if [[ -z $package ]] || ! (cd "$work" && apt-get download -q "$package" >/dev/null 2>&1); then
        apt-get update -q >/dev/null 2>&1 || die "apt-get update failed; is there a network?"
        package=$(find_package)
        [[ -n $package ]] || die "apt knows no linux-image-amd64"
        (cd "$work" && apt-get download -q "$package" >/dev/null) || die "cannot download $package"
    fi
    dpkg-deb -x "$work"/*.deb "$work/tree"
    version=$(ls "$work/tree/lib/modules")
    depmod -b "$work/tree" "$version"

    root=$work/initrd
    mkdir -p "$root"/{bin,dev,proc,sys,disk,modules}
    cp "$(command -v busybox)" "$root/bin/busybox"
    # In the order in which they must be loaded, each once.
    for module in virtio_pci virtio_blk crc32c_generic ext4; do
        modprobe -d "$work/tree" -S "$version" --show-depends "$module"
    done | awk '$1 == "insmod" && !seen[$2]++ {print $2}' >"$work/modules"
    while read -r path; do
        cp "$path" "$root/modules/"
        basename "$path" >>"$root/modules/order"
    done <"$work/modules"
    cat >"$root/init" <<'INIT'
#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
while read -r module; do busybox insmod "/modules/$module"; done </modules/order
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 100 ]; do busybox usleep 100000; tries=$((tries + 1)); done
busybox mount -t ext4 /dev/vda /disk && exec busybox switch_root /disk /init
echo "vm-demo-guest: no disk"
busybox poweroff -f
INIT
    chmod +x "$root/init"
    (cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) >"$work/initrd.gz"
    mv "$work/initrd.gz" "$vm/initrd.gz"
    cp "$work/tree/boot/vmlinuz-$version" "$vm/vmlinuz"
    rm -rf "$work"
}

# The disk of the guest: a busybox root with an /init that leaves a line per boot.
make_image() {
    local root
    root=$(mktemp -d "$vm/root.XXXXXX")
    mkdir -p "$root"/{bin,dev,proc,sys,tmp}
    cp "$(command -v busybox)" "$root/bin/busybox"
    cat >"$root/init" <<'INIT'
#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
read -r cmdline </proc/cmdline
node=${cmdline##*csv_node=}
node=${node%% *}
echo "vm-demo-guest: running from a disk on the cluster volume, started on $node"
echo "boot on $node" >>/boots
busybox sync
echo 3 >/proc/sys/vm/drop_caches
while read -r line; do echo "vm-demo-guest: /boots has: $line"; done </boots
busybox mount -o remount,ro / && echo "vm-demo-guest: done"
busybox sync
busybox poweroff -f
INIT
    chmod +x "$root/init"
    rm -f "$vm/disk.img"
    mkfs.ext4 -q -F -d "$root" "$vm/disk.img" 64M >/dev/null
    rm -rf "$root"
}

# Boots the guest on a node; its console goes to the file named.
boot() {
    local node=$1 console=$2 started=$SECONDS
    timeout "$boot_limit_s" "$csvctl" lab exec "${lab[@]}" "$node" -- \
        qemu-system-x86_64 -accel tcg,thread=multi,tb-size=128 -cpu max -smp 1 -m 256 \
        -nodefaults -no-reboot -display none -serial stdio \
        -kernel "$vm/vmlinuz" -initrd "$vm/initrd.gz" \
        -append "console=ttyS0 quiet panic=-1 csv_node=$node" \
        -drive "file=$volume/vm-demo.img,format=raw,if=virtio,cache=none" \
        </dev/null >"$console" 2>&1 || { tail -n 20 "$console" >&2; die "the guest on $node failed; its console is $console"; }
    grep -a '^vm-demo-guest' "$console" | tr -d '\r' || true
    grep -aq 'vm-demo-guest: done' "$console" || die "the guest on $node did not finish; its console is $console"
    echo "vm-demo: the guest ran on $node for $((SECONDS - started)) s"
}

make_kernel
make_image
echo "vm-demo: copying the guest's disk to $volume/vm-demo.img from $first"
"$csvctl" lab exec "${lab[@]}" "$first" -- dd if="$vm/disk.img" of="$volume/vm-demo.img" bs=1M conv=fsync status=none
boot "$first" "$vm/console-1"
boot "$second" "$vm/console-2"
grep -aq "boots has: boot on $first" "$vm/console-2" || die "$second does not see what the guest wrote on $first"
grep -aq "boots has: boot on $second" "$vm/console-2" || die "the guest does not see its own write on $second"
echo "vm-demo: ok, the guest on $second read what it had written on $first"
