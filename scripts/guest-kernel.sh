#!/bin/bash
# Makes a kernel and an initramfs for guests (`make test-vm`, tests of virtual machines) from Debian's kernel package, which
# is unpacked, not installed: DIR/vmlinux (a plain ELF file, which QEMU starts without a boot loader, in half the time of
# vmlinuz), DIR/initrd.gz. Does nothing when both are there and as new as this script.
#
#   scripts/guest-kernel.sh DIR
#
# csvfs needs Linux 6.6; where the distribution's own kernel is older (Debian 12), the one of its backports is taken,
# without a change to the machine's package sources.
#
# Exit status 3: the package cannot be had here (no network, another distribution).
set -euo pipefail

self=$(realpath "$0")
mkdir -p "$1"
dir=$(realpath "$1")

say() { echo "guest-kernel: $*" >&2; }
unavailable() { say "$*"; exit 3; }

[[ $dir/initrd.gz -nt $self && -s $dir/vmlinux ]] && exit 0

# In the order in which they must be loaded; modprobe adds what they depend on.
COMMON=(virtio_pci virtio_net virtio_blk virtio_console virtio_rng 9pnet_virtio 9p overlay crc32c_generic ext4 button evdev)
NODE=(virtio_scsi sd_mod sg dm_mod fuse)
STORAGE=(configfs target_core_mod target_core_iblock iscsi_target_mod)

command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || unavailable "this is not Debian"
command -v busybox >/dev/null || unavailable "busybox is missing"

work=$(mktemp -d "$dir/work.XXXXXX")
trap 'rm -rf "$work"' EXIT

KERNEL_MIN=6.6
apt=() # options of apt's programs
find_package() {
    apt-cache "${apt[@]}" depends linux-image-amd64 2>/dev/null | awk '/Depends: linux-image-/ {print $2; exit}'
}
download() { (cd "$work" && apt-get "${apt[@]}" download -q "$1" >/dev/null 2>&1); }
too_old() { [[ $(printf '%s\n' "$KERNEL_MIN" "${1#linux-image-}" | sort -V | head -n 1) != "$KERNEL_MIN" ]]; }

use_backports() {
    local codename
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    mkdir -p "$work"/apt/{lists,cache/archives}/partial
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $codename-backports main" \
        >"$work/apt/sources.list"
    apt=(-o "Dir::Etc::sourcelist=$work/apt/sources.list" -o Dir::Etc::sourceparts=-
        -o "Dir::State::lists=$work/apt/lists" -o "Dir::Cache=$work/apt/cache")
    apt-get "${apt[@]}" update -q >/dev/null 2>&1 || unavailable "cannot read the packages of $codename-backports"
    package=$(find_package)
    [[ -n $package ]] && ! too_old "$package" || unavailable "no kernel of $KERNEL_MIN or later in $codename-backports"
}

say "fetching and unpacking Debian's kernel"
package=$(find_package)
if [[ -n $package ]] && too_old "$package"; then
    use_backports
fi
if [[ -z $package ]] || ! download "$package"; then
    apt-get update -q >/dev/null 2>&1 || unavailable "apt-get update failed; is there a network?"
    package=$(find_package)
    [[ -n $package ]] || unavailable "apt knows no linux-image-amd64"
    if too_old "$package"; then
        use_backports
    fi
    download "$package" || unavailable "cannot download $package"
fi
say "$package"
dpkg-deb -x "$work"/*.deb "$work/tree"
version=$(ls "$work/tree/lib/modules")
depmod -b "$work/tree" "$version"

# The compressed kernel lies in vmlinuz behind a small loader: the first place that unpacks to an ELF file is it.
unpack_kernel() {
    local image=$1 magic tool offset
    while read -r magic tool; do
        for offset in $(LC_ALL=C grep -abo -P "$magic" "$image" | cut -d: -f1); do
            tail -c +$((offset + 1)) "$image" | $tool 2>/dev/null >"$work/vmlinux" || true
            [[ $(head -c 4 "$work/vmlinux" | tail -c 3) == ELF ]] && return
        done
    done <<'TOOLS'
\xfd7zXZ\x00 xz -dc --single-stream
\x28\xb5\x2f\xfd zstd -dc
\x1f\x8b\x08 gzip -dc
TOOLS
    say "no ELF file in $image"
    return 1
}
unpack_kernel "$work/tree/boot/vmlinuz-$version"

root=$work/initrd
mkdir -p "$root"/{bin,dev,proc,sys,host,rw,root,modules}
cp "$(command -v busybox)" "$root/bin/busybox"

# insmod lines of a role, each module once.
modules() {
    local module
    for module in "$@"; do
        modprobe -d "$work/tree" -S "$version" --show-depends "$module"
    done | awk '$1 == "insmod" && !seen[$2]++ {print $2}'
}
for role in NODE STORAGE; do
    declare -n own=$role
    modules "${COMMON[@]}" "${own[@]}" | while read -r path; do
        name=$(basename "$path")
        name=${name%%.ko*}.ko
        # busybox's insmod takes them only unpacked.
        case $path in
            *.xz) xz -dc "$path" ;;
            *.zst) zstd -dcq "$path" ;;
            *) cat "$path" ;;
        esac >"$root/modules/$name"
        echo "$name"
    done >"$root/modules/order.${role,,}"
done

# The machine's own root, read-only, with a layer in memory above it; then the guest's own /csv/own/init.
cat >"$root/init" <<'INIT'
#!/bin/busybox sh
b=/bin/busybox
fail() { echo "guest: $*"; $b poweroff -f; }
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for word in $($b cat /proc/cmdline); do
    case $word in csv.role=*) role=${word#csv.role=} ;; esac
done
while read -r module; do $b insmod "/modules/$module" || echo "guest: cannot load $module"; done <"/modules/order.$role"
share() { $b mount -t 9p -o "trans=virtio,version=9p2000.L,msize=262144,$3" "$1" "$2" || fail "cannot mount share $1"; }
share host /host ro,cache=loose
$b mount -t tmpfs -o mode=0755 rw /rw
$b mkdir /rw/upper /rw/work
$b mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work overlay /root || fail "cannot mount the root"
$b mkdir -p /root/csv/bin /root/csv/own
share bin /root/csv/bin ro,cache=none
share own /root/csv/own rw,cache=none
for dir in proc sys dev; do $b mount --move /$dir /root/$dir; done
exec $b switch_root /root /csv/own/init
fail "cannot start /csv/own/init"
INIT
chmod +x "$root/init"
(cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) >"$work/initrd.gz"
mv "$work/vmlinux" "$dir/vmlinux"
mv "$work/initrd.gz" "$dir/initrd.gz"
